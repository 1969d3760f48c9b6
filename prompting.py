"""Prompting: lists of prompts, the order in which they are drawn, and DRIFT's noise on their embeddings.

DRIFT (arXiv 2601.12401) part (ii) varies the prompt "to expand the conditioning space"; our reading is the condition-annealed noise
of CADS (arXiv 2310.17347, eq. 3 to 6), one noise a rollout. With u in [0, 1] the fraction of the steps still to go:
    gamma(u) = 1 for u <= tau1, 0 for u >= tau2, linear between;    y' = sqrt(gamma) y + s sqrt(1 - gamma) n
    then y' is rescaled to the mean and std of y, and mixed: psi rescaled + (1 - psi) y'
Left out on purpose: rewriting the prompt's words.
"""
import io
import json
import numpy as np
import torch
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

@dataclass
class Prompt:
    """One line of a prompt file: its words, and whatever else the line said (a label, say) for the rewards to use."""
    text: str
    metadata: dict = field(default_factory=dict)


def read_prompts(path):
    """Reads a .txt (UTF-8, one prompt a line) or .jsonl (objects with "prompt"; other keys are metadata) -> list of Prompt.

    Raises ValueError naming file and line for anything else: a blank line, a non-object, a missing or
    non-string prompt; bad UTF-8 by its byte.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: prompt files end in .txt (one prompt a line) or .jsonl (objects with a \"prompt\")")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; give an existing prompt file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    lines = io.StringIO(text, newline=None).read().removesuffix("\n").split("\n") if text else []    # not splitlines: U+2028 ends no line
    prompts = [_read_line(f"{path}:{n}", line, path.suffix) for n, line in enumerate(lines, 1)]
    if not prompts:
        raise ValueError(f"{path}: no prompts in it; write one a line")
    return prompts


def _read_line(where, line, suffix):
    row = {"prompt": line}
    if suffix == ".jsonl" and line.strip():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{where}: expected an object with a string "prompt", as in {{"prompt": "a dark coat"}}')
    if not row["prompt"].strip():
        raise ValueError(f"{where}: an empty prompt; remove the line or write one")
    return Prompt(row.pop("prompt").strip(), row)


def draw_prompts(total, count, seed, step):
    """Which of `total` prompts fill the `count` groups of this step -> int array [count], a function of (seed, step) alone.

    The list is walked in shuffled passes, each prompt once a pass. A group is its slot in this array, never its text: a prompt
    drawn twice makes two groups.

    >>> draw_prompts(4, 3, seed=0, step=0), draw_prompts(4, 3, seed=0, step=1)
    (array([2, 0, 1]), array([3, 3, 0]))
    """
    places = np.arange(step * count, (step + 1) * count)
    order = {p: np.random.default_rng([seed, p]).permutation(total) for p in np.unique(places // total)}
    return np.array([order[place // total][place % total] for place in places])


def annealed_noise(embedding, noise, u, scale, tau1, tau2, psi=1.0):
    """y' of the header: embedding and noise [B, ...], u a number or [B] -> like embedding. CADS eq. 3 to 6.

    Mean and std are each sample's own (over the whole batch they would couple the rollouts). Where u <= tau1 the embedding comes
    back bit for bit; where u >= tau2 it is all noise, so tau2 > 1 keeps part of the prompt at every step.

    >>> embedding, noise = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> alike = lambda u: torch.cosine_similarity(annealed_noise(embedding, noise, u, 1.0, 0.2, 0.8).flatten(), embedding.flatten(), dim=0)
    >>> [round(abs(alike(u).item()), 1) for u in (0.9, 0.7, 0.5, 0.3, 0.1)]      # all noise at first, the clean prompt at the end
    [0.0, 0.4, 0.7, 0.9, 1.0]
    """
    dims = tuple(range(1, embedding.dim()))
    column = lambda v: v.reshape(-1, *[1] * len(dims)).to(embedding.dtype)
    u = torch.as_tensor(u, dtype=torch.float64, device=embedding.device).expand(len(embedding))
    gamma = column(((tau2 - u) / (tau2 - tau1)).clamp(0, 1))
    mixed = gamma.sqrt() * embedding + scale * (1 - gamma).sqrt() * noise
    mean, std = lambda v: v.mean(dims, keepdim=True), lambda v: v.std(dims, keepdim=True)
    rescaled = (mixed - mean(mixed)) / std(mixed).clamp(min=1e-8) * std(embedding) + mean(embedding)
    return torch.where(column(u) <= tau1, embedding, psi * rescaled + (1 - psi) * mixed)


def noised_prompt(prompt, noise, scale, tau1, tau2, psi=1.0):
    """-> condition(rows, u): the prompts (a tuple of embeddings [B, ...]) that the rollouts `rows` see when the fraction u is still to go.

    One noise a rollout (a tuple like `prompt`), held here, so that the update sees what the rollout saw. scale 0: the clean prompts.
    """
    if scale == 0:
        return lambda rows, u: tuple(y[rows] for y in prompt)
    return lambda rows, u: tuple(annealed_noise(y[rows], n[rows], u, scale, tau1, tau2, psi) for y, n in zip(prompt, noise))
