"""LoRA: a small trainable change of frozen layers, W + alpha / r B A (arXiv 2106.09685), by hand.

A is r x in and small random numbers, B is out x r and starts at zero, so that the first forward is the base's. Both become children
of the layer they change: `to_q.lora_A.weight` stands beside `to_q.weight`, and no name of the base changes.
A linear layer gets alpha / r B (A x) added to its output, which keeps no matrix of W's size for the backward. A layer of EDM2 counts
by its weight's direction alone, so there the change goes into the weight, before it is normalised: the same as in the merged network.
Left out: 3 x 3 convolutions, text encoders, several LoRAs at once.
"""
import math
import torch
from contextlib import contextmanager
from pathlib import Path
from safetensors.torch import save_file
from torch import nn
from types import SimpleNamespace
from bases.edm2 import Layer
from support.sharding import whole

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",       # attention of diffusers
           "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",                         # and its feed-forward
           "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "attn_qkv", "attn_proj")                           # SiT; EDM2
PREFIX = {"UNet2DConditionModel": "unet.", "SD3Transformer2DModel": "transformer.", "SiT": "transformer.", "EDM2": "unet."}


class LoraLayer(Layer):
    """EDM2's layer with its change, if there is one now, in the weight."""

    def forward(self, x, gain=1.0):
        weight = self.weight + change(self) if self.lora_on else self.weight
        return Layer.forward(SimpleNamespace(weight=weight), x, gain)


def change(layer):
    """alpha / r B A, in the shape of the layer's weight."""
    return (layer.lora_scale * (layer.lora_B.weight @ layer.lora_A.weight)).reshape(layer.weight.shape)


def add_change(layer, args, output):
    """The forward hook of a linear layer. No output of its own means: leave it as it is."""
    return output + layer.lora_scale * layer.lora_B(layer.lora_A(args[0])) if layer.lora_on else None


def changed(network):
    """The layers that have a LoRA, by name."""
    return {name: layer for name, layer in network.named_modules() if hasattr(layer, "lora_A")}


def add_lora(network, rank, alpha, targets=TARGETS, seed=0):
    """Freezes the network and gives each target layer a LoRA -> its trainable parameters, {name: parameter}, in the network's order.

    targets are the ends of names, whole between dots. A is uniform up to 1 / sqrt(in), a function of `seed` and the network alone. Raises
    ValueError if no layer is meant, if one that is meant cannot have a LoRA, if there is one already, or for a bad rank or alpha.

    >>> network, x = nn.ModuleDict({"to_q": nn.Linear(64, 64)}), torch.randn(2, 64)
    >>> before, learns = network["to_q"](x), add_lora(network, rank=4, alpha=4)
    >>> sum(p.numel() for p in learns.values()), torch.equal(network["to_q"](x), before)      # of 64 * 64 + 64; and B = 0: nothing has changed yet
    (512, True)
    """
    if not (isinstance(rank, int) and rank >= 1 and math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"a LoRA of rank {rank} and alpha {alpha}: give an integer from 1 and a positive number")
    if there := changed(network):
        raise ValueError(f"{next(iter(there))} has a LoRA already; fold it into the base first (lora.merged)")
    layers = {name: layer for name, layer in network.named_modules() if ("." + name).endswith(tuple("." + t for t in targets))}
    if odd := [name for name, layer in layers.items() if not isinstance(layer, (nn.Linear, Layer))]:
        raise ValueError(f"{odd[0]} is a {type(layers[odd[0]]).__name__}; a LoRA fits linear layers, and the layers of EDM2")
    if not layers:
        raise ValueError(f"no layer's name ends in one of {', '.join(targets)}; name the layers that shall learn")
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        weight, wide = layer.weight, layer.weight[0].numel()
        layer.lora_A, layer.lora_B = (nn.Linear(*size, bias=False, device="meta").to_empty(device=weight.device)
                                      for size in ((wide, rank), (rank, len(weight))))
        with torch.no_grad():
            layer.lora_A.weight.copy_((2 * torch.rand(rank, wide, generator=generator) - 1) / math.sqrt(wide))
            layer.lora_B.weight.zero_()
        layer.lora_scale, layer.lora_on = alpha / rank, True
        if isinstance(layer, Layer):
            layer.__class__ = LoraLayer
        else:
            layer.register_forward_hook(add_change)
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


@contextmanager
def lora_off(network):
    """The base, bit for bit, for as long as the block lasts: the reference policy, without a second network in memory."""
    layers = changed(network).values()
    before = [layer.lora_on for layer in layers]
    try:
        for layer in layers:
            layer.lora_on = False
        yield network
    finally:
        for layer, on in zip(layers, before):
            layer.lora_on = on


@torch.no_grad()
def merged(network):
    """The network's state dict with every LoRA folded in: the base's names, and copies of its tensors. Without a LoRA: all as it is.

    Of a network in pieces (sharding.py), whole tensors on the first process; the others must come here too."""
    state = {name: whole(tensor).detach().clone() for name, tensor in network.state_dict().items() if ".lora_" not in name}
    for name, layer in changed(network).items():
        state[name + ".weight"] += change(layer)
    return state


def export(network, folder, facts):
    """Writes folder/pytorch_lora_weights.safetensors, which `pipe.load_lora_weights(folder)` of diffusers and merge.py read.

    alpha / r is folded into B, so the file means W + B A. facts, {name: anything}, becomes its metadata as text. Raises ValueError
    for a network without a LoRA, or of no family known here.
    """
    if not changed(network) or type(network).__name__ not in PREFIX:
        raise ValueError(f"a {type(network).__name__} with {len(changed(network))} LoRA layers cannot be exported; known: {', '.join(PREFIX)}")
    tensors = {}
    for name, layer in changed(network).items():
        for part, scale in (("lora_A", 1), ("lora_B", layer.lora_scale)):
            weight = getattr(layer, part).weight.detach().float() * scale
            tensors[f"{PREFIX[type(network).__name__]}{name}.{part}.weight"] = weight.cpu().contiguous()
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / "pytorch_lora_weights.safetensors", {key: str(value) for key, value in facts.items()})
