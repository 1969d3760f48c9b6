"""What distances between distributions are measured in (--features) and against (--target).

A feature network is a function: pictures [B, 3, H, W] in [0, 1] -> float32 [B, D].
    reward, evaluator     the model folder's own classifiers, D = 64, 28 x 28 pictures
    inception:FILE        TorchScript Inception-v3, D = 2048: FID. Takes uint8 pictures with return_features=True, or floats (x - 128) / 128
    dinov2[:MODEL]        FD-DINOv2: the class token of a hub id or folder (default facebook/dinov2-large, D = 1024), bicubic to 224
    clip[:MODEL]          CLIP's image embedding (default openai/clip-vit-large-patch14, D = 768), bicubic to its size
    module:function       your own
A target is an .npz with mu and sigma, a folder of pictures, or an idx file. Left out: any network of which a library or a file exists.
"""
import gzip
from collections.abc import Callable
from dataclasses import dataclass
import math
import numpy as np
import os
import struct
import torch
import zipfile
import zlib
from PIL import Image
from pathlib import Path
from dist_reward import KernelReplace, SubsetReplace, moments
from rewards.classifier import check_classifier
from rewards.features import TINY, load_features
from support.processes import all_say, gather, share

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
LARGE, RATIO = 2**28, 100                                                # a file may unpack to so many bytes, or so many times its own size


def target_path(target, spec, folder):
    """The file that --target names; by default the model folder's moments of real pictures, for its own networks. Raises ValueError."""
    if not target and spec not in TINY:
        raise ValueError(f"--features {spec}: needs --target, an .npz with mu and sigma, a folder of pictures or an idx file")
    return Path(target) if target else Path(folder) / spec / "real.npz"


def check_target(path, D, need_pictures=False):
    """Raises ValueError, in one line, if a target cannot be used with D features (None: not known yet). No picture but the first is read."""
    if path.suffix == ".npz":
        if need_pictures:
            raise ValueError(f"--target {path}: holds moments; kid needs the pictures, a folder or an idx file")
        read_moments(path, D)
        return
    if path.is_dir():
        count = len(picture_files(path))
        if count:
            read_picture(picture_files(path)[0])
    elif path.is_file():
        count = len(read_idx(path))
    else:
        raise ValueError(f"--target {path}: no such file or folder; give an .npz with mu and sigma, a folder of pictures or an idx file")
    if count <= (D or 1):
        raise ValueError(f"--target {path}: {count} pictures are too few for the covariance of {D or 'any'} features; give more than {D or 1}")


def check_unpacked(name, size, packed):
    """Raises ValueError if `packed` bytes of a file are to unpack to `size` bytes that no pictures and no moments would."""
    if size > max(LARGE, RATIO * packed):
        raise ValueError(f"{name} would unpack {packed} bytes to {size}")


def check_npz(path, *names):
    """Raises ValueError for an array of an .npz that holds objects, or unpacks to far more than it takes there, or to another size than its header
    says; KeyError for one that is missing. Only the headers are read."""
    with zipfile.ZipFile(path) as file:
        for name in names:
            info = file.getinfo(f"{name}.npy")
            with file.open(info) as member:
                old = np.lib.format.read_magic(member) == (1, 0)
                shape, _, dtype = (np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0)(member)
                size = member.tell() + math.prod(shape) * dtype.itemsize
            if dtype.hasobject:
                raise ValueError(f"{name} holds objects, which would run code")
            if size != info.file_size:
                raise ValueError(f"{name} holds {info.file_size} bytes where its header says {size}")
            check_unpacked(name, size, info.compress_size)


def read_moments(path, D):
    """-> mu [D], sigma [D, D], float64, looked at closely. Raises ValueError in one line; nothing is unpickled."""
    try:
        check_npz(path, "mu", "sigma")
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = (file[name].astype(np.float64, casting="same_kind") for name in ("mu", "sigma"))
    except KeyError:
        raise ValueError(f"{path}: lacks mu or sigma") from None
    except (OSError, ValueError, EOFError, AttributeError, TypeError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an npz file of numbers ({error})") from None
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{path}: mu has the shape {mu.shape} and sigma {sigma.shape}; expected [D] and [D, D]")
    if D and len(mu) != D:
        raise ValueError(f"{path}: holds {len(mu)} features where --features has {D}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: mu or sigma is not finite")
    if np.abs(sigma - sigma.T).max() > 1e-6 * np.abs(sigma).max() or (sigma.diagonal() < 0).any():
        raise ValueError(f"{path}: sigma is not symmetric, or a variance is negative: no covariance")
    return mu, sigma


def picture_files(folder):
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in PICTURES)


