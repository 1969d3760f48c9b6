"""Checks: all that can be wrong with a command line, before anything is loaded or written.

    check         train.py: flags, model, reward, prompts, run folder
    check_merge   merge.py: checkpoints of one base, coefficients, reward, prompts
    check_eval    eval.py: models, sets of pictures, runs

A ValueError is the user's one line: it names the value and the remedy, and the command ends with
code 2. Defaults that depend on other flags are filled in here. Nothing here changes what is
computed, and no weight is read.
"""

import dataclasses
import math
import os
import re
import sys
from pathlib import Path

import torch

import bases
from bases.files import PIPELINES, copied_folders, locate
from bases.tensors import open_checkpoints
from commands.compare import alignment_of, grid_files, open_runs
from commands.picture_sets import (
    DRAWN,
    choose,
    evaluation_prompts,
    open_pictures,
    parts_of,
    read_sidecar,
    risen,
    settings,
    sidecar,
    training_prompts,
)
from prompting import read_prompts
from rewards import (
    DISTRIBUTION,
    check_labels,
    check_reward,
    cut_texts,
    names_any,
    parse,
    readers,
)
from rewards.classifier import check_classifier
from rewards.features import ANYWHERE, TINY, check_features, seen_side
from rewards.targets import KINDS, check_judge, check_real, check_target, target_path
from sampling import VP
from support import compiling, files, trackers
from support.averages import sweep
from support.guards import warn

LARGEST_SEED = 2**63 - 1  # that torch takes

# Smallest and largest value of each number.
COUNT = (1, math.inf)
COUNT_OR_NONE = (0, math.inf)
SEED = (0, LARGEST_SEED)
POSITIVE = (1e-12, math.inf)
WEIGHT = (0, math.inf)
GROUP = (2, math.inf)
LIMITS = {
    "iterations": COUNT,
    "seed": SEED,
    "prompts_per_step": COUNT,
    "group_size": GROUP,
    "steps": COUNT,
    "eta": (1e-3, 1),
    "guidance": WEIGHT,
    "replace": COUNT_OR_NONE,
    "reference": GROUP,
    "refresh": COUNT_OR_NONE,
    "keep": GROUP,
    "prompt_noise": WEIGHT,
    "tau1": WEIGHT,
    "tau2": WEIGHT,
    "psi": (0, 1),
    "diversity": WEIGHT,
    "fid": WEIGHT,
    "nearest": COUNT_OR_NONE,
    "gamma": (0, 1),
    "kl": WEIGHT,
    "lora": COUNT_OR_NONE,
    "lr": POSITIVE,
    "warmup": COUNT_OR_NONE,
    "updates": COUNT,
    "passes": COUNT,
    "clip": POSITIVE,
    "grad_clip": POSITIVE,
    "ema": (0, 0.9999),
    "eval_every": COUNT,
    "eval_images": COUNT,
    "eval_steps": COUNT,
    "eval_seed": SEED,
    "save_every": COUNT,
    "keep_checkpoints": COUNT,
    "snapshot_every": COUNT_OR_NONE,
    "keep_snapshots": COUNT,
    "batch": COUNT,
    "train_batch": COUNT_OR_NONE,
    "decode_batch": COUNT,
    "reward_batch": COUNT_OR_NONE,
    "timeout": COUNT,
}
MERGE_LIMITS = {
    "updates": COUNT,
    "group_size": GROUP,
    "std": POSITIVE,
    "lr": POSITIVE,
    "seed": SEED,
    "images": GROUP,
    "reference": GROUP,
    "report_images": GROUP,
    "report_seed": SEED,
    "steps": COUNT,
    "guidance": WEIGHT,
    "batch": COUNT,
}
EVAL_LIMITS = {
    "n": COUNT_OR_NONE,
    "seed": SEED,
    "steps": COUNT,
    "guidance": WEIGHT,
    "batch": COUNT,
    "resamples": (10, math.inf),
}

FREE = ("out", "dry_run", "check", "tracker")  # flags that no number of a run depends on

