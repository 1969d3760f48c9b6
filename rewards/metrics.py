"""Metrics: how different pictures are, and how far from real ones, from features; with intervals.

    vendi       exp(-sum v ln v), v the eigenvalues of K/n, K_ij = exp(-|f_i - f_j|^2 / 2 h^2)
                (arXiv 2210.02410): 1 for n copies, at most n
    distance    mean, or smallest, distance of two of the pictures
    modes       effective number of values (exp of the entropy) that an attribute which a prompt
                leaves open takes in its pictures, over that of as many real pictures: 1, nothing is
                lost; 1 / number of values, one is left
    fid, kid    squared Frechet distance (arXiv 1706.08500); unbiased squared MMD with the cubic
                kernel (arXiv 1801.01401)
    precision   share of generated pictures nearer to some real one than its k-th nearest real
                neighbour; recall: with the roles exchanged (arXiv 1904.06991)
    density     how many real neighbourhoods hold a generated picture, over k; coverage: share of
                real neighbourhoods that hold one (arXiv 2002.09797)

The interval is a bootstrap. A resample is a row of counts [n], how often each picture was drawn;
row 0 is all ones, the sample itself. A `resampled_...` function takes features [n, D] and counts
[R, n] and gives [R] values, the first of which is the metric. The generated pictures are drawn;
recall and coverage are means over the real ones, so for them the real ones are drawn.
Left out: intervals for the choice of the real pictures otherwise, and the bias of the FID at finite
n, which no resampling removes.
"""

import math

import numpy as np
import torch

from dist_reward import frechet, kernel_sums, own_kernel, polynomial_kernel, sqrt_psd

NEIGHBOURS = 5  # k of precision, recall, density and coverage


# --------------------------------------------------------------------------------------------------
# How different pictures are.


def pairwise_distances(features, others=None):
    """Euclidean distances: features [..., n, D], others [..., m, D] -> [..., n, m], float64.

    Without `others` those among the features. Exactly 0 for equal rows.
    """
    if others is None:
        others = features
    return torch.cdist(
        features.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )


def vendi_kernel(features, scale):
    """features [n, D] -> the RBF kernel [n, n] of width `scale`."""
    return torch.exp(-(pairwise_distances(features) ** 2) / (2 * scale**2))


def effective_number(kernel):
    """kernel [n, n] of trace 1 -> exp of the entropy of its eigenvalues."""
    eigenvalues = torch.linalg.eigvalsh(kernel).clamp(min=0)
    entropy = -torch.special.xlogy(eigenvalues, eigenvalues).sum()
    return float(torch.exp(entropy))


