"""EDM2: the network against a second one written in numpy, its invariances, its published sizes; and pickles, honest, damaged and hostile."""
import builtins
import copy
import importlib
import io
import math
import os
import pickle
import pickletools
import random
import subprocess
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch

from bases import edm2
from bases import edm2_pickle
from bases.edm2 import EDM2, Block, Fourier, Layer

SMALL = dict(img_resolution=8, img_channels=2, label_dim=3, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4],
             channels_per_head=8)
WIDE = dict(img_resolution=8, img_channels=3, label_dim=0, model_channels=4, channel_mult=[2, 3, 5], num_blocks=2, attn_resolutions=[8, 4],
            channels_per_head=4)                                         # no classes; attention at two levels, and not at the lowest


def build(arguments=SMALL, seed=0):
    """A network of random weights in which no gain is zero."""
    torch.manual_seed(seed)
    network = EDM2(**arguments)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gain"):
                parameter.uniform_(0.3, 1.2)
    return network


def inputs(arguments=SMALL, batch=2, seed=1):
    """x, sigma, labels (None without classes)."""
    g = torch.Generator().manual_seed(seed)
    sigma = torch.rand(batch, generator=g) * 3 + 0.1
    x = torch.randn(batch, arguments["img_channels"], *[arguments["img_resolution"]] * 2, generator=g) * (sigma**2 + 0.25).sqrt()[:, None, None, None]
    n = arguments["label_dim"]
    return x, sigma, torch.eye(n)[torch.arange(batch) % n] if n else None


# ---------------------------------------------------------------------------------------------------------------------
# A second network, in numpy and float64, straight from the formulas: no class, no module, every name of the small one written out.

def n_(x, axes):
    return x / (1e-4 + np.sqrt((x**2).mean(axes, keepdims=True)))


def silu_(x):
    return x / (1 + np.exp(-x)) / 0.596


def sum_(a, b, t):
    return ((1 - t) * a + t * b) / np.sqrt((1 - t) ** 2 + t**2)


def cat_(a, b):
    c = np.sqrt((a.shape[1] + b.shape[1]) / 0.5)
    return np.concatenate([a * c * 0.5 / np.sqrt(a.shape[1]), b * c * 0.5 / np.sqrt(b.shape[1])], 1)


def linear_(x, w, gain=1.0):
    w = n_(w, 1) * gain / np.sqrt(w.shape[1])
    return np.einsum("bi,oi->bo", x, w)


def conv_(x, w, gain=1.0):
    w = n_(w, (1, 2, 3)) * gain / np.sqrt(w[0].size)
    k, (h, v) = w.shape[-1], x.shape[2:]
    padded = np.pad(x, [(0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)])
    return sum(np.einsum("bihw,oi->bohw", padded[:, :, i:i + h, j:j + v], w[:, :, i, j]) for i in range(k) for j in range(k))


