"""What training costs, and what it costs in a plain loop: rollout, update, the rest of an iteration, memory, processes.

    python experiments/speed.py                         # tiny and two small bases, two processes against one; three minutes on two cores
    python experiments/speed.py --compile               # "ours, tuned" compiled as well, which takes eight minutes more and a C++ compiler
    python experiments/speed.py --bases sd15,sd35       # random weights of the real sizes; on a GPU they are in the default (not yet run on one)

The peer is a plain loop over the same model, as DDPO's and Flow-GRPO's published trainers are: prompts are encoded anew for each batch of rollouts, time steps
go one by one, and the update is one backward for each (batch of samples, time step). Its batches, 8 rollouts and 4 training samples, are those of DDPO's
published configuration (Flow-GRPO takes 9 and 9 for SD 3.5); "same batches" gives it ours, "ours, tuned" is our loop in the precision in which this machine
multiplies matrices faster, against the peer in its own. Slower than they are in one thing: each guidance half is a forward of its own. Both loops must give the
same pictures from the same noise and the same gradient, or nothing is timed. They take turns; a ratio is the median over them. The learning rate is 0. "Of
matrix rate": the operations torch counts (not a CPU's attention) over those of a product of two square matrices in that time. "GB" on a CPU: the process, both precisions. Left out: evaluation.
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
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import bases  # noqa: E402
from bases import generator  # noqa: E402
from support import flags  # noqa: E402
from support import processes  # noqa: E402
import train  # noqa: E402
from commands.checks import numbers  # noqa: E402
from evidence import command_line, faster_precision, matrix_rate  # noqa: E402
from rewards.features import load_features  # noqa: E402
from prompting import Prompt, draw_prompts, read_prompts  # noqa: E402
from random_bases import NAMES, build  # noqa: E402
from rewards import Reward  # noqa: E402
from sampling import Policy, log_prob, transition  # noqa: E402

TINY = ROOT / "assets" / "tiny"
TEXTS = [f"{size} {shade} coat" for shade in ("dark", "grey", "light") for size in ("a narrow", "a wide", "a")]
SIZES = {"tiny": (4, 16, 160, 160), "small": (2, 8, 32, 32), "real": (2, 8, 16, 4)}   # groups, rollouts a group, our batch and train_batch
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}                           # relative; other batches round differently


@dataclass
class Args:
    # the benchmark
    bases: str = ""                                 # of tiny, sd1, sd3 (random weights), sd15, sd35 (of real size), or folders (default: the first three; GPU: all)
    repeats: int = 3                                # turns that each loop takes
    guidance: str = "1,4"                           # scales of guidance at which the loops are compared
    peer_batch: int = 8                             # rollouts in one forward of the peer
    peer_train_batch: int = 4                       # samples in one forward and backward of the peer
    processes: int = 2                              # of one thread each, compared with one of them alone on the first base; 0: not at all
    # its size
    prompts_per_step: int = 0                       # groups; 0: 4 for tiny, else 2
    group_size: int = 0                             # rollouts a group; 0: 16 for tiny, else 8
    steps: int = 3                                  # sampling steps; all but the last are stochastic and trained
    batch: int = 0                                  # ours, in one forward; 0: 160 for tiny, 32 for sd1 and sd3, 16 (4 in the update) for the real sizes
    compile: bool = False                           # "ours, tuned" is compiled, too
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the networks' forwards; auto: float32, bfloat16 for the real sizes
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to run


@dataclass
class Bench:
    """A base as train.py holds it, its encoders kept for the peer; learning rate 0."""
    args: train.Args
    model: generator.Generator
    policy: Policy
    prompts: list
    who: np.ndarray                                                      # the prompt of each rollout
    encoder: generator.Generator                                            # the model as the peer has it: it remembers no prompt
    null: tuple
    trained: dict                                                        # {name: parameter}
    optimizer: torch.optim.Optimizer

    def guided(self, guidance):
        return replace(self, args=replace(self.args, guidance=guidance), policy=replace(self.policy, guidance=guidance))


def open_bench(base, folder, options, device, compile=False):
    """The base at `folder`. Plain GRPO: the published loops have no prompt noise, and the update is one optimizer step."""
    kind = "tiny" if base == "tiny" else "real" if base in ("sd15", "sd35") else "small"
    P, N, batch, train_batch = SIZES[kind]
    precision = {"auto": "bfloat16" if kind == "real" else "float32"}.get(options.precision, options.precision)
    args = train.Args(prompts_per_step=options.prompts_per_step or P, group_size=options.group_size or N, steps=options.steps, keep=options.group_size or N,
                      batch=options.batch or batch, train_batch=options.batch or train_batch, prompt_noise=0.0, diversity=0.0, updates=1, grad_clip=1e9,
                      precision=precision, compile=compile, reward="class" if kind == "tiny" else "jpeg", diversity_features="reward" if kind == "tiny" else "latents")
    model = bases.load(folder, device, args.precision, compile=compile)
    trained = {n: p for n, p in model.network.named_parameters() if p.requires_grad_("attn" in n).requires_grad}
    policy = Policy(model.path, model.path.times(args.steps).to(device), range(args.steps - 1), args.eta, args.kernel)
    prompts = read_prompts(folder / "prompts.jsonl") if (folder / "prompts.jsonl").is_file() else [Prompt(text) for text in TEXTS]
    who = draw_prompts(len(prompts), args.prompts_per_step, 0, 0).repeat(args.group_size)
    encoder = copy.copy(model)
    encoder.encoders, encoder.known = model.encoders and [*model.encoders], {}
    model.forget_text_encoders([p.text for p in prompts] + [""])
    return Bench(args, model, policy, prompts, who, encoder, model.encode([""]), trained,
                 torch.optim.AdamW(trained.values(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0))


def our_rollout(bench):
    texts = [bench.prompts[w].text for w in bench.who]
    return train.explore(bench.args, bench.model, bench.policy, texts, bench.null, range(len(texts)), (0, 0, 0))


def our_update(bench, trajectory, advantage):
    P, N = bench.args.prompts_per_step, bench.args.group_size
    return train.update(bench.args, bench.model, None, bench.policy, bench.null, bench.optimizer, bench.trained, trajectory,
                        torch.arange(N).expand(P, N), advantage.reshape(1, P, N).expand(len(bench.policy.window), P, N), 0)


def one_step(bench, x, k, prompt, null):
    """The peer's Gaussian of step k, a forward for each guidance half."""
    model, policy = bench.model, bench.policy
    t, s = policy.times[k:k + 2].tolist()
    at = torch.full((len(x),), t, device=x.device)
    x0_hat, eps_hat = model(x, at, prompt)
    if policy.guidance != 1:
        without = model(x, at, tuple(y.expand_as(p) for y, p in zip(null, prompt)))
        x0_hat, eps_hat = (n + policy.guidance * (p - n) for n, p in zip(without, (x0_hat, eps_hat)))
    return transition(x, x0_hat, eps_hat, policy.path, t, s, policy.eta if k in policy.window else 0.0, policy.kernel)


