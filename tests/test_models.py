"""The bases against their stock pipelines, on networks of a few thousand random weights: samples, prompts, pictures, files; and bad files."""
import contextlib
import functools
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from bases import edm2
from support import guards
import bases
from bases import files as base_files
from bases import generator
from bases import sit
from prompting import noised_prompt
from sampling import FLOW, Policy, log_prob, predict, rollout, sample

TOKENIZER = ROOT / "assets" / "tiny" / "tokenizer"
TEXTS = ["a dark coat", "photo of a bag"]
CLASSES = ["tench, Tinca tinca", "goldfish", "crane", "drake", "crane, machine"]
VAE = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16), latent_channels=4,
           norm_num_groups=4, layers_per_block=1, sample_size=16)
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
FAMILIES = ["tiny", "sd1", "sd2", "sd3", "sd3-without-t5", "sit", "edm2"]
every_family = pytest.mark.parametrize("family", FAMILIES)


# ---------------------------------------------------------------------------------------------------------------------
# Random bases, in the layout of the published ones.

def shaken(module, scale=0.1):
    """No weight stays zero, so everything matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def clip(cls, width=16, layers=2):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, projection_dim=width, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=10, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return tokenizer, shaken(cls(config))


def build_vae(**more):
    return shaken(diffusers.AutoencoderKL(**VAE | more), 0.05)


def build_sd(folder, prediction="epsilon", scheduler=diffusers.DDIMScheduler):
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    tokenizer, encoder = clip(transformers.CLIPTextModel)
    betas = {k: v for k, v in BETAS.items() if scheduler is diffusers.DDIMScheduler or k != "clip_sample"}
    pipe = diffusers.StableDiffusionPipeline(build_vae(scaling_factor=0.18215), encoder, tokenizer, shaken(unet, 0.05),
                                             scheduler(**betas, prediction_type=prediction), None, None, requires_safety_checker=False)
    pipe.save_pretrained(folder)


def build_sd3(folder, t5=True, shift=3.0):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, joint_attention_dim=40,
        caption_projection_dim=16, pooled_projection_dim=24, pos_embed_max_size=8, qk_norm="rms_norm")
    (tokenizer, encoder), (_, encoder_2) = clip(transformers.CLIPTextModelWithProjection), clip(transformers.CLIPTextModelWithProjection, 8, 3)
    tokenizer_3, encoder_3 = None, None
    if t5:
        letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [(c, -3.0) for c in "▁abcdefghijklmnopqrstuvwxyz"]
        tokenizer_3 = transformers.T5TokenizerFast(vocab=letters, extra_ids=0)
        config = transformers.T5Config(vocab_size=len(letters), d_model=40, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        encoder_3 = shaken(transformers.T5EncoderModel(config))
    diffusers.StableDiffusion3Pipeline(
        shaken(transformer), diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), build_vae(scaling_factor=1.5305, shift_factor=0.0609),
        encoder, tokenizer, encoder_2, tokenizer, encoder_3, tokenizer_3).save_pretrained(folder)


def build_sit(folder):
    folder.mkdir(parents=True)
    build_vae().save_pretrained(folder / "vae")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    network = shaken(sit.SiT(8, 2, 4, 24, 2, 4, 5))
    save_file(network.state_dict(), folder / "net.safetensors", {"num_heads": "4"})
    return f"sit:{folder / 'net.safetensors'}"


def build_edm2(folder):
    folder.mkdir(parents=True)
    build_vae().save_pretrained(folder / "vae")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    edm2.save(shaken(edm2.EDM2(8, 4, 5, 16, [1, 2], 1, [4], 16), 0.3), folder / "net.safetensors")
    return f"edm2:{folder / 'net.safetensors'}"


@pytest.fixture(scope="session")
def names(tmp_path_factory, tiny):
    """family -> what --model would be."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    build_sd(folder / "sd1"), build_sd(folder / "sd2", "v_prediction")
    build_sd3(folder / "sd3"), build_sd3(folder / "sd3-without-t5", t5=False)
    found = {family: str(folder / family) for family in ("sd1", "sd2", "sd3", "sd3-without-t5")}
    return found | {"tiny": str(tiny), "sit": build_sit(folder / "sit"), "edm2": build_edm2(folder / "edm2")}


@pytest.fixture(scope="session")
def loaded(names):
    return {family: bases.load(name) for family, name in names.items()}


def prompts_of(family, count=3):
    return {"sit": ["3", "goldfish", ""], "edm2": ["0", "drake", ""]}.get(family, [*TEXTS, ""])[:count]


def noise(shape, count=3, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def draw(model, texts, steps, guidance=1.0, seed=0):
    """The deterministic sampler, from the noise that the stock pipeline would start from."""
    with torch.no_grad():
        return sample(model, model.path, model.path.times(steps), model.encode(texts), noise(model.shape, len(texts), seed) * model.initial_std,
                      guidance, model.encode([""]))


def stock_pipeline(folder):
    parts = json.loads((Path(folder) / "model_index.json").read_text())
    none = {part: None for part in ("text_encoder_3", "tokenizer_3") if part in parts and parts[part][0] is None}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **none)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def changed_json(path, **changes):
    """A JSON file with other values (None: without the key) for as long as the block lasts."""
    before = path.read_text()
    path.write_text(json.dumps({k: v for k, v in (json.loads(before) | changes).items() if v is not None}))
    yield
    path.write_text(before)


# ---------------------------------------------------------------------------------------------------------------------
# Against the stock pipelines.

