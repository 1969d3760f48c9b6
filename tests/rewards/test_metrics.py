"""The metrics by their definitions: loops over pictures, and resamples written out."""

import itertools
import math

import numpy as np
import pytest
import torch

from dist_reward import KernelReplace, frechet_distance, moments
from rewards import metrics


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def ones(n):
    return torch.ones(1, n, dtype=torch.float64)


def repeated(counts):
    """A row of counts written out: the number of each picture, as often as it was drawn."""
    index = []
    for picture, count in enumerate(counts.tolist()):
        index += [picture] * int(count)
    return index


# --------------------------------------------------------------------------------------------------
# How different pictures are.


def entropy(eigenvalues):
    return -sum(v * math.log(v) for v in eigenvalues if v > 0)


def naive_vendi(features, scale):
    x = features.double().numpy()
    kernel = np.exp(-((x[:, None] - x[None]) ** 2).sum(2) / (2 * scale**2))
    return math.exp(entropy(np.linalg.eigvals(kernel / len(x)).real))


def test_vendi_counts_the_different_pictures():
    one = randn(1, 5)
    assert metrics.vendi_score(one.expand(7, 5), 1.0) == pytest.approx(1, abs=1e-6)
    assert metrics.vendi_score(100 * torch.eye(7), 1.0) == pytest.approx(7, abs=1e-6)

    piles = torch.cat([one.expand(6, 5), one.expand(2, 5) + 100])
    expected = math.exp(entropy([3 / 4, 1 / 4]))
    assert metrics.vendi_score(piles, 1.0) == pytest.approx(expected, rel=1e-6)

    pair = torch.tensor([[0.0], [1.0]])
    k = math.exp(-1 / (2 * 0.8**2))
    expected = math.exp(entropy([(1 + k) / 2, (1 - k) / 2]))
    assert metrics.vendi_score(pair, 0.8) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n, D, scale, seed", [(5, 3, 1.0, 0), (12, 8, 2.5, 1), (20, 2, 0.5, 2)])
def test_vendi_by_its_definition(n, D, scale, seed):
    features = randn(n, D, seed=seed)
    expected = naive_vendi(features, scale)
    score = metrics.vendi_score(features, scale)
    assert score == pytest.approx(expected, rel=1e-8)
    assert metrics.vendi_score(features.float(), scale) == pytest.approx(expected, rel=1e-4)
    assert 1 < metrics.vendi_score(features, 2 * scale) < score < n


def test_the_mean_distance_by_its_definition():
    features = randn(6, 4)
    distances = []
    for i in range(6):
        for j in range(i):
            distances.append(math.dist(features[i].tolist(), features[j].tolist()))
    assert metrics.mean_distance(features) == pytest.approx(np.mean(distances), rel=1e-12)
    assert metrics.mean_distance(features[:1].expand(5, 4)) == 0


def test_the_expected_number_of_values_by_exhaustion():
    """All sequences of four pictures of three values."""
    frequencies = np.array([0.5, 0.3, 0.2])
    expected = 0.0
    for drawn in itertools.product(range(3), repeat=4):
        shares = np.bincount(drawn, minlength=3) / 4
        entropy = -sum(share * math.log(share) for share in shares if share)
        expected += math.exp(entropy) * frequencies[list(drawn)].prod()
    assert metrics.expected_values(frequencies, 4) == pytest.approx(expected, abs=0.02)
    assert metrics.expected_values(np.full(9, 1 / 9), 10**6) == pytest.approx(9, abs=1e-3)
    assert metrics.expected_values(np.full(9, 1 / 9), 1) == 1


def test_modes_of_real_pictures_are_1_and_lost_values_are_seen():
    random = np.random.default_rng(0)
    attributes = {"shape": list("abc"), "cell": list(range(9))}
    real = {"frequencies_shape": np.array([0.6, 0.3, 0.1]), "frequencies_cell": np.full(9, 1 / 9)}
    P, n = 200, 24
    shapes = random.choice(3, (P, n), p=real["frequencies_shape"])
    cells = random.choice(9, (P, n))
    asked = torch.full((P, 2), -1)
    asked[:50, 0] = 1  # a quarter of the prompts name the shape
    values = torch.from_numpy(np.stack([shapes, cells], 2))
    found = metrics.modes(values, asked, attributes, real)
    assert list(found) == ["modes", "modes_shape", "modes_cell"]
    assert found["modes_shape"][:50].isnan().all() and not found["modes_shape"][50:].isnan().any()
    torch.testing.assert_close(found["modes"][:50], found["modes_cell"][:50])
    for value in found.values():
        assert value.nanmean().item() == pytest.approx(1, abs=0.02)

    # Three of nine cells are gone: with this many pictures, six ninths are left.
    few = torch.from_numpy(random.choice(6, (1, 10**5)))
    both = torch.stack([torch.zeros_like(few), few], 2)
    found = metrics.modes(both, torch.tensor([[0, -1]]), attributes, real)
    assert list(found) == ["modes", "modes_cell"]
    assert found["modes"].item() == pytest.approx(6 / 9, abs=1e-3)
    one = metrics.modes(torch.zeros_like(both), torch.tensor([[0, -1]]), attributes, real)
    assert one["modes_cell"].item() == pytest.approx(1 / 9, abs=1e-3)
    assert metrics.modes(both, torch.tensor([[0, 1]]), attributes, real) == {}


