"""LoRA by hand: the base bit for bit at first and when off; the merged network; plain diffusers."""

import importlib.util

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_bases import (
    KINDS,
    TEXTS,
    draw,
    noise,
    prompts_of,
    stock_draw,
    stock_pipeline,
)
from torch import nn

import bases
from bases import tensors
from bases.files import network_files
from bases.lora import (
    TARGETS,
    add_lora,
    export,
    lora_layers,
    lora_off,
    merged,
)
from sampling import Policy, log_prob, rollout

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None,
    reason="peft is not installed; diffusers needs it to load a LoRA",
)
some_families = pytest.mark.parametrize("family", ["sd1", "sd3", "sit", "edm2"])


def with_lora(name, learned=True, **options):
    """A base with a LoRA of rank 3 and alpha 6 -> model, its parameters; learned: B is random."""
    model = bases.load(name, **options)
    parameters = add_lora(model.network, 3, 6.0, seed=1)
    if learned:
        learn(parameters)
    return model, parameters


def learn(parameters, scale=0.1):
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if ".lora_B." in name:
                parameter.copy_(scale * torch.randn_like(parameter))


def inputs(model, family):
    t = model.path.times(4)[[0, 1, 2]].float()
    return noise(model.shape), t, model.encode(prompts_of(family))


@torch.no_grad()
def forward(model, family):
    return torch.stack(model(*inputs(model, family)))


# --------------------------------------------------------------------------------------------------
# The network.


@pytest.mark.parametrize("family", KINDS)
def test_at_first_and_when_off_it_is_the_base(loaded, names, family):
    base = forward(loaded[family], family)
    model, parameters = with_lora(names[family], learned=False)
    assert torch.equal(forward(model, family), base)
    learn(parameters)
    changed = forward(model, family)
    assert not torch.allclose(changed, base, atol=1e-4)
    with lora_off(model.network) as network:
        assert network is model.network
        assert torch.equal(forward(model, family), base)
        with lora_off(model.network):
            pass
        # The inner block does not end the outer one.
        assert torch.equal(forward(model, family), base)
    with pytest.raises(KeyError), lora_off(model.network):
        raise KeyError
    assert torch.equal(forward(model, family), changed)


