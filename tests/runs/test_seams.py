"""What the parts of a run hand to each other, looked at while it runs."""

import pytest
from conftest import launch, small

import rewards
import train
from commands import picture_sets
from prompting import draw_prompts, read_prompts

RUN = (
    "--iterations 3 --prompts_per_step 3 --group_size 4 --select all --keep 4 --updates 1 "
    "--eval_every 3 --prompt_noise 0.5"
).split()


@pytest.mark.run
def test_a_group_is_rollouts_of_one_prompt_and_each_iteration_has_the_next(
    tiny, tmp_path, monkeypatch
):
    rewarded = []  # texts and metadata, of each iteration
    original = rewards.Reward.__call__

    def spy(self, images, prompts, metadata):
        rewarded.append((prompts, metadata))
        return original(self, images, prompts, metadata)

    monkeypatch.setattr(rewards.Reward, "__call__", spy)
    launch(small(tiny, tmp_path / "run", *RUN))
    prompts = read_prompts(tiny / "prompts.jsonl")
    for step, (texts, metadata) in enumerate(rewarded):
        drawn = draw_prompts(len(prompts), 3, seed=0, step=step)
        expected = [prompts[number] for number in drawn for _ in range(4)]
        assert texts == [prompt.text for prompt in expected]
        assert metadata == [prompt.metadata for prompt in expected]
    # Nine of thirty prompts, so none comes twice.
    assert len({text for texts, _ in rewarded for text in texts}) == 9


@pytest.mark.run
def test_no_two_draws_of_a_run_share_their_noise(tiny, tmp_path, monkeypatch):
    keys = {train: [], picture_sets: []}

    def spy_on(module):
        original = module.seeded_noise

        def spy(key, samples, shape):
            keys[module].append(tuple(key))
            return original(key, samples, shape)

        monkeypatch.setattr(module, "seeded_noise", spy)

    spy_on(train)
    spy_on(picture_sets)
    flags = ("--reward", "class:1,fid:0.3", "--reference", 24, "--refresh", 1)
    launch(small(tiny, tmp_path / "run", *RUN, *flags))

    # Three iterations and four references, each with noise for the picture and two embeddings.
    assert len(keys[train]) == (3 + 4) * 3
    assert len(set(keys[train])) == len(keys[train])
    assert len(set(keys[picture_sets])) == 1  # every evaluation has the same
    streams = {key[0] for key in keys[train]}
    assert streams.isdisjoint(key[0] for key in keys[picture_sets])
