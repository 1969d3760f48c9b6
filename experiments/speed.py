"""Speed in docs/scaling.md: rollout, update and the rest of an iteration against a plain loop.

    python experiments/speed.py                    # tiny, sd1, sd3, two processes; 3 minutes
    python experiments/speed.py --compile          # the tuned loop compiled; 8 more, needs C++
    python experiments/speed.py --bases sd15,sd35  # random weights of the real sizes

The peer is a plain loop over the same model, as the published trainers of DDPO and Flow-GRPO are:
prompts are encoded anew for each batch, steps are taken one by one, and the update is one backward
for each (batch of samples, step). Its batches, 8 rollouts and 4 samples, are DDPO's (Flow-GRPO
takes 9 and 9 for SD 3.5). In one thing it is slower than they are: each half of the guidance is a
forward of its own.

Before anything is timed, both loops must give the same pictures from the same noise, and the same
gradient. Then they take turns; a ratio is the median over the turns. The learning rate is 0.
    same batches      the peer with our batches
    ours, tuned       our loop in the precision in which this machine multiplies matrices faster,
                      against the peer in its own precision
    of matrix rate    operations that torch counts (without a CPU's attention) over those of a
                      product of two square matrices in the same time
    GB                of the GPU; on a CPU of the process, networks in both precisions included
Left out: evaluation. On a GPU sd15 and sd35 are in the default.
"""

import copy
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from evidence import command_line, faster_precision, matrix_rate  # noqa: E402
from random_bases import NAMES, REAL, build  # noqa: E402

import bases  # noqa: E402
import train  # noqa: E402
from bases.generator import Generator  # noqa: E402
from commands.checks import numbers  # noqa: E402
from commands.training import Setup, choose_trained, policy_of  # noqa: E402
from prompting import Prompt, draw_prompts, read_prompts  # noqa: E402
from rewards import Reward  # noqa: E402
from rewards.features import load_features  # noqa: E402
from sampling import log_prob, seeded_noise, transition  # noqa: E402
from support import flags, processes  # noqa: E402
from support.averages import Averages  # noqa: E402

TINY = ROOT / "assets" / "tiny"
TEXTS = []  # prompts of a base that brings none
for shade in ("dark", "grey", "light"):
    for size in ("a narrow", "a wide", "a"):
        TEXTS.append(f"{size} {shade} coat")

# Groups, rollouts a group, our --batch and our --train_batch, by the kind of base.
SIZES = {"tiny": (4, 16, 160, 160), "small": (2, 8, 32, 32), "real": (2, 8, 4, 4)}

# Largest relative difference of the loops: other batches round differently.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}

# Parts of an iteration that are timed.
PARTS = ("network", "decode", "reward", "features")

FIRST_HEADER = (
    "| base | guidance | | ours | peer | x peer | same batches | ours, tuned | of matrix rate "
    "| GB | GB, peer |"
)
SECOND_HEADER = "| base | network | decode | reward | features | rest | rest |"

# Shapes: B rollouts, W stochastic steps, T steps.


@dataclass
class Args:
    # the benchmark
    bases: str = ""
    """of tiny, sd1, sd3, sd15, sd35, or folders (default: tiny,sd1,sd3; on a GPU all five)"""
    repeats: int = 3
    """turns that each loop takes"""
    guidance: str = "1,4"
    """scales of guidance at which the loops are compared"""
    peer_batch: int = 8
    """rollouts in one forward of the peer"""
    peer_train_batch: int = 4
    """samples in one forward and backward of the peer"""
    processes: int = 2
    """of one thread each, compared with one of them alone on the first base (0: not at all)"""

    # its size
    prompts_per_step: int = 0
    """groups (0: 4 for tiny, else 2)"""
    group_size: int = 0
    """rollouts a group (0: 16 for tiny, else 8)"""
    steps: int = 3
    """sampling steps; all but the last are stochastic and trained"""
    batch: int = 0
    """ours, in one forward (0: 160 for tiny, 32 for sd1 and sd3, else 4)"""
    compile: bool = False
    """compile "ours, tuned", too"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the networks' forwards (auto: bfloat16 for the real sizes, else float32)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to run"""


