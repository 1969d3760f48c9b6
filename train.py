"""Fine-tunes an image generator by reinforcement learning, and keeps its pictures diverse.

    torchrun train.py                                    the default: DRIFT on assets/tiny, a few minutes on two CPU cores
    torchrun train.py --drift off                        plain GRPO, everything else the same
    torchrun --nproc_per_node 8 train.py                 the same to rounding: every size below is global

The algorithm is `train`: prompts -> rollouts -> rewards -> potential -> subset -> advantages -> clipped update (GRPO for flows,
arXiv 2505.05470; DRIFT, arXiv 2601.12401). Simplifications, on purpose:
  1. no critic: a rollout's advantage is its reward against its group's mean;    2. no replay: rollouts are used once and dropped;
  3. randomness is a function of (seed, step, sample), so nothing random is saved;    4. no learning-rate decay, no loss scaling.
"""
import json
import math
import numpy as np
import time
import torch
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm
from typing import Literal
import bases
import dist_reward
import eval as evaluation
from support import files
from support import flags
from support import guards
from support import processes
from bases.lora import add_lora, export, lora_off
from bases.tensors import save_snapshots
from commands.checks import check, plan
from prompting import draw_prompts, noised_prompt
from rewards import Reward
from rewards.features import load_features
from rewards.targets import open_pool
from sampling import Policy, concentrated_subset, log_prob, rollout, seeded_noise
from shaping import gardo, group_advantage, group_diversity, shaped_returns
from support.averages import EMA_LENGTHS, power_decay, swapped
from support.sharding import clip_gradients, shard

ROLLOUT_STREAM, REFERENCE_STREAM, ORDER_STREAM = 0, 1, 3                 # 2 is the evaluation's: each has its own noise


@dataclass
class Args:
    # the run
    model: str = "assets/tiny"                      # base: a folder or hub id of Stable Diffusion 1, 2, 3 or 3.5; sit:FILE; edm2:FILE; or a run's model/
    prompts: str = ""                               # prompts to train on, .txt or .jsonl (default: the model folder's prompts.jsonl)
    reward: str = "class:1"                         # what to raise, as in class:1,fid:0.3; the names are in rewards.py; each in units of its std
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
    # distribution-wise reward, if --reward names fid or kid
    features: str = "reward"                        # measured in: reward, evaluator, inception:FILE, dinov2[:MODEL], clip[:MODEL], module:function
    target: str = ""                                # .npz with mu and sigma, folder of pictures or idx file (default: the model folder's own)
    price: Literal["potential", "exact", "quadratic"] = "potential"  # one price a picture to first order; or one for each set of pictures
    replace: int = 0                                # K, pictures of a set, each of another group (0: one of every group)
    reference: int = 640                            # M, generated pictures in the reference; the oldest make way for each iteration's
    refresh: int = 0                                # iterations between wholly new references; 0: never
    # DRIFT (i): concentrated subset
    select: Literal["window", "median", "band", "trim", "all", "spread"] = "all"  # rule by which rollouts are kept for the update; our reading of DRIFT: window
    keep: int = 15                                  # rollouts kept of each group, unless all are
    # DRIFT (ii): prompt noise
    prompt_noise: float = 0.5                       # scale s of the noise on the prompt embedding; 0 switches it off
    tau1: float = 0.6                               # no noise when less than this fraction of the steps is still to go
    tau2: float = 1.2                               # all noise when more than this is to go; above 1: never all noise
    psi: float = 1.0                                # how far the noised embedding is rescaled to its own mean and std
    # DRIFT (iii): diversity shaping
    diversity: float = 0.5                          # weight of the shaped diversity beside the normalised reward; 0 switches it off
    diversity_features: str = "reward"              # where distances are measured: latents, or whatever --features takes
    metric: Literal["cosine", "euclidean"] = "cosine"  # distance of two rollouts
    nearest: int = 3                                # mean distance to this many nearest of the group; 0: to all
    success: bool = True                            # the potential counts only for rollouts with at least their group's mean reward (--terminal keep)
    gamma: float = 1.0                              # discount of the shaping
    terminal: Literal["keep", "zero"] = "keep"      # potential of the finished picture: keep it (a bonus), or zero (optimum unchanged)
    # other protections, to compare with
    kl: float = 0.0                                 # weight of the KL to the base model, nats a step against a normalised advantage
    gardo: bool = False                             # GARDO: positive advantages times the relative distance to the nearest of the group
    # update
    std: Literal["batch", "group", "none"] = "batch"  # what divides a centred reward: std of the batch, of its group, or nothing
    train: Literal["attention", "all"] = "attention"  # which weights learn
    lora: int = 0                                   # rank of a LoRA on attention and feed-forward, in place of the weights (alpha = rank); 0: the weights themselves
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
    snapshot_every: int = 10                        # iterations between snapshots of the trained weights and two averages, for merge.py; 0: none
    keep_snapshots: int = 6                         # how many of the newest stay
    batch: int = 160                                # rollouts in one forward of a process: memory only, as all down to --shard
    train_batch: int = 0                            # (rollout, step) pairs in one forward and backward; 0: as --batch
    decode_batch: int = 8                           # pictures that a VAE decodes at once
    reward_batch: int = 0                           # pictures that rewards and features look at, at once; 0: as --batch
    checkpointing: bool = False                     # recompute activations in the backward instead of keeping them
    offload: bool = False                           # keep the rollouts in the memory of the CPU until the update asks for them
    shard: bool = False                             # deal weights, gradients and optimizer over the processes (FSDP), if training fits no single one
    compile: bool = False                           # torch.compile the network; the first ratio is then 1 to rounding, not exactly
    precision: Literal["float32", "bfloat16"] = "float32"  # of the networks' forwards; step and log-probs are float32
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to run
    timeout: int = 30                               # minutes that a process waits for the others


