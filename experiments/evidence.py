"""The README's results: DRIFT, each of its parts alone, the FID beside the reward, and other protections against plain GRPO, on assets/tiny.

    python experiments/evidence.py                      # runs what is missing (each run resumes), then prints the tables and draws
    python experiments/evidence.py --reward margin      # the same under a reward with a heavy upper tail, and fewer methods and seeds
    python experiments/evidence.py --report             # only the tables and the figures, from the runs that are there

Two runs of one thread each at a time, in bfloat16 on a CPU that multiplies matrices faster in it, else in float32. The table and the figure are those of
`eval.py compare`; what they hold is said in compare.py.
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
from support import flags
from commands.compare import draw, front, gain_at_equal_alignment, gain_at_equal_diversity, load, spread  # noqa: E402, F401

OFF = {"select": "all", "prompt_noise": 0, "diversity": 0}
COMMON = {"save_every": 60, "snapshot_every": 0}
METHODS = {
    "plain GRPO": {"drift": "off"},
    "plain GRPO, as long as both lines": {"drift": "off", "iterations": 100, "ema": 0.8},
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
    "FID beside the reward": {"drift": "off", "fid": 0.3},
    "both lines": {"prompt_noise": 0, "fid": 0.3, "iterations": 100, "ema": 0.8},   # (iii) and the FID
}
DRAWN = ("plain GRPO", "KL 0.1", "GARDO", "DRIFT (i) subset", "DRIFT (iii) shaping", "DRIFT (ii) and (iii), the default", "FID beside the reward", "both lines")
SECOND = {**dict.fromkeys(DRAWN), "spread, the opposite of (i)": None}   # the methods that are tried on a second reward


def matrix_rate(device, precision):
    """Multiplications and additions a second of the product of two square matrices, the best of ten."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=getattr(torch, precision))

    def seconds():
        start = time.perf_counter()
        (a @ a)[0, 0].item()                                             # a GPU is waited for
        return time.perf_counter() - start
    return 2 * side**3 / min(seconds() for _ in range(10))


def faster_precision(device=torch.device("cpu")):
    """float32 or bfloat16: a CPU without matrix instructions (AMX) takes longer in bfloat16. In either the first ratio is 1."""
    return max(("float32", "bfloat16"), key=lambda precision: matrix_rate(device, precision))


def command_line(flags):
    spelled = lambda k, v: [f"--{k}" if v else f"--no-{k}"] if isinstance(v, bool) else [f"--{k}", str(v)]
    return [word for k, v in flags.items() for word in spelled(k, v)]


def flags_of(name, reward, seed):
    """The flags of one run; `fid` is the weight of the FID beside the reward."""
    flags = METHODS[name]
    return COMMON | {k: v for k, v in flags.items() if k != "fid"} | {"reward": f"{reward}:1" + f",fid:{flags.get('fid')}" * ("fid" in flags), "seed": seed}


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


def table(out, methods, seeds):
    """Prints the markdown table of the finished runs and returns them, {method: {seed: evaluations}}."""
    finished = lambda name: {seed: load(out / f"{name}-{seed}") for seed in seeds if (out / f"{name}-{seed}" / "model").is_dir()}
    runs = {name: found for name in methods if (found := finished(name))}
    if not runs:
        raise SystemExit(f"{out}: no finished run; python experiments/evidence.py makes them")
    print(compare.table(runs))
    return runs


def draw_grids(out, path, seed=0):
    """The same noise through the base model, after plain GRPO, after DRIFT, and with the FID beside it; one row a prompt."""
    sheets = {name: sorted((out / f"{name}-{seed}" / "grids").glob("*.png")) for name in ("plain GRPO", "DRIFT (ii) and (iii), the default", "both lines")}
    if all(sheets.values()):
        plain, drift, both = sheets.values()
        compare.draw_grids({"base model": plain[0], "plain GRPO": plain[-1], "DRIFT (ii) and (iii)": drift[-1], "both lines": both[-1]}, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", default="", help="folder for the runs (default: runs/evidence, with -REWARD for another reward)")
    parser.add_argument("--reward", default="class", choices=["class", "margin"], help="the alignment reward")
    parser.add_argument("--seeds", type=int, default=0, help="seeds of each method, from 0 (default: 5, and 3 of another reward)")
    parser.add_argument("--report", action="store_true", help="only print and draw what is there")
    args = parser.parse_args()
    first = args.reward == "class"
    suffix, methods, seeds = ("", METHODS, range(args.seeds or 5)) if first else (f"-{args.reward}", SECOND, range(args.seeds or 3))
    out = ROOT / (args.out or "runs/evidence" + suffix)
    if not args.report:
        precision = {"precision": faster_precision()}
        jobs = [(out / f"{name}-{seed}", flags_of(name, args.reward, seed) | precision, 1) for seed in seeds for name in methods]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, jobs))
    runs = table(out, methods, seeds)
    draw({name: runs[name] for name in DRAWN if name in runs}, ROOT / "experiments" / f"evidence{suffix}.png")
    if first:
        draw_grids(out, ROOT / "experiments" / "grids.png")


if __name__ == "__main__":
    main()
