"""Files: whole ones or none, the run folder and its checkpoints, and images as bytes.

A run folder holds config.json, metrics.jsonl, grids/, checkpoint-NNNNN/ and model/. Every file is
written under a temporary name, flushed to disk and renamed, so that a kill leaves the old file or
the new one; the same command again resumes from the newest checkpoint.
No random state is saved: all noise is a function of the seed, the step and the sample.
"""

import errno
import json
import os
import shutil
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.flags import refuse
from support.processes import rank
from support.sharding import is_piece, load_state, piece, whole, whole_state

KINDS_OF_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

# --------------------------------------------------------------------------------------------------
# Whole files or none.


def flush(path):
    """Waits until a file, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_atomic(path, write):
    """write(temporary path), then rename it to `path`, a file or a folder.

    Nobody ever sees half a file at `path`. What a kill leaves (safetensors' temporary files too)
    lies in the folder .tmp-NAME beside it, which the next call for `path` empties. Raises OSError.
    """
    path = Path(path)
    scratch = path.with_name(f".tmp-{path.name}")
    if scratch.is_file():
        scratch.unlink()
    else:
        shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()

    temporary = scratch / scratch.name
    try:
        write(temporary)
    except (SafetensorError, RuntimeError) as error:  # safetensors and torch.save at a full disk
        message = " ".join(str(error).split())
        raise OSError(message[:200]) from error
    flush(temporary)
    if temporary.is_dir():
        for file in sorted(temporary.rglob("*")):
            flush(file)

    if path.is_dir():
        shutil.rmtree(path)
    os.replace(temporary, path)
    scratch.rmdir()
    flush(path.parent)  # the new name is on disk only when its folder is


def check_regular(path):
    """Raises ValueError for what is there and is no regular file. Every reader looks first.

    (Who opens a FIFO waits for a writer, and a device may have no end.)
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # whoever opens it says why it cannot be
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: is no regular file but {KINDS_OF_FILES[stat.S_IFMT(mode)]}")


def read_json(path):
    """The object in a JSON file. Raises ValueError, in one line, naming the file."""
    path = Path(path)
    remedy = "get a whole copy of its folder"
    check_regular(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path} is missing or may not be read; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object; {remedy}")
    return value


# --------------------------------------------------------------------------------------------------
# The run folder.


def run_name(changed):
    """The default --out: runs/ and the flags {name: value} that differ from their defaults."""
    flags = [f"{name}={value}" for name, value in changed.items()]
    name = ",".join(flags).replace("/", "_")
    return "runs/" + (name or "default")


def open_run(out, config, free=()):
    """Checks that `out` can hold a run of `config` {flag: value}, or holds it already.

    The flags in `free` may differ from those of the run. Nothing is written.
    Raises ValueError, in one line, naming what is wrong.
    """
    out = Path(out)
    check_writable(out)
    if (out / "config.json").is_file():
        check_config(out, config, free)
        # train.py counts iterations, merge.py rl updates.
        check_progress(out, config.get("iterations", config.get("updates")))
    elif out.exists():
        check_empty(out)


def check_writable(out):
    """Raises ValueError unless `out`, a file or a folder, could be made, or written to."""
    flag = f"--out {out}"
    remedy = "choose another --out"
    place = Path(out).absolute()
    try:
        # What is written has the name .tmp-NAME first, and 255 bytes are the most.
        is_too_long = len(os.fsencode(place.name)) > 250
        for path in Path(out).parents:
            if path.exists() and not path.is_dir():
                raise ValueError(f"{flag}: its parent {path} is a file; {remedy}")
        for path in (*reversed(place.parents), place):
            if os.path.islink(path) and not path.exists():
                raise ValueError(f"{flag}: {path} is a link to nothing; {remedy}")
        existing = place
        while not existing.exists():
            existing = existing.parent
        if is_too_long:
            raise OSError(errno.ENAMETOOLONG, "the name is too long")
        folder = existing if existing.is_dir() else existing.parent
        # The only sure way to know: root may do what is not allowed, and yet not everywhere.
        os.rmdir(tempfile.mkdtemp(prefix=".tmp-", dir=folder))
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{flag}: nothing can be written there ({reason}); {remedy}") from None


def check_progress(out, last):
    """Raises ValueError unless the newest checkpoint of a run and its metrics.jsonl fit each other.

    last: the iteration at which the run ends.
    """
    folder, state = newest_checkpoint(out)
    if folder is None:
        return
    if state["step"] > last:
        raise ValueError(
            f"{folder}: is of iteration {state['step']}, and the run ends at {last}; remove it"
        )
    path = Path(out) / "metrics.jsonl"
    lines = len(read_log(path)) if path.is_file() else 0
    if lines < state["lines"]:
        raise ValueError(
            f"{path}: has {lines} lines, and {folder.name} knows of {state['lines']}; put the file "
            "back, or choose another --out"
        )


def read_log(path):
    """The lines of metrics.jsonl. Raises ValueError, in one line, if they are no text."""
    check_regular(path)
    try:
        return Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except ValueError:
        raise ValueError(
            f"{path}: not UTF-8, so it is not what was written; put the file back, or choose "
            "another --out"
        ) from None


def check_config(out, config, free):
    """Raises ValueError unless the run in `out` has the flags of `config`, but for those `free`."""
    try:
        saved = read_json(out / "config.json")
    except ValueError as error:
        raise ValueError(f"--out {out}: {error}, or choose another --out") from None
    differences = []
    for name in sorted({*saved, *config} - {*free}):
        if saved.get(name) != config.get(name):
            differences.append(f"--{name} {saved.get(name)!r} saved, {config.get(name)!r} now")
    if differences:
        raise ValueError(
            f"--out {out}: belongs to another configuration ({'; '.join(differences)}); "
            "choose another --out or the same flags"
        )


def check_empty(out):
    """Raises ValueError if `out` is no folder, or holds more than what a kill may leave."""
    is_empty = out.is_dir() and all(path.name.startswith(".tmp-") for path in out.iterdir())
    if not is_empty:
        raise ValueError(
            f"--out {out}: exists and is not a run of this program (no config.json); "
            "choose another --out"
        )


class Log:
    """config.json, and metrics.jsonl with one object a line. Only the first process writes.

    Of the lines in the file the first `lines` are kept: those that the checkpoint knows of.
    """

    def __init__(self, out, config, lines):
        out = Path(out)
        self.path = out / "metrics.jsonl"
        self.lines = 0
        if rank() > 0:
            return
        out.mkdir(parents=True, exist_ok=True)
        kept = []
        if self.path.is_file():
            kept = read_log(self.path)[:lines]
        text = json.dumps(config, indent=2) + "\n"
        # config.json first: without it the folder is not known as a run.
        write_atomic(out / "config.json", lambda temporary: temporary.write_text(text))
        write_atomic(self.path, lambda temporary: temporary.write_text("".join(kept)))
        self.lines = len(kept)

    def write(self, row):
        """Appends {name: value}; floats with six digits."""
        if rank() > 0:
            return
        rounded = {}
        for name, value in row.items():
            rounded[name] = float(f"{value:.6g}") if isinstance(value, float) else value
        with open(self.path, "a") as file:
            file.write(json.dumps(rounded) + "\n")
        self.lines += 1


def stopped(out, signal):
    """The line that says where a run resumes that a signal has stopped; of the first process."""
    if rank() > 0:  # the first may still be removing old checkpoints, so no other looks
        return ""
    _, state = newest_checkpoint(out)
    step = state["step"]
    return f"{out}: stopped after checkpoint {step} by signal {signal}; the same command goes on"


# --------------------------------------------------------------------------------------------------
# Checkpoints.


def save_checkpoint(out, step, tensors, optimizer, lines, keep):
    """checkpoint-NNNNN/, of which the newest `keep` stay. Collective: call on every process.

    weights.safetensors   `tensors` {name: tensor}
    optimizer.pt          the state of the optimizer, if there is one
    state.json            step, and how many lines of metrics.jsonl belong to it
    """
    tensors = {name: whole(tensor.detach()) for name, tensor in tensors.items()}
    state = whole_state(optimizer) if optimizer else None
    if rank() > 0:
        return

    def write(folder):
        folder.mkdir()
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, folder / "weights.safetensors")
        if state:
            torch.save(state, folder / "optimizer.pt")
        text = json.dumps({"step": step, "lines": lines})
        (folder / "state.json").write_text(text)

    write_atomic(Path(out) / f"checkpoint-{step:05d}", write)
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old)


