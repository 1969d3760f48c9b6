"""train.py --check: every family of bases passes, and each check sees its own mistake."""

import pytest
import torch
from small_bases import FAMILIES, prompts_of

import train
from commands import model_checks
from sampling import Flow


@pytest.fixture
def case(names, tmp_path):
    """A function family -> its Case."""

    def open_family(family, **options):
        file = tmp_path / "prompts.txt"
        file.write_text("\n".join(prompts_of(family)[:2]) + "\n")
        args = train.Args(model=names[family], prompts=str(file), **options)
        return model_checks.open_case(args, torch.device("cpu"))

    return open_family


def failed(case, check):
    """The line of a check that must fail."""
    line = model_checks.outcome(check, case)
    assert line.startswith("FAILED"), line
    assert "\n" not in line
    return line


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_passes(case, family):
    guidance = 1.0 if family == "tiny" else 2.0
    opened = case(family, guidance=guidance)
    lines = [model_checks.outcome(check, opened) for check in model_checks.CHECKS]
    assert [line for line in lines if not line.startswith("ok")] == []
    print("\n".join(lines))


def test_a_mistake_fails_the_check_that_looks_for_it(case, monkeypatch):
    opened = case("sit")
    model = opened.model
    right = type(model).__call__

    def wrong_sign(self, x_t, t, prompt):
        x0_hat, eps_hat = right(self, x_t, t, prompt)
        return x0_hat, -eps_hat

    def forgetful(self, x_t, t, prompt):
        x0_hat, eps_hat = right(self, x_t, t, prompt)
        return x0_hat.detach(), eps_hat.detach()

    def noisy_gradients(self, x_t, t, prompt):
        x0_hat, eps_hat = right(self, x_t, t, prompt)
        scale = 1.01 if torch.is_grad_enabled() else 1.0
        return scale * x0_hat, eps_hat

    def flat(self, x_t, t, prompt):
        return [value.flatten(1) for value in right(self, x_t, t, prompt)]

    def mixed(self, x_t, t, prompt):
        x0_hat, eps_hat = right(self, x_t, t, prompt)
        return x0_hat + x0_hat.mean(0, keepdim=True), eps_hat

    mistakes = {
        wrong_sign: (model_checks.path_and_prediction, "differ by"),
        forgetful: (model_checks.learning, "RuntimeError"),
        noisy_gradients: (model_checks.first_ratio, "off by"),
        flat: (model_checks.shapes, "expected float32 [3, 4, 8, 8]"),
        mixed: (model_checks.neighbours, "alone and among others"),
    }
    for mistake, (check, words) in mistakes.items():
        with monkeypatch.context() as patched:
            patched.setattr(type(model), "__call__", mistake)
            assert words in failed(opened, check)
    for check in (model_checks.path_and_prediction, model_checks.shapes, model_checks.neighbours):
        assert model_checks.outcome(check, opened).startswith("ok")


def test_times_and_what_is_saved_are_checked(case, monkeypatch):
    opened = case("sit")
    model = opened.model
    model.path = Flow()._replace(times=lambda steps: torch.linspace(0, 1, steps + 1).double())
    assert "do not fall" in failed(opened, model_checks.times_of_the_path)
    model.path = Flow()
    model.initial_std = 80.0
    assert "they should agree" in failed(opened, model_checks.times_of_the_path)

    def save_something_else(folder, model):
        with torch.no_grad():
            next(model.network.parameters()).add_(1)
        save(folder, model)

    save = model_checks.files.save_model
    monkeypatch.setattr(model_checks.files, "save_model", save_something_else)
    assert "off by" in failed(opened, model_checks.saving)


def test_a_sampler_of_its_own_is_compared(case, monkeypatch):
    opened = case("sit")
    monkeypatch.setattr(
        type(opened.model), "stock_sample", lambda self, texts, x_T, steps: x_T, raising=False
    )
    assert "our samples and theirs" in failed(opened, model_checks.own_sampler)
