"""Pickles that would run code, archives that would fill the memory, headers that lie.

Whatever command reads such a file: one line that names it, exit code 2, nothing loaded, nothing
run, nothing written.
"""

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
from conftest import contents, launch, read_metrics, small
from safetensors.torch import save_file

import bases
import eval as evaluation
import merge
import rewards
import train
from bases.files import network_files
from bases.tensors import Weights, save_snapshots
from support import files, processes

# --------------------------------------------------------------------------------------------------
# Hostile files, each written by a function of (path, marker): code in it would make `marker`.


class Trap:
    """Unpickled in the usual way, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def a_pickle(path, marker):
    path.write_bytes(pickle.dumps({"ema": Trap(marker)}))


def a_torch_zip(path, marker):
    torch.save({"ema": Trap(marker), "x": torch.ones(2)}, path)


def an_old_torch_file(path, marker):
    torch.save(Trap(marker), path, _use_new_zipfile_serialization=False)


def garbage(path, marker):
    path.write_bytes(bytes(range(256)) * 40)


def nested_json(path, marker):
    path.write_text("[" * 200_000)


def safetensors_file(length, header=b""):
    """-> a function that writes a header of the claimed length, and nothing else."""

    def write(path, marker):
        path.write_bytes(struct.pack("<Q", length) + header)

    return write


def tensors_beyond_the_end(path, marker):
    tensor = {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 2**62]}
    header = json.dumps({"a.weight": tensor}).encode()
    safetensors_file(len(header), header)(path, marker)


def cut_tensors(path, marker):
    save_file({"a.weight": torch.ones(1000)}, path)
    os.truncate(path, 2000)


huge_header = safetensors_file(2**63)
broken_header = safetensors_file(9, b"{not json")


def npz_of_objects(path, marker):
    traps = np.array([Trap(marker)] * 3, object)
    np.savez(path, mu=traps, sigma=traps, scale=traps, arr_0=traps)


def write_array(member, shape, dtype, data):
    """The header of an array of a shape, and data of any length."""
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    member.write(data)


def npz_bomb(path, marker):
    """A small file whose arrays say that they unpack to gigabytes; header and archive agree."""
    claims = {
        "mu": ("<f8", (22_000,)),
        "sigma": ("<f8", (22_000, 22_000)),
        "scale": ("<f8", ()),
        "arr_0": ("|u1", (20_000, 256, 256, 3)),
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (dtype, shape) in claims.items():
            with archive.open(f"{name}.npy", "w") as member:
                write_array(member, shape, dtype, bytes(1000))

    # Each entry of the zip's directory gets the size that its array claims.
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        place = archive.start_dir
        for info, (dtype, shape) in zip(archive.infolist(), claims.values()):
            data = np.dtype(dtype).itemsize * int(np.prod(shape))
            size = info.file_size - 1000 + data
            place = raw.index(b"PK\1\2", place)
            raw[place + 24 : place + 28] = struct.pack("<I", size)
            place += 4
    path.write_bytes(raw)


def npz_whose_header_lies(path, marker):
    """The archive holds a thousand numbers; the array in it says that it is a thousand million."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("mu.npy", "w") as member:
        write_array(member, (10**9,), "<f8", bytes(8000))


def idx_file(shape, size):
    """-> a function that writes a packed idx file of a claimed shape with `size` zeros."""

    def write(path, marker):
        header = b"\0\0\x08\3" + struct.pack(">3I", *shape)
        path.write_bytes(gzip.compress(header + bytes(size)))

    return write


idx_bomb = idx_file((70, 28, 28), 10**7)  # unpacks to more than it says
idx_that_claims = idx_file((4 * 10**9, 4 * 10**9, 4 * 10**9), 5000)


def picture_bomb(folder, marker):
    """PNGs of 60,000 x 60,000 pixels: 10 GB each, from 60 bytes."""

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = chunk(b"IHDR", struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    folder.mkdir()
    for number in range(70):
        png = b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")
        (folder / f"{number:06d}.png").write_bytes(png)


def test_the_traps_are_armed(tmp_path):
    """Else the tests below would pass whatever was done with the files."""

    def unpickle(path):
        pickle.loads(path.read_bytes())

    def load_torch(path):
        torch.load(path, weights_only=False)

    def load_numpy(path):
        np.load(path, allow_pickle=True)["mu"]

    traps = [
        (a_pickle, unpickle),
        (a_torch_zip, load_torch),
        (an_old_torch_file, load_torch),
        (npz_of_objects, load_numpy),
    ]
    for number, (write, read) in enumerate(traps):
        path, marker = tmp_path / f"{number}.npz", tmp_path / f"marker{number}"
        write(path, marker)
        try:
            read(path)
        except FileExistsError:  # several traps in one file
            pass
        assert marker.is_dir()


# --------------------------------------------------------------------------------------------------
# Commands that are refused.


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory):
    """A model, and two snapshots that could be merged."""
    out = tmp_path_factory.mktemp("good")
    base = Weights(network_files(tiny))
    trained = {name: base[name] for name in base if "attn" in name}
    for iteration in (1, 2):
        save_snapshots(out, iteration, trained, {}, tiny, 9)
    one, two = sorted((out / "snapshots").iterdir())
    return {"tiny": tiny, "one": one, "two": two}


