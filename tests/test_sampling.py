"""The kernel against published samplers and exact scores; log-probs, their replay; the subset."""

import math
from itertools import combinations

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from sampling import (
    EDM,
    FLOW,
    VP,
    Flow,
    Karras,
    Policy,
    Trajectory,
    concentrated_subset,
    log_prob,
    predict,
    rollout,
    sample,
    seeded_noise,
    transition,
)

# Those of Stable Diffusion.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ROOTS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
ABAR = (1 - ROOTS**2).cumprod(0)
PATHS = {"flow": FLOW, "flow shift 3": Flow(3.0), "vp": VP(ABAR), "edm": EDM}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predictions(x, v, t):
    """A flow's (x0_hat, eps_hat) of the velocity v = eps - x_0."""
    ones = [1] * (x.dim() - 1)
    t = torch.as_tensor(t).reshape(-1, *ones).to(x.dtype)
    return x - t * v, x + (1 - t) * v


# --------------------------------------------------------------------------------------------------
# Published samplers.


@pytest.mark.parametrize(
    "eta, to_one, offset, steps",
    [(0.0, True, 1, 50), (0.5, False, 1, 8), (1.0, False, 0, 50), (1.0, True, 1, 8)],
)
def test_ancestral_is_diffusers_ddim(eta, to_one, offset, steps):
    scheduler = diffusers.DDIMScheduler(
        **BETAS,
        clip_sample=False,
        set_alpha_to_one=to_one,
        steps_offset=offset,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    abar = scheduler.alphas_cumprod
    path = VP(abar, final=1.0 if to_one else abar[0], offset=offset)
    times = path.times(steps)
    assert times[:-1].tolist() == scheduler.timesteps.tolist()
    x = randn(2, 3, 4, 4)
    for k, t in enumerate(scheduler.timesteps):
        eps = torch.tanh(x) + 0.1 * randn(2, 3, 4, 4, seed=k)
        z = randn(2, 3, 4, 4, seed=100 + k)
        expected = scheduler.step(eps, t, x, eta=eta, variance_noise=z).prev_sample
        x0_hat = (x - path.sigma(times[k]) * eps) / path.alpha(times[k])
        mean, std = transition(x, x0_hat, eps, path, times[k], times[k + 1], eta)
        torch.testing.assert_close(mean + std * z, expected, atol=1e-5, rtol=1e-5)
        x = expected


@pytest.mark.parametrize("t", [999, 500, 1, 0])
def test_ancestral_at_eta_1_is_diffusers_ddpm(t):
    scheduler = diffusers.DDPMScheduler(**BETAS, clip_sample=False, variance_type="fixed_small")
    scheduler.set_timesteps(1000)
    # Its float32 loses 4 digits of 1 - abar at the end.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    path = VP(scheduler.alphas_cumprod, offset=0)
    times = path.times(1000)
    k = 999 - t
    assert times[k] == t
    x = randn(2, 3, 4, 4).double()
    eps = randn(2, 3, 4, 4, seed=1).double()
    x0_hat = (x - path.sigma(times[k]) * eps) / path.alpha(times[k])
    mean, std = transition(x, x0_hat, eps, path, times[k], times[k + 1], 1.0)

    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(5)).prev_sample
    torch.testing.assert_close((mean + std * z).double(), expected, atol=2e-6, rtol=1e-5)
    if t:
        variance = scheduler._get_variance(t).expand(2)
        torch.testing.assert_close(std.flatten().double() ** 2, variance, rtol=1e-5, atol=0)
    else:
        assert (std == 0).all()  # the last step has no noise


@pytest.mark.parametrize("shift, has_own_times", [(1.0, True), (3.0, True), (3.0, False)])
def test_sample_is_diffusers_flow_euler(shift, has_own_times):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    if has_own_times:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8).tolist())
        times = Flow(shift).times(8)
        torch.testing.assert_close(times, scheduler.sigmas.double(), atol=1e-6, rtol=0)
    else:
        scheduler.set_timesteps(8)  # a schedule that stops at sigma_min before 0
        times = scheduler.sigmas.double()

    def velocity(x, t):
        return torch.tanh(2 * x) - t.reshape(-1, 1, 1, 1) * x

    def model(x, t, prompt):
        return predictions(x, velocity(x, t), t)

    x_T = randn(3, 2, 4, 4)
    x = x_T
    for t in scheduler.timesteps:
        v = velocity(x, torch.full((3,), t.item() / 1000))
        x = scheduler.step(v, t, x).prev_sample
    ours = sample(model, Flow(shift), times, (), x_T)
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