def attention_(x, weights, name, width):
    """Pixel by pixel, head by head. Channel c of the qkv convolution is (head, channel of the head, q or k or v), the last fastest."""
    qkv = conv_(x, weights[f"{name}.attn_qkv.weight"])
    B, C, H, W = x.shape
    y = np.zeros_like(x)
    for b in range(B):
        for head in range(C // width):
            part = lambda which: np.stack([qkv[b, (head * width + c) * 3 + which].ravel() for c in range(width)])
            q, k, v = (n_(part(which), 0) for which in range(3))         # [width, pixels]
            for pixel in range(H * W):
                score = np.array([q[:, pixel] @ k[:, other] for other in range(H * W)]) / np.sqrt(width)
                p = np.exp(score) / np.exp(score).sum()
                y[b, head * width:(head + 1) * width, pixel // W, pixel % W] = v @ p
    return sum_(x, conv_(y, weights[f"{name}.attn_proj.weight"]), 0.3)


def block_(x, emb, weights, name, width, encoder, resample=None):
    w = lambda key: weights.get(f"{name}.{key}.weight")
    if resample == "down":
        x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    if resample == "up":
        x = x.repeat(2, axis=2).repeat(2, axis=3)
    if encoder:
        x = n_(x if w("conv_skip") is None else conv_(x, w("conv_skip")), 1)
    y = conv_(silu_(x), w("conv_res0"))
    y = silu_(y * (linear_(emb, w("emb_linear"), weights[f"{name}.emb_gain"]) + 1)[:, :, None, None])
    y = conv_(y, w("conv_res1"))
    if not encoder and w("conv_skip") is not None:
        x = conv_(x, w("conv_skip"))
    x = sum_(x, y, 0.3)
    if w("attn_qkv") is not None:
        x = attention_(x, weights, name, width)
    return np.clip(x, -256, 256)


def denoise_(weights, x, sigma, labels):
    """The network SMALL."""
    weights = {name.removeprefix("unet."): tensor.double().numpy() for name, tensor in weights.items()}
    x, sigma, labels = (t.double().numpy() for t in (x, sigma, labels))
    fourier = np.sqrt(2) * np.cos(np.log(sigma)[:, None] / 4 * weights["emb_fourier.freqs"] + weights["emb_fourier.phases"])
    label = linear_(labels * np.sqrt(3), weights["emb_label.weight"])
    emb = silu_(sum_(linear_(fourier, weights["emb_noise.weight"]), label, 0.5))
    s = sigma[:, None, None, None]
    h = np.concatenate([x / np.sqrt(s**2 + 0.25), np.ones_like(x[:, :1])], 1)
    a = conv_(h, weights["enc.8x8_conv.weight"])
    b = block_(a, emb, weights, "enc.8x8_block0", 8, True)
    c = block_(b, emb, weights, "enc.4x4_down", 8, True, "down")
    d = block_(c, emb, weights, "enc.4x4_block0", 8, True)
    h = block_(d, emb, weights, "dec.4x4_in0", 8, False)
    h = block_(h, emb, weights, "dec.4x4_in1", 8, False)
    h = block_(cat_(h, d), emb, weights, "dec.4x4_block0", 8, False)
    h = block_(cat_(h, c), emb, weights, "dec.4x4_block1", 8, False)
    h = block_(h, emb, weights, "dec.8x8_up", 8, False, "up")
    h = block_(cat_(h, b), emb, weights, "dec.8x8_block0", 8, False)
    h = block_(cat_(h, a), emb, weights, "dec.8x8_block1", 8, False)
    f = conv_(h, weights["out_conv.weight"], weights["out_gain"])
    return 0.25 / (s**2 + 0.25) * x + s * 0.5 / np.sqrt(s**2 + 0.25) * f


def test_the_network_is_the_one_of_the_formulas():
    network, (x, sigma, labels) = build(), inputs()
    expected = denoise_(network.state_dict(), x, sigma, labels)
    assert np.abs(expected - (0.25 / (sigma**2 + 0.25))[:, None, None, None].numpy() * x.numpy()).max() > 0.1      # F says something
    np.testing.assert_allclose(network(x, sigma, labels).detach(), expected, atol=1e-5)
    np.testing.assert_allclose(network.double()(x.double(), sigma.double(), labels.double()).detach(), expected, atol=1e-6)


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("resample, heads, channels", [(None, 4, (6, 8)), ("down", 0, (8, 8)), ("up", 2, (8, 4)), (None, 8, (8, 8))])
def test_a_block_by_hand(encoder, resample, heads, channels):
    torch.manual_seed(3)
    block = Block(*channels, 5, encoder, resample, heads)
    torch.nn.init.constant_(block.emb_gain, 0.7)
    x, emb = torch.randn(2, channels[0], 4, 4), torch.randn(2, 5)
    weights = {f"block.{name}": tensor.double().numpy() for name, tensor in block.state_dict().items()}
    expected = block_(x.double().numpy(), emb.double().numpy(), weights, "block", heads, encoder, resample)
    np.testing.assert_allclose(block(x, emb).detach(), expected, atol=1e-5)


def test_a_block_is_clipped_at_256():
    torch.manual_seed(0)
    out = Block(4, 4, 3, False)(1000 * torch.ones(1, 4, 4, 4), torch.zeros(1, 3))
    assert out.abs().max() == 256


# ---------------------------------------------------------------------------------------------------------------------
# Magnitudes.

def rms(x):
    return x.double().square().mean().sqrt().item()


def test_operations_keep_unit_variance():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, 30, generator=g), torch.randn(4000, 90, generator=g)
    assert rms(edm2.mp_silu(a)) == pytest.approx(1, abs=0.01)
    for t in (0.1, 0.3, 0.5, 0.9):
        assert rms(edm2.mp_sum(a, b[:, :30], t)) == pytest.approx(1, abs=0.01)
        both = edm2.mp_cat(a, b, t)
        assert both.shape == (4000, 120) and rms(both) == pytest.approx(1, abs=0.01)
        assert both[:, 30:].norm() / both[:, :30].norm() == pytest.approx(t / (1 - t), rel=0.02)       # each part's share, not its width's
    assert torch.equal(edm2.mp_sum(a, b[:, :30], 0), a)
    assert torch.equal(edm2.mp_cat(a, b, 0.5)[:, 30:] > 0, b > 0)


def test_normalize_gives_unit_root_mean_square_over_the_dims():
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64) * 100
    assert edm2.normalize(x, 1).square().mean(1).numpy() == pytest.approx(np.ones((3, 4, 4)), abs=1e-4)
    assert edm2.normalize(x, (1, 2, 3)).square().mean((1, 2, 3)).numpy() == pytest.approx(np.ones(3), abs=1e-4)
    assert edm2.normalize(torch.tensor([[1e-4, -1e-4]]), 1).tolist() == [[pytest.approx(0.5), pytest.approx(-0.5)]]    # eps is 1e-4
    assert edm2.normalize(torch.zeros(1, 3), 1).tolist() == [[0, 0, 0]]
    zero = torch.zeros(1, 3, requires_grad=True)
    edm2.normalize(zero, 1).sum().backward()
    assert zero.grad.isfinite().all()


def test_fourier_features_have_unit_variance_and_differ():
    torch.manual_seed(0)
    fourier = Fourier(20000)
    features = fourier(torch.tensor([-1.0, 0.3, 1.0]))
    assert features.shape == (3, 20000)
    assert [rms(row) for row in features] == pytest.approx([1, 1, 1], abs=0.02)
    assert abs((features[0] * features[2]).mean()) < 0.05                # frequencies of order 2 pi tell -1 from 1
    assert not list(fourier.parameters())
    assert fourier.freqs.std().item() == pytest.approx(2 * math.pi, rel=0.05) and fourier.phases.max().item() == pytest.approx(2 * math.pi, rel=0.01)


@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_a_layer_keeps_unit_variance_whatever_the_scale_of_its_weight(kernel):
    torch.manual_seed(0)
    layer = Layer(24, 64, kernel)
    x = torch.randn(400, 24, *[9, 9] * (kernel > 0))
    for scale in (0.1, 1, 30):
        layer.weight.data.normal_(std=scale)
        out = layer(x)
        assert rms(out[..., 1:-1, 1:-1] if kernel else out) == pytest.approx(1, abs=0.02)
        torch.testing.assert_close(layer(x, 2.5), 2.5 * out)
    assert out.shape == (400, 64, *[9, 9] * (kernel > 0))


def test_the_whole_network_keeps_magnitude_at_every_noise_level():
    network = build(SMALL | dict(model_channels=32, img_resolution=16, attn_resolutions=[8]))
    torch.nn.init.ones_(network.unet.out_gain)
    for sigma in (0.01, 0.5, 80.0):
        x = torch.randn(8, 2, 16, 16) * math.hypot(sigma, 0.5)
        f = (network(x, sigma, torch.eye(3)[[0] * 8]) - 0.25 / (sigma**2 + 0.25) * x) * math.hypot(sigma, 0.5) / (sigma * 0.5)
        assert 0.7 < rms(f) < 1.4


# ---------------------------------------------------------------------------------------------------------------------
# Invariances and the preconditioning.

@pytest.mark.parametrize("arguments", [SMALL, WIDE], ids=["small", "wide"])
def test_the_scale_of_no_layers_weight_matters(arguments):
    network, (x, sigma, labels) = build(arguments).double(), inputs(arguments)
    run = lambda: network(x.double(), sigma.double(), None if labels is None else labels.double()).detach()
    before = run()
    layers = [m for m in network.modules() if isinstance(m, Layer)]
    assert len(layers) == sum(name.endswith("weight") for name, _ in network.named_parameters())
    for layer in layers:
        original = layer.weight.data.clone()
        layer.weight.data *= 7
        torch.testing.assert_close(run(), before, atol=1e-3, rtol=1e-3)  # but for the eps of 1e-4
        layer.weight.data = original.flip(0)                             # while its direction does
        assert (run() - before).abs().max() > 5e-3
        layer.weight.data = original


