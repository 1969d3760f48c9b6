"""CLIP's rewards against the published processor, transformers' own forward and LAION's head.

Every damaged folder or head is refused in one line that names it, and nothing in it is run.
"""

import json
import math
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from reward_helpers import (
    IMAGES,
    LOGIT_SCALE,
    METADATA,
    PROMPTS,
    SIZE,
    TINY,
    as_images,
    edit_json,
    less_than_half_a_byte,
    published,  # noqa: F401 (a fixture)
    rand,
    refused,
    save_clip,
)
from safetensors.torch import load_file, save_file
from torch import nn

import rewards
from rewards import clip

# ruff: noqa: F811 (arguments named like the fixture)

L14 = "openai/clip-vit-large-patch14"
PICK = "yuvalkirstain/PickScore_v1"


def score(spec, images=IMAGES, prompts=PROMPTS, metadata=METADATA):
    """The values of a reward of one term."""
    (values,) = rewards.Reward(spec, TINY)(images, prompts, metadata).values()
    return values


def noise_on_a_slope(*shape, seed):
    """uint8 [B, H, W, 3]: all frequencies, and neither flat nor white."""
    slope = np.linspace(0, 150, shape[1])[:, None, None] * np.linspace(0, 1, shape[2])[:, None]
    noise = np.random.default_rng(seed).integers(0, 106, shape)
    return (noise + slope).astype(np.uint8)


# --------------------------------------------------------------------------------------------------
# Images as the published processor prepares them.


@pytest.mark.parametrize(
    "height, width, size", [(28, 28, 32), (32, 32, 32), (64, 41, 32), (17, 50, 21), (200, 90, 21)]
)
def test_pixels_are_those_of_the_published_processor(height, width, size):
    """Pillow rounds to bytes between the two directions and torch does not.

    So a pixel may be a byte off, and in noise two or three.
    """
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    mean = torch.tensor(processor.image_mean)
    std = torch.tensor(processor.image_std)
    array = noise_on_a_slope(2, height, width, 3, seed=height)
    pictures = [Image.fromarray(picture) for picture in array]
    expected = processor(images=pictures, return_tensors="pt").pixel_values

    found = clip.clip_pixels(as_images(array), size, mean, std)
    assert found.shape == expected.shape == (2, 3, size, size)
    difference = (found - expected).abs() * std[:, None, None] * 255
    assert difference.max() < 3.01 and difference.mean() < 0.35
    near = as_images(array) + less_than_half_a_byte(2, 3, height, width)
    assert torch.equal(clip.clip_pixels(near, size, mean, std), found)


def test_pixels_outside_of_the_range_are_its_ends():
    def prepared(images, size):
        return clip.clip_pixels(images, size, torch.zeros(3), torch.ones(3))

    wide = 2 * rand(2, 3, 40, 30) - 0.5
    assert torch.equal(prepared(wide, 8), prepared(wide.clamp(0, 1), 8))
    edge = torch.zeros(1, 3, 16, 16)
    edge[..., 8:] = 1  # bicubic overshoots at an edge, bytes do not
    assert prepared(edge, 32).min() >= 0 and prepared(edge, 32).max() <= 1


def test_the_processors_own_mean_and_std_are_used(published, tmp_path):
    """In the file that older folders have, whose sizes are single numbers."""
    folder = shutil.copytree(published.folder, tmp_path / "clip")
    (folder / "processor_config.json").unlink()
    settings = {
        "crop_size": SIZE,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "resample": 3,
        "size": SIZE,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.6, 0.7],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    rewards.check_reward(f"clip:{folder}", TINY)
    network = clip.Clip(folder)
    assert network.mean.tolist() == pytest.approx(settings["image_mean"])
    assert network.std.tolist() == pytest.approx(settings["image_std"])


# --------------------------------------------------------------------------------------------------
# Scores by their formulas, with transformers' own forward.


