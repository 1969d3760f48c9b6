"""SiT: the class-conditional flow transformer of arXiv 2401.08740, in the key layout of its published checkpoints.

    x_t = t x_data + (1 - t) eps,    SiT(x_t, t, y) = velocity = x_data - eps,    t = 0 noise, 1 data (the reverse of sampling.py)
A picture is cut into patches, tokens with fixed sin-cos positions. A block is attention, then an MLP; each sees
LayerNorm(x) (1 + scale) + shift and adds gate times its output, where shift, scale and gate are linear in SiLU(time + label embedding).
Left out: label dropout (see `embed`), guidance (the caller's) and the initialisation for training from scratch (weights come from a file).
"""
import argparse
import math
import re
import torch
import torch.nn.functional as F
import zipfile
from pathlib import Path
from torch import nn
from bases.files import class_ids, class_names, stated_heads
from bases.generator import Generator, _from_velocity, _libraries, _part
from sampling import Flow

class SiTGenerator(Generator):
    """SiT (arXiv 2401.08740, sit.py) in our direction of time, 1 noise, 0 data; prompts are classes, and their embedding is what takes noise."""

    def __init__(self, file, device, precision, decode_batch):
        super().__init__(file.parent, device, precision, decode_batch)
        self.network, self.path = load(file, stated_heads(file))[0].to(device), Flow()
        self.vae, self.names = _part(_libraries()[0].AutoencoderKL, self.folder / "vae", device), class_names(self.folder, self.network.num_classes)
        self.shape = self.network.shape

    guided_channels = 3                                                  # as published; the fourth latent follows the prompt alone

    def __call__(self, x_t, t, prompt):
        with self.autocast():
            v = -self.network(x_t, 1 - t, prompt[0])
        return _from_velocity(x_t, t, v.float())

    def embed(self, texts):
        return (self.network.embed(torch.tensor(class_ids(self.folder, self.names, texts, self.network.num_classes), device=self.device)),)

    def picture(self, z):
        return self.vae.decode(z / 0.18215, return_dict=False)[0] / 2 + 0.5

    def save(self, folder, weights=None):
        self.save_own(folder, "sit", {"num_heads": self.network.blocks[0].heads}, weights)
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}    # hidden size, depth, heads
FREQUENCIES = 128                                                        # of the time embedding: a sine and a cosine each


def sincos_positions(grid, hidden):
    """Fixed positions of grid x grid tokens -> [1, grid^2, hidden], row by row: the first half tells the column, the second the row."""
    rates = 10000 ** -(torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], 1)                    # [grid, hidden / 2]
    columns, rows = line.expand(grid, -1, -1), line[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], 2).reshape(1, grid**2, hidden).float()


def modulation(hidden, parts):
    """The condition [B, hidden] -> `parts` shifts, scales and gates (adaLN)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden, parts * hidden))


def modulated(x, shift, scale):
    """LayerNorm without weights of its own, then (1 + scale) and shift: x [B, N, hidden], shift and scale [B, 1, hidden]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and an MLP, both modulated by the condition."""

    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(hidden, 3 * hidden), "proj": nn.Linear(hidden, hidden)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(hidden, 4 * hidden), "fc2": nn.Linear(4 * hidden, hidden)})
        self.adaLN_modulation = modulation(hidden, 6)

    def attention(self, x):
        q, k, v = self.attn["qkv"](x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)     # each [B, heads, N, hidden / heads]
        return self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attention(modulated(x, shift1, scale1))
        return x + gate2 * self.mlp["fc2"](F.gelu(self.mlp["fc1"](modulated(x, shift2, scale2)), approximate="tanh"))


class SiT(nn.Module):
    """velocity = SiT(...)(x, t, y), see `forward`. Sizes in `SIZES`; input_size is the side of x. Raises ValueError for sizes that do not fit."""

    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes):
        super().__init__()
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"patch_size {patch_size} must divide input_size {input_size}, and num_heads {num_heads} and 4 must divide "
                             f"hidden_size {hidden_size}")
        self.shape, self.patch_size, self.num_classes = (in_channels, input_size, input_size), patch_size, num_classes
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(
            nn.Linear(2 * FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, hidden_size)})
        self.register_buffer("pos_embed", sincos_positions(input_size // patch_size, hidden_size))   # a buffer: saved, never trained
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(hidden_size, patch_size**2 * 2 * in_channels),
                                          "adaLN_modulation": modulation(hidden_size, 2)})

    def embed(self, labels):
        """Labels [B], integers from 0 to num_classes, the last being the null label -> embeddings [B, hidden]."""
        # The published code replaces labels by the null label at random in train() mode. Not here: the same step taken twice, by rollout and
        # by update, must have the same log-prob. So train() and eval() are the same network.
        return self.y_embedder["embedding_table"](labels)

    def embed_time(self, t):
        """Times [B] in [0, 1], not scaled -> [B, hidden]."""
        rates = torch.exp(-math.log(10000) / FREQUENCIES * torch.arange(FREQUENCIES, device=t.device))
        angles = t.float()[:, None] * rates
        return self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], 1))

    def forward(self, x, t, y):
        """x [B, C, H, W], t [B] in [0, 1] (0 noise, 1 data), y integer labels [B] or embeddings [B, hidden] -> velocity [B, C, H, W].

        Embeddings are what `embed` returns, or what the caller made of it. Raises ValueError if x does not have the model's own size.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x of shape {tuple(x.shape)}: this SiT takes [B, {', '.join(map(str, self.shape))}]")
        condition = self.embed_time(t) + (y if y.is_floating_point() else self.embed(y))
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed                   # [B, N, hidden]
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.final_layer["adaLN_modulation"](condition)[:, None].chunk(2, dim=2)
        x = self.final_layer["linear"](modulated(x, shift, scale))                                   # [B, N, p * p * 2C]
        channels, side = self.shape[:2]
        grid, p = side // self.patch_size, self.patch_size
        x = x.unflatten(2, (p, p, 2 * channels)).unflatten(1, (grid, grid))                          # [B, row, column, p, p, 2C]
        x = x[..., :channels]                                            # the other half would be the variance, which SiT never uses
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side, side)


