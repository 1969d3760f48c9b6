"""What a distribution-wise reward costs: seconds for each price, against computing the FID anew.

    python experiments/price_benchmark.py               # all sizes below; a quarter of an hour
    python experiments/price_benchmark.py --dims 256    # a minute

The task: 16 rollouts of K pictures each, against a reference of M pictures with D features.
Recomputing is what a plain implementation does for every rollout: mean and covariance of the M
features with K replaced (numpy, float64), then scipy's matrix square root. The table has seconds a
rollout, the ratio to recomputing, and how the prices compare: the error of `exact` against
recomputing for the first rollout, relative to the FID, and the correlation of `potential` (summed
over the K pictures) with `exact` over the rollouts. Features have a decaying spectrum, as those of
networks have. Decomposing the covariance of the reference, once an iteration and not once a
rollout, is a column of its own.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dist_reward import SubsetReplace, moments  # noqa: E402

HEADER = (
    "| D | M | K | recompute | exact | potential | exact x | decompose, once | error of exact "
    "| r potential |"
)


def draw_features(count, D, shift, generator):
    """[count, D] float32 with standard deviations k^-0.5, k = 1 ... D.

    A fixed reflection mixes them, so that no axis is special.
    """
    deviations = torch.arange(1, D + 1) ** -0.5
    x = torch.randn(count, D, generator=generator) * deviations + shift
    axis = torch.ones(D) / D**0.5
    return x - 2 * (x @ axis)[:, None] * axis


def draw_rollouts(count, K, D, generator):
    """[count, K, D] of different quality: some nearer to the real ones, some with less variance."""
    rollouts = []
    for g in range(count):
        shift = 0.02 * (g % 4) / 2
        scale = 1 - 0.02 * (g // 4)
        rollouts.append(draw_features(K, D, shift, generator) * scale)
    return torch.stack(rollouts)


def recompute(reference, replaced, new, mu, sigma):
    """The FID after a replacement, from scratch: what pytorch-fid does."""
    changed = reference.numpy().astype(np.float64)
    changed[replaced.numpy()] = new.numpy()
    mean = changed.mean(0)
    covariance = np.cov(changed, rowvar=False)
    root = scipy.linalg.sqrtm(covariance @ sigma)
    distance = ((mean - mu) ** 2).sum()
    return distance + np.trace(covariance) + np.trace(sigma) - 2 * np.trace(root.real)


def timed(function, *args, repeats=1):
    """-> the result of function(*args), and its mean seconds over `repeats` calls."""
    if repeats > 1:  # a warm-up, where it is cheap
        function(*args)
    start = time.perf_counter()
    for _ in range(repeats):
        result = function(*args)
    return result, (time.perf_counter() - start) / repeats


def print_row(pool, real, K, rollouts, decompose, generator):
    """Times the prices of `rollouts` sets of K pictures, and prints a row of the table.

    pool: the reference; real: mu and sigma in arrays; decompose: seconds, measured before.
    """
    M, D = pool.features.shape
    new = draw_rollouts(rollouts, K, D, generator)
    replaced = torch.randperm(M, generator=generator)[:K]

    exact, exact_seconds = timed(pool.price, new, replaced, "exact")
    potential, potential_seconds = timed(pool.price, new, replaced, "potential", repeats=3)
    exact_seconds /= rollouts
    potential_seconds /= rollouts
    after, seconds = timed(recompute, pool.features, replaced, new[0], *real)

    before = pool.fid()
    error = abs((before - after) - exact[0].item()) / before
    correlation = np.corrcoef(exact, potential.sum(1))[0, 1]
    print(
        f"| {D} | {M} | {K} | {seconds:.2f} | {exact_seconds:.4f} | {potential_seconds:.5f} "
        f"| {seconds / exact_seconds:.0f} | {decompose:.2f} | {error:.0e} | {correlation:.5f} |",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dims", type=int, nargs="+", default=[256, 1024, 2048], help="numbers of features D"
    )
    parser.add_argument(
        "--members", type=int, nargs="+", default=[5000, 50000], help="sizes M of the reference"
    )
    parser.add_argument(
        "--replaced", type=int, nargs="+", default=[16, 64, 256], help="pictures K of a rollout"
    )
    parser.add_argument("--rollouts", type=int, default=16)
    args = parser.parse_args()

    threads = torch.get_num_threads()
    print(f"torch threads {threads}; {args.rollouts} rollouts; seconds a rollout\n")
    print(HEADER)
    print("|---" * 10 + "|")
    for D in args.dims:
        generator = torch.Generator().manual_seed(D)
        mu, sigma = moments(draw_features(max(20000, 4 * D), D, 0.0, generator))
        real = mu.numpy(), sigma.numpy()
        for M in args.members:
            pool = SubsetReplace(draw_features(M, D, 0.02, generator), mu, sigma)
            _, decompose = timed(pool.fid)
            for K in args.replaced:
                print_row(pool, real, K, args.rollouts, decompose, generator)


if __name__ == "__main__":
    main()
