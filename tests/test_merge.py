"""Merging: sums of checkpoints, the policy over coefficients, the commands, the search."""

import itertools
import math
import os
import shutil
import signal
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import contents, files_up_to, launch_process, read_metrics, read_weights
from conftest import files as files_of
from PIL import Image
from safetensors.torch import load_file, save_file
from small_bases import build_sit, edit_json

import bases
import dist_reward
import eval as evaluation
import merge
import prompting
import rewards
import shaping
from bases import stable_diffusion, tensors
from bases.files import network_files
from commands import compare, picture_sets
from commands.checks import check_merge
from rewards import classifier
from support import averages, files

# Blocks in order: blocks.0, blocks.1, blocks.10, rest.
SHAPES = {"blocks.0.w": (3, 2), "blocks.1.w": (4,), "blocks.10.w": (2, 2), "head": (5,)}

# The integers that have a type's bits, so that NaNs can be compared, and -0 differs from 0.
BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def states(K, dtype=torch.float32):
    """K random checkpoints."""
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(K):
        state = {}
        for name, shape in SHAPES.items():
            state[name] = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        found.append(state)
    return found


def like(state, value):
    """A checkpoint that holds one number only."""
    return {name: torch.full_like(tensor, value) for name, tensor in state.items()}


def assert_same(a, b):
    """Equal to the bit, under the same names."""
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_close(a, b, tolerance=2e-7):
    """Equal to rounding, under the same names."""
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def at_call(monkeypatch, owner, name, number, action):
    """The number-th call of owner.name is followed by action()."""
    calls = []
    function = getattr(owner, name)

    def wrapper(*args, **kwargs):
        calls.append(args)
        result = function(*args, **kwargs)
        if len(calls) == number:
            action()
        return result

    monkeypatch.setattr(owner, name, wrapper)


def kill():
    """For at_call: the program dies here."""
    raise KeyboardInterrupt("killed")


# --------------------------------------------------------------------------------------------------
# merge().


@pytest.mark.parametrize("rows", [1, 4])
def test_a_one_hot_merge_is_that_checkpoint_bit_for_bit(rows):
    for dtype, bits in BITS.items():
        first, second, third = states(3, dtype)
        limits = torch.finfo(dtype)
        special = [-0.0, 0.0, limits.tiny / 2, limits.max, -math.inf]
        second["head"] = torch.tensor(special, dtype=dtype)
        wider = {name: tensor.double() for name, tensor in like(third, math.inf).items()}
        parts = [like(first, math.nan), second, wider]
        merged = merge.merge(parts, [[0.0, 1.0, 0.0]] * rows)
        for name, tensor in second.items():
            assert merged[name].dtype == dtype
            assert torch.equal(merged[name].view(bits), tensor.view(bits)), name


@pytest.mark.parametrize("c", [[0.5, 0.25, 0.25], [900.0, 100.5, -999.5]])
def test_a_merge_is_the_sum_in_float64(c):
    """To the last rounding: large coefficients that cancel would show any float32 in between."""
    tolerances = {torch.float64: 1e-13, torch.float32: 1e-7, torch.float16: 1e-3}
    tolerances[torch.bfloat16] = 8e-3
    for dtype, tolerance in tolerances.items():
        parts = states(3, dtype)
        merged = merge.merge(parts, c)
        for name in SHAPES:
            terms = [x * part[name].double().numpy() for x, part in zip(c, parts)]
            assert merged[name].dtype == dtype
            value = merged[name].double().numpy()
            np.testing.assert_allclose(value, sum(terms), rtol=tolerance, atol=1e-10)


def test_each_block_has_its_own_row():
    one, two = states(2, torch.float64)
    rows = [[2.0, -1.0], [0.5, 0.5], [0.0, 1.0], [1.0, 0.0]]
    merged = merge.merge([one, two], rows)
    for name, (a, b) in zip(SHAPES, rows):
        expected = a * one[name] + b * two[name]
        torch.testing.assert_close(merged[name], expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "c, largest",
    [
        ([-3.0, 2.5, 1.5], 1),
        ([1.0, 0.0, 0.0], 0),
        ([[2, -1, 0], [2, -1, 0], [2, -1, 0], [0, 0, 1]], 2),  # the counters are in the last block
    ],
)
def test_what_is_not_a_float_comes_from_the_largest_coefficient(c, largest):
    parts = states(3)
    for k, part in enumerate(parts):
        part["steps"] = torch.tensor([10 + k, -k])
        part["saved"] = torch.tensor(k == 1)
    merged = merge.merge(parts, c)
    for name in ("steps", "saved"):
        assert merged[name].dtype == parts[0][name].dtype
        assert torch.equal(merged[name], parts[largest][name])


def test_mixed_types_widen():
    pairs = {
        (torch.float16, torch.float32): torch.float32,
        (torch.bfloat16, torch.float16): torch.float32,
        (torch.float16, torch.float64): torch.float64,
    }
    for (first, second), widest in pairs.items():
        one, two = states(2, first)[0], states(2, second)[1]
        merged = merge.merge([one, two], [0.75, 0.25])
        for name in SHAPES:
            assert merged[name].dtype == widest
            expected = 0.75 * one[name].double() + 0.25 * two[name].double()
            torch.testing.assert_close(merged[name].double(), expected, rtol=1e-7, atol=1e-7)


def test_the_order_of_the_checkpoints_does_not_matter():
    parts = states(4)
    c = [0.7, -0.4, 0.4, 0.3]
    expected = merge.merge(parts, c)
    for order in itertools.permutations(range(4)):
        merged = merge.merge([parts[k] for k in order], [c[k] for k in order])
        assert_close(merged, expected)


def test_coefficients_that_do_not_fit_are_refused():
    cases = [
        ([0.5, 0.5001], "1.0001"),
        ([[1, 0], [0, 1], [1, 0], [1, 1]], "sum to 2"),
        ([math.nan, 1], "nan"),
        ([1.0], "shape"),
        ([[1, 0], [0, 1]], "shape"),  # two rows for four blocks
    ]
    for c, message in cases:
        with pytest.raises(ValueError, match=message):
            merge.merge(states(2), c)


