"""Processes: what torchrun starts. One process needs no torchrun, and every function here works.

Sizes are global. n samples are dealt to the processes in contiguous shares, results are gathered
in the order of the samples, and gradients are summed by one flat all-reduce. What a sample is
depends on its number alone, so that any number of processes computes the same, to rounding.
A collective is a function that waits for all processes: call it on every one, in the same order.
"""

import math
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist


def start(device="auto", minutes=30):
    """Joins the process group if torchrun started this process -> its torch.device.

    A collective that waits for longer than `minutes` fails.
    """
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if use_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ and not dist.is_initialized():
        # Before the group: an optimizer would import it later, and with it keep the group and its
        # threads alive to the end of the process.
        from torch import _dynamo  # noqa: F401

        backend = "nccl" if use_cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    if use_cuda:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def finish():
    """Leaves the process group."""
    if dist.is_initialized():
        dist.barrier()  # wait until every process is done
        dist.destroy_process_group()


def rank():
    """The number of this process, from 0; also before `start`."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0))


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def peak_memory(device):
    """The most memory that was in use so far, in GB: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --------------------------------------------------------------------------------------------------
# Shares and sums.


def share(n, process=None):
    """The samples of range(n) that belong to a process (default: this one).

    Shares are contiguous, and their sizes differ by one at most.
    """
    if process is None:
        process = rank()
    return range(n * process // world(), n * (process + 1) // world())


def gather(rows, n):
    """Collective: the rows of all processes in order of sample -> [n, ...] on every process.

    rows [len(share(n)), ...]: those of this process.
    """
    if not dist.is_initialized():
        return rows
    sizes = [len(share(n, process)) for process in range(world())]
    padding = rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])
    padded = torch.cat([rows, padding]).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def all_say(value):
    """Collective: the list of what each process gives, any object, in the order of processes."""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def all_sum(tensor):
    """Collective: the sum of a tensor over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_max(number, device):
    """Collective: the largest of a number, or of a tensor of one, over the processes."""
    tensor = torch.as_tensor(number, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def sum_gradients(parameters):
    """Collective: sums gradients over the processes. A parameter without one has zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if not dist.is_initialized():
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    flat = all_sum(flat)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, total in zip(parameters, flat.split(sizes)):
        parameter.grad.copy_(total.view_as(parameter))


def check_equal(weights, device):
    """Collective: raises RuntimeError unless all processes hold the same weights {name: tensor}.

    The sum of each tensor is compared.
    """
    if not dist.is_initialized():
        return
    sums = [weight.detach().double().sum() for weight in weights.values()]
    sums = torch.stack(sums).to(device)
    lowest = sums.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    highest = sums.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    for name, own, *others in zip(weights, sums.tolist(), lowest.tolist(), highest.tolist()):
        for other in others:
            both_nan = math.isnan(own) and math.isnan(other)
            if own != other and not both_nan:
                raise RuntimeError(
                    f"the processes disagree about {name}: {own!r} on process {rank()}, "
                    f"{other!r} on another; the last checkpoint is whole"
                )


# --------------------------------------------------------------------------------------------------
# Signals.


class Interrupt:
    """Within the block SIGTERM and Ctrl-C are noted, not obeyed; `asked` tells all processes."""

    def __enter__(self):
        self.signal = 0
        self.previous = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        """The handler of both signals."""
        self.signal = number

    def asked(self, device):
        """Collective: did any process receive a signal?"""
        number = int(all_max(self.signal, device))
        if number:  # if not, one that came in the meantime stays for the next call
            self.signal = number
        return number > 0

    def leave(self, message):
        """Prints why, and ends the process with the code of one that a signal has stopped."""
        if rank() == 0:
            print(message)
        finish()
        raise SystemExit(128 + self.signal)
