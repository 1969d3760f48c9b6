"""Targets: the real images that a distribution is measured against (--target).

A target is an .npz with mu [D] and sigma [D, D], a folder of images, or an idx file of images
(MNIST's format, plain or .gz). Files are not trusted: nothing in them is unpickled, and a file
that would unpack to far more bytes than images or moments do is refused before it is unpacked.
"""

import gzip
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from dist_reward import KernelReplace, SubsetReplace, moments
from rewards.classifier import check_classifier
from rewards.features import TINY, load_features
from support.files import check_regular
from support.guards import warn
from support.processes import all_say, gather, share

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}

# A file may unpack to this many bytes, or to this many times its own size if that is more.
LARGE = 2**28
RATIO = 100

# What zipfile, zlib and numpy raise, between them, for a file that is not a whole .npz.
DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    AttributeError,
    TypeError,
    RuntimeError,
    zlib.error,
    zipfile.BadZipFile,
)

ORIENTATION = 0x0112  # the tag of a photograph
ON_ITS_SIDE = {5, 6, 7, 8}  # its values where height and width change places

KINDS = "an .npz with mu and sigma, a folder of pictures or an idx file"


# --------------------------------------------------------------------------------------------------
# --target.


def target_path(target, spec, folder):
    """The path that --target names, for --features `spec`.

    Without --target, the model folder's moments, for its own networks. Raises ValueError.
    """
    if target:
        return Path(target)
    if spec not in TINY:
        raise ValueError(f"--features {spec}: needs --target, {KINDS}")
    return Path(folder) / spec / "real.npz"


def check_target(path, D, need_pictures=False, side=None):
    """Raises ValueError, in one line, if a target cannot be used with D features.

    D is None while it is not known; side is that of the only pictures that the features see, if
    there is one. Of a folder only the first picture is read, and with `side` the sizes of all.
    """
    if path.suffix == ".npy":
        raise ValueError(
            f"--target {path}: one array is no target; give {KINDS} "
            "(numpy.savez(file, mu=mu, sigma=sigma) writes one)"
        )
    if path.suffix == ".npz":
        if need_pictures:
            raise ValueError(
                f"--target {path}: holds moments; kid needs the pictures, a folder or an idx file"
            )
        read_moments(path, D)
        return

    if path.is_dir():
        files = picture_files(path)
        count = len(files)
        if files:
            read_picture(files[0])
        if side:
            for file in files:
                check_side(file, picture_size(file), side)
    elif path.is_file():
        pixels = read_idx(path)
        count = len(pixels)
        if side:
            check_side(path, pixels.shape[1:], side)
    else:
        raise ValueError(f"--target {path}: no such file or folder; give {KINDS}")
    if not count:
        raise ValueError(
            f"--target {path}: 0 pictures in it, {endings(path)}; "
            f"read are {', '.join(sorted(PICTURES))}"
        )
    if count <= (D or 1):
        raise ValueError(
            f"--target {path}: {count} pictures are too few for the covariance of "
            f"{D or 'any'} features; give more than {D or 1}"
        )


def check_side(path, size, side):
    """Raises ValueError, naming the file, unless a picture of (height, width) has that side."""
    if size != (side, side):
        raise ValueError(
            f"{path}: of {size[0]} x {size[1]}, and these features see {side} x {side}; "
            "resize it, or choose other --features"
        )


def check_unpacked(name, size, packed):
    """Raises ValueError if `packed` bytes would unpack to far more than images or moments do."""
    if size > max(LARGE, RATIO * packed):
        raise ValueError(f"{name} would unpack {packed} bytes to {size}")


# --------------------------------------------------------------------------------------------------
# Arrays of an .npz.


