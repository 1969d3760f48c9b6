"""Whole runs of train.py on a random base model of a few thousand weights: what they write, what moves, what stops them."""
import dataclasses
import json
import math
import os
import re
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
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.optimize import brentq

import eval as evaluation
from support import flags
from commands import picture_sets
import bases
from bases import files as base_files
from bases import generator
import prompting
import rewards
from rewards import classifier
from support import files
from support import processes
import train
from bases import tensors
from conftest import ROOT, build_model, command, contents, files, launch, launch_process, read_metrics, read_weights, small

METRICS = {"iteration", "loss", "kl", "clip_fraction", "grad_norm", "ratio_error", "reward", "diversity", "zero_std_fraction",
           "seconds_sample", "seconds_train", "peak_memory_gb"}
JUDGED = {"eval/accuracy", "eval/log_prob", "eval/vendi", "eval/distance", "eval/fid"}


def checkpoints(out):
    return sorted(path.name for path in Path(out).glob("checkpoint-*"))


def network(folder):
    return bases.load(folder).network.state_dict()


def spy(monkeypatch, name):
    """Lets train.<name> run as before and collects what it returns."""
    returned, function = [], getattr(train, name)

    def wrapper(*args, **kwargs):
        returned.append(function(*args, **kwargs))
        return returned[-1]
    monkeypatch.setattr(train, name, wrapper)
    return returned


def at_call(monkeypatch, owner, name, number, action):
    """The number-th call of owner.name runs action(result of the call, its arguments) and returns what that returns."""
    calls, function = [], getattr(owner, name)

    def wrapper(*args, **kwargs):
        calls.append(args)
        result = function(*args, **kwargs)
        return action(result, args) if len(calls) == number else result
    monkeypatch.setattr(owner, name, wrapper)


def snapshots(out):
    """{file name: (tensors, facts)} of a run; the bytes of equal files may differ in the order of the facts."""
    found = {}
    for path in sorted((Path(out) / "snapshots").glob("*")):
        with safe_open(path, "pt") as file:
            found[path.name] = load_file(path), file.metadata()
    return found


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def optimizer_state(out):
    state = torch.load(Path(out) / checkpoints(out)[-1] / "optimizer.pt", weights_only=True)
    return {f"{i}.{name}": value for i, row in state["state"].items() for name, value in row.items()}


def assert_equal_runs(a, b):
    """Two runs with the same flags ended with the same bits."""
    assert read_metrics(a) == read_metrics(b)
    assert checkpoints(a) == checkpoints(b)
    same(read_weights(a), read_weights(b))
    same(optimizer_state(a), optimizer_state(b))
    for part in ("model", "grids"):
        assert contents(a / part) == contents(b / part)
    mine, theirs = snapshots(a), snapshots(b)
    assert {name: facts for name, (_, facts) in mine.items()} == {name: facts for name, (_, facts) in theirs.items()}
    for name in mine:
        same(mine[name][0], theirs[name][0])


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind.

@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """A finished run of three iterations, and the model object that it trained."""
    out, loaded = tmp_path_factory.mktemp("done") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, models, "load", 1, lambda model, args: loaded.append(model) or model)
        launch(small(tiny, out, "--iterations", 3, "--keep_checkpoints", 2, "--reward", "class:1,ink:0.5", "--kl", 0.1, "--snapshot_every", 2))
    return SimpleNamespace(out=out, model=loaded[0])


def test_the_run_folder_holds_what_is_documented(done):
    assert {path.name for path in done.out.iterdir()} == {
        "config.json", "metrics.jsonl", "grids", "model", "snapshots", "checkpoint-00002", "checkpoint-00003"}
    assert {path.name for path in (done.out / "checkpoint-00003").iterdir()} == {"weights.safetensors", "optimizer.pt", "state.json"}
    written = json.loads((done.out / "config.json").read_text())
    assert set(written) == {f.name for f in dataclasses.fields(train.Args)}
    assert written["reward"] == "class:1,ink:0.5" and written["kl"] == 0.1 and written["iterations"] == 3


def test_every_line_of_the_metrics_is_complete_and_finite(done):
    first, *rows = read_metrics(done.out, clock=True)
    assert first["iteration"] == 0 and set(first) == {"iteration"} | JUDGED
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(row) == METRICS | JUDGED | {"reward/class", "reward/ink"}
        assert all(math.isfinite(value) for value in row.values())
        assert row["reward"] == pytest.approx(row["reward/class"] + 0.5 * row["reward/ink"], abs=1e-4)
        assert row["seconds_sample"] > 0 and row["seconds_train"] > 0 and row["peak_memory_gb"] > 0 and row["grad_norm"] > 0


def test_the_kl_to_the_base_is_measured(done):
    assert all(row["kl"] > 0 for row in read_metrics(done.out)[1:])


def test_the_grids_are_pictures_of_the_same_seeds(done):
    grids = sorted((done.out / "grids").iterdir())
    assert [grid.name for grid in grids] == ["00000.png", "00001.png", "00002.png", "00003.png"]
    sheets = [np.asarray(Image.open(grid)).astype(int) for grid in grids]
    assert {sheet.shape for sheet in sheets} == {(10 * 29 * 2, 2 * 29 * 2, 3)}
    drift = np.abs(sheets[0] - sheets[3]).mean()
    other_noise = np.abs(sheets[0][:, :56] - sheets[0][:, 58:114]).mean()
    assert 0 < drift < other_noise / 4


def test_the_saved_model_draws_what_the_trained_network_draws(done, tiny):
    prompts = prompting.read_prompts(tiny / "eval_prompts.jsonl")
    draw = lambda model: picture_sets.generate(model, prompts, 2, 3, 1.5, 7, 20)
    saved = draw(bases.load(done.out / "model"))
    torch.testing.assert_close(saved, draw(done.model), rtol=0, atol=1e-3)      # the words went through their encoder in another batch
    assert not torch.allclose(saved, draw(bases.load(tiny)), rtol=0, atol=2e-2)


