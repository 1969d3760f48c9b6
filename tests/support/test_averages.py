"""Averages that training keeps, and post-hoc EMA from its definitions and published numbers.

A profile is p(s) ~ s^gamma on [0, t], of integral 1; sigma_rel is the std of s / t. The formulas
are written here once more, independently of averages.py.
"""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq

from support import averages

# The averages of the examples: two lengths at each of four times.
TIMES = [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
LENGTHS = [0.05, 0.1] * 4


def width(gamma):
    """The std of s / t under the profile, from its first two moments."""
    mean = (gamma + 1) / (gamma + 2)
    mean_square = (gamma + 1) / (gamma + 3)
    return math.sqrt(mean_square - mean**2)


def power(sigma_rel):
    """The gamma of a width, by bisection."""

    def error(gamma):
        return width(gamma) - sigma_rel

    return brentq(error, 0, 2000, xtol=1e-13, rtol=1e-14)


def profile(s, t, gamma):
    """p(s), which is 0 beyond t."""
    return np.where(s <= t, (gamma + 1) / t * (s / t) ** gamma, 0)


def product(t_a, gamma_a, t_b, gamma_b):
    """The integral of p_a p_b over s up to the earlier time, by hand."""
    exponent = gamma_a + gamma_b + 1
    factor = (gamma_a + 1) * (gamma_b + 1) / exponent
    powers = t_a ** -(gamma_a + 1) * t_b ** -(gamma_b + 1)
    return factor * min(t_a, t_b) ** exponent * powers


# --------------------------------------------------------------------------------------------------
# Widths and powers.


def test_widths_and_powers_invert_each_other():
    for gamma in (0, 1, 6.9357, 1000):
        sigma_rel = averages.sigma_rel_of(gamma)
        assert sigma_rel == pytest.approx(width(gamma), rel=1e-8)
        assert averages.gamma_of(sigma_rel) == pytest.approx(gamma, rel=1e-10, abs=1e-10)


def test_the_published_powers():
    """EDM2 trains with 16.97 and 6.94; a plain mean is gamma = 0."""
    assert averages.gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert averages.gamma_of(0.1) == pytest.approx(6.94, abs=0.01)
    assert averages.gamma_of(math.sqrt(1 / 12)) == pytest.approx(0, abs=1e-10)


# --------------------------------------------------------------------------------------------------
# What training keeps.


@pytest.mark.parametrize("sigma_rel", [0.02, 0.28])
def test_an_average_weighs_each_iteration_by_the_integral_of_the_profile(sigma_rel):
    gamma = power(sigma_rel)
    values = np.random.default_rng(0).normal(size=50)
    average = 123.0
    for t, value in enumerate(values, 1):
        decay = averages.power_decay(t, sigma_rel)
        average = decay * average + (1 - decay) * value
        edges = (np.arange(t + 1) / t) ** (gamma + 1)
        expected = np.diff(edges) @ values[:t]
        assert average == pytest.approx(expected, rel=1e-9, abs=1e-12)


def trained_for(iterations, ema_decay, with_snapshots):
    """Averages of one weight, and its value at each iteration."""
    values = [math.sin(3 * t) for t in range(iterations)]
    weight = torch.nn.Parameter(torch.tensor([7.0], dtype=torch.float64))
    kept = averages.Averages({"w": weight}, ema_decay, with_snapshots)
    for t, value in enumerate(values, 1):
        averages.copy_into({"w": weight}, {"w": torch.tensor([value])})
        kept.update(t)
    return kept, values


def test_the_ema_of_training_starts_at_the_base():
    kept, values = trained_for(4, 0.9, with_snapshots=False)
    expected = 0.9**4 * 7 + sum(0.1 * 0.9 ** (3 - t) * values[t] for t in range(4))
    assert kept.tensors["ema"]["w"].item() == pytest.approx(expected, rel=1e-6)
    assert list(kept.state()) == ["average.ema.w"]


def test_the_averages_of_snapshots_do_not_hold_the_base():
    kept, values = trained_for(4, 0, with_snapshots=True)
    assert list(kept.state()) == ["average.0.05.w", "average.0.1.w"]
    for length, average in kept.snapshots().items():
        edges = (np.arange(5) / 4) ** (power(length) + 1)
        assert average["w"].item() == pytest.approx(np.diff(edges) @ values, rel=1e-6)


def test_the_ema_is_in_the_network_within_a_block_only():
    kept, values = trained_for(4, 0.9, with_snapshots=True)
    weight = kept.trained["w"]
    with pytest.raises(ZeroDivisionError), kept.applied():
        assert torch.equal(weight.detach(), kept.tensors["ema"]["w"])
        raise ZeroDivisionError
    assert weight.item() == pytest.approx(values[-1], rel=1e-6)


# --------------------------------------------------------------------------------------------------
# Post-hoc EMA.


def test_the_product_of_two_profiles_is_its_integral():
    def integrand(s, t_a, gamma_a, t_b, gamma_b):
        return profile(s, t_a, gamma_a) * profile(s, t_b, gamma_b)

    pairs = [(1, 7, 1, 7), (0.5, 7, 1, 17), (1, 17, 0.5, 7), (3, 0, 2, 0), (0.9, 40, 1, 0.5)]
    for pair in pairs:
        end = min(pair[0], pair[2])
        expected, _ = quad(integrand, 0, end, pair, epsabs=1e-13, epsrel=1e-12, limit=200)
        value = averages.profile_product(*pair)
        assert float(value) == pytest.approx(expected, rel=1e-8)


def test_an_average_that_was_kept_is_returned():
    for k, one_hot in enumerate(np.eye(len(TIMES))):
        coefficients = averages.ema_coefficients(TIMES, LENGTHS, LENGTHS[k], TIMES[k])
        np.testing.assert_allclose(coefficients, one_hot, atol=1e-8)


def test_the_default_time_is_the_latest_wherever_it_stands():
    """The last of these times is the earliest."""
    times, lengths = TIMES[::-1], LENGTHS[::-1]
    coefficients = averages.ema_coefficients(times, lengths, 0.1)
    np.testing.assert_allclose(coefficients, np.eye(8)[0], atol=1e-8)


@pytest.mark.parametrize("sigma_rel, time", [(0.03, None), (0.07, None), (0.2, None), (0.1, 0.6)])
def test_coefficients_are_the_least_squares_fit_of_the_profile(sigma_rel, time):
    """Against the published formula, and against a fit of the profiles on a fine grid."""
    coefficients = averages.ema_coefficients(TIMES, LENGTHS, sigma_rel, time)
    assert coefficients.shape == (8,)
    assert coefficients.sum() == pytest.approx(1, abs=1e-12)
    kept = [(t, power(length)) for t, length in zip(TIMES, LENGTHS)]
    wanted = (time or 1.0, power(sigma_rel))

    products = np.array([[product(*a, *b) for b in kept] for a in kept])
    expected = np.linalg.solve(products, [product(*a, *wanted) for a in kept])
    np.testing.assert_allclose(coefficients, expected / expected.sum(), rtol=1e-10, atol=1e-10)

    s = (np.arange(20000) + 0.5) / 20000
    columns = np.stack([profile(s, *a) for a in kept], 1)
    fit = np.linalg.lstsq(columns, profile(s, *wanted), rcond=None)[0]
    np.testing.assert_allclose(coefficients, fit / fit.sum(), atol=2e-3)


def test_the_published_coefficients():
    """Of 8 x 2 snapshots, 8 are negative for 0.135, with an L1 norm of 1.54; 0.03 needs more."""
    times, lengths = zip(*itertools.product(np.arange(1, 9) / 8, [0.05, 0.1]))
    wide = averages.ema_coefficients(times, lengths, 0.135)
    assert (wide < 0).sum() == 8
    assert np.abs(wide).sum() == pytest.approx(1.54, abs=0.01)
    narrow = averages.ema_coefficients(times, lengths, 0.03)
    assert narrow.max() == pytest.approx(2.33, abs=0.01)
    assert narrow.min() == pytest.approx(-1.73, abs=0.01)


def test_the_unit_of_time_and_the_order_do_not_matter():
    times, lengths = np.array(TIMES), np.array(LENGTHS)
    expected = averages.ema_coefficients(times, lengths, 0.15)
    in_iterations = averages.ema_coefficients(times * 4000, lengths, 0.15)
    np.testing.assert_allclose(in_iterations, expected, atol=1e-9)
    order = np.random.default_rng(0).permutation(8)
    mixed = averages.ema_coefficients(times[order], lengths[order], 0.15)
    np.testing.assert_allclose(mixed, expected[order], atol=1e-9)


@pytest.mark.parametrize("sigma_rel, error", [(0.07, 0.02), (0.2, 0.05)])
def test_an_average_of_another_length_is_reconstructed(sigma_rel, error):
    """Of a smooth path, to a few hundredths of what the nearest kept average is off by."""

    def path(t):
        return np.array([math.sin(3 * t), math.exp(-2 * t), t**2, 1 / (1 + 4 * t)])

    average = {length: np.zeros(4) for length in (0.05, 0.1, sigma_rel)}
    kept = []
    for step in range(1, 801):
        for length in average:
            decay = averages.power_decay(step, length)
            average[length] = decay * average[length] + (1 - decay) * path(step / 800)
        if step % 100 == 0:
            for length in (0.05, 0.1):
                kept.append((step, length, average[length]))
    times, lengths, values = zip(*kept)
    made = averages.ema_coefficients(times, lengths, sigma_rel) @ np.stack(values)

    def distance(value):
        return np.linalg.norm(value - average[sigma_rel])

    assert distance(made) < error * min(distance(average[0.05]), distance(average[0.1]))


# --------------------------------------------------------------------------------------------------
# Over the checkpoints of a merge.


def view(iteration="", sigma_rel=""):
    """A checkpoint that is an average, or is none."""
    return SimpleNamespace(facts={"iteration": iteration, "sigma_rel": sigma_rel})


def test_only_averages_have_a_coefficient():
    views = [view("10"), view("10", "0.05"), view("10", "0.1"), view(), view("20", "0.05")]
    rows = averages.sweep(views, [0.07, 0.2])
    assert rows.shape == (2, 5) and rows.dtype == torch.float64
    for row, length in zip(rows.numpy(), (0.07, 0.2)):
        expected = averages.ema_coefficients([10, 10, 20], [0.05, 0.1, 0.05], length)
        np.testing.assert_allclose(row[[1, 2, 4]], expected, rtol=1e-12)
        assert row[0] == row[3] == 0
    assert len(averages.sweep(views[:2], [0.07])) == 0
    with pytest.raises(ValueError, match="0.05 of iteration 20"):
        averages.sweep([*views, views[4]], [0.07])


def test_the_rivals_are_each_checkpoint_the_mean_and_each_length():
    """Models of two runs have the same name in different folders."""
    views = [view("10", "0.05"), view("20", "0.05"), view("20", "0.1")]
    paths = ["a/model", "b/model", "c/00010.safetensors"]
    rivals = averages.rivals(views, paths, [0.07, 0.2])
    names = ["a/model", "b/model", "00010", "uniform average", "EMA 0.07", "EMA 0.2"]
    assert list(rivals) == names
    rows = torch.stack(list(rivals.values()))
    assert torch.equal(rows[:3], torch.eye(3, dtype=torch.float64))
    assert torch.equal(rows[3], torch.full((3,), 1 / 3, dtype=torch.float64))
    assert torch.equal(rows[4:], averages.sweep(views, [0.07, 0.2]))


def test_averages_of_two_runs_have_no_other_length():
    """Two seeds have the same iteration and length."""
    views = [view("20", "0.05"), view("20", "0.1"), view("20", "0.1")]
    rivals = averages.rivals(views, ["a/1", "a/2", "b/2"], [0.07])
    assert list(rivals) == ["1", "a/2", "b/2", "uniform average"]