def test_checkpoints_that_differ_are_refused_by_name():
    for k in range(3):
        more = states(3)
        more[k]["more"] = torch.ones(1)
        less = states(3)
        del less[k]["head"]
        reshaped = states(3)
        reshaped[k]["blocks.0.w"] = torch.ones(2, 3)
        cases = {"more": more, "head": less, r"blocks\.0\.w": reshaped}
        for name, parts in cases.items():
            with pytest.raises(ValueError, match=name):
                merge.merge(parts, [0.5, 0.25, 0.25])


class Lazy(Mapping):
    """Reads as a file does, a new tensor each time; fails if an earlier one is still alive."""

    def __init__(self, state):
        self.state = state
        self.read = []
        self.alive = weakref.WeakSet()

    def __getitem__(self, name):
        assert len(self.alive) == 0, f"{name} is read while another tensor is held"
        self.read.append(name)
        value = self.state[name].clone()
        self.alive.add(value)
        return value

    def __iter__(self):
        return iter(self.state)

    def __len__(self):
        return len(self.state)


@pytest.mark.parametrize(
    "c, dtype",
    [
        ([0.5, 1.0, -0.5], torch.float32),
        ([0.5, 1.0, -0.5], torch.float64),
        ([0.0, 1.0, 0.0], torch.int64),
    ],
)
def test_one_tensor_of_each_checkpoint_is_held_at_a_time(c, dtype):
    parts = [Lazy(part) for part in states(3, dtype)]
    merged = merge.merge(parts, c)
    assert merged.keys() == SHAPES.keys()
    for coefficient, part in zip(c, parts):
        assert len(part.alive) == 0
        once_each = sorted(SHAPES) if coefficient else []
        assert sorted(part.read) == once_each


# --------------------------------------------------------------------------------------------------
# The policy.


def test_a_new_picture_replaces_one_of_its_prompt_and_all_have_their_turn():
    for n, M, P in ((30, 60, 30), (4, 12, 2), (12, 12, 4), (9, 15, 3)):
        all_replaced = [merge.members_of(update, n, M, P) for update in range(M)]
        for replaced in all_replaced:
            assert len(set(replaced.tolist())) == n
            prompt_of_member = replaced // (M // P)
            prompt_of_picture = torch.arange(n) // (n // P)
            assert torch.equal(prompt_of_member, prompt_of_picture)
        times = torch.cat(all_replaced).bincount(minlength=M)
        assert times.tolist() == [n] * M


def checkpoints_of(K, scale=(1.0, 0.1, 0.01)):
    """K checkpoints of two blocks and a counter, which differ by `scale` along three directions."""
    g = torch.Generator().manual_seed(K)
    latent = torch.randn(K, 3, generator=g).double() * torch.tensor(scale, dtype=torch.float64)
    matrix = torch.randn(3, 4, 5, generator=g).double()
    vector = torch.randn(3, 7, generator=g).double()
    found = []
    for row in latent:
        state = {"a.0.w": torch.tensordot(row, matrix, 1), "a.1.w": row @ vector}
        state["a.0.n"] = torch.tensor(3)
        found.append(state)
    return found


@pytest.mark.parametrize("K, blocks", [(2, 1), (3, 1), (6, 2)])
def test_every_direction_moves_the_weights_equally_far_and_sums_to_zero(K, blocks):
    views = checkpoints_of(K)
    Q = merge.directions(views, blocks, floor=1e-5)
    rank = min(K - 1, 3)
    assert Q.shape == (blocks, K - 1, K) and Q.dtype == torch.float64
    assert Q.sum(2).abs().max() < 1e-12
    names_of_blocks = [["a.0.w", "a.1.w"]] if blocks == 1 else [["a.0.w"], ["a.1.w"]]
    for b, names in enumerate(names_of_blocks):
        flat = [torch.cat([view[name].flatten() for name in names]) for view in views]
        x = torch.stack(flat)
        centred = x - x.mean(0)
        rms = centred.square().sum(1).mean().sqrt()
        steps = Q[b, :rank] @ x / rms  # orthonormal
        identity = torch.eye(rank, dtype=torch.float64)
        torch.testing.assert_close(steps @ steps.T, identity, rtol=1e-5, atol=1e-5)
        variance = (centred @ steps.T).square().sum(0)
        assert (variance.diff() < 0).all()  # the widest first


def test_directions_in_which_checkpoints_hardly_differ_are_left_out():
    views = checkpoints_of(6, (1.0, 0.1, 1e-4))
    Q = merge.directions(views)[0]
    assert Q[:2].norm(dim=1).min() > 0
    assert Q[2:].abs().max() == 0
    # Equal checkpoints: nowhere to go, and no division by zero.
    assert merge.directions([views[0], views[0]]).abs().max() == 0
    # A checkpoint that is given twice adds no direction.
    twins = merge.directions([views[0], views[1], views[1]])[0]
    assert twins[0].norm() > 0
    assert twins[1].abs().max() == 0


@pytest.mark.parametrize("size, B, K", [((), 1, 4), ((4,), 5, 2)])
def test_coefficients_sum_to_one_and_zero_is_the_start(size, B, K):
    g = torch.Generator().manual_seed(0)
    z = 10 * torch.randn(*size, B, K - 1, generator=g, dtype=torch.float64)
    Q = torch.randn(B, K - 1, K, generator=g, dtype=torch.float64)
    Q = Q - Q.mean(2, keepdim=True)
    start = torch.full((K,), -0.25, dtype=torch.float64)
    start[-1] = 1 + (K - 1) / 4
    c = merge.coefficients_of(z, start, Q)
    assert c.shape == (*size, B, K)
    assert (c.sum(-1) - 1).abs().max() < 1e-12
    z_last = z.reshape(-1, B, K - 1)[-1]
    for b in range(B):
        expected = start + sum(z_last[b, i] * Q[b, i] for i in range(K - 1))
        torch.testing.assert_close(c.reshape(-1, B, K)[-1, b], expected)
    at_zero = merge.coefficients_of(torch.zeros_like(z), start, Q)
    assert torch.equal(at_zero, start.expand(*size, B, -1))


