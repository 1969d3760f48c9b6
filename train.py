"""Fine-tunes an image generator by reinforcement learning, and keeps its pictures diverse.

    torchrun train.py                        the default: DRIFT on assets/tiny, minutes on two cores
    torchrun train.py --drift off            plain GRPO, everything else the same
    torchrun --nproc_per_node 8 train.py     the same to rounding: every size below is global

The algorithm is `train`. An iteration: prompts -> rollouts -> rewards and diversity -> subset ->
advantages -> clipped update (GRPO for flows, arXiv 2505.05470; DRIFT, arXiv 2601.12401).
Left out on purpose: a critic (a rollout's advantage is its reward against its group's mean), replay
(rollouts are used once), a decaying learning rate, loss scaling. Nothing random is saved, because
randomness is a function of (seed, step, sample).
"""

import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import dist_reward
import eval as evaluation
from bases.lora import lora_off
from commands import report
from commands.checks import check, plan
from commands.model_checks import check_generator
from commands.picture_sets import stream
from commands.training import Run, open_setup
from prompting import draw_prompts, noised_prompt
from rewards import DISTRIBUTION
from rewards.features import pixels
from rewards.metrics import evenly
from sampling import Trajectory, concentrated_subset, log_prob, rollout, seeded_noise
from shaping import gardo, group_advantage, group_diversity, shaped_returns
from support import files, flags, guards, processes
from support.sharding import clip_gradients

# Each purpose draws from its own stream of noise; 2 is the evaluation's, 4 to 7 are merge.py's.
ROLLOUT_STREAM, REFERENCE_STREAM, ORDER_STREAM, COMPONENT_STREAM = 0, 1, 3, 8

COMPONENT_PICTURES = 2000  # of the base, to which the features `components` are fitted

# Shapes: P prompts an iteration, N rollouts a prompt, K of them kept, W stochastic steps,
#         B rollouts of this process, F features of a picture, D numbers in a latent.


