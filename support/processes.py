"""Processes of torchrun."""
import math
import os
import signal
import torch
import torch.distributed as dist
from datetime import timedelta

def start(device="auto", minutes=30):
    """Joins the process group if torchrun started us; -> the device of this process. A collective waits for `minutes` at most."""
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ and not dist.is_initialized():
        from torch import _dynamo  # noqa: F401                          # by an optimizer it would come later, and hold the group and its threads to the end
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=minutes))
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def finish():
    if dist.is_initialized():
        dist.barrier()                                                   # nobody leaves while another still needs him
        dist.destroy_process_group()


class Interrupt:
    """Within the block SIGTERM and Ctrl-C are noted and not obeyed: `asked` tells every process, at a line that all of them reach."""

    def __enter__(self):
        self.signal = 0
        self.before = {s: signal.signal(s, lambda number, frame: setattr(self, "signal", number)) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def asked(self, device):
        if asked := int(all_max(self.signal, device)):                   # else one that came meanwhile stays for the next time
            self.signal = asked
        return asked > 0

    def leave(self, message):
        """Ends the process as a shell expects of one that a signal has stopped."""
        if rank() == 0:
            print(message)
        finish()
        raise SystemExit(128 + self.signal)


def check_equal(weights, device):
    """Raises RuntimeError if the processes do not hold the same weights: a sum of each tensor is compared."""
    if dist.is_initialized():
        mine = torch.stack([value.detach().double().sum() for value in weights.values()]).to(device)
        for kind in (dist.ReduceOp.MIN, dist.ReduceOp.MAX):
            seen = mine.clone()
            dist.all_reduce(seen, kind)
            for name, a, b in zip(weights, mine.tolist(), seen.tolist()):
                if a != b and not (math.isnan(a) and math.isnan(b)):
                    raise RuntimeError(f"the processes disagree about {name}: {a!r} on process {rank()}, {b!r} on another; the last checkpoint is whole")


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def share(n, of=None):
    """The samples of 0 .. n - 1 that belong to this process (or to process `of`): contiguous, sizes differing by one at most."""
    of = rank() if of is None else of
    return range(n * of // world(), n * (of + 1) // world())


def gather(mine, n):
    """Every process's rows, in order of sample -> [n, ...] on every process; mine is [len(share(n)), ...]."""
    if not dist.is_initialized():
        return mine
    sizes = [len(share(n, r)) for r in range(world())]
    padded = torch.cat([mine, mine.new_zeros(max(sizes) - len(mine), *mine.shape[1:])]).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def all_say(what):
    """What each process says, any object, in their order."""
    said = [what] * world()
    if dist.is_initialized():
        dist.all_gather_object(said, what)
    return said


def all_sum(tensor):
    """The sum of a tensor over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters):
    """Adds up the gradients of all processes by one flat all-reduce; a parameter that got none here counts as 0."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if dist.is_initialized():
        flat = all_sum(torch.cat([p.grad.flatten() for p in parameters]))
        for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(g.view_as(p))


def all_max(number, device):
    """The largest of a number, or tensor of one, over the processes."""
    tensor = torch.as_tensor(number, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def peak_memory(device):
    """GB: of the GPU if there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
