"""bases/prompt_lengths.py: prompts that a text encoder cuts off are found; no weight is read."""

import pytest
import torch

import bases

SHORT = "a dark coat"
LONG = "photo of a dark grey light narrow wide dark light narrow wide grey coat"


def test_a_prompt_that_just_fits_is_not_cut(names):
    """The tiny tokenizer makes one token of each word, and adds a beginning and an end."""
    fits = " ".join(["dark"] * 8)
    assert bases.cut_prompts(names["tiny"], [SHORT, fits]) == {}
    cuts = bases.cut_prompts(names["tiny"], [SHORT, fits + " coat", LONG])
    assert cuts == {"tokenizer": (10, [fits + " coat", LONG])}


@torch.no_grad()
def test_what_is_cut_is_not_seen(loaded):
    model = loaded["tiny"]
    one, other = model.encode([LONG, LONG.replace("coat", "bag")])[0]
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    "family, limits",
    [
        ("sd1", {"tokenizer": 10}),
        ("sdxl", {"tokenizer": 10, "tokenizer_2": 10}),
        ("sd3", {"tokenizer": 10, "tokenizer_2": 10, "tokenizer_3": 256}),
        ("flux", {"tokenizer": 10, "tokenizer_2": 512}),
        ("flux-schnell", {"tokenizer": 10, "tokenizer_2": 256}),
        ("qwen-image", {"tokenizer": 290}),
        ("dit", {}),
        ("sit", {}),
    ],
)
def test_every_text_encoder_has_its_limit(names, family, limits):
    """In the small T5 and Qwen a letter is a token, so this text is longer than all limits."""
    text = "dark coat " * 100
    cuts = bases.cut_prompts(names[family], [text])
    assert {part: cut.limit for part, cut in cuts.items()} == limits