# --------------------------------------------------------------------------------------------------
# A base, as train.py holds it and as the peer has it.


@dataclass
class Bench:
    """A base as train.py holds it, and its text encoders for the peer."""

    args: train.Args
    setup: Setup
    prompt_index: np.ndarray  # [B], the prompt of each rollout
    encoder: Generator  # the model as the peer has it: it remembers no prompt

    @property
    def texts(self):
        """The prompt of each rollout, B of them."""
        return [self.setup.prompts[i].text for i in self.prompt_index]

    def guided(self, guidance):
        """The same with another scale of guidance."""
        args = replace(self.args, guidance=guidance)
        policy = replace(self.setup.policy, guidance=guidance)
        return replace(self, args=args, setup=replace(self.setup, policy=policy))


def training_flags(base, options, compile):
    """train.py's flags for plain GRPO, as the published loops: no DRIFT, one optimizer step."""
    if base == "tiny":
        kind = "tiny"
    elif base in REAL:
        kind = "real"
    else:
        kind = "small"
    P, N, batch, train_batch = SIZES[kind]
    precision = options.precision
    if precision == "auto":
        precision = "bfloat16" if kind == "real" else "float32"
    return train.Args(
        prompts_per_step=options.prompts_per_step or P,
        group_size=options.group_size or N,
        keep=options.group_size or N,
        steps=options.steps,
        window=f"0:{options.steps - 1}",
        prompt_noise=0.0,
        diversity=0.0,
        updates=1,
        grad_clip=1e9,
        reward="class" if kind == "tiny" else "jpeg",
        diversity_features="reward" if kind == "tiny" else "latents",
        batch=options.batch or batch,
        train_batch=options.batch or train_batch,
        precision=precision,
        compile=compile,
    )


