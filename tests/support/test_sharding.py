"""sharding.py: on two processes a run is that of one to rounding, and what it writes is whole."""

import os

import pytest
import random_bases
import small_bases
import torch
from conftest import ROOT, contents, launch, launch_process, read_metrics, read_weights, small
from safetensors.torch import load_file, save_file
from torch import nn

import bases
from bases import edm2, sit
from support import sharding

ALL = (
    "--train all --kl 0.1 --ema 0.5 --snapshot_every 1 --reward class:1,fid:0.3 --reference 24 "
    "--iterations 3 --updates 2 --save_every 1"
).split()


# --------------------------------------------------------------------------------------------------
# Functions.


def test_a_block_is_an_entry_of_an_outermost_list(tiny):
    inner = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))
    network = nn.Sequential(
        nn.Linear(2, 2),
        nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Tanh()}),
        nn.ModuleList([inner]),
    )
    assert sharding.blocks(network) == [network[1]["a"], inner]
    assert sharding.blocks(nn.Linear(1, 1)) == []
    transformer = bases.load(str(tiny)).network
    assert sharding.blocks(transformer) == list(transformer.transformer_blocks)


def test_what_is_whole_passes_through():
    tensor = torch.ones(3, requires_grad=True)
    assert not sharding.is_piece(tensor)
    assert sharding.whole(tensor) is tensor
    assert sharding.piece(tensor, tensor) is tensor
    assert sharding.local(tensor) is tensor


def test_gradients_are_scaled_to_a_norm_and_the_old_one_is_returned():
    tensor = torch.ones(3, requires_grad=True)
    tensor.grad = torch.full((3,), 5.0)
    assert sharding.clip_gradients([tensor], 1.0) == pytest.approx(75**0.5)
    assert tensor.grad.norm().item() == pytest.approx(1, rel=1e-5)
    assert sharding.clip_gradients([tensor], 2.0) == pytest.approx(1, rel=1e-5)
    assert tensor.grad.norm().item() == pytest.approx(1, rel=1e-5)


def test_an_optimizer_takes_the_state_that_it_gave():
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer.step()
    twin = torch.optim.AdamW([torch.ones(3, requires_grad=True)])
    sharding.load_state(twin, sharding.whole_state(optimizer))
    saved, loaded = optimizer.state_dict()["state"][0], twin.state_dict()["state"][0]
    assert saved.keys() == loaded.keys() == {"step", "exp_avg", "exp_avg_sq"}
    for name, value in saved.items():
        assert torch.equal(loaded[name], value)


# --------------------------------------------------------------------------------------------------
# Runs on two processes.


def transformer_of(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def distance(a, b):
    """The summed norm of the differences of two sets of tensors of the same names."""
    assert a.keys() == b.keys()
    return sum((a[name].float() - b[name].float()).norm() for name in a)


def newest_optimizer(out):
    newest = sorted(out.glob("checkpoint-*"))[-1]
    return torch.load(newest / "optimizer.pt", weights_only=True)["state"]


@pytest.fixture(scope="module")
def sharded(tiny, tmp_path_factory):
    """The folder of a run on two processes."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    code, _, error = launch_process(small(tiny, out, *ALL, "--shard"), processes=2)
    assert code == 0, error
    return out


@pytest.mark.slow
def test_sharded_over_two_processes_a_run_is_the_run_of_one(tiny, tmp_path, sharded):
    one = tmp_path / "run"
    launch(small(tiny, one, *ALL))
    rows, expected_rows = read_metrics(sharded), read_metrics(one)
    assert [row.keys() for row in rows] == [row.keys() for row in expected_rows]
    for row, expected in zip(rows, expected_rows):
        assert row == pytest.approx(expected, rel=2e-3, abs=2e-4)
    assert rows[1]["reward"] == pytest.approx(expected_rows[1]["reward"], rel=1e-6)
    assert all(row["ratio_error"] <= 1e-6 for row in rows[1:])

    assert contents(sharded).keys() == contents(one).keys()
    trained = transformer_of(one / "model")
    way = distance(trained, transformer_of(tiny))
    assert way > 0.01
    assert distance(transformer_of(sharded / "model"), trained) < 0.005 * way
    bases.load(str(sharded / "model"))


@pytest.mark.slow
def test_what_a_sharded_run_saves_is_whole(tiny, tmp_path, sharded):
    one = tmp_path / "run"
    launch(small(tiny, one, *ALL))
    way = distance(transformer_of(one / "model"), transformer_of(tiny))
    for path in sorted((one / "snapshots").iterdir()):
        expected = load_file(path)
        snapshot = load_file(sharded / "snapshots" / path.name)
        assert {name: tensor.shape for name, tensor in snapshot.items()} == {
            name: tensor.shape for name, tensor in expected.items()
        }
        assert distance(snapshot, expected) < 0.005 * way
    state, expected = newest_optimizer(sharded), newest_optimizer(one)
    assert state.keys() == expected.keys()
    for number in state:
        assert state[number]["exp_avg"].shape == expected[number]["exp_avg"].shape


DYING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from support import files

save = files.save_checkpoint

def save_and_die(*args):
    save(*args)
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

files.save_checkpoint = save_and_die
if __name__ == "__main__":
    train.main({argv!r})
"""


@pytest.mark.slow
def test_killed_a_sharded_run_goes_on_bit_for_bit(tiny, tmp_path, sharded):
    out = tmp_path / "run"
    argv = small(tiny, out, *ALL, "--shard")
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(root=str(ROOT), argv=argv))
    code, _, error = launch_process([], processes=2, script=script)
    assert code != 0 and "SIGKILL" in error
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-00001"]
    assert not (out / "model").exists()

    code, _, error = launch_process(argv, processes=2)
    assert code == 0, error
    assert read_metrics(out) == read_metrics(sharded)
    assert distance(read_weights(out), read_weights(sharded)) == 0
    assert distance(transformer_of(out / "model"), transformer_of(sharded / "model")) == 0


