"""What the algorithm asks of every base, and SiT's and EDM2's adapters against their formulas."""

import gc
import weakref

import pytest
import torch
from small_bases import FAMILIES, TEXTS, draw, file_of, noise, prompts_of, shaken
from torch.utils._python_dispatch import TorchDispatchMode

import bases
from bases import edm2, generator, sit
from bases.files import network_files
from prompting import noised_prompt
from sampling import Policy, log_prob, predict, rollout

# --------------------------------------------------------------------------------------------------
# Predictions.


def at_times(path, times):
    """alpha and sigma of the path, [B, 1, 1, 1]."""
    alpha = path.alpha(times.double()).float().reshape(-1, 1, 1, 1)
    sigma = path.sigma(times.double()).float().reshape(-1, 1, 1, 1)
    return alpha, sigma


# Embeddings of classes are made without gradients, and the last block of Stable Diffusion 3 and of
# Qwen-Image asks nothing of the prompt.
UNTRAINED = (
    "y_embedder",
    "unet.emb_label",
    "class_embedder",
    "add_q_proj",
    "norm_added_q",
    "transformer_blocks.1.attn.to_add_out",
    "transformer_blocks.1.txt_mlp",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prediction_is_consistent_and_trains_the_network(loaded, family):
    """x_t = alpha x0_hat + sigma eps_hat."""
    model = loaded[family]
    t = model.path.times(6)[[0, 2, 5]].float()
    alpha, sigma = at_times(model.path, t)
    x_t = noise(model.shape) * (alpha**2 + sigma**2).sqrt()
    x0_hat, eps_hat = model(x_t, t, model.encode(prompts_of(family)))
    assert x0_hat.shape == eps_hat.shape == x_t.shape
    assert x0_hat.dtype == torch.float32
    error = (alpha * x0_hat + sigma * eps_hat - x_t).abs() / (1 + x_t.abs())
    assert error.max() < 1e-5

    x0_hat.square().mean().backward()
    gradients = {name: p.grad for name, p in model.network.named_parameters()}
    model.network.zero_grad()
    for name, gradient in gradients.items():
        if not any(part in name for part in UNTRAINED):
            assert gradient.isfinite().all() and gradient.any(), name


@pytest.mark.parametrize("family", ["tiny", "sd3", "edm2"])
def test_all_but_the_network_is_frozen_and_pictures_are_in_range(loaded, family):
    model = loaded[family]
    assert all(parameter.requires_grad for parameter in model.network.parameters())
    assert not model.network.training
    others = [encoder for _, encoder in model.encoders or []]
    if model.vae:
        others.append(model.vae)
    for module in others:
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    pictures = model.decode(noise(model.shape))
    side = 28 if family == "tiny" else 16
    assert pictures.shape == (3, 3, side, side)
    assert pictures.dtype == torch.float32
    assert 0 <= pictures.min() < pictures.max() <= 1


@pytest.mark.parametrize(
    "family, guidance",
    [
        ("tiny", 1.0),
        ("sd1", 2.0),
        ("sd2", 1.0),
        ("sd3", 2.0),
        ("sd3-without-t5", 1.0),
        ("sit", 2.0),
        ("edm2", 1.0),
        ("edm2", 2.0),
    ],
)
def test_the_first_ratio_is_exactly_one(loaded, family, guidance):
    model = loaded[family]
    prompt = model.encode(prompts_of(family))
    null_prompt = model.encode([""])
    prompt_noise = [noise(y.shape[1:], seed=5 + n) for n, y in enumerate(prompt)]
    condition = noised_prompt(prompt, tuple(prompt_noise), 0.3, 0.3, 1.2)
    policy = Policy(model.path, model.path.times(4), range(3), 0.7, "cps", guidance)
    x_T = noise(model.shape) * model.initial_std
    step_noise = noise((3, *model.shape), seed=9)
    trajectory = rollout(model, policy, condition, x_T, step_noise, null_prompt)

    rows = torch.arange(3)
    for w, k in enumerate(policy.window):
        steps = torch.full((3,), k)
        noised = condition(rows, policy.fraction(steps))
        mean, std, _ = policy.step(model, trajectory.latents[k], steps, noised, null_prompt)
        assert mean.requires_grad
        new = log_prob(trajectory.latents[k + 1], mean, std)
        ratio = torch.exp(new - trajectory.log_probs[w])  # not even divided by the dimensions
        assert (ratio == 1).all()


class Crossings(TorchDispatchMode):
    """Collects the operations that copy from one device to another.

    A GPU stops for each of them, and for each number that is asked of it.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, inputs=(), options=None):
        result = operation(*inputs, **(options or {}))
        tensors = [x for x in (*inputs, result) if isinstance(x, torch.Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.operations.append(str(operation))
        return result


def on_meta(tensors):
    return tuple(tensor.to("meta") for tensor in tensors)


@pytest.mark.parametrize(
    "family, kernel",
    [
        ("tiny", "flow-grpo"),
        ("sd1", "cps"),
        ("sd1", "ancestral"),
        ("sd3", "cps"),
        ("sit", "flow-grpo"),
        ("edm2", "ancestral"),
    ],
)
def test_no_step_of_a_rollout_stops_a_gpu(loaded, family, kernel):
    """On the meta device nothing has a value: a step that asks for one raises."""
    model = loaded[family].frozen()
    model.network.to("meta")
    prompt = on_meta(model.encode(prompts_of(family)))
    null_prompt = on_meta(model.encode([""]))
    x_T = torch.empty(3, *model.shape, device="meta")
    step_noise = torch.empty(3, 2, *model.shape, device="meta")
    policy = Policy(model.path, model.path.times(4).to("meta"), range(2), 0.8, kernel, 2.0)
    prompt_noise = tuple(torch.empty_like(y) for y in prompt)
    condition = noised_prompt(prompt, prompt_noise, 0.5, 0.6, 1.2)
    # What is copied once for a run.
    condition(torch.arange(2, device="meta"), torch.ones(2, device="meta"))
    model.path.alpha(policy.times)
    with Crossings() as crossings:
        trajectory = rollout(model, policy, condition, x_T, step_noise, null_prompt, batch=2)
    assert crossings.operations == []
    assert trajectory.log_probs.device.type == "meta"


def test_a_copy_and_a_question_to_the_gpu_are_noticed():
    with Crossings() as crossings, pytest.raises(RuntimeError, match="meta"):
        torch.arange(3).to("meta").sum().item()
    assert crossings.operations == ["aten._to_copy.default"]


# --------------------------------------------------------------------------------------------------
# Copies, memory, precision.


def change(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("family", ["sd1", "edm2"])
def test_frozen_is_another_network(names, family):
    model = bases.load(names[family])
    inputs = noise(model.shape), model.path.times(4)[[1, 1, 1]].float()
    prompt = model.encode(prompts_of(family))
    before, _ = model(*inputs, prompt)
    twin = model.frozen()
    change(model.network)
    x0_hat, _ = twin(*inputs, prompt)
    assert torch.equal(x0_hat, before)
    assert not x0_hat.requires_grad
    assert not torch.equal(model(*inputs, prompt)[0], before)


@pytest.mark.parametrize("family", ["sd1", "sd3", "sit", "edm2"])
def test_bfloat16_is_near_float32(names, loaded, family):
    exact = loaded[family]
    model = bases.load(names[family], precision="bfloat16")
    assert all(p.dtype == torch.float32 for p in model.network.parameters())
    t = model.path.times(4)[[1, 2, 2]].float()
    prompt = model.encode(prompts_of(family))
    assert all(y.dtype == torch.float32 for y in prompt)
    low, _ = model(noise(model.shape), t, prompt)
    high, _ = exact(noise(model.shape), t, exact.encode(prompts_of(family)))
    assert low.dtype == torch.float32
    assert not torch.equal(low, high)
    assert (low - high).std() < 0.1 * high.std() + 0.02
    x = noise(model.shape)
    torch.testing.assert_close(model.decode(x), exact.decode(x), rtol=0, atol=1e-5)
    low.mean().backward()


def test_pictures_are_decoded_a_few_at_a_time(names, monkeypatch):
    model = bases.load(names["sd1"], decode_batch=2)
    sizes = []
    decode = model.vae.decode

    def counted(latents, **options):
        sizes.append(len(latents))
        return decode(latents, **options)

    monkeypatch.setattr(model.vae, "decode", counted)
    x = noise(model.shape, 5)
    pictures = model.decode(x)
    assert sizes == [2, 2, 1]
    assert torch.allclose(pictures[4:], model.decode(x[4:]), atol=1e-6)
    assert model.decode(x[:0]).shape == (0, 3, 16, 16)  # a process may have none


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_text_encoders_can_be_forgotten(names, family):
    model = bases.load(names[family])
    twin = model.frozen()
    texts = [*TEXTS, ""]
    prompt = model.encode(texts)
    encoders = [weakref.ref(encoder) for _, encoder in model.encoders]
    model.forget_text_encoders(["", *TEXTS, TEXTS[0]])
    gc.collect()
    assert model.encoders == twin.encoders == []
    assert not any(encoder() for encoder in encoders)
    for each in (model, twin):
        for remembered, original in zip(each.encode(texts), prompt):
            assert torch.equal(remembered, original)
        assert len(each.encode(TEXTS[:1] * 3)[0]) == 3
        with pytest.raises(RuntimeError, match="'a boot' was not kept"):
            each.encode([*TEXTS, "a boot"])
    model.forget_text_encoders()  # once more changes nothing
    assert draw(model, TEXTS, 2).isfinite().all()


def test_a_base_of_classes_has_no_encoders_to_forget(names):
    model = bases.load(names["sit"])
    model.forget_text_encoders()
    assert model.encode(["1"])[0].shape == (1, 24)


def test_encoders_stay_where_the_embeddings_do_not_fit(names, monkeypatch):
    model = bases.load(names["sd3"])
    size = sum(y.nbytes for y in model.encode([""]))
    encoded = []
    embed = model.embed

    def noted(texts):
        encoded.append(texts)
        return embed(texts)

    monkeypatch.setattr(model, "embed", noted)
    monkeypatch.setattr(generator, "REMEMBERED", 2 * size)
    texts = [TEXTS[0], TEXTS[1], TEXTS[0]]
    model.forget_text_encoders([*TEXTS, ""])  # more than two
    encoded.clear()
    prompt = model.encode(texts)
    assert model.encoders and not model.known
    assert encoded == [TEXTS]  # each text once
    for y in prompt:
        assert torch.equal(y[0], y[2])
        assert not torch.equal(y[0], y[1])

    model.forget_text_encoders(TEXTS)
    assert not model.encoders
    for remembered, y in zip(model.encode(texts), prompt):
        assert torch.allclose(remembered, y, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# SiT.


@torch.no_grad()
def test_sit_is_eulers_method_on_the_published_velocity(names, loaded):
    model = loaded["sit"]
    network, _ = sit.load(file_of(names["sit"]), num_heads=4)
    labels = torch.tensor([3, 1, 5])
    x = noise(model.shape)
    for i in range(5):  # in the published direction: 0 noise, 1 data
        x = x + network(x, torch.full((3,), i / 5), labels) / 5
    latents = draw(model, ["3", "Goldfish", ""], 5)
    torch.testing.assert_close(latents, x, rtol=1e-5, atol=1e-5)
    pictures = model.vae.decode(x / 0.18215).sample / 2 + 0.5
    torch.testing.assert_close(model.decode(x), pictures.clamp(0, 1), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sit_is_guided_in_its_first_three_channels_alone(loaded):
    model = loaded["sit"]
    x = noise(model.shape)
    t = torch.full((3,), 0.7)
    prompt = model.encode(["1", "2", "3"])
    guided = predict(model, x, t, prompt, 2.5, model.encode([""]))
    with_prompt = model(x, t, prompt)
    without = model(x, t, model.encode([""] * 3))
    for g, p, n in zip(guided, with_prompt, without):
        expected = n + 2.5 * (p - n)
        torch.testing.assert_close(g[:, :3], expected[:, :3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(g[:, 3:], p[:, 3:], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(p[:, 3:], n[:, 3:], atol=1e-3)


def test_the_null_prompt_of_classes(loaded):
    table = loaded["sit"].network.y_embedder["embedding_table"].weight
    assert torch.equal(loaded["sit"].encode([""])[0][0], table[5])
    assert (loaded["edm2"].encode([""])[0] == 0).all()
    assert loaded["edm2"].encode(["1"])[0].any()


# --------------------------------------------------------------------------------------------------
# EDM2.


@torch.no_grad()
def euler(denoise, times, x):
    """Euler's method on dx/dt = (x - D(x; t)) / t."""
    for t, s in zip(times[:-1].float(), times[1:].float()):
        x = x + (s - t) * (x - denoise(x, t)) / t
    return x


def test_edm2_is_eulers_method_on_the_published_denoiser(names, loaded):
    model = loaded["edm2"]
    network = edm2.load(file_of(names["edm2"]))
    labels = torch.eye(6)[[0, 3, 5], :5]

    def denoise(x, t):
        return network(x, t, labels)

    x = euler(denoise, model.path.times(5), noise(model.shape) * 80)
    torch.testing.assert_close(draw(model, ["0", "drake", ""], 5), x, rtol=1e-4, atol=1e-4)
    pictures = model.vae.decode(edm2.latents_to_vae(x)).sample.clamp(0, 1)
    torch.testing.assert_close(model.decode(x), pictures, rtol=1e-5, atol=1e-5)


def test_guidance_starts_from_the_null_label(loaded):
    model = loaded["edm2"]
    null = draw(model, ["", ""], 3)
    torch.testing.assert_close(draw(model, ["1", "2"], 3, 1e-6), null, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(null, draw(model, ["1", "2"], 3), atol=1e-3)


def build_guide(path, label_dim):
    """A smaller network than the base, as its guide."""
    torch.manual_seed(4)
    edm2.save(shaken(edm2.EDM2(8, 4, label_dim, 8, [1, 2], 1, [], 8), 0.3), path)
    return edm2.load(path)


@pytest.mark.parametrize("label_dim", [0, 5], ids=["unconditional", "conditional"])
def test_a_second_network_guides_edm2_as_published(names, loaded, label_dim, tmp_path):
    guide = build_guide(tmp_path / "guide.safetensors", label_dim)
    main = edm2.load(file_of(names["edm2"]))
    model = bases.load(f"{names['edm2']},{tmp_path / 'guide.safetensors'}")
    assert not any(p.requires_grad for p in model.guide_network.parameters())
    assert model.folder == file_of(names["edm2"]).parent
    texts = ["0", "drake", "2"]
    labels = torch.eye(5)[[0, 3, 2]]

    def denoise(x, t):
        weak = guide(x, t, labels if label_dim else None)
        return weak + 2.5 * (main(x, t, labels) - weak)

    x = euler(denoise, model.path.times(4), noise(model.shape) * 80)
    torch.testing.assert_close(draw(model, texts, 4, 2.5), x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(draw(loaded["edm2"], texts, 4, 2.5), x, atol=0.01)
    # A guidance of 1 needs no guide.
    assert torch.equal(draw(model, texts, 4), draw(loaded["edm2"], texts, 4))


def test_a_guide_is_saved_with_its_network(names, loaded, tmp_path):
    build_guide(tmp_path / "guide.safetensors", label_dim=5)
    name = f"{names['edm2']},{tmp_path / 'guide.safetensors'}"
    assert network_files(name) == [file_of(names["edm2"])]
    model = bases.load(name)
    saved = tmp_path / "saved"
    model.save(saved)
    again = bases.load(saved)
    texts = ["0", "drake", "2"]
    expected = draw(model, texts, 3, 2.5)
    assert torch.equal(draw(again, texts, 3, 2.5), expected)
    assert torch.equal(draw(again.frozen(), texts, 3, 2.5), expected)
    (saved / "guide.safetensors").unlink()
    unguided = draw(bases.load(saved), texts, 3, 2.5)
    assert torch.equal(unguided, draw(loaded["edm2"], texts, 3, 2.5))
