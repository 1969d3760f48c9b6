"""Feature networks: functions from images [B, 3, H, W] in [0, 1] to float32 features [B, D].

    reward, evaluator   the model folder's own classifiers: D = 64
    pixels              no network: the image, shrunk to 16 x 16, minus 0.5: D = 3 * 16 * 16
    inception:FILE      TorchScript Inception-v3, D = 2048: FID (arXiv 1706.08500)
    dinov2[:MODEL]      the class token, D = 1024: FD-DINOv2 (arXiv 2306.04675)
    clip[:MODEL]        the image embedding, D = 768
    module:function     your own
    components          of train.py alone: 64 principal components of the pixels of the base's own
                        pictures, so that any base has a space of its own, D = 64
MODEL is a hub id or a folder. Left out: the networks themselves, which are libraries' or files'.
"""

import importlib
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from rewards.classifier import check_classifier, load_classifier
from support.files import check_regular, to_bytes, to_uint8

# The model folder's own classifiers.
TINY = ("reward", "evaluator")

# Those that need no file of the model folder, as messages name them.
ANYWHERE = "pixels, inception:FILE, dinov2[:MODEL], clip[:MODEL], module:function"

SIDE = 16  # of the images of `pixels`
COMPONENTS = 64


class HubNetwork(NamedTuple):
    """A vision network of the Hugging Face hub."""

    model: str  # the default hub id
    width: str  # the entry of its config that is D
    mean: tuple  # of the channels of the images that it was trained on, in [0, 1]
    std: tuple


