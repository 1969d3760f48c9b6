"""Three updates of train.py at published sizes, on random weights; what a GPU is asked first.

    python experiments/real_sizes.py                      # sd15, sdxl and sd35; needs a GPU
    python experiments/real_sizes.py --bases sd1,sd3      # small ones, to try it on a CPU
    python experiments/real_sizes.py --bases sd15 --more  # all weights, and --compile

A row is one run of train.py on 16 rollouts of four steps, two of them trained, in bfloat16 with
guidance 4 and a LoRA of rank 32, four in a forward.
    first ratio   the largest |ratio - 1| before the first optimizer step
    images/s      of the last rollout, decoded and rewarded
    pairs/s       of the last update
    GB            peak of the run; experiments/memory.py counts the same without a GPU
    waits         how often a rollout of 8 steps waits for the GPU, more than one of 4 steps does;
                  then an update of 4 micro-batches, more than one of 2
Left out: real weights, so rewards mean nothing here; --shard, which one process refuses.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import speed  # noqa: E402
from random_bases import NAMES, build  # noqa: E402

from support import flags, processes  # noqa: E402

PROMPTS, GROUP = 2, 8  # groups of an iteration, and rollouts of each
TRAINED = 2  # steps of each rollout
FLAGS = (
    "--reward jpeg --diversity_features latents --guidance 4 --precision bfloat16 "
    f"--iterations 3 --prompts_per_step {PROMPTS} --group_size {GROUP} --keep {GROUP} "
    f"--steps 4 --window 0:{TRAINED} --eval_images 4 --eval_steps 4 --snapshot_every 0 "
    "--decode_batch 2 --reward_batch 4 --batch 4"
)
LORA = "--lora 32"
VARIANTS = (LORA, f"{LORA} --checkpointing")
MORE = ("--train all --checkpointing", f"{LORA} --compile")


@dataclass
class Args:
    bases: str = "sd15,sdxl,sd35"
    """of sd1, sd3, sd15, sdxl, sd35"""
    more: bool = False
    """other runs: all weights instead of a LoRA; --compile"""
    seconds: int = 240
    """that one run may take; a longer one is a row that says so"""


def run(folder, words, out, seconds):
    """One run of train.py -> its metrics of iterations 1 to 3, or a line that says what failed."""
    command = [sys.executable, str(ROOT / "train.py"), "--model", str(folder), "--out", str(out)]
    command += ["--prompts", str(folder / "prompts.txt"), *FLAGS.split(), *words.split()]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds} s"
    if done.returncode:
        return done.stderr.strip().rpartition("\n")[2]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("seconds_train")]


def print_run(base, words, rows):
    if isinstance(rows, str):
        print(f"| {base} | {words} | {rows} |", flush=True)
        return
    first, last = rows[0], rows[-1]
    rollouts = PROMPTS * GROUP
    cells = [
        base,
        words,
        f"{first['ratio_error']:.1e}",
        f"{rollouts / last['seconds_sample']:.2f}",
        f"{rollouts * TRAINED / last['seconds_train']:.2f}",
        f"{last['peak_memory_gb']:.1f}",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def waits_of(function):
    """How often the function waits for the GPU, as torch warns of it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return len(caught)


def print_waits(base, folder, device):
    """Longer rollouts and more micro-batches must not wait more often."""
    counts = []
    for steps in (4, 8):
        options = speed.Args(steps=steps, precision="bfloat16")
        bench = speed.open_bench(base, folder, options, device)
        counts.append(waits_of(partial(speed.our_rollout, bench)))
    trajectory = speed.our_rollout(bench)
    advantage = torch.randn(len(bench.prompt_index), device=device)
    pairs = len(advantage) * (options.steps - 1)
    for parts in (2, 4):
        in_parts = replace(bench, args=replace(bench.args, train_batch=-(-pairs // parts)))
        counts.append(waits_of(partial(speed.our_update, in_parts, trajectory, advantage)))
    short, long, few, many = counts
    print(f"{base}: waits of a rollout {short} and {long}, of an update {few} and {many}")


def main(argv=None):
    args = flags.parse_args(Args, __doc__, argv)
    names = args.bases.split(",")
    for name in names:
        if name not in NAMES:
            flags.refuse(f"--bases {args.bases}: {name!r} is none of {', '.join(NAMES)}")
    device = processes.start("auto")
    print("| base | flags | first ratio | images/s | pairs/s | GB |\n" + "|---" * 6 + "|")
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / name
            build(name, folder, device)
            (folder / "prompts.txt").write_text("\n".join(speed.TEXTS[:PROMPTS]))
            torch.cuda.empty_cache()
            for number, words in enumerate(MORE if args.more else VARIANTS):
                rows = run(folder, words, Path(scratch) / f"run{number}", args.seconds)
                print_run(name, words, rows)
            if device.type == "cuda" and not args.more:
                print_waits(name, folder, device)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