def test_a_policy_step_is_the_natural_gradient():
    """autograd's gradient of E[A log N(z; mean, std^2)] times the inverse Fisher information.

    That is std^2 for the mean and 1 / 2 for log std.
    """
    g = torch.Generator().manual_seed(0)
    G, shape, lr = 8, (2, 3), 0.7
    mean = torch.randn(shape, generator=g).double().requires_grad_()
    log_std = torch.randn(shape, generator=g).double().requires_grad_()
    A = torch.randn(G, generator=g)
    z = (mean + log_std.exp() * torch.randn(G, *shape, generator=g)).detach()
    log_p = torch.distributions.Normal(mean, log_std.exp()).log_prob(z).flatten(1).sum(1)
    gradients = torch.autograd.grad((A * log_p).mean(), (mean, log_std))
    mean, log_std = mean.detach(), log_std.detach()
    new_mean, new_log_std = merge.policy_step(mean, log_std, z, A, lr)
    expected_mean = mean + lr * log_std.exp() ** 2 * gradients[0]
    expected_log_std = log_std + 0.1 * lr * gradients[1] / 2
    torch.testing.assert_close(new_mean, expected_mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new_log_std, expected_log_std, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "optimum", [[[0.9, -0.5, 0.4, 0.2]], [[1.4, -0.4, 0.3, -0.3], [-0.2, 0.5, 0.5, 0.2]]]
)
def test_the_policy_finds_an_optimum_with_negative_coefficients(optimum):
    optimum = torch.tensor(optimum, dtype=torch.float64)
    B = len(optimum)
    g = torch.Generator().manual_seed(0)
    merges = SimpleNamespace(reward=SimpleNamespace(weights={"class": 1.0}))
    views = [{"a.0.w": row, "a.1.w": row} for row in torch.eye(4, dtype=torch.float64)]
    Q = merge.directions(views, B)
    start = torch.full((4,), 0.25, dtype=torch.float64)
    mean = torch.zeros(B, 3, dtype=torch.float64)
    log_std = torch.full((B, 3), math.log(0.3), dtype=torch.float64)
    for _ in range(300):
        noise = torch.randn(4, B, 3, generator=g, dtype=torch.float64)
        z = mean + log_std.exp() * torch.cat([noise, -noise])
        error = merge.coefficients_of(z, start, Q) - optimum
        reward = -error.square().sum((1, 2))
        advantage = merge.Merges.advantage(merges, {"class": reward})
        mean, log_std = merge.policy_step(mean, log_std, z, advantage, 1.0)
    final = merge.coefficients_of(mean, start, Q)
    assert (final - optimum).abs().max() < 0.03
    assert (log_std.exp() < 0.1).all()


@pytest.mark.parametrize("kind, n", [("fid", 10), ("kid", 10), ("fid", 40), ("kid", 40)])
def test_the_fall_of_the_distance_is_a_price_or_a_difference(monkeypatch, kind, n):
    """Of all M = 40 members at once no price is asked for: it would need [2 M, 2 M] numbers."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(40, 6, generator=g) + 0.5
    if kind == "kid":
        members = dist_reward.KernelReplace(features, torch.randn(50, 6, generator=g))
    else:
        members = dist_reward.SubsetReplace(features, torch.zeros(6), torch.eye(6))
    before = {name: value.clone() for name, value in members.state().items()}
    new = torch.randn(n, 6, generator=g)
    replaced = torch.randperm(40, generator=g)[:n]
    expected = 40 / n * members.price(new[None], replaced)[0].item()

    def no_price(*args, **kwargs):
        pytest.fail("the price of all members was asked for")

    if n == 40:
        monkeypatch.setattr(type(members), "price", no_price)
    fall = merge.distance_fall(members, new, replaced)
    assert fall == pytest.approx(expected, rel=1e-6)
    assert abs(expected) > 1e-3
    assert_same(members.state(), before)


# --------------------------------------------------------------------------------------------------
# Checkpoints to merge.

RL = (
    "--device cpu --updates 3 --group_size 4 --images 30 --reference 60 --report_images 20 "
    "--steps 2 --sigma_rel 0.07,0.15"
).split()


@pytest.fixture(scope="module")
def snapshots(tiny, tmp_path_factory):
    """The folder of three snapshots that move away from the base, each raw and in two averages."""
    out = tmp_path_factory.mktemp("run")
    trained = dict(bases.load(tiny).network.named_parameters())
    kept = averages.Averages(trained, 0, with_snapshots=True)
    torch.manual_seed(0)
    for iteration in (1, 2, 3):
        with torch.no_grad():
            for parameter in trained.values():
                parameter.add_(0.03 * torch.randn_like(parameter))
        kept.update(iteration)
        facts = tensors.base_facts(tiny, None)
        tensors.save_snapshots(out, iteration, trained, kept.snapshots(), facts, keep=3)
    return out / "snapshots"


@pytest.fixture(scope="module")
def four(snapshots):
    """Four averages: (2, 0.05), (2, 0.1), (3, 0.05), (3, 0.1)."""
    paths = []
    for iteration in (2, 3):
        for length in ("0.050", "0.100"):
            paths.append(str(snapshots / f"0000{iteration}-{length}.safetensors"))
    return paths


@pytest.fixture(scope="module")
def raw(snapshots):
    """Three snapshots that are no averages."""
    return [str(snapshots / f"0000{iteration}.safetensors") for iteration in (1, 2, 3)]


def network_of(folder):
    """The tensors of a model folder's network, as float32."""
    (file,) = network_files(folder)
    return {name: value.float() for name, value in load_file(file).items()}


def summed(tiny, paths, c):
    """The base with sum_k c_k theta_k in place of every tensor that the checkpoints hold."""
    parts = [load_file(path) for path in paths]
    found = network_of(tiny)
    for name in parts[0]:
        terms = [x * part[name].double() for x, part in zip(c, parts)]
        found[name] = sum(terms).float()
    return found


# --------------------------------------------------------------------------------------------------
# Bad flags: one line, exit code 2, nothing loaded, nothing written.

