"""Compiling: everything that --compile needs besides torch.compile itself.

Rollout and update are two graphs, and the first ratio is 1 only if both round alike. So the
compiled network rounds to bfloat16 where the plain one does, and each batch size is a graph of its
own. What a compiler gets wrong no ratio shows, because rollout and update are wrong alike: so the
gradient is compared with the plain network's, once, before the training.
"""

from contextlib import nullcontext

import torch

# The largest |ratio - 1| before the first update, by precision, where the network is compiled.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}

# The largest relative error of a compiled gradient, by precision.
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


def compile_network(network):
    """Compiles a network in place, so that no name of a weight changes."""
    # torch allows 8 sizes; at the ninth the plain network would take over, which rounds otherwise.
    torch._dynamo.config.recompile_limit = 64
    network.compile(dynamic=False, options={"emulate_precision_casts": True})


def recompute_context(attention):
    """The keyword arguments with which torch's checkpoint recomputes within attention().

    A compiler accepts no such context, and needs none.
    """
    if torch.compiler.is_compiling():
        return {}
    return {"context_fn": lambda: (nullcontext(), attention())}


def check_gradients(model, prompt, trained):
    """Raises ValueError if compiling changes the gradient of the parameters `trained`.

    model: a generator with a compiled network. prompt: embeddings [B, ...]; the first is used.
    The loss is that of two states of noise, at two times within the path.
    """
    trained = list(trained)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *model.shape, generator=generator).to(model.device)
    t = model.path.times(4)[1:3].float().to(model.device)
    prompt = tuple(embedding[:1].expand(2, *embedding.shape[1:]) for embedding in prompt)

    gradients = []
    compiled_call = model.network._compiled_call_impl
    for implementation in (None, compiled_call):
        model.network._compiled_call_impl = implementation
        x0_hat, _ = model(x_t, t, prompt)
        loss = (x0_hat * x_t).mean()
        gradients.append(flat_gradient(loss, trained))

    plain, compiled = gradients
    error = ((compiled - plain).norm() / plain.norm()).item()
    if not error < GRADIENT_TOLERANCE[model.precision]:  # NaN is an error, too
        raise ValueError(
            f"--compile: torch.compile gets the gradient of this network wrong here, by "
            f"{error:.1%} of its length; leave it out"
        )


def flat_gradient(loss, parameters):
    """The gradient of a loss with respect to all parameters, as one vector."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    parts = []
    for parameter, gradient in zip(parameters, gradients):
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        parts.append(gradient.flatten())
    return torch.cat(parts)


def check_sizes(args, processes, stochastic):
    """Raises ValueError if batch sizes would change with every iteration, each a new graph.

    stochastic: the number of steps in --window. One process always has the same sizes. Several have
    them if a minibatch has each rollout equally often, and each process keeps equally many.
    """
    if not args.compile or processes < 2:
        return
    equal_steps = stochastic % args.updates == 0
    equal_rollouts = args.select == "all" or args.prompts_per_step % processes == 0
    if not (equal_steps and equal_rollouts):
        raise ValueError(
            f"--compile: code is made for each size of a batch, and {processes} processes would "
            f"have others at each iteration; let --updates divide the {stochastic} steps of "
            "--window and, unless --select is all, the processes divide --prompts_per_step"
        )
