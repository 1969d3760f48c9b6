"""The README's results on merging: RL over the coefficients of one run's snapshots, beside every baseline, on assets/tiny.

    python experiments/distribution.py --only potential # first: the runs whose snapshots are merged
    python experiments/merging.py                       # then the merges (each resumes; two of one thread at a time) and the table
    python experiments/merging.py --report              # only the table and the figure, from what is there

The checkpoints: the base model, the ten raw snapshots of each run, and the averages of two lengths at its middle and its end. The search sees one
half of the real pictures and its own noise; the table is of 5,000 fresh pictures against the other half, in the features that were
searched and in the held-out evaluator's.
"""
import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from evidence import command_line, faster_precision, spread  # noqa: E402

COMMON = {"images": 210, "reference": 1050, "updates": 30}
KINDS = {"one vector": {}, "a vector for each block": {"blocks": True}}


def checkpoints(folder):
    """The base, the raw snapshots, and the averages of the snapshot in the middle and of the last."""
    raw = sorted(p for p in (folder / "snapshots").glob("*.safetensors") if "-" not in p.name)
    averages = [p for at in (raw[len(raw) // 2 - 1], raw[-1]) for p in sorted(at.parent.glob(f"{at.stem}-*"))]
    return [str(ROOT / "assets" / "tiny"), *map(str, raw + averages)]


def run(job):
    folder, source, flags = job
    if (folder / "table.md").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "merge.py", "rl", *checkpoints(source), "--out", str(folder), *command_line(flags)]
    with open(f"{folder}.log", "w") as log:
        if subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode:
            raise SystemExit(f"failed: {' '.join(command)}; see {folder}.log")
    print("done:", folder, flush=True)


def read_table(path):
    """table.md -> column names, row names without what stands in brackets, numbers [rows, columns]."""
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in path.read_text().splitlines()]
    names = ["best post-hoc EMA" if row[0].startswith("best post-hoc") else row[0].split(" (")[0] for row in lines[2:]]
    return lines[0][1:], names, np.array([[float(x) for x in row[1:]] for row in lines[2:]])


def table(out, seeds):
    """For each kind, the mean over the runs of each row, and its distance to the best single checkpoint of the same run, in per cent."""
    for kind in KINDS:
        found = [read_table(out / f"{kind}-{s}" / "table.md") for s in seeds if (out / f"{kind}-{s}" / "table.md").is_file()]
        if not found:
            continue
        columns, names, _ = found[0]
        numbers = np.stack([f[2] for f in found])                        # [runs, rows, columns]
        single = numbers[:, names.index("best single checkpoint")]
        print(f"\n{kind}, {len(found)} runs\n\n| merge | " + " | ".join(columns) + f" | searched, against the best single, % | held out, % |\n{'|---' * (len(columns) + 3)}|")
        for n, name in enumerate(names):
            change = [spread(list(numbers[:, n, k] / single[:, k] - 1)) for k in (0, 1)]
            print(f"| {name} | " + " | ".join(f"{x:.3f}" for x in numbers[:, n].mean(0)) + f" | {change[0]} | {change[1]} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", default="runs/merging", help="folder for the merges")
    parser.add_argument("--runs", default="runs/distribution", help="folder of the runs potential-0, potential-1, ...")
    parser.add_argument("--seeds", type=int, default=3, help="runs, from 0")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    args = parser.parse_args()
    out, seeds = ROOT / args.out, range(args.seeds)
    if not args.report:
        missing = [s for s in seeds if not (ROOT / args.runs / f"potential-{s}" / "model").is_dir()]
        if missing:
            raise SystemExit(f"{args.runs}: potential-{missing[0]} has not been run; first python experiments/distribution.py --only potential")
        common = COMMON | {"precision": faster_precision()}
        jobs = [(out / f"{kind}-{s}", ROOT / args.runs / f"potential-{s}", common | flags | {"seed": s}) for kind, flags in KINDS.items() for s in seeds]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, jobs))
    table(out, seeds)
    figure = out / f"{next(iter(KINDS))}-0" / "coefficients.png"
    if figure.is_file():
        shutil.copyfile(figure, ROOT / "experiments" / "merging.png")


if __name__ == "__main__":
    main()
