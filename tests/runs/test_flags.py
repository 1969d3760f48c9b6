"""Every flag of train.py does something, where it says so and nowhere else."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build_model, contents, launch, read_metrics, read_weights, small
from equal_runs import assert_close_rows, assert_close_weights, moved, network

import bases
import rewards
import train
from support import processes

# What a flag changes:
ROLLOUTS = "rollouts"  # the first rewards
UPDATE = "update"  # not these, but the trained weights
EVALUATION = "evaluation"  # not the training, but what is measured
OUTPUT = "output"  # no number, but the files or the lines that are written
ROUNDING = "rounding"  # nothing but rounding
MEMORY = "memory"  # nothing but rounding; what it is handed to is in PASSED_TO
NOTHING = "nothing is written"
REFUSED = "refused"  # by one process; what several do with it is in test_sharding.py
START = "start"  # how long a process waits

# What a run has besides SMALL, so that each flag matters.
BASE = (
    "--prompt_noise 0.25 --diversity 0.3 --std group --keep_checkpoints 2 --psi 1 --tau2 1.2"
).split()
FID = "--reward fid --reference 24"

# flag: (value, other value, what it changes, flags that make it matter)
FLAGS = {
    "model": ("{tiny}", "{other}", ROLLOUTS, "--prompts {tiny}/prompts.jsonl"),
    "prompts": ("{tiny}/prompts.jsonl", "{one}", ROLLOUTS, ""),
    "reward": ("class:1", "class:1,ink:0.1", ROLLOUTS, ""),
    "out": ("{tmp}/here", "{tmp}/there", OUTPUT, ""),
    "iterations": (2, 3, OUTPUT, ""),
    "seed": (0, 1, ROLLOUTS, ""),
    "drift": ("on", "off", UPDATE, "--select all --keep 4 --prompt_noise 0 --diversity 0.2"),
    "dry_run": (False, True, NOTHING, ""),
    "check": (False, True, NOTHING, ""),
    "prompts_per_step": (2, 4, ROLLOUTS, ""),
    "group_size": (4, 5, ROLLOUTS, ""),
    "steps": (4, 5, ROLLOUTS, ""),
    "window": ("0:2", "1:3", ROLLOUTS, ""),
    "kernel": ("cps", "ancestral", ROLLOUTS, ""),
    "eta": (0.8, 0.5, ROLLOUTS, ""),
    "guidance": (1, 2, ROLLOUTS, ""),
    "fid": (0.3, 0.0, UPDATE, ""),
    "features": ("reward", "evaluator", ROLLOUTS, FID),
    "target": ("{tiny}/reward/real.npz", "{target}", ROLLOUTS, FID),
    "price": ("potential", "exact", UPDATE, FID),
    "replace": (2, 1, ROLLOUTS, f"{FID} --price exact"),
    "reference": (24, 16, ROLLOUTS, "--reward fid"),
    "refresh": (0, 1, UPDATE, FID),
    "select": ("window", "spread", UPDATE, ""),
    "keep": (3, 2, UPDATE, ""),
    "prompt_noise": (0.25, 0.5, ROLLOUTS, ""),
    "tau1": (0.6, 0.8, ROLLOUTS, ""),
    "tau2": (1.2, 1.0, ROLLOUTS, ""),
    "psi": (1, 0.5, ROLLOUTS, ""),
    "diversity": (0.3, 0, UPDATE, ""),
    "diversity_features": ("reward", "latents", UPDATE, ""),
    "metric": ("cosine", "euclidean", UPDATE, ""),
    "nearest": (2, 1, UPDATE, ""),
    "success": (True, False, UPDATE, ""),
    "gamma": (1, 0.5, UPDATE, ""),
    "terminal": ("keep", "zero", UPDATE, ""),
    "kl": (0, 1, UPDATE, ""),
    "gardo": (False, True, UPDATE, ""),
    "std": ("group", "batch", UPDATE, ""),
    "train": ("attention", "all", UPDATE, ""),
    "lora": (0, 2, UPDATE, ""),
    "lr": (0.001, 0.002, UPDATE, ""),
    "warmup": (0, 4, UPDATE, ""),
    "updates": (2, 1, UPDATE, ""),
    "passes": (1, 2, UPDATE, ""),
    "clip": (0.4, 1e-5, UPDATE, ""),
    "grad_clip": (1, 1e-6, UPDATE, ""),
    "ema": (0, 0.5, EVALUATION, ""),
    "eval_prompts": ("{tiny}/eval_prompts.jsonl", "{one}", EVALUATION, ""),
    "eval_every": (1, 2, EVALUATION, ""),
    "eval_images": (20, 40, EVALUATION, ""),
    "eval_steps": (2, 3, EVALUATION, ""),
    "eval_seed": (0, 1, EVALUATION, ""),
    "save_every": (1, 2, OUTPUT, ""),
    "keep_checkpoints": (2, 1, OUTPUT, ""),
    "snapshot_every": (0, 1, OUTPUT, ""),
    "keep_snapshots": (2, 1, OUTPUT, "--snapshot_every 1"),
    "tracker": ("none", "tensorboard", OUTPUT, ""),
    "batch": (160, 5, ROUNDING, ""),
    "train_batch": (0, 4, MEMORY, ""),
    "decode_batch": (8, 3, MEMORY, ""),
    "reward_batch": (0, 3, MEMORY, ""),
    "checkpointing": (False, True, MEMORY, ""),
    "offload": (False, True, MEMORY, ""),
    "shard": (False, True, REFUSED, ""),
    "compile": (False, True, MEMORY, ""),
    "precision": ("float32", "bfloat16", ROLLOUTS, ""),
    "device": ("cpu", "auto", ROUNDING, ""),
    "timeout": (30, 7, START, ""),
}

# Memory flag: (object, function, what to look at in its arguments, what it is for both values).
# A training batch has 2 prompts x 3 kept x 2 steps in 2 updates; there are 8 rollouts.
PASSED_TO = {
    "checkpointing": (bases, "load", lambda arguments: arguments[3], [False, True]),
    "decode_batch": (bases, "load", lambda arguments: arguments[4], [8, 3]),
    "compile": (bases, "load", lambda arguments: arguments[5], [False, True]),
    "offload": (train, "rollout", lambda arguments: arguments[7], [None, "cpu"]),
    "train_batch": (train, "clipped_loss", lambda arguments: len(arguments[0]), [6, 4]),
    "reward_batch": (rewards.Reward, "score", lambda arguments: len(arguments[1]), [8, 3]),
}
QUICK = ("reward", "select", "prompt_noise", "diversity", "ema", "kl")


def with_marks(names):
    """Some flags are tested by default, all in the whole suite."""
    rows = []
    for name in names:
        mark = pytest.mark.run if name in QUICK else pytest.mark.slow
        rows.append(pytest.param(name, marks=mark))
    return rows


def flags_that_change(*kinds):
    return with_marks(name for name, row in FLAGS.items() if row[2] in kinds)


def spelled(name, value):
    """A flag with its value, as words of a command line."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