def test_the_smallest_distance():
    x = torch.tensor([[0.0, 0], [3, 4], [3, 4.5], [10, 0]])
    assert metrics.smallest_distance(x) == 0.5
    assert metrics.smallest_distance(x[:2]) == 5
    assert metrics.smallest_distance(x[[0, 0, 1]]) == 0


# --------------------------------------------------------------------------------------------------
# Generated against real pictures.


def naive_radius(pictures, i, k):
    """The distance of picture i to its k-th nearest other."""
    others = [math.dist(pictures[i], other) for j, other in enumerate(pictures) if j != i]
    return sorted(others)[k - 1]


def naive_neighbourhoods(generated, real, k):
    generated, real = generated.tolist(), real.tolist()
    real_radii = [naive_radius(real, j, k) for j in range(len(real))]
    generated_radii = [naive_radius(generated, i, k) for i in range(len(generated))]
    in_real = np.zeros((len(generated), len(real)))
    in_generated = np.zeros((len(generated), len(real)))
    for i, x in enumerate(generated):
        for j, y in enumerate(real):
            in_real[i, j] = math.dist(x, y) <= real_radii[j]
            in_generated[i, j] = math.dist(x, y) <= generated_radii[i]
    return {
        "precision": in_real.max(1),
        "recall": in_generated.max(0),
        "density": in_real.sum(1) / k,
        "coverage": in_real.max(0),
    }


@pytest.mark.parametrize(
    "n, m, D, k, shift, seed",
    [(12, 15, 2, 3, 0.0, 0), (20, 9, 3, 5, 0.7, 1), (8, 8, 1, 1, 1.5, 2), (30, 30, 2, 5, 2.0, 3)],
)
def test_neighbourhoods_by_brute_force(n, m, D, k, shift, seed):
    generated = 0.6 * randn(n, D, seed=seed) + shift
    real = randn(m, D, seed=seed + 100)
    expected = naive_neighbourhoods(generated, real, k)
    for shard in (3, 1000):
        values = metrics.neighbourhoods(generated, real, k, shard)
        assert values.keys() == expected.keys()
        for name, value in values.items():
            assert value.tolist() == pytest.approx(expected[name].tolist()), name
    means = {round(value.mean(), 6) for value in expected.values()}
    assert len(means) > 1  # the four are not one number here


def test_neighbourhoods_of_equal_and_of_disjoint_sets():
    x = randn(40, 3)
    equal = {name: value.mean().item() for name, value in metrics.neighbourhoods(x, x).items()}
    assert equal["precision"] == equal["recall"] == equal["coverage"] == 1
    # Each lies in its own neighbourhood and, on average, in those of k others.
    assert equal["density"] == pytest.approx(1 + 1 / 5)
    for value in metrics.neighbourhoods(x + 1000, x).values():
        assert value.sum() == 0

    # One good picture again and again: precise, and nothing is recalled but itself.
    copies = metrics.neighbourhoods(x[:1].expand(40, 3), x)
    assert copies["precision"].mean() == 1
    assert copies["recall"].sum() == 1
    assert 0 < copies["coverage"].mean() < 0.5


def test_too_few_pictures_have_no_neighbourhoods():
    with pytest.raises(ValueError, match="5 pictures have no 5-th"):
        metrics.neighbourhoods(randn(5, 3), randn(40, 3))


# --------------------------------------------------------------------------------------------------
# The bootstrap.