def test_plain_diffusers_loads_the_saved_transformer(done):
    from diffusers import SD3Transformer2DModel
    plain = SD3Transformer2DModel.from_pretrained(done.out / "model" / "transformer")
    same(plain.state_dict(), done.model.network.state_dict())


def test_the_saved_model_can_be_trained_on(done, tmp_path):
    launch(small(done.out / "model", tmp_path / "run"))
    assert len(read_metrics(tmp_path / "run")) == 3


def test_a_checkpoint_holds_the_trained_weights(done):
    saved, now = read_weights(done.out), done.model.network.state_dict()
    averages = {name for name in saved if name.startswith("average.")}
    same({name: saved[name] for name in saved.keys() - averages}, {name: now[name] for name in saved.keys() - averages})
    assert all("attn" in name for name in saved) and len(saved) == 1.5 * len(averages)


def test_the_table_at_the_end_shows_before_and_after(tiny, tmp_path, capfd):
    launch(small(tiny, tmp_path / "run"))
    lines = capfd.readouterr().out.splitlines()
    rows = read_metrics(tmp_path / "run")
    at = next(n for n, line in enumerate(lines) if line.split() == ["before", "after"])
    table_ = {line.split()[0]: tuple(map(float, line.split()[1:])) for line in lines[at + 1:at + 6]}
    assert table_ == {name[5:]: pytest.approx((rows[0][name], rows[-1][name]), abs=1e-3) for name in JUDGED}


def test_averaged_weights_are_judged_and_saved_and_the_raw_ones_go_on(tiny, tmp_path):
    launch(small(tiny, tmp_path / "ema", "--ema", 0.5, "--iterations", 3))
    launch(small(tiny, tmp_path / "raw", "--ema", 0, "--iterations", 3))
    saved, raw, base = read_weights(tmp_path / "ema"), read_weights(tmp_path / "raw"), network(tiny)
    raw = {name: value for name, value in raw.items() if not name.startswith("average.")}
    same({name: saved[name] for name in raw}, raw)
    exported = network(tmp_path / "ema" / "model")
    same({name: saved["average.ema." + name] for name in raw}, {name: exported[name] for name in raw})
    assert 0 < sum((exported[name] - base[name]).norm() for name in raw) < sum((raw[name] - base[name]).norm() for name in raw)


@pytest.mark.parametrize("flags", ["--select all --keep 4 --updates 1", "--select all --keep 4 --updates 1 --guidance 2", "--updates 2",
                                   "--kernel ancestral", "--kernel flow-grpo", "--train all --ema 0.5"])
def test_the_ratio_is_one_before_the_first_update(tiny, tmp_path, monkeypatch, flags):
    returned = spy(monkeypatch, "update")
    launch(small(tiny, tmp_path / "run", "--iterations", 3, "--prompt_noise", 0.5, "--batch", 1000, *flags.split()))
    assert len(returned) == 3 and all(row["ratio_error"] <= 1e-6 for row in returned)          # on many CPUs 0; others round by the size of a batch


def test_a_run_is_the_same_whether_prompts_are_encoded_once_or_each_time(tiny, tmp_path, monkeypatch):
    launch(small(tiny, tmp_path / "once", "--prompt_noise", 0.5))
    monkeypatch.setattr(generator, "REMEMBERED", 0)
    launch(small(tiny, tmp_path / "anew", "--prompt_noise", 0.5))
    assert_close_rows(read_metrics(tmp_path / "once"), read_metrics(tmp_path / "anew"))


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_the_ratio_stays_one_to_rounding_in_smaller_batches(tiny, tmp_path, monkeypatch, batch):
    returned = spy(monkeypatch, "update")
    launch(small(tiny, tmp_path / "run", "--prompt_noise", 0.5, "--batch", batch))
    assert all(row["ratio_error"] <= 1e-6 for row in returned) and len(returned) == 2


# ---------------------------------------------------------------------------------------------------------------------
# What moves.

def test_only_attention_moves_when_only_attention_is_trained(tiny, tmp_path):
    launch(small(tiny, tmp_path / "run", "--train", "attention"))
    base, tuned = network(tiny), network(tmp_path / "run" / "model")
    moved = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert moved and all(".attn." in name for name in moved)
    parts = "to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"
    assert {f"transformer_blocks.0.attn.{part}.weight" for part in parts} <= moved


def test_all_weights_that_matter_move_when_all_are_trained(tiny, tmp_path):
    launch(small(tiny, tmp_path / "run", "--train", "all"))
    base, tuned = network(tiny), network(tmp_path / "run" / "model")
    moved = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert {"proj_out.weight", "context_embedder.weight", "pos_embed.proj.weight", "transformer_blocks.0.attn.to_q.weight",
            "transformer_blocks.0.ff.net.2.weight", "transformer_blocks.0.norm1.linear.weight"} <= moved


def test_text_encoder_and_tokenizer_are_copied_as_they_were(done, tiny):
    for part in ("text_encoder", "tokenizer", "scheduler", "reward", "evaluator"):
        assert contents(done.out / "model" / part) == contents(tiny / part)


def test_drift_off_is_plain_grpo(tiny, tmp_path):
    launch(small(tiny, tmp_path / "off", "--drift", "off", "--select", "all"))
    launch(small(tiny, tmp_path / "by_hand", "--drift", "on", "--select", "all", "--keep", 4, "--prompt_noise", 0, "--diversity", 0))
    assert read_metrics(tmp_path / "off") == read_metrics(tmp_path / "by_hand")
    same(read_weights(tmp_path / "off"), read_weights(tmp_path / "by_hand"))


# ---------------------------------------------------------------------------------------------------------------------
# Every flag does something, where it says so and nowhere else. (flag, value, other value, where, flags that make it matter)
#   rollouts    the first rewards differ                        update     they do not, and the trained weights do
#   judgement   training is the same, the evaluation differs    output     the same numbers, other files or more lines
#   rounding    the same numbers                                nothing    nothing is written at all
#   processes   one process alone refuses it; what several do with it is in test_shard.py

