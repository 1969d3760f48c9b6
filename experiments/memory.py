"""What training takes in GPU memory at the published sizes, counted without weights, without a GPU and without the memory.

    python experiments/memory.py                                 # all bases, a few minutes on one core
    python experiments/memory.py --bases sd15,sit --lora 8

Every network is built from its published numbers out of tensors that have a shape and no content (torch's FakeTensorMode). One update's forward and
backward run on them, and each storage is counted from its making to its end: what the forward keeps for the backward, what bfloat16 autocast copies,
temporaries, recomputation (--checkpointing), gradients. Micro-batches of several sizes give a fixed part and a part for each (rollout, step) pair:
    learns      numbers that are trained: a LoRA, then all weights
    fixed       float32 weights, gradients, AdamW's two moments and the two averages of the snapshots (of what learns), the VAE, copies by autocast
    a pair      what one pair more in --train_batch takes; guidance runs the network on two inputs a pair
The size of a group is no matter of these, since micro-batches sum their gradients. What a rollout adds waits for the update:
    trajectory  T + 1 latents and T predictions, float32; with --offload they wait in the memory of the CPU
    condition   its prompt's embeddings and their noise        picture   decoded, for the rewards        decode   of one picture more in --decode_batch
Left out: the CUDA context and the allocator's fragments (`RESERVE` stands for both), text encoders (dropped before training, unless what they make
of the prompts is more than 8 GB), reward and feature networks, guides, workspaces of convolutions, and what --ema and --kl without --lora add (what
learns, and the network, once more).
The attention kernel counted is one that keeps no matrix of pixels by pixels, except EDM2's, which is spelled out. Nothing here was measured on a GPU.
"""
import sys
import weakref
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from bases import edm2  # noqa: E402
import bases  # noqa: E402
from bases import sit  # noqa: E402
from support import flags  # noqa: E402
from bases.lora import add_lora  # noqa: E402
from support.averages import EMA_LENGTHS  # noqa: E402

GB, RESERVE, GPUS = 2**30, 1.5, (24, 40, 80)                             # GB kept free, GB of the GPUs
SIZES = (1, 256, 512)                                                    # pictures in the forwards that are counted; each costs the same
VAE = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
UNET = dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8)
MMDIT = dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, num_attention_heads=24, attention_head_dim=64,
             joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=384, qk_norm="rms_norm",
             dual_attention_layers=tuple(range(13)))


@dataclass
class Args:
    # what is counted
    bases: str = "sd15,sd35-1024,sd35-512,sit,edm2"  # of these
    lora: int = 32                                  # rank; the other rows train all weights
    steps: int = 10                                 # T of a trajectory


# ---------------------------------------------------------------------------------------------------------------------
# Counting.

