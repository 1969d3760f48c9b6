"""What a few pictures do to the distance between distributions.

The expected values are brute force: numpy's moments and SVDs, scipy's matrix roots, loops over
pairs and finite differences, not the module's own functions.
"""

import numpy as np
import pytest
import scipy.linalg
import torch

from dist_reward import (
    KernelReplace,
    SubsetReplace,
    frechet_distance,
    kernel_sums,
    moments,
    price_groups,
    sqrt_psd,
    trace_root_change,
)

HOWS = "exact", "potential"


# --------------------------------------------------------------------------------------------------
# Data, and the same quantities by other means.


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def cloud(*shape, seed=0, shift=0.0, scale=1.0):
    """Correlated features [..., D], float32; their distribution depends on D, shift and scale."""
    D = shape[-1]
    mix = 0.4 * randn(D, D, seed=99) / D**0.5 + 0.7 * torch.eye(D)
    return (scale * randn(*shape, seed=seed) @ mix + shift).float()


def covariance(D, rank, seed):
    factor = randn(D, rank, seed=seed)
    return factor @ factor.T / rank


def array(x):
    return torch.as_tensor(x).double().numpy()


def numpy_moments(features):
    x = array(features)
    return x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))


def naive_fid(generated, real):
    """The FID of features. The trace of the root is a nuclear norm: exact at any rank."""
    x, y = array(generated), array(real)
    x_factor = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    y_factor = (y - y.mean(0)) / (len(y) - 1) ** 0.5
    cross = np.linalg.svd(x_factor @ y_factor.T, compute_uv=False).sum()
    mean_term = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return mean_term + (x_factor**2).sum() + (y_factor**2).sum() - 2 * cross


def naive_frechet(mu1, sigma1, mu2, sigma2):
    """The Frechet distance with scipy's matrix root: at full rank."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    mean_term = ((mu1 - mu2) ** 2).sum()
    return mean_term + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real


def cubic(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def naive_kid(generated, real):
    x, y = array(generated), array(real)

    def mean_of_pairs(z):
        return cubic(z, z)[~np.eye(len(z), dtype=bool)].mean()

    return mean_of_pairs(x) + mean_of_pairs(y) - 2 * cubic(x, y).mean()


def naive(kind):
    return naive_kid if kind == "kid" else naive_fid


def make(kind, reference, real):
    if kind == "kid":
        return KernelReplace(reference, real)
    return SubsetReplace(reference, *numpy_moments(real))


def replaced(reference, index, new):
    changed = reference.clone()
    changed[index] = new
    return changed


def brute_force(kind, reference, real, new, index):
    """The reward of each of G sets, as the definition has it."""
    distance = naive(kind)
    before = distance(reference, real)
    falls = [before - distance(replaced(reference, index, x), real) for x in new]
    return torch.tensor(falls)


def optimal_map(S, C):
    """T with T S T = C, by scipy's roots."""
    root = scipy.linalg.sqrtm(S).real
    inverse = np.linalg.inv(root)
    return inverse @ scipy.linalg.sqrtm(root @ C @ root).real @ inverse


def along_mixture(kind, reference, real, points, eps=1e-3):
    """The derivative of the distance as weight / M moves to each of points [n, D], by differences.

    KID's is that of the V-statistic, which KID tends to as M grows.
    """
    x, y, points = array(reference), array(real), array(points)
    M = len(x)
    everything = np.concatenate([x, points])
    m, C = numpy_moments(real)
    unbiased = numpy_moments(x)[1] / M  # the unbiased covariance less the biased one

    def distance(i, weight):
        w = np.concatenate([np.full(M, 1 / M), np.zeros(len(points))])
        w[M + i] += weight / M
        if kind == "kid":
            among = w @ cubic(everything, everything) @ w
            return among - 2 * w @ cubic(everything, y).mean(1)
        mean = w @ everything
        centred = everything - mean
        return naive_frechet(mean, (centred.T * w) @ centred + unbiased, m, C)

    slopes = [distance(i, eps) - distance(i, -eps) for i in range(len(points))]
    return np.array(slopes) / (2 * eps)


