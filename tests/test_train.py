"""The mathematics of the update: clipped loss, KL, minibatches and credit, as pure functions."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train
from sampling import concentrated_subset
from shaping import group_advantage
from support import processes
from train import Args, Groups, clipped_loss, gaussian_kl, minibatches


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------
# The loss.

RATIO = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0], dtype=torch.float64)


def plain_loss(ratio, advantage, clip):
    """-min(A r, A clip(r)), of numbers."""
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    return -min(advantage * ratio, advantage * clipped)


@pytest.mark.parametrize("advantage", [2.0, -1.5, 0.0])
def test_clipped_loss_by_its_definition(advantage):
    ours = clipped_loss(RATIO, torch.full_like(RATIO, advantage), 0.2)
    expected = [plain_loss(ratio, advantage, 0.2) for ratio in RATIO.tolist()]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("advantage", [2.0, -1.5])
def test_clipped_loss_has_its_gradient_by_finite_differences(advantage):
    ratio = RATIO.clone().requires_grad_()
    clipped_loss(ratio, torch.full_like(RATIO, advantage), 0.2).sum().backward()
    differences = []
    for r in RATIO.tolist():
        above = plain_loss(r + 1e-6, advantage, 0.2)
        below = plain_loss(r - 1e-6, advantage, 0.2)
        differences.append((above - below) / 2e-6)
    expected = torch.tensor(differences, dtype=torch.float64)
    torch.testing.assert_close(ratio.grad, expected, atol=1e-6, rtol=1e-6)
    # It is zero where the ratio has gone far enough in the direction that pays.
    is_outside = RATIO > 1.2 if advantage > 0 else RATIO < 0.8
    assert torch.equal(ratio.grad, torch.where(is_outside, 0.0, -advantage))


def test_kl_is_that_of_torch():
    mean, reference = randn(4, 3, 5), randn(4, 3, 5, seed=1)
    std = torch.tensor([0.1, 0.5, 1.0, 3.0]).reshape(4, 1, 1)
    ours_and_theirs = (
        torch.distributions.Normal(mean, std),
        torch.distributions.Normal(reference, std),
    )
    expected = torch.distributions.kl_divergence(*ours_and_theirs).flatten(1).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, reference, std), expected, rtol=1e-4, atol=1e-4)
    assert (gaussian_kl(mean, mean, std) == 0).all()


def test_kl_has_its_gradient():
    mean, reference = randn(4, 3, 5).requires_grad_(), randn(4, 3, 5, seed=1)
    std = torch.tensor([0.1, 0.5, 1.0, 3.0]).reshape(4, 1, 1)
    gaussian_kl(mean, reference, std).sum().backward()
    expected = (mean.detach() - reference) / std**2
    torch.testing.assert_close(mean.grad, expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Minibatches.


def dealt(W, kept, updates, passes=1, step=0):
    """The minibatches of W steps of `kept` rollouts."""
    return minibatches(Args(updates=updates, passes=passes), W, kept, step)


@pytest.mark.parametrize("W, kept, updates, passes", [(4, 10, 2, 1), (3, 5, 5, 2), (1, 6, 3, 1)])
def test_each_pass_has_each_pair_once(W, kept, updates, passes):
    parts = dealt(W, kept, updates, passes)
    assert len(parts) == updates * passes
    for first in range(0, len(parts), updates):
        pairs = torch.cat(parts[first : first + updates])
        assert pairs.sort().values.tolist() == list(range(W * kept))


def test_minibatches_have_each_rollout_equally_often_if_updates_divide_the_steps():
    for part in dealt(W=4, kept=10, updates=2):
        counts = (part % 10).bincount(minlength=10)
        assert counts.tolist() == [2] * 10


def test_minibatches_shuffle_the_steps_of_each_rollout_by_itself():
    """With one shuffle for all rollouts, a minibatch would hold the same steps of every rollout."""
    first, _ = dealt(W=4, kept=50, updates=2)
    steps_of = {}
    for pair in first.tolist():
        steps_of.setdefault(pair % 50, set()).add(pair // 50)
    assert len({frozenset(steps) for steps in steps_of.values()}) == 6  # all pairs of four steps


def test_minibatches_shuffle_the_rollouts_in_each_place():
    """Parts of less than a place's 50 rollouts hold others in each place."""
    parts = dealt(W=2, kept=50, updates=4)
    first, second, third, fourth = [set((part % 50).tolist()) for part in parts]
    assert first | second == third | fourth == set(range(50))
    assert first not in ({*range(25)}, third, fourth)


