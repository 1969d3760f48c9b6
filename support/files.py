"""Runtime: the plumbing that is no idea of its own: command line, process group, run folder, checkpoints, pictures.

Sizes are global: n samples are dealt to the processes in contiguous shares, results are gathered in order, gradients are summed with one
flat all-reduce; what a sample is depends on its number alone. One process needs no torchrun.
A run folder holds config.json, metrics.jsonl, grids/, checkpoint-NNNNN/ and model/. Every write goes to a temporary name, is flushed to
disk and renamed, so a kill leaves the old file or the new one; the same command again goes on from the newest checkpoint.
"""
import hashlib
import json
import numpy as np
import os
import shutil
import torch
from PIL import Image
from contextlib import contextmanager
from pathlib import Path
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save_file
from support.flags import refuse
from support.processes import rank
from support.sharding import is_piece, load_state, piece, whole, whole_state

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


def to_bytes(images):
    """Images in [0, 1], any shape -> floats, rounded and clamped to 0, 1, ..., 255."""
    return (images.float() * 255).round().clamp(0, 255)


def to_uint8(images):
    """Images in [0, 1], any shape -> uint8: the one way from floats to pixels."""
    return to_bytes(images).to(torch.uint8)


def save_grid(path, images, scale=2):
    """images [rows, columns, 3, H, W] in [0, 1] -> a PNG, each pixel `scale` wide, a white line between pictures."""
    pixels = np.pad(to_uint8(images).permute(0, 1, 3, 4, 2).cpu().numpy(), ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)
    rows, columns, H, W, _ = pixels.shape
    sheet = pixels.transpose(0, 2, 1, 3, 4).reshape(rows * H, columns * W, 3).repeat(scale, 0).repeat(scale, 1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda temporary: Image.fromarray(sheet).save(temporary, format="PNG"))


def stopped(out, signal):
    """The line that says where a run that a signal has stopped goes on."""
    step = newest_checkpoint(out)[1]["step"]
    return f"{out}: stopped after checkpoint {step} by signal {signal}; the same command goes on"


def read_json(path):
    """The object in a JSON file. Raises ValueError naming the file and its folder."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path.parent.name}/{path.name} is missing; the folder is incomplete") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} in {path.parent.name} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} in {path.parent.name} is not a JSON object")
    return found