def test_gains_matter():
    network, (x, sigma, labels) = build(), inputs()
    skip = 0.25 / (sigma**2 + 0.25)[:, None, None, None] * x
    once = network(x, sigma, labels)
    network.unet.out_gain.data *= 2
    torch.testing.assert_close(network(x, sigma, labels) - skip, 2 * (once - skip), atol=1e-5, rtol=1e-5)
    network.unet.out_gain.data.zero_()
    assert torch.equal(network(x, sigma, labels), skip)
    network = build()
    for block in (m for m in network.modules() if isinstance(m, Block)):
        before = network(x, sigma, labels)
        block.emb_gain.data += 0.5
        assert (network(x, sigma, labels) - before).abs().max() > 1e-3
        block.emb_gain.data.zero_()
    assert torch.equal(network(x, sigma, labels), network(x, sigma, labels.flip(1)))         # no gain: no class


def test_the_class_and_the_noise_level_matter():
    network, (x, sigma, labels) = build(), inputs()
    assert (network(x, sigma, labels) - network(x, sigma, labels.roll(1, 1))).abs().max() > 1e-2
    seen = []
    network.unet.register_forward_hook(lambda module, args, out: seen.append(out))
    network(x, 1.0, labels), network(x * math.sqrt(4.25 / 1.25), 2.0, labels)                # the same c_in x
    assert (seen[0] - seen[1]).abs().max() > 1e-2


def test_sigma_to_zero_is_the_identity():
    network, (x, _, labels) = build(), inputs()
    for sigma in (1e-3, 1e-6):
        assert (network(x, sigma, labels) - x).abs().max() < 5 * sigma + 1e-6


def test_preconditioning_by_hand():
    network, (x, _, labels) = build(), inputs()
    seen = []

    class Constant(torch.nn.Module):
        def forward(self, *args):
            seen.extend(args)
            return torch.full_like(args[0], 3.0)
    embedding = network.embed(labels)
    network.unet = Constant()
    out = network(x, torch.tensor([1.0, 2.0]), embedding=embedding)
    torch.testing.assert_close(seen[0], torch.stack([x[0] / math.sqrt(1.25), x[1] / math.sqrt(4.25)]))
    torch.testing.assert_close(seen[1], torch.tensor([0.0, math.log(2) / 4]))
    assert seen[2] is embedding
    torch.testing.assert_close(out[0], 0.2 * x[0] + 3 * 0.5 / math.sqrt(1.25))
    torch.testing.assert_close(out[1], 0.25 / 4.25 * x[1] + 3 / math.sqrt(4.25))


def test_sigma_is_a_number_or_one_for_each_sample():
    network, (x, sigma, labels) = build(), inputs()
    torch.testing.assert_close(network(x, 0.7, labels), network(x, torch.full((2,), 0.7), labels))
    torch.testing.assert_close(network(x, 0.7, labels), network(x, torch.tensor(0.7, dtype=torch.float64), labels))
    rows = torch.cat([network(x[i:i + 1], sigma[i:i + 1], labels[i:i + 1]) for i in range(2)])
    torch.testing.assert_close(network(x, sigma, labels), rows)


def test_the_embedding_may_be_given_in_place_of_the_labels():
    network, (x, sigma, labels) = build(), inputs()
    embedding = network.embed(labels)
    assert embedding.shape == (2, 16)
    assert torch.equal(network(x, sigma, embedding=embedding), network(x, sigma, labels))
    assert (network(x, sigma, embedding=embedding + 0.5) - network(x, sigma, labels)).abs().max() > 1e-3
    zero = network(x, sigma)
    assert torch.equal(zero, network(x, sigma, torch.zeros(2, 3))) and torch.equal(zero, network(x, sigma, embedding=torch.zeros(2, 16)))
    assert (zero - network(x, sigma, labels)).abs().max() > 1e-3


@pytest.mark.parametrize("labels, embedding", [(torch.zeros(2, 4), None), (torch.zeros(3), None), (torch.zeros(2, 3), torch.zeros(2, 16))])
def test_a_wrong_condition_is_refused(labels, embedding):
    x, sigma, _ = inputs()
    with pytest.raises(ValueError, match="labels"):
        build()(x, sigma, labels, embedding)


def test_a_network_without_classes_takes_no_condition():
    network, (x, sigma, _) = build(WIDE), inputs(WIDE)
    assert network(x, sigma).shape == x.shape and "unet.emb_label.weight" not in network.state_dict()
    for condition in ({"labels": torch.zeros(2, 0)}, {"labels": torch.zeros(2, 3)}, {"embedding": torch.zeros(2, 20)}):
        with pytest.raises(ValueError, match="classes"):
            network(x, sigma, **condition)
    seen = []
    network.unet.enc["8x8_block0"].register_forward_hook(lambda module, args, out: seen.append(args[1]))
    network(x, sigma)
    expected = edm2.mp_silu(network.unet.emb_noise(network.unet.emb_fourier(sigma.log() / 4)))           # no sum with nothing
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("change", [dict(img_resolution=9), dict(channel_mult=[]), dict(num_blocks=0), dict(channels_per_head=0),
                                    dict(channels_per_head=3)])
def test_arguments_that_make_no_network_are_refused(change):
    with pytest.raises(ValueError) as error:
        EDM2(**SMALL | change)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Training.

def test_the_mode_and_the_graph_change_no_bit_and_no_weight():
    network, (x, sigma, labels) = build(), inputs()
    before = copy.deepcopy(network.state_dict())
    out = network.train()(x, sigma, labels).detach()
    assert torch.equal(network.train()(x, sigma, labels), out) and torch.equal(network.eval()(x, sigma, labels), out)
    with torch.no_grad():
        assert torch.equal(network(x, sigma, labels), out) and torch.equal(network.train()(x, sigma, labels), out)
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("arguments", [SMALL, WIDE], ids=["small", "wide"])
def test_gradients_reach_every_trained_parameter(arguments):
    network, (x, sigma, labels) = build(arguments), inputs(arguments)
    (network(x, sigma, labels) * torch.randn_like(x)).sum().backward()
    named = dict(network.named_parameters())
    assert not [name for name, p in named.items() if p.grad is None or not p.grad.isfinite().all() or p.grad.abs().max() < 1e-6]
    assert not [name for name in named if "logvar" in name or "fourier" in name]
    weight, g = named["unet.out_conv.weight"], named["unet.out_conv.weight"].grad
    assert (weight * g).sum((1, 2, 3)).abs().max() < 1e-3 * (weight.norm() * g.norm())       # along a weight's scale there is nothing to gain


