"""What FLUX.1 and Qwen-Image share: latents packed into tokens, and a shift that follows the size.

    a token is a square of 2 x 2 latent pixels with all their channels: [B, C, h, w] <-> [B, N, 4 C]
    mu = a line in N, the number of tokens; the scheduler shifts its times by exp(mu)
We keep latents as pictures [C, h, w], because VAE, noise and distances want them so. The size is
`sample_size` in vae/config.json, in pixels. For another one, write it there.
"""

import numpy as np

from bases.files import packed_side
from bases.generator import _libraries
from support.files import read_json


def pack(latents):
    """[B, C, h, w] -> tokens [B, (h / 2) (w / 2), 4 C]."""
    B, C, h, w = latents.shape
    squares = latents.reshape(B, C, h // 2, 2, w // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(B, h * w // 4, 4 * C)


def unpack(tokens, shape):
    """Tokens [B, N, 4 C] -> [B, *shape], shape (C, h, w)."""
    C, h, w = shape
    squares = tokens.reshape(len(tokens), h // 2, w // 2, C, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), C, h, w)


def packed_shape(folder, channels):
    """The shape (C, h, w) of a latent; channels: those of the network, 4 C."""
    side = packed_side(read_json(folder / "vae" / "config.json"))
    return channels // 4, side, side


def stock_times(folder, shape):
    """The times of the folder's own scheduler -> times(steps), [steps + 1] float64, noise first."""
    diffusers, _ = _libraries()
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    tokens = shape[1] * shape[2] // 4
    fewest = config.get("base_image_seq_len", 256)
    most = config.get("max_image_seq_len", 4096)
    low = config.get("base_shift", 0.5)
    high = config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - fewest) / (most - fewest)

    def times(steps):
        sigmas = np.linspace(1.0, 1 / steps, steps)
        if steps == 1 and config.get("shift_terminal"):
            raise ValueError(
                "1 step: the last time of this scheduler is no picture; take 2 or more"
            )
        scheduler.set_timesteps(sigmas=sigmas, mu=mu)
        return scheduler.sigmas.double()

    return times