both = pytest.mark.parametrize("kind", ["fid", "kid"])


# --------------------------------------------------------------------------------------------------
# Moments and the Frechet distance.


@pytest.mark.parametrize("M, D", [(30, 1), (4, 9)])
def test_moments_are_those_of_numpy(M, D):
    x = cloud(M, D, shift=3.0)
    expected_mu, expected_sigma = numpy_moments(x)
    for shard in (4096, 7):
        mu, sigma = moments(x, shard)
        assert mu.dtype == sigma.dtype == torch.float64
        assert sigma.shape == (D, D)
        np.testing.assert_allclose(mu, expected_mu, rtol=1e-12)
        np.testing.assert_allclose(sigma, expected_sigma, rtol=1e-10, atol=1e-13)


def test_the_root_squared_is_the_matrix():
    for matrix in (covariance(7, 20, 0), covariance(7, 3, 1), torch.zeros(2, 2)):
        root = sqrt_psd(matrix)
        torch.testing.assert_close(root @ root, matrix.double(), atol=1e-12, rtol=0)
        torch.testing.assert_close(root, root.T, atol=1e-12, rtol=0)
        assert torch.linalg.eigvalsh(root).min() > -1e-7


@pytest.mark.parametrize("D", [1, 3, 16])
def test_the_eigenvalue_form_is_that_of_a_matrix_square_root(D):
    for seed in range(3):
        first = randn(D, seed=seed), covariance(D, 2 * D, seed)
        second = randn(D, seed=9 + seed), 2 * covariance(D, 3 * D, 9 + seed)
        arrays = [moment.numpy() for moment in (*first, *second)]
        expected = pytest.approx(naive_frechet(*arrays), rel=1e-9)
        assert frechet_distance(*first, *second) == expected
        assert frechet_distance(*second, *first) == expected
        assert frechet_distance(*arrays) == expected


@pytest.mark.parametrize("M, R, D", [(6, 40, 12), (7, 5, 20)])
def test_the_frechet_distance_of_singular_covariances(M, R, D):
    x, y = cloud(M, D), cloud(R, D, seed=1, shift=0.3, scale=1.5)
    assert frechet_distance(*moments(x), *moments(y)) == pytest.approx(naive_fid(x, y), rel=1e-6)


def test_the_frechet_distance_of_points_and_of_diagonal_gaussians():
    point = torch.zeros(4), torch.zeros(4, 4)
    assert frechet_distance(*point, torch.ones(4), torch.eye(4)) == pytest.approx(4 + 4)

    mu1, mu2 = randn(6), randn(6, seed=1)
    std1, std2 = randn(6, seed=2).abs(), randn(6, seed=3).abs()
    expected = ((mu1 - mu2) ** 2 + (std1 - std2) ** 2).sum().item()
    distance = frechet_distance(mu1, (std1**2).diag(), mu2, (std2**2).diag())
    assert distance == pytest.approx(expected, rel=1e-10)


