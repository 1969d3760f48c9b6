"""Checks: everything that can be wrong with a command line, before anything is loaded or written.

Each flag and each file is looked at; a ValueError is the user's one line, naming the value and the remedy (train.py turns it into exit
code 2). Nothing here changes what is computed, and no weight is read.
"""
import dataclasses
import math
import os
import re
import torch
from pathlib import Path
import bases
from bases import files as base_files
from rewards import targets
from support import compiling, files
from bases.files import BESIDE, OWN
from support.files import read_json
from bases.tensors import open_checkpoints
from commands.compare import grid_files, open_runs
from commands.picture_sets import choose, open_pictures, read_sidecar, settings, sidecar
from prompting import read_prompts
from rewards import DISTRIBUTION, check_labels, check_reward, needs_labels, parse
from rewards.classifier import check_classifier
from rewards.features import TINY, check_features
from rewards.targets import check_target, target_path
from sampling import VP
from support.averages import sweep

SEED = 2**63 - 1                                                         # the largest that torch takes
LIMITS = {                                                               # the smallest and largest value of each number
    **dict.fromkeys(("iterations", "prompts_per_step", "steps", "updates", "passes", "eval_every", "eval_images", "eval_steps",
                     "save_every", "keep_checkpoints", "keep_snapshots", "batch", "timeout", "decode_batch"), (1, math.inf)),
    **dict.fromkeys(("train_batch", "reward_batch"), (0, math.inf)),
    **dict.fromkeys(("warmup", "nearest", "replace", "refresh", "snapshot_every", "lora", "guidance", "tau1", "tau2", "prompt_noise",
                     "diversity", "kl"), (0, math.inf)), **dict.fromkeys(("seed", "eval_seed"), (0, SEED)),
    **dict.fromkeys(("lr", "clip", "grad_clip"), (1e-12, math.inf)), "eta": (1e-3, 1), "psi": (0, 1), "gamma": (0, 1), "ema": (0, 0.9999),
    **dict.fromkeys(("group_size", "keep", "reference"), (2, math.inf))}
IDLE = {**dict.fromkeys(("tau1", "tau2", "psi"), "prompt_noise"), **dict.fromkeys(("success", "gamma", "terminal"), "diversity")}      # where that is 0


