"""EDM2: the class-conditional denoiser of arXiv 2312.02696 (configuration G), and a safe reader of its released snapshots.

    D(x; sigma) = c_skip x + c_out F(c_in x, c_noise)        c_noise = ln(sigma) / 4, sd = 0.5 (arXiv 2206.00364, eq. 7)
    c_skip = sd^2 / (sigma^2 + sd^2)     c_out = sigma sd / sqrt(sigma^2 + sd^2)     c_in = 1 / sqrt(sigma^2 + sd^2)
F preserves magnitudes: every weight is normalised when it is used (eqs. 47, 66), and so is every silu, sum and concatenation (eqs. 81,
88, 103); figure 21 shows it whole. Names in the state dict are the published ones. Left out on purpose: the log-variance head (its
weights are only carried along), dropout, fp16, and writing the normalised weights back, which belong to training from scratch.
"""
import math
import re
import torch
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import avg_pool2d
from torch.nn.functional import conv2d
from torch.nn.functional import interpolate
from torch.nn.functional import one_hot
from torch.nn.functional import silu
from bases.edm2_pickle import ADMITTED, CLIP, CONCAT_BALANCE, LABEL_BALANCE, RESIDUAL_BALANCE, SIGMA_DATA, _collect, _unpickle
from bases.files import class_ids, class_names
from bases.generator import Generator, _libraries, _part
from bases.lora import weight_change
from sampling import EDM

class EDM2Generator(Generator):
    """EDM2 (arXiv 2312.02696, edm2.py); prompts are classes, and their embedding is what takes noise; the null label is zeros."""
    initial_std = 80.0                                                   # sigma_max

    def __init__(self, file, device, precision, decode_batch, guide=None):
        super().__init__(file.parent, device, precision, decode_batch)
        self.network, self.path = load(file).to(device), EDM
        self.guide_network = load(guide).to(device).requires_grad_(False) if guide else None
        self.guide = self.weaker if guide else None                      # stands in for the null prompt in `sampling.predict`
        self.vae, self.names = _part(_libraries()[0].AutoencoderKL, self.folder / "vae", device), class_names(self.folder, self.network.label_dim)
        side = int(next(iter(self.network.unet.enc)).split("x")[0])      # the first layer is called 64x64_conv
        self.shape = (len(self.network.unet.out_conv.weight), side, side)

    def __call__(self, x_t, t, prompt):
        return self.predict(self.network, x_t, t, prompt[0])

    def predict(self, network, x_t, t, embedding):
        with self.autocast():
            x0_hat = network(x_t, t, embedding=embedding).float()
        return x0_hat, (x_t - x0_hat) / t.reshape(-1, 1, 1, 1)

    @torch.no_grad()
    def weaker(self, x_t, t, prompt):
        """The guide's prediction at the same prompt, or at none if it knows no classes."""
        return self.predict(self.guide_network, x_t, t, prompt[1] if self.guide_network.label_dim else None)

    def embed(self, texts):
        ids = torch.tensor(class_ids(self.folder, self.names, texts, self.network.label_dim), device=self.device)
        labels = one_hot(ids, self.network.label_dim + 1)[:, :-1].float()
        return tuple(network.embed(labels) for network in (self.network, self.guide_network) if network and network.label_dim)

    def picture(self, z):
        return self.vae.decode(latents_to_vae(z), return_dict=False)[0]

    def save(self, folder, weights=None):
        self.save_own(folder, "edm2", {"channels_per_head": self.network.channels_per_head}, weights)
        if self.guide_network:
            save(self.guide_network, Path(folder) / "guide.safetensors")


def normalize(x, dims, eps=1e-4):
    """x / (eps + its root mean square over `dims`), of the same shape (eq. 47)."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (eps + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x):
    return silu(x) / 0.596                                               # eq. 81: 0.596^2 = E[silu(z)^2] for z ~ N(0, 1)


def mp_sum(a, b, t):
    """(1 - t) a + t b, at the magnitude of a and b if these are uncorrelated (eq. 88)."""
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a, b, t):
    """a [B, Na, ...] and b [B, Nb, ...] joined to [B, Na + Nb, ...]; a counts 1 - t and b counts t, whatever their widths (eq. 103)."""
    scale = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(a.shape[1])), b * (scale * t / math.sqrt(b.shape[1]))], 1)


class Fourier(nn.Module):
    """Random Fourier features of a number, [B] -> [B, channels] (eq. 75). They are constants, so buffers."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, c):
        return math.sqrt(2) * torch.cos(c[:, None] * self.freqs + self.phases)