def open_bench(base, folder, options, device, compile=False):
    """Loads the base at `folder`; its name `base` says how large it is."""
    args = training_flags(base, options, compile)
    model = bases.load(folder, device, args.precision, compile=compile)
    trained = choose_trained(args, model)
    prompts = [Prompt(text) for text in TEXTS]
    if (folder / "prompts.jsonl").is_file():
        prompts = read_prompts(folder / "prompts.jsonl")

    # The copy keeps its encoders and encodes every batch; the model keeps the embeddings.
    encoder = copy.copy(model)
    encoder.known = {}
    if model.encoders:
        encoder.encoders = [*model.encoders]
    model.forget_text_encoders([*[prompt.text for prompt in prompts], ""])

    diversity_features = None
    if args.diversity_features != "latents":
        diversity_features = load_features(args.diversity_features, model.folder, device)
    setup = Setup(
        model=model,
        frozen_model=None,
        policy=policy_of(args, model),
        trained=trained,
        optimizer=torch.optim.AdamW(trained.values(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0),
        averages=Averages(trained, ema_decay=0.0, with_snapshots=False),
        prompts=prompts,
        null_prompt=model.encode([""]),
        reward=Reward(args.reward, model.folder, device, args.batch),
        diversity_features=diversity_features,
        reference_set=None,
        base_facts={},
    )
    drawn = draw_prompts(len(prompts), args.prompts_per_step, 0, 0)
    return Bench(args, setup, drawn.repeat(args.group_size), encoder)


# --------------------------------------------------------------------------------------------------
# The two loops.


def our_rollout(bench):
    """-> Trajectory of B rollouts."""
    texts = bench.texts
    return train.explore(bench.args, bench.setup, texts, range(len(texts)), (0, 0, 0))


def our_update(bench, trajectory, advantage):
    """One update from a Trajectory; advantage [B], the same for all steps of a rollout."""
    P, N = bench.args.prompts_per_step, bench.args.group_size
    W = len(bench.setup.policy.window)
    everyone = torch.arange(N).expand(P, N)
    advantage = advantage.reshape(1, P, N).expand(W, P, N)
    return train.update(bench.args, bench.setup, trajectory, everyone, advantage, 0)


class PeerBatch(NamedTuple):
    """Some rollouts of the peer."""

    latents: list  # T + 1 times [b, ...]
    log_probs: list  # W times [b]
    prompt: tuple  # embeddings [b, ...]


def peer_step(bench, x_t, k, prompt, null_prompt):
    """The peer's Gaussian of step k, a forward for each half of the guidance -> mean, std."""
    model, policy = bench.setup.model, bench.setup.policy
    t, s = policy.times[k : k + 2].tolist()
    each_t = torch.full((len(x_t),), t, device=x_t.device)
    x0_hat, eps_hat = model(x_t, each_t, prompt)
    if policy.guidance != 1:
        nulls = tuple(n.expand_as(p) for n, p in zip(null_prompt, prompt))
        x0_null, eps_null = model(x_t, each_t, nulls)
        x0_hat = x0_null + policy.guidance * (x0_hat - x0_null)
        eps_hat = eps_null + policy.guidance * (eps_hat - eps_null)
    eta = policy.eta if k in policy.window else 0.0
    return transition(x_t, x0_hat, eps_hat, policy.path, t, s, eta, policy.kernel)


@torch.no_grad()
def peer_rollout(bench, noise, batch):
    """noise [B, 1 + W, ...], `batch` rollouts in a forward -> list of PeerBatch."""
    setup, texts = bench.setup, bench.texts
    batches = []
    for start in range(0, len(noise), batch):
        part = noise[start : start + batch]
        prompt = bench.encoder.encode(texts[start : start + batch])
        null_prompt = bench.encoder.encode([""])
        latents = [part[:, 0] * setup.model.initial_std]
        log_probs = []
        for k in range(bench.args.steps):
            mean, std = peer_step(bench, latents[-1], k, prompt, null_prompt)
            if k in setup.policy.window:
                latents.append(mean + std * part[:, 1 + k])
                log_probs.append(log_prob(latents[-1], mean, std))
            else:
                latents.append(mean)
        batches.append(PeerBatch(latents, log_probs, prompt))
    return batches


def new_peer_rollout(bench, batch):
    """peer_rollout from noise of its own."""
    setup = bench.setup
    shape = (1 + len(setup.policy.window), *setup.model.shape)
    noise = torch.randn(len(bench.prompt_index), *shape, device=setup.model.device)
    return peer_rollout(bench, noise, batch)


def peer_update(bench, batches, advantage, batch):
    """The gradient of the mean clipped loss over all (sample, step) pairs, and a step.

    batches: from peer_rollout; advantage [B]; `batch` samples in a backward.
    """
    args, setup = bench.args, bench.setup
    setup.optimizer.zero_grad()
    latents = torch.cat([torch.stack(part.latents) for part in batches], 1)  # [T + 1, B, ...]
    log_probs = torch.cat([torch.stack(part.log_probs) for part in batches], 1)  # [W, B]
    prompts = tuple(torch.cat(part) for part in zip(*[part.prompt for part in batches]))
    D = latents[0, 0].numel()

    for rows in torch.arange(len(advantage), device=advantage.device).split(batch):
        prompt = tuple(p[rows] for p in prompts)
        for k in setup.policy.window:
            mean, std = peer_step(bench, latents[k, rows], k, prompt, setup.null_prompt)
            log_ratio = log_prob(latents[k + 1, rows], mean, std) - log_probs[k, rows]
            ratio = torch.exp(log_ratio / D)
            loss = train.clipped_loss(ratio, advantage[rows], args.clip / D)
            (loss.sum() / log_probs.numel()).backward()
    torch.nn.utils.clip_grad_norm_(setup.trained.values(), args.grad_clip)
    setup.optimizer.step()


# --------------------------------------------------------------------------------------------------
# Measuring.


def now(device):
    """The time in seconds, when the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function, device):
    start = now(device)
    function()
    return now(device) - start


def take_turns(loops, repeats, device):
    """{name: function} -> {name: its seconds [repeats]}.

    A turn calls each function once; every other turn goes through them backwards. The first turn
    is thrown away.
    """
    seconds = {name: [] for name in loops}
    for turn in range(1 + repeats):
        names = list(loops)
        if turn % 2 == 0:
            names.reverse()
        for name in names:
            seconds[name].append(seconds_of(loops[name], device))
    return {name: times[1:] for name, times in seconds.items()}


def median_ratio(seconds, others):
    """The median over the turns of a / b."""
    return statistics.median(a / b for a, b in zip(seconds, others))


def peak_gb(function, device):
    """The most memory in use while the function runs.

    On a CPU, that of this process; NaN where the system is not Linux.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return processes.peak_memory(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give back what earlier functions have freed
        Path("/proc/self/clear_refs").write_text("5")  # begin to count the peak anew
        function()
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    except (OSError, AttributeError):
        return float("nan")


def counted(function):
    """Operations that torch counts while the function runs."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def distance(a, b):
    """Relative Euclidean distance of two tensors."""
    difference = a.double() - b.double()
    return (difference.norm() / b.double().norm()).item()


def gradient(bench):
    """All gradients of what learns, in one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in bench.setup.trained.values()])


