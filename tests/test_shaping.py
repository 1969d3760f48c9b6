"""Diversity, the shaped return, and the mathematics of the update: advantage, clipped loss, KL, credit."""
import itertools
import math
from dataclasses import replace

import pytest
import torch

import train
from sampling import concentrated_subset
from shaping import gardo, group_advantage, group_diversity, shaped_returns
from train import Args, clipped_loss, gaussian_kl


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Diversity.

def naive_diversity(features, metric, nearest):
    """features [N][D] lists of one group -> N numbers."""
    def distance(a, b):
        if metric == "euclidean":
            return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b)))
        return 1 - sum(p * q for p, q in zip(a, b)) / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))
    result = []
    for i in range(len(features)):
        others = sorted(distance(features[i], features[j]) for j in range(len(features)) if j != i)
        chosen = others[:nearest] if nearest else others
        result.append(sum(chosen) / len(chosen))
    return result


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("nearest", [0, 1, 3, 4, 9])
def test_diversity_is_the_mean_distance_to_the_others(metric, nearest):
    features = randn(3, 5, 2, 4)                                         # dimensions behind the group are one vector
    ours = group_diversity(features, metric, nearest)
    expected = torch.tensor([naive_diversity(group.flatten(1).double().tolist(), metric, nearest) for group in features])
    assert ours.shape == (3, 5)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_copies_have_no_diversity(metric):
    features = randn(2, 1, 6).expand(2, 4, 6).clone()
    assert group_diversity(features, metric).abs().max() < 1e-6
    features[0, 3] = -features[0, 3]                                     # one leaves: it gains all, the others a third
    d = group_diversity(features, metric)
    torch.testing.assert_close(3 * d[0, :3], d[0, 3].expand(3), atol=1e-5, rtol=1e-5)
    assert d[0, 3] > 0.5 and d[1].abs().max() < 1e-6 and group_diversity(features, metric, nearest=1)[0, :3].abs().max() < 1e-6


def test_the_distances_of_a_group_that_has_collapsed_are_no_rounding():
    features = 5 * randn(1, 1, 64) + 3e-4 * randn(1, 8, 64, seed=1)      # as far apart as float32's rounding of 1 - cos
    expected = torch.tensor([naive_diversity(features[0].double().tolist(), "cosine", 1)])
    torch.testing.assert_close(group_diversity(features, "cosine", nearest=1), expected, rtol=1e-2, atol=0)
    many = gardo(torch.ones(1, 8), group_diversity(features, "cosine", nearest=1), torch.arange(8)[None])
    assert 0 < many.min() and many.max() < 4