ATTENTION = {"to_q", "to_k", "to_v", "to_out.0"}
FEED_FORWARD = {"ff.net.0.proj", "ff.net.2"}
JOINT_ATTENTION = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
CONTEXT_FEED_FORWARD = {"ff_context.net.0.proj", "ff_context.net.2"}
EXPECTED_TARGETS = {
    "sd1": ATTENTION | FEED_FORWARD,
    "sd3": ATTENTION | FEED_FORWARD | JOINT_ATTENTION | CONTEXT_FEED_FORWARD,
    "sit": {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"},
    "edm2": {"attn_qkv", "attn_proj"},
}


def target_of(name):
    """The target that a LoRA's parameter belongs to."""
    layer = name.split(".lora_")[0]
    return next(target for target in TARGETS if layer.endswith(target))


@some_families
def test_only_the_lora_learns(names, family):
    model, parameters = with_lora(names[family])
    trainable = [name for name, p in model.network.named_parameters() if p.requires_grad]
    assert trainable == list(parameters)
    for name, parameter in parameters.items():
        assert name.endswith((".lora_A.weight", ".lora_B.weight"))
        assert parameter.dtype == torch.float32
    assert {target_of(name) for name in parameters} == EXPECTED_TARGETS[family]

    x0_hat, _ = model(*inputs(model, family))
    x0_hat.square().sum().backward()
    for name, parameter in model.network.named_parameters():
        if name not in parameters:
            assert parameter.grad is None
        elif "add_q_proj" not in name:  # the last block of Stable Diffusion 3 does not use it
            assert parameter.grad.any(), name


def test_the_start_is_a_function_of_the_seed(names):
    runs = []
    for global_seed, seed in ((0, 1), (1, 1), (2, 2)):
        network = bases.load(names["sd1"]).network
        torch.manual_seed(global_seed)
        runs.append(add_lora(network, 4, 4, seed=seed))
    first, same, other = runs
    for name, weight in first.items():
        assert torch.equal(weight, same[name])
        if ".lora_B." in name:
            assert weight.shape[1] == 4 and not weight.any()
        else:
            bound = weight.shape[1] ** -0.5
            assert weight.shape[0] == 4
            assert weight.abs().max() <= bound
            assert weight.std() > 0.4 * bound
            assert not torch.equal(weight, other[name])


@some_families
def test_merged_is_the_same_network_under_the_bases_names(names, family):
    model, _ = with_lora(names[family])
    base = bases.load(names[family]).network
    before = {name: t.clone() for name, t in model.network.state_dict().items()}
    original = {name: t.clone() for name, t in base.state_dict().items()}
    state = merged(model.network)
    assert list(state) == list(original)
    differing = {name for name in state if not torch.equal(state[name], original[name])}
    layers = lora_layers(model.network)
    assert differing == {name + ".weight" for name in layers}
    for name, layer in layers.items():  # W + alpha / r B A
        change = 2.0 * layer.lora_B.weight @ layer.lora_A.weight
        expected = layer.weight + change.reshape(layer.weight.shape)
        assert torch.allclose(state[name + ".weight"], expected, atol=1e-6)
    for name, tensor in model.network.state_dict().items():  # nothing was changed in place
        assert torch.equal(tensor, before[name])

    trained = forward(model, family)
    model.network = base
    base.load_state_dict(state)
    if family == "edm2":
        assert torch.equal(forward(model, family), trained)
    else:
        assert torch.allclose(forward(model, family), trained, rtol=1e-4, atol=1e-4)


def test_without_a_lora_merged_is_the_state(loaded):
    network = loaded["sd1"].network
    state = merged(network)
    for name, tensor in network.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert state[name].data_ptr() != tensor.data_ptr()


def test_a_model_with_a_lora_is_saved_merged(names, tmp_path):
    model, _ = with_lora(names["sd1"])
    model.save(tmp_path / "model")
    state = merged(model.network)
    saved = bases.load(tmp_path / "model").network.state_dict()
    assert saved.keys() == state.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("family", ["sd1", "edm2"])
def test_frozen_keeps_the_lora_of_now(names, family):
    model, parameters = with_lora(names[family])
    twin = model.frozen()
    before = forward(twin, family)
    # Its tensors lie elsewhere, and a product of size 3 may round otherwise.
    assert torch.allclose(forward(model, family), before, rtol=1e-5, atol=1e-5)
    learn(parameters, 0.3)
    assert torch.equal(forward(twin, family), before)
    assert not torch.allclose(forward(model, family), before, atol=1e-3)
    with lora_off(model.network):
        assert torch.equal(forward(twin, family), before)
    assert not any(parameter.requires_grad for parameter in twin.network.parameters())


@pytest.mark.parametrize("family", ["sd1", "edm2"])
def test_the_first_ratio_is_exactly_one(names, family):
    model, _ = with_lora(names[family], checkpointing=True)
    prompt = model.encode(prompts_of(family))

    def condition(rows, u):
        return tuple(y[rows] for y in prompt)

    policy = Policy(model.path, model.path.times(4), range(2), eta=0.7)
    x_T = noise(model.shape) * model.initial_std
    step_noise = noise((2, *model.shape), seed=9)
    trajectory = rollout(model, policy, condition, x_T, step_noise)
    for k in policy.window:
        steps = torch.full((3,), k)
        mean, std, _ = policy.step(model, trajectory.latents[k], steps, prompt)
        assert mean.requires_grad
        new = log_prob(trajectory.latents[k + 1], mean, std)
        assert torch.equal(new, trajectory.log_probs[k])


@pytest.mark.parametrize("family", ["sd3", "edm2"])
def test_bfloat16_runs(names, family):
    model = bases.load(names[family], precision="bfloat16")
    base = forward(model, family)
    parameters = add_lora(model.network, 2, 2)
    assert torch.equal(forward(model, family), base)
    learn(parameters)
    assert not torch.equal(forward(model, family), base)
    model(*inputs(model, family))[0].sum().backward()
    assert any(parameter.grad.any() for parameter in parameters.values())


# --------------------------------------------------------------------------------------------------
# Files.


@needs_peft
@pytest.mark.parametrize(
    "family, guidance",
    [
        ("sd1", 3.0),
        ("sd2", 1.0),
        ("sd3", 3.0),
        ("sd3-without-t5", 1.0),
        ("sdxl", 3.0),
        ("flux", 3.5),
        ("qwen-image", 3.0),
    ],
)
def test_diffusers_draws_the_same_with_the_exported_file(names, family, guidance, tmp_path):
    model, _ = with_lora(names[family])
    export(model.network, tmp_path / "lora", {"base": names[family], "iteration": 3})
    pipeline = stock_pipeline(names[family])
    base = stock_draw(pipeline, model, TEXTS, 3, guidance)
    pipeline.load_lora_weights(tmp_path / "lora")
    expected = stock_draw(pipeline, model, TEXTS, 3, guidance)
    latents = draw(model, TEXTS, 3, guidance)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert (expected - base).abs().max() > 1e-2

    part = getattr(pipeline, "transformer", None) or pipeline.unet
    changed = [name for name, _ in part.named_parameters() if "lora_A" in name]
    assert len(changed) == len(lora_layers(model.network))
    pipeline.fuse_lora()
    fused = {}
    for name, tensor in part.state_dict().items():
        if ".lora_" not in name:
            fused[name.replace(".base_layer", "")] = tensor
    state = merged(model.network)
    assert fused.keys() == state.keys()
    for name, tensor in fused.items():
        assert torch.allclose(tensor, state[name], atol=1e-5)


@pytest.mark.parametrize("family", ["sd3", "edm2", "dit"])
def test_merge_reads_the_exported_file(names, family, tmp_path):
    model, _ = with_lora(names[family])
    export(model.network, tmp_path, {"base": "somewhere", "iteration": 3})
    file = tensors.Weights([tmp_path / "pytorch_lora_weights.safetensors"])
    assert file.facts["base"] == "somewhere"
    assert file.facts["iteration"] == "3"
    read = tensors.LoraFile("lora", file, tensors.Weights(network_files(names[family])))
    state = merged(model.network)
    assert set(read) == {name + ".weight" for name in lora_layers(model.network)}
    for name in read:
        assert torch.allclose(read[name], state[name], atol=1e-6)
        assert read.shape(name) == tuple(state[name].shape)


@pytest.mark.parametrize("family, prefix", [("sd1", "unet."), ("sd3", "transformer.")])
def test_the_file_has_diffusers_layout(names, tmp_path, family, prefix):
    model, parameters = with_lora(names[family])
    folder = tmp_path / "deep" / "down"
    export(model.network, folder, {})
    path = folder / "pytorch_lora_weights.safetensors"
    stored = load_file(path)
    assert stored.keys() == {prefix + name for name in parameters}
    for name, parameter in parameters.items():
        scale = 2.0 if ".lora_B." in name else 1.0
        assert torch.equal(stored[prefix + name], parameter * scale)
    with safe_open(path, "pt") as opened:
        assert not opened.metadata()


# --------------------------------------------------------------------------------------------------
# Sizes, and what cannot have a LoRA.


def test_the_sizes_of_stable_diffusion_1_5():
    with torch.device("meta"):  # takes no memory
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    base = sum(parameter.numel() for parameter in unet.parameters())
    parameters = add_lora(unet, 4, 4, targets=("to_q", "to_k", "to_v", "to_out.0"))
    lora = sum(parameter.numel() for parameter in parameters.values())
    assert (base, lora) == (859_520_964, 797_184)  # both are published numbers


def test_other_layers_can_be_named(names):
    network = bases.load(names["sd1"]).network
    parameters = add_lora(network, 2, 2, targets=("to_q", "time_emb_proj"))
    layers = {name.split(".lora_")[0] for name in parameters}
    assert {layer.rsplit(".", 1)[1] for layer in layers} == {"to_q", "time_emb_proj"}


def test_a_convolution_of_edm2_can_have_one(names):
    network = bases.load(names["edm2"]).network
    learn(add_lora(network, 2, 2, targets=("conv_res0", "emb_linear")))
    base = bases.load(names["edm2"]).network
    base.load_state_dict(merged(network))
    x = noise((4, 8, 8))
    assert torch.equal(network(x, 1.0), base(x, 1.0))


@pytest.mark.parametrize("rank, alpha", [(0, 1), (1.5, 1), (2, 0), (2, float("nan"))])
def test_bad_sizes_are_refused(rank, alpha):
    network = nn.ModuleDict({"to_q": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=f"rank {rank} and alpha {alpha}"):
        add_lora(network, rank, alpha)
    assert network["to_q"].weight.requires_grad
    assert not lora_layers(network)


def test_what_cannot_have_one_is_refused():
    network = nn.ModuleDict({"to_q": nn.Linear(3, 3), "to_k": nn.Conv2d(3, 3, 1)})
    with pytest.raises(ValueError, match="to_k is a Conv2d"):
        add_lora(network, 2, 2)
    with pytest.raises(ValueError, match="ends in one of to_z"):
        add_lora(network, 2, 2, targets=("to_z",))
    assert not lora_layers(network)
    add_lora(network, 2, 2, targets=("to_q",))
    with pytest.raises(ValueError, match="to_q has a LoRA already"):
        add_lora(network, 2, 2, targets=("to_q",))


def test_a_network_without_a_lora_cannot_be_exported(loaded, tmp_path):
    with pytest.raises(ValueError, match="cannot be exported"):
        export(loaded["sd1"].network, tmp_path / "lora", {})
    assert not (tmp_path / "lora").exists()
