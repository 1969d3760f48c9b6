"""The speed benchmark: both of its loops do the same, its clock adds up, and its command says no in one line."""
import re
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import evidence
import random_bases
import speed
from conftest import launch_process
from sampling import predict

OPTIONS = speed.Args(prompts_per_step=2, group_size=2, steps=3, repeats=1, peer_batch=3, peer_train_batch=3, batch=5, device="cpu")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(tiny):
    return speed.open_bench("tiny", tiny, OPTIONS, CPU)


def noise(bench):
    return speed.train.seeded_noise((0, 0, 0, 0), range(4), (3, *bench.model.shape))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_both_loops_do_the_same_and_what_they_do_is_counted(bench, guidance):
    """With batches of 3 and 5 over 4 rollouts and 8 pairs: none is full twice."""
    rollout, update = speed.check_same(bench.guided(guidance), OPTIONS, noise(bench), torch.tensor([1.0, -2.0, 0.5, 1.0]))
    assert rollout > 0 and 2 / 3 < update / rollout < 2                  # 2 of 3 steps; forward and backward are one to three forwards
    if guidance != 1:
        assert rollout == 2 * speed.counted(lambda: speed.our_rollout(bench))


TRANSITION, LOG_PROB = speed.transition, speed.log_prob


def test_a_peer_that_does_something_else_is_not_timed(bench, monkeypatch):
    for name, wrong in (("transition", lambda *step: [1.001 * part for part in TRANSITION(*step)]), ("log_prob", lambda *step: 0 * LOG_PROB(*step))):
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="the loops disagree.*nothing was timed"):
            patched.setattr(speed, name, wrong)
            speed.check_same(bench, OPTIONS, noise(bench), torch.ones(4))


def test_the_peer_is_a_plain_loop(bench, monkeypatch):
    """A forward for each batch, step and guidance half; a backward for each batch and step; prompts encoded for each batch."""
    sizes, encoded, backwards = [], [], []
    encode, backward = bench.encoder.encode, torch.Tensor.backward
    bench.model.network.register_forward_pre_hook(lambda network, _, named: sizes.append(len(named["hidden_states"])), with_kwargs=True)
    monkeypatch.setattr(bench.encoder, "encode", lambda texts: encoded.append(len(texts)) or encode(texts), raising=False)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: backwards.append(loss) or backward(loss))
    now = bench.guided(2.0)
    samples = speed.peer_rollout(now, noise(bench), 3)
    assert sizes == [3] * 6 + [1] * 6 and encoded == [3, 1, 1, 1]
    sizes.clear()
    speed.peer_update(now, samples, torch.ones(4), 3)
    assert sizes == [3] * 4 + [1] * 4 and len(backwards) == 4
    sizes.clear(), backwards.clear(), encoded.clear()
    speed.our_update(now, speed.our_rollout(now), torch.ones(4))
    assert sizes == [8] * 3 + [10, 6] and len(backwards) == 2 and encoded == []


class Questions(TorchDispatchMode):
    """Counts the numbers that Python asks of a tensor: a GPU stops for each."""
    count = 0

    def __torch_dispatch__(self, operation, types, inputs=(), more=None):
        self.count += operation in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)
        return operation(*inputs, **(more or {}))


def test_a_gpu_is_not_stopped_by_micro_batches_or_tensors(bench):
    """An update asks as often with eight micro-batches as with one, and as often of two parameters as of all."""
    def asked(train_batch, trained):
        now = replace(bench, args=replace(bench.args, train_batch=train_batch), trained=trained, optimizer=torch.optim.SGD(trained.values(), lr=0.0))
        with Questions() as questions:
            speed.our_update(now, speed.our_rollout(now), torch.ones(4))
        return questions.count
    few = dict(list(bench.trained.items())[:2])
    assert 0 < asked(8, bench.trained) == asked(1, bench.trained) == asked(8, few)