@pytest.mark.parametrize("steps", [3, 10])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sd3", "sd3-without-t5"])
def test_samples_are_those_of_the_stock_pipeline(names, loaded, family, guidance, steps):
    model = loaded[family]
    pipe = stock_pipeline(names[family])
    assert type(pipe).__name__ == ("StableDiffusion3Pipeline" if "3" in family else "StableDiffusionPipeline")
    stock = lambda kind: pipe(TEXTS, latents=noise(model.shape, 2), num_inference_steps=steps, guidance_scale=guidance, output_type=kind).images
    latents = draw(model, TEXTS, steps, guidance)
    assert latents.std() > 0.1
    torch.testing.assert_close(latents, stock("latent"), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(model.decode(latents), stock("pt"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [dict(steps_offset=0), dict(set_alpha_to_one=True), dict(beta_schedule="linear")], ids=str)
def test_vp_follows_the_scheduler_file(names, change, tmp_path):
    shutil.copytree(names["sd1"], tmp_path / "m")
    with changed_json(tmp_path / "m" / "scheduler" / "scheduler_config.json", **change):
        pipe = stock_pipeline(tmp_path / "m")
        model = bases.load(tmp_path / "m")
    stock = pipe(TEXTS, latents=noise(model.shape, 2), num_inference_steps=4, guidance_scale=1.0, output_type="latent").images
    torch.testing.assert_close(draw(model, TEXTS, 4), stock, rtol=2e-5, atol=2e-5)


def test_a_folder_with_another_scheduler_samples_as_ddim(tmp_path, capfd):
    torch.manual_seed(1)
    build_sd(tmp_path / "m", scheduler=diffusers.PNDMScheduler)
    rewrite("scheduler/scheduler_config.json", clip_sample=False)(tmp_path / "m")             # as Stable Diffusion 1.5 is published
    capfd.readouterr()
    model, said = bases.load(tmp_path / "m"), capfd.readouterr()
    assert said.out == said.err == ""
    pipe = stock_pipeline(tmp_path / "m")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    stock = pipe(TEXTS, latents=noise(model.shape, 2), num_inference_steps=5, guidance_scale=2.0, output_type="latent").images
    torch.testing.assert_close(draw(model, TEXTS, 5, 2.0), stock, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sd3", "sd3-without-t5"])
def test_prompts_are_those_of_the_stock_pipeline(names, loaded, family):
    pipe, model, texts = stock_pipeline(names[family]), loaded[family], [*TEXTS, "a " * 40, ""]
    if "3" in family:
        with torch.no_grad():
            tokens, _, pooled, _ = pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
        assert tokens.shape == (4, 10 + 256, 40) and pooled.shape == (4, 24)
        expected = tokens, pooled
    else:
        expected = pipe.encode_prompt(texts, "cpu", 1, False)[:1]
    found = model.encode(texts)
    assert len(found) == len(expected) and all(torch.equal(a, b) and not a.requires_grad for a, b in zip(found, expected))
    assert family != "sd3-without-t5" or (found[0][:, 10:] == 0).all()
    many = model.encode(texts * 40)                                      # more than are encoded at once
    assert all(torch.allclose(a, b.repeat(40, *[1] * (b.dim() - 1)), atol=1e-6) for a, b in zip(many, found))


def test_the_miniature_keeps_its_times_and_prompts(loaded):
    model = loaded["tiny"]
    assert torch.equal(model.path.times(8), FLOW.times(8)) and model.vae is None and model.initial_std == 1
    tokenizer, encoder = model.encoders[0]
    out = encoder(tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids)
    assert all(map(torch.equal, model.encode(TEXTS), (out.last_hidden_state, out.text_embeds)))
    x = noise(model.shape)
    assert torch.equal(model.decode(x), ((x + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1))


def test_times_of_stable_diffusion_3_are_the_schedulers_own(loaded):
    for steps in (1, 2, 28):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(steps)
        times = loaded["sd3"].path.times(steps)
        assert times.dtype == torch.float64 and torch.equal(times.float(), scheduler.sigmas) and times[0] == 1 and times[-1] == 0


# ---------------------------------------------------------------------------------------------------------------------
# SiT and EDM2, against their formulas.

def test_sit_is_eulers_method_on_the_published_velocity(names, loaded):
    model, (network, _) = loaded["sit"], sit.load(Path(names["sit"][4:]), 4)
    x, steps = noise(model.shape), 5
    with torch.no_grad():
        for i in range(steps):                                           # the published direction: 0 noise, 1 data
            x = x + network(x, torch.full((3,), i / steps), torch.tensor([3, 1, 5])) / steps
    torch.testing.assert_close(draw(model, ["3", "Goldfish", ""], steps), x, rtol=1e-5, atol=1e-5)
    pixels = model.vae.decode(x / 0.18215).sample / 2 + 0.5
    torch.testing.assert_close(model.decode(x), pixels.clamp(0, 1), rtol=1e-5, atol=1e-5)


def test_edm2_is_eulers_method_on_the_published_denoiser(names, loaded):
    model, network = loaded["edm2"], edm2.load(Path(names["edm2"][5:]))
    times, x = model.path.times(5), noise(model.shape) * 80
    labels = torch.eye(6)[[0, 3, 5], :5]
    with torch.no_grad():
        for t, s in zip(times[:-1].float(), times[1:].float()):
            x = x + (s - t) * (x - network(x, t, labels)) / t
    torch.testing.assert_close(draw(model, ["0", "drake", ""], 5), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.decode(x), model.vae.decode(edm2.latents_to_vae(x)).sample.clamp(0, 1), rtol=1e-5, atol=1e-5)


def test_guidance_starts_from_the_null_label(loaded):
    model = loaded["edm2"]
    null, one = draw(model, ["", ""], 3), draw(model, ["1", "2"], 3)
    torch.testing.assert_close(draw(model, ["1", "2"], 3, 1e-6), null, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(null, one, atol=1e-3)


GUIDES = {"unconditional": edm2.EDM2(8, 4, 0, 8, [1, 2], 1, [], 8), "conditional": edm2.EDM2(8, 4, 5, 8, [1], 1, [], 8)}     # smaller, both of them


@pytest.fixture
def guided(names, tmp_path):
    """kind of guide -> what --model would be, with the guide in another folder."""
    torch.manual_seed(4)
    for kind, network in GUIDES.items():
        edm2.save(shaken(network, 0.3), tmp_path / f"{kind}.safetensors")
    return {kind: f"{names['edm2']},{tmp_path / kind}.safetensors" for kind in GUIDES}


@torch.no_grad()
@pytest.mark.parametrize("kind", GUIDES)
def test_a_second_network_guides_edm2_as_published(names, loaded, guided, kind, tmp_path):
    model, main, guide = bases.load(guided[kind]), edm2.load(Path(names["edm2"][5:])), edm2.load(tmp_path / f"{kind}.safetensors")
    assert not any(p.requires_grad for p in model.guide_network.parameters()) and model.folder == Path(names["edm2"][5:]).parent
    texts, labels = ["0", "drake", "2"], torch.eye(5)[[0, 3, 2]]
    for scale in (0.0, 2.5):
        times, x = model.path.times(4), noise(model.shape) * 80
        for t, s in zip(times[:-1].float(), times[1:].float()):
            weak = guide(x, t, labels if kind == "conditional" else None)
            x0_hat = weak + scale * (main(x, t, labels) - weak)
            x = x + (s - t) * (x - x0_hat) / t
        torch.testing.assert_close(draw(model, texts, 4, scale), x, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(draw(loaded["edm2"], texts, 4, scale), x, atol=0.01)       # guided by the null label
    assert torch.equal(draw(model, texts, 4), draw(loaded["edm2"], texts, 4))                 # a guidance of 1 asks no guide
    model.save(tmp_path / "saved")
    again, twice = bases.load(tmp_path / "saved"), bases.load(tmp_path / "saved").frozen()
    for each in (again, twice):
        assert torch.equal(draw(each, texts, 3, 2.5), draw(model, texts, 3, 2.5))
    assert base_files.network_files(guided[kind]) == base_files.network_files(names["edm2"]) == [Path(names["edm2"][5:])]
    again.save(tmp_path / "alone")
    (tmp_path / "alone" / "guide.safetensors").unlink()
    assert torch.equal(draw(bases.load(tmp_path / "alone"), texts, 3, 2.5), draw(loaded["edm2"], texts, 3, 2.5))


def test_a_guide_that_does_not_fit_is_named(names, tmp_path):
    shutil.copytree(Path(names["edm2"][5:]).parent, tmp_path / "a, b")   # a comma in a name is no second network
    assert bases.check(f"edm2:{tmp_path / 'a, b' / 'net.safetensors'}") == tmp_path / "a, b"
    for key, arguments in (("img_resolution", (16, 4, 5, 8, [1], 1, [], 8)), ("img_channels", (8, 3, 5, 8, [1], 1, [], 8)),
                           ("label_dim", (8, 4, 6, 8, [1], 1, [], 8))):
        edm2.save(edm2.EDM2(*arguments), tmp_path / "guide.safetensors")
        refused(f"{names['edm2']},{tmp_path / 'guide.safetensors'}", "guide.safetensors: has " + key)
    refused(f"{names['edm2']},{tmp_path / 'none.pkl'}", "none.pkl: no such")
    refused(f"{names['edm2']},", "no such")
    refused(f"{names['edm2']},{names['sit'][4:]}", "not an EDM2"), refused(f"{names['sit']},{names['edm2'][5:]}", "no such file")


@torch.no_grad()
def test_sit_is_guided_in_its_first_three_channels_alone(loaded):
    model = loaded["sit"]
    x, t, prompt, null = noise(model.shape), torch.full((3,), 0.7), model.encode(["1", "2", "3"]), model.encode([""])
    guided, with_prompt, without = predict(model, x, t, prompt, 2.5, null), model(x, t, prompt), model(x, t, model.encode([""] * 3))
    for found, p, n in zip(guided, with_prompt, without):
        torch.testing.assert_close(found[:, :3], (n + 2.5 * (p - n))[:, :3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[:, 3:], p[:, 3:], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(p[:, 3:], n[:, 3:], atol=1e-3)


def test_a_class_has_a_number_or_a_name(loaded):
    model = loaded["sit"]
    same = model.encode(["0", "TENCH", "tinca tinca", "tench, Tinca tinca"])[0]
    assert same.shape == (4, 24) and (same == same[0]).all()
    assert torch.equal(model.encode(["crane, machine"])[0], model.encode(["4"])[0])
    assert torch.equal(model.encode([""])[0][0], model.network.y_embedder["embedding_table"].weight[5])
    assert (loaded["edm2"].encode([""])[0] == 0).all() and loaded["edm2"].encode(["1"])[0].abs().sum() > 0
    for text in ("5", "-1", "crow", "crane", "٣", "1.0", "99999999999"):  # two classes are called crane
        with pytest.raises(ValueError, match="a class is a number from 0 to 4") as error:
            model.encode(["1", text])
        assert repr(text) in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# The interface, for every family.

@every_family
def test_a_prediction_is_consistent_and_trains_the_network(loaded, family):
    model = loaded[family]
    t = model.path.times(6)[[0, 2, 5]].float()
    alpha, sigma = (c(t.double()).float().reshape(-1, 1, 1, 1) for c in (model.path.alpha, model.path.sigma))
    x_t = noise(model.shape) * (alpha**2 + sigma**2).sqrt()
    x0_hat, eps_hat = model(x_t, t, model.encode(prompts_of(family)))
    assert x0_hat.shape == eps_hat.shape == x_t.shape and x0_hat.dtype == torch.float32
    assert ((alpha * x0_hat + sigma * eps_hat - x_t).abs() / (1 + x_t.abs())).max() < 1e-5
    x0_hat.square().mean().backward()
    without = [n for n, p in model.network.named_parameters() if p.grad is None or not p.grad.isfinite().all() or p.grad.abs().max() == 0]
    model.network.zero_grad()
    assert all(n.startswith(("y_embedder", "unet.emb_label")) or "add_q_proj" in n or "norm_added_q" in n for n in without), without


@every_family
def test_everything_but_the_network_is_frozen(loaded, family):
    model = loaded[family]
    assert all(p.requires_grad for p in model.network.parameters()) and not model.network.training
    for module in [model.vae, *(encoder for _, encoder in model.encoders or [])]:
        assert module is None or not any(p.requires_grad for p in module.parameters()) and not module.training
    pictures = model.decode(noise(model.shape))
    side = 28 if family == "tiny" else 16
    assert pictures.shape == (3, 3, side, side) and 0 <= pictures.min() < pictures.max() <= 1 and pictures.dtype == torch.float32


@every_family
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_first_ratio_is_exactly_one(loaded, family, guidance):
    model, rows = loaded[family], torch.arange(3)
    prompt, null = model.encode(prompts_of(family)), model.encode([""])
    policy = Policy(model.path, model.path.times(4), range(0, 3), eta=0.7, kernel="cps", guidance=guidance)
    condition = noised_prompt(prompt, tuple(noise(y.shape[1:], 3, 5 + i) for i, y in enumerate(prompt)), 0.3, 0.3, 1.2)
    found = rollout(model, policy, condition, noise(model.shape) * model.initial_std, noise((3, *model.shape), 3, 9), null)
    for w, k in enumerate(policy.window):
        at = torch.full((3,), k)
        mean, std, _ = policy.step(model, found.latents[k], at, condition(rows, policy.fraction(at)), null)
        assert mean.requires_grad
        ratio = torch.exp(log_prob(found.latents[k + 1], mean, std) - found.log_probs[w])     # not even divided by the dimensions
        assert (ratio == 1).all(), (k, ratio)


@every_family
def test_frozen_is_another_network(loaded, family):
    model = loaded[family]
    twin, prompt, x = model.frozen(), model.encode(prompts_of(family)), noise(model.shape)
    t = model.path.times(4)[[1, 1, 1]].float()
    assert torch.equal(twin(x, t, prompt)[0], model(x, t, prompt)[0]) and not twin(x, t, prompt)[0].requires_grad
    before = twin(x, t, prompt)[0]
    kept = {n: p.detach().clone() for n, p in model.network.named_parameters()}
    with torch.no_grad():
        for p in model.network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert torch.equal(twin(x, t, prompt)[0], before) and not torch.equal(model(x, t, prompt)[0], before)
    with torch.no_grad():
        for n, p in model.network.named_parameters():
            p.copy_(kept[n])


@every_family
def test_saved_models_load_like_the_base(names, loaded, family, tmp_path):
    model = bases.load(names[family])
    with torch.no_grad():
        for p in model.network.parameters():
            p.add_(0.01)
    model.save(tmp_path / "saved")
    again = bases.load(tmp_path / "saved")
    assert again.folder == tmp_path / "saved" == bases.check(str(tmp_path / "saved"))
    state, saved = model.network.state_dict(), again.network.state_dict()
    assert state.keys() == saved.keys() and all(torch.equal(state[n], saved[n]) for n in state)
    assert not torch.equal(draw(again, prompts_of(family), 2), draw(loaded[family], prompts_of(family), 2))
    assert torch.equal(draw(again, prompts_of(family), 2), draw(model, prompts_of(family), 2))
    x = noise(model.shape)
    assert torch.equal(again.decode(x), model.decode(x))
    files = base_files.network_files(tmp_path / "saved")
    assert {n for file in files for n in load_file(file)} == set(state)
    again.save(tmp_path / "twice")                                       # and on from there
    assert all(torch.equal(a, saved[n]) for n, a in bases.load(tmp_path / "twice").network.state_dict().items())


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_the_stock_pipeline_reads_what_is_saved(loaded, family, tmp_path):
    model = loaded[family]
    model.save(tmp_path / "m")
    pipe = stock_pipeline(tmp_path / "m")
    stock = pipe(TEXTS, latents=noise(model.shape, 2), num_inference_steps=3, guidance_scale=2.0, output_type="latent").images
    torch.testing.assert_close(draw(model, TEXTS, 3, 2.0), stock, rtol=2e-5, atol=2e-5)


def test_a_part_that_was_never_fetched_is_not_named_when_saved(names, tmp_path):
    shutil.copytree(names["sd1"], tmp_path / "m")
    (tmp_path / "m" / "leftover.ckpt").write_bytes(b"pickle")
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (tmp_path / "m" / "model_index.json").write_text(json.dumps(index))
    bases.load(tmp_path / "m").save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["safety_checker"] == [None, None]
    assert not (tmp_path / "saved" / "leftover.ckpt").exists()
    diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved", requires_safety_checker=False)


def test_links_to_nowhere_and_whole_models_in_one_file_are_not_copied(names, tmp_path):
    shutil.copytree(names["sd1"], tmp_path / "m")
    shutil.copytree(Path(names["sit"].removeprefix("sit:")).parent, tmp_path / "s")
    for file in (tmp_path / "m" / "v1-5-pruned.safetensors", tmp_path / "m" / "v1-5-pruned.bin"):
        file.write_bytes(b"gigabytes")
    for link in (tmp_path / "m" / "lost.json", tmp_path / "m" / "vae" / "lost.json", tmp_path / "s" / "vae" / "lost.json"):
        link.symlink_to(tmp_path / "nowhere")
    before = {path.relative_to(tmp_path / "m") for path in (tmp_path / "m").rglob("*") if path.is_file()}
    bases.load(tmp_path / "m").save(tmp_path / "saved"), bases.load(f"sit:{tmp_path / 's' / 'net.safetensors'}").save(tmp_path / "own")
    assert {path.relative_to(tmp_path / "saved") for path in (tmp_path / "saved").rglob("*") if path.is_file()} == {
        path for path in before if not path.name.startswith("v1-5")}
    assert bases.load(tmp_path / "saved") and bases.load(tmp_path / "own")


class Crossings(TorchDispatchMode):
    """Collects the operations that copy from one device to another: a GPU stops for each, and for each number that is asked of it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, inputs=(), more=None):
        result = operation(*inputs, **(more or {}))
        if len({t.device.type for t in (*inputs, result) if isinstance(t, torch.Tensor)}) > 1:
            self.found.append(str(operation))
        return result


@every_family
def test_no_step_of_a_rollout_stops_a_gpu(loaded, family):
    """On the meta device nothing has a value: a step that asks for one raises, and a copy from the CPU is seen."""
    on_meta = lambda tensors: tuple(t.to("meta") for t in tensors)
    model, prompts = loaded[family].frozen(), prompts_of(family)
    model.network.to("meta")
    y, null = on_meta(model.encode(prompts)), on_meta(model.encode([""]))
    x_T, noise = torch.empty(3, *model.shape, device="meta"), torch.empty(3, 2, *model.shape, device="meta")
    for kernel in ("cps", "ancestral") + ("flow-grpo",) * (family in ("tiny", "sd3", "sit")):
        policy = Policy(model.path, model.path.times(4).to("meta"), range(2), 0.8, kernel, 2.0)
        condition = noised_prompt(y, tuple(map(torch.empty_like, y)), 0.5, 0.6, 1.2)
        condition(torch.arange(2, device="meta"), torch.ones(2, device="meta")), model.path.alpha(policy.times)      # what is copied once
        with Crossings() as crossings:
            trajectory = rollout(model, policy, condition, x_T, noise, null, batch=2)
        assert crossings.found == [] and trajectory.log_probs.device.type == "meta"
    with Crossings() as crossings, pytest.raises(RuntimeError, match="meta"):
        torch.arange(3).to("meta").sum().item()
    assert crossings.found == ["aten._to_copy.default"]


@every_family
def test_bfloat16_is_near_float32(names, loaded, family):
    model, exact = bases.load(names[family], precision="bfloat16"), loaded[family]
    prompt, t = model.encode(prompts_of(family)), model.path.times(4)[[1, 2, 2]].float()
    assert all(y.dtype == torch.float32 for y in prompt) and all(p.dtype == torch.float32 for p in model.network.parameters())
    low, high = model(noise(model.shape), t, prompt)[0], exact(noise(model.shape), t, exact.encode(prompts_of(family)))[0]
    assert low.dtype == torch.float32 and not torch.equal(low, high) and (low - high).std() < 0.1 * high.std() + 0.02
    torch.testing.assert_close(model.decode(noise(model.shape)), exact.decode(noise(model.shape)), rtol=0, atol=1e-5)
    encoders = {p.dtype for _, encoder in model.encoders or [] for p in encoder.parameters()}
    assert encoders <= {torch.float32 if family == "tiny" else torch.bfloat16}
    low.mean().backward()


@every_family
def test_checkpointing_changes_memory_only(names, loaded, family):
    model, plain = bases.load(names[family], checkpointing=True), loaded[family]
    prompt, x, t = model.encode(prompts_of(family)), noise(model.shape), model.path.times(4)[[1, 2, 2]].float()
    kept = []
    for each in (model, plain):
        with torch.autograd.graph.saved_tensors_hooks(lambda v: kept[-1].append(v.numel()) or v, lambda v: v):
            kept.append([])
            out = each(x, t, prompt)[0]
        out.square().sum().backward()
    assert torch.equal(model(x, t, prompt)[0], plain(x, t, prompt)[0]) and sum(kept[0]) < 0.8 * sum(kept[1])
    for (n, a), b in zip(model.network.named_parameters(), plain.network.parameters()):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5)), n
    plain.network.zero_grad()
    twin = model.frozen()
    with torch.no_grad():
        for p in model.network.parameters():
            p.zero_()
        assert torch.equal(twin(x, t, prompt)[0], plain(x, t, prompt)[0])            # the copy's blocks are its own


def test_a_compiler_that_gets_the_gradient_wrong_is_found_out(names):
    """Its predictions may be right all the same, so that no ratio shows it."""
    for precision, tolerated, refused_ in (("float32", 1.0001, 1.01), ("bfloat16", 1.05, 1.2)):
        model = bases.load(names["sit"], precision=precision)
        trained, prompt, calls = dict(model.network.named_parameters()), model.encode(["1"]), []

        def compiled(scale):
            def call(*inputs):
                calls.append(scale)
                out = model.network._call_impl(*inputs)
                return out.detach() + scale * (out - out.detach())
            return call
        for scale in (1, tolerated):
            model.network._compiled_call_impl = compiled(scale)
            guards.check_compiled(model, prompt, trained.values())
        model.network._compiled_call_impl = compiled(refused_)
        with pytest.raises(ValueError, match=f"--compile: .* wrong here, by {refused_ - 1:.0%}"[:-1]):
            guards.check_compiled(model, prompt, trained.values())
        assert calls == [1, tolerated, refused_] and all(p.grad is None for p in trained.values())


def test_compiling_changes_no_name_and_is_not_copied(names, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **more: compiled.append(call) or (lambda *inputs, **more: call(*inputs, **more)))
    model, plain = bases.load(names["sit"], compile=True), bases.load(names["sit"])
    assert len(compiled) == 1 and model.network.state_dict().keys() == plain.network.state_dict().keys()
    assert torch.equal(draw(model, ["1"], 2), draw(plain, ["1"], 2))
    with torch.no_grad():
        twin = model.frozen()
        model.network.final_layer["linear"].bias.add_(1)
    assert torch.equal(draw(twin, ["1"], 2), draw(plain, ["1"], 2)) and not torch.equal(draw(model, ["1"], 2), draw(plain, ["1"], 2))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_a_compiled_rollout_and_a_compiled_update_round_alike(names):
    """One needs no gradient and the other does, so that they are two graphs; left alone, a compiler rounds each to bfloat16 where it likes."""
    torch.compiler.reset()
    model = bases.load(names["tiny"], precision="bfloat16", compile=True)
    x, t = torch.randn(4, *model.shape, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.6)
    prompt = model.encode(["a boot"] * 4)
    with torch.no_grad():
        rolled_out = model(x, t, prompt)[0]
    updated = model(x, t, prompt)[0].detach()
    assert (rolled_out - updated).norm() < 1e-3 * updated.norm()          # left alone, 2.7e-3
    assert torch._dynamo.config.recompile_limit > 8                      # torch's own: past it the plain network stands in, which rounds otherwise


@pytest.mark.parametrize("family", ["sd1", "sd3", "sit", "edm2"])
def test_pictures_are_decoded_a_few_at_a_time(names, family, monkeypatch):
    model, seen = bases.load(names[family], decode_batch=2), []
    original = model.vae.decode
    monkeypatch.setattr(model.vae, "decode", lambda z, **more: seen.append(len(z)) or original(z, **more))
    x = noise(model.shape, 5)
    pictures = model.decode(x)
    assert seen == [2, 2, 1] and torch.allclose(pictures[4:], model.decode(x[4:]), atol=1e-6)
    assert model.decode(x[:0]).shape == (0, 3, 16, 16)                   # a process may have none


def test_encoders_stay_where_their_work_does_not_fit(names, monkeypatch):
    model = bases.load(names["sd3"])
    size = sum(y.nbytes for y in model.encode([""]))
    seen, embed = [], model.embed
    monkeypatch.setattr(model, "embed", lambda texts: seen.append(texts) or embed(texts))
    monkeypatch.setattr(generator, "REMEMBERED", 2 * size)
    model.forget_text_encoders([*TEXTS, ""])                             # more than two
    seen.clear()
    many = model.encode([TEXTS[0], TEXTS[1], TEXTS[0]])
    assert model.encoders and not model.known and seen == [TEXTS[:2]]    # each text once
    assert all(torch.equal(y[0], y[2]) and not torch.equal(y[0], y[1]) for y in many)
    model.forget_text_encoders(TEXTS[:2])
    assert not model.encoders and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(many, model.encode([TEXTS[0], TEXTS[1], TEXTS[0]])))


def test_text_encoders_can_be_forgotten(names):
    for family in ("sd1", "sd3", "tiny"):
        model = bases.load(names[family])
        twin, prompt, alive = model.frozen(), model.encode([*TEXTS, ""]), [weakref.ref(encoder) for _, encoder in model.encoders]
        model.forget_text_encoders(["", *TEXTS, TEXTS[0]])
        gc.collect()
        assert model.encoders == twin.encoders == [] and not any(encoder() for encoder in alive)
        for each in (model, twin):
            assert all(map(torch.equal, each.encode([*TEXTS, ""]), prompt)) and each.encode(TEXTS[:1] * 3)[0].shape[0] == 3
            with pytest.raises(RuntimeError, match="'a boot' was not kept"):
                each.encode([*TEXTS, "a boot"])
        model.forget_text_encoders()                                     # once more changes nothing
        assert draw(model, TEXTS, 2).isfinite().all()
    model = bases.load(names["sit"])
    model.forget_text_encoders()                                         # it has none: the labels' embedding belongs to the network
    assert model.encode(["1"])[0].shape == (1, 24)


# ---------------------------------------------------------------------------------------------------------------------
# Files: shards, hub ids, and what must be refused.

def test_shards_are_read_through_their_index(names, loaded, tmp_path):
    for family, part in (("sd1", "unet"), ("sd3", "transformer")):
        shutil.copytree(names[family], tmp_path / family)
        shutil.rmtree(tmp_path / family / part)
        loaded[family].network.save_pretrained(tmp_path / family / part, max_shard_size="20KB")
        files = base_files.network_files(tmp_path / family)
        assert len(files) > 2 and {n for file in files for n in load_file(file)} == set(loaded[family].network.state_dict())
        assert torch.equal(draw(bases.load(tmp_path / family), TEXTS, 2), draw(loaded[family], TEXTS, 2))
        files[1].write_bytes(files[1].read_bytes()[:-10])
        with pytest.raises(ValueError, match=f"{files[1].name} in {part} is damaged"):
            bases.check(tmp_path / family)
        files[1].unlink()
        with pytest.raises(ValueError, match=f"{part}/{files[1].name} is missing"):
            bases.check(tmp_path / family)


def test_the_key_names_of_published_files_are_known(names, loaded, tmp_path):
    """Older writers named the CLIP's and the VAE's weights otherwise, and wrote some twice."""
    def rename(folder, new, **more):
        [file] = folder.glob("*.safetensors")
        state = load_file(file)
        save_file({new(n): v for n, v in state.items()} | {n: f(state) for n, f in more.items()}, file, {"format": "pt"})
    for family in ("sd1", "sd3"):
        shutil.copytree(names[family], tmp_path / family)
    whole = lambda n: n if n.startswith("text_") else "text_model." + n
    rename(tmp_path / "sd1" / "text_encoder", whole, **{"text_model.embeddings.position_ids": lambda state: torch.arange(10)[None]})
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    rename(tmp_path / "sd1" / "vae", lambda n: functools.reduce(lambda n, pair: n.replace(*pair), old.items(), n) if "attentions" in n else n)
    rename(tmp_path / "sd3" / "text_encoder_2", whole)
    rename(tmp_path / "sd3" / "text_encoder_3", str, **{"encoder.embed_tokens.weight": lambda state: state["shared.weight"].clone()})
    for family in ("sd1", "sd3"):
        model = bases.load(tmp_path / family)
        assert all(map(torch.equal, model.encode(TEXTS), loaded[family].encode(TEXTS)))
        assert torch.equal(model.decode(noise(model.shape)), loaded[family].decode(noise(model.shape)))


def test_network_files_name_one_file(names, tiny):
    assert base_files.network_files(tiny) == [tiny / "transformer" / "diffusion_pytorch_model.safetensors"]
    assert base_files.network_files(names["sit"]) == [Path(names["sit"][4:])]
    assert base_files.network_files(names["sd1"]) == [Path(names["sd1"]) / "unet" / "diffusion_pytorch_model.safetensors"]
    with pytest.raises(ValueError, match="not a safetensors file"):
        base_files.network_files("sit:net.pt")


def test_a_published_sit_needs_no_metadata(tmp_path, names):
    shutil.copytree(Path(names["sit"][4:]).parent / "vae", tmp_path / "vae")
    torch.manual_seed(0)
    torch.save({"ema": sit.SiT(4, 2, 4, 384, 1, 6, 3).state_dict(), "opt": {}}, tmp_path / "SiT-S.pt")
    model = bases.load(f"sit:{tmp_path / 'SiT-S.pt'}")
    assert model.shape == (4, 4, 4) and model.network.blocks[0].heads == 6 and model.folder == tmp_path
    model.save(tmp_path / "saved")
    assert base_files.network_files(tmp_path / "saved") == [tmp_path / "saved" / "sit.safetensors"]
    assert torch.equal(draw(bases.load(tmp_path / "saved"), ["1"], 2), draw(model, ["1"], 2))


def fake_hub(folder, base, repo="someone/some-model"):
    """A cache of the hub that holds `base`, as links to blobs, as the client keeps it."""
    store, revision = folder / ("models--" + repo.replace("/", "--")), "0" * 40
    (store / "refs").mkdir(parents=True), (store / "blobs").mkdir()
    (store / "refs" / "main").write_text(revision)
    for i, path in enumerate(sorted(p for p in Path(base).rglob("*") if p.is_file())):
        link = store / "snapshots" / revision / path.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, store / "blobs" / str(i))
        link.symlink_to(os.path.relpath(store / "blobs" / str(i), link.parent))
    return store / "snapshots" / revision


def test_a_hub_id_is_a_folder_of_the_cache(names, loaded, tmp_path, monkeypatch):
    import huggingface_hub
    snapshot = fake_hub(tmp_path / "cache", names["sd1"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert bases.check("someone/some-model") == snapshot
    model = bases.load("someone/some-model")
    assert torch.equal(draw(model, TEXTS, 2), draw(loaded["sd1"], TEXTS, 2)) and base_files.network_files("someone/some-model")[0].is_file()
    model.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "cache")
    assert not any(p.is_symlink() for p in (tmp_path / "saved").rglob("*")) and bases.load(tmp_path / "saved")


def test_only_what_is_needed_is_fetched(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **more: asked.update(more, repo=repo) or str(tmp_path))
    with pytest.raises(ValueError, match="model_index.json"):
        bases.check("owner/name")
    assert asked.keys() == {"repo", "allow_patterns"} and asked["repo"] == "owner/name"
    published = """model_index.json README.md v1-5-pruned.ckpt v1-5-pruned.safetensors sd3_medium.safetensors
        unet/config.json unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.bin
        unet/diffusion_pytorch_model.non_ema.safetensors transformer/diffusion_pytorch_model-00001-of-00002.safetensors
        transformer/diffusion_pytorch_model.safetensors.index.json transformer/config.json text_encoder_3/model-00001-of-00002.safetensors
        text_encoder_3/model.fp16-00001-of-00002.safetensors text_encoder/model.safetensors text_encoder/pytorch_model.bin
        text_encoder/config.json text_encoder/flax_model.msgpack vae/diffusion_pytorch_model.safetensors vae/config.json tokenizer/vocab.json
        tokenizer/merges.txt tokenizer_3/spiece.model tokenizer_3/tokenizer.json safety_checker/model.safetensors scheduler/scheduler_config.json
        feature_extractor/preprocessor_config.json text_encoder/model.fp16.safetensors text_encoder/run.py""".split()
    kept = set(filter_repo_objects(published, allow_patterns=base_files.WANTED))
    assert kept == set("""model_index.json unet/config.json unet/diffusion_pytorch_model.safetensors transformer/config.json
        transformer/diffusion_pytorch_model-00001-of-00002.safetensors transformer/diffusion_pytorch_model.safetensors.index.json
        text_encoder_3/model-00001-of-00002.safetensors text_encoder/model.safetensors text_encoder/config.json vae/config.json
        vae/diffusion_pytorch_model.safetensors tokenizer/vocab.json tokenizer/merges.txt tokenizer_3/spiece.model tokenizer_3/tokenizer.json
        scheduler/scheduler_config.json""".split())


def refused(name, *naming):
    """models.check and bases.load both say it, in one line with the name and the reason."""
    for call in (bases.check, bases.load):
        with pytest.raises(ValueError) as error:
            call(name)
        line = str(error.value)
        assert "\n" not in line and line.startswith(f"--model {name}: ") and len(line) < 700, line
        for word in naming:
            assert word in line, line


def test_the_default_base_is_found_from_anywhere_and_asked_of_nobody(tiny, tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **more: pytest.fail(f"{repo} was asked for"))
    monkeypatch.chdir(tmp_path)
    assert bases.check("assets/tiny") == ROOT / "assets" / "tiny" and base_files.network_files("assets/tiny")[0].is_file()
    monkeypatch.setattr(model_files, "__file__", str(tmp_path / "elsewhere" / "model_files.py"))
    refused("assets/tiny", "no such folder")
    shutil.copytree(tiny, "assets/tiny")
    assert bases.check("assets/tiny") == Path("assets/tiny")            # one's own comes first


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("someone/no-such-model", "hub id")                           # offline, as all tests are
    (tmp_path / "runs").mkdir()
    refused("runs/typo", "no such folder")                               # a local folder's typo is not sent to anybody
    refused("nowhere", "no such folder"), refused(f"{tmp_path}/a/b", "no such folder")
    refused("sit:", "no such file"), refused(f"sit:{tmp_path}/x.pt", "x.pt"), refused(f"edm2:{tmp_path}/x.pkl", "x.pkl")
    refused(str(tmp_path), "model_index.json")
    refused("x" * 3000 if os.name == "nt" else "a/" + "x" * 300)


def drop(path):
    return lambda folder: (folder / path).unlink() if (folder / path).is_file() else shutil.rmtree(folder / path)


def cut(path):
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:-7])


def put(path, content):
    return lambda folder: (folder / path).write_text(content)


def rewrite(path, **changes):
    return lambda folder: (folder / path).write_text(json.dumps(json.loads((folder / path).read_text()) | changes))


def to_pickle(part):
    def change(folder):
        for path in (folder / part).glob("*.safetensors"):
            torch.save(load_file(path), folder / part / "diffusion_pytorch_model.bin")
            path.unlink()
    return change


BAD = [  # family, what becomes of the folder, what the line must name
    ("sd1", drop("tokenizer/tokenizer_config.json"), ("tokenizer/tokenizer_config.json is missing",)),
    ("sd1", rewrite("tokenizer/tokenizer_config.json", model_max_length=None), ("model_max_length None",)),
    ("sd3", rewrite("tokenizer/tokenizer_config.json", model_max_length=10**30), ("model_max_length 1000",)),
    ("sd3", put("tokenizer_2/tokenizer.json", "{not"), ("tokenizer.json in tokenizer_2 is not JSON",)),
    ("sd1", rewrite("model_index.json", _class_name="StableDiffusionXLPipeline"), ("StableDiffusionXLPipeline", "known here")),
    ("sd1", rewrite("model_index.json", _class_name=["a"]), ("known here",)), ("sd1", put("model_index.json", "[1]"), ("model_index.json",)),
    ("sd1", drop("vae"), ("vae/config.json",)), ("sd1", drop("unet"), ("unet/config.json",)), ("sd1", drop("scheduler"), ("scheduler",)),
    ("sd1", drop("text_encoder/model.safetensors"), ("text_encoder/model.safetensors",)), ("sd1", drop("tokenizer"), ("tokenizer",)),
    ("sd1", cut("unet/diffusion_pytorch_model.safetensors"), ("diffusion_pytorch_model.safetensors in unet is damaged",)),
    ("sd1", cut("vae/diffusion_pytorch_model.safetensors"), ("vae", "damaged")),
    ("sd1", put("unet/diffusion_pytorch_model.safetensors", ""), ("unet", "damaged")),
    ("sd1", to_pickle("unet"), ("diffusion_pytorch_model.bin is a pickle",)), ("sd1", to_pickle("vae"), ("vae", "is a pickle")),
    ("sd1", put("unet/config.json", "{"), ("config.json in unet",)), ("sd1", put("unet/config.json", "[]"), ("config.json in unet",)),
    ("sd1", put("unet/config.json", '{"in_channels": 9}'), ("sample_size",)), ("sd1", rewrite("unet/config.json", in_channels=9), ("in_channels 9",)),
    ("sd1", rewrite("vae/config.json", latent_channels=16), ("4 channels", "16")),
    ("sd1", rewrite("unet/config.json", in_channels=16, out_channels=16), ("16 channels",)),
    ("sd1", rewrite("scheduler/scheduler_config.json", prediction_type="sample"), ("prediction_type 'sample'", "epsilon")),
    ("sd1", rewrite("scheduler/scheduler_config.json", timestep_spacing="trailing"), ("timestep_spacing 'trailing'",)),
    ("sd1", rewrite("scheduler/scheduler_config.json", beta_schedule="squaredcos_cap_v2"), ("squaredcos_cap_v2",)),
    ("sd1", rewrite("scheduler/scheduler_config.json", beta_end="much"), ("beta_end 'much'",)),
    ("sd1", put("unet/diffusion_pytorch_model.safetensors.index.json", "{}"), ("weight_map",)),
    ("sd1", put("unet/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": [1]}'), ("weight_map",)),
    ("sd1", put("unet/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {"a": "../vae/a.safetensors"}}'), ("../vae",)),
    ("sd3", drop("text_encoder_2"), ("text_encoder_2/config.json",)), ("sd3", drop("tokenizer_3"), ("tokenizer_3",)),
    ("sd3", drop("vae"), ("vae/config.json",)), ("sd3", cut("text_encoder_3/model.safetensors"), ("text_encoder_3", "damaged")),
    ("sd3", rewrite("model_index.json", text_encoder_2=[None, None]), ("text_encoder_2",)),
    ("sd3", rewrite("model_index.json", vae=[None, None]), ("4 channels", "pixels")),
    ("sd3", rewrite("scheduler/scheduler_config.json", shift="x"), ("shift 'x'",)),
    ("sd3", rewrite("scheduler/scheduler_config.json", shift=0), ("shift 0",)),
    ("sd3", rewrite("scheduler/scheduler_config.json", use_dynamic_shifting=True), ("use_dynamic_shifting",)),
    ("sd3", put("scheduler/scheduler_config.json", '{"beta_start": 1}'), ("no shift",)),
    ("sit", drop("vae"), ("vae is missing", "stabilityai/sd-vae-ft-ema")), ("edm2", drop("vae"), ("stabilityai/sd-vae-ft-mse",)),
    ("sit", cut("net.safetensors"), ("net.safetensors", "truncated")), ("edm2", cut("net.safetensors"), ("net.safetensors",)),
    ("sit", put("classes.txt", "a\nb"), ("2 lines for 5 classes",)),
    ("sit", lambda f: (f / "classes.txt").write_bytes(b"\xff\n" * 5), ("not UTF-8",)),
    ("sit", rewrite("vae/config.json", latent_channels=16), ("16",)), ("edm2", to_pickle("vae"), ("is a pickle",))]


@pytest.mark.parametrize("case", range(len(BAD)), ids=lambda i: f"{BAD[i][0]}-{BAD[i][2][0]}")
def test_bad_files_are_named_in_one_line(names, tmp_path, case):
    family, spoil, naming = BAD[case]
    folder = Path(names[family].split(":")[-1])
    folder = folder if folder.is_dir() else folder.parent
    shutil.copytree(folder, tmp_path / "m")
    spoil(tmp_path / "m")
    refused(f"{family}:{tmp_path / 'm' / 'net.safetensors'}" if family in ("sit", "edm2") else str(tmp_path / "m"), *naming)


@pytest.mark.parametrize("family, part", [("sd1", "tokenizer"), ("sd3", "tokenizer_3")])
def test_a_tokenizer_that_its_library_cannot_read_is_named(names, tmp_path, family, part):
    shutil.copytree(names[family], tmp_path / "m")
    put(f"{part}/tokenizer.json", '{"model": 3}')(tmp_path / "m")
    bases.check(tmp_path / "m")                                         # which knows no tokenizers
    with pytest.raises(ValueError, match=f"--model {tmp_path / 'm'}: {part} is not the ") as error:
        bases.load(tmp_path / "m")
    assert len(str(error.value).splitlines()) == 1


def test_a_network_of_another_family_is_refused(names, tmp_path):
    sit_file, edm2_file = names["sit"][4:], names["edm2"][5:]
    refused(f"sit:{edm2_file}", "not a SiT"), refused(f"edm2:{sit_file}", "not an EDM2")
    unet = base_files.network_files(names["sd1"])[0]
    refused(f"sit:{unet}", "not a SiT"), refused(f"edm2:{unet}", "not an EDM2")


def test_weights_that_are_not_those_of_the_config_are_no_model(names, tmp_path):
    """Their libraries would fill the gaps with random numbers and a warning."""
    for name, part, spoil in (("sd1", "unet", lambda state: state.popitem()), ("sd1", "text_encoder", lambda state: state.popitem()),
                              ("sd3", "vae", lambda state: state.pop(min(state))),
                              ("sd3", "transformer", lambda state: state.update({min(state): torch.zeros(3, 5)}))):
        folder = tmp_path / part
        shutil.copytree(names[name], folder)
        [file] = (folder / part).glob("*.safetensors")
        state = load_file(file)
        spoil(state)
        save_file(state, file, {"format": "pt"})
        assert bases.check(folder) == folder                            # the headers are in order
        with pytest.raises(ValueError, match=f"{part} is not the") as error:
            bases.load(folder)
        assert "\n" not in str(error.value)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_runs_none(names, tmp_path):
    shutil.copytree(Path(names["sit"][4:]).parent / "vae", tmp_path / "vae")
    torch.save({"ema": Bomb(tmp_path / "ran")}, tmp_path / "sit.pt")
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"ema": Bomb(tmp_path / "ran")}))
    refused(f"sit:{tmp_path / 'sit.pt'}", "could run code"), refused(f"edm2:{tmp_path / 'edm2.pkl'}", "mkdir")
    assert not (tmp_path / "ran").exists()


def test_checking_builds_no_network(names):
    script = ("import sys, models\nfor name in sys.argv[1:]: print(bases.check(name))\n"
              "assert not {'diffusers', 'transformers'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", script, *names.values()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(names), done.stderr


def test_loading_says_nothing(names, capfd):
    for name in names.values():
        bases.load(name)
    out, error = capfd.readouterr()
    assert out == error == ""
