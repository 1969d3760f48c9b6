"""Feature networks against what they are published as, and specs that cannot be loaded."""

import json
import math
import os
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reward_helpers import TINY, as_images, less_than_half_a_byte, noise, rand, refused

from dist_reward import frechet_distance, moments
from rewards.classifier import load_classifier
from rewards.features import (
    Components,
    check_features,
    corner_bilinear,
    load_features,
    own_numbers,
    pixels,
    principal_components,
)
from rewards.targets import own_reference_set

# --------------------------------------------------------------------------------------------------
# The model folder's own networks.


@pytest.mark.parametrize("spec", ["reward", "evaluator"])
def test_the_classifiers_of_the_model_folder(tmp_path, spec):
    images = rand(5, 3, 28, 28)
    network = load_features(spec, TINY)
    features = network(images)
    assert features.shape == (5, check_features(spec, TINY)) and features.dtype == torch.float32
    assert torch.equal(features, load_classifier(TINY / spec).features(images))
    with pytest.raises(FloatingPointError, match=spec):
        network(images * float("nan"))
    line = refused(
        lambda: check_features(spec, tmp_path), f"--features {spec}: {tmp_path} holds no"
    )
    choices = "pixels, inception:FILE, dinov2[:MODEL], clip[:MODEL], module:function"
    assert line.endswith(f"give one of {choices}")  # and latents is none of --features
    (tmp_path / spec).mkdir()
    refused(lambda: check_features(spec, tmp_path), f"{tmp_path / spec}: not a classifier folder")


def test_the_two_classifiers_do_not_see_the_same():
    images = rand(5, 3, 28, 28)
    difference = load_features("reward", TINY)(images) - load_features("evaluator", TINY)(images)
    assert difference.abs().max() > 0.1


# --------------------------------------------------------------------------------------------------
# Inception: two calling conventions, one resize.


class OfBytes(torch.nn.Module):
    """Wants bytes, and returns the images that it is given."""

    def forward(self, img, return_features: bool = False):
        assert img.dtype == torch.uint8
        assert return_features
        return img.flatten(1).float()


class OfFloats(torch.nn.Module):
    """Wants floats of 299 x 299, and returns the images that it is given."""

    def forward(self, x):
        assert x.dtype == torch.float32
        assert x.shape[1] == 3 and x.shape[2] == 299 and x.shape[3] == 299
        return x.flatten(1)


def save_scripted(module, path):
    """-> the --features of the file."""
    torch.jit.script(module).save(path)
    return f"inception:{path}"


def test_an_inception_is_not_read_before_it_is_loaded(tmp_path):
    assert check_features(save_scripted(OfFloats(), tmp_path / "floats.pt"), "") == 2048
    with zipfile.ZipFile(tmp_path / "empty.pt", "w") as file:
        file.writestr("empty/constants.pkl", "")
    spec = f"inception:{tmp_path / 'empty.pt'}"
    assert check_features(spec, "") == 2048
    refused(lambda: load_features(spec, ""), spec, "cannot be loaded")


def test_a_network_of_bytes_is_given_the_nearest_bytes(tmp_path):
    network = load_features(save_scripted(OfBytes(), tmp_path / "bytes.pt"), "")
    content = np.concatenate([np.arange(256, dtype=np.uint8), noise(3 * 30 * 20 - 256)])
    wanted = torch.from_numpy(content).float().reshape(1, 3, 30, 20)
    near = wanted / 255 + less_than_half_a_byte(1, 3, 30, 20)  # some below 0, some above 1
    assert torch.equal(network(wanted / 255), wanted.flatten(1))
    assert torch.equal(network(near), wanted.flatten(1))


