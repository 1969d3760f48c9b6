"""Rewards by name: the grammar of --reward, preference models against their published formulas, JPEG sizes, one's own functions; and that
whatever is wrong with a reward is said in one line with its name, and never turned into a number."""
import io
import json
import math
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import rewards
from rewards import classifier
from rewards import clip
from conftest import ROOT, launch, read_metrics, small

TINY = ROOT / "assets" / "tiny"
SIZE = 32
PROMPTS = ["a dark coat", "photo of a shirt", "a dark coat", "a light bag", "grey sandal", "a dress", "picture of trousers"]
METADATA = [{"label": label} for label in (4, 6, 4, 8, 5, 3, 1)]
CLASSIFIED = ("class", "margin", "ink")


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


IMAGES = rand(7, 3, 28, 28) * torch.linspace(0.2, 1, 7)[:, None, None, None]


def pixels(*shape, seed=0):
    """Random bytes on a slope: all frequencies, and neither flat nor white."""
    slope = np.linspace(0, 150, shape[1])[:, None, None] * np.linspace(0, 1, shape[2])[:, None]
    return (np.random.default_rng(seed).integers(0, 106, shape) + slope).astype(np.uint8)


def as_images(array):
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255


def refused(call, *naming):
    with pytest.raises(ValueError) as caught:
        call()
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and len(line) < 1000
    for name in naming:
        assert str(name) in line
    return line


def save_clip(folder, projection=768, size=SIZE, seed=2):
    """A CLIP of random weights with the words of assets/tiny, as transformers saves one."""
    import transformers
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    text = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=8, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=size, patch_size=8)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            model.logit_scale.fill_(1.7)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    model.save_pretrained(folder)
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


class PublishedHead(nn.Module):
    """The module whose state_dict LAION published, written as it was: dropouts between, and no activation."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
            nn.Linear(64, 16), nn.Linear(16, 1))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A CLIP folder, its network loaded by transformers alone, and a head with its files."""
    import transformers
    folder = save_clip(tmp_path_factory.mktemp("clip") / "model")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        head = PublishedHead().eval()
        with torch.no_grad():                                            # the random one is nearly constant
            for parameter in head.parameters():
                parameter.mul_(2)
    pth, safe = str(folder.parent / "head.pth"), str(folder.parent / "head.safetensors")
    torch.save(head.state_dict(), pth), save_file(head.state_dict(), safe)
    return SimpleNamespace(folder=folder, model=transformers.CLIPModel.from_pretrained(folder).eval(), head=head, pth=pth, safe=safe)