def clipped_loss(ratio, advantage, clip):
    """PPO's pessimistic surrogate, a loss for each pair: max(-A r, -A clip(r, 1 - clip, 1 + clip))."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def gaussian_kl(mean, reference_mean, std):
    """KL(N(mean, std^2) || N(reference_mean, std^2)) in nats, summed over the dimensions -> [B]."""
    return (((mean - reference_mean) / std) ** 2).flatten(1).sum(1) / 2


def credit(args, weights, terms, potential, closest):
    """Reward terms {name: [P, N]} and potentials [W + 1, P, N] -> who is kept, index [P, K], and the advantage of each step, [W, P, K]."""
    total = lambda index: sum(weight * group_advantage(terms[name], index, args.std) for name, weight in weights.items())
    score = total(torch.arange(potential.shape[2]).expand(*potential.shape[1:]))              # [P, N]
    index = concentrated_subset(score, args.keep, args.select)
    advantage = total(index)                                                                 # [P, K]
    if args.gardo:
        advantage = gardo(advantage, closest, index)
    if args.success and args.terminal == "keep":                         # DRIVE, the same group's later paper: only a success is paid
        potential = potential * (score >= 0)
    shaped = shaped_returns(torch.zeros_like(potential[0]), potential, args.gamma, 1.0, args.terminal)   # of the diversity alone: the reward is in `advantage`
    return index, advantage + args.diversity * group_advantage(shaped, index)                # each signal in units of its own std


def explore(args, model, policy, texts, null, samples, key):
    """Rollouts of the prompts `texts`, one for each number in `samples` -> Trajectory; everything random is a function of (key, number)."""
    noise = seeded_noise((*key, 0), samples, (1 + len(policy.window), *model.shape)).to(model.device)
    prompt = model.encode(texts)
    prompt_noise = tuple(seeded_noise((*key, 1 + n), samples, y.shape[1:]).to(y) for n, y in enumerate(prompt))
    condition = noised_prompt(prompt, prompt_noise, args.prompt_noise, args.tau1, args.tau2, args.psi)
    return rollout(model, policy, condition, noise[:, 0] * model.initial_std, noise[:, 1:], null, args.batch, "cpu" if args.offload else None)


@torch.no_grad()                                                         # in inference_mode, --shard would gather weights for it alone
def fresh_reference(args, model, policy, prompts, null, measure, step):
    """Features [M, D] of M new rollouts, all prompts in turn: what the distribution-wise reward starts from."""
    mine, found, who = processes.share(args.reference), [], draw_prompts(len(prompts), args.reference, args.seed, 0)
    for at in range(mine.start, mine.stop, args.batch):
        samples = range(at, min(at + args.batch, mine.stop))
        trajectory = explore(args, model, policy, [prompts[w].text for w in who[at:samples.stop]], null, samples, (REFERENCE_STREAM, args.seed, step))
        found += [measure(part) for part in model.decode(trajectory.latents[-1].to(model.device)).split(args.reward_batch or args.batch)]
    return processes.gather(torch.cat(found), args.reference)


def sample_groups(args, model, policy, prompts, null, reward, measure, look, step):
    """SAMPLE: rolls out this process's share -> its trajectory; and of all rollouts: reward terms, features of the pictures (or None),
    potentials, nearest distances."""
    P, N, W, samples = args.prompts_per_step, args.group_size, len(policy.window), processes.share(args.prompts_per_step * args.group_size)
    in_parts = lambda f, x: torch.cat([f(part.to(model.device)) for part in x.split(args.reward_batch or args.batch)])
    who = draw_prompts(len(prompts), P, args.seed, step)[np.array(samples) // N]              # the prompt of each rollout
    texts = [prompts[w].text for w in who]
    trajectory = explore(args, model, policy, texts, null, samples, (ROLLOUT_STREAM, args.seed, step))
    with torch.inference_mode():
        images = model.decode(trajectory.latents[-1].to(model.device))                        # [B, 3, H, W]
        states = trajectory.x0_hats[policy.window.start:policy.window.stop] if args.diversity else ()         # [W, B, ...]; looked at if paid for
        space, finished = (look, images) if look else (lambda x: x.flatten(1), trajectory.latents[-1])
        with guards.together(f"iteration {step + 1}"):
            guards.finite({"a latent": trajectory.latents, "a predicted picture": trajectory.x0_hats, "a log-prob": trajectory.log_probs})
            terms = reward(images, texts, [prompts[w].metadata for w in who])
            found = in_parts(measure, images) if measure else None
            seen = [in_parts(lambda x: space(model.decode(x) if look else x), state) for state in states] + [in_parts(space, finished)]
        found = processes.gather(found, P * N).reshape(P, N, -1) if measure else None
        terms = {name: processes.gather(value, P * N).reshape(P, N) for name, value in terms.items()}
        features = processes.gather(torch.stack(seen, 1), P * N).transpose(0, 1).reshape(len(seen), P, N, -1)
        potential = torch.stack([group_diversity(f, args.metric, args.nearest) for f in features]).expand(W + 1, P, N)
        closest = group_diversity(features[-1], "cosine", nearest=1)                          # [P, N]
    return trajectory, terms, found, potential, closest


def update(args, model, reference, policy, null, optimizer, weights, trajectory, index, advantage, step):
    """TRAIN: clipped policy gradient on the kept (rollout, step) pairs, in `updates` optimizer steps a pass -> metrics. Their order is
    random, but if `updates` divides W every optimizer step sees each rollout equally often: less noise, and equal work for the processes."""
    W, D, samples = len(policy.window), math.prod(model.shape), processes.share(args.prompts_per_step * args.group_size)
    kept = (torch.arange(len(index))[:, None] * args.group_size + index.cpu()).flatten().to(model.device)      # sample numbers [P K]
    advantage = advantage.float().reshape(W, -1).to(model.device)                             # [W, P K]
    random, grid, totals, ratio_error, norm = np.random.default_rng([ORDER_STREAM, args.seed, step]), np.arange(advantage.numel()), 0, advantage.new_zeros(()), 0.0
    deal = lambda: random.permuted(random.permuted(grid.reshape(W, -1), axis=0), axis=1)      # the steps of each rollout, then the rollouts
    chunks = [c for _ in range(args.passes) for c in torch.as_tensor(deal(), device=model.device).flatten().chunk(args.updates)]
    for n, chunk in enumerate(chunks):
        optimizer.zero_grad()
        tally = torch.zeros(4, dtype=torch.float64, device=model.device)
        mine = chunk[(kept[chunk % len(kept)] >= samples.start) & (kept[chunk % len(kept)] < samples.stop)]
        for pairs in mine.split(args.train_batch or args.batch) if len(mine) else ():
            w, j = pairs // len(kept), pairs % len(kept)                  # pair w P K + j: step w of the window of the kept rollout j
            k, row = w + policy.window.start, kept[j] - samples.start                         # step of the schedule, rollout of ours
            x_t, x_s, prompt = trajectory.at(k, row), trajectory.at(k + 1, row), trajectory.condition(row, policy.fraction(k))
            mean, std, _ = policy.step(model, x_t, k, prompt, null)
            ratio = torch.exp((log_prob(x_s, mean, std) - trajectory.log_probs[w, row]) / D)
            loss, kl = clipped_loss(ratio, advantage[w, j], args.clip / D), torch.zeros_like(ratio)
            if args.kl:
                with torch.no_grad(), nullcontext() if reference else lora_off(model.network):
                    reference_mean, _, _ = policy.step(reference or model, x_t, k, prompt, null)
                kl = gaussian_kl(mean, reference_mean, std)
            ((loss + args.kl * kl / D).sum() / len(chunk)).backward()    # nats over D, both of them
            error = (ratio.detach() - 1).abs()
            tally += torch.stack([loss.sum(), kl.sum(), (error > args.clip / D).sum(), torch.ones_like(loss).sum()]).detach().double()
            ratio_error = torch.maximum(ratio_error, error.max()) if n == 0 else ratio_error                  # no .item(): a GPU would stop here
        guards.check_finite(step, {"an advantage": advantage, "the loss": tally, **{f"the gradient of {n}": p.grad for n, p in weights.items()}}, model.device)
        args.shard or processes.sum_gradients(weights.values())            # FSDP has summed them in the backward
        totals, norm = totals + processes.all_sum(tally), clip_gradients(weights.values(), args.grad_clip)
        ratio_error = processes.all_max(ratio_error, model.device) if n == 0 else ratio_error
        guards.check_update(step, norm, ratio_error, guards.TOLERANCE["compiled " * args.compile + args.precision] * (1 + 2 * abs(args.guidance - 1)), args.clip / D)
        optimizer.step()
    loss, kl, clipped, count = totals.tolist()
    return {"loss": loss / count, "kl": kl / count, "clip_fraction": clipped / count, "grad_norm": norm, "ratio_error": ratio_error}


def open_all(args, prompts, judged, device):
    """-> model, what learns {name: parameter}, embedding of the empty prompt, reward, the space of --diversity_features; and
    for the reward fid or kid its reference, features and target (else None). Exits with code 2 where a file turns out not to be what it should."""
    with flags.refusing():
        model = bases.load(args.model, device, args.precision, args.checkpointing, args.decode_batch, args.compile)
        model.forget_text_encoders([p.text for p in prompts + judged] + [""])
        weights = add_lora(model.network, args.lora, args.lora, seed=args.seed) if args.lora else {
            n: p for n, p in model.network.named_parameters() if p.requires_grad_(args.train == "all" or "attn" in n).requires_grad}
        args.compile and guards.check_compiled(model, model.encode([prompts[0].text]), weights.values())
        reward = Reward(args.reward, model.folder, device, args.reward_batch or args.batch)
        look = None if args.diversity_features == "latents" else load_features(args.diversity_features, model.folder, device)
        blank, kind = model.decode(torch.zeros(1, *model.shape, device=device)), reward.distribution
        opened = open_pool(kind, args.features, args.target, model.folder, args.reference, blank, args.price) if kind else (None,) * 3
        return model, weights, model.encode([""]), reward, look, *opened


def train(args, prompts, judged, interrupt):
    """The algorithm, and around it evaluation, log and checkpoints. Returns early, after a checkpoint, when it is asked to stop."""
    device, out = processes.start(args.device, args.timeout), Path(args.out)
    model, weights, null, reward, look, pool, measure, target = open_all(args, prompts, judged, device)
    policy = Policy(model.path, model.path.times(args.steps).to(device), range(*map(int, args.window.split(":"))), args.eta, args.kernel, args.guidance)
    reference = model.frozen() if args.kl and not args.lora else None
    weights = {n: p for n, p in shard(model.network).items() if n in weights} if args.shard else weights
    args.shard and reference and shard(reference.network)
    averages = {key: {n: p.detach().clone() for n, p in weights.items()} for key in ("ema",) * (args.ema > 0) + EMA_LENGTHS * (args.snapshot_every > 0)}
    optimizer = torch.optim.AdamW(weights.values(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    everything = weights | {f"average.{key}.{n}": v for key, tensors in averages.items() for n, v in tensors.items()} | (pool.state() if pool else {})
    newest, state = files.newest_checkpoint(out)
    guards.check_start(out, state["step"], device)
    if newest:
        files.load_checkpoint(newest, everything, optimizer)
    elif pool:
        pool.refresh(fresh_reference(args, model, policy, prompts, null, measure, 0))
    log = files.Log(out, vars(args), state["lines"])
    name = "reward" if args.features == "evaluator" and pool else "evaluator"                 # who judges is not who rewards
    judge = evaluation.Judge(model.folder, name, device) if (model.folder / name).is_dir() else None

    def judged_now(iteration):
        with swapped(weights, averages.get("ema", {})):
            return evaluation.evaluate(args, model, judged, judge, reward, look, measure, target, iteration)

    if not newest:
        log.write({"iteration": 0} | judged_now(0))
    bar = tqdm(range(state["step"], args.iterations), initial=state["step"], total=args.iterations, disable=processes.rank() > 0, desc=out.name[:30])
    for step in bar:
        began, oldest = time.time(), step * args.prompts_per_step * args.group_size
        # ------------------------------------------------ SAMPLE
        trajectory, terms, found, potential, closest = sample_groups(args, model, policy, prompts, null, reward, measure, look, step)
        sampled = time.time()
        # ------------------------------------------------ CREDIT
        if pool:
            terms[reward.distribution] = dist_reward.price_groups(pool, found, oldest, args.price, args.replace)
        index, advantage = credit(args, reward.weights, terms, potential, closest)
        # ------------------------------------------------ TRAIN
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup))
        row = update(args, model, reference, policy, null, optimizer, weights, trajectory, index, advantage, step)
        for key, tensors in averages.items():
            decay = args.ema if key == "ema" else power_decay(step + 1, key)
            for name, value in tensors.items():
                value.lerp_(weights[name].detach(), 1 - decay)
        if pool:                                                         # the oldest members make way
            pool.replace((oldest + torch.arange(found[..., 0].numel(), device=device)) % args.reference, found.flatten(0, 1))
            row["reference"] = pool.value()
            if args.refresh and (step + 1) % args.refresh == 0:
                row["drift"] = pool.refresh(fresh_reference(args, model, policy, prompts, null, measure, step + 1))
        # ------------------------------------------------ LOG
        total = sum(weight * terms[name] for name, weight in reward.weights.items())          # [P, N]
        row |= {"reward": total.mean().item(), **{"reward/" + name: value.mean().item() for name, value in terms.items()}}
        row |= {"diversity": potential[-1].mean().item(), "zero_std_fraction": (total.std(1) < 1e-6).double().mean().item()}
        row |= {"seconds_sample": sampled - began, "seconds_train": time.time() - sampled, "peak_memory_gb": processes.peak_memory(device)}
        bar.set_postfix(reward=f"{row['reward']:.3f}", diversity=f"{row['diversity']:.3f}", ratio_error=f"{row['ratio_error']:.0e}")
        last = step + 1 == args.iterations
        log.write({"iteration": step + 1} | row | (judged_now(step + 1) if last or (step + 1) % args.eval_every == 0 else {}))
        if last:
            with swapped(weights, averages.get("ema", {})):
                files.save_model(out / "model", model)
                if args.lora and processes.rank() == 0:
                    files.write_atomic(out / "lora", lambda folder: export(model.network, folder, {"base": args.model, "iteration": step + 1}))
        if args.snapshot_every and (last or (step + 1) % args.snapshot_every == 0):
            save_snapshots(out, step + 1, weights, {s: averages[s] for s in EMA_LENGTHS}, args.model, args.keep_snapshots)
        stop = interrupt.asked(device)
        if stop or last or (step + 1) % args.save_every == 0:
            args.shard or processes.check_equal(weights, device)
            files.save_checkpoint(out, step + 1, everything, optimizer, log.lines, args.keep_checkpoints)
        if stop:
            return


@record
def main(argv=None):
    args = flags.parse_args(Args, __doc__, argv)
    try:
        args, prompts, judged = check(args, Args())
    except ValueError as error:
        flags.refuse(error)
    if processes.rank() == 0:
        print(json.dumps(vars(args)), plan(args, prompts), sep="\n", flush=True)
    if args.dry_run:
        return
    complete = files.newest_checkpoint(args.out)[1]["step"] == args.iterations
    with processes.Interrupt() as interrupt, guards.writing(args.out):
        complete or train(args, prompts, judged, interrupt)
    if interrupt.signal:
        interrupt.leave(f"{args.out}: stopped after checkpoint {files.newest_checkpoint(args.out)[1]['step']} by signal {interrupt.signal}; the same command goes on")
    if processes.rank() == 0:
        print(f"{args.out}: already complete\n" * complete + files.before_and_after(args.out))
    processes.finish()
if __name__ == "__main__":
    main()
