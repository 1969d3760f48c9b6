"""EDM2: the network against a second one in numpy, its magnitudes, its files, its adapter."""

import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bases
from bases import edm2
from bases.edm2 import EDM2, Block, Fourier, Layer
from sampling import sample

SMALL = dict(
    img_resolution=8,
    img_channels=2,
    label_dim=3,
    model_channels=8,
    channel_mult=[1, 2],
    num_blocks=1,
    attn_resolutions=[4],
    channels_per_head=8,
)
# No classes; attention at two levels, and not at the lowest.
WIDE = dict(
    img_resolution=8,
    img_channels=3,
    label_dim=0,
    model_channels=4,
    channel_mult=[2, 3, 5],
    num_blocks=2,
    attn_resolutions=[8, 4],
    channels_per_head=4,
)
# Two levels of one width; attention in the middle only.
MORE = dict(
    img_resolution=32,
    img_channels=4,
    label_dim=10,
    model_channels=8,
    channel_mult=[1, 1, 2],
    num_blocks=3,
    attn_resolutions=[],
    channels_per_head=4,
)


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
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.rand(batch, generator=generator) * 3 + 0.1
    side = arguments["img_resolution"]
    x = torch.randn(batch, arguments["img_channels"], side, side, generator=generator)
    x = x * (sigma**2 + 0.25).sqrt()[:, None, None, None]
    classes = arguments["label_dim"]
    labels = torch.eye(classes)[torch.arange(batch) % classes] if classes else None
    return x, sigma, labels


def skip(x, sigma):
    """c_skip x, what is left of D where F is zero."""
    return 0.25 / (sigma**2 + 0.25)[:, None, None, None] * x


def rms(x):
    return x.double().square().mean().sqrt().item()


# --------------------------------------------------------------------------------------------------
# A second network, in numpy and float64, straight from the formulas: no class, no module, and every
# name of the network SMALL written out.


def np_normalize(x, axes):
    return x / (1e-4 + np.sqrt((x**2).mean(axes, keepdims=True)))


def np_silu(x):
    return x / (1 + np.exp(-x)) / 0.596


def np_sum(a, b, t):
    return ((1 - t) * a + t * b) / np.sqrt((1 - t) ** 2 + t**2)


def np_cat(a, b):
    c = np.sqrt((a.shape[1] + b.shape[1]) / 0.5)
    a = a * c * 0.5 / np.sqrt(a.shape[1])
    b = b * c * 0.5 / np.sqrt(b.shape[1])
    return np.concatenate([a, b], 1)


def np_linear(x, w, gain=1.0):
    w = np_normalize(w, 1) * gain / np.sqrt(w.shape[1])
    return np.einsum("bi,oi->bo", x, w)