REFUSED = [  # command, checkpoints, flags, what the message names
    ("average", "four", {"coefficients": "0.5,0.5"}, "2 numbers for 4 checkpoints"),
    ("average", "four", {"coefficients": "1,1,1,1"}, "sum to 4"),
    ("average", "four", {"coefficients": "1,x,0,0"}, "--coefficients 1,x,0,0"),
    ("average", "four", {"out": ""}, "--out"),
    ("average", "four", {"out": "{tmp}"}, "--out .*exists"),
    ("average", "four", {"updates": 3}, "--updates"),
    ("ema", "four", {"coefficients": "1,0,0,0"}, "--coefficients"),
    ("ema", "four", {"sigma_rel": "0.1,0.3"}, "--sigma_rel 0.1,0.3"),
    ("ema", "raw", {}, "averages"),
    ("ema", "one", {}, "one checkpoint"),
    ("rl", "twice", {}, "given twice"),
    ("rl", "four", {"sigma_rel": ""}, "--sigma_rel"),
    ("rl", "four", {"group_size": 3}, "--group_size 3"),
    ("rl", "four", {"std": 0.0}, "--std 0"),
    ("rl", "four", {"report_images": 15}, "--report_images 15"),
    ("rl", "four", {"images": 90, "reference": 60}, "--images 90"),
    ("rl", "four", {"reward": "kid"}, "kid"),
    ("rl", "four", {"report_target": "{tmp}/none"}, "none"),
    ("rl", "four", {"prompts": "{tmp}/none.jsonl"}, "none.jsonl"),
    ("rl", "four", {"model": "{tmp}/none"}, "none"),
]


def checked(command, checkpoints, **values):
    """check_merge of a command line."""
    args = merge.Args(command, checkpoints, **values)
    return check_merge(args, merge.Args(command, checkpoints))


def test_bad_flags_are_refused_by_name(four, raw, tmp_path):
    lists = {"four": four, "raw": raw, "one": four[:1], "twice": [*raw, raw[0]]}
    for command, which, changes, message in REFUSED:
        values = {"out": str(tmp_path / "new")}
        for name, value in changes.items():
            values[name] = value.format(tmp=tmp_path) if isinstance(value, str) else value
        with pytest.raises(ValueError, match=message) as error:
            checked(command, lists[which], **values)
        assert "\n" not in str(error.value)
    assert contents(tmp_path) == {}


def test_a_line_that_is_refused_loads_nothing(four, tmp_path, monkeypatch, capfd):
    def no_load(*args, **kwargs):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(bases, "load", no_load)
    for words in (["rl", *four, "--lr", "nan"], ["average", *four, "--coefficients", "2,0,0,0"]):
        with pytest.raises(SystemExit) as stop:
            merge.main([*words, "--out", str(tmp_path / "new")])
        out, error = capfd.readouterr()
        assert stop.value.code == 2 and out == ""
        assert error.startswith("error: --") and error.count("\n") == 1
    assert contents(tmp_path) == {}


def test_a_model_folder_that_the_search_cannot_use_is_refused(four, tiny, tmp_path):
    needed = ["reward/real-1.npz", "reward/real-2.npz", "evaluator/real-2.npz"]
    needed += ["evaluator/model.safetensors", "reward/model.safetensors"]
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    for name in needed:
        path = model / name
        whole = path.read_bytes()
        for damaged in (None, b"PK\x03\x04 half"):
            path.unlink()
            if damaged:
                path.write_bytes(damaged)
            with pytest.raises(ValueError, match=path.parent.name):
                checked("rl", four, out=str(tmp_path / "new"), model=str(model))
            path.write_bytes(whole)
    checked("rl", four, out=str(tmp_path / "new"), model=str(model))


# --------------------------------------------------------------------------------------------------
# average and ema.


@pytest.mark.run
def test_average_writes_a_whole_model(four, tiny, tmp_path):
    out = tmp_path / "new" / "merged"
    merge.main(["average", *four, "--coefficients", "0.75,-0.5,1.25,-0.5", "--out", str(out)])
    expected = summed(tiny, four, [0.75, -0.5, 1.25, -0.5])
    assert_close(bases.load(out).network.state_dict(), expected)
    for part in ("text_encoder", "tokenizer", "evaluator"):
        assert contents(out / part) == contents(tiny / part)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, c", [([], [0.25] * 4), (["--coefficients=0,0,1,0"], [0.0, 0.0, 1.0, 0.0])]
)
def test_average_of_equal_and_of_one_hot_coefficients(four, tiny, tmp_path, words, c):
    merge.main(["average", *four, *words, "--out", str(tmp_path / "out")])
    merged = bases.load(tmp_path / "out").network.state_dict()
    assert_close(merged, summed(tiny, four, c))
    if words:
        assert_same(merged, network_of(tiny) | load_file(four[2]))


@pytest.mark.slow
def test_ema_writes_a_folder_for_each_length(four, raw, tiny, tmp_path):
    """Of averages: the raw snapshot takes no part."""
    many, one = tmp_path / "many", tmp_path / "one"
    merge.main(["ema", *four, raw[1], "--sigma_rel", "0.07,0.15", "--out", str(many)])
    merge.main(["ema", *four, "--sigma_rel", "0.15", "--out", str(one)])
    assert {path.name for path in many.iterdir()} == {"0.07", "0.15", "config.json"}
    for folder, length in ((many / "0.07", 0.07), (many / "0.15", 0.15), (one, 0.15)):
        c = averages.ema_coefficients([2, 2, 3, 3], [0.05, 0.1, 0.05, 0.1], length)
        assert_close(bases.load(folder).network.state_dict(), summed(tiny, four, c), 1e-6)