BASE = ("--drift on --select window --prompt_noise 0.25 --tau1 0.6 --tau2 1.2 --psi 1 --diversity 0.3 --diversity_features reward "
        "--metric cosine --success --gamma 1 --terminal keep --kl 0 --no-gardo --std group --train attention --clip 0.4 --grad_clip 1 "
        "--passes 1 --ema 0 --kernel cps --eta 0.8 --guidance 1 --reward class:1 --seed 0 --eval_seed 0 --batch 160 --precision float32 "
        "--keep_checkpoints 2 --features reward --price potential --replace 0 --refresh 0").split()
FID = "--reward fid --reference 24"
FLAGS = [
    ("model", "{tiny}", "{other}", "rollouts", "--prompts {tiny}/prompts.jsonl"),
    ("prompts", "{tiny}/prompts.jsonl", "{one}", "rollouts", ""),
    ("reward", "class:1", "class:1,ink:0.1", "rollouts", ""), ("out", "{tmp}/here", "{tmp}/there", "output", ""),
    ("iterations", 2, 3, "output", ""), ("seed", 0, 1, "rollouts", ""), ("drift", "on", "off", "rollouts", "--select all --keep 4 --prompt_noise 0.5 --diversity 0.5"),
    ("dry_run", False, True, "nothing", ""), ("prompts_per_step", 2, 4, "rollouts", ""), ("group_size", 4, 5, "rollouts", ""),
    ("steps", 4, 5, "rollouts", ""), ("window", "0:2", "1:3", "rollouts", ""), ("kernel", "cps", "ancestral", "rollouts", ""),
    ("eta", 0.8, 0.5, "rollouts", ""), ("guidance", 1, 2, "rollouts", ""),
    ("features", "reward", "evaluator", "rollouts", FID), ("target", "{tiny}/reward/real.npz", "{target}", "rollouts", FID),
    ("price", "exact", "quadratic", "rollouts", "--reward fid --reference 192"), ("replace", 2, 1, "rollouts", f"{FID} --price exact"),
    ("reference", 24, 16, "rollouts", "--reward fid"), ("refresh", 0, 1, "update", FID),
    ("select", "window", "spread", "update", ""),
    ("keep", 3, 2, "update", ""), ("prompt_noise", 0.25, 0.5, "rollouts", ""), ("tau1", 0.6, 0.8, "rollouts", ""),
    ("tau2", 1.2, 1.0, "rollouts", ""), ("psi", 1, 0.5, "rollouts", ""), ("diversity", 0.3, 0, "update", ""),
    ("diversity_features", "reward", "latents", "update", ""), ("metric", "cosine", "euclidean", "update", ""),
    ("nearest", 2, 1, "update", ""), ("success", True, False, "update", ""), ("gamma", 1, 0.5, "update", ""),
    ("terminal", "keep", "zero", "update", ""), ("kl", 0, 1, "update", ""), ("gardo", False, True, "update", ""),
    ("std", "group", "batch", "update", ""), ("train", "attention", "all", "update", ""), ("lora", 0, 2, "update", ""), ("lr", 0.001, 0.002, "update", ""),
    ("warmup", 0, 4, "update", ""), ("updates", 2, 1, "update", ""), ("passes", 1, 2, "update", ""), ("clip", 0.4, 1e-5, "update", ""),
    ("grad_clip", 1, 1e-6, "update", ""), ("ema", 0, 0.5, "judgement", ""),
    ("eval_prompts", "{tiny}/eval_prompts.jsonl", "{one}", "judgement", ""), ("eval_every", 1, 2, "judgement", ""),
    ("eval_images", 20, 40, "judgement", ""), ("eval_steps", 2, 3, "judgement", ""), ("eval_seed", 0, 1, "judgement", ""),
    ("save_every", 1, 2, "output", ""), ("keep_checkpoints", 2, 1, "output", ""), ("snapshot_every", 0, 1, "output", ""),
    ("keep_snapshots", 2, 1, "output", "--snapshot_every 1"), ("batch", 160, 5, "rounding", ""),
    ("train_batch", 0, 4, "memory", ""), ("decode_batch", 8, 3, "memory", ""), ("reward_batch", 0, 3, "memory", ""), ("checkpointing", False, True, "memory", ""),
    ("offload", False, True, "memory", ""), ("shard", False, True, "processes", ""), ("compile", False, True, "memory", ""),
    ("precision", "float32", "bfloat16", "rollouts", ""), ("device", "cpu", "auto", "rounding", ""),
    ("timeout", 30, 7, "start", "")]


SPIES = {"checkpointing": (models, "load", lambda arguments: arguments[3], [False, True]), "decode_batch": (models, "load", lambda arguments: arguments[4], [8, 3]),
         "compile": (models, "load", lambda arguments: arguments[5], [False, True]), "offload": (train, "rollout", lambda arguments: arguments[7], [None, "cpu"]),
         "train_batch": (train, "clipped_loss", lambda arguments: len(arguments[0]), [6, 4]),            # 2 prompts x 3 kept x 2 steps in 2 updates
         "reward_batch": (train.Reward, "score", lambda arguments: len(arguments[1]), [8, 3])}           # of 8 rollouts


def test_the_table_covers_every_flag():
    assert [row[0] for row in FLAGS] == [f.name for f in dataclasses.fields(train.Args)]


@pytest.fixture(scope="module")
def outcome(tiny, tmp_path_factory):
    """flags -> the metrics, checkpoint weights, files and exported weights of a run with them; each is run once."""
    tmp, known = tmp_path_factory.mktemp("flags"), {}
    np.savez(tmp / "target.npz", mu=np.ones(64), sigma=np.eye(64))
    (tmp / "one.jsonl").write_text('{"prompt": "a dark coat", "label": 4}\n')
    paths = {"tiny": tiny, "other": build_model(tmp / "other", seed=5), "one": tmp / "one.jsonl", "tmp": tmp, "target": tmp / "target.npz"}

    def run(*flags):
        flags = [str(flag).format(**paths) for flag in flags]
        key = tuple(flag for flag in flags)
        if key not in known:
            out = Path(flags[flags.index("--out") + 1]) if "--out" in flags else tmp / f"run{len(known)}"
            launch(small(tiny, out, *BASE, *flags))
            known[key] = out.is_dir() and SimpleNamespace(
                out=out, rows=read_metrics(out), weights=read_weights(out), names=set(contents(out)), model=network(out / "model"))
        return known[key]
    return run


