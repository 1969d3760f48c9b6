"""Fine-tunes an image generator by reinforcement learning, and keeps its pictures diverse.

    torchrun train.py                                    the default: DRIFT on assets/tiny, a few minutes on two CPU cores
    torchrun train.py --drift off                        plain GRPO, everything else the same
    torchrun --nproc_per_node 8 train.py                 the same to rounding: every size below is global

The algorithm is `train`: prompts -> rollouts -> rewards -> potential -> subset -> advantages -> clipped update (GRPO for flows,
arXiv 2505.05470; DRIFT, arXiv 2601.12401). Simplifications, on purpose:
  1. no critic: a rollout's advantage is its reward against its group's mean;    2. no replay: rollouts are used once and dropped;
  3. randomness is a function of (seed, step, sample), so nothing random is saved;    4. no learning-rate decay, no loss scaling.
"""
import dataclasses
import json
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import eval as evaluation
import models
import runtime
from prompting import draw_prompts, noised_prompt, read_prompts
from rewards import Reward, check_classifier, check_labels, load_classifier, parse as parse_reward
from sampling import Policy, concentrated_subset, log_prob, rollout, seeded_noise
from shaping import group_diversity, shaped_returns

ROLLOUT_STREAM, PROMPT_STREAM, ORDER_STREAM = 0, 1, 3                    # 2 is the evaluation's: no two draws share their noise


@dataclass
class Args:
    # the run
    model: str = "assets/tiny"                      # diffusers folder of the base model
    prompts: str = ""                               # prompts to train on, .txt or .jsonl (default: the model folder's prompts.jsonl)
    reward: str = "class:1"                         # what to raise: a weighted sum of class, margin, ink
    out: str = ""                                   # run folder (default: runs/ and the flags that differ from the defaults)
    iterations: int = 60                            # times to sample and train
    seed: int = 0                                   # of prompts and noise in training
    drift: Literal["on", "off"] = "on"              # off: plain GRPO, that is --select all --prompt_noise 0 --diversity 0
    dry_run: bool = False                           # print configuration and sizes, and stop
    # rollouts
    prompts_per_step: int = 10                      # groups an iteration, over all processes
    group_size: int = 16                            # rollouts a group
    steps: int = 8                                  # sampling steps of a rollout
    window: str = "0:4"                             # the stochastic steps, first:end; the others are deterministic and not trained
    kernel: Literal["ancestral", "cps", "flow-grpo"] = "cps"  # rule of the stochastic step
    eta: float = 0.8                                # its noise, 0 to 1
    guidance: float = 1.0                           # classifier-free guidance, in training and evaluation
    # DRIFT (i): concentrated subset
    select: Literal["window", "median", "band", "trim", "all", "spread"] = "window"  # rule by which rollouts are kept for the update
    keep: int = 15                                  # rollouts kept of each group
    # DRIFT (ii): prompt noise
    prompt_noise: float = 0.5                       # scale s of the noise on the prompt embedding; 0 switches it off
    tau1: float = 0.6                               # no noise when less than this fraction of the steps is still to go
    tau2: float = 1.2                               # all noise when more than this is to go; above 1: never all noise
    psi: float = 1.0                                # how far the noised embedding is rescaled to its own mean and std
    # DRIFT (iii): diversity shaping
    diversity: float = 0.2                          # weight of the shaped diversity beside the normalised reward; 0 switches it off
    diversity_features: Literal["reward", "latents"] = "reward"  # where distances are measured: the reward network, or the latents
    metric: Literal["cosine", "euclidean"] = "cosine"  # distance of two rollouts
    nearest: int = 3                                # mean distance to this many nearest of the group; 0: to all
    success: bool = True                            # the potential counts only for rollouts with at least their group's mean reward
    gamma: float = 1.0                              # discount of the shaping
    terminal: Literal["keep", "zero"] = "keep"      # potential of the finished picture: keep it (a bonus), or zero (optimum unchanged)
    # other protections, to compare with
    kl: float = 0.0                                 # weight of the KL to the base model, nats a step against a normalised advantage
    gardo: bool = False                             # GARDO: positive advantages times the relative distance to the nearest of the group
    # update
    std: Literal["batch", "group", "none"] = "batch"  # what divides a centred reward: std of the batch, of its group, or nothing
    train: Literal["attention", "all"] = "attention"  # which weights learn
    lr: float = 3e-4                                # AdamW's learning rate
    warmup: int = 5                                 # iterations over which lr rises
    updates: int = 2                                # optimizer steps a pass
    passes: int = 1                                 # passes over an iteration's (rollout, step) pairs
    clip: float = 0.4                               # PPO clip of the log-ratio, nats a picture and step (divided by its dimensions)
    grad_clip: float = 1.0                          # largest gradient norm
    ema: float = 0.0                                # decay, an iteration, of the average of the weights that is evaluated and saved; 0: none
    # evaluation, saving, machine
    eval_prompts: str = ""                          # prompts to judge on (default: the model folder's eval_prompts.jsonl)
    eval_every: int = 10                            # iterations between evaluations
    eval_images: int = 640                          # pictures an evaluation, over all prompts
    eval_steps: int = 10                            # deterministic sampling steps
    eval_seed: int = 0                              # of the evaluation's noise
    save_every: int = 10                            # iterations between checkpoints
    keep_checkpoints: int = 2                       # how many of the newest stay
    batch: int = 160                                # pictures, or (picture, step) pairs, in one forward of a process: memory only
    precision: Literal["float32", "bfloat16"] = "float32"  # of the networks' forwards; step and log-probs are float32
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to run


