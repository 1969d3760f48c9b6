"""Checks: everything that can be wrong with a command line, before anything is loaded or written.

Each flag and each file is looked at; a ValueError is the user's one line, naming the value and the remedy (train.py turns it into exit
code 2). Nothing here changes what is computed, and no weight is read.
"""
import dataclasses
import math
import os
import re

import torch

import eval as evaluation
import models
import runtime
from features import check_features, check_target, target_path
from prompting import read_prompts
from rewards import DISTRIBUTION, check_classifier, check_labels, parse

LIMITS = {                                                               # the smallest and largest value of each number
    **dict.fromkeys(("iterations", "prompts_per_step", "steps", "updates", "passes", "eval_every", "eval_images", "eval_steps",
                     "save_every", "keep_checkpoints", "batch"), (1, math.inf)),
    **dict.fromkeys(("seed", "eval_seed", "warmup", "nearest", "replace", "refresh", "guidance", "tau1", "tau2", "prompt_noise",
                     "diversity", "kl"), (0, math.inf)),
    **dict.fromkeys(("lr", "clip", "grad_clip"), (1e-12, math.inf)), "eta": (1e-3, 1), "psi": (0, 1), "gamma": (0, 1), "ema": (0, 0.9999),
    **dict.fromkeys(("group_size", "keep", "reference"), (2, math.inf))}


def check(args, default):
    """Resolves defaults that depend on other flags and refuses what cannot run -> args, prompts, eval prompts. `default`: the untouched flags."""
    def need(ok, message):
        if not ok:
            raise ValueError(message)
    off = {"select": "all", "prompt_noise": 0.0, "diversity": 0.0}
    changed = {k: v for k, v in vars(args).items() if k not in ("out", "dry_run") and v != getattr(default, k)}
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
    weights, folder = parse(args.reward), models.check(args.model)
    if {*weights} & {*DISTRIBUTION}:
        D = check_features(args.features, folder)
        check_target(target_path(args.target, args.features, folder), D, "kid" in weights)
        if args.features == "evaluator":                                 # then the reward classifier judges
            evaluation.check_real(folder / "reward" / "real.npz")
        need(rollouts <= args.reference, f"--reference {args.reference}: must hold the {rollouts} rollouts of an iteration")
        need(args.prompts_per_step % (args.replace or 1) == 0,
             f"--replace {args.replace}: does not divide --prompts_per_step {args.prompts_per_step}")
    check_classifier(folder / "reward"), check_classifier(folder / "evaluator"), evaluation.check_real(folder / "evaluator" / "real.npz")
    args = dataclasses.replace(args, prompts=args.prompts or str(folder / "prompts.jsonl"),
                               eval_prompts=args.eval_prompts or str(folder / "eval_prompts.jsonl"))
    prompts, judged = read_prompts(args.prompts), read_prompts(args.eval_prompts)
    check_labels(judged, args.eval_prompts), check_labels(prompts if {*weights} - {*DISTRIBUTION} else [], args.prompts)
    need(args.eval_images % len(judged) == 0 and args.eval_images >= 2 * len(judged),
         f"--eval_images {args.eval_images}: must be a multiple of the {len(judged)} prompts of {args.eval_prompts}, two each at least")
    runtime.open_run(args.out, vars(args), free=("out", "dry_run"))
    return args, prompts, judged


def plan(args, prompts):
    """The sizes that follow from the flags, for a person to read before hours are spent."""
    first, end = map(int, args.window.split(":"))
    rollouts, pairs = args.prompts_per_step * args.group_size, args.prompts_per_step * args.keep * (end - first)
    sets = {"potential": f"{rollouts} pictures"}.get(args.price, f"{rollouts // (args.replace or args.prompts_per_step)} sets of "
                                                     f"{args.replace or args.prompts_per_step} pictures")
    pool = f"; a reference of {args.reference} pictures prices {sets} an iteration" if {*parse(args.reward)} & {*DISTRIBUTION} else ""
    return (f"{len(prompts)} prompts; an iteration: {args.prompts_per_step} groups x {args.group_size} = {rollouts} rollouts of {args.steps} steps, "
            f"{args.keep} kept of each group x {end - first} stochastic steps = {pairs} pairs, {args.passes * args.updates} optimizer steps of "
            f"{pairs // args.updates} pairs; {args.iterations} iterations = {args.iterations * rollouts} rollouts{pool}")
