"""Averages of the weights, and post-hoc EMA."""
import math
import numpy as np
import torch
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path

EMA_LENGTHS = (0.05, 0.10)                                               # sigma_rel of the averages that training keeps, as EDM2 does


@contextmanager
def swapped(weights, others):
    """Within the block the tensors of `weights` hold the values of `others` (both dicts of the same names); an empty `others` changes nothing."""
    kept = {n: weights[n].detach().clone() for n in others}
    try:
        with torch.no_grad():
            [weights[n].copy_(v) for n, v in others.items()]
        yield
    finally:
        with torch.no_grad():
            [weights[n].copy_(v) for n, v in kept.items()]


def sigma_rel_of(gamma):
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(sigma_rel):
    """The inverse: the largest real root of g^3 + 7 g^2 + (16 - s^-2) g + 12 - s^-2. sigma_rel below sqrt(1/12) = 0.2887, a plain mean."""
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(roots[np.abs(roots.imag) < 1e-9].real.max())


def power_decay(t, sigma_rel):
    """What is kept of the average when the t-th weights (t = 1, 2, ...) come in: (1 - 1/t)^(gamma + 1); the first are taken whole."""
    return (1 - 1 / t) ** (gamma_of(sigma_rel) + 1)


def profile_product(t_a, gamma_a, t_b, gamma_b):
    """The inner product of two averages' profiles p(s) ~ s^gamma on [0, t], each of integral 1; arrays broadcast."""
    earlier = np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** earlier / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def ema_coefficients(times, sigma_rels, sigma_rel, time=None):
    """The coefficients [K] that make averages of K (time, sigma_rel) the nearest to one of `sigma_rel` at `time` (default: the last).

    Least squares between profiles, then divided by their sum (EDM2 eq. 26 ff.). Many come out negative: an affine space, not a simplex.

    >>> ema_coefficients([10, 10, 20, 20], [0.05, 0.1, 0.05, 0.1], 0.08).round(2) + 0.0           # between the two of the last snapshot
    array([0.  , 0.  , 0.26, 0.74])
    """
    t, gamma = np.asarray(times, float), np.array([gamma_of(s) for s in sigma_rels])
    a = profile_product(t[:, None], gamma[:, None], t[None], gamma[None])
    b = profile_product(t, gamma, t.max() if time is None else float(time), gamma_of(sigma_rel))
    x = np.linalg.solve(a, b)
    return x / x.sum()


def sweep(views, lengths):
    """Post-hoc EMA coefficients [K] for each length, over those checkpoints that are averages; none if fewer than two are."""
    which = [k for k, view in enumerate(views) if view.facts.get("sigma_rel")]
    if len(which) < 2:
        return torch.zeros(0, len(views))
    marks = [(float(views[k].facts["iteration"]), float(views[k].facts["sigma_rel"])) for k in which]
    if len(set(marks)) < len(marks):
        raise ValueError(f"two checkpoints are the average {max(marks, key=marks.count)[1]} of iteration {max(marks, key=marks.count)[0]:g}; give each once")
    times, widths = zip(*marks)
    found = torch.zeros(len(lengths), len(views), dtype=torch.float64)
    found[:, which] = torch.stack([torch.as_tensor(ema_coefficients(times, widths, length)) for length in lengths])
    return found


def rivals(views, paths, lengths):
    """What a search over merges has to beat -> {name: coefficients [K]}: each checkpoint alone, the uniform average, post-hoc EMA of every length."""
    K = len(views)
    stems = [Path(path).stem or path for path in paths]
    found = {path if stems.count(stem) > 1 else stem: torch.eye(K, dtype=torch.float64)[k] for k, (path, stem) in enumerate(zip(paths, stems))}
    found["uniform average"] = torch.full((K,), 1 / K, dtype=torch.float64)
    with suppress(ValueError):                                           # averages of two runs have no third length
        found |= {f"EMA {length:g}": c for length, c in zip(lengths, sweep(views, lengths))}
    return found


class Averages:
    """{name: tensor} for each average; `trained` {name: parameter} is what they follow."""

    def __init__(self, trained, ema_decay, with_snapshots):
        self.trained, self.ema_decay = trained, ema_decay
        self.tensors = {}
        if ema_decay:
            self.tensors["ema"] = self.copy_of_trained()
        if with_snapshots:
            for length in EMA_LENGTHS:
                self.tensors[length] = self.copy_of_trained()

    def copy_of_trained(self):
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def update(self, iteration):
        """Takes in the weights of this iteration, 1, 2, ..."""
        for length, average in self.tensors.items():
            decay = self.ema_decay if length == "ema" else power_decay(iteration, length)
            for name, value in average.items():
                value.lerp_(self.trained[name].detach(), 1 - decay)

    def state(self):
        """The tensors that a checkpoint holds."""
        return {f"average.{length}.{name}": value
                for length, average in self.tensors.items() for name, value in average.items()}

    def snapshots(self):
        return {length: self.tensors[length] for length in EMA_LENGTHS}

    @contextmanager
    def applied(self):
        """Within the block the network holds what is evaluated and saved: the EMA, if there is one."""
        with swapped(self.trained, self.tensors.get("ema", {})):
            yield
