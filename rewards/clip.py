"""CLIP: pictures and words in one space."""
import torch
import torch.nn.functional as F
from PIL import Image
from collections import OrderedDict
from pathlib import Path
from torch import nn

CLIPS = {"clip": "openai/clip-vit-large-patch14", "pickscore": "yuvalkirstain/PickScore_v1", "aesthetic": "openai/clip-vit-large-patch14"}
PROCESSORS = {"yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}       # as published: the words and pixels of another folder


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
