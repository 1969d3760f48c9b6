"""Feature networks against what they are published as, and targets: every broken file is refused in one line that names it, every good one
gives the moments that numpy finds, in the same bits on any number of processes."""
import gzip
import json
import os
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import ROOT, launch_process, small
from dist_reward import frechet_distance, moments
from rewards.features import check_features, corner_bilinear, load_features
from rewards.targets import check_target, load_target, open_pool, target_path
from rewards.classifier import load_classifier

TINY = ROOT / "assets" / "tiny"
BLANK = torch.zeros(1, 3, 28, 28)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


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


# ---------------------------------------------------------------------------------------------------------------------
# The model folder's own networks.

@pytest.mark.parametrize("spec", ["reward", "evaluator"])
def test_the_classifiers_of_the_model_folder(spec):
    images = rand(5, 3, 28, 28)
    features = load_features(spec, TINY)(images)
    assert check_features(spec, TINY) == 64 and features.shape == (5, 64) and features.dtype == torch.float32
    assert torch.equal(features, load_classifier(TINY / spec).features(images))
    with pytest.raises(FloatingPointError, match=spec):
        load_features(spec, TINY)(images * float("nan"))


def test_the_two_classifiers_do_not_see_the_same():
    images = rand(5, 3, 28, 28)
    assert (load_features("reward", TINY)(images) - load_features("evaluator", TINY)(images)).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Inception: two calling conventions, one resize.

class OfBytes(torch.nn.Module):
    def forward(self, img, return_features: bool = False):
        assert img.dtype == torch.uint8
        assert return_features
        return img.flatten(1).float()


class OfFloats(torch.nn.Module):
    def forward(self, x):
        assert x.dtype == torch.float32
        assert x.shape[1] == 3 and x.shape[2] == 299 and x.shape[3] == 299
        return x.flatten(1)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """-> {"bytes": a TorchScript file that wants bytes, "floats": one that wants floats}; both return the pictures they were given."""
    folder = tmp_path_factory.mktemp("scripted")
    for name, module in (("bytes", OfBytes()), ("floats", OfFloats())):
        torch.jit.script(module).save(folder / f"{name}.pt")
    return {name: f"inception:{folder / name}.pt" for name in ("bytes", "floats")}


def test_inception_is_found_in_its_file_and_not_read_before(scripted, tmp_path):
    assert check_features(scripted["bytes"], "") == check_features(scripted["floats"], "") == 2048
    with zipfile.ZipFile(tmp_path / "empty.pt", "w") as file:
        file.writestr("empty/constants.pkl", "")
    assert check_features(f"inception:{tmp_path / 'empty.pt'}", "") == 2048
    refused(lambda: load_features(f"inception:{tmp_path / 'empty.pt'}", ""), f"inception:{tmp_path / 'empty.pt'}", "cannot be loaded")


def test_a_network_of_bytes_is_given_the_nearest_bytes(scripted):
    look = load_features(scripted["bytes"], "")
    wanted = torch.cat([torch.arange(256), torch.from_numpy(pixels(3 * 30 * 20 - 256)).long()]).reshape(1, 3, 30, 20)
    off = (rand(1, 3, 30, 20) - 0.5) * 0.98                              # of a byte: less than half, so there is one right answer
    for images in (wanted.float() / 255, (wanted + off) / 255):          # the second has numbers below 0 and above 1
        assert torch.equal(look(images), wanted.flatten(1).float())
    assert look(torch.tensor([-0.3, 1.3]).expand(1, 3, 4, 2)).unique().tolist() == [0, 255]


def test_a_network_of_floats_is_given_bytes_about_zero_at_its_size(scripted):
    look, array = load_features(scripted["floats"], ""), pixels(2, 299, 299, 3)
    off = (rand(2, 3, 299, 299) - 0.5) * 0.98 / 255
    expected = (torch.from_numpy(array).permute(0, 3, 1, 2).float() - 128) / 128
    assert torch.equal(look(as_images(array) + off).reshape(2, 3, 299, 299), expected)
    assert look(torch.tensor([-0.3, 1.3])[:, None, None, None].expand(2, 3, 299, 299)).unique().tolist() == [-1, 127 / 128]
    flat = look(torch.tensor([0.0, 1.0, 128 / 255])[:, None, None, None].expand(3, 3, 28, 28))
    torch.testing.assert_close(flat, torch.tensor([-1, 127 / 128, 0])[:, None].expand_as(flat), atol=1e-6, rtol=0)
    small = pixels(1, 28, 20, 3, seed=1)
    corner = look(as_images(small)).reshape(3, 299, 299)[:, 0, 0]        # the first pixel stays where it is
    assert torch.equal(corner, (torch.from_numpy(small[0, 0, 0]).float() - 128) / 128)