def np_conv(x, w, gain=1.0):
    w = np_normalize(w, (1, 2, 3)) * gain / np.sqrt(w[0].size)
    size = w.shape[-1]
    height, width = x.shape[2:]
    margin = (size // 2, size // 2)
    padded = np.pad(x, [(0, 0), (0, 0), margin, margin])
    total = 0
    for i in range(size):
        for j in range(size):
            window = padded[:, :, i : i + height, j : j + width]
            total = total + np.einsum("bihw,oi->bohw", window, w[:, :, i, j])
    return total


def np_attention(x, weights, name, width):
    """Pixel by pixel, head by head.

    Channel c of the qkv convolution is (head, channel of the head, q or k or v), the last fastest.
    """
    qkv = np_conv(x, weights[f"{name}.attn_qkv.weight"])
    B, C, H, W = x.shape
    y = np.zeros((B, C, H * W))
    for b in range(B):
        for head in range(C // width):
            first = head * width
            parts = qkv[b, 3 * first : 3 * (first + width)].reshape(width, 3, H * W)
            q, k, v = (np_normalize(parts[:, which], 0) for which in range(3))  # [width, pixels]
            for pixel in range(H * W):
                p = np.exp(q[:, pixel] @ k / np.sqrt(width))
                y[b, first : first + width, pixel] = v @ p / p.sum()
    y = np_conv(y.reshape(x.shape), weights[f"{name}.attn_proj.weight"])
    return np_sum(x, y, 0.3)


def np_block(x, emb, weights, name, width, encoder, resample=None):
    skip = weights.get(f"{name}.conv_skip.weight")
    if resample == "down":
        left = x[:, :, ::2, ::2] + x[:, :, 1::2, ::2]
        right = x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]
        x = (left + right) / 4
    if resample == "up":
        x = x.repeat(2, axis=2).repeat(2, axis=3)
    if encoder and skip is not None:
        x = np_conv(x, skip)
    if encoder:
        x = np_normalize(x, 1)
    y = np_conv(np_silu(x), weights[f"{name}.conv_res0.weight"])
    gain = weights[f"{name}.emb_gain"]
    scale = np_linear(emb, weights[f"{name}.emb_linear.weight"], gain) + 1
    y = np_conv(np_silu(y * scale[:, :, None, None]), weights[f"{name}.conv_res1.weight"])
    if not encoder and skip is not None:
        x = np_conv(x, skip)
    x = np_sum(x, y, 0.3)
    if f"{name}.attn_qkv.weight" in weights:
        x = np_attention(x, weights, name, width)
    return np.clip(x, -256, 256)


def np_denoise(state, x, sigma, labels):
    """The network SMALL."""
    weights = {}
    for name, tensor in state.items():
        weights[name.removeprefix("unet.")] = tensor.double().numpy()
    x, sigma, labels = (tensor.double().numpy() for tensor in (x, sigma, labels))
    c_noise = np.log(sigma)[:, None] / 4
    angles = c_noise * weights["emb_fourier.freqs"] + weights["emb_fourier.phases"]
    noise = np_linear(np.sqrt(2) * np.cos(angles), weights["emb_noise.weight"])
    label = np_linear(labels * np.sqrt(3), weights["emb_label.weight"])
    emb = np_silu(np_sum(noise, label, 0.5))

    def block(x, name, encoder, resample=None):
        return np_block(x, emb, weights, name, 8, encoder, resample)

    s = sigma[:, None, None, None]
    h = np.concatenate([x / np.sqrt(s**2 + 0.25), np.ones_like(x[:, :1])], 1)
    a = np_conv(h, weights["enc.8x8_conv.weight"])
    b = block(a, "enc.8x8_block0", True)
    c = block(b, "enc.4x4_down", True, "down")
    d = block(c, "enc.4x4_block0", True)
    h = block(d, "dec.4x4_in0", False)
    h = block(h, "dec.4x4_in1", False)
    h = block(np_cat(h, d), "dec.4x4_block0", False)
    h = block(np_cat(h, c), "dec.4x4_block1", False)
    h = block(h, "dec.8x8_up", False, "up")
    h = block(np_cat(h, b), "dec.8x8_block0", False)
    h = block(np_cat(h, a), "dec.8x8_block1", False)
    f = np_conv(h, weights["out_conv.weight"], weights["out_gain"])
    return 0.25 / (s**2 + 0.25) * x + s * 0.5 / np.sqrt(s**2 + 0.25) * f


def test_the_network_is_the_one_of_the_formulas():
    network = build()
    x, sigma, labels = inputs()
    expected = np_denoise(network.state_dict(), x, sigma, labels)
    assert np.abs(expected - skip(x, sigma).numpy()).max() > 0.1  # F says something
    np.testing.assert_allclose(network(x, sigma, labels).detach(), expected, atol=1e-5)
    double = network.double()(x.double(), sigma.double(), labels.double())
    np.testing.assert_allclose(double.detach(), expected, atol=1e-6)


@pytest.mark.parametrize(
    "in_channels, out_channels, encoder, resample, head_channels",
    [
        (6, 8, True, None, 4),
        (8, 8, True, "down", 0),
        (8, 4, False, "up", 2),
        (8, 8, False, None, 8),
    ],
)
def test_a_block_by_hand(in_channels, out_channels, encoder, resample, head_channels):
    torch.manual_seed(3)
    block = Block(in_channels, out_channels, 5, encoder, resample, head_channels)
    torch.nn.init.constant_(block.emb_gain, 0.7)
    x = torch.randn(2, in_channels, 4, 4)
    emb = torch.randn(2, 5)
    weights = {}
    for name, tensor in block.state_dict().items():
        weights[f"block.{name}"] = tensor.double().numpy()
    expected = np_block(
        x.double().numpy(), emb.double().numpy(), weights, "block", head_channels, encoder, resample
    )
    np.testing.assert_allclose(block(x, emb).detach(), expected, atol=1e-5)


def test_a_block_is_clipped_at_256():
    torch.manual_seed(0)
    block = Block(4, 4, 3, encoder=False)
    out = block(1000 * torch.ones(1, 4, 4, 4), torch.zeros(1, 3))
    assert out.abs().max() == 256


# --------------------------------------------------------------------------------------------------
# Magnitudes.


def test_operations_keep_unit_variance():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 30, generator=generator)
    b = torch.randn(4000, 90, generator=generator)
    assert rms(edm2.mp_silu(a)) == pytest.approx(1, abs=0.01)
    for t in (0.1, 0.3, 0.5, 0.9):
        assert rms(edm2.mp_sum(a, b[:, :30], t)) == pytest.approx(1, abs=0.01)
        both = edm2.mp_cat(a, b, t)
        assert both.shape == (4000, 120)
        assert rms(both) == pytest.approx(1, abs=0.01)
        # Each part counts by its share, not by its width.
        share = both[:, 30:].norm() / both[:, :30].norm()
        assert share == pytest.approx(t / (1 - t), rel=0.02)
    assert torch.equal(edm2.mp_sum(a, b[:, :30], 0), a)