def read_picture(path):
    """-> uint8 [3, H, W]. Raises ValueError naming the file."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):                        # PIL would limit, not scale
                raise ValueError(f"{image.mode}: more than 8 bits a channel")
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a picture ({error})") from None


def read_idx(path, rank=3):
    """An idx file (plain or .gz) of pictures (rank 3) or labels (1) -> uint8 array. Raises ValueError naming the file when it is not one."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            magic = file.read(4)
            dims = struct.unpack(f">{magic[3]}I", file.read(4 * magic[3]))
            if magic[:3] != b"\0\0\x08":
                raise ValueError("not an idx file of unsigned bytes")
            if len(dims) != rank or 0 in dims:
                raise ValueError(f"has the dimensions {dims} where {rank} are expected")
            check_unpacked("it", math.prod(dims), os.path.getsize(path))
            return np.frombuffer(file.read(math.prod(dims) + 1), np.uint8).reshape(dims)       # the one more tells a file that goes on
    except (OSError, EOFError, IndexError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{path}: {error}; expected an idx file of unsigned bytes") from None


def load_target(path, network, blank, block=100):
    """-> mu [D], sigma [D, D], and the features [R, D] of its pictures or None where it holds only moments; on the device of `blank`.

    blank: any picture as the model makes them [1, 3, H, W]. Pictures go through the network in the same blocks however many processes
    share them, so that every count gives the same bits. Raises ValueError, the same on all of them, for a picture that cannot be read, and where the
    number of features only now turns out not to fit.
    """
    D, device = network(blank).shape[1], blank.device
    check_target(path, D)
    if path.suffix == ".npz":
        return *(torch.from_numpy(m).to(device) for m in read_moments(path, D)), None
    if path.is_dir():
        files = picture_files(path)
        total, read = len(files), lambda i: read_picture(files[i])
    else:
        pixels = read_idx(path)
        total, read = len(pixels), lambda i: np.broadcast_to(pixels[i], (3, *pixels.shape[1:]))
    blocks = -(-total // block)
    found = torch.zeros(len(share(blocks)), block, D, device=device)
    damaged = None
    try:
        for row, b in zip(found, share(blocks)):
            images = [torch.from_numpy(read(i).copy()).float() / 255 for i in range(b * block, min((b + 1) * block, total))]
            stacks = torch.stack(images).split(block) if len({x.shape for x in images}) == 1 else [x[None] for x in images]
            row[:len(images)] = torch.cat([network(x.to(device)) for x in stacks])
    except ValueError as error:                                          # a picture that one process alone reads; the others would wait for it
        damaged = str(error)
    if said := [line for line in all_say(damaged) if line]:
        raise ValueError(said[0])
    features = gather(found, blocks).flatten(0, 1)[:total]
    return *moments(features), features


@dataclass
class ReferenceSet:
    """What a distribution-wise reward needs."""

    members: SubsetReplace | KernelReplace  # the M generated pictures' features
    features: Callable  # pictures [B, 3, H, W] -> [B, D]
    target: tuple  # mu [D] and sigma [D, D] of the real pictures


def open_reference_set(kind, spec, target, folder, size, blank):
    """What the reward `kind` (fid or kid) needs -> ReferenceSet with `size` members, all zero.

    blank: one picture [1, 3, H, W], to learn how many features there are. Raises ValueError, in one line.
    """
    network = load_features(spec, folder, blank.device)
    mu, sigma, real = load_target(target_path(target, spec, folder), network, blank)
    empty = torch.zeros(size, len(mu), device=blank.device)
    members = KernelReplace(empty, real) if kind == "kid" else SubsetReplace(empty, mu, sigma)
    return ReferenceSet(members, network, (mu, sigma))


def check_real(path):
    """Raises ValueError, in one line, if the moments of the real pictures cannot be read."""
    try:
        check_npz(path, "mu", "sigma", "scale")
    except KeyError:
        raise ValueError(f"{path}: lacks mu, sigma or scale") from None
    except (OSError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an npz file of numbers ({error})") from None


def check_judge(folder, moments="real.npz"):
    """Raises ValueError if a classifier, or the moments of real pictures beside it, cannot be read."""
    check_classifier(folder)
    check_real(Path(folder) / moments)