def vendi_score(features, scale):
    """features [n, D] -> the effective number of different pictures, 1 to n, by the RBF kernel.

    >>> round(vendi_score(torch.zeros(5, 3), 1.0), 6)  # five copies
    1.0
    >>> round(vendi_score(100 * torch.eye(5), 1.0), 6)  # five that have nothing in common
    5.0
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


# --------------------------------------------------------------------------------------------------
# How many values are left of what a prompt leaves open.


def effective_values(counts):
    """counts [..., V] of n pictures' values -> exp of their entropy [...], 1 to V, in numpy.

    >>> effective_values(np.array([[4, 4, 0], [8, 0, 0]])).round(6).tolist()
    [2.0, 1.0]
    """
    shares = counts / counts.sum(-1, keepdims=True)
    logs = np.log(np.where(shares > 0, shares, 1))
    return np.exp(-(shares * logs).sum(-1))


def expected_values(frequencies, n, draws=4000):
    """The mean of effective_values over sets of n real pictures, whose values have `frequencies`.

    Few pictures show fewer values than there are, so a set is held against sets of its size. By
    simulation with a fixed seed; its error is below a thousandth of the number of values.
    """
    random = np.random.default_rng(0)
    return effective_values(random.multinomial(n, frequencies, size=draws)).mean()


def modes(values, asked, attributes, real):
    """values [P, n, A] read from n pictures of P prompts -> {"modes": [P], "modes_NAME": [P]}.

    asked [P, A]: the values that the prompts name, below 0 where they leave the attribute open.
    attributes: {name: [values]}; real: mapping with "frequencies_NAME" [V] of real pictures.
    A prompt that names the attribute has NaN; an attribute that all prompts name has no entry.
    "modes" is the mean over the attributes that a prompt leaves open.
    """
    found = {}
    for a, (name, known) in enumerate(attributes.items()):
        is_open = asked[:, a] < 0  # [P]
        if not is_open.any():
            continue
        counts = torch.nn.functional.one_hot(values[:, :, a], len(known)).sum(1)  # [P, V]
        numbers = torch.from_numpy(effective_values(counts.cpu().numpy())).to(values.device)
        ratio = numbers / expected_values(real[f"frequencies_{name}"], values.shape[1])
        found[f"modes_{name}"] = ratio.masked_fill(~is_open, math.nan)
    if found:
        found = {"modes": torch.stack([*found.values()]).nanmean(0)} | found
    return found


# --------------------------------------------------------------------------------------------------
# Generated against real pictures.


def neighbour_radii(features, k=NEIGHBOURS, shard=1000):
    """features [n, D] -> the distance of each to its k-th nearest other [n].

    Raises ValueError if there are fewer than k others.
    """
    if len(features) <= k:
        raise ValueError(f"{len(features)} pictures have no {k}-th nearest neighbour")
    radii = []
    for part in features.split(shard):
        distances = pairwise_distances(part, features)
        nearest = distances.topk(k + 1, largest=False).values  # the first is the picture itself
        radii.append(nearest[:, k])
    return torch.cat(radii)


def neighbourhoods(generated, real, k=NEIGHBOURS, shard=1000):
    """generated [n, D], real [m, D] -> {name: float64}, the means of which are the metrics.

    precision and density have one number for each generated picture [n], recall and coverage one
    for each real picture [m]. Compare at equal n and m: more pictures have smaller radii.
    """
    real_radii = neighbour_radii(real, k, shard)
    generated_radii = neighbour_radii(generated, k, shard)
    real_around = []
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = recalled.clone()
    for part, radii in zip(generated.split(shard), generated_radii.split(shard)):
        distances = pairwise_distances(part, real)  # [shard, m]
        in_real = distances <= real_radii
        in_generated = distances <= radii[:, None]
        real_around.append(in_real.sum(1).double())
        covered |= in_real.any(0)
        recalled |= in_generated.any(0)

    count = torch.cat(real_around)  # [n], the real neighbourhoods that a generated picture lies in
    return {
        "precision": (count > 0).double(),
        "recall": recalled.double(),
        "density": count / k,
        "coverage": covered.double(),
    }


# --------------------------------------------------------------------------------------------------
# The bootstrap.


def resample_counts(n, resamples, key):
    """-> counts [1 + resamples, n], float64: ones, then draws of n with replacement.

    They are a function of the numbers in `key`.
    """
    random = np.random.default_rng(list(key))
    drawn = random.multinomial(n, np.full(n, 1 / n), size=resamples)
    return torch.from_numpy(np.concatenate([np.ones((1, n)), drawn]))


def resampled_mean(values, counts):
    """values [n] -> [R]: the mean over prompts, or over indicators. NaN are left out."""
    is_there = ~values.isnan()
    counts = counts[:, is_there]
    return counts @ values[is_there].double() / counts.sum(1)


def resampled_vendi(features, counts, scale):
    """As vendi_score -> [R].

    A picture drawn c times is c equal rows; they weigh the kernel like one row times sqrt(c).
    """
    kernel = vendi_kernel(features, scale)
    scores = []
    for row in counts:
        drawn = row.nonzero()[:, 0]
        root = (row[drawn] / row.sum()).sqrt()
        weighted = kernel[drawn][:, drawn] * root[:, None] * root
        scores.append(effective_number(weighted))
    return counts.new_tensor(scores)


def resampled_distance(features, counts):
    """As mean_distance -> [R]."""
    n = len(features)
    sums = ((counts @ pairwise_distances(features)) * counts).sum(1)
    return sums / (n * (n - 1))


def resampled_fid(features, counts, mu_real, sigma_real):
    """As dist_reward.frechet_distance to N(mu_real [D], sigma_real [D, D]) -> [R]."""
    n = len(features)
    x = features.double() - mu_real  # about mu_real, so that little cancels
    root = sqrt_psd(sigma_real)
    distances = []
    for row in counts:
        shift = row @ x / n
        sigma = (x * row[:, None]).T @ x - n * torch.outer(shift, shift)
        sigma /= n - 1
        distances.append(frechet(shift, sigma, root, sigma_real.trace()))
    return counts.new_tensor(distances)


def resampled_kid(features, counts, real, shard=1000):
    """KID to real [m, D] -> [R]; unbiased for row 0, as dist_reward.KernelReplace.value() is."""
    n, m = len(features), len(real)
    real_sum = sum(kernel_sums(part, real).sum() for part in real.split(shard))
    real_term = (real_sum - own_kernel(real).sum()) / (m * (m - 1))
    to_real = torch.cat([kernel_sums(part, real) for part in features.split(shard)]) / m  # [n]

    among = torch.zeros_like(counts[:, 0])
    for part, row in zip(features.split(shard), counts.split(shard, dim=1)):
        among += ((row @ polynomial_kernel(part, features)) * counts).sum(1)
    generated_term = (among - counts @ own_kernel(features)) / (n * (n - 1))
    return generated_term + real_term - 2 * (counts @ to_real) / n


def interval(values):
    """values [1 + R], the estimate and its resamples -> (low, high) of 95 %; NaN without resamples.

    It is the estimate plus the quantiles of the centred resamples. They are centred because a
    resample holds some pictures twice: that raises a distance between distributions, as fewer
    pictures do, and lowers a diversity, and plain percentiles would often miss the estimate
    itself. For means nothing changes.
    """
    estimate = float(values[0])
    drawn = np.asarray(values[1:], dtype=float)
    if not len(drawn):
        return math.nan, math.nan
    low, high = np.nanquantile(drawn - np.nanmean(drawn), [0.025, 0.975])
    return estimate + float(low), estimate + float(high)


def evenly(total, count):
    """`count` of the numbers 0 .. total - 1 at even steps, or all of them."""
    if count >= total:
        return list(range(total))
    return [i * total // count for i in range(count)]
