"""The bases: load(name) and check(name)."""
import functools
import torch
from contextlib import nullcontext
from torch.utils.checkpoint import checkpoint
from bases import edm2
from bases import sit
from bases.edm2 import EDM2Generator
from bases.files import OWN, _check_channels, _check_part, _check_pipeline, class_names, locate, stated_heads
from bases.sit import SiTGenerator
from bases.stable_diffusion import StableDiffusion, StableDiffusion3
from support.compiling import compile_network, recompute_context

def load(name, device="cpu", precision="float32", checkpointing=False, decode_batch=8, compile=False):
    """Loads a model for training: weights in float32, forwards under bfloat16 autocast if precision says so.

    checkpointing: recompute in the backward instead of keeping activations; decode_batch: pictures that the VAE decodes at once. Both
    are for memory only. compile: by torch.compile, in place, so that no name of a weight changes. Raises ValueError, in one line, as
    `check` does, or if the weights turn out not to be those of their config.
    """
    check(name)
    kind, folder, file, guide = locate(name)
    adapter = {"StableDiffusionPipeline": StableDiffusion, "StableDiffusion3Pipeline": StableDiffusion3, "sit": SiTGenerator, "edm2": EDM2Generator}[kind]
    model = adapter(file or folder, torch.device(device), precision, decode_batch, *([guide] if guide else []))
    if compile:
        compile_network(model.network)
    if checkpointing:
        recompute(model.network, model.attention)
    return model


def recompute(network, attention=nullcontext):
    """Has a network keep only what goes into its blocks, and compute their activations again in the backward, within attention()."""
    again = functools.partial(_again, attention)
    blocks = [module for module in network.modules() if isinstance(module, (sit.Block, edm2.Block))]
    for block in blocks:
        block.forward = functools.partial(_recomputed, again, block.forward)    # a bound method in a partial: deepcopy binds it to the copy
    if not blocks:
        network.enable_gradient_checkpointing(again)


def _again(attention, *call):
    return checkpoint(*call, use_reentrant=False, **recompute_context(attention))


def _recomputed(again, forward, *inputs):
    return again(forward, *inputs) if torch.is_grad_enabled() else forward(*inputs)


def check(name):
    """Raises ValueError, in one line, if `name` is not a model that `load` can read. Returns its folder.

    Of safetensors and .pt files only the headers are read; a .pkl has none, so it is read whole (and nothing in it is run).
    """
    try:
        kind, folder, file, guide = locate(name)
        if kind in OWN:
            _check_own(kind, folder, file, guide)
        else:
            _check_pipeline(folder, kind)
    except (ValueError, OSError) as error:
        raise ValueError(f"--model {name}: {error}") from None
    return folder


def _check_own(kind, folder, file, guide):
    if kind == "sit":
        config = sit.check(file, stated_heads(file))
        channels, classes, vae = config["in_channels"], config["num_classes"], "stabilityai/sd-vae-ft-ema"
    else:
        config = edm2.check(file)[1]
        channels, classes, vae = config["img_channels"], config["label_dim"], "stabilityai/sd-vae-ft-mse"
        other = edm2.check(guide)[1] if guide else config
        for key in ("img_resolution", "img_channels", "label_dim"):
            if other[key] not in (config[key], 0):                       # without classes it is the unconditional network
                raise ValueError(f"{guide}: has {key} {other[key]}, and {file.name} {config[key]}; give a guide of the same data")
    if not classes:
        raise ValueError(f"{file}: has no classes, which are its prompts here; give a class-conditional network")
    if not (folder / "vae").is_dir():
        raise ValueError(f"{folder / 'vae'} is missing, which decodes its latents; get it by hf download {vae} --local-dir {folder / 'vae'}")
    _check_channels(channels, _check_part(folder / "vae"))
    class_names(folder, classes)