# Where a flag has this value, the flags on the right change nothing, so none of them may be given.
IDLE = (
    ("select", "all", ("keep",)),
    ("prompt_noise", 0, ("tau1", "tau2", "psi")),
    ("diversity", 0, ("success", "gamma", "terminal")),
    ("terminal", "zero", ("success",)),
    ("snapshot_every", 0, ("keep_snapshots",)),
    ("optimizer steps", 1, ("clip",)),
    ("fid or kid", False, ("features", "target", "price", "replace", "reference", "refresh")),
    ("price", "potential", ("replace",)),
    ("lora", True, ("train",)),
)
# The switches that are no flag of that value, in words.
SWITCHED = {
    "optimizer steps": "--updates and --passes are 1: the ratio of the only step is 1",
    "fid or kid": "--fid is 0 and --reward names neither fid nor kid",
    "lora": "--lora is given: a LoRA learns in attention and feed-forward",
}
# What --drift off sets.
PLAIN_GRPO = {"select": "all", "prompt_noise": 0.0, "diversity": 0.0, "fid": 0.0}

# Flags that merge.py and eval.py commands use.
MERGE_USES = {
    "average": {"command", "checkpoints", "out", "model", "coefficients"},
    "ema": {"command", "checkpoints", "out", "model", "sigma_rel"},
}
DRAWING = {"prompts", "n", "seed", "steps", "guidance", "precision", "batch", "device"}
EVAL_USES = {
    "images": {"out"} | DRAWING,
    "score": {"out", "model", "reward", "features", "target", "resamples"} | DRAWING,
    "compare": {"out", "labels"},
    "grid": {"out", "labels"},
}


# --------------------------------------------------------------------------------------------------
# What the commands share.


def need(condition, message):
    """Raises ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_limits(args, limits):
    """Each number of `limits` is finite and within its limits."""
    largest = sys.float_info.max  # math.isfinite would raise for an int beyond it
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        need(
            low <= value <= high and abs(value) <= largest,
            f"--{name} {value}: must be a finite number from {low:g} to {high:g}",
        )


def check_device(args):
    """A GPU is there where one is asked for."""
    need(
        args.device != "cuda" or torch.cuda.is_available(),
        "--device cuda: no GPU that torch can use; leave it at auto",
    )


def check_out(out, model):
    """--out can be written, and lies in nothing that is copied from the base with the model."""
    files.check_writable(out)
    for path in copied_folders(model):
        need(
            not Path(out).resolve().is_relative_to(path.resolve()),
            f"--out {out}: lies in {path}, which is copied when the model is saved; "
            "choose an --out beside it",
        )


def check_sampling(model, kernel="cps", **steps):
    """The base's schedule has so many steps, {flag: number}, and its path knows the kernel."""
    kind, folder, *_ = locate(model)
    pipeline = PIPELINES.get(kind)
    is_variance_preserving = pipeline and not pipeline.is_flow
    if is_variance_preserving:
        config = files.read_json(folder / "scheduler" / "scheduler_config.json")
        schedule = VP(torch.ones(int(config.get("num_train_timesteps", 1000))))
        for name, count in steps.items():
            try:
                schedule.times(count)
            except ValueError as error:
                raise ValueError(f"--{name} {count}: {error}; take fewer") from None
    need(
        kernel != "flow-grpo" or not (is_variance_preserving or kind == "edm2"),
        f"--kernel flow-grpo: is defined for flows, and {model} is none; take ancestral or cps",
    )


def check_guide(args):
    """A network that guides another is asked for something."""
    location = locate(args.model)
    need(
        not location.guide or args.guidance != 1,
        f"--guidance 1: leaves the guide {location.guide} without work; "
        f"raise it, or give --model edm2:{location.file} alone",
    )


def check_multiple(flag, value, prompts, where, least=1):
    """A number of pictures is a multiple of the prompts, `least` each or more."""
    fewest = least * prompts
    below = max(value - value % prompts, fewest)
    numbers = f"{below}" if below > value else f"{below} or {below + prompts}"
    each = f", {least} each at least" if least > 1 else ""
    need(
        value % prompts == 0 and value >= fewest,
        f"--{flag} {value}: must be a multiple of the {prompts} prompts of {where}{each}; "
        f"take {numbers}",
    )


