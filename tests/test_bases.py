"""Every base trains through the same train.py: three updates with every mechanism on, on networks of a few thousand random weights."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import launch, read_metrics, read_weights
from safetensors.torch import load_file, save_file
from test_models import FAMILIES, draw, guided, names, prompts_of, shaken  # noqa: F401: names and guided are the fixtures that build the bases

import eval as evaluation
from support import flags
from commands import picture_sets
import merge
import bases
from bases import sit
import prompting
from support import files
from bases import tensors

EVERYTHING = ("--device cpu --iterations 3 --prompts_per_step 2 --group_size 4 --select window --keep 3 --steps 4 --window 0:2 --updates 2 --nearest 2 --lr 0.01 "
              "--warmup 0 --eval_images 20 --eval_steps 2 --eval_every 3 --save_every 1 --snapshot_every 3 --reward jpeg:1 --diversity_features latents "
              "--prompt_noise 0.5 --guidance 2 --kl 0.1 --gardo --checkpointing --decode_batch 2").split()
LORA, WHOLE = ("--lora", "2"), ("--train", "all")


@pytest.fixture(scope="module")
def trained(names, tmp_path_factory):  # noqa: F811
    """(family, extra flags) -> the folder of a run; each is made once."""
    known = {}

    def run(family, *flags):
        if (family, flags) not in known:
            out = tmp_path_factory.mktemp("run")
            (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts_of(family)[:2]))
            prompts = [] if family == "tiny" else ["--prompts", str(out / "prompts.jsonl")]
            launch([*EVERYTHING, "--model", names[family], "--out", str(out / "run"), *prompts, *flags])
            known[family, flags] = out / "run"
        return known[family, flags]
    return run


@pytest.mark.parametrize("flags", [LORA, WHOLE], ids=["lora", "whole"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_trains_and_what_is_saved_draws_the_same(trained, names, family, flags):  # noqa: F811
    run = trained(family, *flags)
    rows = read_metrics(run)
    assert len(rows) == 4 and all(row["ratio_error"] <= 1e-6 and row["grad_norm"] > 0 for row in rows[1:]) and rows[3]["kl"] > 0
    judged = {"accuracy"} if family == "tiny" else {"reward_jpeg"}
    assert all(f"eval/{name}" in row for name in judged | {"vendi", "distance"} for row in (rows[0], rows[3]))
    base, tuned, texts = bases.load(names[family]), bases.load(run / "model"), prompts_of(family)
    before, after = base.network.state_dict(), tuned.network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    if flags == LORA:                                                    # and the merge reads the LoRA as the same model
        assert all(name.endswith(".weight") for name in changed) and len(changed) < len(before)
        if family in ("sit", "edm2"):
            base.save(run / "base")
        folder = str(run / "base") if family in ("sit", "edm2") else names[family]
        _, (view,) = tensors.open_checkpoints([str(run / "lora" / "pytorch_lora_weights.safetensors")], folder)
        assert changed <= {*view}                                        # what the last block makes of the words, no picture sees
        for name in view:
            torch.testing.assert_close(view[name], after[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(draw(base, texts, 3), draw(tuned, texts, 3))


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_plain_diffusers_loads_the_lora(trained, names, family):  # noqa: F811
    pytest.importorskip("peft")
    from test_models import noise, stock_pipeline
    run = trained(family, *LORA)
    pipe, tuned = stock_pipeline(names[family]), bases.load(run / "model")
    pipe.load_lora_weights(run / "lora")
    stock = pipe(prompts_of(family)[:2], latents=noise(tuned.shape, 2), num_inference_steps=3, guidance_scale=1.0, output_type="latent").images
    torch.testing.assert_close(draw(tuned, prompts_of(family)[:2], 3), stock, rtol=1e-3, atol=1e-4)


def test_training_stopped_and_started_again_is_the_same_with_a_lora(trained, names, tmp_path, monkeypatch):  # noqa: F811
    whole = trained("sd1", *LORA)
    argv = [*EVERYTHING, "--model", names["sd1"], "--out", str(tmp_path / "run"), "--prompts", str(whole.parent / "prompts.jsonl"), *LORA]
    save = files.save_checkpoint

    def killed(out, step, *rest):
        save(out, step, *rest)
        if step == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(files, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        launch(argv)
    monkeypatch.setattr(files, "save_checkpoint", save)
    launch(argv)
    assert read_metrics(tmp_path / "run") == read_metrics(whole)
    a, b = (load_file(run / "lora" / "pytorch_lora_weights.safetensors") for run in (tmp_path / "run", whole))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["sd1", "sd3", "edm2"])
def test_micro_batches_and_guidance_leave_the_first_ratio_within_its_tolerance(names, tmp_path, family, precision):  # noqa: F811
    """Other sizes of a batch round otherwise, and guidance magnifies it: on these, up to 4e-6 in float32. A larger error stops a run."""
    (tmp_path / "prompts.txt").write_text("3\n1\n")
    launch([*EVERYTHING, "--model", names[family], "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "run"), *LORA, "--guidance", "4", "--iterations", "1",
            "--batch", "3", "--train_batch", "1", "--precision", precision, "--eval_images", "4", "--snapshot_every", "0"])
    assert read_metrics(tmp_path / "run")[1]["ratio_error"] <= 7 * (1e-5 if precision == "float32" else 1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_a_compiled_run_is_the_plain_one(names, tmp_path):  # noqa: F811
    shutil.copytree(Path(names["sit"][4:]).parent, tmp_path / "base")
    torch.manual_seed(0)
    network = shaken(sit.SiT(8, 2, 4, 16, 1, 2, 5))
    save_file(network.state_dict(), tmp_path / "base" / "net.safetensors", {"num_heads": "2"})
    (tmp_path / "prompts.txt").write_text("3\ngoldfish\n")
    argv = [*EVERYTHING, "--model", f"sit:{tmp_path / 'base' / 'net.safetensors'}", "--prompts", str(tmp_path / "prompts.txt"), "--no-checkpointing",
            "--kl", "0", "--guidance", "1", "--iterations", "2", "--eval_every", "2", "--eval_images", "8", "--window", "0:1", "--updates", "3", *WHOLE]     # few sizes, as each is compiled
    for flag in ("--compile", "--no-compile"):
        launch([*argv, "--out", str(tmp_path / flag), flag])
    compiled, plain = (tmp_path / flag for flag in ("--compile", "--no-compile"))
    for mine, theirs in zip(read_metrics(compiled), read_metrics(plain)):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5) and mine.get("ratio_error", 0) <= 1e-6
    a, b = (load_file(folder / "model" / "sit.safetensors") for folder in (compiled, plain))
    way = sum((b[name] - network.state_dict()[name]).norm() for name in b)
    assert a.keys() == b.keys() and sum((a[name] - b[name]).norm() for name in b) < 0.01 * way
    launch([*argv, "--out", str(tmp_path / "low"), "--compile", "--precision", "bfloat16", "--checkpointing", "--iterations", "1"])
    assert read_metrics(tmp_path / "low")[1]["ratio_error"] <= 1e-3
    assert {*read_weights(compiled)} == {*read_weights(plain)}


def test_edm2_trains_is_merged_and_drawn_under_its_guide(guided, tmp_path, capsys):  # noqa: F811
    name, prompts = guided["conditional"], tmp_path / "prompts.txt"
    prompts.write_text("3\ngoldfish\n")
    argv = [*EVERYTHING, "--model", name, "--prompts", str(prompts), "--out", str(tmp_path / "run"), *WHOLE]
    with pytest.raises(SystemExit):
        launch([*argv, "--guidance", "1"])
    assert "error: --guidance 1: leaves the guide" in capsys.readouterr().err
    launch(argv)
    assert all(row["ratio_error"] <= 1e-6 and row["grad_norm"] > 0 for row in read_metrics(tmp_path / "run")[1:])
    base, tuned, guide = bases.load(name), bases.load(tmp_path / "run" / "model"), load_file(tmp_path / "conditional.safetensors")
    assert all(torch.equal(tensor, guide[name]) for name, tensor in tuned.guide_network.state_dict().items())
    assert not torch.equal(draw(tuned, ["3"], 3), draw(base, ["3"], 3))
    merge.main(["average", *map(str, sorted((tmp_path / "run" / "snapshots").glob("*"))), "--coefficients", "0,0,1", "--out", str(tmp_path / "merged")])
    merged = bases.load(tmp_path / "merged")                            # the snapshots name their base, guide and all
    assert torch.equal(draw(merged, ["3"], 3, 2.0), draw(tuned, ["3"], 3, 2.0))
    evaluation.main(["images", name, "--n", "2", "--prompts", str(prompts), "--steps", "3", "--guidance", "2", "--device", "cpu",
                     "--out", str(tmp_path / "pictures.npz")])
    drawn = picture_sets.generate(base, prompting.read_prompts(prompts), 1, 3, 2.0, 0, 2)
    with np.load(tmp_path / "pictures.npz") as file:
        assert np.array_equal(file["arr_0"], files.to_uint8(drawn).permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dry_run_prints_a_plan(names, tmp_path, capsys, family):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("3\n")
    launch(["--model", names[family], "--reward", "jpeg", "--diversity_features", "latents", "--prompts", str(tmp_path / "prompts.txt"), "--dry_run",
            "--out", str(tmp_path / "run"), "--eval_prompts", str(tmp_path / "prompts.txt")] if family != "tiny" else
           ["--model", names[family], "--out", str(tmp_path / "run"), "--dry_run"])
    said = capsys.readouterr().out
    count = 30 if family == "tiny" else 1
    assert f"{count} prompts; an iteration: 10 groups x 16 = 160 rollouts of 8 steps, 16 kept of each group x 4 stochastic steps = 640 pairs, 2 optimizer steps " \
        "of 320 pairs; 60 iterations = 9600 rollouts" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--reward", "jpeg"], ["--reward", "fid", "--diversity_features", "latents"]])
def test_a_base_without_networks_of_its_own_says_so(names, tmp_path, capsys, flags):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("a boot\n")
    with pytest.raises(SystemExit) as stop:
        launch(["--model", names["sd1"], "--prompts", str(tmp_path / "prompts.txt"), *flags, "--dry_run"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and re.match(rf"error: --(diversity_)?features reward: {names['sd1']} holds no such network; give another", said)


@pytest.mark.parametrize("family, flags, naming", [
    ("sd1", "--steps 1000", "--steps 1000: 1000 steps do not fit a schedule of 1000"), ("sd1", "--eval_steps 1001", "--eval_steps 1001:"),
    ("sd1", "--kernel flow-grpo", "--kernel flow-grpo: is defined for flows"), ("edm2", "--kernel flow-grpo", "--kernel flow-grpo:")])
def test_what_the_schedule_or_the_path_of_a_base_cannot_do_is_refused(names, tmp_path, capsys, family, flags, naming):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("3\n")
    launch([*(argv := ["--model", names[family], "--prompts", str(tmp_path / "prompts.txt"), "--reward", "jpeg", "--diversity_features", "latents"]), "--dry_run"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        launch([*argv, *flags.split(), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"error: {naming}") and said.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["images", "score"])
def test_pictures_of_more_steps_than_the_schedule_has_are_refused(names, tmp_path, capsys, command):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("3\n")
    with pytest.raises(SystemExit) as stop:
        evaluation.main([command, names["sd1"], "--steps", "1001", "--n", "10", "--prompts", str(tmp_path / "prompts.txt"), "--out",
                         str(tmp_path / ("out" if command == "images" else "out.json"))])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: --steps 1001: ") and said.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["prompts.txt"]
