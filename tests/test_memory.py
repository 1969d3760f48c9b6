"""The estimates of experiments/memory.py: bytes counted by hand, and counted by autograd on tensors that have a content."""
import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import memory
from bases import sit
from memory import Live, hollow, line, peak

WIDE, HIDDEN, OUT = 24, 40, 8


def mlp():
    return nn.Sequential(nn.Linear(WIDE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUT))


@pytest.mark.parametrize("fake", [True, False])
@pytest.mark.parametrize("n", [1, 7])
def test_what_a_forward_keeps_is_counted_by_hand(n, fake):
    with torch.device("meta" if fake else "cpu"):
        network = mlp()
    with FakeTensorMode() if fake else torch.enable_grad():
        hollow(network)
        x = torch.zeros(n, WIDE)
        with Live() as live:
            out = network(x)
            assert live.now == 4 * n * (HIDDEN + OUT)                    # the ReLU's output for the second layer, and ours; x was there
            assert live.peak == 4 * n * 2 * HIDDEN                       # the ReLU's input and output
            del out
            assert live.now == 0
        with Live() as live, torch.no_grad():
            network(x)
        assert live.peak == 4 * n * 2 * HIDDEN and live.now == 0


def test_a_backward_beside_the_gradients_of_the_last_is_counted_by_hand():
    n, weights = 1000, WIDE * HIDDEN + HIDDEN + HIDDEN * OUT + OUT
    with FakeTensorMode():
        network = hollow(mlp())
        at_most = peak(network, [torch.zeros(n, WIDE)], lambda network, x: network(x).float(), train=True)
    assert all(p.grad is None for p in network.parameters())
    kept = n * (2 * WIDE + 2 * HIDDEN)                                   # bfloat16, so half of it is weights' width: x, and the hidden layer
    assert 4 * weights + kept < at_most < 4 * weights + 3 * kept + 4 * n * 3 * OUT + 4 * weights


def test_a_forward_keeps_what_autograd_saves():
    """Against the storages that autograd's own hooks see, on a real network of real tensors; once with recomputation."""
    torch.manual_seed(0)
    found = []
    network = sit.SiT(8, 2, 4, 24, 3, 4, 5).eval()
    inputs = [torch.randn(3, 4, 8, 8), torch.rand(3), torch.randn(3, 24)]
    for checkpointing in (False, True):
        if checkpointing:
            memory.models.recompute(network)
        own, saved = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers(), *inputs]}, {}

        def note(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = network(*inputs)
        expected = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in own | {out.untyped_storage().data_ptr()})
        with Live() as live:
            again = network(*inputs)
            found.append(live.now - again.untyped_storage().nbytes())
        assert found[-1] == expected
    assert 3 * 3 * 16 * 24 * 4 <= found[1] < found[0] / 5                # recomputed, the inputs of three blocks: 3 pictures of 16 tokens


def test_a_line_is_above_every_peak():
    peaks = lambda n: max(100 + 3 * n, 10 + 5 * n, 170)                  # gradients alone, then one moment, then another
    fixed, slope = line({n: peaks(n) for n in (1, 256, 512)})
    assert slope == 5 and all(fixed + slope * n >= peaks(n) for n in range(1, 2000)) and fixed + slope < 1.1 * peaks(1)


def test_the_table_is_printed_and_recomputation_and_lora_save_memory(monkeypatch, capsys):
    monkeypatch.setattr(memory, "VAE", memory.VAE | dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1))
    monkeypatch.setitem(sit.SIZES, "XL", (1152, 3, 16))
    memory.main(["--bases", "sit", "--lora", "4", "--steps", "3"])
    above, below = capsys.readouterr().out.split("\n\n")
    lora, lora_again, whole, whole_again = (re.findall(r"[\d.]+", line) for line in above.splitlines()[2:])
    learns, fixed, pair = (lambda row: float(row[0])), (lambda row: float(row[1])), (lambda row: float(row[2]))
    assert learns(lora) == learns(lora_again) < learns(whole) == learns(whole_again) and len(lora) == 3 + 6
    assert pair(lora_again) < pair(lora) < pair(whole) and pair(whole_again) < pair(whole) and fixed(lora) < fixed(whole)
    assert all(2 * int(guided) <= int(alone) < 2 * int(guided) + 2 for row in (lora, whole) for alone, guided in zip(row[3::2], row[4::2]))
    trajectory, condition, picture, _, *most = map(float, re.findall(r"[\d.]+", below.splitlines()[2]))
    assert (trajectory, condition, picture) == pytest.approx((7 * 4096 * 4 / 2**20, 2 * 1152 * 4 / 2**20, 3 * 256**2 * 4 / 2**20), abs=0.006)
    for gpu, here, offloaded in zip(memory.GPUS, most[::2], most[1::2]):
        assert here == pytest.approx(offloaded * (condition + picture) / (trajectory + condition + picture), rel=0.02) and here * 0.75 < gpu * 1024


def test_the_published_sizes():
    millions = {name: sum(p.numel() for p in memory.open_base(name)[0].parameters()) / 1e6 for name in ("sd15", "sd35-512", "sit", "edm2")}
    assert millions == pytest.approx({"sd15": 859.5, "sd35-512": 2243.2, "sit": 674.8, "edm2": 280.2}, abs=0.1)


def test_more_memory_fits_more():
    assert memory.fits(24, 0, memory.GB) == 22 and memory.fits(24, 20 * memory.GB, memory.GB) == 2 and memory.fits(24, 23 * memory.GB, memory.GB) == 0


@pytest.mark.parametrize("flags, naming", [(["--bases", "sd15,sdxl"], "'sdxl'"), (["--lora", "0"], "--lora 0"), (["--steps", "0"], "--steps 0")])
def test_mistakes_are_one_line(flags, naming, capsys):
    with pytest.raises(SystemExit) as stop:
        memory.main(flags)
    assert stop.value.code == 2 and naming in capsys.readouterr().err