def known_attributes(asked):
    """What networks {folder: arguments} read: {name: [values]}.

    Raises ValueError where they differ.
    """
    known = {folder: arguments["attributes"] for folder, arguments in asked.items()}
    first = next(iter(known.values()))
    if any(attributes != first for attributes in known.values()):
        words = [f"{folder.name}/ knows {in_words(known[folder])}" for folder in known]
        parent = next(iter(known)).parent
        raise ValueError(f"{parent}: {' and '.join(words)}; give networks that know the same")
    return first


def in_words(attributes):
    """What a classifier reads, for messages: 10 of label, or 6 of shape, 8 of colour."""
    return ", ".join(f"{len(values)} of {name}" for name, values in attributes.items())


def check_asked_labels(args, judge, prompts, eval_prompts, eval_file):
    """The prompts name what the networks that are asked about them know.

    The reward asks about all prompts; the judge, whose folder may be missing, about eval_prompts.
    """
    asked = {judge: check_classifier(judge)} if judge.is_dir() else {}
    rewarding = readers(args.reward, judge.parent)
    asked |= rewarding
    if asked:
        attributes = known_attributes(asked)
        check_labels(eval_prompts, eval_file, attributes)
    if rewarding:
        check_labels(prompts, args.prompts, attributes)


def say_cut_prompts(model, reward, *lists):
    """One line for each text encoder, of the model or the reward, that cuts prompts off.

    lists: of prompts.
    """
    texts = list(dict.fromkeys(prompt.text for prompts in lists for prompt in prompts))
    cuts = {}
    if model:
        for part, cut in bases.cut_prompts(model, texts).items():
            cuts[f"{part}/ of {model}"] = cut
    if reward:
        cuts |= cut_texts(reward, texts)
    for where, (limit, longer) in cuts.items():
        warn(
            f"{len(longer)} of {len(texts)} prompts are cut off at the end, because {where} takes "
            f"{limit} tokens; the first is {longer[0][:60]!r}"
        )


def prices_sets(reward):
    """Whether a reward names fid or kid, which price sets of pictures."""
    return any(name in DISTRIBUTION for name in parse(reward))


