"""What a few pictures are worth to the distance between distributions: by brute force, with SVDs and scipy's roots, not the module's own."""
import numpy as np
import pytest
import scipy.linalg
import torch

from dist_reward import KernelReplace, SubsetReplace, bend_factors, frechet_distance, kernel_sums, moments, price_groups, quadratic_form, trace_root_change

HOWS = "exact", "quadratic", "potential"


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cloud(*shape, seed=0, shift=0.0, scale=1.0):
    """Correlated features [..., D], float32, of a distribution that depends on D, shift and scale alone."""
    mix = 0.4 * randn(shape[-1], shape[-1], seed=99) / shape[-1] ** 0.5 + 0.7 * torch.eye(shape[-1])
    return (scale * randn(*shape, seed=seed) @ mix + shift).float()


def array(x):
    return torch.as_tensor(x).double().numpy()


def real_moments(real):
    return array(real).mean(0), np.atleast_2d(np.cov(array(real), rowvar=False))


def naive_fid(x, y):
    """Of generated and real features; the trace of the root is a nuclear norm, which is accurate for singular covariances too."""
    x, y = array(x), array(y)
    a, b = (x - x.mean(0)) / (len(x) - 1) ** 0.5, (y - y.mean(0)) / (len(y) - 1) ** 0.5
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()


def naive_frechet(mu1, sigma1, mu2, sigma2):
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(scipy.linalg.sqrtm(sigma1 @ sigma2)).real


def naive_kid(x, y):
    x, y = array(x), array(y)
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    different = lambda a: kernel(a, a)[~np.eye(len(a), dtype=bool)].mean()
    return different(x) + different(y) - 2 * kernel(x, y).mean()


def fid_pool(reference, real):
    return SubsetReplace(reference, *real_moments(real))


KINDS = {"fid": (fid_pool, naive_fid), "kid": (KernelReplace, naive_kid)}
both = pytest.mark.parametrize("kind", KINDS)


def moved(reference, index, new):
    changed = reference.clone()
    changed[index] = new
    return changed


def brute_force(naive, reference, real, new, index):
    """The reward of each of G rollouts, as the definition has it."""
    return torch.tensor([naive(reference, real) - naive(moved(reference, index, x), real) for x in new])


def optimal_map(S, C):
    root = scipy.linalg.sqrtm(S).real
    back = np.linalg.inv(root)
    return back @ scipy.linalg.sqrtm(root @ C @ root).real @ back


def along_mixture(kind, reference, real, points, eps=1e-3):
    """d/d eps of the distance, with weight eps / M of the generated distribution moved to each of points [n, D], by central differences."""
    x, y, points = array(reference), array(real), array(points)
    M, D = x.shape
    everything = np.concatenate([x, points])
    m, C = real_moments(real)
    unbiased = np.atleast_2d(np.cov(x, rowvar=False)) - np.atleast_2d(np.cov(x, rowvar=False, bias=True))

    def distance(i, eps):
        w = np.concatenate([np.full(M, 1 / M), np.zeros(len(points))])
        w[M + i] += eps / M
        if kind == "kid":                                                # the V-statistic: what KID tends to with M
            k = lambda a, b: (a @ b.T / D + 1) ** 3
            return w @ k(everything, everything) @ w - 2 * w @ k(everything, y).mean(1)
        centred = everything - w @ everything                            # the total weight is 1 after a pair of calls: old ones are taken off
        return naive_frechet(w @ everything, (centred.T * w) @ centred + unbiased, m, C)
    return np.array([(distance(i, eps) - distance(i, -eps)) / (2 * eps) for i in range(len(points))])


# ---------------------------------------------------------------------------------------------------------------------
# Moments and the trace of the root.

