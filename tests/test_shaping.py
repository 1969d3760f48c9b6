"""Diversity, the shaped return and the advantage."""

import itertools
import math

import pytest
import torch

from shaping import gardo, group_advantage, group_diversity, shaped_returns


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --------------------------------------------------------------------------------------------------
# Diversity.


def distance(a, b, metric):
    """The distance of two lists of numbers."""
    if metric == "euclidean":
        return math.dist(a, b)
    dot = sum(p * q for p, q in zip(a, b))
    return 1 - dot / math.hypot(*a) / math.hypot(*b)


def plain_diversity(features, metric, nearest):
    """One group's features, lists of numbers -> a number for each member."""
    result = []
    for i, own in enumerate(features):
        others = sorted(distance(own, f, metric) for j, f in enumerate(features) if j != i)
        chosen = others[:nearest] if nearest else others
        result.append(sum(chosen) / len(chosen))
    return result


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("nearest", [0, 1, 3, 9])
def test_diversity_is_the_mean_distance_to_the_nearest_others(metric, nearest):
    features = randn(3, 5, 2, 4)  # all dimensions behind the group are one vector
    expected = []
    for group in features:
        expected.append(plain_diversity(group.flatten(1).double().tolist(), metric, nearest))
    ours = group_diversity(features, metric, nearest)
    torch.testing.assert_close(ours, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_copies_have_no_diversity_and_the_one_that_leaves_gains_most(metric):
    features = randn(2, 1, 6).expand(2, 4, 6).clone()
    assert group_diversity(features, metric).abs().max() < 1e-6
    features[0, 3] = -features[0, 3]
    diversity = group_diversity(features, metric)
    assert diversity[0, 3] > 0.5
    third = diversity[0, 3].expand(3)  # the others gain a third each
    torch.testing.assert_close(3 * diversity[0, :3], third, atol=1e-5, rtol=1e-5)
    assert diversity[1].abs().max() < 1e-6
    assert group_diversity(features, metric, nearest=1)[0, :3].abs().max() < 1e-6


def test_the_distances_of_a_collapsed_group_are_no_rounding():
    """They are as small as float32's rounding of 1 - cos."""
    features = 5 * randn(1, 1, 64) + 3e-4 * randn(1, 8, 64, seed=1)
    expected = plain_diversity(features[0].double().tolist(), "cosine", 1)
    ours = group_diversity(features, "cosine", nearest=1)
    torch.testing.assert_close(ours, torch.tensor([expected]), rtol=1e-2, atol=0)
    multiplied = gardo(torch.ones(1, 8), ours, torch.arange(8)[None])
    assert 0 < multiplied.min() and multiplied.max() < 4


def test_cosine_does_not_see_contrast_and_euclidean_does():
    features = randn(2, 5, 6)
    contrast = torch.rand(2, 5, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    cosine = group_diversity(features, "cosine")
    euclidean = group_diversity(features, "euclidean")
    torch.testing.assert_close(group_diversity(contrast * features, "cosine"), cosine)
    torch.testing.assert_close(group_diversity(3 * features, "euclidean"), 3 * euclidean)


@pytest.mark.parametrize("metric, nearest", [("euclidean", 0), ("cosine", 2)])
def test_diversity_moves_with_its_rollout_and_stays_in_its_group(metric, nearest):
    features, order = randn(3, 6, 4), torch.tensor([3, 0, 5, 1, 2, 4])
    diversity = group_diversity(features, metric, nearest)
    moved = group_diversity(features[:, order], metric, nearest)
    alone = group_diversity(features[1:2], metric, nearest)
    torch.testing.assert_close(moved, diversity[:, order], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(alone, diversity[1:2], atol=1e-6, rtol=1e-6)


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="l1"):
        group_diversity(randn(1, 2, 3), "l1")


# --------------------------------------------------------------------------------------------------
# Shaping.


@pytest.mark.parametrize("gamma, terminal", [(1.0, "keep"), (0.9, "keep"), (0.9, "zero")])
def test_returns_are_the_discounted_sums_and_telescope(gamma, terminal):
    T = 5
    reward = randn(2, 3, dtype=torch.float64)
    potential = randn(T + 1, 2, 3, seed=1, dtype=torch.float64)
    ours = shaped_returns(reward, potential, gamma, 0.7, terminal)
    assert ours.shape == (T, 2, 3)
    phi = potential.clone()
    if terminal == "zero":
        phi[T] = 0
    for t in range(T):
        paid = gamma ** (T - 1 - t) * reward
        summed = paid
        for k in range(t, T):
            summed = summed + 0.7 * gamma ** (k - t) * (gamma * phi[k + 1] - phi[k])
        torch.testing.assert_close(ours[t], summed)
        telescoped = paid + 0.7 * (gamma ** (T - t) * phi[T] - phi[t])
        torch.testing.assert_close(ours[t], telescoped)


def test_shaping_of_one_step_leaves_its_arguments_alone():
    reward, potential = randn(2, 3), randn(2, 2, 3, seed=1)
    copies = reward.clone(), potential.clone()
    kept = shaped_returns(reward, potential, 0.9)
    zeroed = shaped_returns(reward, potential, 0.9, 2.0, "zero")
    torch.testing.assert_close(kept, (reward + 0.9 * potential[1] - potential[0])[None])
    torch.testing.assert_close(zeroed, (reward - 2 * potential[0])[None])
    torch.testing.assert_close(shaped_returns(reward, potential, weight=0.0), reward[None])
    assert torch.equal(reward, copies[0]) and torch.equal(potential, copies[1])


def test_an_unknown_terminal_is_refused():
    with pytest.raises(ValueError, match="maybe"):
        shaped_returns(randn(2, 3), randn(2, 2, 3), terminal="maybe")


def best_policies(reward, phi, gamma, terminal):
    """The best policy of a toy of two steps, by trying all of them.

    An action a of 3, then an action b of 3. reward [3, 3]; phi = (Phi(start), Phi(a) [3],
    Phi(a, b) [3, 3]). -> the best a, the best b after it, and the best b after each a.
    """
    start, middle, end = phi
    potential = torch.stack([start.expand(9), middle.repeat_interleave(3), end.flatten()])
    returns = shaped_returns(reward.reshape(1, 9), potential[:, None], gamma, 1.0, terminal)
    returns = returns[:, 0].reshape(2, 3, 3)  # of each step, for each path a, b

    def value(policy):
        a, answers = policy
        later = [returns[1, state, b].item() for state, b in enumerate(answers)]
        return returns[0, a, answers[a]].item(), later

    answers_to_all = itertools.product(range(3), repeat=3)
    best_a, best_answers = max(itertools.product(range(3), answers_to_all), key=value)
    by_state = returns[1].argmax(1).tolist()
    return best_a, best_answers[best_a], by_state


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_terminal_zero_leaves_the_best_policy_and_keep_moves_it(gamma):
    moved = 0
    nothing = torch.tensor(0.0), torch.zeros(3), torch.zeros(3, 3)
    for seed in range(50):
        reward = randn(3, 3, seed=seed)
        middle, end = 5 * randn(3, seed=200 + seed), 5 * randn(3, 3, seed=300 + seed)
        phi = randn(1, seed=100 + seed)[0], middle, end
        plain = best_policies(reward, nothing, gamma, "zero")
        assert plain[:2] == divmod(reward.argmax().item(), 3)
        assert best_policies(reward, phi, gamma, "zero") == plain
        moved += best_policies(reward, phi, gamma, "keep") != plain
    assert moved > 25


def test_keep_pays_for_the_end():
    reward = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0.9]])
    end = torch.zeros(3, 3)
    end[2, 2] = 0.2
    phi = torch.tensor(0.3), torch.tensor([7.0, -7.0, 0.0]), end
    assert best_policies(reward, phi, 1.0, "zero")[:2] == (0, 0)
    assert best_policies(reward, phi, 1.0, "keep")[:2] == (2, 2)