def test_a_network_of_floats_is_given_bytes_about_zero_at_its_size(tmp_path):
    network = load_features(save_scripted(OfFloats(), tmp_path / "floats.pt"), "")
    array = noise(2, 299, 299, 3)
    expected = (torch.from_numpy(array).permute(0, 3, 1, 2).float() - 128) / 128
    found = network(as_images(array) + less_than_half_a_byte(2, 3, 299, 299))
    assert torch.equal(found.reshape(2, 3, 299, 299), expected)

    white = network(torch.full((1, 3, 28, 28), 1.3))
    torch.testing.assert_close(white, torch.full_like(white, 127 / 128), atol=1e-6, rtol=0)
    small = noise(1, 28, 20, 3, seed=1)
    corner = network(as_images(small)).reshape(3, 299, 299)[:, 0, 0]  # stays where it is
    assert torch.equal(corner, (torch.from_numpy(small[0, 0, 0]).float() - 128) / 128)


def corner_bilinear_by_loops(image, size):
    """image [H, W] -> [size, size]: output pixel (i, j) is read at (i H / size, j W / size).

    Nothing is beyond the last row and column.
    """
    H, W = image.shape
    out = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * H / size, j * W / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, H - 1), min(left + 1, W - 1)
            upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            out[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return out


@pytest.mark.parametrize("H, W, size", [(5, 7, 11), (50, 40, 13), (2, 1, 5)])
def test_the_resize_by_loops(H, W, size):
    image = noise(H, W).astype(np.float32)
    expected = corner_bilinear_by_loops(image.astype(np.float64), size)
    found = corner_bilinear(torch.from_numpy(image).expand(2, 3, H, W), size)
    np.testing.assert_allclose(found[1, 2].numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("H, W", [(28, 28), (512, 37)])
def test_the_resize_by_a_sampling_grid(H, W):
    size = 299
    images = rand(1, 2, H, W) * 255
    theta = [[[1, 0, 1 / W - 1 / size], [0, 1, 1 / H - 1 / size]]]
    theta = torch.tensor(theta, dtype=torch.float64)
    grid = F.affine_grid(theta, [1, 2, size, size], align_corners=False)
    expected = F.grid_sample(
        images.double(), grid, mode="bilinear", padding_mode="border", align_corners=False
    ).float()
    torch.testing.assert_close(corner_bilinear(images, size), expected, atol=0.02, rtol=0)
    half_pixel = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    assert (half_pixel - expected).abs().max() > 20  # what it is often mistaken for


def test_the_resize_leaves_its_own_size_alone():
    images = rand(1, 3, 299, 299)
    assert torch.equal(corner_bilinear(images, 299), images)


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("INCEPTION_FILE"), reason="INCEPTION_FILE names no TorchScript Inception-v3"
)
def test_a_real_inception():
    network = load_features(f"inception:{os.environ['INCEPTION_FILE']}", "")
    rough = rand(8, 3, 32, 32)
    smooth = F.interpolate(rand(4, 3, 4, 4, seed=1), 32, mode="bicubic").clamp(0, 1)
    features = [network(rough[:4]), network(rough[4:]), network(smooth)]
    for part in features:
        assert part.shape == (4, 2048) and part.isfinite().all()
    first = moments(features[0])
    same = frechet_distance(*first, *moments(features[1]))
    other = frechet_distance(*first, *moments(features[2]))
    assert 0 < 2 * same < other
    torch.testing.assert_close(network(rough[:1]), features[0][:1], atol=1e-3, rtol=1e-3)


# --------------------------------------------------------------------------------------------------
# DINOv2 and CLIP, tiny and random, in the layout of the hub.

VISION = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=14)
CLIP = VISION | dict(intermediate_size=48, image_size=28, projection_dim=24)
WORDS = dict(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    vocab_size=50,
    projection_dim=24,
    bos_token_id=48,
    eos_token_id=49,
)


def build_config(name):
    import transformers

    if name == "dinov2":
        return transformers.Dinov2Config(**VISION, image_size=224)
    if name == "clip_vision":
        return transformers.CLIPVisionConfig(**CLIP)
    return transformers.CLIPConfig(text_config=WORDS, vision_config=CLIP, projection_dim=24)


