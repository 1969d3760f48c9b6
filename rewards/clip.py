"""Rewards by a CLIP, which embeds images and texts in one space.

    clip        100 cos(image, prompt): CLIPScore (arXiv 2104.08718) in percent, not cut off at 0
    pickscore   exp(logit_scale) cos(image, prompt) / 26: PickScore (arXiv 2305.01569), in the units
                of Flow-GRPO
    aesthetic   LAION's linear-MSE head on the image embedding of CLIP ViT-L/14: about 1 to 10
Left out: transformers' image processor, which runs on the CPU alone; `clip_pixels` follows it.
"""

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from support.files import check_regular, to_bytes
from support.guards import check_weights

# The default network of each reward.
CLIPS = {
    "clip": "openai/clip-vit-large-patch14",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "aesthetic": "openai/clip-vit-large-patch14",
}

# Where PickScore's authors take the tokenizer and the image processor from.
PROCESSORS = {"yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}

# The linear layers of LAION's head: inputs and outputs. The missing numbers are dropouts.
HEAD = {"0": (768, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
HEAD_FEATURES = 768


# --------------------------------------------------------------------------------------------------
# The network.


def clip_pixels(images, size, mean, std):
    """CLIP's published processor on any device: images [B, 3, H, W] -> [B, 3, size, size].

    Bicubic to `size` on the shorter side, the middle square, then mean [3] and std [3].
    rewards/features.py squashes the whole image to a square for the same network instead: a score
    is defined by this processor, while a distance of distributions must not lose the margins.
    """
    # Rounding to bytes would make an infinity finite; no score of such an image may be finite.
    is_finite = images.isfinite().flatten(1).all(1)
    x = to_bytes(images).masked_fill(~is_finite[:, None, None, None], float("nan"))

    shorter = min(images.shape[2:])
    height, width = (size * side // shorter for side in images.shape[2:])
    x = F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False)
    x = x.round().clamp(0, 255) / 255

    top = (height - size) // 2
    left = (width - size) // 2
    x = x[:, :, top : top + size, left : left + size]
    return (x - mean[:, None, None]) / std[:, None, None]


def read_clip(name):
    """A CLIP's hub id or folder -> its config, tokenizer and image processor; reads no weight.

    Raises ValueError, or whatever transformers raises.
    """
    import transformers  # which takes seconds, and few rewards need it

    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.model_type != "clip":
        raise ValueError(f"{name} is a {config.model_type}, not a clip; name a CLIP")

    # A folder without a tokenizer gives one of two words, and no error.
    source = PROCESSORS.get(name, name)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(source)
    vocabulary = config.text_config.vocab_size
    if len(tokenizer) != vocabulary:
        raise ValueError(
            f"{source} has a tokenizer of {len(tokenizer)} words, and {name} embeds {vocabulary}; "
            "fetch it again, or name another"
        )

    # The class with PIL in its name does not ask for torchvision.
    processor = transformers.CLIPImageProcessorPil.from_pretrained(source)
    size = config.vision_config.image_size
    sides = (processor.size.shortest_edge, processor.crop_size.height, processor.crop_size.width)
    if sides != (size, size, size) or processor.resample != Image.BICUBIC:
        raise ValueError(
            f"{source} prepares pictures otherwise than by a bicubic resize and a middle square "
            f"of {size}; name another CLIP"
        )
    return config, tokenizer, processor


class Clip:
    """A frozen CLIP. Its embeddings [B, D] have length 1.

    The network sees at most `batch` images or texts at a time, and each different text once.
    """

    def __init__(self, name, device="cpu", batch=16):
        import transformers

        config, self.tokenizer, processor = read_clip(name)
        try:
            network, report = transformers.CLIPModel.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # transformers raises another class for each kind of damage
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(
                f"{name}: this CLIP cannot be loaded ({reason}); fetch it again, or name another"
            ) from None
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"]))
            raise ValueError(
                f"{name}: lacks the weights {missing}; fetch it again, or name another"
            )
        self.network = network.to(device).eval().requires_grad_(False)
        check_weights(self.network, name)
        self.device = device
        self.batch = batch
        self.size = config.vision_config.image_size
        self.context_length = config.text_config.max_position_embeddings
        self.mean = torch.tensor(processor.image_mean, device=device)
        self.std = torch.tensor(processor.image_std, device=device)
        self.text_embeddings = {}  # {text: [D]} of all texts so far

    def embed_images(self, images):
        """images [B, 3, H, W] in [0, 1] -> [B, D]."""
        embeddings = []
        for part in images.to(self.device).split(self.batch):
            pixels = clip_pixels(part, self.size, self.mean, self.std)
            output = self.network.get_image_features(pixel_values=pixels).pooler_output
            embeddings.append(F.normalize(output, dim=1))
        return torch.cat(embeddings)

    def embed_texts(self, texts):
        """B texts -> [B, D].

        A text is cut off at the network's context length. All are padded to it, so that no
        embedding depends on the other texts of the batch.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self.text_embeddings]
        for start in range(0, len(new), self.batch):
            part = new[start : start + self.batch]
            tokens = self.tokenizer(
                part,
                padding="max_length",
                truncation=True,
                max_length=self.context_length,
                return_tensors="pt",
            ).to(self.device)
            output = self.network.get_text_features(**tokens).pooler_output
            self.text_embeddings.update(zip(part, F.normalize(output, dim=1)))
        return torch.stack([self.text_embeddings[text] for text in texts])


# --------------------------------------------------------------------------------------------------
# LAION's aesthetic head.


def empty_head():
    """The head as LAION published it: linear layers, without an activation, named layers.0 to 7."""
    layers = OrderedDict()
    for number, (inputs, outputs) in HEAD.items():
        layers[number] = nn.Linear(inputs, outputs)
    return nn.Sequential(OrderedDict(layers=nn.Sequential(layers)))


def read_head(path):
    """The tensors of the head's file -> {name: tensor}. Raises ValueError; runs nothing in it."""
    check_regular(path)
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; give LAION's linear-MSE head")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # reads .safetensors too
    except Exception:  # of pickle, zip, torch or safetensors, whose advice is to run the file
        raise ValueError(
            f"{path}: is damaged or holds more than tensors, and nothing in it was run; "
            "give LAION's linear-MSE head"
        ) from None
    return state if isinstance(state, dict) else {}


def load_head(path, device="cpu"):
    """LAION's linear-MSE head from a .safetensors or torch file, frozen: [B, 768] -> [B, 1].

    Raises ValueError, in one line; nothing in the file is run.
    """
    head = empty_head()
    state = read_head(path)
    expected = {name: list(value.shape) for name, value in head.state_dict().items()}
    found = {name: list(getattr(value, "shape", "?")) for name, value in state.items()}
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{path}: {name} is {found.get(name)}, "
                f"and {expected.get(name)} in LAION's linear-MSE head"
            )
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite; give LAION's linear-MSE head")
    head.load_state_dict(state)
    return head.requires_grad_(False).to(device)


# --------------------------------------------------------------------------------------------------
# The rewards.


class ClipTerm:
    """scale * cos(image, prompt). CLIPScore and PickScore differ in the network and the scale."""

    def __init__(self, name, clip):
        self.clip = clip
        self.scale = 100
        if name == "pickscore":
            self.scale = clip.network.logit_scale.exp() / 26

    def __call__(self, images, prompts, metadata):
        """-> [B]."""
        image_embeddings = self.clip.embed_images(images)
        text_embeddings = self.clip.embed_texts(prompts)
        cosine = (image_embeddings * text_embeddings).sum(1)
        return self.scale * cosine


class AestheticTerm:
    """LAION's aesthetic score. It does not see the prompt."""

    def __init__(self, head, clip):
        self.head = head
        self.clip = clip

    def __call__(self, images, prompts, metadata):
        """-> [B]."""
        return self.head(self.clip.embed_images(images))[:, 0]