HUB = {
    "dinov2": HubNetwork(
        model="facebook/dinov2-large",
        width="hidden_size",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
    "clip": HubNetwork(
        model="openai/clip-vit-large-patch14",
        width="projection_dim",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
}


# --------------------------------------------------------------------------------------------------
# --features and --diversity_features.


def load_function(module, name):
    """Your own function `name` of an importable module. Raises what the import raises."""
    try:
        imported = importlib.import_module(module)
    except SystemExit:  # a script that reads its own command line, for one
        raise ImportError(f"{module} ends the program when it is imported") from None
    function = getattr(imported, name)
    if not callable(function):
        raise TypeError(f"{name} is not a function")
    return function


class NotNumbers(TypeError):
    """Your function returned something that is no tensor, array or list of numbers."""


def named(value):
    """What a value is, for messages: a dict, an int, None."""
    if value is None:
        return "None"
    if isinstance(value, np.ndarray):
        return "an array"
    name = type(value).__name__
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}"


def own_numbers(result, expected):
    """What your function returned, a tensor, an array or a list of numbers -> a tensor.

    Raises NotNumbers that names anything else, and what is `expected`, as in "of 3 numbers".
    """
    remedy = f"return a tensor, array or list {expected}"
    if isinstance(result, torch.Tensor):
        return result
    if not isinstance(result, (list, np.ndarray)):
        raise NotNumbers(f"returned {named(result)}; {remedy}")
    entries = result
    if isinstance(result, list):  # perhaps of tensors on a GPU
        entries = [entry.tolist() if hasattr(entry, "tolist") else entry for entry in result]
    try:
        array = np.asarray(entries)
        numbers = array.astype(np.float64, casting="same_kind")  # no texts, nothing complex
    except (TypeError, ValueError):
        raise NotNumbers(f"returned {named(result)} that is not of numbers; {remedy}") from None
    return torch.from_numpy(numbers)


def pixels(images):
    """The feature space that needs no network: images [B, C, H, W] in [0, 1] -> [B, C 16 16].

    Number (c, i, j) is the mean of channel c over the rows from floor(i H / 16) to ceil((i + 1)
    H / 16) and the columns likewise, minus 0.5: about grey, so that a cosine compares what is
    brighter with what is darker. A side below 16 stays as it is, and nothing is enlarged.
    """
    height, width = images.shape[2:]
    small = F.adaptive_avg_pool2d(images, (min(SIDE, height), min(SIDE, width)))
    return small.flatten(1) - 0.5


class Components:
    """The features `components`: where pictures of the base differ most.

    A function of images [B, 3, H, W] -> [B, K], K = 64 or the number of pixels. The components are
    those of the base at the start of the run; a checkpoint holds them.
    """

    def __init__(self, blank):
        """blank: one picture [1, 3, H, W] as the base makes them."""
        D = pixels(blank).shape[1]
        K = min(COMPONENTS, D)
        self.mean = torch.zeros(D, device=blank.device)
        self.basis = torch.zeros(D, K, device=blank.device)
        self.std = torch.ones(K, device=blank.device)

    def fit(self, base_pixels):
        """base_pixels [M, D]: those of M of the base's pictures."""
        mean, basis = principal_components(base_pixels, self.basis.shape[1])
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        std = ((base_pixels - self.mean) @ self.basis).std(0)
        smallest = max(0.01 * std.max().item(), 1e-6)  # the base may never do a thing
        self.std.copy_(std.clamp(min=smallest))

    def __call__(self, images):
        return (pixels(images) - self.mean) @ self.basis

    def whitened(self, images):
        """In units of their std, so that the base's own pictures have mean 0 and covariance 1."""
        return self(images) / self.std

    def state(self):
        """The tensors that a checkpoint holds."""
        return {
            "components.mean": self.mean,
            "components.basis": self.basis,
            "components.std": self.std,
        }


def principal_components(features, count):
    """features [M, D] -> their mean [D], and the `count` directions of most variance [D, count].

    The largest entry of each direction is positive.
    """
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    _, directions = torch.linalg.eigh(centred.T @ centred)  # of ascending variance
    basis = directions.flip(1)[:, :count]
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return mean, basis * largest.sign()


def choices(flag):
    """What --FLAG may name where the model folder has no such network, as a text."""
    if flag == "diversity_features":
        return f"latents, components, {ANYWHERE}"
    return ANYWHERE


def check_features(spec, folder, flag="features"):
    """The number of features D, or None where only a forward pass can tell. Reads no weight.

    spec: as in the table above; folder: the model folder. Raises ValueError, in one line.
    """
    kind, _, argument = spec.partition(":")
    if spec in TINY:
        if not (Path(folder) / spec).is_dir():
            raise ValueError(
                f"--{flag} {spec}: {folder} holds no such network; give one of {choices(flag)}"
            )
        check_classifier(Path(folder) / spec)
        return 64
    if spec == "pixels" or (spec == "components" and flag == "diversity_features"):
        return None  # it depends on the size of the images
    if kind == "inception":
        check_regular(argument)
        if not is_torchscript(argument):
            file = argument or "no file"
            raise ValueError(
                f"--{flag} {spec}: {file} is not a TorchScript file; write inception:FILE"
            )
        return 2048
    if kind in HUB:
        try:
            return hub_width(kind, argument)
        except Exception as error:  # transformers raises another class for each kind of damage
            lines = str(error).splitlines() or [type(error).__name__]
            raise ValueError(f"--{flag} {spec}: {lines[0]}") from None
    if argument:
        try:
            load_function(kind, argument)
        except Exception as error:  # your module's: of any class
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"--{flag} {spec}: {reason}") from None
        return None
    raise ValueError(f"--{flag} {spec}: none of reward, evaluator, {choices(flag)}")


def seen_side(spec, folder):
    """The side of the only pictures that a network sees, or None where it sees any. See above."""
    return check_classifier(Path(folder) / spec)["size"] if spec in TINY else None


def is_torchscript(path):
    """Whether a file can be TorchScript, by its table of contents; torch.save writes a zip too."""
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/constants.pkl") for name in file.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def hub_width(kind, model):
    """The number of features of a hub id or folder ("": the default), from its config alone."""
    import transformers  # which takes seconds, and few runs need it

    name = model or HUB[kind].model
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    if not config.model_type.startswith(kind):
        raise ValueError(f"is a {config.model_type}, not a {kind}")
    # The config of a whole CLIP holds that of its vision network.
    config = getattr(config, "vision_config", config)
    return getattr(config, HUB[kind].width)