class Live(TorchDispatchMode):
    """Within the block: bytes of the storages that are alive now, and their peak, of those that were made in it."""

    def __enter__(self):
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        storages = lambda tree: [t.untyped_storage() for t in tree_iter(tree) if isinstance(t, torch.Tensor)]
        self.known.update(storages((args, kwargs)))                      # there before: a view of a weight is no new memory
        out = function(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def gone(self, size):
        self.now -= size


@contextmanager
def as_on_cuda():
    """The tensors without content say that they are on the CPU; on a GPU, autocast runs these in float32."""
    wide = lambda function: lambda x, *args, **more: function(x.float() if x.dtype == torch.bfloat16 else x, *args, **more)
    with ExitStack() as stack:
        for owner, name in ((functional, "group_norm"), (functional, "layer_norm"), (functional, "softmax"), (torch.Tensor, "softmax"), (torch.Tensor, "pow"),
                            (torch, "rsqrt")):
            stack.enter_context(patch.object(owner, name, wide(getattr(owner, name))))
        yield


def hollow(network):
    """Puts tensors without content in the place of a network's own, within FakeTensorMode."""
    for module in network.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    kind[name] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return network


def peak(network, inputs, call, train=True):
    """Bytes at most alive during call(network, *inputs), beside the weights and the inputs; if `train`, under autocast and with the backward of the second
    of two micro-batches, which finds the gradients of the first."""
    with Live() as live, torch.set_grad_enabled(train):
        for _ in range(1 + train):
            with torch.autocast("cpu", torch.bfloat16, enabled=train):
                out = call(network, *inputs)
            if train:
                out.square().sum().backward()
            del out
    network.zero_grad()
    return live.peak


def line(peaks):
    """Peaks {n: bytes} of 1 and of two large numbers of pictures -> bytes of the fixed part and of a picture, a line that no peak is above.

    A peak is the largest of several moments, each linear in n, so its slope only grows with n: the last one and the peak of 1 bound all of them."""
    one, few, many = sorted(peaks)
    slope = (peaks[many] - peaks[few]) / (many - few)
    return max(peaks[many] - many * slope, peaks[one] - slope), slope


# ---------------------------------------------------------------------------------------------------------------------
# The bases: network, shapes of a latent and of a prompt's embeddings, how it is called, picture's side.

def open_base(name):
    """-> network on the meta device, latent's shape, shapes of the embeddings, call(network, x_t, t, *embeddings), VAE on the meta device."""
    import diffusers
    side = int(name.split("-")[1]) // 8 if name.startswith("sd35") else {"sd15": 64, "sit": 32, "edm2": 64}[name]
    channels = 16 if name.startswith("sd35") else 4
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(**VAE, latent_channels=channels)
        if name == "sd15":
            network, prompt = diffusers.UNet2DConditionModel(**UNET), [(77, 768)]
            call = lambda network, x, t, y: network(x, t, encoder_hidden_states=y, return_dict=False)[0]
        elif name.startswith("sd35"):
            network, prompt = diffusers.SD3Transformer2DModel(**MMDIT), [(333, 4096), (2048,)]
            call = lambda network, x, t, y, pooled: network(x, y, pooled, t, return_dict=False)[0]
        elif name == "sit":
            network, prompt, call = sit.SiT(32, 2, 4, *sit.SIZES["XL"], 1000), [(1152,)], lambda network, x, t, y: network(x, t, y)
        else:                                                            # EDM2-S for ImageNet-512
            network, prompt = edm2.EDM2(64, 4, 1000, 192, [1, 2, 3, 4], 3, [16, 8]), [(768,)]
            call = lambda network, x, t, y: network(x, t, embedding=y)
    return network.eval(), (channels, side, side), prompt, call, vae.eval()


def count(name, rank, checkpointing):
    """-> bytes of the fixed part and of a pair, and how many numbers learn, in one way to train a base."""
    network, shape, prompt, call, vae = open_base(name)
    trained = add_lora(network, rank, rank).values() if rank else network.requires_grad_(True).parameters()
    learning, weights = (sum(p.numel() for p in ps) for ps in (trained, [*network.parameters(), *network.buffers(), *vae.parameters()]))
    if checkpointing:
        bases.recompute(network)
    with FakeTensorMode(), as_on_cuda():
        hollow(network)
        fixed, pair = line({n: peak(network, [torch.empty(n, *shape), torch.ones(n), *(torch.empty(n, *size) for size in prompt)], call) for n in SIZES})
    fixed = max(fixed, 8 * learning)                                     # gradients, and one more of them in the all-reduce and in AdamW's step
    return 4 * (weights + learning * (2 + len(EMA_LENGTHS))) + fixed, pair, learning


def count_rollout(name, steps):
    """-> bytes of a rollout that wait for the update: trajectory, condition; of its picture; of one picture more in the VAE's decoder."""
    _, shape, prompt, _, vae = open_base(name)
    with FakeTensorMode():
        hollow(vae)
        _, decode = line({n: peak(vae, [torch.empty(n, *shape)], lambda vae, z: vae.decode(z, return_dict=False)[0], train=False) for n in SIZES})
    return 4 * (2 * steps + 1) * prod(shape), 4 * 2 * sum(map(prod, prompt)), 4 * 3 * 64 * prod(shape[1:]), decode


def fits(gpu, fixed, each):
    """How many of `each` bytes fit beside `fixed` on a GPU of `gpu` GB."""
    return max(0, int(((gpu - RESERVE) * GB - fixed) // each))


def main(argv=None):
    args, known = flags.parse_args(Args, __doc__, argv), Args.bases.split(",")
    bases = args.bases.split(",")
    if wrong := [name for name in bases if name not in known]:
        flags.refuse(f"--bases {args.bases}: {wrong[0]!r} is none of {', '.join(known)}")
    if args.lora < 1 or args.steps < 1:
        flags.refuse(f"--lora {args.lora} --steps {args.steps}: must be 1 at least")
    gpus = "".join(f"{f'{gpu} GB':>17}" for gpu in GPUS)
    print(f"bfloat16; the largest --train_batch without guidance, and with it\n{'':11}{'learns':>14}{'recompute':>11}{'fixed':>9}{'a pair':>11}{gpus}")
    room = {}                                                            # what a micro-batch of one guided pair takes
    for name in bases:
        for rank, checkpointing in ((args.lora, False), (args.lora, True), (0, False), (0, True)):
            fixed, pair, learning = count(name, rank, checkpointing)
            most = [fits(gpu, fixed, pair) for gpu in GPUS]
            print(f"{name:11}{learning / 1e6:>12.1f} M{'yes' if checkpointing else 'no':>11}{fixed / GB:>6.1f} GB{pair / 2**20:>8.0f} MB"
                  + "".join(f"{f'{n} / {n // 2}':>17}" for n in most), flush=True)
            if rank and checkpointing:
                room[name] = fixed + 2 * pair
    print(f"\nthe most rollouts of a process beside --lora {args.lora} --checkpointing --train_batch 1, and with --offload; T = {args.steps}, MB each\n"
          f"{'':11}{'trajectory':>12}{'condition':>11}{'picture':>9}{'decode':>8}{gpus}")
    for name in bases:
        trajectory, condition, picture, decode = count_rollout(name, args.steps)
        most = [(fits(gpu, room[name], trajectory + condition + picture), fits(gpu, room[name], condition + picture)) for gpu in GPUS]
        print(f"{name:11}{trajectory / 2**20:>12.2f}{condition / 2**20:>11.2f}{picture / 2**20:>9.2f}{decode / 2**20:>8.0f}"
              + "".join(f"{f'{here} / {offloaded}':>17}" for here, offloaded in most))


if __name__ == "__main__":
    main()