def load(path, num_heads=None):
    """-> (SiT in float32 on the CPU, its constructor's arguments as a dict). Raises ValueError as `check` does. Draws no random numbers."""
    state = _read(Path(path))
    config = _config(path, state, num_heads)
    with torch.device("meta"):
        model = SiT(**config)
    model = model.to_empty(device="cpu")
    model.load_state_dict(state)                                         # strict: every number of the model comes from the file
    return model.eval(), config


def check(path, num_heads=None):
    """Raises ValueError, in one line, if `path` is not a SiT that `load` can read; no weight is read. Returns SiT's arguments as a dict.

    num_heads is in no weight's shape: it is taken from `SIZES` by the hidden size, and has to be given for other sizes.
    """
    return _config(path, _read(Path(path)), num_heads)


def _read(path):
    """The state dict, its tensors mapped from the file: a tensor is read when it is used."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a SiT checkpoint, .pt or .safetensors")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: truncated or not a safetensors file ({error}); copy it again") from None
    elif not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: truncated or not a zip of torch.save; copy it again, or save it anew with torch.save or as .safetensors")
    else:
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # SiT's own training saves its flags, plain values, beside ema
                state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:                                       # each kind of broken file raises another, with advice to unpickle it
            code = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"names {code[1]}, which could run code" if code else f"not a checkpoint of torch.save ({type(error).__name__})"
            raise ValueError(f"{path}: {reason}; give a file that holds tensors only") from None
    state = state.get("ema", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor) and value.is_floating_point() for key, value in state.items()):
        raise ValueError(f"{path}: holds no state dict of float tensors, plain or under the key ema; give a SiT checkpoint")
    return state


def _config(path, state, num_heads):
    """SiT's arguments from the shapes of its weights; raises ValueError if keys or shapes are not those of that SiT."""
    remedy = "not a SiT in the published layout; give another file"
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    sources = {"x_embedder.proj.weight": 4, "y_embedder.embedding_table.weight": 2, "pos_embed": 3}        # key: number of dimensions
    if missing := [key for key in sources if key not in shapes]:
        raise ValueError(f"{path}: lacks {_first(missing)}: {remedy}")
    if wrong := [f"{key} {list(shapes[key])}" for key, dims in sources.items() if len(shapes[key]) != dims or 0 in shapes[key]]:
        raise ValueError(f"{path}: wrong shapes of {_first(wrong)}: {remedy}")
    hidden, channels, patch, _ = shapes["x_embedder.proj.weight"]
    heads = num_heads or {width: heads for width, _, heads in SIZES.values()}.get(hidden)
    if heads is None:
        raise ValueError(f"{path}: hidden size {hidden} is not a published one, so the number of heads is unknown; give num_heads")
    config = {"input_size": math.isqrt(shapes["pos_embed"][1]) * patch, "patch_size": patch, "in_channels": channels, "hidden_size": hidden,
              "depth": len({key.split(".")[1] for key in shapes if key.startswith("blocks.")}), "num_heads": heads,
              "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1}
    try:
        with torch.device("meta"):                                       # shapes without memory
            expected = {key: tuple(value.shape) for key, value in SiT(**config).state_dict().items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if missing := [key for key in expected if key not in shapes]:
        raise ValueError(f"{path}: lacks {_first(missing)}: {remedy}")
    if unexpected := [key for key in shapes if key not in expected]:
        raise ValueError(f"{path}: has the unexpected {_first(unexpected)}: {remedy}")
    if wrong := [f"{key} {list(shapes[key])} instead of {list(expected[key])}" for key in expected if shapes[key] != expected[key]]:
        raise ValueError(f"{path}: wrong shapes of {_first(wrong)}: {remedy}")
    return config


def _first(names, few=3):
    return ", ".join(names[:few]) + (f" and {len(names) - few} more" if len(names) > few else "")
