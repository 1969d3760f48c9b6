"""The README's results: DRIFT, each of its parts alone, and other protections against plain GRPO, over seeds, on assets/tiny.

    python experiments/evidence.py                      # runs what is missing (each run resumes), then prints the tables and draws
    python experiments/evidence.py --report             # only the tables and the figure, from the runs that are there

Two runs of one thread each at a time. Alignment is the held-out evaluator's log-probability, diversity its within-prompt Vendi score. The front
of a run is, at each alignment a, the largest diversity its curve shows at alignment a or more (linear between evaluations).
    gain at equal alignment    of the two fronts' means over ten alignments that both reach, seed by seed
    gain at equal diversity    the same along the other axis, of alignment gained over the base model
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
OFF = {"select": "all", "prompt_noise": 0, "diversity": 0}
COMMON = {"precision": "bfloat16", "save_every": 60, "snapshot_every": 0}   # half the time on a CPU that has it, and the ratio stays exactly 1
METHODS = {
    "plain GRPO": {"drift": "off"},
    "KL 0.03": {"drift": "off", "kl": 0.03},
    "KL 0.1": {"drift": "off", "kl": 0.1},
    "KL 0.3": {"drift": "off", "kl": 0.3},
    "GARDO": {"drift": "off", "gardo": True},
    "spread, the opposite of (i)": OFF | {"select": "spread", "keep": 12},
    "DRIFT (i) subset": OFF | {"select": "window"},
    "DRIFT (ii) prompt noise": {k: v for k, v in OFF.items() if k != "prompt_noise"},
    "DRIFT (iii) shaping": {k: v for k, v in OFF.items() if k != "diversity"},
    "DRIFT (ii) and (iii), the default": {},
    "DRIFT, all three": {"select": "window"},
    "FID beside the reward": {"drift": "off", "reward": "class:1,fid:0.3"},
    "DRIFT, the default, and FID": {"reward": "class:1,fid:0.3"},
}
FIRST = ("plain GRPO", "DRIFT (ii) and (iii), the default", "DRIFT, the default, and FID", "DRIFT (iii) shaping", "DRIFT, all three")


def load(folder):
    """A run's evaluations -> iterations, alignment, diversity, and all their metrics as arrays."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "eval/fid" in row]
    return {name: np.array([row[name] for row in rows]) for name in ("iteration", *(k for k in rows[0] if k.startswith("eval/")))}


def front(x, y, levels):
    """The largest y that the curve (x, y) shows where x is at least each level; NaN where x never gets there."""
    t = np.linspace(0, len(x) - 1, 50 * (len(x) - 1) + 1)               # holds the evaluations themselves
    fine_x, fine_y = np.interp(t, np.arange(len(x)), x), np.interp(t, np.arange(len(x)), y)
    return np.array([fine_y[fine_x >= level].max() if (fine_x >= level).any() else np.nan for level in levels])


def gain_at_equal_alignment(method, plain, diversity="eval/vendi"):
    """Relative gain in diversity over ten alignments, from the base model's to the highest that both runs reach; and at that highest."""
    x = "eval/log_prob"
    levels = np.linspace(plain[x][0], min(plain[x].max(), method[x].max()), 11)[1:] - 1e-9
    m, p = front(method[x], method[diversity], levels), front(plain[x], plain[diversity], levels)
    return float(m.mean() / p.mean() - 1), float(m[-1] / p[-1] - 1)


def gain_at_equal_diversity(method, plain, diversity="eval/vendi"):
    """Relative gain in alignment over the base model's, at ten diversities from the base model's down to the plain run's lowest."""
    x = "eval/log_prob"
    levels = np.linspace(plain[diversity][0], plain[diversity].min(), 11)[1:] + 1e-9
    m, p = front(method[diversity], method[x], levels), front(plain[diversity], plain[x], levels)
    return float((m.mean() - plain[x][0]) / (p.mean() - plain[x][0]) - 1)


def command_line(flags):
    spelled = lambda k, v: [f"--{k}" if v else f"--no-{k}"] if isinstance(v, bool) else [f"--{k}", str(v)]
    return [word for k, v in flags.items() for word in spelled(k, v)]


