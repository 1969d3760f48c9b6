"""Stable Diffusion against diffusers' own pipelines: samples, prompts, times, saved folders."""

import json
import shutil

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_bases import (
    TEXTS,
    build_sd,
    draw,
    edit_json,
    noise,
    stock_draw,
    stock_pipeline,
)

import bases
from bases.files import network_files
from sampling import FLOW

# --------------------------------------------------------------------------------------------------
# Samples.


@pytest.mark.parametrize(
    "family, guidance, steps",
    [
        ("sd1", 1.0, 3),
        ("sd1", 4.0, 10),
        ("sd2", 4.0, 3),
        ("sd3", 1.0, 10),
        ("sd3", 4.0, 3),
        ("sd3-without-t5", 4.0, 10),
        ("sdxl", 1.0, 10),
        ("sdxl", 5.0, 3),
        ("flux", 1.0, 3),
        ("flux", 3.5, 10),
        ("flux-schnell", 1.0, 4),
        ("flux-schnell", 3.0, 3),
        ("qwen-image", 1.0, 10),
        ("qwen-image", 4.0, 3),
    ],
)
def test_samples_are_those_of_the_stock_pipeline(names, loaded, family, guidance, steps):
    model = loaded[family]
    pipeline = stock_pipeline(names[family])
    latents = draw(model, TEXTS, steps, guidance)
    assert latents.std() > 0.1
    expected = stock_draw(pipeline, model, TEXTS, steps, guidance)
    torch.testing.assert_close(latents, expected, rtol=2e-5, atol=2e-5)
    pictures = stock_draw(pipeline, model, TEXTS, steps, guidance, kind="pt")
    torch.testing.assert_close(model.decode(latents), pictures, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"steps_offset": 0}, {"set_alpha_to_one": True}, {"beta_schedule": "linear"}],
    ids=str,
)
def test_the_path_follows_the_scheduler_file(names, change, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(names["sd1"], folder)
    edit_json(folder / "scheduler" / "scheduler_config.json", **change)
    model = bases.load(folder)
    expected = stock_draw(stock_pipeline(folder), model, TEXTS, 4)
    torch.testing.assert_close(draw(model, TEXTS, 4), expected, rtol=2e-5, atol=2e-5)


def test_a_folder_with_another_scheduler_samples_as_ddim(tmp_path, capfd):
    folder = tmp_path / "model"
    torch.manual_seed(1)
    build_sd(folder, scheduler_class=diffusers.PNDMScheduler)
    # As Stable Diffusion 1.5 is published.
    edit_json(folder / "scheduler" / "scheduler_config.json", clip_sample=False)
    capfd.readouterr()
    model = bases.load(folder)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
    pipeline = stock_pipeline(folder)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    expected = stock_draw(pipeline, model, TEXTS, 5, 2.0)
    torch.testing.assert_close(draw(model, TEXTS, 5, 2.0), expected, rtol=2e-5, atol=2e-5)


def test_times_of_stable_diffusion_3_are_the_schedulers_own(loaded):
    for steps in (1, 2, 28):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(steps)
        times = loaded["sd3"].path.times(steps)
        assert times.dtype == torch.float64
        assert torch.equal(times.float(), scheduler.sigmas)
        assert times[0] == 1 and times[-1] == 0


# --------------------------------------------------------------------------------------------------
# Prompts.


def stock_prompt(pipeline, texts):
    """The embeddings that the stock pipeline makes of texts."""
    if isinstance(pipeline, diffusers.StableDiffusionPipeline):
        return pipeline.encode_prompt(texts, "cpu", 1, False)[:1]
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False
        )
    return tokens, pooled


@pytest.mark.parametrize("family", ["sd1", "sd3", "sd3-without-t5"])
def test_prompts_are_those_of_the_stock_pipeline(names, loaded, family):
    model = loaded[family]
    texts = [*TEXTS, "a " * 40, ""]
    expected = stock_prompt(stock_pipeline(names[family]), texts)
    prompt = model.encode(texts)
    assert len(prompt) == len(expected)
    for ours, theirs in zip(prompt, expected):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad
    many = model.encode(texts * 40)  # more than are encoded at once
    for rows, ours in zip(many, prompt):
        repeated = ours.repeat(40, *[1] * (ours.dim() - 1))
        assert torch.allclose(rows, repeated, atol=1e-6)


def test_zeros_stand_in_for_a_missing_t5(loaded):
    with_t5, _ = loaded["sd3"].encode(TEXTS)
    without, _ = loaded["sd3-without-t5"].encode(TEXTS)
    assert with_t5.shape == without.shape == (2, 10 + 256, 40)
    assert with_t5[:, 10:].abs().min(2).values.max() > 0
    assert (without[:, 10:] == 0).all()


