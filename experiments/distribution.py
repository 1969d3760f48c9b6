"""The README's results on distribution-wise rewards: the FID as the only reward, on assets/tiny.

    python experiments/distribution.py                  # runs what is missing, two of one thread each at a time, then the tables and the figure
    python experiments/distribution.py --report         # only the tables and the figure, from the runs that are there
    python experiments/distribution.py --only potential # that run alone, with its seeds

Training sees the reward classifier's features; a run is judged by 5,000 fresh pictures from the deterministic sampler, at a noise seed that
no run has used, in those features and in the held-out evaluator's. Second table: the signal-to-noise of each price. Signal is the mean
price of K pictures of a tuned model less that of K pictures of the base model, noise the std of the latter; `plain` is minus the FID of the
K pictures alone.
"""
import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import eval as evaluation  # noqa: E402
from commands import picture_sets
import bases  # noqa: E402
from dist_reward import SubsetReplace, frechet_distance, moments  # noqa: E402
from evidence import draw, faster_precision, load, run, spread  # noqa: E402
from prompting import read_prompts  # noqa: E402

TINY, FRESH_SEED = ROOT / "assets" / "tiny", 7
COMMON = {"reward": "fid", "drift": "off", "eta": 0.5, "lr": 2e-4, "updates": 1, "iterations": 30, "eval_every": 5,
          "snapshot_every": 3, "keep_snapshots": 10}
RUNS = {
    "potential": {},
    "potential, longer": {"eta": 0.3, "lr": 1e-4, "prompts_per_step": 20, "reference": 1280, "iterations": 40},
    "exact, K = 1": {"price": "exact", "replace": 1},
    "exact, K = 2": {"price": "exact", "replace": 2},
    "exact, K = 5": {"price": "exact", "replace": 5},
    "exact, K = 10": {"price": "exact", "replace": 10},
    "quadratic, K = 10": {"price": "quadratic", "replace": 10},
}
SEEDS = {name: 3 if name in ("potential", "potential, longer", "exact, K = 10") else 1 for name in RUNS}


@torch.inference_mode()
def judged(folder, pictures, steps=20):
    """Fresh pictures of a model folder -> their metrics, and their features in the space that was trained on."""
    prompts = read_prompts(TINY / "eval_prompts.jsonl")
    images = picture_sets.generate(bases.load(folder, precision=faster_precision()), prompts, pictures // len(prompts), steps, 1.0, FRESH_SEED, 500)
    evaluator, reward = evaluation.Judge(TINY, "evaluator"), evaluation.Judge(TINY, "reward")
    features = torch.cat([reward.network.features(x) for x in images.split(500)])
    scores = evaluation.score(images, [p.metadata["label"] for p in prompts], evaluator.network, evaluator.real)
    return scores | {"fid_trained": frechet_distance(*moments(features), reward.real["mu"], reward.real["sigma"])}, features


def cached(path, folder, pictures):
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        scores, features = judged(folder, pictures)
        np.savez(path, features=features.numpy(), **scores)
    with np.load(path) as file:
        return {k: float(v) for k, v in file.items() if k != "features"}, torch.from_numpy(file["features"])


METRICS = ("fid_trained", "fid", "vendi", "distance", "accuracy")


def table(out, pictures, seeds=SEEDS):
    """Prints the markdown table of the finished runs, each against the base model at the same noise."""
    base, _ = cached(out / "judged" / f"base-{pictures}.npz", TINY, pictures)
    print(f"| run | seeds | FD, trained on | change, % | FD, held out | change, % | Vendi | pairwise distance | accuracy |\n{'|---' * 9}|")
    print("| base model | - | " + " | ".join(f"{base[k]:.2f}{' | -' * k.startswith('fid')}" for k in METRICS) + " |")
    for name in RUNS:
        done = [s for s in range(seeds[name]) if (out / f"{name}-{s}" / "model").is_dir()]
        if done:
            rows = [cached(out / "judged" / f"{name}-{s}-{pictures}.npz", out / f"{name}-{s}" / "model", pictures)[0] for s in done]
            cells = [f"{np.mean([r[k] for r in rows]):.2f}" + (f" | {spread([r[k] / base[k] - 1 for r in rows])}" if k.startswith("fid") else "")
                     for k in METRICS]
            print(f"| {name} | {len(done)} | " + " | ".join(cells) + " |")


def signal_to_noise(out, pictures, sizes=(1, 10, 50, 200), draws=200):
    """Prints the signal-to-noise of each price at several K, base model against the tuned model of the first run."""
    _, base = cached(out / "judged" / f"base-{pictures}.npz", TINY, pictures)
    _, tuned = cached(out / "judged" / f"potential-0-{pictures}.npz", out / "potential-0" / "model", pictures)
    real, generator = np.load(TINY / "reward" / "real.npz"), torch.Generator().manual_seed(0)
    half = torch.randperm(len(base), generator=generator)
    pool, fresh = SubsetReplace(base[half[:len(base) // 2]], real["mu"], real["sigma"]), base[half[len(base) // 2:]]
    print(f"\n| K | plain FID of K | exact | quadratic | potential |\n{'|---' * 5}|")
    for K in (k for k in sizes if k <= len(pool.features)):
        pick = lambda among: torch.stack([among[torch.randint(len(among), (K,), generator=generator)] for _ in range(draws)])
        members, kinds = torch.randperm(len(pool.features), generator=generator)[:K], {"good": pick(tuned), "same": pick(fresh)}
        cells = []
        for how in ("plain", "exact", "quadratic", "potential"):
            if how == "plain":
                price = {k: torch.tensor([-frechet_distance(*moments(f), real["mu"], real["sigma"]) if K > 1 else np.nan for f in v])
                         for k, v in kinds.items()}
            else:
                price = {k: pool.price(v, members, how) for k, v in kinds.items()}
                price = {k: v.sum(1) if how == "potential" else v for k, v in price.items()}
            cells.append(f"{(price['good'].mean() - price['same'].mean()) / price['same'].std():.2f}")
        print(f"| {K} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", default="runs/distribution", help="folder for the runs")
    parser.add_argument("--pictures", type=int, default=5000, help="fresh pictures that judge a run")
    parser.add_argument("--seeds", type=int, default=5, help="at most so many seeds of each run, from 0")
    parser.add_argument("--only", default="", choices=["", *RUNS], help="make only this run, with its seeds")
    parser.add_argument("--report", action="store_true", help="only print and draw what is there")
    args = parser.parse_args()
    out, seeds = ROOT / args.out, {name: min(n, args.seeds) for name, n in SEEDS.items()}
    if not args.report:
        common = COMMON | {"precision": faster_precision()}
        jobs = [(out / f"{name}-{seed}", common | flags | {"seed": seed}, 1) for name, flags in RUNS.items()
                for seed in range(seeds[name]) if args.only in ("", name)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, jobs))
    table(out, args.pictures, seeds)
    if (out / "potential-0" / "model").is_dir():
        signal_to_noise(out, args.pictures)
    runs = {name: {s: load(out / f"{name}-{s}") for s in range(seeds[name]) if (out / f"{name}-{s}" / "model").is_dir()} for name in RUNS}
    draw({name: curves for name, curves in runs.items() if curves}, ROOT / "experiments" / "distribution.png",
         ("iteration", "iteration (160 rollouts each; longer: 320)"),
         [("eval/fid_trained", "Frechet distance of fresh pictures, features trained on"), ("eval/fid", "the same, held-out features")])


if __name__ == "__main__":
    main()
