"""Every base trains through the same train.py: three updates with every mechanism on."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import launch, read_metrics, read_weights
from safetensors.torch import load_file, save_file
from small_bases import draw, file_of, prompts_of, shaken, stock_draw, stock_pipeline

import bases
import eval as evaluation
import merge
import prompting
from bases import edm2, sit, tensors
from commands import picture_sets
from support import files

EVERYTHING = """
    --device cpu --iterations 3 --prompts_per_step 2 --group_size 4 --select window --keep 3
    --steps 4 --window 0:2 --updates 2 --nearest 2 --lr 0.01 --warmup 0
    --eval_images 20 --eval_steps 2 --eval_every 3 --save_every 1 --snapshot_every 3
    --reward jpeg:1 --diversity_features latents --prompt_noise 0.5 --guidance 2 --kl 0.1 --gardo
    --checkpointing --decode_batch 2
""".split()
LORA = ("--lora", "2")
WHOLE = ("--train", "all")
LORA_FILE = "pytorch_lora_weights.safetensors"

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile needs a compiler"
)


def write_prompts(path, texts):
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def command_line(name, out, prompts, *flags):
    return [*EVERYTHING, "--model", name, "--out", str(out), "--prompts", str(prompts), *flags]


@pytest.fixture(scope="module")
def trained(names, tmp_path_factory):
    """A function (family, flags) -> the folder of its run; each is made once."""
    known = {}

    def run(family, flags):
        if (family, flags) not in known:
            folder = tmp_path_factory.mktemp("run")
            argv = [*EVERYTHING, "--model", names[family], "--out", str(folder / "run"), *flags]
            if family != "tiny":  # which has prompts of its own, with labels
                prompts = write_prompts(folder / "prompts.jsonl", prompts_of(family)[:2])
                argv += ["--prompts", str(prompts)]
            launch(argv)
            known[family, flags] = folder / "run"
        return known[family, flags]

    return run


def check_rows(rows, family):
    """What metrics.jsonl must say of a run of three iterations."""
    assert len(rows) == 4
    assert rows[3]["kl"] > 0
    for row in rows[1:]:
        assert row["ratio_error"] <= 1e-6
        assert row["grad_norm"] > 0
    measured = ["vendi", "distance", "accuracy" if family == "tiny" else "reward_jpeg"]
    for row in (rows[0], rows[3]):
        for name in measured:
            assert f"eval/{name}" in row


def check_lora(run, name, before, after):
    """The merge reads run/lora as the same model as run/model."""
    base_folder = name
    if name.startswith(("sit:", "edm2:")):
        base_folder = str(run / "base")
        bases.load(name).save(base_folder)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) < len(before)
    _, (view,) = tensors.open_checkpoints([str(run / "lora" / LORA_FILE)], base_folder)
    # What the last block makes of the words, no picture shows: its LoRA changes nothing.
    assert changed <= set(view)
    for key in view:
        torch.testing.assert_close(view[key], after[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "family, flags",
    [
        pytest.param("sd1", LORA, marks=pytest.mark.run),
        pytest.param("sit", WHOLE, marks=pytest.mark.run),
        pytest.param("tiny", LORA, marks=pytest.mark.slow),
        pytest.param("sd2", WHOLE, marks=pytest.mark.slow),
        pytest.param("sd3", LORA, marks=pytest.mark.slow),
        pytest.param("sd3-without-t5", WHOLE, marks=pytest.mark.slow),
        pytest.param("edm2", LORA, marks=pytest.mark.slow),
        pytest.param("sdxl", LORA, marks=pytest.mark.slow),
        pytest.param("flux", LORA, marks=pytest.mark.slow),
        pytest.param("flux-schnell", WHOLE, marks=pytest.mark.slow),
        pytest.param("qwen-image", LORA, marks=pytest.mark.slow),
        pytest.param("dit", LORA, marks=pytest.mark.slow),
    ],
)
def test_a_base_trains_and_what_is_saved_draws_the_same(trained, names, family, flags):
    run = trained(family, flags)
    check_rows(read_metrics(run), family)
    base = bases.load(names[family])
    tuned = bases.load(run / "model")
    before = base.network.state_dict()
    after = tuned.network.state_dict()
    assert before.keys() == after.keys()
    if flags == LORA:
        check_lora(run, names[family], before, after)
    texts = prompts_of(family)
    assert not torch.equal(draw(base, texts, 3), draw(tuned, texts, 3))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd3", "sdxl", "flux", "qwen-image"])
def test_plain_diffusers_loads_the_lora(trained, names, family):
    pytest.importorskip("peft")
    run = trained(family, LORA)
    tuned = bases.load(run / "model")
    pipeline = stock_pipeline(names[family])
    pipeline.load_lora_weights(run / "lora")
    texts = prompts_of(family)[:2]
    expected = stock_draw(pipeline, tuned, texts, 3)
    torch.testing.assert_close(draw(tuned, texts, 3), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_lora_stopped_and_started_again_is_the_same(trained, names, tmp_path, monkeypatch):
    uninterrupted = trained("sd1", LORA)
    prompts = uninterrupted.parent / "prompts.jsonl"
    argv = command_line(names["sd1"], tmp_path / "run", prompts, *LORA)
    save = files.save_checkpoint

    def killed(out, step, *rest):
        save(out, step, *rest)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(files, "save_checkpoint", killed)
        launch(argv)
    launch(argv)
    assert read_metrics(tmp_path / "run") == read_metrics(uninterrupted)
    ours = load_file(tmp_path / "run" / "lora" / LORA_FILE)
    theirs = load_file(uninterrupted / "lora" / LORA_FILE)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, precision, tolerance",
    [("sd1", "float32", 1e-5), ("sd3", "bfloat16", 1e-4), ("edm2", "float32", 1e-5)],
)
def test_micro_batches_and_guidance_keep_the_ratio_in_its_tolerance(
    names, tmp_path, family, precision, tolerance
):
    """Other sizes of a batch round otherwise, and a guidance of 4 magnifies that up to 7 times."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", ["3", "1"])
    flags = "--lora 2 --guidance 4 --iterations 1 --batch 3 --train_batch 1".split()
    flags += ["--precision", precision, "--eval_images", "4", "--snapshot_every", "0"]
    launch(command_line(names[family], tmp_path / "run", prompts, *flags))
    assert read_metrics(tmp_path / "run")[1]["ratio_error"] <= 7 * tolerance


