"""SiT, the class-conditional flow transformer of arXiv 2401.08740, and its adapter.

    x_t = t x_data + (1 - t) eps,    SiT(x_t, t, y) = velocity = x_data - eps
Time t runs from 0, noise, to 1, data: the reverse of sampling.py. A picture is cut into patches;
each is a token with a fixed sine-cosine position. A block is attention, then an MLP. Each of them
sees LayerNorm(x) (1 + scale) + shift and adds gate times its output; shift, scale and gate are
linear in SiLU(time embedding + label embedding). Left out on purpose: label dropout (see `embed`),
guidance (sampling.py) and the initialisation for training from scratch (weights come from a file).
"""

import argparse
import math
import re
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from bases.files import class_ids, class_names, stated_heads, wrapper_of
from bases.generator import Generator, _libraries, _part, from_velocity
from sampling import Flow
from support.guards import check_weights

# The published sizes: hidden size, depth, heads.
SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
FREQUENCIES = 128  # of the time embedding: a sine and a cosine each
LATENT_SCALE = 0.18215  # SiT's latents are the VAE's times this

# Shapes: B pictures of C channels, N tokens a picture, p the side of a patch.

# --------------------------------------------------------------------------------------------------
# The network. A ModuleDict stands where the published key names ask for one more level.


def sincos_positions(grid, hidden):
    """Fixed positions of grid x grid tokens, row by row -> [1, grid^2, hidden].

    The first half of the numbers tells the column, the second half the row.
    """
    exponents = torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4)
    rates = 10000**-exponents
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * rates
    places = torch.cat([angles.sin(), angles.cos()], 1)  # [grid, hidden / 2]
    columns = places.expand(grid, -1, -1)
    rows = places[:, None].expand(-1, grid, -1)
    positions = torch.cat([columns, rows], 2)  # [grid, grid, hidden]
    return positions.reshape(1, grid**2, hidden).float()


def modulation(hidden, parts):
    """The layers from the condition [B, hidden] to `parts` shifts, scales and gates (adaLN)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden, parts * hidden))


def modulated(x, shift, scale):
    """LayerNorm without weights of its own, then (1 + scale) and shift.

    x [B, N, hidden]; shift and scale [B, 1, hidden].
    """
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and an MLP, both modulated by the condition."""

    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict()
        self.attn["qkv"] = nn.Linear(hidden, 3 * hidden)
        self.attn["proj"] = nn.Linear(hidden, hidden)
        self.mlp = nn.ModuleDict()
        self.mlp["fc1"] = nn.Linear(hidden, 4 * hidden)
        self.mlp["fc2"] = nn.Linear(4 * hidden, hidden)
        self.adaLN_modulation = modulation(hidden, 6)

    def attention(self, x):
        """Tokens [B, N, hidden] -> what each gathers from all, of the same shape."""
        qkv = self.attn["qkv"](x).unflatten(2, (3, self.heads, -1))  # [B, N, 3, heads, width]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, width]
        gathered = F.scaled_dot_product_attention(q, k, v)
        return self.attn["proj"](gathered.transpose(1, 2).flatten(2))

    def forward(self, x, condition):
        """Tokens x [B, N, hidden] and condition [B, hidden] -> tokens [B, N, hidden]."""
        parts = self.adaLN_modulation(condition)[:, None]  # [B, 1, 6 hidden]
        shift1, scale1, gate1, shift2, scale2, gate2 = parts.chunk(6, dim=2)
        x = x + gate1 * self.attention(modulated(x, shift1, scale1))
        inner = self.mlp["fc1"](modulated(x, shift2, scale2))
        return x + gate2 * self.mlp["fc2"](F.gelu(inner, approximate="tanh"))