def forward(published, prompts=PROMPTS, images=IMAGES, by_processor=False):
    """CLIPModel's whole forward of the pairs; the pixels are ours or the published processor's."""
    import transformers

    processor = transformers.CLIPProcessor.from_pretrained(published.folder)
    prepare = processor.image_processor
    if by_processor:
        array = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        pictures = [Image.fromarray(picture) for picture in array]
        pixels = prepare(images=pictures, return_tensors="pt").pixel_values
    else:
        mean = torch.tensor(prepare.image_mean)
        pixels = clip.clip_pixels(images, SIZE, mean, torch.tensor(prepare.image_std))
    tokens = processor.tokenizer(
        prompts, padding=True, truncation=True, max_length=8, return_tensors="pt"
    )
    with torch.no_grad():
        return published.network(pixel_values=pixels, **tokens)


def test_clip_is_a_hundred_cosines(published):
    out = forward(published)
    cosine = (out.image_embeds * out.text_embeds).sum(1)
    assert cosine.std() > 0.01 and (cosine < 0).any()  # not cut off at 0
    found = score(published.clip)
    torch.testing.assert_close(found, 100 * cosine, atol=1e-3, rtol=1e-5)
    logits = forward(published, by_processor=True).logits_per_image.diagonal()
    by_processor = 100 / math.exp(LOGIT_SCALE) * logits
    assert (found - by_processor).abs().max() < 0.05 * by_processor.std()


def test_pickscore_is_the_logit_over_26(published):
    logits = forward(published).logits_per_image.diagonal()
    torch.testing.assert_close(score(published.pickscore), logits / 26, atol=1e-5, rtol=1e-5)


def test_bfloat16_pictures_are_scored_in_float32(published):
    images = IMAGES.bfloat16()
    assert torch.equal(score(published.clip, images), score(published.clip, images.float()))


def test_a_long_text_is_cut_off_and_keeps_its_end_token(published):
    text = "a dark coat and a light bag and a grey sandal and a dress"
    alone = score(published.clip, IMAGES[:1], [text], METADATA[:1])
    logits = forward(published, [text], IMAGES[:1]).logits_per_image.diagonal()
    cosine = logits / math.exp(LOGIT_SCALE)
    torch.testing.assert_close(alone, 100 * cosine, atol=1e-3, rtol=1e-5)
    longer = score(published.clip, IMAGES[:1], [text + " and a boot"], METADATA[:1])
    assert torch.equal(alone, longer)


def test_the_terms_share_one_frozen_float32_network(published):
    spec = f"{published.clip},{published.pickscore},{published.aesthetic}"
    reward = rewards.Reward(spec, TINY)
    (network,) = {term.clip.network for term in reward.terms.values()}
    assert not network.training
    for parameter in network.parameters():
        assert parameter.dtype == torch.float32 and not parameter.requires_grad


def test_a_text_is_embedded_once_and_in_batches_of_one_length(published, monkeypatch):
    reward = rewards.Reward(f"{published.clip},{published.pickscore}", TINY, batch=2)
    network = reward.terms["clip"].clip.network
    embed = network.get_text_features
    sizes = []

    def counted(input_ids, **more):
        sizes.append(len(input_ids))
        assert input_ids.shape[1] == 8  # whatever the other texts are
        return embed(input_ids=input_ids, **more)

    monkeypatch.setattr(network, "get_text_features", counted)
    first = reward(IMAGES, PROMPTS, METADATA)
    assert sum(sizes) == 6 and max(sizes) == 2  # six different texts
    sizes.clear()
    again = reward(IMAGES, PROMPTS, METADATA)
    assert not sizes and all(torch.equal(first[name], again[name]) for name in first)
    reward(IMAGES, [*PROMPTS[:6], "a new one"], METADATA)
    assert sizes == [1]


# --------------------------------------------------------------------------------------------------
# Which files are read, and what may be wrong with them.


