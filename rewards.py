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
import json
from collections import Counter, OrderedDict, namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
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
JPEG = {"jpeg": -1, "incompressible": 1}
CLIPS = {"clip": "openai/clip-vit-large-patch14", "pickscore": "yuvalkirstain/PickScore_v1", "aesthetic": "openai/clip-vit-large-patch14"}
PROCESSORS = {"yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}       # as published: the words and pixels of another folder
DISTRIBUTION = ("fid", "kid")
KNOWN = (*NAMES, *JPEG, *CLIPS, *DISTRIBUTION)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP: pictures and words in one space.

def to_bytes(images):
    """The nearest bytes of pictures in [0, 1], as floats; a picture that is not finite becomes NaN all over, so that no score of it is finite."""
    broken = ~images.isfinite().flatten(1).all(1)
    return (images.float() * 255).round().clamp(0, 255).masked_fill(broken[:, None, None, None], float("nan"))


def clip_pixels(images, size, mean, std):
    """CLIP's published processor on any device, [B, 3, H, W] -> [B, 3, size, size]: bicubic to the shorter side, middle square, mean [3], std [3]."""
    height, width = (size * side // min(images.shape[2:]) for side in images.shape[2:])
    x = F.interpolate(to_bytes(images), (height, width), mode="bicubic", antialias=True, align_corners=False).round().clamp(0, 255) / 255
    top, left = (height - size) // 2, (width - size) // 2
    return (x[:, :, top:top + size, left:left + size] - mean[:, None, None]) / std[:, None, None]


def read_clip(name):
    """-> config, tokenizer and image processor of a CLIP, a hub id or a folder; no weight is read. Raises ValueError, or what transformers raises."""
    import transformers
    config, source = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False), PROCESSORS.get(name, name)
    if config.model_type != "clip":
        raise ValueError(f"{name} is a {config.model_type}, not a clip")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(source)
    if len(tokenizer) != config.text_config.vocab_size:                  # a folder without tokenizer gives one of two words, and no error
        raise ValueError(f"{source} has a tokenizer of {len(tokenizer)} words, and {name} embeds {config.text_config.vocab_size}")
    processor = transformers.CLIPImageProcessorPil.from_pretrained(source)                    # the one that does not ask for torchvision
    size = config.vision_config.image_size
    if (processor.size.shortest_edge, processor.crop_size.height, processor.crop_size.width, processor.resample) != (size, size, size, Image.BICUBIC):
        raise ValueError(f"{source} does not prepare pictures by a bicubic resize and a middle square of {size}, the only way known here")
    return config, tokenizer, processor


class Clip:
    """A frozen CLIP. Embeddings [B, D] have length one; networks see `batch` pictures or texts at a time, and each text once."""

    def __init__(self, name, device="cpu", batch=16):
        import transformers
        config, self.tokenizer, processor = read_clip(name)
        try:
            network, found = transformers.CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        except Exception as error:                                       # a library's: each kind of damage raises another
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(f"{name}: this CLIP cannot be loaded ({reason}); fetch it again, or name another") from None
        if found["missing_keys"]:
            raise ValueError(f"{name}: lacks the weights {', '.join(sorted(found['missing_keys']))}")
        self.network, self.device, self.batch, self.known = network.to(device).eval().requires_grad_(False), device, batch, {}
        self.size, self.words = config.vision_config.image_size, config.text_config.max_position_embeddings
        self.mean, self.std = (torch.tensor(v, device=device) for v in (processor.image_mean, processor.image_std))

    def pictures(self, images):
        """images [B, 3, H, W] in [0, 1] -> [B, D]."""
        pixels = (clip_pixels(x, self.size, self.mean, self.std) for x in images.to(self.device).split(self.batch))
        return torch.cat([F.normalize(self.network.get_image_features(pixel_values=x).pooler_output, dim=1) for x in pixels])

    def texts(self, prompts):
        """B texts -> [B, D]. Cut off after the words that the network has places for; padded to as many, so that no text depends on its company."""
        new = [text for text in dict.fromkeys(prompts) if text not in self.known]
        for at in range(0, len(new), self.batch):
            some = new[at:at + self.batch]
            tokens = self.tokenizer(some, padding="max_length", truncation=True, max_length=self.words, return_tensors="pt").to(self.device)
            self.known.update(zip(some, F.normalize(self.network.get_text_features(**tokens).pooler_output, dim=1)))
        return torch.stack([self.known[text] for text in prompts])


def load_head(path, device="cpu"):
    """LAION's linear-MSE head from a file, .safetensors or torch's, frozen: [B, 768] -> [B, 1]. Raises ValueError; nothing in the file is run."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; give LAION's linear-MSE head")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)  # of a .safetensors too
    except Exception:                                                    # of pickle, zip, torch or safetensors, whose advice is to run the file
        raise ValueError(f"{path}: is damaged or holds more than tensors, and nothing in it was run; give LAION's linear-MSE head") from None
    sizes = {"0": (768, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}       # the numbers between are dropouts
    head = nn.Sequential(OrderedDict(layers=nn.Sequential(OrderedDict((n, nn.Linear(*size)) for n, size in sizes.items()))))
    shapes = {name: list(getattr(value, "shape", "?")) for name, value in found.items()} if isinstance(found, dict) else {}
    expected = {name: list(value.shape) for name, value in head.state_dict().items()}
    for name in (name for name in (*expected, *shapes) if shapes.get(name) != expected.get(name)):
        raise ValueError(f"{path}: {name} is {shapes.get(name)}, and {expected.get(name)} in LAION's linear-MSE head")
    if not all(value.isfinite().all() for value in found.values()):
        raise ValueError(f"{path}: holds numbers that are not finite")
    head.load_state_dict(found)
    return head.requires_grad_(False).to(device)


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


# ---------------------------------------------------------------------------------------------------------------------
# --reward.

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