def test_the_frechet_distance_of_equals_is_zero_and_never_negative():
    for rank in (3, 20):
        mu, sigma = randn(8), covariance(8, rank, 1)
        assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-6
        assert frechet_distance(mu, sigma, mu + 0.1, sigma) == pytest.approx(8 * 0.01, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# The change of the trace of the root.

# Powers of ten of the smallest and the largest eigenvalue.
SPECTRA = {
    "plain": (-1, 1),
    "wide": (-8, 4),
    "zeros": (-1, 1),
    "small": (-13, -11),
    "large": (11, 12),
}


def low_rank_change(D, r, spectrum, G=3):
    """Members that leave and others that come -> eigenvalues [D], rows [G, r, D], core [r, r], and
    the change of the trace of the root [G] by singular values.

    A sum x^T x changes by r outer products, + or -. An invertible matrix mixes the rows, so that
    core is dense.
    """
    eigenvalues = torch.logspace(*SPECTRA[spectrum], D, dtype=torch.float64)
    if spectrum == "zeros":
        eigenvalues = eigenvalues * (torch.arange(D) % 3 != 1)
    orthonormal = torch.linalg.qr(randn(2 * D + r, D))[0]
    members = orthonormal * eigenvalues.sqrt()  # x^T x = diag(eigenvalues)
    leave = r // 2
    scale = eigenvalues.mean().sqrt() / D**0.5
    come = 2 * scale * randn(G, r - leave, D, seed=1)

    sign = torch.cat([torch.ones(r - leave), -torch.ones(leave)]).double()
    mix = torch.linalg.qr(randn(r, r, seed=2))[0] * torch.linspace(0.5, 2, r)
    changed = torch.cat([come, members[:leave].expand(G, leave, D)], 1)
    rows = torch.linalg.inv(mix).T @ changed
    core = mix @ (sign[:, None] * mix.T)

    before = np.sqrt(array(eigenvalues)).sum()
    after = []
    for x in come:
        matrix = np.concatenate([members[leave:], x])
        after.append(np.linalg.svd(matrix, compute_uv=False).sum())
    return eigenvalues, rows, core, np.array(after) - before


@pytest.mark.parametrize(
    "D, r, spectrum",
    [
        (1, 2, "plain"),
        (5, 1, "wide"),
        (64, 1, "zeros"),
        (64, 2, "small"),
        (64, 15, "wide"),
        (64, 16, "large"),  # the largest rank that is integrated
        (64, 17, "plain"),
        (24, 24, "small"),
        (24, 60, "zeros"),
    ],
)
def test_the_change_of_the_trace_of_the_root(D, r, spectrum):
    eigenvalues, rows, core, expected = low_rank_change(D, r, spectrum)
    assert abs(expected).min() > 0
    change = trace_root_change(eigenvalues, rows, core)
    assert change.shape == (3,)
    largest = float(eigenvalues.max()) ** 0.5
    atol = 2e-6 * largest if spectrum in ("wide", "zeros") else 0
    np.testing.assert_allclose(change, expected, rtol=1e-6, atol=atol)


def test_the_change_at_the_width_of_a_real_network():
    """The largest rank that is integrated, and more sets than one part of the sum has room for."""
    eigenvalues, rows, core, expected = low_rank_change(256, 64, "plain", G=13)
    np.testing.assert_allclose(trace_root_change(eigenvalues, rows, core), expected, rtol=1e-6)


def test_nothing_changed_is_no_change():
    eigenvalues, rows, core, _ = low_rank_change(64, 8, "plain")
    assert trace_root_change(eigenvalues, rows, 0 * core).tolist() == [0, 0, 0]
    assert trace_root_change(eigenvalues, 0 * rows, core).tolist() == [0, 0, 0]


# --------------------------------------------------------------------------------------------------
# The value and the running sums.


@pytest.mark.parametrize(
    "kind, M, R, D",
    [
        ("fid", 40, 60, 8),
        ("fid", 12, 60, 20),
        ("fid", 4100, 300, 3),  # more than one shard
        ("kid", 40, 60, 8),
        ("kid", 30, 50, 1),
    ],
)
def test_the_value_is_the_distance(kind, M, R, D):
    x, y = cloud(M, D), cloud(R, D, seed=1, shift=0.3, scale=1.5)
    assert make(kind, x, y).value() == pytest.approx(naive(kind)(x, y), rel=1e-6)
    assert make(kind, y, x).value() == pytest.approx(naive(kind)(y, x), rel=1e-6)


def test_the_fid_far_from_zero_and_its_moments():
    x, y = cloud(40, 6, shift=50.0), cloud(60, 6, seed=1, shift=48.0)
    pool = make("fid", x, y)
    shift, sigma = pool.moments()
    np.testing.assert_allclose(shift, array(x).mean(0) - array(y).mean(0), rtol=1e-10)
    np.testing.assert_allclose(sigma, numpy_moments(x)[1], rtol=1e-9, atol=1e-12)
    assert pool.fid() == pool.value() == pytest.approx(naive_fid(x, y), rel=1e-9)
    assert 0 <= make("fid", x, x).fid() < 1e-8


def test_kid_by_loops_over_pairs():
    x, y = cloud(5, 3).tolist(), cloud(4, 3, seed=1).tolist()

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b)) / 3 + 1) ** 3

    def mean_of_pairs(rows):
        total = 0
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                if i != j:
                    total += kernel(a, b)
        return total / (len(rows) * (len(rows) - 1))

    across = sum(kernel(a, b) for a in x for b in y) / 20
    expected = mean_of_pairs(x) + mean_of_pairs(y) - 2 * across
    value = KernelReplace(torch.tensor(x), torch.tensor(y)).value()
    assert value == pytest.approx(expected, rel=1e-6)