@pytest.fixture
def hub(published, monkeypatch):
    """Every hub id leads to the folder of `published` -> list of (class, hub id) asked for."""
    import transformers

    asked = []

    def redirect(name):
        owner = getattr(transformers, name)
        original = owner.from_pretrained

        def from_pretrained(source, *args, **options):
            asked.append((name, str(source)))
            return original(published.folder, *args, **options)

        monkeypatch.setattr(owner, "from_pretrained", from_pretrained)

    for name in ("AutoConfig", "CLIPTokenizer", "CLIPImageProcessorPil", "CLIPModel"):
        redirect(name)
    return asked


@pytest.mark.parametrize(
    "spec, model, words",
    [
        ("clip", L14, L14),
        ("pickscore", PICK, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ("aesthetic:{head}", L14, L14),
        ("pickscore:me/mine", "me/mine", "me/mine"),
    ],
)
def test_the_published_models_are_asked_for(published, hub, spec, model, words):
    spec = spec.format(head=published.pth)
    rewards.check_reward(spec, TINY)
    configs = [("AutoConfig", model), ("CLIPTokenizer", words), ("CLIPImageProcessorPil", words)]
    assert hub == configs  # and no weight
    rewards.Reward(spec, TINY)
    assert hub == [*configs, *configs, ("CLIPModel", model)]


def without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def edit_processor(folder, **changes):
    """Changes what processor_config.json says of images."""
    path = folder / "processor_config.json"
    content = json.loads(path.read_text())
    edit_json(path, image_processor=content["image_processor"] | changes)


DAMAGE = {
    "no folder": (shutil.rmtree, ""),
    "another network": (
        lambda folder: edit_json(folder / "config.json", model_type="dinov2"),
        "dinov2",
    ),
    "no tokenizer": (without_tokenizer, "tokenizer"),
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), ""),
    "another resize": (lambda folder: edit_processor(folder, resample=2), "bicubic"),
    "another crop": (
        lambda folder: edit_processor(folder, crop_size={"height": SIZE, "width": 8}),
        SIZE,
    ),
    "no square": (
        lambda folder: edit_processor(folder, size={"height": SIZE, "width": SIZE}),
        SIZE,
    ),
}


