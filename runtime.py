"""Runtime: the plumbing that is no idea of its own: command line, process group, run folder, checkpoints, pictures.

Sizes are global: n samples are dealt to the processes in contiguous shares, results are gathered in order, gradients are summed with one
flat all-reduce; what a sample is depends on its number alone. One process needs no torchrun.
A run folder holds config.json, metrics.jsonl, grids/, checkpoint-NNNNN/ and model/. Every write goes to a temporary name, is flushed to
disk and renamed, so a kill leaves the old file or the new one; the same command again goes on from the newest checkpoint.
"""
import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sharding import is_piece, load_state, piece, whole, whole_state


# ---------------------------------------------------------------------------------------------------------------------
# Command line.

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each flag that has one and does not say it itself, and the file's header as it stands."""

    def _get_help_string(self, action):
        return action.help if action.default == "" or "(default" in action.help else super()._get_help_string(action)


def parse_args(cls, description, argv=None):
    """A dataclass as a command line: each field's name, type and default, and its trailing comment as help. Bad flags exit with 2."""
    source, section, sections = inspect.getsource(cls), None, {}
    comments = dict(re.findall(r"^ +(\w+) *:.*?# *(.+)$", source, re.M))
    for line in source.splitlines():
        if title := re.match(r" +# (.+)$", line):
            section = title[1]
        elif field := re.match(r" +(\w+) *:", line):
            sections[field[1]] = section
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, formatter_class=Help)
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(sections.values())}
    for f in dataclasses.fields(cls):
        kind = {"choices": get_args(f.type)} if get_origin(f.type) is Literal else {"type": f.type, "metavar": f.type.__name__}
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else kind
        if f.default is dataclasses.MISSING:                             # a field without default is positional; a list takes one or more
            parser.add_argument(f.name, help=comments[f.name], **({"nargs": "+", "metavar": f.name.rstrip("s").upper()} if f.type is list else kind))
            continue
        groups[sections[f.name]].add_argument("--" + f.name, default=f.default, help=comments[f.name], **kind)
    return cls(**vars(parser.parse_args(argv)))


def refuse(error):
    """A user's mistake: one line on stderr (from the first process only), exit code 2."""
    if rank() == 0:
        print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def refusing():
    """Within the block a ValueError is the user's mistake: one that shows only when a file is read whole."""
    try:
        yield
    except ValueError as error:
        refuse(error)


# ---------------------------------------------------------------------------------------------------------------------
# Processes.

def start(device="auto", minutes=30):
    """Joins the process group if torchrun started us; -> the device of this process. A collective waits for `minutes` at most."""
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ and not dist.is_initialized():
        from torch import _dynamo  # noqa: F401                          # by an optimizer it would come later, and hold the group and its threads to the end
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=minutes))
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def finish():
    if dist.is_initialized():
        dist.barrier()                                                   # nobody leaves while another still needs him
        dist.destroy_process_group()