def check_same(bench, options, noise, advantage):
    """Raises RuntimeError unless both loops give the same pictures and the same gradient.

    noise [B, 1 + W, ...]: what our rollout draws. -> operations of our rollout, of our update.
    """
    trajectory = our_rollout(bench)
    batches = peer_rollout(bench, noise, options.peer_batch)
    peer_pictures = torch.cat([part.latents[-1] for part in batches])
    picture_error = distance(peer_pictures, trajectory.latents[-1])

    our_update(bench, trajectory, advantage)
    ours = gradient(bench)
    peer_update(bench, batches, advantage, options.peer_train_batch)
    gradient_error = distance(gradient(bench), ours)

    limit = TOLERANCE[bench.args.precision]
    if not (picture_error < limit and gradient_error < limit):  # NaN fails, too
        raise RuntimeError(
            f"the loops disagree: pictures by {picture_error:.1e}, gradient by "
            f"{gradient_error:.1e}, relative; nothing was timed"
        )
    rollout_count = counted(partial(our_rollout, bench))
    update_count = counted(partial(our_update, bench, trajectory, advantage))
    return rollout_count, update_count


# --------------------------------------------------------------------------------------------------
# First table: the loops against each other.


def compare_loops(base, bench, tuned, options):
    """Prints two rows for each scale of guidance.

    tuned: the same base in the faster precision, and perhaps compiled.
    """
    setup, device = bench.setup, bench.setup.model.device
    B, W = len(bench.prompt_index), len(setup.policy.window)
    noise = seeded_noise((0, 0, 0, 0), range(B), (1 + W, *setup.model.shape)).to(device)
    advantage = torch.randn(B, generator=torch.Generator().manual_seed(0)).to(device)
    for guidance in numbers("guidance", options.guidance):
        rate = matrix_rate(device, bench.args.precision)
        counts = check_same(bench.guided(guidance), options, noise, advantage)
        loops = loops_of(bench.guided(guidance), tuned.guided(guidance), options, advantage)
        label = f"{Path(base).name} | {guidance:g}"
        for (what, functions), done, count in zip(loops.items(), (B, B * W), counts):
            seconds = take_turns(functions, options.repeats, device)
            peaks = [peak_gb(functions[name], device) for name in ("ours", "peer")]
            print_row(f"{label} | {what}", done, seconds, count / rate, peaks)


def loops_of(bench, tuned, options, advantage):
    """What is timed -> {name of the row: {name of the loop: function}}."""
    args = bench.args
    trajectory = our_rollout(bench)
    tuned_trajectory = our_rollout(tuned)
    batches = new_peer_rollout(bench, options.peer_batch)
    rollouts = {
        "ours": partial(our_rollout, bench),
        "tuned": partial(our_rollout, tuned),
        "peer": partial(new_peer_rollout, bench, options.peer_batch),
        "same": partial(new_peer_rollout, bench, args.batch),
    }
    updates = {
        "ours": partial(our_update, bench, trajectory, advantage),
        "tuned": partial(our_update, tuned, tuned_trajectory, advantage),
        "peer": partial(peer_update, bench, batches, advantage, options.peer_train_batch),
        "same": partial(peer_update, bench, batches, advantage, args.train_batch),
    }
    return {"rollout, images/s": rollouts, "update, pairs/s": updates}


