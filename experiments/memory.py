"""Memory in docs/scaling.md: what training takes on a GPU at the published sizes, by counting.

    python experiments/memory.py                         # all bases; a few minutes on one core
    python experiments/memory.py --bases sd15,sit --lora 8

Nothing here was measured on a GPU. Every network is built from its published numbers out of tensors
that have a shape and no content (torch's FakeTensorMode). The forward and backward of an update run
on them, and each storage is counted from its making to its end: what the forward keeps for the
backward, copies by autocast, temporaries, recomputation, gradients. Micro-batches of several sizes
give a fixed part, and a part for each (rollout, step) pair.
    learns      numbers that are trained: a LoRA, then all weights
    fixed       float32 weights and the VAE; of what learns also gradients, AdamW's two moments and
                the two averages of the snapshots
    a pair      one pair more in --train_batch; with guidance a pair is two inputs of the network
The size of a group does not matter, because micro-batches sum their gradients. What a rollout adds
waits for the update:
    trajectory  T + 1 latents and T predictions, float32; with --offload on the CPU
    condition   its prompt's embeddings and their noise
    picture     decoded, for the rewards
    decode      one picture more in --decode_batch
Attention is counted as a kernel that keeps no matrix of pixels by pixels, except EDM2's, which is
spelled out. Left out: the CUDA context and fragments (RESERVE stands for both), text encoders
(dropped before training, unless the prompts' embeddings are more than 8 GB), reward and feature
networks, guides, workspaces of convolutions, --ema (what learns, once more), and --kl without
--lora (the network, once more).
"""

import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import bases  # noqa: E402
from bases import edm2, sit  # noqa: E402
from bases.dit import take_embeddings  # noqa: E402
from bases.lora import add_lora  # noqa: E402
from bases.packed import pack  # noqa: E402
from support import flags  # noqa: E402
from support.averages import EMA_LENGTHS  # noqa: E402

MB = 2**20
GB = 2**30
RESERVE = 1.5  # GB that are kept free
GPUS = (24, 40, 80)  # GB of a GPU
SIZES = (1, 256, 512)  # pictures in the forwards that are counted; all take the same time

# Published sizes, as arguments of diffusers' networks.
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
UNET_XL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
MMDIT = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}

# Functions that autocast runs in float32 on a GPU, and not on a CPU.
IN_FLOAT32 = (
    (functional, "group_norm"),
    (functional, "layer_norm"),
    (functional, "softmax"),
    (torch.Tensor, "softmax"),
    (torch.Tensor, "pow"),
    (torch, "rsqrt"),
)


@dataclass
class Args:
    # what is counted
    bases: str = "sd15,sdxl,sd35-1024,sd35-512,flux-1024,flux-512,qwen-1024,dit,sit,edm2"
    """of these"""
    lora: int = 32
    """rank; the other rows train all weights"""
    steps: int = 10
    """T of a trajectory"""


# --------------------------------------------------------------------------------------------------
# Counting.


class Live(TorchDispatchMode):
    """Within the block: bytes of the storages that were made in it and are alive, and their peak.

    `now` and `peak` hold the numbers.
    """

    def __enter__(self):
        self.now = 0
        self.peak = 0
        self.known = weakref.WeakSet()  # storages that are not to be counted again
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # What goes in was there before: a view of a weight is no new memory.
        self.known.update(storages((args, kwargs)))
        out = function(*args, **kwargs)
        for storage in storages(out):
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def forget(self, size):
        self.now -= size


def storages(tree):
    """The storages of all tensors in nested lists, tuples and dicts."""
    return [leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]


def in_float32(function):
    """The function, with a first input in bfloat16 made float32."""

    def call(x, *args, **kwargs):
        if x.dtype == torch.bfloat16:
            x = x.float()
        return function(x, *args, **kwargs)

    return call


@contextmanager
def as_on_cuda():
    """Autocast as on a GPU, for tensors without content that say that they are on the CPU."""
    with ExitStack() as stack:
        for owner, name in IN_FLOAT32:
            stack.enter_context(patch.object(owner, name, in_float32(getattr(owner, name))))
        yield


def hollow(network):
    """Replaces a network's tensors, in place, by ones without content (within FakeTensorMode)."""
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, tensor.requires_grad)
                tensors[name] = empty
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):  # a table that is no buffer
                setattr(module, name, torch.empty(value.shape, dtype=value.dtype))
    return network


def peak(network, inputs, call, train=True):
    """The most bytes alive during call(network, *inputs), without the weights and the inputs.

    train: under autocast, and with the backward of the second of two micro-batches, which finds the
    gradients of the first in memory.
    """
    with Live() as live, torch.set_grad_enabled(train):
        for _ in range(2 if train else 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=train):
                out = call(network, *inputs)
            if train:
                out.square().sum().backward()
            del out
    network.zero_grad()
    return live.peak


