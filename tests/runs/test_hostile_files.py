"""Hostile files: pickles that run code, archives that fill the memory, headers that lie.

The commands refuse each with one line and code 2; nothing is loaded, run or written. One case a
kind of file: what each reader refuses besides is tested in tests/bases and tests/rewards.
"""

import gzip
import io
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
from conftest import contents, launch, read_metrics, small

import bases
import eval as evaluation
import merge
import train
from bases import tensors
from bases.files import network_files
from commands import picture_sets, training
from support import files, processes


class Trap:
    """Unpickled in the usual way, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


# --------------------------------------------------------------------------------------------------
# Files, each written by a function of (path, marker): `marker` is what a trap would make.


def write_pickle(path, marker):
    path.write_bytes(pickle.dumps({"ema": Trap(marker)}))


def write_torch_zip(path, marker):
    torch.save({"ema": Trap(marker), "x": torch.ones(2)}, path)


def write_npz_of_objects(path, marker):
    objects = np.array([Trap(marker)], object)
    np.savez(path, mu=objects, sigma=objects, scale=objects, arr_0=objects)


CLAIMS = {  # what an .npz says that its arrays unpack to
    "mu": ("<f8", (22_000,)),
    "sigma": ("<f8", (22_000, 22_000)),
    "scale": ("<f8", ()),
    "arr_0": ("|u1", (20_000, 256, 256, 3)),
}


def write_npz_that_claims(path, marker):
    """A kilobyte an array; the arrays' headers and the archive agree that they are CLAIMS."""
    sizes = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, (dtype, shape) in CLAIMS.items():
            header = io.BytesIO()
            facts = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(header, facts)
            file.writestr(f"{name}.npy", header.getvalue() + bytes(1000))
            claimed = np.dtype(dtype).itemsize * int(np.prod(shape))
            sizes.append(len(header.getvalue()) + claimed)
        directory = file.start_dir

    raw = bytearray(path.read_bytes())
    entry = directory
    for size in sizes:
        entry = raw.index(b"PK\1\2", entry)
        raw[entry + 24 : entry + 28] = struct.pack("<I", size)
        entry += 4
    path.write_bytes(raw)


def write_idx_bomb(path, marker):
    """A gzip of five kilobytes; the pictures in it are 784 megabytes by its header."""
    dims = struct.pack(">3I", 10**6, 28, 28)
    path.write_bytes(gzip.compress(b"\0\0\x08\3" + dims + bytes(5000)))