def process_count():
    """How many processes torchrun starts; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def stochastic_steps(args):
    """The number W of steps in --window."""
    first, end = map(int, args.window.split(":"))
    return end - first


# --------------------------------------------------------------------------------------------------
# train.py


def check(args, default):
    """Checks train.py's flags -> args with defaults filled in, prompts, evaluation prompts.

    default: the flags as they are when none is given. Raises ValueError.
    """
    changed = {}
    for name, value in vars(args).items():
        if name not in FREE and value != getattr(default, name):
            changed[name] = value
    check_contradictions(args, changed)
    args = dataclasses.replace(args, out=args.out or files.run_name(changed))
    if args.drift == "off":
        args = dataclasses.replace(args, **PLAIN_GRPO)
    if args.select == "all":
        args = dataclasses.replace(args, keep=args.group_size)

    check_limits(args, LIMITS)
    given_reward = args.reward  # messages name it as it was given
    args = with_fid(args, changed)
    check_idle(args, changed)
    check_sizes(args)
    check_device(args)
    folder = bases.check(args.model)
    if not args.features:
        chosen = "components" if args.fid and not args.target else "reward"
        args = dataclasses.replace(args, features=chosen)
    check_sampling(args.model, args.kernel, steps=args.steps, eval_steps=args.eval_steps)
    compiling.check_sizes(args, process_count(), stochastic_steps(args))
    check_guide(args)
    check_reward(given_reward, folder)
    check_networks(args, folder)
    args, prompts, eval_prompts = check_prompts(args, default, folder)
    check_shard(args, process_count())
    check_out(args.out, args.model)
    files.open_run(args.out, vars(args), FREE)
    trackers.check(args.tracker, args.out)
    say_cut_prompts(args.model, args.reward, prompts, eval_prompts)
    return args, prompts, eval_prompts


def with_fid(args, changed):
    """The flags with the FID of --fid in --reward, where that names no fid or kid of its own.

    changed {flag: value}: those that are not at their defaults.
    """
    named = prices_sets(args.reward)
    need(
        not (named and args.fid and "fid" in changed),
        f"--fid {args.fid}: --reward {args.reward} has a weight of its own; leave out one of them",
    )
    if named:
        return dataclasses.replace(args, fid=0.0)
    if not args.fid:
        return args
    return dataclasses.replace(args, reward=f"{args.reward},fid:{args.fid:g}")


def check_contradictions(args, changed):
    """No flag is given that another one switches off."""
    if args.drift == "off":
        for name, value in PLAIN_GRPO.items():
            need(
                changed.get(name, value) == value,
                f"--{name} {changed.get(name)}: --drift off would switch it off; "
                "leave out one of them",
            )


def check_idle(args, changed):
    """No flag is given that changes nothing, because of another one. One rule: the table IDLE.

    changed {flag: value}: those that are not at their defaults.
    """
    state = vars(args) | {
        "optimizer steps": args.updates * args.passes,
        "fid or kid": prices_sets(args.reward),
        "lora": args.lora > 0,
    }
    for switch, value, names in IDLE:
        if state[switch] != value:
            continue
        where = SWITCHED.get(switch, f"--{switch} is {value}")
        if args.drift == "off" and switch in PLAIN_GRPO:
            where += ", as --drift off sets it"
        for name in names:
            keeps_all = name == "keep" and changed.get(name) == args.group_size
            need(
                name not in changed or keeps_all,
                f"{given(name, changed.get(name))}: means nothing where {where}",
            )
    need(
        args.refresh <= args.iterations,
        f"--refresh {args.refresh}: means nothing where --iterations is {args.iterations}",
    )


def given(name, value):
    """A flag as it was given."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def check_sizes(args):
    """Groups, window and minibatches fit each other, and each process has a rollout."""
    need(
        args.keep <= args.group_size,
        f"--keep {args.keep}: is more than --group_size {args.group_size}",
    )
    need(
        args.nearest < args.group_size,
        f"--nearest {args.nearest}: must be below --group_size {args.group_size}",
    )
    need(args.tau1 < args.tau2, f"--tau1 {args.tau1}: must be below --tau2 {args.tau2}")
    need(
        re.fullmatch(r"\d+:\d+", args.window),
        f"--window {args.window}: write first:end, as in 0:4",
    )
    first, end = map(int, args.window.split(":"))
    need(
        first < end < args.steps,
        f"--window {args.window}: must hold a step and end by {args.steps - 1}, "
        f"before the last of --steps {args.steps}",
    )
    pairs = args.prompts_per_step * args.keep * (end - first)
    need(
        pairs % args.updates == 0,
        f"--updates {args.updates}: does not divide the {pairs} (rollout, step) pairs "
        "of an iteration",
    )
    processes = process_count()
    rollouts = args.prompts_per_step * args.group_size
    need(
        processes <= rollouts,
        f"--nproc_per_node {processes}: an iteration has only {rollouts} rollouts to share",
    )


def check_shard(args, processes):
    """--shard: the processes take the same forwards, each with an equal share."""
    if not args.shard:
        return
    need(
        processes > 1,
        "--shard: one process has nobody to share with; "
        "torchrun --nproc_per_node 2 train.py, or more",
    )
    need(
        not args.lora,
        "--shard: does not go with --lora; a LoRA's gradients and optimizer are small",
    )
    need(not args.compile, "--shard: does not go with --compile")
    need(
        locate(args.model)[0] != "edm2",
        f"--shard: torch deals no weight that is one number, and {args.model} has some; "
        "leave it out",
    )
    shared = ["prompts_per_step", "eval_images"]
    if prices_sets(args.reward):
        shared.append("reference")
    for name in shared:
        need(
            getattr(args, name) % processes == 0,
            f"--{name} {getattr(args, name)}: with --shard, must be a multiple of the {processes} "
            "processes, whose work must be equal",
        )
    stochastic = stochastic_steps(args)
    need(
        stochastic % args.updates == 0,
        f"--updates {args.updates}: with --shard, must divide the {stochastic} steps of --window, "
        "so that the processes' work is equal",
    )