@pytest.mark.parametrize("damage, naming", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_is_refused_before_weights_are_read(published, tmp_path, damage, naming):
    folder = shutil.copytree(published.folder, tmp_path / "clip")
    (folder / "model.safetensors").write_bytes(b"")
    assert rewards.check_reward(f"clip:{folder}", TINY) == {"clip": 1}
    damage(folder)
    refused(lambda: rewards.check_reward(f"jpeg,clip:{folder}:2", TINY), "--reward clip:", naming)


def test_an_unknown_hub_id_is_refused():
    spec = "clip:no/such-model"
    refused(lambda: rewards.check_reward(spec, TINY), f"--reward {spec}")


def test_a_clip_without_all_of_its_weights_is_refused(published, tmp_path):
    folder = shutil.copytree(published.folder, tmp_path / "clip")
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["text_projection.weight"]
    save_file(weights, file, {"format": "pt"})
    refused(lambda: clip.Clip(folder), folder, "text_projection.weight")
    file.write_bytes(b"{")
    refused(lambda: clip.Clip(folder), f"{folder}: this CLIP cannot be loaded")


# --------------------------------------------------------------------------------------------------
# The aesthetic head.


def test_the_aesthetic_score_is_the_published_head_on_the_embedding(published):
    with torch.no_grad():
        expected = published.head(forward(published).image_embeds)[:, 0]
    assert expected.std() > 0.01
    for file in (published.pth, published.safetensors):
        found = score(f"aesthetic:{file}@{published.folder}")
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    without_prompts = score(published.aesthetic, prompts=["?"] * 7, metadata=[{}] * 7)
    assert torch.equal(without_prompts, score(published.aesthetic))


def test_a_head_of_older_or_smaller_files_is_read(published, tmp_path):
    state = published.head.state_dict()
    whole = clip.load_head(published.pth)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old = clip.load_head(tmp_path / "old.pth")
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pth")
    half = clip.load_head(tmp_path / "half.pth")
    for name, value in whole.state_dict().items():
        assert torch.equal(old.state_dict()[name], value)
        assert half.state_dict()[name].dtype == torch.float32
        torch.testing.assert_close(half.state_dict()[name], value, atol=1e-3, rtol=1e-3)


def write_wrong_heads(folder, state):
    """Writes files that are no head -> {file: what its refusal names}."""
    narrow = {"layers.2.weight": torch.zeros(64, 1024)}
    nan = {"layers.0.bias": torch.full((1024,), float("nan"))}
    short = {name: value for name, value in state.items() if name != "layers.7.bias"}
    torch.save(state | narrow, folder / "narrow.pth")
    torch.save(state | nan, folder / "nan.pth")
    torch.save(short, folder / "short.pth")
    torch.save(state | {"layers.9.weight": torch.zeros(1)}, folder / "long.pth")
    torch.save(list(state.values()), folder / "list.pth")
    torch.save({name: "text" for name in state}, folder / "words.pth")
    (folder / "text.pth").write_text("a page that says that there is no such file")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "cut.pth").write_bytes((folder / "long.pth").read_bytes()[:5000])
    torch.jit.script(nn.Linear(2, 2)).save(folder / "script.pth")
    (folder / "folder.pth").mkdir()
    return {
        "narrow.pth": "layers.2.weight is [64, 1024], and [128, 1024]",
        "nan.pth": "layers.0.bias is not finite",
        "short.pth": "layers.7.bias is None",
        "long.pth": "layers.9.weight",
        "list.pth": "layers.0.weight",
        "words.pth": "layers.0.weight",
        "text.pth": "LAION",
        "empty.safetensors": "LAION",
        "cut.pth": "LAION",
        "script.pth": "LAION",
        "folder.pth": "is no regular file but a folder",
        "none.pth": "no such file",
    }


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
def test_a_file_that_is_no_head_is_refused(published, tmp_path):
    wrong_heads = write_wrong_heads(tmp_path, dict(published.head.state_dict()))
    for name, naming in wrong_heads.items():
        file = tmp_path / name
        refused(lambda: clip.load_head(file), file, naming)  # noqa: B023
    spec = f"aesthetic:{file}@{published.folder}"
    refused(lambda: rewards.check_reward(spec, TINY), f"--reward aesthetic:{file}: ", naming)


class Trap:
    """What a trusting reader runs: it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch", "old torch", "pickle", "among the tensors"])
def test_a_head_that_would_run_code_is_refused_and_not_run(published, tmp_path, how):
    head = tmp_path / "head.pth"
    marker = tmp_path / "marker"
    content = Trap(marker)
    if how == "among the tensors":
        content = published.head.state_dict() | {"layers.0.weight": Trap(marker)}
    if how == "pickle":
        head.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, head, _use_new_zipfile_serialization=how != "old torch")
    spec = f"aesthetic:{head}@{published.folder}"
    refused(lambda: rewards.check_reward(spec, TINY), head, "nothing in it was run")
    refused(lambda: rewards.Reward(spec, TINY), head)
    assert not marker.exists()

    # The trap is armed: a trusting reader falls into it.
    if how == "pickle":
        pickle.loads(head.read_bytes())
    else:
        torch.load(head, weights_only=False)
    assert marker.is_dir()


def test_a_clip_of_other_dimensions_is_refused_for_the_head(published, tmp_path):
    folder = save_clip(tmp_path / "clip", projection=64)
    spec = f"aesthetic:{published.pth}@{folder}"
    refused(lambda: rewards.check_reward(spec, TINY), folder, "64", "768")
    assert rewards.check_reward(f"clip:{folder}", TINY) == {"clip": 1}