def naive_corner_bilinear(image, size):
    """image [H, W] -> [size, size]: output pixel (i, j) looks at (i H / size, j W / size); nothing is beyond the last row and column."""
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


@pytest.mark.parametrize("H, W, size", [(5, 7, 11), (12, 9, 4), (3, 28, 17), (28, 28, 64), (50, 40, 13), (1, 1, 3), (2, 1, 5), (6, 6, 1)])
def test_the_resize_by_loops(H, W, size):
    array = pixels(2, 3, H, W).astype(np.float32)
    expected = np.array([[naive_corner_bilinear(channel, size) for channel in image.astype(np.float64)] for image in array])
    np.testing.assert_allclose(corner_bilinear(torch.from_numpy(array), size).numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("H, W", [(28, 28), (32, 48), (256, 200), (298, 300), (400, 350), (512, 37)])
def test_the_resize_by_a_sampling_grid(H, W):
    images, size = rand(1, 2, H, W) * 255, 299
    theta = torch.tensor([[[1, 0, 1 / W - 1 / size], [0, 1, 1 / H - 1 / size]]], dtype=torch.float64)
    grid = F.affine_grid(theta, [1, 2, size, size], align_corners=False)
    expected = F.grid_sample(images.double(), grid, mode="bilinear", padding_mode="border", align_corners=False).float()
    torch.testing.assert_close(corner_bilinear(images, size), expected, atol=0.02, rtol=0)
    half_pixel = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    assert (half_pixel - expected).abs().max() > (20 if H != 298 else 0.2)                     # what it is often mistaken for


def test_the_resize_leaves_its_own_size_alone():
    images = rand(1, 3, 299, 299)
    assert torch.equal(corner_bilinear(images, 299), images)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("INCEPTION_FILE"), reason="INCEPTION_FILE names no TorchScript Inception-v3")
def test_a_real_inception():
    look = load_features(f"inception:{os.environ['INCEPTION_FILE']}", "")
    rough, smooth = rand(8, 3, 32, 32), F.interpolate(rand(8, 3, 4, 4, seed=1), 32, mode="bicubic").clamp(0, 1)
    features = [look(part) for part in (rough[:4], rough[4:], smooth[:4])]
    assert all(f.shape == (4, 2048) and f.isfinite().all() for f in features)
    same, other = (frechet_distance(*moments(features[0]), *moments(f)) for f in features[1:])
    assert 0 < 2 * same < other
    torch.testing.assert_close(look(rough[:1]), features[0][:1], atol=1e-3, rtol=1e-3)         # whatever the others in the batch are


# ---------------------------------------------------------------------------------------------------------------------
# DINOv2 and CLIP, tiny and random, in the layout of the hub.

VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
CLIP = VISION | {"intermediate_size": 48, "image_size": 28, "projection_dim": 24}
WORDS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50, "projection_dim": 24,
         "bos_token_id": 48, "eos_token_id": 49}