def test_the_miniature_keeps_its_times_and_prompts(loaded):
    model = loaded["tiny"]
    assert torch.equal(model.path.times(8), FLOW.times(8))
    assert model.vae is None and model.initial_std == 1
    tokenizer, encoder = model.encoders[0]
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    out = encoder(tokens.input_ids)
    embeddings, pooled = model.encode(TEXTS)
    assert torch.equal(embeddings, out.last_hidden_state)
    assert torch.equal(pooled, out.text_embeds)
    x = noise(model.shape)
    assert torch.equal(model.decode(x), ((x + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1))


# --------------------------------------------------------------------------------------------------
# Folders.


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_the_stock_pipeline_reads_what_is_saved(loaded, family, tmp_path):
    model = loaded[family]
    model.save(tmp_path / "model")
    expected = stock_draw(stock_pipeline(tmp_path / "model"), model, TEXTS, 3, 2.0)
    torch.testing.assert_close(draw(model, TEXTS, 3, 2.0), expected, rtol=2e-5, atol=2e-5)


def test_a_part_that_was_never_fetched_is_not_named_when_saved(names, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(names["sd1"], folder)
    edit_json(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
    )
    saved = tmp_path / "saved"
    bases.load(folder).save(saved)
    index = json.loads((saved / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    diffusers.StableDiffusionPipeline.from_pretrained(saved, requires_safety_checker=False)


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_dead_links_pickles_and_whole_models_in_one_file_are_not_copied(names, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(names["sd1"], folder)
    published = files_in(folder)
    for name in ("v1-5-pruned.safetensors", "v1-5-pruned.bin", "leftover.ckpt"):
        (folder / name).write_bytes(b"gigabytes")
    for name in ("lost.json", "vae/lost.json"):
        (folder / name).symlink_to(tmp_path / "nowhere")
    bases.load(folder).save(tmp_path / "saved")
    assert files_in(tmp_path / "saved") == published
    bases.load(tmp_path / "saved")


def rename_weights(folder, new_name, more=None):
    """Gives the weights in a part's folder other names; more: {name: tensor} that are added."""
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    renamed = {new_name(name): tensor for name, tensor in state.items()}
    save_file(renamed | (more or {}), file, {"format": "pt"})


def clip_name(name):
    """transformers' name -> the published one."""
    return name if name.startswith("text_") else "text_model." + name


def vae_name(name):
    """diffusers' name -> the published one of its attention."""
    if "attentions" in name:
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
            name = name.replace(f".{new}.", f".{old}.")
        name = name.replace(".to_out.0.", ".proj_attn.")
    return name


def same_name(name):
    return name


def test_the_names_of_published_weights_are_known(names, loaded, tmp_path):
    """Older writers named the CLIP's and the VAE's weights otherwise, and wrote some twice."""
    for family in ("sd1", "sd3"):
        shutil.copytree(names[family], tmp_path / family)
    positions = {"text_model.embeddings.position_ids": torch.arange(10)[None]}
    rename_weights(tmp_path / "sd1" / "text_encoder", clip_name, positions)
    rename_weights(tmp_path / "sd1" / "vae", vae_name)
    rename_weights(tmp_path / "sd3" / "text_encoder_2", clip_name)
    t5 = tmp_path / "sd3" / "text_encoder_3"
    tokens = load_file(t5 / "model.safetensors")["shared.weight"].clone()
    rename_weights(t5, same_name, {"encoder.embed_tokens.weight": tokens})

    for family in ("sd1", "sd3"):
        model = bases.load(tmp_path / family)
        for ours, original in zip(model.encode(TEXTS), loaded[family].encode(TEXTS)):
            assert torch.equal(ours, original)
        x = noise(model.shape)
        assert torch.equal(model.decode(x), loaded[family].decode(x))


@pytest.mark.parametrize("family, part", [("sd1", "unet"), ("sd3", "transformer")])
def test_shards_are_read_through_their_index(names, loaded, tmp_path, family, part):
    folder = tmp_path / family
    shutil.copytree(names[family], folder)
    shutil.rmtree(folder / part)
    network = loaded[family].network
    network.save_pretrained(folder / part, max_shard_size="20KB")
    shards = network_files(folder)
    assert len(shards) > 2
    stored = set()
    for shard in shards:
        stored |= set(load_file(shard))
    assert stored == set(network.state_dict())
    assert torch.equal(draw(bases.load(folder), TEXTS, 2), draw(loaded[family], TEXTS, 2))

    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{shards[1].name} in {part} is damaged"):
        bases.check(folder)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"{part}/{shards[1].name} is missing"):
        bases.check(folder)


# --------------------------------------------------------------------------------------------------
# Files whose headers are in order, but that their libraries cannot use.


def without_last(state):
    state.popitem()


def without_first(state):
    del state[min(state)]


def of_another_shape(state):
    state[min(state)] = torch.zeros(3, 5)


@pytest.mark.parametrize(
    "family, part, spoil",
    [
        ("sd1", "text_encoder", without_last),
        ("sd3", "vae", without_first),
        ("sd3", "transformer", of_another_shape),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(names, tmp_path, family, part, spoil):
    """Their libraries would fill the gaps with random numbers and a warning."""
    folder = tmp_path / "model"
    shutil.copytree(names[family], folder)
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    spoil(state)
    save_file(state, file, {"format": "pt"})
    assert bases.check(folder) == folder
    with pytest.raises(ValueError, match=f"{part} is not the") as error:
        bases.load(folder)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_its_library_cannot_read_is_refused(names, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(names["sd1"], folder)
    (folder / "tokenizer" / "tokenizer.json").write_text('{"model": 3}')
    bases.check(folder)
    with pytest.raises(ValueError, match=f"--model {folder}: tokenizer is not the ") as error:
        bases.load(folder)
    assert "\n" not in str(error.value)


def test_encoders_are_bfloat16_where_they_are_large(names):
    for family, expected in (("tiny", torch.float32), ("sd1", torch.bfloat16)):
        model = bases.load(names[family], precision="bfloat16")
        _, encoder = model.encoders[0]
        assert isinstance(encoder, transformers.PreTrainedModel)
        assert {parameter.dtype for parameter in encoder.parameters()} == {expected}