def load_features(spec, folder, device="cpu", flag="features"):
    """-> a function: images [B, 3, H, W] in [0, 1] -> float32 [B, D].

    It raises FloatingPointError if a feature is not finite or the shape is another, and
    RuntimeError if your own function fails; both name --FLAG and its spec.
    Raises ValueError, in one line, if the network cannot be loaded.
    """
    kind, _, argument = spec.partition(":")
    try:
        if spec in TINY:
            network = load_classifier(Path(folder) / spec, device).features
        elif spec == "pixels":
            network = pixels
        elif kind == "inception":
            network = inception(torch.jit.load(argument, map_location=device).eval())
        elif kind in HUB:
            network = vision(kind, argument or HUB[kind].model, device)
        else:
            network = own_features(load_function(kind, argument), f"--{flag} {spec}")
    except Exception as error:  # a library raises another class for each kind of damage
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"--{flag} {spec}: these features cannot be loaded ({reason}); "
            "fetch the network again, or name another"
        ) from None

    @torch.inference_mode()
    def features(images):
        result = network(images).float()
        if result.dim() != 2 or len(result) != len(images):
            raise FloatingPointError(
                f"--{flag} {spec} returned the shape {tuple(result.shape)} "
                f"for {len(images)} pictures; return [{len(images)}, D], a row for each picture"
            )
        if not result.isfinite().all():
            raise FloatingPointError(f"--{flag} {spec} returned a non-finite number")
        return result

    return features


def own_features(function, name):
    """Your function of images, called `name` in messages -> one that returns a tensor there."""

    def features(images):
        try:
            result = function(images)
        except Exception as error:  # of any class
            raise RuntimeError(f"{name} failed: {type(error).__name__}: {error}") from error
        expected = f"of the shape [{len(images)}, D], a row for each picture"
        try:
            return own_numbers(result, expected).to(images.device)
        except NotNumbers as error:
            raise FloatingPointError(f"{name} {error}") from None

    return features


# --------------------------------------------------------------------------------------------------
# Inception-v3, by either of the two published calling conventions.


def inception(network):
    """A TorchScript Inception-v3 -> a function of images in [0, 1].

    One convention takes uint8 with return_features=True and resizes by itself; the other takes
    floats (x - 128) / 128 of 299 x 299. Both were made for bytes, so images are rounded to bytes.
    """

    def features_of_bytes(images):
        return network(to_uint8(images), return_features=True)

    def features_of_floats(images):
        pixels = corner_bilinear(to_bytes(images), 299)
        return network((pixels - 128) / 128)

    arguments = [argument.name for argument in network.forward.schema.arguments]
    return features_of_bytes if "return_features" in arguments else features_of_floats


def corner_bilinear(images, size):
    """images [B, C, H, W] -> [B, C, size, size], as in the TensorFlow graph that FID began with.

    Bilinear without half-pixel centres: output pixel i is read at i * H / size.
    """
    for dim in (2, 3):
        length = images.shape[dim]
        position = torch.arange(size, device=images.device) * (length / size)
        low = position.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        weight = position - low
        if dim == 2:
            weight = weight[:, None]
        below = images.index_select(dim, low)
        above = images.index_select(dim, high)
        images = below * (1 - weight) + above * weight
    return images


# --------------------------------------------------------------------------------------------------
# DINOv2 and CLIP.


def vision(kind, name, device):
    """A network of HUB -> a function: images -> DINOv2's class tokens or CLIP's embeddings.

    Images are rounded to bytes and squashed to a square, bicubic with antialiasing. For CLIP that
    differs from its own processor on purpose: see `clip_pixels` in rewards/clip.py.
    """
    import transformers

    owner = transformers.CLIPVisionModelWithProjection
    if kind == "dinov2":
        owner = transformers.AutoModel
    network, report = owner.from_pretrained(
        name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ValueError(f"{name}: lacks the weights {missing}")
    network = network.to(device).eval()
    size = 224 if kind == "dinov2" else network.config.image_size
    mean = torch.tensor(HUB[kind].mean, device=device)[:, None, None]
    std = torch.tensor(HUB[kind].std, device=device)[:, None, None]

    def embed(images):
        pixels = F.interpolate(
            to_bytes(images), (size, size), mode="bicubic", antialias=True, align_corners=False
        )
        pixels = pixels.clamp(0, 255) / 255
        output = network(pixel_values=(pixels - mean) / std)
        if kind == "dinov2":
            return output.last_hidden_state[:, 0]
        return output.image_embeds

    return embed
