"""files.py: whole files or none, run folders, checkpoints, and images as bytes."""

import errno
import json
import os
import tempfile

import numpy as np
import pytest
import torch
from conftest import contents
from PIL import Image
from safetensors import SafetensorError

from support import files

CONFIG = {"iterations": 7, "lr": 0.5, "reward": "class:1", "out": "runs/a"}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------------------------------
# Whole files or none.


def test_write_atomic_replaces_a_file_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    files.write_atomic(path, lambda temporary: temporary.write_text("old"))

    def fails(temporary):
        temporary.write_text("ne")
        assert path.read_text() == "old"
        raise KeyboardInterrupt("killed")

    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, fails)
    assert path.read_text() == "old"
    files.write_atomic(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_write_atomic_replaces_a_folder_and_what_a_kill_left(tmp_path):
    def write(*file_names):
        def run(folder):
            folder.mkdir()
            for name in file_names:
                (folder / name).write_text(name)

        return run

    files.write_atomic(tmp_path / "model", write("a", "b"))
    (tmp_path / ".tmp-model").mkdir()
    (tmp_path / ".tmp-model" / "half").write_text("half")
    files.write_atomic(tmp_path / "model", write("c"))
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["c"]
    (tmp_path / ".tmp-model").write_text("a file")
    files.write_atomic(tmp_path / "model", write("d"))
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["d"]


@pytest.mark.parametrize("kind", [SafetensorError, RuntimeError])
def test_a_full_disk_is_an_os_error_of_one_line(tmp_path, kind):
    def full(temporary):
        raise kind("No space\n left on device" + 500 * "!")

    with pytest.raises(OSError, match="^No space left on device!") as error:
        files.write_atomic(tmp_path / "file", full)
    assert len(str(error.value)) == 200


def test_every_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced = []
    replace = os.replace

    def number(path):
        return os.stat(path).st_ino

    def note(handle):
        synced.append(os.fstat(handle).st_ino)

    def check(source, destination):
        assert synced == [number(source), number(source / "a"), number(source / "b")]
        replace(source, destination)

    def write(folder):
        folder.mkdir()
        (folder / "a").write_text("a")
        (folder / "b").write_text("b")

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    files.write_atomic(tmp_path / "model", write)
    assert len(synced) == 4 and synced[-1] == number(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "is missing"),
        (b"{not json", "is not JSON"),
        (b"caf\xe9", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"[1]", "is not a JSON object"),
    ],
)
def test_a_bad_json_file_is_named_in_one_line(tmp_path, content, message):
    path = tmp_path / "part" / "config.json"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        files.read_json(path)
    assert str(error.value).startswith(f"{path} {message}")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_json_object_is_read_as_utf_8(tmp_path):
    (tmp_path / "a.json").write_bytes('{"a": "é"}'.encode())
    assert files.read_json(tmp_path / "a.json") == {"a": "é"}


# --------------------------------------------------------------------------------------------------
# The run folder.


def test_the_default_folder_is_named_after_the_flags():
    assert files.run_name({}) == "runs/default"
    changed = {"lr": 0.5, "prompts": "a/b.txt"}
    assert files.run_name(changed) == "runs/lr=0.5,prompts=a_b.txt"


def test_a_new_folder_an_empty_one_and_a_run_of_the_same_flags_are_opened(tmp_path):
    files.open_run(tmp_path / "new" / "er", CONFIG)
    assert names(tmp_path) == []
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".tmp-config.json").write_text("half")
    files.open_run(tmp_path / "killed", CONFIG)
    files.Log(tmp_path / "run", CONFIG, 0)
    before = contents(tmp_path)
    files.open_run(tmp_path / "run", CONFIG)
    files.open_run(tmp_path / "run", CONFIG | {"out": "runs/moved"}, free=("out",))
    assert contents(tmp_path) == before


def another_configuration(out):
    files.Log(out, CONFIG | {"lr": 0.1, "old": 3}, 0)
    return "belongs to another configuration (--lr 0.1 saved, 0.5 now; --old 3 saved, None now)"


def a_damaged_configuration(out):
    out.mkdir()
    (out / "config.json").write_text("{")
    return "config.json is not JSON"


def not_a_run(out):
    out.mkdir()
    (out / "cat.png").write_bytes(b"cat")
    return "exists and is not a run"


def a_file(out):
    out.write_text("text")
    return "exists and is not a run"