@pytest.mark.slow
def test_ema_that_was_killed_makes_the_lengths_that_are_missing(four, tmp_path, monkeypatch, capfd):
    argv = ["ema", *four, "--sigma_rel", "0.07,0.15,0.2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    merge.main([*argv, "--out", str(whole)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_call(patch, files, "save_model", 2, kill)
        merge.main([*argv, "--out", str(cut)])
    shutil.rmtree(cut / "0.15")
    before = files_of(cut / "0.07")
    merge.main([*argv, "--out", str(cut)])
    assert files_of(cut / "0.07") == before  # not written again
    found, expected = contents(cut), contents(whole)
    assert found.pop("config.json") != expected.pop("config.json")  # it names --out
    assert found == expected

    # Other checkpoints, or one model where there is a folder of many, need another folder.
    capfd.readouterr()
    fewer = ["ema", *four[:3], "--sigma_rel", "0.07,0.15,0.2"]
    one = ["ema", *four, "--sigma_rel", "0.07"]
    for other in (fewer, one):
        with pytest.raises(SystemExit) as stop:
            merge.main([*other, "--out", str(cut)])
        assert stop.value.code == 2
        assert "choose another" in capfd.readouterr().err


@pytest.mark.slow
def test_averages_of_two_seeds_are_merged_but_have_no_ema(four, tiny, tmp_path, monkeypatch, capfd):
    """They are of the same iteration and length, so that only `ema` cannot use them."""
    facts = tensors.Weights([four[0]]).facts
    two = []
    for seed in (0, 1):
        path = tmp_path / str(seed) / Path(four[0]).name
        path.parent.mkdir()
        save_file(load_file(four[seed]), path, metadata=facts)
        two.append(str(path))
    merge.main(["average", *two, "--out", str(tmp_path / "merged")])
    merged = bases.load(tmp_path / "merged").network.state_dict()
    assert_close(merged, summed(tiny, four[:2], [0.5, 0.5]))

    fixed_names = []

    def stopped(args, merges, blocks, fixed, *rest):
        fixed_names.extend(fixed)

    monkeypatch.setattr(merge, "search", stopped)
    with pytest.raises(SystemExit):
        merge.main(["rl", *two, *RL, "--reward", "class", "--out", str(tmp_path / "rl")])
    assert fixed_names == [*two, "uniform average"]

    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        merge.main(["ema", *two, "--out", str(tmp_path / "ema")])
    assert stop.value.code == 2
    assert "two checkpoints are the average 0.05 of iteration 2" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command, model", [("average", "out"), ("ema", "out/0.2")])
def test_a_full_disk_ends_a_merge_with_one_line(four, tmp_path, command, model):
    argv = [command, *four, "--out", str(tmp_path / "out")]
    with files_up_to(20000), pytest.raises(SystemExit) as stop:
        merge.main(argv)
    line = stop.value.code
    assert line.startswith("error: ") and "too large" in line
    assert "what is there is whole; the same command goes on" in line
    assert "\n" not in line and len(line) < 500
    merge.main(argv)
    assert bases.load(tmp_path / model)


@pytest.mark.slow
@pytest.mark.parametrize("command, words", [("average", []), ("rl", RL)])
def test_weights_that_do_not_fit_their_config_are_one_line(
    four, tiny, tmp_path, capfd, command, words
):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny, model)
    edit_json(model / "transformer" / "config.json", num_layers=2)
    with pytest.raises(SystemExit) as stop:
        merge.main([command, *four, *words, "--model", str(model), "--out", str(out)])
    line = capfd.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert line.startswith("error: --model ") and "transformer" in line
    assert not out.exists()


@pytest.mark.slow
def test_as_a_command(four, tmp_path):
    argv = ["average", *four, "--out", str(tmp_path / "out")]
    code, out, error = launch_process(argv, script="merge.py")
    assert code == 0, error
    assert "0.2500" in out
    assert bases.load(tmp_path / "out")
    code, out, error = launch_process(argv, script="merge.py")
    assert code == 2
    assert out == ""
    assert len(error.splitlines()) == 1 and "--out" in error


# --------------------------------------------------------------------------------------------------
# rl: what a search leaves.


@pytest.fixture(scope="module")
def rl(four, tmp_path_factory):
    """Flags -> the folder of a finished search with them; each is run once."""
    folder = tmp_path_factory.mktemp("rl")
    finished = {}

    def run(flags):
        if flags not in finished:
            out = folder / str(len(finished))
            merge.main(["rl", *four, *RL, *flags.split(), "--out", str(out)])
            finished[flags] = out
        return finished[flags]

    return run


def coefficients(out):
    """c [updates, B, K] of a search."""
    return [row["coefficients"] for row in read_metrics(out)]


