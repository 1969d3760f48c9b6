"""Targets: every file that cannot be used is refused in one line that names it.

Every good one gives the moments that numpy finds, in the same bits on any number of processes.
"""

import gzip
import io
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, launch_process, small
from PIL import Image
from reward_helpers import TINY, noise, refused

from dist_reward import KernelReplace, SubsetReplace
from rewards import targets
from rewards.classifier import load_classifier
from rewards.features import check_features, load_features
from rewards.targets import check_target, load_target, open_reference_set, target_path

BLANK = torch.zeros(1, 3, 28, 28)


def five(images):
    """A network of 5 features."""
    return images.flatten(1)[:, :5]


def covariance(D=5):
    x = np.random.default_rng(0).normal(size=(3 * D, D))
    return x.T @ x / (3 * D - 1)


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


# --------------------------------------------------------------------------------------------------
# Files, each written by a function of its path.


def moments_file(save=np.savez, **changes):
    """-> a function that writes good moments of 5 features with some changed; None drops one."""
    arrays = {"mu": np.arange(5.0), "sigma": covariance()} | changes
    kept = {name: array for name, array in arrays.items() if array is not None}
    return lambda path: save(path, **kept)


def content(raw):
    """-> a function that writes these bytes."""
    return lambda path: path.write_bytes(raw)


def altered(write, change):
    """-> a function that writes a file, and then what `change` makes of its bytes."""

    def both(path):
        write(path)
        path.write_bytes(change(path.read_bytes()))

    return both


def idx(array, magic=b"\0\0\x08"):
    """The bytes of an idx file."""
    dims = struct.pack(f">{array.ndim}I", *array.shape)
    return magic + bytes([array.ndim]) + dims + array.tobytes()


