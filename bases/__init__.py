"""Base models by name: load(name) -> a Generator (generator.py), check(name) -> its folder.

Names are those of files.py: a folder, a hub id, sit:FILE, edm2:FILE, module:Class:PATH.
"""

import functools
from contextlib import nullcontext

import torch
from torch.utils.checkpoint import checkpoint

from bases import edm2, plug, prompt_lengths, sit
from bases.dit import DiT
from bases.edm2 import EDM2Generator
from bases.files import (
    PIPELINES,
    PLUG,
    check_channels,
    check_part,
    check_pipeline,
    check_regular_files,
    class_names,
    copied_folders,
    locate,
    stated_heads,
)
from bases.flux import Flux
from bases.generator import attention_kernel
from bases.qwen_image import QwenImage
from bases.sit import SiTGenerator
from bases.stable_diffusion import StableDiffusion, StableDiffusion3
from bases.stable_diffusion_xl import StableDiffusionXL
from support.compiling import compile_network, recompute_context
from support.sharding import blocks

# The class of each pipeline of diffusers.
CLASSES = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "QwenImagePipeline": QwenImage,
    "DiTPipeline": DiT,
}


def load(
    name,
    device="cpu",
    precision="float32",
    checkpointing=False,
    decode_batch=8,
    compile=False,
):
    """Loads a base for training: weights in float32, forwards in `precision` (see generator.py).

    checkpointing: recompute activations in the backward; decode_batch: pictures that the VAE
    decodes at once. Both change memory only. compile: by torch.compile, in place. Raises
    ValueError, in one line, as `check` does, or if the weights are not those of their config.
    """
    check(name)
    location = locate(name)
    options = (torch.device(device), precision, decode_batch)
    if location.kind in CLASSES:
        model = CLASSES[location.kind](location.folder, *options)
    elif location.kind == "sit":
        model = SiTGenerator(location.file, *options)
    elif location.kind == "edm2":
        model = EDM2Generator(location.file, *options, location.guide)
    else:
        model = plug.load(location, *options)
    if compile:
        compile_network(model.network)
    if checkpointing:
        # No bound method here: a copy of the network would copy the whole model with it.
        attention = functools.partial(attention_kernel, model.device, model.precision)
        recompute(model.network, attention)
    return model


def recompute(network, attention=nullcontext):
    """Keeps only the inputs of a network's blocks, in place: activation checkpointing.

    The backward computes the blocks' activations again, within the context attention(). A block is
    an entry of an outermost list of modules that has layers of its own; a network without such a
    list is one block.
    """
    again = functools.partial(_checkpointed, attention)
    if hasattr(network, "enable_gradient_checkpointing"):  # a network of diffusers
        network.enable_gradient_checkpointing(again)
        return
    own_blocks = [block for block in blocks(network) if any(block.children())]
    for block in own_blocks or [network]:
        # A bound method within a partial: deepcopy binds it to the copy of the block.
        block.forward = functools.partial(_forward, again, block.forward)


def _checkpointed(attention, block, *inputs, **named):
    """block(*inputs, **named), whose backward computes it again."""
    context = recompute_context(attention)
    return checkpoint(block, *inputs, use_reentrant=False, **named, **context)


def _forward(again, forward, *inputs, **named):
    """A block's forward: checkpointed where there is a backward to come."""
    if torch.is_grad_enabled():
        return again(forward, *inputs, **named)
    return forward(*inputs, **named)


def check(name):
    """Raises ValueError, in one line, if `name` is not a model that `load` can read -> its folder.

    Of safetensors and .pt files only the headers are read. A .pkl has none, so it is read whole;
    nothing in it is run.
    """
    try:
        location = locate(name)
        kind, file = location.kind, location.file
        if kind != PLUG:
            check_regular_files(copied_folders(name))
        if kind in PIPELINES:
            check_pipeline(location.folder, kind)
        elif kind == PLUG:
            plug.check(location)
        elif kind == "sit":
            config = sit.check(file, stated_heads(file))
            _check_beside(file, config["in_channels"], config["num_classes"], "sd-vae-ft-ema")
        else:
            config = _check_edm2(file, location.guide)
            _check_beside(file, config["img_channels"], config["label_dim"], "sd-vae-ft-mse")
    except (ValueError, OSError) as error:
        raise ValueError(f"--model {name}: {error}") from None
    return location.folder


def cut_prompts(name, texts):
    """The prompts that a model's text encoders cut off -> {tokenizer folder: Cut}."""
    location = locate(name)
    if location.kind not in PIPELINES:
        return {}
    return prompt_lengths.cut_prompts(location.folder, location.kind, texts)


def _check_edm2(file, guide):
    """The arguments of EDM2 in a file, and whether those of its guide, if any, fit them."""
    _, config = edm2.check(file)
    if guide:
        _, guide_config = edm2.check(guide)
        for key in ("img_resolution", "img_channels", "label_dim"):
            # A guide without classes is the unconditional network.
            if guide_config[key] not in (config[key], 0):
                raise ValueError(
                    f"{guide}: has {key} {guide_config[key]}, and {file.name} {config[key]}; "
                    "give a guide of the same data"
                )
    return config


def _check_beside(file, channels, classes, vae_name):
    """What lies beside the file of a class-conditional network: vae/ and perhaps classes.txt.

    vae_name: the VAE of the published networks, on the hub.
    """
    if not classes:
        raise ValueError(
            f"{file}: has no classes, which are its prompts here; give a class-conditional network"
        )
    vae = file.parent / "vae"
    if not vae.is_dir():
        raise ValueError(
            f"{vae} is missing, which decodes its latents; "
            f"get it by hf download stabilityai/{vae_name} --local-dir {vae}"
        )
    check_channels(channels, check_part(vae))
    class_names(file.parent, classes)