def spelled(name, value):
    return (f"--{name}" if value else f"--no-{name}",) if isinstance(value, bool) else (f"--{name}", value)


def only(rows, judged):
    return [{k: v for k, v in row.items() if k.startswith("eval/") == judged} for row in rows]


def equal_weights(a, b):
    return all(torch.equal(a[name], b[name]) for name in a.keys() & b.keys())


@pytest.mark.parametrize("name, value, other, where, context", FLAGS, ids=[row[0] for row in FLAGS])
def test_every_flag_does_what_it_says(tiny, outcome, name, value, other, where, context):
    if name == "device" and torch.cuda.is_available():
        pytest.skip("auto is the GPU here")
    if where == "memory":                                                # that a model then does it is tested in test_models.py
        (owner, function, look, expected), folder, firsts = SPIES[name], outcome().out.parent, []
        original = getattr(owner, function)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.Module, "compile", lambda network, **how: None)                  # takes minutes: tested below
            for number in (value, other):
                calls = []
                patch.setattr(owner, function, lambda *arguments: calls.append(look(arguments)) or original(*arguments))
                launch(small(tiny, folder / f"{name}{number}", *BASE, *spelled(name, number)))
                firsts.append(calls[0])
        assert firsts == expected
        assert_close_weights(*(read_weights(folder / f"{name}{number}") for number in (value, other)), network(tiny))
        return
    if where == "start":
        waits, folder = [], outcome().out.parent

        def start(device, minutes):
            waits.append(minutes)
            raise StopIteration
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processes, "start", start)
            for number in (value, other):
                with pytest.raises(StopIteration):
                    launch(small(tiny, folder / f"{name}{number}", *spelled(name, number)))
        assert waits == [value, other]
        return
    if where == "processes":
        assert outcome(*spelled(name, value))
        with pytest.raises(SystemExit) as refused_:
            outcome(*spelled(name, other))
        assert refused_.value.code == 2
        return
    if where == "nothing":
        assert outcome(*spelled(name, value)) and not outcome(*spelled(name, other))
        return
    a = outcome(*context.split(), *spelled(name, value))
    b = outcome(*context.split(), *spelled(name, other))
    if where == "rollouts":
        assert a.rows[1]["reward"] != b.rows[1]["reward"]
    elif where == "update":
        assert a.rows[1]["reward"] == b.rows[1]["reward"]
        assert not equal_weights(a.model, b.model)
    elif where == "judgement":
        assert only(a.rows, False) == only(b.rows, False) and equal_weights(a.weights, b.weights)
        assert only(a.rows, True) != only(b.rows, True)
    elif where == "output":
        both = min(len(a.rows), len(b.rows))
        assert a.rows[:both] == b.rows[:both]
        assert len(a.rows) != len(b.rows) or equal_weights(a.weights, b.weights)
        assert a.out != b.out if name == "out" else a.names != b.names
    else:
        assert_close_rows(a.rows, b.rows)
        assert_close_weights(a.weights, b.weights, network(tiny))


def assert_close_rows(a, b, tolerance=1e-5):
    assert [row.keys() for row in a] == [row.keys() for row in b]
    for mine, theirs in zip(a, b):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)


def assert_close_weights(a, b, base):
    """Equal but for rounding: all but a few elements to 1e-5, where Adam divides a gradient that is nearly zero by itself."""
    assert a.keys() == b.keys()
    flat = lambda weights: torch.cat([weights[name].flatten() for name in a if name in base])
    difference, way = flat(a) - flat(b), flat(a) - flat(base)
    assert way.norm() > 0.01
    assert difference.norm() < 0.005 * way.norm() and (difference.abs() > 1e-5).double().mean() < 1e-3


def test_checkpoints_come_at_the_named_iterations_and_the_newest_stay(tiny, tmp_path):
    launch(small(tiny, tmp_path / "a", "--iterations", 5, "--save_every", 2, "--keep_checkpoints", 2))
    assert checkpoints(tmp_path / "a") == ["checkpoint-00004", "checkpoint-00005"]
    launch(small(tiny, tmp_path / "b", "--iterations", 5, "--save_every", 2, "--keep_checkpoints", 9))
    assert checkpoints(tmp_path / "b") == ["checkpoint-00002", "checkpoint-00004", "checkpoint-00005"]


def test_evaluations_come_at_the_named_iterations_and_at_the_end(tiny, tmp_path):
    launch(small(tiny, tmp_path / "run", "--iterations", 5, "--eval_every", 2))
    assert [row["iteration"] for row in read_metrics(tmp_path / "run") if JUDGED <= row.keys()] == [0, 2, 4, 5]


def test_every_iteration_has_its_own_noise(outcome):
    still = outcome("--lr", 1e-12, "--prompts", "{one}", "--diversity", 0)
    assert still.rows[1]["eval/fid"] == still.rows[2]["eval/fid"]
    assert still.rows[1]["reward"] != still.rows[2]["reward"]


def test_a_strong_kl_holds_the_policy_near_the_base(tiny, tmp_path):
    away = {}
    for weight in (1e-9, 1000):
        out = tmp_path / str(weight)
        launch(small(tiny, out, "--iterations", 6, "--kl", weight, "--diversity", 0, "--clip", 1000))
        away[weight] = read_metrics(out)[-1]["kl"]
    assert away[1000] < away[1e-9] / 2


