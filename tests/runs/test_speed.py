"""experiments/speed.py: both loops do the same, the clock adds up, mistakes are one line."""

import re
from dataclasses import replace

import diffusers
import evidence
import pytest
import random_bases
import speed
import torch
from conftest import launch_process
from torch.utils._python_dispatch import TorchDispatchMode

from sampling import log_prob, predict, seeded_noise, transition

CPU = torch.device("cpu")

# 4 rollouts of 3 steps, of which 2 are trained: 8 pairs.
OPTIONS = speed.Args(
    prompts_per_step=2,
    group_size=2,
    steps=3,
    repeats=1,
    peer_batch=3,
    peer_train_batch=3,
    batch=5,
    device="cpu",
)
SMALL = ["--repeats", "1", "--prompts_per_step", "2", "--group_size", "4"]


@pytest.fixture(scope="module")
def bench(tiny):
    return speed.open_bench("tiny", tiny, OPTIONS, CPU)


def noise_of(bench):
    """What our rollout draws, [B, 1 + W, ...]."""
    return seeded_noise((0, 0, 0, 0), range(4), (3, *bench.setup.model.shape))


def with_setup(bench, **changes):
    return replace(bench, setup=replace(bench.setup, **changes))


# --------------------------------------------------------------------------------------------------
# The loops.


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_both_loops_do_the_same_and_their_operations_are_counted(bench, guidance):
    """Batches of 3 and 5 divide neither 4 rollouts nor 8 pairs."""
    advantage = torch.tensor([1.0, -2.0, 0.5, 1.0])
    guided = bench.guided(guidance)
    rollout, update = speed.check_same(guided, OPTIONS, noise_of(bench), advantage)
    # Two of three steps are trained; forward and backward are one to three forwards.
    assert rollout > 0
    assert 2 / 3 < update / rollout < 2
    if guidance != 1:
        assert rollout == 2 * speed.counted(lambda: speed.our_rollout(bench))


def shifted_transition(*step):
    mean, std = transition(*step)
    return 1.001 * mean, std


def log_prob_without_gradient(*step):
    return 0 * log_prob(*step)


@pytest.mark.parametrize(
    "name, wrong",
    [("transition", shifted_transition), ("log_prob", log_prob_without_gradient)],
)
def test_a_peer_that_does_something_else_is_not_timed(bench, monkeypatch, name, wrong):
    monkeypatch.setattr(speed, name, wrong)
    with pytest.raises(RuntimeError, match="the loops disagree.*nothing was timed"):
        speed.check_same(bench, OPTIONS, noise_of(bench), torch.ones(4))


@pytest.fixture
def watched(bench, monkeypatch):
    """Lists that grow: inputs of each forward, texts of each encoding, losses of each backward."""
    forwards, encoded, backwards = [], [], []
    encode = bench.encoder.encode
    backward = torch.Tensor.backward

    def note_forward(network, inputs, named):
        forwards.append(len(named["hidden_states"]))

    def note_texts(texts):
        encoded.append(len(texts))
        return encode(texts)

    def note_backward(loss):
        backwards.append(loss)
        return backward(loss)

    network = bench.setup.model.network
    hook = network.register_forward_pre_hook(note_forward, with_kwargs=True)
    monkeypatch.setattr(bench.encoder, "encode", note_texts)
    monkeypatch.setattr(torch.Tensor, "backward", note_backward)
    yield forwards, encoded, backwards
    hook.remove()


def test_the_peer_is_a_plain_loop(bench, watched):
    """A forward for each batch, step and half of the guidance; a backward for each batch and step.

    Prompts are encoded for each batch. Ours: few large batches, and no prompt twice.
    """
    forwards, encoded, backwards = watched
    guided = bench.guided(2.0)
    samples = speed.peer_rollout(guided, noise_of(bench), 3)
    assert forwards == [3] * 6 + [1] * 6
    assert encoded == [3, 1, 1, 1]
    forwards.clear()
    speed.peer_update(guided, samples, torch.ones(4), 3)
    assert forwards == [3] * 4 + [1] * 4
    assert len(backwards) == 4

    forwards.clear()
    encoded.clear()
    backwards.clear()
    speed.our_update(guided, speed.our_rollout(guided), torch.ones(4))
    assert forwards == [8] * 3 + [10, 6]
    assert len(backwards) == 2
    assert encoded == []


aten = torch.ops.aten
QUESTIONS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}


