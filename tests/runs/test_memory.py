"""The estimates of experiments/memory.py, against bytes counted by hand and by autograd."""

import re

import memory
import pytest
import torch
from memory import Live, hollow, line, peak
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bases
from bases import sit

INPUTS, HIDDEN, OUTPUTS = 24, 40, 8
WEIGHTS = INPUTS * HIDDEN + HIDDEN + HIDDEN * OUTPUTS + OUTPUTS


def mlp():
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUTS))


def count_a_forward(network, n):
    """Counts a forward of n inputs with and without gradients, and compares with the formulas."""
    x = torch.zeros(n, INPUTS)
    with Live() as live:
        out = network(x)
        # Kept: the ReLU's output for the second layer, and the result. x was there before.
        assert live.now == 4 * n * (HIDDEN + OUTPUTS)
        # At most: the ReLU's input and output.
        assert live.peak == 4 * n * 2 * HIDDEN
        del out
        assert live.now == 0
    with Live() as live, torch.no_grad():
        network(x)
    assert live.peak == 4 * n * 2 * HIDDEN
    assert live.now == 0


def test_what_a_forward_keeps_is_counted_by_hand():
    count_a_forward(mlp(), n=1)
    with torch.device("meta"):
        network = mlp()
    with FakeTensorMode():
        count_a_forward(hollow(network), n=7)


def test_a_backward_beside_the_gradients_of_the_last_is_counted_by_hand():
    n = 1000

    def call(network, x):
        return network(x).float()

    with FakeTensorMode():
        network = hollow(mlp())
        at_most = peak(network, [torch.zeros(n, INPUTS)], call, train=True)
    assert all(parameter.grad is None for parameter in network.parameters())
    kept = n * (2 * INPUTS + 2 * HIDDEN)  # x and the hidden layer, in bfloat16
    assert 4 * WEIGHTS + kept < at_most
    assert at_most < 4 * WEIGHTS + 3 * kept + 4 * n * 3 * OUTPUTS + 4 * WEIGHTS


def bytes_autograd_saves(network, inputs):
    """The storages that autograd's own hooks see in a forward, beside weights, inputs, result."""
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def give(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, give):
        out = network(*inputs)
    for tensor in (*network.parameters(), *network.buffers(), *inputs, out):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def bytes_counted(network, inputs):
    with Live() as live:
        out = network(*inputs)
        return live.now - out.untyped_storage().nbytes()


def test_a_forward_keeps_what_autograd_saves():
    """On a real network of real tensors, without and with recomputation."""
    torch.manual_seed(0)
    network = sit.SiT(8, 2, 4, 24, 3, 4, 5).eval()
    inputs = [torch.randn(3, 4, 8, 8), torch.rand(3), torch.randn(3, 24)]
    whole = bytes_counted(network, inputs)
    assert whole == bytes_autograd_saves(network, inputs)
    bases.recompute(network)
    recomputed = bytes_counted(network, inputs)
    assert recomputed == bytes_autograd_saves(network, inputs)
    # At least the inputs of three blocks, of three pictures of 16 tokens each.
    assert 3 * 3 * 16 * 24 * 4 <= recomputed < whole / 5


def test_a_line_is_above_every_peak():
    def peak_of(n):
        """Gradients alone, then one moment of a forward, then another."""
        return max(170, 100 + 3 * n, 10 + 5 * n)

    fixed, slope = line({n: peak_of(n) for n in (1, 256, 512)})
    assert slope == 5
    assert all(fixed + slope * n >= peak_of(n) for n in range(1, 2000))
    assert fixed + slope < 1.1 * peak_of(1)


def numbers(text):
    return [float(number) for number in re.findall(r"[\d.]+", text)]


@pytest.mark.slow
def test_recomputation_and_lora_save_memory(monkeypatch, capsys):
    """The whole command, on a small SiT and a small VAE."""
    small_vae = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
    monkeypatch.setattr(memory, "VAE", memory.VAE | small_vae)
    monkeypatch.setitem(sit.SIZES, "XL", (1152, 3, 16))
    memory.main(["--bases", "sit", "--lora", "4", "--steps", "3"])
    update, rollout = capsys.readouterr().out.split("\n\n")

    # Columns: trained numbers, fixed bytes, bytes of a pair, then fitting pairs alone and guided.
    lora, lora_again, whole, whole_again = map(numbers, update.splitlines()[2:])
    trained, fixed, pair = 0, 1, 2
    assert lora[trained] == lora_again[trained] < whole[trained] == whole_again[trained]
    assert lora_again[pair] < lora[pair] < whole[pair]
    assert whole_again[pair] < whole[pair]
    assert lora[fixed] < whole[fixed]
    for row in (lora, whole):
        assert len(row) == 3 + 2 * len(memory.GPUS)
        for alone, guided in zip(row[3::2], row[4::2]):
            assert 2 * guided <= alone < 2 * guided + 2

    trajectory, condition, picture, _, *most = numbers(rollout.splitlines()[2])
    MB = 2**20
    assert trajectory == pytest.approx(7 * 4096 * 4 / MB, abs=0.006)
    assert condition == pytest.approx(2 * 1152 * 4 / MB, abs=0.006)
    assert picture == pytest.approx(3 * 256**2 * 4 / MB, abs=0.006)
    share = (condition + picture) / (trajectory + condition + picture)
    for gpu, on_gpu, offloaded in zip(memory.GPUS, most[::2], most[1::2]):
        assert on_gpu == pytest.approx(offloaded * share, rel=0.02)
        assert on_gpu * 0.75 < gpu * 1024


PUBLISHED_MILLIONS = {
    "sdxl": 2567.5,
    "sd15": 859.5,
    "sd35-512": 2243.2,
    "sit": 674.8,
    "edm2": 280.2,
}


def test_the_published_sizes():
    for name, millions in PUBLISHED_MILLIONS.items():
        network = memory.open_base(name)[0]
        count = sum(parameter.numel() for parameter in network.parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.1)


def test_more_memory_fits_more():
    assert memory.fits(24, 0, memory.GB) == 22
    assert memory.fits(24, 20 * memory.GB, memory.GB) == 2
    assert memory.fits(24, 23 * memory.GB, memory.GB) == 0


@pytest.mark.parametrize(
    "flags, words", [("--bases sd15,sd21", "'sd21'"), ("--lora 0 --steps 1", "--lora 0")]
)
def test_mistakes_are_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        memory.main(flags.split())
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
