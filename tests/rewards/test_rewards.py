"""The mini-language of --reward, all terms together, JPEG sizes and your own functions.

Whatever is wrong with a reward is said in one line with its name, and never becomes a number.
"""

import io
import sys

import numpy as np
import pytest
import torch
from conftest import launch, read_metrics, small
from PIL import Image
from reward_helpers import (
    IMAGES,
    METADATA,
    PROMPTS,
    TINY,
    as_images,
    less_than_half_a_byte,
    noise,
    published,  # noqa: F401 (a fixture)
    rand,
    refused,
)

import rewards
from prompting import Prompt
from rewards.classifier import label_of

L14 = "openai/clip-vit-large-patch14"
B32 = "openai/clip-vit-base-patch32"

OWN = """
import numpy, torch

def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))

def words(images, prompts, metadata):
    return [len(prompt.split()) for prompt in prompts]

def label(images, prompts, metadata):
    return numpy.array([entry["label"] for entry in metadata], dtype=numpy.float64)

def fid(images, prompts, metadata):
    return images.amax((1, 2, 3))

def column(images, prompts, metadata):
    return images.mean((2, 3))[:, :1]

def hole(images, prompts, metadata):
    return torch.tensor([1.0] * (len(images) - 1) + [float("nan")])

def steep(images, prompts, metadata):
    return torch.full((len(images),), 1e300, dtype=torch.float64)

def nothing(images, prompts, metadata):
    pass

def scalars(images, prompts, metadata):
    return [image.mean() for image in images]

def whole(images, prompts, metadata):
    return torch.arange(len(images))

def named(images, prompts, metadata):
    return {"score": images.mean((1, 2, 3))}

def pair(images, prompts, metadata):
    return images.mean((1, 2, 3)), {}

def text(images, prompts, metadata):
    return ["good"] * len(images)

def broken(images, prompts, metadata):
    return 1 / 0

def vandal(images, prompts, metadata):
    images.mul_(0)
    prompts.clear()
    for entry in metadata:
        entry.clear()
    return torch.zeros(len(images))

number = 5
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of one's own, and some that cannot be imported -> its name."""
    modules = {
        "own_rewards": OWN,
        "half_written": "def reward(:\n",
        "explodes": "raise RuntimeError('first line\\nsecond line')\n",
    }
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_rewards"
    for name in modules:
        sys.modules.pop(name, None)


def score(spec, images=IMAGES, prompts=PROMPTS, metadata=METADATA, **options):
    """The values of a reward of one term."""
    (values,) = rewards.Reward(spec, TINY, **options)(images, prompts, metadata).values()
    return values


# --------------------------------------------------------------------------------------------------
# The mini-language: name[:argument][:weight].


@pytest.mark.parametrize(
    "spec, expected",
    [
        (" class:1, ink:0.2 ", {"class": ("class", "", None, 1), "ink": ("ink", "", None, 0.2)}),
        ("jpeg:-2,fid", {"jpeg": ("jpeg", "", None, -2), "fid": ("fid", "", None, 1)}),
        ("clip", {"clip": ("clip", "", L14, 1)}),
        ("clip:-1e-2", {"clip": ("clip", "", L14, -0.01)}),
        (f"pickscore:{B32}", {"pickscore": ("pickscore", B32, B32, 1)}),
        ("clip:C:/models/clip:2", {"clip": ("clip", "C:/models/clip", "C:/models/clip", 2)}),
        ("clip:7:1", {"clip": ("clip", "7", "7", 1)}),
        ("aesthetic:head.pth:0.2", {"aesthetic": ("aesthetic", "head.pth", L14, 0.2)}),
        ("aesthetic:a/h.pth@b/c:2", {"aesthetic": ("aesthetic", "a/h.pth", "b/c", 2)}),
        ("a.b.c:score:-3", {"score": ("a.b.c", "score", "score", -3)}),
        ("a:f,b:f:2", {"a:f": ("a", "f", "f", 1), "b:f": ("b", "f", "f", 2)}),
        ("clip,clip:b:2", {"clip": ("clip", "", L14, 1), "clip:b": ("clip", "b", "b", 2)}),
        ("m:fid", {"m:fid": ("m", "fid", "fid", 1)}),
    ],
)
def test_a_mixture_is_read(spec, expected):
    terms = rewards.parse_terms(spec)
    assert list(terms) == list(expected)
    for key, (name, argument, model, weight) in expected.items():
        assert (terms[key].name, terms[key].argument) == (name, argument)
        assert (terms[key].model, terms[key].weight) == (model, weight)
    assert rewards.parse(spec) == {key: term.weight for key, term in terms.items()}


