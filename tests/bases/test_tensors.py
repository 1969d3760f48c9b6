"""Tensors by name, read from files: snapshots, LoRA files, model folders, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model
from safetensors.torch import load_file, save_file

import bases
from bases import tensors
from bases.files import network_files


def write(path, values, **facts):
    """A safetensors file -> its path."""
    contiguous = {name: value.contiguous() for name, value in values.items()}
    save_file(contiguous, path, metadata=facts or None)
    return path


def network_of(folder):
    """The tensors of a model folder's network, as float32."""
    (file,) = network_files(folder)
    return {name: value.float() for name, value in load_file(file).items()}


def assert_same(a, b):
    """Equal to the bit, under the same names."""
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --------------------------------------------------------------------------------------------------
# Mappings.


def test_a_tensor_is_read_when_it_is_asked_for(tmp_path):
    """The numbers are changed within the file after it was opened."""
    values = {"w": torch.arange(3.0), "v": torch.ones(2)}
    path = write(tmp_path / "a.safetensors", values, base="x")
    opened = tensors.Weights([path])
    place = path.read_bytes().index(values["w"].numpy().tobytes())
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(torch.tensor([5.0, 6.0, 7.0]).numpy().tobytes())
    assert opened["w"].tolist() == [5, 6, 7]
    assert opened.shape("w") == (3,)
    assert opened.facts == {"base": "x"}


def test_several_files_are_one_checkpoint(tmp_path):
    first = write(tmp_path / "1", {"w": torch.ones(1)})
    second = write(tmp_path / "2", {"v": torch.zeros(2)})
    opened = tensors.Weights([first, second])
    assert list(opened) == ["v", "w"] and len(opened) == 2
    assert opened["w"].tolist() == [1]
    assert opened["v"].tolist() == [0, 0]


def test_a_checkpoint_lies_over_its_base(tmp_path):
    base = write(tmp_path / "base", {name: torch.zeros(1) for name in "abc"})
    part = write(tmp_path / "part", {"b": torch.ones(1)})
    over = tensors.Over(tensors.Weights([part]), tensors.Weights([base]), ["a", "b"])
    assert list(over) == ["a", "b"] and len(over) == 2
    assert (over["a"].item(), over["b"].item()) == (0, 1)


@pytest.mark.parametrize(
    "prefix, alpha, kernel",
    [("", None, None), ("transformer.", 8.0, None), ("unet.", 8.0, 1), ("unet.", None, 3)],
)
def test_a_lora_is_its_layer_plus_two_layers_in_a_row(tmp_path, prefix, alpha, kernel):
    g = torch.Generator().manual_seed(0)
    window = [] if kernel is None else [kernel, kernel]
    point = [1] * len(window)
    rank = 2
    W = torch.randn(5, 4, *window, generator=g)
    A = torch.randn(rank, 4, *window, generator=g)
    B = torch.randn(5, rank, *point, generator=g)
    base = {"a.1.to_q.weight": W, "a.1.to_q.bias": torch.ones(5), "b.weight": W + 1}
    layer = prefix + "a.1.to_q"
    file = {layer + ".lora_A.weight": A, layer + ".lora_B.weight": B}
    scale = 1
    if alpha:
        file[layer + ".alpha"] = torch.tensor(alpha)
        scale = alpha / rank
    opened = tensors.Weights([write(tmp_path / "lora", file)])
    lora = tensors.LoraFile("lora", opened, tensors.Weights([write(tmp_path / "base", base)]))
    assert list(lora) == ["a.1.to_q.weight"] and len(lora) == 1
    assert lora.shape("a.1.to_q.weight") == tuple(W.shape)

    x = torch.randn(3, 4, *[6 for _ in window], generator=g)
    layer_of = F.conv2d if window else F.linear
    two_layers = layer_of(layer_of(x, A), B)
    expected = layer_of(x, W) + scale * two_layers
    output = layer_of(x, lora["a.1.to_q.weight"])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_a_block_is_a_name_up_to_its_first_number():
    blocks = {
        "blocks.0.attn.to_q.weight": "blocks.0",
        "blocks.10.norm.1.bias": "blocks.10",
        "enc.64x64_block0.conv.weight": "enc.64x64_block0",  # EDM2's
        "conv1.weight": "rest",
        "projection": "rest",
    }
    for name, block in blocks.items():
        assert tensors.block_of(name) == block


def test_put_copies_into_parameters_and_buffers():
    network = torch.nn.BatchNorm1d(2)
    bias = network.bias.clone()
    values = {"weight": torch.tensor([3.0, 4.0]), "running_mean": torch.tensor([5.0, 6.0])}
    tensors.put(network, values)
    assert torch.equal(network.weight, values["weight"])
    assert torch.equal(network.running_mean, values["running_mean"])
    assert torch.equal(network.bias, bias)


# --------------------------------------------------------------------------------------------------
# Snapshots.