def png_chunk(kind, data):
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def write_picture_bombs(folder, marker):
    """PNGs of 60,000 x 60,000 pixels: 10 GB each, from 60 bytes."""
    header = png_chunk(b"IHDR", struct.pack(">2I5B", 60000, 60000, 8, 2, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(bytes(100))) + png_chunk(b"IEND", b"")
    folder.mkdir()
    for n in range(70):
        (folder / f"{n:06d}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)


def write_endless_header(path, marker):
    """A safetensors file whose header is 2^63 bytes long."""
    path.write_bytes(struct.pack("<Q", 2**63))


def write_tensor_beyond_the_end(path, marker):
    """A safetensors file of one tensor of 2^62 bytes, which are not in it."""
    tensor = {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 2**62]}
    header = json.dumps({"a.weight": tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def write_nested_lists(path, marker):
    """200,000 lists, each in the one before."""
    path.write_text("[" * 200_000)


# --------------------------------------------------------------------------------------------------
# Commands.


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory):
    """{name in a command line: path}: the base, and two snapshots that could be merged."""
    out = tmp_path_factory.mktemp("good")
    weights = tensors.Weights(network_files(tiny))
    trained = {name: weights[name] for name in weights if "attn" in name}
    for iteration in (1, 2):
        facts = tensors.base_facts(tiny, None)
        tensors.save_snapshots(out, iteration, trained, {}, facts, keep=2)
    one, two = sorted((out / "snapshots").iterdir())
    return {"tiny": tiny, "one": one, "two": two}


@pytest.fixture
def refused(tmp_path, capfd, monkeypatch):
    """A function: runs a command line that must be refused in one line that names a file."""

    def fail(*args, **kwargs):
        pytest.fail("weights or arrays were loaded")

    load_array = np.load

    def load_harmless(path, *args, **kwargs):
        return fail() if "bad" in str(path) else load_array(path, *args, **kwargs)

    monkeypatch.setattr(np, "load", load_harmless)
    monkeypatch.setattr(bases, "load", fail)
    for module in (training, merge, evaluation):
        monkeypatch.setattr(module, "Reward", fail)
    monkeypatch.setattr(evaluation, "Judge", fail)
    monkeypatch.setattr(picture_sets, "open_model", fail)

    def run(line, file):
        script, *argv = line.split()
        if script == "train":
            argv = small("assets/tiny", tmp_path / "new", *argv)
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as stop:
            {"train": train, "merge": merge, "eval": evaluation}[script].main(argv)
        out, error = capfd.readouterr()
        assert stop.value.code == 2 and out == ""
        assert len(error.splitlines()) == 1, error
        assert error.startswith("error: ") and str(file) in error and len(error) < 1000
        assert contents(tmp_path) == before and not (tmp_path / "new").exists()
        assert not (tmp_path / "marker").exists(), "it was run"

    return run


REWARD = "train --model {tiny} --reward fid --target {bad}"
SCORE = "eval score {bad} --model {tiny}"
SCORE_AGAINST = "eval score {tiny} --target {bad}"
MERGE = "merge average {bad} --model {tiny} --out {new}"
SEARCH = "merge rl {one} {two} --out {new}"

# What it is: the file's name, the function that writes it, the commands that are to read it.
HOSTILE = {
    "a pickle named safetensors": (
        "bad.safetensors",
        write_pickle,
        [MERGE, "train --model sit:{bad}", "eval images edm2:{bad} --out {new}"],
    ),
    "an endless header": (
        "bad.safetensors",
        write_endless_header,
        [MERGE, "train --model edm2:{bad}", "eval images sit:{bad} --out {new}"],
    ),
    "a tensor beyond the end": (
        "bad.safetensors",
        write_tensor_beyond_the_end,
        ["merge rl {one} {bad} --out {new}", "train --model sit:{bad}"],
    ),
    "a zip of torch": (
        "bad.pt",
        write_torch_zip,
        [MERGE, "train --model sit:{bad}", "eval images sit:{bad} --out {new}"],
    ),
    "a snapshot of EDM2": (
        "bad.pkl",
        write_pickle,
        ["train --model edm2:{bad}", "eval score edm2:{bad}"],
    ),
    "arrays of objects": (
        "bad.npz",
        write_npz_of_objects,
        [REWARD, SCORE, SCORE_AGAINST, SEARCH + " --target {bad}"],
    ),
    "arrays that unpack to gigabytes": (
        "bad.npz",
        write_npz_that_claims,
        [REWARD, SCORE, SCORE_AGAINST, SEARCH + " --report_target {bad}"],
    ),
    "an idx bomb": ("bad.gz", write_idx_bomb, [REWARD, SCORE_AGAINST]),
    "picture bombs": ("bad", write_picture_bombs, [REWARD, SCORE, SCORE_AGAINST]),
    "lists in lists": (
        "bad.jsonl",
        write_nested_lists,
        [
            "train --model {tiny} --prompts {bad}",
            "eval images {tiny} --prompts {bad} --out {new}",
            SEARCH + " --prompts {bad}",
        ],
    ),
}


@pytest.mark.parametrize("name, write, lines", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused(good, tmp_path, refused, name, write, lines):
    bad = tmp_path / name
    write(bad, tmp_path / "marker")
    for line in lines:
        refused(line.format(bad=bad, new=tmp_path / "new", **good), bad)


# Files of a model folder.
HOSTILE_PARTS = [
    ("transformer/diffusion_pytorch_model.safetensors", write_torch_zip),
    ("evaluator/real.npz", write_npz_of_objects),
    ("model_index.json", write_nested_lists),
]


@pytest.mark.parametrize("name, write", HOSTILE_PARTS)
def test_a_hostile_part_of_a_model_folder_is_refused(good, tmp_path, refused, name, write):
    model = tmp_path / "bad-model"
    shutil.copytree(good["tiny"], model)
    (model / name).unlink()
    write(model / name, tmp_path / "marker")
    refused(f"train --model {model}", model)
    refused(f"eval score {model} --n 20 --features evaluator", model)
    if name != "evaluator/real.npz":  # a search reads real-1 and real-2
        line = SEARCH.format(new=tmp_path / "new", **good)
        refused(f"{line} --model {model}", model)


def test_the_traps_are_armed(tmp_path):
    """A trusting reader falls into each; else the tests above would pass whatever was done."""

    def load_pickle(path):
        pickle.loads(path.read_bytes())

    def load_torch(path):
        torch.load(path, weights_only=False)

    def load_npz(path):
        np.load(path, allow_pickle=True)["mu"]

    trusting = [
        (write_pickle, load_pickle),
        (write_torch_zip, load_torch),
        (write_npz_of_objects, load_npz),
    ]
    for n, (write, load) in enumerate(trusting):
        path = tmp_path / f"{n}.npz"
        marker = tmp_path / f"marker-{n}"
        write(path, marker)
        load(path)
        assert marker.is_dir()


# --------------------------------------------------------------------------------------------------
# Checkpoints of a run.

HOSTILE_CHECKPOINTS = [
    ("optimizer.pt", write_torch_zip),
    ("weights.safetensors", write_endless_header),
    ("state.json", write_nested_lists),
]


@pytest.mark.parametrize("name, write", HOSTILE_CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused(tmp_path, capsys, name, write):
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    files.save_checkpoint(tmp_path, 2, {"w": weight}, optimizer, 3, keep=2)
    folder = tmp_path / "checkpoint-00002"
    write(folder / name, tmp_path / "marker")
    with pytest.raises(SystemExit) as stop:
        newest, _ = files.newest_checkpoint(tmp_path)
        files.load_checkpoint(newest, {"w": weight}, optimizer)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"error: {folder}: damaged") and len(error.splitlines()) == 1
    assert not (tmp_path / "marker").exists(), "it was run"


@pytest.mark.slow
def test_after_a_hostile_checkpoint_the_one_before_serves(tiny, tmp_path, capfd, monkeypatch):
    argv = small(tiny, tmp_path / "run", "--iterations", 3)
    newest = tmp_path / "run" / "checkpoint-00002"
    with monkeypatch.context() as patch:
        # Asked to stop in the second iteration, it saves and stops.
        first = tmp_path / "run" / "checkpoint-00001"
        patch.setattr(processes.Interrupt, "asked", lambda self, device: first.exists())
        launch(argv)
    write_torch_zip(newest / "optimizer.pt", tmp_path / "marker")
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        launch(argv)
    errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert stop.value.code == 2 and len(errors) == 1
    assert "checkpoint-00002: damaged" in errors[0]
    assert not (tmp_path / "marker").exists(), "it was run"

    shutil.rmtree(newest)
    launch(argv)
    assert [row["iteration"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 3]