@pytest.fixture(scope="module")
def outcome(tiny, tmp_path_factory):
    """flags -> what a run with them wrote; each run is made once."""
    tmp = tmp_path_factory.mktemp("flags")
    np.savez(tmp / "target.npz", mu=np.ones(64), sigma=np.eye(64))
    (tmp / "one.jsonl").write_text('{"prompt": "a dark coat", "label": 4}\n')
    paths = {
        "tiny": tiny,
        "other": build_model(tmp / "other", seed=5),
        "one": tmp / "one.jsonl",
        "tmp": tmp,
        "target": tmp / "target.npz",
    }
    known = {}

    def run(words):
        words = tuple(word.format(**paths) for word in words)
        if words not in known:
            out = tmp / f"run{len(known)}"
            if "--out" in words:
                out = Path(words[words.index("--out") + 1])
            launch(small(tiny, out, *BASE, *words))
            known[words] = read_run(out)
        return known[words]

    return run


def read_run(out):
    """What a run wrote, or None."""
    if not out.is_dir():
        return None
    return SimpleNamespace(
        out=out,
        rows=read_metrics(out),
        weights=read_weights(out),
        names=set(contents(out)),
        model=network(out / "model"),
    )


def both(outcome, name):
    """The two runs of a flag, with each of its values."""
    value, other, _, context = FLAGS[name]
    a = outcome([*context.split(), *spelled(name, value)])
    b = outcome([*context.split(), *spelled(name, other)])
    return a, b


def training(rows):
    """The rows without what an evaluation measured."""
    return [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in rows]