class Questions(TorchDispatchMode):
    """Counts the numbers that Python asks of a tensor: a GPU stops for each."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in QUESTIONS:
            self.count += 1
        return operation(*args, **(kwargs or {}))


def questions_asked(bench, train_batch, trained):
    """How many an update asks, with this --train_batch and these parameters."""
    optimizer = torch.optim.SGD(trained.values(), lr=0.0)
    changed = with_setup(bench, trained=trained, optimizer=optimizer)
    changed = replace(changed, args=replace(bench.args, train_batch=train_batch))
    with Questions() as questions:
        speed.our_update(changed, speed.our_rollout(changed), torch.ones(4))
    return questions.count


def test_a_gpu_is_not_stopped_by_micro_batches_or_tensors(bench):
    """An update asks as often with eight micro-batches, and of two parameters, as otherwise."""
    all_trained = bench.setup.trained
    two_trained = dict(list(all_trained.items())[:2])
    asked = questions_asked(bench, 8, all_trained)
    assert asked > 0
    assert questions_asked(bench, 1, all_trained) == asked
    assert questions_asked(bench, 8, two_trained) == asked


# --------------------------------------------------------------------------------------------------
# Measuring.


def test_turns_are_taken():
    order = []

    def named(name):
        return lambda: order.append(name)

    seconds = speed.take_turns({name: named(name) for name in "abc"}, 3, CPU)
    assert "".join(order) == "cbaabccbaabc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert speed.median_ratio([3.0, 8.0, 10.0], [1.0, 2.0, 10.0]) == 3.0


def test_memory_is_that_of_the_function():
    def nothing():
        pass

    def quarter_of_a_gigabyte():
        torch.ones(2**26)

    before = speed.peak_gb(nothing, CPU)
    if before != before:
        pytest.skip("this system does not count a process's peak memory anew")
    assert speed.peak_gb(quarter_of_a_gigabyte, CPU) - before == pytest.approx(0.25, abs=0.03)
    assert speed.peak_gb(nothing, CPU) - before == pytest.approx(0, abs=0.03)


# --------------------------------------------------------------------------------------------------
# The bases of random weights.


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sd1", "sd3"])
def test_the_small_bases_are_bases_like_any_other(base, tmp_path):
    random_bases.build(base, tmp_path / base, CPU)
    options = replace(OPTIONS, group_size=1, prompts_per_step=1)
    bench = speed.open_bench(base, tmp_path / base, options, CPU)
    setup = bench.setup
    assert 2e6 < sum(p.numel() for p in setup.model.network.parameters()) < 8e6
    latents = speed.our_rollout(bench.guided(2.0)).latents
    assert latents.isfinite().all()
    assert setup.model.decode(latents[-1]).std() > 0.01

    half = torch.tensor([0.5])
    prompt = setup.model.encode([setup.prompts[0].text])
    with_prompt, _ = predict(setup.model, latents[0], half, prompt)
    without, _ = predict(setup.model, latents[0], half, setup.null_prompt)
    assert not torch.equal(with_prompt, without)


def test_the_large_bases_have_the_published_sizes():
    with torch.device("meta"):
        sd15 = diffusers.UNet2DConditionModel(**random_bases.UNETS["sd15"])
        sd35 = diffusers.SD3Transformer2DModel(**random_bases.TRANSFORMERS["sd35"])
    for network, millions in ((sd15, 860), (sd35, 2243)):
        assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions


# --------------------------------------------------------------------------------------------------
# The command.


@pytest.mark.slow
def test_the_tables(tiny, capsys):
    """A row for each scale of guidance and phase, then a row of seconds that add up."""
    speed.main(["--bases", str(tiny), "--guidance", "1,2", "--processes", "0", *SMALL])
    rows = []
    for line in capsys.readouterr().out.splitlines():
        if line.startswith(f"| {tiny.name} "):
            rows.append([cell.strip() for cell in line.strip("|\n").split("|")])
    *loops, parts = rows
    assert [row[1:3] for row in loops] == [
        ["1", "rollout, images/s"],
        ["1", "update, pairs/s"],
        ["2", "rollout, images/s"],
        ["2", "update, pairs/s"],
    ]
    for row in loops:
        assert all(float(cell) > 0 for cell in row[3:8])

    network, decode, reward, features, rest = map(float, parts[1:6])
    assert network > decode >= 0
    assert rest > 0 and features == 0
    total = network + decode + reward + features + rest
    assert float(parts[6].split()[0]) == pytest.approx(100 * rest / total, abs=10)


@pytest.fixture
def compared(monkeypatch):
    """A list that grows: what would be compiled, and the two precisions that would be compared."""
    calls = []

    def note_compiled(network, **keywords):
        calls.append(next(network.parameters()).dtype)

    def note_compared(base, bench, tuned, options):
        calls.append((bench.args.precision, tuned.args.precision, tuned is bench))

    monkeypatch.setattr(torch.nn.Module, "compile", note_compiled)
    monkeypatch.setattr(speed, "compare_loops", note_compared)
    monkeypatch.setattr(speed, "split_iteration", lambda base, bench, repeats: None)
    return calls


@pytest.mark.parametrize(
    "flags, bfloat16_rate, calls, tuned",
    [
        ("", 2.0, [("float32", "bfloat16", False)], "bfloat16"),
        (
            "--compile --precision bfloat16",
            2.0,
            [torch.float32, ("bfloat16", "bfloat16", False)],
            "bfloat16, compiled",
        ),
        # A CPU without matrix instructions.
        ("", 0.5, [("float32", "float32", True)], "float32"),
    ],
)
def test_the_tuned_loop(tiny, monkeypatch, capsys, compared, flags, bfloat16_rate, calls, tuned):
    """It is in the faster precision, and with --compile it alone is compiled."""
    rate = {"float32": 1.0, "bfloat16": bfloat16_rate}
    monkeypatch.setattr(evidence, "matrix_rate", lambda device, precision: rate[precision])
    speed.main(["--bases", str(tiny), "--processes", "0", *flags.split()])
    assert compared == calls
    assert f"tuned: {tuned}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_take_turns_with_one(tiny):
    argv = ["--bases", str(tiny), "--guidance", "1", *SMALL]
    code, out, error = launch_process(argv, script="experiments/speed.py")
    assert code == 0, error
    line = (
        r"takes one process ([\d.e-]+) s, 2 processes ([\d.e-]+) s, "
        r"one thread each: x ([\d.]+)"
    )
    alone, shared, times = map(float, re.search(line, out).groups())
    # Seconds are rounded to three digits, the ratio to two.
    assert times > 0
    assert times == pytest.approx(alone / shared, abs=0.01 + 0.02 * times)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "--bases sd7",
            "--bases sd7: neither a folder nor one of tiny, sd1, sd15, sdxl, sd3, sd35",
        ),
        ("--steps 1", "--steps 1: must be 2 or more"),
        ("--guidance x", "--guidance x: write numbers with commas between, as in 0.05,0.1"),
    ],
)
def test_a_bad_flag_is_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        speed.main(flags.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"