# --------------------------------------------------------------------------------------------------
# --compile.


def way(state, other):
    """How far two state dicts lie from each other."""
    return sum((state[name] - other[name]).norm() for name in state)


@pytest.fixture
def one_block(names, tmp_path):
    """A SiT of one block -> its name, its state dict."""
    folder = tmp_path / "base"
    shutil.copytree(file_of(names["sit"]).parent, folder)
    torch.manual_seed(0)
    state = shaken(sit.SiT(8, 2, 4, 16, 1, 2, 5)).state_dict()
    save_file(state, folder / "net.safetensors", {"num_heads": "2"})
    return f"sit:{folder / 'net.safetensors'}", state


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_is_the_plain_one(one_block, tmp_path):
    name, base = one_block
    prompts = write_prompts(tmp_path / "prompts.jsonl", ["3", "goldfish"])
    # Few sizes of a batch, for each of them is compiled.
    few_sizes = """
        --no-checkpointing --kl 0 --guidance 1 --iterations 2 --eval_every 2 --eval_images 8
        --window 0:1 --updates 3 --train all
    """.split()
    compiled = tmp_path / "compiled"
    plain = tmp_path / "plain"
    launch(command_line(name, compiled, prompts, *few_sizes, "--compile"))
    launch(command_line(name, plain, prompts, *few_sizes))
    for ours, expected in zip(read_metrics(compiled), read_metrics(plain)):
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert ours.get("ratio_error", 0) <= 1e-6
    assert read_weights(compiled).keys() == read_weights(plain).keys()
    ours = load_file(compiled / "model" / "sit.safetensors")
    expected = load_file(plain / "model" / "sit.safetensors")
    assert way(ours, expected) < 0.01 * way(expected, base)

    low = ["--compile", "--precision", "bfloat16", "--checkpointing", "--iterations", "1"]
    launch(command_line(name, tmp_path / "low", prompts, *few_sizes, *low))
    assert read_metrics(tmp_path / "low")[1]["ratio_error"] <= 1e-3


# --------------------------------------------------------------------------------------------------
# EDM2 with a guide.


@pytest.fixture
def guided(names, tmp_path):
    """The name of EDM2 under a smaller network, and that network's state dict."""
    torch.manual_seed(4)
    guide = shaken(edm2.EDM2(8, 4, 5, 8, [1], 1, [], 8), 0.3)
    edm2.save(guide, tmp_path / "guide.safetensors")
    return f"{names['edm2']},{tmp_path / 'guide.safetensors'}", guide.state_dict()


