"""Rewards of images by name, and weighted sums of them: the mini-language of --reward.

A sum is written class:1,aesthetic:head.pth:0.2,fid:0.5: terms name[:argument][:weight], weight 1
if left out. Training centres each term, divides it by its own std, and then weights it.

    class, margin,        the model folder's classifier: rewards/classifier.py
    ink, taste
    recogniser            its recogniser, a network of another kind: rewards/recogniser.py
    clip[:MODEL]          CLIPScore in percent: rewards/clip.py. MODEL is a hub id or a folder
    pickscore[:MODEL]     PickScore
    aesthetic:FILE        LAION's head, a file, on CLIP ViT-L/14; aesthetic:FILE@MODEL on another
    jpeg, incompressible  minus and plus the kilobytes of a JPEG (DDPO, arXiv 2305.13301)
    fid, kid              rewards of the distribution: dist_reward.py
    module:function       your own: images [B, 3, H, W] in [0, 1], prompts, metadata -> [B]

A reward that fails, or whose shape is wrong or whose numbers are not finite, is an error and never
a score. Left out: rewards that ask a server; write those as module:function.
"""

import io
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from rewards.classifier import (
    NAMES,
    ClassifierTerm,
    SharedLogits,
    check_classifier,
    load_classifier,
)
from rewards.clip import CLIPS, HEAD_FEATURES, AestheticTerm, Clip, ClipTerm, load_head, read_clip
from rewards.features import NotNumbers, load_function, own_numbers
from rewards.recogniser import Recogniser, check_recogniser
from support.files import to_uint8

JPEG = {"jpeg": -1, "incompressible": 1}
DISTRIBUTION = ("fid", "kid")
RECOGNISER = "recogniser"
KNOWN = (*NAMES, RECOGNISER, *JPEG, *CLIPS, *DISTRIBUTION)


# --------------------------------------------------------------------------------------------------
# The mini-language.


class Term(NamedTuple):
    """One term of --reward."""

    name: str  # one of KNOWN, or your module
    argument: str  # a CLIP, the head's file or your function, as written; "" if there is none
    model: str | None  # the CLIP that it needs
    weight: float

    @property
    def short_name(self):
        """What it is called in the metrics, where that is unique."""
        return self.name if self.name in KNOWN else self.argument

    @property
    def full_name(self):
        return f"{self.name}:{self.argument}" if self.argument else self.name


