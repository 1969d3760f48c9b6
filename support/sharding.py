"""Sharding: a network that is trained whole but held in pieces, one on each process (--shard).

Each block's weights are gathered just before it runs and freed right after. The backward sums its
gradients over the processes and leaves each process its own piece, so the optimizer holds pieces of
its state: 16 bytes a parameter become 16 / processes (ZeRO, arXiv 1910.02054; FSDP, arXiv
2304.11277; torch's fully_shard). The price: all processes must run the same forwards, so their
shares must be equal (commands/checks.py).
Left out on purpose: loading in pieces (the network is read whole, 4 bytes a parameter, and then
distributed), and shards within hosts with copies across.
"""

import torch
import torch.distributed as dist
from torch import nn

LISTS = (nn.ModuleList, nn.ModuleDict)


def shard(network):
    """Distributes the weights of a network over the processes, in place, block by block.

    -> its parameters, {name: parameter}, now pieces (DTensor), whose gradients are sums over the
    processes. A block is an entry of an outermost list of modules: a layer of a transformer, a
    level of a U-Net.
    """
    # Not at the top: these two take a second to import.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    device_type = next(network.parameters()).device.type
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    # Of blocks, those parts that the network also calls outside of them.
    alone = getattr(network, "called_alone", [])
    for block in (*alone, *blocks(network), network):
        # Without the reshard the root would keep weights that `swapped` has changed since.
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            # A sum, not a mean: the loss is a mean over the pairs of all processes already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return dict(network.named_parameters())


def blocks(module):
    """The entries that have weights of the outermost lists of modules within a module.

    >>> network = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(1, 1), nn.Tanh()]))
    >>> blocks(network)
    [Linear(in_features=1, out_features=1, bias=True)]
    """
    entries = []
    for child in module.children():
        if isinstance(child, LISTS):
            entries += flat(child)
        else:
            entries += blocks(child)
    return [entry for entry in entries if next(entry.parameters(), None) is not None]


def flat(modules):
    """The entries of a list of modules, and those of lists within it: a list has no forward."""
    entries = []
    for entry in modules.children():
        entries += flat(entry) if isinstance(entry, LISTS) else [entry]
    return entries


def is_piece(tensor):
    """Is it a piece (DTensor) of a tensor that the processes share?"""
    return hasattr(tensor, "placements")


def whole(tensor):
    """All of a tensor that may be a piece. Collective: call on every process, in the same order.

    A piece becomes whole on the CPU of the first process, and empty on the others. Any other tensor
    comes back as it is.
    """
    if not is_piece(tensor):
        return tensor
    full = tensor.detach().full_tensor()
    return full.cpu() if dist.get_rank() == 0 else torch.empty(0)


def piece(full, like):
    """This process's piece of a whole tensor, distributed as `like` is.

    Each process has the whole tensor, from the same file. If `like` is no piece: the whole tensor.
    """
    if not is_piece(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    full = full.to(like.device)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def local(tensor):
    """The part of a tensor that lies on this process."""
    return tensor.to_local() if is_piece(tensor) else tensor


def clip_gradients(parameters, largest):
    """Scales gradients to a norm of at most `largest`, over all pieces -> their norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, largest)
    if is_piece(norm):
        norm = norm.full_tensor()
    return norm.item()


def whole_state(optimizer):
    """The state_dict of an optimizer with whole tensors. Collective, as `whole` is."""
    saved = optimizer.state_dict()
    state = {}
    for number, values in saved["state"].items():
        state[number] = {name: whole(value) for name, value in values.items()}
    return saved | {"state": state}


def load_state(optimizer, saved):
    """Gives an optimizer the state that `whole_state` returned, of which it takes its pieces."""
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    state = {}
    for number, values in saved["state"].items():
        state[number] = {}
        for name, value in values.items():
            has_pieces = value.shape == parameters[number].shape  # the step counter has none
            state[number][name] = piece(value, parameters[number]) if has_pieces else value
    optimizer.load_state_dict(saved | {"state": state})
