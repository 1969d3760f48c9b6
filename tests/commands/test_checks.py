"""What is wrong with a command line is said in one line, before anything is loaded or written.

What check_merge and check_eval say is also in test_merge.py and test_eval.py.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import contents, launch, launch_process, small
from PIL import Image
from safetensors.torch import save_file

import bases
import eval as evaluation
import merge
import rewards
import train
from commands import checks, training
from rewards import targets
from rewards.classifier import Classifier, read_config
from support import flags

# --------------------------------------------------------------------------------------------------
# train.py


@pytest.fixture
def check(tiny, tmp_path):
    """check(words): the flags of a small run and these -> args, prompts, evaluation prompts."""

    def run(words="", model=tiny, out=None):
        words = [word.format(tmp=tmp_path) for word in words.split()]
        argv = small(model, out or tmp_path / "run", *words)
        return checks.check(flags.parse_args(train.Args, "", argv), train.Args())

    return run


@pytest.fixture
def refused(check, tmp_path):
    """refused(words, named): the one line that check answers, which names `named`."""

    def run(words, *named, **options):
        before = contents(tmp_path)
        with pytest.raises(ValueError) as caught:
            check(words, **options)
        message = str(caught.value)
        line = flags.one_line(message)  # as it is printed: the value and the remedy are in it
        assert len(f"error: {line}") <= 300
        assert message.startswith(line[:90]) and message.endswith(line[-90:])
        for name in named:
            assert str(name) in message
        assert contents(tmp_path) == before
        return message

    return run


# flags: what the line says. SMALL has 2 groups of 4 rollouts, 3 kept, 4 steps, window 0:2.
REFUSED = {
    "--keep 5": "--keep 5: is more than --group_size 4",
    "--nearest 4": "--nearest 4: must be below --group_size 4",
    "--window 0:4": "--window 0:4: must hold a step and end by 3, before the last of --steps 4",
    "--window 2:2": "--window 2:2: must hold a step",
    "--window 3": "--window 3: write first:end, as in 0:4",
    "--updates 5": "--updates 5: does not divide the 12 (rollout, step) pairs",
    "--ema 1": "--ema 1.0: must be a finite number from 0 to 0.9999",
    "--prompt_noise 0.5 --tau1 0.8 --tau2 0.8": "--tau1 0.8: must be below --tau2 0.8",
    "--eval_images 25": "--eval_images 25: must be a multiple of the 10 prompts of",
    "--eval_images 10": "2 each at least; take 20",
    "--eval_images 32": "take 30 or 40",
    "--select all": "--keep 3: means nothing where --select is all",
    "--drift off --select all --diversity 0.3": "--diversity 0.3: --drift off would switch it off",
    "--drift off --select spread": "--select spread: --drift off would switch it off",
    "--reward fid --reference 24 --replace 2": "--replace 2: means nothing where --price is",
    "--lora 4 --train all": "--train all: means nothing where --lora is given: a LoRA",
    "--target {tmp}": ": means nothing where --fid is 0 and --reward names neither fid nor kid",
    "--reward class,fid --fid 0.5": "--fid 0.5: --reward class,fid has a weight of its own",
    "--fid 0.3 --features components --target {tmp}": "the target is the base's own moments",
    "--reward class,kid --features components": "leave out --target and kid",
    "--drift off --select all": "--keep 3: means nothing where --select is all, as --drift off",
    "--reward fid --reference 7": "--reference 7: must hold the 8 rollouts of an iteration",
    "--reward fid --price exact --replace 3": "--replace 3: does not divide --prompts_per_step 2",
    "--reward beauty": "'beauty' is none of class",
    "--reward kid": "kid needs the pictures",
    "--reward fid --features nothing": "--features nothing",
    "--reward fid --features json:loads": "--features json:loads: needs --target",
    "--reward fid --target {tmp}/none.npz": "none.npz",
    "--diversity_features nothing": "--diversity_features nothing",
    "--model {tmp}/nowhere": "/nowhere: no such folder",
    "--prompts {tmp}/none.jsonl": "none.jsonl: No such file",
    "--eval_prompts {tmp}/none.txt": "none.txt: No such file",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_mistake_is_one_line_with_the_value(refused, words):
    refused(words, REFUSED[words])


def test_sizes_may_just_fit(check):
    check("--keep 4 --nearest 3 --window 0:3")
    check("--reward fid --reference 8 --price exact --replace 2")
    check("--drift off --select all --prompt_noise 0 --keep 4")


def test_a_right_command_line_is_accepted_and_completed(check, tiny):
    args, prompts, eval_prompts = check()
    assert args.prompts == str(tiny / "prompts.jsonl")
    assert args.eval_prompts == str(tiny / "eval_prompts.jsonl")
    assert len(prompts) == 30 and len(eval_prompts) == 10
    args, *_ = check("--drift off --select all --keep 4")
    assert (args.select, args.prompt_noise, args.diversity, args.keep) == ("all", 0, 0, 4)


# Another value of each flag of checks.IDLE, and what it needs besides.
GIVEN = {
    "keep": "--keep 3 --select window",
    "tau1": "--tau1 0.5 --prompt_noise 0.5",
    "tau2": "--tau2 1.0 --prompt_noise 0.5",
    "psi": "--psi 0.5 --prompt_noise 0.5",
    "success": "--no-success",
    "gamma": "--gamma 0.9",
    "terminal": "--terminal zero",
    "keep_snapshots": "--keep_snapshots 2 --snapshot_every 1",
    "clip": "--clip 0.3",
    "features": "--features evaluator --reward fid --reference 8",
    "target": "--target {tmp} --reward fid --reference 8 --features pixels",
    "price": "--price exact --reward fid --reference 8",
    "replace": "--replace 2 --price exact --reward fid --reference 8",
    "reference": "--reference 24 --reward fid",
    "refresh": "--refresh 1 --reward fid --reference 8",
    "train": "--train all",
}
# What switches the mechanism off.
OFF = {
    "optimizer steps": "--updates 1 --passes 1",
    "fid or kid": "--reward class",
    "lora": "--lora 2",
    "select": "--select all",
    "price": "--price potential",
    "terminal": "--terminal zero",
    "prompt_noise": "--prompt_noise 0",
    "diversity": "--diversity 0",
    "snapshot_every": "--snapshot_every 0",
}
PAIRS = [(switch, name) for switch, _, names in checks.IDLE for name in names]


@pytest.mark.parametrize("switch, name", PAIRS)
def test_a_flag_that_changes_nothing_is_refused(refused, switch, name):
    words = " ".join(GIVEN[name].split()[:2]) if switch == "fid or kid" else GIVEN[name]
    given = "--no-success" if name == "success" else f"--{name} "
    refused(f"{words} {OFF[switch]}", given, ": means nothing where ")


def test_a_flag_that_changes_something_is_accepted(check):
    for name, words in GIVEN.items():
        if name != "target":  # that of a test is too small
            check(words)
    for words in OFF.values():
        check(words + (" --keep 4" if words == "--select all" else ""))
    check("--diversity 0 --drift off --select all --keep 4")


TABLES = [
    (checks.LIMITS, train.Args),
    (checks.MERGE_LIMITS, merge.Args),
    (checks.EVAL_LIMITS, evaluation.Args),
]


def just_beyond(low, high, kind):
    """Numbers outside the limits, as near as their type allows, and such as are not finite."""
    numbers = [math.nan, math.inf, -math.inf, 10**400, -(10**400)]
    if kind is int:
        numbers.append(low - 1)
    else:
        numbers.append(np.nextafter(low, -math.inf))
    if high < math.inf:
        numbers.append(high + 1 if kind is int else np.nextafter(high, math.inf))
    return numbers


@pytest.mark.parametrize("limits, Args", TABLES, ids=["train", "merge", "eval"])
def test_every_number_of_a_command_has_limits_and_stays_within_them(limits, Args):
    kinds = {}
    for field in dataclasses.fields(Args):
        if field.type in (int, float):
            kinds[field.name] = field.type
    assert kinds.keys() == limits.keys()
    for name, (low, high) in limits.items():
        only = {name: (low, high)}
        for value in (low, min(high, 2**62)):
            checks.check_limits(SimpleNamespace(**{name: value}), only)
        for value in just_beyond(low, high, kinds[name]):
            with pytest.raises(ValueError, match=f"^--{name} .*: must be a finite number from"):
                checks.check_limits(SimpleNamespace(**{name: value}), only)


def test_the_defaults_are_within_the_limits():
    checks.check_limits(train.Args(), checks.LIMITS)
    checks.check_limits(merge.Args("rl", []), checks.MERGE_LIMITS)
    checks.check_limits(evaluation.Args("score", []), checks.EVAL_LIMITS)


def test_a_seed_is_one_that_torch_takes():
    assert torch.Generator().manual_seed(checks.LARGEST_SEED)
    with pytest.raises((RuntimeError, ValueError, OverflowError)):
        torch.Generator().manual_seed(2 * checks.LARGEST_SEED + 2)


def test_a_number_that_no_float_holds(refused):
    refused(f"--seed {10**400}", "--seed 1000", "must be a finite number")
    refused(f"--iterations {10**400}", "--iterations 1000", "must be a finite number")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(refused):
    refused("--device cuda", "--device cuda: no GPU")


@pytest.mark.parametrize("flag", ["--prompts", "--eval_prompts"])
def test_prompts_without_the_label_that_the_reward_needs(refused, tmp_path, flag):
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "a coat", "label": 4}\n{"prompt": "a bag"}\n'
    )
    refused(f"{flag} {{tmp}}/prompts.jsonl", f"{tmp_path / 'prompts.jsonl'}:2")


# --------------------------------------------------------------------------------------------------
# The model folder and its files.

# A file that is missing, and what the line names.
DAMAGED = {
    "model_index.json": "model_index.json",
    "transformer/diffusion_pytorch_model.safetensors": "diffusion_pytorch_model.safetensors",
    "reward/model.safetensors": "reward",
    "evaluator/real.npz": "real.npz",
    "prompts.jsonl": "prompts.jsonl",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_model_folder_with_a_file_missing(refused, tiny, tmp_path, name):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    refused("", DAMAGED[name], model=tmp_path / "model")


def test_real_moments_without_the_kernel_width(refused, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    path = tmp_path / "model" / "evaluator" / "real.npz"
    with np.load(path) as real:
        np.savez(path, mu=real["mu"], sigma=real["sigma"])
    refused("", "real.npz", "scale", model=tmp_path / "model")


def test_where_the_evaluator_rewards_the_reward_classifier_must_judge(refused, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "reward" / "real.npz").unlink()
    words = "--reward fid --features evaluator --reference 24"
    refused(words, "real.npz", model=tmp_path / "model")


def test_feature_networks_that_the_model_folder_lacks(check, refused, tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    shutil.rmtree(model / "evaluator")
    words = "--diversity_features evaluator"
    choices = "latents, components, pixels, inception:FILE, dinov2[:MODEL], clip[:MODEL]"
    message = f"{words}: {model} holds no such network; give one of {choices}"
    refused(words, message, model=model)
    check(model=model)  # the rewards judge
    words = "--reward fid --reference 24 --features evaluator"
    refused(words, f"--features evaluator: {model} holds no such network", model=model)


def bare_model(tiny, folder, count=47):
    """A copy of tiny without its classifiers, and a file of `count` prompts without labels."""
    shutil.copytree(tiny, folder / "model")
    for name in ("reward", "evaluator"):
        shutil.rmtree(folder / "model" / name)
    for name in ("prompts.jsonl", "eval_prompts.jsonl"):
        (folder / "model" / name).unlink()
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"a coat number {number}\n" for number in range(count)))
    return folder / "model", prompts


def test_the_default_flags_run_on_a_base_without_classifiers(tiny, tmp_path):
    model, prompts = bare_model(tiny, tmp_path)
    out = str(tmp_path / "run")
    plain = train.Args(model=str(model), prompts=str(prompts), reward="jpeg", out=out)
    args, _, eval_prompts = checks.check(plain, train.Args())
    assert (args.diversity_features, args.features) == ("components", "components")
    assert args.reward == "jpeg,fid:0.3"
    assert args.eval_images == 658 and len(eval_prompts) == 47  # the default is 640
    with pytest.raises(ValueError, match="take 611 or 658"):
        given = dataclasses.replace(plain, eval_images=650)
        checks.check(given, train.Args())


def test_a_default_above_many_prompts_does_not_rise_by_itself(tiny, tmp_path):
    model, prompts = bare_model(tiny, tmp_path, count=321)
    plain = train.Args(
        model=str(model), prompts=str(prompts), reward="jpeg", out=str(tmp_path / "x")
    )
    with pytest.raises(ValueError, match="--eval_images 640: .* take 642$"):
        checks.check(plain, train.Args())


def test_a_reward_of_a_classifier_that_is_not_there_names_the_others(tiny, tmp_path):
    model, prompts = bare_model(tiny, tmp_path)
    plain = train.Args(model=str(model), prompts=str(prompts), out=str(tmp_path / "run"))
    with pytest.raises(
        ValueError, match="rewards without one are clip, .*module:function"
    ) as found:
        checks.check(plain, train.Args())
    assert str(found.value).startswith("--reward class:1: ")


def test_evaluation_falls_back_on_the_prompts_of_training(check, tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "eval_prompts.jsonl").unlink()
    args, _, eval_prompts = check("--eval_images 60", model=model)
    assert args.eval_prompts == str(model / "prompts.jsonl") and len(eval_prompts) == 30
    images = evaluation.Args("images", [str(model)], out=str(tmp_path / "drawn"), n=60)
    args, prompts = checks.check_eval(images, evaluation.Args("images", [str(model)]))
    assert args.prompts == str(model / "prompts.jsonl") and len(prompts) == 30
    (model / "prompts.jsonl").unlink()
    line = f"--prompts: {model} has no prompts.jsonl; give a file of prompts"
    for command, more in (("images", {"out": str(tmp_path / "drawn")}), ("score", {})):
        default = evaluation.Args(command, [str(model)])
        with pytest.raises(ValueError, match=f"^{line}$"):
            checks.check_eval(dataclasses.replace(default, **more), default)


def test_labels_are_those_of_the_classifiers(check, refused, tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    lines = [{"prompt": "a bag", "label": 46}, {"prompt": "a coat", "label": 0}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = f"--prompts {file} --eval_prompts {file} --eval_images 20"
    refused(words, 'needs "label" to be a number from 0 to 9, not 46', model=model)
    for name in ("reward", "evaluator"):
        build_classifier(model / name, classes=47)
    check(words, model=model)
    build_classifier(model / "reward", classes=12)
    refused(words, "evaluator/ knows 47 of label and reward/ knows 12 of label", model=model)
    check(f"{words} --reward jpeg", model=model)  # reward/ is not asked for labels
    judged_by_reward = "--reward fid --features evaluator --reference 24"
    refused(f"{words} {judged_by_reward}", 'needs "label" to be a number from 0 to 11', model=model)


def build_classifier(folder, width=4, **sizes):
    """A random classifier in a folder that may have held another."""
    (folder / "config.json").write_text(json.dumps({"width": width} | sizes))
    network = Classifier(**read_config(folder))
    save_file(network.state_dict(), folder / "model.safetensors")


def stable_diffusion(folder):
    """As much of a Stable Diffusion 1 folder as check_sampling reads."""
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"num_train_timesteps": 50}')
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


def test_the_schedule_has_as_many_steps_as_are_asked_for(tmp_path):
    model = stable_diffusion(tmp_path)
    checks.check_sampling(model, steps=49, eval_steps=20)
    with pytest.raises(ValueError, match="^--eval_steps 50: .*; take fewer$"):
        checks.check_sampling(model, steps=49, eval_steps=50)


def test_the_kernel_of_flows_is_for_flows(tiny, tmp_path):
    checks.check_sampling(tiny, "flow-grpo", steps=4)
    checks.check_sampling("sit:net.safetensors", "flow-grpo", steps=4)
    for model in (stable_diffusion(tmp_path), "edm2:net.safetensors"):
        with pytest.raises(ValueError, match=f"^--kernel flow-grpo: .* {model} is none; take"):
            checks.check_sampling(model, "flow-grpo", steps=4)


def test_a_guide_must_have_work():
    guided = train.Args(model="edm2:net.pkl,guide.pkl", guidance=1.0)
    with pytest.raises(ValueError, match="--guidance 1: .*guide.pkl.*--model edm2:net.pkl alone"):
        checks.check_guide(guided)
    checks.check_guide(dataclasses.replace(guided, guidance=2.0))
    checks.check_guide(dataclasses.replace(guided, model="edm2:net.pkl"))


# --------------------------------------------------------------------------------------------------
# The run folder.


@pytest.mark.parametrize("words", ["--lr 0.5", "--seed 3", "--window 1:3"])
def test_a_run_folder_of_another_configuration(check, refused, tmp_path, words):
    out = tmp_path / "old"
    out.mkdir()
    args, *_ = check(out=out)
    (out / "config.json").write_text(json.dumps(vars(args)))
    refused(words, out, words.split()[0], out=out)
    check(out=out)  # the same configuration goes on
    check("--dry_run", out=out)
    out.rename(tmp_path / "moved")
    check(out=tmp_path / "moved")


def test_a_run_of_before_there_was_a_flag_goes_on(check, tmp_path):
    out = tmp_path / "old"
    out.mkdir()
    args, *_ = check(out=out)
    saved = vars(args).copy()
    del saved["check"]
    (out / "config.json").write_text(json.dumps(saved))
    check(out=out)


def test_the_fid_stands_beside_any_reward_that_names_none(tiny, tmp_path):
    def checked(**flags):
        given = train.Args(model=str(tiny), out=str(tmp_path / "run"), **flags)
        args, *_ = checks.check(given, train.Args())
        return args.reward, args.fid, args.features

    assert checked() == ("class:1,fid:0.3", 0.3, "components")
    assert checked(reward="margin", fid=0.5) == ("margin,fid:0.5", 0.5, "components")
    assert checked(features="reward") == ("class:1,fid:0.3", 0.3, "reward")
    real = str(tiny / "reward" / "real.npz")
    assert checked(target=real) == ("class:1,fid:0.3", 0.3, "reward")
    assert checked(reward="class,fid:2") == ("class,fid:2", 0.0, "reward")
    assert checked(drift="off") == ("class:1", 0.0, "reward")


def test_a_default_that_is_filled_in_is_not_in_the_name_of_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare_model(tiny, tmp_path)
    plain = train.Args(model="model", prompts="prompts.txt", reward="jpeg")
    args, *_ = checks.check(plain, train.Args())
    assert args.out == "runs/model=model,prompts=prompts.txt,reward=jpeg"


def test_a_run_folder_that_cannot_be_used(refused, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    (tmp_path / "file").write_text("text")
    refused("", "broken", "config.json", out=tmp_path / "broken")
    refused("", "photos: exists and is not a run", out=tmp_path / "photos")
    refused("", "file", out=tmp_path / "file")
    refused("", f"its parent {tmp_path / 'file'} is a file", out=tmp_path / "file" / "run")
    refused("", "File name too long", out=tmp_path / ("x" * 300))
    (tmp_path / "loop").symlink_to("loop")
    refused("", "loop is a link to nothing", out=tmp_path / "loop")


@pytest.mark.parametrize("out", ["model/run", "model/../model/reward/run", "link/run"])
def test_a_run_folder_within_the_base(refused, tiny, tmp_path, out):
    """The finished model holds a copy of the base, and so would hold itself."""
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    message = f"--out {tmp_path / out}: lies in {tmp_path / 'model'}, which is copied"
    refused("", message, model=tmp_path / "model", out=tmp_path / out)


def test_a_run_may_lie_beside_the_file_of_a_network_but_not_in_what_is_copied(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    checks.check_out("runs/default", "sit:net.safetensors")
    with pytest.raises(ValueError, match="--out vae/run: lies in vae, which is copied"):
        checks.check_out("vae/run", "sit:net.safetensors")


# --------------------------------------------------------------------------------------------------
# Several processes.


def test_more_processes_than_rollouts(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "9")
    message = "--nproc_per_node 9: an iteration has only 8 rollouts"
    refused("", message)
    refused("--model nowhere", message)  # before a base is fetched


def test_compiled_sizes_that_would_change_with_every_iteration(check, refused, monkeypatch):
    words = "--compile --prompts_per_step 3"
    check(words)  # one process always has the same
    monkeypatch.setenv("WORLD_SIZE", "2")
    check("--compile")
    refused(words, "--compile: code is made for each size of a batch, and 2 processes")


SHARDED = {
    "--lora 2": "--shard: does not go with --lora",
    "--compile": "--shard: does not go with --compile",
    "--prompts_per_step 3": "--prompts_per_step 3: with --shard, must be a multiple of the 2",
    "--reward fid --reference 23": "--reference 23: with --shard",
    "--updates 3": "--updates 3: with --shard, must divide the 2 steps of --window",
}


@pytest.mark.parametrize("words", SHARDED)
def test_shard_needs_equal_work(refused, monkeypatch, words):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(f"--shard {words}", SHARDED[words])


def test_with_shard_a_default_rises_for_the_processes_too(tiny, tmp_path, monkeypatch):
    model, prompts = bare_model(tiny, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    plain = train.Args(
        model=str(model),
        prompts=str(prompts),
        reward="jpeg",
        out=str(tmp_path / "run"),
        prompts_per_step=12,
        shard=True,
    )
    args, *_ = checks.check(plain, train.Args())
    assert args.eval_images == 752  # 16 * 47: the first from 640 that both divide


def test_shard_needs_several_processes_and_weights_that_can_be_dealt(check, refused, monkeypatch):
    refused("--shard", "--shard: one process has nobody to share with")
    monkeypatch.setenv("WORLD_SIZE", "2")
    args, *_ = check("--shard")
    edm2 = dataclasses.replace(args, model="edm2:net.safetensors")
    with pytest.raises(ValueError, match="--shard: .*edm2:net.safetensors has some"):
        checks.check_shard(edm2, processes=2)


# --------------------------------------------------------------------------------------------------
# The plan.


def test_the_plan_names_the_sizes(check):
    args, prompts, _ = check("--passes 2 --updates 4")
    plan = checks.plan(args, prompts)
    for size in ("30 prompts", "= 8 rollouts", "= 12 pairs", "8 optimizer steps of 3 pairs"):
        assert size in plan
    args, prompts, _ = check("--reward fid --reference 24 --price exact --replace 1")
    assert "a reference of 24 pictures prices 8 sets of 1 pictures" in checks.plan(args, prompts)


# --------------------------------------------------------------------------------------------------
# merge.py


MERGE_REFUSED = {
    "average --out {tmp}": "exists; choose another",
    "average": "--out: name the folder to write",
    "average --out {out} --device cpu": "--device: means nothing to merge.py average",
    "average --out {out} --coefficients nan,1": "--coefficients nan,1: sum to nan; they must sum",
    "ema --out {out}": "ema: needs two or more averages",
    "rl --out {out} --coefficients 1,0": "--coefficients: means nothing to merge.py rl",
    "rl --out {out} --images 31": "--images 31: must be a multiple of the 30 prompts",
    "rl --out {out} --images 40": "prompts.jsonl; take 30 or 60",
    "rl --out {out} --reference 29": "--reference 29: must be a multiple of the 30 prompts",
    "rl --out {out} --report_images 5001": "take 5000 or 5010",
    "rl --out {out} --features pixels": "--features pixels: needs --target",
    "rl --out {out} --guidance nan": "--guidance nan: must be a finite number",
}


@pytest.fixture(scope="module")
def two_models(tiny, tmp_path_factory):
    """Two copies of a base, which can be merged."""
    folder = tmp_path_factory.mktemp("two")
    for name in "ab":
        shutil.copytree(tiny, folder / name)
    return [str(folder / "a"), str(folder / "b")]


@pytest.mark.parametrize("words", MERGE_REFUSED)
def test_a_mistake_of_a_merge_is_one_line(two_models, tmp_path, words):
    command, *rest = words.format(tmp=tmp_path, out=tmp_path / "out").split()
    args = flags.parse_args(merge.Args, "", [command, *two_models, *rest])
    with pytest.raises(ValueError) as caught:
        checks.check_merge(args, merge.Args(command, two_models))
    assert MERGE_REFUSED[words] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {}


@pytest.fixture(scope="module")
def bare(tiny, tmp_path_factory):
    """A base without classifiers, a file of 47 prompts for it, and 800 pictures in a folder."""
    folder = tmp_path_factory.mktemp("bare")
    model, prompts = bare_model(tiny, folder)
    pixels = np.random.default_rng(0).integers(0, 255, (800, 16, 16), dtype=np.uint8)
    (folder / "pictures").mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / "pictures" / f"{number}.png")
    return SimpleNamespace(model=str(model), prompts=str(prompts), pictures=folder / "pictures")


def check_search_of(bare, tmp_path, **flags):
    """check_merge of merge.py rl on the bare base and a copy of it."""
    if not (tmp_path / "b").exists():
        shutil.copytree(bare.model, tmp_path / "b")
    checkpoints = [bare.model, str(tmp_path / "b")]
    default = merge.Args("rl", checkpoints)
    out = str(tmp_path / "merged")
    return checks.check_merge(dataclasses.replace(default, out=out, **flags), default)


def test_the_default_sizes_of_a_search_rise_to_multiples_of_the_prompts(bare, tmp_path):
    flags = {"prompts": bare.prompts, "features": "pixels", "target": str(bare.pictures)}
    args, *_ = check_search_of(bare, tmp_path, **flags)
    assert (args.images, args.reference, args.report_images) == (235, 1081, 5029)
    with pytest.raises(ValueError, match="^--images 211: .*; take 188 or 235$"):
        check_search_of(bare, tmp_path, images=211, **flags)


def test_a_search_on_a_base_that_holds_nothing_says_what_to_give(bare, tmp_path):
    line = "--features reward: .*/model holds no such network; give one of pixels, inception:FILE"
    with pytest.raises(ValueError, match=f"^{line}"):
        check_search_of(bare, tmp_path)
    with pytest.raises(ValueError, match="^--prompts: .*/model has no prompts.jsonl; give"):
        check_search_of(bare, tmp_path, features="pixels", target=str(bare.pictures))


def test_a_merge_that_cannot_be_written(two_models, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (("loop", "is a link to nothing"), ("x" * 300, "File name too long")):
        args = merge.Args("average", two_models, out=str(tmp_path / name))
        with pytest.raises(ValueError, match=f"^--out .*{reason}"):
            checks.check_merge(args, merge.Args("average", two_models))


def test_a_merge_within_its_base(two_models):
    out = str(Path(two_models[0]) / "merged")
    args = merge.Args("average", two_models, out=out)
    with pytest.raises(ValueError, match="merged: lies in"):
        checks.check_merge(args, merge.Args("average", two_models))


# --------------------------------------------------------------------------------------------------
# eval.py


EVAL_REFUSED = {
    "images {tiny} --out {tmp}/new --labels a": "--labels: means nothing to eval.py images",
    "score {tiny} --n 50 --out {tmp}/table.txt": "must end in .json",
    "score {tiny} --resamples 9": "--resamples 9: must be a finite number from 10",
    "score {tmp}/pictures --reward class": "needs to know what was asked for; give --prompts",
    "score {tmp}/pictures {tiny}": "compare equal ones; --n 12",
    "grid {tiny} --out {tmp}/grid.jpg": "must end in .png",
    "compare {tiny} --steps 3": "--steps: means nothing to eval.py compare",
}


@pytest.mark.parametrize("words", EVAL_REFUSED)
def test_a_mistake_of_an_evaluation_is_one_line(tiny, tmp_path, words):
    (tmp_path / "pictures").mkdir()
    image = np.random.default_rng(0).integers(0, 255, (28, 28), dtype=np.uint8)
    for number in range(12):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{number}.png")
    before = contents(tmp_path)
    args = flags.parse_args(evaluation.Args, "", words.format(tiny=tiny, tmp=tmp_path).split())
    with pytest.raises(ValueError) as caught:
        checks.check_eval(args, evaluation.Args(args.command, args.inputs))
    assert EVAL_REFUSED[words] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


def test_a_score_on_a_base_without_an_evaluator_is_in_pixels(bare, tmp_path):
    default = evaluation.Args("score", [bare.model])
    given = dataclasses.replace(default, prompts=bare.prompts)
    with pytest.raises(ValueError) as caught:
        checks.check_eval(given, default)
    for choice in ("--target", "an idx file", "pixels", "inception:FILE", "module:function"):
        assert choice in str(caught.value)
    given = dataclasses.replace(given, target=str(bare.pictures))
    args, (_, (pictures,)) = checks.check_eval(given, default)
    assert args.features == "pixels"
    assert pictures.total == 1034  # of 47 prompts; the default is 1000
    given = dataclasses.replace(given, features="dinov2:nowhere/nothing")
    with pytest.raises(ValueError, match="^--features dinov2:nowhere/nothing"):
        checks.check_eval(given, default)


def test_pictures_have_the_size_of_each_classifier_that_is_asked(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    build_classifier(model / "evaluator", classes=47, size=32, channels=3)
    pixels = np.zeros((20, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "large.npz", arr_0=pixels)
    (tmp_path / "labelled.jsonl").write_text('{"prompt": "a coat", "label": 46}\n')
    inputs = [str(tmp_path / "large.npz")]
    default = evaluation.Args("score", inputs)
    args = dataclasses.replace(default, model=str(model))
    checks.check_eval(args, default)  # of 32 x 32, as the evaluator
    args = dataclasses.replace(args, features="reward")
    with pytest.raises(ValueError, match="large.npz: of 32 x 32, and .*/reward sees 28 x 28"):
        checks.check_eval(args, default)
    prompts = str(tmp_path / "labelled.jsonl")
    args = dataclasses.replace(default, model=str(model), prompts=prompts)
    with pytest.raises(ValueError, match="evaluator/ knows 47 of label and reward/ knows 10"):
        checks.check_eval(args, default)
    build_classifier(model / "reward", classes=47, size=32)
    checks.check_eval(args, default)


def test_a_score_in_other_features_needs_no_moments_of_the_evaluator(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "evaluator" / "real.npz").unlink()
    args = evaluation.Args("score", [str(model)], features="reward")
    checks.check_eval(args, evaluation.Args("score", [str(model)]))
    (model / "evaluator" / "model.safetensors").unlink()  # the alignment does need the network
    with pytest.raises(ValueError, match="evaluator: not a classifier folder"):
        checks.check_eval(args, evaluation.Args("score", [str(model)]))


# --------------------------------------------------------------------------------------------------
# Through the commands.


@pytest.mark.parametrize("words", [["--keep", "1"], ["--eval_images", "25"]], ids=" ".join)
def test_a_refusal_loads_nothing_and_writes_nothing(tiny, tmp_path, capfd, monkeypatch, words):
    """Whether it is the first check that fails or one of the last."""

    def fail(*args, **kwargs):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(bases, "load", fail)
    monkeypatch.setattr(rewards.Reward, "__init__", fail)
    monkeypatch.setattr(training, "load_features", fail)
    monkeypatch.setattr(targets, "load_features", fail)
    monkeypatch.setattr(evaluation.Judge, "__init__", fail)
    with pytest.raises(SystemExit) as stopped:
        launch(small(tiny, tmp_path / "run", *words))
    out, error = capfd.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert error.startswith(f"error: {' '.join(words)}: must be")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words, named",
    [
        ("--learning_rate 1", "--learning_rate"),
        ("--group 8", "--group"),
        ("--kernel euler", "euler"),
        ("--lr fast", "fast"),
        ("--iterations 2.5", "2.5"),
    ],
)
def test_a_flag_that_is_none_or_has_another_type(tiny, tmp_path, capfd, words, named):
    with pytest.raises(SystemExit) as stopped:
        launch(small(tiny, tmp_path / "run", *words.split()))
    assert stopped.value.code == 2
    assert named in capfd.readouterr().err.splitlines()[-1]


def test_only_the_first_process_speaks(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        launch(small(tiny, tmp_path / "run", "--keep", 1))
    assert stopped.value.code == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_as_a_command(tiny, tmp_path):
    code, out, error = launch_process(small(tiny, tmp_path / "run", "--keep", "1"))
    assert code == 2 and out == ""
    assert error == "error: --keep 1: must be a finite number from 2 to inf\n"
    assert not (tmp_path / "run").exists()
