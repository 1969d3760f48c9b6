"""Whole runs of train.py on a random base model: what they write, what moves, what stops them."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    command,
    contents,
    files,
    launch,
    launch_process,
    read_metrics,
    read_weights,
    small,
)
from equal_runs import (
    assert_agree,
    assert_close_rows,
    assert_equal_runs,
    assert_same_tensors,
    at_call,
    checkpoints,
    killed,
    moved,
    network,
    snapshots,
    spy,
)
from PIL import Image
from scipy.optimize import brentq

import bases
import prompting
import rewards
import train
from bases import generator
from bases.files import network_files
from bases.tensors import Weights, fingerprint
from commands import picture_sets, training
from rewards import classifier

METRICS = {
    "iteration",
    "loss",
    "kl",
    "clip_fraction",
    "grad_norm",
    "ratio_error",
    "reward",
    "diversity",
    "zero_std_fraction",
    "seconds_sample",
    "seconds_train",
    "peak_memory_gb",
}
EVALUATED = {"eval/accuracy", "eval/log_prob", "eval/vendi", "eval/distance", "eval/fid"}


# --------------------------------------------------------------------------------------------------
# What a run leaves behind.


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """A finished run of three iterations, and the model object that it trained."""
    out = tmp_path_factory.mktemp("done") / "run"
    flags = "--iterations 3 --reward class:1,ink:0.5 --kl 0.1 --snapshot_every 2".split()
    with pytest.MonkeyPatch.context() as patch:
        loaded = spy(patch, bases, "load")
        launch(small(tiny, out, *flags))
    return SimpleNamespace(out=out, model=loaded[0])


@pytest.mark.run
def test_the_run_folder_holds_what_is_documented(done):
    expected = "config.json metrics.jsonl report.png grids model snapshots"
    names = {"checkpoint-00002", "checkpoint-00003", *expected.split()}
    assert {path.name for path in done.out.iterdir()} == names
    checkpoint = {path.name for path in (done.out / "checkpoint-00003").iterdir()}
    assert checkpoint == {"weights.safetensors", "optimizer.pt", "state.json"}
    written = json.loads((done.out / "config.json").read_text())
    assert set(written) == {field.name for field in dataclasses.fields(train.Args)}
    assert written["reward"] == "class:1,ink:0.5"
    assert written["kl"] == 0.1
    assert written["iterations"] == 3


@pytest.mark.run
def test_every_line_of_the_metrics_is_complete_and_finite(done):
    first, *rows = read_metrics(done.out, clock=True)
    assert set(first) == {"iteration"} | EVALUATED
    assert first["iteration"] == 0
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(row) == METRICS | EVALUATED | {"reward/class", "reward/ink"}
        assert all(math.isfinite(value) for value in row.values())
        total = row["reward/class"] + 0.5 * row["reward/ink"]
        assert row["reward"] == pytest.approx(total, abs=1e-4)
        for name in ("seconds_sample", "seconds_train", "peak_memory_gb", "grad_norm", "kl"):
            assert row[name] > 0
        assert row["zero_std_fraction"] == 0


@pytest.mark.run
def test_the_grids_are_pictures_of_the_same_seeds(done):
    grids = sorted((done.out / "grids").iterdir())
    assert [grid.name for grid in grids] == ["00000.png", "00001.png", "00002.png", "00003.png"]
    sheets = [np.asarray(Image.open(grid)).astype(int) for grid in grids]
    assert {sheet.shape for sheet in sheets} == {(10 * 29 * 2, 2 * 29 * 2, 3)}
    drift = np.abs(sheets[0] - sheets[3]).mean()
    other_noise = np.abs(sheets[0][:, :56] - sheets[0][:, 58:114]).mean()
    assert 0 < drift < other_noise / 4


@pytest.mark.run
def test_the_saved_model_draws_what_the_trained_network_draws(done, tiny):
    prompts = prompting.read_prompts(tiny / "eval_prompts.jsonl")

    def draw(model):
        return picture_sets.generate(model, prompts, 2, 3, 1.5, 7, 20)

    saved = draw(bases.load(done.out / "model"))
    # Not bit for bit: the words went through their encoder in another batch.
    torch.testing.assert_close(saved, draw(done.model), rtol=0, atol=1e-3)
    assert not torch.allclose(saved, draw(bases.load(tiny)), rtol=0, atol=2e-2)


@pytest.mark.run
def test_plain_diffusers_loads_the_saved_transformer(done):
    from diffusers import SD3Transformer2DModel

    plain = SD3Transformer2DModel.from_pretrained(done.out / "model" / "transformer")
    assert_same_tensors(plain.state_dict(), done.model.network.state_dict())


@pytest.mark.slow
def test_the_saved_model_can_be_trained_on(done, tmp_path):
    launch(small(done.out / "model", tmp_path / "run"))
    assert len(read_metrics(tmp_path / "run")) == 3


@pytest.mark.run
def test_a_checkpoint_holds_the_trained_weights_and_their_averages(done):
    saved = read_weights(done.out)
    current = done.model.network.state_dict()
    raw = {name for name in saved if not name.startswith("average.")}
    assert_same_tensors({name: saved[name] for name in raw}, {name: current[name] for name in raw})
    assert all("attn" in name for name in saved)
    assert len(saved) == 3 * len(raw)


@pytest.mark.run
def test_text_encoder_and_tokenizer_are_copied_as_they_were(done, tiny):
    for part in ("text_encoder", "tokenizer", "scheduler", "reward", "evaluator"):
        assert contents(done.out / "model" / part) == contents(tiny / part)


@pytest.mark.slow
def test_the_table_at_the_end_shows_before_and_after(tiny, tmp_path, capfd):
    launch(small(tiny, tmp_path / "run"))
    lines = capfd.readouterr().out.splitlines()
    first, *_, last = read_metrics(tmp_path / "run")
    start = [line.split() for line in lines].index(["before", "after"])
    shown = {}
    for line in lines[start + 1 : start + 6]:
        name, before, after, *_ = line.split()
        shown["eval/" + name] = (float(before), float(after))
    assert shown.keys() == EVALUATED
    for name, values in shown.items():
        assert values == pytest.approx((first[name], last[name]), abs=1e-3)


@pytest.mark.slow
def test_averaged_weights_are_judged_and_saved_and_the_raw_ones_go_on(tiny, tmp_path):
    launch(small(tiny, tmp_path / "ema", "--ema", 0.5, "--iterations", 3))
    launch(small(tiny, tmp_path / "raw", "--ema", 0, "--iterations", 3))
    saved, base = read_weights(tmp_path / "ema"), network(tiny)
    raw = read_weights(tmp_path / "raw")
    raw = {name: value for name, value in raw.items() if not name.startswith("average.")}
    assert_same_tensors({name: saved[name] for name in raw}, raw)
    exported = network(tmp_path / "ema" / "model")
    for name in raw:
        assert torch.equal(saved["average.ema." + name], exported[name])
    way_of_average = sum((exported[name] - base[name]).norm() for name in raw)
    assert 0 < way_of_average < sum((raw[name] - base[name]).norm() for name in raw)


# --------------------------------------------------------------------------------------------------
# Rollout and update agree.


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param("--select all --keep 4 --updates 1", marks=pytest.mark.run),
        pytest.param("--select all --keep 4 --updates 1 --guidance 2", marks=pytest.mark.slow),
        pytest.param("--kernel ancestral", marks=pytest.mark.slow),
        pytest.param("--kernel flow-grpo", marks=pytest.mark.slow),
        pytest.param("--train all --ema 0.5", marks=pytest.mark.slow),
        pytest.param("--batch 3", marks=pytest.mark.slow),
    ],
)
def test_the_ratio_is_one_before_the_first_update(tiny, tmp_path, monkeypatch, flags):
    """On many CPUs it is 1 to the bit; others round by the size of a batch."""
    returned = spy(monkeypatch, train, "update")
    launch(small(tiny, tmp_path / "run", "--prompt_noise", 0.5, "--batch", 1000, *flags.split()))
    assert len(returned) == 2
    assert all(metrics["ratio_error"] <= 1e-6 for metrics in returned)


def rounded_latents(trajectory, args):
    trajectory.latents = trajectory.latents.bfloat16().float()
    return trajectory


def other_noise(trajectory, args):
    right = trajectory.condition
    count = trajectory.latents.shape[1]

    def of_the_next_rollout(rows, u):
        return right((rows + 1) % count, u)

    trajectory.condition = of_the_next_rollout
    return trajectory


def no_noise(trajectory, args):
    right = trajectory.condition

    def without_noise(rows, u):
        return right(rows, 0 * u)

    trajectory.condition = without_noise
    return trajectory


def other_times(trajectory, args):
    policy = args[1]
    policy.times = policy.times * 0.999
    return trajectory


def other_guidance(trajectory, args):
    policy = args[1]
    policy.guidance = 1.01
    return trajectory


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake", [rounded_latents, other_noise, no_noise, other_times, other_guidance]
)
def test_an_update_that_disagrees_with_the_rollout_is_caught(tiny, tmp_path, monkeypatch, mistake):
    at_call(monkeypatch, train, "rollout", 2, mistake)
    with pytest.raises(FloatingPointError, match="iteration 2.*ratio"):
        launch(small(tiny, tmp_path / "run", "--prompt_noise", 0.5))
    assert checkpoints(tmp_path / "run") == ["checkpoint-00001"]


@pytest.mark.slow
def test_a_run_is_the_same_whether_prompts_are_encoded_once_or_each_time(
    tiny, tmp_path, monkeypatch
):
    launch(small(tiny, tmp_path / "once", "--prompt_noise", 0.5))
    monkeypatch.setattr(generator, "REMEMBERED", 0)
    launch(small(tiny, tmp_path / "anew", "--prompt_noise", 0.5))
    assert_close_rows(read_metrics(tmp_path / "once"), read_metrics(tmp_path / "anew"))


# --------------------------------------------------------------------------------------------------
# What moves.


@pytest.mark.run
def test_only_attention_moves_when_only_attention_is_trained(tiny, tmp_path):
    launch(small(tiny, tmp_path / "run", "--train", "attention"))
    names = moved(network(tiny), network(tmp_path / "run" / "model"))
    assert names and all(".attn." in name for name in names)
    for part in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"):
        assert f"transformer_blocks.0.attn.{part}.weight" in names


@pytest.mark.slow
def test_all_weights_that_matter_move_when_all_are_trained(tiny, tmp_path):
    launch(small(tiny, tmp_path / "run", "--train", "all"))
    names = moved(network(tiny), network(tmp_path / "run" / "model"))
    assert {"proj_out.weight", "context_embedder.weight", "pos_embed.proj.weight"} <= names
    for part in ("attn.to_q", "ff.net.2", "norm1.linear"):
        assert f"transformer_blocks.0.{part}.weight" in names


@pytest.mark.slow
def test_drift_off_is_plain_grpo(tiny, tmp_path):
    by_hand = "--select all --keep 4 --prompt_noise 0 --diversity 0".split()
    launch(small(tiny, tmp_path / "off", "--drift", "off", "--select", "all", "--keep", "4"))
    launch(small(tiny, tmp_path / "by_hand", *by_hand))
    assert read_metrics(tmp_path / "off") == read_metrics(tmp_path / "by_hand")
    assert_same_tensors(read_weights(tmp_path / "off"), read_weights(tmp_path / "by_hand"))


@pytest.mark.slow
def test_checkpoints_come_at_the_named_iterations_and_the_newest_stay(tiny, tmp_path):
    flags = ("--iterations", 5, "--save_every", 2, "--eval_every", 2)
    launch(small(tiny, tmp_path / "two", *flags, "--keep_checkpoints", 2))
    launch(small(tiny, tmp_path / "all", *flags, "--keep_checkpoints", 9))
    kept = ["checkpoint-00002", "checkpoint-00004", "checkpoint-00005"]
    assert checkpoints(tmp_path / "two") == kept[1:]
    assert checkpoints(tmp_path / "all") == kept
    rows = read_metrics(tmp_path / "two")
    assert [row["iteration"] for row in rows if row.keys() >= EVALUATED] == [0, 2, 4, 5]


@pytest.mark.slow
def test_every_iteration_has_its_own_noise(tiny, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "a dark coat", "label": 4}\n')
    flags = ("--lr", 1e-12, "--prompts", tmp_path / "one.jsonl", "--diversity", 0)
    launch(small(tiny, tmp_path / "run", *flags))
    _, first, second = read_metrics(tmp_path / "run")
    assert first["eval/fid"] == second["eval/fid"]
    assert first["reward"] != second["reward"]


@pytest.mark.slow
def test_a_strong_kl_holds_the_policy_near_the_base(tiny, tmp_path):
    away = {}
    for weight in (1e-9, 1000):
        out = tmp_path / str(weight)
        flags = ("--iterations", 6, "--kl", weight, "--diversity", 0, "--clip", 1000)
        launch(small(tiny, out, *flags))
        away[weight] = read_metrics(out)[-1]["kl"]
    assert away[1000] < away[1e-9] / 2


@pytest.mark.run
def test_the_default_run_folder_is_named_after_the_flags(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def folder(*flags):
        launch(["--model", str(tiny), "--eval_images", "20", *flags, "--dry_run"])
        return Path(json.loads(capfd.readouterr().out.splitlines()[0])["out"])

    names = {folder(), folder("--seed", "1"), folder("--reward", "class:1,ink:0.2")}
    assert len(names) == 3
    assert {name.parent for name in names} == {Path("runs")}


# --------------------------------------------------------------------------------------------------
# Snapshots: the trained weights, and averages whose weights are powers of time.


@pytest.fixture(scope="module")
def snapped(tiny, tmp_path_factory):
    """A run that kept a snapshot of each of its five iterations."""
    out = tmp_path_factory.mktemp("snapped") / "run"
    flags = "--iterations 5 --snapshot_every 1 --keep_snapshots 9 --lr 0.01".split()
    launch(small(tiny, out, *flags))
    return out


def snapshot_names(*iterations):
    """The files of the snapshots of these iterations, in order."""
    names = []
    for iteration in iterations:
        for length in ("-0.050", "-0.100", ""):
            names.append(f"{iteration:05d}{length}.safetensors")
    return names


@pytest.mark.slow
def test_a_snapshot_says_whose_it_is(snapped, tiny):
    mark = fingerprint(Weights(network_files(tiny)))
    found = snapshots(snapped)
    assert list(found) == snapshot_names(1, 2, 3, 4, 5)
    for name, (tensors, facts) in found.items():
        assert facts["base"] == str(tiny)
        assert facts["fingerprint"] == mark
        assert facts["iteration"] == str(int(name[:5]))
        assert facts["sigma_rel"] == {"-0.050": "0.05", "-0.100": "0.1"}.get(name[5:11], "")
        assert all("attn" in key and value.dtype == torch.float32 for key, value in tensors.items())


@pytest.mark.slow
def test_the_last_snapshot_is_the_final_model(snapped, tiny):
    tensors, _ = snapshots(snapped)["00005.safetensors"]
    final = network(snapped / "model")
    assert_same_tensors(tensors, {name: final[name] for name in tensors})
    assert moved(network(tiny), final) <= tensors.keys()


@pytest.mark.slow
@pytest.mark.parametrize("length, last", [(0.05, 1), (0.05, 5), (0.1, 3), (0.1, 5)])
def test_the_averages_weigh_each_iteration_by_a_power_of_time(snapped, length, last):
    """The profile s^gamma, integrated over each iteration; its relative std is `length`."""

    def std_error(g):
        return (g + 1) / (g + 3) - ((g + 1) / (g + 2)) ** 2 - length**2

    exponent = brentq(std_error, 0, 1000, xtol=1e-12) + 1
    found = snapshots(snapped)
    average, _ = found[f"{last:05d}-{length:.3f}.safetensors"]
    for name, value in average.items():
        expected = 0
        for t in range(1, last + 1):
            part = (t / last) ** exponent - ((t - 1) / last) ** exponent
            expected = expected + part * found[f"{t:05d}.safetensors"][0][name].double()
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, iterations",
    [
        ("--snapshot_every 2 --keep_snapshots 9", (2, 4, 5)),
        ("--snapshot_every 2 --keep_snapshots 2", (4, 5)),
        ("--snapshot_every 0", ()),
    ],
)
def test_snapshots_come_at_the_named_iterations_and_the_newest_stay(
    tiny, tmp_path, flags, iterations
):
    launch(small(tiny, tmp_path / "run", "--iterations", 5, *flags.split()))
    assert list(snapshots(tmp_path / "run")) == snapshot_names(*iterations)
    assert (tmp_path / "run" / "snapshots").is_dir() == bool(iterations)


@pytest.mark.slow
def test_snapshots_change_nothing_else(snapped, tiny, tmp_path):
    launch(small(tiny, tmp_path / "run", "--iterations", 5, "--lr", 0.01))
    assert read_metrics(tmp_path / "run") == read_metrics(snapped)
    assert contents(tmp_path / "run" / "model") == contents(snapped / "model")


# --------------------------------------------------------------------------------------------------
# Interruption.

LONG = (
    "--iterations 4 --save_every 2 --keep_checkpoints 9 --ema 0.5 --kl 0.1 --prompt_noise 0.25 "
    "--diversity 0.3 --snapshot_every 1 --keep_snapshots 3"
).split()


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    launch(small(tiny, out, *LONG))
    return out


def run_until_killed(argv, iteration):
    """Runs train.py until the end of the update of this iteration, and kills it there."""
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, train, "update", iteration, killed)
        with pytest.raises(KeyboardInterrupt):
            launch(argv)


@pytest.mark.parametrize(
    "iteration",
    [
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(3, marks=pytest.mark.run),
        pytest.param(4, marks=pytest.mark.slow),
    ],
)
def test_a_run_cut_off_in_an_iteration_goes_on_to_the_same_bits(tiny, tmp_path, whole, iteration):
    out = tmp_path / "run"
    run_until_killed(small(tiny, out, *LONG), iteration)
    assert checkpoints(out) == ["checkpoint-00002"][: iteration > 2]
    assert len(read_metrics(out)) == iteration
    launch(small(tiny, out, *LONG))
    assert_equal_runs(out, whole)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("checkpoint-00002", marks=pytest.mark.slow),
        pytest.param("checkpoint-00004", marks=pytest.mark.run),
        pytest.param("model", marks=pytest.mark.slow),
        pytest.param("00004.png", marks=pytest.mark.slow),
        pytest.param("config.json", marks=pytest.mark.slow),
        pytest.param("metrics.jsonl", marks=pytest.mark.slow),
        pytest.param("00004-0.100.safetensors", marks=pytest.mark.slow),
    ],
)
def test_a_kill_during_a_write_leaves_the_last_checkpoint_whole(tiny, tmp_path, whole, target):
    out = tmp_path / "run"
    replace = os.replace

    def torn(source, destination):
        if Path(destination).name == target:
            raise KeyboardInterrupt("killed")
        replace(source, destination)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", torn)
        with pytest.raises(KeyboardInterrupt):
            launch(small(tiny, out, *LONG))
    is_late = target not in ("checkpoint-00002", "config.json", "metrics.jsonl")
    assert checkpoints(out) == ["checkpoint-00002"][:is_late]
    assert not (out / target).exists()
    if is_late:
        assert contents(out / "checkpoint-00002") == contents(whole / "checkpoint-00002")
    launch(small(tiny, out, *LONG))
    assert_equal_runs(out, whole)


@pytest.mark.slow
def test_a_half_written_line_and_leftover_temporaries_do_no_harm(tiny, tmp_path, whole):
    out = tmp_path / "run"
    run_until_killed(small(tiny, out, *LONG), 4)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "lo')
    (out / ".tmp-checkpoint-00004").mkdir()
    (out / ".tmp-checkpoint-00004" / "weights.safetensors").write_bytes(b"half")
    (out / ".tmp-metrics.jsonl").write_text("half")
    launch(small(tiny, out, *LONG))
    assert_equal_runs(out, whole)


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bits(tiny, tmp_path):
    out = tmp_path / "run"
    flags = "--iterations 60 --eval_every 60 --save_every 2 --keep_checkpoints 2".split()
    argv = small(tiny, out, *flags)
    process = subprocess.Popen(command(argv), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.time() + 600
    while "checkpoint-00002" not in checkpoints(out):
        assert process.poll() is None and time.time() < limit
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "model").exists()
    launch(argv)
    launch(small(tiny, tmp_path / "whole", *flags))
    assert_equal_runs(out, tmp_path / "whole")


@pytest.mark.slow
def test_a_finished_run_says_so_and_is_left_alone(tiny, tmp_path, capfd):
    argv = small(tiny, tmp_path / "run")
    launch(argv)
    before = files(tmp_path / "run")
    capfd.readouterr()
    launch(argv)
    assert "already complete" in capfd.readouterr().out
    assert files(tmp_path / "run") == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(tiny, tmp_path, capsys, number):
    flags = ("--iterations", 4, "--save_every", 100)
    launch(small(tiny, tmp_path / "whole", *flags))

    def signalled(metrics, args):
        os.kill(os.getpid(), number)
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, train, "update", 2, signalled)
        with pytest.raises(SystemExit) as stopped:
            launch(small(tiny, tmp_path / "stopped", *flags))
    assert stopped.value.code == 128 + number
    assert "stopped after checkpoint 2" in capsys.readouterr().out
    assert checkpoints(tmp_path / "stopped") == ["checkpoint-00002"]
    assert not (tmp_path / "stopped" / "model").exists()
    launch(small(tiny, tmp_path / "stopped", *flags))
    assert read_metrics(tmp_path / "stopped") == read_metrics(tmp_path / "whole")
    stopped_model, whole_model = tmp_path / "stopped" / "model", tmp_path / "whole" / "model"
    assert_same_tensors(network(stopped_model), network(whole_model))


# --------------------------------------------------------------------------------------------------
# Several processes. Runs in this process have one thread, and so do these.


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_groups_across_them(tiny, tmp_path):
    flags = (
        "--prompts_per_step 3 --group_size 5 --keep 3 --updates 9 --ema 0.5 --kl 0.1 --gardo "
        "--std batch --eval_images 30"
    ).split()
    launch(small(tiny, tmp_path / "one", *flags))
    code, out, error = launch_process(small(tiny, tmp_path / "two", *flags), processes=2)
    assert code == 0, error
    assert out.count("before") == 1
    assert_agree(tmp_path / "one", tmp_path / "two", tiny)


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, flags",
    [
        (3, "--guidance 2 --batch 2"),
        (4, "--prompts_per_step 1 --keep 2 --updates 4 --reward ink:1,margin:0.1"),
    ],
)
def test_more_processes_do_what_one_does(tiny, tmp_path, processes, flags):
    launch(small(tiny, tmp_path / "one", *flags.split()))
    code, _, error = launch_process(small(tiny, tmp_path / "more", *flags.split()), processes)
    assert code == 0, error
    assert_agree(tmp_path / "one", tmp_path / "more", tiny)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(tiny, tmp_path, whole):
    argv = small(tiny, tmp_path / "run", *LONG)
    run_until_killed(argv, 4)
    code, _, error = launch_process(argv, processes=2)
    assert code == 0, error
    assert_agree(tmp_path / "run", whole, tiny)
    code, out, error = launch_process(argv, processes=2)
    assert code == 0 and out.count("already complete") == 1, error


SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
import train
from rewards import classifier
from support import processes
{body}
if __name__ == "__main__":
    train.main({argv!r})
"""