@dataclass
class Args:
    # the run
    model: str = "assets/tiny"
    """a diffusers folder or hub id; sit:FILE; edm2:FILE[,GUIDE]; a run's model/; or a generator of
    your own, module:Class:PATH"""
    prompts: str = ""
    """prompts to train on, .txt or .jsonl (default: the model folder's prompts.jsonl)"""
    reward: str = "class:1"
    """rewards and weights, as in class:1,fid:0.3; each is in units of its own std"""
    out: str = ""
    """run folder (default: runs/ and the flags that differ from the defaults)"""
    iterations: int = 60
    """how often to sample and train"""
    seed: int = 0
    """of prompts and noise in training"""
    drift: Literal["on", "off"] = "on"
    """off: plain GRPO, that is --select all --prompt_noise 0 --diversity 0 --fid 0"""
    dry_run: bool = False
    """print configuration and sizes, and stop"""
    check: bool = False
    """check the generator of --model, for one of your own, print a line a check, and stop"""

    # rollouts
    prompts_per_step: int = 10
    """groups an iteration, over all processes"""
    group_size: int = 16
    """rollouts a group"""
    steps: int = 8
    """sampling steps of a rollout"""
    window: str = "0:4"
    """the stochastic steps, first:end; the others are deterministic and are not trained"""
    kernel: Literal["ancestral", "cps", "flow-grpo"] = "cps"
    """rule of the stochastic step"""
    eta: float = 0.8
    """how much noise a stochastic step adds, 0 to 1"""
    guidance: float = 1.0
    """classifier-free guidance, in training and evaluation"""

    # distribution-wise reward
    fid: float = 0.3
    """weight of the FID beside the reward (0: none), where --reward names neither fid nor kid"""
    features: str = ""
    """where it is measured: components, of the base's own pictures, which are then the target;
    reward, evaluator, pixels, inception:FILE, dinov2[:MODEL], clip[:MODEL], module:function
    (default: components, or reward where --target is given or --reward names fid or kid)"""
    target: str = ""
    """real pictures: .npz of mu and sigma, folder or idx file (default: the model folder's own)"""
    price: Literal["potential", "exact"] = "potential"
    """a first-order price for each picture, or an exact one for each set of pictures"""
    replace: int = 0
    """K, pictures of a set, each of another group (0: one of every group)"""
    reference: int = 640
    """M, generated pictures in the reference set; each iteration's replace the oldest"""
    refresh: int = 0
    """iterations between wholly new reference sets (0: never)"""

    # DRIFT (i): concentrated subset
    select: Literal["window", "band", "spread", "all"] = "all"
    """rule by which rollouts are kept for the update; our reading of DRIFT: window"""
    keep: int = 15
    """rollouts kept of each group, unless all are"""

    # DRIFT (ii): prompt noise
    prompt_noise: float = 0.0
    """scale s of the noise on the prompt embedding (0: off)"""
    tau1: float = 0.6
    """no noise when less than this fraction of the steps is left"""
    tau2: float = 1.2
    """nothing but noise when more than this fraction is left; above 1: never nothing but noise"""
    psi: float = 1.0
    """how far the noised embedding is rescaled to its own mean and std"""

    # DRIFT (iii): diversity shaping
    diversity: float = 0.2
    """weight of the shaped diversity beside the normalised reward (0: off)"""
    diversity_features: str = "components"
    """where distances are measured: latents, or whatever --features takes"""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """distance of two rollouts"""
    nearest: int = 3
    """diversity is the mean distance to this many nearest of the group (0: to all)"""
    success: bool = True
    """pay diversity only to rollouts with at least their group's mean reward (--terminal keep)"""
    gamma: float = 1.0
    """discount of the shaping"""
    terminal: Literal["keep", "zero"] = "keep"
    """potential of the finished picture: keep it (a bonus) or zero it (the optimum is unchanged)"""

    # other protections, to compare with
    kl: float = 0.0
    """weight of the KL to the base model, nats a step against a normalised advantage"""
    gardo: bool = False
    """GARDO: a positive advantage times the relative distance to the nearest of the group"""

    # update
    std: Literal["batch", "group", "none"] = "batch"
    """what a centred reward is divided by: the std of the batch, that of its group, or nothing"""
    train: Literal["attention", "all"] = "attention"
    """which weights are trained"""
    lora: int = 0
    """rank of a LoRA on attention and feed-forward, alpha = rank (0: train the weights)"""
    lr: float = 3e-4
    """AdamW's learning rate"""
    warmup: int = 5
    """iterations over which the learning rate rises"""
    updates: int = 2
    """optimizer steps a pass"""
    passes: int = 1
    """passes over an iteration's (rollout, step) pairs"""
    clip: float = 0.4
    """PPO's clip of the log-ratio, nats a picture and step (divided by its dimensions)"""
    grad_clip: float = 1.0
    """largest norm of the gradient"""
    ema: float = 0.0
    """decay an iteration of the averaged weights that are evaluated and saved (0: no average)"""

    # evaluation, saving, machine
    eval_prompts: str = ""
    """prompts to evaluate on (default: the model folder's eval_prompts.jsonl, or else --prompts)"""
    eval_every: int = 10
    """iterations between evaluations"""
    eval_images: int = 640
    """pictures of an evaluation, over all prompts (the default rises to a multiple of them)"""
    eval_steps: int = 10
    """deterministic sampling steps of an evaluation"""
    eval_seed: int = 0
    """of the evaluation's noise"""
    save_every: int = 10
    """iterations between checkpoints"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints stay"""
    snapshot_every: int = 10
    """iterations between snapshots of the weights and two averages, for merge.py (0: none)"""
    keep_snapshots: int = 6
    """how many of the newest snapshots stay"""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """also send metrics and grids there, with each checkpoint"""
    batch: int = 160
    """rollouts in one forward of a process; this and the flags down to --offload: memory only"""
    train_batch: int = 0
    """(rollout, step) pairs in one forward and backward (0: as --batch)"""
    decode_batch: int = 8
    """pictures that a VAE decodes at once"""
    reward_batch: int = 0
    """pictures that rewards and feature networks see at once (0: as --batch)"""
    checkpointing: bool = False
    """recompute activations in the backward instead of keeping them"""
    offload: bool = False
    """keep the rollouts in the memory of the CPU until the update needs them"""
    shard: bool = False
    """deal weights, gradients and optimizer over the processes (FSDP)"""
    compile: bool = False
    """torch.compile the network; the first ratio is then 1 to rounding, not exactly"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the networks' forwards; step and log-probs are float32"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to run"""
    timeout: int = 30
    """minutes that a process waits for the others"""


