"""LoRA by hand: the base bit for bit at first and when it is off, the merged network, and the same pictures in plain diffusers."""
import importlib.util
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import ROOT  # noqa: F401  (puts the modules on the path)
from safetensors import safe_open
from safetensors.torch import load_file
from test_models import FAMILIES, TEXTS, draw, names, noise, prompts_of, stock_pipeline  # noqa: F401  (names is a fixture)
from torch import nn

from bases import lora
import bases
from bases import files as base_files
from bases import tensors
from sampling import Policy, log_prob, rollout

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed; diffusers needs it to load a LoRA")
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def with_lora(names):
    """family -> the base with a LoRA, its parameters, and inputs; B is random if `learned`."""
    def make(family, learned=True, rank=3, alpha=6.0, **more):
        model = bases.load(names[family], **more)
        parameters = lora.add_lora(model.network, rank, alpha, seed=1)
        if learned:
            learn(parameters)
        return model, parameters
    return make


def learn(parameters, scale=0.1):
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if ".lora_B." in name:
                parameter.copy_(scale * torch.randn_like(parameter))


def inputs(model, family):
    return noise(model.shape), model.path.times(4)[[0, 1, 2]].float(), model.encode(prompts_of(family))


def forward(model, family):
    with torch.no_grad():
        return torch.stack(model(*inputs(model, family)))


# ---------------------------------------------------------------------------------------------------------------------

@every_family
def test_at_first_and_when_off_it_is_the_base(names, with_lora, family):
    base = forward(bases.load(names[family]), family)
    model, parameters = with_lora(family, learned=False)
    assert torch.equal(forward(model, family), base)
    learn(parameters)
    assert not torch.allclose(forward(model, family), base, atol=1e-4)
    with lora.lora_off(model.network) as network:
        assert network is model.network and torch.equal(forward(model, family), base)
        with lora.lora_off(model.network):
            pass
        assert torch.equal(forward(model, family), base)                 # the inner block does not switch the outer one off
    changed = forward(model, family)
    with pytest.raises(KeyError), lora.lora_off(model.network):
        raise KeyError
    assert torch.equal(forward(model, family), changed) and not torch.equal(changed, base)


@every_family
def test_only_the_lora_learns(with_lora, family):
    model, parameters = with_lora(family)
    assert parameters == {n: p for n, p in model.network.named_parameters() if p.requires_grad} and parameters
    assert all(n.endswith((".lora_A.weight", ".lora_B.weight")) and p.dtype == torch.float32 for n, p in parameters.items())
    kinds = {next(t for t in lora.TARGETS if n.split(".lora_")[0].endswith(t)) for n in parameters}
    shared = {"to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"}
    joint = {"add_q_proj", "add_k_proj", "add_v_proj", *(() if family == "tiny" else ("to_add_out", "ff_context.net.0.proj", "ff_context.net.2"))}
    assert kinds == {"sit": {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}, "edm2": {"attn_qkv", "attn_proj"},
                     "sd1": shared, "sd2": shared}.get(family, shared | joint)                 # tiny has one block, whose context ends in it
    x0_hat, _ = model(*inputs(model, family))
    x0_hat.square().sum().backward()
    assert all(p.grad is None for p in model.network.parameters() if not p.requires_grad)
    without = [n for n, p in parameters.items() if p.grad is None or p.grad.abs().max() == 0]
    assert all("add_q_proj" in n for n in without), without              # the last block of Stable Diffusion 3 does not use it


def test_the_start_is_a_function_of_the_seed(names):
    found = []
    for seed in (1, 1, 2):
        model = bases.load(names["sd1"])
        torch.manual_seed(len(found))
        found.append(lora.add_lora(model.network, 4, 4, seed=seed))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    for name, a in found[0].items():
        if ".lora_A." in name:
            assert a.shape[0] == 4 and not torch.equal(a, found[2][name])
            assert a.abs().max() <= a.shape[1] ** -0.5 and a.std() > 0.4 * a.shape[1] ** -0.5
        else:
            assert a.shape[1] == 4 and (a == 0).all()


