"""--tracker: what a run sends to TensorBoard and to Weights & Biases, killed and resumed."""

import json
import os
import shutil
import struct
import subprocess
import time

import numpy as np
import pytest
from conftest import command, launch, launch_process, read_metrics, small
from PIL import Image

from support import trackers


def points_in_tensorboard(out):
    """{name: [(iteration, value)]} of all event files, and the sizes of the grids."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), {"scalars": 0, "images": 0})
    events.Reload()
    points = {}
    for name in events.Tags()["scalars"]:
        points[name] = [(event.step, event.value) for event in events.Scalars(name)]
    grids = [(event.step, event.width) for event in events.Images("grid")]
    return points, grids


def records_in(path):
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    data = path.read_bytes()
    place = 7
    record = b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # what is left of a block is filled with zeros
            place += 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def points_in_wandb(out):
    """The same of all offline runs, and the ids that they have."""
    from wandb.proto.wandb_internal_pb2 import Record

    points = {}
    grids = []
    ids = set()
    for path in sorted((out / "wandb").glob("offline-run-*/*.wandb")):
        for data in records_in(path):
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            row = {}
            for item in record.history.item:
                row[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            if "grid.width" in row:
                grids.append((record.history.step.num, row["grid.width"]))
            for name, value in row.items():
                if not name.startswith("_"):
                    points.setdefault(name, []).append((record.history.step.num, value))
    return points, grids, ids


def write_run(out, lines):
    """A run folder with so many lines; every other iteration has a grid."""
    (out / "grids").mkdir(parents=True, exist_ok=True)
    rows = [{"iteration": i, "reward": i / 4, "eval/fid": 2.0 * i} for i in range(lines)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(0, lines, 2):
        Image.fromarray(np.full((8, 20), 100, np.uint8)).save(out / "grids" / f"{i:05d}.png")


def send(kind, out, lines):
    write_run(out, lines)
    tracker = trackers.Tracker(kind, out, {"lr": 0.1})
    tracker.send()
    tracker.close()


def test_tensorboard_has_each_line_once(tmp_path):
    for lines in (3, 3, 5):
        send("tensorboard", tmp_path, lines)
    points, grids = points_in_tensorboard(tmp_path)
    assert points["reward"] == [(i, i / 4) for i in range(5)]
    assert points["eval/fid"] == [(i, 2.0 * i) for i in range(5)]
    assert grids == [(0, 20), (2, 20), (4, 20)]


@pytest.mark.run
def test_wandb_offline_has_each_line_once_under_one_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for lines in (3, 5):
        send("wandb", tmp_path, lines)
    points, grids, ids = points_in_wandb(tmp_path)
    assert points["reward"] == [(i, i / 4) for i in range(5)]
    assert points["eval/fid"] == [(i, 2.0 * i) for i in range(5)]
    assert grids == [(0, 20), (2, 20), (4, 20)]
    assert len(ids) == 1


def test_another_tracker_gets_all_lines(tmp_path):
    write_run(tmp_path, 3)
    sent = {"tracker": "wandb", "lines": 2, "id": "x"}
    (tmp_path / "tracker.json").write_text(json.dumps(sent))
    send("tensorboard", tmp_path, 3)
    points, _ = points_in_tensorboard(tmp_path)
    assert [step for step, _ in points["reward"]] == [0, 1, 2]


@pytest.mark.run
@pytest.mark.parametrize("kind", trackers.TRACKERS)
def test_a_missing_package_is_one_line(tiny, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        launch(small(tiny, tmp_path / "run", "--tracker", kind))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"error: --tracker {kind}: the package is missing; pip install {kind}"]
    assert not (tmp_path / "run").exists()


@pytest.mark.run
@pytest.mark.parametrize("text", ["[]", "not json", '{"tracker": "x", "lines": "2", "id": 1}'])
def test_a_damaged_record_is_refused(tiny, tmp_path, text):
    (tmp_path / "tracker.json").write_text(text)
    with pytest.raises(ValueError, match=r"tracker\.json"):
        trackers.check("tensorboard", tmp_path)


@pytest.mark.run
def test_a_killed_run_goes_on_in_its_tracker(tiny, tmp_path):
    """Killed between two checkpoints, and after the tracker knew of the second."""
    flags = ("--iterations", 3, "--eval_every", 3, "--tracker", "tensorboard")
    launch(small(tiny, tmp_path, *flags))
    shutil.rmtree(tmp_path / "model")
    for number in (2, 3):
        shutil.rmtree(tmp_path / f"checkpoint-{number:05d}", ignore_errors=True)
    launch(small(tiny, tmp_path, *flags))
    rows = read_metrics(tmp_path)
    points, grids = points_in_tensorboard(tmp_path)
    assert [step for step, _ in grids] == [0, 3]
    for name in rows[-1].keys() - {"iteration"}:
        steps = [row["iteration"] for row in rows if name in row]
        assert [step for step, _ in points[name]] == steps, name
    assert points["reward"][-1][1] == pytest.approx(rows[-1]["reward"])


def test_a_broken_grid_is_not_sent(tmp_path):
    write_run(tmp_path, 3)
    (tmp_path / "grids" / "00000.png").write_bytes(b"no picture")
    tracker = trackers.Tracker("tensorboard", tmp_path, {})
    tracker.send()
    tracker.close()
    points, grids = points_in_tensorboard(tmp_path)
    assert len(points["reward"]) == 3
    assert [step for step, _ in grids] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", trackers.TRACKERS)
def test_a_run_killed_by_a_signal_sends_each_line_once(tiny, tmp_path, kind):
    flags = ("--iterations", 5, "--save_every", 1, "--eval_every", 5, "--tracker", kind)
    argv = small(tiny, tmp_path, *flags)
    env = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    run = subprocess.Popen(command(argv), env=env, stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "checkpoint-00003").exists(), run)
    run.kill()
    run.wait()
    code, _, error = launch_process(argv, WANDB_MODE="offline")
    assert code == 0, error

    points = points_in_tensorboard if kind == "tensorboard" else points_in_wandb
    found, grids, *ids = points(tmp_path)
    assert [step for step, _ in grids] == [0, 5]
    assert [step for step, _ in found["reward"]] == [1, 2, 3, 4, 5]
    assert all(len(some) == 1 for some in ids)


def wait_for(condition, process):
    """Until it is so, or two minutes are over, or the process has ended."""
    deadline = time.time() + 120
    while not condition():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