class SiT(nn.Module):
    """velocity = SiT(...)(x, t, y), see `forward`. Published sizes are in `SIZES`.

    input_size is the side of x, a latent. Raises ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        input_size,
        patch_size,
        in_channels,
        hidden_size,
        depth,
        num_heads,
        num_classes,
    ):
        super().__init__()
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"patch_size {patch_size} must divide input_size {input_size}, and num_heads "
                f"{num_heads} and 4 must divide hidden_size {hidden_size}"
            )
        self.shape = (in_channels, input_size, input_size)
        self.patch_size = patch_size
        self.num_classes = num_classes

        # Embeddings of patches, time and label. The last label is the null label.
        self.x_embedder = nn.ModuleDict()
        self.x_embedder["proj"] = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        self.t_embedder = nn.ModuleDict()
        self.t_embedder["mlp"] = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )
        self.y_embedder = nn.ModuleDict()
        self.y_embedder["embedding_table"] = nn.Embedding(num_classes + 1, hidden_size)

        # A buffer: saved, never trained.
        positions = sincos_positions(input_size // patch_size, hidden_size)
        self.register_buffer("pos_embed", positions)

        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict()
        self.final_layer["linear"] = nn.Linear(hidden_size, patch_size**2 * 2 * in_channels)
        self.final_layer["adaLN_modulation"] = modulation(hidden_size, 2)

    def embed(self, labels):
        """Labels [B], integers from 0 to num_classes (the null label) -> [B, hidden].

        Published training replaces labels by the null label at random in train() mode. Not here:
        the rollout and the update take the same step twice and must find the same log-prob. So
        train() and eval() are the same network.
        """
        return self.y_embedder["embedding_table"](labels)

    def embed_time(self, t):
        """Times [B] in [0, 1], not scaled -> [B, hidden]."""
        numbers = torch.arange(FREQUENCIES, device=t.device)
        rates = torch.exp(-math.log(10000) / FREQUENCIES * numbers)
        angles = t.float()[:, None] * rates
        return self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], 1))

    def forward(self, x, t, y):
        """The velocity [B, C, H, W] at x [B, C, H, W] and times t [B], 0 noise, 1 data.

        y: integer labels [B], or embeddings [B, hidden], which are what `embed` returns or what the
        caller made of it. Raises ValueError if x does not have the network's own size.
        """
        if tuple(x.shape[1:]) != self.shape:
            sizes = ", ".join(map(str, self.shape))
            raise ValueError(f"x of shape {tuple(x.shape)}: this SiT takes [B, {sizes}]")
        if not y.is_floating_point():
            y = self.embed(y)
        condition = self.embed_time(t) + y
        patches = self.x_embedder["proj"](x).flatten(2).transpose(1, 2)  # [B, N, hidden]
        x = patches + self.pos_embed
        for block in self.blocks:
            x = block(x, condition)

        parts = self.final_layer["adaLN_modulation"](condition)[:, None]  # [B, 1, 2 hidden]
        shift, scale = parts.chunk(2, dim=2)
        return self.picture(self.final_layer["linear"](modulated(x, shift, scale)))

    def picture(self, tokens):
        """Puts the patches [B, N, p p 2C] together -> [B, C, H, W]."""
        channels, side, _ = self.shape
        p = self.patch_size
        grid = side // p
        x = tokens.unflatten(2, (p, p, 2 * channels)).unflatten(1, (grid, grid))
        # Now [B, row, column, p, p, 2C]. The second half of the channels would be the variance,
        # which SiT never uses.
        x = x[..., :channels].permute(0, 5, 1, 3, 2, 4)  # [B, C, row, p, column, p]
        return x.reshape(-1, channels, side, side)


# --------------------------------------------------------------------------------------------------
# Checkpoints.

NOT_A_SIT = "not a SiT in the published layout; give another file"

# What SiT's own training calls the only kind of network that is sampled here.
TRAINED_AS = {"prediction": "velocity", "path_type": "Linear"}


def load(path, num_heads=None):
    """The network of a .pt or .safetensors file -> SiT (float32, CPU, eval()), its arguments.

    The arguments are those of SiT, as a dict. Draws no random numbers. Raises ValueError as `check`
    does.
    """
    state, arguments = read(Path(path), num_heads)
    with torch.device("meta"):
        network = SiT(**arguments)
    network = network.to_empty(device="cpu")
    network.load_state_dict(state)  # strict: every number of the network comes from the file
    return network.eval(), arguments


def check(path, num_heads=None):
    """SiT's arguments, as a dict, for the checkpoint in `path`. No weight is read.

    num_heads is in no weight's shape: it follows from the hidden size of a published network, and
    has to be given for other sizes. Raises ValueError, in one line, for what `load` cannot read,
    and for a network that is no velocity on the linear path.
    """
    _, arguments = read(Path(path), num_heads)
    return arguments


def read(path, num_heads):
    """A file -> its state dict, SiT's arguments. A tensor is read when it is used."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a SiT checkpoint, .pt or .safetensors")
    if path.suffix == ".safetensors":
        state, said = read_safetensors(path)
    else:
        state, said = read_torch(path), {}
    if isinstance(state, dict) and "args" in state:
        said = state["args"]
        said = vars(said) if isinstance(said, argparse.Namespace) else said
    check_training(path, said)
    if isinstance(state, dict) and "ema" in state:
        state = state["ema"]
    if not is_state_dict(state):
        raise ValueError(
            f"{path}: holds no state dict of float tensors, plain or under the key ema; "
            "give a SiT checkpoint"
        )
    wrapper = wrapper_of(state)
    state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    arguments = arguments_of(path, state, num_heads)
    check_architecture(path, said, arguments)
    return state, arguments


