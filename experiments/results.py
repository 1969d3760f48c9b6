"""All of docs/results.md and docs/shapes.md that is made of training runs, by one command.

    python experiments/results.py               # about five hours on two cores; resumes
    python experiments/results.py --seeds 1     # one seed of each method: an hour and a half
    python experiments/results.py --report      # only the tables and figures, from the runs there

The six parts are commands of their own, one after another; each says in its header what it does.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

# Command and number of seeds.
PARTS = (
    (["evidence.py"], 5),
    (["evidence.py", "--reward", "margin"], 3),
    (["evidence.py", "--reward", "recogniser"], 3),
    (["distribution.py"], 3),
    (["merging.py"], 3),
    (["collapse.py"], 3),
)


def run_part(words):
    """Runs one part, and says how long it took."""
    script, *flags = words
    print(f"\n### {' '.join(words)}\n", flush=True)
    start = time.time()
    done = subprocess.run([sys.executable, str(FOLDER / script), *flags])
    if done.returncode:
        raise SystemExit(f"{script} stopped; the same command goes on from where it was")
    print(f"\n{(time.time() - start) / 60:.0f} minutes", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="at most so many seeds of each method, from 0"
    )
    parser.add_argument("--report", action="store_true", help="only print and draw what is there")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: give at least 1")

    for command, seeds in PARTS:
        words = [*command, "--seeds", str(min(seeds, args.seeds))]
        if args.report:
            words.append("--report")
        run_part(words)


if __name__ == "__main__":
    main()