def test_karras_is_diffusers_edm_euler():
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(12)
    times = EDM.times(12)
    torch.testing.assert_close(times, scheduler.sigmas.double(), rtol=1e-5, atol=0)
    x = 80 * randn(2, 3, 4, 4)
    for k, t in enumerate(scheduler.timesteps):
        sigma = times[k].item()
        output = torch.tanh(x) + randn(2, 3, 4, 4, seed=k)
        x0_hat = scheduler.precondition_outputs(x, output, sigma)
        scheduler.scale_model_input(x, t)
        expected = scheduler.step(output, t, x).prev_sample
        eps_hat = (x - x0_hat) / sigma
        mean, _ = transition(x, x0_hat, eps_hat, EDM, times[k], times[k + 1], eta=0.0)
        torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)
        x = expected


@pytest.mark.parametrize(
    "path, first",
    [(FLOW, 1.0), (Flow(3.0), 1.0), (VP(ABAR), 801.0), (EDM, 80.0), (Karras(0.1, 10.0), 10.0)],
)
def test_times_have_their_ends(path, first):
    times = path.times(5)
    assert len(times) == 6 and times.dtype == torch.float64
    assert (times.diff() < 0).all()
    assert times[0].item() == pytest.approx(first, rel=1e-12)
    assert path.sigma(times[-1]) == 0 and path.alpha(times[-1]) == 1


@pytest.mark.parametrize("steps", [1000, 5000])
def test_a_schedule_that_does_not_fit_is_refused(steps):
    with pytest.raises(ValueError, match=f"{steps} steps"):
        VP(torch.linspace(0.999, 0.01, 1000), offset=1).times(steps)