FAILS_ON_RANK_1 = """
right = classifier.NAMES["class"]
calls = []
def wrong(logits, labels, images):
    calls.append(0)
    return right(logits, labels, images) * (float("nan") if len(calls) == 2 else 1)
if os.environ["RANK"] == "1":
    classifier.NAMES["class"] = wrong
"""


def run_script(tmp_path, body, argv):
    """A run on two processes with `body` before it -> the finished process."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), body=body, argv=argv))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc_per_node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, timeout=900, env=environment)


@pytest.mark.slow
def test_a_reward_that_fails_in_one_process_stops_them_all(tiny, tmp_path):
    out = tmp_path / "run"
    ended = run_script(tmp_path, FAILS_ON_RANK_1, small(tiny, out))
    assert ended.returncode != 0
    assert "FloatingPointError" in ended.stderr and "class" in ended.stderr
    assert checkpoints(out) == ["checkpoint-00001"]
    assert len(read_metrics(out)) == 2
    assert not (out / "model").exists()


# --------------------------------------------------------------------------------------------------
# NaN and infinity.


def poisoned_reward(poison):
    """The second reward is poison(the right one)."""

    def plant(monkeypatch):
        calls = []
        right = classifier.NAMES["class"]

        def wrong(logits, labels, images):
            calls.append(0)
            result = right(logits, labels, images)
            return poison(result) if len(calls) == 2 else result

        monkeypatch.setitem(classifier.NAMES, "class", wrong)

    return plant


def one_bad(number):
    """-> a function that puts a number in the place of the fourth."""

    def poison(result):
        return torch.where(torch.arange(len(result)) == 3, number, result)

    return poison


def poisoned_loss(poison):
    """The loss of the first update of iteration 2 (there are two updates an iteration)."""

    def plant(monkeypatch):
        at_call(monkeypatch, train, "clipped_loss", 3, lambda loss, args: poison(loss, args[0]))

    return plant


def nan_weight(monkeypatch):
    """A weight becomes NaN while iteration 2 is sampled."""

    def poison(groups, args):
        setup = args[1]
        with torch.no_grad():
            next(iter(setup.trained.values()))[0] = float("nan")
        return groups

    at_call(monkeypatch, train, "sample_groups", 2, poison)


POISONS = {
    "NaN reward": (poisoned_reward(one_bad(float("nan"))), "reward class"),
    "misshapen reward": (poisoned_reward(lambda result: result[:, None]), "reward class"),
    "infinite loss": (poisoned_loss(lambda loss, ratio: loss + float("inf")), "loss"),
    "infinite gradient": (
        poisoned_loss(lambda loss, ratio: loss + (ratio - ratio.detach()).sqrt()),
        "gradient",
    ),
    "NaN weight": (nan_weight, "not finite"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.run if name == "NaN reward" else pytest.mark.slow)
        for name in POISONS
    ],
)
def test_nan_or_infinity_stops_the_run_before_the_step(tiny, tmp_path, monkeypatch, name):
    plant, cause = POISONS[name]
    out = tmp_path / "run"
    loaded = spy(monkeypatch, bases, "load")
    steps = spy(monkeypatch, torch.optim.AdamW, "step")
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        with pytest.raises(FloatingPointError) as error:
            launch(small(tiny, out))
    assert "iteration 2" in str(error.value) and cause in str(error.value)
    assert len(steps) == 2
    assert checkpoints(out) == ["checkpoint-00001"]
    assert not (out / "model").exists()
    assert len(read_metrics(out)) == 2
    if name != "NaN weight":
        saved, current = read_weights(out), loaded[0].network.state_dict()
        assert_same_tensors(saved, {name: current[name] for name in saved})
    launch(small(tiny, out))
    launch(small(tiny, tmp_path / "whole"))
    assert_equal_runs(out, tmp_path / "whole")


# --------------------------------------------------------------------------------------------------
# Learning.


@pytest.mark.slow
def test_equal_rewards_teach_nothing_and_break_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(
        classifier.NAMES, "class", lambda logits, labels, images: torch.full((len(images),), 0.1)
    )
    launch(small(tiny, tmp_path / "plain", "--drift", "off", "--select", "all", "--keep", "4"))
    for row in read_metrics(tmp_path / "plain")[1:]:
        assert row["zero_std_fraction"] == 1
        assert row["grad_norm"] == 0
    base = network(tiny)
    assert moved(base, network(tmp_path / "plain" / "model")) == set()
    launch(small(tiny, tmp_path / "shaped", "--diversity", 0.3))
    assert moved(base, network(tmp_path / "shaped" / "model"))


@pytest.mark.slow
def test_diversity_that_is_not_paid_is_measured_in_the_finished_pictures_alone(
    tiny, tmp_path, monkeypatch
):
    sizes = []
    features = classifier.load_classifier(tiny / "reward").features

    def counted(images):
        sizes.append(len(images))
        return features(images)

    monkeypatch.setattr(training, "load_features", lambda *which: counted)
    # The second weight is lost in float32, and has two more steps to look at.
    for weight, states in ((0, 1), (1e-300, 3)):
        sizes.clear()
        launch(small(tiny, tmp_path / f"{weight}", "--diversity", weight))
        assert sum(sizes) == 2 * 8 * states
    assert read_metrics(tmp_path / "0") == read_metrics(tmp_path / "1e-300")
    assert_same_tensors(read_weights(tmp_path / "0"), read_weights(tmp_path / "1e-300"))


@pytest.mark.slow
@pytest.mark.parametrize("has_judge", [True, False])
def test_no_network_sees_more_pictures_at_once_than_reward_batch(
    tiny, tmp_path, monkeypatch, has_judge
):
    shutil.copytree(tiny, tmp_path / "model")
    if not has_judge:
        shutil.rmtree(tmp_path / "model" / "evaluator")
    sizes = []
    features = classifier.load_classifier(tiny / "reward").features
    score = rewards.Reward.score
    open_reference_set = training.open_reference_set

    def counted(images):
        sizes.append(len(images))
        return features(images)

    def counted_reference_set(*which):
        return dataclasses.replace(open_reference_set(*which), features=counted)

    def counted_score(self, images, *rest):
        sizes.append(len(images))
        return score(self, images, *rest)

    monkeypatch.setattr(training, "load_features", lambda *which: counted)
    monkeypatch.setattr(training, "open_reference_set", counted_reference_set)
    monkeypatch.setattr(rewards.Reward, "score", counted_score)
    flags = ("--reward", "class:1,fid:0.3", "--reference", 24, "--reward_batch", 3)
    launch(small(tmp_path / "model", tmp_path / "run", *flags))
    assert max(sizes) == 3 and sum(sizes) > 100


@pytest.mark.slow
def test_groups_of_two_work(tiny, tmp_path):
    launch(small(tiny, tmp_path / "run", "--group_size", 2, "--keep", 2, "--nearest", 1))
    assert all(row["grad_norm"] > 0 for row in read_metrics(tmp_path / "run")[1:])


TEACH = (
    "--iterations 14 --prompts_per_step 4 --group_size 16 --keep 12 --train all --lr 0.005 "
    "--kernel cps --eta 1 --std batch --clip 1 --eval_every 14 --save_every 14 --updates 2 "
    "--tau1 0.6 --tau2 1.2 --psi 1 --prompt_noise 0.25"
).split()


PLAIN = "--select all --diversity 0 --prompt_noise 0"


def rise(out, name):
    """How much a metric rose from the first three iterations to the last three."""
    curve = [row[name] for row in read_metrics(out)[1:]]
    return np.mean(curve[-3:]) - np.mean(curve[:3])


@pytest.mark.parametrize(
    "flags, sign",
    [
        pytest.param(f"{PLAIN} --keep 16", 1, marks=pytest.mark.run),
        pytest.param(f"{PLAIN} --keep 16", -1, marks=pytest.mark.slow),
        pytest.param("--diversity 0 --select window", 1, marks=pytest.mark.slow),
        pytest.param("--diversity 0.3", 1, marks=pytest.mark.slow),
    ],
)
def test_the_mean_reward_rises(tiny, tmp_path, monkeypatch, flags, sign):
    monkeypatch.setitem(
        classifier.NAMES, "ink", lambda logits, labels, images: images.mean((1, 2, 3))
    )
    launch(small(tiny, tmp_path / "run", *TEACH, "--reward", f"ink:{sign}", *flags.split()))
    assert rise(tmp_path / "run", "reward") > 0.02


@pytest.mark.slow
def test_diversity_alone_rises_when_it_alone_is_paid(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(
        classifier.NAMES, "class", lambda logits, labels, images: torch.zeros(len(images))
    )
    flags = "--reward class:1 --diversity 1 --diversity_features latents".split()
    launch(small(tiny, tmp_path / "run", *TEACH, *flags))
    assert rise(tmp_path / "run", "diversity") > 0.1


# --------------------------------------------------------------------------------------------------
# The command.


@pytest.mark.run
def test_dry_run_prints_configuration_and_sizes_and_writes_nothing(
    tiny, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(bases, "load", lambda *args: pytest.fail("a model was loaded"))
    before = contents(tiny)
    flags = ("--dry_run", "--prompts_per_step", 3, "--group_size", 5, "--passes", 2)
    launch(small(tiny, tmp_path / "run", *flags))
    first, rest = capfd.readouterr().out.split("\n", 1)
    assert json.loads(first)["group_size"] == 5
    for size in ("15 rollouts", "18 pairs", "4 optimizer steps", "9 pairs", "30 rollouts"):
        assert size in rest
    assert list(tmp_path.iterdir()) == []
    assert contents(tiny) == before


@pytest.mark.slow
def test_the_command_runs_from_any_folder(tiny, tmp_path):
    code, out, error = launch_process(small(tiny, tmp_path / "run"), processes=1, cwd=tmp_path)
    assert code == 0, error
    assert (tmp_path / "run" / "model").is_dir()
    assert "before" in out
    launch(small(tiny, tmp_path / "here"))
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "here")