def shake(network):
    """Adds noise to the weights, so that none is zero and all of them matter."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def build_vae(folder):
    """The VAE of a Stable Diffusion 1 of random weights, in folder/vae."""
    random_bases.build("sd1", folder / "sd1", "cpu")
    os.rename(folder / "sd1" / "vae", folder / "vae")


def build_sit(folder):
    """A SiT of random weights -> what --model is."""
    build_vae(folder)
    network = shake(sit.SiT(12, 2, 4, 24, 2, 4, 5))
    save_file(network.state_dict(), folder / "net.safetensors", {"num_heads": "4"})
    return f"sit:{folder / 'net.safetensors'}"


def build_unet(folder):
    """A Stable Diffusion 1 of random weights -> what --model is."""
    random_bases.build("sd1", folder / "sd1", "cpu")
    return str(folder / "sd1")


def build_dit(folder):
    """A DiT of random weights -> what --model is. Its forward calls a part of a block alone."""
    small_bases.build_dit(folder / "dit")
    return str(folder / "dit")


@pytest.mark.slow
@pytest.mark.parametrize(
    "build, prompts, saved",
    [
        (build_unet, "a dark coat\na bag\n", "unet/diffusion_pytorch_model.safetensors"),
        (build_sit, "1\n3\n", "sit.safetensors"),
        (build_dit, "1\n3\n", "transformer/diffusion_pytorch_model.safetensors"),
    ],
)
def test_other_bases_can_be_sharded(tmp_path, monkeypatch, build, prompts, saved):
    # A smooth reward: the bytes of a JPEG jump with the rounding of one pixel.
    text = "def light(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"
    (tmp_path / "smooth.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    model = build(tmp_path)
    (tmp_path / "prompts.txt").write_text(prompts)
    flags = (
        "--eval_images 4 --eval_every 2 --save_every 2 --reward smooth:light --train all "
        "--kl 0.1 --diversity_features latents --decode_batch 2 --guidance 2 --batch 4 "
        "--checkpointing"
    ).split()
    flags += ["--prompts", tmp_path / "prompts.txt"]
    launch(small(model, tmp_path / "one", *flags))
    argv = small(model, tmp_path / "two", *flags, "--shard")
    code, _, error = launch_process(argv, processes=2, PYTHONPATH=str(tmp_path))
    assert code == 0, error
    for row, expected in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")):
        assert row == pytest.approx(expected, rel=2e-2, abs=2e-3)
    two, one = (load_file(tmp_path / out / "model" / saved) for out in ("two", "one"))
    base = bases.load(model).network.state_dict()
    way = distance(one, base)
    assert way > 0.001
    assert distance(two, one) < 0.02 * way


# --------------------------------------------------------------------------------------------------
# What cannot be sharded.


@pytest.mark.parametrize(
    "flags, processes, named",
    [
        ("", 1, "--shard: one process"),
        ("--lora 2", 2, "--lora"),
        ("--compile", 2, "--compile"),
        ("--prompts_per_step 3", 2, "--prompts_per_step 3"),
        ("--reward fid --reference 25", 2, "--reference 25"),
        ("--prompts_per_step 4 --updates 3 --steps 5 --window 0:4", 2, "--updates 3"),
    ],
)
def test_what_cannot_be_sharded_is_refused_in_one_line(
    tiny, tmp_path, capsys, monkeypatch, flags, processes, named
):
    monkeypatch.setattr(bases, "load", lambda *args: pytest.fail("a model was loaded"))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(SystemExit) as stop:
        launch(small(tiny, tmp_path / "run", "--shard", *flags.split()))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and named in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_network_with_a_weight_of_one_number_is_refused(tmp_path, capsys, monkeypatch):
    build_vae(tmp_path)
    network = shake(edm2.EDM2(12, 4, 5, 16, [1, 2], 1, [6], 16))
    edm2.save(network, tmp_path / "net.safetensors")
    (tmp_path / "prompts.txt").write_text("3\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ("--shard", "--reward", "jpeg:1", "--prompts", tmp_path / "prompts.txt")
    flags += ("--diversity_features", "latents")
    with pytest.raises(SystemExit) as stop:
        launch(small(f"edm2:{tmp_path / 'net.safetensors'}", tmp_path / "run", *flags))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "no weight that is one number" in line
