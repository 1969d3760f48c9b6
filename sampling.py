"""Sampling: Gaussian paths, one transition kernel, rollouts with log-probs, and a subset of them.

Every base model follows a path  x_t = alpha(t) x_0 + sigma(t) eps  and predicts (x0_hat, eps_hat).
One step from time t to time s < t is
    mean = alpha_s x0_hat + sqrt(sigma_s^2 - tau^2) eps_hat,    x_s = mean + tau z,    z ~ N(0, I)
tau = 0 is the deterministic sampler (DDIM, arXiv 2010.02502 eq. 12; Euler for a flow); for tau > 0
see `transition`. The policy of RL is this Gaussian: state (x_t, t, prompt), action x_s.
DRIFT (arXiv 2601.12401) part (i) is `concentrated_subset`.
Left out on purpose: solvers of higher order, because a log-prob needs one Gaussian a step.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

# Shapes: B pictures, T steps of which W are stochastic, P prompts, N rollouts a prompt.
# "..." is the shape of a latent.


# --------------------------------------------------------------------------------------------------
# Paths: from picture to noise.


class Path(NamedTuple):
    """A Gaussian path x_t = alpha(t) x_0 + sigma(t) eps, and the times at which to sample it."""

    alpha: Callable  # t -> alpha(t)
    sigma: Callable  # t -> sigma(t)
    times: Callable  # number of steps T -> [T + 1] float64, from noise to picture


def Flow(shift=1.0):
    """Rectified flow: alpha = 1 - t, sigma = t, t from 1 to 0.

    `shift` > 1 spends more steps at high noise (Stable Diffusion 3, arXiv 2403.03206).
    """

    def alpha(t):
        return 1 - t

    def sigma(t):
        return t

    def times(steps):
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return shift * t / (1 + (shift - 1) * t)

    return Path(alpha, sigma, times)


def VP(alphas_cumprod, final=1.0, offset=1):
    """Variance preserving, in discrete time: alpha^2 = abar[t], t = 999, ..., 0, and -1 at the end.

    final: abar at the time -1, which is 1 or abar[0] (the scheduler's set_alpha_to_one).
    offset: the scheduler's steps_offset (1 for Stable Diffusion 1.x and 2.x).
    """
    last = torch.tensor([float(final)], dtype=torch.float64)
    table = torch.cat([torch.as_tensor(alphas_cumprod).double().cpu(), last])
    table_on = functools.cache(table.to)  # copied to a GPU once: each copy would stop it

    def abar(t):
        t = torch.as_tensor(t)
        return table_on(t.device)[t.double().round().long()]  # index -1 is `final`

    def alpha(t):
        return abar(t).sqrt()

    def sigma(t):
        return (1 - abar(t)).sqrt()

    def times(steps):
        schedule = len(table) - 1
        spacing = schedule // steps
        if spacing == 0 or spacing * (steps - 1) + offset > schedule - 1:
            raise ValueError(
                f"{steps} steps do not fit a schedule of {schedule} that starts at {offset}"
            )
        t = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * spacing + offset
        return torch.cat([t, torch.tensor([-1.0], dtype=torch.float64)])

    return Path(alpha, sigma, times)


def Karras(sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM (arXiv 2206.00364, eq. 5): alpha = 1, sigma = t.

    The times are evenly spaced in sigma^(1/rho), and then 0.
    """

    def alpha(t):
        return t * 0 + 1

    def sigma(t):
        return t

    def times(steps):
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        first = sigma_max ** (1 / rho)
        last = sigma_min ** (1 / rho)
        t = (first + ramp * (last - first)) ** rho
        return torch.cat([t, torch.zeros(1, dtype=torch.float64)])

    return Path(alpha, sigma, times)


FLOW = Flow()
EDM = Karras()


# --------------------------------------------------------------------------------------------------
# One step.


def transition(x_t, x0_hat, eps_hat, path, t, s, eta=1.0, kernel="ancestral"):
    """The Gaussian of one step from time t to time s < t -> mean [B, ...], std [B, 1, ...].

    kernel     tau                                                        published as
    ancestral  eta sigma_s sqrt(1 - (alpha_t sigma_s / alpha_s sigma_t)^2)  DDIM eq. 16; eta 1: DDPM
    cps        sigma_s sin(eta pi / 2)                                    Flow-GRPO's later step
    flow-grpo  eta sqrt(t / (1 - t)) sqrt(t - s), and a mean of its own   arXiv 2505.05470, eq. 9

    x_t, x0_hat, eps_hat are [B, ...]; t, s and eta are numbers or [B]. At sigma_s = 0 the first two
    kernels end without noise: std = 0. Coefficients are float64, the step is float32.
    Raises ValueError for another kernel, and for flow-grpo on a path that is not a flow.

    >>> x_t, x0_hat, eps_hat = torch.tensor([[0.7]]), torch.tensor([[0.4]]), torch.tensor([[1.0]])
    >>> for eta in (0, 0.5, 1):  # from DDIM to all fresh noise
    ...     mean, std = transition(x_t, x0_hat, eps_hat, FLOW, 0.5, 0.25, eta, "cps")
    ...     print(round(std.item(), 3))
    0.0
    0.177
    0.25
    """
    x_t, x0_hat, eps_hat = x_t.float(), x0_hat.float(), eps_hat.float()
    t = torch.as_tensor(t, dtype=torch.float64, device=x_t.device)
    s = torch.as_tensor(s, dtype=torch.float64, device=x_t.device)
    eta = torch.as_tensor(eta, dtype=torch.float64, device=x_t.device)
    if kernel == "flow-grpo":
        return euler_maruyama(x_t, eps_hat - x0_hat, path, t, s, eta)

    alpha_s = path.alpha(s)
    sigma_s = path.sigma(s)
    if kernel == "ancestral":
        kept = path.alpha(t) * sigma_s / (alpha_s * path.sigma(t))
        tau = eta * sigma_s * torch.sqrt((1 - kept**2).clamp(min=0))
    elif kernel == "cps":
        tau = sigma_s * torch.sin(eta * math.pi / 2)
    else:
        raise ValueError(f"kernel {kernel!r} is none of ancestral, cps, flow-grpo")
    direction = (sigma_s**2 - tau**2).clamp(min=0).sqrt()
    mean = column(alpha_s, x_t) * x0_hat + column(direction, x_t) * eps_hat
    return mean, column(tau, x_t)


def euler_maruyama(x_t, velocity, path, t, s, eta):
    """Flow-GRPO's published step (arXiv 2505.05470, eq. 9), for flows only -> mean, std.

    velocity = eps_hat - x0_hat [B, ...].
    """
    if abs(float(path.alpha(0.5) + path.sigma(0.5)) - 1) > 1e-6:
        raise ValueError(
            "kernel flow-grpo is defined for flows (alpha + sigma = 1) only; take ancestral or cps"
        )
    dt = s - t
    below = 1 - torch.where(t == 1, s, t)  # at t = 1 the published code takes the second time
    level = eta * torch.sqrt(t / below)
    correction = level**2 / (2 * t)
    drift = column((1 + level**2 * (1 - t) / (2 * t)) * dt, x_t)
    mean = column(1 + correction * dt, x_t) * x_t + drift * velocity
    return mean, column(level * torch.sqrt(-dt), x_t)


def column(values, like):
    """A number or [B] -> float32 [B, 1, ...], to be multiplied with `like` [B, ...]."""
    ones = [1] * (like.dim() - 1)
    return values.expand(len(like)).reshape(-1, *ones).float()


def log_prob(x, mean, std):
    """log N(x; mean, std^2 I) in nats, float32 [B]: summed over all dimensions but the first.

    std must be positive.
    """
    std = torch.as_tensor(std, device=x.device).float()
    z = (x.float() - mean.float()) / std
    log_density = -(0.5 * z**2 + torch.log(std) + 0.5 * math.log(2 * math.pi))
    return log_density.flatten(1).sum(1)


def predict(model, x_t, t, prompt, guidance=1.0, null_prompt=None):
    """The model's prediction (x0_hat, eps_hat) at t [B], with classifier-free guidance.

    Guided: x0 = x0_null + guidance (x0 - x0_null), and eps alike; guidance 1 asks the model once.
    prompt is a tuple of embeddings [B, ...], null_prompt of [1, ...]; both go through one forward.
    A model may have a second network for x0_null, `model.guide` (EDM2, arXiv 2312.02696;
    autoguidance, arXiv 2406.02507), or a guidance of its own, `model.guided` (a distilled FLUX.1
    takes the number as an input).
    """
    own_guidance = getattr(model, "guided", None)
    if own_guidance:
        return own_guidance(x_t, t, prompt, guidance, null_prompt)
    if guidance == 1.0:
        return model(x_t, t, prompt)

    guide = getattr(model, "guide", None)
    if guide:
        without_prompt = guide(x_t, t, prompt)
        with_prompt = model(x_t, t, prompt)
    else:
        both = [torch.cat([n.expand_as(p), p]) for n, p in zip(null_prompt, prompt)]
        x0_hat, eps_hat = model(torch.cat([x_t, x_t]), t.repeat(2), tuple(both))
        x0_null, x0_prompt = x0_hat.float().chunk(2)
        eps_null, eps_prompt = eps_hat.float().chunk(2)
        without_prompt = x0_null, eps_null
        with_prompt = x0_prompt, eps_prompt

    guided = []
    for without, plain in zip(without_prompt, with_prompt):
        out = without + guidance * (plain - without)
        channels = getattr(model, "guided_channels", None)
        if channels:  # SiT as published: the other channels follow the prompt alone
            out = torch.cat([out[:, :channels], plain[:, channels:]], 1)
        guided.append(out)
    return tuple(guided)


# --------------------------------------------------------------------------------------------------
# Rollouts.


@dataclass
class Policy:
    """How a step is taken: what rollout and update must share for the ratio to be 1."""

    path: Path
    times: torch.Tensor  # [T + 1] float64, from noise to picture
    window: range  # the stochastic steps; the others are deterministic
    eta: float = 1.0
    kernel: str = "ancestral"
    guidance: float = 1.0

    def step(self, model, x_t, k, prompt, null_prompt=None):
        """The Gaussian of the steps k [B] from x_t -> mean [B, ...], std [B, 1, ...], x0_hat."""
        times = self.times.to(x_t.device)
        is_stochastic = (k >= self.window.start) & (k < self.window.stop)
        eta = self.eta * is_stochastic.double()
        x0_hat, eps_hat = predict(model, x_t, times[k].float(), prompt, self.guidance, null_prompt)
        mean, std = transition(
            x_t, x0_hat, eps_hat, self.path, times[k], times[k + 1], eta, self.kernel
        )
        return mean, std, x0_hat.float()

    def fraction(self, k):
        """u in (0, 1], the fraction of the steps that is left before step k: 1 at the start."""
        steps = len(self.times) - 1
        return (steps - k) / steps  # not 1 - k / steps, which may round to just above tau1


@dataclass
class Trajectory:
    """B rollouts of T steps, with all that the update needs to take the same steps again."""

    latents: torch.Tensor  # [T + 1, B, ...] float32, x at every time; [-1] is the finished one
    x0_hats: torch.Tensor  # [T, B, ...] float32, the clean picture predicted at each step
    log_probs: torch.Tensor  # [W, B] float32, nats, of the stochastic steps
    condition: Callable  # (rows, u) -> the prompt that these rows saw

    def at(self, k, rows):
        """x before the steps k [n] of the rollouts rows [n] -> [n, ...], on the device of rows."""
        kept_on = self.latents.device
        return self.latents[k.to(kept_on), rows.to(kept_on)].to(rows.device)


@torch.no_grad()
def rollout(model, policy, condition, x_T, noise, null_prompt=None, batch=256, keep_on=None):
    """Rolls the policy out from x_T [B, ...] -> Trajectory.

    condition(rows, u): the prompt of the rollouts `rows`, a tuple of embeddings [len(rows), ...],
        when the fraction u [len(rows)] of the steps is left; prompt noise enters here.
    noise: [B, W, ...], noise[:, w] is the z of the w-th stochastic step.
    batch: rollouts in one forward. keep_on: the device on which the trajectory waits for the update
        (None: where it was made). Both are for memory only.
    """
    parts = []
    for rows in torch.arange(len(x_T), device=x_T.device).split(batch):
        part = roll_part(model, policy, condition, x_T[rows], noise[rows], rows, null_prompt)
        latents, x0_hats, log_probs = part
        parts.append((latents.to(keep_on), x0_hats.to(keep_on), log_probs))
    latents, x0_hats, log_probs = zip(*parts)
    return Trajectory(
        torch.cat(latents, 1), torch.cat(x0_hats, 1), torch.cat(log_probs, 1), condition
    )


def roll_part(model, policy, condition, x_T, noise, rows, null_prompt):
    """Some of the rollouts -> latents [T + 1, b, ...], x0_hats [T, b, ...], log_probs [W, b]."""
    latents = [x_T.float()]
    x0_hats = []
    log_probs = []
    for k in range(len(policy.times) - 1):
        steps = torch.full_like(rows, k)
        prompt = condition(rows, policy.fraction(steps))
        mean, std, x0_hat = policy.step(model, latents[-1], steps, prompt, null_prompt)
        x_s = mean
        if k in policy.window:
            x_s = mean + std * noise[:, k - policy.window.start]
            log_probs.append(log_prob(x_s, mean, std))
        latents.append(x_s)
        x0_hats.append(x0_hat)
    no_log_probs = x_T.new_empty(0, len(rows))
    return (
        torch.stack(latents),
        torch.stack(x0_hats),
        torch.stack(log_probs) if log_probs else no_log_probs,
    )


def sample(model, path, times, prompt, x_T, guidance=1.0, null_prompt=None):
    """The deterministic sampler (DDIM; Euler for a flow): x_T [B, ...] -> x_0 [B, ...]."""
    x = x_T.float()
    for t, s in zip(times[:-1].tolist(), times[1:].tolist()):
        t_all = torch.full((len(x),), t, device=x.device)
        x0_hat, eps_hat = predict(model, x, t_all, prompt, guidance, null_prompt)
        x, _ = transition(x, x0_hat, eps_hat, path, t, s, eta=0.0)
    return x


def seeded_noise(key, samples, shape):
    """Standard normal numbers [len(samples), *shape] on the CPU.

    Each row is a function of (key, its sample's number) alone, so no size of a batch and no number
    of processes changes a picture. key: a tuple of integers >= 0 (a purpose, a seed, a step, ...).
    """
    rows = []
    for sample in samples:
        sequence = np.random.SeedSequence([*key, int(sample)])
        state = sequence.generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> 1))
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)


