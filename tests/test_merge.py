"""Merging: sums of checkpoints, averages of any length, the search over coefficients; what is read, what is written, what is refused."""
import itertools
import json
import math
import os
import shutil
import signal
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.integrate import quad
from scipy.optimize import brentq

from commands import compare
from support import flags
from commands import picture_sets
import dist_reward
import eval as evaluation
import merge
import bases
from bases import files as base_files
from bases import stable_diffusion
import prompting
import rewards
from rewards import classifier
from support import files
import shaping
from bases import tensors
from support import averages
from conftest import build_model, contents, files, files_up_to, launch, launch_process, read_metrics, small
from test_bad_input import rewrite
from test_models import build_sit
from test_train import at_call, killed, same

SHAPES = {"blocks.0.w": (3, 2), "blocks.1.w": (4,), "blocks.10.w": (2, 2), "head": (5,)}          # blocks in order: 0, 1, 10, rest
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def states(K, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [{name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()} for _ in range(K)]


# ---------------------------------------------------------------------------------------------------------------------
# merge().

@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("rows", [1, 4])
def test_a_one_hot_merge_is_that_checkpoint_bit_for_bit(dtype, rows):
    parts = states(3, dtype)
    parts[1]["head"] = torch.tensor([-0.0, 0.0, torch.finfo(dtype).tiny / 2, torch.finfo(dtype).max, -float("inf")], dtype=dtype)
    parts[0] = {name: torch.full_like(value, float("nan")) for name, value in parts[0].items()}
    parts[2] = {name: torch.full_like(value, float("inf"), dtype=torch.float64) for name, value in parts[2].items()}
    found = merge.merge(parts, torch.tensor([[0.0, 1.0, 0.0]] * rows))
    for name, value in parts[1].items():
        assert found[name].dtype == dtype and torch.equal(found[name].view(BITS[dtype]), value.view(BITS[dtype])), name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-7), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("c", [[0.5, 0.25, 0.25], [1.5, -1.25, 0.75], [900.0, 100.5, -999.5]])
def test_a_merge_is_the_sum_in_float64(dtype, tolerance, c):
    """To the last rounding: large coefficients that cancel would show any float32 in between."""
    parts = states(3, dtype)
    found = merge.merge(parts, c)
    for name in SHAPES:
        right = sum(x * np.float64(part[name].double().numpy()) for x, part in zip(c, parts))
        assert found[name].dtype == dtype
        np.testing.assert_allclose(found[name].double().numpy(), right, rtol=tolerance, atol=1e-10)


def test_each_block_has_its_own_row():
    parts, rows = states(2, torch.float64), torch.tensor([[2.0, -1.0], [0.5, 0.5], [0.0, 1.0], [1.0, 0.0]])
    found = merge.merge(parts, rows)
    for (name, row) in zip(SHAPES, rows.tolist()):
        torch.testing.assert_close(found[name], row[0] * parts[0][name] + row[1] * parts[1][name], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name, block", [("blocks.0.attn.to_q.weight", "blocks.0"), ("blocks.10.norm.1.bias", "blocks.10"), ("head.weight", "rest"),
                                         ("a.b.3.c.4.d", "a.b.3"), ("proj", "rest"), ("conv1.weight", "rest")])
def test_a_block_is_a_name_up_to_its_first_number(name, block):
    assert tensors.block_of(name) == block


@pytest.mark.parametrize("c, largest", [([-3.0, 2.5, 1.5], 1), ([0.2, 0.3, 0.5], 2), ([1.0, 0.0, 0.0], 0), ([[2, -1, 0]] * 4 + [[0, 0, 1]], 2)])
def test_what_is_no_float_comes_from_the_largest_coefficient(c, largest):
    parts = [part | {"steps": torch.tensor([10 + k, -k]), "seen": torch.tensor(k == 1)} for k, part in enumerate(states(3))]
    if len(c) == 5:                                                      # a row for each block; the last is "rest", where the counters are
        parts = [part | {"blocks.2.w": torch.ones(1)} for part in parts]
    found = merge.merge(parts, c)
    assert torch.equal(found["steps"], torch.tensor([10 + largest, -largest])) and found["steps"].dtype == torch.int64
    assert found["seen"].dtype == torch.bool and found["seen"].item() == (largest == 1)


@pytest.mark.parametrize("dtypes, widest", [("float16 float32", "float32"), ("bfloat16 float16", "float32"), ("float16 float64", "float64"),
                                            ("float32 bfloat16", "float32")])
def test_mixed_types_widen(dtypes, widest):
    parts = [states(2, getattr(torch, dtype))[k] for k, dtype in enumerate(dtypes.split())]
    found = merge.merge(parts, [0.75, 0.25])
    for name in SHAPES:
        assert found[name].dtype == getattr(torch, widest)
        torch.testing.assert_close(found[name].double(), 0.75 * parts[0][name].double() + 0.25 * parts[1][name].double(), rtol=1e-7, atol=1e-7)


def test_the_order_of_the_checkpoints_does_not_matter():
    parts, c = states(4), [0.7, -0.4, 0.4, 0.3]
    right = merge.merge(parts, c)
    for order in itertools.permutations(range(4)):
        found = merge.merge([parts[k] for k in order], [c[k] for k in order])
        for name in SHAPES:
            torch.testing.assert_close(found[name], right[name], rtol=2e-7, atol=1e-8)


@pytest.mark.parametrize("c, naming", [
    ([0.5, 0.4], "0.9"), ([0.5, 0.5001], "1.0001"), ([[1, 0], [0, 1], [1, 0], [1, 1]], "2"), ([math.nan, 1], "nan"), ([1.0], "shape"),
    ([0.3, 0.3, 0.4], "shape"), ([[1, 0], [0, 1]], "shape"), ([[[1, 0]]], "shape")])
def test_coefficients_that_do_not_fit_are_refused(c, naming):
    with pytest.raises(ValueError, match=naming):
        merge.merge(states(2), c)


@pytest.mark.parametrize("change, naming", [({"more": torch.ones(1)}, "more"), ({"head": None}, "head"), ({"blocks.1.w": torch.ones(1)}, r"blocks\.1\.w.*\(1,\)"),
                                            ({"blocks.0.w": torch.ones(2, 3)}, r"blocks\.0\.w")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_checkpoints_that_differ_are_refused_by_name(change, naming, which):
    parts = states(3)
    parts[which] = {name: value for name, value in (parts[which] | change).items() if value is not None}
    with pytest.raises(ValueError, match=naming):
        merge.merge(parts, [0.5, 0.25, 0.25])


class Reading(Mapping):
    """Reads as a file does, a new tensor each time, and fails if an earlier one is still alive."""

    def __init__(self, tensors):
        self.tensors, self.read, self.alive = tensors, [], weakref.WeakSet()

    def __getitem__(self, name):
        assert len(self.alive) == 0, f"{name} is read while another tensor of the checkpoint is held"
        self.read.append(name)
        value = self.tensors[name].clone()
        self.alive.add(value)
        return value

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("c", [[0.5, 1.0, -0.5], [0.0, 1.0, 0.0]])
def test_one_tensor_of_each_checkpoint_is_held_at_a_time(dtype, c):
    parts = [Reading(part) for part in states(3, dtype)]
    found = merge.merge(parts, c)
    assert found.keys() == SHAPES.keys() and not any(part.alive for part in parts)
    assert sorted(parts[1].read) == sorted(SHAPES)                       # once each
    assert c[0] or parts[0].read == parts[2].read == []


# ---------------------------------------------------------------------------------------------------------------------
# Post-hoc EMA, from its definitions: p(s) ~ s^gamma on [0, t], of integral 1; sigma_rel is the std of s / t.

def width(gamma):
    return math.sqrt((gamma + 1) / (gamma + 3) - ((gamma + 1) / (gamma + 2)) ** 2)


def power_of(sigma_rel):
    return brentq(lambda gamma: width(gamma) - sigma_rel, 0, 2000, xtol=1e-13, rtol=1e-14)


def product(t_a, gamma_a, t_b, gamma_b):
    """int_0^min p_a p_b ds, by hand."""
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * min(t_a, t_b) ** (gamma_a + gamma_b + 1) / t_a ** (gamma_a + 1) / t_b ** (gamma_b + 1)


TIMES, LENGTHS = zip(*itertools.product([0.25, 0.5, 0.75, 1.0], [0.05, 0.1]))


@pytest.mark.parametrize("gamma", [0, 0.1, 1, 6.9357, 16.9731, 100, 1000])
def test_lengths_and_powers_invert_each_other(gamma):
    sigma_rel = averages.sigma_rel_of(gamma)
    assert sigma_rel == pytest.approx(width(gamma), rel=1e-8)
    assert averages.gamma_of(sigma_rel) == pytest.approx(gamma, rel=1e-10, abs=1e-10)
    assert averages.sigma_rel_of(averages.gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-10)


def test_the_published_powers():
    assert averages.gamma_of(0.05) == pytest.approx(16.97, abs=0.01) and averages.gamma_of(0.1) == pytest.approx(6.94, abs=0.01)
    assert averages.gamma_of(math.sqrt(1 / 12)) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.28])