def test_normalize_gives_unit_root_mean_square_over_the_dims():
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64) * 100
    for dims in (1, (1, 2, 3)):
        squares = edm2.normalize(x, dims).square().mean(dims)
        torch.testing.assert_close(squares, torch.ones_like(squares), atol=1e-4, rtol=0)
    # At 1e-4, the size of eps, half is left.
    tiny = edm2.normalize(torch.tensor([[1e-4, -1e-4]]), 1)
    torch.testing.assert_close(tiny, torch.tensor([[0.5, -0.5]]))
    zero = torch.zeros(1, 3, requires_grad=True)
    out = edm2.normalize(zero, 1)
    out.sum().backward()
    assert out.tolist() == [[0, 0, 0]] and zero.grad.isfinite().all()


def test_fourier_features_have_unit_variance_and_differ():
    torch.manual_seed(0)
    fourier = Fourier(20000)
    features = fourier(torch.tensor([-1.0, 0.3, 1.0]))
    assert features.shape == (3, 20000)
    assert [rms(row) for row in features] == pytest.approx([1, 1, 1], abs=0.02)
    assert abs((features[0] * features[2]).mean()) < 0.05  # frequencies of 2 pi tell -1 from 1
    assert not list(fourier.parameters())
    assert fourier.freqs.std().item() == pytest.approx(2 * math.pi, rel=0.05)
    assert fourier.phases.max().item() == pytest.approx(2 * math.pi, rel=0.01)


def test_a_layer_keeps_unit_variance_whatever_the_scale_of_its_weight():
    torch.manual_seed(0)
    for kernel, shape in ((0, (400, 24)), (1, (400, 24, 9, 9)), (3, (400, 24, 9, 9))):
        layer = Layer(24, 64, kernel)
        x = torch.randn(shape)
        for scale in (0.1, 30):
            layer.weight.data.normal_(std=scale)
            out = layer(x)
            assert out.shape == (400, 64, *shape[2:])
            inside = out[..., 1:-1, 1:-1] if kernel else out
            assert rms(inside) == pytest.approx(1, abs=0.02)
            torch.testing.assert_close(layer(x, 2.5), 2.5 * out)