def test_minibatches_are_a_function_of_seed_and_step():
    assert torch.equal(torch.cat(dealt(4, 10, 2)), torch.cat(dealt(4, 10, 2)))
    assert not torch.equal(torch.cat(dealt(4, 10, 2)), torch.cat(dealt(4, 10, 2, step=1)))


# --------------------------------------------------------------------------------------------------
# Credit: the signals together. P = 3 prompts, N = 6 rollouts, W = 3 steps.

PLAIN = {
    "keep": 4,
    "select": "window",
    "std": "group",
    "gardo": False,
    "success": False,
    "gamma": 0.9,
    "diversity": 0.3,
}
EVERYONE = torch.arange(6).expand(3, 6)


def credit(rewards, potential, nearest=None, weights=None, **changes):
    """train.credit with one reward, or several: {name: [P, N]} with weights."""
    if not isinstance(rewards, dict):
        rewards = {"class": rewards}
    if nearest is None:
        nearest = torch.ones(potential.shape[1:])
    groups = Groups(None, rewards, None, potential, nearest)
    args = replace(Args(), **(PLAIN | changes))
    return train.credit(args, weights or {"class": 1.0}, groups)


@pytest.mark.parametrize("std", ["group", "batch"])
def test_each_reward_is_in_units_of_its_own_std_and_then_weighted(std):
    a, b = randn(3, 6), randn(3, 6, seed=1)
    potential = torch.zeros(4, 3, 6)
    weights = {"class": 1.0, "fid": 0.5}
    index, ours = credit({"class": a, "fid": b}, potential, weights=weights, std=std)
    expected = group_advantage(a, index, std) + 0.5 * group_advantage(b, index, std)
    torch.testing.assert_close(ours[0], expected)

    scaled = {"class": 1000 * a - 3, "fid": 0.01 * b}
    index_of_scaled, ours_of_scaled = credit(scaled, potential, weights=weights, std=std)
    assert torch.equal(index, index_of_scaled)
    torch.testing.assert_close(ours, ours_of_scaled, rtol=1e-3, atol=1e-3)


def test_who_is_kept_is_decided_on_the_weighted_sum():
    a, b = randn(3, 6), randn(3, 6, seed=1)
    weights = {"class": 1.0, "fid": -2.0}
    index, _ = credit({"class": a, "fid": b}, torch.zeros(4, 3, 6), weights=weights, std="batch")
    score = group_advantage(a, EVERYONE, "batch") - 2 * group_advantage(b, EVERYONE, "batch")
    assert torch.equal(index, concentrated_subset(score, 4, "window"))


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_diversity_is_added_in_units_of_its_groups_std(std):
    rewards, potential = randn(3, 6), randn(4, 3, 6, seed=1)
    index, ours = credit(rewards, potential, std=std)
    _, plain = credit(rewards, potential, std=std, diversity=0.0)
    assert index.shape == (3, 4) and ours.shape == (3, 3, 4)
    for t in range(3):
        shaped = 0.9 ** (3 - t) * potential[3].double() - potential[t].double()
        expected = 0.3 * group_advantage(shaped, index)
        torch.testing.assert_close(plain[t], group_advantage(rewards, index, std))
        torch.testing.assert_close(ours[t] - plain[t], expected, rtol=1e-5, atol=1e-5)


