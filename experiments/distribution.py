"""The FID alone in docs/results.md: the FID as the only reward, on assets/tiny, at several prices.

    python experiments/distribution.py                  # runs what is missing, then the report
    python experiments/distribution.py --report         # only the report, from the runs there are
    python experiments/distribution.py --only potential # that run alone, with its seeds

Two runs of one thread each go on at a time. Training sees the reward classifier's features; a run
is evaluated by 5,000 fresh pictures from the deterministic sampler, at a noise seed that no run has
used, in those features and in the held-out evaluator's.
Second table: the signal-to-noise of each price. Signal is the mean price of K pictures of a tuned
model less that of K pictures of the base model, noise the std of the latter; `plain` is minus the
FID of the K pictures alone.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from evidence import draw, faster_precision, load, run, spread  # noqa: E402

import bases  # noqa: E402
import eval as evaluation  # noqa: E402
from commands import picture_sets  # noqa: E402
from dist_reward import SubsetReplace, frechet_distance, moments  # noqa: E402
from prompting import read_prompts  # noqa: E402

TINY = ROOT / "assets" / "tiny"
FRESH_SEED = 7
COMMON = {
    "reward": "fid",
    "drift": "off",
    "eta": 0.5,
    "lr": 2e-4,
    "updates": 1,
    "iterations": 30,
    "eval_every": 5,
    "snapshot_every": 3,
    "keep_snapshots": 10,
}
LONGER = {"eta": 0.3, "lr": 1e-4, "prompts_per_step": 20, "reference": 1280, "iterations": 40}
RUNS = {
    "potential": {},
    "potential, longer": LONGER,
    "exact, K = 1": {"price": "exact", "replace": 1},
    "exact, K = 2": {"price": "exact", "replace": 2},
    "exact, K = 5": {"price": "exact", "replace": 5},
    "exact, K = 10": {"price": "exact", "replace": 10},
}
SEEDS = {
    "potential": 3,
    "potential, longer": 3,
    "exact, K = 1": 1,
    "exact, K = 2": 1,
    "exact, K = 5": 1,
    "exact, K = 10": 3,
}
METRICS = ("fid_trained", "fid", "vendi", "distance", "accuracy")
PRICES = ("plain", "exact", "potential")


# --------------------------------------------------------------------------------------------------
# What a run is worth.


@torch.inference_mode()
def evaluated(folder, pictures, steps=20):
    """Fresh pictures of a model folder -> {metric: number}, and their features [n, D].

    The features are those that training sees.
    """
    prompts = read_prompts(TINY / "eval_prompts.jsonl")
    model = bases.load(folder, precision=faster_precision())
    images = picture_sets.generate(
        model, prompts, pictures // len(prompts), steps, 1.0, FRESH_SEED, 500
    )
    evaluator = evaluation.Judge(TINY, "evaluator")
    reward = evaluation.Judge(TINY, "reward")
    features = torch.cat([reward.network.features(part) for part in images.split(500)])

    scores = evaluation.score(images, prompts, evaluator.network, evaluator.real)
    mu, sigma = moments(features)
    scores["fid_trained"] = frechet_distance(mu, sigma, reward.real["mu"], reward.real["sigma"])
    return scores, features


def cached(path, folder, pictures):
    """As `evaluated`, from the file `path` if it exists; else it is written."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        scores, features = evaluated(folder, pictures)
        np.savez(path, features=features.numpy(), **scores)
    scores = {}
    with np.load(path) as file:
        for name, value in file.items():
            if name != "features":
                scores[name] = float(value)
        return scores, torch.from_numpy(file["features"])


def cached_base(out, pictures):
    return cached(out / "judged" / f"base-{pictures}.npz", TINY, pictures)


def cached_run(out, name, seed, pictures):
    path = out / "judged" / f"{name}-{seed}-{pictures}.npz"
    return cached(path, out / f"{name}-{seed}" / "model", pictures)


def finished_seeds(out, name, count):
    """The seeds of a run, of the first `count`, that have been trained to the end."""
    return [seed for seed in range(count) if (out / f"{name}-{seed}" / "model").is_dir()]


# --------------------------------------------------------------------------------------------------
# The report.


def print_cells(*cells):
    print("| " + " | ".join(cells) + " |")