def save_model(folder, model):
    """A generator as a folder that `bases.load` reads. Collective: call on every process."""
    is_sharded = any(is_piece(parameter) for parameter in model.network.parameters())
    weights = None
    if is_sharded or rank() == 0:  # every process gives its pieces
        weights = model.weights()
    if rank() == 0:
        write_atomic(folder, lambda temporary: model.save(temporary, weights))


def checkpoints(out):
    """The checkpoint folders of a run, oldest first."""
    numbered = []
    for folder in Path(out).glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdecimal():
            numbered.append((int(number), folder))
    return [folder for _, folder in sorted(numbered)]


def newest_checkpoint(out):
    """-> its folder and {"step", "lines"}; None and zeros if there is none."""
    folders = checkpoints(out)
    if not folders:
        return None, {"step": 0, "lines": 0}
    newest = folders[-1]
    with undamaged(newest):
        state = read_json(newest / "state.json")
        step, lines = state["step"], state["lines"]
        if f"checkpoint-{step:05d}" != newest.name or lines < 0 or lines != int(lines):
            raise ValueError("the step is not that of the folder, or the lines are no count")
        return newest, {"step": step, "lines": int(lines)}


def load_checkpoint(folder, tensors, optimizer=None):
    """Copies what `save_checkpoint` saved into `tensors`, in place, and into the optimizer."""
    with undamaged(folder), torch.no_grad():
        for name in ("weights.safetensors", "optimizer.pt"):
            check_regular(folder / name)
        saved = load_file(folder / "weights.safetensors")
        for name, tensor in tensors.items():
            tensor.copy_(piece(saved[name], tensor))
        if optimizer:
            # weights_only: nothing in the file is run.
            state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            load_state(optimizer, state)