# --------------------------------------------------------------------------------------------------
# Advantages.

EVERYONE = torch.arange(6).expand(3, 6)
SOME = torch.tensor([[0, 1, 4, 5], [1, 2, 3, 4], [0, 2, 3, 5]])


@pytest.mark.parametrize("index", [EVERYONE, SOME], ids=["all", "some"])
@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_advantage_by_its_definition(index, std):
    values = randn(2, 3, 6) * torch.tensor([1.0, 3.0, 0.2])[:, None]
    ours = group_advantage(values, index, std, limit=100.0)
    assert ours.shape == (2, *index.shape) and ours.dtype == torch.float64
    for w in range(2):
        kept = values[w].double().gather(1, index)
        centred = kept - kept.mean(1, keepdim=True)
        units = {
            "group": kept.std(1, keepdim=True),
            "batch": (centred**2).mean().sqrt(),
            "none": 1.0,
        }
        torch.testing.assert_close(ours[w], centred / units[std])


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_advantage_invariances(std):
    values, order = randn(3, 6, dtype=torch.float64), torch.tensor([3, 0, 5, 1, 2, 4])
    advantage = group_advantage(values, EVERYONE, std)
    permuted = group_advantage(values[:, order], EVERYONE, std)
    shifted = group_advantage(values + torch.tensor([[100.0], [-3.0], [0.0]]), EVERYONE, std)
    scaled = group_advantage(50 * values, EVERYONE, std, limit=1e9)
    torch.testing.assert_close(permuted, advantage[:, order])
    torch.testing.assert_close(shifted, advantage)
    torch.testing.assert_close(scaled, advantage * (50 if std == "none" else 1))


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_equal_values_have_no_advantage(std):
    values = torch.tensor([0.1, -7.3, 1e6])[:, None].expand(3, 6)
    assert (group_advantage(values, EVERYONE, std) == 0).all()
    mixed = torch.cat([values[:2], randn(1, 6)])
    advantage = group_advantage(mixed, EVERYONE, std)
    assert (advantage[:2] == 0).all() and (advantage[2] != 0).all()