def test_kid_is_unbiased():
    values = []
    for i in range(400):
        x, y = cloud(10, 3, seed=2 * i), cloud(12, 3, seed=2 * i + 1)
        values.append(KernelReplace(x, y).value())
    error = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values)) < 4 * error
    assert min(values) < 0

    # With the terms of a picture and itself it would be off by far more than that.
    x = array(cloud(4000, 3))
    own = ((x**2).sum(1) / 3 + 1) ** 3
    other = cubic(x[:2000], x[2000:])
    assert (own.mean() - other.mean()) / 10 > 8 * error


def test_kernel_sums_in_shards():
    x, y = cloud(5, 4), cloud(23, 4, seed=1)
    expected = cubic(array(x), array(y)).sum(1)
    np.testing.assert_allclose(kernel_sums(x, y, shard=7), expected, rtol=1e-12)


def assert_sums_close(sums, expected):
    for a, b in zip(sums, expected):
        assert (a - b).norm() <= 1e-12 * b.norm()


@both
def test_after_every_replacement_the_sums_are_those_computed_anew(kind):
    x, y = cloud(30, 7, shift=2.0), cloud(50, 7, seed=1)
    before = x.clone()
    expected = x.clone()
    pool = make(kind, x, y)
    random = np.random.default_rng(0)
    for step in range(60):
        K = int(random.integers(1, 31))
        index = torch.as_tensor(random.permutation(30)[:K])
        shift, scale = float(random.normal()), float(random.uniform(0.1, 3))
        new = cloud(K, 7, seed=100 + step, shift=shift, scale=scale)
        pool.replace(index, new)
        expected[index] = new
        if step % 20 == 0:
            assert pool.value() == pytest.approx(naive(kind)(expected, y), rel=1e-6)
        assert torch.equal(pool.features, expected)
        assert_sums_close(pool.sums, make(kind, expected, y).sums)
    assert torch.equal(x, before)  # the caller's own

    value = pool.value()
    assert pool.refresh() < 1e-12
    assert pool.value() == pytest.approx(value, rel=1e-9)
    assert_sums_close(pool.sums, pool.compute_sums())


@both
def test_float64_features_are_summed_as_they_are_kept(kind):
    """Only float32 is kept: sums of anything more exact would drift."""
    pool = make(kind, cloud(12, 5), cloud(20, 5, seed=1))
    for step in range(20):
        pool.replace(torch.tensor([3, 0, 7]), randn(3, 5, seed=step))
    assert pool.refresh() < 1e-13


@both
def test_refresh_reports_the_drift_and_ends_it(kind):
    x, y = cloud(20, 6, shift=1.0), cloud(50, 6, seed=1)
    other = cloud(20, 6, seed=2, scale=2.0)
    pool = make(kind, x, y)
    value = pool.value()
    for which, factor, drift in ((0, 2.0, 1), (1, 1.5, 0.5), (1, 0.75, 0.25)):
        pool.sums[which].mul_(factor)
        assert pool.refresh() == pytest.approx(drift)
        assert pool.refresh() == 0
        assert pool.value() == pytest.approx(value, rel=1e-12)

    # With new members it reports the drift of the old sums, and is then like a new object.
    kept = other.clone()
    assert pool.refresh(other) == 0
    fresh = make(kind, other, y)
    new, index = cloud(2, 3, 6, seed=3), torch.tensor([4, 0, 9])
    assert pool.value() == fresh.value()
    assert torch.equal(pool.features, other)
    for how in HOWS:
        assert torch.equal(pool.price(new, index, how), fresh.price(new, index, how))
    pool.replace(index, new[0])
    assert torch.equal(other, kept)


