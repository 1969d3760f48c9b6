"""bases/lora_files.py: a LoRA file means what diffusers and peft make of it, or is refused."""

import json

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from bases import tensors

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
LAYER = "transformer_blocks.0.attn.to_q"

# What a LoRA's scale depends on.
SETTINGS = {
    "alpha is not the rank": {"lora_alpha": 16},
    "alphas by layer": {"lora_alpha": 4, "alpha_pattern": {"to_q": 16, r".*0\.attn\.to_k": 1}},
    "ranks by layer": {"lora_alpha": 4, "rank_pattern": {"to_v": 2}},
    "root of the rank": {"lora_alpha": 4, "use_rslora": True, "rank_pattern": {"to_q": 1}},
}


def trained_network(tiny, settings):
    """A network of the base with a random LoRA, as its trainers hold it -> network, config."""
    torch.manual_seed(0)
    network = diffusers.SD3Transformer2DModel.from_pretrained(tiny, subfolder="transformer")
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **settings)
    return network, config


def save_as_diffusers(network, config, folder):
    network.add_adapter(config)
    halves = get_peft_model_state_dict(network)
    facts = {"transformer." + name: value for name, value in config.to_dict().items()}
    for name, value in facts.items():
        facts[name] = sorted(value) if isinstance(value, set) else value
    metadata = {"lora_adapter_metadata": json.dumps(facts), "format": "pt"}
    named = {"transformer." + name: tensor.contiguous() for name, tensor in halves.items()}
    folder.mkdir()
    save_file(named, folder / "pytorch_lora_weights.safetensors", metadata)
    return network


def save_as_peft(network, config, folder):
    wrapped = get_peft_model(network, config)
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize("what", SETTINGS)
@pytest.mark.parametrize("save", [save_as_diffusers, save_as_peft])
def test_the_merged_network_is_the_trained_one(tiny, tmp_path, what, save):
    """peft's own layers are the truth: each is merged by peft, and compared."""
    wrapped = save(*trained_network(tiny, SETTINGS[what]), tmp_path / "lora")
    _, (merged,) = tensors.open_checkpoints([str(tmp_path / "lora")], str(tiny))
    changed = 0
    for name, module in wrapped.named_modules():
        if hasattr(module, "get_delta_weight") and module.lora_A:
            layer = name.removeprefix("base_model.model.")
            expected = module.weight + module.get_delta_weight(*module.lora_A)
            torch.testing.assert_close(merged[layer + ".weight"], expected, rtol=1e-5, atol=1e-6)
            changed += 1
    assert changed == len(merged)


A = torch.ones(2, 128)
B = torch.ones(128, 2)

# Layouts that are no LoRA of a network in the layout of diffusers: names, what the line says.
LAYOUTS = {
    "kohya": (["lora_unet_blocks_0_to_q.lora_down.weight"], "kohya"),
    "kohya, text": (["lora_te1_text_model_0_q.alpha"], "kohya"),
    "ComfyUI": (["diffusion_model.blocks.0.to_q.lora_A.weight"], "ComfyUI"),
    "text encoder": (["text_encoder.layers.0.q.lora_A.weight"], "text encoder"),
    "adapter name": ([f"{LAYER}.lora_A.default.weight"], "named by an adapter"),
    "older diffusers": (["unet.a.processor.to_q_lora.up.weight"], "older layout"),
    "DoRA": ([f"transformer.{LAYER}.lora_magnitude_vector"], "DoRA"),
    "biases": ([f"transformer.{LAYER}.lora_B.bias"], "biases"),
    "LoHa": ([f"{LAYER}.hada_w1_a"], "no LoRA"),
    "embedding": ([f"{LAYER}.lora_embedding_A"], "embedding"),
    "full weights": (["transformer.proj_out.weight", f"{LAYER}.lora_A.weight"], "neither"),
}


@pytest.mark.parametrize("what", LAYOUTS)
def test_another_layout_is_refused_by_its_name(tiny, tmp_path, what):
    names, message = LAYOUTS[what]
    path = tmp_path / "lora.safetensors"
    save_file({name: torch.ones(2, 128) for name in names}, path)
    with pytest.raises(ValueError, match=f"lora.safetensors: .*{message}.*; ") as error:
        tensors.open_checkpoints([str(path)], str(tiny))
    assert "\n" not in str(error.value)


PLAIN = {"r": 2, "lora_alpha": 2}
MISTAKES = {
    "DoRA": ({"use_dora": True}, "use_dora is True"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "changes the base before training"),
    "LoHa": ({"peft_type": "LOHA"}, "LOHA"),
    "bias": ({"bias": "all"}, "bias is 'all'"),
    "whole layers": ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
    "another rank": ({"r": 8}, "rank 2, and its settings say 8"),
    "no rank": ({"r": None}, "r is None"),
    "alpha is no number": ({"lora_alpha": "NaN"}, "lora_alpha is 'NaN'"),
    "a pattern without end": ({"alpha_pattern": {"(.*)*x": 1}}, "pattern"),
    "a pattern that is none": ({"alpha_pattern": {"(": 1}}, "pattern"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_settings_that_are_not_obeyed_are_refused(tiny, tmp_path, what):
    changes, message = MISTAKES[what]
    settings = {"transformer." + name: value for name, value in (PLAIN | changes).items()}
    path = tmp_path / "lora.safetensors"
    halves = {f"transformer.{LAYER}.lora_A.weight": A, f"transformer.{LAYER}.lora_B.weight": B}
    save_file(halves, path, {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(ValueError, match=message):
        tensors.open_checkpoints([str(path)], str(tiny))


def test_a_peft_file_needs_its_config_and_a_pickle_is_not_read(tiny, tmp_path):
    folder = tmp_path / "lora"
    save_as_peft(*trained_network(tiny, {"lora_alpha": 8}), folder)
    (folder / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match="adapter_config.json, and that is not beside it"):
        tensors.open_checkpoints([str(folder / "adapter_model.safetensors")], str(tiny))
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="adapter_model.bin: a pickle, which is never read"):
        tensors.open_checkpoints([str(folder)], str(tiny))


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_a_wrapped_models_names_are_named(tiny, tmp_path, wrapper):
    path = tmp_path / "weights.safetensors"
    save_file({wrapper + "proj_out.bias": torch.ones(196)}, path)
    with pytest.raises(ValueError, match=f"all its names begin with {wrapper}; "):
        tensors.open_checkpoints([str(path)], str(tiny))
