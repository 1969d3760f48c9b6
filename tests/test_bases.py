"""Every base trains through the same train.py: three updates with every mechanism on, on networks of a few thousand random weights."""
import json

import pytest
import torch
from conftest import launch, read_metrics
from safetensors.torch import load_file
from test_models import FAMILIES, draw, names, prompts_of  # noqa: F401: names is the fixture that builds the bases

import models
import runtime
import weights

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
    base, tuned, texts = models.load(names[family]), models.load(run / "model"), prompts_of(family)
    before, after = base.network.state_dict(), tuned.network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    if flags == LORA:                                                    # and the merge reads the LoRA as the same model
        assert all(name.endswith(".weight") for name in changed) and len(changed) < len(before)
        if family in ("sit", "edm2"):
            base.save(run / "base")
        folder = str(run / "base") if family in ("sit", "edm2") else names[family]
        _, (view,) = weights.open_checkpoints([str(run / "lora" / "pytorch_lora_weights.safetensors")], folder)
        assert changed <= {*view}                                        # what the last block makes of the words, no picture sees
        for name in view:
            torch.testing.assert_close(view[name], after[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(draw(base, texts, 3), draw(tuned, texts, 3))


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_plain_diffusers_loads_the_lora(trained, names, family):  # noqa: F811
    pytest.importorskip("peft")
    from test_models import noise, stock_pipeline
    run = trained(family, *LORA)
    pipe, tuned = stock_pipeline(names[family]), models.load(run / "model")
    pipe.load_lora_weights(run / "lora")
    stock = pipe(prompts_of(family)[:2], latents=noise(tuned.shape, 2), num_inference_steps=3, guidance_scale=1.0, output_type="latent").images
    torch.testing.assert_close(draw(tuned, prompts_of(family)[:2], 3), stock, rtol=1e-3, atol=1e-4)


def test_training_stopped_and_started_again_is_the_same_with_a_lora(trained, names, tmp_path, monkeypatch):  # noqa: F811
    whole = trained("sd1", *LORA)
    argv = [*EVERYTHING, "--model", names["sd1"], "--out", str(tmp_path / "run"), "--prompts", str(whole.parent / "prompts.jsonl"), *LORA]
    save = runtime.save_checkpoint

    def killed(out, step, *rest):
        save(out, step, *rest)
        if step == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(runtime, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        launch(argv)
    monkeypatch.setattr(runtime, "save_checkpoint", save)
    launch(argv)
    assert read_metrics(tmp_path / "run") == read_metrics(whole)
    a, b = (load_file(run / "lora" / "pytorch_lora_weights.safetensors") for run in (tmp_path / "run", whole))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dry_run_prints_a_plan(names, tmp_path, capsys, family):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("3\n")
    launch(["--model", names[family], "--reward", "jpeg", "--diversity_features", "latents", "--prompts", str(tmp_path / "prompts.txt"), "--dry_run",
            "--out", str(tmp_path / "run"), "--eval_prompts", str(tmp_path / "prompts.txt")] if family != "tiny" else
           ["--model", names[family], "--out", str(tmp_path / "run"), "--dry_run"])
    assert "optimizer steps" in capsys.readouterr().out and not (tmp_path / "run").exists()