def score(spec, images=IMAGES, prompts=PROMPTS, metadata=METADATA, folder=TINY, **options):
    """The values of a reward of one term."""
    found = rewards.Reward(spec, folder, **options)(images, prompts, metadata)
    assert len(found) == 1
    return next(iter(found.values()))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of one's own -> its name."""
    (tmp_path / "own_rewards.py").write_text(
        "import numpy, torch\n"
        "def brightness(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"
        "def words(images, prompts, metadata):\n    return [len(p.split()) for p in prompts]\n"
        "def label(images, prompts, metadata):\n    return numpy.array([m['label'] for m in metadata], dtype=numpy.float64)\n"
        "def fid(images, prompts, metadata):\n    return images.amax((1, 2, 3))\n"
        "def column(images, prompts, metadata):\n    return images.mean((2, 3))[:, :1]\n"
        "def few(images, prompts, metadata):\n    return torch.zeros(1)\n"
        "def hole(images, prompts, metadata):\n    return torch.tensor([1.0] * (len(images) - 1) + [float('nan')])\n"
        "def steep(images, prompts, metadata):\n    return torch.full((len(images),), 1e300, dtype=torch.float64)\n"
        "def nothing(images, prompts, metadata):\n    pass\n"
        "def broken(images, prompts, metadata):\n    return 1 / 0\n"
        "def vandal(images, prompts, metadata):\n    images.mul_(0), prompts.clear(), [m.clear() for m in metadata]\n"
        "    return torch.zeros(len(images))\n"
        "number = 5\n")
    (tmp_path / "half_written.py").write_text("def reward(:\n")
    (tmp_path / "missing_part.py").write_text("import no_such_library\n")
    (tmp_path / "explodes.py").write_text("raise RuntimeError('first line\\nsecond line')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_rewards"
    import sys
    for name in ("own_rewards", "half_written", "missing_part", "explodes"):
        sys.modules.pop(name, None)


def specs(published):
    """Every sample-wise reward, by the name that it goes by here."""
    return {**{name: name for name in CLASSIFIED}, "clip": f"clip:{published.folder}", "pickscore": f"pickscore:{published.folder}",
            "aesthetic": f"aesthetic:{published.pth}@{published.folder}", "jpeg": "jpeg", "incompressible": "incompressible",
            "brightness": "own_rewards:brightness", "words": "own_rewards:words", "label": "own_rewards:label"}


LOOKING = [*CLASSIFIED, "clip", "pickscore", "aesthetic", "jpeg", "incompressible", "brightness"]
every_reward = pytest.mark.parametrize("name", [*LOOKING, "words", "label"])


# ---------------------------------------------------------------------------------------------------------------------
# The grammar: name[:argument][:weight].

L14, PICK = "openai/clip-vit-large-patch14", "yuvalkirstain/PickScore_v1"



def test_halving_is_torchs_pooling_bit_for_bit():
    for shape in ((3, 2, 28, 28), (3, 2, 7, 7), (1, 4, 9, 6), (0, 2, 14, 14)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(classifier.Halve()(x), torch.nn.functional.max_pool2d(x, 2) if len(x) else x[..., ::2, ::2])


@pytest.mark.parametrize("spec, expected", [
    ("class", {"class": ("class", "", None, 1)}),
    ("class:1, ink:0.2", {"class": ("class", "", None, 1), "ink": ("ink", "", None, 0.2)}),
    ("jpeg:-2,incompressible", {"jpeg": ("jpeg", "", None, -2), "incompressible": ("incompressible", "", None, 1)}),
    ("clip", {"clip": ("clip", "", L14, 1)}), ("clip:.5", {"clip": ("clip", "", L14, 0.5)}), ("clip:-1e-2", {"clip": ("clip", "", L14, -0.01)}),
    ("clip:openai/clip-vit-base-patch32", {"clip": ("clip", "openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32", 1)}),
    ("clip:openai/clip-vit-base-patch32:0.5", {"clip": ("clip", "openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32", 0.5)}),
    ("clip:C:/models/clip:2", {"clip": ("clip", "C:/models/clip", "C:/models/clip", 2)}),
    ("clip:./7", {"clip": ("clip", "./7", "./7", 1)}), ("clip:7:1", {"clip": ("clip", "7", "7", 1)}),
    ("pickscore", {"pickscore": ("pickscore", "", PICK, 1)}), ("pickscore:mine:3", {"pickscore": ("pickscore", "mine", "mine", 3)}),
    ("aesthetic:head.pth:0.2", {"aesthetic": ("aesthetic", "head.pth", L14, 0.2)}), ("aesthetic:head", {"aesthetic": ("aesthetic", "head", L14, 1)}),
    ("aesthetic:a/head.pth@b/clip:2", {"aesthetic": ("aesthetic", "a/head.pth", "b/clip", 2)}),
    ("mymodule:score", {"score": ("mymodule", "score", None, 1)}), ("a.b.c:score:-3", {"score": ("a.b.c", "score", None, -3)}),
    ("a:f,b:g:2", {"f": ("a", "f", None, 1), "g": ("b", "g", None, 2)}),
    ("a:f,b:f:2", {"a:f": ("a", "f", None, 1), "b:f": ("b", "f", None, 2)}),
    ("clip,clip:b:2", {"clip": ("clip", "", L14, 1), "clip:b": ("clip", "b", "b", 2)}),
    ("m:fid,m:class", {"m:fid": ("m", "fid", None, 1), "m:class": ("m", "class", None, 1)}),
    ("fid:2,class:0.5", {"fid": ("fid", "", None, 2), "class": ("class", "", None, 0.5)})])
def test_a_mixture_is_read(spec, expected):
    found = rewards.parse_terms(spec)
    assert [*found] == [*expected]
    for key, (name, argument, model, weight) in expected.items():
        term = found[key]
        assert (term.name, term.argument, term.weight) == (name, argument, weight)
        assert model is None or term.model == model
    assert rewards.parse(spec) == {key: term.weight for key, term in found.items()}


@pytest.mark.parametrize("spec, words", [
    ("", "'' is none of class, margin, ink"), ("beauty", "'beauty' is none of"), ("beauty:1", "'beauty' is none of"), ("class,,ink", "'' is none of"),
    ("my-module:f", "'my-module' is none of"), ("my/module:f", "none of"), ("m:f.g", "none of"), ("m:f:g:1", "none of"), ("m:", "none of"),
    ("class:much", "'much' is not a number; write class:1"), ("class:", "'' is not a number"), ("class:a:1", "'a:1' is not a number"),
    ("jpeg:95:1", "'95:1' is not a number"), ("fid:x", "'x' is not a number"), ("clip:", "'' is not a number"),
    ("class:0", "class must be finite and not zero"), ("class:nan", "class must be finite"), ("clip:a:inf", "clip must be finite"),
    ("m:f:0", "m must be finite and not zero"), ("class,class:2", "'class' is named twice"), ("clip:a,clip:a:2", "'clip:a' is named twice"),
    ("m:f,m:f:2", "'m:f' is named twice"), ("aesthetic", "aesthetic needs the file of its head"), ("aesthetic:0.5", "aesthetic needs the file"),
    ("aesthetic:@clip", "aesthetic needs the file"), ("fid,kid", "fid and kid")])
def test_a_mixture_that_cannot_be_read_is_refused(spec, words):
    refused(lambda: rewards.parse(spec), f"--reward {spec}", words)
    refused(lambda: rewards.check_reward(spec, TINY), f"--reward {spec}", words)


@pytest.mark.parametrize("spec, needed", [
    ("class", True), ("jpeg,margin:2", True), ("fid,ink", True), ("fid", False), ("kid,jpeg", False), ("clip,pickscore,aesthetic:f", False),
    ("incompressible:3", False), ("m:class", False), ("ink:f", None)])
def test_labels_are_needed_by_the_classifier_s_rewards_only(spec, needed):
    if needed is None:
        refused(lambda: rewards.needs_labels(spec))
    else:
        assert rewards.needs_labels(spec) is needed


# ---------------------------------------------------------------------------------------------------------------------
# All of them.

@every_reward
def test_a_reward_is_float32_one_a_picture_and_without_gradient(own, published, name):
    reward = rewards.Reward(f"{specs(published)[name]}:-2", TINY)
    found = reward(IMAGES.clone().requires_grad_(), PROMPTS, METADATA)
    assert [*found] == [name] and reward.weights == {name: -2} and reward.distribution is None
    assert found[name].shape == (7,) and found[name].dtype == torch.float32 and not found[name].requires_grad
    assert found[name].std() > 1e-3 and torch.equal(found[name], reward(IMAGES, PROMPTS, METADATA)[name])     # unweighted, and each time the same


@every_reward
def test_a_reward_does_not_depend_on_company_and_order(own, published, name):
    spec, order = specs(published)[name], [4, 2, 6, 0, 1, 3, 5]
    whole, tolerance = score(spec), dict(atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(score(spec, IMAGES[order], [PROMPTS[i] for i in order], [METADATA[i] for i in order]), whole[order], **tolerance)
    for batch in (1, 3, 7):
        torch.testing.assert_close(score(spec, batch=batch), whole, **tolerance)
    reward = rewards.Reward(spec, TINY)
    for i in range(7):
        torch.testing.assert_close(reward(IMAGES[i:i + 1], PROMPTS[i:i + 1], METADATA[i:i + 1])[name], whole[i:i + 1], **tolerance)


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_picture_that_is_not_finite_has_no_score(own, published, name, bad):
    images = IMAGES.clone() if name in CLASSIFIED else torch.cat([IMAGES] * 2, 3)             # so wide that the middle square lacks the edge
    images[5, 1, 3, 0] = bad
    with pytest.raises(FloatingPointError, match=f"the reward {name} returned a non-finite number"):
        score(specs(published)[name], images)


def test_a_mixture_is_all_of_its_terms(own, published):
    terms = specs(published)
    reward = rewards.Reward("fid:3," + ",".join(f"{term}:2" for term in terms.values()), TINY)
    assert reward.weights == {"fid": 3, **dict.fromkeys(terms, 2)} and reward.distribution == "fid"
    found = reward(IMAGES, PROMPTS, METADATA)
    assert [*found] == [*terms]
    for name, value in found.items():
        torch.testing.assert_close(value, score(terms[name]), atol=1e-5, rtol=1e-5)


def test_pictures_prompts_and_metadata_are_as_many():
    for images, prompts, metadata in ((IMAGES, PROMPTS[:1], METADATA), (IMAGES[:1], PROMPTS, METADATA), (IMAGES, PROMPTS, METADATA[:6])):
        refused(lambda: rewards.Reward("jpeg", TINY)(images, prompts, metadata), f"{len(images)} pictures", f"{len(prompts)} prompts")


# ---------------------------------------------------------------------------------------------------------------------
# The classifier of the model folder.

def test_the_classifier_s_rewards_by_their_definitions():
    images, labels = IMAGES.clone(), torch.tensor([m["label"] for m in METADATA])
    images[2:6:3] = (torch.arange(28) < 14).float()[:, None]             # white above black: for the classifier neither a coat nor a dress
    p = classifier.load_classifier(TINY / "reward")(images).double().softmax(1)[range(7), labels]
    assert (p.log() < -6).any() and (p.log() > -6).any()
    found = {name: value.double() for name, value in rewards.Reward("class,margin,ink", TINY)(images, PROMPTS, METADATA).items()}
    torch.testing.assert_close(found["class"], p.log().clamp(min=-6), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["margin"], p.log() - (1 - p).log(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["ink"], 10 * p * images.double().mean((1, 2, 3)), atol=1e-4, rtol=1e-4)


def test_the_classifier_is_loaded_when_it_is_needed_and_once(monkeypatch):
    loads, right = [], classifier.load_classifier
    monkeypatch.setattr(classifier, "load_classifier", lambda *args: loads.append(args) or right(*args))
    reward = rewards.Reward("jpeg,fid", TINY)
    reward(IMAGES, PROMPTS, [{}] * 7)
    assert not loads
    rewards.Reward("class,margin,ink", TINY)(IMAGES, PROMPTS, METADATA)
    assert len(loads) == 1


def test_a_folder_without_classifier_serves_the_other_rewards(tmp_path):
    reward = rewards.Reward("jpeg", tmp_path)
    assert torch.equal(reward(IMAGES, PROMPTS, [{}] * 7)["jpeg"], score("jpeg"))
    refused(lambda: reward.classifier, tmp_path, "--diversity_features reward")
    refused(lambda: rewards.Reward("jpeg,ink", tmp_path), tmp_path, "ink")
    assert rewards.check_reward("jpeg:2,fid", tmp_path) == {"jpeg": 2, "fid": 1}
    for name in CLASSIFIED:
        refused(lambda: rewards.check_reward(f"jpeg,{name}", tmp_path), tmp_path / "reward")
    assert rewards.check_reward("class,jpeg:2", TINY) == {"class": 1, "jpeg": 2}


def test_a_missing_label_names_the_reward():
    with pytest.raises(RuntimeError, match="the reward margin failed: KeyError: 'label'"):
        score("margin", metadata=[{}] * 7)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP: the pictures as the published processor prepares them.

@pytest.mark.parametrize("height, width", [(28, 28), (32, 32), (33, 32), (64, 40), (40, 65), (128, 128), (200, 90), (17, 50), (31, 100)])
@pytest.mark.parametrize("size", [32, 21])
def test_pixels_are_those_of_the_published_processor(height, width, size):
    """Pillow rounds to bytes between the two directions and torch does not, so a pixel may be a byte off, and in noise two or three."""
    from transformers import CLIPImageProcessorPil
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    array, mean, std = pixels(2, height, width, 3, seed=height), torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    expected = processor(images=[Image.fromarray(a) for a in array], return_tensors="pt").pixel_values
    found = clip.clip_pixels(as_images(array), size, mean, std)
    assert found.shape == expected.shape == (2, 3, size, size)
    difference = (found - expected).abs() * std[:, None, None] * 255
    assert difference.max() < 3.01 and difference.mean() < 0.35
    off = (rand(2, 3, height, width) - 0.5) * 0.98 / 255                 # of a byte: less than half, so there is one right answer
    assert torch.equal(clip.clip_pixels(as_images(array) + off, size, mean, std), found)


def test_pixels_outside_of_the_range_are_its_ends():
    mean, std = torch.zeros(3), torch.ones(3)
    found = clip.clip_pixels(torch.tensor([-0.3, 1.3])[:, None, None, None].expand(2, 3, 40, 30), 8, mean, std)
    assert found[0].unique().tolist() == [0] and found[1].unique().tolist() == [1]
    wide = 2 * rand(2, 3, 40, 30) - 0.5
    assert torch.equal(clip.clip_pixels(wide, 8, mean, std), clip.clip_pixels(wide.clamp(0, 1), 8, mean, std))
    edge = torch.zeros(1, 3, 16, 16)
    edge[..., 8:] = 1                                                    # bicubic overshoots at an edge, bytes do not
    assert 0 <= clip.clip_pixels(edge, 32, mean, std).min() and clip.clip_pixels(edge, 32, mean, std).max() <= 1


def test_the_processor_s_own_mean_and_std_are_used(published, tmp_path):
    """In the file that older folders have, whose sizes are single numbers."""
    folder = shutil.copytree(published.folder, tmp_path / "clip")
    (folder / "processor_config.json").unlink()
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "crop_size": SIZE, "do_center_crop": True, "do_normalize": True, "do_resize": True, "feature_extractor_type": "CLIPFeatureExtractor",
        "resample": 3, "size": SIZE, **statistics}))
    rewards.check_reward(f"clip:{folder}", TINY)
    judge = clip.Clip(folder)
    assert judge.mean.tolist() == pytest.approx(statistics["image_mean"]) and judge.std.tolist() == pytest.approx(statistics["image_std"])
    assert (score(f"clip:{folder}") - score(f"clip:{published.folder}")).abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# CLIP: scores by their formulas, with transformers' own forward.

def forward(published, images=IMAGES, prompts=PROMPTS, processor_pixels=False):
    """CLIPModel's whole forward of the pairs; the pixels are ours or the published processor's."""
    import transformers
    processor = transformers.CLIPProcessor.from_pretrained(published.folder)
    array = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    ours = clip.clip_pixels(images, SIZE, torch.tensor(processor.image_processor.image_mean), torch.tensor(processor.image_processor.image_std))
    theirs = processor.image_processor(images=[Image.fromarray(a) for a in array], return_tensors="pt").pixel_values
    tokens = processor.tokenizer(prompts, padding=True, truncation=True, max_length=8, return_tensors="pt")
    with torch.no_grad():
        return published.model(pixel_values=theirs if processor_pixels else ours, **tokens)


def test_clip_is_a_hundred_cosines(published):
    out = forward(published)
    cosine = (out.image_embeds * out.text_embeds).sum(1)
    assert cosine.std() > 0.01 and (cosine < 0).any()                    # not cut off at 0
    torch.testing.assert_close(score(f"clip:{published.folder}"), 100 * cosine, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(score(f"clip:{published.folder}"), 100 / math.exp(1.7) * out.logits_per_image.diagonal(), atol=1e-3, rtol=1e-5)
    rounded = 100 / math.exp(1.7) * forward(published, processor_pixels=True).logits_per_image.diagonal()
    assert (score(f"clip:{published.folder}") - rounded).abs().max() < 0.05 * rounded.std()


def test_pickscore_is_the_logit_over_26(published):
    out = forward(published)
    torch.testing.assert_close(score(f"pickscore:{published.folder}"), out.logits_per_image.diagonal() / 26, atol=1e-5, rtol=1e-5)


def test_bfloat16_pictures_are_scored_in_float32(published):
    images = IMAGES.bfloat16()
    torch.testing.assert_close(score(f"clip:{published.folder}", images), score(f"clip:{published.folder}", images.float()))


def test_a_text_is_embedded_once_and_in_batches(published, monkeypatch):
    made, seen, right = [], [], clip.Clip
    monkeypatch.setattr(clip, "Clip", lambda *args: made.append(right(*args)) or made[-1])
    reward = rewards.Reward(f"clip:{published.folder},pickscore:{published.folder}", TINY, batch=2)
    judge = made[0]
    texts, pictures = judge.network.get_text_features, judge.network.get_image_features
    monkeypatch.setattr(judge.network, "get_text_features", lambda **k: seen.append(("text", len(k["input_ids"]))) or texts(**k))
    monkeypatch.setattr(judge.network, "get_image_features", lambda **k: seen.append(("picture", len(k["pixel_values"]))) or pictures(**k))
    first = reward(IMAGES, PROMPTS, METADATA)
    texts_seen = [n for kind, n in seen if kind == "text"]
    assert sum(texts_seen) == 6 and max(texts_seen) == 2                 # six different texts
    assert [n for kind, n in seen if kind == "picture"] == [2, 2, 2, 2, 2, 2, 1, 1]           # for each of two terms
    seen.clear()
    again = reward(IMAGES, PROMPTS, METADATA)
    assert all(kind == "picture" for kind, _ in seen) and all(torch.equal(first[name], again[name]) for name in first)
    reward(IMAGES, PROMPTS[:6] + ["a new one"], METADATA)
    assert [n for kind, n in seen if kind == "text"] == [1]


def test_a_long_text_is_cut_and_keeps_its_end(published):
    long = "a dark coat and a light bag and a grey sandal and a dress"
    alone = score(f"clip:{published.folder}", IMAGES[:1], [long], METADATA[:1])
    cosine = forward(published, IMAGES[:1], [long]).logits_per_image.diagonal() * 100 / math.exp(1.7)
    torch.testing.assert_close(alone, cosine, atol=1e-3, rtol=1e-5)
    other = score(f"clip:{published.folder}", IMAGES[:1], [long + " and a boot"], METADATA[:1])
    assert torch.equal(alone, other)


def test_the_clip_is_frozen_float32_and_shared(published, monkeypatch):
    made, right = [], clip.Clip
    monkeypatch.setattr(clip, "Clip", lambda *args: made.append(right(*args)) or made[-1])
    rewards.Reward(f"clip:{published.folder},pickscore:{published.folder},aesthetic:{published.pth}@{published.folder}", TINY)
    assert len(made) == 1
    network = made[0].network
    assert not network.training and all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters())


@pytest.fixture
def hub(published, monkeypatch):
    """Every hub id leads to the folder of `published` -> the list of (what was asked for, hub id)."""
    import transformers
    asked = []
    for name in ("AutoConfig", "CLIPTokenizer", "CLIPImageProcessorPil", "CLIPModel"):
        owner = getattr(transformers, name)
        right = owner.from_pretrained
        monkeypatch.setattr(owner, "from_pretrained", lambda source, *args, name=name, right=right, **options:
                            asked.append((name, str(source))) or right(published.folder, *args, **options))
    return asked


@pytest.mark.parametrize("spec, model, words", [
    ("clip", L14, L14), ("pickscore", PICK, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"), ("aesthetic:{head}", L14, L14),
    ("pickscore:me/mine", "me/mine", "me/mine")])
def test_the_published_models_are_asked_for(published, hub, spec, model, words):
    spec = spec.format(head=published.pth)
    rewards.check_reward(spec, TINY)
    read = [("AutoConfig", model), ("CLIPTokenizer", words), ("CLIPImageProcessorPil", words)]
    assert hub == read                                                   # and no weight
    rewards.Reward(spec, TINY)
    assert hub == [*read, *read, ("CLIPModel", model)]


def edit(folder, file, **changes):
    path = folder / file
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def processor_config(folder, **changes):
    path = folder / "processor_config.json"
    content = json.loads(path.read_text())
    content["image_processor"].update(changes)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["clip", "pickscore", "aesthetic"])
@pytest.mark.parametrize("damage, naming", [
    (shutil.rmtree, ""), (lambda f: (f / "config.json").unlink(), ""), (lambda f: (f / "config.json").write_text("{"), ""),
    (lambda f: edit(f, "config.json", model_type="dinov2"), "dinov2"), (lambda f: edit(f, "config.json", model_type="nothing"), ""),
    (lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    (lambda f: (f / "processor_config.json").unlink(), ""), (lambda f: processor_config(f, resample=2), "bicubic"),
    (lambda f: processor_config(f, size={"shortest_edge": 40}), f"{SIZE}"), (lambda f: processor_config(f, crop_size={"height": SIZE, "width": 8}), f"{SIZE}"),
    (lambda f: processor_config(f, size={"height": SIZE, "width": SIZE}), f"{SIZE}")])
def test_a_broken_clip_folder_is_refused_before_weights_are_read(published, tmp_path, name, damage, naming):
    folder = shutil.copytree(published.folder, tmp_path / "clip")
    spec = f"aesthetic:{published.pth}@{folder}" if name == "aesthetic" else f"{name}:{folder}"
    (folder / "model.safetensors").write_bytes(b"")
    assert [*rewards.check_reward(spec, TINY)] == [name]
    damage(folder)
    refused(lambda: rewards.check_reward(f"jpeg,{spec}:2", TINY), f"--reward {name}:", naming)


def test_an_unknown_hub_id_is_refused():
    refused(lambda: rewards.check_reward("clip:no/such-model", TINY), "--reward clip:no/such-model")


def test_a_clip_without_all_of_its_weights_is_refused(published, tmp_path):
    folder = shutil.copytree(published.folder, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(lambda: rewards.Reward(f"clip:{folder}", TINY), folder, "text_projection.weight")
    for spoil in (lambda path: path.write_bytes(b"{"), lambda path: path.unlink()):             # each makes transformers raise another error
        spoil(folder / "model.safetensors")
        refused(lambda: rewards.Reward(f"clip:{folder}", TINY), f"{folder}: this CLIP cannot be loaded")


# ---------------------------------------------------------------------------------------------------------------------
# The aesthetic score.

@pytest.mark.parametrize("file", ["pth", "safe"])
def test_the_aesthetic_score_is_the_published_head_on_the_embedding(published, file):
    with torch.no_grad():
        expected = published.head(forward(published).image_embeds)[:, 0]
    found = score(f"aesthetic:{getattr(published, file)}@{published.folder}")
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_aesthetic_score_sees_no_prompt(published):
    spec = f"aesthetic:{published.pth}@{published.folder}"
    assert torch.equal(score(spec), score(spec, prompts=["?"] * 7, metadata=[{}] * 7))


def test_a_head_of_older_or_smaller_files_is_read(published, tmp_path):
    state = published.head.state_dict()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pth")
    for name, tolerance in (("old.pth", 0), ("half.pth", 1e-2)):
        spec = f"aesthetic:{tmp_path / name}@{published.folder}"
        rewards.check_reward(spec, TINY)
        torch.testing.assert_close(score(spec), score(f"aesthetic:{published.pth}@{published.folder}"), atol=tolerance, rtol=tolerance)


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def wrong_heads(tmp_path, state):
    """name of a file that is no head -> what its refusal names."""
    other = {name: value for name, value in state.items()}
    torch.save(other | {"layers.2.weight": torch.zeros(64, 1024)}, tmp_path / "narrow.pth")
    torch.save({name: value for name, value in other.items() if name != "layers.7.bias"}, tmp_path / "short.pth")
    torch.save(other | {"layers.9.weight": torch.zeros(1)}, tmp_path / "long.pth")
    torch.save({"state_dict": other}, tmp_path / "wrapped.pth")
    torch.save([*other.values()], tmp_path / "list.pth")
    torch.save({name: "text" for name in other}, tmp_path / "words.pth")
    torch.save(other | {"layers.0.bias": torch.full((1024,), float("nan"))}, tmp_path / "nan.pth")
    save_file({"layers.0.weight": torch.zeros(2, 2)}, tmp_path / "small.safetensors")
    (tmp_path / "text.pth").write_text("a page that says that there is no such file")
    (tmp_path / "empty.pth").write_bytes(b""), (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save(other, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:5000])
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pth")
    (tmp_path / "folder.pth").mkdir()
    return {"narrow.pth": "layers.2.weight is [64, 1024], and [128, 1024]", "short.pth": "layers.7.bias", "long.pth": "layers.9.weight",
            "wrapped.pth": "layers.0.weight", "list.pth": "layers.0.weight", "words.pth": "layers.0.weight", "nan.pth": "not finite",
            "small.safetensors": "layers.0.weight is [2, 2]", "text.pth": "LAION", "empty.pth": "LAION", "empty.safetensors": "LAION",
            "cut.pth": "LAION", "script.pth": "LAION", "folder.pth": "no such file", "none.pth": "no such file", "none.safetensors": "no such file"}


def test_a_file_that_is_no_head_is_refused(published, tmp_path):
    for name, naming in wrong_heads(tmp_path, published.head.state_dict()).items():
        spec = f"aesthetic:{tmp_path / name}@{published.folder}"
        refused(lambda: rewards.check_reward(spec, TINY), f"--reward aesthetic:{tmp_path / name}: ", naming)
        refused(lambda: rewards.Reward(spec, TINY), tmp_path / name, naming)


@pytest.mark.parametrize("how", ["torch", "old torch", "pickle", "in the tensors", "safetensors"])
def test_a_head_that_would_run_code_is_refused_and_not_run(published, tmp_path, how):
    head, marker = tmp_path / ("head.safetensors" if how == "safetensors" else "head.pth"), tmp_path / "marker"
    content = published.head.state_dict() | {"layers.0.weight": Hostile(marker)} if how == "in the tensors" else Hostile(marker)
    if how in ("pickle", "safetensors"):
        head.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, head, _use_new_zipfile_serialization=how != "old torch")
    spec = f"aesthetic:{head}@{published.folder}"
    refused(lambda: rewards.check_reward(spec, TINY), head, "nothing in it was run")
    refused(lambda: rewards.Reward(spec, TINY), head)
    assert not marker.exists()
    if how != "safetensors":                                             # the trap is armed: a trusting reader falls into it
        torch.load(head, weights_only=False) if how != "pickle" else pickle.loads(head.read_bytes())
        assert marker.is_dir()


def test_a_clip_of_other_dimensions_is_refused_for_the_head(published, tmp_path):
    folder = save_clip(tmp_path / "clip", projection=64)
    refused(lambda: rewards.check_reward(f"aesthetic:{published.pth}@{folder}", TINY), folder, "64", "768")
    assert rewards.check_reward(f"clip:{folder}", TINY) == {"clip": 1}


# ---------------------------------------------------------------------------------------------------------------------
# JPEG.

def test_jpeg_is_the_size_of_the_file():
    array = np.concatenate([pixels(3, 40, 24, 3), np.full((1, 40, 24, 3), 77, np.uint8)])
    sizes = []
    for a in array:
        file = io.BytesIO()
        Image.fromarray(a).save(file, format="JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    images = as_images(array)
    assert score("incompressible", images, PROMPTS[:4], METADATA[:4]).tolist() == pytest.approx(sizes, rel=1e-6)
    assert score("jpeg", images, PROMPTS[:4], METADATA[:4]).tolist() == pytest.approx([-size for size in sizes], rel=1e-6)
    off = (rand(*images.shape) - 0.5) * 0.98 / 255                       # the nearest bytes, at both ends too
    assert score("jpeg", images + off, PROMPTS[:4], METADATA[:4]).tolist() == pytest.approx([-size for size in sizes], rel=1e-6)
    wide = 2 * rand(2, 3, 40, 24) - 0.5
    assert torch.equal(score("jpeg", wide, PROMPTS[:2], METADATA[:2]), score("jpeg", wide.clamp(0, 1), PROMPTS[:2], METADATA[:2]))


def test_noise_is_less_compressible_than_a_slope_and_that_than_nothing():
    images = torch.stack([torch.full((3, 64, 64), 0.5), torch.linspace(0, 1, 64).expand(3, 64, 64), rand(3, 64, 64)])
    flat, slope, noise = score("jpeg", images, PROMPTS[:3], METADATA[:3]).tolist()
    assert 0 > flat > slope > noise and noise < 3 * flat


# ---------------------------------------------------------------------------------------------------------------------
# One's own.

def test_a_function_of_one_s_own(own):
    torch.testing.assert_close(score(f"{own}:brightness"), IMAGES.mean((1, 2, 3)))
    assert score(f"{own}:words").tolist() == [len(prompt.split()) for prompt in PROMPTS]
    assert score(f"{own}:label").tolist() == [m["label"] for m in METADATA]
    assert rewards.check_reward(f"{own}:brightness:0.5,jpeg", "") == {"brightness": 0.5, "jpeg": 1}


def test_a_function_with_the_name_of_a_reward_is_not_taken_for_it(own):
    reward = rewards.Reward(f"{own}:fid,jpeg", TINY)
    assert reward.distribution is None and [*reward(IMAGES, PROMPTS, METADATA)] == [f"{own}:fid", "jpeg"]
    torch.testing.assert_close(reward(IMAGES, PROMPTS, METADATA)[f"{own}:fid"], IMAGES.amax((1, 2, 3)))


def test_a_function_that_writes_on_its_arguments_spoils_nothing(own):
    images, prompts, metadata = IMAGES.clone(), [*PROMPTS], [dict(m) for m in METADATA]
    found = rewards.Reward(f"{own}:vandal,{own}:brightness,{own}:label", TINY)(images, prompts, metadata)
    assert torch.equal(images, IMAGES) and prompts == PROMPTS and metadata == METADATA
    assert torch.equal(found["brightness"], IMAGES.mean((1, 2, 3))) and found["label"].tolist() == [m["label"] for m in METADATA]


@pytest.mark.parametrize("name, error, words", [
    ("column", FloatingPointError, r"the reward column returned the shape \(7, 1\) for 7 pictures"),
    ("few", FloatingPointError, r"the reward few returned the shape \(1,\) for 7 pictures"),
    ("hole", FloatingPointError, "the reward hole returned a non-finite number"),
    ("steep", FloatingPointError, "the reward steep returned a non-finite number"),
    ("nothing", RuntimeError, "the reward nothing failed"), ("broken", RuntimeError, "the reward broken failed: ZeroDivisionError: division by zero")])
def test_a_function_that_fails_is_named(own, name, error, words):
    with pytest.raises(error, match=words) as caught:
        score(f"jpeg,{own}:{name}")
    assert name != "broken" or isinstance(caught.value.__cause__, ZeroDivisionError)          # with the line of the user's file


@pytest.mark.parametrize("spec, naming", [
    ("no_such_module:f", "no_such_module"), ("own_rewards:missing", "missing"), ("own_rewards:number", "number is not a function"),
    ("half_written:reward", ""), ("missing_part:reward", "no_such_library"), ("explodes:f", "first line"), ("json.no_such:f", "json")])
def test_a_function_that_cannot_be_had_is_refused(own, spec, naming):
    line = refused(lambda: rewards.check_reward(f"jpeg,{spec}:0.5", TINY), f"--reward {spec}: ", naming)
    assert "second line" not in line


# ---------------------------------------------------------------------------------------------------------------------
# In a run.

def test_a_run_with_one_s_own_reward_and_jpeg(own, tiny, tmp_path):
    launch(small(tiny, tmp_path / "run", "--reward", f"{own}:brightness,jpeg:0.5,class:0.1", "--iterations", 1))
    row = read_metrics(tmp_path / "run")[-1]
    assert row["reward"] == pytest.approx(row["reward/brightness"] + 0.5 * row["reward/jpeg"] + 0.1 * row["reward/class"], rel=1e-5)
    assert 0 < row["reward/brightness"] < 1 and -3 < row["reward/jpeg"] < -0.3


def test_a_run_stops_at_a_reward_that_fails(own, tiny, tmp_path):
    with pytest.raises(RuntimeError, match="the reward broken failed: ZeroDivisionError"):
        launch(small(tiny, tmp_path / "broken", "--reward", f"{own}:broken,class"))
    with pytest.raises(FloatingPointError, match="iteration 1, process 0: the reward hole returned a non-finite number"):
        launch(small(tiny, tmp_path / "hole", "--reward", f"{own}:hole,class"))
    assert not [*tmp_path.glob("*/checkpoint-*"), *tmp_path.glob("*/model")]