def below_a_file(out):
    out.parent.rmdir()
    out.parent.write_text("text")
    return f"its parent {out.parent} is a file"


@pytest.mark.parametrize(
    "spoil",
    [
        another_configuration,
        a_damaged_configuration,
        not_a_run,
        a_file,
        below_a_file,
    ],
)
def test_a_folder_that_is_taken_is_refused(tmp_path, spoil):
    out = tmp_path / "runs" / "a"
    out.parent.mkdir()
    message = spoil(out)
    before = contents(tmp_path)
    with pytest.raises(ValueError) as error:
        files.open_run(out, CONFIG)
    assert str(error.value).startswith(f"--out {out}: ")
    assert message in str(error.value) and "choose another --out" in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    for name in ("x" * 256 + "/run", "x" * 251, "x/" * 2500):
        with pytest.raises(ValueError, match=r"^--out .*nothing can be written.*too long"):
            files.open_run(tmp_path / name, CONFIG)
    files.open_run(tmp_path / ("x" * 255) / "run", CONFIG)
    files.open_run(tmp_path / ("x" * 250), CONFIG)

    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("dangling", "dangling/run", "loop", "loop/run"):
        with pytest.raises(ValueError, match=f"--out .*{name}: .*is a link to nothing; choose"):
            files.open_run(tmp_path / name, CONFIG)

    def fail(prefix, dir):
        raise PermissionError(errno.EACCES, "Permission denied")  # root may write anywhere

    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    with pytest.raises(ValueError, match=r"nothing can be written there \(Permission denied\)"):
        files.open_run(tmp_path / "new" / "run", CONFIG)


def test_the_log_keeps_the_lines_that_the_checkpoint_knows(tmp_path):
    log = files.Log(tmp_path / "run", CONFIG, 0)
    for step in range(3):
        log.write({"iteration": step, "reward": 1 / 3, "names": ["a"]})
    assert log.lines == 3
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3, "rew')
    log = files.Log(tmp_path / "run", CONFIG, 2)
    log.write({"iteration": 2})
    assert log.lines == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    first = {"iteration": 0, "reward": 0.333333, "names": ["a"]}
    assert rows == [first, first | {"iteration": 1}, {"iteration": 2}]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == CONFIG


def a_run(out, step, lines, state=None):
    """A run of CONFIG at a checkpoint of `step`, whose log has `lines` lines."""
    log = files.Log(out, CONFIG, 0)
    for _ in range(lines):
        log.write({"iteration": 0})
    files.save_checkpoint(out, step, {"a": torch.ones(2)}, None, lines, 2)
    if state:
        (out / f"checkpoint-{step:05d}" / "state.json").write_text(json.dumps(state))


def test_a_log_that_is_not_the_runs_is_refused(tmp_path):
    a_run(tmp_path, 1, 3)
    files.open_run(tmp_path, CONFIG)
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="metrics.jsonl: has 1 lines, and checkpoint-00001.* 3;"):
        files.open_run(tmp_path, CONFIG)
    path.write_bytes(b"\xff{}\n")
    with pytest.raises(ValueError, match="metrics.jsonl: not UTF-8"):
        files.open_run(tmp_path, CONFIG)
    path.unlink()
    with pytest.raises(ValueError, match="metrics.jsonl: has 0 lines"):
        files.open_run(tmp_path, CONFIG)
    os.mkfifo(path)
    with pytest.raises(ValueError, match="metrics.jsonl: has 0 lines"):
        files.open_run(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "state",
    [
        {"step": 9, "lines": 3},
        {"step": -1, "lines": 3},
        {"step": "1", "lines": 3},
        {"step": 1, "lines": -3},
        {"step": 1},
        [1, 3],
    ],
)
def test_a_state_that_was_edited_is_refused(tmp_path, state, capsys):
    a_run(tmp_path, 1, 3, state)
    with pytest.raises(SystemExit) as stop:
        files.open_run(tmp_path, CONFIG)
    assert stop.value.code == 2
    assert "checkpoint-00001: damaged" in capsys.readouterr().err


def test_a_checkpoint_beyond_the_end_is_refused(tmp_path):
    a_run(tmp_path, 8, 3)
    with pytest.raises(ValueError, match="checkpoint-00008: is of iteration 8, .* ends at 7"):
        files.open_run(tmp_path, CONFIG)