def test_the_average_weighs_the_t_th_by_the_profile_s_integral(sigma_rel):
    values, average, gamma = np.random.default_rng(0).normal(size=50), 123.0, power_of(sigma_rel)
    for t, value in enumerate(values, 1):
        decay = averages.power_decay(t, sigma_rel)
        average = decay * average + (1 - decay) * value
        edges = (np.arange(t + 1) / t) ** (gamma + 1)
        assert average == pytest.approx(np.diff(edges) @ values[:t], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("t_a, gamma_a, t_b, gamma_b", [(1, 7, 1, 7), (0.5, 7, 1, 17), (1, 17, 0.5, 7), (3, 0, 2, 0), (0.9, 40, 1, 0.5), (10, 3, 8, 30)])
def test_the_product_of_profiles_is_their_integral(t_a, gamma_a, t_b, gamma_b):
    profile = lambda s, t, gamma: (gamma + 1) / t * (s / t) ** gamma
    right, _ = quad(lambda s: profile(s, t_a, gamma_a) * profile(s, t_b, gamma_b), 0, min(t_a, t_b), epsabs=1e-13, epsrel=1e-12, limit=200)
    assert float(averages.profile_product(t_a, gamma_a, t_b, gamma_b)) == pytest.approx(right, rel=1e-8)


@pytest.mark.parametrize("k", range(len(TIMES)))
def test_an_average_that_is_there_is_found(k):
    found = averages.ema_coefficients(TIMES, LENGTHS, LENGTHS[k], TIMES[k])
    np.testing.assert_allclose(found, np.eye(len(TIMES))[k], atol=1e-8)


@pytest.mark.parametrize("sigma_rel, time", [(0.03, None), (0.07, None), (0.135, None), (0.2, None), (0.08, 0.8), (0.1, 0.6)])
def test_coefficients_are_the_least_squares_fit_of_the_profile(sigma_rel, time):
    """Against the published formulas written once more, and against a fit to the profiles on a fine grid."""
    found, K, target = averages.ema_coefficients(TIMES, LENGTHS, sigma_rel, time), len(TIMES), (time or 1.0, power_of(sigma_rel))
    members = [(t, power_of(length)) for t, length in zip(TIMES, LENGTHS)]
    a, b = np.array([[product(*x, *y) for y in members] for x in members]), np.array([product(*x, *target) for x in members])
    right = np.linalg.solve(a, b)
    np.testing.assert_allclose(found, right / right.sum(), rtol=1e-10, atol=1e-10)
    assert found.shape == (K,) and found.sum() == pytest.approx(1, abs=1e-12)
    s = (np.arange(20000) + 0.5) / 20000
    sampled = lambda t, gamma: np.where(s < t, (gamma + 1) / t * (s / t) ** gamma, 0)
    fit = np.linalg.lstsq(np.stack([sampled(*m) for m in members], 1), sampled(*target), rcond=None)[0]
    np.testing.assert_allclose(found, fit / fit.sum(), atol=2e-3)


def test_many_coefficients_are_negative():
    """As published: of 8 x 2 snapshots 8 are negative for 0.135, with an L1 norm of 1.54; 0.03 needs 2.33 and -1.73."""
    times, lengths = zip(*itertools.product(np.arange(1, 9) / 8, [0.05, 0.1]))
    wide, narrow = (averages.ema_coefficients(times, lengths, sigma_rel) for sigma_rel in (0.135, 0.03))
    assert (wide < 0).sum() == 8 and np.abs(wide).sum() == pytest.approx(1.54, abs=0.01)
    assert narrow.max() == pytest.approx(2.33, abs=0.01) and narrow.min() == pytest.approx(-1.73, abs=0.01)


def test_the_unit_of_time_and_the_order_do_not_matter():
    right, order = averages.ema_coefficients(TIMES, LENGTHS, 0.15), np.random.default_rng(0).permutation(len(TIMES))
    np.testing.assert_allclose(averages.ema_coefficients(np.array(TIMES) * 4000, LENGTHS, 0.15), right, atol=1e-9)
    np.testing.assert_allclose(averages.ema_coefficients(np.array(TIMES)[order], np.array(LENGTHS)[order], 0.15), right[order], atol=1e-9)


@pytest.mark.parametrize("sigma_rel, error", [(0.07, 0.02), (0.15, 0.02), (0.2, 0.05)])
def test_an_average_of_another_length_is_reconstructed(sigma_rel, error):
    """Of a smooth trajectory in five dimensions, from averages of two lengths, in units of what the nearest kept average is off by."""
    path = lambda t: np.array([math.sin(3 * t), math.exp(-2 * t), t**2, math.cos(5 * t), 1 / (1 + 4 * t)])
    averages, saved = {s: np.zeros(5) for s in (0.05, 0.1, sigma_rel)}, []
    for step in range(1, 801):
        for s in averages:
            decay = averages.power_decay(step, s)
            averages[s] = decay * averages[s] + (1 - decay) * path(step / 800)
        if step % 100 == 0:
            saved += [(step, s, averages[s]) for s in (0.05, 0.1)]
    times, lengths, values = zip(*saved)
    off = np.linalg.norm(averages.ema_coefficients(times, lengths, sigma_rel) @ np.stack(values) - averages[sigma_rel])
    assert off < error * min(np.linalg.norm(averages[s] - averages[sigma_rel]) for s in (0.05, 0.1))


def view(iteration="", sigma_rel=""):
    return SimpleNamespace(facts={"iteration": iteration, "sigma_rel": sigma_rel})


def test_only_averages_take_part_in_an_average():
    views = [view("10"), view("10", "0.05"), view("10", "0.1"), view(), view("20", "0.05")]
    found = averages.sweep(views, [0.07, 0.2])
    assert found.shape == (2, 5) and found.dtype == torch.float64
    for row, length in zip(found.numpy(), (0.07, 0.2)):
        np.testing.assert_allclose(row[[1, 2, 4]], averages.ema_coefficients([10, 10, 20], [0.05, 0.1, 0.05], length), rtol=1e-12)
        assert row[0] == row[3] == 0
    assert len(averages.sweep(views[:2], [0.07])) == len(averages.sweep(views[3:4], [0.07])) == 0
    with pytest.raises(ValueError, match="0.05 of iteration 20"):
        averages.sweep([*views, views[4]], [0.07])


# ---------------------------------------------------------------------------------------------------------------------
# The policy.

@pytest.mark.parametrize("n, M, P", [(30, 60, 30), (6, 12, 3), (4, 12, 2), (12, 12, 4), (9, 15, 3)])
def test_a_new_picture_takes_the_place_of_one_with_its_prompt_and_all_have_their_turn(n, M, P):
    seen = [merge.members_of(update, n, M, P) for update in range(M)]
    assert all(len(set(m.tolist())) == n and torch.equal(m // (M // P), torch.arange(n) // (n // P)) for m in seen)
    assert torch.cat(seen).bincount(minlength=M).unique().tolist() == [n]


def weights_of(seed, K, scale=(1.0, 0.1, 0.01)):
    """K checkpoints of two blocks and a counter, that differ a hundred times more along some directions than along others."""
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(K, len(scale), generator=g).double() * torch.tensor(scale, dtype=torch.float64)
    mixing = {"a.0.w": torch.randn(len(scale), 4, 5, generator=g).double(), "a.1.w": torch.randn(len(scale), 7, generator=g).double()}
    return [{name: torch.einsum("r,r...->...", row, m) for name, m in mixing.items()} | {"a.0.n": torch.tensor(3)} for row in latent]


@pytest.mark.parametrize("K, blocks", [(2, 1), (3, 1), (4, 2), (6, 2)])
def test_every_direction_moves_the_weights_equally_far_and_sums_to_zero(K, blocks):
    views = weights_of(K, K)
    Q = merge.directions(views, blocks, floor=1e-5)
    rank = min(K - 1, 3)
    assert Q.shape == (blocks, K - 1, K) and Q.dtype == torch.float64 and Q.sum(2).abs().max() < 1e-12
    for b, names in enumerate([["a.0.w", "a.1.w"]] if blocks == 1 else [["a.0.w"], ["a.1.w"]]):
        x = torch.stack([torch.cat([view[n].flatten() for n in names]) for view in views])
        steps, rms = Q[b, :rank] @ x, (x - x.mean(0)).square().sum(1).mean().sqrt()
        torch.testing.assert_close(steps @ steps.T, rms**2 * torch.eye(rank, dtype=torch.float64), rtol=1e-5, atol=1e-5 * rms.item()**2)
        variance = (x - x.mean(0)) @ (steps / rms).T
        assert (variance.square().sum(0).diff() < 0).all()               # the widest first


def test_directions_in_which_checkpoints_hardly_differ_are_left_out():
    views = weights_of(0, 6, (1.0, 0.1, 1e-4))
    Q = merge.directions(views)[0]
    assert Q[:2].norm(dim=1).min() > 0 and Q[2:].abs().max() == 0
    same = [views[0], views[0]]
    assert merge.directions(same).abs().max() == 0                       # equal checkpoints: nowhere to go, and no division by zero
    twins = merge.directions([views[0], views[1], views[1]])[0]          # a checkpoint given twice adds no direction
    assert twins[0].norm() > 0 and twins[1].abs().max() == 0


@pytest.mark.parametrize("size, B, K", [((), 1, 4), ((5,), 1, 4), ((4,), 5, 2), ((), 2, 6)])
def test_coefficients_sum_to_one_and_zero_is_the_start(size, B, K):
    g = torch.Generator().manual_seed(0)
    z, Q = 10 * torch.randn(*size, B, K - 1, generator=g, dtype=torch.float64), torch.randn(B, K - 1, K, generator=g, dtype=torch.float64)
    Q, start = Q - Q.mean(2, keepdim=True), torch.cat([torch.full((K - 1,), -0.25, dtype=torch.float64), torch.tensor([1 + (K - 1) / 4])])
    c = merge.coefficients_of(z, start, Q)
    assert c.shape == (*size, B, K) and (c.sum(-1) - 1).abs().max() < 1e-12
    one = z.reshape(-1, B, K - 1)[-1]
    by_hand = torch.stack([start + sum(one[b, i] * Q[b, i] for i in range(K - 1)) for b in range(B)])
    torch.testing.assert_close(c.reshape(-1, B, K)[-1], by_hand)
    assert torch.equal(merge.coefficients_of(torch.zeros_like(z), start, Q), start.expand(*size, B, -1))


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_a_policy_step_is_the_natural_gradient(shape):
    """autograd's gradient of E[A log N(z; mean, std^2)], times the inverse Fisher information: std^2 and 1 / 2."""
    g, G, lr = torch.Generator().manual_seed(0), 8, 0.7
    mean, log_std, A = torch.randn(shape, generator=g).double(), torch.randn(shape, generator=g).double(), torch.randn(G, generator=g)
    z = mean + log_std.exp() * torch.randn(G, *shape, generator=g)
    leaves = mean.clone().requires_grad_(), log_std.clone().requires_grad_()
    log_p = torch.distributions.Normal(leaves[0], leaves[1].exp()).log_prob(z).flatten(1).sum(1)
    toward_mean, toward_log_std = torch.autograd.grad((A * log_p).mean(), leaves)
    found = merge.policy_step(mean, log_std, z, A, lr)
    torch.testing.assert_close(found[0], mean + lr * log_std.exp() ** 2 * toward_mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], log_std + 0.1 * lr * toward_log_std / 2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("optimum", [[[0.9, -0.5, 0.4, 0.2]], [[1.4, -0.4, 0.3, -0.3], [-0.2, 0.5, 0.5, 0.2]]])
def test_the_policy_finds_an_optimum_with_negative_coefficients(optimum):
    optimum, g = torch.tensor(optimum, dtype=torch.float64), torch.Generator().manual_seed(0)
    mean, log_std = torch.zeros(len(optimum), 3, dtype=torch.float64), torch.full((len(optimum), 3), math.log(0.3), dtype=torch.float64)
    task, start = SimpleNamespace(reward=SimpleNamespace(weights={"class": 1.0})), torch.full((4,), 0.25, dtype=torch.float64)
    Q = merge.directions([{"a.0.w": row, "a.1.w": row} for row in torch.eye(4, dtype=torch.float64)], len(optimum))
    for _ in range(300):
        noise = torch.randn(4, *mean.shape, generator=g, dtype=torch.float64)
        z = mean + log_std.exp() * torch.cat([noise, -noise])
        reward = -(merge.coefficients_of(z, start, Q) - optimum).square().sum((1, 2))
        mean, log_std = merge.policy_step(mean, log_std, z, merge.Search.advantage(task, {"class": reward}), 1.0)
    assert (merge.coefficients_of(mean, start, Q) - optimum).abs().max() < 0.03 and (log_std.exp() < 0.1).all()


def test_the_rivals_are_every_checkpoint_alone_the_mean_and_every_length():
    """Also when the files are called the same in different folders, as the models of two runs are."""
    views = [view("10", "0.05"), view("20", "0.05"), view("20", "0.1")]
    found = merge.rivals(views, ["a/model", "b/model", "c/00010.safetensors"], [0.07, 0.2])
    rows = torch.stack(list(found.values()))
    assert len(found) == 3 + 1 + 2 and torch.equal(rows[:3], torch.eye(3, dtype=torch.float64))
    assert torch.equal(found["uniform average"], torch.full((3,), 1 / 3, dtype=torch.float64))
    assert torch.equal(rows[4:], averages.sweep(views, [0.07, 0.2])) and [*found][3:] == ["uniform average", "EMA 0.07", "EMA 0.2"]


def test_averages_of_two_runs_have_no_third_length():
    """The same iteration and length twice: two seeds."""
    assert [*merge.rivals([view("20", "0.05"), view("20", "0.1"), view("20", "0.1")], ["a/1", "a/2", "b/2"], [0.07])] == ["1", "a/2", "b/2", "uniform average"]


@pytest.mark.parametrize("kind", ["fid", "kid"])
@pytest.mark.parametrize("n", [10, 40])
def test_the_fall_of_the_distance_is_a_price_or_a_difference(monkeypatch, kind, n):
    """Of all M = 40 members at once no price is asked for: it would need [2 M, 2 M] numbers."""
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g)
    pool = dist_reward.KernelReplace(randn(40, 6) + 0.5, randn(50, 6)) if kind == "kid" else dist_reward.SubsetReplace(randn(40, 6) + 0.5, torch.zeros(6), torch.eye(6))
    new, members, before = randn(n, 6), torch.randperm(40, generator=g)[:n], {name: value.clone() for name, value in pool.state().items()}
    right = 40 / n * pool.price(new[None], members)[0].item()
    if n == 40:
        monkeypatch.setattr(type(pool), "price", lambda *rest: pytest.fail("the price of all members was asked for"))
    assert merge.fall(pool, new, members) == pytest.approx(right, rel=1e-6) and abs(right) > 1e-3
    same(pool.state(), before)


# ---------------------------------------------------------------------------------------------------------------------
# Files.

def write(path, tensors, **facts):
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=facts or None)
    return path


def test_a_tensor_is_read_when_it_is_asked_for(tmp_path):
    """The file is changed in place after it was opened: the new numbers are found."""
    path = write(tmp_path / "a.safetensors", {"w": torch.arange(3.0), "v": torch.ones(2)}, base="x")
    opened, raw = tensors.Weights([path]), path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(raw.index(torch.arange(3.0).numpy().tobytes()))
        file.write(torch.tensor([5.0, 6.0, 7.0]).numpy().tobytes())
    assert opened["w"].tolist() == [5, 6, 7] and opened.facts == {"base": "x"} and opened.shape("w") == (3,) and [*opened] == ["v", "w"]


def test_several_files_are_one_checkpoint(tmp_path):
    opened = tensors.Weights([write(tmp_path / "1", {"w": torch.ones(1)}), write(tmp_path / "2", {"v": torch.zeros(2)})])
    assert [*opened] == ["v", "w"] and len(opened) == 2 and opened["w"].tolist() == [1] and opened["v"].tolist() == [0, 0]


@pytest.mark.parametrize("prefix", ["", "transformer.", "unet."])
@pytest.mark.parametrize("alpha", [None, 8.0])
@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_a_lora_file_is_its_layer_plus_two_layers_in_a_row(tmp_path, prefix, alpha, kernel):
    g, rank = torch.Generator().manual_seed(0), 2
    draw = lambda *shape: torch.randn(*shape, *([kernel] * 2 if kernel else []), generator=g)
    W, down, up = draw(5, 4), draw(rank, 4), torch.randn(5, rank, *[1] * (2 if kernel else 0), generator=g)
    base = tensors.Weights([write(tmp_path / "base", {"a.1.to_q.weight": W, "a.1.to_q.bias": torch.ones(5), "b.weight": W + 1})])
    layer = prefix + "a.1.to_q"
    tensors = {layer + ".lora_A.weight": down, layer + ".lora_B.weight": up} | ({layer + ".alpha": torch.tensor(alpha)} if alpha else {})
    found = tensors.Lora(tensors.Weights([write(tmp_path / "lora", tensors)]), base)
    assert [*found] == ["a.1.to_q.weight"] and len(found) == 1 and found.shape("a.1.to_q.weight") == tuple(W.shape)
    x = torch.randn(3, 4, *([6, 6] if kernel else []), generator=g)
    apply = F.conv2d if kernel else F.linear
    right = apply(x, W) + (alpha / rank if alpha else 1) * apply(apply(x, down), up)
    torch.testing.assert_close(apply(x, found["a.1.to_q.weight"]), right, rtol=1e-4, atol=1e-4)


def test_a_view_lies_over_its_base(tmp_path):
    base = tensors.Weights([write(tmp_path / "base", {"a": torch.zeros(1), "b": torch.zeros(1), "c": torch.zeros(1)})])
    over = tensors.Over(tensors.Weights([write(tmp_path / "part", {"b": torch.ones(1)})]), base, ["a", "b"])
    assert [*over] == ["a", "b"] and len(over) == 2 and (over["a"].item(), over["b"].item()) == (0, 1)


def test_a_fingerprint_is_of_the_numbers_not_of_their_type(tmp_path):
    part = states(1, torch.float16)[0]
    mark = lambda tensors: tensors.fingerprint(tensors.Weights([write(tmp_path / "file", tensors)]))
    assert mark(part) == mark({name: value.float() for name, value in part.items()})
    changed = [part | {"head": part["head"] + 1}, part | {"more": torch.ones(1)}, {("tail" if n == "head" else n): v for n, v in part.items()},
               part | {"blocks.0.w": part["blocks.0.w"].reshape(2, 3)}]
    assert len({mark(part), *map(mark, changed)}) == 5


def test_snapshots_roll(tiny, tmp_path):
    raw, averages = {"w": torch.ones(2, dtype=torch.bfloat16)}, {0.05: {"w": torch.zeros(2)}, 0.1: {"w": torch.full((2,), 0.5)}}
    for iteration in (9, 99998, 99999, 100000):                          # more digits than the names are padded to
        tensors.save_snapshots(tmp_path, iteration, raw, averages, str(tiny), keep=2)
    found = {path.name: tensors.Weights([path]) for path in (tmp_path / "snapshots").iterdir()}
    assert set(found) == {f"{i}{length}.safetensors" for i in (99999, 100000) for length in ("", "-0.050", "-0.100")}
    assert found["100000-0.050.safetensors"].facts == {
        "base": str(tiny), "fingerprint": tensors.fingerprint(tensors.Weights(base_files.network_files(tiny))), "iteration": "100000", "sigma_rel": "0.05"}
    assert found["100000.safetensors"].facts["sigma_rel"] == "" and found["100000.safetensors"]["w"].dtype == torch.float32
    assert found["100000-0.100.safetensors"]["w"].tolist() == [0.5, 0.5]


def test_a_half_written_snapshot_does_no_harm(tiny, tmp_path):
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / ".tmp-00003-0.050.safetensors").write_bytes(b"half")
    for iteration in (1, 2):
        tensors.save_snapshots(tmp_path, iteration, {"w": torch.ones(1)}, {}, str(tiny), keep=1)
    assert (tmp_path / "snapshots" / "00002.safetensors").is_file() and not (tmp_path / "snapshots" / "00001.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Opening checkpoints.

@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished run with three snapshots, each raw and in two averages. Everything was trained, so there are two blocks."""
    out = tmp_path_factory.mktemp("trained") / "run"
    launch(small(tiny, out, "--iterations", 3, "--snapshot_every", 1, "--lr", 0.02, "--train", "all", "--warmup", 0))
    return out


@pytest.fixture(scope="module")
def four(run):
    """Four averages."""
    return [str(run / "snapshots" / f"{i:05d}-{length}.safetensors") for i in (2, 3) for length in ("0.050", "0.100")]


def whole(folder):
    return {name: value.float() for name, value in load_file(base_files.network_files(folder)[0]).items()}


def brute(tiny, paths, c):
    """The base with sum_k c_k theta_k in place of every tensor that a snapshot holds."""
    parts, found = [load_file(path) for path in paths], whole(tiny)
    return found | {name: sum(x * part[name].double() for x, part in zip(c, parts)).float() for name in parts[0]}


def close(a, b, tolerance=2e-7):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def test_folders_snapshots_and_lora_files_go_together(run, tiny, tmp_path):
    raw = run / "snapshots" / "00003.safetensors"
    layer = "transformer_blocks.0.attn.to_q"
    lora = write(tmp_path / "lora.safetensors", {f"transformer.{layer}.lora_A.weight": torch.ones(1, 32), f"transformer.{layer}.lora_B.weight": torch.ones(32, 1)})
    folder, views = tensors.open_checkpoints([str(run / "model"), str(raw), str(lora)])
    base, tuned = whole(tiny), whole(run / "model")
    assert Path(folder) == tiny and all([*v] == sorted(base) for v in views)
    assert views[1].facts["iteration"] == "3" and views[1].facts["sigma_rel"] == ""
    same({name: views[0][name] for name in base}, tuned)
    same({name: views[1][name] for name in base}, base | load_file(raw))
    same({name: views[2][name] for name in base}, base | {layer + ".weight": base[layer + ".weight"] + 1})
    alone = tensors.open_checkpoints([str(lora)], str(tiny))[1][0]
    assert [*alone] == [layer + ".weight"]                               # what nobody changes is not merged
    assert [*tensors.open_checkpoints([str(lora), str(raw)])[1][0]] == sorted(load_file(raw))       # and what anybody changes is


def test_the_length_of_an_average_is_also_read_from_its_name(four, tmp_path):
    path = write(tmp_path / "net-0002147-0.050.safetensors", load_file(four[0]))
    assert tensors.open_checkpoints([str(path)], str(Path(tensors.Weights([four[0]]).facts["base"])))[1][0].facts == {"iteration": "0002147", "sigma_rel": "0.050"}
    folder = tmp_path / "net-0002147-0.050"                              # a folder made from such a file
    shutil.copytree(tensors.Weights([four[0]]).facts["base"], folder)
    assert tensors.open_checkpoints([str(folder)])[1][0].facts == {"iteration": "0002147", "sigma_rel": "0.050"}


LORA_A = {"proj_out.lora_A.weight": torch.ones(2, 32)}
DAMAGED = {  # what is written -> what the line must say
    "another base": (lambda p, part: write(p, part, base="elsewhere", fingerprint="0" * 16), "another base"),
    "unknown name": (lambda p, part: write(p, part | {"stray.weight": torch.ones(1)}), "stray.weight"),
    "wrong shape": (lambda p, part: write(p, part | {"proj_out.bias": torch.ones(7)}), r"proj_out.bias.*\(7,\)"),
    "no tensor": (lambda p, part: write(p, {}), "no tensor"),
    "truncated": (lambda p, part: p.write_bytes(write(p, part).read_bytes()[:-50]), "safetensors"),
    "text": (lambda p, part: p.write_text("weights\n" * 50), "safetensors"), "empty": (lambda p, part: p.write_bytes(b""), "safetensors"),
    "pickle": (lambda p, part: torch.save(part, p), "safetensors"), "no file": (lambda p, part: None, "safetensors"),
    "a folder of nothing": (lambda p, part: p.mkdir(), "model_index.json"),
    "lora of an unknown layer": (lambda p, part: write(p, {"text_encoder.q.lora_A.weight": torch.ones(1, 2), "text_encoder.q.lora_B.weight": torch.ones(2, 1)}), "text_encoder.q"),
    "lora of another size": (lambda p, part: write(p, LORA_A | {"proj_out.lora_B.weight": torch.ones(9, 2)}), "proj_out.weight"),
    "lora of two ranks": (lambda p, part: write(p, LORA_A | {"proj_out.lora_B.weight": torch.ones(196, 3)}), "proj_out.weight"),
    "lora without B": (lambda p, part: write(p, LORA_A), "proj_out")}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_checkpoint_that_does_not_fit_is_refused(run, tiny, tmp_path, what):
    make, naming = DAMAGED[what]
    make(tmp_path / "bad.pt", load_file(run / "snapshots" / "00003.safetensors"))
    with pytest.raises(ValueError, match=f"bad.pt.*{naming}") as error:
        tensors.open_checkpoints([str(run / "snapshots" / "00002.safetensors"), str(tmp_path / "bad.pt")], str(tiny))
    assert "\n" not in str(error.value)


def test_a_snapshot_is_not_put_over_another_base(run, tmp_path):
    other = build_model(tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match="00003.safetensors.*another base.*other"):
        tensors.open_checkpoints([str(run / "snapshots" / "00003.safetensors")], str(other))


def test_a_folder_that_lacks_a_tensor_is_refused(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "model")
    file = base_files.network_files(tmp_path / "model")[0]
    write(file, {name: value for name, value in load_file(file).items() if name != "proj_out.bias"})
    with pytest.raises(ValueError, match="proj_out.bias"):
        tensors.open_checkpoints([str(run / "snapshots" / "00003.safetensors"), str(tmp_path / "model")])


def test_a_base_must_be_named(run, tmp_path):
    path = write(tmp_path / "bare.safetensors", load_file(run / "snapshots" / "00003.safetensors"))
    with pytest.raises(ValueError, match="bare.safetensors.*--model"):
        tensors.open_checkpoints([str(path)])


# ---------------------------------------------------------------------------------------------------------------------
# The commands that write a model.

def coefficients(out):
    return [row["coefficients"] for row in read_metrics(out)]


@pytest.mark.parametrize("flags, c", [([], [0.25] * 4), (["--coefficients", "0.75,-0.5,1.25,-0.5"], [0.75, -0.5, 1.25, -0.5]),
                                      (["--coefficients=0,0,1,0"], [0, 0, 1, 0])])
def test_average(four, tiny, tmp_path, flags, c):
    merge.main(["average", *four, *flags, "--out", str(tmp_path / "new" / "merged")])
    found = bases.load(tmp_path / "new" / "merged").network.state_dict()
    close(found, brute(tiny, four, c))
    if max(c) == 1:
        same(found, whole(tiny) | load_file(four[2]))
    assert all(contents(tmp_path / "new" / "merged" / part) == contents(tiny / part) for part in ("text_encoder", "tokenizer", "evaluator"))


def test_ema_writes_a_folder_for_each_length(four, tiny, tmp_path):
    raw = four[0].replace("-0.050", "")                                  # takes no part
    merge.main(["ema", *four, raw, "--sigma_rel", "0.07,0.15", "--out", str(tmp_path / "many")])
    merge.main(["ema", *four, "--sigma_rel", "0.15", "--out", str(tmp_path / "one")])
    assert {path.name for path in (tmp_path / "many").iterdir()} == {"0.07", "0.15", "config.json"}
    for folder, length in ((tmp_path / "many" / "0.07", 0.07), (tmp_path / "many" / "0.15", 0.15), (tmp_path / "one", 0.15)):
        c = averages.ema_coefficients([2, 2, 3, 3], [0.05, 0.1, 0.05, 0.1], length)
        close(bases.load(folder).network.state_dict(), brute(tiny, four, c), 1e-6)


def test_ema_that_was_killed_makes_the_lengths_that_are_missing(four, tmp_path, monkeypatch, capsys):
    argv = ["ema", *four, "--sigma_rel", "0.07,0.15,0.2"]
    merge.main([*argv, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_call(patch, runtime, "save_model", 2, killed)
        merge.main([*argv, "--out", str(tmp_path / "cut")])
    shutil.rmtree(tmp_path / "cut" / "0.15")
    before = files(tmp_path / "cut" / "0.07")
    merge.main([*argv, "--out", str(tmp_path / "cut")])
    assert files(tmp_path / "cut" / "0.07") == before                    # not written again
    found, right = contents(tmp_path / "cut"), contents(tmp_path / "whole")
    assert found.pop("config.json") != right.pop("config.json") and found == right
    capsys.readouterr()
    for other in (["ema", *four[:3], "--sigma_rel", "0.07,0.15,0.2"], ["ema", *four, "--sigma_rel", "0.07"]):
        with pytest.raises(SystemExit) as stop:                          # of other checkpoints, or a model where the folder of many is
            merge.main([*other, "--out", str(tmp_path / "cut")])
        assert stop.value.code == 2 and "choose another" in capsys.readouterr().err
    assert contents(tmp_path / "cut").keys() == found.keys() | {"config.json"}


def test_averages_of_two_seeds_are_merged_but_are_no_average(four, tiny, tmp_path, monkeypatch, capsys):
    """They are of the same iteration and length, so that only `ema` cannot use them."""
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
    two = [shutil.copy(four[0], tmp_path / "0"), write(tmp_path / "1" / Path(four[0]).name, load_file(four[1]), **tensors.Weights([four[0]]).facts)]
    merge.main(["average", *map(str, two), "--out", str(tmp_path / "merged")])
    close(bases.load(tmp_path / "merged").network.state_dict(), brute(tiny, [four[0], four[1]], [0.5, 0.5]))
    searched = []
    monkeypatch.setattr(merge, "search", lambda args, task, blocks, fixed, *rest: searched.extend(fixed))
    with pytest.raises(SystemExit):                                      # None is what a search that was asked to stop returns
        merge.main(["rl", *map(str, two), *RL, "--reward", "class", "--out", str(tmp_path / "rl")])
    assert searched == [*map(str, two), "uniform average"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        merge.main(["ema", *map(str, two), "--out", str(tmp_path / "ema")])
    assert stop.value.code == 2 and "two checkpoints are the average 0.05 of iteration 2" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["average", "ema"])
def test_a_full_disk_ends_a_merge_with_one_line(four, tmp_path, command):
    argv = [command, *four, "--out", str(tmp_path / "out")]
    with files_up_to(20000), pytest.raises(SystemExit, match=r"^error: .*out: .*too large.*what is there is whole; the same command goes on") as stop:
        merge.main(argv)
    assert "\n" not in stop.value.code and len(stop.value.code) < 500
    merge.main(argv)
    assert bases.load(tmp_path / "out" if command == "average" else tmp_path / "out" / "0.2")


def test_weights_that_do_not_fit_their_config_are_one_line(four, tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "model")
    rewrite(num_layers=2)(tmp_path / "model" / "transformer" / "config.json")
    for command in ("average", "rl"):
        with pytest.raises(SystemExit) as stop:
            merge.main([command, *four, *(RL if command == "rl" else []), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")])
        line = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and line.startswith("error: --model ") and "transformer" in line and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The search.

RL = "--device cpu --updates 3 --group_size 4 --images 30 --reference 60 --report_images 20 --steps 2 --sigma_rel 0.07,0.15".split()


@pytest.fixture(scope="module")
def rl(four, tmp_path_factory):
    """flags -> the folder of a finished search with them; each is run once."""
    tmp, known = tmp_path_factory.mktemp("rl"), {}

    def launched(*flags):
        key = tuple(map(str, flags))
        if key not in known:
            known[key] = tmp / str(len(known))
            merge.main(["rl", *four, *RL, *key, "--out", str(known[key])])
        return known[key]
    return launched


@pytest.mark.parametrize("flags", ["--reward fid:1", "--reward class:1", "--reward fid:1,class:0.5", "--reward fid:1 --blocks"])
def test_a_search_leaves_a_model_a_table_and_a_plot(rl, four, tiny, flags):
    out = rl(*flags.split())
    assert {"config.json", "metrics.jsonl", "table.md", "coefficients.png", "model"} < {path.name for path in out.iterdir()}
    rows, blocks = read_metrics(out), 1 + ("blocks" in flags)
    assert [row["update"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert np.shape(row["coefficients"]) == (blocks, 4) and np.abs(np.sum(row["coefficients"], 1) - 1).max() < 1e-12
        assert row["sum_error"] < 1e-12 and len(row["std"]) == blocks and ("reference" in row) == ("fid" in flags)
        assert {name for name in row if name.startswith("reward/")} == {f"reward/{name}" for name in ("fid", "class") if name in flags}
    assert rows[0]["coefficients"] != rows[1]["coefficients"] and rows[0]["coefficients"] != [[0.25] * 4] * blocks
    c, found = rows[-1]["coefficients"], bases.load(out / "model").network.state_dict()
    parts = [brute(tiny, four, row) for row in c]                        # in order: rest, transformer_blocks.0
    close(found, {name: parts[name.startswith("transformer_blocks.0.") and blocks - 1][name] for name in found})
    if blocks == 2:
        assert c[0] != c[1]
    with Image.open(out / "coefficients.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 24)) > 10


def table(out):
    """table.md -> {row: {column: number}}."""
    head, line, *rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in (out / "table.md").read_text().splitlines()]
    assert set("".join(line)) == {"-"}
    return {row[0]: dict(zip(head[1:], map(float, row[1:]))) for row in rows}


def test_the_table_judges_every_rival_by_fresh_pictures(rl, tiny, four):
    out = rl("--reward", "fid:1")
    found = table(out)
    assert [name.split(" (")[0].split(" EMA")[0] for name in found] == ["base model", "best single checkpoint", "uniform average", "best post-hoc", "random search", "RL"]
    prompts = prompting.read_prompts(tiny / "eval_prompts.jsonl")
    reward, evaluator = (classifier.load_classifier(tiny / part) for part in ("reward", "evaluator"))
    average = bases.load(tiny)
    average.network.load_state_dict(brute(tiny, four, [0.25] * 4))
    for name, model in (("base model", bases.load(tiny)), ("RL", bases.load(out / "model")), ("uniform average", average)):
        images = picture_sets.generate(model, prompts, 2, 2, 1.0, 1000, 500)
        real = np.load(tiny / "reward" / "real-2.npz")
        scores = evaluation.score(images, [p.metadata["label"] for p in prompts], evaluator, np.load(tiny / "evaluator" / "real-2.npz"))
        assert found[name] == {
            "FD, searched features": pytest.approx(dist_reward.frechet_distance(*dist_reward.moments(reward.features(images)), real["mu"], real["sigma"]), rel=1e-3),
            "FD, held-out features": pytest.approx(scores["fid"], rel=1e-3), "Vendi": pytest.approx(scores["vendi"], abs=1e-3),
            "accuracy": pytest.approx(scores["accuracy"], abs=1e-3)}


def test_a_reward_that_was_searched_stands_in_the_table_whoever_judges(run, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    for part in ("reward", "evaluator"):
        shutil.rmtree(tmp_path / "model" / part)
    snapshots = [str(run / "snapshots" / f"0000{i}.safetensors") for i in (1, 2)]
    for model in (tiny, tmp_path / "model"):
        out = tmp_path / f"out-{model.name}"
        merge.main(["rl", *snapshots, *RL, "--reward", "jpeg", "--updates", "1", "--model", str(model), "--out", str(out)])
        images = picture_sets.generate(bases.load(out / "model"), prompting.read_prompts(tiny / "eval_prompts.jsonl"), 2, 2, 1.0, 1000, 500)
        expected = rewards.Reward("jpeg", tiny)(images, [""] * len(images), [{}] * len(images))["jpeg"].mean().item()
        assert table(out)["RL"]["reward jpeg"] == pytest.approx(expected, abs=1e-3)
        assert ("accuracy" in table(out)["RL"]) == (model == tiny) and all("reward jpeg" in row for row in table(out).values())


def test_without_averages_the_table_has_no_such_row(run, tmp_path):
    merge.main(["rl", *(str(run / "snapshots" / f"0000{i}.safetensors") for i in (1, 2, 3)), *RL, "--updates", "1", "--out", str(tmp_path / "out")])
    assert len(table(tmp_path / "out")) == 5 and not any("EMA" in name for name in table(tmp_path / "out"))


def test_the_search_pays_the_fall_of_the_distance_by_brute_force(four, tiny, tmp_path, monkeypatch):
    """Each vector's merge is built, drawn and priced once more: the reference with its oldest members replaced, and its Frechet distance."""
    asked, steps, group, step = [], [], merge.Search.group, merge.policy_step

    def spied(self, candidates, count, key, pool, replaced):
        before = pool.features.clone()
        asked.append((candidates, count, key, before, replaced, group(self, candidates, count, key, pool, replaced)))
        return asked[-1][-1]
    monkeypatch.setattr(merge.Search, "group", spied)
    monkeypatch.setattr(merge, "policy_step", lambda *args: steps.append([x if isinstance(x, float) else x.clone() for x in args]) or step(*args))
    merge.main(["rl", *four, *RL, "--updates", "2", "--reward", "fid:1,class:0.5", "--out", str(tmp_path / "out")])
    fixed, first, random, second, other_random = asked
    model, real = bases.load(tiny), np.load(tiny / "reward" / "real-1.npz")
    prompts, network = prompting.read_prompts(tiny / "prompts.jsonl"), classifier.load_classifier(tiny / "reward")
    distance = lambda f: dist_reward.frechet_distance(*dist_reward.moments(f), real["mu"], real["sigma"])

    def drawn(c, count, key):
        model.network.load_state_dict(brute(tiny, four, c.flatten().tolist()))
        images = picture_sets.pictures(model, prompts, count // 30, range(count), 2, 1.0, key, 500)
        labels = torch.tensor([p.metadata["label"] for p in prompts]).repeat_interleave(count // 30)
        return network.features(images), classifier.class_reward(network(images), labels, images).double().mean().item()
    for candidates, count, key, members, replaced, terms in asked:
        assert len(replaced) == count == len(set(replaced.tolist()))
        for g in (0, len(candidates) - 1):
            features, reward = drawn(candidates[g], count, key)
            changed = members.clone()
            changed[replaced] = features
            assert terms["fid"][g].item() == pytest.approx(60 / count * (distance(members) - distance(changed)), rel=1e-3, abs=1e-3)
            assert terms["class"][g].item() == pytest.approx(reward, rel=1e-5)
    torch.testing.assert_close(fixed[3], drawn(torch.full((4,), 0.25), 60, fixed[2])[0], rtol=1e-4, atol=1e-4)           # the uniform average's
    score = sum(w * (fixed[5][n] - fixed[5][n].mean()) / fixed[5][n].std() for n, w in (("fid", 1), ("class", 0.5)))
    start = fixed[0][score.argmax(), 0]                                  # the best of those that need no search: the policy's origin
    torch.testing.assert_close(first[3], drawn(start, 60, fixed[2])[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(first[3], random[3]) and torch.equal(random[3], other_random[3])
    moved = first[3].clone()                                             # the mean's pictures, at the noise that the group had, took their place
    moved[first[4]] = drawn(torch.tensor(coefficients(tmp_path / "out")[0]), 30, first[2])[0]
    torch.testing.assert_close(second[3], moved, rtol=1e-4, atol=1e-4)
    assert first[2] != second[2] and random[2] == other_random[2] and len({*first[4].tolist(), *second[4].tolist()}) == 60
    assert not torch.equal(random[0], other_random[0]) and fixed[1] == 60 and len(fixed[0]) == 4 + 1 + 2
    Q = merge.directions(tensors.open_checkpoints(four)[1])
    for (mean, log_std, z, advantage, lr), (candidates, *_, terms) in zip(steps, (first, second)):
        torch.testing.assert_close(merge.coefficients_of(z, start, Q), candidates)
        torch.testing.assert_close(z[:2] + z[2:], 2 * mean.expand(2, 1, 3))                   # mirrored pairs
        standard = lambda x: shaping.group_advantage(x[None], torch.arange(len(x))[None])[0]
        torch.testing.assert_close(advantage, standard(terms["fid"]) + 0.5 * standard(terms["class"]), rtol=1e-6, atol=1e-6)
        assert lr == 0.5
    assert steps[0][0].abs().max() == 0 and steps[0][1].exp().unique().tolist() == [pytest.approx(0.1)]


def test_the_best_of_the_rivals_is_shown(four, tmp_path, monkeypatch):
    """With a reward whose optimum is known: the last coefficient minus the first."""
    monkeypatch.setattr(merge.Search, "group", lambda self, candidates, *rest: {"class": candidates.double().mean(1)[:, 3] - candidates.double().mean(1)[:, 0]})
    shown = []
    monkeypatch.setattr(merge, "report", lambda args, task, base, judged, rows: shown.append(rows) or "")
    merge.main(["rl", *four, *RL, "--reward", "class:1", "--updates", "30", "--group_size", "8", "--out", str(tmp_path / "out")])
    (base, _), (single, c), _, (ema, length), (_, random), (_, found) = shown[0].items()
    assert base == "base model" and "00003-0.100" in single and c.tolist() == [0, 0, 0, 1]
    sweep = {f"best post-hoc EMA {x}": averages.ema_coefficients([2, 2, 3, 3], [0.05, 0.1, 0.05, 0.1], x) for x in (0.07, 0.15)}
    assert ema == max(sweep, key=lambda name: sweep[name][3] - sweep[name][0])
    np.testing.assert_allclose(length, sweep[ema], atol=1e-9)
    worth = lambda c: float(c.flatten()[3] - c.flatten()[0])
    assert 1.1 < worth(random) and worth(found) - 1 > 2 * (worth(random) - 1)      # the best of 240 blind vectors; and what 30 steps uphill reach


@pytest.mark.parametrize("owner, name, number", [(merge, "policy_step", 1), (merge, "policy_step", 3), (runtime, "save_checkpoint", 1),
                                                 (runtime, "save_checkpoint", 3), (merge, "report", 1), (compare, "draw_coefficients", 1)])
def test_a_search_that_is_cut_off_goes_on_to_the_same_bits(rl, four, tmp_path, owner, name, number):
    out, right = tmp_path / "out", rl("--reward", "fid:1,class:0.5")
    argv = ["rl", *four, *RL, "--reward", "fid:1,class:0.5", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, owner, name, number, killed)
        with pytest.raises(KeyboardInterrupt):
            merge.main(argv)
    merge.main(argv)
    assert read_metrics(out) == read_metrics(right) and contents(out / "model") == contents(right / "model")
    assert (out / "table.md").read_text() == (right / "table.md").read_text()
    same(load_file(out / "checkpoint-00003" / "weights.safetensors"), load_file(right / "checkpoint-00003" / "weights.safetensors"))


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_a_search_that_is_asked_to_stop_saves_and_goes_on(rl, four, tmp_path, monkeypatch, capsys, signal_):
    out, right = tmp_path / "out", rl("--reward", "fid:1,class:0.5")
    argv = ["rl", *four, *RL, "--reward", "fid:1,class:0.5", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, merge, "policy_step", 2, lambda result, args: os.kill(os.getpid(), signal_) or result)
        with pytest.raises(SystemExit) as stopped:
            merge.main(argv)
    assert stopped.value.code == 128 + signal_ and "the same command goes on" in capsys.readouterr().out
    assert (out / "checkpoint-00002").is_dir() and not (out / "checkpoint-00003").exists() and not (out / "model").exists()
    merge.main(argv)
    assert read_metrics(out) == read_metrics(right) and contents(out / "model") == contents(right / "model")


def test_a_full_disk_ends_a_search_with_one_line(four, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    at_call(monkeypatch, runtime, "save_checkpoint", 2, full)
    with pytest.raises(SystemExit, match=r"^error: .*No space left on device.*checkpoint 2 is whole; the same command goes on"):
        merge.main(["rl", *four, *RL, "--reward", "fid:1", "--out", str(tmp_path / "out")])


def test_a_search_holds_no_more_pictures_than_a_batch_or_two(four, tmp_path, monkeypatch):
    """One that is being measured, and one that is being drawn, of the 60 of a rival."""
    decode, alive, most = stable_diffusion.StableDiffusion3.decode, weakref.WeakSet(), []

    def counted(self, latents):
        images = decode(self, latents).clone()
        alive.add(images)
        most.append(sum(map(len, alive)))
        return images
    monkeypatch.setattr(stable_diffusion.StableDiffusion3, "decode", counted)
    monkeypatch.setattr(merge, "report", lambda *args: "")
    merge.main(["rl", *four, *RL, "--updates", "1", "--reward", "fid:1,class:0.5", "--batch", "7", "--out", str(tmp_path / "out")])
    assert len(most) > 7 * 60 / 7 and 7 <= max(most) <= 14


def test_a_prompt_that_is_no_class_leaves_nothing_behind(tmp_path, capsys):
    for name in "ab":
        bases.load(build_sit(tmp_path / f"base-{name}")).save(tmp_path / name)
    argv = ["rl", str(tmp_path / "a"), str(tmp_path / "b"), *RL, "--reward", "jpeg", "--updates", "1", "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")]
    for text in ("a boot", "goldfish"):
        (tmp_path / "p.txt").write_text(text + "\n")
        before = contents(tmp_path)
        if text == "goldfish":
            merge.main(argv)
            break
        with pytest.raises(SystemExit) as stop:
            merge.main(argv)
        assert stop.value.code == 2 and "error: prompt 'a boot': a class is a number" in capsys.readouterr().err
        assert contents(tmp_path) == before and not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "table.md").is_file()


def test_search_and_report_have_their_own_halves(rl, tiny, tmp_path):
    for half, (metrics_differ, table_differs) in {"1": (True, True), "2": (False, True)}.items():
        model = tmp_path / half
        shutil.copytree(tiny, model)
        np.savez(model / "reward" / f"real-{half}.npz", mu=np.linspace(-3, 3, 64), sigma=np.diag(np.linspace(0.01, 2, 64)))
        a, b = rl("--reward", "fid:1"), rl("--reward", "fid:1", "--model", model)
        assert (read_metrics(a) != read_metrics(b), table(a) != table(b)) == (metrics_differ, table_differs)
    np.savez(tmp_path / "target.npz", mu=np.zeros(64), sigma=np.eye(64))
    a, b = rl("--reward", "fid:1"), rl("--reward", "fid:1", "--report_target", tmp_path / "target.npz")
    assert read_metrics(a) == read_metrics(b) and contents(a / "model") == contents(b / "model") and table(a) != table(b)
    c = rl("--reward", "fid:1", "--target", tmp_path / "target.npz", "--report_target", tiny / "reward" / "real-2.npz")
    assert read_metrics(a) != read_metrics(c) and table(a)["base model"] == table(c)["base model"]


@pytest.mark.parametrize("flags", ["--seed 1", "--std 0.2", "--lr 0.3", "--group_size 6", "--images 60", "--reference 90", "--steps 3", "--guidance 2",
                                   "--precision bfloat16", "--features evaluator"])
def test_every_flag_of_the_search_does_something(rl, flags):
    assert coefficients(rl("--reward", "fid:1", *flags.split())) != coefficients(rl("--reward", "fid:1"))


@pytest.mark.parametrize("flags", ["--report_images 40", "--report_seed 7"])
def test_flags_of_the_report_leave_the_search_alone(rl, flags):
    a, b = rl("--reward", "fid:1"), rl("--reward", "fid:1", *flags.split())
    assert read_metrics(a) == read_metrics(b) and table(a) != table(b)


def test_the_batch_is_memory_only(rl):
    a, b = coefficients(rl("--reward", "fid:1")), coefficients(rl("--reward", "fid:1", "--batch", 7))
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("processes, flags", [(2, "--reward fid:1,class:0.5"), (2, "--reward class:1"), (2, "--reward fid:1 --blocks"),
                                              (3, "--reward fid:1 --group_size 2 --images 30")])
def test_more_processes_find_what_one_finds(rl, four, tmp_path, processes, flags):
    one = rl(*flags.split())
    code, out, error = launch_process(["rl", *four, *RL, *flags.split(), "--out", str(tmp_path / "out")], processes, script="merge.py")
    assert code == 0, error
    assert out.count("| RL |") == 1
    np.testing.assert_allclose(coefficients(tmp_path / "out"), coefficients(one), atol=1e-5)
    close(whole(tmp_path / "out" / "model"), whole(one / "model"), 1e-5)
    assert table(tmp_path / "out").keys() == table(one).keys()


@pytest.mark.slow
def test_as_a_command(four, tmp_path):
    code, out, error = launch_process(["average", *four, "--out", str(tmp_path / "out")], script="merge.py")
    assert code == 0 and "0.2500" in out and bases.load(tmp_path / "out"), error
    code, out, error = launch_process(["average", *four, "--out", str(tmp_path / "out")], script="merge.py")
    assert code == 2 and out == "" and len(error.splitlines()) == 1 and "--out" in error


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, nothing loaded, nothing written.

BAD = [  # command line, what the line must name
    ("average {four} --coefficients 0.5,0.5 --out {out}", "--coefficients 0.5,0.5"), ("average {four} --coefficients 1,1,1,1 --out {out}", "sum to 4"),
    ("average {four} --coefficients 1,x,0,0 --out {out}", "--coefficients 1,x,0,0"), ("average {four} --coefficients nan,1,0,0 --out {out}", "--coefficients"),
    ("average {four} --coefficients 1,,0,0 --out {out}", "--coefficients"), ("average {four}", "--out"), ("average {four} --out {tmp}", "--out"),
    ("average {four} --out {tmp}/file/new", "--out"), ("average {four} --out {out} --updates 3", "--updates"), ("average {four} --out {out} --blocks", "--blocks"),
    ("average {four} --out {out} --sigma_rel 0.1", "--sigma_rel"), ("ema {four} --out {out} --reward class:1", "--reward"),
    ("ema {four} --out {out} --coefficients 1,0,0,0", "--coefficients"), ("rl {four} --out {out} --coefficients 1,0,0,0", "--coefficients"),
    ("ema {four} --out {out} --sigma_rel 0.3", "--sigma_rel 0.3"), ("ema {four} --out {out} --sigma_rel 0.1,0", "--sigma_rel 0.1,0"),
    ("ema {four} --out {out} --sigma_rel=-0.1", "--sigma_rel -0.1"), ("ema {four} --out {out} --sigma_rel nan", "--sigma_rel nan"),
    ("ema {four} --out {out} --sigma_rel short", "--sigma_rel short"), ("ema {four} --out {out} --sigma_rel=", "--sigma_rel"),
    ("ema {one} --out {out}", "two"), ("ema {raw} {raw2} --out {out}", "averages"), ("ema {one} {raw} --out {out}", "averages"),
    ("ema {one} {one} --out {out}", "given twice"), ("rl {raw} {raw2} {raw} --out {out}", "given twice"), ("rl {one} --out {out}", "two"),
    ("rl {four} --out {out} --sigma_rel=", "--sigma_rel"), ("rl {four} --out {out} --group_size 3", "--group_size 3"),
    ("rl {four} --out {out} --group_size 0", "--group_size 0"), ("rl {four} --out {out} --updates 0", "--updates 0"), ("rl {four} --out {out} --std 0", "--std 0"),
    ("rl {four} --out {out} --lr nan", "--lr nan"), ("rl {four} --out {out} --images 31", "--images 31"), ("rl {four} --out {out} --images 90 --reference 60", "--images 90"),
    ("rl {four} --out {out} --reference 100", "--reference 100"), ("rl {four} --out {out} --report_images 15", "--report_images 15"),
    ("rl {four} --out {out} --features nothing", "--features nothing"), ("rl {four} --out {out} --reward beauty", "beauty"),
    ("rl {four} --out {out} --reward kid", "kid"), ("rl {four} --out {out} --target {tmp}/file", "{tmp}/file"), ("rl {four} --out {out} --target {tmp}/none", "{tmp}/none"),
    ("rl {four} --out {out} --report_target {tmp}/file", "{tmp}/file"), ("rl {four} --out {out} --prompts {tmp}/none.jsonl", "none.jsonl"),
    ("rl {four} --out {tmp}", "--out"), ("rl {four} --out {tmp}/file/new", "--out"), ("rl {four} --out {out} --model {tmp}/none", "{tmp}/none"),
    ("rl {four}", "--out"), ("blend {four} --out {out}", "blend"), ("average --out {out}", "CHECKPOINT"), ("average {tmp}/file --out {out}", "{tmp}/file"),
    ("average {four} --out {out} --coeff 1", "--coeff"),
    pytest.param("rl {four} --out {out} --device cuda", "--device cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"))]


@pytest.fixture
def refused(four, tmp_path, capfd):
    """Runs merge.py on a command line that must be refused, naming `naming`; looks at exit code, stderr and files."""
    snapshots = Path(four[0]).parent
    fields = {"four": " ".join(four), "one": four[0], "raw": snapshots / "00001.safetensors", "raw2": snapshots / "00002.safetensors", "tmp": tmp_path,
              "out": tmp_path / "new"}

    def run(line, naming, load=False):
        (tmp_path / "file").write_text("text")
        before = contents(tmp_path)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            for owner, name in () if load else ((models, "load"), (merge, "Reward"), (merge, "open_pool"), (merge.evaluation, "Judge")):
                patch.setattr(owner, name, lambda *args, **kwargs: pytest.fail("weights were loaded"))
            merge.main([part.format(**fields) for word in line.split() for part in (word.format(**fields).split() or [word])])
        out, error = capfd.readouterr()
        lines = [line for line in error.splitlines() if "shards" not in line]
        assert stop.value.code == 2 and out == "" and (len(lines) == 1 or lines[0].startswith("usage:")), error
        assert "error: " in lines[-1] and naming.format(**fields) in lines[-1] and len(lines[-1]) < 1000
        assert contents(tmp_path) == before and not (tmp_path / "new").exists()
    return run


@pytest.mark.parametrize("line, naming", BAD)
def test_bad_command_lines(refused, line, naming):
    refused(line, naming)


@pytest.mark.parametrize("file", ["reward/real-1.npz", "reward/real-2.npz", "evaluator/real-2.npz", "evaluator/model.safetensors", "reward/model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_model_folder_that_the_search_cannot_use(refused, tiny, tmp_path, file, damage):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / file).unlink()
    if damage == "damaged":
        (tmp_path / "model" / file).write_bytes(b"PK\x03\x04 half")
    refused("rl {four} --out {out} --model {tmp}/model", file.split("/")[0])


@pytest.mark.parametrize("flags", ["--target {tmp}/target.npz", "--target {tmp}/four.npz --report_target {tmp}/target.npz"])
def test_own_features_of_another_size_than_a_target_are_refused(refused, tmp_path, monkeypatch, flags):
    """How many there are is known only from a picture, but before anything is searched."""
    (tmp_path / "few_features.py").write_text("def f(images):\n    return images.flatten(1)[:, :4]\n")
    monkeypatch.syspath_prepend(tmp_path)
    np.savez(tmp_path / "four.npz", mu=np.zeros(4), sigma=np.eye(4)), np.savez(tmp_path / "target.npz", mu=np.zeros(5), sigma=np.eye(5))
    monkeypatch.setattr(merge, "search", lambda *args: pytest.fail("the search began"))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    refused(f"rl {{four}} {' '.join(RL)} --out {{out}} --features few_features:f {flags}", "target.npz", load=True)


def test_a_search_of_another_configuration_is_not_continued(rl, four, refused, tmp_path, capfd):
    out = rl("--reward", "fid:1")
    before = contents(out)
    refused(f"rl {{four}} {' '.join(RL)} --reward fid:1 --seed 5 --out {out}", "--seed")
    assert contents(out) == before
