"""The recogniser: a ViT of transformers that reads attributes, as a reward."""

import pytest
import torch
import transformers
from reward_helpers import TINY, edit_json, rand, refused

import bases
import rewards
from commands import picture_sets
from prompting import read_prompts
from rewards import recogniser
from rewards.classifier import FLOOR

# Not in alphabetical order: transformers sorts the names of an object in config.json.
ATTRIBUTES = {"shape": ["ring", "star", "cross"], "colour": ["red", "blue"]}
PAIRS = [[name, values] for name, values in ATTRIBUTES.items()]
ASKED = [{"shape": "star"}, {"colour": "red"}, {"shape": "ring", "colour": "blue"}]


def write_recogniser(folder, spread=5.0):
    """A random network -> ViTForImageClassification in eval mode."""
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=5,
        attributes=PAIRS,
    )
    torch.manual_seed(0)
    network = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        network.classifier.weight.mul_(50 * spread)
    network.save_pretrained(folder)
    return network


def test_the_reward_is_the_log_probability_of_what_is_named(tmp_path):
    network = write_recogniser(tmp_path / "recogniser")
    images = rand(3, 3, 16, 16)
    found = rewards.Reward("recogniser,jpeg", tmp_path)(images, ["a"] * 3, ASKED)["recogniser"]
    with torch.no_grad():
        logits = network(pixel_values=images * 2 - 1).logits
    shape = logits[:, :3].log_softmax(1)
    colour = logits[:, 3:].log_softmax(1)
    expected = torch.stack([shape[0, 1], colour[1, 0], shape[2, 0] + colour[2, 1]])
    torch.testing.assert_close(found, expected.clamp(min=FLOOR))
    assert found.min() < -0.1


def test_what_it_reads_is_known_before_it_is_loaded(tmp_path):
    write_recogniser(tmp_path / "recogniser")
    expected = {"attributes": ATTRIBUTES, "size": 16}
    folder = tmp_path / "recogniser"
    assert rewards.readers("recogniser", tmp_path) == {folder: expected}
    refused(lambda: rewards.check_reward("recogniser", tmp_path / "none"), "recogniser", "exist")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "resnet"}, "holds a resnet, not a vit"),
        ({"attributes": {"shape": ["ring"]}}, "attributes"),
        ({"attributes": None}, "attributes"),
        ({"attributes": ["shape", "colour"]}, "pairs"),
        ({"attributes": ATTRIBUTES}, "in the order of the logits"),
        ({"attributes": [*PAIRS, ["size", ["small", "large"]]]}, "7 values"),
    ],
)
def test_another_network_is_refused(tmp_path, change, words):
    folder = tmp_path / "recogniser"
    write_recogniser(folder)
    edit_json(folder / "config.json", **change)
    refused(lambda: rewards.check_reward("recogniser", tmp_path), folder, words)


def test_weights_of_another_network_are_refused(tmp_path):
    folder = tmp_path / "recogniser"
    write_recogniser(folder)
    edit_json(folder / "config.json", num_hidden_layers=2)
    refused(lambda: recogniser.Recogniser(folder), folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    refused(lambda: recogniser.Recogniser(folder), folder)


def test_the_recogniser_of_the_embedded_base_knows_what_it_draws():
    """Another network finds what the classifier finds in the base's own pictures."""
    model = bases.load(TINY)
    prompts = read_prompts(TINY / "eval_prompts.jsonl")
    images = picture_sets.generate(model, prompts, 4, 10, 1.0, seed=1, batch=40)
    metadata = [prompt.metadata for prompt in prompts for _ in range(4)]
    found = rewards.Reward("recogniser,class", TINY)(images, [""] * 40, metadata)
    for values in found.values():
        assert values.exp().mean() > 0.6
        assert values.min() >= FLOOR
    assert not torch.allclose(found["recogniser"], found["class"], atol=0.05)
