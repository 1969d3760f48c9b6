"""Merging in docs/results.md: RL over the coefficients of one run's snapshots, and its rivals.

    python experiments/distribution.py --only potential # first: the runs whose snapshots are merged
    python experiments/merging.py                       # what is missing, then the report; resumes
    python experiments/merging.py --report              # only the report, from the merges there are

Two merges of one thread each go on at a time. Their checkpoints are the base, assets/tiny, the ten
raw snapshots of a run, and the averages of two lengths at its middle and its end. The search sees
one half of the real pictures and its own noise. The table is of 5,000 fresh pictures against the
other half, in the features that were searched and in the held-out evaluator's.
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

# Flags of all merges, and of each kind.
COMMON = {"images": 210, "reference": 1050, "updates": 30}
KINDS = {
    "one vector": {},
    "a vector for each block": {"blocks": True},
}


# --------------------------------------------------------------------------------------------------
# Merges.


def checkpoints(folder):
    """What is merged of a run: the base, its raw snapshots, the averages of two of them.

    These two are the snapshot in the middle and the last.
    """
    snapshots = sorted((folder / "snapshots").glob("*.safetensors"))
    raw = [path for path in snapshots if "-" not in path.name]
    averages = []
    for snapshot in (raw[len(raw) // 2 - 1], raw[-1]):
        averages += sorted(snapshot.parent.glob(f"{snapshot.stem}-*"))
    return [str(path) for path in (ROOT / "assets" / "tiny", *raw, *averages)]


def run(job):
    """Merges as `job` says, (folder to write, run folder, flags), unless that is done already.

    What merge.py prints goes to FOLDER.log.
    """
    folder, source, flags = job
    if (folder / "table.md").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "merge.py", "rl", *checkpoints(source)]
    command += ["--out", str(folder), *command_line(flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(f"{folder}.log", "w") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}; see {folder}.log")
    print("done:", folder, flush=True)


def merge_missing(out, runs, seeds):
    """Makes the merges that do not exist yet, two at a time, of the runs in the folder `runs`."""
    for seed in seeds:
        if not (ROOT / runs / f"potential-{seed}" / "model").is_dir():
            raise SystemExit(
                f"{runs}: potential-{seed} has not been run; "
                "first python experiments/distribution.py --only potential"
            )
    common = COMMON | {"precision": faster_precision()}
    jobs = []
    for kind, flags in KINDS.items():
        for seed in seeds:
            source = ROOT / runs / f"potential-{seed}"
            jobs.append((out / f"{kind}-{seed}", source, common | flags | {"seed": seed}))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, jobs))


# --------------------------------------------------------------------------------------------------
# The report.


def row_name(text):
    """A row's name without what differs from merge to merge: a checkpoint, a length."""
    if text.startswith("best post-hoc"):
        return "best post-hoc EMA"
    return text.split(" (")[0]


def read_table(path):
    """table.md -> names of columns, names of rows, numbers [rows, columns]."""
    lines = []
    for line in path.read_text().splitlines():
        cells = line.strip().strip("|").split("|")
        lines.append([cell.strip() for cell in cells])
    head, _, *rows = lines
    names = [row_name(row[0]) for row in rows]
    numbers = [[float(cell) for cell in row[1:]] for row in rows]
    return head[1:], names, np.array(numbers)


def print_cells(*cells):
    print("| " + " | ".join(cells) + " |")


def table(out, seeds):
    """Prints the finished merges, a table for each kind, in markdown.

    A row has the means over the runs, and in per cent its distance to the best single checkpoint of
    the same run.
    """
    for kind in KINDS:
        paths = [out / f"{kind}-{seed}" / "table.md" for seed in seeds]
        tables = [read_table(path) for path in paths if path.is_file()]
        if not tables:
            continue
        columns, names, _ = tables[0]
        numbers = np.stack([table_numbers for _, _, table_numbers in tables])  # [runs, rows, cols]
        single = numbers[:, names.index("best single checkpoint")]  # [runs, cols]

        print(f"\n{kind}, {len(tables)} runs\n")
        print_cells("merge", *columns, "searched, against the best single, %", "held out, %")
        print("|---" * (len(columns) + 3) + "|")
        for row, name in enumerate(names):
            means = numbers[:, row].mean(0)
            change = numbers[:, row] / single - 1
            print_cells(
                name,
                *[f"{mean:.3f}" for mean in means],
                spread(list(change[:, 0])),
                spread(list(change[:, 1])),
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="runs/merging", help="folder for the merges")
    parser.add_argument(
        "--runs",
        default="runs/distribution",
        help="folder of the runs potential-0, potential-1, ...",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs, from 0")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    args = parser.parse_args()

    out = ROOT / args.out
    seeds = range(args.seeds)
    if not args.report:
        merge_missing(out, args.runs, seeds)
    table(out, seeds)
    first = next(iter(KINDS))
    figure = out / f"{first}-0" / "coefficients.png"
    if figure.is_file():
        shutil.copyfile(figure, ROOT / "docs" / "merging.png")


if __name__ == "__main__":
    main()