@every_family
def test_merged_is_the_same_network_under_the_bases_names(names, with_lora, family):
    model, _ = with_lora(family)
    base, state = bases.load(names[family]), lora.merged(model.network)
    assert state.keys() == base.network.state_dict().keys()
    kept = {n: t.clone() for n, t in model.network.state_dict().items()}
    plain = {n: t.clone() for n, t in base.network.state_dict().items()}
    differ = {n for n in state if not torch.equal(state[n], plain[n])}
    assert differ == {n + ".weight" for n in lora.changed(model.network)}
    base.network.load_state_dict(state)
    expected = forward(base, family)
    found = forward(model, family)
    assert torch.equal(found, expected) if family == "edm2" else torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(t, kept[n]) for n, t in model.network.state_dict().items())         # and nothing was changed in place
    for name, layer in lora.changed(model.network).items():                                    # W + alpha / r B A, by hand
        change = 2.0 * layer.lora_B.weight @ layer.lora_A.weight
        assert torch.allclose(state[name + ".weight"], layer.weight + change.reshape(layer.weight.shape), atol=1e-6)
    untouched = bases.load(names[family]).network
    assert all(torch.equal(t, plain[n]) for n, t in lora.merged(untouched).items())


@every_family
def test_a_model_with_a_lora_is_saved_merged(with_lora, family, tmp_path):
    model, _ = with_lora(family)
    model.save(tmp_path / "m")
    again = bases.load(tmp_path / "m")
    state = lora.merged(model.network)
    assert all(torch.equal(t, state[n]) for n, t in again.network.state_dict().items()) and len(state) == len(again.network.state_dict())


@every_family
def test_frozen_keeps_the_lora_of_now(with_lora, family):
    model, parameters = with_lora(family)
    twin = model.frozen()
    before = forward(twin, family)                                       # its tensors lie elsewhere: a product of size 3 may round otherwise
    assert torch.allclose(forward(model, family), before, rtol=1e-5, atol=1e-5)
    learn(parameters, 0.3)
    assert torch.equal(forward(twin, family), before) and not torch.allclose(forward(model, family), before, atol=1e-3)
    with lora.lora_off(model.network):
        assert torch.equal(forward(twin, family), before)                # switched for itself alone
    assert not any(p.requires_grad for p in twin.network.parameters())


@every_family
def test_the_first_ratio_is_exactly_one(with_lora, family):
    model, _ = with_lora(family, learned=False, checkpointing=True)
    prompt, rows = model.encode(prompts_of(family)), torch.arange(3)
    policy = Policy(model.path, model.path.times(4), range(0, 2), eta=0.7)
    clean = lambda rows, u: tuple(y[rows] for y in prompt)
    found = rollout(model, policy, clean, noise(model.shape) * model.initial_std, noise((2, *model.shape), 3, 9))
    for k in policy.window:
        mean, std, _ = policy.step(model, found.latents[k], torch.full((3,), k), tuple(y[rows] for y in prompt))
        assert mean.requires_grad and (log_prob(found.latents[k + 1], mean, std) == found.log_probs[k]).all()


@pytest.mark.parametrize("family", ["sd1", "sd3", "edm2"])
def test_bfloat16_runs(names, family):
    model = bases.load(names[family], precision="bfloat16")
    base = forward(model, family)
    parameters = lora.add_lora(model.network, 2, 2)
    assert torch.equal(forward(model, family), base)
    learn(parameters)
    model(*inputs(model, family))[0].sum().backward()
    assert not torch.equal(forward(model, family), base) and any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())


# ---------------------------------------------------------------------------------------------------------------------
# Files.

@needs_peft
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sd3", "sd3-without-t5"])
def test_diffusers_draws_the_same_with_the_exported_file(names, with_lora, family, guidance, tmp_path):
    model, _ = with_lora(family)
    lora.export(model.network, tmp_path / "lora", {"base": names[family], "iteration": 3})
    pipe = stock_pipeline(names[family])
    stock = lambda: pipe(TEXTS, latents=noise(model.shape, 2), num_inference_steps=3, guidance_scale=guidance, output_type="latent").images
    base = stock()
    pipe.load_lora_weights(tmp_path / "lora")
    found = stock()
    torch.testing.assert_close(draw(model, TEXTS, 3, guidance), found, rtol=1e-4, atol=1e-4)
    assert (found - base).abs().max() > 1e-2
    part = pipe.transformer if "3" in family else pipe.unet
    assert sum("lora_A" in n for n, _ in part.named_parameters()) == len(lora.changed(model.network))
    pipe.fuse_lora()
    state = lora.merged(model.network)
    fused = {n.replace(".base_layer", ""): t for n, t in part.state_dict().items() if ".lora_" not in n}
    assert fused.keys() == state.keys() and all(torch.allclose(fused[n], state[n], atol=1e-5) for n in state)