def save_network(name, folder):
    """Writes a random network, in half precision as the published ones may be -> the network."""
    import transformers

    owners = {
        "dinov2": transformers.Dinov2Model,
        "clip_vision": transformers.CLIPVisionModelWithProjection,
        "clip": transformers.CLIPModel,
    }
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = owners[name](build_config(name)).eval()
        for parameter in network.parameters():  # no weight is zero or one
            parameter.add_(0.2 * torch.randn_like(parameter))
    network.half().save_pretrained(folder)
    return network.float()


def class_token(network, x):
    """DINOv2's first token after the last block, normalised by hand."""
    last = network(x, output_hidden_states=True).hidden_states[-1][:, 0]
    norm = network.layernorm
    variance = last.var(1, keepdim=True, unbiased=False)
    normal = (last - last.mean(1, keepdim=True)) / (variance + norm.eps).sqrt()
    return normal * norm.weight + norm.bias


def image_embedding(network, x):
    """CLIP's first token, normalised and projected by hand."""
    trunk = network.vision_model
    last = trunk(x, output_hidden_states=True).hidden_states[-1][:, 0]
    norm = trunk.post_layernorm
    normal = F.layer_norm(last, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return normal @ network.visual_projection.weight.T


def published_statistics(kind):
    """The mean and std of the channels, from transformers."""
    from transformers import image_utils

    if kind == "dinov2":
        return image_utils.IMAGENET_DEFAULT_MEAN, image_utils.IMAGENET_DEFAULT_STD
    return image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD


def prepared_by_pil(array, size, kind, dtype):
    """uint8 [B, H, W, 3], resized as `dtype` by PIL's bicubic -> [B, 3, size, size], normalised.

    As bytes PIL rounds and clamps after each of the two directions.
    """
    planes = array.transpose(0, 3, 1, 2).reshape(-1, *array.shape[1:3]).astype(dtype)
    resized = []
    for plane in planes:
        image = Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC)
        resized.append(np.asarray(image))
    x = np.array(resized).clip(0, 255).reshape(-1, 3, size, size) / 255
    mean, std = published_statistics(kind)
    return torch.from_numpy((x - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))).float()


def record_pixels(monkeypatch, kind, given):
    """Appends what the network is given to the list `given`."""
    import transformers

    owner = transformers.CLIPVisionModelWithProjection
    if kind == "dinov2":
        owner = transformers.Dinov2Model
    forward = owner.forward

    def recorded(self, pixel_values, **more):
        given.append(pixel_values)
        return forward(self, pixel_values=pixel_values, **more)

    monkeypatch.setattr(owner, "forward", recorded)


@pytest.mark.parametrize(
    "name, size, H, W",
    [
        ("dinov2", 224, 28, 28),
        ("dinov2", 224, 300, 260),
        ("clip_vision", 28, 40, 54),
        ("clip", 28, 28, 28),
    ],
)
def test_a_vision_network_by_hand(tmp_path, monkeypatch, name, size, H, W):
    kind, _, _ = name.partition("_")
    by_hand = class_token if kind == "dinov2" else image_embedding
    network = save_network(name, tmp_path)
    array = noise(3, H, W, 3)
    array[2] = array[2] // 2 + 64  # no overshoot, which PIL's bytes would clamp halfway
    given = []
    record_pixels(monkeypatch, kind, given)
    features = load_features(f"{kind}:{tmp_path}", "")
    found = features(as_images(array) + less_than_half_a_byte(3, 3, H, W))
    monkeypatch.undo()
    exact = prepared_by_pil(array, size, kind, np.float32)
    _, std = published_statistics(kind)
    assert given[0].dtype == found.dtype == torch.float32
    torch.testing.assert_close(given[0], exact, atol=1e-4, rtol=0)
    in_bytes = prepared_by_pil(array[2:], size, kind, np.uint8)
    torch.testing.assert_close(given[0][2:], in_bytes, atol=1.1 / 255 / min(std), rtol=0)

    with torch.inference_mode():
        torch.testing.assert_close(found, by_hand(network, exact), atol=1e-3, rtol=1e-3)
        assert (found - by_hand(network, exact.flip(1))).abs().max() > 0.1
    assert found.shape == (3, check_features(f"{kind}:{tmp_path}", ""))