def check_training(path, said):
    """Refuses a file whose own flags say that it is no velocity on the linear path.

    said: the flags that SiT's training saves. Files that its authors publish have none.
    """
    if not isinstance(said, dict):
        raise ValueError(f"{path}: its args are no table of flags; {NOT_A_SIT}")
    if not said:
        return
    if not str(said.get("model")).startswith("SiT"):
        raise ValueError(f"{path}: says model {said.get('model')!r}; known here: SiT")
    for name, known in TRAINED_AS.items():
        if said.get(name) != known:
            raise ValueError(f"{path}: says {name} {said.get(name)!r}; known here: {known!r}")


def check_architecture(path, said, arguments):
    """Refuses a file whose flags say another architecture than its weights have.

    arguments: those of SiT, by the weights.
    """
    size, _, patch = str(said.get("model", "")).removeprefix("SiT-").partition("/")
    expected = {}
    if size in SIZES and patch.isdecimal():
        hidden_size, _, heads = SIZES[size]
        expected |= {"patch_size": int(patch), "hidden_size": hidden_size, "num_heads": heads}
    if isinstance(said.get("image_size"), int):
        expected["input_size"] = said["image_size"] // 8  # of a latent
    if isinstance(said.get("num_classes"), int):
        expected["num_classes"] = said["num_classes"]
    for name, value in expected.items():
        if arguments[name] != value:
            raise ValueError(
                f"{path}: says {name} {value}, and its weights have {arguments[name]}; "
                "give the file as it was trained"
            )


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, and flags of its training, if it has any."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
        said = {}
        if facts.keys() & {"model", *TRAINED_AS}:
            said = {"model": "SiT"} | TRAINED_AS | facts
        return load_file(path), said
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: truncated or not a safetensors file ({error}); copy it again"
        ) from None


def read_torch(path):
    """What torch.save wrote, of tensors and plain values only. Raises ValueError."""
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: truncated or not a zip of torch.save; copy it again, or save it anew with "
            "torch.save or as .safetensors"
        )
    try:
        # SiT's own training saves its flags beside "ema", in a Namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # each kind of damage raises another, and advises to unpickle it
        reason = f"not a checkpoint of torch.save ({type(error).__name__})"
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            reason = f"names {code[1]}, which could run code"
        raise ValueError(f"{path}: {reason}; give a file that holds tensors only") from None


def is_state_dict(state):
    """Whether this is {name: tensor of floats}."""
    if not isinstance(state, dict):
        return False
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            return False
        if not value.is_floating_point():
            return False
    return True