@pytest.mark.parametrize(
    "spec, words",
    [
        ("", "'' is none of class, margin, ink"),
        ("beauty:1", "'beauty' is none of"),
        ("m:f:g:1", "'m' is none of"),
        ("m:", "'m' is none of"),
        ("class:", "'' is not a number; write class:1"),
        ("jpeg:95:1", "'95:1' is not a number"),
        ("class:nan", "class must be finite and not zero"),
        ("m:f:0", "m must be finite and not zero"),
        ("class,class:2", "'class' is named twice"),
        ("clip:a,clip:a:2", "'clip:a' is named twice"),
        ("aesthetic:0.5", "aesthetic needs the file of its head"),
        ("aesthetic:@clip", "aesthetic needs the file"),
        ("fid,kid", "fid and kid"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_refused(spec, words):
    refused(lambda: rewards.parse(spec), f"--reward {spec}", words)
    refused(lambda: rewards.check_reward(spec, TINY), f"--reward {spec}", words)


def test_only_some_rewards_ask_networks_of_the_model_folder():
    for spec in ("class", "jpeg,margin:2", "fid,ink"):
        assert list(rewards.readers(spec, TINY)) == [TINY / "reward"]
    for spec in ("fid", "kid,jpeg", "clip,pickscore,aesthetic:f", "m:class"):
        assert rewards.readers(spec, TINY) == {}


def test_a_value_that_no_classifier_knows_is_named_by_its_line():
    attributes = {"shape": ["ring", "star"], "colour": ["red", "blue"]}
    good = [
        Prompt("a red ring", {"shape": "ring", "colour": "red"}),
        Prompt("b", {"shape": "star"}),
    ]
    rewards.check_labels(good, "p.jsonl", attributes)
    assert rewards.names_any(good, attributes) and not rewards.names_any(good, {"size": [1, 2]})
    wrong = {
        "colour": {"shape": "ring", "colour": "pink"},
        "shape": {"shape": 0},
        '"shape" or "colour"': {"label": 3},
    }
    for name, metadata in wrong.items():
        with pytest.raises(ValueError, match=f"p.jsonl:3: .*{name}"):
            rewards.check_labels([*good, Prompt("c", metadata)], "p.jsonl", attributes)


def test_a_label_that_is_no_class_is_named_by_its_line():
    good = [Prompt("a", {"label": 0}), Prompt("b", {"label": 9})]
    rewards.check_labels(good, "p.jsonl", label_of(10))
    rewards.check_labels([Prompt("c", {"label": 46})], "p.jsonl", label_of(47))
    wrong = [{}] + [{"label": label} for label in (10, -1, "3", 1.0, True, None)]
    for metadata in wrong:
        prompts = [*good, Prompt("c", metadata)]
        with pytest.raises(ValueError, match="p.jsonl:3: .*label"):
            rewards.check_labels(prompts, "p.jsonl", label_of(10))


# --------------------------------------------------------------------------------------------------
# All terms.


@pytest.fixture
def specs(own, published):  # noqa: F811
    """Every kind of sample-wise term, {key: term}."""
    return {
        "class": "class",
        "margin": "margin",
        "ink": "ink",
        "clip": published.clip,
        "pickscore": published.pickscore,
        "aesthetic": published.aesthetic,
        "jpeg": "jpeg",
        "incompressible": "incompressible",
        "brightness": f"{own}:brightness",
        "words": f"{own}:words",
        "label": f"{own}:label",
    }


def test_a_mixture_is_all_of_its_terms(specs):
    """Each unweighted, float32, one a picture, without gradient, and the same as alone."""
    spec = ",".join(f"{term}:-2" for term in specs.values())
    reward = rewards.Reward(f"fid:3,{spec}", TINY)
    assert reward.weights == {"fid": 3, **dict.fromkeys(specs, -2)}
    assert reward.distribution == "fid"
    found = reward(IMAGES.clone().requires_grad_(), PROMPTS, METADATA)
    assert list(found) == list(specs)
    for name, values in found.items():
        assert values.shape == (7,) and values.dtype == torch.float32
        assert not values.requires_grad and values.std() > 1e-3
        torch.testing.assert_close(values, score(specs[name]), atol=1e-5, rtol=1e-5)
    again = reward(IMAGES, PROMPTS, METADATA)
    assert all(torch.equal(found[name], again[name]) for name in specs)


def test_a_score_does_not_depend_on_the_other_pictures_and_their_order(specs):
    spec = ",".join(specs.values())
    order = [4, 2, 6, 0, 1, 3, 5]
    whole = rewards.Reward(spec, TINY)(IMAGES, PROMPTS, METADATA)
    small_batches = rewards.Reward(spec, TINY, batch=3)
    prompts = [PROMPTS[i] for i in order]
    shuffled = small_batches(IMAGES[order], prompts, [METADATA[i] for i in order])
    alone = small_batches(IMAGES[4:5], PROMPTS[4:5], METADATA[4:5])
    for name, values in whole.items():
        torch.testing.assert_close(shuffled[name], values[order], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(alone[name], values[4:5], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "name, bad",
    [("margin", "nan"), ("clip", "inf"), ("jpeg", "-inf")],
)
def test_a_picture_that_is_not_finite_has_no_score(specs, name, bad):
    images = IMAGES.clone()
    if name == "clip":
        images = torch.cat([IMAGES, IMAGES], 3)  # so wide that the middle square lacks the edge
    images[5, 1, 3, 0] = float(bad)
    words = f"the reward {name} returned a non-finite number"
    with pytest.raises(FloatingPointError, match=words):
        score(specs[name], images)


def test_the_distribution_wise_reward_is_named_and_left_to_others():
    reward = rewards.Reward("class:0.5,kid:2", TINY)
    assert reward.weights == {"class": 0.5, "kid": 2.0} and reward.distribution == "kid"
    assert list(reward(IMAGES, PROMPTS, METADATA)) == ["class"]
    assert rewards.Reward("kid", TINY)(IMAGES, PROMPTS, METADATA) == {}


def test_no_pictures_have_no_scores():
    found = rewards.Reward("class,jpeg", TINY)(IMAGES[:0], [], [])
    assert {name: values.shape for name, values in found.items()} == {"class": (0,), "jpeg": (0,)}


def test_pictures_prompts_and_metadata_are_as_many():
    reward = rewards.Reward("jpeg", TINY)
    refused(lambda: reward(IMAGES, PROMPTS[:1], METADATA), "7 pictures", "1 prompts")
    refused(lambda: reward(IMAGES[:1], PROMPTS, METADATA), "1 pictures", "7 prompts")
    refused(lambda: reward(IMAGES, PROMPTS, METADATA[:6]), "6 metadata")


# --------------------------------------------------------------------------------------------------
# JPEG.


def kilobytes(array):
    """uint8 [H, W, 3] -> the thousands of bytes that PIL writes."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="JPEG", quality=95)
    return len(file.getvalue()) / 1000


def test_jpeg_is_the_size_of_the_file_of_the_nearest_bytes():
    array = np.concatenate([noise(3, 40, 24, 3), np.full((1, 40, 24, 3), 77, np.uint8)])
    images = as_images(array) + less_than_half_a_byte(4, 3, 40, 24)
    sizes = np.array([kilobytes(picture) for picture in array])
    reward = rewards.Reward("jpeg,incompressible", TINY)
    found = reward(images, PROMPTS[:4], METADATA[:4])
    assert found["incompressible"].tolist() == pytest.approx(sizes, rel=1e-6)
    assert found["jpeg"].tolist() == pytest.approx(-sizes, rel=1e-6)

    wide = 2 * rand(2, 3, 40, 24) - 0.5
    clamped = rewards.jpeg_kilobytes(wide.clamp(0, 1))
    assert torch.equal(rewards.jpeg_kilobytes(wide), clamped)


def test_noise_compresses_less_than_a_slope_and_that_less_than_nothing():
    flat = torch.full((3, 64, 64), 0.5)
    slope = torch.linspace(0, 1, 64).expand(3, 64, 64)
    sizes = rewards.jpeg_kilobytes(torch.stack([flat, slope, rand(3, 64, 64)])).tolist()
    assert 0 < sizes[0] < sizes[1] < sizes[2] and sizes[2] > 3 * sizes[0]


# --------------------------------------------------------------------------------------------------
# Your own.


def test_a_function_of_one_s_own(own):
    torch.testing.assert_close(score(f"{own}:brightness"), IMAGES.mean((1, 2, 3)))
    assert score(f"{own}:words").tolist() == [len(prompt.split()) for prompt in PROMPTS]
    assert score(f"{own}:label").tolist() == [entry["label"] for entry in METADATA]
    found = rewards.check_reward(f"{own}:brightness:0.5,jpeg", "")
    assert found == {"brightness": 0.5, "jpeg": 1}


def test_a_function_with_the_name_of_a_reward_is_not_taken_for_it(own):
    reward = rewards.Reward(f"{own}:fid,jpeg", TINY)
    assert reward.distribution is None
    found = reward(IMAGES, PROMPTS, METADATA)
    assert list(found) == [f"{own}:fid", "jpeg"]
    torch.testing.assert_close(found[f"{own}:fid"], IMAGES.amax((1, 2, 3)))


def test_a_function_that_writes_on_its_arguments_spoils_nothing(own):
    images = IMAGES.clone()
    prompts = list(PROMPTS)
    metadata = [dict(entry) for entry in METADATA]
    reward = rewards.Reward(f"{own}:vandal,{own}:brightness,{own}:label", TINY)
    found = reward(images, prompts, metadata)
    assert torch.equal(images, IMAGES) and prompts == PROMPTS and metadata == METADATA
    assert torch.equal(found["brightness"], IMAGES.mean((1, 2, 3)))
    assert found["label"].tolist() == [entry["label"] for entry in METADATA]


def test_a_function_may_return_a_tensor_an_array_or_a_list(own):
    expected = {
        "scalars": IMAGES.mean((1, 2, 3)),
        "whole": torch.arange(7.0),
        "words": torch.tensor([float(len(prompt.split())) for prompt in PROMPTS]),
        "label": torch.tensor([float(entry["label"]) for entry in METADATA]),
    }
    reward = rewards.Reward(",".join(f"{own}:{name}" for name in expected), TINY)
    found = reward(IMAGES, PROMPTS, METADATA)
    for name, values in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], values)


@pytest.mark.parametrize(
    "name, error, words",
    [
        ("column", FloatingPointError, r"returned the shape \(7, 1\) for 7 pictures"),
        ("hole", FloatingPointError, "returned a non-finite number"),
        ("steep", FloatingPointError, "returned a non-finite number"),
        ("nothing", FloatingPointError, "returned None; return a tensor, array or list of 7"),
        (
            "named",
            FloatingPointError,
            "returned a dict; return a tensor, array or list of 7 numbers, one for each picture",
        ),
        ("pair", FloatingPointError, "returned a tuple; return a tensor, array or list of 7"),
        ("text", FloatingPointError, "returned a list that is not of numbers"),
        ("broken", RuntimeError, "failed: ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_that_fails_is_named(own, name, error, words):
    with pytest.raises(error, match=f"the reward {name} {words}") as caught:
        score(f"jpeg,{own}:{name}")
    if name == "broken":  # the traceback shows the line of the user's file
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    "spec, naming",
    [
        ("no_such_module:f", "no_such_module"),
        ("own_rewards:missing", "missing"),
        ("own_rewards:number", "number is not a function"),
        ("half_written:reward", "half_written.py"),
        ("explodes:f", "first line"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_refused(own, spec, naming):
    spec_with_others = f"jpeg,{spec}:0.5"
    line = refused(
        lambda: rewards.check_reward(spec_with_others, TINY), f"--reward {spec}: ", naming
    )
    assert "second line" not in line


# --------------------------------------------------------------------------------------------------
# In a run.


@pytest.mark.slow
def test_a_run_logs_the_weighted_sum_of_its_rewards(own, tiny, tmp_path):
    spec = f"{own}:brightness,jpeg:0.5,class:0.1"
    launch(small(tiny, tmp_path / "run", "--reward", spec, "--iterations", 1))
    row = read_metrics(tmp_path / "run")[-1]
    total = row["reward/brightness"] + 0.5 * row["reward/jpeg"] + 0.1 * row["reward/class"]
    assert row["reward"] == pytest.approx(total, rel=1e-5)
    assert 0 < row["reward/brightness"] < 1 and -3 < row["reward/jpeg"] < -0.3


@pytest.mark.run
def test_a_run_stops_at_a_reward_that_fails(own, tiny, tmp_path):
    with pytest.raises(RuntimeError, match="the reward broken failed: ZeroDivisionError"):
        launch(small(tiny, tmp_path / "broken", "--reward", f"{own}:broken,class"))
    words = "iteration 1, process 0: the reward hole returned a non-finite number"
    with pytest.raises(FloatingPointError, match=words):
        launch(small(tiny, tmp_path / "hole", "--reward", f"{own}:hole,class"))
    assert not [*tmp_path.glob("*/checkpoint-*"), *tmp_path.glob("*/model")]
