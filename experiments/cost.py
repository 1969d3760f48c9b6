"""The README's table of how the cost grows with the work: one flag at a time, five iterations of train.py each, on one thread a process.

    python experiments/cost.py        # about fifteen minutes; nothing else should run beside it

What varies: the group, the sampling steps, the trained steps, the reference of the FID reward and its price, the pictures' side (a small U-Net of
random weights and its VAE), the processes, the compiler. Printed: seconds of an iteration's rollouts with decoding and rewards, of the update with prices and
averages (medians over the iterations but the first), the sum against the first row of its part, and the peak memory of the first process.
Left out: loading, evaluations and checkpoints, which --eval_every and --save_every space out.
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

SHORT = "--device cpu --iterations 5 --eval_every 5 --eval_images 20 --eval_steps 1 --snapshot_every 0".split()
FID = {"reward": "class:1,fid:0.3"}
PARTS = {                                                                # title: (flags of the part's rows, what each row changes; the first is the measure)
    "the default base": ({}, [{}, {"group_size": 32}, {"group_size": 64}, {"steps": 16}, {"window": "0:7"}, {"kl": 0.1}, {"passes": 2}, {"guidance": 2.0},
                              {"precision": "bfloat16"}, {"checkpointing": True}, {"processes": 2}]),
    "with the FID reward": (FID, [{}, {"reference": 2560}, {"reference": 10240}, {"price": "quadratic"}, {"price": "exact", "replace": 1},
                                  {"reference": 10240, "price": "exact", "replace": 1}]),
    "a small U-Net": ({"lora": 4, "reward": "jpeg", "diversity_features": "latents", "prompts_per_step": 2, "group_size": 4, "steps": 4, "window": "0:2"},
                      [{"pixels": 96}, {"pixels": 192}, {"pixels": 384}]),
    "compiled": ({"precision": "bfloat16"}, [{}, {"compile": True}])}    # the last, for it needs a C++ compiler


def base_of(pixels, folder):
    """A random Stable Diffusion 1 that draws pictures of this side."""
    random_bases.build("sd1", folder, "cpu")
    for part, side in (("unet", pixels // 8), ("vae", pixels)):
        path = Path(folder) / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": side}))
    return str(folder)


def measure(flags, folder):
    """-> seconds of SAMPLE, seconds of TRAIN, peak memory in GB."""
    flags, argv = dict(flags), [*SHORT, "--out", f"{folder}/run"]
    processes, pixels = flags.pop("processes", 1), flags.pop("pixels", 0)
    if pixels:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("a boot\na bag\n")
        argv += ["--model", base_of(pixels, f"{folder}/base"), "--prompts", str(prompts)]
    argv += command_line(flags)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run([sys.executable, *torchrun, "train.py", *argv], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"failed: train.py {' '.join(argv)}\n{done.stderr}")
    rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()][2:]
    return (*(statistics.median(row[f"seconds_{part}"] for row in rows) for part in ("sample", "train")), rows[-1]["peak_memory_gb"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--only", default="", help="one part, by the beginning of its name")
    only = parser.parse_args().only
    for title, (common, rows) in PARTS.items():
        if not title.startswith(only):
            continue
        print(f"\n| {title} | rollout, s | update, s | together, times the first | GB |\n|---|---|---|---|---|", flush=True)
        first = None
        for row in rows:
            with tempfile.TemporaryDirectory() as folder:
                sample, train, memory = measure(common | row, folder)
            first = first or sample + train
            name = ", ".join(f"{key} {value}" if value is not True else key for key, value in row.items()) or "as it is"
            print(f"| {name} | {sample:.2f} | {train:.2f} | {(sample + train) / first:.2f} | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