def test_the_default_run_folder_is_named_after_the_flags(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    where = lambda *flags: json.loads((launch([*flags, "--dry_run"]), capfd.readouterr().out.splitlines()[0])[1])["out"]
    model = ("--model", str(tiny), "--eval_images", "20")
    assert len({where(*model), where(*model, "--seed", "1"), where(*model, "--lr", "0.5")}) == 3
    assert all(Path(where(*model, *flags)).parent == Path("runs") for flags in ((), ("--reward", "class:1,ink:0.2")))
    launch([flag for flag in small(tiny, "OUT") if flag not in ("--out", "OUT")])
    assert [path.name for path in next((tmp_path / "runs").iterdir()).glob("model")] == ["model"]


# ---------------------------------------------------------------------------------------------------------------------
# Snapshots: the trained weights, and averages whose weights are powers of time.

@pytest.fixture(scope="module")
def snapped(tiny, tmp_path_factory):
    """A run that kept a snapshot of each of its five iterations."""
    out = tmp_path_factory.mktemp("snapped") / "run"
    launch(small(tiny, out, "--iterations", 5, "--snapshot_every", 1, "--keep_snapshots", 9, "--lr", 0.01))
    return out


def snapshot_names(*iterations):
    return [f"{i:05d}{length}.safetensors" for i in iterations for length in ("-0.050", "-0.100", "")]


def test_a_snapshot_says_whose_it_is(snapped, tiny):
    found, mark = snapshots(snapped), tensors.fingerprint(tensors.Weights(base_files.network_files(tiny)))
    assert [*found] == snapshot_names(1, 2, 3, 4, 5)
    for name, (tensors, facts) in found.items():
        length = {"-0.050": "0.05", "-0.100": "0.1"}.get(name[5:11], "")
        assert facts == {"base": str(tiny), "fingerprint": mark, "iteration": str(int(name[:5])), "sigma_rel": length}
        assert all("attn" in name and value.dtype == torch.float32 for name, value in tensors.items())


def test_the_last_snapshot_is_the_final_model(snapped, tiny):
    tensors, final, base = snapshots(snapped)["00005.safetensors"][0], network(snapped / "model"), network(tiny)
    same(tensors, {name: final[name] for name in tensors})
    assert {name for name in base if not torch.equal(base[name], final[name])} <= tensors.keys()


@pytest.mark.parametrize("length", [0.05, 0.1])
@pytest.mark.parametrize("last", [1, 3, 5])
def test_the_averages_weigh_each_iteration_by_a_power_of_time(snapped, length, last):
    """The profile s^gamma, integrated over iteration t: (t^(gamma + 1) - (t - 1)^(gamma + 1)) / last^(gamma + 1). Its std is `length`."""
    found = snapshots(snapped)
    gamma = brentq(lambda g: (g + 1) / (g + 3) - ((g + 1) / (g + 2)) ** 2 - length**2, 0, 1000, xtol=1e-12)
    parts = {t: (t / last) ** (gamma + 1) - ((t - 1) / last) ** (gamma + 1) for t in range(1, last + 1)}
    tensors, raw = found[f"{last:05d}-{length:.3f}.safetensors"][0], {t: found[f"{t:05d}.safetensors"][0] for t in parts}
    for name, value in tensors.items():
        torch.testing.assert_close(value, sum(part * raw[t][name].double() for t, part in parts.items()).float(), rtol=1e-6, atol=1e-7)
    assert last == 1 or any(not torch.equal(tensors[name], raw[last][name]) for name in tensors)


@pytest.mark.parametrize("flags, iterations", [("--snapshot_every 2 --keep_snapshots 9", (2, 4, 5)), ("--snapshot_every 2 --keep_snapshots 2", (4, 5)),
                                               ("--snapshot_every 9", (5,)), ("--snapshot_every 0", ())])
def test_snapshots_come_at_the_named_iterations_and_the_newest_stay(tiny, tmp_path, flags, iterations):
    launch(small(tiny, tmp_path / "run", "--iterations", 5, *flags.split()))
    assert [*snapshots(tmp_path / "run")] == snapshot_names(*iterations)
    assert (tmp_path / "run" / "snapshots").is_dir() == bool(iterations)


def test_snapshots_change_nothing_else(snapped, tiny, tmp_path):
    launch(small(tiny, tmp_path / "run", "--iterations", 5, "--lr", 0.01))
    assert read_metrics(tmp_path / "run") == read_metrics(snapped)
    assert contents(tmp_path / "run" / "model") == contents(snapped / "model")


# ---------------------------------------------------------------------------------------------------------------------
# Interruption.

LONG = ("--iterations 4 --save_every 2 --keep_checkpoints 9 --ema 0.5 --kl 0.1 --prompt_noise 0.25 --diversity 0.3 --snapshot_every 1 "
        "--keep_snapshots 3").split()


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    launch(small(tiny, out, *LONG))
    return out


def killed(result, args):
    raise KeyboardInterrupt("killed")


@pytest.mark.parametrize("iteration", [1, 2, 3, 4])
def test_a_run_cut_off_in_an_iteration_goes_on_to_the_same_bits(tiny, tmp_path, whole, iteration):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, train, "update", iteration, killed)
        with pytest.raises(KeyboardInterrupt):
            launch(small(tiny, out, *LONG))
    assert checkpoints(out) == ["checkpoint-00002"][:iteration > 2] and len(read_metrics(out)) == iteration
    launch(small(tiny, out, *LONG))
    assert_equal_runs(out, whole)


@pytest.mark.parametrize("target", ["checkpoint-00002", "checkpoint-00004", "model", "00002.png", "00004.png", "config.json",
                                    "metrics.jsonl", "00003-0.050.safetensors", "00004.safetensors", "00004-0.100.safetensors"])
def test_a_kill_during_a_write_leaves_the_last_checkpoint_whole(tiny, tmp_path, whole, target):
    out, replace = tmp_path / "run", os.replace

    def torn(source, destination):
        if Path(destination).name == target:
            raise KeyboardInterrupt("killed")
        replace(source, destination)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", torn)
        with pytest.raises(KeyboardInterrupt):
            launch(small(tiny, out, *LONG))
    late = target in ("checkpoint-00004", "model", "00004.png") or target.endswith(".safetensors")
    assert checkpoints(out) == ["checkpoint-00002"][:late] and not (out / target).exists()
    if late:
        assert contents(out / "checkpoint-00002") == contents(whole / "checkpoint-00002")
    launch(small(tiny, out, *LONG))
    assert_equal_runs(out, whole)


