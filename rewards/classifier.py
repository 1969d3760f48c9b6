"""The small classifier of a model folder, and the three rewards that it gives.

A model folder's reward/ and evaluator/ each hold config.json, {"width": channels}, and
model.safetensors of a CNN on 28 x 28 images. With p = p(label | image), in nats:
    class = max(log p, FLOOR)      margin = log p - log(1 - p)      ink = 10 p * brightness
`ink` is a toy that invites reward hacking. Left out: training it (experiments/build_tiny.py).
"""

import weakref
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from support.files import read_json

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
    """A CNN on 28 x 28 images: 64 features, 10 classes, `width` channels after its first layer."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.trunk = nn.Sequential(
            *block(1, width),
            *block(width, 2 * width),
            *block(2 * width, 4 * width),
            nn.Flatten(),
            nn.Linear(3 * 3 * 4 * width, 64),
        )
        self.head = nn.Sequential(nn.GELU(), nn.Linear(64, 10))

    def features(self, images):
        """images [B, 1 or 3, 28, 28] in [0, 1] -> float32 [B, 64]. Raises ValueError."""
        height, width = images.shape[2:]
        if (height, width) != (28, 28):
            raise ValueError(f"the tiny classifiers see 28 x 28 pictures, not {height} x {width}")
        return self.trunk(images.mean(1, keepdim=True) * 2 - 1)

    def forward(self, images):
        """images [B, 1 or 3, 28, 28] in [0, 1] -> logits [B, 10]."""
        return self.head(self.features(images))


# --------------------------------------------------------------------------------------------------
# Its files.


def check_classifier(folder):
    """Raises ValueError, in one line, if a classifier folder cannot be loaded; reads no weight."""
    folder = Path(folder)
    try:
        width = read_json(folder / "config.json")["width"]
        with torch.device("meta"):
            weights = Classifier(width).state_dict()
        expected = {name: list(value.shape) for name, value in weights.items()}
        with safe_open(folder / "model.safetensors", "pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}
        if found != expected:
            raise ValueError("config.json and model.safetensors disagree; get a whole copy")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder}: not a classifier folder ({reason})") from None


def load_classifier(folder, device="cpu"):
    """A classifier folder -> Classifier, frozen."""
    folder = Path(folder)
    model = Classifier(read_json(folder / "config.json")["width"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval().requires_grad_(False).to(device)


# --------------------------------------------------------------------------------------------------
# Its rewards: logits [B, 10], labels [B], images [B, 3, 28, 28] -> [B].


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
        """images [B, 3, 28, 28] -> [B, 10]. The same tensor again gives the same logits again."""
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
        """-> [B]. Each of the metadata has a "label", 0 to 9."""
        logits = self.shared_logits(images)
        labels = torch.tensor([entry["label"] for entry in metadata], device=images.device)
        return self.formula(logits, labels, images)
