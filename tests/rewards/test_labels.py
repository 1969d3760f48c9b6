"""rewards.check_labels, and which terms of a mixture are left to dist_reward."""

import pytest
import torch

from prompting import Prompt
from rewards import Reward, check_labels


def test_a_label_that_is_no_class_is_named_by_its_line():
    good = Prompt("a", {"label": 0})
    check_labels([good, Prompt("b", {"label": 9})], "p.jsonl")
    for metadata in ({}, *({"label": label} for label in (10, -1, "3", 1.0, True, None))):
        with pytest.raises(ValueError, match="p.jsonl:2: "):
            check_labels([good, Prompt("b", metadata)], "p.jsonl")


@pytest.mark.parametrize("name", ["fid", "kid"])
def test_a_distribution_wise_reward_is_named_and_left_to_others(tiny, name):
    reward = Reward(f"{name}:2,class:0.5", tiny)
    assert reward.weights == {name: 2.0, "class": 0.5}
    assert reward.distribution == name
    images = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert list(reward(images, ["?", "?"], [{"label": 1}, {"label": 2}])) == ["class"]