@torch.no_grad()
def peer_rollout(bench, noise, batch):
    """noise [B, 1 + W, ...] -> list of (latents, one for each time; log-probs, one for each stochastic step; prompt), one for each batch."""
    samples, texts = [], [bench.prompts[w].text for w in bench.who]
    for at in range(0, len(noise), batch):
        prompt, null = bench.encoder.encode(texts[at:at + batch]), bench.encoder.encode([""])
        latents, log_probs = [noise[at:at + batch, 0] * bench.model.initial_std], []
        for k in range(bench.args.steps):
            mean, std = one_step(bench, latents[-1], k, prompt, null)
            latents.append(mean + std * noise[at:at + batch, 1 + k] if k in bench.policy.window else mean)
            if k in bench.policy.window:
                log_probs.append(log_prob(latents[-1], mean, std))
        samples.append((latents, log_probs, prompt))
    return samples


def peer_update(bench, samples, advantage, batch):
    """samples as from peer_rollout, advantage [B]: gradient of the mean clipped loss over all (sample, step) pairs, and a step."""
    bench.optimizer.zero_grad()
    latents, log_probs = (torch.cat([torch.stack(s[i]) for s in samples], 1) for i in (0, 1))
    prompts, D = tuple(torch.cat(part) for part in zip(*(s[2] for s in samples))), latents[0, 0].numel()
    for rows in torch.arange(len(advantage), device=advantage.device).split(batch):
        prompt = tuple(p[rows] for p in prompts)
        for k in bench.policy.window:
            mean, std = one_step(bench, latents[k, rows], k, prompt, bench.null)
            ratio = torch.exp((log_prob(latents[k + 1, rows], mean, std) - log_probs[k, rows]) / D)
            (train.clipped_loss(ratio, advantage[rows], bench.args.clip / D).sum() / log_probs.numel()).backward()
    torch.nn.utils.clip_grad_norm_(bench.trained.values(), bench.args.grad_clip)
    bench.optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring.

