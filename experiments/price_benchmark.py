"""What a distribution-wise reward costs: seconds for each price, against computing the FID anew.

    python experiments/price_benchmark.py               # D = 256, 1024, 2048; M = 5,000 and 50,000; K = 16, 64, 256 (a quarter of an hour)
    python experiments/price_benchmark.py --dims 256    # a minute

The task: 16 rollouts of K pictures each, against a reference of M. Recomputing is what a plain implementation does for every rollout: mean and
covariance of the M features with K replaced (numpy, float64), then scipy's matrix square root. Reported are seconds a rollout, the ratio to
recomputing, and how the prices compare: the largest error of `exact` against recomputing, relative to the FID, and the correlation of
`quadratic` and `potential` (summed over the K pictures) with `exact` over the rollouts. Features have a decaying spectrum, as networks' have.
Decomposing the reference's covariance, once for each iteration and not for each rollout, is a column of its own.
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


def features(count, D, shift, generator):
    """[count, D] float32 with standard deviations k^-0.5 (k = 1 ... D), mixed by a fixed reflection so that no axis is special."""
    x = torch.randn(count, D, generator=generator) * torch.arange(1, D + 1) ** -0.5 + shift
    axis = torch.ones(D) / D**0.5
    return x - 2 * (x @ axis)[:, None] * axis


def recompute(reference, replaced, new, mu, sigma):
    """The FID after a replacement, from scratch: what pytorch-fid does."""
    changed = reference.numpy().astype(np.float64)
    changed[replaced.numpy()] = new.numpy()
    m, S = changed.mean(0), np.cov(changed, rowvar=False)
    root = scipy.linalg.sqrtm(S @ sigma)
    return ((m - mu) ** 2).sum() + np.trace(S) + np.trace(sigma) - 2 * np.trace(root.real)


def timed(function, repeats=1):
    function() if repeats > 1 else None                                  # warm-up, where it is cheap
    start = time.perf_counter()
    for _ in range(repeats):
        result = function()
    return result, (time.perf_counter() - start) / repeats


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 1024, 2048], help="numbers of features D")
    parser.add_argument("--members", type=int, nargs="+", default=[5000, 50000], help="sizes M of the reference")
    parser.add_argument("--replaced", type=int, nargs="+", default=[16, 64, 256], help="pictures K of a rollout")
    parser.add_argument("--rollouts", type=int, default=16)
    args = parser.parse_args()
    print(f"torch threads {torch.get_num_threads()}; {args.rollouts} rollouts; seconds a rollout\n")
    print("| D | M | K | recompute | exact | quadratic | potential | exact x | quadratic x | decompose, once | error of exact | r quadratic | r potential |")
    print("|---" * 13 + "|")
    for D in args.dims:
        generator = torch.Generator().manual_seed(D)
        mu, sigma = moments(features(max(20000, 4 * D), D, 0.0, generator))
        for M in args.members:
            reference = features(M, D, 0.02, generator)
            pool = SubsetReplace(reference, mu, sigma)
            before, decompose = timed(pool.fid)
            for K in args.replaced:
                # rollouts of different quality: some nearer to the real distribution, some with less variance
                new = torch.stack([features(K, D, 0.02 * (g % 4) / 2, generator) * (1 - 0.02 * (g // 4)) for g in range(args.rollouts)])
                replaced = torch.randperm(M, generator=generator)[:K]
                prices, seconds = {}, {}
                for how in ("exact", "quadratic", "potential"):
                    prices[how], seconds[how] = timed(lambda: pool.price(new, replaced, how), repeats=1 if how == "exact" else 3)
                    seconds[how] /= args.rollouts
                old = timed(lambda: recompute(reference, replaced, new[0], mu.numpy(), sigma.numpy()))
                error = abs((before - old[0]) - prices["exact"][0].item()) / before
                r = [np.corrcoef(prices["exact"], p)[0, 1] for p in (prices["quadratic"], prices["potential"].sum(1))]
                print(f"| {D} | {M} | {K} | {old[1]:.2f} | {seconds['exact']:.4f} | {seconds['quadratic']:.5f} | {seconds['potential']:.5f} | "
                      f"{old[1] / seconds['exact']:.0f} | {old[1] / seconds['quadratic']:.0f} | {decompose:.2f} | {error:.0e} | {r[0]:.5f} | {r[1]:.5f} |",
                      flush=True)


if __name__ == "__main__":
    main()