def test_a_half_written_line_and_leftover_temporaries_do_no_harm(tiny, tmp_path, whole):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, train, "update", 4, killed)
        with pytest.raises(KeyboardInterrupt):
            launch(small(tiny, out, *LONG))
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "lo')
    (out / ".tmp-checkpoint-00004").mkdir()
    (out / ".tmp-checkpoint-00004" / "weights.safetensors").write_bytes(b"half")
    (out / ".tmp-metrics.jsonl").write_text("half")
    launch(small(tiny, out, *LONG))
    assert_equal_runs(out, whole)


def test_a_killed_process_goes_on_to_the_same_bits(tiny, tmp_path):
    flags = "--iterations 60 --eval_every 60 --save_every 2 --keep_checkpoints 2".split()
    argv, out = small(tiny, tmp_path / "run", *flags), tmp_path / "run"
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


def test_a_finished_run_says_so_and_is_left_alone(tiny, tmp_path, capfd):
    argv = small(tiny, tmp_path / "run")
    launch(argv)
    before = files(tmp_path / "run")
    capfd.readouterr()
    launch(argv)
    assert "already complete" in capfd.readouterr().out
    assert files(tmp_path / "run") == before


# ---------------------------------------------------------------------------------------------------------------------
# Several processes. In-process runs have one thread, and so do these.

def agree(one, two, base, tolerance=1e-5):
    assert_close_rows(read_metrics(one), read_metrics(two), tolerance)
    assert_close_weights(read_weights(one), read_weights(two), network(base))
    assert_close_weights(network(one / "model"), network(two / "model"), network(base))


def test_two_processes_do_what_one_does_with_groups_across_them(tiny, tmp_path):
    flags = "--prompts_per_step 3 --group_size 5 --keep 3 --updates 9 --ema 0.5 --kl 0.1 --gardo --std batch --eval_images 30".split()
    launch(small(tiny, tmp_path / "one", *flags))
    code, out, error = launch_process(small(tiny, tmp_path / "two", *flags), processes=2)
    assert code == 0, error
    assert out.count("before") == 1
    agree(tmp_path / "one", tmp_path / "two", tiny)


@pytest.mark.slow
@pytest.mark.parametrize("processes, flags", [(2, ""), (3, "--prompts_per_step 2 --group_size 4 --guidance 2 --batch 2"),
                                              (4, "--prompts_per_step 1 --group_size 4 --keep 2 --updates 4 --reward ink:1,margin:0.1")])
def test_more_processes_do_what_one_does(tiny, tmp_path, processes, flags):
    launch(small(tiny, tmp_path / "one", *flags.split()))
    code, _, error = launch_process(small(tiny, tmp_path / "more", *flags.split()), processes)
    assert code == 0, error
    agree(tmp_path / "one", tmp_path / "more", tiny)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(tiny, tmp_path, whole):
    argv = small(tiny, tmp_path / "run", *LONG)
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, train, "update", 4, killed)
        with pytest.raises(KeyboardInterrupt):
            launch(argv)
    code, _, error = launch_process(argv, processes=2)
    assert code == 0, error
    agree(tmp_path / "run", whole, tiny)
    code, out, error = launch_process(argv, processes=2)
    assert code == 0 and out.count("already complete") == 1


FAILING_RANK = """
import os, sys
sys.path.insert(0, {root!r})
import rewards, train
if __name__ == "__main__":
    right, calls = classifier.NAMES["class"], []

    def wrong(logits, labels, images):
        calls.append(0)
        return right(logits, labels, images) * (float("nan") if len(calls) == 2 else 1)
    if os.environ["RANK"] == "1":
        classifier.NAMES["class"] = wrong
    train.main({argv!r})
"""