def test_turns_are_taken():
    order = []
    loops = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = speed.take_turns(loops, 3, CPU)
    assert "".join(order) == "cbaabccbaabc" and {name: len(found) for name, found in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert speed.ratio([3.0, 8.0, 10.0], [1.0, 2.0, 10.0]) == 3.0


def test_memory_is_that_of_the_function():
    def takes(gigabytes):
        return lambda: torch.ones(int(gigabytes * 2**28))
    before = speed.peak_gb(lambda: None, CPU)
    if before != before:
        pytest.skip("this system does not count a process's peak memory anew")
    assert speed.peak_gb(takes(0.25), CPU) - before == pytest.approx(0.25, abs=0.03)
    assert speed.peak_gb(lambda: None, CPU) - before == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("base", ["sd1", "sd3"])
def test_the_small_bases_are_bases_like_any_other(base, tmp_path):
    random_bases.build(base, tmp_path / base, CPU)
    bench = speed.open_bench(base, tmp_path / base, replace(OPTIONS, group_size=1, prompts_per_step=1), CPU)
    assert 2e6 < sum(p.numel() for p in bench.model.network.parameters()) < 8e6
    latents = speed.our_rollout(bench.guided(2.0)).latents
    assert latents.isfinite().all() and bench.model.decode(latents[-1]).std() > 0.01
    drawn = [predict(bench.model, latents[0], torch.tensor([0.5]), prompt)[0] for prompt in (bench.model.encode([bench.prompts[0].text]), bench.null)]
    assert not torch.equal(*drawn)                                       # the prompt matters


@pytest.mark.parametrize("base, millions", [("sd15", 860), ("sd35", 2243)])
def test_the_large_bases_have_the_published_sizes(base, millions):
    import diffusers
    with torch.device("meta"):
        if base in random_bases.UNETS:
            network = diffusers.UNet2DConditionModel(sample_size=64, **random_bases.UNETS[base][1])
        else:
            network = diffusers.SD3Transformer2DModel(sample_size=64, patch_size=2, qk_norm="rms_norm", **random_bases.TRANSFORMERS[base][1])
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions


def test_the_tables(tiny, capsys):
    """A row for each scale of guidance and phase, then a row of seconds that add up."""
    speed.main(["--bases", str(tiny), "--repeats", "1", "--guidance", "1,2", "--prompts_per_step", "2", "--group_size", "4", "--processes", "0"])
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {tiny.name} ")]
    assert [row[1:3] for row in rows[:4]] == [[g, what] for g in "12" for what in ("rollout, images/s", "update, pairs/s")] and len(rows) == 5
    assert all(float(cell) > 0 for row in rows[:4] for cell in row[3:8])
    network, decode, reward, features, rest = map(float, rows[4][1:6])
    assert network > decode >= 0 and rest > 0 and features == 0
    assert float(rows[4][6].split()[0]) == pytest.approx(100 * rest / (network + decode + reward + features + rest), abs=10)


def test_with_compile_the_tuned_loop_is_compiled(tiny, monkeypatch, capsys):
    compiled, rate = [], {"float32": 1.0, "bfloat16": 2.0}
    monkeypatch.setattr(evidence, "matrix_rate", lambda device, precision: rate[precision])
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network, **more: compiled.append(next(network.parameters()).dtype))
    monkeypatch.setattr(speed, "compare_loops", lambda base, bench, low, options: compiled.append((bench.args.precision, low.args.precision, low is bench)))
    monkeypatch.setattr(speed, "split_iteration", lambda *inputs: None)
    for flags in ([], ["--compile"], ["--compile", "--precision", "bfloat16"], ["--precision", "bfloat16"]):
        speed.main(["--bases", str(tiny), "--processes", "0", *flags])
    assert compiled == [("float32", "bfloat16", False), torch.float32, ("float32", "bfloat16", False), torch.float32, ("bfloat16", "bfloat16", False),
                        ("bfloat16", "bfloat16", True)]
    assert capsys.readouterr().out.count("tuned: bfloat16, compiled") == 2
    rate["bfloat16"] = 0.5                                               # a CPU without matrix instructions
    speed.main(["--bases", str(tiny), "--processes", "0"])
    assert compiled[-1] == ("float32", "float32", True) and "tuned: float32\n" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_take_turns_with_one(tiny):
    code, out, err = launch_process(["--bases", str(tiny), "--repeats", "1", "--guidance", "1", "--prompts_per_step", "2", "--group_size", "4"],
                                    script="experiments/speed.py")
    assert code == 0, err
    alone, shared, times = map(float, re.search(r"takes one process ([\d.e-]+) s, 2 processes ([\d.e-]+) s, one thread each: x ([\d.]+)", out).groups())
    assert times == pytest.approx(alone / shared, abs=0.01 + 0.02 * times) and times > 0   # each is rounded to three digits, the ratio to two


@pytest.mark.parametrize("flags, said", [
    (["--bases", "sd7"], "--bases sd7: neither a folder nor one of tiny, sd1, sd15, sd3, sd35"), (["--steps", "1"], "--steps 1: must be 2 or more"),
    (["--repeats", "0"], "--repeats 0: must be 1 or more"), (["--guidance", "x"], "--guidance x: write numbers with commas between, as in 0.05,0.1")], ids=str)
def test_a_bad_flag_is_one_line(flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        speed.main(flags)
    assert stopped.value.code == 2 and capsys.readouterr().err == f"error: {said}\n"