@pytest.mark.slow
def test_edm2_trains_is_merged_and_drawn_under_its_guide(guided, tmp_path, capsys):
    name, guide = guided
    run = tmp_path / "run"
    prompts = write_prompts(tmp_path / "prompts.jsonl", ["3", "goldfish"])
    argv = command_line(name, run, prompts, *WHOLE)
    with pytest.raises(SystemExit):
        launch([*argv, "--guidance", "1"])
    assert "error: --guidance 1: leaves the guide" in capsys.readouterr().err

    launch(argv)
    check_rows(read_metrics(run), "edm2")
    base = bases.load(name)
    tuned = bases.load(run / "model")
    for key, tensor in tuned.guide_network.state_dict().items():
        assert torch.equal(tensor, guide[key])
    assert not torch.equal(draw(tuned, ["3"], 3), draw(base, ["3"], 3))

    # The snapshots name their base, guide and all.
    snapshots = [str(path) for path in sorted((run / "snapshots").glob("*"))]
    merged = tmp_path / "merged"
    merge.main(["average", *snapshots, "--coefficients", "0,0,1", "--out", str(merged)])
    assert torch.equal(draw(bases.load(merged), ["3"], 3, 2.0), draw(tuned, ["3"], 3, 2.0))


@pytest.mark.slow
def test_pictures_of_edm2_are_drawn_under_its_guide(guided, tmp_path):
    name, _ = guided
    prompts = write_prompts(tmp_path / "prompts.jsonl", ["3", "goldfish"])
    out = tmp_path / "pictures.npz"
    flags = "--n 2 --steps 3 --guidance 2 --device cpu".split()
    evaluation.main(["images", name, *flags, "--prompts", str(prompts), "--out", str(out)])
    model = bases.load(name)
    pictures = picture_sets.generate(model, prompting.read_prompts(prompts), 1, 3, 2.0, 0, 2)
    expected = files.to_uint8(pictures).permute(0, 2, 3, 1).numpy()
    with np.load(out) as file:
        assert np.array_equal(file["arr_0"], expected)


# --------------------------------------------------------------------------------------------------
# What the command says of a base before anything is loaded.

WITHOUT_NETWORKS = ["--reward", "jpeg", "--diversity_features", "latents"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny", "sd1"])
def test_a_dry_run_prints_a_plan(names, tmp_path, capsys, family):
    argv = ["--model", names[family], "--out", str(tmp_path / "run"), "--dry_run"]
    count = 30
    if family != "tiny":
        prompts = str(write_prompts(tmp_path / "prompts.jsonl", ["3"]))
        argv += [*WITHOUT_NETWORKS, "--prompts", prompts, "--eval_prompts", prompts]
        count = 1
    launch(argv)
    printed = capsys.readouterr().out
    assert f"{count} prompts; an iteration: 10 groups x 16 = 160 rollouts of 8 steps" in printed
    assert not (tmp_path / "run").exists()


def refused(argv, capsys, line):
    """train.py refuses a command line with exit code 2 and one line."""
    with pytest.raises(SystemExit) as stop:
        launch(argv)
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert re.match(line, printed), printed
    assert printed.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, flag",
    [
        ("--reward jpeg --diversity_features reward", "diversity_features"),
        ("--reward fid", "features"),
    ],
)
def test_a_base_without_networks_of_its_own_says_so(names, tmp_path, capsys, flags, flag):
    prompts = write_prompts(tmp_path / "prompts.jsonl", ["a boot"])
    argv = ["--model", names["sd1"], "--prompts", str(prompts), *flags.split(), "--dry_run"]
    line = f"error: --{flag} reward: {names['sd1']} holds no such network; give one of"
    refused(argv, capsys, line)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, flags, line",
    [
        ("sd1", "--steps 1000", "--steps 1000: 1000 steps do not fit a schedule of 1000"),
        ("sd1", "--eval_steps 1001", "--eval_steps 1001:"),
        ("sd1", "--kernel flow-grpo", "--kernel flow-grpo: is defined for flows"),
        ("edm2", "--kernel flow-grpo", "--kernel flow-grpo:"),
    ],
)
def test_what_the_path_of_a_base_cannot_do_is_refused(names, tmp_path, capsys, family, flags, line):
    prompts = write_prompts(tmp_path / "prompts.jsonl", ["3"])
    argv = ["--model", names[family], "--prompts", str(prompts), *WITHOUT_NETWORKS]
    launch([*argv, "--dry_run"])
    capsys.readouterr()
    refused([*argv, *flags.split(), "--out", str(tmp_path / "run")], capsys, f"error: {line}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["images", "score"])
def test_more_steps_than_the_schedule_has_are_refused(names, tmp_path, capsys, command):
    prompts = write_prompts(tmp_path / "prompts.jsonl", ["3"])
    out = tmp_path / ("out" if command == "images" else "out.json")
    argv = [command, names["sd1"], "--steps", "1001", "--n", "10"]
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*argv, "--prompts", str(prompts), "--out", str(out)])
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert printed.startswith("error: --steps 1001: ")
    assert printed.count("\n") == 1
    assert not out.exists()