def done(device):
    """Now, in seconds, with nothing left to do on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function, device):
    start = done(device)
    function()
    return done(device) - start


def take_turns(loops, repeats, device):
    """loops {name: function} -> {name: its seconds, one for each turn}; the first one to go changes with the turn, and one turn is thrown away."""
    seconds = {name: [] for name in loops}
    for turn in range(1 + repeats):
        for name in (list(loops) if turn % 2 else reversed(loops)):
            seconds[name].append(seconds_of(loops[name], device))
    return {name: found[1:] for name, found in seconds.items()}


def ratio(seconds, other):
    return statistics.median(a / b for a, b in zip(seconds, other))


def peak_gb(function, device):
    """The most memory in use while the function runs: of the GPU, or of this process, where Linux counts it anew; else nan."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return processes.peak_memory(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)                                 # what earlier functions have freed is theirs
        Path("/proc/self/clear_refs").write_text("5")
        function()
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    except (OSError, AttributeError):
        return float("nan")


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def check_same(bench, options, noise, advantage):
    """Raises RuntimeError unless both loops give the same pictures and the same gradient -> what torch counts in our rollout and update."""
    far = lambda a, b: ((a.double() - b.double()).norm() / b.double().norm()).item()
    trajectory, samples, found = our_rollout(bench), peer_rollout(bench, noise, options.peer_batch), []
    pictures = far(torch.cat([s[0][-1] for s in samples]), trajectory.latents[-1])
    for update in (lambda: our_update(bench, trajectory, advantage), lambda: peer_update(bench, samples, advantage, options.peer_train_batch)):
        update()
        found.append(torch.cat([p.grad.flatten() for p in bench.trained.values()]))
    gradient, limit = far(found[1], found[0]), TOLERANCE[bench.args.precision]
    if not (pictures < limit and gradient < limit):
        raise RuntimeError(f"the loops disagree: pictures by {pictures:.1e}, gradient by {gradient:.1e}, relative; nothing was timed")
    return counted(lambda: our_rollout(bench)), counted(lambda: our_update(bench, trajectory, advantage))