def print_row(label, done, seconds, matrix_seconds, peaks):
    """done: pictures or pairs of one turn; matrix_seconds: its operations at the matrix rate."""
    ours = statistics.median(seconds["ours"])
    peer = statistics.median(seconds["peer"])
    cells = [
        label,
        f"{done / ours:.1f}",
        f"{done / peer:.1f}",
        f"{median_ratio(seconds['peer'], seconds['ours']):.2f}",
        f"{median_ratio(seconds['same'], seconds['ours']):.2f}",
        f"{median_ratio(seconds['peer'], seconds['tuned']):.2f}",
        f"{matrix_seconds / ours:.2f}",
        f"{peaks[0]:.2f}",
        f"{peaks[1]:.2f}",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


# --------------------------------------------------------------------------------------------------
# Second table: a whole iteration, with DRIFT as it is by default.


def iterate(bench, setup):
    """One iteration of train.py."""
    defaults = train.Args
    args = replace(bench.args, prompt_noise=defaults.prompt_noise, diversity=defaults.diversity)
    groups = train.sample_groups(args, setup, 0)
    weights = dict.fromkeys(groups.rewards, 1.0)
    index, advantage = train.credit(args, weights, groups)
    train.update(args, setup, groups.trajectory, index, advantage, 0)


class Stopwatch:
    """Seconds in each of PARTS. The backward of the step's own formulas counts as network."""

    def __init__(self, device):
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def timed(self, part, function):
        """The function, with its seconds added to a part."""

        def call(*inputs):
            start = now(self.device)
            result = function(*inputs)
            self.seconds[part] += now(self.device) - start
            return result

        return call

    def before_forward(self, *_):
        self.start = now(self.device)

    def after_forward(self, *_):
        self.seconds["network"] += now(self.device) - self.start


def split_seconds(bench):
    """One iteration -> seconds of PARTS and of the rest, and the rest in per cent."""
    setup, model = bench.setup, bench.setup.model
    watch = Stopwatch(model.device)
    diversity_features = None
    if setup.diversity_features:
        diversity_features = watch.timed("features", setup.diversity_features)
    watched = replace(
        setup,
        reward=watch.timed("reward", setup.reward),
        diversity_features=diversity_features,
    )
    with ExitStack() as stack:
        before = model.network.register_forward_pre_hook(watch.before_forward)
        after = model.network.register_forward_hook(watch.after_forward)
        stack.callback(before.remove)
        stack.callback(after.remove)
        backward = watch.timed("network", torch.Tensor.backward)
        # A function in a class is a method: `call` gets the tensor as its first input.
        stack.enter_context(patch.object(torch.Tensor, "backward", backward))
        stack.enter_context(patch.object(model, "decode", watch.timed("decode", model.decode)))
        total = seconds_of(partial(iterate, bench, watched), model.device)
    rest = total - sum(watch.seconds.values())
    return [*watch.seconds.values(), rest, 100 * rest / total]


def split_iteration(base, bench, repeats):
    """Prints a row of medians; the first of the iterations is thrown away."""
    rows = [split_seconds(bench) for _ in range(1 + repeats)]
    *seconds, per_cent = np.median(rows[1:], axis=0)
    cells = [Path(base).name, *[f"{part:.3f}" for part in seconds], f"{per_cent:.1f} %"]
    print("| " + " | ".join(cells) + " |", flush=True)


# --------------------------------------------------------------------------------------------------
# Several processes against one.


def worker(base, options):
    """Under torchrun: iterations of the first process alone, in turn with iterations of all.

    base: tiny, or a folder.
    """
    device = processes.start(options.device)
    folder = TINY if base == "tiny" else Path(base)
    bench = open_bench(base, folder, options, device)
    once = partial(iterate, bench, bench.setup)
    alone = []
    shared = []
    for _ in range(1 + options.repeats):
        if processes.rank() == 0:
            # While no group seems to exist, this process gets all the work.
            with patch.object(dist, "is_initialized", lambda: False):
                alone.append(seconds_of(once, device))
        dist.barrier()
        shared.append(seconds_of(once, device))
        dist.barrier()
    if processes.rank() == 0:
        print_speedup(base, alone[1:], shared[1:])
    processes.finish()


def print_speedup(base, alone, shared):
    print(
        f"\n{Path(base).name}: an iteration takes one process {statistics.median(alone):.3g} s, "
        f"{processes.world()} processes {statistics.median(shared):.3g} s, one thread each: "
        f"x {median_ratio(alone, shared):.2f}",
        flush=True,
    )


def start_workers(options, base):
    """Runs this script again under torchrun, on one base."""
    words = command_line(vars(options) | {"bases": str(base)})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*torchrun, "--nproc_per_node", str(options.processes), __file__, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )


