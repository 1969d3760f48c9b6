"""Prompt lengths: which prompts a base cuts off, because its text encoders take fewer tokens.

    cut_prompts("assets/tiny", texts)     # -> {"tokenizer": Cut(limit 10, the texts that are cut)}
Only tokenizers are loaded. The limits are those of the stock pipelines, as the adapters use them.
Left out on purpose: bases whose prompts are classes, and generators of one's own.
"""

import logging
from typing import NamedTuple

from bases.files import named_parts
from bases.flux import t5_tokens
from bases.qwen_image import DROPPED, TEMPLATE, TOKENS
from bases.stable_diffusion import T5_TOKENS
from support.files import read_json

CLIPS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


class Cut(NamedTuple):
    """What a tokenizer cuts off."""

    limit: int  # tokens, the marks of beginning and end among them
    texts: list  # those that are longer


def token_limits(folder, kind):
    """{tokenizer folder: most tokens} of a diffusers folder; kind is one of PIPELINES."""
    present = [part for part in named_parts(folder) if part.startswith("tokenizer")]
    limits = {part: stated_length(folder, part) for part in present}
    if kind not in CLIPS:  # all CLIPs of a pipeline get the length of the first
        limits = dict.fromkeys(present, limits.get("tokenizer"))
    if kind == "StableDiffusion3Pipeline" and "tokenizer_3" in limits:
        limits["tokenizer_3"] = T5_TOKENS
    if kind == "FluxPipeline":
        limits["tokenizer_2"] = t5_tokens(read_json(folder / "transformer" / "config.json"))
    if kind == "QwenImagePipeline":
        limits["tokenizer"] = DROPPED + TOKENS
    return limits


def stated_length(folder, part):
    """model_max_length of a tokenizer."""
    return read_json(folder / part / "tokenizer_config.json").get("model_max_length")


def cut_prompts(folder, kind, texts):
    """{tokenizer folder: Cut} of those that cut a text; kind: of files.locate."""
    cuts = {}
    for part, limit in token_limits(folder, kind).items():
        template = TEMPLATE if kind == "QwenImagePipeline" else "{}"
        lengths = token_counts(folder / part, [template.format(text) for text in texts])
        longer = [text for text, length in zip(texts, lengths) if length > limit]
        if longer:
            cuts[part] = Cut(limit, longer)
    return cuts


def token_counts(folder, texts):
    """How many tokens each text has. A tokenizer that cannot be loaded is named when it is."""
    import transformers  # here, because it takes long to import

    transformers.utils.logging.set_verbosity(logging.ERROR)  # it warns of the same, without a name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return [len(numbers) for numbers in tokenizer(texts, truncation=False).input_ids]
    except Exception:
        return [0] * len(texts)