@contextmanager
def undamaged(folder):
    """Within the block whatever fails means a damaged checkpoint: one line, exit code 2.

    Every error, because JSON, safetensors, zip and pickle each raise their own.
    """
    try:
        yield
    except Exception as error:
        refuse(
            f"{folder}: damaged ({type(error).__name__}), and nothing in it was run; "
            "remove it, and the same command goes on from the one before"
        )


# --------------------------------------------------------------------------------------------------
# Images.


def to_bytes(images):
    """Images in [0, 1], any shape -> floats, rounded and clamped to 0, 1, ..., 255."""
    return (images.float() * 255).round().clamp(0, 255)


def to_uint8(images):
    """Images in [0, 1], any shape -> uint8: the one way from floats to pixels."""
    return to_bytes(images).to(torch.uint8)


def save_grid(path, images, scale=2):
    """images [rows, columns, 3, H, W] in [0, 1] -> a PNG.

    Each pixel is `scale` wide, and a white line stands between images.
    """
    pixels = to_uint8(images).permute(0, 1, 3, 4, 2).cpu().numpy()  # [rows, columns, H, W, 3]
    line = (0, 1)
    pixels = np.pad(pixels, ((0, 0), (0, 0), line, line, (0, 0)), constant_values=255)
    rows, columns, H, W, _ = pixels.shape
    sheet = pixels.transpose(0, 2, 1, 3, 4).reshape(rows * H, columns * W, 3)
    sheet = sheet.repeat(scale, axis=0).repeat(scale, axis=1)
    image = Image.fromarray(sheet)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda temporary: image.save(temporary, format="PNG"))
