"""Metrics: how different pictures are, and how far they are from real ones, as functions of features; each with an interval.

    vendi         exp(-sum l ln l), l the eigenvalues of K/n (arXiv 2210.02410), K_ij = exp(-|f_i - f_j|^2 / 2 h^2)       1 for copies, n at most
    distance      mean (or smallest) distance of two of the pictures
    fid, kid      squared Frechet distance (arXiv 1706.08500); unbiased squared MMD, cubic kernel (arXiv 1801.01401)
    precision     share of generated pictures nearer to some real one than its k-th nearest real neighbour; recall: with the roles
                  exchanged (arXiv 1904.06991).  density: by how many real ones, over k; coverage: share of real ones reached (arXiv 2002.09797)

The interval is a bootstrap. A resample is a row of counts [n], how often each picture was drawn; row 0 is all ones, the sample itself. A
`resampled_...` function takes features [n, D] and counts [R, n] and gives [R] values, the first of which is the metric. What is drawn are the
generated pictures; recall and coverage are means over the real ones, and for them those are drawn.
Left out: intervals for the choice of the real pictures otherwise, and the bias of FID at finite n, which no resampling removes.
"""
import math
import numpy as np
import torch
from dist_reward import kernel_sums, polynomial_kernel, sqrt_psd

NEIGHBOURS = 5                                                           # k of precision, recall, density and coverage


