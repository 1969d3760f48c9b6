"""Shows a run in TensorBoard or Weights & Biases, beside metrics.jsonl: --tracker.

A tracker is sent the lines of metrics.jsonl, under the same names, and the grids of pictures of
their iterations, each time a checkpoint is saved. A run that is killed goes on from a checkpoint,
so it sends no line twice. tracker.json in the run folder says which tracker has how many lines,
and the id of the run there.
Left out: statistics of the machine, upload of weights.
"""

import importlib.util
import json
import uuid
from pathlib import Path

import numpy as np
from PIL import Image

from support import files

FILE = "tracker.json"


class TensorBoard:
    """Event files in the run folder's tensorboard/."""

    def __init__(self, out, config, run_id):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"))
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```", 0)

    def send(self, iteration, numbers, grid):
        """numbers {name: value}; grid: a PIL image or None."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, iteration)
        if grid:
            self.writer.add_image("grid", np.asarray(grid), iteration, dataformats="HWC")

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()


class WeightsAndBiases:
    """A run of the project driftwise; with WANDB_MODE=offline, files in wandb/ to send later."""

    def __init__(self, out, config, run_id):
        import wandb

        self.wandb = wandb
        self.settings = {"name": out.name, "id": run_id, "dir": out, "config": config}
        self.run = self.open()
        if self.run.url:
            print(self.run.url, flush=True)

    def open(self):
        """Opens the run, or goes on with it."""
        silent = self.wandb.Settings(silent=True)
        return self.wandb.init(
            project="driftwise", resume="allow", settings=silent, **self.settings
        )

    def send(self, iteration, numbers, grid):
        """numbers {name: value}; grid: a PIL image or None."""
        self.run = self.run or self.open()
        row = dict(numbers)
        if grid:
            row["grid"] = self.wandb.Image(grid)
        self.run.log(row, step=iteration)

    def flush(self):
        """Ends the run for now: until then a kill would lose what was sent."""
        if self.run:
            self.run.finish()
            self.run = None

    def close(self):
        self.flush()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check(kind, out):
    """Raises ValueError, in one line, unless the tracker can be opened for the run folder `out`."""
    if kind == "none":
        return
    if importlib.util.find_spec(kind) is None:
        raise ValueError(f"--tracker {kind}: the package is missing; pip install {kind}")
    read_sent(kind, out)


def read_sent(kind, out):
    """How many lines this tracker has, and the run's id there -> {"tracker", "lines", "id"}."""
    path = Path(out) / FILE
    if path.exists():
        sent = files.read_json(path)
        is_right = isinstance(sent, dict) and sent.keys() == {"tracker", "lines", "id"}
        if not is_right or not isinstance(sent["lines"], int):
            raise ValueError(f"{path}: not what was written; remove it to send all lines again")
        if sent["tracker"] == kind:
            return sent
    return {"tracker": kind, "lines": 0, "id": uuid.uuid4().hex[:8]}


class Tracker:
    """What --tracker names, for one run folder; opened by the first process alone."""

    def __init__(self, kind, out, config):
        self.out = Path(out)
        self.sent = read_sent(kind, out)
        self.tracker = TRACKERS[kind](self.out, config, self.sent["id"])

    def send(self):
        """Sends the lines of metrics.jsonl that were not sent yet, and the grids beside them."""
        lines = files.read_log(self.out / "metrics.jsonl")
        for line in lines[self.sent["lines"] :]:
            row = json.loads(line)
            iteration = row.pop("iteration")
            self.tracker.send(iteration, row, self.grid(iteration))
        self.tracker.flush()
        # After a restart there can be fewer lines than were sent.
        self.sent["lines"] = max(self.sent["lines"], len(lines))
        text = json.dumps(self.sent) + "\n"
        files.write_atomic(self.out / FILE, lambda temporary: temporary.write_text(text))

    def grid(self, iteration):
        """The pictures of an evaluation, if there was one. A broken file stops no run."""
        try:
            with Image.open(self.out / "grids" / f"{iteration:05d}.png") as grid:
                return grid.convert("RGB")
        except (OSError, SyntaxError):
            return None

    def close(self):
        self.tracker.close()