def test_cosine_does_not_see_contrast_and_euclidean_does():
    features, scale = randn(2, 5, 6), torch.rand(2, 5, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    torch.testing.assert_close(group_diversity(scale * features, "cosine"), group_diversity(features, "cosine"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(group_diversity(3 * features, "euclidean"), 3 * group_diversity(features, "euclidean"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_diversity_moves_with_its_rollout_and_stays_in_its_group(metric):
    features, order = randn(3, 6, 4), torch.tensor([3, 0, 5, 1, 2, 4])
    for nearest in (0, 2):
        d = group_diversity(features, metric, nearest)
        torch.testing.assert_close(group_diversity(features[:, order], metric, nearest), d[:, order], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(group_diversity(features[1:2], metric, nearest), d[1:2], atol=1e-6, rtol=1e-6)


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="l1"):
        group_diversity(randn(1, 2, 3), "l1")


# ---------------------------------------------------------------------------------------------------------------------
# Shaping.

@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("terminal", ["keep", "zero"])
def test_returns_are_the_discounted_sums(gamma, terminal):
    T, reward, potential = 5, randn(2, 3, dtype=torch.float64), randn(6, 2, 3, seed=1, dtype=torch.float64)
    ours = shaped_returns(reward, potential, gamma, 0.7, terminal)
    phi = potential.clone()
    if terminal == "zero":
        phi[T] = 0
    for t in range(T):
        naive = gamma ** (T - 1 - t) * reward
        for k in range(t, T):
            naive = naive + 0.7 * gamma ** (k - t) * (gamma * phi[k + 1] - phi[k])
        torch.testing.assert_close(ours[t], naive)
        telescoped = gamma ** (T - 1 - t) * reward + 0.7 * (gamma ** (T - t) * phi[T] - phi[t])
        torch.testing.assert_close(ours[t], telescoped)
    assert ours.shape == (T, 2, 3)


def test_shaping_leaves_its_arguments_alone_and_may_be_one_step_long():
    reward, potential = randn(2, 3), randn(2, 2, 3, seed=1)
    copies = reward.clone(), potential.clone()
    torch.testing.assert_close(shaped_returns(reward, potential, 0.9), (reward + 0.9 * potential[1] - potential[0])[None])
    torch.testing.assert_close(shaped_returns(reward, potential, 0.9, 2.0, "zero"), (reward - 2 * potential[0])[None])
    assert torch.equal(reward, copies[0]) and torch.equal(potential, copies[1])
    torch.testing.assert_close(shaped_returns(reward, potential, weight=0.0), reward[None])
    with pytest.raises(ValueError, match="maybe"):
        shaped_returns(reward, potential, terminal="maybe")


def best_policies(reward, phi, gamma, terminal):
    """A toy of two steps: a from 3, then b from 3. reward [3, 3]; phi = (Phi(start), Phi(a) [3], Phi(a, b) [3, 3]).

    Tries every policy (a, then b for each a) from the start, and every b from each a; the return is the shaped one.
    """
    paths = list(itertools.product(range(3), range(3)))                  # each path is one rollout of one group
    start, middle, end = phi
    potential = torch.stack([start.expand(9), torch.stack([middle[a] for a, _ in paths]), torch.stack([end[a, b] for a, b in paths])])
    returns = shaped_returns(reward.reshape(1, 9), potential[:, None], gamma, 1.0, terminal)[:, 0].reshape(2, 3, 3)
    policies = [(a, answers) for a in range(3) for answers in itertools.product(range(3), repeat=3)]
    best = max(policies, key=lambda p: (returns[0, p[0], p[1][p[0]]].item(), [returns[1, a, b].item() for a, b in enumerate(p[1])]))
    by_state = [max(range(3), key=lambda b: returns[1, a, b].item()) for a in range(3)]
    return best[0], best[1][best[0]], by_state


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_terminal_zero_leaves_the_best_policy_and_keep_moves_it(gamma):
    moved = 0
    for seed in range(50):
        reward, nothing = randn(3, 3, seed=seed), (torch.tensor(0.0), torch.zeros(3), torch.zeros(3, 3))
        phi = randn(1, seed=100 + seed)[0], 5 * randn(3, seed=200 + seed), 5 * randn(3, 3, seed=300 + seed)
        plain = best_policies(reward, nothing, gamma, "zero")
        assert plain[:2] == divmod(reward.argmax().item(), 3)
        assert best_policies(reward, phi, gamma, "zero") == plain
        moved += best_policies(reward, phi, gamma, "keep") != plain
    assert moved > 25


def test_keep_pays_for_the_end():
    reward, end = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0.9]]), torch.zeros(3, 3)
    end[2, 2] = 0.2
    phi = torch.tensor(0.3), torch.tensor([7.0, -7.0, 0.0]), end
    assert best_policies(reward, phi, 1.0, "zero")[:2] == (0, 0)
    assert best_policies(reward, phi, 1.0, "keep")[:2] == (2, 2)


# ---------------------------------------------------------------------------------------------------------------------
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
        table = values[w].double().numpy()
        everything = [table[p, i] - table[p, index[p].numpy()].mean() for p in range(3) for i in index[p]]
        for p in range(3):
            kept = table[p, index[p].numpy()]
            scale = {"group": kept.std(ddof=1), "batch": math.sqrt(sum(c * c for c in everything) / len(everything)), "none": 1.0}[std]
            torch.testing.assert_close(ours[w, p], torch.tensor((kept - kept.mean()) / scale))


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_advantage_invariances(std):
    values, order = randn(3, 6, dtype=torch.float64), torch.tensor([3, 0, 5, 1, 2, 4])
    a = group_advantage(values, EVERYONE, std)
    torch.testing.assert_close(group_advantage(values[:, order], EVERYONE, std), a[:, order])
    torch.testing.assert_close(group_advantage(values + torch.tensor([100.0, -3.0, 0.0])[:, None], EVERYONE, std), a)
    torch.testing.assert_close(group_advantage(50 * values, EVERYONE, std, limit=1e9), a * (50 if std == "none" else 1))
    torch.testing.assert_close(group_advantage(values[[2, 0, 1]], EVERYONE, std), a[[2, 0, 1]])


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_equal_values_have_no_advantage(std):
    values = torch.tensor([0.1, -7.3, 1e6])[:, None].expand(3, 6)
    assert (group_advantage(values, EVERYONE, std) == 0).all()
    mixed = torch.cat([values[:2], randn(1, 6)])
    assert (group_advantage(mixed, EVERYONE, std)[:2] == 0).all() and (group_advantage(mixed, EVERYONE, std)[2] != 0).all()


@pytest.mark.parametrize("std", ["group", "batch"])
def test_rounding_is_not_blown_up(std):
    values = 1 + 1e-7 * randn(3, 6, dtype=torch.float64)
    assert 0 < group_advantage(values, EVERYONE, std).abs().max() < 0.05
    assert group_advantage(values - 1, EVERYONE, std).abs().max() > 0.5                        # the same differences of numbers so small are no rounding


@pytest.mark.parametrize("std", ["group", "batch"])
@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1e5])
def test_a_weight_means_the_same_whatever_the_scale_of_a_reward(std, scale):
    values = randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(group_advantage(scale * values, EVERYONE, std), group_advantage(values, EVERYONE, std))