def check(args, default):
    """Resolves defaults that depend on other flags and refuses what cannot run -> args, prompts, eval prompts. `default`: the untouched flags."""
    def need(ok, message):
        if not ok:
            raise ValueError(message)
    off = {"select": "all", "prompt_noise": 0.0, "diversity": 0.0}
    changed = {k: v for k, v in vars(args).items() if k not in ("out", "dry_run") and v != getattr(default, k)}
    need(args.select != "all" or args.drift == "off" or "keep" not in changed or args.keep == args.group_size,
         f"--keep {args.keep}: means nothing with --select all; add --select window, or another rule")
    for name in (name for name, value in off.items() if args.drift == "off" and name in changed and changed[name] != value):
        raise ValueError(f"--{name} {changed[name]}: --drift off would switch it off; leave out one of them")
    need(args.price != "potential" or not args.replace, f"--replace {args.replace}: means nothing with --price potential; add --price exact")
    need(not args.lora or args.train == "attention", f"--train {args.train}: a LoRA learns in attention and feed-forward, whatever this says; leave out --lora or --train")
    args = dataclasses.replace(args, out=args.out or files.run_name(changed), **(off if args.drift == "off" else {}))
    args = dataclasses.replace(args, keep=args.group_size if args.select == "all" else args.keep)
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        need(low <= value <= high and math.isfinite(value), f"--{name} {value}: must be a finite number from {low:g} to {high:g}")
    for name, switch in IDLE.items():
        given = f"--{name} {getattr(args, name)}" if name != "success" else "--no-success"
        need(name not in changed or getattr(args, switch), f"{given}: means nothing where --{switch} is 0" + ", as --drift off sets it" * (args.drift == "off"))
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
    folder = bases.check(args.model)
    check_sampling(args.model, args.kernel, steps=args.steps, eval_steps=args.eval_steps)
    check_shard(args, processes, end - first)
    compiling.check_sizes(args, processes, end - first)
    check_guide(args)
    if args.snapshot_every:
        base_files.network_files(args.model)                                 # a snapshot names its base by the numbers in them
    weights = check_reward(args.reward, folder)
    for name in (name for name in ("features", "target", "price", "reference", "refresh") if name in changed and not {*weights} & {*DISTRIBUTION}):
        raise ValueError(f"--{name} {changed[name]}: means nothing where --reward, {args.reward}, names neither fid nor kid")
    for flag in ("features",) * bool({*weights} & {*DISTRIBUTION}) + ("diversity_features",):
        need(getattr(args, flag) not in TINY or (folder / getattr(args, flag)).is_dir(),
             f"--{flag} {getattr(args, flag)}: {folder} holds no such network; give another, as in --{flag} dinov2")
    if {*weights} & {*DISTRIBUTION}:
        D = check_features(args.features, folder)
        check_target(target_path(args.target, args.features, folder), D, "kid" in weights)
        if args.features == "evaluator":                                 # then the reward classifier judges
            check_classifier(folder / "reward")
            targets.check_real(folder / "reward" / "real.npz")
        need(rollouts <= args.reference, f"--reference {args.reference}: must hold the {rollouts} rollouts of an iteration")
        need(args.prompts_per_step % (args.replace or 1) == 0,
             f"--replace {args.replace}: does not divide --prompts_per_step {args.prompts_per_step}")
    if args.diversity_features != "latents":
        check_features(args.diversity_features, folder, "diversity_features")
    judge = (folder / "evaluator").is_dir()                              # without one, the rewards and --diversity_features judge
    if judge:
        check_classifier(folder / "evaluator"), targets.check_real(folder / "evaluator" / "real.npz")
    own = [folder / "eval_prompts.jsonl", folder / "prompts.jsonl"]
    need(args.prompts or own[1].is_file(), f"--prompts: {folder} has no prompts.jsonl; give a file of prompts")
    args = dataclasses.replace(args, prompts=args.prompts or str(own[1]))
    args = dataclasses.replace(args, eval_prompts=args.eval_prompts or (str(own[0]) if own[0].is_file() or judge else args.prompts))
    prompts, judged, labels = read_prompts(args.prompts), read_prompts(args.eval_prompts), needs_labels(args.reward)
    check_labels(judged if judge or labels else [], args.eval_prompts), check_labels(prompts if labels else [], args.prompts)
    need(args.eval_images % len(judged) == 0 and args.eval_images >= 2 * len(judged),
         f"--eval_images {args.eval_images}: must be a multiple of the {len(judged)} prompts of {args.eval_prompts}, two each at least")
    check_out(args.out, args.model)
    files.open_run(args.out, vars(args), free=("out", "dry_run"))
    return args, prompts, judged


def check_out(out, model):
    """Raises ValueError for an --out within what is copied from the base when the model is saved: it would be copied into itself, without end."""
    kind, folder, *_ = base_files.locate(model)
    for path in [folder / name for name in BESIDE] if kind in OWN else [folder]:
        if Path(out).resolve().is_relative_to(path.resolve()):
            raise ValueError(f"--out {out}: lies in {path}, which is copied when the model is saved; choose an --out beside it")


def check_shard(args, processes, stochastic):
    """Raises ValueError unless the processes of --shard can take the same forwards, each with its equal share."""
    if not args.shard:
        return
    if processes < 2:
        raise ValueError("--shard: one process has nobody to share with; torchrun --nproc_per_node 2 train.py, or more")
    if flag := ("lora" * bool(args.lora) or "compile" * args.compile):
        raise ValueError(f"--shard: does not go with --{flag}" + "; a LoRA's gradients and optimizer are small" * (flag == "lora"))
    if base_files.locate(args.model)[0] == "edm2":
        raise ValueError(f"--shard: torch deals no weight that is one number, and {args.model} has some; leave it out")
    for name in ("prompts_per_step", "eval_images") + ("reference",) * bool({*parse(args.reward)} & {*DISTRIBUTION}):
        if getattr(args, name) % processes:
            raise ValueError(f"--{name} {getattr(args, name)}: with --shard, must be a multiple of the {processes} processes, whose work must be equal")
    if stochastic % args.updates:
        raise ValueError(f"--updates {args.updates}: with --shard, must divide the {stochastic} steps of --window, so that the processes' work is equal")