def check_networks(args, folder):
    """The feature networks, the target and the judge can be loaded."""
    if prices_sets(args.reward):
        check_distribution(args, folder)
    if args.diversity_features != "latents":
        check_features(args.diversity_features, folder, "diversity_features")
    if (folder / "evaluator").is_dir():
        check_judge(folder / "evaluator")


def check_distribution(args, folder):
    """What a distribution-wise reward needs: features, target, sizes."""
    if args.features == "components":
        need(
            not args.target and "kid" not in parse(args.reward),
            "--features components: the target is the base's own moments, so leave out --target "
            "and kid, or name other --features",
        )
    else:
        D = check_features(args.features, folder)
        target = target_path(args.target, args.features, folder)
        side = seen_side(args.features, folder)
        check_target(target, D, need_pictures="kid" in parse(args.reward), side=side)
    if args.features == "evaluator":  # then the reward's classifier judges
        check_judge(folder / "reward")
    rollouts = args.prompts_per_step * args.group_size
    need(
        rollouts <= args.reference,
        f"--reference {args.reference}: must hold the {rollouts} rollouts of an iteration",
    )
    need(
        args.prompts_per_step % (args.replace or 1) == 0,
        f"--replace {args.replace}: does not divide --prompts_per_step {args.prompts_per_step}",
    )


def check_prompts(args, default, folder):
    """-> args with both prompt files named, prompts, evaluation prompts."""
    file = training_prompts(args.prompts, folder)
    eval_file = args.eval_prompts or evaluation_prompts(file, folder)
    args = dataclasses.replace(args, prompts=file, eval_prompts=eval_file)
    prompts = read_prompts(file)
    eval_prompts = read_prompts(eval_file)

    judge = folder / "evaluator"  # without it, rewards and --diversity_features judge
    if prices_sets(args.reward) and args.features == "evaluator":
        judge = folder / "reward"
    check_asked_labels(args, judge, prompts, eval_prompts, eval_file)

    count = len(eval_prompts)
    equal_work = process_count() if args.shard else 1
    images = risen(args.eval_images, default.eval_images, count, equal_work)
    args = dataclasses.replace(args, eval_images=images)
    check_multiple("eval_images", images, count, args.eval_prompts, least=2)
    return args, prompts, eval_prompts


def plan(args, prompts):
    """The sizes that follow from the flags, for a person to read before hours are spent."""
    stochastic = stochastic_steps(args)
    rollouts = args.prompts_per_step * args.group_size
    pairs = args.prompts_per_step * args.keep * stochastic
    priced = ""
    if prices_sets(args.reward):
        sets = f"{rollouts} pictures"
        if args.price != "potential":
            size = args.replace or args.prompts_per_step
            sets = f"{rollouts // size} sets of {size} pictures"
        priced = f"; a reference of {args.reference} pictures prices {sets} an iteration"
    return (
        f"{len(prompts)} prompts; an iteration: {args.prompts_per_step} groups x "
        f"{args.group_size} = {rollouts} rollouts of {args.steps} steps, "
        f"{args.keep} kept of each group x {stochastic} stochastic steps = {pairs} pairs, "
        f"{args.passes * args.updates} optimizer steps of {pairs // args.updates} pairs; "
        f"{args.iterations} iterations = {args.iterations * rollouts} rollouts{priced}"
    )


# --------------------------------------------------------------------------------------------------
# merge.py


