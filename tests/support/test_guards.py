"""guards.py: NaN and infinity are named, and what fails on one process stops them all."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, launch, launch_process, read_metrics, small

import bases
import train
from support import guards

CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------
# Each guard by itself.


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_the_first_tensor_with_nan_or_infinity_is_named(number):
    good = {
        "the loss": torch.zeros(()),
        "the gradient of a": None,
        "the gradient of b": torch.ones(2),
    }
    guards.check_finite(4, good, CPU)
    guards.finite({"a latent": torch.ones(2)})
    bad = torch.tensor([[1.0, 2.0], [3.0, number]])
    tensors = good | {"the gradient of b": bad, "the gradient of c": bad}
    message = (
        "iteration 5, process 0: the gradient of b is not finite; stopped before the optimizer step"
    )
    with pytest.raises(FloatingPointError, match=f"^{message}$"):
        guards.check_finite(4, tensors, CPU)
    with pytest.raises(FloatingPointError, match="^a log-prob is not finite$"):
        guards.finite({"a latent": torch.ones(2), "a log-prob": bad})


@pytest.mark.parametrize(
    "error, kind, text",
    [
        (FloatingPointError("a reward is NaN"), FloatingPointError, "a reward is NaN"),
        (KeyError("label"), RuntimeError, "'label'"),
        (ValueError(), RuntimeError, "ValueError"),
    ],
)
def test_what_fails_keeps_its_words_and_its_cause(error, kind, text):
    with pytest.raises(kind) as raised, guards.together("iteration 3"):
        raise error
    assert type(raised.value) is kind and raised.value.__cause__ is error
    assert str(raised.value) == f"iteration 3, process 0: {text}; stopped before the update"


def test_what_is_right_and_what_asks_to_end_pass_through():
    with guards.together("iteration 3"):
        pass
    with pytest.raises(KeyboardInterrupt), guards.together("iteration 3"):
        raise KeyboardInterrupt


TWO = """
import sys
sys.path.insert(0, {root!r})
import torch
from support import guards, processes

device = processes.start("cpu")
rank = processes.rank()

def a_bad_number():
    tensors = {{"a latent": torch.ones(2), "a log-prob": torch.ones(2) / (1 - rank)}}
    guards.check_finite(6, tensors, device)

def a_failing_reward():
    with guards.together("iteration 8"):
        if rank == 1:
            raise ArithmeticError("no score")

def two_run_folders():
    guards.check_start("runs/x", 20, device)
    guards.check_start("runs/x", 20 - 10 * rank, device)

for mistake in (a_bad_number, a_failing_reward, two_run_folders):
    try:
        mistake()
    except Exception as error:
        print(f"{{rank}} {{type(error).__name__}} {{error}}\\n", end="", flush=True)
