"""Part of docs/results.md: DRIFT, its parts alone, the FID as a reward, and their rivals.

    python experiments/evidence.py                   # runs what is missing, then the report
    python experiments/evidence.py --reward margin   # a reward without a ceiling; fewer runs
    python experiments/evidence.py --only "plain GRPO,the default"
    python experiments/evidence.py --report          # only the report, from the runs there are

Every run fine-tunes assets/tiny. Two runs of one thread each go on at a time, in the precision in
which this CPU multiplies matrices faster; the same command resumes. The report is a table and a
figure, as `eval.py compare` makes them (commands/compare.py explains the columns), and a grid of
pictures.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from commands import compare  # noqa: E402

# distribution.py and merging.py import these from here.
from commands.compare import draw, load, spread  # noqa: E402, F401

CPU = torch.device("cpu")
COMMON = {"save_every": 60, "snapshot_every": 0}
PLAIN = {"drift": "off"}

# DRIFT in the features of the classifier that rewards, without the FID: our first reading of it.
CLASSIFIER = {"fid": 0, "diversity_features": "reward"}

# Flags of each run. Both lines are (iii) and the FID to real pictures; `spread` is the opposite of
# (i). A name has no comma, for --only.
METHODS = {
    "plain GRPO": PLAIN,
    "plain GRPO for 100 iterations": {**PLAIN, "iterations": 100, "ema": 0.8},
    "KL 0.03": {**PLAIN, "kl": 0.03},
    "KL 0.1": {**PLAIN, "kl": 0.1},
    "KL 0.3": {**PLAIN, "kl": 0.3},
    "GARDO": {**PLAIN, "gardo": True, "diversity_features": "reward"},
    "spread": {"select": "spread", "keep": 12, "diversity": 0, "fid": 0},
    "DRIFT (i) subset": {"select": "window", "diversity": 0, "fid": 0},
    "DRIFT (ii) prompt noise": {"prompt_noise": 0.5, "diversity": 0, "fid": 0},
    "DRIFT (iii) shaping": {**CLASSIFIER, "diversity": 0.5},
    "DRIFT (ii) and (iii)": {**CLASSIFIER, "diversity": 0.5, "prompt_noise": 0.5},
    "DRIFT (i) to (iii)": {
        **CLASSIFIER,
        "diversity": 0.5,
        "prompt_noise": 0.5,
        "select": "window",
    },
    "FID beside the reward": {"diversity": 0, "features": "reward"},
    "both lines": {
        "diversity": 0.5,
        "diversity_features": "reward",
        "features": "reward",
        "iterations": 100,
        "ema": 0.8,
    },
    "the default's shaping alone": {"fid": 0},
    "the default's FID alone": {"diversity": 0},
    "the default": {},
    "the default for 100 iterations": {"iterations": 100},
}

# The methods in the figure.
DRAWN = (
    "plain GRPO",
    "KL 0.1",
    "GARDO",
    "DRIFT (iii) shaping",
    "FID beside the reward",
    "both lines",
    "the default's shaping alone",
    "the default's FID alone",
    "the default",
)

# The methods that are tried on other rewards.
SECOND = (
    *DRAWN,
    "the default for 100 iterations",
    "DRIFT (i) subset",
    "DRIFT (ii) and (iii)",
    "spread",
)

# The sheets in the grid of pictures, after the base model: (method, title).
SHEETS = (
    ("plain GRPO", "plain GRPO"),
    ("the default", "the default"),
)


# --------------------------------------------------------------------------------------------------
# Runs.


def matrix_rate(device, precision):
    """Multiplications and additions a second in a product of two square matrices, best of ten."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=getattr(torch, precision))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def faster_precision(device=CPU):
    """float32 or bfloat16: a CPU without matrix instructions (AMX) is slower in bfloat16.

    The first ratio is 1 in both.
    """
    if matrix_rate(device, "bfloat16") > matrix_rate(device, "float32"):
        return "bfloat16"
    return "float32"


def command_line(flags):
    """{name: value} -> the words of a command line. A truth value is --name or --no-name."""
    words = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is False:
            words.append(f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def flags_of(name, reward, seed):
    """All flags of one run of a method -> {name: value}."""
    return COMMON | METHODS[name] | {"reward": reward, "seed": seed}


def run(job):
    """Trains as `job` says, (run folder, flags, threads), unless that is done already.

    What train.py prints goes to FOLDER.log.
    """
    folder, flags, threads = job
    if (folder / "model").is_dir() and (folder / "metrics.jsonl").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "train.py", "--out", str(folder), *command_line(flags)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(f"{folder}.log", "w") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}; see {folder}.log")
    print("done:", folder, flush=True)


def train_missing(out, methods, reward, seeds):
    """Makes the runs that do not exist yet, two at a time."""
    precision = faster_precision()
    jobs = []
    for seed in seeds:
        for name in methods:
            flags = flags_of(name, reward, seed)
            flags["precision"] = precision
            jobs.append((out / f"{name}-{seed}", flags, 1))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, jobs))


# --------------------------------------------------------------------------------------------------
# The report.


def finished_runs(out, methods, seeds):
    """The runs that were trained to the end -> {method: {seed: evaluations}}."""
    runs = {}
    for name in methods:
        for seed in seeds:
            folder = out / f"{name}-{seed}"
            if (folder / "model").is_dir():
                runs.setdefault(name, {})[seed] = load(folder)
    return runs


def table(out, methods, seeds):
    """Prints the finished runs in markdown -> {method: {seed: evaluations}}."""
    runs = finished_runs(out, methods, seeds)
    if not runs:
        raise SystemExit(f"{out}: no finished run; python experiments/evidence.py makes them")
    print(compare.table(runs))
    return runs


def draw_grids(out, path, seed=0):
    """Pictures of the base model and after two of the runs, from the same noise.

    Draws nothing while one of the runs is missing.
    """
    sheets = {}
    for name, title in SHEETS:
        evaluations = sorted((out / f"{name}-{seed}" / "grids").glob("*.png"))
        if not evaluations:
            return
        sheets.setdefault("base model", evaluations[0])
        sheets[title] = evaluations[-1]
    compare.draw_grids(sheets, path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out",
        default="",
        help="folder for the runs (default: runs/evidence, with -REWARD for another reward)",
    )
    parser.add_argument(
        "--reward",
        default="class",
        choices=["class", "margin", "recogniser"],
        help="the alignment reward",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=0,
        help="seeds of each method, from 0 (default: 5, and 3 of another reward)",
    )
    parser.add_argument(
        "--only", default="", help='some of the methods, as in --only "plain GRPO,the default"'
    )
    parser.add_argument("--report", action="store_true", help="only print and draw what is there")
    args = parser.parse_args()

    if args.reward == "class":
        suffix = ""
        methods = METHODS
        seeds = range(args.seeds or 5)
    else:
        suffix = f"-{args.reward}"
        methods = SECOND
        seeds = range(args.seeds or 3)
    if args.only:
        unknown = [name for name in args.only.split(",") if name not in methods]
        if unknown:
            parser.error(f"--only {args.only}: {unknown[0]!r} is none of {', '.join(methods)}")
        methods = args.only.split(",")
    out = ROOT / (args.out or f"runs/evidence{suffix}")

    if not args.report:
        train_missing(out, methods, args.reward, seeds)
    runs = table(out, methods, seeds)
    drawn = {name: runs[name] for name in DRAWN if name in runs}
    draw(drawn, ROOT / "docs" / f"evidence{suffix}.png")
    if args.reward == "class":
        draw_grids(out, ROOT / "docs" / "grids.png")


if __name__ == "__main__":
    main()