def test_the_whole_network_keeps_magnitude_at_every_noise_level():
    network = build(SMALL | dict(model_channels=32, img_resolution=16, attn_resolutions=[8]))
    torch.nn.init.ones_(network.unet.out_gain)
    labels = torch.eye(3)[[0] * 8]
    for sigma in (0.01, 0.5, 80.0):
        std = math.hypot(sigma, 0.5)
        x = torch.randn(8, 2, 16, 16) * std
        out = network(x, sigma, labels)
        f = (out - 0.25 / std**2 * x) * std / (sigma * 0.5)
        assert 0.7 < rms(f) < 1.4


def test_the_scale_of_no_layers_weight_matters():
    network = build().double()
    x, sigma, labels = (tensor.double() for tensor in inputs())
    before = network(x, sigma, labels).detach()
    layers = [module for module in network.modules() if isinstance(module, Layer)]
    weights = [name for name, _ in network.named_parameters() if name.endswith("weight")]
    assert len(layers) == len(weights)
    for layer in layers:
        original = layer.weight.data
        layer.weight.data = 7 * original
        after = network(x, sigma, labels)
        torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)  # but for the eps of 1e-4
        layer.weight.data = original.flip(0)  # the direction does matter
        assert (network(x, sigma, labels) - before).abs().max() > 5e-3
        layer.weight.data = original


# --------------------------------------------------------------------------------------------------
# The denoiser.


class Constant(torch.nn.Module):
    """Stands in for F: remembers what it is given and answers 3."""

    def forward(self, *args):
        self.args = args
        return torch.full_like(args[0], 3.0)


def test_preconditioning_by_hand():
    network = build()
    x, _, labels = inputs()
    embedding = network.embed(labels)
    network.unet = Constant()
    out = network(x, torch.tensor([1.0, 2.0]), embedding=embedding)
    scaled, c_noise, condition = network.unet.args
    torch.testing.assert_close(
        scaled, torch.stack([x[0] / math.sqrt(1.25), x[1] / math.sqrt(4.25)])
    )
    torch.testing.assert_close(c_noise, torch.tensor([0.0, math.log(2) / 4]))
    assert condition is embedding
    torch.testing.assert_close(out[0], 0.2 * x[0] + 3 * 0.5 / math.sqrt(1.25))
    torch.testing.assert_close(out[1], 0.25 / 4.25 * x[1] + 3 / math.sqrt(4.25))


def test_sigma_is_a_number_or_one_for_each_sample():
    network = build()
    x, sigma, labels = inputs()
    out = network(x, 0.7, labels)
    torch.testing.assert_close(out, network(x, torch.full((2,), 0.7), labels))
    torch.testing.assert_close(out, network(x, torch.tensor(0.7, dtype=torch.float64), labels))
    first = network(x[:1], sigma[:1], labels[:1])
    second = network(x[1:], sigma[1:], labels[1:])
    torch.testing.assert_close(network(x, sigma, labels), torch.cat([first, second]))


def test_the_embedding_may_be_given_in_place_of_the_labels():
    network = build()
    x, sigma, labels = inputs()
    embedding = network.embed(labels)
    assert embedding.shape == (2, 16)
    with_labels = network(x, sigma, labels)
    assert torch.equal(network(x, sigma, embedding=embedding), with_labels)
    noised = network(x, sigma, embedding=embedding + 0.5)
    assert (noised - with_labels).abs().max() > 1e-3

    # No labels are zeros, and so is their embedding.
    without = network(x, sigma)
    assert torch.equal(without, network(x, sigma, torch.zeros(2, 3)))
    assert torch.equal(without, network(x, sigma, embedding=torch.zeros(2, 16)))
    assert (without - with_labels).abs().max() > 1e-3


def test_a_wrong_condition_is_refused():
    network = build()
    x, sigma, labels = inputs()
    too_many = {"labels": torch.zeros(2, 4)}
    numbers = {"labels": torch.zeros(3)}
    both = {"labels": labels, "embedding": torch.zeros(2, 16)}
    for condition in (too_many, numbers, both):
        with pytest.raises(ValueError, match="labels"):
            network(x, sigma, **condition)