def test_a_fingerprint_is_of_the_numbers_and_not_of_their_type(tmp_path):
    def mark(values):
        return tensors.fingerprint(tensors.Weights([write(tmp_path / "file", values)]))

    values = {"head": torch.randn(5).half(), "w": torch.randn(3, 2).half()}
    as_float = {name: value.float() for name, value in values.items()}
    assert mark(values) == mark(as_float)
    others = [
        values | {"head": values["head"] + 1},
        values | {"more": torch.ones(1)},
        {"tail": values["head"], "w": values["w"]},
        values | {"w": values["w"].reshape(2, 3)},
    ]
    marks = {mark(other) for other in [values, *others]}
    assert len(marks) == 5


def test_snapshots_roll(tiny, tmp_path):
    trained = {"w": torch.ones(2, dtype=torch.bfloat16)}
    averages = {0.05: {"w": torch.zeros(2)}, 0.1: {"w": torch.full((2,), 0.5)}}
    # The last iteration has more digits than the names are padded to.
    for iteration in (9, 99998, 99999, 100000):
        tensors.save_snapshots(
            tmp_path, iteration, trained, averages, tensors.base_facts(tiny, None), keep=2
        )
    saved = {path.name: tensors.Weights([path]) for path in (tmp_path / "snapshots").iterdir()}
    expected = set()
    for iteration in (99999, 100000):
        for length in ("", "-0.050", "-0.100"):
            expected.add(f"{iteration}{length}.safetensors")
    assert set(saved) == expected

    raw = saved["100000.safetensors"]
    assert raw["w"].dtype == torch.float32
    assert raw.facts["sigma_rel"] == ""
    assert saved["100000-0.100.safetensors"]["w"].tolist() == [0.5, 0.5]
    assert saved["100000-0.050.safetensors"].facts == {
        "base": str(tiny),
        "fingerprint": tensors.fingerprint(tensors.Weights(network_files(tiny))),
        "iteration": "100000",
        "sigma_rel": "0.05",
    }


def test_a_half_written_snapshot_does_no_harm(tiny, tmp_path):
    folder = tmp_path / "snapshots"
    folder.mkdir()
    (folder / ".tmp-00003-0.050.safetensors").write_bytes(b"half")
    for iteration in (1, 2):
        tensors.save_snapshots(tmp_path, iteration, {"w": torch.ones(1)}, {}, {}, keep=1)
    names = [path.name for path in folder.glob("[0-9]*")]
    assert names == ["00002.safetensors"]


# --------------------------------------------------------------------------------------------------
# Checkpoints of one base.


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """As a run leaves it: model/ with all weights moved, and a snapshot and an average of them."""
    out = tmp_path_factory.mktemp("checkpoints")
    model = bases.load(tiny)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save(out / "model")
    trained = dict(model.network.named_parameters())
    average = {name: value + 1 for name, value in trained.items()}
    tensors.save_snapshots(out, 3, trained, {0.05: average}, tensors.base_facts(tiny, None), keep=1)
    return out


@pytest.fixture(scope="module")
def snapshot(run):
    """The file of the snapshot."""
    return run / "snapshots" / "00003.safetensors"


LAYER = "transformer_blocks.0.attn.to_q"


def test_folders_snapshots_and_lora_files_go_together(run, snapshot, tiny, tmp_path):
    halves = {
        f"transformer.{LAYER}.lora_A.weight": torch.ones(1, 32),
        f"transformer.{LAYER}.lora_B.weight": torch.ones(32, 1),
    }
    lora = write(tmp_path / "lora.safetensors", halves)
    paths = [str(run / "model"), str(snapshot), str(lora)]
    folder, views = tensors.open_checkpoints(paths)
    base = network_of(tiny)
    changed = {LAYER + ".weight": base[LAYER + ".weight"] + 1}
    assert folder == str(tiny)
    assert_same(views[0], network_of(run / "model"))
    assert_same(views[1], base | load_file(snapshot))
    assert_same(views[2], base | changed)
    assert views[1].facts["iteration"] == "3"
    assert views[1].facts["sigma_rel"] == ""

    # What no checkpoint changes is not merged.
    _, (alone,) = tensors.open_checkpoints([str(lora)], str(tiny))
    assert_same(alone, changed)
    _, (over_snapshot, _) = tensors.open_checkpoints([str(lora), str(snapshot)])
    assert set(over_snapshot) == set(load_file(snapshot))


def test_the_length_of_an_average_is_also_read_from_its_name(run, tiny, tmp_path):
    """As EDM2 names its files, and a folder that is made of one."""
    name = "net-0002147-0.050"
    expected = {"iteration": "0002147", "sigma_rel": "0.050"}
    average = load_file(run / "snapshots" / "00003-0.050.safetensors")
    file = write(tmp_path / f"{name}.safetensors", average)
    folder = tmp_path / name
    shutil.copytree(tiny, folder)
    _, views = tensors.open_checkpoints([str(file), str(folder)], str(tiny))
    assert [view.facts for view in views] == [expected, expected]