def compare_loops(base, bench, low, options):
    """Prints two rows of the first table for each scale of guidance. low: the same base in the faster precision, and perhaps compiled."""
    device, args, B, W = bench.model.device, bench.args, len(bench.who), len(bench.policy.window)
    draw = lambda: torch.randn(B, 1 + W, *bench.model.shape, device=device)
    advantage = torch.randn(B, generator=torch.Generator().manual_seed(0)).to(device)
    for guidance in numbers("guidance", options.guidance):
        now, below, rate = bench.guided(guidance), low.guided(guidance), matrix_rate(device, args.precision)
        flops = check_same(now, options, train.seeded_noise((0, 0, 0, 0), range(B), draw().shape[1:]).to(device), advantage)
        trajectory, coarse, samples = our_rollout(now), our_rollout(below), peer_rollout(now, draw(), options.peer_batch)
        rollouts = {"ours": lambda: our_rollout(now), "low": lambda: our_rollout(below), "peer": lambda: peer_rollout(now, draw(), options.peer_batch),
                    "same": lambda: peer_rollout(now, draw(), args.batch)}
        updates = {"ours": lambda: our_update(now, trajectory, advantage), "low": lambda: our_update(below, coarse, advantage),
                   "peer": lambda: peer_update(now, samples, advantage, options.peer_train_batch), "same": lambda: peer_update(now, samples, advantage, args.train_batch)}
        for what, count, loops, work in (("rollout, images/s", B, rollouts, flops[0]), ("update, pairs/s", B * W, updates, flops[1])):
            seconds = take_turns(loops, options.repeats, device)
            ours, peer = (statistics.median(seconds[name]) for name in ("ours", "peer"))
            print(f"| {Path(base).name} | {guidance:g} | {what} | {count / ours:.1f} | {count / peer:.1f} | {ratio(seconds['peer'], seconds['ours']):.2f} | "
                  f"{ratio(seconds['same'], seconds['ours']):.2f} | {ratio(seconds['peer'], seconds['low']):.2f} | {work / ours / rate:.2f} | "
                  + " | ".join(f"{peak_gb(loops[name], device):.2f}" for name in ("ours", "peer")) + " |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# A whole iteration, with DRIFT as it is by default, by one process and by several.

def iteration(bench):
    """-> a function that takes one iteration of train.py, and what in it is timed: the reward and the feature network of the potentials (or None)."""
    args = replace(bench.args, **{name: getattr(train.Args, name) for name in ("prompt_noise", "diversity")})
    reward = Reward(args.reward, bench.model.folder, bench.model.device, args.batch)
    look = load_features(args.diversity_features, bench.model.folder, bench.model.device) if args.diversity_features != "latents" else None

    def once(reward=reward, look=look):
        trajectory, terms, _, potential, closest = train.sample_groups(
            args, bench.model, bench.policy, bench.prompts, bench.null, reward, None, look, 0)
        index, advantage = train.credit(args, {name: 1.0 for name in terms}, terms, potential, closest)
        train.update(args, bench.model, None, bench.policy, bench.null, bench.optimizer, bench.trained, trajectory, index, advantage, 0)
    return once, reward, look


def split_iteration(base, bench, repeats):
    """Prints a row of the second table: medians of seconds. The backward of the step's mathematics counts as network."""
    once, reward, look = iteration(bench)
    device, network, rows, starts = bench.model.device, bench.model.network, [], []
    for _ in range(1 + repeats):
        spent = dict.fromkeys(("network", "decode", "reward", "features"), 0.0)

        def timed(name, function):
            def call(*inputs):
                start = done(device)
                result = function(*inputs)
                spent[name] += done(device) - start
                return result
            return call
        with ExitStack() as stack:
            stack.callback(network.register_forward_pre_hook(lambda *_: starts.append(done(device))).remove)
            stack.callback(network.register_forward_hook(lambda *_: spent.update(network=spent["network"] + done(device) - starts.pop())).remove)
            stack.enter_context(patch.object(torch.Tensor, "backward", timed("network", torch.Tensor.backward)))
            stack.enter_context(patch.object(bench.model, "decode", timed("decode", bench.model.decode)))
            total = seconds_of(lambda: once(timed("reward", reward), look and timed("features", look)), device)
        rows.append([*spent.values(), total - sum(spent.values()), 100 * (1 - sum(spent.values()) / total)])
    print(f"| {Path(base).name} | {' | '.join(f'{part:.3f}' for part in np.median(rows[1:], 0)[:5])} | {np.median(rows[1:], 0)[5]:.1f} % |", flush=True)


def worker(base, options):
    """Under torchrun: iterations of the first process alone, in turn with iterations shared by all. `base` is tiny or a folder."""
    device = processes.start(options.device)
    bench, seconds = open_bench(base, TINY if base == "tiny" else Path(base), options, device), {"alone": [], "all": []}
    once, _, _ = iteration(bench)
    for _ in range(1 + options.repeats):
        if processes.rank() == 0:
            with patch.object(dist, "is_initialized", lambda: False):    # runtime.py then deals everything to this process
                seconds["alone"].append(seconds_of(once, device))
        dist.barrier()
        seconds["all"].append(seconds_of(once, device))
        dist.barrier()
    if processes.rank() == 0:
        alone, shared = (statistics.median(seconds[name][1:]) for name in ("alone", "all"))
        print(f"\n{Path(base).name}: an iteration takes one process {alone:.3g} s, {processes.world()} processes {shared:.3g} s, one thread each: "
              f"x {ratio(seconds['alone'][1:], seconds['all'][1:]):.2f}", flush=True)
    processes.finish()


def check(options):
    """-> the bases. Raises ValueError, in one line."""
    bases = options.bases.split(",") if options.bases else ["tiny", "sd1", "sd3"] + ["sd15", "sd35"] * torch.cuda.is_available()
    for base in (base for base in bases if base not in ("tiny", *NAMES) and not Path(base).is_dir()):
        raise ValueError(f"--bases {base}: neither a folder nor one of tiny, {', '.join(NAMES)}")
    least = {"repeats": 1, "peer_batch": 1, "peer_train_batch": 1, "processes": 0, "steps": 2, "batch": 0}
    for name in (name for name in least if getattr(options, name) < least[name]):
        raise ValueError(f"--{name} {getattr(options, name)}: must be {least[name]} or more")
    numbers("guidance", options.guidance)
    return bases


def main(argv=None):
    options = flags.parse_args(Args, __doc__, argv)
    with flags.refusing():
        bases = check(options)
    if "RANK" in os.environ:
        return worker(bases[0], options)
    device = processes.start(options.device)
    faster = faster_precision(device)
    print(f"{device}, {torch.get_num_threads()} threads; {options.repeats} turns; tuned: {faster}{', compiled' * options.compile}\n\n"
          f"| base | guidance | | ours | peer | x peer | same batches | ours, tuned | of matrix rate | GB | GB, peer |\n" + "|---" * 11 + "|")
    with tempfile.TemporaryDirectory() as scratch:
        rows = []
        for base in bases:
            folder = TINY if base == "tiny" else Path(scratch) / base if base in NAMES else Path(base)
            base in NAMES and build(base, folder, device)
            bench = open_bench(base, folder, options, device)
            torch.compiler.reset()                                       # it compiles a function a few times only, and bases share some
            shared, tuned = bench.args.precision == faster and not options.compile, replace(options, precision=faster)
            compare_loops(base, bench, bench if shared else open_bench(base, folder, tuned, device, options.compile), options)
            rows.append((base, bench))
        print("\nOne iteration, seconds:\n\n| base | network | decode | reward | features | rest | rest |\n" + "|---" * 7 + "|")
        for base, bench in rows:
            split_iteration(base, bench, options.repeats)
        if options.processes:
            flags = command_line(vars(options) | {"bases": "tiny" if bases[0] == "tiny" else rows[0][1].model.folder})
            subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes), __file__, *flags],
                           env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


if __name__ == "__main__":
    main()