def test_a_network_without_classes_takes_no_condition():
    network = build(WIDE)
    x, sigma, _ = inputs(WIDE)
    assert network(x, sigma).shape == x.shape
    assert "unet.emb_label.weight" not in network.state_dict()
    no_label = {"labels": torch.zeros(2, 0)}
    labels = {"labels": torch.zeros(2, 3)}
    embedding = {"embedding": torch.zeros(2, 20)}
    for condition in (no_label, labels, embedding):
        with pytest.raises(ValueError, match="classes"):
            network(x, sigma, **condition)


def test_arguments_that_make_no_network_are_refused():
    changes = [
        dict(img_resolution=9),
        dict(channel_mult=[]),
        dict(num_blocks=0),
        dict(channels_per_head=0),
        dict(channels_per_head=3),
    ]
    for change in changes:
        with pytest.raises(ValueError, match="no network|heads of 3"):
            EDM2(**SMALL | change)


def test_the_mode_and_the_graph_change_no_bit_and_no_weight():
    network = build()
    x, sigma, labels = inputs()
    before = copy.deepcopy(network.state_dict())
    out = network.train()(x, sigma, labels).detach()
    assert torch.equal(network.eval()(x, sigma, labels), out)
    with torch.no_grad():
        assert torch.equal(network(x, sigma, labels), out)
        assert torch.equal(network.train()(x, sigma, labels), out)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_gradients_reach_every_trained_parameter():
    for arguments in (SMALL, WIDE):
        network = build(arguments)
        x, sigma, labels = inputs(arguments)
        (network(x, sigma, labels) * torch.randn_like(x)).sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 1e-6, name
            assert "logvar" not in name and "fourier" not in name
        # Along a weight's scale there is nothing to gain.
        weight = network.unet.out_conv.weight
        along = (weight * weight.grad).sum((1, 2, 3))
        assert along.abs().max() < 1e-3 * weight.norm() * weight.grad.norm()


def test_gradients_are_finite_differences():
    network = build().double()
    x, sigma, labels = (tensor.double() for tensor in inputs())
    direction = torch.randn_like(x)

    def value():
        return (network(x, sigma, labels) * direction).sum()

    value().backward()
    unet = network.unet
    parameters = [
        unet.enc["4x4_block0"].attn_qkv.weight,
        unet.emb_label.weight,
        unet.dec["8x8_up"].emb_gain,
        unet.enc["8x8_conv"].weight,
    ]
    for parameter in parameters:
        step = torch.randn_like(parameter) * 1e-5
        parameter.data += step
        above = value().item()
        parameter.data -= 2 * step
        below = value().item()
        parameter.data += step
        expected = 2 * (parameter.grad * step).sum().item()
        assert above - below == pytest.approx(expected, rel=1e-4, abs=1e-10)


def test_bfloat16_autocast_is_near():
    network = build()
    x, sigma, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        half = network(x, sigma, labels)
    full = network(x, sigma, labels)
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert rms(half - full) < 0.03 * rms(full)


# --------------------------------------------------------------------------------------------------
# Names, shapes and sizes.