@pytest.fixture
def refused(good, tmp_path, capfd, monkeypatch):
    """Runs a command line that must be refused before anything is loaded -> its line of stderr."""
    load_array = np.load

    def forbidden(*args, **kwargs):
        pytest.fail("weights were loaded")

    def load_good_array(path, **kwargs):
        if "bad" in str(path):
            pytest.fail("an array was read")
        return load_array(path, **kwargs)

    monkeypatch.setattr(np, "load", load_good_array)
    monkeypatch.setattr(bases, "load", forbidden)
    monkeypatch.setattr(rewards.Reward, "__init__", forbidden)

    def run(line, named):
        script, *argv = line.format(bad=tmp_path / "bad", **good).split()
        if script == "train":
            argv = small(good["tiny"], tmp_path / "new", *argv)
        elif script == "merge":
            argv += ["--out", str(tmp_path / "new")]
        main = {"train": train.main, "merge": merge.main, "eval": evaluation.main}[script]
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as stop:
            main(argv)
        out, error = capfd.readouterr()
        lines = [line for line in error.splitlines() if "shards" not in line]  # transformers'
        assert stop.value.code == 2 and out == ""
        assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1000
        assert str(named) in lines[0]
        assert contents(tmp_path) == before and not (tmp_path / "new").exists()
        return lines[0]

    return run


TENSORS = (
    "merge average {bad}.safetensors --model {tiny}",
    "merge rl {bad}.safetensors {one} --model {tiny}",
    "train --model sit:{bad}.safetensors",
    "train --model edm2:{bad}.safetensors",
)
MOMENTS = (
    "train --reward fid --target {bad}.npz",
    "merge rl {one} {two} --target {bad}.npz",
    "merge rl {one} {two} --report_target {bad}.npz",
    "eval score {tiny} --target {bad}.npz",
    "eval score {bad}.npz --model {tiny}",
)
PICTURES = ("train --reward fid --target {bad}{ending}", "eval score {tiny} --target {bad}{ending}")


@pytest.mark.parametrize(
    "ending, write, lines",
    [
        # Each kind of file where it hurts, each reader at least once.
        (".safetensors", a_pickle, TENSORS),
        (".safetensors", a_torch_zip, TENSORS[1:2]),
        (".safetensors", huge_header, TENSORS),
        (".safetensors", broken_header, TENSORS[2:3]),
        (".safetensors", tensors_beyond_the_end, TENSORS[:1]),
        (".safetensors", cut_tensors, TENSORS[3:]),
        (".pt", a_pickle, ["train --model sit:{bad}.pt", "merge average {bad}.pt --model {tiny}"]),
        (".pt", a_torch_zip, ["train --model sit:{bad}.pt", "eval score sit:{bad}.pt"]),
        (".pt", an_old_torch_file, ["train --model sit:{bad}.pt"]),
        (".pkl", a_pickle, ["train --model edm2:{bad}.pkl", "eval score edm2:{bad}.pkl"]),
        (".pkl", a_torch_zip, ["train --model edm2:{bad}.pkl"]),
        (".npz", npz_of_objects, MOMENTS),
        (".npz", npz_bomb, MOMENTS),
        (".npz", npz_whose_header_lies, MOMENTS[:1]),
        (".npz", garbage, MOMENTS[4:]),
        (".gz", idx_bomb, [line.replace("{ending}", ".gz") for line in PICTURES]),
        (".gz", idx_that_claims, ["train --reward fid --target {bad}.gz"]),
        (
            "",
            picture_bomb,
            ["train --reward fid --target {bad}", "eval score {bad} --model {tiny}"],
        ),
        (
            ".jsonl",
            nested_json,
            ["train --prompts {bad}.jsonl", "merge rl {one} {two} --prompts {bad}.jsonl"],
        ),
    ],
)
def test_a_hostile_file_is_refused(tmp_path, refused, ending, write, lines):
    bad, marker = tmp_path / f"bad{ending}", tmp_path / "marker"
    write(bad, marker)
    for line in lines:
        refused(line, named=bad)
        assert not marker.exists(), "it was run"


