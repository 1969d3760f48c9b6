"""Guards: numbers that are none are named, what fails on one process stops them all, and a clip within the noise is warned of."""
import pytest
import torch

from support import guards
from support import processes
import train
from conftest import ROOT, launch, launch_process, read_metrics, small

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_the_first_tensor_that_is_not_finite_is_named(number):
    bad = torch.tensor([[1.0, 2.0], [3.0, number]])
    guards.check_finite(4, {"the loss": torch.zeros(()), "the gradient of a": None, "the gradient of b": torch.ones(3)}, CPU)
    with pytest.raises(FloatingPointError, match="^iteration 5, process 0: the gradient of b is not finite; stopped before the optimizer step$"):
        guards.check_finite(4, {"the loss": torch.zeros(()), "the gradient of a": None, "the gradient of b": bad, "the gradient of c": bad}, CPU)


@pytest.mark.parametrize("raised, expected", [(FloatingPointError("a reward is none"), FloatingPointError), (RuntimeError("a reward failed"), RuntimeError),
                                              (KeyError("label"), RuntimeError), (ValueError(), RuntimeError)])
def test_what_fails_keeps_its_kind_its_words_and_its_cause(raised, expected):
    with pytest.raises(expected) as error, guards.together("iteration 3"):
        raise raised
    assert type(error.value) is expected and error.value.__cause__ is raised
    assert str(error.value) == f"iteration 3, process 0: {str(raised) or 'ValueError'}; stopped before the update"


def test_what_is_right_and_what_asks_to_end_pass_through():
    with guards.together("iteration 3"):
        pass
    with pytest.raises(KeyboardInterrupt), guards.together("iteration 3"):
        raise KeyboardInterrupt


def test_the_other_processes_hear_who_it_was(tmp_path):
    """Process 1 alone has a bad number, then a failing reward; process 0 says the same of it, and neither waits."""
    (tmp_path / "two.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, guards, runtime
device, rank = processes.start("cpu"), processes.rank()

def two():
    guards.check_finite(6, {{"a latent": torch.ones(2), "a log-prob": torch.ones(2) / (1 - rank)}}, device)

def three():
    with guards.together("iteration 8"):
        if rank == 1:
            raise ArithmeticError("no score")

def four():
    guards.check_start("runs/x", 20, device)
    guards.check_start("runs/x", 20 - 10 * rank, device)

for mistake in (two, three, four):
    try:
        mistake()
    except Exception as error:
        print(f"{{rank}} {{type(error).__name__}} {{error}}\\n", end="", flush=True)
processes.finish()
""")
    code, out, error = launch_process([], 2, script=tmp_path / "two.py")
    assert code == 0, error
    number = "FloatingPointError iteration 7, process 1: a log-prob is not finite; stopped before the optimizer step"
    reward = "RuntimeError iteration 8, process 1: no score; stopped before the update"
    start = "RuntimeError runs/x: process 0 would go on from iteration 20, process 1 from 10; all hosts must see the same --out"
    assert sorted(out.splitlines()) == sorted(f"{rank} {line}" for rank in (0, 1) for line in (number, reward, start))


@pytest.mark.parametrize("norm, ratio_error, naming", [(float("nan"), 0.0, "norm"), (float("inf"), 0.0, "norm"), (1.0, 2e-6, "off by 2.0e-06.*dropout.*guidance")])
def test_an_update_that_must_not_be_made(norm, ratio_error, naming):
    with pytest.raises(FloatingPointError, match="^iteration 3: .*" + naming):
        guards.check_update(2, norm, ratio_error, 1e-6, 1e-3)


def test_a_clip_within_the_noise_is_warned_of_once(capsys):
    guards.warn.cache_clear()
    for step, clip in enumerate((1.1e-5, 0.9e-5, 0.9e-5)):
        guards.check_update(step, 1.0, 1e-6, 1e-4, clip)
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the clip of the ratio, 9.0e-06, is less than ten times") and "--clip" in line
    guards.check_update(5, 1.0, 0.0, 1e-4, 1e-12)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------------------
# In a run: each is named, before the weights have moved.

def spoiled(tensor):
    tensor = tensor.clone()
    tensor.flatten()[-1] = float("nan")
    return tensor


def change(owner, name, do):
    """-> a function that plants do(result) as what owner.name returns in iteration 2."""
    def plant(monkeypatch, iteration):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: do(function(*args, **kwargs)) if iteration() == 2 else function(*args, **kwargs))
    return plant


def of_trajectory(part):
    def do(trajectory):
        setattr(trajectory, part, spoiled(getattr(trajectory, part)))
        return trajectory
    return do


@pytest.mark.parametrize("plant, naming", [
    (change(train, "rollout", of_trajectory("latents")), "a latent"), (change(train, "rollout", of_trajectory("x0_hats")), "a predicted picture"),
    (change(train, "rollout", of_trajectory("log_probs")), "a log-prob"), (change(train, "credit", lambda pair: (pair[0], spoiled(pair[1]))), "an advantage"),
    (change(train, "clipped_loss", spoiled), "the loss")], ids=["latent", "x0_hat", "log-prob", "advantage", "loss"])
def test_a_number_that_is_none_is_named(tiny, tmp_path, monkeypatch, plant, naming):
    plant(monkeypatch, lambda: len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()))
    with pytest.raises(FloatingPointError, match=f"^iteration 2, process 0: {naming} is not finite; stopped before the (update|optimizer step)$"):
        launch(small(tiny, tmp_path / "run"))
    assert [row["iteration"] for row in read_metrics(tmp_path / "run")] == [0, 1]


def test_a_gradient_that_is_none_is_named_after_its_weight(tiny, tmp_path, monkeypatch):
    backward = torch.Tensor.backward

    def poisoned(loss):
        backward(loss)
        weights["transformer_blocks.0.attn.to_k.bias"].grad[3] = float("inf")
    weights, load = {}, train.models.load
    monkeypatch.setattr(train.models, "load", lambda *args: (model := load(*args), weights.update(model.network.named_parameters()))[0])
    monkeypatch.setattr(torch.Tensor, "backward", poisoned)
    with pytest.raises(FloatingPointError, match="^iteration 1, process 0: the gradient of transformer_blocks.0.attn.to_k.bias is not finite"):
        launch(small(tiny, tmp_path / "run"))


@pytest.mark.parametrize("clip, said", [(784 * 6e-6, 0), (784 * 4e-6, 1)])
def test_a_run_whose_clip_is_within_the_noise_says_so(tiny, tmp_path, monkeypatch, capfd, clip, said):
    def noisy(*args, **kwargs):
        trajectory = rollout(*args, **kwargs)
        trajectory.log_probs += 784 * 5e-7                               # of 784 dimensions: the ratio is off by 5e-7
        return trajectory
    rollout = train.rollout
    monkeypatch.setattr(train, "rollout", noisy)
    guards.warn.cache_clear()
    launch(small(tiny, tmp_path / "run", "--clip", clip))
    assert capfd.readouterr().err.count("warning: the clip of the ratio") == said
    assert [row["ratio_error"] for row in read_metrics(tmp_path / "run")[1:]] == pytest.approx([5e-7] * 2, rel=0.3)