def test_gradients_are_right():
    network, (x, sigma, labels) = build().double(), inputs()
    x, sigma, labels = x.double(), sigma.double(), labels.double()
    direction = torch.randn_like(x)
    (network(x, sigma, labels) * direction).sum().backward()
    for name in ("unet.enc.4x4_block0.attn_qkv.weight", "unet.emb_label.weight", "unet.dec.8x8_up.emb_gain", "unet.enc.8x8_conv.weight"):
        parameter = dict(network.named_parameters())[name]
        step = torch.randn_like(parameter) * 1e-5
        values = []
        for sign in (1, -1):
            parameter.data += sign * step
            values.append((network(x, sigma, labels) * direction).sum().item())
            parameter.data -= sign * step
        assert values[0] - values[1] == pytest.approx(2 * (parameter.grad * step).sum().item(), rel=1e-4, abs=1e-10), name


def test_bfloat16_autocast_is_near():
    network, (x, sigma, labels) = build(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        half = network(x, sigma, labels)
    full = network(x, sigma, labels)
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert rms(half - full) < 0.03 * rms(full)


# ---------------------------------------------------------------------------------------------------------------------
# Names, shapes and sizes.

KEYS = """
    logvar_fourier.freqs 128; logvar_fourier.phases 128; logvar_linear.weight 1 128; unet.emb_fourier.freqs 8; unet.emb_fourier.phases 8;
    unet.emb_noise.weight 16 8; unet.emb_label.weight 16 3; unet.enc.8x8_conv.weight 8 3 3 3; unet.enc.8x8_block0.emb_gain;
    unet.enc.8x8_block0.conv_res0.weight 8 8 3 3; unet.enc.8x8_block0.emb_linear.weight 8 16; unet.enc.8x8_block0.conv_res1.weight 8 8 3 3;
    unet.enc.4x4_down.emb_gain; unet.enc.4x4_down.conv_res0.weight 8 8 3 3; unet.enc.4x4_down.emb_linear.weight 8 16;
    unet.enc.4x4_down.conv_res1.weight 8 8 3 3; unet.enc.4x4_block0.emb_gain; unet.enc.4x4_block0.conv_res0.weight 16 16 3 3;
    unet.enc.4x4_block0.emb_linear.weight 16 16; unet.enc.4x4_block0.conv_res1.weight 16 16 3 3; unet.enc.4x4_block0.conv_skip.weight 16 8 1 1;
    unet.enc.4x4_block0.attn_qkv.weight 48 16 1 1; unet.enc.4x4_block0.attn_proj.weight 16 16 1 1; unet.dec.4x4_in0.emb_gain;
    unet.dec.4x4_in0.conv_res0.weight 16 16 3 3; unet.dec.4x4_in0.emb_linear.weight 16 16; unet.dec.4x4_in0.conv_res1.weight 16 16 3 3;
    unet.dec.4x4_in0.attn_qkv.weight 48 16 1 1; unet.dec.4x4_in0.attn_proj.weight 16 16 1 1; unet.dec.4x4_in1.emb_gain;
    unet.dec.4x4_in1.conv_res0.weight 16 16 3 3; unet.dec.4x4_in1.emb_linear.weight 16 16; unet.dec.4x4_in1.conv_res1.weight 16 16 3 3;
    unet.dec.4x4_block0.emb_gain; unet.dec.4x4_block0.conv_res0.weight 16 32 3 3; unet.dec.4x4_block0.emb_linear.weight 16 16;
    unet.dec.4x4_block0.conv_res1.weight 16 16 3 3; unet.dec.4x4_block0.conv_skip.weight 16 32 1 1; unet.dec.4x4_block0.attn_qkv.weight 48 16 1 1;
    unet.dec.4x4_block0.attn_proj.weight 16 16 1 1; unet.dec.4x4_block1.emb_gain; unet.dec.4x4_block1.conv_res0.weight 16 24 3 3;
    unet.dec.4x4_block1.emb_linear.weight 16 16; unet.dec.4x4_block1.conv_res1.weight 16 16 3 3; unet.dec.4x4_block1.conv_skip.weight 16 24 1 1;
    unet.dec.4x4_block1.attn_qkv.weight 48 16 1 1; unet.dec.4x4_block1.attn_proj.weight 16 16 1 1; unet.dec.8x8_up.emb_gain;
    unet.dec.8x8_up.conv_res0.weight 16 16 3 3; unet.dec.8x8_up.emb_linear.weight 16 16; unet.dec.8x8_up.conv_res1.weight 16 16 3 3;
    unet.dec.8x8_block0.emb_gain; unet.dec.8x8_block0.conv_res0.weight 8 24 3 3; unet.dec.8x8_block0.emb_linear.weight 8 16;
    unet.dec.8x8_block0.conv_res1.weight 8 8 3 3; unet.dec.8x8_block0.conv_skip.weight 8 24 1 1; unet.dec.8x8_block1.emb_gain;
    unet.dec.8x8_block1.conv_res0.weight 8 16 3 3; unet.dec.8x8_block1.emb_linear.weight 8 16; unet.dec.8x8_block1.conv_res1.weight 8 8 3 3;
    unet.dec.8x8_block1.conv_skip.weight 8 16 1 1; unet.out_conv.weight 2 8 3 3; unet.out_gain
"""


def test_names_and_shapes_are_the_published_ones():
    expected = {name: [int(n) for n in shape] for name, *shape in (entry.split() for entry in KEYS.split(";"))}
    assert {name: list(tensor.shape) for name, tensor in build().state_dict().items()} == expected


@pytest.mark.parametrize("channels, millions", [(128, 125), (192, 280), (256, 498), (320, 777), (384, 1119), (448, 1523)])
def test_the_published_sizes(channels, millions):
    with torch.device("meta"):
        network = EDM2(64, 4, 1000, channels, [1, 2, 3, 4], 3, [16, 8])
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)