# --------------------------------------------------------------------------------------------------
# The command.


def check(options):
    """-> the bases. Raises ValueError, in one line."""
    names = ["tiny", "sd1", "sd3"]
    if torch.cuda.is_available():
        names += ["sd15", "sd35"]
    if options.bases:
        names = options.bases.split(",")
    for name in names:
        if name not in ("tiny", *NAMES) and not Path(name).is_dir():
            known = ", ".join(NAMES)
            raise ValueError(f"--bases {name}: neither a folder nor one of tiny, {known}")
    least = {
        "repeats": 1,
        "peer_batch": 1,
        "peer_train_batch": 1,
        "processes": 0,
        "steps": 2,
        "batch": 0,
    }
    for name, smallest in least.items():
        value = getattr(options, name)
        if value < smallest:
            raise ValueError(f"--{name} {value}: must be {smallest} or more")
    numbers("guidance", options.guidance)
    return names


def open_base(base, scratch, device):
    """The folder of a base; one of random weights is written first."""
    if base == "tiny":
        return TINY
    if base not in NAMES:
        return Path(base)
    build(base, scratch / base, device)
    return scratch / base


def open_tuned(base, bench, options, faster):
    """The base in the faster precision, compiled with --compile. It may be `bench` itself."""
    if bench.args.precision == faster and not options.compile:
        return bench
    model = bench.setup.model
    faster_options = replace(options, precision=faster)
    return open_bench(base, Path(model.folder), faster_options, model.device, options.compile)


def print_tables(names, scratch, options, device):
    faster = faster_precision(device)
    tuned_as = f"{faster}, compiled" if options.compile else faster
    print(
        f"{device}, {torch.get_num_threads()} threads; {options.repeats} turns; "
        f"tuned: {tuned_as}\n\n{FIRST_HEADER}\n" + "|---" * 11 + "|"
    )
    benches = []
    for base in names:
        bench = open_bench(base, open_base(base, scratch, device), options, device)
        torch.compiler.reset()  # it compiles a function a few times only, and bases share some
        compare_loops(base, bench, open_tuned(base, bench, options, faster), options)
        benches.append(bench)

    print(f"\nOne iteration, seconds:\n\n{SECOND_HEADER}\n" + "|---" * 7 + "|")
    for base, bench in zip(names, benches):
        split_iteration(base, bench, options.repeats)
    if options.processes:
        first = "tiny" if names[0] == "tiny" else benches[0].setup.model.folder
        start_workers(options, first)


def main(argv=None):
    options = flags.parse_args(Args, __doc__, argv)
    with flags.refusing():
        names = check(options)
    if "RANK" in os.environ:
        worker(names[0], options)
        return
    device = processes.start(options.device)
    with tempfile.TemporaryDirectory() as scratch:
        print_tables(names, Path(scratch), options, device)


if __name__ == "__main__":
    main()