# --------------------------------------------------------------------------------------------------
# DRIFT (i): which rollouts of a group are trained on.


def concentrated_subset(rewards, keep, rule="window"):
    """Which `keep` of each group's N rollouts to train on: rewards [P, N] -> index [P, keep].

    window  the subset of least variance
    band    those within one standard deviation of the group's mean, then the nearest to these
    spread  the subset of largest variance (PODS, arXiv 2504.13818; Pro-GRPO): the opposite
    all     everything (keep = N)

    The index is ascending. DRIFT's abstract fixes neither rule nor size: these are our readings.
    Raises ValueError for another rule, or a size that is not possible.

    >>> rewards = torch.tensor([[0.1, 0.9, 0.5, 0.4, 0.6]])
    >>> concentrated_subset(rewards, 3, "window")
    tensor([[2, 3, 4]])
    >>> concentrated_subset(rewards, 3, "spread")
    tensor([[0, 1, 4]])
    """
    P, N = rewards.shape
    if not 1 <= keep <= N or (rule == "all" and keep != N):
        raise ValueError(f"cannot keep {keep} of {N} rollouts with the rule {rule!r}")
    rewards = rewards.double()
    if rule == "all":
        return torch.arange(N, device=rewards.device).expand(P, N)
    if rule == "window":
        index = least_variance(rewards, keep)
    elif rule == "spread":
        index = largest_variance(rewards, keep)
    elif rule == "band":
        index = nearest_to_band(rewards, keep)
    else:
        raise ValueError(f"rule {rule!r} is none of window, band, spread, all")
    return index.sort(1).values