def check_npz(path, *names):
    """Checks the arrays `names` of an .npz by their headers alone.

    Raises KeyError for an array that is missing; ValueError for one that holds objects, would
    unpack to far too much, or has another size than its header says.
    """
    with zipfile.ZipFile(path) as file:
        for name in names:
            info = file.getinfo(f"{name}.npy")
            with file.open(info) as member:
                shape, dtype = read_header(member)
                size = member.tell() + math.prod(shape) * dtype.itemsize
            if dtype.hasobject:
                raise ValueError(f"{name} holds objects, which would run code")
            if size != info.file_size:
                raise ValueError(
                    f"{name} holds {info.file_size} bytes where its header says {size}"
                )
            check_unpacked(name, size, info.compress_size)


def read_header(member):
    """The shape and dtype of an opened .npy; the data are next."""
    read = np.lib.format.read_array_header_2_0
    if np.lib.format.read_magic(member) == (1, 0):
        read = np.lib.format.read_array_header_1_0
    shape, _, dtype = read(member)
    return shape, dtype


def read_npz(path, *names):
    """The arrays of an .npz, a list in the order of `names`; nothing is unpickled.

    mu, sigma = read_npz("real.npz", "mu", "sigma")
    Raises ValueError, in one line naming the file, if one is missing or the file is damaged.
    """
    check_regular(path)
    try:
        check_npz(path, *names)
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names]
    except KeyError:
        raise ValueError(
            f"{path}: lacks {' or '.join(names)}; give an .npz with {' and '.join(names)}"
        ) from None
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give an .npz with {' and '.join(names)}") from None
    except DAMAGED as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: not an npz file of arrays ({reason}); write it again with numpy.savez"
        ) from None


def read_moments(path, D):
    """The moments in an .npz -> mu [D], sigma [D, D] in float64. D None: any number of features.

    Raises ValueError, in one line, unless they can be those of D features.
    """
    mu, sigma = read_npz(path, "mu", "sigma")
    for name, array in (("mu", mu), ("sigma", sigma)):
        if not np.can_cast(array.dtype, np.float64, "same_kind"):
            raise ValueError(f"{path}: {name} is of {array.dtype}; expected real numbers")
    mu = mu.astype(np.float64)
    sigma = sigma.astype(np.float64)

    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"{path}: mu has the shape {mu.shape} and sigma {sigma.shape}; expected [D] and [D, D]"
        )
    if D and len(mu) != D:
        raise ValueError(
            f"{path}: holds {len(mu)} features where --features has {D}; "
            "give the moments of the same network"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: mu or sigma is not finite; compute the moments again")
    asymmetry = np.abs(sigma - sigma.T).max()
    if asymmetry > 1e-6 * np.abs(sigma).max() or (sigma.diagonal() < 0).any():
        raise ValueError(
            f"{path}: sigma is not symmetric, or a variance is negative: no covariance; "
            "compute the moments again"
        )
    return mu, sigma


def check_real(path, attributes=None):
    """Raises ValueError, in one line, unless a file has the moments of real images, and a scale.

    attributes {name: [values]}: where there are several, a prompt may leave one open, and the file
    has the frequencies of its values, too.
    """
    read_moments(path, None)
    (scale,) = read_npz(path, "scale")
    if scale.shape != () or not 0 < scale < math.inf:
        raise ValueError(f"{path}: scale is {scale}; expected one positive number")
    if attributes and len(attributes) > 1:
        for name, values in attributes.items():
            (shares,) = read_npz(path, f"frequencies_{name}")
            is_right = shares.shape == (len(values),) and (shares >= 0).all()
            if not is_right or abs(shares.sum() - 1) > 1e-6:
                raise ValueError(
                    f"{path}: frequencies_{name} must be {len(values)} shares that sum to 1"
                )


def check_judge(folder, moments="real.npz"):
    """Raises ValueError, in one line, unless `folder` holds a classifier and those moments."""
    attributes = check_classifier(folder)["attributes"]
    check_real(Path(folder) / moments, attributes)


# --------------------------------------------------------------------------------------------------
# Images in files.


def picture_files(folder):
    """The pictures in a folder and the folders in it, in the order of their paths.

    Hidden files and folders (their names begin with a dot) are left out, as a viewer leaves them
    out; how many pictures are hidden or of other formats is said. Raises ValueError where two names
    differ in the ending alone, so that it is unclear which picture is meant.
    """
    folder = Path(folder)
    others = Image.registered_extensions().keys() - PICTURES
    paths = []
    hidden = 0
    unread = []
    for path in sorted(folder.rglob("*")):
        suffix = path.suffix.lower()
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if is_hidden:
            hidden += suffix in PICTURES and not path.name.startswith(".tmp-")
        elif suffix in PICTURES:
            paths.append(path)
        elif suffix in others:
            unread.append(path)
    if hidden or (unread and paths):  # without a picture the refusal names the formats
        formats = ", ".join(sorted({path.suffix for path in unread}))
        kinds = f"{hidden} hidden pictures and {len(unread)} of other formats"
        read = ", ".join(sorted(PICTURES))
        warn(f"{folder}: leaves out {kinds}{formats and f' ({formats})'}; read are {read}")

    stems = {}
    for path in paths:
        other = stems.setdefault(path.with_suffix(""), path)
        if other != path:
            raise ValueError(f"{path}: has the name of {other.name} but for the ending; remove one")
    return paths


def endings(folder):
    """What the visible files of a folder without pictures end in, in words; at most five of them.

    endings(folder) -> "its files are .gif, .heic"
    """
    found = set()
    for path in Path(folder).rglob("*"):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in parts):
            found.add(path.suffix or path.name)
    if not found:
        return "and no other visible file"
    names = ", ".join(sorted(found)[:5])
    return f"its files are {names}{' and others' if len(found) > 5 else ''}"


