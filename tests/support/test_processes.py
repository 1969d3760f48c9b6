"""processes.py: shares, sums over processes, and signals."""

import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch_process

from support import processes

CPU = torch.device("cpu")


@pytest.mark.parametrize("n, world", [(12, 4), (10, 4), (3, 5), (0, 2)])
def test_shares_are_contiguous_whole_and_equal_to_one(monkeypatch, n, world):
    monkeypatch.setattr(processes, "world", lambda: world)
    shares = [processes.share(n, process) for process in range(world)]
    assert [sample for share in shares for sample in share] == list(range(n))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_one_process_needs_no_group():
    assert processes.start("cpu") == CPU
    assert (processes.rank(), processes.world()) == (0, 1)
    assert processes.share(5) == range(5)
    rows = torch.arange(6.0).reshape(3, 2)
    assert processes.gather(rows, 3) is rows
    assert processes.all_say("a") == ["a"]
    assert processes.all_sum(rows) is rows
    assert processes.all_max(2, CPU) == 2.0
    processes.check_equal({"a": rows}, CPU)
    with_gradient, without = torch.ones(2), torch.ones(3)
    with_gradient.grad = torch.full((2,), 5.0)
    processes.sum_gradients([with_gradient, without])
    assert with_gradient.grad.tolist() == [5, 5]
    assert without.grad.tolist() == [0, 0, 0]
    assert processes.peak_memory(CPU) > 0.01
    processes.finish()


THREE = """
import sys
sys.path.insert(0, {root!r})
import torch
from support import processes

device = processes.start("cpu")
rank = processes.rank()
assert processes.world() == 3

# Eleven samples: shares of 3, 4 and 4.
share = processes.share(11)
rows = torch.tensor([[sample, 10.0 * sample] for sample in share])
whole = torch.tensor([[sample, 10.0 * sample] for sample in range(11)])
assert torch.equal(processes.gather(rows, 11), whole)
one = torch.full((len(processes.share(1)), 2), 7, dtype=torch.uint8)       # two processes have none
assert processes.gather(one, 1).tolist() == [[7, 7]]

assert processes.all_say({{"rank": rank}}) == [{{"rank": 0}}, {{"rank": 1}}, {{"rank": 2}}]
assert processes.all_sum(torch.tensor([1.0, rank])).tolist() == [3, 3]
assert processes.all_max(10 - rank, device) == 10

a, b, c = torch.ones(2, 2), torch.ones(3), torch.ones(1)
a.grad = torch.full((2, 2), 1.0 + rank)
if rank == 2:
    b.grad = torch.tensor([1.0, 2.0, 3.0])
processes.sum_gradients(dict(a=a, b=b, c=c).values())
assert a.grad.tolist() == [[6, 6], [6, 6]]
assert b.grad.tolist() == [1, 2, 3] and c.grad.tolist() == [0]

processes.finish()
print("left\\n", end="", flush=True)
"""


@pytest.mark.slow
def test_three_processes_share_and_sum(tmp_path):
    script = tmp_path / "three.py"
    script.write_text(THREE.format(root=str(ROOT)))
    code, out, error = launch_process([], 3, script=script)
    assert code == 0, error
    assert out.split() == ["left"] * 3


DISAGREEING = """
import sys
sys.path.insert(0, {root!r})
import torch
from support import processes

device = processes.start("cpu")
rank = processes.rank()
nan = torch.tensor(float("nan"))
processes.check_equal({{"layer.a": torch.ones(3), "layer.b": nan}}, device)
other = torch.ones(2) + 1e-6 * (rank == 1)
try:
    processes.check_equal({{"layer.a": torch.ones(3), "layer.b": other}}, device)
except RuntimeError as error:
    print(f"{{rank}} {{error}}\\n", end="", flush=True)
processes.finish()
"""


@pytest.mark.slow
def test_processes_that_disagree_about_the_weights_stop_and_say_where(tmp_path):
    script = tmp_path / "disagreeing.py"
    script.write_text(DISAGREEING.format(root=str(ROOT)))
    code, out, error = launch_process([], 2, script=script)
    assert code == 0, error
    first, second = sorted(out.splitlines())
    assert first.startswith("0 the processes disagree about layer.b: 2.0 on process 0, 2.0000")
    assert second.startswith("1 the processes disagree about layer.b: 2.0000")


LEAVING = """
import os, sys
sys.path.insert(0, {root!r})
import torch
from support import processes

processes.start("cpu")
weight = torch.ones(2, requires_grad=True)
optimizer = torch.optim.AdamW([weight])
processes.all_sum(weight.detach()).sum()
weight.sum().backward()
optimizer.step()
processes.finish()
tasks = "/proc/self/task"
names = [open(f"{{tasks}}/{{number}}/comm").read().strip() for number in os.listdir(tasks)]
print("threads:", *names, "\\n", end="", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads Linux's names of threads")
def test_a_process_leaves_its_group_with_no_thread_of_it_behind(tmp_path):
    """A thread of the group that is alive when the interpreter ends may abort a finished run."""
    script = tmp_path / "leaving.py"
    script.write_text(LEAVING.format(root=str(ROOT)))
    code, out, error = launch_process([], 2, script=script)
    assert code == 0, error
    assert out.count("threads:") == 2
    assert "gloo" not in out


def test_signals_are_noted_and_handlers_restored():
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGINT):
        with processes.Interrupt() as interrupt:
            assert not interrupt.asked(CPU)
            os.kill(os.getpid(), number)
            assert interrupt.asked(CPU)
            assert interrupt.signal == number
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_comes_while_the_processes_agree_is_heard_the_next_time(monkeypatch):
    numbers = []

    def agree(number, device):
        if not numbers:
            os.kill(os.getpid(), signal.SIGTERM)
        numbers.append(number)
        return float(number)

    monkeypatch.setattr(processes, "all_max", agree)
    with processes.Interrupt() as interrupt:
        assert not interrupt.asked(CPU)
        assert interrupt.asked(CPU)
    assert numbers == [0, 15]
    assert interrupt.signal == 15


def test_a_stopped_process_says_so_and_ends_as_a_shell_expects(capsys):
    interrupt = processes.Interrupt()
    interrupt.signal = signal.SIGTERM
    with pytest.raises(SystemExit) as stop:
        interrupt.leave("runs/x: stopped")
    assert stop.value.code == 143
    assert capsys.readouterr().out == "runs/x: stopped\n"