@every_family
def test_merge_reads_the_exported_file(names, with_lora, family, tmp_path):
    model, _ = with_lora(family)
    lora.export(model.network, tmp_path, {"base": "somewhere", "iteration": 3})
    file = tensors.Weights([tmp_path / "pytorch_lora_weights.safetensors"])
    assert file.facts["base"] == "somewhere" and file.facts["iteration"] == "3"
    read, state = tensors.Lora(file, tensors.Weights(base_files.network_files(names[family]))), lora.merged(model.network)
    assert set(read) == {name + ".weight" for name in lora.changed(model.network)}
    for name in read:
        assert torch.allclose(read[name], state[name], atol=1e-6) and read.shape(name) == tuple(state[name].shape)


def test_the_file_holds_safe_tensors_in_diffusers_layout(with_lora, tmp_path):
    for family, prefix in (("sd1", "unet."), ("sd3", "transformer.")):
        model, parameters = with_lora(family)
        lora.export(model.network, tmp_path / family / "deep", {})
        found = load_file(tmp_path / family / "deep" / "pytorch_lora_weights.safetensors")
        assert found.keys() == {prefix + name for name in parameters}
        for name, parameter in parameters.items():
            assert torch.equal(found[prefix + name], parameter * (2.0 if ".lora_B." in name else 1))
        with safe_open(tmp_path / family / "deep" / "pytorch_lora_weights.safetensors", "pt") as opened:
            assert not opened.metadata()


# ---------------------------------------------------------------------------------------------------------------------

def test_the_sizes_of_stable_diffusion_1_5():
    with torch.device("meta"):                                           # takes no memory
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    base = sum(p.numel() for p in unet.parameters())
    parameters = lora.add_lora(unet, 4, 4, targets=("to_q", "to_k", "to_v", "to_out.0"))
    assert (base, sum(p.numel() for p in parameters.values())) == (859_520_964, 797_184)      # both are published numbers


def test_other_layers_can_be_named(names):
    network = bases.load(names["sd1"]).network
    parameters = lora.add_lora(network, 2, 2, targets=("to_q", "time_emb_proj"))
    assert {n.split(".lora_")[0].rsplit(".", 1)[1] for n in parameters} == {"to_q", "time_emb_proj"}
    network = bases.load(names["edm2"]).network                          # at the weight, a 3 x 3 convolution is one like any other
    parameters = lora.add_lora(network, 2, 2, targets=("conv_res0", "emb_linear"))
    learn(parameters)
    x, base = noise((4, 8, 8)), bases.load(names["edm2"]).network
    base.load_state_dict(lora.merged(network))
    assert torch.equal(network(x, 1.0), base(x, 1.0))


@pytest.mark.parametrize("rank, alpha", [(0, 1), (-1, 1), (1.5, 1), (2, 0), (2, -1), (2, float("nan")), (2, float("inf"))])
def test_bad_sizes(rank, alpha):
    network = nn.ModuleDict({"to_q": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match="rank"):
        lora.add_lora(network, rank, alpha)
    assert network["to_q"].weight.requires_grad and not lora.changed(network)


def test_what_cannot_have_one(names, tmp_path):
    network = nn.ModuleDict({"to_q": nn.Linear(3, 3), "to_k": nn.Conv2d(3, 3, 1)})
    with pytest.raises(ValueError, match="to_k is a Conv2d"):
        lora.add_lora(network, 2, 2)
    with pytest.raises(ValueError, match="ends in one of to_z"):
        lora.add_lora(network, 2, 2, targets=("to_z",))
    with pytest.raises(ValueError, match="Conv2d"):
        lora.add_lora(network, 2, 2, ("to_k",))
    lora.add_lora(network, 2, 2, targets=("to_q",))
    with pytest.raises(ValueError, match="to_q has a LoRA already"):
        lora.add_lora(network, 2, 2, targets=("to_q",))
    for thing in (network, bases.load(names["sd1"]).network):           # of no known family; without a LoRA
        with pytest.raises(ValueError, match="cannot be exported"):
            lora.export(thing, tmp_path / "x", {})
    assert not Path(tmp_path / "x").exists()