def check_sampling(model, kernel="cps", **steps):
    """Raises ValueError if the schedule of a base does not have so many steps, {flag: number}, or its path does not know the kernel."""
    kind, folder, *_ = base_files.locate(model)
    if kind == "StableDiffusionPipeline":
        config = read_json(folder / "scheduler" / "scheduler_config.json")
        for name, count in steps.items():
            try:
                VP(torch.ones(int(config.get("num_train_timesteps", 1000)))).times(count)
            except ValueError as error:
                raise ValueError(f"--{name} {count}: {error}; take fewer") from None
    if kernel == "flow-grpo" and kind in ("StableDiffusionPipeline", "edm2"):
        raise ValueError(f"--kernel flow-grpo: is defined for flows, and {model} is none; take ancestral or cps")


def check_guide(args):
    """Raises ValueError for a network that guides another at a guidance that does not ask it."""
    *_, file, guide = base_files.locate(args.model)
    if guide and args.guidance == 1:
        raise ValueError(f"--guidance 1: leaves the guide {guide} without work; raise it, or give --model edm2:{file} alone")


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
MERGE_LIMITS = {
    **dict.fromkeys(("updates", "steps", "batch"), (1, math.inf)), **dict.fromkeys(("seed", "report_seed"), (0, SEED)), "guidance": (0, math.inf),
    **dict.fromkeys(("group_size", "images", "reference", "report_images"), (2, math.inf)), **dict.fromkeys(("std", "lr"), (1e-12, math.inf))}


def check_merge(args, default):
    """Resolves defaults and refuses what cannot run -> args, base folder, checkpoints, prompts, eval prompts. Raises ValueError, in one line."""
    def need(ok, message):
        if not ok:
            raise ValueError(message)
    need(args.out, "--out: name the folder to write")
    need(len(args.checkpoints) > 1 or args.command == "average", f"{args.command}: one checkpoint is nothing to merge; give two or more")
    uses = {"average": {"coefficients"}, "ema": {"sigma_rel"}}.get(args.command, {*vars(args)} - {"coefficients"}) | {"command", "checkpoints", "out", "model"}
    for name in (name for name, value in vars(args).items() if value != getattr(default, name, value) and name not in uses):
        raise ValueError(f"--{name}: means nothing to merge.py {args.command}")
    for name, (low, high) in MERGE_LIMITS.items():
        value = getattr(args, name)
        need(low <= value <= high and math.isfinite(value), f"--{name} {value}: must be a finite number from {low:g} to {high:g}")
    lengths = numbers("sigma_rel", args.sigma_rel)
    need(lengths and all(0 < s < 0.288 for s in lengths), f"--sigma_rel {args.sigma_rel}: each must be between 0 and 0.288")
    for path in args.checkpoints:
        need(args.checkpoints.count(path) == 1, f"{path}: is given twice; once is enough")
    base, views = open_checkpoints(args.checkpoints, args.model)
    args, folder = dataclasses.replace(args, model=str(base)), bases.check(base)
    need(args.device != "cuda" or torch.cuda.is_available(), "--device cuda: no GPU that torch can use; leave it at auto")
    averages = sweep(views, lengths) if args.command == "ema" else ()
    check_sampling(base, steps=args.steps), check_out(args.out, base)
    if args.command != "rl":
        several = args.command == "ema" and len(lengths) > 1            # a folder each, which the same command may complete
        need(several or not Path(args.out).exists(), f"--out {args.out}: exists; choose another")
        files.open_run(args.out, vars(args) if several else {}, free=("out",))
        c = numbers("coefficients", args.coefficients)
        need(len(c) in (0, len(views)), f"--coefficients {args.coefficients}: {len(c)} numbers for {len(views)} checkpoints")
        need(not c or abs(sum(c) - 1) < 1e-6, f"--coefficients {args.coefficients}: sum to {sum(c):.6g}; they must sum to 1")
        need(args.command == "average" or len(averages), "ema: needs two or more averages that train.py kept (snapshots/NNNNN-0.050.safetensors)")
        return args, base, views, [], []
    check_guide(args)
    weights, half = check_reward(args.reward, folder), folder / args.features
    args = dataclasses.replace(args, target=args.target or str(half / "real-1.npz"), report_target=args.report_target or args.target or str(half / "real-2.npz"),
                               prompts=args.prompts or str(folder / "prompts.jsonl"))
    if {*weights} & {*DISTRIBUTION}:
        D = check_features(args.features, folder)
        for path in (args.target, args.report_target):
            check_target(Path(path), D, "kid" in weights)
    judge = folder / ("reward" if args.features == "evaluator" else "evaluator")
    if judge.is_dir():
        check_classifier(judge), targets.check_real(judge / "real-2.npz")
    own, labels = folder / "eval_prompts.jsonl", needs_labels(args.reward)
    prompts, judged = read_prompts(args.prompts), read_prompts(own if own.is_file() or judge.is_dir() else args.prompts)
    check_labels(judged if judge.is_dir() or labels else [], "eval_prompts.jsonl"), check_labels(prompts if labels else [], args.prompts)
    for name, count in (("images", len(prompts)), ("reference", len(prompts)), ("report_images", len(judged))):
        need(getattr(args, name) % count == 0, f"--{name} {getattr(args, name)}: must be a multiple of the {count} prompts")
    need(args.images <= args.reference, f"--images {args.images}: is more than --reference {args.reference}")
    need(args.group_size % 2 == 0, f"--group_size {args.group_size}: must be even, for mirrored pairs")
    files.open_run(args.out, vars(args), free=("out",))
    return args, base, views, prompts, judged


