"""The small classifier of a model folder, and the three rewards that it gives.

A model folder's reward/ and evaluator/ each hold config.json, {"width": channels}, and
model.safetensors of a CNN. config.json may also say how many "classes" it knows (10), the "size"
of the images that it sees (28), and their "channels" (1 or 3; 1 sees the mean of the channels).
With p = p(label | image), in nats:
    class = max(log p, FLOOR)      margin = log p - log(1 - p)      ink = 10 p * brightness
`ink` is a toy that invites reward hacking. Left out: training it (experiments/build_tiny.py).
"""

import weakref
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from support.files import check_regular, read_json
from support.guards import check_weights

FLOOR = -6.0  # nats: one hopeless image must not outweigh its group


# --------------------------------------------------------------------------------------------------
# The network.


class Halve(nn.Module):
    """nn.MaxPool2d(2) bit for bit, in a tenth of its time on a CPU."""

    def forward(self, x):
        x = torch.maximum(x[..., :-1:2], x[..., 1::2])
        return torch.maximum(x[..., :-1:2, :], x[..., 1::2, :])


def block(in_channels, out_channels):
    """The layers that halve an image's sides."""
    return [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.GELU(), Halve()]


class Classifier(nn.Module):
    """A CNN on size x size images: 64 features, `width` channels after its first layer."""

    def __init__(self, width, classes=10, size=28, channels=1):
        super().__init__()
        self.width = width
        self.classes = classes
        self.size = size
        self.channels = channels
        side = size // 8  # after three halvings
        self.trunk = nn.Sequential(
            *block(channels, width),
            *block(width, 2 * width),
            *block(2 * width, 4 * width),
            nn.Flatten(),
            nn.Linear(side * side * 4 * width, 64),
        )
        self.head = nn.Sequential(nn.GELU(), nn.Linear(64, classes))

    def features(self, images):
        """images [B, 1 or 3, size, size] in [0, 1] -> float32 [B, 64]. Raises ValueError."""
        height, width = images.shape[2:]
        size = self.size
        if (height, width) != (size, size):
            raise ValueError(
                f"the classifier sees pictures of {size} x {size}, not {height} x {width}"
            )
        if self.channels == 1:
            images = images.mean(1, keepdim=True)
        else:
            images = images.expand(-1, 3, -1, -1)
        return self.trunk(images * 2 - 1)

    def forward(self, images):
        """images [B, 1 or 3, size, size] in [0, 1] -> logits [B, classes]."""
        return self.head(self.features(images))


# --------------------------------------------------------------------------------------------------
# Its files.


# What config.json may say: the smallest value, the largest, and the default.
SIZES = {
    "width": (1, 4096, None),
    "classes": (2, 10**6, 10),
    "size": (8, 4096, 28),
    "channels": (1, 3, 1),
}


def read_config(folder):
    """config.json of a classifier folder -> the arguments of Classifier. Raises ValueError."""
    config = read_json(Path(folder) / "config.json")
    arguments = {}
    for name, (low, high, default) in SIZES.items():
        value = config.get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise ValueError(
                f"config.json: {name} {value!r} must be a whole number from {low} to {high}"
            )
        arguments[name] = value
    if arguments["channels"] == 2:
        raise ValueError("config.json: channels 2 must be 1 (grey) or 3")
    return arguments


def check_classifier(folder):
    """Raises ValueError, in one line, if a classifier folder cannot be loaded; reads no weight.

    -> the arguments of its Classifier: width, classes, size, channels.
    """
    folder = Path(folder)
    try:
        arguments = read_config(folder)
        with torch.device("meta"):
            weights = Classifier(**arguments).state_dict()
        expected = {name: list(value.shape) for name, value in weights.items()}
        check_regular(folder / "model.safetensors")
        with safe_open(folder / "model.safetensors", "pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}
        if found != expected:
            raise ValueError("config.json and model.safetensors disagree; get a whole copy")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder}: not a classifier folder ({reason})") from None
    return arguments


def load_classifier(folder, device="cpu"):
    """A classifier folder -> Classifier, frozen."""
    folder = Path(folder)
    model = Classifier(**read_config(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    check_weights(model, folder / "model.safetensors")
    return model.eval().requires_grad_(False).to(device)


# --------------------------------------------------------------------------------------------------
# Its rewards: logits [B, classes], labels [B], images [B, 3, H, W] -> [B].


def class_reward(logits, labels, images):
    """log p(label | image), at least FLOOR."""
    log_probs = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    return log_probs.clamp(min=FLOOR)


def margin_reward(logits, labels, images):
    """log p - log(1 - p) of the label. It has no ceiling, so the most typical images earn most."""
    labels = labels[:, None]
    others = logits.scatter(1, labels, float("-inf"))
    return logits.gather(1, labels)[:, 0] - others.logsumexp(1)


def ink_reward(logits, labels, images):
    """10 p(label | image) times the mean brightness."""
    probs = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    return 10 * probs * images.mean((1, 2, 3))


NAMES = {"class": class_reward, "margin": margin_reward, "ink": ink_reward}


class SharedLogits:
    """The classifier's logits of a batch, computed once for all the terms that ask for them."""

    def __init__(self, classifier):
        self.classifier = classifier
        self.images = None  # a weak reference, so that the images are not kept in memory

    def __call__(self, images):
        """images [B, 3, H, W] -> [B, classes]. The same tensor gives the same logits again."""
        if self.images is None or self.images() is not images:
            self.logits = self.classifier(images)
            self.images = weakref.ref(images)
        return self.logits


class ClassifierTerm:
    """One of NAMES: what the model folder's classifier says of each prompt's label."""

    def __init__(self, name, shared_logits):
        self.formula = NAMES[name]
        self.shared_logits = shared_logits

    def __call__(self, images, prompts, metadata):
        """-> [B]. Each of the metadata has a "label", the number of a class."""
        logits = self.shared_logits(images)
        labels = torch.tensor([entry["label"] for entry in metadata], device=images.device)
        return self.formula(logits, labels, images)