def evaluation(rows):
    """What the evaluations measured."""
    return [{k: v for k, v in row.items() if k.startswith("eval/")} for row in rows]


def equal_weights(a, b):
    """Whether the tensors that both hold are the same."""
    return all(torch.equal(a[name], b[name]) for name in a.keys() & b.keys())


# --------------------------------------------------------------------------------------------------


def test_the_table_covers_every_flag():
    assert list(FLAGS) == [field.name for field in dataclasses.fields(train.Args)]


@pytest.mark.parametrize("name", flags_that_change(ROLLOUTS))
def test_the_flag_changes_the_rollouts(outcome, name):
    a, b = both(outcome, name)
    assert a.rows[1]["reward"] != b.rows[1]["reward"]


@pytest.mark.parametrize("name", flags_that_change(UPDATE))
def test_the_flag_changes_the_update_alone(outcome, name):
    a, b = both(outcome, name)
    if name != "price":  # the price is the reward
        assert a.rows[1]["reward"] == b.rows[1]["reward"]
    assert moved(a.model, b.model)


@pytest.mark.parametrize("name", flags_that_change(EVALUATION))
def test_the_flag_changes_the_evaluation_alone(outcome, name):
    a, b = both(outcome, name)
    assert training(a.rows) == training(b.rows)
    assert equal_weights(a.weights, b.weights)
    assert evaluation(a.rows) != evaluation(b.rows)


@pytest.mark.parametrize("name", flags_that_change(OUTPUT))
def test_the_flag_changes_what_is_written_and_no_number(outcome, name):
    a, b = both(outcome, name)
    common = min(len(a.rows), len(b.rows))
    assert a.rows[:common] == b.rows[:common]
    assert len(a.rows) != len(b.rows) or equal_weights(a.weights, b.weights)
    if name == "out":
        assert a.out != b.out
    else:
        assert a.names != b.names


@pytest.mark.parametrize("name", flags_that_change(ROUNDING))
def test_the_flag_changes_rounding_alone(tiny, outcome, name):
    if name == "device" and torch.cuda.is_available():
        pytest.skip("auto is the GPU here")
    a, b = both(outcome, name)
    assert_close_rows(a.rows, b.rows)
    assert_close_weights(a.weights, b.weights, network(tiny))


@pytest.mark.parametrize("name", flags_that_change(MEMORY))
def test_the_flag_is_passed_on_and_changes_rounding_alone(tiny, tmp_path, monkeypatch, name):
    """That the model then does it is tested in tests/bases."""
    owner, function, look, expected = PASSED_TO[name]
    original = getattr(owner, function)
    base = network(tiny)
    calls = []

    def spy(*arguments):
        calls.append(look(arguments))
        return original(*arguments)

    monkeypatch.setattr(owner, function, spy)
    # Compiling takes minutes, and is tested in test_compiling.py.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network, **options: None)
    firsts = []
    for value in FLAGS[name][:2]:
        calls.clear()
        launch(small(tiny, tmp_path / str(value), *BASE, *spelled(name, value)))
        firsts.append(calls[0])
    assert firsts == expected
    a, b = [read_weights(tmp_path / str(value)) for value in FLAGS[name][:2]]
    assert_close_weights(a, b, base)


@pytest.mark.slow
def test_dry_run_writes_nothing(outcome):
    a, b = both(outcome, "dry_run")
    assert a and b is None


@pytest.mark.slow
def test_check_trains_nothing(outcome, capsys):
    a, b = both(outcome, "check")
    assert a and b is None
    assert "11 of 11 checks passed" in capsys.readouterr().out


@pytest.mark.slow
def test_shard_is_refused_by_one_process(outcome):
    with pytest.raises(SystemExit) as stopped:
        both(outcome, "shard")
    assert stopped.value.code == 2


@pytest.mark.slow
def test_timeout_is_how_long_a_process_waits(tiny, tmp_path, monkeypatch):
    waits = []

    def start(device, minutes):
        waits.append(minutes)
        raise StopIteration

    monkeypatch.setattr(processes, "start", start)
    for minutes in FLAGS["timeout"][:2]:
        with pytest.raises(StopIteration):
            launch(small(tiny, tmp_path / str(minutes), *spelled("timeout", minutes)))
    assert waits == list(FLAGS["timeout"][:2])
