"""The classifier of a model folder: its layers, its rewards by their definitions, its files."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import launch, read_metrics, small
from reward_helpers import IMAGES, METADATA, PROMPTS, TINY, edit_json, rand, refused
from safetensors.torch import save_file

import eval as evaluation
import rewards
from dist_reward import moments
from rewards import classifier


def test_halve_is_max_pooling_bit_for_bit():
    for shape in ((3, 2, 28, 28), (3, 2, 7, 7), (1, 4, 9, 6)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(classifier.Halve()(x), F.max_pool2d(x, 2))


def test_the_classifier_is_frozen_and_sees_the_mean_of_the_channels():
    network = classifier.load_classifier(TINY / "reward")
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    features = network.features(IMAGES)
    assert features.shape == (7, 64) and features.dtype == torch.float32
    grey = IMAGES.mean(1, keepdim=True)
    torch.testing.assert_close(network.features(grey), features, atol=1e-5, rtol=1e-5)
    refused(lambda: network(torch.zeros(1, 3, 28, 32)), "28 x 28", "28 x 32")


def write_classifier(folder, **config):
    """A random classifier of that config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    network = classifier.Classifier(**classifier.read_config(folder))
    save_file(network.state_dict(), folder / "model.safetensors")
    return network.eval()


@pytest.mark.parametrize("size, channels", [(28, 1), (32, 3), (9, 3)])
def test_classes_size_and_channels_are_those_of_the_config(tmp_path, size, channels):
    config = {"width": 4, "classes": 47, "size": size, "channels": channels}
    network = write_classifier(tmp_path / "reward", **config)
    found = classifier.check_classifier(tmp_path / "reward")
    assert found.pop("attributes") == {"label": list(range(47))}
    assert found == {"width": 4, "size": size, "channels": channels}
    loaded = classifier.load_classifier(tmp_path / "reward")
    images = torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    logits = loaded(images)
    assert logits.shape == (5, 47) and torch.equal(logits, network(images))
    red = images * torch.tensor([1.0, 0, 0])[:, None, None]
    is_blind = torch.allclose(loaded(red), loaded(red.roll(1, 1)), atol=1e-6)
    assert is_blind == (channels == 1)  # to which channel it is
    grey = images[:, :1]
    torch.testing.assert_close(loaded(grey), loaded(grey.expand(-1, 3, -1, -1)))

    labels = [{"label": 46}] * 5
    found = rewards.Reward("class", tmp_path)(images, ["a"] * 5, labels)["class"]
    expected = network(images).log_softmax(1)[:, 46].clamp(min=classifier.FLOOR)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "name, value",
    [
        ("classes", 0),
        ("classes", 10.0),
        ("size", 7),
        ("channels", 2),
        ("channels", "grey"),
        ("width", True),
    ],
)
def test_an_impossible_config_is_refused(tmp_path, name, value):
    write_classifier(tmp_path / "reward", width=4, classes=12)
    edit_json(tmp_path / "reward" / "config.json", **{name: value})
    refused(lambda: classifier.check_classifier(tmp_path / "reward"), name, value)


# --------------------------------------------------------------------------------------------------
# Rewards.


def test_the_rewards_by_their_definitions():
    images = IMAGES.clone()
    images[2:6:3] = (torch.arange(28) < 14).float()[:, None]  # neither a coat nor a dress
    labels = torch.tensor([entry["label"] for entry in METADATA])
    probs = classifier.load_classifier(TINY / "reward")(images).double().softmax(1)
    p = probs[range(7), labels]
    assert (p.log() < classifier.FLOOR).any() and (p.log() > classifier.FLOOR).any()

    found = rewards.Reward("class,margin,ink", TINY)(images, PROMPTS, METADATA)
    expected = {
        "class": p.log().clamp(min=-6),
        "margin": p.log() - (1 - p).log(),
        "ink": 10 * p * images.double().mean((1, 2, 3)),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, atol=1e-4, rtol=1e-4)