# ---------------------------------------------------------------------------------------------------------------------
# Before anything is loaded: every flag and file is looked at. A ValueError here is the user's one line.

LIMITS = {                                                               # the smallest and largest value of each number
    **dict.fromkeys(("iterations", "prompts_per_step", "steps", "updates", "passes", "eval_every", "eval_images", "eval_steps",
                     "save_every", "keep_checkpoints", "batch"), (1, math.inf)),
    **dict.fromkeys(("seed", "eval_seed", "warmup", "nearest", "guidance", "tau1", "tau2", "prompt_noise", "diversity", "kl"), (0, math.inf)),
    **dict.fromkeys(("lr", "clip", "grad_clip"), (1e-12, math.inf)), "eta": (1e-3, 1), "psi": (0, 1), "gamma": (0, 1), "ema": (0, 0.9999),
    "group_size": (2, math.inf), "keep": (2, math.inf)}


def check(args):
    """Resolves defaults that depend on other flags and refuses what cannot run -> args, prompts, eval prompts."""
    def need(ok, message):
        if not ok:
            raise ValueError(message)
    default, off = vars(Args()), {"select": "all", "prompt_noise": 0.0, "diversity": 0.0}
    changed = {k: v for k, v in vars(args).items() if k not in ("out", "dry_run") and v != default[k]}
    args = dataclasses.replace(args, out=args.out or runtime.run_name(changed), **(off if args.drift == "off" else {}))
    args = dataclasses.replace(args, keep=args.group_size if args.select == "all" else args.keep)
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        need(math.isfinite(value) and low <= value <= high, f"--{name} {value}: must be a finite number from {low:g} to {high:g}")
    need(args.keep <= args.group_size, f"--keep {args.keep}: is more than --group_size {args.group_size}")
    need(args.nearest < args.group_size, f"--nearest {args.nearest}: must be below --group_size {args.group_size}")
    need(args.tau1 < args.tau2, f"--tau1 {args.tau1}: must be below --tau2 {args.tau2}")
    need(re.fullmatch(r"\d+:\d+", args.window), f"--window {args.window}: write first:end, as in 0:4")
    first, end = map(int, args.window.split(":"))
    need(first < end < args.steps, f"--window {args.window}: must hold a step and end by {args.steps - 1}, before the last of --steps {args.steps}")
    pairs = args.prompts_per_step * args.keep * (end - first)
    need(pairs % args.updates == 0, f"--updates {args.updates}: does not divide the {pairs} (rollout, step) pairs of an iteration")
    need(args.device != "cuda" or torch.cuda.is_available(), "--device cuda: no GPU that torch can use; leave it at auto")
    rollouts, processes = args.prompts_per_step * args.group_size, int(os.environ.get("WORLD_SIZE", 1))
    need(processes <= rollouts, f"--nproc_per_node {processes}: an iteration has only {rollouts} rollouts to share")
    parse_reward(args.reward)
    folder = models.check(args.model)
    check_classifier(folder / "reward"), check_classifier(folder / "evaluator"), evaluation.check_real(folder / "evaluator" / "real.npz")
    args = dataclasses.replace(args, prompts=args.prompts or str(folder / "prompts.jsonl"),
                               eval_prompts=args.eval_prompts or str(folder / "eval_prompts.jsonl"))
    prompts, judged = read_prompts(args.prompts), read_prompts(args.eval_prompts)
    check_labels(prompts, args.prompts), check_labels(judged, args.eval_prompts)
    need(args.eval_images % len(judged) == 0 and args.eval_images >= 2 * len(judged),
         f"--eval_images {args.eval_images}: must be a multiple of the {len(judged)} prompts of {args.eval_prompts}, two each at least")
    runtime.open_run(args.out, vars(args), free=("out", "dry_run"))
    return args, prompts, judged


