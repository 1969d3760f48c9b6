"""Sharding: dealt over two processes, a run is the run it is without, to rounding; what it writes is whole, and it goes on bit for bit."""
import pytest
import torch
from conftest import ROOT, contents, launch, launch_process, read_metrics, read_weights, small
from safetensors.torch import load_file
from test_models import names, prompts_of  # noqa: F401
from torch import nn

import bases
from support import sharding
from support import flags

ALL = ("--train all --kl 0.1 --ema 0.5 --snapshot_every 1 --reward class:1,fid:0.3 --reference 24 --iterations 3 --updates 2 --save_every 1").split()


def exported(out):
    return load_file(next((out / "model" / part / "diffusion_pytorch_model.safetensors" for part in ("transformer", "unet") if (out / "model" / part).is_dir())))


@pytest.fixture(scope="module")
def sharded(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded") / "run"
    code, _, error = launch_process(small(tiny, out, *ALL, "--shard"), processes=2)
    assert code == 0, error
    return out


def test_a_block_is_an_entry_of_an_outermost_list(tiny):
    assert sharding.blocks(bases.load(str(tiny)).network)
    network = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Tanh()}), nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))]))
    assert sharding.blocks(network) == [network[1]["a"], network[2][0]] and sharding.blocks(nn.Linear(1, 1)) == []


def test_what_is_not_dealt_passes_through():
    tensor = torch.ones(3, requires_grad=True)
    assert sharding.whole(tensor) is tensor and sharding.piece(tensor, tensor) is tensor and sharding.local(tensor) is tensor
    optimizer = torch.optim.AdamW([tensor])
    (5 * tensor).sum().backward()
    assert sharding.clip_gradients([tensor], 1.0) == pytest.approx(75 ** 0.5) and tensor.grad.norm().item() == pytest.approx(1, rel=1e-5)
    optimizer.step()
    twin = torch.optim.AdamW([torch.ones(3, requires_grad=True)])
    sharding.load_state(twin, sharding.whole_state(optimizer))
    assert all(torch.equal(twin.state_dict()["state"][0][k], v) for k, v in optimizer.state_dict()["state"][0].items())


@pytest.mark.slow
def test_sharded_over_two_processes_a_run_is_the_run_of_one(tiny, tmp_path, sharded):
    launch(small(tiny, tmp_path / "run", *ALL))
    mine, theirs = read_metrics(sharded), read_metrics(tmp_path / "run")
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    for a, b in zip(mine, theirs):
        assert a == pytest.approx(b, rel=2e-3, abs=2e-4)
    assert [row["reward"] for row in mine[1:2]] == pytest.approx([row["reward"] for row in theirs[1:2]], rel=1e-6)
    assert all(row["ratio_error"] <= 1e-6 for row in mine[1:])
    assert contents(sharded).keys() == contents(tmp_path / "run").keys()
    base, a, b = (load_file(tiny / "transformer" / "diffusion_pytorch_model.safetensors"), exported(sharded), exported(tmp_path / "run"))
    assert a.keys() == b.keys() == base.keys()
    way = sum((b[name] - base[name]).norm() for name in b)
    assert way > 0.01 and sum((a[name] - b[name]).norm() for name in b) < 0.005 * way
    for name in sorted(p.name for p in (sharded / "snapshots").iterdir()):
        snapshot, right = (load_file(out / "snapshots" / name) for out in (sharded, tmp_path / "run"))
        assert {n: t.shape for n, t in snapshot.items()} == {n: t.shape for n, t in right.items()}
        assert sum((snapshot[n] - right[n]).norm() for n in right) < 0.005 * way
    saved = [torch.load(sorted(out.glob("checkpoint-*"))[-1] / "optimizer.pt", weights_only=True)["state"] for out in (sharded, tmp_path / "run")]
    assert saved[0].keys() == saved[1].keys() and all(saved[0][i]["exp_avg"].shape == saved[1][i]["exp_avg"].shape for i in saved[0])
    bases.load(str(sharded / "model"))


