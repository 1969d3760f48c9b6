"""Averages of the trained weights, as training keeps them, and post-hoc EMA.

An average whose weights are powers of time, p(s) ~ s^gamma up to the time t of its snapshot, has a
width relative to t, sigma_rel (EDM2, arXiv 2312.02696, section 3.1). From the snapshots of two such
averages one of any other length is made afterwards: the combination whose profile is the nearest.
Left out on purpose: averages of buffers. The networks here have none that training changes.
"""

import math
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

EMA_LENGTHS = (0.05, 0.10)  # sigma_rel of the averages that training keeps, as EDM2 does


# --------------------------------------------------------------------------------------------------
# What training keeps.


class Averages:
    """The averages of the trained weights: "ema" of --ema, and those of EMA_LENGTHS for snapshots.

    trained: {name: parameter}, what they follow.
    """

    def __init__(self, trained, ema_decay, with_snapshots):
        self.trained = trained
        self.ema_decay = ema_decay
        self.tensors = {}  # {"ema" or a length: {name: tensor}}
        if ema_decay:
            self.tensors["ema"] = self.copy_of_trained()
        if with_snapshots:
            for length in EMA_LENGTHS:
                self.tensors[length] = self.copy_of_trained()

    def copy_of_trained(self):
        """{name: tensor} of the weights as they are now."""
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def update(self, iteration):
        """Takes in the weights of this iteration, 1, 2, ..."""
        for length, average in self.tensors.items():
            decay = self.ema_decay if length == "ema" else power_decay(iteration, length)
            for name, value in average.items():
                value.lerp_(self.trained[name].detach(), 1 - decay)

    def state(self):
        """The tensors that a checkpoint holds."""
        tensors = {}
        for length, average in self.tensors.items():
            for name, value in average.items():
                tensors[f"average.{length}.{name}"] = value
        return tensors

    def snapshots(self):
        """{length: {name: tensor}} of the averages that snapshots are made of."""
        return {length: self.tensors[length] for length in EMA_LENGTHS}

    @contextmanager
    def applied(self):
        """Within the block the network holds what is evaluated and saved: the EMA, if any."""
        with swapped(self.trained, self.tensors.get("ema", {})):
            yield


@contextmanager
def swapped(weights, others):
    """Within the block the tensors of `weights` hold the values of `others`, {name: tensor}.

    Without others nothing changes.
    """
    kept = {name: weights[name].detach().clone() for name in others}
    try:
        copy_into(weights, others)
        yield
    finally:
        copy_into(weights, kept)


@torch.no_grad()
def copy_into(weights, values):
    """Copies values {name: tensor} into the tensors of the same names."""
    for name, value in values.items():
        weights[name].copy_(value)


# --------------------------------------------------------------------------------------------------
# Post-hoc EMA.


def sigma_rel_of(gamma):
    """The relative width of the profile s^gamma (EDM2, section 3.1)."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(sigma_rel):
    """The inverse, for 0 < sigma_rel < sqrt(1/12) = 0.2887, which is a plain mean.

    It is the largest real root of g^3 + 7 g^2 + (16 - s^-2) g + 12 - s^-2.
    """
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    is_real = np.abs(roots.imag) < 1e-9
    return float(roots[is_real].real.max())


def power_decay(t, sigma_rel):
    """What is kept of an average when the t-th weights come in, t = 1, 2, ...

    (1 - 1/t)^(gamma + 1): the first weights are taken whole.
    """
    return (1 - 1 / t) ** (gamma_of(sigma_rel) + 1)


def profile_product(t_a, gamma_a, t_b, gamma_b):
    """The inner product of two profiles p(s) ~ s^gamma on [0, t], each of integral 1.

    Arrays broadcast.
    """
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    product = (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** exponent
    return product / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def ema_coefficients(times, sigma_rels, sigma_rel, time=None):
    """The coefficients [K] that make K averages, of (time, sigma_rel), the nearest to one wanted.

    Wanted is the average of length `sigma_rel` at `time` (default: the largest of `times`).
    Least squares between profiles, then divided by their sum (EDM2, eq. 26 and after). Many come
    out negative, so merging is in an affine space.

    >>> # between the two averages of the last snapshot
    >>> ema_coefficients([10, 10, 20, 20], [0.05, 0.1, 0.05, 0.1], 0.08).round(2) + 0.0
    array([0.  , 0.  , 0.26, 0.74])
    """
    t = np.asarray(times, float)
    gamma = np.array([gamma_of(length) for length in sigma_rels])
    wanted_time = t.max() if time is None else float(time)
    products = profile_product(t[:, None], gamma[:, None], t[None], gamma[None])  # [K, K]
    wanted = profile_product(t, gamma, wanted_time, gamma_of(sigma_rel))  # [K]
    coefficients = np.linalg.solve(products, wanted)
    return coefficients / coefficients.sum()


def sweep(views, lengths):
    """Post-hoc EMA coefficients [len(lengths), K] over the K checkpoints `views`.

    Only checkpoints that are averages (facts["sigma_rel"]) count; without two of them there is no
    row. Raises ValueError if two are the same average.
    """
    which = [k for k, view in enumerate(views) if view.facts.get("sigma_rel")]
    if len(which) < 2:
        return torch.zeros(0, len(views))
    times = [float(views[k].facts["iteration"]) for k in which]
    widths = [float(views[k].facts["sigma_rel"]) for k in which]
    marks = list(zip(times, widths))
    if len(set(marks)) < len(marks):
        time, width = max(marks, key=marks.count)
        raise ValueError(
            f"two checkpoints are the average {width} of iteration {time:g}; give each once"
        )
    rows = torch.zeros(len(lengths), len(views), dtype=torch.float64)
    for row, length in zip(rows, lengths):
        row[which] = torch.as_tensor(ema_coefficients(times, widths, length))
    return rows


def rivals(views, paths, lengths):
    """What a search over merges has to beat -> {name: coefficients [K]}.

    Each of the K checkpoints alone, the uniform average, and post-hoc EMA of every length.
    """
    K = len(views)
    stems = [Path(path).stem or path for path in paths]
    found = {}
    for path, stem, one_hot in zip(paths, stems, torch.eye(K, dtype=torch.float64)):
        name = path if stems.count(stem) > 1 else stem
        found[name] = one_hot
    found["uniform average"] = torch.full((K,), 1 / K, dtype=torch.float64)
    with suppress(ValueError):  # averages of two runs have no third length
        for length, coefficients in zip(lengths, sweep(views, lengths)):
            found[f"EMA {length:g}"] = coefficients
    return found