KEYS = """
    logvar_fourier.freqs 128
    logvar_fourier.phases 128
    logvar_linear.weight 1 128
    unet.emb_fourier.freqs 8
    unet.emb_fourier.phases 8
    unet.emb_noise.weight 16 8
    unet.emb_label.weight 16 3
    unet.enc.8x8_conv.weight 8 3 3 3
    unet.enc.8x8_block0.emb_gain
    unet.enc.8x8_block0.conv_res0.weight 8 8 3 3
    unet.enc.8x8_block0.emb_linear.weight 8 16
    unet.enc.8x8_block0.conv_res1.weight 8 8 3 3
    unet.enc.4x4_down.emb_gain
    unet.enc.4x4_down.conv_res0.weight 8 8 3 3
    unet.enc.4x4_down.emb_linear.weight 8 16
    unet.enc.4x4_down.conv_res1.weight 8 8 3 3
    unet.enc.4x4_block0.emb_gain
    unet.enc.4x4_block0.conv_res0.weight 16 16 3 3
    unet.enc.4x4_block0.emb_linear.weight 16 16
    unet.enc.4x4_block0.conv_res1.weight 16 16 3 3
    unet.enc.4x4_block0.conv_skip.weight 16 8 1 1
    unet.enc.4x4_block0.attn_qkv.weight 48 16 1 1
    unet.enc.4x4_block0.attn_proj.weight 16 16 1 1
    unet.dec.4x4_in0.emb_gain
    unet.dec.4x4_in0.conv_res0.weight 16 16 3 3
    unet.dec.4x4_in0.emb_linear.weight 16 16
    unet.dec.4x4_in0.conv_res1.weight 16 16 3 3
    unet.dec.4x4_in0.attn_qkv.weight 48 16 1 1
    unet.dec.4x4_in0.attn_proj.weight 16 16 1 1
    unet.dec.4x4_in1.emb_gain
    unet.dec.4x4_in1.conv_res0.weight 16 16 3 3
    unet.dec.4x4_in1.emb_linear.weight 16 16
    unet.dec.4x4_in1.conv_res1.weight 16 16 3 3
    unet.dec.4x4_block0.emb_gain
    unet.dec.4x4_block0.conv_res0.weight 16 32 3 3
    unet.dec.4x4_block0.emb_linear.weight 16 16
    unet.dec.4x4_block0.conv_res1.weight 16 16 3 3
    unet.dec.4x4_block0.conv_skip.weight 16 32 1 1
    unet.dec.4x4_block0.attn_qkv.weight 48 16 1 1
    unet.dec.4x4_block0.attn_proj.weight 16 16 1 1
    unet.dec.4x4_block1.emb_gain
    unet.dec.4x4_block1.conv_res0.weight 16 24 3 3
    unet.dec.4x4_block1.emb_linear.weight 16 16
    unet.dec.4x4_block1.conv_res1.weight 16 16 3 3
    unet.dec.4x4_block1.conv_skip.weight 16 24 1 1
    unet.dec.4x4_block1.attn_qkv.weight 48 16 1 1
    unet.dec.4x4_block1.attn_proj.weight 16 16 1 1
    unet.dec.8x8_up.emb_gain
    unet.dec.8x8_up.conv_res0.weight 16 16 3 3
    unet.dec.8x8_up.emb_linear.weight 16 16
    unet.dec.8x8_up.conv_res1.weight 16 16 3 3
    unet.dec.8x8_block0.emb_gain
    unet.dec.8x8_block0.conv_res0.weight 8 24 3 3
    unet.dec.8x8_block0.emb_linear.weight 8 16
    unet.dec.8x8_block0.conv_res1.weight 8 8 3 3
    unet.dec.8x8_block0.conv_skip.weight 8 24 1 1
    unet.dec.8x8_block1.emb_gain
    unet.dec.8x8_block1.conv_res0.weight 8 16 3 3
    unet.dec.8x8_block1.emb_linear.weight 8 16
    unet.dec.8x8_block1.conv_res1.weight 8 8 3 3
    unet.dec.8x8_block1.conv_skip.weight 8 16 1 1
    unet.out_conv.weight 2 8 3 3
    unet.out_gain
"""


def test_names_and_shapes_are_the_published_ones():
    expected = {}
    for line in KEYS.split("\n")[1:-1]:
        name, *shape = line.split()
        expected[name] = tuple(map(int, shape))
    shapes = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    assert shapes == expected


def test_the_middle_has_attention_whatever_its_level_says():
    names = [name for name in build(WIDE).state_dict() if name.endswith("attn_qkv.weight")]
    assert "unet.dec.2x2_in0.attn_qkv.weight" in names
    assert not any(name.startswith("unet.enc.2x2") for name in names)
    levels = {name.split(".")[2].partition("_")[0] for name in names}
    assert levels == {"8x8", "4x4", "2x2"}


def test_the_published_sizes():
    millions = {128: 125, 192: 280, 256: 498, 320: 777, 384: 1119, 448: 1523}
    for channels, expected in millions.items():
        with torch.device("meta"):
            network = EDM2(64, 4, 1000, channels, [1, 2, 3, 4], 3, [16, 8])
        count = sum(parameter.numel() for parameter in network.parameters())
        assert count / 1e6 == pytest.approx(expected, abs=0.6)


