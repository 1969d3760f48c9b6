"""compiling.py: what --compile needs besides torch.compile."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sampling import FLOW
from support import compiling


class Model:
    """A generator as far as check_gradients knows it: x0_hat is linear in latents and prompt."""

    shape = (1, 2, 2)
    device = torch.device("cpu")
    path = FLOW

    def __init__(self, precision="float32"):
        self.precision = precision
        torch.manual_seed(0)
        self.network = nn.Linear(7, 4)

    def __call__(self, x_t, t, prompt):
        (embedding,) = prompt
        inputs = torch.cat([x_t.flatten(1), t[:, None], embedding], dim=1)
        x0_hat = self.network(inputs).reshape(x_t.shape)
        return x0_hat, x0_hat


@pytest.mark.parametrize(
    "precision, tolerated, refused",
    [
        ("float32", 1.0005, 1.01),
        ("bfloat16", 1.05, 1.2),
    ],
)
def test_a_compiler_that_gets_the_gradient_wrong_is_found_out(precision, tolerated, refused):
    """Its predictions are right all the same, so that no ratio shows it."""
    model = Model(precision)
    prompt = (torch.randn(3, 2),)
    calls = []

    def compiled(scale):
        def call(inputs):
            calls.append(scale)
            out = model.network._call_impl(inputs)
            return out.detach() + scale * (out - out.detach())

        return call

    for scale in (1, tolerated):
        model.network._compiled_call_impl = compiled(scale)
        compiling.check_gradients(model, prompt, model.network.parameters())
    model.network._compiled_call_impl = compiled(refused)
    error = f"--compile: .* gradient of this network wrong here, by {refused - 1:.1%}"
    with pytest.raises(ValueError, match=error):
        compiling.check_gradients(model, prompt, model.network.parameters())
    assert calls == [1, tolerated, refused]  # once compiled, once not
    assert all(parameter.grad is None for parameter in model.network.parameters())


def test_parameters_without_a_gradient_count_as_zeros():
    used, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    loss = (used * torch.tensor([2.0, 3.0])).sum()
    assert compiling.flat_gradient(loss, [used, unused]).tolist() == [2, 3, 0, 0, 0]


def test_each_size_of_a_batch_is_compiled_by_itself(monkeypatch):
    options = {}
    monkeypatch.setattr(torch, "compile", lambda call, **more: options.update(more) or call)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    network = nn.Linear(2, 2)
    names = network.state_dict().keys()
    compiling.compile_network(network)
    assert network.state_dict().keys() == names
    assert options["dynamic"] is False
    assert options["options"] == {"emulate_precision_casts": True}
    assert torch._dynamo.config.recompile_limit == 64  # past it the plain network runs


def test_what_is_recomputed_is_recomputed_within_the_attention(monkeypatch):
    entered = []

    def attention():
        entered.append(True)
        return nullcontext()

    context = compiling.recompute_context(attention)
    x = torch.ones(2, requires_grad=True)
    checkpoint(torch.exp, x, use_reentrant=False, **context).sum().backward()
    assert entered == [True]
    torch.testing.assert_close(x.grad, torch.full((2,), torch.e))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert compiling.recompute_context(attention) == {}


@pytest.mark.parametrize(
    "change, processes, is_good",
    [
        ({}, 2, True),
        ({"updates": 3}, 1, True),  # one process: always the same sizes
        ({"updates": 3, "compile": False}, 2, True),
        ({"updates": 3}, 2, False),  # does not divide the four steps
        ({"prompts_per_step": 3}, 2, False),
        ({"prompts_per_step": 3, "select": "all"}, 2, True),
    ],
)
def test_sizes_that_would_change_with_every_iteration_are_refused(change, processes, is_good):
    flags = {"compile": True, "updates": 2, "select": "window", "prompts_per_step": 4}
    args = SimpleNamespace(**flags | change)
    if is_good:
        compiling.check_sizes(args, processes, stochastic=4)
        return
    with pytest.raises(ValueError, match="^--compile: code is made for each size.* 2 processes"):
        compiling.check_sizes(args, processes, stochastic=4)