@pytest.mark.parametrize(
    "name, write, line",
    [
        ("transformer/diffusion_pytorch_model.safetensors", a_pickle, "train --model {bad}"),
        ("transformer/diffusion_pytorch_model.safetensors", huge_header, "eval score {bad}"),
        ("text_encoder/model.safetensors", cut_tensors, "train --model {bad}"),
        ("reward/model.safetensors", tensors_beyond_the_end, "merge rl {one} {two} --model {bad}"),
        ("reward/config.json", nested_json, "train --model {bad}"),
        ("evaluator/real.npz", npz_of_objects, "train --model {bad}"),
        ("evaluator/real.npz", npz_bomb, "eval score {bad} --features evaluator"),
        ("model_index.json", nested_json, "merge rl {one} {two} --model {bad}"),
        ("scheduler/scheduler_config.json", nested_json, "train --model {bad}"),
    ],
)
def test_a_hostile_part_of_a_model_folder_is_refused(good, tmp_path, refused, name, write, line):
    bad, marker = tmp_path / "bad", tmp_path / "marker"
    shutil.copytree(good["tiny"], bad)
    (bad / name).unlink()
    write(bad / name, marker)
    refused(line, named=bad)
    assert not marker.exists(), "it was run"


@pytest.mark.parametrize(
    "facts, named",
    [
        ({"iteration": "first", "sigma_rel": "0.05"}, "of iteration first"),
        ({"iteration": "nan", "sigma_rel": "0.05"}, "iteration nan"),
        ({"iteration": "2", "sigma_rel": "7"}, "average 7"),
        ({"sigma_rel": "0.05"}, "iteration None"),
    ],
)
def test_an_average_that_says_nonsense_of_itself_is_refused(tmp_path, refused, facts, named):
    tensors = {"transformer_blocks.0.attn.to_q.weight": torch.zeros(32, 32)}
    save_file(tensors, tmp_path / "bad.safetensors", metadata=facts)
    line = refused("merge ema {bad}.safetensors {one} --model {tiny}", named)
    assert str(tmp_path / "bad.safetensors") in line


def test_a_lora_whose_alpha_is_no_number_is_refused(tmp_path, refused):
    layer, path = "transformer_blocks.0.attn.to_q", tmp_path / "bad.safetensors"
    tensors = {
        f"{layer}.lora_A.weight": torch.ones(2, 32),
        f"{layer}.lora_B.weight": torch.ones(32, 2),
        f"{layer}.alpha": torch.ones(3),
    }
    save_file(tensors, path)
    line = "merge average {bad}.safetensors --model {tiny}"
    refused(line, f"{path}: {layer}.alpha has the shape (3,)")


# --------------------------------------------------------------------------------------------------
# Checkpoints.


@pytest.mark.parametrize(
    "name, write",
    [
        ("optimizer.pt", a_pickle),
        ("optimizer.pt", a_torch_zip),
        ("optimizer.pt", garbage),
        ("weights.safetensors", a_pickle),
        ("weights.safetensors", cut_tensors),
        ("weights.safetensors", huge_header),
        ("state.json", nested_json),
        ("state.json", garbage),
    ],
)
def test_a_hostile_checkpoint_is_refused(tmp_path, capsys, name, write):
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    files.save_checkpoint(tmp_path, 2, {"w": weight}, optimizer, 3, keep=1)
    marker = tmp_path / "marker"
    (tmp_path / "checkpoint-00002" / name).unlink()
    write(tmp_path / "checkpoint-00002" / name, marker)
    with pytest.raises(SystemExit) as stop:
        folder, _ = files.newest_checkpoint(tmp_path)
        files.load_checkpoint(folder, {"w": weight}, optimizer)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "checkpoint-00002: damaged" in line
    assert not marker.exists(), "it was run"


@pytest.mark.slow
def test_without_a_hostile_checkpoint_the_one_before_serves(tiny, tmp_path, capfd):
    out = tmp_path / "run"
    argv = small(tiny, out, "--iterations", 3)

    def second_is_saved(interrupt, device):
        return len(list(out.glob("checkpoint-*"))) == 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes.Interrupt, "asked", second_is_saved)
        launch(argv)
    marker = tmp_path / "marker"
    a_torch_zip(out / "checkpoint-00002" / "optimizer.pt", marker)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        launch(argv)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert stop.value.code == 2 and "checkpoint-00002: damaged" in line
    assert not marker.exists(), "it was run"
    shutil.rmtree(out / "checkpoint-00002")
    launch(argv)
    assert [row["iteration"] for row in read_metrics(out)] == [0, 1, 2, 3]
