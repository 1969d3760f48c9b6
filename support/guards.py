"""Guards: what stops a run before it does harm, on every process at once, and says where to look.

A number that is none is found before the optimizer step and named: iteration, process, tensor. What fails on one process alone (a reward, a
feature network) ends the others too, instead of leaving them to wait for it. All go on from the same iteration. The ratio of the first update is
1, or rollout and update disagree; a compiled network has the plain one's gradient. A full disk is one line, and costs no more than what came
after the last checkpoint.
Left out: skipping the bad step and going on, which hides the cause.
"""
import functools
import math
import shutil
import sys
import torch
from contextlib import contextmanager
from support.files import newest_checkpoint
from support.processes import all_say, gather, rank, world
from support.sharding import local

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-4, "compiled float32": 1e-5, "compiled bfloat16": 1e-3}         # of the first ratio


def tolerance(args):
    """How far the first ratio may be from 1: it grows with the guidance, which amplifies rounding."""
    kind = f"compiled {args.precision}" if args.compile else args.precision
    return TOLERANCE[kind] * (1 + 2 * abs(args.guidance - 1))


@functools.cache
def warn(line):
    """One line on stderr, from the first process, however often it is said."""
    if rank() == 0:
        print(f"warning: {line}", file=sys.stderr)


@contextmanager
def together(where):
    """What fails within the block on one process stops them all, and each names that process. No collective may stand in the block."""
    mistake = None
    try:
        yield
    except Exception as error:
        mistake = error
    for process, text in enumerate(all_say(mistake and (str(mistake) or type(mistake).__name__))):
        if text:
            kind = FloatingPointError if isinstance(mistake, FloatingPointError) else RuntimeError
            raise kind(f"{where}, process {process}: {text}; stopped before the update") from mistake


@contextmanager
def writing(out):
    """Within the block a full disk, or a folder that was taken away, ends the run with one line."""
    try:
        yield
    except OSError as error:
        why, step = error.args[0][0][2] if isinstance(error, shutil.Error) else error, newest_checkpoint(out)[1]["step"]        # copytree names each file
        raise SystemExit(f"error: {out}: {why}; {f'checkpoint {step}' if step else 'what is there'} is whole; the same command goes on from it") from None


def check_finite(step, tensors, device):
    """Stops every process if a number of one is none. tensors: {name: tensor, or None for none}, the same names on every process."""
    fine = torch.ones((), dtype=torch.bool, device=device)
    fine = torch.stack([fine if t is None else local(t).isfinite().all().to(device) for t in tensors.values()])
    table = gather(fine[None].to(torch.uint8), world())                  # [processes, tensors]; looked at once, for a GPU must stop for it
    for process, row in enumerate(table.tolist()):
        if not all(row):
            raise FloatingPointError(f"iteration {step + 1}, process {process}: {[*tensors][row.index(0)]} is not finite; stopped before the optimizer step")


def finite(tensors):
    """Raises FloatingPointError, on this process, for the first of {name: tensor} with a number that is none. For a block of `together`."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{name} is not finite")


def check_start(out, step, device):
    """Stops every process if they would go on from different iterations `step`: hosts that do not see the same run folder `out`."""
    steps = gather(torch.tensor([step], device=device), world()).tolist()
    if other := next((process for process, found in enumerate(steps) if found != steps[0]), 0):
        raise RuntimeError(f"{out}: process 0 would go on from iteration {steps[0]}, process {other} from {steps[other]}; all hosts must see the same --out")


def check_update(step, norm, ratio_error, tolerance, clip):
    """Stops every process before the optimizer step when the norm of the gradients is not finite, or when the update cannot reproduce the rollouts.

    ratio_error: the largest |ratio - 1| before the first step, over all processes, and `tolerance`, which it may reach; clip: that of the ratio.
    Warns, once, of a clip below ten times that error. Raises FloatingPointError.
    """
    if not math.isfinite(norm):
        raise FloatingPointError(f"iteration {step + 1}: the norm of the gradients is not finite; stopped before the optimizer step")
    if ratio_error > tolerance:
        raise FloatingPointError(f"iteration {step + 1}: the ratio before the first update is off by {ratio_error:.1e}: rollout and update disagree; "
                                 "look for dropout, stored precision, other times, other guidance or other prompt noise")
    if ratio_error > clip / 10:
        warn(f"the clip of the ratio, {clip:.1e}, is less than ten times the ratio's error before any update (ratio_error in metrics.jsonl), so that "
             "rounding is clipped too; raise --clip, or take --precision float32")


def check_compiled(model, prompt, trained):
    """Raises ValueError if the gradient of the parameters `trained` is another when the network is compiled: compilers err, and no ratio shows it.

    prompt: embeddings [B, ...], of which the first is looked at."""
    x, t = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0)).to(model.device), model.path.times(4)[1:3].float().to(model.device)
    trained, prompt, found = list(trained), tuple(y[:1].expand(2, *y.shape[1:]) for y in prompt), []
    call = model.network._compiled_call_impl
    for model.network._compiled_call_impl in (None, call):
        grads = torch.autograd.grad((model(x, t, prompt)[0] * x).mean(), trained, allow_unused=True)
        found.append(torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(trained, grads)]))
    error = ((found[1] - found[0]).norm() / found[0].norm()).item()
    if not error < (0.1 if model.precision == "bfloat16" else 1e-3):
        raise ValueError(f"--compile: torch.compile gets the gradient of this network wrong here, by {error:.1%} of its length; leave it out")
