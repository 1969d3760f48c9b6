"""Sampling: Gaussian paths, the one transition kernel, rollouts with log-probs, and the choice of a subset of them.

Every base model follows a path  x_t = alpha(t) x_0 + sigma(t) eps  and predicts (x0_hat, eps_hat). One step from t to s < t:
    mean = alpha_s x0_hat + sqrt(sigma_s^2 - tau^2) eps_hat,    x_s = mean + tau z,    z ~ N(0, I)
tau = 0 is the deterministic sampler (DDIM, arXiv 2010.02502 eq. 12; Euler for a flow); the rules for tau > 0 are in `transition`.
The policy of RL is this Gaussian: state (x_t, t, prompt), action x_s. DRIFT (arXiv 2601.12401) part (i) is `concentrated_subset`.
Left out on purpose: higher-order solvers (a rollout has few steps, and a log-prob needs one Gaussian a step).
"""
import functools
import math
import numpy as np
import torch
from dataclasses import dataclass
from typing import Callable
from typing import NamedTuple

class Path(NamedTuple):
    """A Gaussian path x_t = alpha(t) x_0 + sigma(t) eps and the times at which to sample it."""
    alpha: Callable
    sigma: Callable
    times: Callable


def Flow(shift=1.0):
    """Rectified flow: alpha = 1 - t, sigma = t; `shift` > 1 spends more steps at high noise (Stable Diffusion 3, arXiv 2403.03206)."""
    def times(steps):
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return shift * t / (1 + (shift - 1) * t)
    return Path(lambda t: 1 - t, lambda t: t, times)


def VP(alphas_cumprod, final=1.0, offset=1):
    """Variance preserving, discrete: alpha^2 = abar[t], t = 999..0; the time -1 stands after the last and has abar = `final`.

    `final` is 1 or abar[0] (the scheduler's set_alpha_to_one), `offset` its steps_offset (1 for Stable Diffusion 1.x and 2.x).
    """
    table = torch.cat([torch.as_tensor(alphas_cumprod).double().cpu(), torch.tensor([float(final)], dtype=torch.float64)])
    table_on = functools.cache(table.to)                                 # copied once, for a GPU must stop for each copy
    def abar(t):
        t = torch.as_tensor(t)
        return table_on(t.device)[t.double().round().long()]             # index -1 is `final`
    def times(steps):
        spacing = (len(table) - 1) // steps
        if spacing * (steps - 1) + offset > len(table) - 2 or spacing == 0:
            raise ValueError(f"{steps} steps do not fit a schedule of {len(table) - 1} that starts at {offset}")
        t = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * spacing + offset
        return torch.cat([t, torch.tensor([-1.0], dtype=torch.float64)])
    return Path(lambda t: abar(t).sqrt(), lambda t: (1 - abar(t)).sqrt(), times)