def plan(args, prompts):
    """The sizes that follow from the flags, for a person to read before hours are spent."""
    first, end = map(int, args.window.split(":"))
    rollouts, pairs = args.prompts_per_step * args.group_size, args.prompts_per_step * args.keep * (end - first)
    return (f"{len(prompts)} prompts; an iteration: {args.prompts_per_step} groups x {args.group_size} = {rollouts} rollouts of {args.steps} steps, "
            f"{args.keep} kept of each group x {end - first} stochastic steps = {pairs} pairs, {args.passes * args.updates} optimizer steps of "
            f"{pairs // args.updates} pairs; {args.iterations} iterations = {args.iterations * rollouts} rollouts")


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics of the update: pure functions of tensors.

def group_advantage(values, index, std="group", floor=1e-3, limit=5.0):
    """Centres values [..., P, N] by group and divides them by a std, over the kept rollouts index [P, K] -> float64 [..., P, K].

    std: "group" the kept group's, "batch" that of all the kept together, "none" 1. A std below `floor` counts as `floor`, so a group of
    equals gets 0 and rounding is never blown up; the result is limited to +-`limit`.
    """
    values = values.double()
    kept = values.gather(-1, index.expand(*values.shape[:-1], index.shape[-1]))
    centred = kept - kept.mean(-1, keepdim=True)
    if std == "group":
        centred = centred / kept.std(-1, keepdim=True).clamp(min=floor)
    elif std == "batch":
        centred = centred / centred.square().mean((-2, -1), keepdim=True).sqrt().clamp(min=floor)
    return centred.clamp(-limit, limit)