MORE = dict(img_resolution=32, img_channels=4, label_dim=10, model_channels=8, channel_mult=[1, 1, 2], num_blocks=3, attn_resolutions=[],
            channels_per_head=4)


@pytest.mark.parametrize("arguments", [SMALL, WIDE, MORE], ids=["small", "wide", "more"])
def test_arguments_are_told_by_names_and_shapes(arguments):
    state = build(arguments).state_dict()
    told = edm2.arguments_of(state, arguments["channels_per_head"])
    assert told == arguments
    EDM2(**told).load_state_dict(state, strict=True)


def test_latents_to_the_vae_and_back():
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(edm2.vae_to_latents(edm2.latents_to_vae(x)), x, atol=1e-5, rtol=1e-5)
    zero = edm2.latents_to_vae(torch.zeros(1, 4, 1, 1)).flatten().tolist()
    half = edm2.latents_to_vae(torch.full((1, 4, 1, 1), 0.5)).flatten().tolist()
    assert zero == pytest.approx([5.81, 3.25, 0.12, -2.15])              # the means
    assert half == pytest.approx([5.81 + 4.17, 3.25 + 4.62, 0.12 + 3.71, -2.15 + 3.28])      # one std above


# ---------------------------------------------------------------------------------------------------------------------
# Snapshots: pickles of the released structure, written here with stand-ins for the two packages that they name.

class Persistent:
    """What a released snapshot has in place of each of its own modules."""

    def __init__(self, class_name, state, module_src="raise SystemExit('module_src has run')"):
        self.meta = dict(type="class", version=6, module_src=module_src, class_name=class_name, state=state)

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


class Reduce:
    """Pickles as a call of anything."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    for package, module in (("torch_utils", "persistence"), ("dnnlib", "util")):
        parent, child = types.ModuleType(package), types.ModuleType(f"{package}.{module}")
        setattr(parent, module, child)
        monkeypatch.setitem(sys.modules, package, parent)
        monkeypatch.setitem(sys.modules, f"{package}.{module}", child)
    exec("def _reconstruct_persistent_obj(meta):\n    exec(meta['module_src'], {})\n    return meta", sys.modules["torch_utils.persistence"].__dict__)
    exec("class EasyDict(dict):\n    pass", sys.modules["dnnlib.util"].__dict__)


def module_state(parameters=(), buffers=(), modules=(), **more):
    hooks = {name: OrderedDict() for name in ("_backward_hooks", "_forward_hooks", "_state_dict_hooks")}
    return dict(training=False, _parameters=dict(parameters), _buffers=dict(buffers), _non_persistent_buffers_set=set(), **hooks,
                _modules=dict(modules), **more, _init_args=(), _init_kwargs={})


def snapshot(network, wrap=lambda name, tensor: tensor, **constants):
    """The object tree of a released snapshot: a dict with `ema`; Persistent modules, but for the two ModuleDicts, which are torch's own."""
    def node(prefix):
        below = {name[len(prefix):]: tensor for name, tensor in network.state_dict().items() if name.startswith(prefix)}
        own = {name: wrap(prefix + name, tensor) for name, tensor in below.items() if "." not in name}
        parameters = {name: torch.nn.Parameter(tensor) for name, tensor in own.items() if name not in ("freqs", "phases")}
        children = {name.split(".")[0]: None for name in below if "." in name}
        state = module_state(parameters, {name: own[name] for name in own if name not in parameters},
                             {name: node(f"{prefix}{name}.") for name in children})
        if prefix in ("unet.enc.", "unet.dec."):
            container = torch.nn.ModuleDict()
            container.__dict__["_modules"] = state["_modules"]
            return container
        if "conv_res0" in children:
            heads = below["attn_qkv.weight"].shape[1] // network.channels_per_head if "attn_qkv" in children else 0
            state |= dict(num_heads=heads, flavor="enc", resample_filter=[1, 1], res_balance=0.3, attn_balance=0.3, clip_act=256, dropout=0.1)
        if prefix == "":
            state |= dict(img_resolution=8, use_fp16=True, sigma_data=0.5)
        state |= {name: value for name, value in constants.items() if name in state}
        return Persistent("Module", state)
    encoder = Persistent("Encoder", dict(scale=np.float32([0.1, 0.2]), bias=np.float64([3]), batch=np.int64(8), device=torch.device("cpu")))
    return {"ema": node(""), "encoder": encoder, "dataset_kwargs": sys.modules["dnnlib.util"].EasyDict(path="x")}


def write(path, thing, protocol=4):
    path.write_bytes(thing if isinstance(thing, bytes) else pickle.dumps(thing, protocol))
    return path


def refusal(path, *arguments):
    """The message with which check refuses a file; it must be one line that begins with the file's name, and load's and read_pickle's too."""
    messages = []
    for function, more in ((edm2.check, arguments), (edm2.load, arguments), (edm2_pickle.read_pickle, ())):
        with pytest.raises(ValueError) as error:
            function(path, *more)
        messages.append(str(error.value))
    assert all(m.startswith(f"{path}: ") and "give" in m and len(m.splitlines()) == 1 for m in messages) and messages[0] == messages[1]
    return messages[0]


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("arguments", [SMALL, WIDE, MORE], ids=["small", "wide", "more"])
def test_a_snapshot_gives_its_state_dict_and_its_arguments(tmp_path, arguments, protocol):
    network, (x, sigma, labels) = build(arguments), inputs(arguments)
    path = write(tmp_path / "a.pkl", snapshot(network), protocol)
    expected, state = network.state_dict(), edm2_pickle.read_pickle(path)
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
    assert edm2.check(path)[1] == arguments
    loaded = edm2.load(path)
    assert not loaded.training and loaded.channels_per_head == arguments["channels_per_head"]
    assert torch.equal(loaded(x, sigma, labels), network(x, sigma, labels))
    assert all(p.requires_grad for p in loaded.parameters())
    assert loaded.state_dict().keys() == expected.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_float_type_is_read_and_becomes_float32(tmp_path, dtype):
    network = build()
    path = write(tmp_path / "a.pkl", snapshot(network, lambda name, tensor: tensor.to(dtype)))
    state, loaded = edm2_pickle.read_pickle(path), edm2.load(path).state_dict()
    for name, tensor in network.state_dict().items():
        assert state[name].dtype == dtype and torch.equal(state[name], tensor.to(dtype))
        assert loaded[name].dtype == torch.float32 and torch.equal(loaded[name], tensor.to(dtype).float())