def line(peaks):
    """Peaks {n: bytes} of 1 and of two large n -> fixed, each: a line that no peak is above.

    A peak is the largest of several moments, each linear in n, so its slope only grows with n: the
    last slope and the peak of 1 bound all of them.
    """
    one, few, many = sorted(peaks)
    each = (peaks[many] - peaks[few]) / (many - few)
    fixed = max(peaks[many] - many * each, peaks[one] - each)
    return fixed, each


# --------------------------------------------------------------------------------------------------
# The bases.


class Base(NamedTuple):
    """A base at its published size, on torch's meta device."""

    network: nn.Module
    shape: tuple  # of a latent
    embeddings: list  # shapes of a prompt's embeddings
    call: Callable  # call(network, x_t, t, *embeddings)
    vae: nn.Module


def call_unet(network, x, t, text):
    return network(x, t, encoder_hidden_states=text, return_dict=False)[0]


def call_mmdit(network, x, t, text, pooled):
    return network(x, text, pooled, t, return_dict=False)[0]


def call_unet_xl(network, x, t, text, pooled):
    added = {"text_embeds": pooled, "time_ids": x.new_ones(len(x), 6)}
    return network(x, t, text, added_cond_kwargs=added, return_dict=False)[0]


def call_flux(network, x, t, text, pooled):
    tokens = pack(x)
    places = x.new_zeros(tokens.shape[1], 3)
    text_places = x.new_zeros(text.shape[1], 3)
    return network(
        tokens,
        text,
        pooled,
        t,
        img_ids=places,
        txt_ids=text_places,
        guidance=t,
        return_dict=False,
    )[0]