@pytest.mark.slow
def test_a_reward_that_fails_in_one_process_stops_them_all(tiny, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING_RANK.format(root=str(ROOT), argv=small(tiny, tmp_path / "run")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done_ = subprocess.run(torchrun, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done_.returncode != 0 and "FloatingPointError" in done_.stderr and "class" in done_.stderr
    assert checkpoints(tmp_path / "run") == ["checkpoint-00001"] and len(read_metrics(tmp_path / "run")) == 2
    assert not (tmp_path / "run" / "model").exists()


LEAVING_RANK = """
sys.path.insert(0, {root!r})
import runtime, train

leave = processes.finish
def finish():
    leave()
    names = [open("/proc/self/task/" + number + "/comm").read().strip() for number in os.listdir("/proc/self/task")]
    print("threads:", *names)
processes.finish = finish
if __name__ == "__main__":
    train.main({argv!r})
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads the names of threads from Linux's /proc")
def test_a_process_leaves_its_group_with_no_thread_of_it_behind(tiny, tmp_path):
    """A thread of the group that is alive while the interpreter ends may abort a run whose work is done."""
    script = tmp_path / "leaving.py"
    script.write_text(LEAVING_RANK.format(root=str(ROOT), argv=small(tiny, tmp_path / "run")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    ended = subprocess.run(torchrun, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("threads:") == 2 and "gloo" not in ended.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are none, and rollouts that the update cannot reproduce.

def poisoned_reward(value):
    def plant(monkeypatch):
        calls, right = [], classifier.NAMES["class"]

        def wrong(logits, labels, images):
            result = right(logits, labels, images)
            calls.append(result)
            if len(calls) == 2:
                result = value(result)
            return result
        monkeypatch.setitem(classifier.NAMES, "class", wrong)
    return plant


def one_bad(number):
    return lambda result: torch.where(torch.arange(len(result)) == 3, number, result)


def poisoned_loss(poison):
    """The loss of the first update of iteration 2 (updates come two an iteration)."""
    return lambda monkeypatch: at_call(monkeypatch, train, "clipped_loss", 3, lambda loss, args: poison(loss, args[0]))


def poisoned_weight(monkeypatch):
    def poison(result, args):
        with torch.no_grad():
            next(p for p in args[1].network.parameters() if p.requires_grad)[0] = float("nan")
        return result
    at_call(monkeypatch, train, "sample_groups", 2, poison)


@pytest.mark.parametrize("plant, cause", [
    (poisoned_reward(one_bad(float("nan"))), "reward class"), (poisoned_reward(one_bad(float("inf"))), "reward class"),
    (poisoned_reward(lambda result: result[:, None]), "reward class"),
    (poisoned_loss(lambda loss, ratio: loss * float("nan")), "loss"), (poisoned_loss(lambda loss, ratio: loss + float("inf")), "loss"),
    (poisoned_loss(lambda loss, ratio: loss + (ratio - ratio.detach()).sqrt()), "gradient"), (poisoned_weight, "not finite")],
    ids=["nan reward", "infinite reward", "misshapen reward", "nan loss", "infinite loss", "infinite gradient", "nan weight"])
def test_a_number_that_is_none_stops_the_run_before_the_step(tiny, tmp_path, monkeypatch, plant, cause):
    steps, loaded = [], []
    at_call(monkeypatch, models, "load", 1, lambda model, args: loaded.append(model) or model)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: steps.append(1) or step(*args, **kwargs))
    whole_argv, argv = small(tiny, tmp_path / "whole"), small(tiny, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        with pytest.raises(FloatingPointError) as error:
            launch(argv)
    assert "iteration 2" in str(error.value) and cause in str(error.value)
    assert len(steps) == 2
    out = tmp_path / "run"
    assert checkpoints(out) == ["checkpoint-00001"] and not (out / "model").exists() and len(read_metrics(out)) == 2
    if plant is not poisoned_weight:
        saved, now = read_weights(out), loaded[0].network.state_dict()
        same(saved, {name: now[name] for name in saved})
    launch(argv), launch(whole_argv)
    assert_equal_runs(out, tmp_path / "whole")


def rounded_latents(trajectory, args):
    trajectory.latents = trajectory.latents.bfloat16().float()
    return trajectory


def other_noise(trajectory, args):
    right = trajectory.condition
    trajectory.condition = lambda rows, u: right((rows + 1) % trajectory.latents.shape[1], u)
    return trajectory


def no_noise(trajectory, args):
    right = trajectory.condition
    trajectory.condition = lambda rows, u: right(rows, 0 * u)
    return trajectory


def other_times(trajectory, args):
    policy = args[1]
    policy.times = policy.times * 0.999
    return trajectory


def other_guidance(trajectory, args):
    args[1].guidance = 1.01
    return trajectory


@pytest.mark.parametrize("mistake", [rounded_latents, other_noise, no_noise, other_times, other_guidance])
def test_an_update_that_disagrees_with_the_rollout_is_caught(tiny, tmp_path, monkeypatch, mistake):
    at_call(monkeypatch, train, "rollout", 2, mistake)
    with pytest.raises(FloatingPointError, match="iteration 2.*ratio"):
        launch(small(tiny, tmp_path / "run", "--prompt_noise", 0.5))
    assert checkpoints(tmp_path / "run") == ["checkpoint-00001"]


# ---------------------------------------------------------------------------------------------------------------------
# Learning.

def test_equal_rewards_teach_nothing_and_break_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(classifier.NAMES, "class", lambda logits, labels, images: torch.full((len(images),), 0.1))
    launch(small(tiny, tmp_path / "plain", "--drift", "off", "--select", "all"))
    rows, base, tuned = read_metrics(tmp_path / "plain")[1:], network(tiny), network(tmp_path / "plain" / "model")
    assert [row["zero_std_fraction"] for row in rows] == [1, 1] and [row["grad_norm"] for row in rows] == [0, 0]
    same(base, tuned)
    launch(small(tiny, tmp_path / "shaped", "--diversity", 0.3))
    assert not equal_weights(base, network(tmp_path / "shaped" / "model"))


def test_diversity_that_is_not_paid_is_seen_in_the_finished_pictures_alone(tiny, tmp_path, monkeypatch):
    seen, features = [], train.load_features
    monkeypatch.setattr(train, "load_features", lambda *which: lambda images: seen.append(len(images)) or features(*which)(images))
    for weight, states in ((0, 1), (1e-300, 3)):                         # the second, lost in float32, has two steps more to look at
        seen.clear()
        launch(small(tiny, tmp_path / f"{weight}", "--diversity", weight))
        assert sum(seen) == 2 * 8 * states
    a, b = ([{name: value for name, value in row.items() if "seconds" not in name and "memory" not in name} for row in read_metrics(tmp_path / f"{weight}")]
            for weight in (0, 1e-300))
    assert a == b
    same(read_weights(tmp_path / "0"), read_weights(tmp_path / "1e-300"))


@pytest.mark.parametrize("judge", [True, False])
def test_no_network_sees_more_pictures_at_once_than_reward_batch(tiny, tmp_path, monkeypatch, judge):
    shutil.copytree(tiny, tmp_path / "model")
    judge or shutil.rmtree(tmp_path / "model" / "evaluator")
    seen, features, score, original = [], classifier.load_classifier(tiny / "reward").features, rewards.Reward.score, train.open_pool
    look = lambda images: seen.append(len(images)) or features(images)
    monkeypatch.setattr(train, "load_features", lambda *which: look)
    monkeypatch.setattr(train, "open_pool", lambda *which: (lambda pool, _, target: (pool, look, target))(*original(*which)))
    monkeypatch.setattr(rewards.Reward, "score", lambda self, images, *rest: seen.append(len(images)) or score(self, images, *rest))
    launch(small(tmp_path / "model", tmp_path / "run", "--reward", "class:1,fid:0.3", "--reference", 24, "--reward_batch", 3))
    assert max(seen) == 3 and sum(seen) > 100


def test_unequal_rewards_are_not_counted_as_equal(done):
    assert [row["zero_std_fraction"] for row in read_metrics(done.out)[1:]] == [0, 0, 0]


def test_groups_of_two_work(tiny, tmp_path):
    launch(small(tiny, tmp_path / "run", "--group_size", 2, "--keep", 2, "--nearest", 1))
    assert all(row["grad_norm"] > 0 for row in read_metrics(tmp_path / "run")[1:])


TEACH = ("--iterations 14 --prompts_per_step 4 --group_size 16 --keep 12 --train all --lr 0.005 --kernel cps --eta 1 --std batch --clip 1 "
         "--eval_every 14 --save_every 14 --updates 2 --tau1 0.6 --tau2 1.2 --psi 1 --prompt_noise 0.25").split()
PLAIN = "--select all --prompt_noise 0"                                  # what is above, taken back


@pytest.mark.parametrize("flags, sign", [(f"--drift off {PLAIN}", 1), (f"--drift off {PLAIN}", -1), ("--diversity 0 --select window", 1),
                                         ("--diversity 0.3", 1)])
def test_the_mean_reward_rises(tiny, tmp_path, monkeypatch, flags, sign):
    monkeypatch.setitem(classifier.NAMES, "ink", lambda logits, labels, images: images.mean((1, 2, 3)))
    launch(small(tiny, tmp_path / "run", *TEACH, "--reward", f"ink:{sign}", *flags.split()))
    curve = [row["reward"] for row in read_metrics(tmp_path / "run")[1:]]
    assert np.mean(curve[-3:]) - np.mean(curve[:3]) > 0.02


def test_diversity_alone_rises_when_it_alone_is_paid(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(classifier.NAMES, "class", lambda logits, labels, images: torch.zeros(len(images)))
    launch(small(tiny, tmp_path / "run", *TEACH, *"--reward class:1 --diversity 1 --diversity_features latents --metric cosine".split()))
    curve = [row["diversity"] for row in read_metrics(tmp_path / "run")[1:]]
    assert np.mean(curve[-3:]) - np.mean(curve[:3]) > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# The command line.

def test_dry_run_prints_configuration_and_sizes_and_writes_nothing(tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(bases, "load", lambda *args: pytest.fail("a model was loaded"))
    before = contents(tiny)
    launch(small(tiny, tmp_path / "run", "--dry_run", "--prompts_per_step", 3, "--group_size", 5, "--passes", 2))
    first, rest = capfd.readouterr().out.split("\n", 1)
    assert json.loads(first)["group_size"] == 5
    assert all(size in rest for size in ("15 rollouts", "18 pairs", "4 optimizer steps", "9 pairs", "30 rollouts"))
    assert list(tmp_path.iterdir()) == [] and contents(tiny) == before


def test_help_explains_every_flag():
    code, out, error = launch_process(["--help"], COLUMNS="1000")
    assert code == 0 and not error
    source = (ROOT / "train.py").read_text()
    lines = re.sub(r"\n {12,}", " ", out).splitlines()
    for field in dataclasses.fields(train.Args):
        declared = next(line for line in source.splitlines() if line.startswith(f"    {field.name}:"))
        text = declared.split("# ", 1)[1].strip()
        assert any(line.strip().startswith(f"--{field.name}") and text in line for line in lines), field.name


def test_the_command_runs(tiny, tmp_path):
    code, out, error = launch_process(small(tiny, tmp_path / "run"), cwd=tmp_path)
    assert code == 0, error
    assert (tmp_path / "run" / "model").is_dir() and "before" in out
    launch(small(tiny, tmp_path / "here"))
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "here")


def test_write_atomic_replaces_the_whole_or_nothing(tmp_path):
    path = tmp_path / "file"
    files.write_atomic(path, lambda temporary: temporary.write_text("old"))

    def fails(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")
    with pytest.raises(OSError):
        files.write_atomic(path, fails)
    assert path.read_text() == "old"
    files.write_atomic(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["file"]


# ---------------------------------------------------------------------------------------------------------------------
# Being asked to stop, and disks.

@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(tiny, tmp_path, monkeypatch, capsys, signal_):
    flags = lambda name: small(tiny, tmp_path / name, "--iterations", 4, "--save_every", 100, "--snapshot_every", 0)
    launch(flags("whole"))
    update = train.update

    def signalled(*arguments):
        if arguments[-1] == 1:
            os.kill(os.getpid(), signal_)
        return update(*arguments)
    monkeypatch.setattr(train, "update", signalled)
    with pytest.raises(SystemExit) as stopped:
        launch(flags("stopped"))
    assert stopped.value.code == 128 + signal_ and "stopped after checkpoint 2" in capsys.readouterr().out
    assert [p.name for p in tmp_path.glob("stopped/checkpoint-*")] == ["checkpoint-00002"] and not (tmp_path / "stopped" / "model").exists()
    monkeypatch.setattr(train, "update", update)
    launch(flags("stopped"))
    assert read_metrics(tmp_path / "stopped") == read_metrics(tmp_path / "whole")
    same(network(tmp_path / "stopped" / "model"), network(tmp_path / "whole" / "model"))


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(tiny, tmp_path, monkeypatch):
    flags, write = small(tiny, tmp_path / "run", "--iterations", 3, "--save_every", 1), runtime.save_file

    def full(tensors, path, **rest):
        if "checkpoint-00002" in str(path):
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        write(tensors, path, **rest)
    monkeypatch.setattr(runtime, "save_file", full)
    with pytest.raises(SystemExit, match=r"error: .*run: .*No space left.*checkpoint 1 is whole") as stopped:
        launch(flags)
    assert "\n" not in stopped.value.code
    monkeypatch.setattr(runtime, "save_file", write)
    launch(flags)
    assert len(read_metrics(tmp_path / "run")) == 4


def test_a_folder_that_may_not_be_written_to_is_refused(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit) as stopped:
        launch(small(tiny, tmp_path / "run"))
    assert stopped.value.code == 2 and "nothing may be written to" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("apart", [0, 1])
def test_processes_that_disagree_about_the_weights_stop(tmp_path, apart):
    (tmp_path / "two.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport torch, runtime\nruntime.start('cpu')\n"
        f"runtime.check_equal({{'layer.a': torch.ones(3), 'layer.b': torch.ones(2) + 1e-7 * processes.rank() * {apart}}}, torch.device('cpu'))\n"
        "runtime.finish()\nprint('equal')\n")
    code, out, error = launch_process([], 2, script=tmp_path / "two.py")
    assert (code == 0 and out.count("equal") == 2) if not apart else (code != 0 and "disagree about layer.b" in error and "equal" not in out)
