"""What the tests of whole runs share: reading what a run wrote, comparing two runs, cutting in."""

from pathlib import Path

import pytest
import torch
from conftest import contents, read_metrics, read_weights
from safetensors import safe_open
from safetensors.torch import load_file

import bases


def checkpoints(out):
    """The names of a run's checkpoint folders."""
    return sorted(path.name for path in Path(out).glob("checkpoint-*"))


def network(folder):
    """The tensors of a model folder's network."""
    return bases.load(folder).network.state_dict()


def snapshots(out):
    """{file name: (tensors, facts)} of a run. (The bytes may differ in the order of the facts.)"""
    found = {}
    for path in sorted((Path(out) / "snapshots").glob("*")):
        with safe_open(path, "pt") as file:
            found[path.name] = (load_file(path), file.metadata())
    return found


def optimizer_state(out):
    """The tensors of the newest checkpoint's optimizer."""
    newest = Path(out) / checkpoints(out)[-1]
    saved = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
    tensors = {}
    for number, state in saved.items():
        for name, value in state.items():
            tensors[f"{number}.{name}"] = value
    return tensors


def moved(before, after):
    """The names of the tensors that are not the same in both."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def assert_same_tensors(a, b):
    """Equal to the bit, under the same names."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_equal_runs(a, b):
    """Two runs with the same flags ended with the same bits."""
    assert read_metrics(a) == read_metrics(b)
    assert checkpoints(a) == checkpoints(b)
    assert_same_tensors(read_weights(a), read_weights(b))
    assert_same_tensors(optimizer_state(a), optimizer_state(b))
    for part in ("model", "grids"):
        assert contents(a / part) == contents(b / part)
    ours, theirs = snapshots(a), snapshots(b)
    assert ours.keys() == theirs.keys()
    for name, (tensors, facts) in ours.items():
        assert facts == theirs[name][1]
        assert_same_tensors(tensors, theirs[name][0])


def assert_close_rows(a, b, tolerance=1e-5):
    """The lines of metrics are equal to rounding."""
    assert [row.keys() for row in a] == [row.keys() for row in b]
    for ours, theirs in zip(a, b):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


def assert_close_weights(a, b, base):
    """Equal but for rounding: all but a few elements to 1e-5.

    The few are where Adam divides a gradient that is nearly zero by itself.
    """

    def flat(weights):
        return torch.cat([weights[name].flatten() for name in a if name in base])

    assert a.keys() == b.keys()
    difference = flat(a) - flat(b)
    way = flat(a) - flat(base)
    assert way.norm() > 0.01
    assert difference.norm() < 0.005 * way.norm()
    assert (difference.abs() > 1e-5).double().mean() < 1e-3


def assert_agree(one, two, base, tolerance=1e-5):
    """Two runs are the same to rounding: metrics, checkpoints and saved models."""
    assert_close_rows(read_metrics(one), read_metrics(two), tolerance)
    assert_close_weights(read_weights(one), read_weights(two), network(base))
    assert_close_weights(network(one / "model"), network(two / "model"), network(base))


def at_call(monkeypatch, owner, name, number, action):
    """The number-th call of owner.name returns action(its result, its positional arguments)."""
    calls = []
    function = getattr(owner, name)

    def wrapper(*args, **kwargs):
        calls.append(args)
        result = function(*args, **kwargs)
        return action(result, args) if len(calls) == number else result

    monkeypatch.setattr(owner, name, wrapper)


def spy(monkeypatch, owner, name):
    """Lets owner.name run as before -> the list of what it returns."""
    returned = []
    function = getattr(owner, name)

    def wrapper(*args, **kwargs):
        returned.append(function(*args, **kwargs))
        return returned[-1]

    monkeypatch.setattr(owner, name, wrapper)
    return returned


def killed(result, args):
    """For at_call: the program dies here."""
    raise KeyboardInterrupt("killed")