def test_strides_and_offsets_of_the_file_are_followed(tmp_path):
    def view(name, tensor):
        if tensor.dim() == 4:
            second = torch.cat([tensor.flatten() * 0 + 9, tensor.flatten()])[tensor.numel():].view(tensor.shape)      # half-way in its storage
            return tensor.to(memory_format=torch.channels_last) if "res0" in name else second
        return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
    network = build()
    state = edm2_pickle.read_pickle(write(tmp_path / "a.pkl", snapshot(network, view)))
    assert all(torch.equal(state[name], tensor) and state[name].is_contiguous() for name, tensor in network.state_dict().items())


def test_none_and_non_persistent_entries_are_no_part_of_the_state_dict(tmp_path):
    tree = snapshot(build())
    top = tree["ema"].meta["state"]
    top["_buffers"] |= {"scratch": torch.zeros(3), "nothing": None}
    top["_parameters"]["bias"] = top["_modules"]["absent"] = None
    top["_non_persistent_buffers_set"].add("scratch")
    assert edm2_pickle.read_pickle(write(tmp_path / "a.pkl", tree)).keys() == build().state_dict().keys()
    top["_non_persistent_buffers_set"].clear()
    assert "scratch" in refusal(write(tmp_path / "a.pkl", tree))


def test_the_top_may_be_an_easydict(tmp_path):
    tree = sys.modules["dnnlib.util"].EasyDict(snapshot(build()))
    assert edm2_pickle.read_pickle(write(tmp_path / "a.pkl", tree)).keys() == build().state_dict().keys()


def test_arrays_of_either_numpy_are_passed_over(tmp_path, monkeypatch):
    """numpy 1 wrote numpy.core where numpy 2 writes numpy._core."""
    old = types.ModuleType("numpy.core.multiarray")
    exec("def _reconstruct(*args):\n    raise SystemExit", old.__dict__)
    monkeypatch.setitem(sys.modules, "numpy.core.multiarray", old)
    evil = Reduce(old._reconstruct, (np.ndarray, (0,), b"b"), (1, (2,), np.dtype("f4"), False, b"12345678"))
    state = edm2_pickle.read_pickle(write(tmp_path / "a.pkl", beside([evil, np.ones(3), np.float64(2), np.random.rand(4, 4).T])))
    assert state.keys() == build().state_dict().keys()


@pytest.mark.parametrize("constant, value", [("sigma_data", 1.0), ("res_balance", 0.5), ("attn_balance", 0.1), ("clip_act", None),
                                             ("resample_filter", [1, 3, 3, 1])])
def test_a_snapshot_with_other_constants_is_refused(tmp_path, constant, value):
    assert constant in refusal(write(tmp_path / "a.pkl", snapshot(build(), **{constant: value})))


def test_networks_are_saved_and_loaded(tmp_path):
    network, (x, sigma, labels) = build(), inputs()
    edm2.save(network, tmp_path / "a.safetensors")
    loaded = edm2.load(tmp_path / "a.safetensors")
    assert torch.equal(loaded(x, sigma, labels), network(x, sigma, labels)) and loaded.channels_per_head == 8
    from safetensors.torch import save_file
    save_file(network.state_dict(), tmp_path / "b.safetensors")          # no metadata: the caller says, or 64
    assert edm2.load(tmp_path / "b.safetensors", 8).channels_per_head == 8
    assert not torch.equal(edm2.load(tmp_path / "b.safetensors", 4)(x, sigma, labels), network(x, sigma, labels))
    assert "64" in refusal(tmp_path / "b.safetensors")
    big = EDM2(**SMALL | dict(model_channels=64, channels_per_head=64))
    save_file(big.state_dict(), tmp_path / "c.safetensors")
    assert edm2.load(tmp_path / "c.safetensors").channels_per_head == 64
    edm2.save(edm2.load(write(tmp_path / "d.pkl", snapshot(network))), tmp_path / "d.safetensors")
    assert torch.equal(edm2.load(tmp_path / "d.safetensors")(x, sigma, labels), network(x, sigma, labels))


# ---------------------------------------------------------------------------------------------------------------------
# Hostile files. `marker` is what they would leave behind; where a call is hidden, the usual loader is shown to make it.

@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


def touch(marker):
    return os.system, (f"touch '{marker}'",)


def at_top(evil):
    return {"ema": evil}


def beside(evil):
    return snapshot(build()) | {"encoder": evil}


def among_the_weights(evil):
    tree = snapshot(build())
    tree["ema"].meta["state"]["_parameters"]["extra"] = evil
    return tree


def in_place_of_an_attribute(evil):
    tree = snapshot(build())
    tree["ema"].meta["state"]["training"] = [{"deep": (evil,)}]
    return tree


CALLS = {                                                                # by the name that the pickle asks for
    "posix.system": lambda marker: touch(marker),
    "builtins.eval": lambda marker: (builtins.eval, (f"open({str(marker)!r}, 'w')",)),
    "builtins.exec": lambda marker: (builtins.exec, (f"open({str(marker)!r}, 'w')",)),
    "io.open": lambda marker: (open, (str(marker), "w")),
    "builtins.getattr": lambda marker: (getattr, (Reduce(importlib.import_module, ("os",)), "system")),
    "subprocess.Popen": lambda marker: (subprocess.Popen, (["touch", str(marker)],)),
    "torch.serialization.load": lambda marker: (torch.load, (str(marker),)),
    "torch.hub.load": lambda marker: (torch.hub.load, (str(marker), "x")),
    "numpy.save": lambda marker: (np.save, (str(marker), 1)),
}


@pytest.mark.parametrize("place", [at_top, beside, among_the_weights, in_place_of_an_attribute])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_refused_by_its_name(tmp_path, marker, name, place):
    message = refusal(write(tmp_path / "a.pkl", place(Reduce(*CALLS[name](marker)))))
    assert f"asks for {name}" in message


@pytest.mark.parametrize("name", ["posix.system", "builtins.eval", "builtins.exec", "io.open"])
def test_those_calls_would_have_been_made(tmp_path, name):
    marker = tmp_path / "proof"
    pickle.loads(pickle.dumps(at_top(Reduce(*CALLS[name](marker)))))
    assert marker.exists()