def least_variance(rewards, keep):
    """The subset of least variance is a window of the sorted rewards: all N - keep + 1 are tried.

    (If it had a gap, moving a member into the gap would bring it nearer to the mean.)
    """
    ordered = rewards.sort(dim=1, stable=True)
    windows = ordered.values.unfold(1, keep, 1)  # [P, N - keep + 1, keep]
    first = windows.var(2, correction=0).argmin(1)  # [P]
    ranks = first[:, None] + torch.arange(keep, device=rewards.device)
    return ordered.indices.gather(1, ranks)


def largest_variance(rewards, keep):
    """The subset of largest variance is the lowest i and the highest keep - i, for some i."""
    N = rewards.shape[1]
    ordered = rewards.sort(dim=1, stable=True)
    places = torch.arange(keep, device=rewards.device)
    ranks = [places + (places >= i) * (N - keep) for i in range(keep + 1)]
    ranks = torch.stack(ranks)  # [keep + 1, keep]
    best = ordered.values[:, ranks].var(2, correction=0).argmax(1)  # [P]
    return ordered.indices.gather(1, ranks[best])


def nearest_to_band(rewards, keep):
    """Those within one standard deviation of the mean, in their order, then the nearest to them."""
    from_mean = (rewards - rewards.mean(1, keepdim=True)).abs()
    from_band = (from_mean - rewards.std(1, keepdim=True)).clamp(min=0)
    return from_band.sort(dim=1, stable=True).indices[:, :keep]