def is_number(text):
    """Whether float(text) is possible."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def split_term(text):
    """'clip:a/b:0.5' -> its name, argument and weight, as texts. The weight is last, a number."""
    name, colon, rest = text.strip().partition(":")
    takes_argument = name in CLIPS or name not in KNOWN
    if not takes_argument or not rest:
        return name, "", rest if colon else "1"
    argument, _, last = rest.rpartition(":")
    if is_number(last):
        return name, argument, last
    return name, rest, "1"


def parse_term(spec, text):
    """'pickscore', 'clip:openai/clip-vit-base-patch32:0.5' or 'module:function:2' -> Term.

    spec: the whole of --reward, for the ValueError.
    """
    name, argument, weight = split_term(text)
    if name not in KNOWN:
        words = [*name.split("."), argument]
        if not all(word.isidentifier() for word in words):
            raise ValueError(
                f"--reward {spec}: {name!r} is none of {', '.join(KNOWN)}, module:function"
            )
    if not is_number(weight):
        raise ValueError(f"--reward {spec}: {weight!r} is not a number; write {name}:1")
    weight = float(weight)
    if not 0 < abs(weight) < float("inf"):
        raise ValueError(f"--reward {spec}: the weight of {name} must be finite and not zero")

    model = argument
    if name == "aesthetic":
        argument, _, model = argument.partition("@")  # a comma would end the term
        if not argument:
            raise ValueError(
                f"--reward {spec}: aesthetic needs the file of its head; write aesthetic:FILE:1"
            )
    return Term(name, argument, model or CLIPS.get(name), weight)


def parse_terms(spec):
    """--reward -> {key: Term}; the keys are those of the metrics. Raises ValueError, in one line.

    A key is the short name, or name:argument where two terms share the short name, or where the
    name of your function is that of another reward.
    """
    terms = [parse_term(spec, text) for text in spec.split(",")]
    short_names = [term.short_name for term in terms]
    terms_by_key = {}
    for term, key in zip(terms, short_names):
        is_shared = short_names.count(key) > 1
        is_taken = term.name not in KNOWN and key in KNOWN
        if is_shared or is_taken:
            key = term.full_name
        if key in terms_by_key:
            raise ValueError(f"--reward {spec}: {key!r} is named twice")
        terms_by_key[key] = term
    if all(name in terms_by_key for name in DISTRIBUTION):
        raise ValueError(f"--reward {spec}: fid and kid need a reference each; name one of them")
    return terms_by_key


def parse(spec):
    """--reward -> {key: weight}. Raises ValueError, in one line.

    >>> parse("class:1,fid:0.3,my_rewards:redness")
    {'class': 1.0, 'fid': 0.3, 'redness': 1.0}
    """
    return {key: term.weight for key, term in parse_terms(spec).items()}


# --------------------------------------------------------------------------------------------------
# Checks, before anything is loaded.


def cut_texts(spec, texts):
    """The prompts that the CLIPs of --reward cut off -> {model: (limit, the texts)}."""
    cuts = {}
    for term in parse_terms(spec).values():
        if term.name in CLIPS and term.name != "aesthetic":  # which reads no text
            config, tokenizer, _ = read_clip(term.model)
            limit = config.text_config.max_position_embeddings
            numbers = tokenizer(texts, truncation=False).input_ids
            longer = [text for text, row in zip(texts, numbers) if len(row) > limit]
            if longer:
                cuts[term.model] = (limit, longer)
    return cuts


def readers(spec, folder):
    """The networks of the model folder that terms ask -> {path: what it reads, and its size}.

    Each wants every prompt to name something. Raises ValueError, in one line.
    """
    asked = {}
    for term in parse_terms(spec).values():
        if term.name in NAMES:
            path = Path(folder) / "reward"
            check_is_there(spec, path)
            asked[path] = check_classifier(path)
            if term.name == "taste" and asked[path]["channels"] == 1:
                raise ValueError(
                    f"--reward {spec}: taste pays warm colours, and {path} sees greys alone"
                )
        if term.name == RECOGNISER:
            path = Path(folder) / RECOGNISER
            check_is_there(spec, path)
            asked[path] = check_recogniser(path)
    return asked


def check_is_there(spec, path):
    """Raises ValueError unless the folder of a network that a reward asks exists."""
    if not path.is_dir():
        others = ", ".join(["clip", "pickscore", "aesthetic:FILE", *JPEG, "module:function"])
        raise ValueError(
            f"--reward {spec}: {path} does not exist, and {', '.join(NAMES)} ask reward/, "
            f"{RECOGNISER} its own; rewards without one are {others}, and fid and kid of --target"
        )


def check_term(term):
    """Raises whatever is wrong with what a term needs: its CLIP, its head, your function."""
    if term.name in CLIPS:
        if term.name == "aesthetic":
            load_head(term.argument)  # first, because a CLIP may have to be fetched
        config, _, _ = read_clip(term.model)
        features = config.projection_dim
        if term.name == "aesthetic" and features != HEAD_FEATURES:
            raise ValueError(
                f"{term.model} has {features} features, and the head needs "
                f"{HEAD_FEATURES}; name a CLIP ViT-L/14"
            )
    if term.name not in KNOWN:
        load_function(term.name, term.argument)


def check_reward(spec, folder):
    """--reward and the model folder -> {key: weight}. Of networks, it reads the configs alone.

    Raises ValueError, in one line, for a term that cannot be loaded.
    """
    readers(spec, folder)
    for term in parse_terms(spec).values():
        try:
            check_term(term)
        except Exception as error:  # transformers' or your module's: of any class
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"--reward {term.full_name}: {lines[0][:500]}") from None
    return parse(spec)


def names_any(prompts, attributes):
    """Whether some prompt names a value of one of the attributes {name: [values]}."""
    return any(prompt.metadata.keys() & attributes.keys() for prompt in prompts)


def check_labels(prompts, where, attributes):
    """Raises ValueError unless every prompt names something that the classifiers know.

    where: the file of the prompts, for the message; attributes {name: [values]}: of classifiers.
    """
    names = " or ".join(f'"{name}"' for name in attributes)
    for line, prompt in enumerate(prompts, 1):
        named = [name for name in attributes if name in prompt.metadata]
        if not named:
            raise ValueError(f"{where}:{line}: the classifier needs {names} beside the prompt")
        for name in named:
            check_value(f"{where}:{line}", name, prompt.metadata[name], attributes[name])


def check_value(where, name, value, values):
    """Raises ValueError unless `value` is one of the attribute's values; True and 1.0 are not 1."""
    if not any(type(value) is type(known) and value == known for known in values):
        known = ", ".join(map(str, values))
        if type(values[0]) is int and values == list(range(len(values))):
            known = f"a number from 0 to {len(values) - 1}"
        raise ValueError(f'{where}: the classifier needs "{name}" to be {known}, not {value!r}')


# --------------------------------------------------------------------------------------------------
# Terms. Those of the classifier and of a CLIP are in classifier.py and clip.py.
# All are called with images [B, 3, H, W] in [0, 1], B prompts and B metadata, and return [B].