def test_arguments_are_told_by_names_and_shapes():
    for arguments in (SMALL, WIDE, MORE):
        state = build(arguments).state_dict()
        told = edm2.arguments_of(state, arguments["channels_per_head"])
        assert told == arguments


def test_latents_to_the_vae():
    zero = edm2.latents_to_vae(torch.zeros(1, 4, 1, 1)).flatten().tolist()
    half = edm2.latents_to_vae(torch.full((1, 4, 1, 1), 0.5)).flatten().tolist()
    mean = [5.81, 3.25, 0.12, -2.15]
    std = [4.17, 4.62, 3.71, 3.28]
    assert zero == pytest.approx(mean)
    assert half == pytest.approx([m + s for m, s in zip(mean, std)])  # one std above


# --------------------------------------------------------------------------------------------------
# Files. Snapshots are in test_edm2_pickle.py.


def refused(path, *arguments):
    """The one line with which both check and load refuse a file; it names the file."""
    with pytest.raises(ValueError) as by_check:
        edm2.check(path, *arguments)
    with pytest.raises(ValueError) as by_load:
        edm2.load(path, *arguments)
    message = str(by_check.value)
    assert message == str(by_load.value)
    assert message.startswith(f"{path}: ") and "give" in message
    assert len(message.splitlines()) == 1
    return message


def test_a_network_is_saved_and_loaded(tmp_path):
    network = build()
    edm2.save(network, tmp_path / "a.safetensors")
    loaded = edm2.load(tmp_path / "a.safetensors")
    assert loaded.channels_per_head == 8 and not loaded.training
    assert torch.equal(loaded(*inputs()), network(*inputs()))


def test_a_file_that_does_not_tell_the_width_of_its_heads(tmp_path):
    network = build()
    save_file(network.state_dict(), tmp_path / "a.safetensors")  # no metadata
    assert edm2.load(tmp_path / "a.safetensors", 8).channels_per_head == 8
    other = edm2.load(tmp_path / "a.safetensors", 4)
    assert not torch.equal(other(*inputs()), network(*inputs()))

    # If nobody says it is 64, which does not divide the channels here.
    assert "heads of 64" in refused(tmp_path / "a.safetensors")
    big = EDM2(**SMALL | dict(model_channels=64, channels_per_head=64))
    save_file(big.state_dict(), tmp_path / "b.safetensors")
    assert edm2.load(tmp_path / "b.safetensors").channels_per_head == 64


def test_missing_and_foreign_files_are_named(tmp_path):
    (tmp_path / "folder.pkl").mkdir()
    torch.save(build().state_dict(), tmp_path / "a.pt")
    for name in ("none.pkl", "none.safetensors", "folder.pkl", "a.pt"):
        assert "no such" in refused(tmp_path / name)


OTHER_STATES = {  # what the message says: the weights that are changed, None for one left out
    "attn_proj.weight has shape None": {"unet.enc.4x4_block0.attn_proj.weight": None},
    "names are not those of EDM2": {"unet.out_conv.weight": None},
    "stray.weight has shape [2], and None": {"unet.stray.weight": torch.ones(2)},
    "has shape [16, 9], and [16, 8]": {"unet.emb_noise.weight": torch.ones(16, 9)},
    "0-d": {"unet.out_conv.weight": torch.tensor(1.0)},
    "num_blocks=0": {"unet.enc.16x16_conv.weight": torch.ones(8, 3, 3, 3)},
    "out_gain holds": {"unet.out_gain": torch.tensor(math.nan)},
    "emb_noise.weight holds": {"unet.emb_noise.weight": torch.ones(16, 8).long()},
}


@pytest.mark.parametrize("reason", OTHER_STATES)
def test_a_state_dict_of_another_network_is_refused(tmp_path, reason):
    state = build().state_dict() | OTHER_STATES[reason]
    state = {name: value for name, value in state.items() if value is not None}
    save_file(state, tmp_path / "a.safetensors", {"channels_per_head": "8"})
    assert reason in refused(tmp_path / "a.safetensors")


