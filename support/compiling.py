"""What torch.compile needs (--compile)."""

from contextlib import nullcontext

import torch


def compile_network(network):
    """Compiles a network in place, so that no name of a weight changes.

    Rollout and update are two graphs and must round nearly alike: to bfloat16 where the plain
    network does, and each size of a batch by itself.
    """
    # torch's own limit is 8. A size beyond it would go through the plain network, which rounds
    # otherwise.
    torch._dynamo.config.recompile_limit = 64
    network.compile(dynamic=False, options={"emulate_precision_casts": True})


def recompute_context(attention):
    """Arguments of torch's checkpoint: it recomputes within attention(), except in a compiler."""
    if torch.compiler.is_compiling():  # which takes no context, and needs none
        return {}
    return {"context_fn": lambda: (nullcontext(), attention())}