class Groups(NamedTuple):
    """One iteration's rollouts: the trajectory of this process's B, all else of all P x N."""

    trajectory: Trajectory
    rewards: dict  # {name: [P, N]}
    set_features: torch.Tensor | None  # [P, N, F], what a distribution-wise reward sees
    potential: torch.Tensor  # [W + 1, P, N], diversity before each stochastic step and at the end
    nearest: torch.Tensor  # [P, N], distance to the nearest of the group


# --------------------------------------------------------------------------------------------------
# SAMPLE: N rollouts of each prompt, their rewards, and how different they are.


def explore(args, setup, texts, samples, key):
    """Rollouts of `texts`, numbered `samples` -> Trajectory.

    All noise is a function of (key, number).
    """
    model, policy = setup.model, setup.policy
    shape = (1 + len(policy.window), *model.shape)
    noise = seeded_noise((*key, 0), samples, shape).to(model.device)  # [B, 1 + W, ...]
    x_T = noise[:, 0] * model.initial_std
    step_noise = noise[:, 1:]

    # DRIFT (ii): noise on the prompt's embeddings, one for each rollout.
    prompt = model.encode(texts)
    prompt_noise = []
    for n, embedding in enumerate(prompt):
        drawn = seeded_noise((*key, 1 + n), samples, embedding.shape[1:])
        prompt_noise.append(drawn.to(embedding))
    condition = noised_prompt(
        prompt, prompt_noise, args.prompt_noise, args.tau1, args.tau2, args.psi
    )

    keep_on = "cpu" if args.offload else None
    return rollout(
        model, policy, condition, x_T, step_noise, setup.null_prompt, args.batch, keep_on
    )


def in_parts(function, inputs, args, device):
    """function(inputs), a few at a time: for memory only."""
    size = args.reward_batch or args.batch
    return torch.cat([function(part.to(device)) for part in inputs.split(size)])


def diversity_features(args, setup, trajectory, images):
    """Where distances are measured, before each stochastic step and at the end -> [W + 1, B, F].

    Before a step it is the picture predicted there. Without --diversity only the end: [1, B, F].
    """
    window, device = setup.policy.window, setup.model.device
    predicted = trajectory.x0_hats[window.start : window.stop] if args.diversity else ()
    if setup.diversity_features is None:  # distances between latents
        states = [*predicted, trajectory.latents[-1]]
        return torch.stack([latents.to(device).flatten(1) for latents in states])

    def features_of(latents):
        return setup.diversity_features(setup.model.decode(latents))

    features = [in_parts(features_of, latents, args, device) for latents in predicted]
    features.append(in_parts(setup.diversity_features, images, args, device))
    return torch.stack(features)