def configs():
    import transformers
    return {"dinov2": transformers.Dinov2Config(**VISION, image_size=224), "clip_vision": transformers.CLIPVisionConfig(**CLIP),
            "clip": transformers.CLIPConfig(text_config=WORDS, vision_config=CLIP, projection_dim=24)}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """-> {name: (folder, the model that was saved there)}; no weight is zero or one."""
    import transformers
    classes = {"dinov2": transformers.Dinov2Model, "clip_vision": transformers.CLIPVisionModelWithProjection, "clip": transformers.CLIPModel}
    saved = {}
    for n, (name, config) in enumerate(configs().items()):
        torch.manual_seed(n)
        model = classes[name](config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp(name)
        model.half().save_pretrained(folder)                             # as the published ones may be
        saved[name] = folder, model.float()
    return saved


def class_token(model, x):
    """The first token after the last block, normalised by hand."""
    last, norm = model(x, output_hidden_states=True).hidden_states[-1][:, 0], model.layernorm
    return (last - last.mean(1, keepdim=True)) / (last.var(1, keepdim=True, unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias


def image_embedding(model, x):
    trunk = model.vision_model
    last, norm = trunk(x, output_hidden_states=True).hidden_states[-1][:, 0], trunk.post_layernorm
    return F.layer_norm(last, norm.normalized_shape, norm.weight, norm.bias, norm.eps) @ model.visual_projection.weight.T


def as_prepared(array, size, mean, std, floats):
    """uint8 [B, H, W, 3] by PIL's bicubic, of floats or (rounded and limited after each direction) of bytes -> [B, 3, size, size], normalised."""
    resize = lambda a: np.asarray(Image.fromarray(a).resize((size, size), Image.Resampling.BICUBIC))
    planes = array.transpose(0, 3, 1, 2).astype(np.float32 if floats else np.uint8)
    resized = np.array([[resize(np.ascontiguousarray(plane)) for plane in picture] for picture in planes]).clip(0, 255)
    return torch.from_numpy((resized / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))).float()


@pytest.mark.parametrize("H, W", [(28, 28), (40, 54), (300, 260), (224, 224)])
@pytest.mark.parametrize("kind, name, size, reference", [("dinov2", "dinov2", 224, class_token), ("clip", "clip_vision", 28, image_embedding),
                                                         ("clip", "clip", 28, image_embedding)])
def test_a_vision_network_by_hand(hub, monkeypatch, kind, name, size, reference, H, W):
    import transformers
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    folder, model = hub[name]
    owner, given = transformers.Dinov2Model if kind == "dinov2" else transformers.CLIPVisionModelWithProjection, []
    forward = owner.forward
    monkeypatch.setattr(owner, "forward", lambda self, pixel_values, **more: given.append(pixel_values) or forward(self, pixel_values, **more))
    array = pixels(3, H, W, 3)
    array[2] = array[2] // 2 + 64                                        # no overshoot here, where PIL's bytes would be limited halfway
    found = load_features(f"{kind}:{folder}", "")(as_images(array) + (rand(3, 3, H, W) - 0.5) * 0.98 / 255)      # rounded to these bytes
    monkeypatch.undo()
    mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if kind == "dinov2" else (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    prepared = as_prepared(array, size, mean, std, floats=True)
    assert given[0].dtype == found.dtype == torch.float32
    torch.testing.assert_close(given[0], prepared, atol=1e-4, rtol=0)
    torch.testing.assert_close(given[0][2:], as_prepared(array[2:], size, mean, std, floats=False), atol=1.1 / 255 / min(std), rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(found, reference(model, prepared), atol=1e-3, rtol=1e-3)
        assert (found - reference(model, prepared.flip(1))).abs().max() > 0.1
    assert found.shape == (3, check_features(f"{kind}:{folder}", ""))


@pytest.mark.parametrize("kind, name, D", [("dinov2", "dinov2", 32), ("clip", "clip_vision", 24), ("clip", "clip", 24)])
def test_the_size_of_the_features_is_in_the_config(tmp_path, kind, name, D):
    configs()[name].save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert check_features(f"{kind}:{tmp_path}", "") == D


def test_a_vision_network_without_all_its_weights_is_refused(hub, tmp_path):
    """What a file lacks would be random, and other in every process."""
    import transformers
    transformers.CLIPVisionModel.from_pretrained(hub["clip_vision"][0]).save_pretrained(tmp_path)   # leaves out the projection
    with pytest.raises((ValueError, RuntimeError), match="visual_projection"):
        load_features(f"clip:{tmp_path}", "")


@pytest.mark.parametrize("weights", [None, b"", b"text"])
@pytest.mark.parametrize("kind, name", [("dinov2", "dinov2"), ("clip", "clip_vision")])
def test_a_vision_network_whose_weights_cannot_be_read_is_refused(tmp_path, kind, name, weights):
    configs()[name].save_pretrained(tmp_path)
    if weights is not None:
        (tmp_path / "model.safetensors").write_bytes(weights)
    refused(lambda: load_features(f"{kind}:{tmp_path}", ""), f"{kind}:{tmp_path}: these features cannot be loaded")


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_code_beside_a_config_is_not_offered_to_run(tmp_path, monkeypatch, kind):
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    refused(lambda: check_features(f"{kind}:{tmp_path}", ""), tmp_path)
    assert asked == []


# ---------------------------------------------------------------------------------------------------------------------
# A function of one's own.

OWN = """
def right(images): return images.flatten(1)[:, :5].double()
def flat(images): return images.mean((1, 2, 3))
def short(images): return images.flatten(1)[1:]
def deep(images): return images
def nan(images): return images.flatten(1)[:, :5] / 0 * 0
def inf(images): return images.flatten(1)[:, :5] + float("inf")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_features.py").write_text(OWN)
    (tmp_path / "failing_features.py").write_text("raise ImportError('first\\nsecond')")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_features", None)


def test_a_function_of_ones_own(own):
    images = rand(4, 3, 6, 6).requires_grad_()
    assert check_features("own_features:right", "") is None              # only a forward can tell
    found = load_features("own_features:right", "")(images)
    assert torch.equal(found, images.detach().flatten(1)[:, :5])
    assert found.dtype == torch.float32 and not found.requires_grad


@pytest.mark.parametrize("name, naming", [("flat", "(4,)"), ("short", "(3, 108)"), ("deep", "(4, 3, 6, 6)"), ("nan", "non-finite"),
                                          ("inf", "non-finite")])
def test_a_function_that_returns_something_else(own, name, naming):
    with pytest.raises(FloatingPointError) as caught:
        load_features(f"own_features:{name}", "")(rand(4, 3, 6, 6))
    assert f"own_features:{name}" in str(caught.value) and naming in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# --features that cannot be.

@pytest.mark.parametrize("spec", [
    "", "nothing", "Reward", "evaluator:", "inception", "inception:", "inception:{tmp}", "inception:{tmp}/none.pt", "inception:{tmp}/text.pt", "inception:{tmp}/tensors.pt",
    "dinov2:{tmp}/none", "clip:{tmp}/none", "dinov2:nobody/no-such-model", "clip:nobody/no-such-model", "clip:a b", "dinov2:{tmp}/bare",
    "clip:{tmp}/bare", "dinov2:{tmp}/cut", "clip:{tmp}/cut", "dinov2:{tmp}/list", "dinov2:{tmp}/strange", "dinov2:{tmp}/untyped",
    "no_such_module:f", "no_such.module:f", "json:no_such_function", "json:", "own_features:missing", ":f", ".json:f",
    "math:pi", "failing_features:f", "dinov2:{tmp}/word", "clip:{tmp}/word",
    "dinov2:{tmp}/bert", "dinov2:{tmp}/three"])
def test_features_that_cannot_be_loaded(own, tmp_path, spec):
    (tmp_path / "text.pt").write_text("no zip")
    torch.save({"weight": torch.ones(3)}, tmp_path / "tensors.pt")       # a zip too
    (tmp_path / "bare").mkdir()
    for name, text in {"cut": '{"model_type": "dino', "list": "[]", "strange": '{"model_type": "strange"}', "untyped": '{"hidden_size": 32}',
                       "word": '{"model_type": "dinov2", "hidden_size": "large"}', "bert": '{"model_type": "bert"}', "three": "3"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    spec = spec.format(tmp=tmp_path)
    refused(lambda: check_features(spec, TINY), f"--features {spec}:")


def test_a_model_folder_without_classifiers(tmp_path):
    for spec in ("reward", "evaluator"):
        refused(lambda: check_features(spec, tmp_path), tmp_path / spec)


# ---------------------------------------------------------------------------------------------------------------------
# Targets: which file, and what is wrong with it.

def test_the_default_target_is_the_model_folders():
    for spec in ("reward", "evaluator"):
        path = target_path("", spec, TINY)
        assert path == TINY / spec / "real.npz"
        check_target(path, check_features(spec, TINY))
        mu, sigma, features = load_target(path, load_features(spec, TINY), BLANK)
        assert mu.shape == (64,) and sigma.shape == (64, 64) and features is None
    assert str(target_path("here.idx", "reward", TINY)) == "here.idx"


@pytest.mark.parametrize("spec", ["inception:x.pt", "dinov2", "clip:folder", "module:function"])
def test_other_features_need_a_target(spec):
    refused(lambda: target_path("", spec, TINY), f"--features {spec}", "--target")
    assert str(target_path("a/b", spec, TINY)) == os.path.join("a", "b")


def five(images):
    """A network of 5 features."""
    return images.flatten(1)[:, :5]


def covariance(D=5):
    x = np.random.default_rng(0).normal(size=(3 * D, D))
    return x.T @ x / (3 * D - 1)


def moments_file(save=np.savez, **changes):
    """-> a function that writes good moments of 5 features with some changed; None leaves one out."""
    arrays = {"mu": np.arange(5.0), "sigma": covariance()} | changes
    return lambda path: save(path, **{k: v for k, v in arrays.items() if v is not None})


def changed(array, at, value):
    array = array.copy()
    array[at] = value
    return array


def altered(write, change):
    """-> a function that writes a file, and then what `change` makes of its bytes."""
    def both(path):
        write(path)
        path.write_bytes(change(path.read_bytes()))
    return both


def spoil_first_member(raw):
    """A zip whose first member is no longer what deflate can read: a block of the reserved type."""
    name, extra = struct.unpack("<HH", raw[26:30])
    return raw[:30 + name + extra] + b"\xff" + raw[31 + name + extra:]


def idx(array, magic=b"\0\0\x08"):
    return magic + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def content(raw):
    return lambda path: path.write_bytes(raw)


def pictures(count, spoil=None):
    """-> a function that fills a folder with `count` PNGs; spoil(the first one's bytes) are its new bytes."""
    def write(path):
        path.mkdir()
        for n in range(count):
            Image.fromarray(pixels(6, 7, 3, seed=n)).save(path / f"{n}.png")
        if spoil:
            (path / "0.png").write_bytes(spoil((path / "0.png").read_bytes()))
    return write


def a_16_bit_picture(path):
    path.mkdir()
    for n in range(6):
        Image.fromarray(np.full((4, 4), 8000 * (n + 1), np.uint16)).save(path / f"{n}.png")


GOOD = moments_file()
IDX = idx(pixels(9, 4, 5))
TARGETS = [  # what is wrong, name, how to write it, what the line says after the file's name
    ("missing npz", "t.npz", lambda path: None, ""), ("missing folder", "t", lambda path: None, "no such file or folder"),
    ("an npz that is a folder", "t.npz", lambda path: path.mkdir(), ""),
    ("mu is a matrix", "t.npz", moments_file(mu=np.zeros((5, 1))), "(5, 1)"), ("mu is a number", "t.npz", moments_file(mu=np.float64(1)), "()"),
    ("sigma is longer", "t.npz", moments_file(sigma=covariance(6)), "(6, 6)"),
    ("sigma is not square", "t.npz", moments_file(sigma=covariance()[:4]), "(4, 5)"),
    ("sigma is a diagonal", "t.npz", moments_file(sigma=np.ones(5)), "(5,)"),
    ("mu has nan", "t.npz", moments_file(mu=changed(np.zeros(5), 2, np.nan)), "not finite"),
    ("sigma has nan", "t.npz", moments_file(sigma=changed(covariance(), (2, 2), np.nan)), "not finite"),
    ("sigma has inf", "t.npz", moments_file(sigma=changed(covariance(), (0, 0), np.inf)), "not finite"),
    ("asymmetric", "t.npz", moments_file(sigma=changed(covariance(), (0, 3), covariance()[0, 3] + 1e-3)), "not symmetric"),
    ("antisymmetric", "t.npz", moments_file(sigma=np.triu(np.ones((5, 5)), 1) - np.tril(np.ones((5, 5)), -1)), "not symmetric"),
    ("negative variance", "t.npz", moments_file(sigma=changed(covariance(), (1, 1), -1e-3)), "negative"),
    ("other features", "t.npz", moments_file(mu=np.zeros(4), sigma=covariance(4)), "4 features"),
    ("no mu", "t.npz", moments_file(mu=None), "lacks"), ("no sigma", "t.npz", moments_file(sigma=None, cov=covariance()), "lacks"),
    ("words", "t.npz", moments_file(mu=np.array(list("abcde"))), ""), ("no npz", "t.npz", content(b"mu and sigma"), ""),
    ("an empty file", "t.npz", content(b""), ""), ("a cut zip", "t.npz", altered(GOOD, lambda raw: raw[:-100]), ""),
    ("a half zip", "t.npz", altered(GOOD, lambda raw: raw[:len(raw) // 2]), ""),
    ("a zip of which a bit fell over", "t.npz", altered(GOOD, lambda raw: raw.replace(struct.pack("<d", 3.0), struct.pack("<d", -3.0))), ""),
    ("an empty folder", "t", lambda path: path.mkdir(), "0 pictures"), ("as many pictures as features", "t", pictures(5), "5 pictures"),
    ("a picture that is text", "t", pictures(6, lambda raw: b"text"), "0.png"),
    ("a picture that is empty", "t", pictures(6, lambda raw: b""), "0.png"),
    ("a cut picture", "t", pictures(6, lambda raw: raw[:-40]), "0.png"),
    ("a picture that does not unpack", "t", pictures(6, lambda raw: raw[:60] + b"\xff\xff\xff" + raw[63:]), "0.png"),
    ("an idx of as many pictures as features", "t.idx", content(idx(pixels(5, 4, 5))), "5 pictures"),
    ("an idx of no picture", "t.idx", content(idx(pixels(0, 4, 5))), ""), ("a cut idx", "t", content(IDX[:-1]), ""),
    ("an idx that is too long", "t", content(IDX + b"\0"), ""), ("an idx of only a header", "t", content(IDX[:16]), ""),
    ("half a header", "t", content(IDX[:9]), ""), ("an idx of floats", "t", content(idx(pixels(9, 4, 5), b"\0\0\x0d")), "unsigned bytes"),
    ("a wrong magic", "t", content(idx(pixels(9, 4, 5), b"\1\0\x08")), "unsigned bytes"), ("text", "t.txt", content(b"pictures, many"), ""),
    ("an empty idx", "t", content(b""), ""), ("an idx.gz that is none", "t.gz", content(IDX), ""),
    ("a cut idx.gz", "t.gz", content(gzip.compress(IDX)[:-20]), ""), ("a gz of something else", "t.gz", content(gzip.compress(b"hello")), "")]
TARGETS += [
    ("an npy named npz", "t.npz", altered(GOOD, lambda raw: zipless(np.eye(5))), ""),
    ("a compressed npz that does not unpack", "t.npz", altered(moments_file(np.savez_compressed), spoil_first_member), ""),
    ("an npz of records", "t.npz", moments_file(mu=np.zeros(5, [("a", float), ("b", int)])), ""),
    ("complex moments", "t.npz", moments_file(mu=np.arange(5) + 1j), ""),
    ("an encrypted npz", "t.npz", altered(GOOD, lambda raw: encrypted(raw)), ""),
    ("a gz that does not unpack", "t.gz", content(gzip.compress(IDX)[:10] + b"\xff" * 30), ""),
    ("an idx of labels", "t", content(idx(pixels(9))), ""), ("an idx of one number", "t", content(idx(pixels())), ""),
    ("an idx of four dimensions", "t", content(idx(pixels(9, 3, 4, 5))), ""), ("an idx of empty pictures", "t", content(idx(pixels(9, 0, 0))), ""),
    ("16 bits of grey, which PIL makes white", "t", a_16_bit_picture, "0.png")]


def zipless(array):
    import io
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def encrypted(raw):
    """The first member's flag in the zip's directory says that it needs a password."""
    at = raw.index(b"PK\1\2") + 8
    return raw[:at] + bytes([raw[at] | 1]) + raw[at + 1:]


@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
@pytest.mark.parametrize("name, write, naming", [pytest.param(*row[1:], id=row[0]) for row in TARGETS])
def test_a_target_that_cannot_be_used(tmp_path, name, write, naming):
    path = tmp_path / name
    write(path)
    refused(lambda: check_target(path, 5), path, naming)


def test_moments_of_nothing(tmp_path):
    np.savez(tmp_path / "t.npz", mu=np.zeros(0), sigma=np.zeros((0, 0)))
    refused(lambda: check_target(tmp_path / "t.npz", None), tmp_path / "t.npz")


class Trap:
    """What np.load would run if it unpickled it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["mu", "sigma"])
def test_nothing_is_unpickled(tmp_path, name):
    path, sprung = tmp_path / "t.npz", tmp_path / "sprung"
    moments_file(**{name: np.array([Trap(sprung)] * 5, object)})(path)
    for call in (lambda: check_target(path, 5), lambda: load_target(path, five, BLANK)):
        refused(call, path)
    assert not sprung.exists()
    with np.load(path, allow_pickle=True) as file:
        file[name]
    assert sprung.exists()                                               # it was armed


@pytest.mark.parametrize("changes", [
    {}, {"mu_s": np.zeros(7), "sigma_s": np.eye(7), "arr_0": np.zeros((2, 3))},                # as guided-diffusion's files have
    {"mu": np.arange(5, dtype=np.float32), "sigma": covariance().astype(np.float32)}, {"sigma": np.zeros((5, 5))},
    {"sigma": changed(covariance(), (0, 3), covariance()[0, 3] + 1e-9)}])                      # rounding is no asymmetry
def test_moments_that_can_be_used(tmp_path, changes):
    for save in (np.savez, np.savez_compressed):
        moments_file(save, **changes)(tmp_path / "t.npz")
        check_target(tmp_path / "t.npz", 5), check_target(tmp_path / "t.npz", None)
        mu, sigma, features = load_target(tmp_path / "t.npz", five, BLANK)
        assert features is None and mu.dtype == sigma.dtype == torch.float64
        assert np.array_equal(mu.numpy(), changes.get("mu", np.arange(5.0))) and np.array_equal(sigma.numpy(), changes.get("sigma", covariance()))


def test_kid_needs_pictures(tmp_path):
    GOOD(tmp_path / "t.npz"), pictures(6)(tmp_path / "folder"), content(IDX)(tmp_path / "t.idx")
    refused(lambda: check_target(tmp_path / "t.npz", 5, need_pictures=True), tmp_path / "t.npz", "kid")
    check_target(tmp_path / "folder", 5, need_pictures=True), check_target(tmp_path / "t.idx", 5, need_pictures=True)


def test_how_many_pictures_are_enough(tmp_path):
    for n in (1, 2, 5, 6):
        pictures(n)(tmp_path / f"{n}"), content(idx(pixels(n, 4, 5)))(tmp_path / f"{n}.idx")
    for ending in ("", ".idx"):
        check_target(tmp_path / f"6{ending}", 5), check_target(tmp_path / f"2{ending}", None)
        refused(lambda: check_target(tmp_path / f"5{ending}", 5), tmp_path / f"5{ending}", "more than 5")
        refused(lambda: check_target(tmp_path / f"1{ending}", None), tmp_path / f"1{ending}", "more than 1")


# ---------------------------------------------------------------------------------------------------------------------
# Targets: what comes out.

def look(images):
    """A network of 4 features that takes any size, and tells one channel and one corner from another."""
    return torch.stack([images.mean((1, 2, 3)), images[:, 0].amax((1, 2)), images[:, 1, 0, -1], images[:, 2, -1, 0]], 1)


def numpy_look(array):
    """The same of one uint8 picture [H, W, 3] or [H, W]."""
    x = np.broadcast_to(array.reshape(*array.shape[:2], -1), (*array.shape[:2], 3)).astype(np.float64) / 255
    return [x.mean(), x[:, :, 0].max(), x[0, -1, 1], x[-1, 0, 2]]


def agrees(found, arrays):
    """mu, sigma, features against numpy's, of pictures as they were before they were written."""
    expected = np.array([numpy_look(array) for array in arrays])
    mu, sigma, features = found
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(mu.numpy(), expected.mean(0), atol=1e-6)
    np.testing.assert_allclose(sigma.numpy(), np.cov(expected, rowvar=False), atol=1e-6)
    assert mu.dtype == sigma.dtype == torch.float64 and features.dtype == torch.float32


@pytest.mark.parametrize("total, block", [(23, 10), (20, 10), (7, 10), (10, 10), (6, 1), (11, 100)])
@pytest.mark.parametrize("name", ["t.idx", "t.gz"])
def test_pictures_of_an_idx_file(tmp_path, name, total, block):
    array, batches = pixels(total, 5, 8), []
    (tmp_path / name).write_bytes(gzip.compress(idx(array)) if name.endswith(".gz") else idx(array))
    check_target(tmp_path / name, 4)
    agrees(load_target(tmp_path / name, lambda x: batches.append(tuple(x.shape)) or look(x), BLANK, block=block), array)
    assert batches.pop(0) == (1, 3, 28, 28)                              # the blank
    assert {shape[1:] for shape in batches} == {(3, 5, 8)} and max(shape[0] for shape in batches) == min(total, block)


@pytest.mark.parametrize("block", [1, 4, 12, 100])
@pytest.mark.parametrize("mixed", [False, True], ids=["one size", "many sizes"])
def test_pictures_of_a_folder(tmp_path, mixed, block):
    names = ["a/0.png", "a/1.PNG", "a/deep/er/0.bmp", "b.png", "c/0.webp", *(f"d/{n}.png" for n in range(7))]
    arrays = []
    for n, name in enumerate(names):
        size = (4 + n % 3, 9 - n % 2) if mixed else (6, 7)
        arrays.append(pixels(*size, *([] if n % 3 == 1 else [3]), seed=n))                     # every third is grey
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(arrays[-1]).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    check_target(tmp_path, 4)
    agrees(load_target(tmp_path, look, BLANK, block=block), arrays)


def test_a_later_picture_that_is_broken_is_named(tmp_path):
    pictures(8)(tmp_path / "t")
    (tmp_path / "t" / "5.png").write_bytes(b"text")
    check_target(tmp_path / "t", 4)                                      # which reads but the first
    refused(lambda: load_target(tmp_path / "t", look, BLANK), tmp_path / "t" / "5.png")


def test_a_picture_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    pictures(6)(tmp_path / "t")
    check_target(tmp_path / "t", 5)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)                   # PIL refuses twice as many
    refused(lambda: check_target(tmp_path / "t", 5), tmp_path / "t" / "0.png")


@pytest.mark.parametrize("write, name, naming", [
    (moments_file(mu=np.zeros(4), sigma=covariance(4)), "t.npz", "4 features"), (pictures(5), "t", "5 pictures"),
    (content(idx(pixels(5, 4, 5))), "t.idx", "5 pictures")])
def test_a_target_that_does_not_fit_a_function_of_ones_own(tmp_path, write, name, naming):
    write(tmp_path / name)
    check_target(tmp_path / name, None)                                  # nobody knows yet
    refused(lambda: load_target(tmp_path / name, five, BLANK), tmp_path / name, naming)


def test_too_few_members_for_the_quadratic_price_of_a_function_of_ones_own(own, tmp_path):
    """Below three times the features its second order has the wrong sign; only now is it known how many there are."""
    moments_file(mu=np.zeros(5), sigma=covariance(5))(tmp_path / "t.npz")
    pool = lambda members, *price: open_pool("fid", "own_features:right", str(tmp_path / "t.npz"), "", members, BLANK, *price)
    refused(lambda: pool(14, "quadratic"), "--price quadratic", "--reference 14", "5 features", "--price exact", "--price potential", "--reference 15")
    assert len(pool(15, "quadratic")[0].features) == 15 and pool(4) and pool(4, "potential")
    pictures(8)(tmp_path / "real")
    assert open_pool("kid", "own_features:right", str(tmp_path / "real"), "", 4, BLANK, "quadratic")             # there it is exact


SHARED = """
from pathlib import Path
sys.path.insert(0, {root!r})
from support import processes
from rewards.features import load_features
from rewards.targets import load_target
device = processes.start("cpu")
mu, sigma, features = load_target(Path({path!r}), load_features("reward", {tiny!r}, device), torch.zeros(1, 3, 28, 28))
np.savez(f"{out}-{{processes.rank()}}.npz", mu=mu, sigma=sigma, features=features)
processes.finish()
"""


@pytest.mark.parametrize("processes", [2, 4])                            # of 4, one has no block at all
def test_the_same_bits_for_any_number_of_processes(tmp_path, processes):
    array = pixels(230, 28, 28)
    (tmp_path / "t.idx").write_bytes(idx(array))
    mu, sigma, features = load_target(tmp_path / "t.idx", load_features("reward", TINY), BLANK)
    expected = load_classifier(TINY / "reward").features(torch.from_numpy(array)[:, None].float() / 255).double().numpy()
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(mu.numpy(), expected.mean(0), atol=1e-4)
    np.testing.assert_allclose(sigma.numpy(), np.cov(expected, rowvar=False), atol=1e-4)
    script = tmp_path / "shared.py"
    script.write_text(SHARED.format(root=str(ROOT), path=str(tmp_path / "t.idx"), tiny=str(TINY), out=tmp_path / "out"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), str(script)]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for rank in range(processes):
        with np.load(tmp_path / f"out-{rank}.npz") as file:
            for name, one in (("mu", mu), ("sigma", sigma), ("features", features)):
                assert file[name].tobytes() == one.numpy().tobytes(), (rank, name)


def test_a_picture_that_one_process_alone_reads_and_cannot_is_named_once(tmp_path):
    (tmp_path / "t").mkdir()
    for i, array in enumerate(pixels(150, 28, 28)):
        Image.fromarray(array).save(tmp_path / "t" / f"{i:03}.png")
    damaged = tmp_path / "t" / "140.png"                                 # of the second process
    damaged.write_bytes(damaged.read_bytes()[:200])
    argv = small(TINY, tmp_path / "run", "--reward", "class:1,fid:0.3", "--target", tmp_path / "t", "--reference", 20)
    code, _, error = launch_process(argv, processes=2)
    assert code != 0 and not (tmp_path / "run").exists()
    assert error.count(f"error: {damaged}: not a picture") == 1 and "Connection closed" not in error