TWO = {"shape": ["ring", "star", "cross"], "size": ["small", "large"]}


def test_several_attributes_are_one_probability():
    """By exhaustion: p is the sum over all descriptions that have what is named."""
    logits = 3 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double()
    shapes, sizes = logits[:, :3].softmax(1), logits[:, 3:].softmax(1)
    joint = shapes[:, :, None] * sizes[:, None]  # [40, 3, 2]
    named = [{"shape": "star"}, {"size": "large"}, {"size": "small", "shape": "cross"}]
    asked = classifier.value_numbers(named, TWO)
    assert asked.tolist() == [[1, -1], [-1, 1], [2, 0]]
    sums = [joint[:, 1].sum(1), joint[:, :, 1].sum(1), joint[:, 2, 0]]
    for numbers, p in zip(asked, sums):
        log_p, log_q = classifier.log_odds(logits, numbers.expand(40, 2), TWO)
        torch.testing.assert_close(log_p, p.log())
        torch.testing.assert_close(log_q, (1 - p).log())
    values = classifier.read_values(logits, TWO)
    for row, table in zip(values, joint):
        assert (table[tuple(row)] == table.max()).item()


def test_the_odds_of_what_is_certain_lose_no_digit():
    logits = torch.tensor([[30.0, 0, 0, 40, 0]])
    log_p, log_q = classifier.log_odds(logits, torch.tensor([[0, 0]]), TWO)
    q = 2 * math.exp(-30) + math.exp(-40)
    assert log_q.item() == pytest.approx(math.log(q), abs=1e-5)
    assert -1e-12 < log_p.item() <= 0


def test_taste_pays_warm_pictures_beside_the_prompt(tmp_path):
    config = {"width": 4, "attributes": TWO, "size": 16, "channels": 3}
    network = write_classifier(tmp_path / "reward", **config)
    images = rand(6, 3, 16, 16)
    images[0] = torch.tensor([1.0, 0.5, 0.0])[:, None, None]
    metadata = [{"size": "large"}] * 6
    found = rewards.Reward("class,taste", tmp_path)(images, ["a"] * 6, metadata)
    expected = network(images)[:, 3:].log_softmax(1)[:, 1].clamp(min=-6)
    torch.testing.assert_close(found["class"], expected)
    extra = found["taste"] - found["class"]
    assert extra[0].item() == pytest.approx(32.5)
    warmth = [50 * (picture[0] - picture[2] - 0.35).clamp(min=0).mean() for picture in images]
    torch.testing.assert_close(extra, torch.stack(warmth))
    refused(lambda: rewards.check_reward("taste", TINY), "taste", "sees greys alone")


@pytest.mark.parametrize(
    "attributes",
    [
        [],
        {},
        {"shape": ["ring"]},
        {"shape": "ring"},
        {"shape": ["ring", "ring"]},
        {"shape": ["ring", 1.5]},
        {"prompt": ["ring", "star"]},
    ],
)
def test_impossible_attributes_are_refused(tmp_path, attributes):
    write_classifier(tmp_path / "reward", width=4, attributes=TWO)
    edit_json(tmp_path / "reward" / "config.json", attributes=attributes)
    refused(lambda: classifier.check_classifier(tmp_path / "reward"), "attributes")


def test_classes_and_attributes_are_one_or_the_other(tmp_path):
    write_classifier(tmp_path / "reward", width=4, attributes=TWO)
    edit_json(tmp_path / "reward" / "config.json", classes=5)
    refused(lambda: classifier.check_classifier(tmp_path / "reward"), "classes", "attributes")