def call_qwen(network, x, t, text):
    grid = (1, x.shape[2] // 2, x.shape[3] // 2)
    return network(
        pack(x),
        encoder_hidden_states=text,
        encoder_hidden_states_mask=None,
        timestep=t,
        img_shapes=[[grid]] * len(x),
        return_dict=False,
    )[0]


def call_dit(network, x, t, labels):
    return network(x, t, labels, return_dict=False)[0]


def call_sit(network, x, t, label):
    return network(x, t, label)


def call_edm2(network, x, t, label):
    return network(x, t, embedding=label)


def decode(vae, latents):
    if type(vae).__name__ == "AutoencoderKLQwenImage":
        latents = latents[:, :, None]  # a video of one frame
    return vae.decode(latents, return_dict=False)[0]


def open_base(name):
    """-> Base; name is one of Args.bases."""
    import diffusers

    family, _, pixels = name.partition("-")
    with torch.device("meta"):
        if family == "qwen":
            vae = diffusers.AutoencoderKLQwenImage()
        else:
            channels = 16 if family in ("sd35", "flux") else 4
            vae = diffusers.AutoencoderKL(**VAE, latent_channels=channels)
        network, shape, embeddings, call = open_network(family, int(pixels or 512) // 8)
    return Base(network.eval(), shape, embeddings, call, vae.eval())


def open_network(family, side):
    """-> network, shape of a latent, shapes of its prompt's embeddings, how it is called.

    side: of a latent, where the network takes any.
    """
    import diffusers

    if family == "sd15":
        network = diffusers.UNet2DConditionModel(**UNET)
        return network, (4, 64, 64), [(77, 768)], call_unet
    if family == "sdxl":
        network = diffusers.UNet2DConditionModel(**UNET_XL)
        return network, (4, 128, 128), [(77, 2048), (1280,)], call_unet_xl
    if family == "sd35":
        network = diffusers.SD3Transformer2DModel(**MMDIT)
        return network, (16, side, side), [(333, 4096), (2048,)], call_mmdit
    if family == "flux":  # dev: its defaults are the published sizes
        network = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        return network, (16, side, side), [(512, 4096), (768,)], call_flux
    if family == "qwen":  # here, too
        network = diffusers.QwenImageTransformer2DModel()
        return network, (16, side, side), [(256, 3584)], call_qwen
    if family == "dit":  # DiT-XL/2 for ImageNet-256; here, too
        network = diffusers.DiTTransformer2DModel(sample_size=32, out_channels=8)
        take_embeddings(network)
        return network, (4, 32, 32), [(28, 1152)], call_dit
    if family == "sit":
        network = sit.SiT(32, 2, 4, *sit.SIZES["XL"], 1000)
        return network, (4, 32, 32), [(1152,)], call_sit
    # EDM2-S for ImageNet-512
    network = edm2.EDM2(64, 4, 1000, 192, [1, 2, 3, 4], 3, [16, 8])
    return network, (4, 64, 64), [(768,)], call_edm2


def numbers_in(tensors):
    """How many numbers the tensors hold."""
    return sum(tensor.numel() for tensor in tensors)


def count(name, rank, checkpointing):
    """One way to train a base -> bytes of the fixed part and of a pair, how many numbers learn.

    rank 0 trains all weights.
    """
    base = open_base(name)
    network = base.network
    if rank:
        trained = add_lora(network, rank, rank).values()
    else:
        trained = network.requires_grad_(True).parameters()
    learning = numbers_in(trained)
    kept = [*network.parameters(), *network.buffers(), *base.vae.parameters()]
    if checkpointing:
        bases.recompute(network)

    peaks = {}
    with FakeTensorMode(), as_on_cuda():
        hollow(network)
        for n in SIZES:
            embeddings = [torch.empty(n, *shape) for shape in base.embeddings]
            inputs = [torch.empty(n, *base.shape), torch.ones(n), *embeddings]
            peaks[n] = peak(network, inputs, base.call)
    fixed, pair = line(peaks)

    # Gradients, and as much again in the all-reduce and in AdamW's step.
    fixed = max(fixed, 4 * 2 * learning)
    # Weights, AdamW's two moments and the averages.
    weights = numbers_in(kept) + learning * (2 + len(EMA_LENGTHS))
    return 4 * weights + fixed, pair, learning


def count_rollout(name, steps):
    """Bytes of a rollout that wait for the update: trajectory, condition, picture.

    Then those of one picture more in the VAE's decoder.
    """
    base = open_base(name)
    peaks = {}
    with FakeTensorMode():
        hollow(base.vae)
        for n in SIZES:
            latents = torch.empty(n, *base.shape)
            peaks[n] = peak(base.vae, [latents], decode, train=False)
    _, decoded = line(peaks)
    trajectory = 4 * (2 * steps + 1) * prod(base.shape)
    condition = 4 * 2 * sum(prod(shape) for shape in base.embeddings)
    pixels = 64 * prod(base.shape[1:])
    return trajectory, condition, 4 * 3 * pixels, decoded


def fits(gpu, fixed, each):
    """How many times `each` bytes fit beside `fixed` on a GPU of `gpu` GB."""
    free = (gpu - RESERVE) * GB - fixed
    return max(0, int(free // each))


# --------------------------------------------------------------------------------------------------
# The tables.


def two_counts(counts):
    """Pairs of numbers, one for each GPU, as cells of a table."""
    return "".join(f"{f'{first} / {second}':>17}" for first, second in counts)


def print_updates(names, rank, gpus):
    """The first table -> {base: bytes of a micro-batch of one guided pair}, LoRA, recomputed."""
    print("bfloat16; the largest --train_batch without guidance, and with it")
    print(f"{'':11}{'learns':>14}{'recompute':>11}{'fixed':>9}{'a pair':>11}{gpus}")
    smallest = {}
    for name in names:
        for lora in (rank, 0):
            for checkpointing in (False, True):
                fixed, pair, learning = count(name, lora, checkpointing)
                largest = [fits(gpu, fixed, pair) for gpu in GPUS]
                recompute = "yes" if checkpointing else "no"
                print(
                    f"{name:11}{learning / 1e6:>12.1f} M{recompute:>11}{fixed / GB:>6.1f} GB"
                    f"{pair / MB:>8.0f} MB" + two_counts([(n, n // 2) for n in largest]),
                    flush=True,
                )
                if lora and checkpointing:
                    smallest[name] = fixed + 2 * pair
    return smallest


def print_rollouts(names, args, smallest, gpus):
    """The second table, beside an update as small as `smallest` {base: bytes}."""
    print(
        f"\nthe most rollouts of a process beside --lora {args.lora} --checkpointing "
        f"--train_batch 1, and with --offload; T = {args.steps}, MB each"
    )
    print(f"{'':11}{'trajectory':>12}{'condition':>11}{'picture':>9}{'decode':>8}{gpus}")
    for name in names:
        trajectory, condition, picture, decoded = count_rollout(name, args.steps)
        most = []
        for gpu in GPUS:
            kept = fits(gpu, smallest[name], trajectory + condition + picture)
            offloaded = fits(gpu, smallest[name], condition + picture)
            most.append((kept, offloaded))
        print(
            f"{name:11}{trajectory / MB:>12.2f}{condition / MB:>11.2f}{picture / MB:>9.2f}"
            f"{decoded / MB:>8.0f}" + two_counts(most)
        )


def main(argv=None):
    args = flags.parse_args(Args, __doc__, argv)
    names = args.bases.split(",")
    known = Args.bases.split(",")
    for name in names:
        if name not in known:
            flags.refuse(f"--bases {args.bases}: {name!r} is none of {', '.join(known)}")
    if args.lora < 1 or args.steps < 1:
        flags.refuse(f"--lora {args.lora} --steps {args.steps}: must be 1 at least")
    gpus = "".join(f"{f'{gpu} GB':>17}" for gpu in GPUS)
    smallest = print_updates(names, args.lora, gpus)
    print_rollouts(names, args, smallest, gpus)


if __name__ == "__main__":
    main()