def numbers(flag, text):
    try:
        return [float(x) for x in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"--{flag} {text}: write numbers with commas between, as in 0.05,0.1") from None
EVAL_LIMITS = {"steps": (1, math.inf), "batch": (1, math.inf), **dict.fromkeys(("n", "guidance"), (0, math.inf)), "resamples": (10, math.inf), "seed": (0, SEED)}
EVAL_USES = {"images": {"out", "n", "prompts", "seed", "steps", "guidance", "precision", "batch", "device"}, "compare": {"out", "labels"}}
EVAL_USES |= {"grid": EVAL_USES["compare"], "score": EVAL_USES["images"] | {"model", "reward", "features", "target", "resamples"}}


def check_eval(args, default):
    """Resolves defaults and refuses what cannot run -> args, and what the command works on: prompts, (judging folder, picture sets), runs, or
    the files of a grid. Raises ValueError, in one line."""
    def need(ok, message):
        if not ok:
            raise ValueError(message)
    for name, value in vars(args).items():
        need(value == getattr(default, name) or name in EVAL_USES[args.command], f"--{name}: means nothing to eval.py {args.command}")
    for name, (low, high) in EVAL_LIMITS.items():
        value = getattr(args, name)
        need(low <= value <= high and math.isfinite(value), f"--{name} {value}: must be a finite number from {low:g} to {high:g}")
    need(args.device != "cuda" or torch.cuda.is_available(), "--device cuda: no GPU that torch can use; leave it at auto")
    most = {"images": 1, "score": 2}.get(args.command, math.inf)
    need(len(args.inputs) <= most, f"{' '.join(args.inputs)}: eval.py {args.command} takes {most:g} at most")
    ending = ".json" if args.command == "score" else ".png"
    wanted = "the folder or the .npz" if args.command == "images" else "the .png"
    need(args.out or args.command in ("score", "compare"), f"--out: name {wanted} to write")
    need(args.command == "images" or not args.out or Path(args.out).suffix == ending, f"--out {args.out}: must end in {ending}")
    blocked = [p for p in Path(args.out).parents if p.exists() and not p.is_dir()]
    need(not blocked, f"--out {args.out}: its parent {[*blocked, ''][0]} is a file; choose another --out")
    if args.command == "images":
        return check_images(args, need)
    need(not args.out or not os.path.lexists(args.out), f"--out {args.out}: exists; choose another")
    if args.command == "compare":
        return args, open_runs(args.inputs, args.labels)
    return (args, grid_files(args.inputs, args.labels)) if args.command == "grid" else check_score(args, default, need)