LORA_A = {"proj_out.lora_A.weight": torch.ones(2, 32)}
LORA = LORA_A | {"proj_out.lora_B.weight": torch.ones(196, 2)}
BIAS = {"proj_out.bias": torch.ones(196)}
FOREIGN_LORA = {
    "encoder.q.lora_A.weight": torch.ones(1, 2),
    "encoder.q.lora_B.weight": torch.ones(2, 1),
}

MISFITS = {  # what is wrong: the tensors of the file, its facts, what the message says
    "another base": (BIAS, {"base": "elsewhere", "fingerprint": "0" * 16}, "another base"),
    "unknown name": ({"stray.weight": torch.ones(1)}, {}, "stray.weight"),
    "wrong shape": ({"proj_out.bias": torch.ones(7)}, {}, r"proj_out.bias.*\(7,\)"),
    "no tensor": ({}, {}, "no tensor"),
    "LoRA of an unknown layer": (FOREIGN_LORA, {}, "encoder.q"),
    "LoRA of two ranks": (
        LORA | {"proj_out.lora_B.weight": torch.ones(196, 3)},
        {},
        "proj_out.weight",
    ),
    "LoRA without B": (LORA_A, {}, "proj_out lacks proj_out.lora_B.weight"),
    "LoRA with three alphas": (
        LORA | {"proj_out.alpha": torch.ones(3)},
        {},
        r"proj_out.alpha has the shape \(3,\)",
    ),
}


def assert_refused(snapshot, bad, base, message):
    """Opened beside a good checkpoint, it is named in one line."""
    with pytest.raises(ValueError, match=f"{bad.name}.*{message}") as error:
        tensors.open_checkpoints([str(snapshot), str(bad)], str(base))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused(snapshot, tiny, tmp_path, what):
    values, facts, message = MISFITS[what]
    bad = write(tmp_path / "bad.safetensors", values, **facts)
    assert_refused(snapshot, bad, tiny, message)


def test_an_impossible_average_is_refused(snapshot, tiny, tmp_path):
    for iteration, length in (("2", "wide"), ("2", "7"), ("nan", "0.05"), ("first", "0.05")):
        facts = {"iteration": iteration, "sigma_rel": length}
        bad = write(tmp_path / "bad.safetensors", BIAS, **facts)
        assert_refused(snapshot, bad, tiny, f"average {length} of iteration {iteration}")
    bad = write(tmp_path / "bad.safetensors", BIAS, sigma_rel="0.05")
    assert_refused(snapshot, bad, tiny, "average 0.05 of iteration None")


def test_what_is_no_checkpoint_is_refused(snapshot, tiny, tmp_path):
    cut = tmp_path / "cut"
    cut.write_bytes(snapshot.read_bytes()[:-50])
    pickle = tmp_path / "weights.pt"
    torch.save(BIAS, pickle)
    for bad in (cut, pickle, tmp_path / "none"):
        assert_refused(snapshot, bad, tiny, "not a safetensors file")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert_refused(snapshot, folder, tiny, "model_index.json")


def test_a_snapshot_is_not_put_over_another_base(snapshot, tmp_path):
    other = build_model(tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match="00003.safetensors.*another base.*other"):
        tensors.open_checkpoints([str(snapshot)], str(other))


def test_a_folder_that_lacks_a_tensor_is_refused(run, snapshot, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run / "model", folder)
    (file,) = network_files(folder)
    values = load_file(file)
    del values["proj_out.bias"]
    write(Path(file), values)
    with pytest.raises(ValueError, match="proj_out.bias"):
        tensors.open_checkpoints([str(snapshot), str(folder)])


def test_a_base_must_be_named(snapshot, tmp_path):
    path = write(tmp_path / "bare.safetensors", load_file(snapshot))
    with pytest.raises(ValueError, match="bare.safetensors.*--model"):
        tensors.open_checkpoints([str(path)])


def test_a_checkpoint_may_be_a_name_with_a_prefix(names, tmp_path):
    """Its weights are read where they lie, or held in memory where no safetensors hold them."""
    name, views = tensors.open_checkpoints([names["sit"], names["sit"]])
    assert name == names["sit"]
    state = load_file(names["sit"].partition(":")[2])
    assert_same(views[0], state)

    pickled = tmp_path / "net.pt"
    torch.save({"ema": state}, pickled)
    shutil.copytree(Path(names["sit"].partition(":")[2]).parent / "vae", tmp_path / "vae")
    weights = tensors.open_weights(names["sit"])
    network = bases.load(names["sit"]).network
    held = tensors.open_weights(f"sit:{pickled}", network)
    assert isinstance(held, tensors.Held) and isinstance(weights, tensors.Weights)
    assert tensors.fingerprint(held) == tensors.fingerprint(weights)