def run(job):
    folder, flags, threads = job
    if (folder / "model").is_dir() and (folder / "metrics.jsonl").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "train.py", "--out", str(folder), *command_line(flags)]
    with open(f"{folder}.log", "w") as log:
        if subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode:
            raise SystemExit(f"failed: {' '.join(command)}; see {folder}.log")
    print("done:", folder, flush=True)


COLUMNS = ("run", "seeds", "accuracy", "log-prob", "Vendi", "distance", "FID", "diversity at equal alignment, %", "at the highest, %",
           "alignment at equal diversity, %")


def table(out, methods, seeds):
    """Prints the markdown table of the finished runs and returns them, {method: {seed: evaluations}}."""
    finished = lambda name: {seed: load(out / f"{name}-{seed}") for seed in seeds if (out / f"{name}-{seed}" / "model").is_dir()}
    runs = {name: found for name in methods if (found := finished(name))}
    print("| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", sep="\n")
    for name, curves in runs.items():
        end = [f"{np.mean([c['eval/' + k][-1] for c in curves.values()]):.3f}" for k in ("accuracy", "log_prob", "vendi", "distance", "fid")]
        pairs = [(curve, runs["plain GRPO"][seed]) for seed, curve in curves.items() if seed in runs.get("plain GRPO", {})]
        equal, back = [gain_at_equal_alignment(*pair) for pair in pairs], [gain_at_equal_diversity(*pair) for pair in pairs]
        print("| " + " | ".join([name, str(len(curves)), *end, *(spread(v) for v in ([e[0] for e in equal], [e[1] for e in equal], back))]) + " |")
    return runs


def spread(values):
    """Mean and standard error, in per cent."""
    if len(values) < 2:
        return f"{100 * values[0]:+.1f}" if values else "-"
    return f"{100 * np.mean(values):+.1f} +- {100 * np.std(values, ddof=1) / len(values) ** 0.5:.1f}"


ALIGNMENT = "eval/log_prob", "alignment: held-out log-probability (higher is better)"
PANELS = [("eval/vendi", "diversity: Vendi score within a prompt (higher is better)"), ("eval/fid", "Frechet distance to real pictures (lower is better)")]


def draw(runs, path, x=ALIGNMENT, panels=PANELS):
    """Curves of runs, {name: {seed: evaluations}}: thin lines are seeds, thick ones the mean over seeds; the base model is where all start."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2))
    for axis, (metric, label) in zip(axes, panels):
        for n, (name, curves) in enumerate(runs.items()):
            for curve in curves.values():
                axis.plot(curve[x[0]], curve[metric], color=f"C{n}", lw=0.5, alpha=0.35)
            axis.plot(*(np.mean([c[k] for c in curves.values()], 0) for k in (x[0], metric)), color=f"C{n}", lw=2, marker="o", ms=3, label=name)
        axis.set(xlabel=x[1], ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_grids(out, path, seed=0):
    """The same noise through the base model, after plain GRPO and after DRIFT; one row a prompt."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    grids = {title: sorted((out / f"{name}-{seed}" / "grids").glob("*.png"))[which] for title, name, which in (
        ("base model", "plain GRPO", 0), ("plain GRPO", "plain GRPO", -1), ("DRIFT", "DRIFT (ii) and (iii), the default", -1))}
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.3))
    for axis, (title, file) in zip(axes, grids.items()):
        axis.imshow(plt.imread(file), interpolation="nearest")
        axis.set_title(title), axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", default="runs/evidence", help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each method, from 0")
    parser.add_argument("--report", action="store_true", help="only print and draw what is there")
    args = parser.parse_args()
    out, seeds = ROOT / args.out, range(args.seeds)
    if not args.report:
        jobs = [(out / f"{name}-{seed}", COMMON | flags | {"seed": seed}, 1) for name, flags in METHODS.items() for seed in seeds]
        jobs.sort(key=lambda job: job[0].name.rpartition("-")[0] not in FIRST)            # the main comparison first
        jobs.sort(key=lambda job: job[1]["seed"] if job[0].name.rpartition("-")[0] in FIRST else 100)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, jobs))
    runs = table(out, METHODS, seeds)
    draw(runs, ROOT / "experiments" / "evidence.png")
    draw_grids(out, ROOT / "experiments" / "grids.png")


if __name__ == "__main__":
    main()
