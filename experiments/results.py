"""Everything under the README's Results, and on the FID and merging: every run, table and figure, by one command.

    python experiments/results.py                       # about three hours on two cores; each run resumes, and what is finished is not run again
    python experiments/results.py --seeds 1             # the same rows and figures from one seed each, about an hour
    python experiments/results.py --report              # only the tables and the figures, from the runs that are there

The four parts are commands of their own, run one after another; each says in its header what it does.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = {("evidence.py",): 5, ("evidence.py", "--reward", "margin"): 3, ("distribution.py",): 3, ("merging.py",): 3}    # and their seeds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5, help="at most so many seeds of each method, from 0")
    parser.add_argument("--report", action="store_true", help="only print and draw what is there")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: give at least 1")
    for (script, *flags), seeds in PARTS.items():
        flags += ["--seeds", str(min(seeds, args.seeds))] + ["--report"] * args.report
        print(f"\n### {script} {' '.join(flags)}\n", flush=True)
        began = time.time()
        if subprocess.run([sys.executable, str(ROOT / "experiments" / script), *flags]).returncode:
            raise SystemExit(f"{script} stopped; the same command goes on from where it was")
        print(f"\n{(time.time() - began) / 60:.0f} minutes", flush=True)


if __name__ == "__main__":
    main()