@pytest.mark.parametrize("std", ["group", "batch"])
def test_rounding_is_not_blown_up(std):
    values = 1 + 1e-7 * randn(3, 6, dtype=torch.float64)
    assert 0 < group_advantage(values, EVERYONE, std).abs().max() < 0.05
    # Of numbers that are small themselves, the same differences are no rounding.
    assert group_advantage(values - 1, EVERYONE, std).abs().max() > 0.5


@pytest.mark.parametrize("std, scale", [("group", 1e-8), ("batch", 1e-5), ("group", 1e5)])
def test_a_weight_means_the_same_whatever_the_scale_of_a_reward(std, scale):
    values = randn(3, 6, dtype=torch.float64)
    scaled = group_advantage(scale * values, EVERYONE, std)
    torch.testing.assert_close(scaled, group_advantage(values, EVERYONE, std))


def test_a_group_that_is_nearly_equal_beside_others_is_not_blown_up():
    nearly_equal = -1e-4 * randn(1, 6, seed=1).abs()
    values = torch.cat([randn(1, 6), nearly_equal, randn(1, 6, seed=2)])
    advantage = group_advantage(values, EVERYONE)
    assert advantage[1].abs().max() < 0.3
    assert advantage[0].abs().max() > 0.8


def test_advantage_is_limited():
    values = torch.zeros(1, 40)
    values[0, 7] = 1
    index = torch.arange(40)[None]
    assert group_advantage(values, index).max() == 5
    assert group_advantage(-values, index).min() == -5
    assert group_advantage(values, index, limit=2.0).max() == 2
    assert 6 < group_advantage(values, index, limit=100.0).max() < 6.5