def table(out):
    """table.md -> {row: {column: number}}."""
    lines = []
    for line in (out / "table.md").read_text().splitlines():
        lines.append([cell.strip() for cell in line.strip("|").split("|")])
    head, rule, *rows = lines
    assert set("".join(rule)) == {"-"}
    return {row[0]: dict(zip(head[1:], map(float, row[1:]))) for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["--reward class:1", "--reward fid:1,class:0.5", "--reward fid:1 --blocks"]
)
def test_a_search_leaves_a_model_a_table_and_a_plot(rl, four, tiny, flags):
    out = rl(flags)
    blocks = 2 if "--blocks" in flags else 1
    names = {name for name in ("fid", "class") if name in flags}
    rows = read_metrics(out)
    assert [row["update"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert np.shape(row["coefficients"]) == (blocks, 4)
        assert np.abs(np.sum(row["coefficients"], 1) - 1).max() < 1e-12
        assert row["sum_error"] < 1e-12
        assert len(row["std"]) == blocks
        assert ("reference" in row) == ("fid" in flags)
        in_row = {name for name in row if name.startswith("reward/")}
        assert in_row == {f"reward/{name}" for name in names}
    assert rows[0]["coefficients"] != rows[1]["coefficients"]

    # The model is the last mean's. The blocks in order: rest, transformer_blocks.0.
    c = rows[-1]["coefficients"]
    parts = [summed(tiny, four, row) for row in c]
    expected = parts[0]
    if blocks == 2:
        assert c[0] != c[1]
        for name in expected:
            if name.startswith("transformer_blocks.0."):
                expected[name] = parts[1][name]
    assert_close(bases.load(out / "model").network.state_dict(), expected)

    with Image.open(out / "coefficients.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.slow
def test_the_table_judges_every_rival_by_fresh_pictures(rl, tiny, four):
    out = rl("--reward fid:1")
    rows = table(out)
    starts = ["base model", "best single checkpoint", "uniform average", "best post-hoc EMA"]
    starts += ["random search", "RL"]
    assert len(rows) == len(starts)
    for name, start in zip(rows, starts):
        assert name.startswith(start)

    average = bases.load(tiny)
    average.network.load_state_dict(summed(tiny, four, [0.25] * 4))
    models = {"base model": bases.load(tiny), "uniform average": average}
    models["RL"] = bases.load(out / "model")
    prompts = prompting.read_prompts(tiny / "eval_prompts.jsonl")
    reward = classifier.load_classifier(tiny / "reward")
    real = np.load(tiny / "reward" / "real-2.npz")
    evaluator = classifier.load_classifier(tiny / "evaluator")
    evaluator_real = np.load(tiny / "evaluator" / "real-2.npz")
    for name, model in models.items():
        images = picture_sets.generate(model, prompts, 2, 2, 1.0, 1000, 500)
        mu, sigma = dist_reward.moments(reward.features(images))
        searched = dist_reward.frechet_distance(mu, sigma, real["mu"], real["sigma"])
        scores = evaluation.score(images, prompts, evaluator, evaluator_real)
        assert rows[name] == {
            "FD, searched features": pytest.approx(searched, rel=1e-3),
            "FD, held-out features": pytest.approx(scores["fid"], rel=1e-3),
            "Vendi": pytest.approx(scores["vendi"], abs=1e-3),
            "accuracy": pytest.approx(scores["accuracy"], abs=1e-3),
        }


@pytest.mark.slow
def test_a_reward_that_was_searched_stands_in_the_table_with_or_without_a_judge(
    raw, tiny, tmp_path
):
    bare = tmp_path / "model"
    shutil.copytree(tiny, bare)
    shutil.rmtree(bare / "reward")
    shutil.rmtree(bare / "evaluator")
    prompts = prompting.read_prompts(tiny / "eval_prompts.jsonl")
    for model in (tiny, bare):
        out = tmp_path / f"out-{model.name}"
        argv = ["rl", *raw[:2], *RL, "--reward", "jpeg", "--updates", "1"]
        merge.main([*argv, "--model", str(model), "--out", str(out)])
        merged = bases.load(out / "model")
        images = picture_sets.generate(merged, prompts, 2, 2, 1.0, 1000, 500)
        reward = rewards.Reward("jpeg", tiny)
        values = reward(images, [""] * len(images), [{}] * len(images))["jpeg"]
        rows = table(out)
        assert rows["RL"]["reward jpeg"] == pytest.approx(values.mean().item(), abs=1e-3)
        assert all("reward jpeg" in row for row in rows.values())
        assert ("accuracy" in rows["RL"]) == (model == tiny)
        assert not any("EMA" in name for name in rows)  # none of the checkpoints is an average


# --------------------------------------------------------------------------------------------------
# rl: what the search does.


class Group(NamedTuple):
    """A call of Merges.group: what it was asked, the members' features before it, the rewards."""

    candidates: torch.Tensor  # [G, B, K]
    count: int
    key: tuple
    members: torch.Tensor  # [M, F]
    replaced: torch.Tensor  # [count]
    rewards: dict


class Step(NamedTuple):
    """A call of policy_step."""

    mean: torch.Tensor
    log_std: torch.Tensor
    z: torch.Tensor
    advantage: torch.Tensor
    lr: float


@pytest.fixture
def spied(four, tmp_path, monkeypatch):
    """A search of two updates -> its groups, its policy steps, the mean's c after each update."""
    groups, steps = [], []
    group, policy_step = merge.Merges.group, merge.policy_step

    def spied_group(self, candidates, count, key, members, replaced):
        before = members.features.clone()
        values = group(self, candidates, count, key, members, replaced)
        groups.append(Group(candidates, count, key, before, replaced, values))
        return values

    def spied_step(mean, log_std, z, advantage, lr):
        steps.append(Step(mean.clone(), log_std.clone(), z, advantage, lr))
        return policy_step(mean, log_std, z, advantage, lr)

    monkeypatch.setattr(merge.Merges, "group", spied_group)
    monkeypatch.setattr(merge, "policy_step", spied_step)
    out = tmp_path / "out"
    flags = ["--updates", "2", "--reward", "fid:1,class:0.5"]
    merge.main(["rl", *four, *RL, *flags, "--out", str(out)])
    return groups, steps, coefficients(out)


class BruteForce:
    """Each merge built, drawn and priced once more, from the files alone."""

    def __init__(self, tiny, paths):
        self.tiny = tiny
        self.paths = paths
        self.model = bases.load(tiny)
        self.prompts = prompting.read_prompts(tiny / "prompts.jsonl")
        self.network = classifier.load_classifier(tiny / "reward")
        self.real = np.load(tiny / "reward" / "real-1.npz")

    def draw(self, c, count, key):
        """Pictures of one merge -> features [count, F], mean reward."""
        state = summed(self.tiny, self.paths, torch.as_tensor(c).flatten().tolist())
        self.model.network.load_state_dict(state)
        each = count // len(self.prompts)
        images = picture_sets.pictures(
            self.model, self.prompts, each, range(count), 2, 1.0, key, 500
        )
        labels = torch.tensor([prompt.metadata["label"] for prompt in self.prompts])
        labels = labels.repeat_interleave(each)
        log_p = self.network(images).log_softmax(1)[range(count), labels]
        values = log_p.clamp(min=classifier.FLOOR)
        return self.network.features(images), values.double().mean().item()

    def distance(self, features):
        """The Frechet distance from the real pictures."""
        mu, sigma = dist_reward.moments(features)
        return dist_reward.frechet_distance(mu, sigma, self.real["mu"], self.real["sigma"])


def advantage_of(values):
    """fid:1,class:0.5 -> advantages [G]."""
    index = torch.arange(len(values["fid"]))[None]
    fid = shaping.group_advantage(values["fid"][None], index)[0]
    label = shaping.group_advantage(values["class"][None], index)[0]
    return fid + 0.5 * label


@pytest.mark.run
def test_the_search_pays_the_fall_of_the_distance_by_brute_force(spied, four, tiny):
    groups, steps, means = spied
    fixed, first, random, second, other_random = groups
    brute = BruteForce(tiny, four)

    # Every reward is what the reference gains from the merge's pictures, and their own.
    for group in groups:
        assert len(group.replaced) == group.count == len(set(group.replaced.tolist()))
        for g in (0, len(group.candidates) - 1):
            features, reward = brute.draw(group.candidates[g], group.count, group.key)
            changed = group.members.clone()
            changed[group.replaced] = features
            fall = brute.distance(group.members) - brute.distance(changed)
            scaled = 60 / group.count * fall
            assert group.rewards["fid"][g].item() == pytest.approx(scaled, rel=1e-3, abs=1e-3)
            assert group.rewards["class"][g].item() == pytest.approx(reward, rel=1e-5)

    # The fixed merges are priced by the uniform average's pictures; the best is the origin.
    assert fixed.count == 60 and len(fixed.candidates) == 4 + 1 + 2
    features, _ = brute.draw([0.25] * 4, 60, fixed.key)
    torch.testing.assert_close(fixed.members, features, rtol=1e-4, atol=1e-4)
    start = fixed.candidates[advantage_of(fixed.rewards).argmax(), 0]
    features, _ = brute.draw(start, 60, fixed.key)
    torch.testing.assert_close(first.members, features, rtol=1e-4, atol=1e-4)

    # The mean's pictures take their place, at the noise that the group had.
    moved = first.members.clone()
    moved[first.replaced], _ = brute.draw(means[0], 30, first.key)
    torch.testing.assert_close(second.members, moved, rtol=1e-4, atol=1e-4)
    assert first.key != second.key
    assert len({*first.replaced.tolist(), *second.replaced.tolist()}) == 60

    # Random vectors are always priced by the pictures of the origin, at one noise.
    for group in (random, other_random):
        assert torch.equal(group.members, first.members)
    assert random.key == other_random.key
    assert not torch.equal(random.candidates, other_random.candidates)

    # The policy starts at the origin, and its vectors come in mirrored pairs.
    assert steps[0].mean.abs().max() == 0
    torch.testing.assert_close(steps[0].log_std.exp(), torch.full((1, 3), 0.1).double())
    Q = merge.directions(tensors.open_checkpoints(four)[1])
    for step, group in zip(steps, (first, second)):
        torch.testing.assert_close(merge.coefficients_of(step.z, start, Q), group.candidates)
        pairs = step.z[:2] + step.z[2:]
        torch.testing.assert_close(pairs, 2 * step.mean.expand(2, 1, 3))
        expected = advantage_of(group.rewards)
        torch.testing.assert_close(step.advantage, expected, rtol=1e-6, atol=1e-6)
        assert step.lr == 0.5


def worth(c):
    """A reward whose optimum is known: the last coefficient minus the first."""
    return float(c.flatten()[3] - c.flatten()[0])


@pytest.mark.slow
def test_the_best_of_the_rivals_is_shown(four, tmp_path, monkeypatch):
    rows = {}

    def known_rewards(self, candidates, *rest):
        c = candidates.double().mean(1)  # [G, K]
        return {"class": c[:, 3] - c[:, 0]}

    def keep_rows(args, merges, base, eval_prompts, shown):
        rows.update(shown)
        return ""

    monkeypatch.setattr(merge.Merges, "group", known_rewards)
    monkeypatch.setattr(merge, "report", keep_rows)
    flags = "--reward class:1 --updates 30 --group_size 8".split()
    merge.main(["rl", *four, *RL, *flags, "--out", str(tmp_path / "out")])

    base, single, _, ema, random, found = rows
    assert (base, random, found) == ("base model", "random search", "RL")
    assert "00003-0.100" in single
    assert rows[single].tolist() == [0, 0, 0, 1]
    lengths = {}
    for length in (0.07, 0.15):
        c = averages.ema_coefficients([2, 2, 3, 3], [0.05, 0.1, 0.05, 0.1], length)
        lengths[f"best post-hoc EMA {length}"] = c
    assert ema == max(lengths, key=lambda name: worth(lengths[name]))
    np.testing.assert_allclose(rows[ema], lengths[ema], atol=1e-9)
    # The best of 240 blind vectors, and what 30 steps uphill reach.
    gain_of_random = worth(rows[random]) - 1
    assert gain_of_random > 0.1
    assert worth(rows[found]) - 1 > 2 * gain_of_random


@pytest.mark.slow
def test_a_search_holds_no_more_pictures_than_a_batch_or_two(four, tmp_path, monkeypatch):
    """One that is being measured and one that is being drawn, of the 60 of a rival."""
    decode = stable_diffusion.StableDiffusion3.decode
    alive = weakref.WeakSet()
    counts = []

    def counted(self, latents):
        images = decode(self, latents).clone()
        alive.add(images)
        counts.append(sum(len(part) for part in alive))
        return images

    def no_report(*args):
        return ""

    monkeypatch.setattr(stable_diffusion.StableDiffusion3, "decode", counted)
    monkeypatch.setattr(merge, "report", no_report)
    flags = "--updates 1 --reward fid:1,class:0.5 --batch 7".split()
    merge.main(["rl", *four, *RL, *flags, "--out", str(tmp_path / "out")])
    assert len(counts) > 60
    assert 7 <= max(counts) <= 14


@pytest.mark.slow
def test_search_and_report_have_their_own_halves(rl, tiny, tmp_path):
    """Other real pictures in one half, or named by a flag, change the numbers of that half."""
    base = rl("--reward fid:1")
    for half in ("1", "2"):
        model = tmp_path / half
        shutil.copytree(tiny, model)
        sigma = np.diag(np.linspace(0.01, 2, 64))
        np.savez(model / "reward" / f"real-{half}.npz", mu=np.linspace(-3, 3, 64), sigma=sigma)
        other = rl(f"--reward fid:1 --model {model}")
        assert (read_metrics(base) == read_metrics(other)) == (half == "2")
        assert table(base) != table(other)

    target = tmp_path / "target.npz"
    np.savez(target, mu=np.zeros(64), sigma=np.eye(64))
    reported = rl(f"--reward fid:1 --report_target {target}")
    assert read_metrics(base) == read_metrics(reported)
    assert contents(base / "model") == contents(reported / "model")
    assert table(base) != table(reported)
    second_half = tiny / "reward" / "real-2.npz"
    searched = rl(f"--reward fid:1 --target {target} --report_target {second_half}")
    assert read_metrics(base) != read_metrics(searched)
    assert table(base)["base model"] == table(searched)["base model"]


@pytest.mark.slow
def test_every_flag_does_what_it_says(rl):
    base = rl("--reward fid:1")
    of_search = ["--seed 1", "--std 0.2", "--lr 0.3", "--group_size 6", "--images 60"]
    of_search += ["--reference 90", "--steps 3", "--guidance 2", "--precision bfloat16"]
    of_search += ["--features evaluator"]
    for flags in of_search:
        assert coefficients(rl(f"--reward fid:1 {flags}")) != coefficients(base), flags
    for flags in ("--report_images 40", "--report_seed 7"):
        out = rl(f"--reward fid:1 {flags}")
        assert read_metrics(out) == read_metrics(base), flags
        assert table(out) != table(base), flags
    memory_only = coefficients(rl("--reward fid:1 --batch 7"))
    np.testing.assert_allclose(memory_only, coefficients(base), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, flags",
    [
        (2, "--reward fid:1 --blocks"),
        (3, "--reward fid:1 --group_size 2"),  # one process has no candidate
    ],
)
def test_more_processes_find_what_one_finds(rl, four, tmp_path, processes, flags):
    one, out = rl(flags), tmp_path / "out"
    argv = ["rl", *four, *RL, *flags.split(), "--out", str(out)]
    code, text, error = launch_process(argv, processes, script="merge.py")
    assert code == 0, error
    assert text.count("| RL |") == 1
    np.testing.assert_allclose(coefficients(out), coefficients(one), atol=1e-5)
    assert_close(network_of(out / "model"), network_of(one / "model"), 1e-5)
    assert table(out).keys() == table(one).keys()


# --------------------------------------------------------------------------------------------------
# rl: stopped, and started again by the same command.


def assert_ended_alike(out, expected):
    """Metrics, model, table and the last checkpoint are the same to the bit."""
    assert read_metrics(out) == read_metrics(expected)
    assert contents(out / "model") == contents(expected / "model")
    assert (out / "table.md").read_text() == (expected / "table.md").read_text()
    assert_same(read_weights(out), read_weights(expected))


def assert_resumes(rl, four, out, owner, name, number):
    """A search killed after the number-th call of owner.name ends like one that was not."""
    expected = rl("--reward fid:1,class:0.5")
    argv = ["rl", *four, *RL, "--reward", "fid:1,class:0.5", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_call(patch, owner, name, number, kill)
        merge.main(argv)
    merge.main(argv)
    assert_ended_alike(out, expected)


@pytest.mark.run
def test_a_search_that_is_cut_off_goes_on_to_the_same_bits(rl, four, tmp_path):
    assert_resumes(rl, four, tmp_path / "out", merge, "policy_step", 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "owner, name, number",
    [
        (merge, "policy_step", 1),
        (files, "save_checkpoint", 1),
        (merge, "report", 1),
        (compare, "draw_coefficients", 1),
    ],
)
def test_a_search_that_is_cut_off_anywhere_goes_on(rl, four, tmp_path, owner, name, number):
    assert_resumes(rl, four, tmp_path / "out", owner, name, number)


@pytest.mark.slow
def test_a_search_that_is_asked_to_stop_saves_and_goes_on(rl, four, tmp_path, capfd):
    expected, out = rl("--reward fid:1,class:0.5"), tmp_path / "out"
    argv = ["rl", *four, *RL, "--reward", "fid:1,class:0.5", "--out", str(out)]

    def send():
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        at_call(patch, merge, "policy_step", 2, send)
        merge.main(argv)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "the same command goes on" in capfd.readouterr().out
    assert (out / "checkpoint-00002").is_dir()
    assert not (out / "checkpoint-00003").exists()
    assert not (out / "model").exists()
    merge.main(argv)
    assert_ended_alike(out, expected)


@pytest.mark.slow
def test_a_full_disk_ends_a_search_with_one_line(four, tmp_path, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    at_call(monkeypatch, files, "save_checkpoint", 2, full)
    message = "No space left on device.*checkpoint 2 is whole; the same command goes on"
    with pytest.raises(SystemExit, match=rf"^error: .*{message}"):
        merge.main(["rl", *four, *RL, "--reward", "fid:1", "--out", str(tmp_path / "out")])


@pytest.mark.slow
def test_a_search_of_another_configuration_is_not_continued(rl, four, capfd):
    out = rl("--reward fid:1")
    before = contents(out)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        merge.main(["rl", *four, *RL, "--reward", "fid:1", "--seed", "5", "--out", str(out)])
    assert stop.value.code == 2
    assert "--seed 0 saved, 5 now" in capfd.readouterr().err
    assert contents(out) == before


# --------------------------------------------------------------------------------------------------
# rl: what shows only when files are read whole.


@pytest.mark.slow
def test_a_prompt_that_is_not_a_class_leaves_nothing_behind(tmp_path, capfd):
    argv = ["rl"]
    for name in "ab":
        model = bases.load(build_sit(tmp_path / f"base-{name}"))
        model.save(tmp_path / name)
        argv.append(str(tmp_path / name))
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    argv += [*RL, "--reward", "jpeg", "--updates", "1", "--prompts", str(prompts)]
    argv += ["--out", str(out)]

    prompts.write_text("a boot\n")
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        merge.main(argv)
    assert stop.value.code == 2
    assert "error: prompt 'a boot': a class is a number" in capfd.readouterr().err
    assert contents(tmp_path) == before and not out.exists()

    prompts.write_text("goldfish\n")
    merge.main(argv)
    assert (out / "table.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--target", "--report_target"])
def test_own_features_of_another_size_than_a_target_are_refused(
    four, tmp_path, monkeypatch, capfd, flag
):
    """How many there are is known only from a picture, but before anything is searched."""
    code = "def f(images):\n    return images.flatten(1)[:, :4]\n"
    (tmp_path / "few_features.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    fitting, other = tmp_path / "four.npz", tmp_path / "five.npz"
    np.savez(fitting, mu=np.zeros(4), sigma=np.eye(4))
    np.savez(other, mu=np.zeros(5), sigma=np.eye(5))
    targets = {"--target": fitting, "--report_target": fitting} | {flag: other}
    argv = ["rl", *four, *RL, "--features", "few_features:f", "--out", str(tmp_path / "out")]
    for name, path in targets.items():
        argv += [name, str(path)]
    with pytest.raises(SystemExit) as stop:
        merge.main(argv)
    assert stop.value.code == 2
    assert "five.npz" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
