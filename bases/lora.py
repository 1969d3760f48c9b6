"""LoRA: a small trainable change of frozen layers, W + alpha / r B A (arXiv 2106.09685, eq. 3).

A is [r, in] and starts as small random numbers; B is [out, r] and starts at zero, so the first
forward is the base's. Both become children of the layer they change: `to_q.lora_A.weight` stands
beside `to_q.weight`, and no name of the base changes.
A linear layer gets alpha / r B (A x) added to its output, so no matrix of W's size is kept for the
backward. An EDM2 layer normalises its weight, so it adds alpha / r B A to the weight before that.
Left out on purpose: 3 x 3 convolutions, text encoders, several LoRAs at once.
"""

import math
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from support.sharding import whole

# The ends of the names of the layers that get a LoRA.
TARGETS = (
    # diffusers' attention
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    # diffusers' feed-forward layers
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    # FLUX.1: a block that does attention and feed-forward at once
    "proj_mlp",
    # Qwen-Image
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
    # SiT
    "attn.qkv",
    "attn.proj",
    "mlp.fc1",
    "mlp.fc2",
    # EDM2
    "attn_qkv",
    "attn_proj",
)

# What diffusers puts before a layer's name in a LoRA file, by the class of the network. Nothing
# before the names of a network that is not here.
PREFIX = {
    "UNet2DConditionModel": "unet.",
    "SD3Transformer2DModel": "transformer.",
    "FluxTransformer2DModel": "transformer.",
    "QwenImageTransformer2DModel": "transformer.",
    "SiT": "transformer.",
    "EDM2": "unet.",
}


def weight_change(layer):
    """alpha / r B A, in the shape of the layer's weight."""
    product = layer.lora_B.weight @ layer.lora_A.weight
    return (layer.lora_scale * product).reshape(layer.weight.shape)


def add_output_change(layer, inputs, output):
    """Forward hook of a linear layer: adds alpha / r B (A x) while the LoRA is on."""
    if not layer.lora_on:
        return output
    return output + layer.lora_scale * layer.lora_B(layer.lora_A(inputs[0]))


def lora_layers(network):
    """The layers that have a LoRA -> {name: layer}."""
    return {name: layer for name, layer in network.named_modules() if hasattr(layer, "lora_A")}


def changes_its_weight(layer):
    """Whether a layer adds `weight_change` to its weight itself: its class has `lora_on`."""
    return hasattr(type(layer), "lora_on")


def can_have_lora(layer):
    """Whether a layer is linear and is called, or changes its weight itself.

    nn.MultiheadAttention reads the weight of its out_proj and never calls that layer.
    """
    is_linear = isinstance(layer, nn.Linear)
    is_read = isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return (is_linear and not is_read) or changes_its_weight(layer)


def target_layers(network, targets):
    """The layers whose names end in one of `targets`, whole between dots -> {name: layer}.

    Raises ValueError for one that cannot have a LoRA.
    """
    ends = tuple("." + target for target in targets)
    layers = {}
    for name, layer in network.named_modules():
        if ("." + name).endswith(ends):
            layers[name] = layer
    for name, layer in layers.items():
        if not can_have_lora(layer):
            raise ValueError(
                f"{name} is a {type(layer).__name__}; "
                "a LoRA fits linear layers, and the layers of EDM2"
            )
    return layers


def empty_linear(inputs, outputs, device):
    """A linear map without bias whose numbers are not set, so none is drawn at random."""
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    return linear.to_empty(device=device)


def add_lora(network, rank, alpha, targets=TARGETS, seed=0):
    """Freezes a network and gives each target layer a LoRA -> its parameters {name: parameter}.

    targets: the ends of names, whole between dots. A is uniform in +-1 / sqrt(in), a function of
    `seed` and the network alone. Raises ValueError if no layer is named so, if one of them cannot
    have a LoRA, if there is one already, or for a bad rank or alpha.

    >>> network, x = nn.ModuleDict({"to_q": nn.Linear(64, 64)}), torch.randn(2, 64)
    >>> before = network["to_q"](x)
    >>> trained = add_lora(network, rank=4, alpha=4)
    >>> sum(p.numel() for p in trained.values())        # of 64 * 64 + 64
    512
    >>> torch.equal(network["to_q"](x), before)         # B = 0: nothing has changed yet
    True
    """
    if not (isinstance(rank, int) and rank >= 1 and math.isfinite(alpha) and alpha > 0):
        raise ValueError(
            f"a LoRA of rank {rank} and alpha {alpha}: give an integer from 1 and a positive number"
        )
    present = list(lora_layers(network))
    if present:
        raise ValueError(
            f"{present[0]} has a LoRA already; fold it into the base first (lora.merged)"
        )
    layers = target_layers(network, targets)
    if not layers:
        raise ValueError(
            f"--lora: no layer's name ends in one of {', '.join(targets) or '(none is linear)'}; "
            "name the layers to train"
        )

    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        outputs = len(layer.weight)
        inputs = layer.weight[0].numel()
        layer.lora_A = empty_linear(inputs, rank, layer.weight.device)
        layer.lora_B = empty_linear(rank, outputs, layer.weight.device)
        uniform = 2 * torch.rand(rank, inputs, generator=generator) - 1
        with torch.no_grad():
            layer.lora_A.weight.copy_(uniform / math.sqrt(inputs))
            layer.lora_B.weight.zero_()
        layer.lora_scale = alpha / rank
        layer.lora_on = True
        if not changes_its_weight(layer):
            layer.register_forward_hook(add_output_change)
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


@contextmanager
def lora_off(network):
    """Within the block the network is the base, bit for bit: the reference policy of the KL.

    It takes no second network in memory. Blocks may lie in one another.
    """
    layers = lora_layers(network).values()
    before = [layer.lora_on for layer in layers]
    try:
        for layer in layers:
            layer.lora_on = False
        yield network
    finally:
        for layer, was_on in zip(layers, before):
            layer.lora_on = was_on


@torch.no_grad()
def merged(network):
    """The network's state dict with every LoRA folded in: the base's names, copies of its tensors.

    Without a LoRA all tensors are as they are. Of a network in pieces (support/sharding.py) the
    first process gets whole tensors. Collective then: call it on every process.
    """
    state = {}
    for name, tensor in network.state_dict().items():
        if ".lora_" not in name:
            state[name] = whole(tensor).detach().clone()
    for name, layer in lora_layers(network).items():
        state[name + ".weight"] += weight_change(layer)
    return state


def export(network, folder, facts):
    """Writes folder/pytorch_lora_weights.safetensors, for diffusers and merge.py.

    diffusers reads it by pipe.load_lora_weights(folder). alpha / r is folded into B, so the file
    means W + B A. facts {name: anything} becomes its metadata, as text. Raises ValueError for a
    network without a LoRA.
    """
    kind = type(network).__name__
    layers = lora_layers(network)
    if not layers:
        raise ValueError(f"a {kind} without a LoRA cannot be exported as one")
    prefix = PREFIX.get(kind, "")
    tensors = {}
    for name, layer in layers.items():
        down = layer.lora_A.weight.detach().float()
        up = layer.lora_B.weight.detach().float() * layer.lora_scale
        tensors[f"{prefix}{name}.lora_A.weight"] = down.cpu().contiguous()
        tensors[f"{prefix}{name}.lora_B.weight"] = up.cpu().contiguous()
    metadata = {key: str(value) for key, value in facts.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / "pytorch_lora_weights.safetensors", metadata)
