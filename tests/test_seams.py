"""Seams: what the parts of a run hand to each other, looked at while it runs."""
import numpy as np
import torch

from commands import picture_sets
from support import files
import train
from conftest import launch, small
from prompting import draw_prompts, read_prompts

RUN = "--iterations 3 --prompts_per_step 3 --group_size 4 --select all --keep 4 --updates 1 --eval_every 3 --prompt_noise 0.5".split()


def test_a_group_is_rollouts_of_one_prompt_and_each_iteration_has_the_next(tiny, tmp_path, monkeypatch):
    seen, call = [], train.Reward.__call__
    monkeypatch.setattr(train.Reward, "__call__", lambda self, images, prompts, metadata: seen.append((prompts, metadata)) or call(self, images, prompts, metadata))
    launch(small(tiny, tmp_path / "run", *RUN))
    prompts = read_prompts(tiny / "prompts.jsonl")
    expected = [[prompts[i] for i in draw_prompts(len(prompts), 3, 0, step) for _ in range(4)] for step in range(3)]
    assert [[p.text for p in row] for row in expected] == [texts for texts, _ in seen]
    assert [[p.metadata for p in row] for row in expected] == [metadata for _, metadata in seen]
    assert len({text for texts, _ in seen for text in texts}) == 9       # of thirty, so none comes twice


def test_no_two_draws_of_a_run_share_their_noise(tiny, tmp_path, monkeypatch):
    keys = {train: [], picture_sets: []}
    for owner, found in keys.items():
        monkeypatch.setattr(owner, "seeded_noise", lambda key, samples, shape, found=found, draw=owner.seeded_noise:
                            found.append(tuple(key)) or draw(key, samples, shape))
    launch(small(tiny, tmp_path / "run", *RUN, "--reward", "class:1,fid:0.3", "--reference", 24, "--refresh", 1))
    trained, judged = keys[train], set(keys[picture_sets])
    assert len(trained) == len(set(trained)) == (3 + 4) * len(trained) // 7 and len(judged) == 1
    assert not {key[0] for key in trained} & {key[0] for key in judged}


def test_a_pixel_is_its_nearest_byte():
    values = np.random.default_rng(0).uniform(-0.1, 1.1, 2000).astype(np.float32)
    nearest = [min(range(256), key=lambda byte: abs(np.float64(value) * 255 - byte)) for value in values]
    assert files.to_uint8(torch.tensor(values)).tolist() == nearest