def test_nonsense_in_the_metadata_is_refused(tmp_path):
    for heads in ("0", "-8", "3", "many"):
        save_file(build().state_dict(), tmp_path / "a.safetensors", {"channels_per_head": heads})
        refused(tmp_path / "a.safetensors")


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    edm2.save(build(), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "a.safetensors"
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path)


# --------------------------------------------------------------------------------------------------
# The adapter.

LATENTS = SMALL | dict(img_channels=4, label_dim=5)
GUIDES = {
    "conditional": LATENTS | dict(channel_mult=[1], attn_resolutions=[]),
    "unconditional": LATENTS | dict(label_dim=0, attn_resolutions=[]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An EDM2 of 8 x 8 latents and 5 classes, two guides, a VAE and names of classes."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("edm2")
    edm2.save(build(LATENTS), folder / "net.safetensors")
    for seed, (kind, arguments) in enumerate(GUIDES.items()):
        edm2.save(build(arguments, seed + 1), folder / f"{kind}.safetensors")
    vae = AutoencoderKL(
        block_out_channels=[8],
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
    )
    vae.save_pretrained(folder / "vae")
    (folder / "classes.txt").write_text("tench\ngoldfish, carp\nshark\nray\nrooster\n")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return bases.load(f"edm2:{folder / 'net.safetensors'}")


def draw(model, texts, steps=4, guidance=1.0):
    """The deterministic sampler from three fixed noises -> latents."""
    x_T = 80 * torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    times = model.path.times(steps)
    return sample(model, model.path, times, model.encode(texts), x_T, guidance, model.encode([""]))


@torch.no_grad()
def test_samples_are_eulers_method_on_the_denoiser(folder, model):
    network = edm2.load(folder / "net.safetensors")
    labels = torch.eye(6)[[0, 3, 5], :5]  # the null label is zeros
    x = 80 * torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    times = model.path.times(4).float()
    for t, s in zip(times[:-1], times[1:]):
        x = x + (s - t) * (x - network(x, t, labels)) / t
    latents = draw(model, ["0", "Ray", ""])
    torch.testing.assert_close(latents, x, rtol=1e-4, atol=1e-4)
    pictures = model.vae.decode(edm2.latents_to_vae(x)).sample.clamp(0, 1)
    torch.testing.assert_close(model.decode(x), pictures, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="prompt 'eagle'"):
        model.encode(["eagle"])


@torch.no_grad()
def test_guidance_starts_from_the_null_label(model):
    null = draw(model, ["", "", ""])
    torch.testing.assert_close(
        draw(model, ["1", "2", "3"], guidance=1e-6), null, rtol=1e-3, atol=1e-3
    )
    assert not torch.allclose(draw(model, ["1", "2", "3"]), null, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", GUIDES)
def test_a_second_network_guides_as_published(tmp_path, folder, model, kind):
    guided = bases.load(f"edm2:{folder / 'net.safetensors'},{folder / kind}.safetensors")
    network = edm2.load(folder / "net.safetensors")
    guide = edm2.load(folder / f"{kind}.safetensors")
    texts = ["0", "ray", "2"]
    labels = torch.eye(5)[[0, 3, 2]]
    guide_labels = labels if kind == "conditional" else None
    times = guided.path.times(4).float()
    x = 80 * torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t, s in zip(times[:-1], times[1:]):
        weak = guide(x, t, guide_labels)
        x0_hat = weak + 2.5 * (network(x, t, labels) - weak)
        x = x + (s - t) * (x - x0_hat) / t
    latents = draw(guided, texts, guidance=2.5)
    torch.testing.assert_close(latents, x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(draw(model, texts, guidance=2.5), x, atol=0.01)
    assert torch.equal(draw(guided, texts), draw(model, texts))  # a guidance of 1 asks no guide
    assert not any(p.requires_grad for p in guided.guide_network.parameters())

    # The guide is saved with it.
    guided.save(tmp_path / "saved")
    again = bases.load(tmp_path / "saved")
    assert again.network.channels_per_head == 8
    assert torch.equal(draw(again, texts, guidance=2.5), latents)