def test_success_pays_diversity_to_the_better_half_only():
    rewards, potential = randn(3, 6), randn(4, 3, 6, seed=1)
    index, ours = credit(rewards, potential, success=True)
    is_success = rewards >= rewards.mean(1, keepdim=True)
    same_index, expected = credit(rewards, potential * is_success)
    assert torch.equal(index, same_index)  # who is kept depends on rewards alone
    torch.testing.assert_close(ours, expected)


def test_a_group_of_equals_is_all_successful():
    """The float32 mean of equal numbers can round above them."""
    rewards = torch.full((1, 3), 1.4451544284820557)
    potential = torch.rand(3, 1, 3, generator=torch.Generator().manual_seed(0))
    _, with_success = credit(rewards, potential, select="all", keep=3, success=True)
    _, without = credit(rewards, potential, select="all", keep=3, success=False)
    assert torch.equal(with_success, without)
    assert without.abs().max() > 0


@pytest.mark.parametrize("terminal", ["zero", "keep"])
def test_a_potential_that_only_shapes_knows_no_success(terminal):
    """Masked by the outcome, a potential that is zero at the end would fine a success."""
    rewards, potential = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.full((4, 1, 4), 0.5)
    _, ours = credit(rewards, potential, success=True, terminal=terminal, gamma=1.0)
    _, plain = credit(rewards, potential, diversity=0.0)
    torch.testing.assert_close(ours, plain)  # equally diverse, so nothing to pay


def test_gardo_multiplies_positive_advantages_by_the_relative_distance():
    rewards, potential = randn(3, 6), torch.zeros(4, 3, 6)
    nearest = torch.rand(3, 6, generator=torch.Generator().manual_seed(2))
    index, plain = credit(rewards, potential, nearest)
    _, ours = credit(rewards, potential, nearest, gardo=True)
    relative = (nearest / nearest.mean(1, keepdim=True)).gather(1, index)
    expected = torch.where(plain > 0, plain * relative, plain)
    torch.testing.assert_close(ours, expected)


# --------------------------------------------------------------------------------------------------
# The learning rate.


def test_the_learning_rate_rises_over_the_warmup_and_stays():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    rates = []
    for iteration in (1, 2, 4, 5):
        train.set_learning_rate(Args(lr=1.0, warmup=4), optimizer, iteration)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.25, 0.5, 1.0, 1.0]


# --------------------------------------------------------------------------------------------------
# The base's own pictures.


@pytest.mark.parametrize("world", [1, 3])
def test_the_processes_draw_equally_many_of_the_bases_pictures(monkeypatch, world):
    """Picture i is grey of brightness i / 10; all are there once, in order."""
    drawn = []

    def draw(model, prompts, each, numbers, *rest):
        drawn.append(numbers)
        brightness = torch.tensor(numbers) / 10
        yield torch.tensor(numbers), brightness.reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2)

    monkeypatch.setattr(train, "stream", draw)
    monkeypatch.setattr(train, "COMPONENT_PICTURES", 9)
    monkeypatch.setattr(processes, "world", lambda: world)
    monkeypatch.setattr(processes, "gather", lambda rows, n: rows)
    setup = SimpleNamespace(model=None, prompts=["a bag", "a coat"])  # five pictures of each
    parts = []
    for rank in range(world):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        parts.append(train.base_pixels(Args(), setup))
    expected = (torch.arange(10) / 10 - 0.5)[:, None].expand(10, 12)
    torch.testing.assert_close(torch.cat(parts), expected)
    assert len({len(numbers) for numbers in drawn}) == 1


def test_the_reward_in_the_log_is_that_of_pictures_where_there_is_one():
    rewards = {"class": torch.full((2, 3), -1.0), "fid": torch.arange(6.0).reshape(2, 3)}
    groups = Groups(None, rewards, None, torch.zeros(1, 2, 3), torch.zeros(2, 3))
    metrics = train.sample_metrics({"class": 2.0, "fid": 0.3}, groups)
    assert metrics["reward"] == -2.0
    assert metrics["reward/fid"] == 2.5
    assert metrics["zero_std_fraction"] == 1.0  # the class teaches nothing in either group
    assert train.sample_metrics({"fid": 2.0}, groups)["reward"] == 5.0