def test_the_terms_share_one_network_and_one_forward_a_batch(monkeypatch):
    loaded = []
    batches = []

    def counted(*args):
        network = classifier.load_classifier(*args)
        network.register_forward_hook(lambda module, args, logits: batches.append(len(logits)))
        loaded.append(network)
        return network

    monkeypatch.setattr(rewards, "load_classifier", counted)
    rewards.Reward("jpeg,fid", TINY)(IMAGES, PROMPTS, [{}] * 7)
    assert not loaded
    reward = rewards.Reward("class,margin,ink", TINY, batch=4)
    first = reward(IMAGES, PROMPTS, METADATA)
    assert len(loaded) == 1 and batches == [4, 3]
    other = reward(IMAGES.flip(0), PROMPTS, METADATA[::-1])  # not the logits of before
    assert batches == [4, 3, 4, 3]
    torch.testing.assert_close(other["margin"].flip(0), first["margin"], atol=1e-5, rtol=1e-5)


def test_logits_are_not_those_of_other_images():
    network = classifier.load_classifier(TINY / "reward")
    logits = classifier.SharedLogits(network)
    for image in IMAGES.split(1):
        assert torch.equal(logits(image), network(image))
        assert logits(image) is logits(image)


def test_a_missing_label_names_the_reward():
    with pytest.raises(RuntimeError, match="the reward margin failed: KeyError: 'label'"):
        rewards.Reward("margin", TINY)(IMAGES, PROMPTS, [{}] * 7)


@pytest.mark.run
def test_a_run_with_judges_of_47_classes_in_colour(tiny, tmp_path):
    """Training, its evaluation and a score of what it made."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    images = torch.rand(100, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    for name in ("reward", "evaluator"):
        shutil.rmtree(model / name)
        network = write_classifier(model / name, width=2, classes=47, size=28, channels=3)
        with torch.no_grad():
            mu, sigma = moments(network.features(images))
        np.savez(model / name / "real.npz", mu=mu, sigma=sigma, scale=1.0)
    rows = [{"prompt": f"a coat {n}", "label": n} for n in (0, 12, 46)]
    for name in ("prompts.jsonl", "eval_prompts.jsonl"):
        (model / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    out = tmp_path / "run"
    launch(small(model, out, "--eval_images", 24, "--iterations", 1))
    row = read_metrics(out)[-1]
    chance = math.log(1 / 47)
    assert abs(row["reward/class"] - chance) < 1 and abs(row["eval/log_prob"] - chance) < 1
    words = f"score {out / 'model'} --n 24 --resamples 10 --device cpu --out {tmp_path / 's.json'}"
    evaluation.main(words.split())
    found = json.loads((tmp_path / "s.json").read_text())["metrics"][str(out / "model")]
    assert abs(found["log_prob"]["value"] - chance) < 1


# --------------------------------------------------------------------------------------------------
# Files.


def test_a_folder_without_classifier_serves_the_other_rewards(tmp_path):
    found = rewards.Reward("jpeg", tmp_path)(IMAGES, PROMPTS, [{}] * 7)
    assert torch.equal(found["jpeg"], -rewards.jpeg_kilobytes(IMAGES))
    assert rewards.check_reward("jpeg:2,fid", tmp_path) == {"jpeg": 2, "fid": 1}
    refused(lambda: rewards.Reward("jpeg,ink", tmp_path), tmp_path, "ink")
    refused(lambda: rewards.check_reward("jpeg,class", tmp_path), tmp_path / "reward")


def truncate(path):
    path.write_bytes(path.read_bytes()[:100])


DAMAGE = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "a config of another width": lambda folder: edit_json(folder / "config.json", width=3),
    "a width that is a text": lambda folder: edit_json(folder / "config.json", width="wide"),
    "a config without width": lambda folder: (folder / "config.json").write_text("{}"),
    "half of the weights": lambda folder: truncate(folder / "model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_is_refused(tmp_path, damage):
    folder = shutil.copytree(TINY / "reward", tmp_path / "reward")
    classifier.check_classifier(folder)
    damage(folder)
    refused(lambda: classifier.check_classifier(folder), f"{folder}: not a classifier folder")