def test_a_group_that_is_nearly_equal_beside_others_is_not_blown_up():
    values = torch.cat([randn(1, 6), -1e-4 * randn(1, 6, seed=1).abs(), randn(1, 6, seed=2)])
    assert group_advantage(values, EVERYONE)[1].abs().max() < 0.3 and group_advantage(values, EVERYONE)[0].abs().max() > 0.8


def test_advantage_is_limited():
    values = torch.zeros(1, 40)
    values[0, 7] = 1
    index = torch.arange(40)[None]
    assert group_advantage(values, index).max() == 5 and group_advantage(-values, index).min() == -5
    assert group_advantage(values, index, limit=2.0).max() == 2 and 6 < group_advantage(values, index, limit=100.0).max() < 6.5


# ---------------------------------------------------------------------------------------------------------------------
# The loss.

RATIO = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0], dtype=torch.float64)


def naive_loss(ratio, advantage, clip):
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    return -min(advantage * ratio, advantage * clipped)


def test_clipped_loss_by_its_definition():
    for advantage in (2.0, -1.5, 0.0):
        ours = clipped_loss(RATIO, torch.full_like(RATIO, advantage), 0.2)
        torch.testing.assert_close(ours, torch.tensor([naive_loss(r, advantage, 0.2) for r in RATIO.tolist()], dtype=torch.float64))


def test_clipped_loss_has_its_gradient_by_finite_differences():
    for advantage in (2.0, -1.5):
        ratio = RATIO.clone().requires_grad_()
        clipped_loss(ratio, torch.full_like(RATIO, advantage), 0.2).sum().backward()
        differences = [(naive_loss(r + 1e-6, advantage, 0.2) - naive_loss(r - 1e-6, advantage, 0.2)) / 2e-6 for r in RATIO.tolist()]
        torch.testing.assert_close(ratio.grad, torch.tensor(differences, dtype=torch.float64), atol=1e-6, rtol=1e-6)
        outside = RATIO > 1.2 if advantage > 0 else RATIO < 0.8          # gone far enough in the direction that pays
        assert torch.equal(ratio.grad, torch.where(outside, 0.0, -advantage))