@contextmanager
def opened(path):
    """Within the block the picture, not yet decoded. What is wrong names the file: ValueError."""
    check_regular(path)
    frames = 1
    try:
        with Image.open(path) as image:
            # A camera's MPO holds a second picture, which no viewer shows.
            if image.format != "MPO":
                frames = getattr(image, "n_frames", 1)
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a picture ({error}); replace or remove it") from None
    if frames > 1:
        raise ValueError(f"{path}: {frames} pictures in one file; split it or remove it")


def picture_size(path):
    """Height and width as a viewer shows it. Raises ValueError naming the file.

    Only the header is read, but for a PNG that is not square: its tags may stand at its end.
    """
    with opened(path) as image:
        width, height = image.size
        is_turned = False
        if width != height and image.format != "TIFF":  # PIL has turned a TIFF's size already
            is_turned = image.getexif().get(ORIENTATION) in ON_ITS_SIDE
    return (width, height) if is_turned else (height, width)


def read_picture(path):
    """-> uint8 [3, H, W], as a viewer shows it. Raises ValueError naming the file."""
    with opened(path) as image:
        upright = ImageOps.exif_transpose(image)
    # Converting more than 8 bits, PIL would cut values off instead of scaling them.
    if upright.mode.startswith(("I", "F")):
        raise ValueError(f"{path}: more than 8 bits a channel ({upright.mode}); save it with 8")
    if upright.has_transparency_data:
        opacity = np.asarray(upright.convert("RGBA"))[:, :, 3]
        # What lies under it is seen nowhere, and each viewer has another background.
        if opacity.min() < 255:
            raise ValueError(f"{path}: has transparent pixels; flatten it onto a background")
    return np.asarray(upright.convert("RGB")).transpose(2, 0, 1)