def link_to_a_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, link_to_a_device])
def test_what_is_no_file_is_not_opened(tmp_path, make):
    path = tmp_path / "config.json"
    make(path)
    with pytest.raises(ValueError, match="config.json: is no regular file but a "):
        files.read_json(path)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = files.Log(tmp_path / "run", CONFIG, 0)
    log.write({"iteration": 0})
    files.save_checkpoint(tmp_path / "run", 1, {"a": torch.ones(2)}, None, 1, 2)
    assert log.lines == 0 and names(tmp_path) == []


# --------------------------------------------------------------------------------------------------
# Checkpoints.


def trained_weight():
    """A weight and an optimizer that has made two steps with it."""
    weight = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    for _ in range(2):
        (weight**2).sum().backward()
        optimizer.step()
    return weight, optimizer


def test_a_checkpoint_gives_weights_and_optimizer_back_to_the_bit(tmp_path):
    weight, optimizer = trained_weight()
    files.save_checkpoint(tmp_path, 7, {"w": weight}, optimizer, 9, keep=2)
    folder, state = files.newest_checkpoint(tmp_path)
    assert folder == tmp_path / "checkpoint-00007" and state == {"step": 7, "lines": 9}
    assert names(folder) == ["optimizer.pt", "state.json", "weights.safetensors"]

    other = torch.zeros(3, requires_grad=True)
    other_optimizer = torch.optim.AdamW([other], lr=0.1)
    files.load_checkpoint(folder, {"w": other}, other_optimizer)
    assert torch.equal(other, weight)
    for one, its_optimizer in ((weight, optimizer), (other, other_optimizer)):
        its_optimizer.zero_grad()
        (one**2).sum().backward()
        its_optimizer.step()
    assert torch.equal(other, weight)


def test_the_newest_checkpoints_stay_and_none_needs_an_optimizer(tmp_path):
    assert files.newest_checkpoint(tmp_path) == (None, {"step": 0, "lines": 0})
    assert "after checkpoint 0 by signal 15" in files.stopped(tmp_path, 15)
    (tmp_path / "checkpoint-copy").mkdir()
    for step in (9, 99_999, 100_000):  # of which names sort wrongly
        tensor = torch.full((2,), float(step))
        files.save_checkpoint(tmp_path, step, {"a": tensor}, None, step, keep=2)
    assert names(tmp_path) == ["checkpoint-100000", "checkpoint-99999", "checkpoint-copy"]
    folder, state = files.newest_checkpoint(tmp_path)
    assert state["step"] == 100_000
    tensors = {"a": torch.zeros(2)}
    files.load_checkpoint(folder, tensors)
    assert tensors["a"].tolist() == [100_000, 100_000]
    assert "after checkpoint 100000 by signal 15" in files.stopped(tmp_path, 15)


# --------------------------------------------------------------------------------------------------
# Images.


def test_a_pixel_is_its_nearest_byte():
    values = np.random.default_rng(0).uniform(-0.1, 1.1, 2000).astype(np.float32)
    nearest = []
    for value in values:
        distances = [abs(np.float64(value) * 255 - byte) for byte in range(256)]
        nearest.append(int(np.argmin(distances)))
    images = torch.tensor(values)
    assert files.to_uint8(images).tolist() == nearest
    assert files.to_bytes(images).tolist() == nearest
    assert files.to_uint8(images).dtype == torch.uint8
    assert files.to_bytes(images).dtype == torch.float32
    assert files.to_uint8(images.bfloat16()).dtype == torch.uint8


def test_a_grid_shows_each_image_at_its_place_with_white_between(tmp_path):
    images = torch.zeros(2, 3, 3, 4, 5)  # [rows, columns, 3, H, W]
    images[0, 2, 0] = 1.0  # red
    images[1, 0, 2] = 0.5  # blue
    files.save_grid(tmp_path / "grids" / "a.png", images)
    sheet = np.asarray(Image.open(tmp_path / "grids" / "a.png"))
    assert sheet.shape == (2 * 2 * 5, 3 * 2 * 6, 3)
    red = sheet[0:8, 24:34]
    blue = sheet[10:18, 0:10]
    assert (red == [255, 0, 0]).all() and (blue == [0, 0, 128]).all()
    assert (sheet[0:8, 0:10] == 0).all()
    assert (sheet[8:10] == 255).all() and (sheet[:, 10:12] == 255).all()
