"""The tilted base: its draws against enumeration, and its folder as a run that is compared."""

import itertools

import numpy as np
import pytest
import tilted
import torch
from conftest import launch_process, read_metrics

from commands import compare


def test_pictures_are_drawn_without_replacement_by_exp_of_the_reward():
    """All ordered pairs of five pictures, against 40,000 draws."""
    rewards = torch.tensor([0.0, -1.0, 0.5, -3.0, 0.2])
    beta = 0.7
    shares = (rewards.double() / beta).softmax(0).numpy()
    expected = np.zeros(5)  # how often each is among the two
    for first, second in itertools.permutations(range(5), 2):
        chance = shares[first] * shares[second] / (1 - shares[first])
        expected[[first, second]] += chance
    generator = torch.Generator().manual_seed(0)
    drawn = tilted.tilt(rewards.expand(40000, 5), 2, beta, generator)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    found = np.bincount(drawn.flatten().numpy(), minlength=5) / 40000
    assert found == pytest.approx(expected, abs=0.01)


def test_the_ends_are_the_base_and_the_best_pictures():
    rewards = torch.randn(300, 12, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    best = tilted.tilt(rewards, 3, 1e-6, generator).sort(1).values
    assert torch.equal(best, rewards.topk(3, dim=1).indices.sort(1).values)
    random = tilted.tilt(rewards, 3, float("inf"), generator)
    counts = np.bincount(random.flatten().numpy(), minlength=12)
    assert (abs(counts - 75) < 4.5 * np.sqrt(75)).all()
    chosen = rewards.gather(1, random)
    assert abs(chosen.mean() - rewards.mean()) < 0.1


@pytest.mark.slow
def test_its_folder_is_compared_as_a_run(tmp_path):
    out = tmp_path / "tilted"
    argv = ["--pool", "100", "--out", str(out)]
    code, printed, error = launch_process(argv, script="experiments/tilted.py")
    assert code == 0, error
    rows = read_metrics(out)
    assert len(printed.splitlines()) == len(rows) == 1 + len(tilted.BETAS)
    rewards = [row["reward"] for row in rows]
    assert rewards[-1] > rewards[0] + 0.1
    assert sorted(rewards[1:]) == pytest.approx(rewards[1:], abs=0.03)
    assert rows[-1]["eval/log_prob"] > rows[0]["eval/log_prob"]
    (curves,) = compare.open_runs([out], "").values()
    assert list(curves) == [0] and len(curves[0]["eval/vendi"]) == len(rows)

    code, _, error = launch_process(argv, script="experiments/tilted.py")
    assert code == 2 and error.count("\n") == 1 and "exists; choose another" in error