def npy(array):
    """The bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def pictures(count, spoil=None):
    """-> a function that fills a folder with PNGs, and spoils the bytes of the first."""

    def write(path):
        path.mkdir()
        for n in range(count):
            Image.fromarray(noise(6, 7, 3, seed=n)).save(path / f"{n}.png")
        if spoil:
            first = path / "0.png"
            first.write_bytes(spoil(first.read_bytes()))

    return write


def pictures_of_16_bits(path):
    path.mkdir()
    for n in range(6):
        Image.fromarray(np.full((4, 4), 8000 * (n + 1), np.uint16)).save(path / f"{n}.png")


def picture_bomb(path):
    """PNGs of 60,000 x 60,000 pixels: 10 GB each, from 60 bytes."""

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = chunk(b"IHDR", struct.pack(">2I5B", 60000, 60000, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    path.mkdir()
    for n in range(6):
        (path / f"{n}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)


def npz_whose_header_lies(path):
    """The archive holds a thousand numbers; the array in it says a thousand million."""
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**9,)}
    with zipfile.ZipFile(path, "w") as file, file.open("mu.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, header)
        member.write(bytes(8000))


def npz_bomb(path):
    """A small archive that unpacks to 400 MB, as both of its headers say."""
    header = {"descr": "<f8", "fortran_order": False, "shape": (50_000_000,)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("mu.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for _ in range(50):
                member.write(bytes(8_000_000))


def undeflatable(raw):
    """A zip whose first member deflate cannot read: it begins with a block of the reserved type."""
    name_length, extra_length = struct.unpack("<HH", raw[26:30])
    start = 30 + name_length + extra_length
    return raw[:start] + b"\xff" + raw[start + 1 :]


def encrypted(raw):
    """A zip whose directory says that its first member needs a password."""
    flags = raw.index(b"PK\1\2") + 8
    return raw[:flags] + bytes([raw[flags] | 1]) + raw[flags + 1 :]


def with_a_bit_changed(raw):
    """A zip one of whose numbers has another sign: its checksum is wrong."""
    return raw.replace(struct.pack("<d", 3.0), struct.pack("<d", -3.0))


GOOD = moments_file()
IDX = idx(noise(9, 4, 5))
IDX_BOMB = gzip.compress(b"\0\0\x08\3" + struct.pack(">3I", 10**6, 28, 28) + bytes(5000))

# Kind of failure -> files of it: name, the function that writes it, what the refusal says.
WRONG = {
    "missing": [
        ("t.npz", lambda path: None, ""),
        ("t", lambda path: None, "no such file or folder"),
        ("t.npz", moments_file(mu=None), "lacks mu or sigma"),
        ("t.npz", lambda path: path.mkdir(), ""),
    ],
    "wrong shape": [
        ("t.npz", moments_file(mu=np.zeros((5, 1))), "(5, 1)"),
        ("t.npz", moments_file(mu=np.float64(1)), "()"),
        ("t.npz", moments_file(sigma=covariance(6)), "(6, 6)"),
        ("t.npz", moments_file(mu=np.zeros(4), sigma=covariance(4)), "4 features"),
    ],
    "not finite": [
        ("t.npz", moments_file(sigma=covariance() * np.nan), "not finite"),
        ("t.npz", moments_file(mu=np.full(5, np.inf)), "not finite"),
    ],
    "no covariance": [
        (
            "t.npz",
            moments_file(sigma=changed(covariance(), (0, 3), covariance()[0, 3] + 1e-3)),
            "not symmetric",
        ),
        ("t.npz", moments_file(sigma=-np.eye(5)), "negative"),
    ],
    "no real numbers": [
        ("t.npz", moments_file(mu=np.array(list("abcde"))), "real numbers"),
        ("t.npz", moments_file(mu=np.zeros(5, [("a", float), ("b", int)])), "real numbers"),
        ("t.npz", moments_file(mu=np.arange(5) + 1j), "real numbers"),
    ],
    "damaged npz": [
        ("t.npz", content(b"mu and sigma"), "not an npz"),
        ("t.npz", content(npy(np.eye(5))), "not an npz"),
        ("t.npz", altered(GOOD, lambda raw: raw[: len(raw) // 2]), "not an npz"),
        ("t.npz", altered(GOOD, with_a_bit_changed), "not an npz"),
        ("t.npz", altered(moments_file(np.savez_compressed), undeflatable), "not an npz"),
        ("t.npz", altered(GOOD, encrypted), "not an npz"),
    ],
    "few pictures": [
        ("t", lambda path: path.mkdir(), "0 pictures"),
        ("t", pictures(5), "5 pictures"),
        ("t.idx", content(idx(noise(5, 4, 5))), "5 pictures"),
    ],
    "damaged picture": [
        ("t", pictures(6, lambda raw: b"text"), "0.png"),
        ("t", pictures(6, lambda raw: raw[:-40]), "0.png"),
    ],
    "16 bits, which PIL makes white": [("t", pictures_of_16_bits, "0.png")],
    "damaged idx": [
        ("t", content(IDX[:-1]), ""),
        ("t", content(IDX + b"\0"), ""),
        ("t", content(IDX[:9]), ""),
        ("t", content(b""), ""),
        ("t.gz", content(IDX), ""),
        ("t.gz", content(gzip.compress(IDX)[:-20]), ""),
        ("t.gz", content(gzip.compress(IDX)[:10] + b"\xff" * 30), ""),
    ],
    "another idx": [
        ("t", content(idx(noise(9, 4, 5), b"\0\0\x0d")), "unsigned bytes"),
        ("t", content(idx(noise(9))), "dimensions (9,)"),
        ("t", content(idx(noise(0, 4, 5))), "dimensions (0, 4, 5)"),
    ],
    "larger than it says": [("t.npz", npz_whose_header_lies, "where its header says")],
    "picture bomb": [("t", picture_bomb, "0.png")],
    "idx bomb": [("t.gz", content(IDX_BOMB), "would unpack")],
}


@pytest.mark.parametrize("files", WRONG.values(), ids=WRONG.keys())
def test_a_target_that_cannot_be_used(tmp_path, files):
    for n, (name, write, naming) in enumerate(files):
        path = tmp_path / str(n) / name
        path.parent.mkdir()
        write(path)
        with pytest.raises(ValueError) as caught:
            check_target(path, 5)
        line = str(caught.value)
        assert str(path) in line and naming in line
        assert len(line.splitlines()) == 1 and len(line) < 1000


def test_moments_of_nothing(tmp_path):
    path = tmp_path / "t.npz"
    np.savez(path, mu=np.zeros(0), sigma=np.zeros((0, 0)))
    refused(lambda: check_target(path, None), path, "(0,)")


# --------------------------------------------------------------------------------------------------
# Arrays of an .npz.


class Trap:
    """What np.load runs if it unpickles: it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "t.npz"
    marker = tmp_path / "marker"
    moments_file(sigma=np.array([Trap(marker)] * 5, object))(path)
    refused(lambda: check_target(path, 5), path, "sigma holds objects")
    refused(lambda: load_target(path, five, BLANK), path)
    assert not marker.exists()
    with np.load(path, allow_pickle=True) as file:
        file["sigma"]
    assert marker.exists()  # it was armed