def jpeg_kilobytes(images):
    """images [B, 3, H, W] in [0, 1] -> [B]: thousands of bytes as a JPEG of quality 95.

    NaN for an image that is not finite.

    >>> grey, noise = torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64)
    >>> bool(jpeg_kilobytes(grey[None]) < 0.2 * jpeg_kilobytes(noise[None]))
    True
    """
    is_finite = images.isfinite().flatten(1).all(1).tolist()
    pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 3]
    sizes = []
    for n, picture in enumerate(pixels):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="JPEG", quality=95)
        sizes.append(file.tell() / 1000 if is_finite[n] else float("nan"))
    return torch.tensor(sizes, device=images.device)


class JpegTerm:
    """sign * kilobytes: -1 rewards small files, so in the end empty images; 1 rewards noise."""

    def __init__(self, name):
        self.sign = JPEG[name]

    def __call__(self, images, prompts, metadata):
        return self.sign * jpeg_kilobytes(images)


class OwnTerm:
    """Your own function, which may write on its arguments: it gets copies.

    It returns a tensor, an array or a list of B numbers. Raises NotNumbers for anything else.
    """

    def __init__(self, module, name):
        self.function = load_function(module, name)

    def __call__(self, images, prompts, metadata):
        copies = [dict(entry) for entry in metadata]
        result = self.function(images.clone(), list(prompts), copies)
        return own_numbers(result, f"of {len(images)} numbers, one for each picture")


# --------------------------------------------------------------------------------------------------
# All terms.


class Reward:
    """The terms of --reward; a call scores images by all that are sample-wise.

    weights: {key: weight} of all terms; distribution: the key of the distribution-wise term, or
    None. A term sees at most `batch` images at a time; a network that two terms name is loaded
    once. Raises ValueError where a network or a file is missing.
    """

    def __init__(self, spec, folder, device="cpu", batch=16):
        self.weights = parse(spec)
        self.folder = Path(folder)  # of the model, which holds the classifier
        self.device = device
        self.batch = batch
        self.distribution = None
        self.logits = None
        self.clips = {}  # {hub id or folder: Clip}
        self.terms = {}
        for key, term in parse_terms(spec).items():
            if term.name in DISTRIBUTION:
                self.distribution = key
            else:
                self.terms[key] = self.open(term)

    def open(self, term):
        """Term -> a function: images, prompts, metadata -> [B]."""
        if term.name in NAMES:
            if self.logits is None:
                self.logits = SharedLogits(self.open_classifier())
            return ClassifierTerm(term.name, self.logits)
        if term.name == RECOGNISER:
            recogniser = Recogniser(self.folder / RECOGNISER, self.device)
            return ClassifierTerm("class", SharedLogits(recogniser))
        if term.name in JPEG:
            return JpegTerm(term.name)
        if term.name in CLIPS:
            if term.model not in self.clips:
                self.clips[term.model] = Clip(term.model, self.device, self.batch)
            clip = self.clips[term.model]
            if term.name == "aesthetic":
                return AestheticTerm(load_head(term.argument, self.device), clip)
            return ClipTerm(term.name, clip)
        return OwnTerm(term.name, term.argument)

    def open_classifier(self):
        """The model folder's classifier. Raises ValueError if there is none."""
        folder = self.folder / "reward"
        if not folder.is_dir():
            raise ValueError(f"{self.folder} has no reward/ classifier; {', '.join(NAMES)} need it")
        return load_classifier(folder, self.device)

    @torch.no_grad()
    def __call__(self, images, prompts, metadata):
        """images [B, 3, H, W] in [0, 1], B prompts, B metadata -> {key: float32 [B]}, unweighted.

        Raises FloatingPointError naming a term whose shape is wrong or whose numbers are not
        finite, and RuntimeError naming a term that fails, from its own error.
        """
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(
                f"{len(images)} pictures, {len(prompts)} prompts and {len(metadata)} metadata; "
                "as many of each are needed"
            )
        parts = []
        for start in range(0, max(len(images), 1), self.batch):  # no images: one empty part
            part = slice(start, start + self.batch)
            parts.append(self.score(images[part], prompts[part], metadata[part]))
        return {key: torch.cat([part[key] for part in parts]) for key in self.terms}

    def score(self, images, prompts, metadata):
        """The same for at most `batch` images."""
        scores = {}
        for key, term in self.terms.items():
            try:
                score = term(images, prompts, metadata)
                score = torch.as_tensor(score, dtype=torch.float32, device=images.device)
            except NotNumbers as error:
                raise FloatingPointError(f"the reward {key} {error}") from None
            except Exception as error:  # your function's: of any class
                message = f"the reward {key} failed: {type(error).__name__}: {error}"
                raise RuntimeError(message) from error
            if score.shape != (len(images),):
                raise FloatingPointError(
                    f"the reward {key} returned the shape {tuple(score.shape)} "
                    f"for {len(images)} pictures; return one number for each"
                )
            if not score.isfinite().all():
                raise FloatingPointError(f"the reward {key} returned a non-finite number")
            scores[key] = score
        return scores