def check_images(args, need):
    """-> args, prompts. Raises ValueError where --out cannot be begun or gone on with."""
    folder, out = bases.check(args.inputs[0]), Path(args.out)
    args = dataclasses.replace(args, n=args.n or 1000, model=args.inputs[0], prompts=args.prompts or str(folder / "eval_prompts.jsonl"))
    check_sampling(args.model, steps=args.steps)
    prompts, path = read_prompts(args.prompts), sidecar(out)
    choose(args.n, args.n, len(prompts), args.prompts)
    if path.is_file():
        there, here = read_sidecar(out), settings(args)
        differ = [f"--{k} {there.get(k)!r} there, {v!r} here" for k, v in here.items() if there.get(k) != v]
        need(not differ, f"--out {out}: was made otherwise ({'; '.join(differ)}); choose another --out or the same flags")
    else:
        empty = out.is_dir() and out.suffix != ".npz" and all(p.name.startswith(".tmp-") for p in out.iterdir())
        for there in (out, Path(f"{out}.parts")):
            need(not os.path.lexists(there) or empty, f"--out {out}: {there} exists, and no {path.name} says how it was made; choose another --out")
    return args, prompts


def check_score(args, default, need):
    """-> args, (the folder whose classifiers judge, the picture sets). Raises ValueError, also for two sets that cannot be compared."""
    sets = [open_pictures(args, name) for name in args.inputs]
    for s in sets:
        s.size or check_sampling(s.model, steps=args.steps)
    for name in ("steps", "guidance", "precision"):
        need(any(s.size is None for s in sets) or getattr(args, name) == getattr(default, name), f"--{name}: means nothing to pictures that are there")
    folder, last = bases.check(args.model or sets[0].model or "assets/tiny"), sets[-1]
    totals, texts = {s.total for s in sets}, [[(p.text, p.metadata) for p in s.prompts] for s in sets if s.prompts]
    need(len(totals) == 1, f"{sets[0].total} pictures in {sets[0].name} and {last.total} in {last.name}: the bias of FID falls with their number, "
                           f"so compare equal ones; --n {min(totals)}")
    need(last.total >= 10, f"{last.name}: {last.total} pictures are too few to say anything; 10 at least")
    need(len(texts) < 2 or texts[0] == texts[1], f"{sets[0].name} and {last.name}: of different prompts, so nothing is paired; use the same --prompts")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    need(processes <= last.total, f"--nproc_per_node {processes}: there are only {last.total} pictures to share")
    known = len(texts) == len(sets)                                      # what was asked for
    labelled = known and any("label" in metadata for _, metadata in texts[0])
    need(known or not args.reward, f"--reward {args.reward}: needs to know what was asked for; give --prompts")
    args = dataclasses.replace(args, reward=args.reward or "class" * (labelled and (folder / "reward").is_dir()))
    classified = args.features in TINY or args.reward and needs_labels(args.reward) or labelled and (folder / "evaluator").is_dir()
    if args.reward:
        need(not {*check_reward(args.reward, folder)} & {*DISTRIBUTION}, f"--reward {args.reward}: fid and kid come with --target; name others")
    if labelled or args.reward and needs_labels(args.reward):
        check_labels(sets[0].prompts, args.prompts or sets[0].name)
    if labelled and (folder / "evaluator").is_dir():
        check_classifier(folder / "evaluator")
    D, target = check_features(args.features, folder), target_path(args.target, args.features, folder)
    if args.features in TINY:
        targets.check_real(folder / args.features / "real.npz")
    check_target(target, D)
    for s in sets:
        size = " x ".join(map(str, s.size or ()))
        need(not classified or not size or s.size == (28, 28), f"{s.name}: pictures of {size}, and the classifiers of {folder} see 28 x 28; choose "
             "other --features, and --prompts without labels")
    return args, (folder, sets)
