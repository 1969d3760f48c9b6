"""Plants the field's usual bugs, one at a time, in a copy of the project: which test sees it?

    python tests/mutations.py           every bug, in minutes; exits with 1 if one survives
    python tests/mutations.py 3 17      these alone

A bug's place is a function and an expression (or statement) in it, compared as syntax, so that line
breaks, comments and the rest of the file do not matter. Not collected by pytest.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Bug:
    """In `function` of `file`, the expression `old` becomes `new`; `tests` should see it."""

    what: str
    file: str
    function: str  # name, or Class.name
    old: str
    new: str
    tests: str  # arguments of pytest; what follows -k is one of them


RATIO = "tests/runs/test_train_loop.py -k ratio_is_one"
RESUME = "tests/runs/test_train_loop.py -k cut_off"
TWO_PROCESSES = "tests/runs/test_train_loop.py -k two_processes"
SEAMS = "tests/runs/test_seams.py"

BUGS = [
    # Rollout and update disagree.
    Bug(
        "latents are kept in half precision",
        "sampling.py",
        "roll_part",
        "latents.append(x_s)",
        "latents.append(x_s.bfloat16().float())",
        RATIO,
    ),
    Bug(
        "the update sees another prompt noise",
        "train.py",
        "pair_losses",
        "policy.fraction(k)",
        "policy.fraction(k + 1)",
        RATIO,
    ),
    Bug(
        "the log-prob forgets the log of the std",
        "sampling.py",
        "log_prob",
        "0.5 * z**2 + torch.log(std)",
        "0.5 * z**2",
        "tests/test_sampling.py -k log_prob",
    ),
    Bug(
        "each step copies the schedule's table anew",
        "sampling.py",
        "VP",
        "functools.cache(table.to)",
        "table.to",
        "tests/bases -k stops_a_gpu",
    ),
    # Numbers that are NaN or infinity.
    Bug(
        "only a process with nothing but bad numbers is stopped",
        "support/guards.py",
        "check_finite",
        "all(is_finite)",
        "any(is_finite)",
        "tests/support/test_guards.py",
    ),
    Bug(
        "an infinite gradient is stepped along",
        "support/guards.py",
        "check_update",
        "math.isfinite(grad_norm)",
        "grad_norm == grad_norm",
        "tests/support/test_guards.py",
    ),
    Bug(
        "a reward that is NaN is a score",
        "rewards/__init__.py",
        "Reward.score",
        "score.isfinite()",
        "torch.ones_like(score)",
        "tests/rewards",
    ),
    # Groups and advantages.
    Bug(
        "a group of equal rewards is divided by nothing",
        "shaping.py",
        "group_advantage",
        "kept.std(-1, keepdim=True).clamp(min=smallest_std)",
        "kept.std(-1, keepdim=True)",
        "tests/test_shaping.py -k advantage or equal",
    ),
    Bug(
        "rollouts of a group have different prompts",
        "train.py",
        "sample_groups",
        "sample // N",
        "sample % P",
        SEAMS,
    ),
    Bug(
        "the loss is optimistic where it should be pessimistic",
        "train.py",
        "clipped_loss",
        "torch.maximum(unclipped, clipped)",
        "torch.minimum(unclipped, clipped)",
        "tests/test_train.py -k clipped",
    ),
    Bug(
        "the steps of a rollout stand together in a minibatch",
        "train.py",
        "minibatches",
        "random.permuted(pairs, axis=0)",
        "random.permuted(pairs, axis=1)",
        "tests/test_train.py -k minibatches",
    ),
    Bug(
        "a minibatch holds the same rollouts at every step",
        "train.py",
        "minibatches",
        "random.permuted(shuffled, axis=1)",
        "shuffled",
        "tests/test_train.py -k minibatches",
    ),
    # Processes.
    Bug(
        "gradients are not summed over the processes",
        "support/processes.py",
        "sum_gradients",
        "all_sum(flat)",
        "flat",
        TWO_PROCESSES,
    ),
    Bug(
        "a process's padding is gathered with its samples",
        "support/processes.py",
        "gather",
        "part[:size]",
        "part",
        TWO_PROCESSES,
    ),
    Bug(
        "processes that disagree go on",
        "support/processes.py",
        "check_equal",
        "own != other",
        "own == other",
        "tests/support/test_processes.py -k disagree",
    ),
    # Checkpoints.
    Bug(
        "a checkpoint is written in its place",
        "support/files.py",
        "write_atomic",
        "scratch / scratch.name",
        "path",
        "tests/support/test_support_files.py tests/runs -k write_atomic or kill_during",
    ),
    Bug(
        "the averages of the weights begin anew",
        "support/files.py",
        "load_checkpoint",
        "tensors.items()",
        "[pair for pair in tensors.items() if 'average' not in pair[0]]",
        RESUME,
    ),
    Bug(
        "the optimizer begins anew",
        "support/files.py",
        "load_checkpoint",
        "load_state(optimizer, state)",
        "state",
        RESUME,
    ),
    Bug(
        "lines of the log stay that will be written again",
        "support/files.py",
        "Log.__init__",
        "read_log(self.path)[:lines]",
        "read_log(self.path)",
        RESUME,
    ),
    Bug(
        "every iteration has the first one's prompts",
        "train.py",
        "sample_groups",
        "draw_prompts(len(setup.prompts), P, args.seed, step)",
        "draw_prompts(len(setup.prompts), P, args.seed, 0)",
        SEAMS,
    ),
    # Files that run code.
    Bug(
        "a pickle in a checkpoint is run",
        "support/files.py",
        "load_checkpoint",
        "torch.load(folder / 'optimizer.pt', map_location='cpu', weights_only=True)",
        "torch.load(folder / 'optimizer.pt', map_location='cpu', weights_only=False)",
        "tests/runs/test_hostile_files.py",
    ),
    Bug(
        "an archive is unpacked whatever it claims",
        "rewards/targets.py",
        "check_unpacked",
        "size > max(LARGE, RATIO * packed)",
        "False",
        "tests/rewards/test_targets.py tests/runs/test_hostile_files.py",
    ),
    # Gradients and weights.
    Bug(
        "the KL has no gradient",
        "train.py",
        "pair_losses",
        "gaussian_kl(mean, base_mean, std)",
        "gaussian_kl(mean.detach(), base_mean, std)",
        "tests/runs/test_train_loop.py -k strong_kl",
    ),
    Bug(
        "frozen weights learn",
        "commands/training.py",
        "choose_trained",
        'args.train == "all" or model.trained(name)',
        "True",
        "tests/runs/test_train_loop.py -k only_attention",
    ),
    Bug(
        "the weights stay swapped for their average",
        "support/averages.py",
        "swapped",
        "copy_into(weights, kept)",
        "kept",
        "tests/runs/test_train_loop.py -k averaged_weights",
    ),
    Bug(
        "post-hoc EMA takes the last time for the largest",
        "support/averages.py",
        "ema_coefficients",
        "t.max()",
        "t[-1]",
        "tests/support/test_averages.py",
    ),
    Bug(
        "a LoRA is saved without its scale",
        "bases/lora.py",
        "export",
        "layer.lora_B.weight.detach().float() * layer.lora_scale",
        "layer.lora_B.weight.detach().float()",
        "tests/bases/test_lora.py",
    ),
    Bug(
        "a dealt network goes on with swapped weights",
        "support/sharding.py",
        "shard",
        "fully_shard(block, mesh=mesh, reshard_after_forward=True)",
        "fully_shard(block, mesh=mesh)",
        "tests/support/test_sharding.py tests/runs -k run_of_one",
    ),
    # Pictures, memory, flags, evaluation.
    Bug(
        "pixels are cut off and not rounded",
        "support/files.py",
        "to_bytes",
        "(images.float() * 255).round()",
        "(images.float() * 255).floor()",
        "tests/support/test_support_files.py -k byte",
    ),
    Bug(
        "the gradient depends on the size of a forward",
        "train.py",
        "backward",
        "len(minibatch)",
        "len(pairs)",
        "tests/runs/test_flags.py -k train_batch",
    ),
    Bug(
        "the warm-up is ignored",
        "train.py",
        "set_learning_rate",
        "args.lr * min(1, iteration / max(1, args.warmup))",
        "args.lr",
        "tests/runs/test_flags.py -k warmup",
    ),
    Bug(
        "pictures are judged without the guidance asked for",
        "commands/picture_sets.py",
        "stream",
        "sample(model, model.path, times, prompt, x_T, guidance, null_prompt)",
        "sample(model, model.path, times, prompt, x_T, 1.0, null_prompt)",
        "tests/commands/test_picture_sets.py tests/test_eval.py",
    ),
    Bug(
        "the hypervolume's corner is the first run's start",
        "commands/compare.py",
        "table",
        "min(starts)",
        "starts[0]",
        "tests/commands/test_compare.py",
    ),
    Bug(
        "prompt and picture have the same noise",
        "train.py",
        "explore",
        "seeded_noise((*key, 1 + n), samples, embedding.shape[1:])",
        "seeded_noise((*key, 0), samples, embedding.shape[1:])",
        SEAMS,
    ),
]


# --------------------------------------------------------------------------------------------------
# Planting.


def find_function(tree, name):
    """The node of the function `name` or Class.name. Raises ValueError."""
    node = tree
    for part in name.split("."):
        children = [n for n in ast.walk(node) if getattr(n, "name", None) == part]
        if not children:
            raise ValueError(f"there is no {name}")
        node = children[0]
    return node


def planted(source, bug):
    """The source of a file with the bug in it. Raises ValueError unless it has one place."""
    old = ast.parse(bug.old).body[0]
    wanted = old.value if isinstance(old, ast.Expr) else old
    function = find_function(ast.parse(source), bug.function)
    places = [n for n in ast.walk(function) if ast.dump(n) == ast.dump(wanted)]
    if len(places) != 1:
        raise ValueError(f"{bug.function} in {bug.file} holds {len(places)} times: {bug.old}")
    place = places[0]
    lines = source.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: place.lineno - 1])) + place.col_offset
    end = sum(map(len, lines[: place.end_lineno - 1])) + place.end_col_offset
    text = source.encode()
    return (text[:start] + bug.new.encode() + text[end:]).decode()


def run_tests(folder, bug):
    """Runs the bug's tests in a copy of the project -> the first test that fails, or None."""
    files, _, chosen = bug.tests.partition(" -k ")
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    words += ["-m", "slow or not slow", *files.split()]
    if chosen:
        words += ["-k", chosen]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if ran.returncode not in (0, 1):
        raise ValueError(f"pytest {bug.tests} ended with {ran.returncode}: {ran.stdout[-500:]}")
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", ran.stdout, re.M)
    return failed[1].split("[")[0] if failed else None


