"""Prompting: prompt files, the order in which prompts are drawn, and noise on their embeddings.

DRIFT (arXiv 2601.12401) part (ii) varies the prompt "to expand the conditioning space". Our reading
is the condition-annealed noise of CADS (arXiv 2310.17347, eq. 3 to 6), one noise n a rollout.
With u in [0, 1] the fraction of the steps that is left:
    gamma(u) = 1 for u <= tau1, 0 for u >= tau2, linear between
    y' = sqrt(gamma) y + s sqrt(1 - gamma) n
Then y' is rescaled to the mean and std of y, and mixed: psi rescaled + (1 - psi) y'.
Left out on purpose: rewriting the prompt's words.
"""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

# --------------------------------------------------------------------------------------------------
# Prompt files.


@dataclass
class Prompt:
    """One line of a prompt file: its words, and what else the line says, for the rewards to use."""

    text: str
    metadata: dict = field(default_factory=dict)


def read_prompts(path):
    """Reads a prompt file -> list of Prompt.

    .txt: UTF-8, one prompt a line. .jsonl: objects with "prompt"; their other keys are metadata.
    Raises ValueError naming file and line for anything else: a blank line, bad UTF-8, no object, a
    prompt that is missing or no string.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{path}: prompt files end in .txt (one prompt a line) "
            'or .jsonl (objects with a "prompt")'
        )
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no regular file; give an existing prompt file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{path}: {reason}; give an existing prompt file") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from None

    prompts = []
    for number, line in enumerate(lines_of(text), 1):
        prompts.append(read_line(f"{path}:{number}", line, path.suffix))
    if not prompts:
        raise ValueError(f"{path}: no prompts in it; write one a line")
    return prompts


def lines_of(text):
    """The lines of a text. (Not by splitlines: it also ends a line at U+2028.)"""
    if not text:
        return []
    return io.StringIO(text, newline=None).read().removesuffix("\n").split("\n")


def read_line(where, line, suffix):
    """One line of a prompt file -> Prompt. Raises ValueError that begins with `where`."""
    row = {"prompt": line}
    if suffix == ".jsonl" and line.strip():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(
                f'{where}: expected an object with a string "prompt", '
                'as in {"prompt": "a dark coat"}'
            )
    if not row["prompt"].strip():
        raise ValueError(f"{where}: an empty prompt; remove the line or write one")
    text = row.pop("prompt").strip()
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: holds half a character, which no text encoder takes") from None
    return Prompt(text, row)


def draw_prompts(total, count, seed, step):
    """Which of `total` prompts fill the `count` groups of this step -> int array [count].

    A function of (seed, step) alone. The list is walked in shuffled passes, each prompt once a
    pass. A prompt that is drawn twice makes two groups.

    >>> draw_prompts(4, 3, seed=0, step=0), draw_prompts(4, 3, seed=0, step=1)
    (array([2, 0, 1]), array([3, 3, 0]))
    """
    places = np.arange(step * count, (step + 1) * count)  # in the endless walk
    order = {}
    for number in np.unique(places // total):
        order[number] = np.random.default_rng([seed, number]).permutation(total)
    return np.array([order[place // total][place % total] for place in places])


# --------------------------------------------------------------------------------------------------
# DRIFT (ii): annealed noise.


def annealed_noise(embedding, noise, u, scale, tau1, tau2, psi=1.0):
    """y' of the header: embedding and noise [B, ...], u a number or [B] -> like embedding.

    Mean and std are each sample's own: over the whole batch they would couple the rollouts.
    Where u <= tau1 the embedding comes back bit for bit. Where u >= tau2 it is all noise, so
    tau2 > 1 keeps part of the prompt at every step.

    >>> embedding, noise = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> for u in (0.9, 0.7, 0.5, 0.3, 0.1):  # all noise at first, the clean prompt at the end
    ...     noised = annealed_noise(embedding, noise, u, 1.0, 0.2, 0.8)
    ...     likeness = torch.cosine_similarity(noised.flatten(), embedding.flatten(), dim=0)
    ...     print(round(abs(likeness.item()), 1))
    0.0
    0.4
    0.7
    0.9
    1.0
    """
    u = torch.as_tensor(u, dtype=torch.float64, device=embedding.device).expand(len(embedding))
    gamma = ((tau2 - u) / (tau2 - tau1)).clamp(0, 1)
    gamma = column(gamma, embedding)
    mixed = gamma.sqrt() * embedding + scale * (1 - gamma).sqrt() * noise

    own = tuple(range(1, embedding.dim()))  # all dimensions but that of the samples
    std = mixed.std(own, keepdim=True).clamp(min=1e-8)
    standardised = (mixed - mixed.mean(own, keepdim=True)) / std
    rescaled = standardised * embedding.std(own, keepdim=True) + embedding.mean(own, keepdim=True)
    noised = psi * rescaled + (1 - psi) * mixed
    return torch.where(column(u, embedding) <= tau1, embedding, noised)


def column(values, like):
    """[B] -> [B, 1, ...] in the dtype of `like` [B, ...]."""
    ones = [1] * (like.dim() - 1)
    return values.reshape(-1, *ones).to(like.dtype)


def noised_prompt(prompt, noise, scale, tau1, tau2, psi=1.0):
    """-> condition(rows, u): the prompts that the rollouts `rows` see when the fraction u is left.

    prompt and noise are tuples of embeddings [B, ...]. The one noise of a rollout is held here, so
    that the update sees what the rollout saw. scale 0: the clean prompts. An entry of integers is a
    mask of tokens [B, L]: it takes no noise, and no token that it hides does.
    """
    masks = [entry for entry in prompt if not entry.is_floating_point()]
    if masks:
        noise = [masked(drawn, masks[0]) for drawn in noise]

    def clean(rows, u):
        return tuple(embedding[rows] for embedding in prompt)

    def noised(rows, u):
        embeddings = []
        for embedding, drawn in zip(prompt, noise):
            seen = embedding[rows]
            if embedding.is_floating_point():
                seen = annealed_noise(seen, drawn[rows], u, scale, tau1, tau2, psi)
            embeddings.append(seen)
        return tuple(embeddings)

    return noised if scale else clean


def masked(noise, mask):
    """Noise [B, L, ...] without that of the tokens at which mask [B, L] is 0."""
    if noise.shape[:2] != mask.shape:  # of another entry, a pooled one
        return noise
    ones = [1] * (noise.dim() - 2)
    return noise * mask.reshape(*mask.shape, *ones)
