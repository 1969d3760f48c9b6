"""EDM2, the class-conditional denoiser of arXiv 2312.02696 (configuration G), and its adapter.

    D(x; sigma) = c_skip x + c_out F(c_in x, c_noise)     c_noise = ln(sigma) / 4, sd = 0.5
    c_skip = sd^2 / (sigma^2 + sd^2)     c_out = sigma sd / sqrt(sigma^2 + sd^2)
    c_in = 1 / sqrt(sigma^2 + sd^2)                       (arXiv 2206.00364, eq. 7)
F keeps magnitudes: every weight is normalised when it is used (eqs. 47, 66), and so is every silu,
sum and concatenation (eqs. 81, 88, 103); figure 21 shows it whole. Left out on purpose: dropout,
fp16, writing normalised weights back, and the log-variance head, whose weights are only kept.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, interpolate, one_hot, silu

from bases.edm2_pickle import (
    CLIP,
    CONCAT_BALANCE,
    FIXED,
    LABEL_BALANCE,
    RESIDUAL_BALANCE,
    SIGMA_DATA,
    read_snapshot,
    unreadable,
)
from bases.files import class_ids, class_names
from bases.generator import Generator, _libraries, _part
from bases.lora import weight_change
from sampling import EDM

# Shapes: B pictures of C channels and R x R pixels, E numbers in an embedding of noise and label.

# --------------------------------------------------------------------------------------------------
# Operations that keep the magnitude: unit variance in, unit variance out.


def normalize(x, dims, eps=1e-4):
    """x / (eps + its root mean square over `dims`), of the same shape (eq. 47)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype)
    root_mean_square = norm * math.sqrt(norm.numel() / x.numel())
    return x / (eps + root_mean_square).to(x.dtype)


def mp_silu(x):
    """silu at unit variance: 0.596^2 = E[silu(z)^2] for z ~ N(0, 1) (eq. 81)."""
    return silu(x) / 0.596


def mp_sum(a, b, t):
    """(1 - t) a + t b, at the magnitude of a and b if these are uncorrelated (eq. 88)."""
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a, b, t):
    """a [B, Na, ...] and b [B, Nb, ...] joined to [B, Na + Nb, ...].

    a counts 1 - t and b counts t, whatever their widths (eq. 103).
    """
    Na = a.shape[1]
    Nb = b.shape[1]
    scale = math.sqrt((Na + Nb) / ((1 - t) ** 2 + t**2))
    a = a * (scale * (1 - t) / math.sqrt(Na))
    b = b * (scale * t / math.sqrt(Nb))
    return torch.cat([a, b], 1)


class Fourier(nn.Module):
    """Random Fourier features of a number, [B] -> [B, channels] (eq. 75).

    Frequencies and phases are constants, so they are buffers.
    """

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, c):
        return math.sqrt(2) * torch.cos(c[:, None] * self.freqs + self.phases)


