"""Rewards by name, and sums of them.

Sample-wise, (images[B, 3, H, W] in [0, 1], prompts, metadata) -> float32 [B]:
    class               log p(label | picture) of the model folder's reward classifier, no less than FLOOR: did you draw what was asked?
    margin              the log-odds of the same, log p - log(1 - p): it has no ceiling, so the most typical pictures pay ever more
    ink                 brightness times p(label | picture): a toy that invites hacking
    clip[:MODEL]        100 cos(picture, prompt) of a CLIP's embeddings: CLIPScore (arXiv 2104.08718) in percent, not cut off below 0
    pickscore[:MODEL]   exp(logit_scale) cos(picture, prompt) / 26 of PickScore (arXiv 2305.01569), the scale of Flow-GRPO
    aesthetic:FILE      LAION's aesthetic score, about 1 to 10: FILE is the linear-MSE head on CLIP ViT-L/14; @MODEL after it is another copy of it
    jpeg                minus the kilobytes (1000 bytes) of the picture as a JPEG of quality 95; incompressible: plus (DDPO, arXiv 2305.13301)
    module:function     your own, of the same signature
Distribution-wise: fid, kid, in dist_reward.py. A mixture is written pickscore:1,aesthetic:head.pth:0.2,fid:0.5, each name[:argument][:weight]:
every term is centred and divided by its own std, then weighted. A reward that fails, or returns a wrong shape or a number that is not finite,
is an error and never a score. Left out: rewards that ask a server; write those as module:function.
"""
import functools
import importlib
import io
import torch
from PIL import Image
from collections import Counter
from collections import namedtuple
from pathlib import Path
from rewards.classifier import NAMES, check_classifier, load_classifier
from rewards.clip import CLIPS, Clip, load_head, read_clip, to_bytes

JPEG = {"jpeg": -1, "incompressible": 1}
DISTRIBUTION = ("fid", "kid")
KNOWN = (*NAMES, *JPEG, *CLIPS, *DISTRIBUTION)


def jpeg_kilobytes(images):
    """images [B, 3, H, W] in [0, 1] -> [B]: thousands of bytes as a JPEG of quality 95, NaN for a picture that is not finite.

    >>> grey, noise = torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64)
    >>> bool(jpeg_kilobytes(grey[None]) < 0.2 * jpeg_kilobytes(noise[None]))       # what pays for small files pays for empty pictures
    True
    """
    sizes = []
    for image in to_bytes(images).cpu():
        file = io.BytesIO()
        Image.fromarray(image.nan_to_num().byte().permute(1, 2, 0).numpy()).save(file, format="JPEG", quality=95)
        sizes.append(float("nan") if image.isnan().any() else file.tell() / 1000)
    return torch.tensor(sizes, device=images.device)
Term = namedtuple("Term", "name argument model weight")                 # name: of KNOWN, or your module; argument: model, file or function


def number(text):
    try:
        return float(text)
    except ValueError:
        return None


def parse_term(spec, text):
    """'pickscore', 'clip:openai/clip-vit-base-patch32:0.5' or 'module:function:2' -> Term: the weight is the last part, if it is a number."""
    name, colon, rest = text.strip().partition(":")
    argument, _, weight = rest.rpartition(":")
    if not rest or name in KNOWN and name not in CLIPS:                  # those take no argument, so all the rest is to be the weight
        argument, weight = "", rest if colon else "1"
    elif number(weight) is None:
        argument, weight = rest, "1"
    if name not in KNOWN and not all(part.isidentifier() for part in (*name.split("."), argument)):
        raise ValueError(f"--reward {spec}: {name!r} is none of {', '.join(KNOWN)}, module:function")
    if number(weight) is None:
        raise ValueError(f"--reward {spec}: {weight!r} is not a number; write {name}:1")
    if not 0 < abs(number(weight)) < float("inf"):
        raise ValueError(f"--reward {spec}: the weight of {name} must be finite and not zero")
    model = argument
    if name == "aesthetic":
        argument, _, model = argument.partition("@")                     # not a comma, which parts terms
        if not argument:
            raise ValueError(f"--reward {spec}: aesthetic needs the file of its head; write aesthetic:FILE:1")
    return Term(name, argument, model or CLIPS.get(name), number(weight))


def parse_terms(spec):
    """-> {key: Term}. The key, as in metrics, is the name or your function's; where that is not unique, or another reward's, name:argument."""
    terms, found = [parse_term(spec, text) for text in spec.split(",")], {}
    short = [term.name if term.name in KNOWN else term.argument for term in terms]
    for term, key in zip(terms, short):
        if Counter(short)[key] > 1 or term.name not in KNOWN and key in KNOWN:
            key = ":".join(filter(None, term[:2]))
        if key in found:
            raise ValueError(f"--reward {spec}: {key!r} is named twice")
        found[key] = term
    if {*DISTRIBUTION} <= {*found}:
        raise ValueError(f"--reward {spec}: fid and kid need a reference each; name one of them")
    return found


def parse(spec):
    """'class:1,ink:0.2' -> {'class': 1.0, 'ink': 0.2}. Raises ValueError for an unknown or repeated name or a weight that is no number.

    >>> parse("class:1,fid:0.3,my_rewards:redness")
    {'class': 1.0, 'fid': 0.3, 'redness': 1.0}
    """
    return {key: term.weight for key, term in parse_terms(spec).items()}