processes.finish()
"""


@pytest.mark.slow
def test_the_other_processes_hear_who_it_was(tmp_path):
    """Process 1 alone has each mistake; process 0 says the same of it, and neither waits."""
    script = tmp_path / "two.py"
    script.write_text(TWO.format(root=str(ROOT)))
    code, out, error = launch_process([], 2, script=script)
    assert code == 0, error
    expected = []
    for rank in (0, 1):
        expected += [
            f"{rank} FloatingPointError iteration 7, process 1: a log-prob is not finite; "
            "stopped before the optimizer step",
            f"{rank} RuntimeError iteration 8, process 1: no score; stopped before the update",
            f"{rank} RuntimeError runs/x: process 0 would go on from iteration 20, process 1 from "
            "10; all hosts must see the same --out",
        ]
    assert sorted(out.splitlines()) == sorted(expected)


@pytest.mark.parametrize(
    "grad_norm, ratio_error, named",
    [
        (float("nan"), 0.0, "norm"),
        (float("inf"), 0.0, "norm"),
        (1.0, 2e-6, "off by 2.0e-06.*dropout.*guidance"),
    ],
)
def test_an_update_that_must_not_be_made(grad_norm, ratio_error, named):
    with pytest.raises(FloatingPointError, match=f"^iteration 3: .*{named}"):
        guards.check_update(2, grad_norm, ratio_error, tolerance=1e-6, clip=1e-3)


def test_a_clip_within_the_rounding_is_warned_of_once(capsys):
    guards.warn.cache_clear()
    for step, clip in enumerate((1.1e-5, 0.9e-5, 0.9e-5)):
        guards.check_update(step, 1.0, 1e-6, tolerance=1e-4, clip=clip)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the clip of the ratio, 9.0e-06, is less than ten times")
    assert "--clip" in line
    guards.check_update(5, 1.0, 0.0, tolerance=1e-4, clip=1e-12)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "precision, compiled, guidance, expected",
    [
        ("float32", False, 1.0, 1e-5),
        ("bfloat16", False, 3.0, 5e-4),
        ("float32", True, 0.0, 3e-5),
        ("bfloat16", True, 1.0, 1e-3),
    ],
)
def test_the_first_ratio_may_be_off_by_rounding_times_guidance(
    precision, compiled, guidance, expected
):
    args = SimpleNamespace(precision=precision, compile=compiled, guidance=guidance)
    assert guards.tolerance(args) == pytest.approx(expected)


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (shutil.Error([("a", "b", "[Errno 28] No space")]), r"\[Errno 28\] No space"),
    ],
)
def test_a_full_disk_is_one_line(tmp_path, error, reason):
    pattern = f"^error: {tmp_path}: .*{reason}; what is there is whole; the same command goes on"
    with pytest.raises(SystemExit, match=pattern), guards.writing(tmp_path):
        raise error
    (tmp_path / "checkpoint-00003").mkdir()
    (tmp_path / "checkpoint-00003" / "state.json").write_text('{"step": 3, "lines": 4}')
    with pytest.raises(SystemExit, match="; checkpoint 3 is whole;"), guards.writing(tmp_path):
        raise error


# --------------------------------------------------------------------------------------------------
# In a run each is named before the weights have moved.


def spoil(tensor):
    """A copy whose last number is NaN."""
    tensor = tensor.clone()
    tensor.flatten()[-1] = float("nan")
    return tensor


def spoil_part(name):
    """-> a function that spoils one part of a trajectory."""

    def change(trajectory):
        setattr(trajectory, name, spoil(getattr(trajectory, name)))
        return trajectory

    return change


def spoil_advantage(credited):
    index, advantage = credited
    return index, spoil(advantage)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function, change, named",
    [
        ("rollout", spoil_part("latents"), "a latent"),
        ("rollout", spoil_part("x0_hats"), "a predicted picture"),
        ("rollout", spoil_part("log_probs"), "a log-prob"),
        ("credit", spoil_advantage, "an advantage"),
        ("clipped_loss", spoil, "the loss"),
    ],
)
def test_what_holds_nan_is_named(tiny, tmp_path, monkeypatch, function, change, named):
    original = getattr(train, function)
    metrics = tmp_path / "run" / "metrics.jsonl"

    def changed_in_iteration_2(*args, **kwargs):
        result = original(*args, **kwargs)
        is_second = len(metrics.read_text().splitlines()) == 2
        return change(result) if is_second else result

    monkeypatch.setattr(train, function, changed_in_iteration_2)
    with pytest.raises(FloatingPointError, match=f"^iteration 2, process 0: {named} is not finite"):
        launch(small(tiny, tmp_path / "run"))
    assert [row["iteration"] for row in read_metrics(tmp_path / "run")] == [0, 1]


@pytest.mark.run
def test_an_infinite_gradient_is_named_after_its_weight(tiny, tmp_path, monkeypatch):
    name = "transformer_blocks.0.attn.to_k.bias"
    weights = {}
    load = bases.load
    backward = torch.Tensor.backward

    def load_and_note(*args, **kwargs):
        model = load(*args, **kwargs)
        weights.update(model.network.named_parameters())
        return model

    def poisoned(loss):
        backward(loss)
        weights[name].grad[3] = float("inf")

    monkeypatch.setattr(bases, "load", load_and_note)
    monkeypatch.setattr(torch.Tensor, "backward", poisoned)
    message = f"^iteration 1, process 0: the gradient of {name} is not finite"
    with pytest.raises(FloatingPointError, match=message):
        launch(small(tiny, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("clip, lines", [(784 * 6e-6, 0), (784 * 4e-6, 1)])
def test_a_run_whose_clip_is_within_the_rounding_says_so(
    tiny, tmp_path, monkeypatch, capfd, clip, lines
):
    """Log-probs off by 5e-7 in each of 784 dimensions: the ratio before the update is, too."""
    rollout = train.rollout

    def noisy(*args, **kwargs):
        trajectory = rollout(*args, **kwargs)
        trajectory.log_probs += 784 * 5e-7
        return trajectory

    monkeypatch.setattr(train, "rollout", noisy)
    guards.warn.cache_clear()
    launch(small(tiny, tmp_path / "run", "--clip", clip))
    assert capfd.readouterr().err.count("warning: the clip of the ratio") == lines
    for row in read_metrics(tmp_path / "run")[1:]:
        assert row["ratio_error"] == pytest.approx(5e-7, rel=0.3)