class Layer(nn.Module):
    """A convolution (kernel > 0) or a linear map (kernel 0) whose weight counts by direction only.

    It has no bias (eqs. 47, 66). A forward never changes the stored weight. Published training
    writes the normalised weight back in train() mode; under RL a rollout and its update would then
    have different networks, and log-probs must not depend on the mode they are computed in.
    """

    lora_on = False  # whether it has a LoRA now, whose change is added to the weight (lora.py)

    def __init__(self, in_channels, out_channels, kernel):
        super().__init__()
        window = (kernel, kernel) if kernel else ()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *window))

    def forward(self, x, gain=1.0):
        weight = self.weight
        if self.lora_on:
            weight = weight + weight_change(self)
        fan_in = weight[0].numel()
        inputs = tuple(range(1, weight.dim()))
        w = normalize(weight, inputs) * (gain / math.sqrt(fan_in))
        if w.dim() == 2:
            return x @ w.T
        return conv2d(x, w, padding=w.shape[-1] // 2)


# --------------------------------------------------------------------------------------------------
# The network. Names in its state dict are the published ones.


class Block(nn.Module):
    """One residual block of figure 21: x [B, in, H, W], emb [B, E] -> [B, out, H, W].

    `resample` "down" halves H and W, "up" doubles them. An encoder block widens and normalises its
    main path first, a decoder block widens it last. Attention if head_channels is not 0.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        emb_channels,
        encoder,
        resample=None,
        head_channels=0,
    ):
        super().__init__()
        if head_channels and out_channels % head_channels:
            raise ValueError(
                f"{out_channels} channels do not divide into heads of {head_channels}; "
                "give the channels_per_head of its training"
            )
        self.encoder = encoder
        self.resample = resample
        self.head_channels = head_channels
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.emb_linear = Layer(emb_channels, out_channels, 0)
        self.conv_res0 = Layer(out_channels if encoder else in_channels, out_channels, 3)
        self.conv_res1 = Layer(out_channels, out_channels, 3)
        if in_channels != out_channels:
            self.conv_skip = Layer(in_channels, out_channels, 1)
        else:
            self.conv_skip = nn.Identity()
        if head_channels:
            self.attn_qkv = Layer(out_channels, 3 * out_channels, 1)
            self.attn_proj = Layer(out_channels, out_channels, 1)

    def forward(self, x, emb):
        if self.resample == "down":
            x = avg_pool2d(x, 2)
        elif self.resample == "up":
            x = interpolate(x, scale_factor=2, mode="nearest")
        if self.encoder:
            x = normalize(self.conv_skip(x), 1)

        # The residual path, scaled channel by channel by noise level and label.
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, self.emb_gain) + 1
        y = mp_silu(y * scale[:, :, None, None])
        y = self.conv_res1(y)

        if not self.encoder:
            x = self.conv_skip(x)
        x = mp_sum(x, y, RESIDUAL_BALANCE)
        if self.head_channels:
            x = mp_sum(x, self.attn_proj(self.attend(x)), RESIDUAL_BALANCE)
        return x.clamp(-CLIP, CLIP)

    def attend(self, x):
        """Cosine attention over the pixels, x [B, C, H, W] -> the same shape.

        Spelled out, because a fused kernel may be another one, with other rounding, under no_grad.
        """
        qkv = self.attn_qkv(x).unflatten(1, (-1, self.head_channels, 3))
        qkv = qkv.flatten(4)  # [B, heads, head_channels, 3, pixels]
        q, k, v = normalize(qkv, 2).unbind(3)  # each [B, heads, head_channels, pixels]
        scores = torch.einsum("bhcq,bhck->bhqk", q, k / math.sqrt(self.head_channels))
        weights = scores.softmax(3)
        return torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(x.shape)


class Level(NamedTuple):
    """The blocks of a U-Net that work at one resolution."""

    resolution: int
    width: int  # channels
    head_channels: int  # 0: no attention at this level


class UNet(nn.Module):
    """F of the header, from the highest resolution down and up again.

    levels are in the order of falling resolution. The lowest has attention in its middle, with
    heads of channels_per_head, whatever its level says.
    """

    def __init__(self, img_channels, label_dim, levels, num_blocks, channels_per_head):
        super().__init__()
        emb = max(level.width for level in levels)
        width = levels[0].width  # of what the next block takes
        self.emb_fourier = Fourier(width)
        self.emb_noise = Layer(width, emb, 0)
        if label_dim:
            self.emb_label = Layer(label_dim, emb, 0)
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        skips = []  # widths of what the encoder hands to the decoder

        for level in levels:
            name = f"{level.resolution}x{level.resolution}"
            if level is levels[0]:
                self.enc[f"{name}_conv"] = Layer(img_channels + 1, width, 3)
            else:
                self.enc[f"{name}_down"] = Block(width, width, emb, True, "down")
            skips.append(width)
            for i in range(num_blocks):
                block = Block(width, level.width, emb, True, None, level.head_channels)
                self.enc[f"{name}_block{i}"] = block
                width = level.width
                skips.append(width)

        for level in reversed(levels):
            name = f"{level.resolution}x{level.resolution}"
            if level is levels[-1]:
                self.dec[f"{name}_in0"] = Block(width, width, emb, False, None, channels_per_head)
                self.dec[f"{name}_in1"] = Block(width, width, emb, False)
            else:
                self.dec[f"{name}_up"] = Block(width, width, emb, False, "up")
            for i in range(num_blocks + 1):
                joined = width + skips.pop()
                block = Block(joined, level.width, emb, False, None, level.head_channels)
                self.dec[f"{name}_block{i}"] = block
                width = level.width
        self.out_conv = Layer(width, img_channels, 3)
        self.out_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x, c_noise, embedding):
        """x [B, C, R, R], c_noise [B], label embedding [B, E] or None -> [B, C, R, R]."""
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if embedding is not None:
            emb = mp_sum(emb, embedding, LABEL_BALANCE)
        emb = mp_silu(emb)  # [B, E]

        ones = torch.ones_like(x[:, :1])  # they stand in for biases
        x = torch.cat([x, ones], 1)
        skips = []
        for name, layer in self.enc.items():
            if name.endswith("_conv"):
                x = layer(x)
            else:
                x = layer(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            if "_block" in name:
                x = mp_cat(x, skips.pop(), CONCAT_BALANCE)
            x = block(x, emb)
        return self.out_conv(x, self.out_gain)


class EDM2(nn.Module):
    """The denoiser: model(x, sigma, labels) -> the expected clean latents, of the shape of x.

    The arguments are the published ones. Raises ValueError for those that make no network.
    """

    def __init__(
        self,
        img_resolution,
        img_channels,
        label_dim,
        model_channels,
        channel_mult,
        num_blocks,
        attn_resolutions,
        channels_per_head=64,
    ):
        super().__init__()
        halvings = len(channel_mult) - 1
        is_empty = halvings < 0 or num_blocks < 1 or channels_per_head < 1
        if is_empty or img_resolution % 2**halvings:
            raise ValueError(
                f"no network: {img_resolution=} {channel_mult=} {num_blocks=} {channels_per_head=}"
            )
        levels = []
        for depth, multiple in enumerate(channel_mult):
            resolution = img_resolution >> depth
            head_channels = channels_per_head if resolution in attn_resolutions else 0
            levels.append(Level(resolution, model_channels * multiple, head_channels))

        self.shape = (img_channels, img_resolution, img_resolution)
        self.label_dim = label_dim
        self.channels_per_head = channels_per_head
        self.unet = UNet(img_channels, label_dim, levels, num_blocks, channels_per_head)
        # The log-variance head of the published training: kept in the file, never trained.
        self.logvar_fourier = Fourier(128)
        self.logvar_linear = nn.Module()
        self.logvar_linear.register_buffer("weight", torch.randn(1, 128))

    def embed(self, labels):
        """Labels, one-hot [B, label_dim] -> label embedding [B, E]. Raises ValueError."""
        if not self.label_dim or labels.dim() != 2 or labels.shape[1] != self.label_dim:
            raise ValueError(
                f"labels of shape {list(labels.shape)} for {self.label_dim} classes: "
                f"give one-hot [B, {self.label_dim}]"
            )
        return self.unet.emb_label(labels * math.sqrt(self.label_dim))

    def forward(self, x, sigma, labels=None, embedding=None):
        """x [B, C, R, R], sigma > 0 a number or [B] -> [B, C, R, R].

        labels: one-hot [B, label_dim]; None: zeros, the null label. To put noise on the condition
        pass `embedding` [B, E] instead, made from `embed`. Raises ValueError if that does not fit.
        """
        if embedding is not None:
            if labels is not None or not self.label_dim:
                raise ValueError(
                    "give labels or their embedding, not both, and neither to a network "
                    "without classes"
                )
        elif labels is not None:
            embedding = self.embed(labels)
        elif self.label_dim:
            null_label = x.new_zeros(1, self.label_dim)
            embedding = self.embed(null_label)

        sigma = torch.as_tensor(sigma, device=x.device).to(x.dtype).reshape(-1, 1, 1, 1)
        total = sigma**2 + SIGMA_DATA**2
        c_skip = SIGMA_DATA**2 / total
        c_out = sigma * SIGMA_DATA / total.sqrt()
        c_noise = sigma.log().flatten() / 4
        f = self.unet(x / total.sqrt(), c_noise, embedding)
        return c_skip * x + c_out * f.to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Files.


def arguments_of(state, channels_per_head=64):
    """EDM2's arguments, as a dict, from the names and shapes of a state dict.

    No shape tells channels_per_head. Raises ValueError if it is not the state dict of an EDM2.
    """
    # The first layer is called, for example, 64x64_conv.
    first_layer = re.compile(r"unet\.enc\.([1-9]\d{0,4})x\1_conv\.weight")
    resolution = 0
    for match in map(first_layer.fullmatch, state):
        if match:
            resolution = max(resolution, int(match[1]))

    # Each level halves the resolution, as far as there are blocks.
    prefixes = {}
    for depth in range(resolution.bit_length()):
        level = resolution >> depth
        prefixes[level] = f"unet.enc.{level}x{level}_block"
    widths = []
    attn_resolutions = []
    for level, prefix in prefixes.items():
        if f"{prefix}0.conv_res1.weight" in state:
            widths.append(len(state[f"{prefix}0.conv_res1.weight"]))
        if f"{prefix}0.attn_qkv.weight" in state:
            attn_resolutions.append(level)
    if not widths or "unet.out_conv.weight" not in state:
        raise ValueError("its names are not those of EDM2")
    num_blocks = 0
    for name in state:
        if name.startswith(prefixes[resolution]) and name.endswith("conv_res1.weight"):
            num_blocks += 1
    label_dim = 0
    if "unet.emb_label.weight" in state:
        label_dim = state["unet.emb_label.weight"].shape[-1]

    model_channels = math.gcd(*widths)
    arguments = {
        "img_resolution": resolution,
        "img_channels": len(state["unet.out_conv.weight"]),
        "label_dim": label_dim,
        "model_channels": model_channels,
        "channel_mult": [width // model_channels for width in widths],
        "num_blocks": num_blocks,
        "attn_resolutions": attn_resolutions,
        "channels_per_head": channels_per_head,
    }
    check_state(state, arguments)
    return arguments


def check_state(state, arguments):
    """Raises ValueError unless a state dict is that of EDM2(**arguments), of finite floats."""
    with torch.device("meta"):  # shapes without memory
        expected = EDM2(**arguments).state_dict()
    expected = {name: list(tensor.shape) for name, tensor in expected.items()}
    for name in sorted(expected.keys() | state.keys()):
        shape = list(state[name].shape) if name in state else None
        if shape != expected.get(name):
            raise ValueError(
                f"{name} has shape {shape}, and {expected.get(name)} in an EDM2 network of "
                "these levels"
            )
        if not state[name].is_floating_point() or not state[name].isfinite().all():
            raise ValueError(f"{name} holds values that are not finite numbers")


def check(path, channels_per_head=None):
    """The network of a file -> its state dict (in the file's dtypes), EDM2's arguments (a dict).

    Raises ValueError, in one line, for what `load` cannot use or should not.
    """
    path = Path(path)
    if path.suffix not in (".pkl", ".safetensors") or not path.is_file():
        raise ValueError(
            f"{path}: no such .pkl or .safetensors file; give a released snapshot or a file "
            "written by edm2.save"
        )
    try:
        if path.suffix == ".pkl":
            state, stated = read_snapshot(path)
        else:
            state, stated = read_safetensors(path)
        if len(stated) > 1:
            raise ValueError(f"its attention heads have the widths {sorted(stated)}")
        width = channels_per_head or next(iter(stated), 64)
        return state, arguments_of(state, width)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise unreadable(path, error) from None


def read_safetensors(path):
    """A file of `save` -> its state dict, the width of its heads (a set of one)."""
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() or {}
    for name, value in FIXED.items():
        if metadata.get(name, str(value)) != str(value):
            raise ValueError(f"it says {name} {metadata[name]}; known here: {value}")
    return state, {int(metadata.get("channels_per_head", 64))}


def load(path, channels_per_head=None):
    """The network of a released snapshot (.pkl) or of a file of `save`, in float32 and in eval().

    channels_per_head None: what the file says, or 64 if it says nothing. Raises ValueError as
    `check` does.
    """
    state, arguments = check(path, channels_per_head)
    with torch.device("meta"):
        network = EDM2(**arguments)
    weights = {name: tensor.float() for name, tensor in state.items()}
    network.load_state_dict(weights, assign=True)
    return network.eval()


def save(network, path):
    """Writes the state dict as .safetensors, with the one argument that no shape tells."""
    save_file(network.state_dict(), path, {"channels_per_head": str(network.channels_per_head)})


# --------------------------------------------------------------------------------------------------
# The adapter.

# EDM2's latents have mean 0 and std 0.5 in each channel.
# Those of the VAE (sd-vae-ft-mse, unscaled) have these:
RAW_MEAN = (5.81, 3.25, 0.12, -2.15)
RAW_STD = (4.17, 4.62, 3.71, 3.28)


def latents_to_vae(x):
    """Latents x [B, 4, H, W] of EDM2 -> what the VAE's decoder takes.

    The decoder's output is a picture in [0, 1] already; clamp it.
    """
    std = x.new_tensor(RAW_STD)[:, None, None]
    mean = x.new_tensor(RAW_MEAN)[:, None, None]
    return x * std / SIGMA_DATA + mean


class EDM2Generator(Generator):
    """EDM2 with classes for prompts; the null label is zeros.

    The embedding of the class is what takes prompt noise. `guide` is the file of a second network
    which guides this one, as published; its prediction stands in for the null prompt's.
    """

    initial_std = 80.0  # sigma_max

    def __init__(self, file, device, precision, decode_batch, guide=None):
        super().__init__(file.parent, device, precision, decode_batch)
        self.network = load(file).to(device)
        self.path = EDM
        self.shape = self.network.shape
        self.guide_network = None
        self.guide = None  # `sampling.predict` looks for it
        if guide:
            self.guide_network = load(guide).to(device).requires_grad_(False)
            self.guide = self.weaker
        diffusers, _ = _libraries()
        self.vae = _part(diffusers.AutoencoderKL, self.folder / "vae", device)
        self.names = class_names(self.folder, self.network.label_dim)

    def __call__(self, x_t, t, prompt):
        return self.predict(self.network, x_t, t, prompt[0])

    def predict(self, network, x_t, t, embedding):
        with self.autocast():
            x0_hat = network(x_t, t, embedding=embedding).float()
        return x0_hat, (x_t - x0_hat) / t.reshape(-1, 1, 1, 1)

    @torch.no_grad()
    def weaker(self, x_t, t, prompt):
        """The guide's prediction at the same prompt, or at none if it knows no classes."""
        embedding = prompt[1] if self.guide_network.label_dim else None
        return self.predict(self.guide_network, x_t, t, embedding)

    def embed(self, texts):
        ids = class_ids(self.folder / "classes.txt", self.names, texts, self.network.label_dim)
        ids = torch.tensor(ids, device=self.device)
        # The null label has the number label_dim; without the last column it is zeros.
        labels = one_hot(ids, self.network.label_dim + 1)[:, :-1].float()
        embeddings = [self.network.embed(labels)]
        if self.guide_network and self.guide_network.label_dim:
            embeddings.append(self.guide_network.embed(labels))
        return tuple(embeddings)

    def picture(self, z):
        return self.vae.decode(latents_to_vae(z), return_dict=False)[0]

    def save(self, folder, weights=None):
        facts = {"channels_per_head": self.network.channels_per_head}
        self.save_own(folder, "edm2", facts, weights)
        if self.guide_network:
            save(self.guide_network, Path(folder) / "guide.safetensors")