def check_merge(args, default):
    """Checks merge.py's flags -> args, the base's name, checkpoints, prompts, evaluation prompts.

    default: the flags as they are when none is given. Raises ValueError.
    """
    need(args.out, "--out: name the folder to write")
    need(
        len(args.checkpoints) > 1 or args.command == "average",
        f"{args.command}: one checkpoint is nothing to merge; give two or more",
    )
    rl_uses = vars(args).keys() - {"coefficients"}
    uses = MERGE_USES.get(args.command, rl_uses)
    for name, value in vars(args).items():
        need(
            name in uses or value == getattr(default, name, value),
            f"--{name}: means nothing to merge.py {args.command}",
        )
    check_limits(args, MERGE_LIMITS)
    check_device(args)
    lengths = numbers("sigma_rel", args.sigma_rel)
    need(
        lengths and all(0 < length < 0.288 for length in lengths),
        f"--sigma_rel {args.sigma_rel}: each must be between 0 and 0.288",
    )
    for path in args.checkpoints:
        need(args.checkpoints.count(path) == 1, f"{path}: is given twice; once is enough")

    base, views = open_checkpoints(args.checkpoints, args.model)
    args = dataclasses.replace(args, model=base)
    folder = bases.check(base)
    check_sampling(base, steps=args.steps)
    check_out(args.out, base)
    if args.command != "rl":
        check_one_merge(args, views, lengths)
        return args, base, views, [], []
    args, prompts, eval_prompts = check_search(args, default, folder)
    files.open_run(args.out, vars(args), free=("out",))
    say_cut_prompts(base, args.reward, prompts, eval_prompts)
    return args, base, views, prompts, eval_prompts


def check_one_merge(args, views, lengths):
    """merge.py average and ema: the output is new, the coefficients fit."""
    # ema writes a folder for each length, which the same command may complete.
    is_resumable = args.command == "ema" and len(lengths) > 1
    need(
        is_resumable or not Path(args.out).exists(),
        f"--out {args.out}: exists; choose another",
    )
    config = vars(args) if is_resumable else {}
    files.open_run(args.out, config, free=("out",))

    coefficients = numbers("coefficients", args.coefficients)
    need(
        len(coefficients) in (0, len(views)),
        f"--coefficients {args.coefficients}: {len(coefficients)} numbers "
        f"for {len(views)} checkpoints",
    )
    need(
        not coefficients or abs(sum(coefficients) - 1) < 1e-6,
        f"--coefficients {args.coefficients}: sum to {sum(coefficients):.6g}; they must sum to 1",
    )
    need(
        args.command != "ema" or len(sweep(views, lengths)),
        "ema: needs two or more averages that train.py kept (snapshots/NNNNN-0.050.safetensors)",
    )


def check_search(args, default, folder):
    """merge.py rl -> args with defaults filled in, prompts, evaluation prompts."""
    check_guide(args)
    check_reward(args.reward, folder)
    prices = prices_sets(args.reward)
    for name in ("features", "target", "report_target"):
        value = getattr(args, name)
        need(
            prices or value == getattr(default, name),
            f"--{name} {value}: means nothing where --reward names neither fid nor kid",
        )
    if prices:
        D = check_features(args.features, folder)
        target_path(args.target, args.features, folder)  # raises where --target is needed
    half = folder / args.features
    args = dataclasses.replace(
        args,
        target=args.target or str(half / "real-1.npz"),
        report_target=args.report_target or args.target or str(half / "real-2.npz"),
        prompts=training_prompts(args.prompts, folder),
    )
    if prices:
        side = seen_side(args.features, folder)
        for path in (args.target, args.report_target):
            check_target(Path(path), D, need_pictures="kid" in parse(args.reward), side=side)
    judge = folder / ("reward" if args.features == "evaluator" else "evaluator")
    if judge.is_dir():
        check_judge(judge, "real-2.npz")

    eval_file = evaluation_prompts(args.prompts, folder)
    prompts = read_prompts(args.prompts)
    eval_prompts = read_prompts(eval_file)
    check_asked_labels(args, judge, prompts, eval_prompts, eval_file)

    multiples = {
        "images": (len(prompts), args.prompts),
        "reference": (len(prompts), args.prompts),
        "report_images": (len(eval_prompts), eval_file),
    }
    for name, (count, file) in multiples.items():
        value = risen(getattr(args, name), getattr(default, name), count)
        args = dataclasses.replace(args, **{name: value})
        check_multiple(name, value, count, file)
    check_search_sizes(args)
    return args, prompts, eval_prompts


