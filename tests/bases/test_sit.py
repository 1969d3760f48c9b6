"""SiT: its formulas written out once more, its published layout, its checkpoints, its adapter."""

import argparse
import math
import os
import re
import zipfile

import pytest
import torch
from safetensors.torch import save_file

import bases
from bases import sit
from sampling import predict, sample

SMALL = dict(
    input_size=6,
    patch_size=2,
    in_channels=3,
    hidden_size=24,
    depth=2,
    num_heads=4,
    num_classes=5,
)


def build(scale=0.3, **sizes):
    """A SiT with random weights that are all large enough to matter."""
    torch.manual_seed(0)
    network = sit.SiT(**SMALL | sizes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return network


def batch(B=3, seed=1):
    """x, t, y; the last label is the null label."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, 3, 6, 6, generator=generator)
    t = torch.rand(B, generator=generator)
    y = torch.tensor([0, 3, 5])[:B]
    return x, t, y


@pytest.fixture(scope="module")
def network():
    return build()


def equal_states(one, other):
    """Whether two state dicts have the same names and the same values."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --------------------------------------------------------------------------------------------------
# The formulas once more: float64, one picture and one token at a time, from the state dict alone.


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(token):
    """A token [D] at mean 0 and variance 1."""
    centred = token - token.sum() / len(token)
    variance = (centred**2).sum() / len(token)
    return centred / torch.sqrt(variance + 1e-6)


def position(row, column, D):
    """The position [D] of a token: sines and cosines of the column, then of the row."""
    numbers = []
    for place in (column, row):
        angles = [place / 10000 ** (i / (D // 4)) for i in range(D // 4)]
        numbers += [math.sin(angle) for angle in angles]
        numbers += [math.cos(angle) for angle in angles]
    return torch.tensor(numbers, dtype=torch.float64)


def time_features(t):
    """The 256 numbers that stand for a time."""
    angles = [t / 10000 ** (i / 128) for i in range(128)]
    cosines = [math.cos(angle) for angle in angles]
    sines = [math.sin(angle) for angle in angles]
    return torch.tensor(cosines + sines, dtype=torch.float64)


class ByHand:
    """The velocity of one picture, with loops over tokens and heads."""

    def __init__(self, state, sizes):
        self.weights = {name: value.double() for name, value in state.items()}
        self.sizes = sizes
        self.grid = sizes["input_size"] // sizes["patch_size"]

    def linear(self, name, x):
        return self.weights[name + ".weight"] @ x + self.weights[name + ".bias"]

    def modulation(self, name, condition, parts):
        """Shifts, scales and gates, `parts` of [D]."""
        return self.linear(name + "adaLN_modulation.1", silu(condition)).chunk(parts)

    def tokens(self, x):
        """One token [D] a patch, row by row."""
        p = self.sizes["patch_size"]
        kernel = self.weights["x_embedder.proj.weight"]
        tokens = []
        for row in range(self.grid):
            for column in range(self.grid):
                patch = x[:, row * p : (row + 1) * p, column * p : (column + 1) * p].double()
                token = torch.stack([(window * patch).sum() for window in kernel])
                token = token + self.weights["x_embedder.proj.bias"]
                tokens.append(token + position(row, column, len(token)))
        return tokens

    def attention(self, name, tokens):
        heads = self.sizes["num_heads"]
        width = len(tokens[0]) // heads
        qkv = [self.linear(name + "qkv", token).chunk(3) for token in tokens]
        gathered = [torch.zeros_like(token) for token in tokens]
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            for i in range(len(tokens)):
                query = qkv[i][0][part]
                scores = [query @ key[part] / math.sqrt(width) for _, key, _ in qkv]
                weights = [math.exp(score) for score in scores]
                for weight, (_, _, value) in zip(weights, qkv):
                    gathered[i][part] += weight / sum(weights) * value[part]
        return [self.linear(name + "proj", token) for token in gathered]

    def block(self, name, tokens, condition):
        parts = self.modulation(name, condition, 6)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        normed = [norm(token) * (1 + scale1) + shift1 for token in tokens]
        attended = self.attention(name + "attn.", normed)
        tokens = [token + gate1 * change for token, change in zip(tokens, attended)]
        result = []
        for token in tokens:
            inner = self.linear(name + "mlp.fc1", norm(token) * (1 + scale2) + shift2)
            result.append(token + gate2 * self.linear(name + "mlp.fc2", gelu(inner)))
        return result

    def velocity(self, x, t, y):
        """x [C, H, W], t a float and y an integer -> [C, H, W]."""
        inner = silu(self.linear("t_embedder.mlp.0", time_features(t)))
        condition = self.linear("t_embedder.mlp.2", inner)
        condition = condition + self.weights["y_embedder.embedding_table.weight"][y]
        tokens = self.tokens(x)
        for depth in range(self.sizes["depth"]):
            tokens = self.block(f"blocks.{depth}.", tokens, condition)

        # A patch is p rows of p pixels, the velocities and variances of a pixel side by side.
        shift, scale = self.modulation("final_layer.", condition, 2)
        C, p = self.sizes["in_channels"], self.sizes["patch_size"]
        velocity = torch.zeros(x.shape, dtype=torch.float64)
        for n, token in enumerate(tokens):
            numbers = self.linear("final_layer.linear", norm(token) * (1 + scale) + shift)
            row, column = divmod(n, self.grid)
            for a in range(p):
                for b in range(p):
                    first = (a * p + b) * 2 * C
                    pixel = numbers[first : first + C]
                    velocity[:, row * p + a, column * p + b] = pixel
        return velocity


@pytest.mark.parametrize(
    "sizes",
    [{}, dict(patch_size=3, hidden_size=16, depth=3, num_heads=2)],
    ids=["patch 2", "patch 3"],
)
def test_the_velocity_is_the_formulas(sizes):
    network = build(**sizes)
    x, t, y = batch()
    with torch.no_grad():
        velocity = network(x, t, y)
    hand = ByHand(network.state_dict(), SMALL | sizes)
    expected = torch.stack([hand.velocity(x[i], t[i].item(), y[i].item()) for i in range(3)])
    assert velocity.shape == x.shape and velocity.dtype == torch.float32
    assert (velocity - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 0.1  # or there would be nothing to compare


def test_positions_by_hand():
    table = sit.sincos_positions(3, 8)[0]
    s, c = math.sin(2), math.cos(2)  # of place 2; the rates are 1 and 0.01
    slow_s, slow_c = math.sin(0.02), math.cos(0.02)
    row_0_column_2 = torch.tensor([s, slow_s, c, slow_c, 0, 0, 1, 1])
    row_2_column_0 = torch.tensor([0, 0, 1, 1, s, slow_s, c, slow_c])
    torch.testing.assert_close(table[2], row_0_column_2, atol=1e-7, rtol=0)
    torch.testing.assert_close(table[6], row_2_column_0, atol=1e-7, rtol=0)


# --------------------------------------------------------------------------------------------------
# The published layout and the interface.

SINGLE = """
    pos_embed x_embedder.proj.weight x_embedder.proj.bias t_embedder.mlp.0.weight
    t_embedder.mlp.0.bias t_embedder.mlp.2.weight t_embedder.mlp.2.bias
    y_embedder.embedding_table.weight final_layer.linear.weight final_layer.linear.bias
    final_layer.adaLN_modulation.1.weight final_layer.adaLN_modulation.1.bias
""".split()
PER_BLOCK = """
    attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias mlp.fc1.weight mlp.fc1.bias
    mlp.fc2.weight mlp.fc2.bias adaLN_modulation.1.weight adaLN_modulation.1.bias
""".split()


def test_keys_are_the_published_ones(network):
    blocks = [f"blocks.{i}.{name}" for i in range(2) for name in PER_BLOCK]
    expected = {*SINGLE, *blocks}
    assert set(network.state_dict()) == expected
    # The positions are fixed: no optimizer may move them.
    assert {name for name, _ in network.named_parameters()} == expected - {"pos_embed"}


def test_the_published_number_of_weights():
    hidden_size, depth, num_heads = sit.SIZES["XL"]
    with torch.device("meta"):
        state = sit.SiT(32, 2, 4, hidden_size, depth, num_heads, 1000).state_dict()
    assert sum(value.numel() for value in state.values()) == 675_129_632
    assert state["pos_embed"].shape == (1, 256, 1152)
    assert state["y_embedder.embedding_table.weight"].shape == (1001, 1152)
    assert state["blocks.27.attn.qkv.weight"].shape == (3456, 1152)
    assert state["final_layer.linear.weight"].shape == (32, 1152)


def test_an_embedding_stands_for_its_label(network):
    x, t, y = batch()
    with torch.no_grad():
        embedding = network.embed(y)
        table = network.state_dict()["y_embedder.embedding_table.weight"]
        assert embedding.shape == (3, 24) and torch.equal(embedding[2], table[5])
        assert torch.equal(network(x, t, embedding), network(x, t, y))
        assert not torch.allclose(network(x, t, embedding + 0.1), network(x, t, y), atol=1e-3)
    embedding = embedding.requires_grad_()
    loss = network(x, t, embedding).square().sum()
    assert torch.autograd.grad(loss, embedding)[0].abs().amin() > 0


def test_no_randomness_in_train_mode_or_eval_mode(network):
    x, t, y = batch(1)
    x = x.expand(64, -1, -1, -1)  # with label dropout some of these would differ
    t = t.expand(64)
    y = y.expand(64)
    with torch.no_grad():
        first = network.train()(x, t, y)
        state = torch.get_rng_state()
        assert torch.equal(network(x, t, y), first)
        assert torch.equal(network.eval()(x, t, y), first)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.allclose(first, first[:1].expand_as(first), atol=1e-6)


def test_gradients_reach_every_weight_that_is_used():
    network = build(0.1)  # with larger weights some GELUs are exactly 0
    x, t, y = batch()
    network(x, t, y).square().sum().backward()
    velocities = torch.arange(24) % 6 < 3  # rows of the last layer: 4 pixels x (3 + 3 variances)
    labels = torch.tensor([True, False, False, True, False, True])  # 0, 3 and null are in y
    for name, parameter in network.named_parameters():
        gradient = parameter.grad.abs().reshape(len(parameter), -1).amax(1)  # of each row
        if name.startswith("final_layer.linear"):
            assert torch.equal(gradient > 0, velocities), name
        elif name == "y_embedder.embedding_table.weight":
            assert torch.equal(gradient > 0, labels)
        elif name.endswith("attn.qkv.bias"):  # a constant on all keys changes no softmax
            assert gradient[:24].min() > 0 and gradient[48:].min() > 0, name
        else:
            assert gradient.min() > 0, name


def test_bfloat16_autocast(network):
    x, t, y = batch()
    with torch.no_grad():
        full = network(x, t, y)
        with torch.autocast("cpu", torch.bfloat16):
            low = network(x, t, y).float()
    assert 0 < (low - full).abs().max() < 0.05 * full.abs().max()


def test_another_picture_size_is_refused(network):
    t = torch.zeros(2)
    y = torch.zeros(2, dtype=torch.long)
    for shape in [(2, 3, 2, 2), (2, 4, 6, 6), (3, 6, 6)]:  # 2 x 2 would broadcast to the grid
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            network(torch.zeros(shape), t, y)


def test_sizes_that_do_not_fit_are_refused():
    for sizes in [dict(patch_size=4), dict(num_heads=5), dict(hidden_size=18, num_heads=3)]:
        with pytest.raises(ValueError, match="must divide"):
            sit.SiT(**SMALL | sizes)


# --------------------------------------------------------------------------------------------------
# Checkpoints.


def save_training(state, path):
    """What SiT's own training writes; the averaged weights are those to read."""
    optimizer = {"state": {}, "param_groups": [{"lr": 1e-4}]}
    flags = argparse.Namespace(
        model="SiT-small", prediction="velocity", path_type="Linear", epochs=80
    )
    other = {name: value + 1 for name, value in state.items()}
    torch.save({"model": other, "ema": state, "opt": optimizer, "args": flags}, path)


SAID = {"model": "SiT-small", "prediction": "velocity", "path_type": "Linear"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prediction": "noise"}, "prediction 'noise'; known here: 'velocity'"),
        ({"prediction": "score"}, "prediction 'score'"),
        ({"path_type": "GVP"}, "path_type 'GVP'; known here: 'Linear'"),
        ({"path_type": None}, "path_type None"),
        ({"model": "DiT-S/2"}, "model 'DiT-S/2'; known here: SiT"),
        ({"model": "SiT-S/4"}, "patch_size 4, and its weights have 2"),
        ({"image_size": 512}, "input_size 64, and its weights have 6"),
        ({"num_classes": 1000}, "num_classes 1000, and its weights have"),
    ],
)
def test_a_file_that_says_it_is_another_network_is_refused(tmp_path, network, changes, message):
    state = network.state_dict()
    for flags in (SAID | changes, argparse.Namespace(**SAID | changes)):
        torch.save({"ema": state, "args": flags}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=f"a.pt: says {message}"):
            sit.check(tmp_path / "a.pt", num_heads=4)


def test_a_safetensors_file_may_say_so_too(tmp_path, network):
    save_file(network.state_dict(), tmp_path / "a.safetensors", {"prediction": "noise"})
    with pytest.raises(ValueError, match="prediction 'noise'"):
        sit.check(tmp_path / "a.safetensors", num_heads=4)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_what_a_wrapper_puts_before_all_names_is_taken_off(tmp_path, network, wrapper):
    state = network.state_dict()
    torch.save({wrapper + name: tensor for name, tensor in state.items()}, tmp_path / "a.pt")
    loaded, _ = sit.load(tmp_path / "a.pt", num_heads=4)
    assert equal_states(loaded.state_dict(), state)


@pytest.mark.parametrize(
    "name, save",
    [("plain.pt", torch.save), ("training.pt", save_training), ("a.safetensors", save_file)],
)
def test_a_checkpoint_loads_in_every_form(tmp_path, network, name, save):
    path = tmp_path / name
    expected = network.state_dict()
    save(expected, path)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    loaded, arguments = sit.load(path, num_heads=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert arguments == SMALL == sit.check(str(path), num_heads=4)
    assert equal_states(loaded.state_dict(), expected)
    assert not loaded.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(*batch()), network(*batch()))

    # The network is a copy, not the mapped file.
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert equal_states(loaded.state_dict(), expected)


def test_every_size_is_read_from_the_shapes(tmp_path):
    sizes = dict(
        input_size=15,
        patch_size=3,
        in_channels=1,
        hidden_size=16,
        depth=4,
        num_heads=2,
        num_classes=7,
    )
    network = build(**sizes)
    torch.save(network.state_dict(), tmp_path / "a.pt")
    loaded, arguments = sit.load(tmp_path / "a.pt", 2)
    assert arguments == sizes
    assert equal_states(loaded.state_dict(), network.state_dict())


def test_half_precision_is_loaded_as_float32(tmp_path, network):
    halves = {name: value.half() for name, value in network.state_dict().items()}
    torch.save(halves, tmp_path / "half.pt")
    loaded, _ = sit.load(tmp_path / "half.pt", 4)
    assert all(value.dtype == torch.float32 for value in loaded.state_dict().values())
    assert equal_states(loaded.state_dict(), {name: half.float() for name, half in halves.items()})


def test_published_sizes_know_their_heads(tmp_path):
    published = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
    assert sit.SIZES == published
    path = tmp_path / "a.safetensors"
    for hidden_size, _, heads in published.values():
        sizes = SMALL | dict(hidden_size=hidden_size, num_heads=heads, depth=0)
        state = sit.SiT(**sizes).state_dict()
        save_file({name: value.bfloat16() for name, value in state.items()}, path)
        assert sit.check(path) == sizes
        assert sit.check(path, 8) == sizes | dict(num_heads=8)


def test_heads_that_no_shape_tells(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "a.pt")
    message = refused(tmp_path / "a.pt", num_heads=None)
    assert "hidden size 24" in message and "give num_heads" in message
    assert "num_heads 5" in refused(tmp_path / "a.pt", num_heads=5)


def refused(path, num_heads=4):
    """The one line with which both check and load refuse a file; it names the file."""
    with pytest.raises(ValueError) as by_check:
        sit.check(path, num_heads)
    with pytest.raises(ValueError) as by_load:
        sit.load(path, num_heads)
    message = str(by_check.value)
    assert message == str(by_load.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert re.search("give|copy|must", message)
    return message


NAMELESS = {f"projectors.{i}.weight": torch.zeros(1) for i in range(5)}
OTHER_STATES = {  # what the message says: the weights that are changed, None for one left out
    "lacks blocks.1.mlp.fc1.bias": {"blocks.1.mlp.fc1.bias": None},
    "lacks pos_embed": {"pos_embed": None},
    "projectors.0.weight, projectors.1.weight, projectors.2.weight and 2 more": NAMELESS,
    "pos_embed [1, 8, 24] instead of [1, 4, 24]": {"pos_embed": torch.zeros(1, 8, 24)},
    "wrong shapes of pos_embed [9, 24]": {"pos_embed": torch.zeros(9, 24)},
    "wrong shapes of pos_embed [1, 0, 24]": {"pos_embed": torch.zeros(1, 0, 24)},
    "hidden_size 22": {"x_embedder.proj.weight": torch.zeros(22, 3, 2, 2)},
}


@pytest.mark.parametrize("reason", OTHER_STATES)
def test_another_architecture_is_one_line(tmp_path, network, reason):
    state = network.state_dict() | OTHER_STATES[reason]
    state = {name: value for name, value in state.items() if value is not None}
    torch.save(state, tmp_path / "a.pt")
    assert reason in refused(tmp_path / "a.pt")


def test_what_is_no_state_dict_is_one_line(tmp_path, network):
    state = network.state_dict()
    integers = torch.zeros(96, 24, dtype=torch.int8)
    contents = [
        state | {"epoch": 3},
        state | {3: torch.zeros(1)},
        state | {"blocks.0.mlp.fc1.weight": integers},
        list(state.values()),
        {"ema": 0.999},
        torch.zeros(3),
    ]
    for content in contents:
        torch.save(content, tmp_path / "a.pt")
        assert "no state dict" in refused(tmp_path / "a.pt")


def test_no_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path / "none.safetensors", tmp_path):
        assert "no such file" in refused(path)


@pytest.mark.parametrize("name, save", [("a.pt", torch.save), ("a.safetensors", save_file)])
def test_a_truncated_file(tmp_path, network, name, save):
    path = tmp_path / name
    save(network.state_dict(), path)
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "truncated" in refused(path)


def test_a_file_of_another_kind(tmp_path, network):
    for path in (tmp_path / "a.pt", tmp_path / "a.safetensors"):
        path.write_bytes(b"\x89PNG" + bytes(range(256)) * 8)
        assert "truncated or not a" in refused(path)
        # A bare pickle, as before torch 1.6.
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
        assert "truncated or not a" in refused(path)


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
def test_a_zip_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "a.pt"
    for record in ("readme.txt", "a/constants.pkl"):  # the second is TorchScript's
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a/version", "3")
            file.writestr(record, "hello")
        assert "not a checkpoint of torch.save (RuntimeError)" in refused(path)


class Bomb:
    """Unpickling it would run os.mkdir."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path, network):
    trap = tmp_path / "trap"
    hidden = argparse.Namespace(model=Bomb(trap))
    for flags in (Bomb(trap), hidden):
        torch.save({"ema": network.state_dict(), "args": flags}, tmp_path / "a.pt")
        assert "mkdir, which could run code" in refused(tmp_path / "a.pt")
        assert not trap.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)  # the trap is one
    assert trap.is_dir()


# --------------------------------------------------------------------------------------------------
# The adapter.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A SiT of 8 x 8 latents and 5 classes, with a VAE and names of classes beside it."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("sit")
    network = build(input_size=8, in_channels=4)
    save_file(network.state_dict(), folder / "net.safetensors", {"num_heads": "4"})
    vae = AutoencoderKL(
        block_out_channels=[8],
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
    )
    vae.save_pretrained(folder / "vae")
    (folder / "classes.txt").write_text("tench\ngoldfish, carp\nshark\nray\nrooster\n")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return bases.load(f"sit:{folder / 'net.safetensors'}")


def noise(count=3):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_samples_are_eulers_method_on_the_published_velocity(folder, model):
    network, _ = sit.load(folder / "net.safetensors", 4)
    labels = torch.tensor([3, 1, 5])
    x = noise()
    for i in range(5):  # the published direction: 0 noise, 1 data
        x = x + network(x, torch.full((3,), i / 5), labels) / 5
    prompt = model.encode(["3", "Goldfish", ""])
    times = model.path.times(5)
    latents = sample(model, model.path, times, prompt, noise(), 1.0, model.encode([""]))
    torch.testing.assert_close(latents, x, rtol=1e-5, atol=1e-5)
    pictures = model.vae.decode(x / 0.18215).sample / 2 + 0.5
    torch.testing.assert_close(model.decode(x), pictures.clamp(0, 1), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_guidance_is_in_the_first_three_channels_alone(model):
    x = noise()
    t = torch.full((3,), 0.7)
    prompt = model.encode(["1", "2", "3"])
    null_prompt = model.encode([""])
    guided = predict(model, x, t, prompt, 2.5, null_prompt)
    with_prompt = model(x, t, prompt)
    without = model(x, t, model.encode([""] * 3))
    for found, p, n in zip(guided, with_prompt, without):
        expected = n + 2.5 * (p - n)
        torch.testing.assert_close(found[:, :3], expected[:, :3], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[:, 3:], p[:, 3:], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(p[:, 3:], n[:, 3:], atol=1e-3)


@torch.no_grad()
def test_a_saved_model_is_the_same_model(tmp_path, model):
    model.save(tmp_path / "saved")
    again = bases.load(tmp_path / "saved")
    prompt = model.encode(["shark", "0", "carp"])
    t = torch.full((3,), 0.4)
    for one, other in zip(model(noise(), t, prompt), again(noise(), t, prompt)):
        assert torch.equal(one, other)
    assert again.network.blocks[0].heads == 4
    for text in ("5", "-1", "eagle"):
        with pytest.raises(ValueError, match=f"prompt '{text}'"):
            again.encode([text])
