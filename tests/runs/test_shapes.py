"""The world of shapes: its scenes, captions and reading, and the base that is built from it."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
import shapes
import torch
from build_shapes import EVAL_NAMED, TOKENS, TRAIN_NAMED, scenes_of
from conftest import ROOT, launch, launch_process, read_metrics, small

import bases
import eval as evaluation
import rewards
from prompting import read_prompts
from rewards import metrics

SHAPES = ROOT / "assets" / "shapes"
MODES = ["modes", *(f"modes_{name}" for name in shapes.ATTRIBUTES)]


def facts_of(seed, count):
    return [shapes.new_scene(seed, number).facts for number in range(count)]


# --------------------------------------------------------------------------------------------------
# Scenes.


def test_a_scene_is_a_function_of_its_seed_and_number():
    first = [shapes.draw(shapes.new_scene(5, number)) for number in range(6)]
    again = [shapes.draw(shapes.new_scene(5, number)) for number in reversed(range(6))]
    assert all(np.array_equal(a, b) for a, b in zip(first, reversed(again)))
    pictures, facts = shapes.draw_many(5, range(6))
    assert np.array_equal(pictures.transpose(0, 2, 3, 1), np.stack(first))
    assert facts == facts_of(5, 6) != facts_of(6, 6)


def test_attributes_are_even_and_apart_from_each_other():
    n = 4000
    facts = facts_of(0, n)
    for name, values in shapes.ATTRIBUTES.items():
        counts = np.array([sum(fact[name] == value for fact in facts) for value in values])
        expected = n / len(values)
        assert (abs(counts - expected) < 4.5 * np.sqrt(expected)).all(), name
    for one, two in itertools.combinations(shapes.ATTRIBUTES, 2):
        pairs = {pair: 0 for pair in itertools.product(*map(shapes.ATTRIBUTES.get, (one, two)))}
        for fact in facts:
            pairs[fact[one], fact[two]] += 1
        expected = n / len(pairs)
        chi_square = sum((count - expected) ** 2 / expected for count in pairs.values())
        assert chi_square < len(pairs) + 6 * np.sqrt(2 * len(pairs)), (one, two)


def test_what_is_given_is_kept():
    for number in range(40):
        scene = shapes.new_scene(0, number, named={"shape": "star"}, cells=["top", "left"])
        assert scene.facts["shape"] == "star" and scene.facts["cell"] in ("top", "left")


def test_a_program_reads_every_scene():
    for number in range(60):
        scene = shapes.new_scene(11, number)
        assert shapes.read(shapes.draw(scene)) == scene.facts


def test_a_program_reads_each_shape_at_each_size_turned_or_not():
    for shape, size, turn in itertools.product(shapes.SHAPES, shapes.RADII, (-0.35, 0, 0.35)):
        scene = shapes.new_scene(3, 0, named={"shape": shape, "size": size})
        scene.turn = turn
        assert shapes.read(shapes.draw(scene)) == scene.facts


def test_a_crowd_has_an_object_in_each_cell_and_is_no_scene():
    crowd = shapes.draw_crowd(3, 4)
    assert np.array_equal(crowd, shapes.draw_crowd(3, 4))
    first = shapes.draw(shapes.new_scene(3, 36, named={"cell": "top left"}))
    alike = abs(first.astype(int) - crowd).max(-1) < 10
    cells = alike.reshape(3, 12, 3, 12).transpose(0, 2, 1, 3).reshape(9, 144)
    assert cells[0].mean() > 0.9  # the first object on its own background
    assert (cells[1:].mean(1) < 0.95).all()
    assert shapes.read(crowd) is None


def test_what_is_no_scene_is_not_read():
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (shapes.SIDE, shapes.SIDE, 3), dtype=np.uint8)
    flat = np.full((shapes.SIDE, shapes.SIDE, 3), 150, np.uint8)
    two = shapes.draw(shapes.new_scene(0, 0, named={"cell": "top left", "background": "sand"}))
    other = shapes.draw(
        shapes.new_scene(0, 0, named={"cell": "bottom right", "background": "sand"})
    )
    two[18:] = other[18:]
    for picture in (noise, flat, two):
        assert shapes.read(picture) is None


# --------------------------------------------------------------------------------------------------
# Captions and prompts.


def subsets(facts):
    for count in range(len(facts) + 1):
        for names in itertools.combinations(facts, count):
            yield {name: facts[name] for name in names}


@pytest.mark.parametrize("style", [0, 1])
def test_a_phrase_says_what_is_named_and_nothing_else(style):
    words = set(shapes.all_words())
    said = {}
    for facts in facts_of(2, 40):
        for named in subsets(facts):
            text = shapes.phrase(named, style=style)
            assert said.setdefault(text, named) == named
            assert set(text.split()) <= words
            assert len(text.split()) <= TOKENS - 2


def test_captions_are_true_and_name_each_attribute_as_often_as_is_said():
    random = np.random.default_rng(0)
    facts = {
        "shape": "ring",
        "colour": "pink",
        "size": "small",
        "cell": "top",
        "background": "sky",
    }
    captions = [shapes.caption(random, facts).split() for _ in range(3000)]
    for name, share in shapes.NAMED.items():
        found = np.mean([facts[name] in words for words in captions])
        assert found == pytest.approx(share, abs=0.04)
    others = {value for values in shapes.ATTRIBUTES.values() for value in values}
    others -= {*facts.values(), "shape"}
    assert not any(others & set(words) for words in captions)


def test_each_attribute_is_named_by_some_prompts_and_left_open_by_others():
    for prompts in (TRAIN_NAMED, EVAL_NAMED):
        for name, values in shapes.ATTRIBUTES.items():
            named = [prompt[name] for prompt in prompts if name in prompt]
            assert set(named) <= set(values)
            assert 0 < len(named) <= 0.7 * len(prompts), name
        assert len({tuple(prompt.items()) for prompt in prompts}) == len(prompts)
    seen = [tuple(prompt.items()) for prompt in TRAIN_NAMED]
    assert not any(tuple(prompt.items()) in seen for prompt in EVAL_NAMED)


def test_modes_of_scenes_by_their_facts():
    """Of fresh scenes 1, and where three of nine cells are gone, six ninths of the cells."""
    values = shapes.ATTRIBUTES["cell"]
    expected = metrics.expected_values(np.full(9, 1 / 9), 64)
    for cells, share in ((values, 1), (values[:6], 6 / 9)):
        found = []
        for prompt in range(20):
            numbers = range(64 * prompt, 64 * (prompt + 1))
            facts = [shapes.new_scene(7, number, cells=cells).facts["cell"] for number in numbers]
            counts = np.array([facts.count(value) for value in values])
            found.append(metrics.effective_values(counts) / expected)
        # Six values show a little less of a loss among 64 pictures than nine do.
        assert np.mean(found) == pytest.approx(share, rel=0.03)


# --------------------------------------------------------------------------------------------------
# The embedded base.

is_there = pytest.mark.skipif(not SHAPES.is_dir(), reason="assets/shapes is not built yet")


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@is_there
def test_the_embedded_base_is_small_and_whole_and_holds_no_code():
    names = files_in(SHAPES)
    assert sum((SHAPES / name).stat().st_size for name in names) < 8e6
    assert {name.rpartition(".")[2] for name in names} == {"json", "jsonl", "safetensors", "npz"}
    assert bases.check(SHAPES) == SHAPES
    model = bases.load(SHAPES)
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    assert 2e6 < parameters < 4e6


@pytest.fixture(scope="module")
def judge():
    return evaluation.Judge(SHAPES, "evaluator")


@is_there
def test_the_judge_finds_nothing_lost_in_fresh_scenes(judge):
    prompts = read_prompts(SHAPES / "eval_prompts.jsonl")
    scores = evaluation.score(
        scenes_of(EVAL_NAMED, 64, seed=50), prompts, judge.network, judge.real
    )
    assert scores["accuracy"] > 0.97
    for name in MODES:
        assert scores[name] == pytest.approx(1, abs=0.05), name


@is_there
def test_the_rewards_of_fresh_scenes_are_near_zero():
    """Networks that read the attributes in another order than they were trained would say no."""
    prompts = [prompt for prompt in read_prompts(SHAPES / "eval_prompts.jsonl") for _ in range(20)]
    images = scenes_of(EVAL_NAMED, 20, seed=51)
    reward = rewards.Reward("class,recogniser", SHAPES)
    found = reward(images, [prompt.text for prompt in prompts], [p.metadata for p in prompts])
    for name, values in found.items():
        assert values.mean() > -0.15, name


@is_there
def test_the_judge_says_which_values_are_gone(judge):
    """Scenes in six of the nine cells, and all of them red."""
    prompts = read_prompts(SHAPES / "eval_prompts.jsonl")[:1]  # a cross
    images = []
    for number in range(200):
        named = {"shape": "cross", "colour": "red"}
        scene = shapes.new_scene(60, number, named=named, cells=shapes.ATTRIBUTES["cell"][:6])
        images.append(torch.from_numpy(shapes.draw(scene)).permute(2, 0, 1) / 255)
    scores = evaluation.score(torch.stack(images), prompts, judge.network, judge.real)
    assert "modes_shape" not in scores
    assert scores["modes_cell"] == pytest.approx(6 / 9, abs=0.04)
    assert scores["modes_colour"] == pytest.approx(1 / 8, abs=0.02)
    assert scores["modes_size"] == pytest.approx(1, abs=0.05)


# What the build writes, of networks that have learned next to nothing.
SIZE = "--scenes 300 --vae_steps 3 --steps 3 --batch 16 --reader_steps 3 --recogniser_steps 3"
PARTS = ("vae", "transformer", "text_encoder", "tokenizer", "scheduler")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "base"
    argv = ["--out", str(folder), *SIZE.split(" ")]
    code, out, error = launch_process(argv, script="experiments/build_shapes.py")
    assert code == 0 and "built in" in out, error
    return folder


def run_on(base, out, *more):
    return small(base, out, "--eval_images", 20, "--iterations", 2, *more)


@pytest.mark.slow
def test_the_build_command_makes_a_base_and_its_report(base):
    for part in (*PARTS, "reward", "evaluator", "recogniser"):
        assert any((base / part).iterdir()), part
    for part in ("reward", "evaluator"):
        assert {"real.npz", "real-1.npz", "real-2.npz"} < files_in(base / part)
    argv = ["--out", str(base), "--report", "--pictures", "40"]
    code, out, error = launch_process(argv, script="experiments/build_shapes.py")
    assert code == 0, error
    # Of scenes, which a program reads without a fault, and at three strengths of guidance.
    assert len(re.findall(r"modes_cell \d", out)) == 4
    assert "a program reads 1.000 of them, finds 1.000 right" in out.splitlines()[1]


@pytest.mark.slow
def test_a_run_logs_modes_and_everything_reads_them(base, tmp_path, capsys):
    flags = ("--reward", "class:1,margin:0.5,taste:0.5,recogniser:0.5,fid:0.3", "--reference", 20)
    launch(run_on(base, tmp_path / "run", *flags))
    first, *_, last = read_metrics(tmp_path / "run")
    for row in (first, last):
        assert all(0 < row[f"eval/{name}"] <= 1.6 for name in MODES)
    for name in ("class", "margin", "taste", "recogniser", "fid"):
        assert f"reward/{name}" in last
    plain = "--select all --keep 4 --diversity 0 --prompt_noise 0".split()
    launch(run_on(base, tmp_path / "off", *plain))
    capsys.readouterr()
    evaluation.main(["compare", str(tmp_path / "off"), str(tmp_path / "run")])
    assert "| modes |" in capsys.readouterr().out.splitlines()[0]

    out = tmp_path / "score.json"
    words = ["score", str(tmp_path / "run" / "model"), "--n", "20", "--steps", "2"]
    evaluation.main([*words, "--device", "cpu", "--out", str(out), "--reward", "recogniser"])
    (found,) = json.loads(out.read_text())["metrics"].values()
    assert set(MODES) <= set(found)
    assert found["modes"]["low"] <= found["modes"]["value"] <= found["modes"]["high"]
    assert found["modes"]["value"] == pytest.approx(last["eval/modes"], abs=0.2)


@pytest.mark.slow
def test_two_processes_and_a_resumed_run_are_the_run(base, tmp_path):
    components = "--diversity_features components --features components --fid 0.3 --reference 20"
    flags = ("--std", "group", *components.split())
    launch(run_on(base, tmp_path / "one", *flags))
    assert "reward/fid" in read_metrics(tmp_path / "one")[-1]
    code, _, error = launch_process(run_on(base, tmp_path / "two", *flags), processes=2)
    assert code == 0, error
    for row, expected in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)

    # As a kill after the first checkpoint leaves it.
    shutil.rmtree(tmp_path / "two" / "model")
    shutil.rmtree(tmp_path / "two" / "checkpoint-00002")
    expected = read_metrics(tmp_path / "two")
    launch(run_on(base, tmp_path / "two", *flags))
    for row, before in zip(read_metrics(tmp_path / "two"), expected, strict=True):
        assert row == pytest.approx(before, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_checkpoints_of_the_base_are_merged(base, tmp_path):
    launch(run_on(base, tmp_path / "run", "--snapshot_every", 1, "--lr", "1e-2"))
    checkpoints = [base, *sorted((tmp_path / "run" / "snapshots").glob("0000?.safetensors"))]
    words = ["rl", *map(str, checkpoints), "--out", str(tmp_path / "merged"), "--reward", "fid:1"]
    words += "--updates 1 --group_size 4 --images 30 --reference 60 --report_images 20".split()
    code, out, error = launch_process(
        [*words, "--steps", "2", "--device", "cpu"], script="merge.py"
    )
    assert code == 0, error
    assert len(re.findall(r"\| RL", out)) == 1
