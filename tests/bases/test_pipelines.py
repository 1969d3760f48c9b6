"""What is special in Stable Diffusion XL, FLUX.1, Qwen-Image and DiT.

Samples against the stock pipelines are in test_stable_diffusion.py; DiT's are here, because its
pipeline draws its own noise.
"""

import copy
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.dit import pipeline_dit
from small_bases import TEXTS, draw, edit_json, noise, prompts_of, stock_draw, stock_pipeline

import bases
from bases import packed
from bases.dit import label_embedders
from prompting import noised_prompt
from sampling import predict

SCHEDULER = ("scheduler", "scheduler_config.json")


def copied(names, family, tmp_path):
    """A copy of a base's folder that a test may change."""
    folder = tmp_path / "model"
    shutil.copytree(names[family], folder)
    return folder


def noised(prompt, seed=3):
    """A prompt with DRIFT's noise, as a rollout sees it at the start of sampling."""
    drawn = [noise(entry.shape[1:], len(entry), seed).to(entry) for entry in prompt]
    condition = noised_prompt(prompt, drawn, 0.5, 0.2, 1.2)
    return condition(torch.arange(len(prompt[0])), torch.ones(len(prompt[0])))


# --------------------------------------------------------------------------------------------------
# All of them.


@pytest.mark.parametrize(
    "family", ["sd1", "sd2", "sdxl", "sd3", "flux", "flux-schnell", "qwen-image", "dit"]
)
def test_the_library_draws_the_same(loaded, family):
    model = loaded[family]
    texts = prompts_of(family)[:2]
    with torch.no_grad():
        theirs = model.stock_sample(texts, noise(model.shape, 2), 4)
    torch.testing.assert_close(draw(model, texts, 4), theirs, rtol=2e-5, atol=2e-5)


def test_bases_without_a_library_have_nothing_to_compare(loaded):
    for family in ("tiny", "sit", "edm2"):
        assert loaded[family].stock_sample(["3"], noise(loaded[family].shape, 1), 4) is None


@pytest.mark.parametrize("family", ["sdxl", "flux", "flux-schnell", "sd3"])
def test_pooled_embeddings_take_noise_too(loaded, family):
    model = loaded[family]
    prompt = model.encode(TEXTS)
    assert [entry.dim() for entry in prompt] == [3, 2]
    changed = noised(prompt)
    x, t = noise(model.shape, 2), model.path.times(4)[[1, 2]].float()
    with torch.no_grad():
        clean, _ = model(x, t, prompt)
        for number in range(2):  # each entry alone changes what the network says
            mixed = list(prompt)
            mixed[number] = changed[number]
            assert not torch.equal(model(x, t, tuple(mixed))[0], clean)


