"""The small classifier of a model folder, and the rewards that ask it."""
import json
import torch
from pathlib import Path
from safetensors import SafetensorError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

FLOOR = -6.0                                                             # nats: one hopeless picture must not outweigh its group


class Halve(nn.Module):
    def forward(self, x):                                                # nn.MaxPool2d(2), bit for bit, which torch takes ten times as long for on a CPU
        x = torch.maximum(x[..., :-1:2], x[..., 1::2])
        return torch.maximum(x[..., :-1:2, :], x[..., 1::2, :])


class Classifier(nn.Module):
    """A small CNN on 28 x 28 pictures: 64 features and 10 classes. `width` is the number of channels after the first layer."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        block = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.GELU(), Halve()]
        self.trunk = nn.Sequential(*block(1, width), *block(width, 2 * width), *block(2 * width, 4 * width), nn.Flatten(),
                                   nn.Linear(9 * 4 * width, 64))
        self.head = nn.Sequential(nn.GELU(), nn.Linear(64, 10))

    def features(self, images):
        """images [B, 1 or 3, 28, 28] in [0, 1] -> float32 [B, 64]."""
        if images.shape[2:] != (28, 28):
            raise ValueError(f"the tiny classifiers see 28 x 28 pictures, not {images.shape[2]} x {images.shape[3]}")
        return self.trunk(images.mean(1, keepdim=True) * 2 - 1)

    def forward(self, images):
        return self.head(self.features(images))                          # logits [B, 10]


def check_classifier(folder):
    """Raises ValueError, in one line, if a classifier folder cannot be loaded; no weight is read."""
    try:
        width = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["width"]
        with torch.device("meta"):
            expected = {name: list(value.shape) for name, value in Classifier(width).state_dict().items()}
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}
        if found != expected:
            raise ValueError("config.json and model.safetensors disagree")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a classifier folder ({type(error).__name__}: {error})") from None


def load_classifier(folder, device="cpu"):
    """A classifier folder (config.json, model.safetensors), frozen."""
    model = Classifier(json.loads((Path(folder) / "config.json").read_text())["width"])
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.eval().requires_grad_(False).to(device)


def class_reward(logits, labels, images):
    return logits.log_softmax(1).gather(1, labels[:, None])[:, 0].clamp(min=FLOOR)


def margin_reward(logits, labels, images):
    return logits.gather(1, labels[:, None])[:, 0] - logits.scatter(1, labels[:, None], float("-inf")).logsumexp(1)
NAMES = {"class": class_reward, "margin": margin_reward,
         "ink": lambda logits, labels, images: 10 * logits.softmax(1).gather(1, labels[:, None])[:, 0] * images.mean((1, 2, 3))}
