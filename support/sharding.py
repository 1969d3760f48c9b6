"""Sharding: a network that is trained whole but held in pieces, one for each process, as a model needs whose training fits no single GPU (--shard).

Each block's weights are gathered just before it runs and let go right after; the backward adds its gradients up over the processes and leaves
each process its own piece, and so the optimizer holds pieces of its state: 16 bytes a parameter become 16 / processes (ZeRO, arXiv 1910.02054;
FSDP, arXiv 2304.11277; torch's fully_shard). The price is that all processes must run the same forwards, so their shares must be equal
(`checks.py`). Left out: loading in pieces (the network is read whole, 4 bytes a parameter, and then dealt), shards within hosts and copies across.
"""
import torch
import torch.distributed as dist
from torch import nn

def shard(network):
    """Deals the weights of a network over the processes, in place, block by block -> its parameters, {name: parameter}, now pieces (DTensor).

    A block is an entry of an outermost list of modules: a transformer's layer, a level of a U-Net. Gradients become sums over the processes."""
    from torch.distributed.device_mesh import init_device_mesh           # here, because these two take a second to import
    from torch.distributed.fsdp import FSDPModule, fully_shard
    mesh = init_device_mesh(next(network.parameters()).device.type, (dist.get_world_size(),))
    for block in (*blocks(network), network):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)        # or the root would keep, and use, weights that `swapped` has changed since
    for module in network.modules():
        if isinstance(module, FSDPModule):                               # the loss is a mean over all processes' pairs already
            module.set_gradient_divide_factor(1.0), module.set_force_sum_reduction_for_comms(True)
    return dict(network.named_parameters())


def blocks(module):
    """The entries, with weights, of the outermost lists of modules within a module.

    >>> blocks(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(1, 1), nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), nn.Tanh()])))
    [Linear(in_features=1, out_features=1, bias=True), Sequential(
      (0): ModuleList(
        (0): Linear(in_features=2, out_features=2, bias=True)
      )
    )]
    """
    inside = [[*child.children()] if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else blocks(child) for child in module.children()]
    return [block for found in inside for block in found if any(True for _ in block.parameters())]


def is_piece(tensor):
    return hasattr(tensor, "placements")


def whole(tensor):
    """All of a tensor that may be held in pieces: on the CPU of the first process, and nothing on the others. A whole one comes back as it is.

    Every process must come here in the same order."""
    if not is_piece(tensor):
        return tensor
    full = tensor.detach().full_tensor()
    return full.cpu() if dist.get_rank() == 0 else torch.empty(0)


def piece(full, like):
    """This process's piece of a whole tensor, dealt as `like` is; each process has the whole one, from the same file."""
    if not is_piece(like):
        return full
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local(tensor):
    """What of a tensor lies on this process."""
    return tensor.to_local() if is_piece(tensor) else tensor


def clip_gradients(parameters, largest):
    """Scales gradients to a norm of `largest` at most, over all pieces -> the norm they had, a number."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
    return (norm.full_tensor() if is_piece(norm) else norm).item()


def whole_state(optimizer):
    """The state_dict of an optimizer with its tensors whole (see `whole`)."""
    saved = optimizer.state_dict()
    return saved | {"state": {i: {name: whole(value) for name, value in found.items()} for i, found in saved["state"].items()}}


def load_state(optimizer, saved):
    """Gives an optimizer a state with whole tensors, of which it takes its pieces."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    dealt = lambda value, p: piece(value, p) if value.shape == p.shape else value           # the step counter is a number
    optimizer.load_state_dict(saved | {"state": {i: {name: dealt(value, parameters[i]) for name, value in found.items()} for i, found in saved["state"].items()}})