def test_the_arrays_of_an_npz_come_in_the_order_of_their_names(tmp_path):
    path = tmp_path / "t.npz"
    np.savez(path, a=np.arange(3), b=np.eye(2, dtype=np.uint8))
    b, a = targets.read_npz(path, "b", "a")
    assert np.array_equal(a, np.arange(3)) and b.dtype == np.uint8
    refused(lambda: targets.read_npz(path, "a", "c"), path, "lacks a or c")


def test_a_file_that_unpacks_to_far_more_than_it_takes_is_refused(tmp_path, monkeypatch):
    """Images pack to a tenth at most: the limit concerns what is both large and empty."""
    monkeypatch.setattr(targets, "LARGE", 10_000)
    images = noise(99, 28, 28)
    (tmp_path / "noise.gz").write_bytes(gzip.compress(idx(images)))
    assert np.array_equal(targets.read_idx(tmp_path / "noise.gz"), images)
    np.savez_compressed(tmp_path / "noise.npz", x=images)
    targets.check_npz(tmp_path / "noise.npz", "x")

    np.savez_compressed(tmp_path / "empty.npz", x=0 * images)
    refused(lambda: targets.check_npz(tmp_path / "empty.npz", "x"), "would unpack")
    (tmp_path / "empty.gz").write_bytes(gzip.compress(idx(0 * images)))
    refused(lambda: targets.read_idx(tmp_path / "empty.gz"), "empty.gz", "would unpack")


@pytest.mark.slow
def test_an_npz_bomb_is_refused(tmp_path):
    npz_bomb(tmp_path / "t.npz")
    refused(lambda: check_target(tmp_path / "t.npz", 5), "mu would unpack", "to 400000128")


@pytest.mark.parametrize("missing", ["model.safetensors", "real-2.npz", "scale"])
def test_a_judge_is_a_classifier_and_moments_with_a_scale(tmp_path, missing):
    folder = shutil.copytree(TINY / "evaluator", tmp_path / "evaluator")
    targets.check_judge(folder)
    targets.check_judge(folder, "real-2.npz")
    if missing == "scale":
        np.savez(folder / "real-2.npz", mu=np.zeros(64), sigma=np.eye(64))
    else:
        (folder / missing).unlink()
    refused(lambda: targets.check_judge(folder, "real-2.npz"), folder)


@pytest.mark.parametrize("shares", [None, [0.5, 0.5], [0.5, 0.6, -0.1], [0.5, 0.3, 0.1]])
def test_a_judge_of_several_attributes_knows_how_frequent_their_values_are(tmp_path, shares):
    moments = {"mu": np.zeros(3), "sigma": np.eye(3), "scale": 1.0}
    two = {"shape": list("abc"), "size": [0, 1]}
    right = {"frequencies_shape": [0.5, 0.3, 0.2], "frequencies_size": [1, 0]}
    np.savez(tmp_path / "real.npz", **moments, **right)
    targets.check_real(tmp_path / "real.npz", two)
    wrong = {"frequencies_size": [1, 0]}
    if shares:
        wrong["frequencies_shape"] = shares
    np.savez(tmp_path / "real.npz", **moments, **wrong)
    refused(lambda: targets.check_real(tmp_path / "real.npz", two), "frequencies_shape")
    targets.check_real(tmp_path / "real.npz", {"label": [0, 1]})


# --------------------------------------------------------------------------------------------------
# Targets that can be used.


def test_the_default_target_is_the_model_folders():
    path = target_path("", "reward", TINY)
    assert path == TINY / "reward" / "real.npz"
    check_target(path, check_features("reward", TINY))
    assert str(target_path("mine.idx", "reward", TINY)) == "mine.idx"
    refused(lambda: target_path("", "dinov2", TINY), "--features dinov2", "--target")


def test_moments_that_can_be_used(tmp_path):
    path = tmp_path / "t.npz"
    single = {"mu": np.arange(5, dtype=np.float32), "sigma": covariance().astype(np.float32)}
    rounded = changed(covariance(), (0, 3), covariance()[0, 3] + 1e-9)
    for changes in (
        {"mu_s": np.zeros(7), "sigma_s": np.eye(7)},  # as guided-diffusion's files have
        single,
        {"sigma": np.zeros((5, 5))},
        {"sigma": rounded},
    ):
        for save in (np.savez, np.savez_compressed):
            moments_file(save, **changes)(path)
            check_target(path, 5)
            mu, sigma, features = load_target(path, five, BLANK)
            assert features is None and mu.dtype == sigma.dtype == torch.float64
            assert np.array_equal(mu.numpy(), changes.get("mu", np.arange(5.0)))
            assert np.array_equal(sigma.numpy(), changes.get("sigma", covariance()))