@pytest.mark.parametrize(
    "family, change, word",
    [
        ("sdxl", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("sdxl", {"timestep_spacing": "trailing"}, "timestep_spacing"),
        ("sdxl", {"prediction_type": "sample"}, "prediction_type"),
        ("flux", {"stochastic_sampling": True}, "stochastic_sampling"),
        ("qwen-image", {"invert_sigmas": True}, "invert_sigmas"),
        ("dit", {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ("dit", {"prediction_type": "v_prediction"}, "prediction_type"),
        ("dit", {"clip_sample": True}, "clip_sample"),
    ],
)
def test_another_scheduler_is_refused(names, tmp_path, family, change, word):
    folder = copied(names, family, tmp_path)
    edit_json(folder.joinpath(*SCHEDULER), **change)
    with pytest.raises(ValueError, match=word):
        bases.check(folder)


# --------------------------------------------------------------------------------------------------
# Stable Diffusion XL.


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_of_xl_is_zeros_or_is_encoded(names, tmp_path, zeros):
    folder = copied(names, "sdxl", tmp_path)
    edit_json(folder / "model_index.json", force_zeros_for_empty_prompt=zeros)
    model = bases.load(folder)
    tokens, pooled = model.encode(["", TEXTS[0]])
    assert bool(tokens[0].any()) == bool(pooled[0].any()) == (not zeros)
    assert tokens[1].any() and pooled[1].any()
    pipeline = stock_pipeline(folder)
    expected = stock_draw(pipeline, model, TEXTS, 3, 4.0)
    torch.testing.assert_close(draw(model, TEXTS, 3, 4.0), expected, rtol=2e-5, atol=2e-5)


def test_xl_samples_by_ddim_as_well(names, tmp_path):
    folder = copied(names, "sdxl", tmp_path)
    file = folder.joinpath(*SCHEDULER)
    edit_json(file, _class_name="DDIMScheduler", clip_sample=False, set_alpha_to_one=False)
    edit_json(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    model = bases.load(folder)
    expected = stock_draw(stock_pipeline(folder), model, TEXTS, 4)
    torch.testing.assert_close(draw(model, TEXTS, 4), expected, rtol=2e-5, atol=2e-5)


# --------------------------------------------------------------------------------------------------
# Packed latents.


def test_packing_is_that_of_the_stock_pipelines():
    latents = noise((4, 6, 8), 2)
    tokens = packed.pack(latents)
    expected = diffusers.FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(tokens, expected)
    assert torch.equal(packed.unpack(tokens, (4, 6, 8)), latents)


@pytest.mark.parametrize("family", ["flux", "flux-schnell", "qwen-image"])
def test_times_follow_the_size(names, loaded, family):
    """Against the published line in the number of tokens, from 256 to 4,096 of them."""
    model = loaded[family]
    scheduler = stock_pipeline(names[family]).scheduler
    high = {"flux": 1.15, "qwen-image": 0.9, "flux-schnell": 1.15}[family]
    mu = 0.5 + (high - 0.5) * (16 - 256) / (4096 - 256)  # 16 tokens
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 7, 7), mu=mu)
    times = model.path.times(7)
    assert torch.equal(times.float(), scheduler.sigmas)
    assert times[0] == 1 and times[-1] == 0


def test_one_step_of_qwen_image_is_refused(loaded):
    with pytest.raises(ValueError, match="take 2 or more"):
        loaded["qwen-image"].path.times(1)


@pytest.mark.parametrize("family, side", [("flux", 8), ("qwen-image", 8)])
def test_the_size_is_that_of_the_vae(names, loaded, tmp_path, family, side):
    assert loaded[family].shape == (4, side, side)
    folder = copied(names, family, tmp_path)
    edit_json(folder / "vae" / "config.json", sample_size=24)
    model = bases.load(folder)
    assert model.shape == (4, 12, 12)
    assert model.decode(noise(model.shape, 1)).shape == (1, 3, 24, 24)


def test_guidance_of_dev_is_an_input_also_of_a_frozen_copy(loaded):
    model = loaded["flux"]
    assert loaded["flux-schnell"].guided is None
    twin = model.frozen()
    prompt = model.encode(TEXTS)
    x, t = noise(model.shape, 2), torch.tensor([0.9, 0.5])
    with torch.no_grad():
        weak, _ = predict(model, x, t, prompt, 1.0, None)
        strong, _ = predict(model, x, t, prompt, 4.0, None)
        assert not torch.equal(weak, strong)
        before, _ = predict(twin, x, t, prompt, 4.0, None)
        twin.network.proj_out.weight.add_(1)
        after, _ = predict(twin, x, t, prompt, 4.0, None)
        assert torch.equal(before, strong) and not torch.equal(after, strong)
        again, _ = predict(model, x, t, prompt, 4.0, None)
    assert torch.equal(again, strong)


# --------------------------------------------------------------------------------------------------
# Qwen-Image.


def test_the_mask_hides_padding_and_takes_no_noise(loaded):
    model = loaded["qwen-image"]
    tokens, mask = model.encode(["a bag", "a much longer text"])
    assert tokens.shape[:2] == mask.shape == (2, 256)
    assert not mask.is_floating_point() and mask[1].sum() - mask[0].sum() == 13
    assert not tokens[mask == 0].any()

    changed, same_mask = noised((tokens, mask))
    assert torch.equal(same_mask, mask)
    assert not torch.equal(changed[mask == 1], tokens[mask == 1])
    x, t = noise(model.shape, 2), torch.tensor([0.9, 0.5])
    with torch.no_grad():
        seen, _ = model(x, t, (changed, mask))
        assert not torch.equal(seen, model(x, t, (tokens, mask))[0])
        # What the padding holds makes no difference.
        filled = torch.where(mask[..., None] == 1, changed, 7.0)
        torch.testing.assert_close(model(x, t, (filled, mask))[0], seen, rtol=1e-5, atol=1e-5)


def test_a_long_text_is_cut_as_the_stock_pipeline_cuts_it(names, loaded):
    model = loaded["qwen-image"]
    text = "a dark coat " * 40  # a token is a byte
    tokens, mask = model.encode([text])
    pipeline = stock_pipeline(names["qwen-image"])
    expected, _ = pipeline.encode_prompt(text, max_sequence_length=256)
    assert mask.all()
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


def test_texts_are_encoded_the_same_alone_and_together(loaded):
    model = loaded["qwen-image"]
    together = model.encode(["a bag", "a much longer text"])
    alone = model.encode(["a bag"])
    for one, many in zip(alone, together):
        torch.testing.assert_close(one, many[:1], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# DiT.


@pytest.mark.parametrize("guidance, steps", [(1.0, 10), (4.0, 3)])
def test_samples_of_dit_are_those_of_the_stock_pipeline(
    names, loaded, monkeypatch, guidance, steps
):
    model = loaded["dit"]
    pipeline = stock_pipeline(names["dit"])
    monkeypatch.setattr(
        pipeline_dit, "randn_tensor", lambda shape, **options: noise(shape[1:], shape[0])
    )
    expected = pipeline(
        [3, 1], guidance_scale=guidance, num_inference_steps=steps, output_type="pt"
    ).images
    pictures = model.decode(draw(model, ["3", "goldfish"], steps, guidance))
    torch.testing.assert_close(pictures, expected, rtol=1e-5, atol=1e-5)


def test_prompt_noise_reaches_every_block_of_dit(loaded):
    model = loaded["dit"]
    (labels,) = model.encode(["3", "goldfish"])
    assert labels.shape == (2, 2, 16)  # B texts, 2 blocks
    tables = [embedder.embedding_table.weight for embedder in label_embedders(model.network)]
    for block, table in enumerate(tables):
        assert torch.equal(labels[:, block], table[[3, 1]])
    x, t = noise(model.shape, 2), torch.tensor([500.0, 20.0])
    with torch.no_grad():
        clean, _ = model(x, t, (labels,))
        for block in range(2):
            changed = labels.clone()
            changed[:, block] += 0.5
            assert not torch.equal(model(x, t, (changed,))[0], clean)


def test_dit_drops_no_label_and_can_be_copied(loaded):
    model = loaded["dit"]
    prompt = model.encode(["3", "goldfish"])
    x, t = noise(model.shape, 2), torch.tensor([500.0, 20.0])
    twin = copy.copy(model)
    twin.network = copy.deepcopy(model.network).train()
    with torch.no_grad():
        expected = model(x, t, prompt)[0]
        for _ in range(5):
            assert torch.equal(twin(x, t, prompt)[0], expected)


def test_classes_of_dit_have_the_names_of_the_index(loaded):
    model = loaded["dit"]
    for name, number in (("tench", "0"), ("Goldfish", "1"), ("drake", "3")):
        assert torch.equal(model.encode([name])[0], model.encode([number])[0])
    for text in ("crane", "1000", "-1"):  # of two classes; beyond the last
        with pytest.raises(ValueError, match="model_index.json"):
            model.encode([text])
