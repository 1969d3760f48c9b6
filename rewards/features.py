"""Feature networks of --features and --diversity_features."""
import importlib
import torch
import torch.nn.functional as F
import zipfile
from pathlib import Path
from rewards.classifier import check_classifier, load_classifier

TINY = ("reward", "evaluator")
HUB = {"dinov2": ("facebook/dinov2-large", "hidden_size"), "clip": ("openai/clip-vit-large-patch14", "projection_dim")}


def check_features(spec, folder, flag="features"):
    """-> D, or None where only a forward can tell. Raises ValueError, in one line, for what cannot be loaded; no weight is read."""
    kind, _, rest = spec.partition(":")
    if spec in TINY:
        check_classifier(Path(folder) / spec)
        return 64
    if kind == "inception":
        try:
            with zipfile.ZipFile(rest) as file:
                scripted = any(name.endswith("/constants.pkl") for name in file.namelist())   # torch.save writes a zip too, without it
        except (OSError, ValueError, zipfile.BadZipFile):
            scripted = False
        if not scripted:
            raise ValueError(f"--{flag} {spec}: {rest or 'no file'} is not a TorchScript file; write inception:FILE")
        return 2048
    if kind in HUB:
        try:
            import transformers
            config = transformers.AutoConfig.from_pretrained(rest or HUB[kind][0], trust_remote_code=False)
            if not config.model_type.startswith(kind):
                raise ValueError(f"is a {config.model_type}, not a {kind}")
            return getattr(getattr(config, "vision_config", config), HUB[kind][1])
        except Exception as error:                                       # a library's: each kind of broken config raises another
            raise ValueError(f"--{flag} {spec}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    if rest:
        try:
            if not callable(getattr(importlib.import_module(kind), rest)):
                raise TypeError(f"{rest} is not a function")
            return None
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"--{flag} {spec}: {' '.join(str(error).split())}") from None
    raise ValueError(f"--{flag} {spec}: none of reward, evaluator, inception:FILE, dinov2[:MODEL], clip[:MODEL], module:function")


def load_features(spec, folder, device="cpu"):
    """-> a function: pictures [B, 3, H, W] in [0, 1] -> float32 [B, D]; it raises FloatingPointError if a feature is not finite.

    Raises ValueError, in one line, if the network cannot be loaded."""
    kind, _, rest = spec.partition(":")
    try:
        if spec in TINY:
            network = load_classifier(Path(folder) / spec, device).features
        elif kind == "inception":
            network = inception(torch.jit.load(rest, map_location=device).eval())
        elif kind in HUB:
            network = vision(kind, rest or HUB[kind][0], device)
        else:
            network = getattr(importlib.import_module(kind), rest)
    except Exception as error:                                           # a library's: each kind of damage raises another
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{spec}: these features cannot be loaded ({reason}); fetch the network again, or name another") from None

    @torch.inference_mode()
    def features(images):
        found = network(images).float()
        if found.dim() != 2 or len(found) != len(images):
            raise FloatingPointError(f"--features {spec} returned the shape {tuple(found.shape)} for {len(images)} pictures")
        if not found.isfinite().all():
            raise FloatingPointError(f"--features {spec} returned a non-finite number")
        return found
    return features


def inception(network):
    """Either published calling convention. The network's pictures are bytes, so ours are rounded to bytes."""
    if any(argument.name == "return_features" for argument in network.forward.schema.arguments):
        return lambda images: network((images * 255).round().clamp(0, 255).to(torch.uint8), return_features=True)
    return lambda images: network((corner_bilinear((images * 255).round().clamp(0, 255), 299) - 128) / 128)


def corner_bilinear(images, size):
    """The bilinear resize of the TensorFlow graph that FID began with: pixel i is looked up at i * H / size, without half-pixel centres."""
    for dim in (2, 3):
        n = images.shape[dim]
        at = torch.arange(size, device=images.device) * (n / size)
        low = at.floor().long().clamp(max=n - 1)
        part = (at - low).reshape([-1 if d == dim else 1 for d in range(4)])
        images = images.index_select(dim, low) * (1 - part) + images.index_select(dim, (low + 1).clamp(max=n - 1)) * part
    return images


def vision(kind, name, device):
    """DINOv2's class token or CLIP's embedding: antialiased bicubic resize of bytes, the network's own mean and std."""
    import transformers
    owner = transformers.AutoModel if kind == "dinov2" else transformers.CLIPVisionModelWithProjection
    network, found = owner.from_pretrained(name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(f"{name}: lacks the weights {', '.join(sorted(found['missing_keys']))}")
    network = network.to(device).eval()
    if kind == "dinov2":
        size, mean, std = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    else:
        size, mean, std = network.config.image_size, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (mean, std))

    def embed(images):
        x = F.interpolate((images * 255).round(), (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255) / 255
        out = network(pixel_values=(x - mean) / std)
        return out.last_hidden_state[:, 0] if kind == "dinov2" else out.image_embeds
    return embed