def read_idx(path, rank=3):
    """An idx file (plain or .gz) of images (rank 3) or labels (rank 1) -> uint8 array.

    Raises ValueError naming the file when it is not one.
    """
    open_file = gzip.open if str(path).endswith(".gz") else open
    try:
        with open_file(path, "rb") as file:
            magic = file.read(4)  # two zeros, the type of the numbers, how many dimensions
            dims = struct.unpack(f">{magic[3]}I", file.read(4 * magic[3]))
            if magic[:3] != b"\0\0\x08":
                raise ValueError("not an idx file of unsigned bytes")
            if len(dims) != rank or 0 in dims:
                raise ValueError(f"has the dimensions {dims} where {rank} are expected")
            size = math.prod(dims)
            check_unpacked("it", size, os.path.getsize(path))
            content = file.read(size + 1)  # one byte more shows whether the file is too long
            return np.frombuffer(content, np.uint8).reshape(dims)
    except (OSError, EOFError, IndexError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{path}: {error}; expected an idx file of unsigned bytes") from None


def open_images(path):
    """A folder or an idx file -> how many images, and a function: i -> uint8 [3, H, W]."""
    if path.is_dir():
        files = picture_files(path)

        def read_file(i):
            return read_picture(files[i])

        return len(files), read_file

    pixels = read_idx(path)  # [R, H, W]

    def read_grey(i):
        return np.broadcast_to(pixels[i], (3, *pixels.shape[1:]))

    return len(pixels), read_grey


# --------------------------------------------------------------------------------------------------
# What a distribution-wise reward needs.


def load_target(path, network, blank, block=100):
    """A target -> mu [D], sigma [D, D], and the features [R, D] of its images.

    The features are None for an .npz. All are on the device of `blank`, any image [1, 3, H, W] as
    the model makes them: it shows how many features `network` has.
    Collective: call on every process. Images go through the network in the same blocks however
    many processes share them, so any number of processes gives the same bits.
    Raises ValueError, the same on every process, for an image that cannot be read, or where the
    number of features does not fit, or if your own function returns no features.
    """
    try:
        D = network(blank).shape[1]
    except FloatingPointError as error:
        raise ValueError(str(error)) from None
    device = blank.device
    check_target(path, D)
    if path.suffix == ".npz":
        mu, sigma = read_moments(path, D)
        return torch.from_numpy(mu).to(device), torch.from_numpy(sigma).to(device), None

    total, read = open_images(path)
    blocks = math.ceil(total / block)
    ours = share(blocks)
    features = torch.zeros(len(ours), block, D, device=device)
    failure = None
    try:
        for row, number in zip(features, ours):
            numbers = range(number * block, min((number + 1) * block, total))
            images = [torch.from_numpy(read(i).copy()).float() / 255 for i in numbers]
            row[: len(images)] = features_of(images, network, device)
    except ValueError as error:  # an image of this process alone; the others wait in all_say
        failure = str(error)
    failures = [line for line in all_say(failure) if line]
    if failures:
        raise ValueError(failures[0])
    features = gather(features, blocks).flatten(0, 1)[:total]
    mu, sigma = moments(features)
    return mu, sigma, features


def features_of(images, network, device):
    """Features [n, D] of a list of n images [3, H, W]; together, if all have one size."""
    sizes = {image.shape for image in images}
    if len(sizes) == 1:
        return network(torch.stack(images).to(device))
    return torch.cat([network(image[None].to(device)) for image in images])


@dataclass
class ReferenceSet:
    """What a distribution-wise reward needs."""

    members: SubsetReplace | KernelReplace  # the features [M, D] of generated images
    features: Callable  # images [B, 3, H, W] -> [B, D]
    target: tuple  # mu [D] and sigma [D, D] of the real images


def open_reference_set(kind, spec, target, folder, size, blank):
    """The reward `kind` ("fid" or "kid") -> ReferenceSet with `size` members, all zero.

    spec: --features; target: --target; folder: the model folder; blank: an image [1, 3, H, W].
    Collective: call on every process. Raises ValueError, in one line.
    """
    network = load_features(spec, folder, blank.device)
    mu, sigma, real_features = load_target(target_path(target, spec, folder), network, blank)
    empty = torch.zeros(size, len(mu), device=blank.device)
    if kind == "kid":
        members = KernelReplace(empty, real_features)
    else:
        members = SubsetReplace(empty, mu, sigma)
    return ReferenceSet(members, network, (mu, sigma))


def own_reference_set(components, size):
    """The reward fid to the base itself, in its own components -> ReferenceSet."""
    D = components.basis.shape[1]
    device = components.basis.device
    target = torch.zeros(D, device=device).double(), torch.eye(D, device=device).double()
    members = SubsetReplace(torch.zeros(size, D, device=device), *target)
    return ReferenceSet(members, components.whitened, target)
