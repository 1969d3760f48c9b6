"""Rewards by name, and the advantage that a group of rollouts makes of them.

Sample-wise, (images[B, 3, H, W] in [0, 1], prompts, metadata) -> float32 [B]:
    class    log p(label | picture) of the model folder's reward classifier, no less than FLOOR: did you draw what was asked?
    margin   the log-odds of the same, log p - log(1 - p): it has no ceiling, so the most typical pictures pay ever more
    ink      brightness times p(label | picture): a toy that invites hacking
Distribution-wise: fid, kid, in dist_reward.py. A mixture is written class:1,fid:0.5: every term is centred and divided by its own std, then
weighted. A reward that fails, or returns a wrong shape or a non-finite number, is an error and never a score.
Left out here: preference models; they come as further names.
"""
import json
from pathlib import Path

import torch
from torch import nn

FLOOR = -6.0                                                             # nats: one hopeless picture must not outweigh its group


class Classifier(nn.Module):
    """A small CNN on 28 x 28 pictures: 64 features and 10 classes. `width` is the number of channels after the first layer."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        block = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)]
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
    from safetensors import SafetensorError, safe_open
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
    from safetensors.torch import load_file
    model = Classifier(json.loads((Path(folder) / "config.json").read_text())["width"])
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.eval().requires_grad_(False).to(device)


def class_reward(logits, labels, images):
    return logits.log_softmax(1).gather(1, labels[:, None])[:, 0].clamp(min=FLOOR)


def margin_reward(logits, labels, images):
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return logits.gather(1, labels[:, None])[:, 0] - others.logsumexp(1)


def ink_reward(logits, labels, images):
    return 10 * logits.softmax(1).gather(1, labels[:, None])[:, 0] * images.mean((1, 2, 3))


NAMES = {"class": class_reward, "margin": margin_reward, "ink": ink_reward}
DISTRIBUTION = ("fid", "kid")


def parse(spec):
    """'class:1,ink:0.2' -> {'class': 1.0, 'ink': 0.2}. Raises ValueError for an unknown or repeated name or a weight that is no number."""
    weights = {}
    for term in spec.split(","):
        name, colon, weight = term.strip().partition(":")
        if name not in (*NAMES, *DISTRIBUTION) or name in weights:
            raise ValueError(f"--reward {spec}: {name!r} is {'named twice' if name in weights else 'none of ' + ', '.join((*NAMES, *DISTRIBUTION))}")
        try:
            weights[name] = float(weight if colon else 1)
        except ValueError:
            raise ValueError(f"--reward {spec}: {weight!r} is not a number; write {name}:1") from None
        if not abs(weights[name]) < float("inf") or weights[name] == 0:
            raise ValueError(f"--reward {spec}: the weight of {name} must be finite and not zero")
    if {*DISTRIBUTION} <= {*weights}:
        raise ValueError(f"--reward {spec}: fid and kid need a reference each; name one of them")
    return weights


def check_labels(prompts, where):
    """Raises ValueError if a prompt does not say which class it asks for (all rewards here need the label)."""
    for n, prompt in enumerate(prompts, 1):
        label = prompt.metadata.get("label")
        if type(label) is not int or not 0 <= label <= 9:
            raise ValueError(f'{where}:{n}: the reward needs a "label" from 0 to 9 beside the prompt, and finds {label!r}')


class Reward:
    """The named rewards: `weights` {name: weight} of all, `distribution` the distribution-wise one or None; a call gives the others."""

    def __init__(self, spec, folder, device="cpu"):
        self.weights, self.classifier = parse(spec), load_classifier(Path(folder) / "reward", device)
        self.distribution = next((name for name in self.weights if name in DISTRIBUTION), None)

    def __call__(self, images, prompts, metadata):
        """-> {name: float32 [B]} of the sample-wise rewards. Raises FloatingPointError naming a reward that is not finite."""
        names, terms = [name for name in self.weights if name in NAMES], {}
        if names:
            logits = self.classifier(images)
            labels = torch.tensor([m["label"] for m in metadata], device=images.device)
        for name in names:
            terms[name] = NAMES[name](logits, labels, images).float()
            if terms[name].shape != (len(images),):
                raise FloatingPointError(f"the reward {name} returned the shape {tuple(terms[name].shape)} for {len(images)} pictures")
            if not terms[name].isfinite().all():
                raise FloatingPointError(f"the reward {name} returned a non-finite number")
        return terms

    def features(self, images):
        """The space in which `--diversity_features reward` measures distances -> [B, 64]."""
        return self.classifier.features(images)


def group_advantage(values, index, std="group", floor=1e-3, limit=5.0):
    """Centres values [..., P, N] by group and divides them by a std, over the kept rollouts index [P, K] -> float64 [..., P, K].

    std: "group" the kept group's, "batch" that of all the kept together, "none" 1. A std below `floor` counts as `floor`, so a group of
    equals gets 0 and rounding is never blown up; the result is limited to +-`limit`.
    """
    values, index = values.double(), index.to(values.device)
    kept = values.gather(-1, index.expand(*values.shape[:-1], index.shape[-1]))
    centred = kept - kept.mean(-1, keepdim=True)
    if std == "group":
        centred = centred / kept.std(-1, keepdim=True).clamp(min=floor)
    elif std == "batch":
        centred = centred / centred.square().mean((-2, -1), keepdim=True).sqrt().clamp(min=floor)
    return centred.clamp(-limit, limit)