def sample_groups(args, setup, step):
    """SAMPLE: P groups of N rollouts -> Groups."""
    P, N, W = args.prompts_per_step, args.group_size, len(setup.policy.window)
    model, reference_set = setup.model, setup.reference_set

    # Roll out this process's share of the P x N rollouts.
    samples = processes.share(P * N)
    drawn = draw_prompts(len(setup.prompts), P, args.seed, step)  # [P]
    prompts = [setup.prompts[drawn[sample // N]] for sample in samples]  # B of them
    texts = [prompt.text for prompt in prompts]
    trajectory = explore(args, setup, texts, samples, (ROLLOUT_STREAM, args.seed, step))

    with torch.inference_mode():
        # Look at the pictures. What fails on one process stops them all.
        images = model.decode(trajectory.latents[-1].to(model.device))  # [B, 3, H, W]
        set_features = None
        with guards.together(f"iteration {step + 1}"):
            guards.finite({"a latent": trajectory.latents})
            guards.finite({"a predicted picture": trajectory.x0_hats})
            guards.finite({"a log-prob": trajectory.log_probs})
            rewards = setup.reward(images, texts, [prompt.metadata for prompt in prompts])
            if reference_set:
                set_features = in_parts(reference_set.features, images, args, model.device)
            features = diversity_features(args, setup, trajectory, images)  # [W + 1, B, F]

        # Gather what all processes found.
        for name, reward in rewards.items():
            rewards[name] = processes.gather(reward, P * N).reshape(P, N)
        if reference_set:
            set_features = processes.gather(set_features, P * N).reshape(P, N, -1)
        features = processes.gather(features.transpose(0, 1), P * N)  # [P N, W + 1, F]
        features = features.transpose(0, 1).reshape(features.shape[1], P, N, -1)

        # How different is each rollout from its group?
        potential = [group_diversity(state, args.metric, args.nearest) for state in features]
        potential = torch.stack(potential).expand(W + 1, P, N)
        nearest = group_diversity(features[-1], "cosine", nearest=1)
    return Groups(trajectory, rewards, set_features, potential, nearest)


@torch.no_grad()  # in inference_mode, --shard would gather the weights
def reference_features(args, setup, step):
    """Features [M, F] of M new rollouts, all prompts in turn: the members of a new reference."""
    M = args.reference
    samples = processes.share(M)
    drawn = draw_prompts(len(setup.prompts), M, args.seed, 0)  # [M]
    features = []
    for start in range(samples.start, samples.stop, args.batch):
        some = range(start, min(start + args.batch, samples.stop))
        texts = [setup.prompts[drawn[sample]].text for sample in some]
        trajectory = explore(args, setup, texts, some, (REFERENCE_STREAM, args.seed, step))
        images = setup.model.decode(trajectory.latents[-1].to(setup.model.device))
        features.append(in_parts(setup.reference_set.features, images, args, setup.model.device))
    return processes.gather(torch.cat(features), M)


@torch.no_grad()
def base_pixels(args, setup):
    """Pixels [M, D] of about 2,000 pictures of the base, equally many of each prompt.

    Of more prompts than that one picture each, of 2,000 at even steps.
    """
    chosen = evenly(len(setup.prompts), COMPONENT_PICTURES)
    prompts = [setup.prompts[number] for number in chosen]
    each = math.ceil(COMPONENT_PICTURES / len(prompts))
    M = each * len(prompts)
    mine = list(processes.share(M))
    most = math.ceil(M / processes.world())
    numbers = mine + mine[-1:] * (most - len(mine))  # equal work, which --shard needs
    key = (COMPONENT_STREAM, args.eval_seed)  # runs of all seeds share them, as judges
    steps, guidance = args.eval_steps, args.guidance
    drawn = stream(setup.model, prompts, each, numbers, steps, guidance, key, args.batch)
    parts = []
    quiet = processes.rank() > 0
    with tqdm(total=most, disable=quiet, desc="pictures of the base", leave=False) as bar:
        for some, images in drawn:
            parts.append(pixels(images))
            bar.update(len(some))
    return processes.gather(torch.cat(parts)[: len(mine)], M)


# --------------------------------------------------------------------------------------------------
# CREDIT: who is kept, and what each of its steps earns.


def weighted_advantage(args, weights, rewards, index):
    """Each reward centred by group and in units of its std, then weighted -> [P, K]."""
    total = 0
    for name, weight in weights.items():
        total = total + weight * group_advantage(rewards[name], index, args.std)
    return total


def credit(args, weights, groups):
    """CREDIT -> the kept rollouts, index [P, K], and advantages [W, P, K] of their steps."""
    P, N = groups.nearest.shape
    everyone = torch.arange(N).expand(P, N)
    score = weighted_advantage(args, weights, groups.rewards, everyone)  # [P, N]

    # DRIFT (i): keep a concentrated subset of each group.
    index = concentrated_subset(score, args.keep, args.select)  # [P, K]
    advantage = weighted_advantage(args, weights, groups.rewards, index)  # [P, K]
    if args.gardo:
        advantage = gardo(advantage, groups.nearest, index)

    # DRIFT (iii): pay each step for the diversity that it adds, in successful rollouts only. (So a
    # success that ends less different than it was predicted is fined.)
    potential = groups.potential
    if args.success and args.terminal == "keep":
        potential = potential * (score >= 0)
    no_reward = torch.zeros_like(potential[0])  # it is paid in `advantage` already
    returns = shaped_returns(no_reward, potential, args.gamma, 1.0, args.terminal)  # [W, P, N]
    return index, advantage + args.diversity * group_advantage(returns, index)


# --------------------------------------------------------------------------------------------------
# TRAIN: a clipped policy gradient on (rollout, step) pairs.


def clipped_loss(ratio, advantage, clip):
    """PPO's pessimistic surrogate, a loss for each pair."""
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(unclipped, clipped)


def gaussian_kl(mean, reference_mean, std):
    """KL(N(mean, std^2) || N(reference_mean, std^2)) in nats, summed over the dimensions -> [B]."""
    distance = (mean - reference_mean) / std
    return (distance**2).flatten(1).sum(1) / 2


def minibatches(args, W, kept, step):
    """The numbers of all W x kept pairs, shuffled, in `updates` parts for each pass.

    The steps of each rollout are shuffled first, then the rollouts in each place. So if `updates`
    divides W, a minibatch has each rollout equally often: less noise, and equal work.
    """
    random = np.random.default_rng([ORDER_STREAM, args.seed, step])
    pairs = np.arange(W * kept).reshape(W, kept)
    parts = []
    for _ in range(args.passes):
        shuffled = random.permuted(pairs, axis=0)
        shuffled = random.permuted(shuffled, axis=1)
        parts += torch.as_tensor(shuffled).flatten().chunk(args.updates)
    return parts


def pair_losses(args, setup, trajectory, w, row, advantage):
    """Policy loss, KL and |ratio - 1| [n] of n pairs: step w of the window of the rollout `row`.

    w, row and advantage are [n]; `row` counts this process's rollouts.
    """
    model, policy = setup.model, setup.policy
    D = math.prod(model.shape)
    k = w + policy.window.start  # step of the schedule
    x_t = trajectory.at(k, row)
    x_s = trajectory.at(k + 1, row)
    prompt = trajectory.condition(row, policy.fraction(k))

    mean, std, _ = policy.step(model, x_t, k, prompt, setup.null_prompt)
    log_ratio = log_prob(x_s, mean, std) - trajectory.log_probs[w, row]
    ratio = torch.exp(log_ratio / D)  # of one dimension, so that one clip fits all sizes
    loss = clipped_loss(ratio, advantage, args.clip / D)

    kl = torch.zeros_like(ratio)
    if args.kl:
        base = setup.frozen_model or model
        as_base = nullcontext() if setup.frozen_model else lora_off(model.network)
        with torch.no_grad(), as_base:
            base_mean, _, _ = policy.step(base, x_t, k, prompt, setup.null_prompt)
        kl = gaussian_kl(mean, base_mean, std)
    return loss, kl, (ratio.detach() - 1).abs()


def backward(args, setup, trajectory, kept, advantage, minibatch):
    """Adds up the gradients of this process's pairs -> sums [4] and the largest |ratio - 1|.

    kept [P K]: the numbers of the kept rollouts; advantage [W, P K]. Pair w P K + j of `minibatch`
    is step w of the kept rollout j. sums: of the loss, the KL, the clipped pairs and all pairs.
    """
    D = math.prod(setup.model.shape)
    local = processes.share(args.prompts_per_step * args.group_size)
    rollouts = kept[minibatch % len(kept)]
    local_pairs = minibatch[(rollouts >= local.start) & (rollouts < local.stop)]
    sums = torch.zeros(4, dtype=torch.float64, device=kept.device)
    ratio_error = torch.zeros((), device=kept.device)  # a tensor: .item() would stop a GPU

    for pairs in local_pairs.split(args.train_batch or args.batch):
        if not len(pairs):
            break
        w = pairs // len(kept)
        j = pairs % len(kept)
        row = kept[j] - local.start
        loss, kl, error = pair_losses(args, setup, trajectory, w, row, advantage[w, j])
        objective = (loss + args.kl * kl / D).sum() / len(minibatch)
        objective.backward()

        clipped = (error > args.clip / D).sum()
        count = torch.ones_like(loss).sum()
        sums += torch.stack([loss.sum(), kl.sum(), clipped, count]).detach().double()
        ratio_error = torch.maximum(ratio_error, error.max())
    return sums, ratio_error


def update(args, setup, trajectory, index, advantage, step):
    """TRAIN: one optimizer step a minibatch -> metrics. index [P, K], advantage [W, P, K]."""
    device = setup.model.device
    N, W = args.group_size, len(setup.policy.window)
    clip = args.clip / math.prod(setup.model.shape)
    first_of_group = torch.arange(len(index))[:, None] * N
    kept = (first_of_group + index.cpu()).flatten().to(device)  # [P K]
    advantage = advantage.float().reshape(W, -1).to(device)  # [W, P K]
    totals = torch.zeros(4, dtype=torch.float64, device=device)

    for n, minibatch in enumerate(minibatches(args, W, len(kept), step)):
        setup.optimizer.zero_grad()
        sums, error = backward(args, setup, trajectory, kept, advantage, minibatch.to(device))
        tensors = {"an advantage": advantage, "the loss": sums}
        for name, parameter in setup.trained.items():
            tensors[f"the gradient of {name}"] = parameter.grad
        guards.check_finite(step, tensors, device)

        # One optimizer step on the gradients of all processes.
        if not args.shard:  # FSDP has summed them already
            processes.sum_gradients(setup.trained.values())
        totals = totals + processes.all_sum(sums)
        grad_norm = clip_gradients(setup.trained.values(), args.grad_clip)
        if n == 0:  # before the first step the ratio is 1, to rounding
            ratio_error = processes.all_max(error, device)
        guards.check_update(step, grad_norm, ratio_error, guards.tolerance(args), clip)
        setup.optimizer.step()

    loss, kl, clipped, count = totals.tolist()
    return {
        "loss": loss / count,
        "kl": kl / count,
        "clip_fraction": clipped / count,
        "grad_norm": grad_norm,
        "ratio_error": ratio_error,
    }


# --------------------------------------------------------------------------------------------------
# The loop.


def set_learning_rate(args, optimizer, iteration):
    """It rises over the first `warmup` iterations and stays."""
    for group in optimizer.param_groups:
        group["lr"] = args.lr * min(1, iteration / max(1, args.warmup))


def renew_reference(args, setup, groups, oldest, step):
    """The newest pictures take the place of the oldest members -> metrics."""
    members = setup.reference_set.members
    features = groups.set_features.flatten(0, 1)  # [P N, F]
    places = (oldest + torch.arange(len(features), device=features.device)) % args.reference
    members.replace(places, features)
    metrics = {"reference": members.value()}
    if args.refresh and (step + 1) % args.refresh == 0:
        metrics["drift"] = members.refresh(reference_features(args, setup, step + 1))
    return metrics


def sample_metrics(weights, groups):
    """What the rollouts were worth, and how different they were -> metrics."""
    of_pictures = {name: weight for name, weight in weights.items() if name not in DISTRIBUTION}
    counted = of_pictures or weights  # a price of the FID has no level: it is relative to the set
    total = sum(weight * groups.rewards[name] for name, weight in counted.items())  # [P, N]
    metrics = {"reward": total.mean().item()}
    for name, reward in groups.rewards.items():
        metrics["reward/" + name] = reward.mean().item()
    metrics["diversity"] = groups.potential[-1].mean().item()
    metrics["zero_std_fraction"] = (total.std(1) < 1e-6).double().mean().item()
    return metrics


def train(args, prompts, eval_prompts, interrupt):
    """The algorithm. Returns early, after a checkpoint, when it is asked to stop."""
    device = processes.start(args.device, args.timeout)
    setup = open_setup(args, prompts, eval_prompts, device)
    run = Run(args, setup, device)
    evaluate = evaluation.Evaluator(args, setup, eval_prompts, device)
    weights, reference_set = setup.reward.weights, setup.reference_set

    if run.is_new and setup.components:
        setup.components.fit(base_pixels(args, setup))
    if run.is_new and reference_set:
        reference_set.members.refresh(reference_features(args, setup, 0))
    run.open_log()
    if run.is_new:
        run.log(0, evaluate(0))

    for step in run.steps():
        iteration = step + 1
        oldest = step * args.prompts_per_step * args.group_size  # member of the reference set

        # SAMPLE
        began = time.time()
        groups = sample_groups(args, setup, step)
        sampled = time.time()

        # CREDIT
        if reference_set:
            groups.rewards[setup.reward.distribution] = dist_reward.price_groups(
                reference_set.members, groups.set_features, oldest, args.price, args.replace
            )
        run.watch(groups)
        index, advantage = credit(args, weights, groups)

        # TRAIN
        set_learning_rate(args, setup.optimizer, iteration)
        metrics = update(args, setup, groups.trajectory, index, advantage, step)
        setup.averages.update(iteration)
        if reference_set:
            metrics |= renew_reference(args, setup, groups, oldest, step)

        # LOG AND SAVE
        metrics |= sample_metrics(weights, groups)
        metrics["seconds_sample"] = sampled - began
        metrics["seconds_train"] = time.time() - sampled
        metrics["peak_memory_gb"] = processes.peak_memory(device)
        if run.is_due(iteration, args.eval_every):
            metrics |= evaluate(iteration)
        run.log(iteration, metrics)
        run.save_results(iteration)
        stop = interrupt.asked(device)
        run.save_checkpoint(iteration, stop)
        if stop:
            return


@record
def main(argv=None):
    """The command: checks everything, trains, and prints the table of before and after."""
    args = flags.parse_args(Args, __doc__, argv)
    if args.check:
        raise SystemExit(check_generator(args))
    try:
        args, prompts, eval_prompts = check(args, Args())
    except ValueError as error:
        flags.refuse(error)
    if processes.rank() == 0:
        print(json.dumps(vars(args)))
        print(plan(args, prompts), flush=True)
    if args.dry_run:
        return

    is_complete = files.newest_checkpoint(args.out)[1]["step"] == args.iterations
    with processes.Interrupt() as interrupt, guards.writing(args.out):
        if not is_complete:
            train(args, prompts, eval_prompts, interrupt)
    if interrupt.signal:
        interrupt.leave(files.stopped(args.out, interrupt.signal))
    if processes.rank() == 0:
        if is_complete:
            print(f"{args.out}: already complete")
        print(report.table(args.out))
    processes.finish()


if __name__ == "__main__":
    main()