def published_flow_grpo(x, v, t, s, eta, second):
    """Flow-GRPO's step in its own words: v is the velocity, `second` the schedule's second time."""
    dt = s - t
    level = eta * math.sqrt(t / (1 - (second if t == 1 else t)))
    own = 1 + level**2 / (2 * t) * dt
    drift = (1 + level**2 * (1 - t) / (2 * t)) * dt
    return x * own + v * drift, level * math.sqrt(-dt)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_grpo_is_its_published_formula(shift):
    times = Flow(shift).times(10)
    x = randn(2, 3, 4, 4)
    v = randn(2, 3, 4, 4, seed=1)
    for t, s in zip(times.tolist(), times.tolist()[1:]):
        x0_hat, eps_hat = predictions(x, v, t)
        mean, std = transition(x, x0_hat, eps_hat, Flow(shift), t, s, 0.7, "flow-grpo")
        expected_mean, expected_std = published_flow_grpo(x, v, t, s, 0.7, times[1].item())
        torch.testing.assert_close(mean, expected_mean, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(std, torch.full_like(std, expected_std), atol=1e-7, rtol=1e-6)


# Numbers of the published implementations at D = 108. A log-prob depends on the inner products of
# its vectors alone, so each vector is given by its coordinates in the span of (x, prediction, next
# x): 3 numbers, and the other 105 are 0.
# fmt: off
PUBLISHED_FLOW_GRPO = [
    # t, s, x, v, next x, mean, std, log-prob averaged over D; eta 0.7
    (1.0, 0.96012932, [11.133592], [1.5447017, 8.3816932], [7.5150384, 0.28905148, 2.937274],
     [8.3442739, -0.3341838], 0.69999993, -0.65394557),
    (0.8576923, 0.79036826, [11.236364], [1.9835069, 10.577235], [7.9926007, 0.19196212, 3.3907183],
     [9.7677416, -0.88656717], 0.44589713, -0.47943872),
    (0.60215056, 0.46487603, [10.212741], [-1.7041088, 9.9418351],
     [7.3196465, 0.15226693, 3.3505132], [9.6406497, -1.6991271], 0.31907016, -0.68794549),
    (0.27804878, 0.0089285718, [9.4662279], [-1.0405701, 9.464617],
     [6.7984505, 0.27875339, 3.189507], [8.9503428, -3.1711641], 0.22536047, -1.8632843),
]
PUBLISHED_DDPO = [
    # abar_t, abar_s, x, eps, next x, log-prob averaged over D; eta 1
    (0.0081549985, 0.014004889, [11.133592], [0.33323471, 9.0814498],
     [7.5150384, -0.012553464, 2.9514356], -1.3825961),
    (0.081916653, 0.11632477, [11.236364], [1.7536926, 11.049261],
     [7.9926007, -0.04219371, 3.3958857], -1.1086453),
    (0.34555799, 0.42288131, [10.212741], [1.6909423, 9.3479969],
     [7.3196465, -0.38288478, 3.3320449], -0.79789138),
    (0.95052409, 0.99829602, [9.4662279], [0.23673261, 11.469409],
     [6.7984505, 0.30425013, 3.1871759], -71.620369),
]
# fmt: on
D_PUBLISHED = 108


def vector(numbers):
    """The first coordinates of a vector [1, 108]; the others are 0."""
    rest = [0.0] * (D_PUBLISHED - len(numbers))
    return torch.tensor([numbers + rest], dtype=torch.float64)


@pytest.mark.parametrize("t, s, x, v, following, mean, std, average", PUBLISHED_FLOW_GRPO)
def test_flow_grpo_reproduces_published_numbers(t, s, x, v, following, mean, std, average):
    x = vector(x)
    x0_hat, eps_hat = predictions(x, vector(v), t)
    ours, ours_std = transition(x, x0_hat, eps_hat, FLOW, t, s, 0.7, "flow-grpo")
    torch.testing.assert_close(ours.double(), vector(mean), atol=2e-6, rtol=1e-6)
    assert ours_std.item() == pytest.approx(std, rel=1e-6)
    ours_average = log_prob(vector(following), ours, ours_std).item() / D_PUBLISHED
    assert ours_average == pytest.approx(average, rel=2e-6)


@pytest.mark.parametrize("abar_t, abar_s, x, eps, following, average", PUBLISHED_DDPO)
def test_ancestral_reproduces_published_ddpo_log_probs(abar_t, abar_s, x, eps, following, average):
    path = VP(torch.tensor([abar_s, abar_t], dtype=torch.float64))
    x0_hat = (vector(x) - math.sqrt(1 - abar_t) * vector(eps)) / math.sqrt(abar_t)
    mean, std = transition(vector(x), x0_hat, vector(eps), path, 1, 0, 1.0)
    ours_average = log_prob(vector(following), mean, std).item() / D_PUBLISHED
    assert ours_average == pytest.approx(average, rel=2e-6)


@pytest.mark.parametrize("t, s, eta", [(0.9, 0.8, 0.7), (0.5, 0.3, 1.3), (0.2, 0.15, 0.3)])
def test_flow_grpo_is_the_sde_of_sit_and_dancegrpo(t, s, eta):
    """SiT counts time from noise to data; DanceGRPO writes the same step with the score."""
    x = randn(2, 3, 4, 4).double()
    v = randn(2, 3, 4, 4, seed=1).double()
    level = eta * math.sqrt(t / (1 - t))
    mean, std = transition(x, *predictions(x, v, t), FLOW, t, s, eta, "flow-grpo")

    time, velocity, dt, w = 1 - t, -v, t - s, level**2 / 2
    score = (time * velocity - x) / (1 - time)
    sit_mean = x + (velocity + w * score) * dt
    torch.testing.assert_close(mean.double(), sit_mean, atol=1e-6, rtol=1e-6)
    assert std[0].item() == pytest.approx(math.sqrt(2 * w * dt), rel=1e-6)

    score = -(x - (1 - t) * (x - t * v)) / t**2
    dance_mean = x + (s - t) * (v - 0.5 * level**2 * score)
    torch.testing.assert_close(mean.double(), dance_mean, atol=1e-6, rtol=1e-6)
    assert std[1].item() == pytest.approx(level * math.sqrt(dt), rel=1e-6)


@pytest.mark.parametrize(
    "t, s, eta", [(1.0, 0.9, 0.8), (0.5, 0.3, 0.5), (0.2, 0.0, 0.8), (0.6, 0.4, 1.0)]
)
def test_cps_formula(t, s, eta):
    x = randn(2, 3, 4, 4)
    x0_hat, eps_hat = predictions(x, randn(2, 3, 4, 4, seed=1), t)
    mean, std = transition(x, x0_hat, eps_hat, FLOW, t, s, eta, "cps")
    tau = s * math.sin(eta * math.pi / 2)
    expected = (1 - s) * x0_hat + math.sqrt(s**2 - tau**2) * eps_hat
    torch.testing.assert_close(mean, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(std, torch.full((2, 1, 1, 1), tau), atol=1e-7, rtol=1e-6)


# --------------------------------------------------------------------------------------------------
# Exact scores.

WEIGHT = torch.tensor([0.3, 0.7], dtype=torch.float64)
CENTRE = torch.tensor([-1.2, 0.8], dtype=torch.float64)
WIDTH = torch.tensor([0.25, 0.4], dtype=torch.float64)


def mixture(n, generator):
    """n numbers of a mixture of two Gaussians."""
    component = (torch.rand(n, generator=generator) > WEIGHT[0]).long()
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    return CENTRE[component] + WIDTH[component] * noise


def mixture_posterior(x, alpha, sigma):
    """E[x_0 | x_t] and E[eps | x_t] of the mixture, exactly: x [n, 1]."""
    x = x.double()
    variance = alpha**2 * WIDTH**2 + sigma**2
    from_centre = x - alpha * CENTRE
    log_weight = WEIGHT.log() - variance.log() / 2 - from_centre**2 / (2 * variance)
    expected = CENTRE + alpha * WIDTH**2 / variance * from_centre
    x0_hat = (log_weight.softmax(1) * expected).sum(1, keepdim=True)
    return x0_hat, (x - alpha * x0_hat) / sigma


@pytest.mark.parametrize(
    "name, kernel, eta",
    [
        ("flow", "ancestral", 0.0),
        ("flow", "flow-grpo", 0.7),
        ("flow shift 3", "ancestral", 0.5),
        ("vp", "ancestral", 1.0),
        ("edm", "ancestral", 0.5),
        ("edm", "cps", 0.2),
    ],
)
def test_exact_scores_carry_noise_to_the_mixture(name, kernel, eta):
    """In many steps. cps at a small eta only: its bias falls with eta, not with the steps."""
    path = PATHS[name]
    generator = torch.Generator().manual_seed(0)
    n = 10000
    data = mixture(n, generator)
    times = path.times(200)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    x = path.alpha(times[0]) * data + path.sigma(times[0]) * noise
    x = x[:, None].float()
    for t, s in zip(times, times[1:]):
        x0_hat, eps_hat = mixture_posterior(x, path.alpha(t), path.sigma(t))
        mean, std = transition(x, x0_hat, eps_hat, path, t, s, eta, kernel)
        x = mean + std * torch.randn(x.shape, generator=generator)

    x = x[:, 0].double()
    exact = mixture(40 * n, generator)
    low_share = (exact < -0.3).double().mean().item()
    assert x.mean().item() == pytest.approx(exact.mean().item(), abs=0.03)
    assert x.std().item() == pytest.approx(exact.std().item(), rel=0.025)
    assert (x < -0.3).double().mean().item() == pytest.approx(low_share, abs=0.016)
    levels = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert (x.quantile(levels) - exact.quantile(levels)).abs().mean() < 0.035


@pytest.mark.parametrize(
    "name, kernel, eta",
    [
        ("flow", "cps", 0.8),
        ("flow shift 3", "ancestral", 0.0),
        ("vp", "ancestral", 0.6),
        ("edm", "ancestral", 1.0),
        ("vp", "cps", 0.8),
        ("edm", "cps", 0.3),
    ],
)
def test_the_noise_level_is_kept_at_any_number_of_steps(name, kernel, eta):
    """Where the picture is known, x_s = alpha_s x_0 + N(0, sigma_s^2) holds after every step."""
    path = PATHS[name]
    generator = torch.Generator().manual_seed(1)
    n, x0 = 20000, 0.7
    times = path.times(5)
    noise = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x = path.alpha(times[0]) * x0 + path.sigma(times[0]) * noise
    for t, s in zip(times, times[1:]):
        eps_hat = (x.double() - path.alpha(t) * x0) / path.sigma(t)
        mean, std = transition(x, torch.full_like(x, x0), eps_hat, path, t, s, eta, kernel)
        x = mean + std * torch.randn(x.shape, generator=generator)
        centre = (path.alpha(s) * x0).item()
        level = path.sigma(s).item()
        assert x.mean().item() == pytest.approx(centre, abs=0.03 * level + 1e-5)
        assert x.std().item() == pytest.approx(level, rel=0.025, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# The Gaussian of a step.


def test_log_prob_is_the_sum_of_normal_log_densities():
    x = randn(5, 3, 4, 4)
    mean = randn(5, 3, 4, 4, seed=1)
    std = torch.rand(5, 1, 1, 1, generator=torch.Generator().manual_seed(2)) + 0.05
    normal = torch.distributions.Normal(mean.double(), std.double())
    expected = normal.log_prob(x.double()).flatten(1).sum(1)
    assert log_prob(x, mean, std).shape == (5,)
    assert log_prob(x.double(), mean, std).dtype == torch.float32
    torch.testing.assert_close(log_prob(x, mean, std).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "name, kernel",
    [
        ("flow", "flow-grpo"),
        ("flow", "cps"),
        ("vp", "ancestral"),
        ("vp", "cps"),
        ("edm", "ancestral"),
    ],
)
def test_steps_are_finite_at_both_ends(name, kernel):
    path = PATHS[name]
    x, x0_hat, eps_hat = (randn(2, 3, 4, 4, seed=seed) for seed in range(3))
    for steps in (1, 2, 8):
        times = path.times(steps)
        for k in range(steps):
            mean, std = transition(x, x0_hat, eps_hat, path, times[k], times[k + 1], 0.8, kernel)
            assert mean.shape == x.shape and std.shape == (2, 1, 1, 1)
            assert mean.isfinite().all() and std.isfinite().all()
            if k == steps - 1 and kernel != "flow-grpo":
                assert (std == 0).all()
            else:
                assert (std > 0).all()
                assert log_prob(x, mean, std).isfinite().all()


@pytest.mark.parametrize(
    "path, kernel",
    [(FLOW, "ancestral"), (VP(ABAR), "ancestral"), (EDM, "cps"), (FLOW, "flow-grpo")],
)
def test_each_sample_has_its_own_times_and_eta(path, kernel):
    times = path.times(6)
    k = torch.tensor([0, 2, 5])
    eta = torch.tensor([1.0, 0.0, 0.5])
    x, x0_hat, eps_hat = (randn(3, 2, 4, seed=seed) for seed in range(3))
    mean, std = transition(x, x0_hat, eps_hat, path, times[k], times[k + 1], eta, kernel)
    for i in range(3):
        one = slice(i, i + 1)
        t, s = times[k[i]], times[k[i] + 1]
        alone = transition(x[one], x0_hat[one], eps_hat[one], path, t, s, eta[i].item(), kernel)
        torch.testing.assert_close(mean[one], alone[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(std[one], alone[1], atol=1e-6, rtol=1e-6)
    assert std[1] == 0 and std[0] > 0


@pytest.mark.parametrize("path", [VP(ABAR), EDM], ids=["vp", "edm"])
def test_flow_grpo_is_refused_on_another_path(path):
    x = randn(2, 3)
    times = path.times(4)
    with pytest.raises(ValueError, match="flow-grpo"):
        transition(x, x, x, path, times[0], times[1], kernel="flow-grpo")


def test_an_unknown_kernel_is_refused():
    x = randn(2, 3)
    with pytest.raises(ValueError, match="'euler' is none of ancestral, cps, flow-grpo"):
        transition(x, x, x, FLOW, 0.5, 0.4, kernel="euler")


# --------------------------------------------------------------------------------------------------
# Rollouts.


class Tiny(nn.Module):
    """A flow's network of 2 x 6 x 6 numbers; a prompt is two embeddings, [B, 5, 4] and [B, 4]."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(2, 8, 3, padding=1)
            self.last = nn.Conv2d(8, 2, 3, padding=1)
            self.time = nn.Linear(1, 8)
            self.tokens = nn.Linear(20, 8)
            self.pooled = nn.Linear(4, 8)

    def forward(self, x, t, prompt):
        tokens, pooled = prompt
        told = self.time(t[:, None]) + self.tokens(tokens.flatten(1)) + self.pooled(pooled)
        hidden = self.first(x) + told[:, :, None, None]
        return predictions(x, self.last(nn.functional.gelu(hidden)), t)


MODEL = Tiny().requires_grad_(False)
B, D = 7, 72
EVERY_ROW = torch.arange(B)
PROMPT = (randn(B, 5, 4, seed=1), randn(B, 4, seed=2))
NULL = (randn(1, 5, 4, seed=3), randn(1, 4, seed=4))


def noisy_prompt(rows, u):
    """A prompt that changes with the rollout and the step, as DRIFT's does."""
    tokens = PROMPT[0][rows] + u[:, None, None] * randn(B, 5, 4, seed=5)[rows]
    return tokens, PROMPT[1][rows]


def clean_prompt(rows, u):
    return tuple(embedding[rows] for embedding in PROMPT)


def policy(window=range(0, 4), eta=0.8, kernel="cps", guidance=1.0, steps=6):
    return Policy(FLOW, FLOW.times(steps), window, eta, kernel, guidance)


def roll(policy, condition=noisy_prompt, batch=256):
    x_T = randn(B, 2, 6, 6, seed=6)
    noise = randn(B, len(policy.window), 2, 6, 6, seed=7)
    return rollout(MODEL, policy, condition, x_T, noise, NULL, batch=batch)


def step_again(policy, trajectory, k, rows):
    """The steps k [n] of the rollouts `rows` [n], taken again -> mean, std."""
    prompt = trajectory.condition(rows, policy.fraction(k))
    mean, std, _ = policy.step(MODEL, trajectory.latents[k, rows], k, prompt, NULL)
    return mean, std


def replay_error(policy, trajectory, k, rows):
    """The largest |log-prob of the replay - log-prob of the rollout| / D over the rows."""
    k = torch.full_like(rows, k) if isinstance(k, int) else k
    mean, std = step_again(policy, trajectory, k, rows)
    again = log_prob(trajectory.latents[k + 1, rows], mean, std)
    difference = again - trajectory.log_probs[k - policy.window.start, rows]
    return difference.abs().max().item() / D


@pytest.mark.parametrize(
    "kernel, eta, window, guidance",
    [
        ("ancestral", 1.0, range(0, 4), 4.5),
        ("cps", 0.8, range(2, 5), 1.0),
        ("cps", 0.8, range(0, 4), 1.0),
        ("flow-grpo", 0.7, range(2, 5), 4.5),
    ],
)
def test_replay_repeats_the_log_probs(kernel, eta, window, guidance):
    p = policy(window, eta, kernel, guidance)
    trajectory = roll(p)
    assert trajectory.latents.shape == (7, B, 2, 6, 6)
    assert trajectory.x0_hats.shape == (6, B, 2, 6, 6)
    assert trajectory.log_probs.shape == (len(window), B)
    for tensor in (trajectory.latents, trajectory.x0_hats, trajectory.log_probs):
        assert tensor.dtype == torch.float32
    for k in window:
        assert replay_error(p, trajectory, k, EVERY_ROW) == 0  # the same batch: exactly
        for rows in EVERY_ROW.split(2):
            assert replay_error(p, trajectory, k, rows) < 1e-6


def test_replay_of_a_batch_of_mixed_steps():
    p = policy(range(1, 5))
    rows = torch.tensor([0, 3, 3, 6, 1, 5, 2, 4, 0])
    k = torch.tensor([1, 1, 4, 2, 3, 3, 4, 1, 2])
    assert replay_error(p, roll(p), k, rows) < 1e-6


def test_replay_shows_latents_stored_in_low_precision():
    p = policy()
    whole = roll(p)
    rounded = whole.latents.bfloat16().float()
    trajectory = Trajectory(rounded, whole.x0_hats, whole.log_probs, whole.condition)
    assert min(replay_error(p, trajectory, k, EVERY_ROW) for k in p.window) > 1e-5


def test_replay_shows_another_prompt_guidance_or_time():
    p = policy(guidance=2.0)
    trajectory = roll(p)
    other_prompt = Trajectory(
        trajectory.latents, trajectory.x0_hats, trajectory.log_probs, clean_prompt
    )
    other_times = Policy(FLOW, Flow(1.1).times(6), p.window, p.eta, p.kernel, p.guidance)
    assert replay_error(p, other_prompt, 1, EVERY_ROW) > 1e-5
    assert replay_error(policy(guidance=1.9), trajectory, 1, EVERY_ROW) > 1e-5
    assert replay_error(other_times, trajectory, 1, EVERY_ROW) > 1e-5


def test_noise_enters_in_the_window_only():
    p = policy(range(1, 3))
    trajectory = roll(p)
    noise = randn(B, 2, 2, 6, 6, seed=7)
    for k in range(6):
        mean, std = step_again(p, trajectory, torch.full((B,), k), EVERY_ROW)
        following = trajectory.latents[k + 1]
        if k in (1, 2):
            assert (std > 0).all()
            assert torch.equal(following, mean + std * noise[:, k - 1])
        else:
            assert (std == 0).all()
            assert torch.equal(following, mean)


def test_the_predicted_pictures_are_kept():
    p = policy()
    trajectory = roll(p)
    for k in range(6):
        steps = torch.full((B,), k)
        prompt = noisy_prompt(EVERY_ROW, p.fraction(steps))
        _, _, x0_hat = p.step(MODEL, trajectory.latents[k], steps, prompt, NULL)
        assert torch.equal(x0_hat, trajectory.x0_hats[k])


@pytest.mark.parametrize("kernel, tolerance", [("ancestral", 0), ("cps", 0), ("flow-grpo", 1e-5)])
def test_sample_is_a_rollout_without_a_window(kernel, tolerance):
    """flow-grpo without noise is Euler's step too, written in another order."""
    trajectory = roll(policy(range(0, 0), kernel=kernel, guidance=3.0), clean_prompt)
    x_T = randn(B, 2, 6, 6, seed=6)
    pictures = sample(MODEL, FLOW, FLOW.times(6), PROMPT, x_T, 3.0, NULL)
    assert trajectory.log_probs.shape == (0, B)
    torch.testing.assert_close(trajectory.latents[-1], pictures, atol=tolerance, rtol=0)


@pytest.mark.parametrize("batch", [1, 3])
def test_rollouts_do_not_depend_on_their_batch(batch):
    p = policy(guidance=2.0)
    whole = roll(p)
    parts = roll(p, batch=batch)
    torch.testing.assert_close(parts.latents, whole.latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts.x0_hats, whole.x0_hats, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts.log_probs, whole.log_probs, atol=1e-4, rtol=1e-5)


def test_rollout_keeps_no_graph_and_the_update_has_one():
    network = Tiny()
    p = policy()
    x_T, noise = randn(B, 2, 6, 6), randn(B, 4, 2, 6, 6)
    trajectory = rollout(network, p, noisy_prompt, x_T, noise, NULL)
    for tensor in (trajectory.latents, trajectory.x0_hats, trajectory.log_probs):
        assert not tensor.requires_grad
    steps = torch.zeros(B, dtype=torch.long)
    prompt = noisy_prompt(EVERY_ROW, p.fraction(steps))
    mean, std, _ = p.step(network, trajectory.latents[0], steps, prompt, NULL)
    log_prob(trajectory.latents[1], mean, std).sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in network.parameters())


@pytest.mark.parametrize("guidance", [0.0, 0.5, 4.5])
def test_guidance_is_two_forwards(guidance):
    x = randn(B, 2, 6, 6)
    t = torch.linspace(0.1, 0.9, B)
    with_prompt = MODEL(x, t, PROMPT)
    without_prompt = MODEL(x, t, (NULL[0].repeat(B, 1, 1), NULL[1].repeat(B, 1)))
    guided = predict(MODEL, x, t, PROMPT, guidance, NULL)
    for ours, prompted, plain in zip(guided, with_prompt, without_prompt):
        expected = guidance * prompted + (1 - guidance) * plain
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_guidance_1_is_the_model_itself():
    x = randn(B, 2, 6, 6)
    t = torch.linspace(0.1, 0.9, B)
    for ours, plain in zip(predict(MODEL, x, t, PROMPT), MODEL(x, t, PROMPT)):
        assert torch.equal(ours, plain)


def test_fraction_counts_the_steps_that_are_left():
    expected = torch.tensor([8, 7, 6, 5, 4, 3, 2, 1]) / 8
    torch.testing.assert_close(policy(steps=8).fraction(torch.arange(8)), expected)


def test_the_fraction_is_never_rounded_up():
    """One step above tau1 would no longer be the clean prompt."""
    for steps in range(1, 65):
        p = policy(steps=steps, window=range(0, 1))
        for k in range(steps):
            nearest = torch.tensor((steps - k) / steps, dtype=torch.float32).item()
            assert p.fraction(torch.tensor([k])).item() <= nearest


def test_seeded_noise_is_a_function_of_key_and_sample():
    rows = seeded_noise((0, 5, 2), [3, 7, 11, 7], (2, 4))
    assert rows.shape == (4, 2, 4)
    assert torch.equal(rows[1], rows[3])
    for i, number in enumerate((3, 7, 11)):
        alone = seeded_noise((0, 5, 2), torch.tensor([number]), (2, 4))
        assert torch.equal(alone[0], rows[i])


def test_seeded_noise_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    seeded_noise((0, 5, 2), [3], (2, 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_seeded_noise_is_normal_and_its_streams_are_apart():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0, 0), (1, 0, 0, 1), (2, 0), (2, 1)]
    noise = torch.cat([seeded_noise(key, range(20), (500,)) for key in keys]).double()
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs((noise**4).mean() - 3) < 0.2
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 0.25  # 5.6 standard errors; a repeated row would give 1


# --------------------------------------------------------------------------------------------------
# The subset.


def variances_of(rewards, subsets):
    """rewards [P, N], subsets [P, S, K] -> [P, S], centred first and then squared."""
    values = rewards.double().gather(1, subsets.flatten(1)).reshape(subsets.shape)
    return (values - values.mean(2, keepdim=True)).square().mean(2)


def draws(kind, shape, seed=0):
    """Rewards of several kinds."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "cauchy":
        return normal / torch.randn(shape, generator=generator)
    if kind == "ties":
        return torch.randint(0, 3, shape, generator=generator).float()
    if kind == "offset":
        return 1e6 + normal.double() * 1e-2
    return normal


@pytest.mark.parametrize("kind", ["normal", "cauchy", "ties", "offset"])
@pytest.mark.parametrize("rule", ["window", "spread"])
def test_window_and_spread_are_the_extreme_variances(kind, rule):
    """By trying every subset."""
    for N, keep in ((2, 1), (5, 3), (8, 2), (8, 5), (8, 8)):
        rewards = draws(kind, (300, N), seed=10 * N + keep)
        subsets = torch.tensor(list(combinations(range(N), keep))).expand(300, -1, keep)
        all_variances = variances_of(rewards, subsets)
        best = all_variances.min(1) if rule == "window" else all_variances.max(1)
        ours = concentrated_subset(rewards, keep, rule)
        variance = variances_of(rewards, ours[:, None])[:, 0]
        torch.testing.assert_close(variance, best.values, rtol=1e-6, atol=1e-18)


@pytest.mark.parametrize("keep", [1, 4, 8])
def test_band_by_its_definition(keep):
    rewards = draws("normal", (100, 9))
    ours = concentrated_subset(rewards, keep, "band").tolist()
    for index, row in zip(ours, rewards.double().numpy()):
        outside = np.maximum(0, np.abs(row - row.mean()) - row.std(ddof=1))
        inside = [i for i in range(9) if outside[i] == 0]
        others = [i for i in range(9) if outside[i] > 0]
        others.sort(key=lambda i: outside[i])
        assert index == sorted((inside + others)[:keep])


@pytest.mark.parametrize("rule", ["window", "band", "spread"])
def test_a_subset_is_ascending_and_does_not_depend_on_shift_and_scale(rule):
    rewards = draws("normal", (200, 8)).double()
    index = concentrated_subset(rewards, 5, rule)
    assert index.shape == (200, 5) and index.dtype == torch.long
    assert (index.diff(dim=1) > 0).all()
    for changed in (rewards + 1000, 0.01 * rewards, 37 * rewards - 12):
        assert torch.equal(concentrated_subset(changed, 5, rule), index)


def test_all_keeps_everything():
    index = concentrated_subset(draws("normal", (50, 7)), 7, "all")
    assert torch.equal(index, torch.arange(7).expand(50, 7))


def test_window_drops_the_outlier_and_spread_keeps_it():
    rewards = torch.tensor([[0.1, 9.0, 0.2, 0.0], [-5.0, 1.0, 1.1, 1.2]])
    assert concentrated_subset(rewards, 3).tolist() == [[0, 2, 3], [1, 2, 3]]
    assert concentrated_subset(rewards, 2, "spread").tolist() == [[1, 3], [0, 3]]


def test_window_is_exact_beside_a_huge_outlier():
    rewards = torch.tensor([[0, 1, 1.1, 1.2, 5, 1e9]], dtype=torch.float64)
    assert concentrated_subset(rewards, 3).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("keep, rule", [(0, "window"), (5, "band"), (3, "all"), (2, "best")])
def test_a_bad_size_or_rule_is_refused(keep, rule):
    with pytest.raises(ValueError, match=rule):
        concentrated_subset(torch.zeros(2, 4), keep, rule)