class Layer(nn.Module):
    """A convolution (kernel > 0) or a linear map (kernel 0), without bias, whose weight counts by its direction only (eqs. 47, 66).

    The stored weight is never changed by a forward. Published training writes the normalised weight back in train() mode; under RL a
    rollout and its update would then have different networks, and the log-probs must not depend on the mode they are computed in.
    """
    lora_on = False                                                      # True: it has a LoRA (lora.py), whose change is added to the weight

    def __init__(self, in_channels, out_channels, kernel):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *[kernel] * 2 * (kernel > 0)))

    def forward(self, x, gain=1.0):
        weight = self.weight
        if self.lora_on:
            weight = weight + weight_change(self)
        w = normalize(weight, tuple(range(1, self.weight.dim()))) * (gain / math.sqrt(self.weight[0].numel()))
        return x @ w.T if w.dim() == 2 else conv2d(x, w, padding=w.shape[-1] // 2)


class Block(nn.Module):
    """One residual block of figure 21: x [B, in, H, W], emb [B, E] -> [B, out, H, W] (H and W halved or doubled by `resample`).

    An encoder block widens and normalises its main path first, a decoder block widens it last. Attention if head_channels is not 0.
    """

    def __init__(self, in_channels, out_channels, emb_channels, encoder, resample=None, head_channels=0):
        super().__init__()
        if head_channels and out_channels % head_channels:
            raise ValueError(f"{out_channels} channels do not divide into heads of {head_channels}; give the channels_per_head of its training")
        self.encoder, self.resample, self.head_channels = encoder, resample, head_channels
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.emb_linear = Layer(emb_channels, out_channels, 0)
        self.conv_res0 = Layer(out_channels if encoder else in_channels, out_channels, 3)
        self.conv_res1 = Layer(out_channels, out_channels, 3)
        self.conv_skip = Layer(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        if head_channels:
            self.attn_qkv, self.attn_proj = Layer(out_channels, 3 * out_channels, 1), Layer(out_channels, out_channels, 1)

    def forward(self, x, emb):
        if self.resample:
            x = avg_pool2d(x, 2) if self.resample == "down" else interpolate(x, scale_factor=2, mode="nearest")
        if self.encoder:
            x = normalize(self.conv_skip(x), 1)
        y = self.conv_res0(mp_silu(x))
        y = mp_silu(y * (self.emb_linear(emb, self.emb_gain) + 1)[:, :, None, None])
        y = self.conv_res1(y)
        x = mp_sum(x if self.encoder else self.conv_skip(x), y, RESIDUAL_BALANCE)
        if self.head_channels:
            x = mp_sum(x, self.attn_proj(self.attend(x)), RESIDUAL_BALANCE)
        return x.clamp(-CLIP, CLIP)

    def attend(self, x):
        """Cosine attention over the pixels. Spelled out: a fused kernel may be another one, with other rounding, under no_grad."""
        qkv = self.attn_qkv(x).unflatten(1, (-1, self.head_channels, 3)).flatten(4)
        q, k, v = normalize(qkv, 2).unbind(3)                            # each [B, heads, head_channels, pixels]
        weights = torch.einsum("bhcq,bhck->bhqk", q, k / math.sqrt(self.head_channels)).softmax(3)
        return torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(x.shape)


class UNet(nn.Module):
    """F of the header: x [B, C, R, R], c_noise [B], label embedding [B, E] or None -> [B, C, R, R]."""

    def __init__(self, img_resolution, img_channels, label_dim, model_channels, channel_mult, num_blocks, attn_resolutions, channels_per_head):
        super().__init__()
        widths, emb = [model_channels * m for m in channel_mult], model_channels * max(channel_mult)
        self.emb_fourier, self.emb_noise = Fourier(widths[0]), Layer(widths[0], emb, 0)
        if label_dim:
            self.emb_label = Layer(label_dim, emb, 0)
        levels = [(f"{res}x{res}", width, channels_per_head if res in attn_resolutions else 0)
                  for res, width in ((img_resolution >> level, width) for level, width in enumerate(widths))]
        self.enc, self.dec, skips, width = nn.ModuleDict(), nn.ModuleDict(), [], widths[0]
        for level, (res, after, heads) in enumerate(levels):
            name = f"{res}_down" if level else f"{res}_conv"
            self.enc[name] = Block(width, width, emb, True, "down") if level else Layer(img_channels + 1, width, 3)
            skips.append(width)
            for i in range(num_blocks):
                self.enc[f"{res}_block{i}"] = Block(width, after, emb, True, None, heads)
                width = after
                skips.append(width)
        self.dec[f"{res}_in0"] = Block(width, width, emb, False, None, channels_per_head)      # res is the lowest resolution now
        self.dec[f"{res}_in1"] = Block(width, width, emb, False)
        for level, (res, after, heads) in enumerate(levels[::-1]):
            if level:
                self.dec[f"{res}_up"] = Block(width, width, emb, False, "up")
            for i in range(num_blocks + 1):
                self.dec[f"{res}_block{i}"] = Block(width + skips.pop(), after, emb, False, None, heads)
                width = after
        self.out_conv, self.out_gain = Layer(width, img_channels, 3), nn.Parameter(torch.zeros(()))

    def forward(self, x, c_noise, embedding):
        emb = self.emb_noise(self.emb_fourier(c_noise))
        emb = mp_silu(emb if embedding is None else mp_sum(emb, embedding, LABEL_BALANCE))    # [B, E]
        x, skips = torch.cat([x, torch.ones_like(x[:, :1])], 1), []      # the ones stand in for biases
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("_conv") else layer(x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(mp_cat(x, skips.pop(), CONCAT_BALANCE) if "_block" in name else x, emb)
        return self.out_conv(x, self.out_gain)


class EDM2(nn.Module):
    """The denoiser: model(x, sigma, labels) -> the expected clean latents, of the shape of x. The arguments are the published ones.

    x [B, img_channels, img_resolution, img_resolution]; sigma > 0, a number or [B]; labels one-hot [B, label_dim], None: zeros. To put
    noise on the condition pass `embedding` [B, E] instead, made from model.embed(labels). Raises ValueError if that does not fit.
    """

    def __init__(self, img_resolution, img_channels, label_dim, model_channels, channel_mult, num_blocks, attn_resolutions, channels_per_head=64):
        super().__init__()
        if not channel_mult or num_blocks < 1 or channels_per_head < 1 or img_resolution % 2 ** (len(channel_mult) - 1):
            raise ValueError(f"no network: {img_resolution=} {channel_mult=} {num_blocks=} {channels_per_head=}")
        self.label_dim, self.channels_per_head = label_dim, channels_per_head
        self.unet = UNet(img_resolution, img_channels, label_dim, model_channels, channel_mult, num_blocks, attn_resolutions, channels_per_head)
        self.logvar_fourier, self.logvar_linear = Fourier(128), nn.Module()
        self.logvar_linear.register_buffer("weight", torch.randn(1, 128))      # a buffer: kept in the file, never trained

    def embed(self, labels):
        """labels [B, label_dim] -> label embedding [B, E], for `embedding`. Raises ValueError for another shape."""
        if not self.label_dim or labels.dim() != 2 or labels.shape[1] != self.label_dim:
            raise ValueError(f"labels of shape {list(labels.shape)} for {self.label_dim} classes: give one-hot [B, {self.label_dim}]")
        return self.unet.emb_label(labels * math.sqrt(self.label_dim))

    def forward(self, x, sigma, labels=None, embedding=None):
        if embedding is not None and (labels is not None or not self.label_dim):
            raise ValueError("give labels or their embedding, not both, and neither to a network without classes")
        if embedding is None and (labels is not None or self.label_dim):
            embedding = self.embed(x.new_zeros(1, self.label_dim) if labels is None else labels)
        sigma = torch.as_tensor(sigma, device=x.device).to(x.dtype).reshape(-1, 1, 1, 1)
        total = sigma**2 + SIGMA_DATA**2
        f = self.unet(x / total.sqrt(), sigma.log().flatten() / 4, embedding)
        return SIGMA_DATA**2 / total * x + sigma * SIGMA_DATA / total.sqrt() * f.to(x.dtype)
# EDM2's latents have mean 0 and std 0.5 in each channel; those of the VAE (sd-vae-ft-mse, unscaled) have these:
RAW_MEAN, RAW_STD, FINAL_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), 0.5


def latents_to_vae(x):
    """x [B, 4, H, W] of EDM2 -> what the VAE's decoder takes. Its output is a picture in [0, 1] already (clamp it)."""
    return x * x.new_tensor(RAW_STD)[:, None, None] / FINAL_STD + x.new_tensor(RAW_MEAN)[:, None, None]


def vae_to_latents(z):
    """The inverse: z [B, 4, H, W] of the VAE's encoder -> x of EDM2."""
    return (z - z.new_tensor(RAW_MEAN)[:, None, None]) * FINAL_STD / z.new_tensor(RAW_STD)[:, None, None]


def arguments_of(state, channels_per_head=64):
    """EDM2's arguments from the names and shapes of a state dict; no shape tells channels_per_head. Raises ValueError if it is no EDM2."""
    inputs = map(re.compile(r"unet\.enc\.([1-9]\d{0,4})x\1_conv\.weight").fullmatch, state)
    resolution = max((int(match[1]) for match in inputs if match), default=0)
    blocks = {resolution >> i: f"unet.enc.{resolution >> i}x{resolution >> i}_block" for i in range(resolution.bit_length())}
    widths = [len(state[f"{b}0.conv_res1.weight"]) for b in blocks.values() if f"{b}0.conv_res1.weight" in state]
    if not widths or "unet.out_conv.weight" not in state:
        raise ValueError("its names are not those of EDM2")
    arguments = dict(
        img_resolution=resolution, img_channels=len(state["unet.out_conv.weight"]), model_channels=math.gcd(*widths),
        label_dim=state["unet.emb_label.weight"].shape[-1] if "unet.emb_label.weight" in state else 0,
        channel_mult=[width // math.gcd(*widths) for width in widths], channels_per_head=channels_per_head,
        num_blocks=sum(name.startswith(blocks[resolution]) and name.endswith("conv_res1.weight") for name in state),
        attn_resolutions=[res for res, b in blocks.items() if f"{b}0.attn_qkv.weight" in state])
    with torch.device("meta"):
        expected = {name: list(tensor.shape) for name, tensor in EDM2(**arguments).state_dict().items()}
    for name in sorted(expected.keys() | state.keys()):
        found = list(state[name].shape) if name in state else None
        if found != expected.get(name):
            raise ValueError(f"{name} has shape {found}, and {expected.get(name)} in an EDM2 network of these levels")
        if not (state[name].is_floating_point() and state[name].isfinite().all()):
            raise ValueError(f"{name} holds values that are not finite numbers")
    return arguments


def check(path, channels_per_head=None):
    """-> state dict (in the file's dtypes), EDM2's arguments. Raises ValueError, in one line, for what `load` cannot use or should not."""
    path, state, heads = Path(path), {}, set()
    if path.suffix not in (".pkl", ".safetensors") or not path.is_file():
        raise ValueError(f"{path}: no such .pkl or .safetensors file; give a released snapshot or a file written by edm2.save")
    try:
        if path.suffix == ".pkl":
            with open(path, "rb") as file:
                _collect(_unpickle(file, ADMITTED)["ema"], "", state, heads, set())
        else:
            with safe_open(path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}
                heads = {int((file.metadata() or {}).get("channels_per_head", 64))}
        [stated] = heads or {64}
        return state, arguments_of(state, channels_per_head or stated)
    except Exception as error:                                           # a damaged pickle can raise nearly anything
        reason = " ".join(f"{type(error).__name__}: {error}".split()).removeprefix("ValueError: ")[:200]
        raise ValueError(f"{path}: not an EDM2 network that can be read here ({reason}); give a released snapshot, fetched anew") from None


def load(path, channels_per_head=None):
    """The network of a released snapshot (.pkl) or of a state dict (.safetensors), in float32 and in eval(). channels_per_head None: what
    the file says (a snapshot and a file of `save` do), else 64. Raises ValueError as `check` does."""
    state, arguments = check(path, channels_per_head)
    with torch.device("meta"):
        network = EDM2(**arguments)
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return network.eval()


def save(network, path):
    """Writes the state dict as a .safetensors file that `load` reads, with the one argument that no shape tells."""
    save_file(network.state_dict(), path, {"channels_per_head": str(network.channels_per_head)})
