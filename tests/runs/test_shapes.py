"""The world of shapes: its scenes, captions and reading, and the base that is built from it."""

import itertools

import numpy as np
import pytest
import shapes
from build_shapes import EVAL_NAMED, TOKENS, TRAIN_NAMED

from rewards import metrics


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


def test_what_is_no_scene_is_not_read():
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    flat = np.full((32, 32, 3), 150, np.uint8)
    two = shapes.draw(shapes.new_scene(0, 0, named={"cell": "top left", "background": "black"}))
    other = shapes.draw(
        shapes.new_scene(0, 0, named={"cell": "bottom right", "background": "black"})
    )
    two[16:] = other[16:]
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
        "background": "navy",
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