def check_search_sizes(args):
    """A set is no larger than the reference; a group has mirrored pairs."""
    need(
        args.images <= args.reference,
        f"--images {args.images}: is more than --reference {args.reference}",
    )
    need(
        args.group_size % 2 == 0,
        f"--group_size {args.group_size}: must be even, for mirrored pairs",
    )


def numbers(flag, text):
    """The numbers of a flag, as in 0.05,0.1 -> list. Raises ValueError."""
    if not text:
        return []
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--{flag} {text}: write numbers with commas between, as in 0.05,0.1"
        ) from None


# --------------------------------------------------------------------------------------------------
# eval.py


def check_eval(args, default):
    """Checks eval.py's flags -> args, and what the command works on. Raises ValueError.

    images: prompts; score: (judging folder, sets of pictures); compare: runs; grid: its files.
    default: the flags as they are when none is given.
    """
    for name, value in vars(args).items():
        is_used = name in EVAL_USES[args.command] or name in ("command", "inputs")
        need(
            is_used or value == getattr(default, name),
            f"--{name}: means nothing to eval.py {args.command}",
        )
    check_limits(args, EVAL_LIMITS)
    check_device(args)
    most = {"images": 1, "score": 2}.get(args.command, math.inf)
    need(
        len(args.inputs) <= most,
        f"{' '.join(args.inputs)}: eval.py {args.command} takes {most:g} at most",
    )
    check_eval_out(args)
    if args.command == "images":
        return check_images(args)
    need(
        not args.out or not os.path.lexists(args.out),
        f"--out {args.out}: exists; choose another",
    )
    if args.command == "compare":
        runs = open_runs(args.inputs, args.labels)
        alignment_of(runs)  # they have one in common
        return args, runs
    if args.command == "grid":
        return args, grid_files(args.inputs, args.labels)
    return check_score(args, default)


def check_eval_out(args):
    """--out is given where it is needed, ends as it should, and can be written."""
    ending = ".json" if args.command == "score" else ".png"
    wanted = "the folder or the .npz" if args.command == "images" else "the .png"
    need(
        args.out or args.command in ("score", "compare"),
        f"--out: name {wanted} to write",
    )
    need(
        args.command == "images" or not args.out or Path(args.out).suffix == ending,
        f"--out {args.out}: must end in {ending}",
    )
    if args.out:
        files.check_writable(args.out)


def check_images(args):
    """eval.py images -> args, prompts. --out is new, or was begun by the same command."""
    folder = bases.check(args.inputs[0])
    out = Path(args.out)
    file = args.prompts or evaluation_prompts("", folder)
    args = dataclasses.replace(args, model=args.inputs[0], prompts=file)
    check_sampling(args.model, steps=args.steps)
    prompts = read_prompts(file)
    args = dataclasses.replace(args, n=args.n or risen(DRAWN, DRAWN, len(prompts)))
    choose(args.n, args.n, len(prompts), args.prompts)
    say_cut_prompts(args.model, "", prompts)

    if sidecar(out).is_file():
        saved = read_sidecar(out)
        current = settings(args)
        differ = []
        for name, value in current.items():
            if saved.get(name) != value:
                differ.append(f"--{name} {saved.get(name)!r} there, {value!r} here")
        need(
            not differ,
            f"--out {out}: was made otherwise ({'; '.join(differ)}); "
            "choose another --out or the same flags",
        )
        return args, prompts

    is_empty = out.suffix != ".npz" and out.is_dir() and not visible_files(out)
    for path in (out, parts_of(out)):
        need(
            is_empty or not os.path.lexists(path),
            f"--out {out}: {path} exists, and no {sidecar(out).name} says how it was made; "
            "choose another --out",
        )
    return args, prompts


def visible_files(folder):
    """All that lies in a folder, but for what a killed write left."""
    return [path for path in folder.iterdir() if not path.name.startswith(".tmp-")]