class Interrupt:
    """Within the block SIGTERM and Ctrl-C are noted and not obeyed: `asked` tells every process, at a line that all of them reach."""

    def __enter__(self):
        self.signal = 0
        self.before = {s: signal.signal(s, lambda number, frame: setattr(self, "signal", number)) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def asked(self, device):
        if asked := int(all_max(self.signal, device)):                   # else one that came meanwhile stays for the next time
            self.signal = asked
        return asked > 0

    def leave(self, out):
        """Ends the process as a shell expects of one that a signal has stopped."""
        if rank() == 0:
            print(f"{out}: stopped after checkpoint {newest_checkpoint(out)[1]['step']} by signal {self.signal}; the same command goes on")
        finish()
        raise SystemExit(128 + self.signal)


def check_equal(weights, device):
    """Raises RuntimeError if the processes do not hold the same weights: a sum of each tensor is compared."""
    if dist.is_initialized():
        mine = torch.stack([value.detach().double().sum() for value in weights.values()]).to(device)
        for kind in (dist.ReduceOp.MIN, dist.ReduceOp.MAX):
            seen = mine.clone()
            dist.all_reduce(seen, kind)
            for name, a, b in zip(weights, mine.tolist(), seen.tolist()):
                if a != b and not (math.isnan(a) and math.isnan(b)):
                    raise RuntimeError(f"the processes disagree about {name}: {a!r} on process {rank()}, {b!r} on another; the last checkpoint is whole")


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def share(n, of=None):
    """The samples of 0 .. n - 1 that belong to this process (or to process `of`): contiguous, sizes differing by one at most."""
    of = rank() if of is None else of
    return range(n * of // world(), n * (of + 1) // world())


def gather(mine, n):
    """Every process's rows, in order of sample -> [n, ...] on every process; mine is [len(share(n)), ...]."""
    if not dist.is_initialized():
        return mine
    sizes = [len(share(n, r)) for r in range(world())]
    padded = torch.cat([mine, mine.new_zeros(max(sizes) - len(mine), *mine.shape[1:])]).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def all_say(what):
    """What each process says, any object, in their order."""
    said = [what] * world()
    if dist.is_initialized():
        dist.all_gather_object(said, what)
    return said


def all_sum(tensor):
    """The sum of a tensor over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters):
    """Adds up the gradients of all processes by one flat all-reduce; a parameter that got none here counts as 0."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if dist.is_initialized():
        flat = all_sum(torch.cat([p.grad.flatten() for p in parameters]))
        for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(g.view_as(p))


def all_max(number, device):
    """The largest of a number, or tensor of one, over the processes."""
    tensor = torch.as_tensor(number, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def peak_memory(device):
    """GB: of the GPU if there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---------------------------------------------------------------------------------------------------------------------
# Files.

def write_atomic(path, write):
    """write(temporary path), flush it to disk, rename it to path, a file or a folder: only whole results are ever seen there. What a kill leaves,
    safetensors' own temporary files too, lies in the folder .tmp-NAME, where the next one finds it."""
    scratch = (path := Path(path)).with_name(".tmp-" + Path(path).name)
    temporary = scratch / scratch.name
    scratch.unlink() if scratch.is_file() else shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        write(temporary)
    except (SafetensorError, RuntimeError) as error:                     # what safetensors and torch.save make of a full disk
        raise OSError(" ".join(str(error).split())[:200]) from error
    for file in [temporary] + (sorted(temporary.rglob("*")) if temporary.is_dir() else []):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle), os.close(handle)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(temporary, path), scratch.rmdir()
    handle = os.open(path.parent, os.O_RDONLY)                           # the new name is on disk only when its folder is
    os.fsync(handle), os.close(handle)


def run_name(changed):
    """The default --out: runs/ and the flags that were changed; a name too long for a folder is cut and ends in its hash."""
    name = ",".join(f"{k}={v}" for k, v in changed.items()).replace("/", "_") or "default"
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return "runs/" + (name if len(name.encode()) <= 200 else f"{name.encode()[:180].decode(errors='ignore')}-{digest}")


def open_run(out, config, free=()):
    """Prepares the run folder, or checks that it belongs to this configuration. Raises ValueError naming the flags that differ."""
    path = Path(out) / "config.json"
    there = next(p for p in (Path(out).absolute(), *Path(out).absolute().parents) if os.path.lexists(p))
    closed = os.path.isdir(there) and not os.access(there, os.W_OK | os.X_OK)
    blocked = [p for p in Path(out).parents if os.path.exists(p) and not os.path.isdir(p)]
    if blocked or closed or max(map(len, map(os.fsencode, path.parts))) > 255:
        reason = f"its parent {blocked[0]} is a file" if blocked else f"nothing may be written to {there}" if closed else "the name is too long"
        raise ValueError(f"--out {str(out)[:500]}: {reason}; choose another --out")
    if path.is_file():
        try:
            before = json.loads(path.read_text())
            keys = sorted(k for k in {*before, *config} - {*free} if before.get(k) != config.get(k))
            differ = [f"--{k} {before.get(k)!r} there, {config.get(k)!r} here" for k in keys]
        except (ValueError, AttributeError, RecursionError):
            differ = ["config.json is unreadable"]
        if differ:
            raise ValueError(f"--out {out}: belongs to another configuration ({'; '.join(differ)}); choose another --out or the same flags")
    elif Path(out).exists() and (not Path(out).is_dir() or any(not p.name.startswith(".tmp-") for p in Path(out).iterdir())):
        raise ValueError(f"--out {out}: exists and is not a run of this program (no config.json); choose another --out")


def save_checkpoint(out, step, weights, optimizer, lines, keep):
    """checkpoint-NNNNN/: weights.safetensors, optimizer.pt (if there is one), state.json (step, and how many lines of metrics.jsonl belong to it)."""
    weights, state = {k: whole(v.detach()) for k, v in weights.items()}, optimizer and whole_state(optimizer)

    def write(folder):
        folder.mkdir()
        save_file({k: v.cpu().contiguous() for k, v in weights.items()}, folder / "weights.safetensors")
        if state:
            torch.save(state, folder / "optimizer.pt")
        (folder / "state.json").write_text(json.dumps({"step": step, "lines": lines}))
    if rank() == 0:
        write_atomic(Path(out) / f"checkpoint-{step:05d}", write)
        for old in checkpoints(out)[:-keep]:
            shutil.rmtree(old)


def save_model(folder, model):
    dealt = any(map(is_piece, model.network.parameters()))               # then every process has a piece to give
    weights = model.weights() if dealt or rank() == 0 else None
    if rank() == 0:
        write_atomic(folder, lambda path: model.save(path, weights))


def checkpoints(out):
    return sorted((p for p in Path(out).glob("checkpoint-*") if p.name[11:].isdecimal()), key=lambda folder: int(folder.name[11:]))


@contextmanager
def undamaged(folder):
    """Refuses a checkpoint that cannot be read, by the one line that says so; json, safetensors, zip and pickle each raise others."""
    try:
        yield
    except Exception as error:
        refuse(f"{folder}: damaged ({type(error).__name__}), and nothing in it was run; remove it, and the same command goes on from the one before")


def newest_checkpoint(out):
    """-> (folder, its state) or (None, {"step": 0, "lines": 0})."""
    for folder in checkpoints(out)[-1:]:
        with undamaged(folder):
            return folder, {key: int(json.loads((folder / "state.json").read_text())[key]) for key in ("step", "lines")}
    return None, {"step": 0, "lines": 0}


def load_checkpoint(folder, weights, optimizer=None):
    """Copies a checkpoint's tensors into `weights` (a dict of tensors, as it was saved) and its state into the optimizer."""
    with undamaged(folder), torch.no_grad():
        saved = load_file(folder / "weights.safetensors")
        for name, tensor in weights.items():
            tensor.copy_(piece(saved[name], tensor))
        if optimizer:
            load_state(optimizer, torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))


class Log:
    """config.json, and metrics.jsonl with one object a line; written by the first process only."""

    def __init__(self, out, config, lines):
        self.path, self.lines = Path(out) / "metrics.jsonl", 0
        if rank() == 0:
            Path(out).mkdir(parents=True, exist_ok=True)
            kept = self.path.read_text().splitlines(True)[:lines] if self.path.is_file() else []
            marks_a_run = json.dumps(config, indent=2) + "\n"           # so it is written first
            write_atomic(Path(out) / "config.json", lambda temporary: temporary.write_text(marks_a_run))
            write_atomic(self.path, lambda temporary: temporary.write_text("".join(kept)))
            self.lines = len(kept)

    def write(self, row):
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}) + "\n")
            self.lines += 1


def before_and_after(out):
    """The table that closes a run, from the first and the last evaluation in metrics.jsonl."""
    rows = [row for row in map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines()) if "eval/vendi" in row]
    lines = [f"{'':12}{'before':>10}{'after':>10}"]
    lines += [f"{name[5:]:12}{rows[0][name]:10.3f}{rows[-1][name]:10.3f}" for name in rows[0] if name.startswith("eval/")]
    return "\n".join(lines) + f"\n{out}: {rows[-1]['iteration']} iterations; pictures in grids/, the tuned model in model/"


def to_uint8(images):
    """[..., 3, H, W] in [0, 1] -> uint8, rounded and clamped: the one way from floats to pixels."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


def save_grid(path, images, scale=2):
    """images [rows, columns, 3, H, W] in [0, 1] -> a PNG, each pixel `scale` wide, a white line between pictures."""
    pixels = np.pad(to_uint8(images).permute(0, 1, 3, 4, 2).cpu().numpy(), ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)
    rows, columns, H, W, _ = pixels.shape
    sheet = pixels.transpose(0, 2, 1, 3, 4).reshape(rows * H, columns * W, 3).repeat(scale, 0).repeat(scale, 1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda temporary: Image.fromarray(sheet).save(temporary, format="PNG"))
