"""Hostile files: pickles that would run code, archives that would fill the memory, headers that lie. One line, exit code 2, nothing loaded, nothing run."""
import gzip
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rewards import targets
import eval as evaluation
import merge
from bases import files as base_files
from support import processes
import test_bad_input
import test_eval_command
import test_merge
import test_shard
import train
from conftest import contents, launch, read_metrics, small


class Trap:
    """Unpickled in the usual way, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


# ---------------------------------------------------------------------------------------------------------------------
# Files, each written by a function of (path, marker).

def a_pickle(path, marker):
    path.write_bytes(pickle.dumps({"ema": Trap(marker)}))


def a_torch_zip(path, marker):
    torch.save({"ema": Trap(marker), "x": torch.ones(2)}, path)


def an_old_torch_file(path, marker):
    torch.save(Trap(marker), path, _use_new_zipfile_serialization=False)


def npz_of_objects(*names):
    return lambda path, marker: np.savez(path, **{name: np.array([Trap(marker)] * 3, object) for name in names})


def npz_that_claims(**claims):
    """{name: (dtype, shape)}: a small file whose arrays say that they unpack to that; header and archive agree about it."""
    def write(path, marker):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, (dtype, shape) in claims.items():
                with file.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array_header_1_0(member, {"descr": dtype, "fortran_order": False, "shape": shape})
                    member.write(bytes(1000))
        raw = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as file:
            for info, (dtype, shape) in zip(file.infolist(), claims.values()):
                size = info.file_size - 1000 + np.dtype(dtype).itemsize * int(np.prod(shape))
                at = raw.index(b"PK\1\2", file.start_dir if info is file.infolist()[0] else at + 1)
                raw[at + 24:at + 28] = struct.pack("<I", size)
        path.write_bytes(raw)
    return write


def npz_whose_header_lies(path, marker):
    """The archive holds a thousand numbers; the array in it says that it is a thousand million."""
    with zipfile.ZipFile(path, "w") as file, file.open("mu.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (10**9,)})
        member.write(bytes(8000))


def idx_gz(dims, size):
    return lambda path, marker: path.write_bytes(gzip.compress(b"\0\0\x08\3" + struct.pack(">3I", *dims) + bytes(size)))


def picture_bomb(folder, marker):
    """PNGs of 60,000 x 60,000 pixels: 10 GB each, from 60 bytes."""
    folder.mkdir()
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    for n in range(70):
        (folder / f"{n:06d}.png").write_bytes(png)


def safetensors_header(length, text=b""):
    return lambda path, marker: path.write_bytes(struct.pack("<Q", length) + text)


def beyond_its_end(path, marker):
    text = json.dumps({"a.weight": {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 2**62]}}).encode()
    safetensors_header(len(text), text)(path, marker)


def cut(path, marker):
    save_file({"a.weight": torch.ones(1000)}, path)
    os.truncate(path, 2000)


def nested(path, marker):
    path.write_text("[" * 200_000)


def garbage(path, marker):
    path.write_bytes(bytes(range(256)) * 40)


WEIGHTS = [a_pickle, a_torch_zip, an_old_torch_file, safetensors_header(2**63), safetensors_header(2**40), safetensors_header(9, b"{not json"),
           safetensors_header(10**8, b"{" * 100), beyond_its_end, cut, garbage]
MOMENTS = {"mu": ("<f8", (22000,)), "sigma": ("<f8", (22000, 22000))}
FILES = [  # a name, how to write it, the commands that are to read it
    *[("bad.safetensors", write, ["merge average {bad} --model {tiny} --out {new}", "merge rl {bad} {bad} --model {tiny} --out {new}",
                                  "train --model sit:{bad}", "train --model edm2:{bad}", "eval images sit:{bad} --out {new}"]) for write in WEIGHTS],
    *[("bad.pt", write, ["train --model sit:{bad}", "merge average {bad} --model {tiny} --out {new}", "train --reward aesthetic:{bad}@{clip}",
                         "eval images sit:{bad} --out {new}"]) for write in (a_pickle, a_torch_zip, an_old_torch_file, garbage)],
    *[("bad.pkl", write, ["train --model edm2:{bad}", "eval score edm2:{bad}"]) for write in (a_pickle, a_torch_zip, garbage)],
    *[("bad.npz", write, ["train --reward fid --target {bad}", "merge rl {one} {two} --target {bad} --out {new}",
                          "merge rl {one} {two} --report_target {bad} --out {new}",
                          "eval score {bad} --model {tiny}", "eval score {tiny} --target {bad}"])
      for write in (npz_of_objects("mu", "sigma", "arr_0"), npz_that_claims(**MOMENTS, arr_0=("|u1", (20000, 256, 256, 3))), npz_whose_header_lies,
                    a_pickle, garbage)],
    *[("bad.gz", write, ["train --reward fid --target {bad}", "eval score {tiny} --target {bad}"])
      for write in (idx_gz((10**6, 28, 28), 5000), idx_gz((4 * 10**9, 4 * 10**9, 4 * 10**9), 5000), idx_gz((70, 28, 28), 10**7), garbage)],
    ("bad", picture_bomb, ["train --reward fid --target {bad}", "eval score {bad} --model {tiny}", "eval score {tiny} --target {bad}"]),
    ("bad.jsonl", nested, ["train --prompts {bad}", "merge rl {one} {two} --prompts {bad} --out {new}", "eval images {tiny} --prompts {bad} --out {new}"])]
PARTS = [  # a file of the model folder, how to write it
    ("transformer/diffusion_pytorch_model.safetensors", WEIGHTS), ("text_encoder/model.safetensors", WEIGHTS[:5]), ("reward/model.safetensors", WEIGHTS[:5]),
    ("evaluator/real.npz", [npz_of_objects("mu", "sigma", "scale"), npz_that_claims(**MOMENTS, scale=("<f8", ())), garbage]),
    ("model_index.json", [nested]), ("reward/config.json", [nested]), ("scheduler/scheduler_config.json", [nested])]


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory):
    """Two snapshots that could be merged, and a small CLIP that a head could stand on."""
    from bases import tensors
    from test_rewards import save_clip
    out = tmp_path_factory.mktemp("good")
    base = tensors.Weights(base_files.network_files(tiny))
    for iteration in (1, 2):
        tensors.save_snapshots(out, iteration, {n: base[n] for n in base if "attn" in n}, {}, tiny, 9)
    one, two = sorted((out / "snapshots").iterdir())
    return {"tiny": tiny, "one": one, "two": two, "clip": save_clip(out / "clip", projection=768)}


@pytest.fixture
def refused(tmp_path, capfd, monkeypatch):
    """Runs a command line that must be refused before anything is loaded, whose line names `naming` -> the line."""
    load = np.load
    monkeypatch.setattr(np, "load", lambda path, **kwargs: pytest.fail("an array was read") if "bad" in str(path) else load(path, **kwargs))
    for owner, name in ((models, "load"), (train, "Reward"), (merge, "Reward"), (evaluation.rewards, "Reward"), (evaluation, "Judge")):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: pytest.fail("weights were loaded"))

    def run(line, naming):
        script, *argv = line.split()
        argv = small(argv[argv.index("--model") + 1] if "--model" in argv else "", tmp_path / "new", *argv) if script == "train" else argv
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as stop:
            {"train": train, "merge": merge, "eval": evaluation}[script].main([*map(str, argv)])
        out, error = capfd.readouterr()
        lines = [line for line in error.splitlines() if "shards" not in line]
        assert stop.value.code == 2 and out == "" and len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1000, error
        assert str(naming) in lines[0] and contents(tmp_path) == before and not (tmp_path / "new").exists()
        return lines[0]
    return run


def named(write):
    return getattr(write, "__qualname__", "file").split(".")[0]


@pytest.mark.parametrize("name, write, lines", [pytest.param(*row, id=f"{n}-{named(row[1])}-{row[0]}") for n, row in enumerate(FILES)])
def test_a_hostile_file_is_refused(good, tmp_path, refused, name, write, lines):
    bad, marker = tmp_path / name, tmp_path / "marker"
    write(bad, marker)
    for line in lines:
        line = line.format(bad=bad, new=tmp_path / "new", **good)
        refused(f"{line} --model {good['tiny']}" if line.startswith("train") and "--model" not in line else line, bad)
        assert not marker.exists(), "it was run"


@pytest.mark.parametrize("name, writes", PARTS, ids=[name for name, _ in PARTS])
def test_a_hostile_part_of_a_model_folder_is_refused(good, tmp_path, refused, name, writes):
    model, marker = tmp_path / "bad-model", tmp_path / "marker"
    shutil.copytree(good["tiny"], model)
    for write in writes:
        (model / name).unlink()
        write(model / name, marker)
        for line in (f"train --model {model}", f"eval score {model} --n 20 --features evaluator",
                     f"merge rl {good['one']} {good['two']} --model {model} --out {tmp_path / 'new'}"):
            if line.startswith("merge") and "evaluator" in name:         # which reads real-2.npz
                continue
            refused(line, model)
            assert not marker.exists(), "it was run"


@pytest.mark.parametrize("file, write", [("optimizer.pt", a_pickle), ("optimizer.pt", a_torch_zip), ("optimizer.pt", garbage), ("weights.safetensors", a_pickle),
                                         ("weights.safetensors", cut), ("weights.safetensors", safetensors_header(2**63)), ("state.json", nested),
                                         ("state.json", garbage)],
                         ids=lambda value: named(value) if callable(value) else value)
def test_a_hostile_checkpoint_is_refused_and_the_one_before_serves(tiny, tmp_path, capfd, file, write):
    argv, marker = small(tiny, tmp_path / "run", "--iterations", 3), tmp_path / "marker"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes.Interrupt, "asked", lambda self, device: len(list((tmp_path / "run").glob("checkpoint-*"))) == 1)
        launch(argv)
    shutil.copytree(tmp_path / "run" / "checkpoint-00002", tmp_path / "whole")
    (tmp_path / "run" / "checkpoint-00002" / file).unlink()
    write(tmp_path / "run" / "checkpoint-00002" / file, marker)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        launch(argv)
    lines = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert stop.value.code == 2 and len(lines) == 1 and "checkpoint-00002: damaged" in lines[0] and not marker.exists()
    shutil.rmtree(tmp_path / "run" / "checkpoint-00002")
    launch(argv)
    assert [row["iteration"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 3]


def test_the_traps_are_armed(tmp_path):
    """Else the tests above would pass whatever was done with the files."""
    for n, (write, read) in enumerate([(a_pickle, lambda p: pickle.loads(p.read_bytes())), (a_torch_zip, lambda p: torch.load(p, weights_only=False)),
                                       (an_old_torch_file, lambda p: torch.load(p, weights_only=False)),
                                       (npz_of_objects("x"), lambda p: np.load(p, allow_pickle=True)["x"])]):
        path, marker = tmp_path / f"{n}.npz", tmp_path / f"marker{n}"
        write(path, marker)
        try:
            read(path)
        except FileExistsError:                                          # three traps in one file
            pass
        assert marker.is_dir()


def test_a_large_file_that_is_honest_is_read(tmp_path, monkeypatch):
    """Pictures pack to a tenth at most: the limits concern what is both large and empty."""
    monkeypatch.setattr(targets, "LARGE", 10_000)
    noise = np.random.default_rng(0).integers(0, 256, (99, 28, 28), np.uint8)
    (tmp_path / "noise.gz").write_bytes(gzip.compress(b"\0\0\x08\3" + struct.pack(">3I", *noise.shape) + noise.tobytes()))
    assert np.array_equal(targets.read_idx(tmp_path / "noise.gz"), noise)
    np.savez_compressed(tmp_path / "noise.npz", x=noise)
    targets.check_npz(tmp_path / "noise.npz", "x")
    np.savez_compressed(tmp_path / "empty.npz", x=0 * noise)
    with pytest.raises(ValueError, match="would unpack"):
        targets.check_npz(tmp_path / "empty.npz", "x")


@pytest.mark.parametrize("facts, naming", [({"iteration": "first", "sigma_rel": "0.05"}, "of iteration first"),
                                           ({"iteration": "2", "sigma_rel": "wide"}, "average wide"), ({"iteration": "nan", "sigma_rel": "0.05"}, "iteration nan"),
                                           ({"iteration": "2", "sigma_rel": "7"}, "average 7"),
                                           ({"sigma_rel": "0.05"}, "iteration None")])
def test_an_average_that_says_nonsense_of_itself_is_refused(good, tmp_path, refused, facts, naming):
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.zeros(32, 32)}, tmp_path / "bad.safetensors", metadata=facts)
    line = refused(f"merge ema {tmp_path / 'bad.safetensors'} {good['one']} --model {good['tiny']} --out {tmp_path / 'new'}", naming)
    assert str(tmp_path / "bad.safetensors") in line


def test_a_lora_whose_alpha_is_no_number_is_refused(good, tmp_path, refused):
    layer, path = "transformer_blocks.0.attn.to_q", tmp_path / "bad.safetensors"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2), f"{layer}.alpha": torch.ones(3)}, path)
    refused(f"merge average {path} --model {good['tiny']} --out {tmp_path / 'new'}", f"{path}: {layer}.alpha has the shape (3,)")


def test_mistakes_are_counted():
    """Every row of these tables is a test of its own: exit code 2, one line that names it, nothing loaded, nothing written."""
    rows = lambda table: [row.values if hasattr(row, "values") and not isinstance(row, tuple) else row for row in table]
    distinct = {"train.py": {row[0] for row in rows(test_bad_input.FLAGS)} | {row[0] for row in test_bad_input.PROMPT_FILES} | {row[0] for row in test_shard.REFUSED} | {
                    f"{n} {row[0]}" for n, row in enumerate(test_bad_input.MODEL_FILES)},
                "merge.py": {row[0] for row in rows(test_merge.BAD)}, "eval.py": {row[0] for row in rows(test_eval_command.BAD)},
                "hostile files": {f"{n} {line}" for n, row in enumerate(FILES) for line in row[2]} | {
                    f"{n} {name}" for name, writes in PARTS for n in range((2 if "evaluator" in name else 3) * len(writes))}}
    print({name: len(lines) for name, lines in distinct.items()}, "in all", sum(map(len, distinct.values())))
    assert all(len(lines) >= 50 for lines in distinct.values())
