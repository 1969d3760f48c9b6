"""The table of docs/shapes.md: what plain GRPO loses on assets/shapes, attribute by attribute.

    python experiments/collapse.py            # runs what is missing, then the report
    python experiments/collapse.py --report   # only the report, from the runs there are

Plain GRPO and the default, each under four rewards. A cell of the table is the effective number of
values that what a prompt leaves open still has, over that of real scenes (eval/modes); 1 means
that nothing is lost. The figure has each attribute over the iterations, the sheet the same noise
before and after. Two runs of one thread each go on at a time; the same command resumes.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from evidence import ROOT, faster_precision, load, run, spread
from shapes import ATTRIBUTES

from commands import compare

REWARDS = ("class", "margin", "taste", "recogniser")
METHODS = {"plain GRPO": {"drift": "off"}, "the default": {}}
COMMON = {"model": "assets/shapes", "save_every": 60, "snapshot_every": 0}
LOST = 0.9  # an attribute has lost a tenth of its values
NAMES = ("modes", *(f"modes_{name}" for name in ATTRIBUTES))


def jobs_of(out, seeds):
    """The runs -> {(reward, method, seed): (run folder, flags, threads)}."""
    precision = faster_precision()
    jobs = {}
    for seed in seeds:
        for method, flags in METHODS.items():
            for reward in REWARDS:
                folder = out / f"{reward}-{method}-{seed}"
                own = {"seed": seed, "reward": reward, "precision": precision}
                jobs[reward, method, seed] = (folder, COMMON | flags | own, 1)
    return jobs


def first_loss(curve, name):
    """The first iteration at which a run's attribute is below LOST; NaN: never."""
    below = np.flatnonzero(curve[f"eval/{name}"] < LOST)
    return curve["iteration"][below[0]] if len(below) else np.nan


def table(runs):
    """Runs {(reward, method): [evaluations of each seed]} -> markdown."""
    columns = ["run", "seeds", "accuracy", "Vendi", "FID", *NAMES]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    metrics = ["accuracy", "vendi", "fid", *NAMES]
    base = next(iter(runs.values()))
    rows = {"base model": (base, 0)}
    rows |= {", ".join(key): (curves, -1) for key, curves in runs.items()}
    for label, (curves, place) in rows.items():
        cells = [label, str(len(curves))]
        for name in metrics:
            values = [curve[f"eval/{name}"][place] for curve in curves]
            cells.append(spread(values, scale=1, digits=3, sign=""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def losses(runs):
    """When each attribute has lost a tenth, in words, a line for each run."""
    lines = []
    for key, curves in runs.items():
        words = []
        for name in NAMES[1:]:
            first = [first_loss(curve, name) for curve in curves]
            if np.isfinite(first).any():
                words.append(f"{name.removeprefix('modes_')} {np.nanmedian(first):.0f}")
        lines.append(f"{', '.join(key)}: {', '.join(words) or 'none'}")
    return "\n".join(lines)


def draw(runs, path):
    """The modes of each attribute over the iterations; a panel for each reward, plain GRPO."""
    plt = compare.pyplot()
    figure, axes = plt.subplots(1, len(REWARDS), figsize=(4 * len(REWARDS), 3.6), sharey=True)
    for axis, reward in zip(axes, REWARDS):
        axis.set_title(f"plain GRPO, reward {reward}")
        axis.set_xlabel("iteration")
        for name in NAMES[1:]:
            curves = runs.get((reward, "plain GRPO"), [])
            if curves:
                mean = np.mean([curve[f"eval/{name}"] for curve in curves], axis=0)
                axis.plot(curves[0]["iteration"], mean, label=name.removeprefix("modes_"))
    axes[0].set_ylabel("share of the values that is left")
    axes[0].legend()
    figure.tight_layout()
    compare.save_figure(figure, path, dpi=100)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="runs/collapse", help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each run, from 0")
    parser.add_argument("--report", action="store_true", help="only print and draw what is there")
    args = parser.parse_args()

    jobs = jobs_of(ROOT / args.out, range(args.seeds))
    if not args.report:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, jobs.values()))
    runs = {}
    for (reward, method, _), (folder, _, _) in jobs.items():
        if (folder / "model").is_dir():
            runs.setdefault((reward, method), []).append(load(folder))
    if not runs:
        raise SystemExit(f"{args.out}: no finished run; python experiments/collapse.py makes them")
    runs = {key: runs[key] for key in sorted(runs, key=lambda key: REWARDS.index(key[0]))}
    print(table(runs))
    print(
        f"\nThe first iteration at which less than {LOST} of the values is left, median of seeds:"
    )
    print(losses(runs))
    draw(runs, ROOT / "docs" / "collapse.png")
    sheets = {}
    for method in METHODS:
        grids = sorted((ROOT / args.out / f"taste-{method}-0" / "grids").glob("*.png"))
        if len(grids) > 1:
            sheets.setdefault("base model", grids[0])
            sheets[method] = grids[-1]
    if sheets:
        compare.draw_grids(sheets, ROOT / "docs" / "shapes.png")


if __name__ == "__main__":
    main()