def test_kid_needs_pictures(tmp_path):
    GOOD(tmp_path / "t.npz")
    pictures(6)(tmp_path / "folder")
    content(IDX)(tmp_path / "t.idx")
    path = tmp_path / "t.npz"
    refused(lambda: check_target(path, 5, need_pictures=True), path, "kid")
    check_target(tmp_path / "folder", 5, need_pictures=True)
    check_target(tmp_path / "t.idx", 5, need_pictures=True)


def test_more_pictures_than_features_are_enough(tmp_path):
    content(idx(noise(6, 4, 5)))(tmp_path / "6.idx")
    content(idx(noise(1, 4, 5)))(tmp_path / "1.idx")
    check_target(tmp_path / "6.idx", 5)
    refused(lambda: check_target(tmp_path / "6.idx", 6), tmp_path / "6.idx", "more than 6")
    refused(lambda: check_target(tmp_path / "1.idx", None), tmp_path / "1.idx", "more than 1")


def four(images):
    """A network of 4 features that takes any size, and tells channels and corners apart."""
    corners = [images[:, 1, 0, -1], images[:, 2, -1, 0]]
    return torch.stack([images.mean((1, 2, 3)), images[:, 0].amax((1, 2)), *corners], 1)


def four_by_numpy(array):
    """The same of one uint8 picture [H, W, 3] or [H, W]."""
    H, W = array.shape[:2]
    x = np.broadcast_to(array.reshape(H, W, -1), (H, W, 3)).astype(np.float64) / 255
    return [x.mean(), x[:, :, 0].max(), x[0, -1, 1], x[-1, 0, 2]]


def agrees(target, arrays):
    """Compares a target of `four` with numpy's, of the pictures before they were written."""
    expected = np.array([four_by_numpy(array) for array in arrays])
    mu, sigma, features = target
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(mu.numpy(), expected.mean(0), atol=1e-6)
    np.testing.assert_allclose(sigma.numpy(), np.cov(expected, rowvar=False), atol=1e-6)
    assert mu.dtype == sigma.dtype == torch.float64 and features.dtype == torch.float32


@pytest.mark.parametrize(
    "name, total, block", [("t.idx", 23, 10), ("t.gz", 20, 10), ("t.idx", 7, 100)]
)
def test_pictures_of_an_idx_file(tmp_path, name, total, block):
    array = noise(total, 5, 8)
    raw = idx(array)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    batches = []

    def network(images):
        batches.append(tuple(images.shape))
        return four(images)

    agrees(load_target(tmp_path / name, network, BLANK, block=block), array)
    assert batches.pop(0) == (1, 3, 28, 28)  # the blank
    assert {shape[1:] for shape in batches} == {(3, 5, 8)}
    assert max(shape[0] for shape in batches) == min(total, block)


@pytest.mark.parametrize("sizes, block", [("one", 4), ("many", 4), ("many", 100)])
def test_pictures_of_a_folder(tmp_path, sizes, block):
    names = ["a/0.png", "a/1.PNG", "a/deep/er/0.bmp", "b.png", "c/0.webp", "d/0.png", "d/1.png"]
    arrays = []
    for n, name in enumerate(names):
        H, W = (6, 7) if sizes == "one" else (4 + n % 3, 9 - n % 2)
        shape = (H, W) if n % 3 == 1 else (H, W, 3)  # every third is grey
        arrays.append(noise(*shape, seed=n))
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lossless = {"lossless": True} if name.endswith("webp") else {}
        Image.fromarray(arrays[-1]).save(path, **lossless)
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    check_target(tmp_path, 4)
    agrees(load_target(tmp_path, four, BLANK, block=block), arrays)


def test_a_later_picture_that_is_damaged_is_named(tmp_path):
    pictures(8)(tmp_path / "t")
    damaged = tmp_path / "t" / "5.png"
    damaged.write_bytes(b"text")
    check_target(tmp_path / "t", 4)  # which reads only the first
    refused(lambda: load_target(tmp_path / "t", four, BLANK), damaged)


