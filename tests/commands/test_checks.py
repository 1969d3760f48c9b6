"""What is wrong with a command line is said in one line, before anything is loaded or written."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import contents, launch, launch_process, small
from PIL import Image

import bases
import eval as evaluation
import merge
import rewards
import train
from commands import checks, training
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
        assert "\n" not in message and len(message) < 1000
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
    "--tau1 0.8 --tau2 0.8": "--tau1 0.8: must be below --tau2 0.8",
    "--eval_images 25": "--eval_images 25: must be a multiple of the 10 prompts of",
    "--eval_images 10": "two each at least",
    "--select all": "--keep 3: means nothing with --select all",
    "--drift off --select all --diversity 0.3": "--diversity 0.3: --drift off would switch it off",
    "--drift off --select spread": "--select spread: --drift off would switch it off",
    "--reward fid --reference 24 --replace 2": "--replace 2: means nothing with --price potential",
    "--lora 4 --train all": "--train all: a LoRA learns in attention and feed-forward",
    "--target {tmp}": ": means nothing where --reward, class:1, names neither fid nor kid",
    "--reference 24": "--reference 24: means nothing where --reward",
    "--reward fid --reference 7": "--reference 7: must hold the 8 rollouts of an iteration",
    "--reward fid --price exact --replace 3": "--replace 3: does not divide --prompts_per_step 2",
    "--reward beauty": "'beauty' is none of class",
    "--reward kid": "kid needs the pictures",
    "--reward fid --features nothing": "--features nothing",
    "--reward fid --features json:loads": "--features json:loads: needs --target",
    "--reward fid --target {tmp}/none.npz": "none.npz",
    "--diversity_features nothing": "--diversity_features nothing",
    "--model {tmp}/nowhere": "--model",
    "--prompts {tmp}/none.jsonl": "none.jsonl: No such file",
    "--eval_prompts {tmp}/none.txt": "none.txt: No such file",
    "--shard": "--shard: one process has nobody to share with",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_mistake_is_one_line_with_the_value(refused, words):
    refused(words, REFUSED[words])


def test_a_right_command_line_is_accepted_and_completed(check, tiny):
    args, prompts, eval_prompts = check()
    assert args.prompts == str(tiny / "prompts.jsonl")
    assert args.eval_prompts == str(tiny / "eval_prompts.jsonl")
    assert len(prompts) == 30 and len(eval_prompts) == 10
    args, *_ = check("--drift off --select all")
    assert (args.select, args.prompt_noise, args.diversity, args.keep) == ("all", 0, 0, 4)


@pytest.mark.parametrize("name", checks.NEEDS)
def test_a_flag_whose_mechanism_is_off_means_nothing(refused, name):
    other = {
        "tau1": "--tau1 0.5",
        "tau2": "--tau2 1.0",
        "psi": "--psi 0.5",
        "success": "--no-success",
        "gamma": "--gamma 0.9",
        "terminal": "--terminal zero",
    }[name]
    switch = checks.NEEDS[name]
    refused(f"{other} --{switch} 0", f"{other}: means nothing where --{switch} is 0")
    why = f"{other}: means nothing where --{switch} is 0, as --drift off sets it"
    refused(f"{other} --drift off --select all --keep 4", why)


TABLES = [
    (checks.LIMITS, train.Args),
    (checks.MERGE_LIMITS, merge.Args),
    (checks.EVAL_LIMITS, evaluation.Args),
]


@pytest.mark.parametrize("limits, Args", TABLES, ids=["train", "merge", "eval"])
def test_every_number_has_limits_and_none_leaves_them(limits, Args):
    fields = {field.name: field for field in dataclasses.fields(Args)}
    numbers = {name for name, field in fields.items() if field.type in (int, float)}
    assert numbers == set(limits)
    values = {}
    for name, field in fields.items():
        is_required = field.default is dataclasses.MISSING
        values[name] = [] if is_required else field.default
    for name, (low, high) in limits.items():
        for value in (low - 1, high + 1, math.nan, math.inf, -math.inf):
            args = Args(**(values | {name: value}))
            rest = {other: limits[other] for other in limits if other == name}
            with pytest.raises(ValueError, match=f"--{name} .*must be a finite number from"):
                checks.check_limits(args, rest)


def test_a_seed_is_one_that_torch_takes():
    assert torch.Generator().manual_seed(checks.LARGEST_SEED)
    with pytest.raises((RuntimeError, ValueError, OverflowError)):
        torch.Generator().manual_seed(2 * checks.LARGEST_SEED + 2)


def test_a_number_that_no_float_holds(refused):
    refused(f"--seed {10**400}", "--seed 1000", "must be a finite number")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(refused):
    refused("--device cuda", "--device cuda: no GPU")


@pytest.mark.parametrize("flag", ["--prompts", "--eval_prompts"])
def test_prompts_without_the_label_that_the_reward_needs(refused, tmp_path, flag):
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "a coat", "label": 4}\n{"prompt": "a bag"}\n'
    )
    refused(f"{flag} {{tmp}}/prompts.jsonl", f"{tmp_path / 'prompts.jsonl'}:2")


# What happens to a file of the model folder, and what the line names.
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
    refused("", "the name is too long", out=tmp_path / ("x" * 300))


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
    refused("", "--nproc_per_node 9: an iteration has only 8 rollouts")


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
    "average --out {out} --updates 3": "--updates: means nothing to merge.py average",
    "average --out {out} --coefficients 0.5": "1 numbers for 2 checkpoints",
    "average --out {out} --coefficients 1,1": "sum to 2; they must sum to 1",
    "average --out {out} --coefficients 1,x": "--coefficients 1,x: write numbers with commas",
    "average --out {out} --coefficients nan,1": "--coefficients nan,1",
    "ema --out {out}": "ema: needs two or more averages",
    "ema --out {out} --sigma_rel 0.3": "--sigma_rel 0.3: each must be between 0 and 0.288",
    "rl --out {out} --group_size 3": "--group_size 3: must be even",
    "rl --out {out} --images 31": "--images 31: must be a multiple of the 30 prompts",
    "rl --out {out} --images 90 --reference 60": "--images 90: is more than --reference 60",
    "rl --out {out} --report_images 15": "--report_images 15: must be a multiple of the 10",
    "rl --out {out} --target {tmp}/none": "none",
    "rl --out {out} --reward beauty": "beauty",
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


@pytest.mark.parametrize(
    "command, count, words",
    [("ema", 1, "one checkpoint is nothing to merge"), ("average", 3, "is given twice")],
)
def test_checkpoints_that_are_too_few_or_given_twice(two_models, tmp_path, command, count, words):
    paths = [*two_models, two_models[0]][:count]
    args = merge.Args(command, paths, out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=words):
        checks.check_merge(args, merge.Args(command, paths))


# --------------------------------------------------------------------------------------------------
# eval.py


EVAL_REFUSED = {
    "images {tiny}": "--out: name the folder or the .npz to write",
    "images {tiny} {tiny} --out {tmp}/new": "eval.py images takes 1 at most",
    "images {tiny} --out {tmp}/file/new": "is a file; choose another --out",
    "images {tiny} --out {tmp}/file": "exists, and no config.json says how it was made",
    "images {tiny} --out {tmp}/new --n 15": "--n 15",
    "images {tiny} --out {tmp}/new --labels a": "--labels: means nothing to eval.py images",
    "score {tiny} --n 50 --out {tmp}/table.txt": "must end in .json",
    "score {tiny} --n 50 --reward fid": "--reward fid: fid and kid come with --target",
    "score {tmp}/pictures --steps 3": "--steps: means nothing to pictures that are there",
    "score {tmp}/pictures --reward class": "needs to know what was asked for; give --prompts",
    "score {tmp}/pictures {tiny}": "compare equal ones; --n 12",
    "grid {tiny} --out {tmp}/grid.jpg": "must end in .png",
    "compare {tiny} --steps 3": "--steps: means nothing to eval.py compare",
}


@pytest.mark.parametrize("words", EVAL_REFUSED)
def test_a_mistake_of_an_evaluation_is_one_line(tiny, tmp_path, words):
    (tmp_path / "file").write_text("text")
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


# --------------------------------------------------------------------------------------------------
# Through the commands.


@pytest.mark.run
def test_a_refusal_loads_nothing_and_writes_nothing(tiny, tmp_path, capfd, monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(bases, "load", fail)
    monkeypatch.setattr(rewards.Reward, "__init__", fail)
    monkeypatch.setattr(training, "load_features", fail)
    with pytest.raises(SystemExit) as stopped:
        launch(small(tiny, tmp_path / "run", "--keep", 1))
    out, error = capfd.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert error == "error: --keep 1: must be a finite number from 2 to inf\n"
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


def test_a_merge_within_its_base(two_models, tmp_path, capfd):
    out = Path(two_models[0]) / "merged"
    with pytest.raises(SystemExit) as stopped:
        merge.main(["average", two_models[0], "--out", str(out)])
    assert stopped.value.code == 2 and not out.exists()
    assert "merged: lies in" in capfd.readouterr().err