DYING_RANK = """
import os, signal, sys
sys.path.insert(0, {root!r})
import runtime, train

save = files.save_checkpoint
def dies(*arguments):
    save(*arguments)
    os.environ["RANK"] == "0" and os.kill(os.getpid(), signal.SIGKILL)
files.save_checkpoint = dies
if __name__ == "__main__":
    train.main({argv!r})
"""


@pytest.mark.slow
def test_killed_a_sharded_run_goes_on_bit_for_bit(tiny, tmp_path, sharded):
    argv, script = small(tiny, tmp_path / "run", *ALL, "--shard"), tmp_path / "dying.py"
    script.write_text(DYING_RANK.format(root=str(ROOT), argv=argv))
    code, _, error = launch_process([], processes=2, script=script)
    assert code != 0 and "SIGKILL" in error
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-00001"] and not (tmp_path / "run" / "model").exists()
    code, _, error = launch_process(argv, processes=2)
    assert code == 0, error
    a, b = read_weights(tmp_path / "run"), read_weights(sharded)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert read_metrics(tmp_path / "run") == read_metrics(sharded)
    a, b = exported(tmp_path / "run"), exported(sharded)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sit"])
def test_every_base_can_be_dealt(names, tmp_path, family):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text in prompts_of(family)[:2]))
    argv = ("--device cpu --iterations 2 --prompts_per_step 2 --group_size 4 --select window --keep 3 --steps 4 --window 0:2 --updates 2 --nearest 2 --lr 0.001 --warmup 0 "
            "--eval_images 4 --eval_steps 2 --eval_every 2 --save_every 2 --snapshot_every 0 --reward jpeg:1 --diversity_features latents --decode_batch 2 --train all "
            "--kl 0.1 --guidance 2 --batch 4 --checkpointing").split() + ["--model", str(names[family]), "--prompts", str(tmp_path / "prompts.txt")]
    launch([*argv, "--out", str(tmp_path / "one")])
    code, _, error = launch_process([*argv, "--out", str(tmp_path / "two"), "--shard"], processes=2)
    assert code == 0, error
    for mine, theirs in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")):
        assert mine == pytest.approx(theirs, rel=2e-2, abs=2e-3)
    name = {"sd1": "unet/diffusion_pytorch_model", "sit": "sit"}[family]
    a, b = (load_file(tmp_path / out / "model" / f"{name}.safetensors") for out in ("two", "one"))
    weights = bases.load(str(names[family])).network.state_dict()
    way = sum((b[n].float() - weights[n].float()).norm() for n in b)
    assert a.keys() == b.keys() and way > 0.001 and sum((a[n] - b[n]).norm() for n in b) < 0.02 * way


REFUSED = [("", 0, "--shard: one process"), ("--lora 2", 2, "--lora"), ("--compile", 2, "--compile"), ("--prompts_per_step 3", 2, "--prompts_per_step 3"),
           ("--reward fid --reference 25", 2, "--reference 25"), ("--prompts_per_step 4 --updates 3 --steps 5 --window 0:4", 2, "--updates 3"),
           ("--eval_images 20 --prompts_per_step 3", 3, "--eval_images 20")]


@pytest.mark.parametrize("flags, processes, named", REFUSED, ids=[row[0] or "alone" for row in REFUSED])
def test_what_cannot_be_dealt_is_refused_in_one_line(tiny, tmp_path, capsys, monkeypatch, flags, processes, named):
    monkeypatch.setattr(bases, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setenv("WORLD_SIZE", str(processes)) if processes else None
    with pytest.raises(SystemExit) as left:
        launch(small(tiny, tmp_path / "run", "--shard", *flags.split()))
    error = capsys.readouterr().err.strip()
    assert left.value.code == 2 and named in error and "\n" not in error and not (tmp_path / "run").exists()


def test_a_network_with_weights_of_one_number_is_refused(names, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "prompts.txt").write_text("3\n")
    with pytest.raises(SystemExit) as left:
        launch(small(names["edm2"], tmp_path / "run", "--shard", "--prompts", tmp_path / "prompts.txt"))
    error = capsys.readouterr().err.strip()
    assert left.value.code == 2 and "no weight that is one number" in error and "\n" not in error
