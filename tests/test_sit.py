"""SiT against its formulas, written out once more with loops and plain numbers, and against the published layout; bad checkpoints."""
import argparse
import math
import os
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from bases import sit

SMALL = dict(input_size=6, patch_size=2, in_channels=3, hidden_size=24, depth=2, num_heads=4, num_classes=5)
SINGLE = """pos_embed x_embedder.proj.weight x_embedder.proj.bias t_embedder.mlp.0.weight t_embedder.mlp.0.bias t_embedder.mlp.2.weight
    t_embedder.mlp.2.bias y_embedder.embedding_table.weight final_layer.linear.weight final_layer.linear.bias
    final_layer.adaLN_modulation.1.weight final_layer.adaLN_modulation.1.bias""".split()
PER_BLOCK = """attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias
    adaLN_modulation.1.weight adaLN_modulation.1.bias""".split()


def build(scale=0.3, **sizes):
    """A SiT with random weights that are all large enough to matter."""
    torch.manual_seed(0)
    model = sit.SiT(**SMALL | sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return model


def batch(B=3, seed=1):
    """x, t, y; the last label is the null label."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, 3, 6, 6, generator=g), torch.rand(B, generator=g), torch.tensor([0, 3, 5, 1, 2])[:B]


@pytest.fixture(scope="module")
def model():
    return build()


# ---------------------------------------------------------------------------------------------------------------------
# The formulas once more: float64, one picture and one token at a time, from the state dict alone.

def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x):
    """One token [D]: mean 0, variance 1."""
    centred = x - x.sum() / len(x)
    return centred / torch.sqrt((centred**2).sum() / len(x) + 1e-6)


def position(row, column, D):
    quarter = D // 4
    angles = [[place / 10000 ** (i / quarter) for i in range(quarter)] for place in (column, row)]
    return torch.tensor([f(a) for line in angles for f in (math.sin, math.cos) for a in line], dtype=torch.float64)


def time_features(t):
    angles = [t / 10000 ** (i / 128) for i in range(128)]
    return torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)


def softmax_attention(tokens, w, prefix, heads):
    D = len(tokens[0])
    d = D // heads
    qkv = [w[prefix + "qkv.weight"] @ token + w[prefix + "qkv.bias"] for token in tokens]          # of each token [3D]: all q, all k, all v
    out = [torch.zeros(D, dtype=torch.float64) for _ in tokens]
    for h in range(heads):
        q, k, v = ([token[part * D + h * d:part * D + (h + 1) * d] for token in qkv] for part in range(3))
        for i in range(len(tokens)):
            weights = [math.exp(float(q[i] @ k[j]) / math.sqrt(d)) for j in range(len(tokens))]
            out[i][h * d:(h + 1) * d] = sum(weight * v[j] for j, weight in enumerate(weights)) / sum(weights)
    return [w[prefix + "proj.weight"] @ token + w[prefix + "proj.bias"] for token in out]


def by_hand(state, sizes, x, t, y):
    """The velocity [C, H, W] of one picture x at time t (a float) with label y (an integer)."""
    w = {key: value.double() for key, value in state.items()}
    p, C, D = sizes["patch_size"], sizes["in_channels"], sizes["hidden_size"]
    grid = sizes["input_size"] // p
    linear = lambda name, v: w[name + ".weight"] @ v + w[name + ".bias"]
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", time_features(t)))) + w["y_embedder.embedding_table.weight"][y]
    patches = [(i, j, x[:, i * p:(i + 1) * p, j * p:(j + 1) * p].double()) for i in range(grid) for j in range(grid)]
    tokens = [torch.stack([(w["x_embedder.proj.weight"][o] * patch).sum() for o in range(D)]) + w["x_embedder.proj.bias"] + position(i, j, D)
              for i, j, patch in patches]
    for b in range(sizes["depth"]):
        name = f"blocks.{b}."
        m = linear(name + "adaLN_modulation.1", silu(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = (m[k * D:(k + 1) * D] for k in range(6))
        seen = softmax_attention([norm(token) * (1 + scale1) + shift1 for token in tokens], w, name + "attn.", sizes["num_heads"])
        tokens = [token + gate1 * a for token, a in zip(tokens, seen)]
        tokens = [token + gate2 * linear(name + "mlp.fc2", gelu(linear(name + "mlp.fc1", norm(token) * (1 + scale2) + shift2))) for token in tokens]
    m = linear("final_layer.adaLN_modulation.1", silu(c))
    velocity = torch.zeros(C, grid * p, grid * p, dtype=torch.float64)
    for (i, j, _), token in zip(patches, tokens):
        numbers = linear("final_layer.linear", norm(token) * (1 + m[D:]) + m[:D])                  # [p p 2C]: a pixel's channels lie together
        for a in range(p):
            for b in range(p):
                for channel in range(C):
                    velocity[channel, i * p + a, j * p + b] = numbers[(a * p + b) * 2 * C + channel]
    return velocity


@pytest.mark.parametrize("sizes", [{}, dict(patch_size=3, in_channels=3, hidden_size=16, depth=3, num_heads=2)], ids=["patch2", "patch3"])
def test_the_velocity_is_the_formulas(sizes):
    model = build(**sizes)
    x, t, y = batch()
    with torch.no_grad():
        velocity = model(x, t, y)
    hand = torch.stack([by_hand(model.state_dict(), SMALL | sizes, x[i], float(t[i]), int(y[i])) for i in range(len(x))])
    assert velocity.shape == x.shape and velocity.dtype == torch.float32
    assert (velocity - hand).abs().max() < 1e-5 * hand.abs().max()
    assert (hand[0] - hand[1]).abs().max() > 0.1                         # or there would be nothing to compare


def test_positions_by_hand():
    table = sit.sincos_positions(3, 8)[0]
    s, c, s01, c01 = math.sin(2), math.cos(2), math.sin(0.02), math.cos(0.02)                      # column 2; rates 1 and 0.01
    assert torch.allclose(table[2], torch.tensor([s, s01, c, c01, 0, 0, 1, 1]), atol=1e-7)          # row 0, column 2
    assert torch.allclose(table[6], torch.tensor([0, 0, 1, 1, s, s01, c, c01]), atol=1e-7)          # row 2, column 0


def test_every_input_matters(model):
    x, t, y = batch()
    with torch.no_grad():
        base = model(x, t, y)
        for other in (model(x + 0.1, t, y), model(x, 1 - t, y), model(x, t, (y + 1) % 6)):
            assert (other - base).flatten(1).abs().amax(1).min() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# The published layout and the interface.

def test_keys_are_the_published_ones(model):
    expected = SINGLE + [f"blocks.{i}.{name}" for i in range(2) for name in PER_BLOCK]
    assert sorted(model.state_dict()) == sorted(expected)
    assert {name for name, _ in model.named_parameters()} == set(expected) - {"pos_embed"}         # fixed: no optimizer may move it


def test_the_published_number_of_weights():
    hidden_size, depth, num_heads = sit.SIZES["XL"]
    with torch.device("meta"):
        state = sit.SiT(32, 2, 4, hidden_size, depth, num_heads, 1000).state_dict()
    assert sum(value.numel() for value in state.values()) == 675_129_632
    assert state["pos_embed"].shape == (1, 256, 1152) and state["y_embedder.embedding_table.weight"].shape == (1001, 1152)
    assert state["final_layer.linear.weight"].shape == (32, 1152) and state["blocks.27.attn.qkv.weight"].shape == (3456, 1152)


def test_the_file_runs():
    done = subprocess.run([sys.executable, str(ROOT / "sit.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "SiT-XL/2: 675,129,632 numbers" in done.stdout.splitlines()


def test_an_embedding_stands_for_its_label(model):
    x, t, y = batch()
    with torch.no_grad():
        embedding = model.embed(y)
        assert embedding.shape == (3, 24) and torch.equal(embedding[2], model.state_dict()["y_embedder.embedding_table.weight"][5])
        assert torch.equal(model(x, t, embedding), model(x, t, y))
        assert not torch.allclose(model(x, t, embedding + 0.1), model(x, t, y), atol=1e-3)
    embedding = embedding.requires_grad_()
    assert torch.autograd.grad(model(x, t, embedding).square().sum(), embedding)[0].abs().amin() > 0


def test_no_randomness_in_train_mode_or_eval_mode(model):
    x, t, y = batch(1)
    x, t, y = x.expand(64, -1, -1, -1), t.expand(64), y.expand(64)       # with label dropout some of these would differ
    with torch.no_grad():
        first = model.train()(x, t, y)
        state = torch.get_rng_state()
        assert torch.equal(model(x, t, y), first) and torch.equal(model.eval()(x, t, y), first)
        assert torch.equal(torch.get_rng_state(), state) and torch.allclose(first, first[:1].expand_as(first), atol=1e-6)


def test_gradients_reach_every_weight_that_is_used():
    model = build(0.1)                                                   # with larger weights some GELUs are exactly 0
    x, t, y = batch()
    model(x, t, y).square().sum().backward()
    halves = torch.arange(24) % 6 < 3                                    # the rows of the last layer: 4 pixels x (3 velocities, 3 variances)
    for name, parameter in model.named_parameters():
        grad = parameter.grad.abs().flatten(1).amax(1) if parameter.dim() > 1 else parameter.grad.abs()
        if name.startswith("final_layer.linear"):
            assert torch.equal(grad > 0, halves), name
        elif name == "y_embedder.embedding_table.weight":
            assert torch.equal(grad > 0, torch.tensor([True, False, False, True, False, True]))    # labels 0, 3 and null
        elif name.endswith("attn.qkv.bias"):
            assert (grad[:24].min() > 0) and (grad[48:].min() > 0), name                           # a constant on all keys changes no softmax
        else:
            assert grad.min() > 0, name


def test_bfloat16_autocast(model):
    x, t, y = batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(x, t, y).float()
    with torch.no_grad():
        full = model(x, t, y)
    assert 0 < (low - full).abs().max() < 0.05 * full.abs().max()


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (2, 3, 12, 12), (2, 4, 6, 6), (2, 3, 6, 4), (3, 6, 6)], ids=str)
def test_another_picture_size_is_refused(model, shape):
    with pytest.raises(ValueError, match=re.escape(str(shape))):         # 2 x 2 would broadcast to the whole grid
        model(torch.zeros(shape), torch.zeros(2), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("sizes", [dict(patch_size=4), dict(num_heads=5), dict(hidden_size=18, num_heads=3)], ids=str)
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="must divide"):
        sit.SiT(**SMALL | sizes)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints.

FORMS = {  # how a state dict becomes a file
    "plain.pt": torch.save,
    "ema.pt": lambda state, path: torch.save({"ema": state, "model": {k: v + 1 for k, v in state.items()}}, path),
    "training.pt": lambda state, path: torch.save({"model": {}, "ema": state, "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
                                                   "args": argparse.Namespace(model="SiT-S/2", epochs=80)}, path),
    "tensors.safetensors": save_file}


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_loads_in_every_form(tmp_path, model, form):
    FORMS[form](model.state_dict(), tmp_path / form)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    loaded, config = sit.load(tmp_path / form, num_heads=4)
    assert config == SMALL == sit.check(str(tmp_path / form), num_heads=4) and torch.equal(torch.get_rng_state(), before)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert not loaded.training and all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(*batch()), model(*batch()))
    with open(tmp_path / form, "r+b") as file:                           # the model must be a copy, not the mapped file
        file.write(bytes((tmp_path / form).stat().st_size))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_every_size_is_read_from_the_shapes(tmp_path):
    config = dict(input_size=15, patch_size=3, in_channels=1, hidden_size=16, depth=4, num_heads=2, num_classes=7)
    model = build(**config)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    loaded, found = sit.load(tmp_path / "a.pt", 2)
    assert found == config
    x, t, y = torch.randn(2, 1, 15, 15), torch.rand(2), torch.tensor([0, 7])
    with torch.no_grad():
        assert torch.equal(loaded(x, t, y), model(x, t, y))


def test_half_precision_is_loaded_as_float32(tmp_path, model):
    torch.save({key: value.half() for key, value in model.state_dict().items()}, tmp_path / "half.pt")
    loaded, _ = sit.load(tmp_path / "half.pt", 4)
    assert all(value.dtype == torch.float32 and torch.equal(value, model.state_dict()[key].half().float())
               for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("name, heads", [("S", 6), ("B", 12), ("L", 16), ("XL", 16)])
def test_published_sizes_know_their_heads(tmp_path, name, heads):
    hidden = {"S": 384, "B": 768, "L": 1024, "XL": 1152}[name]
    assert sit.SIZES[name] == (hidden, {"S": 12, "B": 12, "L": 24, "XL": 28}[name], heads)
    config = SMALL | dict(hidden_size=hidden, num_heads=heads, depth=1)
    torch.save({key: value.bfloat16() for key, value in sit.SiT(**config).state_dict().items()}, tmp_path / "a.pt")
    assert sit.check(tmp_path / "a.pt") == config and sit.check(tmp_path / "a.pt", 8)["num_heads"] == 8


class Bomb:
    """Unpickling it would run os.mkdir."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def without(*keys):
    return lambda state: {key: value for key, value in state.items() if key not in keys}


def replaced(key, *shape):
    return lambda state: state | {key: torch.zeros(shape)}


def renumbered(state):
    return {key.replace("blocks.1.", "blocks.7."): value for key, value in state.items()}


STATES = [  # what becomes of the state dict, what the line must say
    (without("blocks.1.mlp.fc1.bias"), "lacks blocks.1.mlp.fc1.bias"),
    (without("pos_embed"), "lacks pos_embed"), (lambda s: {}, "lacks x_embedder.proj.weight"),
    (lambda s: {"module." + key: value for key, value in s.items()}, "lacks x_embedder.proj.weight"),
    (lambda s: s | {f"projectors.{i}.weight": torch.zeros(1) for i in range(5)},
     "unexpected projectors.0.weight, projectors.1.weight, projectors.2.weight and 2 more"),
    (renumbered, "lacks blocks.1.attn.qkv.weight, blocks.1.attn.qkv.bias, blocks.1.attn.proj.weight and 7 more"),
    (replaced("final_layer.linear.weight", 12, 24), "final_layer.linear.weight [12, 24] instead of [24, 24]"),   # without learn_sigma
    (replaced("blocks.0.mlp.fc1.weight", 48, 24), "blocks.0.mlp.fc1.weight [48, 24] instead of [96, 24]"),
    (replaced("pos_embed", 1, 8, 24), "pos_embed [1, 8, 24] instead of [1, 4, 24]"),
    (replaced("pos_embed", 9, 24), "pos_embed [9, 24]"), (replaced("pos_embed", 1, 0, 24), "pos_embed [1, 0, 24]"),
    (replaced("x_embedder.proj.weight", 24, 12), "x_embedder.proj.weight [24, 12]"),
    (replaced("x_embedder.proj.weight", 24, 3, 2, 3), "x_embedder.proj.weight [24, 3, 2, 3]"),
    (replaced("x_embedder.proj.weight", 22, 3, 2, 2), "hidden_size 22"),
    (lambda s: s | {"epoch": 3}, "no state dict"), (lambda s: s | {3: torch.zeros(1)}, "no state dict"),
    (lambda s: s | {"blocks.0.mlp.fc1.weight": torch.zeros(96, 24, dtype=torch.int8)}, "no state dict"),
    (lambda s: list(s.values()), "no state dict"), (lambda s: {"ema": 0.999}, "no state dict"), (lambda s: torch.zeros(3), "no state dict")]


def refused(path, num_heads=4):
    """The one line with which both check and load refuse a file; it names the file."""
    with pytest.raises(ValueError) as caught:
        sit.check(path, num_heads)
    with pytest.raises(ValueError) as again:
        sit.load(path, num_heads)
    line = str(caught.value)
    assert line == str(again.value) and line.startswith(f"{path}: ") and "\n" not in line and re.search("give|copy|must", line)
    return line


@pytest.mark.parametrize("change, said", STATES, ids=[said for _, said in STATES])
def test_another_architecture_is_one_line(tmp_path, model, change, said):
    torch.save(change(dict(model.state_dict())), tmp_path / "a.pt")
    assert said in refused(tmp_path / "a.pt")


def test_no_file_and_a_folder(tmp_path):
    assert "no such file" in refused(tmp_path / "none.pt") and "no such file" in refused(tmp_path / "none.safetensors")
    assert "no such file" in refused(tmp_path)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("left", [0, 1, 0.5, -1])
def test_a_truncated_file(tmp_path, model, name, left):
    path = tmp_path / name
    save_file(model.state_dict(), path) if name.endswith("safetensors") else torch.save(model.state_dict(), path)
    size = path.stat().st_size
    os.truncate(path, int(size * left) if left == 0.5 else left % size)  # to 0 bytes, 1 byte, half, all but one
    assert "truncated" in refused(path)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_file_of_another_kind(tmp_path, model, name):
    path = tmp_path / name
    path.write_bytes(b"\x89PNG" + bytes(range(256)) * 8)
    assert "truncated or not a" in refused(path)
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)                     # a bare pickle, as before torch 1.6
    assert "truncated or not a" in refused(path)


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
@pytest.mark.parametrize("record", ["readme.txt", "a/constants.pkl"], ids=["any", "TorchScript"])
def test_a_zip_that_is_no_checkpoint(tmp_path, record):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("a/version", "3")
        file.writestr(record, "hello")
    assert refused(tmp_path / "a.pt").endswith("not a checkpoint of torch.save (RuntimeError); give a file that holds tensors only")


def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path, model):
    trap = tmp_path / "trap"
    torch.save({"ema": model.state_dict(), "args": Bomb(trap)}, tmp_path / "a.pt")
    assert "mkdir, which could run code" in refused(tmp_path / "a.pt") and not trap.exists()
    torch.save({"ema": model.state_dict(), "args": argparse.Namespace(model=Bomb(trap))}, tmp_path / "b.pt")
    assert "mkdir, which could run code" in refused(tmp_path / "b.pt") and not trap.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)                    # the trap is one
    assert trap.is_dir()


def test_heads_that_no_shape_tells(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert "hidden size 24" in refused(tmp_path / "a.pt", None) and "num_heads" in refused(tmp_path / "a.pt", None)
    assert "num_heads 5" in refused(tmp_path / "a.pt", 5)
