"""Plants the field's usual bugs, one line each, one at a time in a copy of this folder, and shows which test sees it.

    python tests/mutations.py                every bug: some minutes; exits with 1 if one survives, or if its place is not found exactly once
    python tests/mutations.py 3 17           these alone

A bug is (what, file, old text, new text, the tests that should see it: arguments of pytest). Not collected by pytest.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RATIO = "tests/test_train.py -k ratio_is_one"
CUT_OFF = "tests/test_train.py -k cut_off"
FLAGS = "tests/test_train.py -k does_what_it_says and "
BUGS = [
    # rollout and update disagree
    ("latents are kept in half precision", "sampling.py", "latents.append(x), x0_hats", "latents.append(x.bfloat16().float()), x0_hats", RATIO),
    ("the update sees another prompt noise", "train.py", "trajectory.condition(row, policy.fraction(k))", "trajectory.condition(row, policy.fraction(k + 1))",
     RATIO),
    ("the log-prob forgets the log of the std", "sampling.py", "-(0.5 * z**2 + torch.log(std) +", "-(0.5 * z**2 +", "tests/test_sampling.py -k log_prob"),
    ("each step copies the schedule's table anew", "sampling.py", "functools.cache(table.to)", "table.to", "tests/test_models.py -k stops_a_gpu"),
    # numbers that are none
    ("only a process with nothing but bad numbers is stopped", "guards.py", "        if not all(row):", "        if not any(row):", "tests/test_guards.py"),
    ("an infinite gradient is stepped along", "guards.py", "if not math.isfinite(norm):", "if norm != norm:", "tests/test_guards.py -k must_not"),
    ("a reward that is none is a score", "rewards.py", "if not found[key].isfinite().all():", "if False:", "tests/test_rewards.py"),
    # groups and advantages
    ("a group of equal rewards is divided by nothing", "shaping.py", "kept.std(-1, keepdim=True).clamp(min=floor)", "kept.std(-1, keepdim=True)",
     "tests/test_shaping.py tests/test_rewards.py tests/test_train.py -k advantage or equal"),
    ("rollouts of a group have different prompts", "train.py", "[np.array(samples) // N]", "[np.array(samples) % P]", "tests/test_seams.py"),
    ("the loss is optimistic where it should be pessimistic", "train.py", "return torch.maximum(-advantage * ratio", "return torch.minimum(-advantage * ratio",
     "tests/test_shaping.py -k clipped"),
    # processes
    ("gradients are not summed over the processes", "runtime.py", "flat = all_sum(torch.cat([p.grad.flatten() for p in parameters]))",
     "flat = torch.cat([p.grad.flatten() for p in parameters])", "tests/test_train.py -k two_processes"),
    ("a process's padding is gathered with its samples", "runtime.py", "part[:size] for part, size in zip(parts, sizes)", "part for part, size in zip(parts, sizes)",
     "tests/test_train.py -k two_processes"),
    ("processes that disagree go on", "runtime.py", "if a != b and not", "if a == b and not", "tests/test_train.py -k disagree"),
    # checkpoints
    ("a checkpoint is written in its place", "runtime.py", 'temporary = scratch / scratch.name', 'temporary = path',
     "tests/test_train.py -k write_atomic or kill_during"),
    ("the averages of the weights begin anew", "runtime.py", "            tensor.copy_(piece(saved[name], tensor))",
     '            "average" in name or tensor.copy_(piece(saved[name], tensor))', CUT_OFF),
    ("the optimizer begins anew", "runtime.py", "            load_state(optimizer, torch.load(", "            (optimizer, torch.load(", CUT_OFF),
    ("lines of the log stay that will be written again", "runtime.py", ".splitlines(True)[:lines]", ".splitlines(True)", CUT_OFF),
    ("every iteration has the first one's prompts", "train.py", "draw_prompts(len(prompts), P, args.seed, step)",
     "draw_prompts(len(prompts), P, args.seed, 0)", "tests/test_seams.py"),
    # files that run code
    ("a pickle in a checkpoint is run", "runtime.py", 'map_location="cpu", weights_only=True', 'map_location="cpu", weights_only=False',
     "tests/test_hostile.py -k checkpoint"),
    ("an archive is unpacked whatever it claims", "features.py", "    if size > max(LARGE, RATIO * packed):", "    if False:",
     "tests/test_hostile.py -k claims or honest"),
    # gradients and weights
    ("the KL has no gradient", "train.py", "kl = gaussian_kl(mean, reference_mean, std)", "kl = gaussian_kl(mean.detach(), reference_mean, std)",
     "tests/test_train.py -k strong_kl"),
    ("frozen weights learn", "train.py", 'args.train == "all" or "attn" in n', 'args.train == "all" or True', "tests/test_train.py -k only_attention"),
    ("the weights stay swapped for their average", "weights.py", "[weights[n].copy_(v) for n, v in kept.items()]", "[weights[n] for n, v in kept.items()]",
     "tests/test_train.py -k averaged_weights"),
    ("a LoRA is saved without its scale", "lora.py", '("lora_B", layer.lora_scale)', '("lora_B", 1)', "tests/test_lora.py"),
    ("a dealt network goes on with swapped weights", "sharding.py", ", reshard_after_forward=True)", ")", "-m slow tests/test_shard.py -k run_of_one"),
    # pictures, memory, flags, evaluation
    ("pixels are cut off and not rounded", "runtime.py", "(images.float() * 255).round()", "(images.float() * 255).floor()", "tests/test_seams.py"),
    ("the gradient depends on the size of a forward", "train.py", ".sum() / len(chunk)).backward()", ".sum() / len(pairs)).backward()", FLAGS + "batch"),
    ("the warm-up is ignored", "train.py", "args.lr * min(1, (step + 1) / max(1, args.warmup))", "args.lr", FLAGS + "warmup"),
    ("pictures are judged without the guidance asked for", "picture_sets.py", "sample(model, model.path, times, prompt, x_T, guidance, null)",
     "sample(model, model.path, times, prompt, x_T, 1.0, null)", "tests/test_eval.py tests/test_eval_command.py -k guidance or generate or npz_hold"),
    ("prompt and picture have the same noise", "train.py", "seeded_noise((*key, 1 + n), samples", "seeded_noise((*key, 0), samples", "tests/test_seams.py")]


def plant(tree, bug):
    """Runs the tests of one bug in the copy `tree` -> the name of the first test that fails, or None; the seconds. Raises ValueError where it has no place."""
    what, name, old, new, tests = bug
    source = (tree / name).read_text()
    if source.count(old) != 1:
        raise ValueError(f"{what}: {name} holds {source.count(old)} times: {old}")
    (tree / name).write_text(source.replace(old, new))
    files, _, chosen = tests.partition(" -k ")
    began, environment = time.time(), os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        ran = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files.split(), *(["-k", chosen] if chosen else [])],
                             cwd=tree, env=environment, capture_output=True, text=True)
    finally:
        (tree / name).write_text(source)
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", ran.stdout, re.M)
    if ran.returncode not in (0, 1):
        raise ValueError(f"{what}: pytest {tests} ended with {ran.returncode}: {ran.stdout[-500:]}")
    return found and found[1].split("[")[0], time.time() - began


def main(numbers):
    survived, lines = 0, [("", "bug", "file", "seen by", "s")]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "__pycache__", ".pytest_cache", "runs", ".venv"))
        for n, bug in enumerate(BUGS, 1):
            if not numbers or n in numbers:
                try:
                    test, seconds = plant(tree, bug)
                except ValueError as error:
                    test, seconds = f"NOT PLANTED: {error}", 0
                survived += not test or test.startswith("NOT PLANTED")
                lines.append((str(n), bug[0], bug[1], test or "SURVIVED", f"{seconds:.0f}"))
                print(" | ".join(lines[-1]), flush=True)
    print("", *("| " + " | ".join(line) + " |" for line in [lines[0], ("---",) * 5, *lines[1:]]), f"{len(lines) - 1} bugs, {survived} not seen", sep="\n")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main({int(word) for word in sys.argv[1:]}))