@pytest.mark.parametrize("M, D", [(40, 5), (21, 5), (4, 9), (2, 3), (30, 1)])
def test_moments_are_numpy_s(M, D):
    x = cloud(M, D, shift=3.0)
    for shard in (4096, 7):
        mu, sigma = moments(x, shard)
        assert mu.dtype == sigma.dtype == torch.float64 and sigma.shape == (D, D)
        np.testing.assert_allclose(mu, array(x).mean(0), rtol=1e-12)
        np.testing.assert_allclose(sigma, np.atleast_2d(np.cov(array(x), rowvar=False)), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("M, R, D", [(40, 30, 8), (30, 50, 1), (6, 40, 12), (7, 5, 20)])
def test_the_naive_distance_is_the_frechet_distance(M, R, D):
    x, y = cloud(M, D), cloud(R, D, seed=1, shift=0.3, scale=1.5)
    expected = naive_fid(x, y)
    assert frechet_distance(*moments(x), *moments(y)) == pytest.approx(expected, rel=1e-6)
    if min(M, R) > D:
        assert naive_frechet(*real_moments(x), *real_moments(y)) == pytest.approx(expected, rel=1e-10)


SPECTRA = {"plain": (-1, 1), "wide": (-8, 4), "zeros": (-1, 1), "small": (-13, -11), "large": (11, 12)}


def low_rank_change(D, r, spectrum, G=3):
    """l [D], Z [G, r, D], core [r, r] of members that leave and others that come, and the change of the trace by singular values.

    The change of a sum x^T x is a sum of r rows' outer products, + or -; an invertible matrix mixes the rows, so that core is dense.
    """
    l = torch.logspace(*SPECTRA[spectrum], D, dtype=torch.float64)
    l = l * (torch.arange(D) % 3 != 1) if spectrum == "zeros" else l
    scale = l.mean().sqrt() / D**0.5
    members = torch.linalg.qr(randn(2 * D + r, D))[0] * l.sqrt()         # x^T x = diag(l)
    leave = r // 2
    come = 2 * scale * randn(G, r - leave, D, seed=1)
    sign = torch.cat([torch.ones(r - leave), -torch.ones(leave)]).double()
    mix = torch.linalg.qr(randn(r, r, seed=2))[0] * torch.linspace(0.5, 2, r)
    Z = torch.linalg.inv(mix).T @ torch.cat([come, members[:leave].expand(G, leave, D)], 1)
    core = mix @ (sign[:, None] * mix.T)
    after = [np.linalg.svd(np.concatenate([members[leave:], x]), compute_uv=False).sum() for x in come]
    return l, Z, core, np.array(after) - np.sqrt(array(l)).sum()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("D, r", [(1, 2), (5, 1), (64, 1), (64, 2), (64, 15), (64, 16), (64, 17), (24, 24), (24, 60)])
def test_the_change_of_the_trace_of_the_root(D, r, spectrum):
    l, Z, core, expected = low_rank_change(D, r, spectrum)
    assert core.shape == (r, r) and abs(expected).min() > 0
    change = trace_root_change(l, Z, core)
    assert change.shape == (3,)
    by_numpy = np.array([np.sqrt(np.linalg.eigvalsh(np.diag(l) + z.T @ array(core) @ z).clip(0)).sum() for z in array(Z)]) - np.sqrt(l.numpy()).sum()
    top = float(l.max()) ** 0.5
    np.testing.assert_allclose(change, expected, rtol=1e-6, atol=2e-6 * top if spectrum in ("wide", "zeros") else 0)
    np.testing.assert_allclose(change, by_numpy, rtol=1e-6, atol=2e-6 * top if spectrum in ("wide", "zeros") else 0)


@pytest.mark.parametrize("G, r", [(24, 32), (2, 64)])                   # several shards of the integral; the largest rank that is integrated
def test_the_change_at_the_width_of_a_real_network(G, r):
    l, Z, core, expected = low_rank_change(256, r, "plain", G)
    np.testing.assert_allclose(trace_root_change(l, Z, core), expected, rtol=1e-6)


def test_nothing_changed_is_no_change():
    l, Z, core, _ = low_rank_change(64, 8, "plain")
    assert trace_root_change(l, Z, 0 * core).tolist() == trace_root_change(l, 0 * Z, core).tolist() == [0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The running sums.

@both
@pytest.mark.parametrize("M, R, D", [(40, 60, 8), (12, 60, 20), (30, 50, 1), (4100, 300, 3)])   # more than a shard of both
def test_value_is_the_distance(kind, M, R, D):
    make, naive = KINDS[kind]
    x, y = cloud(M, D), cloud(R, D, seed=1, shift=0.3, scale=1.5)
    assert make(x, y).value() == pytest.approx(naive(x, y), rel=1e-6)
    assert make(y, x).value() == pytest.approx(naive(y, x), rel=1e-6)


def test_fid_is_the_value_and_its_moments_are_numpy_s():
    x, y = cloud(40, 6, shift=50.0), cloud(60, 6, seed=1, shift=48.0)
    pool = fid_pool(x, y)
    shift, sigma = pool.moments()
    np.testing.assert_allclose(shift, array(x).mean(0) - array(y).mean(0), rtol=1e-10)
    np.testing.assert_allclose(sigma, np.cov(array(x), rowvar=False), rtol=1e-9, atol=1e-12)
    assert pool.fid() == pool.value() == pytest.approx(naive_fid(x, y), rel=1e-9)
    assert 0 <= fid_pool(x, x).fid() < 1e-8


def test_kid_by_loops_over_pairs():
    x, y = cloud(5, 3).tolist(), cloud(4, 3, seed=1).tolist()
    kernel = lambda a, b: (sum(p * q for p, q in zip(a, b)) / 3 + 1) ** 3
    different = lambda s: sum(kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j) / (len(s) * (len(s) - 1))
    expected = different(x) + different(y) - 2 * sum(kernel(a, b) for a in x for b in y) / 20
    assert KernelReplace(torch.tensor(x), torch.tensor(y)).value() == pytest.approx(expected, rel=1e-6)


def test_kid_is_unbiased():
    values = np.array([KernelReplace(cloud(10, 3, seed=2 * i), cloud(12, 3, seed=2 * i + 1)).value() for i in range(400)])
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean()) < 4 * error and values.min() < 0
    x = array(cloud(4000, 3))
    own, other = ((x**2).sum(1) / 3 + 1) ** 3, ((x[:2000] @ x[2000:].T) / 3 + 1) ** 3
    assert (own.mean() - other.mean()) / 10 > 8 * error                  # what it would be off by with the terms of a picture and itself


def test_kernel_sums_in_shards():
    x, y = cloud(5, 4), cloud(23, 4, seed=1)
    np.testing.assert_allclose(kernel_sums(x, y, shard=7), ((array(x) @ array(y).T / 4 + 1) ** 3).sum(1), rtol=1e-12)


def sums_close(a, b, rel=1e-12):
    return all((p - q).norm() <= rel * q.norm() for p, q in zip(a, b))


@both
def test_the_sums_follow_every_replacement(kind):
    make, naive = KINDS[kind]
    x, y, kept = cloud(30, 7, shift=2.0), cloud(50, 7, seed=1), cloud(30, 7, shift=2.0)
    pool, rng, expected = make(x, y), np.random.default_rng(0), x.clone()
    for step in range(300):
        K = int(rng.integers(1, 31))
        index = torch.as_tensor(rng.permutation(30)[:K])
        new = cloud(K, 7, seed=100 + step, shift=float(rng.normal()), scale=float(rng.uniform(0.1, 3)))
        pool.replace(index, new)
        expected[index] = new
        if step % 20 == 0:
            assert pool.value() == pytest.approx(naive(expected, y), rel=1e-6)                   # nothing stale is kept from before
        assert torch.equal(pool.features, expected)
        assert sums_close(pool.sums, pool.recomputed())
        fresh = make(expected, y)
        assert sums_close(pool.sums, fresh.sums)
    assert torch.equal(x, kept)                                          # the caller's own
    value = pool.value()
    assert pool.refresh() < 1e-12 and pool.value() == pytest.approx(value, rel=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(pool.sums, pool.recomputed()))


@both
def test_float64_pictures_are_kept_as_they_are_summed(kind):
    """Only float32 is kept: a sum of anything more exact would drift."""
    pool, index = KINDS[kind][0](cloud(12, 5), cloud(20, 5, seed=1)), torch.tensor([3, 0, 7])
    for step in range(20):
        pool.replace(index, randn(3, 5, seed=step))
    assert pool.refresh() < 1e-13


@both
def test_refresh_reports_the_drift_and_ends_it(kind):
    make, _ = KINDS[kind]
    x, y, other = cloud(20, 6, shift=1.0), cloud(50, 6, seed=1), cloud(20, 6, seed=2, scale=2.0)
    pool, value = make(x, y), make(x, y).value()
    for which, factor, drift in ((0, 2.0, 1), (1, 1.5, 0.5), (1, 0.75, 0.25)):
        pool.sums[which].mul_(factor)
        assert pool.refresh() == pytest.approx(drift) and pool.refresh() == 0
        assert pool.value() == pytest.approx(value, rel=1e-12)
    kept = other.clone()
    assert pool.refresh(other) == 0                                      # the drift of the old one, not the distance of the new
    fresh, new, index = make(other, y), cloud(2, 3, 6, seed=3), torch.tensor([4, 0, 9])
    assert pool.value() == fresh.value() and torch.equal(pool.features, other)
    assert all(torch.equal(pool.price(new, index, how), fresh.price(new, index, how)) for how in HOWS)
    pool.replace(index, new[0])
    assert torch.equal(other, kept) and not torch.equal(pool.features, other)


@both
def test_a_state_copied_in_place_is_the_same_object_again(kind):
    make, _ = KINDS[kind]
    x, y, index, new = cloud(20, 6), cloud(50, 6, seed=1), torch.tensor([4, 0, 9]), cloud(2, 3, 6, seed=3)
    pool = make(x, y)
    for step in range(30):                                               # its sums are now rounded otherwise than fresh ones
        pool.replace(torch.arange(step, step + 5) % 20, cloud(5, 6, seed=10 + step))
    saved = {name: tensor.clone() for name, tensor in pool.state().items()}
    other = make(torch.zeros(20, 6), y)
    assert saved.keys() == other.state().keys()
    for name, tensor in other.state().items():
        tensor.copy_(saved[name])
    assert other.value() == pool.value() != make(x, y).value()
    assert all(torch.equal(other.price(new, index, how), pool.price(new, index, how)) for how in HOWS)
    for one in (pool, other):
        one.replace(index, new[1])
    assert other.value() == pool.value() and torch.equal(other.features, pool.features) and other.refresh() == pool.refresh()


# ---------------------------------------------------------------------------------------------------------------------
# The exact price.

@both
@pytest.mark.parametrize("M, R, D, K", [
    (40, 60, 6, 1), (40, 60, 6, 5), (40, 60, 6, 40),                     # one, some, all of them
    (90, 150, 64, 1), (90, 150, 64, 8), (90, 150, 64, 9),                # the integral, and just beyond
    (30, 150, 64, 1), (30, 150, 64, 6), (30, 150, 64, 30),               # fewer pictures than dimensions
    (30, 20, 64, 4), (80, 20, 64, 4), (6, 40, 1, 2), (2, 5, 3, 1)])
def test_the_exact_price_is_the_fall_of_the_distance(kind, M, R, D, K):
    make, naive = KINDS[kind]
    x, y = cloud(M, D, scale=0.7), cloud(R, D, seed=1, shift=0.4)
    index, new = torch.randperm(M, generator=torch.Generator().manual_seed(2))[:K], cloud(5, K, D, seed=3, shift=0.2, scale=1.3)
    pool, kept = make(x, y), new.clone()
    price = pool.price(new, index)
    expected = brute_force(naive, x, y, new, index)
    assert price.shape == (5,) and price.dtype == torch.float64
    close = dict(rtol=0, atol=1e-6 * abs(naive(x, y)))
    torch.testing.assert_close(price, expected, **close)
    assert expected.abs().max() > 1e-4 * abs(naive(x, y)) and torch.equal(new, kept) and torch.equal(pool.features, x)
    if kind == "kid":
        assert torch.equal(pool.price(new, index, "quadratic"), price)
    pool.replace(index, new[3])                                          # what was paid is what happens, and the next price is of what is there
    assert naive(x, y) - pool.value() == pytest.approx(price[3].item(), abs=close["atol"])
    torch.testing.assert_close(pool.price(new, index), brute_force(naive, moved(x, index, new[3]), y, new, index), **close)


def test_the_exact_price_at_the_width_of_a_real_network():
    x, y, new, index = cloud(300, 256), cloud(400, 256, seed=1, shift=0.1), cloud(3, 32, 256, seed=2, scale=1.2), torch.arange(40, 72)
    expected = brute_force(naive_fid, x, y, new, index)
    torch.testing.assert_close(fid_pool(x, y).price(new, index), expected, rtol=0, atol=1e-6 * naive_fid(x, y))


@both
@pytest.mark.parametrize("M, D", [(40, 6), (40, 64), (20, 64)])
def test_copies_are_priced_like_others(kind, M, D):
    make, naive = KINDS[kind]
    x, y, new, index = cloud(M, D), cloud(100, D, seed=1, shift=0.4), cloud(5, 4, D, seed=2), torch.tensor([3, 11, 0, 12])
    x[11] = x[12] = x[17] = x[3]                                         # some of them leave, one stays
    new[0] = new[0, :1]                                                  # all the same
    new[1, 2] = new[1, 0]
    new[2, 1] = x[17]                                                    # of one that stays
    new[3, 0] = x[0]                                                     # of one that leaves
    torch.testing.assert_close(make(x, y).price(new, index), brute_force(naive, x, y, new, index), rtol=0, atol=1e-6 * naive(x, y))


@pytest.mark.parametrize("M", [16, 63, 64, 65])
def test_no_rollout_of_many_is_priced_amiss_at_the_edge_of_the_rank(M):
    """A singular covariance before or after: a determinant that rounds to 0 must not become a reward of minus infinity."""
    x, y, new = cloud(M, 64, seed=50), cloud(100, 64, seed=1, shift=0.4), cloud(400, 1, 64, seed=5)
    price, expected = fid_pool(x, y).price(new, torch.tensor([0])), brute_force(naive_fid, x, y, new, [0])
    torch.testing.assert_close(price, expected, rtol=0, atol=1e-6 * naive_fid(x, y))


@pytest.mark.parametrize("spread", [0, 1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize("K", [1, 4, 12])
def test_the_exact_price_in_a_collapsed_reference(K, spread):
    """All members (nearly) the same: the change is beyond all that the reference has."""
    x, y = 2 + spread * cloud(80, 64), cloud(200, 64, seed=1, shift=0.4)
    new, index = cloud(3, K, 64, seed=2), torch.arange(K)
    expected = brute_force(naive_fid, x, y, new, index)
    torch.testing.assert_close(fid_pool(x, y).price(new, index), expected, rtol=1e-6, atol=0)


@both
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("M, D", [(40, 6), (20, 64), (90, 64)])
def test_the_old_ones_again_are_worth_nothing(kind, how, M, D):
    x, y, index = cloud(M, D), cloud(100, D, seed=1, shift=0.4), torch.tensor([3, 11, 0, 12])
    pool = KINDS[kind][0](x, y)
    price = pool.price(x[index].expand(2, 4, D), index, how)
    assert price.shape == ((2, 4) if how == "potential" else (2,)) and price.abs().max() < 1e-9 * pool.value()


@both
@pytest.mark.parametrize("how", HOWS)
def test_what_comes_nearer_to_the_real_is_worth_more_than_nothing(kind, how):
    x, y = cloud(400, 8, shift=2.0), cloud(400, 8, seed=1)
    near, far = cloud(5, 6, 8, seed=2), cloud(5, 6, 8, seed=3, shift=4.0)
    pool, index = KINDS[kind][0](x, y), torch.arange(10, 16)
    of_set = lambda new: pool.price(new, index, how).reshape(5, -1).sum(1)
    assert of_set(near).min() > 0 > of_set(far).max()


# ---------------------------------------------------------------------------------------------------------------------
# The approximate prices.

@pytest.mark.parametrize("D", [6, 64])                                   # exact by eigenvalues; by the integral
def test_the_quadratic_price_errs_by_the_third_order(D):
    x, y, index = cloud(3 * D, D), cloud(5 * D, D, seed=1, shift=0.3), torch.arange(3, 8)
    pool, direction = fid_pool(x, y), cloud(6, 5, D, seed=2)

    def error(eps):
        new = x[index].double() + eps * direction.double()
        return pool.price(new, index, "quadratic") - pool.price(new, index)
    coarse, fine = error(0.04), error(0.02)
    large = coarse.abs() > 0.1 * coarse.abs().max()                      # not where the third order happens to vanish
    ratio = (coarse / fine)[large]
    assert large.sum() >= 3 and 6 < ratio.min() and ratio.max() < 10.5


def test_the_quadratic_price_ranks_as_the_exact_one_does():
    x, y, index = cloud(1000, 16, scale=0.8), cloud(500, 16, seed=1, shift=0.3), torch.arange(4)
    pool, new = fid_pool(x, y), torch.cat([cloud(50, 4, 16, seed=i, shift=0.2 * i, scale=0.5 + 0.5 * i) for i in range(4)])
    exact, quadratic, potential = pool.price(new, index), pool.price(new, index, "quadratic"), pool.price(new, index, "potential").sum(1)
    assert np.corrcoef(exact, quadratic)[0, 1] > 0.999 and np.corrcoef(exact, potential)[0, 1] > 0.99
    assert (quadratic - exact).abs().mean() < 0.1 * (potential - exact).abs().mean()             # the second order is of use
    assert (potential - exact).mean() > 0                                # the distance is convex: summed, first-order gains are too large


@both
def test_the_potential_is_the_derivative_along_a_mixture(kind):
    x, y, index, new = cloud(50, 7), cloud(60, 7, seed=1, shift=0.3, scale=1.4), torch.tensor([5, 0, 31]), cloud(4, 3, 7, seed=2)
    pool = KINDS[kind][0](x, y)
    price = pool.price(new, index, "potential")
    assert price.shape == (4, 3) and price.dtype == torch.float64
    comes, leaves = along_mixture(kind, x, y, new.flatten(0, 1)).reshape(4, 3), along_mixture(kind, x, y, x[index])
    scale = price.abs().max().item()
    np.testing.assert_allclose(price, -(comes - leaves), rtol=1e-5, atol=1e-5 * scale)


def naive_potential(x, y, f):
    """phi of f [n, D] by its documented form, with the optimal map between the Gaussians by scipy's roots."""
    (mu, S), (m, C), f = real_moments(x), real_moments(y), array(f)
    bend = np.eye(len(mu)) - optimal_map(S, C)
    return 2 * (f - mu) @ (mu - m) + np.einsum("ni,ij,nj->n", f - mu, bend, f - mu)


@pytest.mark.parametrize("M, D", [(50, 7), (30, 1)])
def test_the_potential_s_gradient_is_twice_the_way_to_the_optimal_map(M, D):
    x, y, index = cloud(M, D, scale=0.8), cloud(60, D, seed=1, shift=0.3, scale=1.4), torch.tensor([5, 0, 17])
    (mu, S), (m, C) = real_moments(x), real_moments(y)
    T, pool, new = optimal_map(S, C), fid_pool(x, y), randn(4, 3, D, seed=2)
    np.testing.assert_allclose(T @ S @ T, C, rtol=1e-9, atol=1e-12)      # it does carry the one covariance to the other
    phi = naive_potential(x, y, new.flatten(0, 1)).reshape(4, 3) - naive_potential(x, y, x[index])
    np.testing.assert_allclose(pool.price(new, index, "potential"), -phi / M, rtol=1e-8, atol=1e-10)
    for i, step in enumerate(torch.eye(D, dtype=torch.float64)):
        slope = (pool.price(new + 0.5 * step, index, "potential") - pool.price(new - 0.5 * step, index, "potential")) * -M
        expected = 2 * (array(new) - m - (array(new) - mu) @ T)[..., i]  # f - T(f), and T(f) = m + T (f - mu)
        np.testing.assert_allclose(slope, expected, rtol=1e-7, atol=1e-8)


def test_the_gradient_of_the_distance_in_the_moments():
    """2 (mu - m) and I - T: what the potential is made of, by differences of scipy's distance, and by the potential itself."""
    D, eps = 5, 1e-4
    x, y, index = cloud(40, D), cloud(60, D, seed=1, shift=0.3, scale=1.4), torch.tensor([3])
    (mu, S), (m, C) = real_moments(x), real_moments(y)
    units = np.eye(D)
    slope = lambda a, b: (naive_frechet(mu + eps * a, S + eps * b, m, C) - naive_frechet(mu - eps * a, S - eps * b, m, C)) / (2 * eps)
    of_mean = np.array([slope(e, 0 * S) for e in units])
    of_cov = np.array([[slope(0 * mu, (np.outer(a, b) + np.outer(b, a)) / 2) for a in units] for b in units])
    np.testing.assert_allclose(of_mean, 2 * (mu - m), atol=1e-6)
    np.testing.assert_allclose(of_cov, units - optimal_map(S, C), atol=1e-6)
    f, pool = randn(3, 1, D, seed=4), fid_pool(x, y)
    form = lambda f: 2 * (f - mu) @ (mu - m) + (((f - mu) @ of_cov) * (f - mu)).sum(-1)
    np.testing.assert_allclose(pool.price(f, index, "potential"), -(form(array(f)) - form(array(x[index]))) / 40, atol=1e-6)


@both
@pytest.mark.parametrize("how", ["quadratic", "potential"])
def test_the_price_of_one_tends_to_the_exact_one(kind, how):
    """With the reference written down again and again, M goes up and the distribution stays; the error of M * price goes down like 1 / M."""
    x, y, new = cloud(40, 6), cloud(60, 6, seed=1, shift=0.3), cloud(6, 1, 6, seed=2, scale=1.5)
    off = []
    for copies in (20, 40):
        pool = KINDS[kind][0](x.repeat(copies, 1), y)
        exact, ours = (40 * copies * pool.price(new, torch.tensor([7]), h).flatten() for h in ("exact", how))
        off.append((ours - exact).abs().max() / exact.abs().max())
    assert off[0] < 0.05 and (off[1] < 1e-4 if how == "quadratic" else 0.4 * off[0] < off[1] < 0.6 * off[0])


def test_where_there_is_no_variance_the_approximations_are_finite():
    """Eigenvalues are floored: neither is a size there, but the potential is still the form it says it is."""
    x, y, index, new = cloud(20, 32), cloud(100, 32, seed=1, shift=0.3), torch.tensor([3, 8]), cloud(4, 2, 32, seed=2)
    pool = fid_pool(x, y)
    assert all(pool.price(new, index, how).isfinite().all() for how in HOWS)
    (mu, S), (m, C) = real_moments(x), real_moments(y)
    R = scipy.linalg.sqrtm(C).real
    l, U = np.linalg.eigh(R @ S @ R)
    bend = np.eye(32) - R @ U @ np.diag(l.clip(1e-6 * l.max()) ** -0.5) @ U.T @ R
    form = lambda f: 2 * (f - mu) @ (mu - m) + (((f - mu) @ bend) * (f - mu)).sum(-1)
    expected = -(form(array(new)) - form(array(x[index]))) / 20
    np.testing.assert_allclose(pool.price(new, index, "potential"), expected, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What a price does not depend on.

@both
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("M, D", [(40, 6), (90, 64)])
def test_the_order_makes_no_difference(kind, how, M, D):
    x, y, index, new = cloud(M, D), cloud(100, D, seed=1, shift=0.4), torch.tensor([3, 11, 0, 12]), cloud(3, 4, D, seed=2)
    pool, order = KINDS[kind][0](x, y), torch.tensor([2, 0, 3, 1])
    price, close = pool.price(new, index, how), dict(rtol=1e-6, atol=1e-7 * pool.value())
    assert price.std(0).min() > 1e-4 * price.abs().max()
    together = pool.price(new[:, order], index[order], how)
    torch.testing.assert_close(together, price[:, order] if how == "potential" else price, **close)
    if how != "potential":
        torch.testing.assert_close(pool.price(new[:, order], index, how), price, **close)
    torch.testing.assert_close(pool.price(new[[2, 0, 1]], index, how), price[[2, 0, 1]], **close)
    torch.testing.assert_close(pool.price(new[1:2], index, how), price[1:2], **close)            # nor do the other rollouts
    members = torch.randperm(M, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(KINDS[kind][0](x[members], y).price(new, members.argsort()[index], how), price, **close)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("far", [1024.0, -1024.0])
def test_a_common_translation_makes_no_difference(how, far):
    grid = lambda f: (f * 1024).round() / 1024                           # float32 holds these exactly, here and there
    x, y, new = grid(cloud(40, 16)), grid(cloud(60, 16, seed=1, shift=0.4)), grid(cloud(3, 2, 16, seed=2))
    index, (mu, sigma) = torch.tensor([3, 11]), real_moments(y)
    here, there = SubsetReplace(x, mu, sigma), SubsetReplace(x + far, mu + far, sigma)
    assert there.fid() == pytest.approx(here.fid(), rel=1e-9)
    torch.testing.assert_close(there.price(new + far, index, how), here.price(new, index, how), rtol=1e-6, atol=1e-9)
    there.replace(index, new[0] + far), here.replace(index, new[0])
    assert there.fid() == pytest.approx(here.fid(), rel=1e-9) and there.refresh() < 1e-12


@both
@pytest.mark.parametrize("how", ["linear", "", None])
def test_an_unknown_price_is_refused(kind, how):
    pool = KINDS[kind][0](cloud(10, 3), cloud(20, 3, seed=1))
    with pytest.raises(ValueError, match=f"{how!r}"):
        pool.price(cloud(2, 1, 3), torch.tensor([0]), how)


# ---------------------------------------------------------------------------------------------------------------------
# Groups.

@both
@pytest.mark.parametrize("how", ["exact", "quadratic"])
@pytest.mark.parametrize("oldest", [0, 25, 28, 28 + 5 * 30])             # the last three go round the end
@pytest.mark.parametrize("P, K", [(6, 3), (6, 2), (6, 6), (6, 0), (4, 1)])
def test_a_set_earns_what_replacing_the_oldest_is_worth(kind, how, P, K, oldest):
    make, naive = KINDS[kind]
    x, y, new = cloud(30, 5), cloud(60, 5, seed=1, shift=0.4), cloud(P, 4, 5, seed=2)
    size = K or P
    rewards = price_groups(make(x, y), new, oldest, how, K)
    assert rewards.shape == (P, 4)
    for first in range(0, P, size):
        members = [(oldest + first + i) % 30 for i in range(size)]
        found = torch.stack([new[first:first + size, n] for n in range(4)])                      # a picture of every group of the block
        worth = brute_force(naive, x, y, found, members) if how == "exact" else make(x, y).price(found, torch.tensor(members), how)
        for p in range(first, first + size):
            assert torch.equal(rewards[p], rewards[first])               # to the bit: rivals differ, companions do not
            torch.testing.assert_close(rewards[p], worth * 30 / size, rtol=0, atol=1e-6 * naive(x, y))
    assert rewards.std(1).min() > 0


@both
@pytest.mark.parametrize("oldest", [0, 28, 88])
@pytest.mark.parametrize("K", [0, 2, 1])
def test_each_picture_earns_its_own_potential(kind, K, oldest):
    x, y, new = cloud(30, 5), cloud(60, 5, seed=1, shift=0.4), cloud(4, 3, 5, seed=2)
    rewards = price_groups(KINDS[kind][0](x, y), new, oldest, replace=K)
    leaves = along_mixture(kind, x, y, x[[(oldest + p) % 30 for p in range(4)]])
    expected = -30 * (along_mixture(kind, x, y, new.flatten(0, 1)).reshape(4, 3) - leaves[:, None])
    np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


@both
@pytest.mark.parametrize("how", HOWS)
def test_sets_that_do_not_divide_the_groups_are_refused(kind, how):
    pool = KINDS[kind][0](cloud(30, 5), cloud(60, 5, seed=1))
    for K in (4, 5, 7):
        with pytest.raises(ValueError, match=f"{K} pictures do not divide 6"):
            price_groups(pool, cloud(6, 2, 5), 0, how, K)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_the_factors_of_the_second_order_are_exact_to_rounding(spread):
    root = torch.logspace(np.log10(spread), 0, 300, dtype=torch.float64)[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    a, bend = bend_factors(root), 1 / (root[:, None] * root * (root[:, None] + root))
    assert len(a) <= 20
    assert ((a.T @ a - bend).abs() <= 1e-6 * (bend.diagonal()[:, None] * bend.diagonal()).sqrt()).all()
    new, old = cloud(2, 4, 300).double(), cloud(3, 300, seed=1).double()
    for g, form in zip(new, quadratic_form(new, old, a)):
        E = g[:-1].T @ g[:-1] - old.T @ old - g[-1:].T @ g[-1:]
        assert form.item() == pytest.approx((E**2 * bend).sum().item(), rel=1e-5)


def test_the_quadratic_price_of_many_features_is_in_float32_and_still_true():
    x, y, index, new = cloud(900, 512), cloud(1200, 512, seed=1, shift=0.1), torch.arange(6), cloud(3, 6, 512, seed=2, scale=1.1)
    pool = fid_pool(x, y)
    l, B = pool._spectrum()
    shift, sigma = pool.moments()
    change = [SubsetReplace(torch.cat([n, x[6:]]), *real_moments(y)).moments() for n in new]         # moments after, from scratch
    root = l.clamp(min=1e-6 * l.max().item()).sqrt()
    for (moved, after), price in zip(change, pool.price(new, index, "quadratic")):
        E = B.T @ (after - sigma) @ B
        cross = (E.diagonal() / (2 * root)).sum() - (E**2 / (root[:, None] * root * (root[:, None] + root))).sum() / 4
        expected = -(moved.square().sum() - shift.square().sum() + (after - sigma).trace() - 2 * cross)
        assert price.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("how", ["exact", "quadratic", "potential"])
def test_a_reference_of_equal_members_has_prices(how):
    """Its covariance is nothing; the exact price is still the change of the distance, and none is no number."""
    generator = torch.Generator().manual_seed(0)
    pool, new = SubsetReplace(torch.ones(100, 4), torch.zeros(4), torch.eye(4)), torch.randn(2, 3, 4, generator=generator)
    price = pool.price(new, torch.arange(3), how)
    assert price.isfinite().all()
    if how == "exact":
        before, members = pool.fid(), torch.ones(2, 100, 4).index_copy(1, torch.arange(3), new)
        after = [frechet_distance(*moments(m), torch.zeros(4), torch.eye(4)) for m in members]
        assert price.tolist() == pytest.approx([before - a for a in after], rel=1e-5)