def check_score(args, default):
    """eval.py score -> args, (the folder whose classifiers judge, the sets of pictures)."""
    sets = [open_pictures(args, name) for name in args.inputs]
    are_drawn = [pictures.sizes is None for pictures in sets]  # by a model, still to be
    for pictures, is_drawn in zip(sets, are_drawn):
        if is_drawn:
            check_sampling(pictures.model, steps=args.steps)
    for name in ("steps", "guidance", "precision"):
        need(
            any(are_drawn) or getattr(args, name) == getattr(default, name),
            f"--{name}: means nothing to pictures that are there",
        )
    folder = bases.check(args.model or sets[0].model or "assets/tiny")
    check_comparable(sets)
    if args.features == default.features and not (folder / "evaluator").is_dir():
        need(
            args.target,
            f"--features {args.features}: {folder} holds no such network; give --target, {KINDS}, "
            f"and --features, one of {ANYWHERE} (default: pixels)",
        )
        args = dataclasses.replace(args, features="pixels")

    has_prompts = all(pictures.prompts for pictures in sets)
    has_labels = has_prompts and any(
        names_any(sets[0].prompts, check_classifier(path)["attributes"])
        for path in classifiers_of(folder)
    )
    need(
        has_prompts or not args.reward,
        f"--reward {args.reward}: needs to know what was asked for; give --prompts",
    )
    if not args.reward and has_labels and (folder / "reward").is_dir():
        args = dataclasses.replace(args, reward="class")
    check_score_networks(args, folder, sets, has_labels)
    for pictures, is_drawn in zip(sets, are_drawn):
        if is_drawn:
            say_cut_prompts(pictures.model, args.reward, pictures.prompts)
        elif args.reward:
            say_cut_prompts("", args.reward, pictures.prompts)
    return args, (folder, sets)


def classifiers_of(folder):
    """The classifiers that a model folder holds."""
    return [folder / name for name in TINY if (folder / name).is_dir()]


def check_comparable(sets):
    """One set is large enough; two are of equal size and of the same prompts."""
    first = sets[0]
    last = sets[-1]
    need(
        first.total == last.total,
        f"{first.total} pictures in {first.name} and {last.total} in {last.name}: the bias of FID "
        "falls with their number, so compare equal ones; "
        f"--n {min(first.total, last.total)}",
    )
    need(
        last.total >= 10,
        f"{last.name}: {last.total} pictures are too few to say anything; 10 at least",
    )
    need(
        not (first.prompts and last.prompts) or first.prompts == last.prompts,
        f"{first.name} and {last.name}: of different prompts, so nothing is paired; "
        "use the same --prompts",
    )
    processes = process_count()
    need(
        processes <= last.total,
        f"--nproc_per_node {processes}: there are only {last.total} pictures to share",
    )


def check_score_networks(args, folder, sets, has_labels):
    """The networks that see the pictures can be loaded, and can see pictures of their size."""
    asked = readers(args.reward, folder) if args.reward else {}
    evaluator = folder / "evaluator"
    if has_labels and evaluator.is_dir():
        asked = {evaluator: check_classifier(evaluator)} | asked
        if len(asked[evaluator]["attributes"]) > 1:  # for the modes
            check_judge(evaluator)
    if args.reward:
        check_reward(args.reward, folder)
        need(
            not prices_sets(args.reward),
            f"--reward {args.reward}: fid and kid come with --target; name others",
        )
    if asked:
        check_labels(sets[0].prompts, args.prompts or sets[0].name, known_attributes(asked))
    D = check_features(args.features, folder)
    target = target_path(args.target, args.features, folder)
    if args.features in TINY:
        check_real(folder / args.features / "real.npz")
    check_target(target, D, side=seen_side(args.features, folder))

    if args.features in TINY:
        asked[folder / args.features] = check_classifier(folder / args.features)
    for network, arguments in asked.items():
        side = arguments["size"]
        for pictures in sets:
            for size, picture in (pictures.sizes or {}).items():
                need(
                    size == (side, side),
                    f"{picture}: of {size[0]} x {size[1]}, and {network} sees {side} x {side}; "
                    "choose other --features, and --prompts without labels",
                )