def needs_labels(spec):
    """Whether a term asks the model folder's classifier, and so a "label" beside every prompt."""
    return any(term.name in NAMES for term in parse_terms(spec).values())


def check_reward(spec, folder):
    """-> {key: weight}. Raises ValueError, in one line, for a term that cannot be loaded; of networks, only their configs are read."""
    if needs_labels(spec):
        check_classifier(Path(folder) / "reward")
    for term in parse_terms(spec).values():
        try:
            if term.name in CLIPS:
                features = read_clip(term.model)[0].projection_dim
                if term.name == "aesthetic" and load_head(term.argument)[0][0].in_features != features:
                    raise ValueError(f"{term.model} has {features} features; the head is of CLIP ViT-L/14's 768")
            if term.name not in KNOWN:
                if not callable(getattr(importlib.import_module(term.name), term.argument)):
                    raise TypeError(f"{term.argument} is not a function")
        except Exception as error:                                       # a library's or a user's: each kind of failure raises another
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
            raise ValueError(f"--reward {':'.join(filter(None, term[:2]))}: {line}") from None
    return parse(spec)


def check_labels(prompts, where):
    """Raises ValueError if a prompt does not say which class it asks for (class, margin and ink need the label)."""
    for n, prompt in enumerate(prompts, 1):
        label = prompt.metadata.get("label")
        if type(label) is not int or not 0 <= label <= 9:
            raise ValueError(f'{where}:{n}: the reward needs a "label" from 0 to 9 beside the prompt, and finds {label!r}')


class Reward:
    """The named rewards: `weights` {key: weight} of all, `distribution` the distribution-wise one or None; a call gives the others.

    Raises ValueError where a term's network or file is missing. A reward sees `batch` pictures at a time; a CLIP that two terms name is loaded once.
    """

    def __init__(self, spec, folder, device="cpu", batch=16):
        self.weights, self.folder, self.device, self.batch = parse(spec), Path(folder), device, batch
        self.distribution = next((name for name in self.weights if name in DISTRIBUTION), None)
        clip = functools.cache(lambda name: Clip(name, device, batch))
        self.terms = {key: self.open(term, clip) for key, term in parse_terms(spec).items() if key != self.distribution}

    def open(self, term, clip):
        """-> a function: images [B, 3, H, W], prompts, metadata, classifier's (logits, labels) on demand -> [B]. `clip`: name -> Clip."""
        name = term.name
        if name in NAMES:
            self.classifier                                              # loaded now, so that a folder without it fails now
            return lambda images, prompts, metadata, judged: NAMES[name](*judged(), images)
        if name in JPEG:
            return lambda images, prompts, metadata, judged: JPEG[name] * jpeg_kilobytes(images)
        if name in CLIPS:
            judge = clip(term.model)
            if name == "aesthetic":
                head = load_head(term.argument, self.device)
                return lambda images, prompts, metadata, judged: head(judge.pictures(images))[:, 0]
            scale = 100 if name == "clip" else judge.network.logit_scale.exp() / 26
            return lambda images, prompts, metadata, judged: scale * (judge.pictures(images) * judge.texts(prompts)).sum(1)
        function = getattr(importlib.import_module(name), term.argument)
        return lambda images, prompts, metadata, judged: function(images.clone(), [*prompts], [{**m} for m in metadata])    # it may write on them

    @functools.cached_property
    def classifier(self):
        """The model folder's, loaded when first asked for. Raises ValueError if it has none."""
        if not (self.folder / "reward").is_dir():
            raise ValueError(f"{self.folder} has no reward/ classifier; class, margin, ink and --diversity_features reward need it")
        return load_classifier(self.folder / "reward", self.device)

    @torch.no_grad()
    def __call__(self, images, prompts, metadata):
        """-> {key: float32 [B]} of the sample-wise rewards.

        Raises FloatingPointError naming a reward of a wrong shape or not finite, RuntimeError naming one that raises, from what it raised.
        """
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(f"{len(images)} pictures, {len(prompts)} prompts and {len(metadata)} metadata; as many of each are needed")
        parts = [slice(at, at + self.batch) for at in range(0, len(images), self.batch)] or [slice(0)]
        found = [self.score(images[part], prompts[part], metadata[part]) for part in parts]
        return {key: torch.cat([scores[key] for scores in found]) for key in self.terms}

    def score(self, images, prompts, metadata):
        """The same of a few pictures, all at once."""
        judged, found = functools.cache(lambda: (self.classifier(images), torch.tensor([m["label"] for m in metadata], device=images.device))), {}
        for key, term in self.terms.items():
            try:
                found[key] = torch.as_tensor(term(images, prompts, metadata, judged), dtype=torch.float32, device=images.device)
            except Exception as error:
                raise RuntimeError(f"the reward {key} failed: {type(error).__name__}: {error}") from error
            if found[key].shape != (len(images),):
                raise FloatingPointError(f"the reward {key} returned the shape {tuple(found[key].shape)} for {len(images)} pictures")
            if not found[key].isfinite().all():
                raise FloatingPointError(f"the reward {key} returned a non-finite number")
        return found
