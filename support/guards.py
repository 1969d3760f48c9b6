"""Guards: what stops a run before it does harm, on every process at once, and says where to look.

NaN or infinity is found before the optimizer step, and named: iteration, process, tensor. What
fails on one process alone (a reward, a feature network) ends the others too, which would wait for
it. All processes resume from the same iteration. The ratio before the first update is 1, or rollout
and update disagree. A full disk costs one line, and the work since the last checkpoint.
Left out on purpose: skipping a bad step and going on, which hides its cause.
"""

import functools
import math
import shutil
import sys
from contextlib import contextmanager

import torch

from support import compiling
from support.files import newest_checkpoint
from support.flags import one_line
from support.processes import all_say, gather, rank, world
from support.sharding import local

# The largest |ratio - 1| before the first update, by precision.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-4}


def tolerance(args):
    """How far the first ratio may be from 1. Guidance amplifies rounding, so it grows with it."""
    table = compiling.TOLERANCE if args.compile else TOLERANCE
    return table[args.precision] * (1 + 2 * abs(args.guidance - 1))


@functools.cache
def warn(line):
    """One line on stderr, of the first process, and only the first time."""
    if rank() == 0:
        print(f"warning: {one_line(line)}", file=sys.stderr)


@contextmanager
def together(where):
    """What fails within the block on one process stops them all; each names that process.

    `where`, as in "iteration 3", begins the message. Collective, but no collective may stand in the
    block. Raises FloatingPointError where this process did, else RuntimeError.
    """
    mistake, text = None, None
    try:
        yield
    except Exception as error:
        mistake = error
        text = str(error) or type(error).__name__
    kind = FloatingPointError if isinstance(mistake, FloatingPointError) else RuntimeError
    for process, failure in enumerate(all_say(text)):
        if failure:
            message = f"{where}, process {process}: {failure}; stopped before the update"
            raise kind(message) from mistake


@contextmanager
def writing(out):
    """Within the block a full disk, or a folder that was taken away, ends the run with one line."""
    try:
        yield
    except OSError as error:
        reason = error
        if isinstance(error, shutil.Error):  # copytree's: a list of (from, to, reason)
            reason = error.args[0][0][2]
        _, state = newest_checkpoint(out)
        rest = f"checkpoint {state['step']}" if state["step"] else "what is there"
        message = f"{out}: {reason}; {rest} is whole; the same command goes on from it"
        raise SystemExit(f"error: {one_line(message)}") from None


def check_weights(network, where):
    """Raises ValueError for a network whose weights hold NaN or infinity; `where` they are from."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{where}: {name} holds NaN or infinity; get a whole copy")


def check_finite(step, tensors, device):
    """Collective: raises FloatingPointError if a tensor of any process holds NaN or infinity.

    tensors: {name: tensor or None}, the same names on every process.
    """
    finite_here = []
    for tensor in tensors.values():
        if tensor is None:
            finite_here.append(torch.ones((), dtype=torch.bool, device=device))
        else:
            finite_here.append(local(tensor).isfinite().all().to(device))
    row = torch.stack(finite_here)[None].to(torch.uint8)
    table = gather(row, world())  # [processes, tensors]
    names = list(tensors)
    for process, is_finite in enumerate(table.tolist()):  # one .tolist(): a GPU waits for each
        if not all(is_finite):
            name = names[is_finite.index(0)]
            raise FloatingPointError(
                f"iteration {step + 1}, process {process}: {name} is not finite; "
                "stopped before the optimizer step"
            )


def finite(tensors):
    """Raises FloatingPointError for the first of {name: tensor} that holds NaN or infinity.

    On this process alone: for a block of `together`.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{name} is not finite")


def check_start(out, step, device):
    """Collective: raises RuntimeError if the processes would resume from different steps.

    So it is where hosts do not see the same run folder `out`.
    """
    steps = gather(torch.tensor([step], device=device), world()).tolist()
    for process, other in enumerate(steps):
        if other != steps[0]:
            raise RuntimeError(
                f"{out}: process 0 would go on from iteration {steps[0]}, process {process} from "
                f"{other}; all hosts must see the same --out"
            )


def check_update(step, grad_norm, ratio_error, tolerance, clip):
    """Raises FloatingPointError before an optimizer step that must not be made.

    That is where the norm of the gradients is NaN or infinity, or where the update does not
    reproduce the rollouts: ratio_error, the largest |ratio - 1| before the first update, over all
    processes, is above `tolerance`. Warns, once, if `clip`, the range of the ratio, is less than
    ten times that error. All arguments are the same on every process.
    """
    if not math.isfinite(grad_norm):
        raise FloatingPointError(
            f"iteration {step + 1}: the norm of the gradients is not finite; "
            "stopped before the optimizer step"
        )
    if ratio_error > tolerance:
        raise FloatingPointError(
            f"iteration {step + 1}: the ratio before the first update is off by "
            f"{ratio_error:.1e}: rollout and update disagree; look for dropout, stored precision, "
            "other times, other guidance or other prompt noise"
        )
    if ratio_error > clip / 10:
        warn(
            f"the clip of the ratio, {clip:.1e}, is less than ten times the ratio's error before "
            "any update (ratio_error in metrics.jsonl), so that rounding is clipped too; raise "
            "--clip, or take --precision float32"
        )