@both
def test_a_state_copied_in_place_is_the_same_object_again(kind):
    x, y = cloud(20, 6), cloud(50, 6, seed=1)
    new, index = cloud(2, 3, 6, seed=3), torch.tensor([4, 0, 9])
    pool = make(kind, x, y)
    for step in range(30):  # now its sums are rounded otherwise than fresh ones
        pool.replace(torch.arange(step, step + 5) % 20, cloud(5, 6, seed=10 + step))

    other = make(kind, torch.zeros(20, 6), y)
    assert list(other.state()) == ["reference.features", "reference.sums.0", "reference.sums.1"]
    for name, tensor in other.state().items():
        tensor.copy_(pool.state()[name])
    assert other.value() == pool.value() != make(kind, x, y).value()
    for how in HOWS:
        assert torch.equal(other.price(new, index, how), pool.price(new, index, how))
    pool.replace(index, new[1])
    other.replace(index, new[1])
    assert other.value() == pool.value()
    assert torch.equal(other.features, pool.features)
    assert other.refresh() == pool.refresh()


# --------------------------------------------------------------------------------------------------
# The exact price.


@pytest.mark.parametrize(
    "kind, M, R, D, K",
    [
        ("fid", 40, 60, 6, 40),  # all members
        ("fid", 90, 150, 64, 8),  # the largest set whose change is integrated
        ("fid", 90, 150, 64, 9),  # and just beyond
        ("fid", 30, 20, 64, 4),  # fewer pictures than dimensions
        ("fid", 2, 5, 3, 1),
        ("kid", 40, 60, 6, 5),
        ("kid", 30, 20, 64, 30),
    ],
)
def test_the_exact_price_is_the_fall_of_the_distance(kind, M, R, D, K):
    x, y = cloud(M, D, scale=0.7), cloud(R, D, seed=1, shift=0.4)
    index = torch.randperm(M, generator=torch.Generator().manual_seed(2))[:K]
    new = cloud(5, K, D, seed=3, shift=0.2, scale=1.3)
    new_before = new.clone()
    pool = make(kind, x, y)
    distance = naive(kind)(x, y)
    atol = 1e-6 * abs(distance)

    price = pool.price(new, index)
    expected = brute_force(kind, x, y, new, index)
    assert price.shape == (5,)
    assert price.dtype == torch.float64
    torch.testing.assert_close(price, expected, rtol=0, atol=atol)
    assert expected.abs().max() > 1e-4 * abs(distance)
    assert torch.equal(new, new_before)
    assert torch.equal(pool.features, x)

    # What was paid is what happens, and the next price is of what is there then.
    pool.replace(index, new[3])
    assert distance - pool.value() == pytest.approx(price[3].item(), abs=atol)
    expected = brute_force(kind, replaced(x, index, new[3]), y, new, index)
    torch.testing.assert_close(pool.price(new, index), expected, rtol=0, atol=atol)


def test_the_exact_price_at_the_width_of_a_real_network():
    x, y = cloud(300, 256), cloud(400, 256, seed=1, shift=0.1)
    new, index = cloud(3, 32, 256, seed=2, scale=1.2), torch.arange(40, 72)
    expected = brute_force("fid", x, y, new, index)
    price = make("fid", x, y).price(new, index)
    torch.testing.assert_close(price, expected, rtol=0, atol=1e-6 * naive_fid(x, y))


@pytest.mark.parametrize("kind, M, D", [("fid", 20, 64), ("kid", 40, 6)])
def test_copies_are_priced_like_others(kind, M, D):
    x, y = cloud(M, D), cloud(100, D, seed=1, shift=0.4)
    new, index = cloud(5, 4, D, seed=2), torch.tensor([3, 11, 0, 12])
    for copy in (11, 12, 17):  # some copies of member 3 leave, one stays
        x[copy] = x[3]
    new[0] = new[0, :1]  # all the same
    new[1, 2] = new[1, 0]
    new[2, 1] = x[17]  # a copy of one that stays
    new[3, 0] = x[0]  # a copy of one that leaves
    expected = brute_force(kind, x, y, new, index)
    price = make(kind, x, y).price(new, index)
    torch.testing.assert_close(price, expected, rtol=0, atol=1e-6 * naive(kind)(x, y))