@pytest.mark.parametrize("name", ["vendi", "distance", "fid", "mean"])
def test_a_resample_is_the_metric_of_the_pictures_it_draws(name):
    x = 3 + randn(12, 4)
    real = moments(2 * randn(50, 4, seed=1) - 1)
    counts = metrics.resample_counts(12, 8, (0, 1))
    if name == "vendi":
        values = metrics.resampled_vendi(x, counts, 1.3)
    elif name == "distance":
        values = metrics.resampled_distance(x, counts)
    elif name == "fid":
        values = metrics.resampled_fid(x, counts, *real)
    else:
        values = metrics.resampled_mean(x[:, 0], counts)

    expected = []
    for row in counts:
        drawn = x[repeated(row)]
        if name == "vendi":
            expected.append(metrics.vendi_score(drawn, 1.3))
        elif name == "distance":
            expected.append(metrics.mean_distance(drawn))
        elif name == "fid":
            expected.append(frechet_distance(*moments(drawn), *real))
        else:
            expected.append(drawn[:, 0].mean().item())
    assert values.tolist() == pytest.approx(expected, rel=1e-6)


def naive_kid(x, y):
    x, y = x.tolist(), y.tolist()

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b)) / len(a) + 1) ** 3

    def mean_of_pairs(rows):
        total = 0
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                if i != j:
                    total += kernel(a, b)
        return total / (len(rows) * (len(rows) - 1))

    across = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    return mean_of_pairs(x) + mean_of_pairs(y) - 2 * across


@pytest.mark.parametrize("shard", [4, 1000])
def test_kid_by_a_double_loop(shard):
    x, y = randn(9, 4), 1.3 * randn(14, 4, seed=1) + 0.4
    counts = metrics.resample_counts(9, 6, (3, 0))
    values = metrics.resampled_kid(x, counts, y, shard)
    assert values[0].item() == pytest.approx(KernelReplace(x, y).value(), rel=1e-5)
    expected = [naive_kid(x[repeated(row)], y) for row in counts]
    assert values.tolist() == pytest.approx(expected, rel=1e-9)


def test_the_fid_of_samples_of_two_gaussians():
    std = torch.tensor([1.0, 2.0, 0.5]).double()
    std_real = torch.tensor([1.5, 1.0, 0.5]).double()
    shift = torch.tensor([0.3, 0, -0.4]).double()
    expected = (shift.square().sum() + (std - std_real).square().sum()).item()
    features = randn(40000, 3) * std + shift
    mu_real = torch.zeros(3).double()
    value = metrics.resampled_fid(features, ones(40000), mu_real, (std_real**2).diag())
    assert value.item() == pytest.approx(expected, abs=0.03)


def test_resamples_are_draws_with_replacement_and_a_function_of_their_key():
    def draw(*key):
        return metrics.resample_counts(20, 5, key)

    assert torch.equal(draw(0, 1), draw(0, 1))
    assert not torch.equal(draw(0, 1), draw(0, 2))
    assert not torch.equal(draw(0, 1), draw(1, 1))

    counts = metrics.resample_counts(10, 4000, (0,))
    assert counts.shape == (4001, 10)
    assert (counts[0] == 1).all()
    assert (counts.sum(1) == 10).all()
    many = counts[1:]
    assert many.var().item() == pytest.approx(0.9, abs=0.03)
    torch.testing.assert_close(many.mean(0), ones(10)[0], atol=0.06, rtol=0)


def test_the_interval_of_a_mean_holds_the_truth_95_times_in_100():
    held = 0
    widths = []
    for trial in range(200):
        values = 2 + randn(40, seed=trial)
        counts = metrics.resample_counts(40, 200, (trial,))
        low, high = metrics.interval(metrics.resampled_mean(values, counts))
        held += low < 2 < high
        widths.append(high - low)
    assert 0.90 <= held / 200 <= 0.99
    assert np.mean(widths) == pytest.approx(2 * 1.96 / math.sqrt(40), rel=0.1)


def test_the_interval_of_a_biased_metric_is_about_the_estimate():
    """A resample of 60 of 60 has about 38 different pictures, and a far higher Frechet distance."""
    real = torch.zeros(16).double(), torch.eye(16).double()
    counts = metrics.resample_counts(60, 100, (0,))
    values = metrics.resampled_fid(randn(60, 16), counts, *real)
    low, high = metrics.interval(values)
    assert low < values[0] < high < values[1:].mean()
    lower, upper = np.quantile(values[1:], [0.025, 0.975])
    assert high - low == pytest.approx(float(upper - lower))


def test_without_resamples_there_is_no_interval():
    low, high = metrics.interval(torch.tensor([3.0]))
    assert math.isnan(low)
    assert math.isnan(high)


def test_even_numbers():
    assert metrics.evenly(3, 5) == [0, 1, 2]
    assert metrics.evenly(10, 5) == [0, 2, 4, 6, 8]
    assert metrics.evenly(7, 3) == [0, 2, 4]