def test_kl_is_that_of_torch():
    mean, reference, std = randn(4, 3, 5), randn(4, 3, 5, seed=1), torch.tensor([0.1, 0.5, 1.0, 3.0]).reshape(4, 1, 1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(reference, std)).flatten(1).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, reference, std), expected, rtol=1e-4, atol=1e-4)
    assert (gaussian_kl(mean, mean, std) == 0).all()
    mean.requires_grad_()
    gaussian_kl(mean, reference, std).sum().backward()
    torch.testing.assert_close(mean.grad, (mean.detach() - reference) / std**2, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Credit: the signals together.

def args(**changes):
    return replace(Args(), **(dict(keep=4, select="window", std="group", gardo=False, success=False, gamma=0.9, diversity=0.3) | changes))


def credit(args, rewards, potential, closest):
    """With one reward."""
    return train.credit(args, {"class": 1.0}, {"class": rewards}, potential, closest)


def test_each_reward_is_measured_in_its_own_std_and_then_weighted():
    a, b, potential, closest = randn(3, 6), randn(3, 6, seed=1), torch.zeros(4, 3, 6), torch.ones(3, 6)
    for std in ("group", "batch"):
        index, ours = train.credit(args(std=std), {"class": 1.0, "fid": 0.5}, {"class": a, "fid": b}, potential, closest)
        torch.testing.assert_close(ours[0], group_advantage(a, index, std) + 0.5 * group_advantage(b, index, std))
        again, scaled = train.credit(args(std=std), {"class": 1.0, "fid": 0.5}, {"class": 1000 * a - 3, "fid": 0.01 * b}, potential, closest)
        assert torch.equal(index, again)
        torch.testing.assert_close(ours, scaled, rtol=1e-3, atol=1e-3)
    score = group_advantage(a, torch.arange(6).expand(3, 6), "batch") - 2 * group_advantage(b, torch.arange(6).expand(3, 6), "batch")
    index, _ = train.credit(args(std="batch"), {"class": 1.0, "fid": -2.0}, {"class": a, "fid": b}, potential, closest)
    assert torch.equal(index, concentrated_subset(score, 4, "window"))   # who is kept is decided on the weighted sum


def test_credit_adds_signals_in_units_of_their_own_std():
    rewards, potential, closest = randn(3, 6), randn(4, 3, 6, seed=1), torch.rand(3, 6, generator=torch.Generator().manual_seed(2))
    index, ours = credit(args(), rewards, potential, closest)
    assert index.shape == (3, 4) and ours.shape == (3, 3, 4)
    _, rescaled = credit(args(), 100 * rewards - 5, 0.01 * potential, closest)
    torch.testing.assert_close(rescaled, ours, rtol=1e-3, atol=1e-3)     # the potential is float32
    phi = potential.double()
    for std in ("group", "batch", "none"):                               # it is the reward's; diversity is always in its group's std
        _, ours = credit(args(std=std), rewards, potential, closest)
        _, plain = credit(args(std=std, diversity=0.0), rewards, potential, closest)
        for t in range(3):
            shaped = 0.9 ** (3 - t) * phi[3] - phi[t]
            torch.testing.assert_close(plain[t], group_advantage(rewards, index, std))
            torch.testing.assert_close(ours[t] - plain[t], 0.3 * group_advantage(shaped, index), rtol=1e-5, atol=1e-5)


def test_success_gives_the_potential_to_the_better_half_only():
    rewards, potential, closest = randn(3, 6), randn(4, 3, 6, seed=1), torch.ones(3, 6)
    index, ours = credit(args(success=True), rewards, potential, closest)
    for p in range(3):
        for n in range(6):
            if rewards[p, n] < rewards[p].mean():
                potential[:, p, n] = 0
    same, expected = credit(args(), rewards, potential, closest)
    assert torch.equal(index, same)                                      # who is kept depends on rewards alone
    torch.testing.assert_close(ours, expected)
    equal = torch.full((3, 6), 0.5)                                      # no one is worse than the mean: all are paid
    assert torch.equal(credit(args(success=True), equal, potential, closest)[1], credit(args(), equal, potential, closest)[1])


def test_a_potential_that_only_shapes_knows_no_success():
    """Masked by the outcome, a potential that is zero at the end would be a fine for a success, as large as the diversity before it."""
    rewards, potential, closest = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.full((4, 1, 4), 0.5), torch.ones(1, 4)
    for terminal in ("zero", "keep"):
        _, ours = credit(args(success=True, terminal=terminal, gamma=1.0), rewards, potential, closest)
        _, plain = credit(args(diversity=0.0), rewards, potential, closest)
        torch.testing.assert_close(ours, plain)                          # equally diverse, so nothing to pay


def test_gardo_multiplies_positive_advantages_by_the_relative_distance():
    rewards, potential, closest = randn(3, 6), torch.zeros(4, 3, 6), torch.rand(3, 6, generator=torch.Generator().manual_seed(2))
    index, plain = credit(args(), rewards, potential, closest)
    _, ours = credit(args(gardo=True), rewards, potential, closest)
    for p in range(3):
        for j in range(4):
            relative = closest[p, index[p, j]] / closest[p].mean()
            expected = plain[0, p, j] * (relative if plain[0, p, j] > 0 else 1)
            assert ours[0, p, j].item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_group_of_equals_is_all_successful():
    """The float32 mean of equal numbers can round above them."""
    rewards, potential = torch.full((1, 3), 1.4451544284820557), torch.rand(3, 1, 3, generator=torch.Generator().manual_seed(0))
    one, other = (credit(replace(Args(), select="all", keep=3, success=s), rewards, potential, potential[-1])[1] for s in (True, False))
    assert torch.equal(one, other) and one.abs().max() > 0