def storage_bytes(evil, place):
    """The bytes of a real storage with `evil` in place of one of its five pickles, or behind its data."""
    stream, parts = io.BytesIO(pickle.loads(pickle.dumps(torch.ones(3)))._typed_storage().__reduce__()[1][0]), []
    for _ in range(5):
        start = stream.tell()
        list(pickletools.genops(stream))
        parts.append(stream.getvalue()[start:stream.tell()])
    parts[place] = pickle.dumps(evil, 2)
    return b"".join(parts) + stream.read()


def tensor_of(data, size=(3,), stride=(1,), offset=0):
    """A weight as a pickle has it: the bytes of its storage, and how to look at them."""
    storage = Reduce(torch.storage._load_from_bytes, (data,))
    return among_the_weights(Reduce(torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, OrderedDict())))


@pytest.mark.parametrize("place", range(5))
def test_a_call_inside_the_bytes_of_a_storage_is_refused(tmp_path, marker, place):
    data = storage_bytes(Reduce(*touch(marker)), place)
    honest = tensor_of(torch.ones(3)._typed_storage().__reduce__()[1][0])
    assert "extra has shape [3]" in refusal(write(tmp_path / "a.pkl", honest))           # without the call it would be read
    assert "posix.system" in refusal(write(tmp_path / "a.pkl", tensor_of(data)))


def test_a_storage_asks_for_its_type_only_and_has_the_bytes_it_says(tmp_path):
    data = torch.ones(3)._typed_storage().__reduce__()[1][0]
    assert "asks for collections.OrderedDict" in refusal(write(tmp_path / "a.pkl", tensor_of(storage_bytes(OrderedDict(), 2))))
    assert "differ in size" in refusal(write(tmp_path / "a.pkl", tensor_of(data + bytes(4))))


def test_that_call_would_have_been_made(tmp_path):
    marker = tmp_path / "proof"
    try:
        torch.storage._load_from_bytes(storage_bytes(Reduce(*touch(marker)), 0))
    except Exception:
        pass                                                             # what comes after the call is not its concern
    assert marker.exists()


def test_a_zip_of_torch_is_no_storage(tmp_path, marker):
    buffer = io.BytesIO()
    torch.save(Reduce(*touch(marker)), buffer)
    refusal(write(tmp_path / "a.pkl", tensor_of(buffer.getvalue())))


def test_the_embedded_source_never_runs(tmp_path, marker):
    tree = snapshot(build())
    tree["ema"].meta["module_src"] = f"open({str(marker)!r}, 'w').close()"
    assert edm2_pickle.read_pickle(write(tmp_path / "a.pkl", tree)).keys() == build().state_dict().keys()
    assert not marker.exists()
    with pytest.raises(SystemExit):                                      # while the stand-in does run what it is given
        pickle.loads(pickle.dumps(Persistent("Module", {})))


def test_an_admitted_name_is_no_gadget(tmp_path, marker):
    """Only stand-ins are called, so neither these calls nor attributes set on what they make (or on themselves) have any effect."""
    load, rebuild = torch.storage._load_from_bytes, torch._utils._rebuild_tensor_v2
    defaults, hooks = rebuild.__defaults__, dict(edm2_pickle.Inert.__dict__)
    payload = pickle.dumps(Reduce(*touch(marker)))
    source = {"module_src": f"open({str(marker)!r}, 'w')"}
    refusal(write(tmp_path / "a.pkl", at_top(Reduce(load, (payload,)))))
    refusal(write(tmp_path / "a.pkl", at_top(Reduce(OrderedDict, ([("_modules", 1)],)))))
    for evil in (Reduce(load, (payload,)), Reduce(sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (source,))):
        edm2_pickle.read_pickle(write(tmp_path / "a.pkl", beside(evil)))        # beside the network: skipped unread
    for names in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"):
        defaults_ = b"}X\x0c\x00\x00\x00__defaults__K\x01s"
        for state in (defaults_, b"N" + defaults_ + b"\x86", b"N}X\x08\x00\x00\x00__init__K\x01s\x86"):
            refusal(write(tmp_path / "a.pkl", b"\x80\x02" + names + state + b"b."))
    assert rebuild.__defaults__ == defaults and dict(edm2_pickle.Inert.__dict__) == hooks


def nested(depth):
    """A module inside a module, and so on."""
    key = lambda name: b"X" + len(name).to_bytes(4, "little") + name
    before = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}" + key(b"state") + b"}(" + key(b"_modules") + b"}" + key(b"m")
    after = b"s" + b"".join(key(name) + b"}" for name in (b"_parameters", b"_buffers", b"_non_persistent_buffers_set")) + b"us\x85R"
    return b"\x80\x02}" + key(b"ema") + before * depth + b"N" + after * depth + b"s."


def memo_bomb():
    return b"\x80\x04K\x01r\xff\xff\xff\x7f."


def stuck_together(wide=60):
    """Each module holds the next one twice: as a tree it has 2^60 leaves."""
    module = Persistent("Module", module_state())
    for _ in range(wide):
        module = Persistent("Module", module_state(modules={"a": module, "b": module}))
    return at_top(module)


def circular():
    container = torch.nn.ModuleDict()
    container.__dict__["_modules"] = {"again": container}
    return at_top(container)


def sized(size, stride, offset=0, cut=None):
    return tensor_of(torch.ones(3)._typed_storage().__reduce__()[1][0][:cut], size, stride, offset)