def arguments_of(path, state, num_heads):
    """SiT's arguments from the shapes of its weights.

    Raises ValueError if the names or the shapes are not those of that SiT.
    """
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    try:
        arguments = arguments_of_shapes(shapes, num_heads)
        with torch.device("meta"):  # shapes without memory
            expected = SiT(**arguments).state_dict()
        check_shapes(shapes, {name: tuple(value.shape) for name, value in expected.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return arguments


def arguments_of_shapes(shapes, num_heads):
    """SiT's arguments from {name: shape}, without a look at what they do not depend on."""
    # The weights that tell the arguments, and how many dimensions each has.
    dimensions = {
        "x_embedder.proj.weight": 4,
        "y_embedder.embedding_table.weight": 2,
        "pos_embed": 3,
    }
    missing = [name for name in dimensions if name not in shapes]
    if missing:
        raise ValueError(f"lacks {first_few(missing)}: {NOT_A_SIT}")
    wrong = []
    for name, count in dimensions.items():
        if len(shapes[name]) != count or 0 in shapes[name]:
            wrong.append(f"{name} {list(shapes[name])}")
    if wrong:
        raise ValueError(f"wrong shapes of {first_few(wrong)}: {NOT_A_SIT}")

    hidden_size, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    heads = num_heads or published_heads(hidden_size)
    if heads is None:
        raise ValueError(
            f"hidden size {hidden_size} is not a published one, so the number of heads is "
            "unknown; give num_heads"
        )
    grid = math.isqrt(shapes["pos_embed"][1])
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    labels, _ = shapes["y_embedder.embedding_table.weight"]
    return {
        "input_size": grid * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": len(blocks),
        "num_heads": heads,
        "num_classes": labels - 1,
    }


def published_heads(hidden_size):
    """The number of heads of the published SiT of that hidden size, or None."""
    for published_size, _, heads in SIZES.values():
        if published_size == hidden_size:
            return heads
    return None


def check_shapes(shapes, expected):
    """Raises ValueError where {name: shape} is not as expected."""
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise ValueError(f"lacks {first_few(missing)}: {NOT_A_SIT}")
    unexpected = [name for name in shapes if name not in expected]
    if unexpected:
        raise ValueError(f"has the unexpected {first_few(unexpected)}: {NOT_A_SIT}")
    wrong = []
    for name, shape in expected.items():
        if shapes[name] != shape:
            wrong.append(f"{name} {list(shapes[name])} instead of {list(shape)}")
    if wrong:
        raise ValueError(f"wrong shapes of {first_few(wrong)}: {NOT_A_SIT}")


def first_few(names, few=3):
    """The first names as text, and how many more there are."""
    text = ", ".join(names[:few])
    if len(names) > few:
        text += f" and {len(names) - few} more"
    return text


# --------------------------------------------------------------------------------------------------
# The adapter.


class SiTGenerator(Generator):
    """SiT in our direction of time: 1 noise, 0 data. Prompts are classes.

    The embedding of the class is what takes prompt noise.
    """

    guided_channels = 3  # as published: the fourth latent channel follows the prompt alone

    def __init__(self, file, device, precision, decode_batch):
        super().__init__(file.parent, device, precision, decode_batch)
        network, _ = load(file, stated_heads(file))
        self.network = network.to(device)
        check_weights(network, file)
        self.path = Flow()
        self.shape = self.network.shape
        diffusers, _ = _libraries()
        self.vae = _part(diffusers.AutoencoderKL, self.folder / "vae", device)
        self.names = class_names(self.folder, self.network.num_classes)

    def __call__(self, x_t, t, prompt):
        with self.autocast():
            v = -self.network(x_t, 1 - t, prompt[0])
        return from_velocity(x_t, t, v.float())

    def embed(self, texts):
        labels = class_ids(self.folder / "classes.txt", self.names, texts, self.network.num_classes)
        labels = torch.tensor(labels, device=self.device)
        return (self.network.embed(labels),)

    def picture(self, z):
        decoded = self.vae.decode(z / LATENT_SCALE, return_dict=False)[0]  # in [-1, 1]
        return decoded / 2 + 0.5

    def save(self, folder, weights=None):
        facts = {"num_heads": self.network.blocks[0].heads}
        self.save_own(folder, "sit", facts, weights)