def test_the_number_of_features_is_in_the_config(tmp_path):
    for name, D in (("dinov2", 32), ("clip_vision", 24), ("clip", 24)):
        folder = tmp_path / name
        build_config(name).save_pretrained(folder)
        assert [path.name for path in folder.iterdir()] == ["config.json"]
        kind, _, _ = name.partition("_")
        assert check_features(f"{kind}:{folder}", "") == D


def test_a_vision_network_without_all_its_weights_is_refused(tmp_path):
    """What a file lacks would be random, and different on every process."""
    import transformers

    save_network("clip_vision", tmp_path / "whole")
    trunk = transformers.CLIPVisionModel.from_pretrained(tmp_path / "whole")
    trunk.save_pretrained(tmp_path / "trunk")  # leaves out the projection
    spec = f"clip:{tmp_path / 'trunk'}"
    refused(lambda: load_features(spec, ""), spec, "visual_projection")


@pytest.mark.parametrize("kind, weights", [("dinov2", None), ("clip", b"text")])
def test_a_vision_network_whose_weights_cannot_be_read_is_refused(tmp_path, kind, weights):
    build_config("dinov2" if kind == "dinov2" else "clip_vision").save_pretrained(tmp_path)
    if weights:
        (tmp_path / "model.safetensors").write_bytes(weights)
    spec = f"{kind}:{tmp_path}"
    refused(lambda: load_features(spec, ""), f"{spec}: these features cannot be loaded")


def test_code_beside_a_config_is_not_offered_to_run(tmp_path, monkeypatch):
    questions = []

    def refuse(question=""):
        questions.append(question)
        return "n"

    monkeypatch.setattr("builtins.input", refuse)
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    refused(lambda: check_features(f"dinov2:{tmp_path}", ""), tmp_path)
    assert questions == []


# --------------------------------------------------------------------------------------------------
# Your own function.