BOMBS = {
    "memo": memo_bomb,
    "deep lists": lambda: b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".", "deep modules": lambda: nested(2000),
    "shared modules": stuck_together, "a circle": circular, "stride 0": lambda: sized((1 << 40,), (0,)),
    "a list for a module": lambda: at_top(Persistent("Module", module_state(modules={"a": [1]}))),
    "beyond the storage": lambda: sized((3,), (2,)), "offset": lambda: sized((3,), (1,), 1), "negative offset": lambda: sized((2,), (1,), -1),
    "negative sizes": lambda: sized((-1, -2), (1, 1)), "no size": lambda: sized((0,), (1,)), "sizes of text": lambda: sized("3", (1,)),
    "cut storage": lambda: sized((3,), (1,), cut=-1), "extension": lambda: b"\x80\x02\x82\x01.", "persistent id": lambda: b"\x80\x02K\x01Q.",
    "a number": lambda: 3, "a list": lambda: [1], "no ema": lambda: {"G_ema": 1}, "ema is None": lambda: at_top(None),
    "ema is text": lambda: at_top("ema"), "a tensor": lambda: at_top(torch.ones(3)), "a number as weight": lambda: among_the_weights(3),
    "a storage as weight": lambda: among_the_weights(torch.ones(3)._typed_storage()), "integers": lambda: among_the_weights(torch.ones(3).long()),
    "a dict as weight": lambda: among_the_weights(sys.modules["dnnlib.util"].EasyDict()),
    "huge string": lambda: b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fx.",
    "empty": lambda: b"", "text": lambda: b"version https://git-lfs.github.com/spec/v1\n", "html": lambda: b"<html>\n<body>not found</body>",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_and_nonsense_are_refused(tmp_path, marker, bomb):
    refusal(write(tmp_path / "a.pkl", BOMBS[bomb]()))


def test_bombs_are_refused_for_their_own_reason(tmp_path):
    reasons = {"memo": "LONG_BINPUT", "extension": "EXT1", "shared modules": "shared", "stride 0": "size", "beyond the storage": "storage",
               "offset": "storage", "deep modules": "Recursion", "a list for a module": "list", "a circle": "contains itself", "no ema": "ema",
               "cut storage": "size", "negative offset": "offset", "integers": "LongStorage"}
    for bomb, reason in reasons.items():
        assert reason in refusal(write(tmp_path / "a.pkl", BOMBS[bomb]())), bomb


def test_a_truncated_snapshot_is_refused_wherever_it_ends(tmp_path):
    whole = pickle.dumps(snapshot(build()), 4)
    for end in [*range(0, 40), *random.Random(0).sample(range(40, len(whole)), 40), len(whole) - 1]:
        assert "a.pkl" in refusal(write(tmp_path / "a.pkl", whole[:end]))


def test_no_flipped_byte_raises_anything_else(tmp_path):
    whole, dice, refused = pickle.dumps(snapshot(build()), 4), random.Random(0), 0
    for _ in range(150):
        broken = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            broken[dice.randrange(len(broken) if dice.random() < 0.3 else 3000)] = dice.randrange(256)
        try:
            edm2.check(write(tmp_path / "a.pkl", bytes(broken)))
        except ValueError as error:
            assert str(error).startswith(str(tmp_path)) and len(str(error).splitlines()) == 1
            refused += 1
    assert refused > 50


def test_a_name_with_line_breaks_still_makes_one_line(tmp_path):
    message = refusal(write(tmp_path / "a.pkl", b"\x80\x04\x8c\x04a\nb\nK\x01\x93."))
    assert "\n" not in message
    long = refusal(write(tmp_path / "a.pkl", b"\x80\x04X\x10\x27\x00\x00" + b"m" * 10000 + b"\x8c\x01n\x93."))
    assert len(long) < 500


# ---------------------------------------------------------------------------------------------------------------------
# Files that are something else.

def test_missing_and_foreign_files_are_named(tmp_path):
    (tmp_path / "folder.pkl").mkdir()
    write(tmp_path / "a.pt", snapshot(build()))
    for name in ("none.pkl", "none.safetensors", "folder.pkl", "a.pt"):
        assert "no such" in refusal(tmp_path / name)


@pytest.mark.parametrize("name, tensor, reason", [
    ("unet.enc.4x4_block0.attn_proj.weight", None, "attn_proj.weight has shape None"), ("unet.out_gain", None, "out_gain has shape None"),
    ("logvar_linear.weight", None, "logvar_linear.weight has shape None"), ("unet.out_conv.weight", None, "names"),
    ("unet.enc.8x8_conv.weight", None, "names"), ("unet.enc.8x8_block0.conv_res1.weight", None, ""),
    ("unet.stray.weight", torch.ones(2), "stray.weight has shape [2], and None"),
    ("unet.emb_noise.weight", torch.ones(16, 9), "emb_noise.weight has shape [16, 9], and [16, 8]"),
    ("unet.emb_label.weight", torch.ones(16), "emb_label.weight has shape [16]"), ("unet.out_conv.weight", torch.tensor(1.0), "0-d"),
    ("unet.enc.16x16_conv.weight", torch.ones(8, 3, 3, 3), "num_blocks=0"), ("unet.enc.0x0_block0.conv_res1.weight", torch.ones(2), "0x0"),
    ("unet.enc.2x2_block0.conv_res1.weight", torch.ones(16, 16, 3, 3), "2x2"), ("unet.out_gain", torch.tensor(math.nan), "out_gain holds"),
    ("unet.emb_noise.weight", torch.full((16, 8), math.inf), "emb_noise.weight holds"),
    ("unet.emb_noise.weight", torch.ones(16, 8).long(), "emb_noise.weight holds")])
def test_a_state_dict_of_another_network_is_refused(tmp_path, name, tensor, reason):
    from safetensors.torch import save_file
    state = {other: value for other, value in build().state_dict().items() if other != name}
    save_file(state if tensor is None else state | {name: tensor}, tmp_path / "a.safetensors", {"channels_per_head": "8"})
    assert reason in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize("metadata", ["0", "-8", "3", "many", "8 8"])
def test_nonsense_in_the_metadata_is_refused(tmp_path, metadata):
    from safetensors.torch import save_file
    save_file(build().state_dict(), tmp_path / "a.safetensors", {"channels_per_head": metadata})
    refusal(tmp_path / "a.safetensors")


def test_other_architectures_are_refused(tmp_path):
    from safetensors.torch import save_file
    save_file({"blocks.0.attn.qkv.weight": torch.ones(3, 3)}, tmp_path / "a.safetensors")
    assert "names are not those of EDM2" in refusal(tmp_path / "a.safetensors")
    save_file({}, tmp_path / "a.safetensors")
    assert "names are not those of EDM2" in refusal(tmp_path / "a.safetensors")
    layer = Persistent("Conv", module_state({"weight": torch.nn.Parameter(torch.ones(2))}))
    assert "names are not those of EDM2" in refusal(write(tmp_path / "a.pkl", at_top(Persistent("SongUNet", module_state(modules={"map": layer})))))


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    edm2.save(build(), tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for end in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        refusal(write(tmp_path / "b.safetensors", whole[:end]))
    refusal(write(tmp_path / "b.safetensors", pickle.dumps(snapshot(build()))))
    write(tmp_path / "b.pkl", whole)
    refusal(tmp_path / "b.pkl")