def table(out, pictures, seeds=SEEDS):
    """Prints the finished runs, each against the base model at the same noise, in markdown."""
    print_cells(
        "run",
        "seeds",
        "FD, trained on",
        "change, %",
        "FD, held out",
        "change, %",
        "Vendi",
        "pairwise distance",
        "accuracy",
    )
    print("|---" * 9 + "|")

    base, _ = cached_base(out, pictures)
    cells = ["base model", "-"]
    for metric in METRICS:
        cells.append(f"{base[metric]:.2f}")
        if metric.startswith("fid"):
            cells.append("-")
    print_cells(*cells)

    for name in RUNS:
        done = finished_seeds(out, name, seeds[name])
        if not done:
            continue
        rows = [cached_run(out, name, seed, pictures)[0] for seed in done]
        cells = [name, str(len(done))]
        for metric in METRICS:
            values = [row[metric] for row in rows]
            cells.append(f"{np.mean(values):.2f}")
            if metric.startswith("fid"):
                cells.append(spread([value / base[metric] - 1 for value in values]))
        print_cells(*cells)


def prices(how, pool, sets, members, real):
    """The price of each of n sets [n, K, D] against the same members [K] -> [n]."""
    if how == "plain":
        distances = []
        for features in sets:
            if len(features) > 1:
                mu, sigma = moments(features)
                distances.append(-frechet_distance(mu, sigma, real["mu"], real["sigma"]))
            else:
                distances.append(np.nan)
        return torch.tensor(distances)
    price = pool.price(sets, members, how)
    return price.sum(1) if how == "potential" else price


def signal_to_noise(out, pictures, sizes=(1, 10, 50, 200), draws=200):
    """Prints the signal-to-noise of each price at several K: base model against a tuned one."""
    _, base = cached_base(out, pictures)
    _, tuned = cached_run(out, "potential", 0, pictures)
    real = np.load(TINY / "reward" / "real.npz")
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(base), generator=generator)
    half = len(base) // 2
    pool = SubsetReplace(base[shuffled[:half]], real["mu"], real["sigma"])
    fresh = base[shuffled[half:]]

    def draw_sets(features, K):
        """[draws, K, D] with replacement."""
        sets = []
        for _ in range(draws):
            index = torch.randint(len(features), (K,), generator=generator)
            sets.append(features[index])
        return torch.stack(sets)

    print()
    print_cells("K", "plain FID of K", "exact", "potential")
    print("|---" * 4 + "|")
    for K in sizes:
        if K > len(pool.features):
            continue
        members = torch.randperm(len(pool.features), generator=generator)[:K]
        tuned_sets = draw_sets(tuned, K)
        base_sets = draw_sets(fresh, K)
        cells = [str(K)]
        for how in PRICES:
            good = prices(how, pool, tuned_sets, members, real)
            same = prices(how, pool, base_sets, members, real)
            cells.append(f"{(good.mean() - same.mean()) / same.std():.2f}")
        print_cells(*cells)


def draw_curves(out, seeds):
    """The distances of fresh pictures along the finished runs, as a figure."""
    curves = {}
    for name in RUNS:
        done = finished_seeds(out, name, seeds[name])
        if done:
            curves[name] = {seed: load(out / f"{name}-{seed}") for seed in done}
    draw(
        curves,
        ROOT / "docs" / "distribution.png",
        ("iteration", "iteration (160 rollouts each; longer: 320)"),
        [
            ("eval/fid_trained", "Frechet distance of fresh pictures, features trained on"),
            ("eval/fid", "the same, held-out features"),
        ],
    )


def train_missing(out, seeds, only):
    """Makes the runs that do not exist yet, two at a time."""
    common = COMMON | {"precision": faster_precision()}
    jobs = []
    for name, flags in RUNS.items():
        if only not in ("", name):
            continue
        for seed in range(seeds[name]):
            jobs.append((out / f"{name}-{seed}", common | flags | {"seed": seed}, 1))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, jobs))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="runs/distribution", help="folder for the runs")
    parser.add_argument(
        "--pictures", type=int, default=5000, help="fresh pictures that judge a run"
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="at most so many seeds of each run, from 0"
    )
    parser.add_argument(
        "--only", default="", choices=["", *RUNS], help="make only this run, with its seeds"
    )
    parser.add_argument("--report", action="store_true", help="only print and draw what is there")
    args = parser.parse_args()

    out = ROOT / args.out
    seeds = {name: min(count, args.seeds) for name, count in SEEDS.items()}
    if not args.report:
        train_missing(out, seeds, args.only)
    table(out, args.pictures, seeds)
    if (out / "potential-0" / "model").is_dir():
        signal_to_noise(out, args.pictures)
    draw_curves(out, seeds)


if __name__ == "__main__":
    main()