def test_the_exact_price_at_the_edge_of_the_rank():
    """A singular covariance before or after: a determinant that rounds to 0 must not become a
    reward of minus infinity.
    """
    x, y = cloud(64, 64, seed=50), cloud(100, 64, seed=1, shift=0.4)
    new = cloud(400, 1, 64, seed=5)
    price = make("fid", x, y).price(new, torch.tensor([0]))
    expected = brute_force("fid", x, y, new, [0])
    torch.testing.assert_close(price, expected, rtol=0, atol=1e-6 * naive_fid(x, y))


@pytest.mark.parametrize("K, spread", [(1, 0), (4, 1e-5), (12, 1e-1)])
def test_the_exact_price_in_a_collapsed_reference(K, spread):
    """All members are (nearly) the same: the change exceeds all that the reference has."""
    x, y = 2 + spread * cloud(80, 64), cloud(200, 64, seed=1, shift=0.4)
    new, index = cloud(3, K, 64, seed=2), torch.arange(K)
    expected = brute_force("fid", x, y, new, index)
    torch.testing.assert_close(make("fid", x, y).price(new, index), expected, rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------------------
# The potential.


@both
def test_the_potential_is_the_derivative_along_a_mixture(kind):
    x, y = cloud(50, 7), cloud(60, 7, seed=1, shift=0.3, scale=1.4)
    new, index = cloud(4, 3, 7, seed=2), torch.tensor([5, 0, 31])
    price = make(kind, x, y).price(new, index, "potential")
    assert price.shape == (4, 3)
    assert price.dtype == torch.float64
    come = along_mixture(kind, x, y, new.flatten(0, 1)).reshape(4, 3)
    leave = along_mixture(kind, x, y, x[index])
    atol = 1e-5 * price.abs().max().item()
    np.testing.assert_allclose(price, leave - come, rtol=1e-5, atol=atol)


def potential_with(bend, mean_slope, mu, features):
    """The documented form: 2 (mu - m).(f - mu) + (f - mu)^T (I - T) (f - mu), bend = I - T."""
    x = array(features) - mu
    return 2 * x @ mean_slope + np.einsum("...i,ij,...j->...", x, bend, x)


@pytest.mark.parametrize("M, D", [(50, 7), (30, 1)])
def test_the_gradient_of_the_potential_is_twice_the_way_to_the_optimal_map(M, D):
    x, y = cloud(M, D, scale=0.8), cloud(60, D, seed=1, shift=0.3, scale=1.4)
    index = torch.tensor([5, 0, 17])
    (mu, S), (m, C) = numpy_moments(x), numpy_moments(y)
    T = optimal_map(S, C)
    np.testing.assert_allclose(T @ S @ T, C, rtol=1e-9, atol=1e-12)

    pool = make("fid", x, y)
    new = randn(4, 3, D, seed=2)
    bend = np.eye(D) - T
    phi_new = potential_with(bend, mu - m, mu, new)
    phi_old = potential_with(bend, mu - m, mu, x[index])
    price = pool.price(new, index, "potential")
    np.testing.assert_allclose(price, -(phi_new - phi_old) / M, rtol=1e-8, atol=1e-10)

    mapped = m + (array(new) - mu) @ T
    for i, step in enumerate(torch.eye(D, dtype=torch.float64)):
        above = pool.price(new + 0.5 * step, index, "potential")
        below = pool.price(new - 0.5 * step, index, "potential")
        expected = 2 * (array(new) - mapped)[..., i]
        np.testing.assert_allclose(-M * (above - below), expected, rtol=1e-7, atol=1e-8)


def test_the_potential_is_made_of_the_gradient_of_the_distance_in_the_moments():
    """2 (mu - m) in the mean and I - T in the covariance, by differences of scipy's distance."""
    D, eps = 5, 1e-4
    x, y = cloud(40, D), cloud(60, D, seed=1, shift=0.3, scale=1.4)
    (mu, S), (m, C) = numpy_moments(x), numpy_moments(y)
    units = np.eye(D)

    def slope(mean_step, covariance_step):
        above = naive_frechet(mu + eps * mean_step, S + eps * covariance_step, m, C)
        below = naive_frechet(mu - eps * mean_step, S - eps * covariance_step, m, C)
        return (above - below) / (2 * eps)

    of_mean = np.array([slope(e, 0 * S) for e in units])
    of_covariance = np.empty((D, D))
    for i, a in enumerate(units):
        for j, b in enumerate(units):
            of_covariance[i, j] = slope(0 * mu, (np.outer(a, b) + np.outer(b, a)) / 2)
    np.testing.assert_allclose(of_mean, 2 * (mu - m), atol=1e-6)
    np.testing.assert_allclose(of_covariance, units - optimal_map(S, C), atol=1e-6)

    new, index = randn(3, 1, D, seed=4), torch.tensor([3])
    phi_new = potential_with(of_covariance, of_mean / 2, mu, new)
    phi_old = potential_with(of_covariance, of_mean / 2, mu, x[index])
    price = make("fid", x, y).price(new, index, "potential")
    np.testing.assert_allclose(price, -(phi_new - phi_old) / 40, atol=1e-6)


@both
def test_the_potential_tends_to_the_exact_price_of_one(kind):
    """The reference is written down again and again: M grows and the distribution stays. The error
    of M * price falls like 1 / M.
    """
    x, y = cloud(40, 6), cloud(60, 6, seed=1, shift=0.3)
    new, index = cloud(6, 1, 6, seed=2, scale=1.5), torch.tensor([7])
    errors = []
    for copies in (20, 40):
        pool = make(kind, x.repeat(copies, 1), y)
        exact = 40 * copies * pool.price(new, index)
        first_order = 40 * copies * pool.price(new, index, "potential")[:, 0]
        errors.append((first_order - exact).abs().max() / exact.abs().max())
    assert errors[0] < 0.05
    assert 0.4 * errors[0] < errors[1] < 0.6 * errors[0]


def test_the_potential_ranks_as_the_exact_price_does_and_promises_more():
    x, y = cloud(1000, 16, scale=0.8), cloud(500, 16, seed=1, shift=0.3)
    pool, index = make("fid", x, y), torch.arange(4)
    qualities = [cloud(50, 4, 16, seed=i, shift=0.2 * i, scale=0.5 + 0.5 * i) for i in range(4)]
    new = torch.cat(qualities)
    exact = pool.price(new, index)
    potential = pool.price(new, index, "potential").sum(1)
    assert np.corrcoef(exact, potential)[0, 1] > 0.99
    assert (potential - exact).mean() > 0  # the distance is convex


def test_where_there_is_no_variance_the_eigenvalues_are_floored():
    x, y = cloud(20, 32), cloud(100, 32, seed=1, shift=0.3)
    new, index = cloud(4, 2, 32, seed=2), torch.tensor([3, 8])
    (mu, S), (m, C) = numpy_moments(x), numpy_moments(y)
    R = scipy.linalg.sqrtm(C).real
    eigenvalues, U = np.linalg.eigh(R @ S @ R)
    floored = eigenvalues.clip(1e-6 * eigenvalues.max())
    bend = np.eye(32) - R @ U @ np.diag(floored**-0.5) @ U.T @ R
    phi_new = potential_with(bend, mu - m, mu, new)
    phi_old = potential_with(bend, mu - m, mu, x[index])
    price = make("fid", x, y).price(new, index, "potential")
    np.testing.assert_allclose(price, -(phi_new - phi_old) / 20, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Every price.


@pytest.mark.parametrize(
    "kind, how", [("fid", "exact"), ("fid", "potential"), ("kid", "exact"), ("kid", "potential")]
)
def test_the_old_ones_again_are_worth_nothing(kind, how):
    x, y = cloud(20, 64), cloud(100, 64, seed=1, shift=0.4)
    index = torch.tensor([3, 11, 0, 12])
    pool = make(kind, x, y)
    price = pool.price(x[index].expand(2, 4, 64), index, how)
    assert price.shape == ((2, 4) if how == "potential" else (2,))
    assert price.abs().max() < 1e-9 * pool.value()


@pytest.mark.parametrize("kind, how", [("fid", "potential"), ("kid", "exact")])
def test_what_is_nearer_to_the_real_has_a_positive_price(kind, how):
    x, y = cloud(400, 8, shift=2.0), cloud(400, 8, seed=1)
    near, far = cloud(5, 6, 8, seed=2), cloud(5, 6, 8, seed=3, shift=4.0)
    pool, index = make(kind, x, y), torch.arange(10, 16)
    assert pool.price(near, index, how).reshape(5, -1).sum(1).min() > 0
    assert pool.price(far, index, how).reshape(5, -1).sum(1).max() < 0


def test_a_reference_of_equal_members_has_prices():
    """Its covariance is zero. The exact price is still the fall of the distance."""
    real = torch.zeros(4), torch.eye(4)
    pool = SubsetReplace(torch.ones(100, 4), *real)
    new, index = randn(2, 3, 4).float(), torch.arange(3)
    assert pool.price(new, index, "potential").isfinite().all()
    expected = []
    for x in new:
        after = frechet_distance(*moments(replaced(torch.ones(100, 4), index, x)), *real)
        expected.append(pool.fid() - after)
    assert pool.price(new, index).tolist() == pytest.approx(expected, rel=1e-5)


@both
def test_an_unknown_price_is_refused(kind):
    pool = make(kind, cloud(10, 3), cloud(20, 3, seed=1))
    with pytest.raises(ValueError, match="'linear'.*exact or potential"):
        pool.price(cloud(2, 1, 3), torch.tensor([0]), "linear")


# --------------------------------------------------------------------------------------------------
# Groups.


@pytest.mark.parametrize(
    "kind, P, K, oldest",
    [
        ("fid", 6, 3, 28),  # 30 members: the sets go round the end
        ("fid", 6, 0, 28 + 5 * 30),
        ("fid", 4, 1, 0),
        ("kid", 6, 3, 28),
        ("kid", 6, 0, 25),
        ("kid", 4, 1, 28 + 5 * 30),
    ],
)
def test_a_set_earns_what_replacing_the_oldest_is_worth(kind, P, K, oldest):
    x, y = cloud(30, 5), cloud(60, 5, seed=1, shift=0.4)
    new = cloud(P, 4, 5, seed=2)
    rewards = price_groups(make(kind, x, y), new, oldest, "exact", K)
    assert rewards.shape == (P, 4)
    size = K or P
    for first in range(0, P, size):
        members = [(oldest + first + i) % 30 for i in range(size)]
        sets = new[first : first + size].transpose(0, 1)  # one picture of each group of the block
        expected = brute_force(kind, x, y, sets, members) * 30 / size
        for p in range(first, first + size):
            assert torch.equal(rewards[p], rewards[first])  # rivals differ, companions do not
            torch.testing.assert_close(rewards[p], expected, rtol=0, atol=1e-6 * naive(kind)(x, y))
    assert rewards.std(1).min() > 0


@pytest.mark.parametrize("kind, K, oldest", [("fid", 2, 28), ("kid", 0, 88), ("kid", 1, 0)])
def test_each_picture_earns_its_own_potential(kind, K, oldest):
    x, y = cloud(30, 5), cloud(60, 5, seed=1, shift=0.4)
    new = cloud(4, 3, 5, seed=2)
    rewards = price_groups(make(kind, x, y), new, oldest, replace=K)
    members = [(oldest + p) % 30 for p in range(4)]
    leave = along_mixture(kind, x, y, x[members])
    come = along_mixture(kind, x, y, new.flatten(0, 1)).reshape(4, 3)
    expected = -30 * (come - leave[:, None])
    np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


def test_sets_that_do_not_divide_the_groups_are_refused():
    pool = make("fid", cloud(30, 5), cloud(60, 5, seed=1))
    for K in (4, 7):
        with pytest.raises(ValueError, match=f"{K} pictures do not divide 6"):
            price_groups(pool, cloud(6, 2, 5), 0, "exact", K)