OWN = """
def right(images): return images.flatten(1)[:, :5].double()
def flat(images): return images.mean((1, 2, 3))
def short(images): return images.flatten(1)[1:]
def nan(images): return images.flatten(1)[:, :5] / 0 * 0
def inf(images): return images.flatten(1)[:, :5] + float("inf")
def array(images): return images.flatten(1)[:, :5].double().numpy()
def rows(images): return [list(row[:5]) for row in images.flatten(1).tolist()]
def tensors(images): return [row[:5] for row in images.flatten(1)]
def named(images): return {"features": images.flatten(1)}
def broken(images): return images @ 0
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_features.py").write_text(OWN)
    (tmp_path / "failing_features.py").write_text("raise ImportError('first\\nsecond')")
    (tmp_path / "half_features.py").write_text("def f(:")
    (tmp_path / "script_features.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_features", None)


@pytest.mark.parametrize("name", ["right", "array", "rows", "tensors"])
def test_a_function_of_ones_own(own, name):
    images = rand(4, 3, 6, 6)
    if name == "right":
        images.requires_grad_()
    assert check_features(f"own_features:{name}", "") is None  # only a forward pass can tell
    found = load_features(f"own_features:{name}", "")(images)
    assert torch.equal(found, images.detach().flatten(1)[:, :5])
    assert found.dtype == torch.float32 and not found.requires_grad


@pytest.mark.parametrize(
    "name, naming",
    [
        (
            "named",
            "returned a dict; return a tensor, array or list of the shape [4, D], a row for each",
        ),
        ("flat", "returned the shape (4,) for 4 pictures; return [4, D], a row for each picture"),
        ("short", "(3, 108)"),
        ("nan", "non-finite"),
        ("inf", "non-finite"),
    ],
)
def test_a_function_that_returns_something_else(own, name, naming):
    with pytest.raises(FloatingPointError) as caught:
        load_features(f"own_features:{name}", "")(rand(4, 3, 6, 6))
    assert f"--features own_features:{name} " in str(caught.value) and naming in str(caught.value)


def test_a_function_of_another_flag_is_named_by_that_flag(own):
    images = rand(4, 3, 6, 6)
    flag = "diversity_features"
    with pytest.raises(FloatingPointError, match="^--diversity_features own_features:named retu"):
        load_features("own_features:named", "", flag=flag)(images)
    failing = load_features("own_features:broken", "", flag=flag)
    with pytest.raises(RuntimeError, match="^--diversity_features own_features:broken failed: "):
        failing(images)


NUMBERS = {
    "reversed": noise(3)[::-1].astype(np.float64),
    "booleans": [True, False, True],
    "arrays": [np.float32(1), np.array(2), 3],
    "tensors": [torch.tensor(1), torch.tensor(0.5), 2],
}
NO_NUMBERS = {
    "texts of numbers": (["1", "2"], "a list that is not of numbers"),
    "an array of texts": (np.array(["1"]), "an array that is not of numbers"),
    "complex": (np.array([1j]), "an array that is not of numbers"),
    "unequal rows": ([[1, 2], [3]], "a list that is not of numbers"),
    "dicts": ([{"score": 1}], "a list that is not of numbers"),
    "none": ([None], "a list that is not of numbers"),
    "a number": (3, "an int"),
    "nothing": (None, "None"),
}


@pytest.mark.parametrize("value", NUMBERS.values(), ids=NUMBERS.keys())
def test_numbers_of_many_kinds(value):
    found = own_numbers(value, "of 3 numbers")
    assert found.tolist() == [float(entry) for entry in value]


@pytest.mark.parametrize("value, naming", NO_NUMBERS.values(), ids=NO_NUMBERS.keys())
def test_what_is_not_numbers_is_named(value, naming):
    with pytest.raises(TypeError) as caught:
        own_numbers(value, "of 3 numbers")
    expected = f"returned {naming}; return a tensor, array or list of 3 numbers"
    assert str(caught.value) == expected


# --------------------------------------------------------------------------------------------------
# Pixels.


def test_pixels_are_means_of_areas_minus_grey():
    images = rand(3, 3, 64, 32)
    found = load_features("pixels", "")(images)
    areas = images.reshape(3, 3, 16, 4, 16, 2).mean((3, 5))
    torch.testing.assert_close(found, (areas - 0.5).flatten(1))
    small = rand(2, 1, 8, 16)
    assert torch.equal(load_features("pixels", "")(small), small.flatten(1) - 0.5)
    assert check_features("pixels", "") is None


def test_pixels_of_a_size_that_16_does_not_divide():
    images = rand(2, 3, 28, 50)
    found = load_features("pixels", "")(images)
    assert found.shape == (2, 3 * 16 * 16) and found.dtype == torch.float32
    expected = torch.zeros(2, 3, 16, 16)
    for i in range(16):
        for j in range(16):
            rows = slice(math.floor(i * 28 / 16), math.ceil((i + 1) * 28 / 16))
            columns = slice(math.floor(j * 50 / 16), math.ceil((j + 1) * 50 / 16))
            expected[:, :, i, j] = images[:, :, rows, columns].mean((2, 3)) - 0.5
    torch.testing.assert_close(found, expected.flatten(1), atol=1e-6, rtol=0)


# --------------------------------------------------------------------------------------------------
# --features that cannot be loaded.


@pytest.mark.parametrize(
    "spec, naming",
    [
        ("", "none of reward, evaluator"),
        ("inception:none.pt", "none.pt is not a TorchScript file"),
        ("no_such_module:f", "no_such_module"),
        ("math:pi", "pi is not a function"),
        ("own_features:missing", "missing"),
        ("failing_features:f", "first second"),
        ("half_features:f", "invalid syntax"),
        ("script_features:f", "script_features ends the program when it is imported"),
        ("dinov2:nobody/no-such-model", ""),
    ],
)
def test_features_that_do_not_exist(own, spec, naming):
    refused(lambda: check_features(spec, TINY), f"--features {spec}: ", naming)
    flag = "diversity_features"
    refused(lambda: check_features(spec, TINY, flag), f"--diversity_features {spec}: ")


def test_components_are_for_the_diversity_and_not_read_from_a_folder():
    assert check_features("components", TINY, "diversity_features") is None
    refused(lambda: check_features("components", TINY), "--features components: none of")


def test_a_file_that_is_no_torchscript(tmp_path):
    path = tmp_path / "network.pt"
    words = f"{path} is not a TorchScript file"
    path.write_text("no zip")
    refused(lambda: check_features(f"inception:{path}", TINY), words)
    torch.save({"weight": torch.ones(3)}, path)  # a zip too
    refused(lambda: check_features(f"inception:{path}", TINY), words)
    refused(lambda: check_features("inception:", TINY), "no file is not a TorchScript file")
    os.mkfifo(tmp_path / "pipe.pt")
    spec = f"inception:{tmp_path / 'pipe.pt'}"
    refused(lambda: check_features(spec, TINY), "pipe.pt: is no regular file but a FIFO")


@pytest.mark.parametrize(
    "config, naming",
    [
        ('{"model_type": "dino', ""),
        ('{"model_type": "strange"}', "strange"),
        ('{"model_type": "bert"}', "is a bert, not a dinov2"),
        ('{"model_type": "dinov2", "hidden_size": "large"}', ""),
    ],
)
def test_a_folder_that_is_no_dinov2(tmp_path, config, naming):
    (tmp_path / "config.json").write_text(config)
    spec = f"dinov2:{tmp_path}"
    refused(lambda: check_features(spec, TINY), f"--features {spec}: ", naming)


# --------------------------------------------------------------------------------------------------
# Principal components of the base's own pictures.


def test_the_components_are_those_of_a_singular_value_decomposition():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([5.0, 0.1, 3.0, 1.0, 0.01])
    features = torch.randn(400, 5, generator=generator) * scales + 7
    mean, basis = principal_components(features, 3)
    torch.testing.assert_close(mean, features.double().mean(0))
    _, _, rows = np.linalg.svd(features.double().numpy() - mean.numpy())
    for direction, expected in zip(basis.T.numpy(), rows):
        assert direction[abs(direction).argmax()] > 0
        assert abs(direction @ expected) == pytest.approx(1, abs=1e-9)


def test_the_components_of_pictures_do_not_see_what_the_base_never_draws():
    images = torch.rand(300, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[:, :, 4:] = 0.5  # the lower half is always grey
    components = Components(images[:1])
    components.fit(pixels(images))
    changed = images.clone()
    changed[:, :, 4:] = 1.0
    assert components(images).shape == (300, 64)
    torch.testing.assert_close(components(changed), components(images), atol=1e-4, rtol=0)
    brighter = components(images * 0.5)
    assert (brighter - components(images)).norm() > 1
    restored = Components(images[:1])
    for name, tensor in restored.state().items():
        tensor.copy_(components.state()[name])
    assert torch.equal(restored(images), components(images))
    assert torch.equal(restored.whitened(images), components.whitened(images))


def test_whitened_the_base_has_mean_0_and_covariance_1_and_is_its_own_target():
    images = torch.rand(500, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = images * torch.linspace(0.2, 1.0, 8)  # columns of other contrast
    components = Components(images[:1])
    components.fit(pixels(images))
    mu, sigma = moments(components.whitened(images))
    torch.testing.assert_close(mu, torch.zeros(64).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sigma, torch.eye(64).double(), atol=1e-4, rtol=0)

    own = own_reference_set(components, 500)
    own.members.refresh(own.features(images))
    assert own.members.fid() == pytest.approx(0, abs=1e-6)
    own.members.refresh(own.features(images[:1].expand(500, 3, 8, 8)))
    assert own.members.fid() > 60  # all 64 variances are lost


def test_what_the_base_never_does_is_no_infinite_surprise():
    images = torch.zeros(50, 3, 4, 4)
    images[:, 0, 0, 0] = torch.linspace(0, 1, 50)
    components = Components(images[:1])
    components.fit(pixels(images))
    assert components.whitened(torch.ones(2, 3, 4, 4)).abs().max() < 1000
    components.fit(pixels(images[:1].expand(50, 3, 4, 4)))  # a base that draws one picture
    assert components.whitened(images).isfinite().all()