def plant(folder, bug):
    """Plants a bug in the copy, runs its tests and takes it out again -> the test that sees it."""
    path = folder / bug.file
    source = path.read_text()
    path.write_text(planted(source, bug))
    try:
        return run_tests(folder, bug)
    finally:
        path.write_text(source)


def copy_of_project(folder):
    """A copy of all that the tests need."""

    def ignore(path, names):
        """Not tests/runs, but the folder runs/ at the top."""
        at_top = {"runs", ".git", ".venv"} if Path(path) == ROOT else set()
        return at_top | {"__pycache__", ".pytest_cache", ".ruff_cache"}

    shutil.copytree(ROOT, folder, ignore=ignore)
    return folder


def main(numbers):
    survived = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = copy_of_project(Path(scratch) / "project")
        print("| | bug | file | seen by | s |")
        print("|---|---|---|---|---|")
        for number, bug in enumerate(BUGS, 1):
            if numbers and number not in numbers:
                continue
            began = time.time()
            try:
                seen_by = plant(folder, bug)
            except (ValueError, SyntaxError) as error:
                seen_by = None
                print(f"not planted: {error}", file=sys.stderr)
            if seen_by is None:
                survived += 1
            seconds = f"{time.time() - began:.0f}"
            row = [str(number), bug.what, bug.file, seen_by or "SURVIVED", seconds]
            print("| " + " | ".join(row) + " |", flush=True)
    print(f"{len(numbers) or len(BUGS)} bugs, {survived} not seen")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main({int(word) for word in sys.argv[1:]}))