# --------------------------------------------------------------------------------------------------
# Folders of pictures as people keep them.


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def photograph(seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 4, len(mode)), np.uint8)
    return Image.fromarray(pixels, mode)


def test_hidden_pictures_and_other_formats_are_left_out_and_counted(tmp_path, capsys):
    for name in ("b.png", "a.JPG", "deeper/c.tif", "d.bmp"):
        save(tmp_path / name, photograph())
    for name in (".ipynb_checkpoints/b.png", "._b.png", "deeper/.x/y.jpg"):
        save(tmp_path / name, photograph())
    save(tmp_path / "film.gif", photograph())
    (tmp_path / "notes.txt").write_text("no picture")
    found = [str(path.relative_to(tmp_path)) for path in targets.picture_files(tmp_path)]
    assert found == ["a.JPG", "b.png", "d.bmp", "deeper/c.tif"]
    line = capsys.readouterr().err
    assert line.startswith(f"warning: {tmp_path}: leaves out 3 hidden pictures and 1 of other")
    assert "(.gif)" in line and line.count("\n") == 1


def test_two_names_that_differ_in_the_ending_alone_are_refused(tmp_path):
    save(tmp_path / "1.png", photograph())
    save(tmp_path / "1.jpg", photograph())
    with pytest.raises(ValueError, match=r"1\.png: has the name of 1\.jpg but for the ending"):
        targets.picture_files(tmp_path)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("turn, rotation", [(1, 0), (3, 180), (6, 270), (8, 90), (99, 0)])
def test_a_photograph_is_turned_upright(tmp_path, turn, rotation, ending):
    """PIL's rotate turns against the clock; tag 6 means that the top lies on the right.

    99 means nothing. Of a TIFF, PIL turns the size when it opens it, and no other's.
    """
    path = tmp_path / f"a.{ending}"
    tags = Image.Exif()
    tags[0x0112] = turn
    save(path, photograph(), exif=tags)
    upright = np.asarray(photograph().rotate(rotation, expand=True)).transpose(2, 0, 1)
    assert np.array_equal(targets.read_picture(path), upright)
    assert targets.picture_size(path) == upright.shape[1:]


def test_of_a_square_picture_only_the_header_is_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    assert targets.picture_size(tmp_path / "half.png") == (64, 64)


def test_what_lies_under_transparent_pixels_is_not_guessed(tmp_path):
    clear = photograph(mode="RGBA")
    save(tmp_path / "clear.png", clear)
    palette = Image.fromarray(np.zeros((4, 4), np.uint8), "P")
    save(tmp_path / "palette.png", palette, transparency=0)
    for name in ("clear.png", "palette.png"):
        with pytest.raises(ValueError, match=f"{name}: .*transparent pixels; flatten it"):
            targets.read_picture(tmp_path / name)
    clear.putalpha(255)
    save(tmp_path / "solid.png", clear)
    pixels = np.asarray(clear.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(targets.read_picture(tmp_path / "solid.png"), pixels)


def test_a_picture_of_a_size_that_the_features_do_not_see_is_named(tmp_path):
    for number in range(4):
        save(tmp_path / f"{number}.png", Image.new("L", (28, 30 if number == 2 else 28)))
    targets.check_target(tmp_path, 3)
    with pytest.raises(ValueError, match="2.png: of 30 x 28, and these features see 28 x 28"):
        targets.check_target(tmp_path, 3, side=28)
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match="0.png: of 28 x 28, and these features see 32 x 32"):
        targets.check_target(tmp_path, 2, side=32)
    targets.check_target(tmp_path, 2, side=28)


