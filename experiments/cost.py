"""The tables under Cost in docs/scaling.md: how the time grows with the work, one flag at a time.

    python experiments/cost.py        # about fifteen minutes; nothing else should run beside it

Each row is five iterations of train.py, one thread a process: seconds of an iteration's rollouts
(with decoding and rewards) and of its update (with prices and averages), medians over all but the
first iteration; their sum against the first row of its part; peak memory of the first process.
Left out: loading, evaluations and checkpoints, whose number --eval_every and --save_every set.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import random_bases  # noqa: E402
from evidence import command_line  # noqa: E402

SHORT = (
    "--device cpu --iterations 5 --eval_every 5 --eval_images 20 --eval_steps 1 --snapshot_every 0"
).split()
SMALL_UNET = {
    "lora": 4,
    "reward": "jpeg",
    "fid": 0,
    "diversity_features": "latents",
    "prompts_per_step": 2,
    "group_size": 4,
    "steps": 4,
    "window": "0:2",
}

# {title: (flags of all rows of this part, what each row changes)}. The first row is what the others
# are measured against. `processes` and `pixels` are no flags of train.py: `measure` knows them.
PARTS = {
    "the default base": (
        {},
        [
            {},
            {"group_size": 32},
            {"group_size": 64},
            {"steps": 16},
            {"window": "0:7"},
            {"kl": 0.1},
            {"passes": 2},
            {"guidance": 2.0},
            {"precision": "bfloat16"},
            {"checkpointing": True},
            {"processes": 2},
        ],
    ),
    "with the FID reward": (
        {"reward": "class:1,fid:0.3"},
        [
            {},
            {"reference": 2560},
            {"reference": 10240},
            {"price": "exact", "replace": 1},
            {"reference": 10240, "price": "exact", "replace": 1},
        ],
    ),
    "a small U-Net": (SMALL_UNET, [{"pixels": 96}, {"pixels": 192}, {"pixels": 384}]),
    # The last part, because it needs a C++ compiler.
    "compiled": ({"precision": "bfloat16"}, [{}, {"compile": True}]),
}


def build_base(pixels, folder):
    """Writes a random Stable Diffusion 1 whose pictures are `pixels` wide and high."""
    random_bases.build("sd1", folder, "cpu")
    for part, side in (("unet", pixels // 8), ("vae", pixels)):
        path = folder / part / "config.json"
        config = json.loads(path.read_text())
        config["sample_size"] = side
        path.write_text(json.dumps(config))


def measure(row, folder):
    """Runs train.py in `folder` -> seconds of SAMPLE, seconds of TRAIN, peak memory in GB."""
    folder = Path(folder)
    flags = dict(row)
    processes = flags.pop("processes", 1)
    pixels = flags.pop("pixels", 0)
    words = [*SHORT, "--out", str(folder / "run")]
    if pixels:
        build_base(pixels, folder / "base")
        prompts = folder / "prompts.txt"
        prompts.write_text("a boot\na bag\n")
        words += ["--model", str(folder / "base"), "--prompts", str(prompts)]
    words += command_line(flags)

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", str(processes), "train.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"failed: train.py {' '.join(words)}\n{done.stderr}")

    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    iterations = [json.loads(line) for line in lines[2:]]  # without the start and iteration 1
    sample = statistics.median(metrics["seconds_sample"] for metrics in iterations)
    train = statistics.median(metrics["seconds_train"] for metrics in iterations)
    return sample, train, iterations[-1]["peak_memory_gb"]


def row_name(row):
    """The flags of a row in words."""
    names = []
    for flag, value in row.items():
        names.append(flag if value is True else f"{flag} {value}")
    return ", ".join(names) or "as it is"


def print_part(title, common, rows):
    """Measures one part and prints its table, row by row."""
    print(f"\n| {title} | rollout, s | update, s | together, times the first | GB |")
    print("|---" * 5 + "|", flush=True)
    first = None
    for row in rows:
        with tempfile.TemporaryDirectory() as folder:
            sample, train, memory = measure(common | row, folder)
        together = sample + train
        if first is None:
            first = together
        print(
            f"| {row_name(row)} | {sample:.2f} | {train:.2f} | {together / first:.2f} "
            f"| {memory:.2f} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", default="", help="one part, by the beginning of its name")
    args = parser.parse_args()
    for title, (common, rows) in PARTS.items():
        if title.startswith(args.only):
            print_part(title, common, rows)


if __name__ == "__main__":
    main()