def pairwise_distances(features, others=None):
    """features [..., n, D], others [..., m, D] (default: the same) -> Euclidean distances [..., n, m], float64; 0 exactly for equal rows."""
    others = features if others is None else others
    return torch.cdist(features.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist")


def vendi_kernel(features, scale):
    """features [n, D] -> the RBF kernel [n, n] of width `scale`."""
    return torch.exp(-pairwise_distances(features) ** 2 / (2 * scale**2))


def effective_number(kernel):
    """kernel [n, n] of trace 1 -> exp of the entropy of its eigenvalues."""
    l = torch.linalg.eigvalsh(kernel).clamp(min=0)
    return float(torch.exp(-torch.special.xlogy(l, l).sum()))


def vendi_score(features, scale):
    """features [n, D] -> the effective number of different pictures, 1 to n, with the RBF kernel of width `scale`.

    >>> round(vendi_score(torch.zeros(5, 3), 1.0), 6), round(vendi_score(100 * torch.eye(5), 1.0), 6)          # five copies; five strangers
    (1.0, 5.0)
    """
    return effective_number(vendi_kernel(features, scale) / len(features))


def mean_distance(features):
    """features [n, D] -> the mean distance of two different pictures."""
    n = len(features)
    return float(pairwise_distances(features).sum() / (n * (n - 1)))


def smallest_distance(features):
    """features [n, D] -> the distance of the two nearest pictures."""
    distances = pairwise_distances(features)
    return float(distances.fill_diagonal_(math.inf).min())


def neighbour_radii(features, k=NEIGHBOURS, shard=1000):
    """features [n, D] -> each one's distance to its k-th nearest other [n]. Raises ValueError if there are not k others."""
    if len(features) <= k:
        raise ValueError(f"{len(features)} pictures have no {k}-th nearest neighbour")
    return torch.cat([pairwise_distances(part, features).topk(k + 1, largest=False).values[:, k] for part in features.split(shard)])


def neighbourhoods(generated, real, k=NEIGHBOURS, shard=1000):
    """generated [n, D], real [m, D] -> {name: float64}: precision and density, one number a generated picture [n]; recall and coverage, one a
    real picture [m]. Their means are the metrics. Compare at equal n and m: radii shrink as pictures become more."""
    of_real, of_generated, rows = neighbour_radii(real, k, shard), neighbour_radii(generated, k, shard), []
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = recalled.clone()
    for part, radii in zip(generated.split(shard), of_generated.split(shard)):
        distances = pairwise_distances(part, real)                       # [shard, m]
        rows.append((distances <= of_real).sum(1).double())              # in how many real neighbourhoods a picture lies
        covered |= (distances <= of_real).any(0)
        recalled |= (distances <= radii[:, None]).any(0)
    inside = torch.cat(rows)
    return {"precision": (inside > 0).double(), "recall": recalled.double(), "density": inside / k, "coverage": covered.double()}


def resample_counts(n, resamples, key):
    """-> counts [1 + resamples, n], float64: ones, then draws of n with replacement; a function of the numbers in `key`."""
    drawn = np.random.default_rng(list(key)).multinomial(n, np.full(n, 1 / n), size=resamples)
    return torch.from_numpy(np.concatenate([np.ones((1, n)), drawn]))


def resampled_mean(values, counts):
    """values [n] -> [R]. The mean over prompts, or over indicators."""
    return counts @ values.double() / len(values)


def resampled_vendi(features, counts, scale):
    """As vendi_score -> [R]; a picture drawn c times is c equal rows, and these weigh the kernel like one row times sqrt(c)."""
    kernel, found = vendi_kernel(features, scale), []
    for row in counts:
        kept = row.nonzero()[:, 0]
        root = (row[kept] / row.sum()).sqrt()
        found.append(effective_number(kernel[kept][:, kept] * root[:, None] * root))
    return counts.new_tensor(found)


def resampled_distance(features, counts):
    """As mean_distance -> [R]."""
    n = len(features)
    return ((counts @ pairwise_distances(features)) * counts).sum(1) / (n * (n - 1))


def resampled_fid(features, counts, mu_real, sigma_real):
    """As dist_reward.frechet_distance to N(mu_real [D], sigma_real [D, D]) -> [R]; the real root is taken once."""
    n, x, found = len(features), features.double() - mu_real, []
    root = sqrt_psd(sigma_real)
    for row in counts:
        shift = row @ x / n
        sigma = (x * row[:, None]).T @ x - n * torch.outer(shift, shift)                     # about mu_real, so that little cancels
        sigma /= n - 1
        cross = torch.linalg.eigvalsh(root @ sigma @ root).clamp(min=0).sqrt().sum()
        found.append(max(0.0, float(shift.square().sum() + sigma.trace() + sigma_real.trace() - 2 * cross)))
    return counts.new_tensor(found)


def resampled_kid(features, counts, real, shard=1000):
    """KID to real [m, D] -> [R], unbiased for row 0, where it is dist_reward.KernelReplace(features, real).value()."""
    n, m = len(features), len(real)
    own = lambda x: (x.double().square().sum(1) / x.shape[1] + 1) ** 3                       # k(x, x), which an unbiased mean leaves out
    real_term = (sum(kernel_sums(part, real).sum() for part in real.split(shard)) - own(real).sum()) / (m * (m - 1))
    across = torch.cat([kernel_sums(part, real) for part in features.split(shard)]) / m      # [n]
    among = torch.zeros_like(counts[:, 0])
    for part, row in zip(features.split(shard), counts.split(shard, dim=1)):
        among += ((row @ polynomial_kernel(part, features)) * counts).sum(1)
    return (among - counts @ own(features)) / (n * (n - 1)) + real_term - 2 * (counts @ across) / n


def interval(values):
    """values [1 + R], the estimate and its resamples -> (low, high), 95 %: the estimate plus the quantiles of what resampling does to it.

    Centred, because a resample holds pictures twice: that raises a distance between distributions, as fewer pictures do, and lowers a
    diversity, and the plain percentiles would often not even hold the estimate. For means nothing changes. NaN if there are no resamples.
    """
    estimate, drawn = float(values[0]), np.asarray(values[1:], dtype=float)
    if not len(drawn):
        return math.nan, math.nan
    low, high = np.quantile(drawn - drawn.mean(), [0.025, 0.975])
    return estimate + float(low), estimate + float(high)


def evenly(total, count):
    """`count` numbers of 0 .. total - 1 at even steps, or all."""
    return list(range(total)) if count >= total else [i * total // count for i in range(count)]
