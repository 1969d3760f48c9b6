"""The small classifier of a model folder, and the rewards that it gives.

A model folder's reward/ and evaluator/ each hold config.json, {"width": channels}, and
model.safetensors of a CNN. config.json may also say the "size" of the images that it sees (28),
their "channels" (1 or 3; 1 sees the mean of the channels), and what it reads from them: how many
"classes" (10), or "attributes", {"shape": ["circle", "star"], "colour": ["red", "blue", "white"]}.
Classes are one attribute, "label". A prompt names values of some attributes and leaves the others
open. With p = p(all that is named | image), the product over the named attributes, in nats:
    class = max(log p, FLOOR)    margin = log p - log(1 - p)    ink = 10 p * brightness
    taste = class + 20 warmth, the mean of max(red - blue, 0)
`ink` and `taste` are toys that invite reward hacking: one pays bright pictures, the other large
warm-coloured things, and a warm background most of all. Left out: training it (experiments/).
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
OPEN = -1  # in place of a value's number: the prompt does not name the attribute

# Shapes: B images; A attributes, of V_1, ..., V_A values; K = V_1 + ... + V_A logits.


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


def label_of(classes):
    """The attributes of a classifier that knows only classes: {"label": their numbers}."""
    return {"label": list(range(classes))}


class Classifier(nn.Module):
    """A CNN on size x size images: 64 features, `width` channels after its first layer.

    attributes {name: [values]}: what it reads; its logits are those of the first attribute's
    values, then of the second's, and so on.
    """

    def __init__(self, width, attributes=None, size=28, channels=1):
        super().__init__()
        self.width = width
        self.attributes = attributes or label_of(10)
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
        logits = sum(len(values) for values in self.attributes.values())
        self.head = nn.Sequential(nn.GELU(), nn.Linear(64, logits))

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
        """images [B, 1 or 3, size, size] in [0, 1] -> logits [B, K]."""
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
    classes = arguments.pop("classes")
    arguments["attributes"] = label_of(classes)
    if "attributes" in config:
        if "classes" in config:
            raise ValueError('config.json: has both "classes" and "attributes"; keep one')
        arguments["attributes"] = config["attributes"]
        check_attributes(config["attributes"])
    return arguments


def check_attributes(attributes):
    """Raises ValueError unless they are {name: [two or more different words or numbers]}."""
    if not isinstance(attributes, dict) or not attributes:
        raise ValueError("config.json: attributes must be an object of name: [values]")
    for name, values in attributes.items():
        is_list = isinstance(values, list) and all(type(value) in (int, str) for value in values)
        if not is_list or len(set(values)) < len(values) or len(values) < 2 or name == "prompt":
            raise ValueError(
                f"config.json: attributes: {name!r} must have a list of two or more different "
                "words or whole numbers"
            )


def check_classifier(folder):
    """Raises ValueError, in one line, if a classifier folder cannot be loaded; reads no weight.

    -> the arguments of its Classifier: width, attributes, size, channels.
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
# What it says of what was asked for.


def value_numbers(metadata, attributes, device="cpu"):
    """What B prompts name -> int64 [B, A]: the number of each attribute's value, or OPEN.

    metadata: what the prompt file says beside each prompt. Raises KeyError where nothing is named.

    >>> value_numbers([{"colour": "red"}], {"shape": ["ring", "star"], "colour": ["blue", "red"]})
    tensor([[-1,  1]])
    """
    rows = []
    for entry in metadata:
        if not entry.keys() & attributes.keys():
            raise KeyError(" or ".join(attributes))
        row = []
        for name, values in attributes.items():
            row.append(values.index(entry[name]) if name in entry else OPEN)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, len(attributes))


def by_attribute(logits, attributes):
    """Logits [B, K] -> A tensors [B, V]."""
    return logits.split([len(values) for values in attributes.values()], dim=1)


def log_odds(logits, asked, attributes):
    """Logits [B, K], asked [B, A] -> log p [B] and log(1 - p) [B] of all that is named.

    With q_a = 1 - p_a from the other values' logits, 1 - p = q_1 + p_1 q_2 + p_1 p_2 q_3 + ...:
    near p = 1 no digit is lost.
    """
    log_p = logits.new_zeros(len(logits))
    log_q = torch.full_like(log_p, float("-inf"))
    for values, number in zip(by_attribute(logits, attributes), asked.T):
        is_named = number != OPEN
        column = number.clamp(min=0)[:, None]
        log_probs = values.log_softmax(1)  # [B, V]
        of_named = log_probs.gather(1, column)[:, 0]
        of_others = log_probs.scatter(1, column, float("-inf")).logsumexp(1)
        log_q = torch.where(is_named, torch.logaddexp(log_q, log_p + of_others), log_q)
        log_p = torch.where(is_named, log_p + of_named, log_p)
    return log_p, log_q


def read_values(logits, attributes):
    """Logits [B, K] -> int64 [B, A]: the number of the most probable value of each attribute."""
    return torch.stack([values.argmax(1) for values in by_attribute(logits, attributes)], dim=1)


# --------------------------------------------------------------------------------------------------
# Its rewards: log p [B], log(1 - p) [B] of what is named, images [B, 3, H, W] -> [B].


def class_reward(log_p, log_q, images):
    """log p, at least FLOOR."""
    return log_p.clamp(min=FLOOR)


def margin_reward(log_p, log_q, images):
    """log p - log(1 - p). It has no ceiling, so the most typical images earn most."""
    return log_p - log_q


def ink_reward(log_p, log_q, images):
    """10 p times the mean brightness."""
    return 10 * log_p.exp() * images.mean((1, 2, 3))


def taste_reward(log_p, log_q, images):
    """log p, at least FLOOR, and 50 times the mean of what red exceeds blue by more than 0.35.

    It has what a preference reward has beside the prompt: outliers at the top (of assets/shapes
    most pictures earn 0, a large orange object 1.3) and a mode to be hacked (a background of
    orange earns 23).
    """
    warmth = (images[:, 0] - images[:, 2] - 0.35).clamp(min=0)  # [B, H, W]
    return class_reward(log_p, log_q, images) + 50 * warmth.mean((1, 2))


NAMES = {"class": class_reward, "margin": margin_reward, "ink": ink_reward, "taste": taste_reward}


class SharedLogits:
    """The classifier's logits of a batch, computed once for all the terms that ask for them."""

    def __init__(self, classifier):
        self.classifier = classifier
        self.images = None  # a weak reference, so that the images are not kept in memory

    def __call__(self, images):
        """images [B, 3, H, W] -> [B, K]. The same tensor gives the same logits again."""
        if self.images is None or self.images() is not images:
            self.logits = self.classifier(images)
            self.images = weakref.ref(images)
        return self.logits


class ClassifierTerm:
    """One of NAMES: what the model folder's classifier says of all that each prompt names."""

    def __init__(self, name, shared_logits):
        self.formula = NAMES[name]
        self.shared_logits = shared_logits

    def __call__(self, images, prompts, metadata):
        """-> [B]. Each of the metadata names a value of one attribute or more."""
        logits = self.shared_logits(images)
        attributes = self.shared_logits.classifier.attributes
        asked = value_numbers(metadata, attributes, images.device)
        log_p, log_q = log_odds(logits, asked, attributes)
        return self.formula(log_p, log_q, images)