def Karras(sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM (arXiv 2206.00364, eq. 5): alpha = 1, sigma = t, times evenly spaced in sigma^(1/rho), then 0."""
    def times(steps):
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        t = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
        return torch.cat([t, torch.zeros(1, dtype=torch.float64)])
    return Path(lambda t: t * 0 + 1, lambda t: t, times)
FLOW, EDM = Flow(), Karras()


def transition(x_t, x0_hat, eps_hat, path, t, s, eta=1.0, kernel="ancestral"):
    """The Gaussian of one step from time t to time s < t; all tensors [B, ...], t, s and eta numbers or [B].

    kernel       tau                                                                   published as
    ancestral    eta sigma_s sqrt(1 - (alpha_t sigma_s / (alpha_s sigma_t))^2)         DDIM eq. 16; eta = 1: DDPM
    cps          sigma_s sin(eta pi / 2)                                               Flow-GRPO's later, coefficients-preserving step
    flow-grpo    eta sqrt(t / (1 - t)) sqrt(t - s), with its own Euler-Maruyama mean   Flow-GRPO, arXiv 2505.05470 eq. 9 (flows only)

    Returns mean [B, ...] and std [B, 1, ...]. At sigma_s = 0 the first two end noise-free: std = 0. The coefficients are computed
    in float64 and the step in float32. Raises ValueError for another kernel, or for flow-grpo on a path that is not a flow.

    >>> x_t, x0_hat, eps_hat = torch.tensor([[0.7]]), torch.tensor([[0.4]]), torch.tensor([[1.0]])
    >>> [round(transition(x_t, x0_hat, eps_hat, FLOW, 0.5, 0.25, eta, "cps")[1].item(), 3) for eta in (0, 0.5, 1)]    # from DDIM to all fresh noise
    [0.0, 0.177, 0.25]
    """
    x_t, x0_hat, eps_hat = x_t.float(), x0_hat.float(), eps_hat.float()
    t, s, eta = (torch.as_tensor(v, dtype=torch.float64, device=x_t.device) for v in (t, s, eta))
    alpha_t, sigma_t, alpha_s, sigma_s = path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s)
    column = lambda c: c.expand(len(x_t)).reshape(-1, *[1] * (x_t.dim() - 1)).float()         # [B, 1, ...]
    if kernel == "flow-grpo":
        if abs(float(path.alpha(0.5) + path.sigma(0.5)) - 1) > 1e-6:
            raise ValueError("kernel flow-grpo is defined for flows (alpha + sigma = 1) only; take ancestral or cps")
        dt = s - t
        level = eta * torch.sqrt(t / (1 - torch.where(t == 1, s, t)))    # at t = 1 the published code puts the second time below the line
        mean = column(1 + level**2 / (2 * t) * dt) * x_t + column((1 + level**2 * (1 - t) / (2 * t)) * dt) * (eps_hat - x0_hat)
        return mean, column(level * torch.sqrt(-dt))
    if kernel == "ancestral":
        tau = eta * sigma_s * torch.sqrt((1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2).clamp(min=0))
    elif kernel == "cps":
        tau = sigma_s * torch.sin(eta * math.pi / 2)
    else:
        raise ValueError(f"kernel {kernel!r} is none of ancestral, cps, flow-grpo")
    return column(alpha_s) * x0_hat + column((sigma_s**2 - tau**2).clamp(min=0).sqrt()) * eps_hat, column(tau)


def log_prob(x, mean, std):
    """log N(x; mean, std^2 I) in nats, summed over all dimensions but the first, in float32 -> [B]. std must be positive."""
    std = torch.as_tensor(std, device=x.device).float()
    z = (x.float() - mean.float()) / std
    return -(0.5 * z**2 + torch.log(std) + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def predict(model, x_t, t, prompt, guidance=1.0, null=None):
    """model(x_t, t, prompt) -> (x0_hat, eps_hat), with classifier-free guidance when it is not 1; both halves in one forward.

    t [B]; prompt is a tuple of embeddings [B, ...], null of [1, ...]. Guided x0 = x0_null + guidance (x0 - x0_null), eps alike. If the model
    has a network of its own to guide it, `model.guide`, x0_null is what that one says (EDM2, arXiv 2312.02696; autoguidance, 2406.02507).
    """
    if guidance == 1.0:
        return model(x_t, t, prompt)
    if guide := getattr(model, "guide", None):
        halves = [*zip(guide(x_t, t, prompt), model(x_t, t, prompt))]
    else:
        both = tuple(torch.cat([n.expand_as(p), p]) for n, p in zip(null, prompt))
        halves = [out.float().chunk(2) for out in model(x_t.repeat(2, *[1] * (x_t.dim() - 1)), t.repeat(2), both)]
    guided = [without + guidance * (with_prompt - without) for without, with_prompt in halves]
    if channels := getattr(model, "guided_channels", None):              # SiT as published: the others follow the prompt alone
        guided = [torch.cat([g[:, :channels], with_prompt[:, channels:]], 1) for g, (_, with_prompt) in zip(guided, halves)]
    return tuple(guided)


@dataclass
class Policy:
    """How a step is taken: what rollout and update must share for the ratio to be 1."""
    path: Path
    times: torch.Tensor                                                  # [T + 1] float64, noise first
    window: range                                                        # the stochastic steps; the others are deterministic
    eta: float = 1.0
    kernel: str = "ancestral"
    guidance: float = 1.0

    def step(self, model, x_t, k, prompt, null=None):
        """The Gaussian of steps k [B] (integers) from x_t [B, ...] -> mean [B, ...], std [B, 1, ...], x0_hat [B, ...]."""
        times = self.times.to(x_t.device)
        stochastic = ((k >= self.window.start) & (k < self.window.stop)).double()
        x0_hat, eps_hat = predict(model, x_t, times[k].float(), prompt, self.guidance, null)
        mean, std = transition(x_t, x0_hat, eps_hat, self.path, times[k], times[k + 1], self.eta * stochastic, self.kernel)
        return mean, std, x0_hat.float()

    def fraction(self, k):
        """u in (0, 1], the fraction of the steps still to go before step k: 1 at the start."""
        steps = len(self.times) - 1
        return (steps - k) / steps                                       # not 1 - k / steps, which rounds to above tau1 now and then


@dataclass
class Trajectory:
    """B rollouts of T steps, W of them stochastic, with all that the update needs to take the same steps again. float32."""
    latents: torch.Tensor                                                # [T + 1, B, ...] x at every time; [-1] is the picture
    x0_hats: torch.Tensor                                                # [T, B, ...] the clean picture predicted at each step
    log_probs: torch.Tensor                                              # [W, B] nats, of the stochastic steps
    condition: Callable                                                  # (rows, u) -> the prompt that these rows saw

    def at(self, k, rows):
        """x before the steps k [n] of the rollouts rows [n] -> [n, ...], on the device of `rows`, wherever the latents wait."""
        place = self.latents.device
        return self.latents[k.to(place), rows.to(place)].to(rows.device)


@torch.no_grad()
def rollout(model, policy, condition, x_T, noise, null=None, batch=256, keep=None):
    """Rolls the policy out from x_T [B, ...] with the step noise z = noise[:, w] of its w-th stochastic step -> Trajectory.

    condition(rows, u) gives the prompt of the rollouts `rows` (a tuple of embeddings [len(rows), ...]) when the fraction u [len(rows)]
    of the steps is still to go: the place where prompt noise enters. noise is [B, W, ...]; `batch` rollouts go through one forward. The
    latents wait for the update on the device `keep` (None: where they were made).
    """
    parts = []
    for rows in torch.arange(len(x_T), device=x_T.device).split(batch):
        latents, x0_hats, log_probs = [x_T[rows].float()], [], []
        for k in range(len(policy.times) - 1):
            at = torch.full_like(rows, k)
            mean, std, x0_hat = policy.step(model, latents[-1], at, condition(rows, policy.fraction(at)), null)
            x = mean
            if k in policy.window:
                x = mean + std * noise[rows, k - policy.window.start]
                log_probs.append(log_prob(x, mean, std))
            latents.append(x), x0_hats.append(x0_hat)
        parts.append([torch.stack(latents).to(keep), torch.stack(x0_hats).to(keep), torch.stack(log_probs) if log_probs else x_T.new_empty(0, len(rows))])
    return Trajectory(*(torch.cat(columns, 1) for columns in zip(*parts)), condition)


def sample(model, path, times, prompt, x_T, guidance=1.0, null=None):
    """The deterministic sampler (DDIM; Euler for a flow): x_T [B, ...] -> x_0 [B, ...] along `times`, at a fixed prompt."""
    x = x_T.float()
    for t, s in zip(times[:-1].tolist(), times[1:].tolist()):
        x0_hat, eps_hat = predict(model, x, torch.full((len(x),), t, device=x.device), prompt, guidance, null)
        x, _ = transition(x, x0_hat, eps_hat, path, t, s, eta=0.0)
    return x


def seeded_noise(key, samples, shape):
    """Standard normal numbers [len(samples), *shape] on the CPU, each row a function of (key, its sample's number) alone.

    key is a tuple of non-negative integers (a seed, a purpose, a step, ...), so no batch and no process count changes a picture.
    """
    def row(i):
        state = np.random.SeedSequence([*key, int(i)]).generate_state(1, np.uint64)[0]
        return torch.randn(shape, generator=torch.Generator().manual_seed(int(state >> 1)))
    return torch.stack([row(i) for i in samples])


def concentrated_subset(rewards, keep, rule="window", band=1.0):
    """Which `keep` of each group's N rollouts to train on: rewards [P, N] -> index [P, keep], ascending.

    window   the keep-subset of least variance. It is always a contiguous window of the sorted rewards (moving a member into a gap
             of the window brings it nearer the mean), so one look at the N - keep + 1 windows finds it exactly
    median   the nearest to the group's median
    band     those within `band` standard deviations of the mean, in their order, then the nearest to that band
    trim     all but the highest: only outliers at the top, those that pull a policy to one mode, are dropped
    all      everything (keep = N)
    spread   the keep-subset of largest variance (PODS, arXiv 2504.13818; Pro-GRPO): the opposite, to compare with
    The abstract of DRIFT fixes neither rule nor size; these are our readings. Raises ValueError for a bad rule or size.

    >>> rewards = torch.tensor([[0.1, 0.9, 0.5, 0.4, 0.6]])
    >>> {rule: concentrated_subset(rewards, 3, rule)[0].tolist() for rule in ("window", "trim", "spread")}
    {'window': [2, 3, 4], 'trim': [0, 2, 3], 'spread': [0, 1, 4]}
    """
    P, N = rewards.shape
    if not 1 <= keep <= N or (rule == "all" and keep != N):
        raise ValueError(f"cannot keep {keep} of {N} rollouts with the rule {rule!r}")
    r = rewards.double()
    if rule == "all":
        return torch.arange(N, device=r.device).expand(P, N)
    ordered = r.sort(dim=1, stable=True)
    if rule == "window":
        windows = ordered.values.unfold(1, keep, 1)                      # [P, N - keep + 1, keep]
        first = windows.var(2, correction=0).argmin(1)
        return ordered.indices.gather(1, first[:, None] + torch.arange(keep, device=r.device)).sort(1).values
    if rule == "spread":                                                 # the lowest i and the highest keep - i, for every i
        slots = torch.arange(keep, device=r.device)
        ranks = torch.stack([slots + (slots >= i) * (N - keep) for i in range(keep + 1)])   # [keep + 1, keep]
        best = ordered.values[:, ranks].var(2, correction=0).argmax(1)
        return ordered.indices.gather(1, ranks[best]).sort(1).values
    if rule == "median":
        distance = (r - r.quantile(0.5, dim=1, keepdim=True)).abs()
    elif rule == "trim":
        distance = r
    elif rule == "band":
        distance = ((r - r.mean(1, keepdim=True)).abs() - band * r.std(1, keepdim=True)).clamp(min=0)
    else:
        raise ValueError(f"rule {rule!r} is none of window, median, band, trim, all, spread")
    return distance.sort(dim=1, stable=True).indices[:, :keep].sort(1).values