def test_films_fifos_and_arrays_are_no_pictures(tmp_path):
    film = [photograph(1), photograph(2)]
    save(tmp_path / "film.webp", film[0], save_all=True, append_images=film[1:], lossless=True)
    with pytest.raises(ValueError, match="film.webp: .*2 pictures in one file"):
        targets.read_picture(tmp_path / "film.webp")
    os.mkfifo(tmp_path / "a.png")
    for read in (targets.read_picture, targets.picture_size):
        with pytest.raises(ValueError, match="a.png: is no regular file but a FIFO"):
            read(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="a.npz: is no regular file but a FIFO"):
        check_target(tmp_path / "a.npz", 5)
    np.save(tmp_path / "mu.npy", np.zeros(5))
    with pytest.raises(ValueError, match="mu.npy: one array is no target; .*numpy.savez"):
        check_target(tmp_path / "mu.npy", 5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: 0 pictures in it, and no other .*; read are .bmp"):
        check_target(tmp_path / "empty", 5)
    (tmp_path / "empty" / "a.heic").touch()
    with pytest.raises(ValueError, match="empty: 0 pictures in it, its files are .heic; read are"):
        check_target(tmp_path / "empty", 5)


def test_a_target_that_does_not_fit_is_refused_when_the_features_are_counted(tmp_path):
    path = tmp_path / "t.npz"
    moments_file(mu=np.zeros(4), sigma=covariance(4))(path)
    check_target(path, None)  # nobody knows yet
    refused(lambda: load_target(path, five, BLANK), path, "4 features")


def test_own_features_that_return_something_else_are_refused_before_anything_is_drawn(
    tmp_path, monkeypatch
):
    (tmp_path / "wrong_features.py").write_text("def named(images): return {'a': images}\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = "wrong_features:named"
    network = load_features(spec, "")
    line = refused(lambda: load_target(TINY / "reward" / "real.npz", network, BLANK))
    assert line.startswith(f"--features {spec} returned a dict; return a tensor, array or list of")


# --------------------------------------------------------------------------------------------------
# What a distribution-wise reward needs.


@pytest.mark.parametrize("kind, members", [("fid", SubsetReplace), ("kid", KernelReplace)])
def test_a_reference_set_has_zero_members_in_the_features_of_its_target(tmp_path, kind, members):
    content(idx(noise(80, 28, 28)))(tmp_path / "t.idx")
    opened = open_reference_set(kind, "reward", str(tmp_path / "t.idx"), TINY, 6, BLANK)
    network = load_features("reward", TINY)
    mu, sigma, _ = load_target(tmp_path / "t.idx", network, BLANK)
    assert type(opened.members) is members
    assert torch.equal(opened.members.features.float(), torch.zeros(6, 64))
    assert torch.equal(opened.target[0], mu) and torch.equal(opened.target[1], sigma)
    assert torch.equal(opened.features(BLANK), network(BLANK))


SHARED = """
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, {root!r})
from rewards.features import load_features
from rewards.targets import load_target
from support import processes

device = processes.start("cpu")
network = load_features("reward", {tiny!r}, device)
mu, sigma, features = load_target(Path({path!r}), network, torch.zeros(1, 3, 28, 28))
np.savez(f"{out}-{{processes.rank()}}.npz", mu=mu, sigma=sigma, features=features)
processes.finish()
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])  # of 4, one has no block at all
def test_any_number_of_processes_gives_the_same_bits(tmp_path, processes):
    array = noise(230, 28, 28)
    content(idx(array))(tmp_path / "t.idx")
    alone = load_target(tmp_path / "t.idx", load_features("reward", TINY), BLANK)
    images = torch.from_numpy(array)[:, None].float() / 255
    expected = load_classifier(TINY / "reward").features(images).double().numpy()
    np.testing.assert_allclose(alone[2].numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(alone[1].numpy(), np.cov(expected, rowvar=False), atol=1e-4)

    script = tmp_path / "shared.py"
    values = dict(root=str(ROOT), path=str(tmp_path / "t.idx"), tiny=str(TINY))
    script.write_text(SHARED.format(**values, out=tmp_path / "out"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", str(processes), str(script)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for rank in range(processes):
        with np.load(tmp_path / f"out-{rank}.npz") as file:
            for name, value in zip(("mu", "sigma", "features"), alone):
                assert file[name].tobytes() == value.numpy().tobytes(), (rank, name)


@pytest.mark.slow
def test_a_picture_that_one_process_alone_cannot_read_is_named_once(tmp_path):
    (tmp_path / "t").mkdir()
    for i, array in enumerate(noise(150, 28, 28)):
        Image.fromarray(array).save(tmp_path / "t" / f"{i:03}.png")
    damaged = tmp_path / "t" / "140.png"  # the second process reads it
    damaged.write_bytes(damaged.read_bytes()[:200])
    flags = ["--reward", "class:1,fid:0.3", "--target", tmp_path / "t", "--reference", 20]
    argv = small(TINY, tmp_path / "run", *flags)
    code, _, error = launch_process(argv, processes=2)
    assert code != 0 and not (tmp_path / "run").exists()
    assert error.count(f"error: {damaged}: not a picture") == 1
    assert "Connection closed" not in error