def clipped_loss(ratio, advantage, clip):
    """PPO's pessimistic surrogate, a loss for each pair: max(-A r, -A clip(r, 1 - clip, 1 + clip))."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def gaussian_kl(mean, reference_mean, std):
    """KL(N(mean, std^2) || N(reference_mean, std^2)) in nats, summed over the dimensions -> [B]."""
    return (((mean - reference_mean) / std) ** 2).flatten(1).sum(1) / 2


def credit(args, rewards, potential, closest):
    """Rewards [P, N] and potentials [W + 1, P, N] -> who is kept, index [P, K], and the advantage of each step, [W, P, K]."""
    index = concentrated_subset(rewards, args.keep, args.select)
    advantage = group_advantage(rewards, index, args.std)                                    # [P, K]
    if args.gardo:                                                       # arXiv 2512.24138: the positive side times d / mean d
        relative = closest / closest.mean(1, keepdim=True).clamp(min=1e-8)
        advantage = torch.where(advantage > 0, advantage * relative.gather(1, index), advantage)
    if args.success:                                                     # DRIVE, the same group's later paper: only a success is paid
        potential = potential * (rewards >= rewards.double().mean(1, keepdim=True))   # float64: equals reach their mean
    shaped = shaped_returns(torch.zeros_like(rewards), potential, args.gamma, 1.0, args.terminal)
    return index, advantage + args.diversity * group_advantage(shaped, index)               # each signal in units of its own std


# ---------------------------------------------------------------------------------------------------------------------
# The two phases. A process handles its share of the P x N rollouts; `table` and `null` are prompt embeddings.

def sample_groups(args, model, policy, table, null, reward, prompts, step):
    """SAMPLE: rolls out this process's share -> its trajectory; and of all rollouts: rewards, their terms, potentials, nearest distances."""
    P, N, W = args.prompts_per_step, args.group_size, len(policy.window)
    samples = runtime.share(P * N)
    who = draw_prompts(len(prompts), P, args.seed, step)[np.array(samples) // N]              # the prompt of each rollout
    noise = seeded_noise((ROLLOUT_STREAM, args.seed, step), samples, (1 + W, *model.shape)).to(model.device)
    prompt = tuple(y[torch.as_tensor(who, device=y.device)] for y in table)
    prompt_noise = tuple(seeded_noise((PROMPT_STREAM, args.seed, step, n), samples, y.shape[1:]).to(y) for n, y in enumerate(prompt))
    condition = noised_prompt(prompt, prompt_noise, args.prompt_noise, args.tau1, args.tau2, args.psi)
    trajectory = rollout(model, policy, condition, noise[:, 0] * policy.path.sigma(policy.times[0]).item(), noise[:, 1:], null, args.batch)
    with torch.inference_mode():
        images = model.decode(trajectory.latents[-1])                                         # [B, 3, H, W]
        try:
            total, terms = reward(images, [prompts[w].text for w in who], [prompts[w].metadata for w in who])
        except FloatingPointError as error:
            raise FloatingPointError(f"iteration {step + 1}: {error}; stopped before the update") from None
        states = [*trajectory.x0_hats[policy.window.start:policy.window.stop], trajectory.latents[-1]]        # W + 1 of [B, ...]
        look = (lambda x: reward.features(model.decode(x))) if args.diversity_features == "reward" else (lambda x: x.flatten(1))
        features = runtime.gather(torch.stack([look(x) for x in states], 1), P * N).transpose(0, 1).reshape(W + 1, P, N, -1)
        scores = runtime.gather(torch.stack([total, *terms.values()], 1), P * N).T.reshape(-1, P, N)
        potential = torch.stack([group_diversity(f, args.metric, args.nearest) for f in features])            # [W + 1, P, N]
        closest = group_diversity(features[-1], "cosine", nearest=1)                          # [P, N]
    return trajectory, scores[0], dict(zip(terms, scores[1:])), potential, closest


def update(args, model, reference, policy, null, optimizer, trained, trajectory, index, advantage, step):
    """TRAIN: clipped policy gradient on the kept (rollout, step) pairs, shuffled, in `updates` optimizer steps a pass -> metrics."""
    W, D, samples = len(policy.window), math.prod(model.shape), runtime.share(args.prompts_per_step * args.group_size)
    kept = (torch.arange(len(index))[:, None] * args.group_size + index.cpu()).flatten().to(model.device)      # sample numbers [P K]
    advantage = advantage.float().reshape(W, -1).to(model.device)                             # [W, P K]
    shuffle, totals, ratio_error, norm = np.random.default_rng([ORDER_STREAM, args.seed, step]), 0, 0.0, 0.0
    chunks = [c for _ in range(args.passes) for c in torch.as_tensor(shuffle.permutation(advantage.numel()), device=model.device).chunk(args.updates)]
    for n, chunk in enumerate(chunks):
        optimizer.zero_grad()
        tally = torch.zeros(4, dtype=torch.float64, device=model.device)
        mine = chunk[(kept[chunk % len(kept)] >= samples.start) & (kept[chunk % len(kept)] < samples.stop)]
        for pairs in mine.split(args.batch) if len(mine) else ():
            w, j = pairs // len(kept), pairs % len(kept)
            k, row = w + policy.window.start, kept[j] - samples.start                         # step of the schedule, rollout of ours
            prompt = trajectory.condition(row, policy.fraction(k))
            mean, std, _ = policy.step(model, trajectory.latents[k, row], k, prompt, null)
            ratio = torch.exp((log_prob(trajectory.latents[k + 1, row], mean, std) - trajectory.log_probs[w, row]) / D)
            loss, kl = clipped_loss(ratio, advantage[w, j], args.clip / D), torch.zeros_like(ratio)
            if args.kl:
                with torch.no_grad():
                    reference_mean, _, _ = policy.step(reference, trajectory.latents[k, row], k, prompt, null)
                kl = gaussian_kl(mean, reference_mean, std)
            ((loss + args.kl * kl / D).sum() / len(chunk)).backward()    # nats over D, both of them
            error = (ratio.detach() - 1).abs()
            tally += torch.stack([loss.sum(), kl.sum(), (error > args.clip / D).sum(), torch.ones_like(loss).sum()]).detach().double()
            ratio_error = max(ratio_error, error.max().item()) if n == 0 else ratio_error
        runtime.sum_gradients(trained)
        totals, norm = totals + runtime.all_sum(tally), torch.nn.utils.clip_grad_norm_(trained, args.grad_clip).item()
        ratio_error = runtime.all_max(ratio_error, model.device) if n == 0 else ratio_error
        check_update(args, step, totals, norm, ratio_error)
        optimizer.step()
    loss, kl, clipped, count = totals.tolist()
    return {"loss": loss / count, "kl": kl / count, "clip_fraction": clipped / count, "grad_norm": norm, "ratio_error": ratio_error}


def check_update(args, step, totals, norm, ratio_error):
    """Stops every process before the optimizer step, on a number that is none or on rollouts that the update cannot reproduce."""
    for what, value in (("loss", totals.sum().item()), ("gradient", norm)):
        if not math.isfinite(value):
            raise FloatingPointError(f"iteration {step + 1}: the {what} is not finite; stopped before the optimizer step")
    if ratio_error > (1e-6 if args.precision == "float32" else 1e-4):
        raise FloatingPointError(f"iteration {step + 1}: the ratio before the first update is off by {ratio_error:.1e}: rollout and update disagree; "
                                 "look for dropout, stored precision, other times, other guidance or other prompt noise")


# ---------------------------------------------------------------------------------------------------------------------
# The loop.

def train(args, prompts, judged):
    """The algorithm, and around it evaluation, log and checkpoints."""
    device, out = runtime.start(args.device), Path(args.out)
    model = models.load(args.model, device, args.precision)
    reward, evaluator = Reward(args.reward, model.folder, device), load_classifier(model.folder / "evaluator", device)
    real = np.load(model.folder / "evaluator" / "real.npz")
    table, null = model.encode([p.text for p in prompts]), model.encode([""])
    policy = Policy(model.path, model.path.times(args.steps), range(*map(int, args.window.split(":"))), args.eta, args.kernel, args.guidance)
    reference = model.frozen() if args.kl else None
    weights = {n: p for n, p in model.network.named_parameters() if p.requires_grad_(args.train == "all" or "attn" in n).requires_grad}
    average = {n: p.detach().clone() for n, p in weights.items()} if args.ema else {}
    optimizer = torch.optim.AdamW(weights.values(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    everything = weights | {"average." + n: v for n, v in average.items()}
    newest, state = runtime.newest_checkpoint(out)
    if newest:
        runtime.load_checkpoint(newest, everything, optimizer)
    log = runtime.Log(out, vars(args), state["lines"])

    def evaluate(iteration):
        with runtime.swapped(weights, average):
            images = evaluation.generate(model, judged, args.eval_images // len(judged), args.eval_steps, args.guidance, args.eval_seed, args.batch)
        if runtime.rank() == 0:
            runtime.save_grid(out / "grids" / f"{iteration:05d}.png", images.reshape(len(judged), -1, *images.shape[1:])[:, :10])
        scores = evaluation.score(images, [p.metadata["label"] for p in judged], evaluator, real)
        return {"eval/" + name: value for name, value in scores.items()}

    if not newest:
        log.write({"iteration": 0} | evaluate(0))
    bar = tqdm(range(state["step"], args.iterations), initial=state["step"], total=args.iterations, disable=runtime.rank() > 0, desc=out.name[:30])
    for step in bar:
        began = time.time()
        # ------------------------------------------------ SAMPLE
        trajectory, rewards, terms, potential, closest = sample_groups(args, model, policy, table, null, reward, prompts, step)
        sampled = time.time()
        # ------------------------------------------------ CREDIT
        index, advantage = credit(args, rewards, potential, closest)
        # ------------------------------------------------ TRAIN
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup))
        row = update(args, model, reference, policy, null, optimizer, list(weights.values()), trajectory, index, advantage, step)
        for name, value in average.items():
            value.lerp_(weights[name].detach(), 1 - args.ema)
        # ------------------------------------------------ LOG
        row |= {"reward": rewards.mean().item(), **{"reward/" + name: value.mean().item() for name, value in terms.items()}}
        row |= {"diversity": potential[-1].mean().item(), "zero_std_fraction": (rewards.std(1) < 1e-6).double().mean().item()}
        row |= {"seconds_sample": sampled - began, "seconds_train": time.time() - sampled, "peak_memory_gb": runtime.peak_memory(device)}
        bar.set_postfix(reward=f"{row['reward']:.3f}", diversity=f"{row['diversity']:.3f}", ratio_error=f"{row['ratio_error']:.0e}")
        last = step + 1 == args.iterations
        row |= evaluate(step + 1) if last or (step + 1) % args.eval_every == 0 else {}
        log.write({"iteration": step + 1} | row)
        if last:
            with runtime.swapped(weights, average):
                runtime.save_model(out / "model", model)
        if last or (step + 1) % args.save_every == 0:
            runtime.save_checkpoint(out, step + 1, everything, optimizer, log.lines, args.keep_checkpoints)


@record
def main(argv=None):
    args = runtime.parse_args(Args, __doc__, argv)
    try:
        args, prompts, judged = check(args)
    except ValueError as error:
        runtime.refuse(error)
    if runtime.rank() == 0:
        print(json.dumps(vars(args)), plan(args, prompts), sep="\n", flush=True)
    if args.dry_run:
        return
    complete = runtime.newest_checkpoint(args.out)[1]["step"] == args.iterations
    if not complete:
        train(args, prompts, judged)
    if runtime.rank() == 0:
        print(f"{args.out}: already complete\n" * complete + runtime.before_and_after(args.out))
    runtime.finish()


if __name__ == "__main__":
    main()
