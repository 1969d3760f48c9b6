"""The kernel against published samplers and exact scores, log-probs and their replay, and the choice of a subset."""
import math
from itertools import combinations

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from sampling import EDM, FLOW, VP, Flow, Karras, Policy, Trajectory
from sampling import concentrated_subset, log_prob, predict, rollout, sample, seeded_noise, transition

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")              # those of Stable Diffusion
ABAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


PATHS = {"flow": FLOW, "flow shift 3": Flow(3.0), "vp": VP(ABAR), "edm": EDM}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predictions(x, v, t):
    """A flow's (x0_hat, eps_hat) of the velocity v = eps - x_0."""
    t = torch.as_tensor(t).reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    return x - t * v, x + (1 - t) * v


# ---------------------------------------------------------------------------------------------------------------------
# Published samplers.

@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("steps", [8, 50])
def test_ancestral_is_diffusers_ddim(eta, to_one, offset, steps):
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=to_one, steps_offset=offset,
                                        timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    abar = scheduler.alphas_cumprod
    path = VP(abar, final=1.0 if to_one else abar[0], offset=offset)
    times = path.times(steps)
    assert times[:-1].tolist() == scheduler.timesteps.tolist()
    x = randn(2, 3, 4, 4)
    for k, t in enumerate(scheduler.timesteps):
        eps, z = torch.tanh(x) + 0.1 * randn(2, 3, 4, 4, seed=k), randn(2, 3, 4, 4, seed=100 + k)
        expected = scheduler.step(eps, t, x, eta=eta, variance_noise=z).prev_sample
        x0_hat = (x - path.sigma(times[k]) * eps) / path.alpha(times[k])
        mean, std = transition(x, x0_hat, eps, path, times[k], times[k + 1], eta)
        torch.testing.assert_close(mean + std * z, expected, atol=1e-5, rtol=1e-5)
        x = expected


@pytest.mark.parametrize("t", [999, 500, 20, 1, 0])
def test_ancestral_at_eta_1_is_diffusers_ddpm(t):
    scheduler = diffusers.DDPMScheduler(**BETAS, clip_sample=False, variance_type="fixed_small")
    scheduler.set_timesteps(1000)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()         # its float32 loses 4 digits of 1 - abar at the end
    path = VP(scheduler.alphas_cumprod, offset=0)
    times = path.times(1000)
    k = 999 - t
    assert times[k] == t
    x, eps = randn(2, 3, 4, 4).double(), randn(2, 3, 4, 4, seed=1).double()
    x0_hat = (x - path.sigma(times[k]) * eps) / path.alpha(times[k])
    mean, std = transition(x, x0_hat, eps, path, times[k], times[k + 1], 1.0)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) if t else 0     # the last step has no noise
    expected = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(5)).prev_sample
    torch.testing.assert_close((mean + std * z).double(), expected, atol=2e-6, rtol=1e-5)
    if t:
        torch.testing.assert_close(std.flatten().double() ** 2, scheduler._get_variance(t).expand(2), rtol=1e-5, atol=0)
    else:
        assert (std == 0).all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("own_times", [True, False])
def test_sample_is_diffusers_flow_euler(shift, own_times):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    if own_times:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8).tolist())
        times = Flow(shift).times(8)
        torch.testing.assert_close(times, scheduler.sigmas.double(), atol=1e-6, rtol=0)
    else:
        scheduler.set_timesteps(8)                                       # a schedule that stops at sigma_min before 0
        times = scheduler.sigmas.double()
    velocity = lambda x, t: torch.tanh(2 * x) - t.reshape(-1, 1, 1, 1) * x
    x_T = randn(3, 2, 4, 4)
    x = x_T
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, torch.full((3,), t.item() / 1000)), t, x).prev_sample
    ours = sample(lambda x, t, _: predictions(x, velocity(x, t), t), Flow(shift), times, (), x_T)
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


def test_karras_is_diffusers_edm_euler():
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(12)
    times = EDM.times(12)
    torch.testing.assert_close(times, scheduler.sigmas.double(), rtol=1e-5, atol=0)
    x = 80 * randn(2, 3, 4, 4)
    for k, t in enumerate(scheduler.timesteps):
        sigma, output = times[k].item(), torch.tanh(x) + randn(2, 3, 4, 4, seed=k)
        x0_hat = scheduler.precondition_outputs(x, output, sigma)
        scheduler.scale_model_input(x, t)
        expected = scheduler.step(output, t, x).prev_sample
        mean, _ = transition(x, x0_hat, (x - x0_hat) / sigma, EDM, times[k], times[k + 1], eta=0.0)
        torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)
        x = expected


def test_times_have_their_ends():
    for path, first in ((FLOW, 1.0), (Flow(3.0), 1.0), (VP(ABAR), 801.0), (EDM, 80.0), (Karras(0.1, 10.0), 10.0)):
        times = path.times(5)
        assert len(times) == 6 and times.dtype == torch.float64 and (times.diff() < 0).all()
        assert times[0].item() == pytest.approx(first, rel=1e-12) and path.sigma(times[-1]) == 0 and path.alpha(times[-1]) == 1


def naive_flow_grpo(x, v, t, s, eta, second):
    """Flow-GRPO's published step in its own words: v is the velocity, `second` the schedule's second time."""
    dt = s - t
    level = eta * math.sqrt(t / (1 - (second if t == 1 else t)))
    return x * (1 + level**2 / (2 * t) * dt) + v * (1 + level**2 * (1 - t) / (2 * t)) * dt, level * math.sqrt(-dt)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_grpo_is_its_published_formula(shift):
    times = Flow(shift).times(10)
    x, v = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    for t, s in zip(times.tolist(), times.tolist()[1:]):
        mean, std = transition(x, *predictions(x, v, t), Flow(shift), t, s, 0.7, "flow-grpo")
        expected_mean, expected_std = naive_flow_grpo(x, v, t, s, 0.7, times[1].item())
        torch.testing.assert_close(mean, expected_mean, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(std, torch.full_like(std, expected_std), atol=1e-7, rtol=1e-6)


# Numbers of the published implementations at D = 108. A log-prob depends on the inner products of its vectors alone, so each vector
# is given by its coordinates in the span of (x, prediction, next x): 3 numbers, the other 105 are 0.
PUBLISHED_FLOW_GRPO = [                                                  # t, s, x, v, next x, mean, std, log-prob averaged over D; eta 0.7
    (1.0, 0.96012932, [11.133592], [1.5447017, 8.3816932], [7.5150384, 0.28905148, 2.937274],
     [8.3442739, -0.3341838], 0.69999993, -0.65394557),
    (0.8576923, 0.79036826, [11.236364], [1.9835069, 10.577235], [7.9926007, 0.19196212, 3.3907183],
     [9.7677416, -0.88656717], 0.44589713, -0.47943872),
    (0.60215056, 0.46487603, [10.212741], [-1.7041088, 9.9418351], [7.3196465, 0.15226693, 3.3505132],
     [9.6406497, -1.6991271], 0.31907016, -0.68794549),
    (0.27804878, 0.0089285718, [9.4662279], [-1.0405701, 9.464617], [6.7984505, 0.27875339, 3.189507],
     [8.9503428, -3.1711641], 0.22536047, -1.8632843),
]
PUBLISHED_DDPO = [                                                       # abar_t, abar_s, x, eps, next x, log-prob averaged over D; eta 1
    (0.0081549985, 0.014004889, [11.133592], [0.33323471, 9.0814498], [7.5150384, -0.012553464, 2.9514356], -1.3825961),
    (0.081916653, 0.11632477, [11.236364], [1.7536926, 11.049261], [7.9926007, -0.04219371, 3.3958857], -1.1086453),
    (0.34555799, 0.42288131, [10.212741], [1.6909423, 9.3479969], [7.3196465, -0.38288478, 3.3320449], -0.79789138),
    (0.95052409, 0.99829602, [9.4662279], [0.23673261, 11.469409], [6.7984505, 0.30425013, 3.1871759], -71.620369),
]


def vector(numbers, D=108):
    return torch.tensor([numbers + [0.0] * (D - len(numbers))], dtype=torch.float64)


@pytest.mark.parametrize("t, s, x, v, following, mean, std, average", PUBLISHED_FLOW_GRPO)
def test_flow_grpo_reproduces_published_numbers(t, s, x, v, following, mean, std, average):
    ours, ours_std = transition(vector(x), *predictions(vector(x), vector(v), t), FLOW, t, s, 0.7, "flow-grpo")
    torch.testing.assert_close(ours.double(), vector(mean), atol=2e-6, rtol=1e-6)
    assert ours_std.item() == pytest.approx(std, rel=1e-6)
    assert log_prob(vector(following), ours, ours_std).item() / 108 == pytest.approx(average, rel=2e-6)


@pytest.mark.parametrize("abar_t, abar_s, x, eps, following, average", PUBLISHED_DDPO)
def test_ancestral_reproduces_published_ddpo_log_probs(abar_t, abar_s, x, eps, following, average):
    path = VP(torch.tensor([abar_s, abar_t], dtype=torch.float64))
    x0_hat = (vector(x) - math.sqrt(1 - abar_t) * vector(eps)) / math.sqrt(abar_t)
    mean, std = transition(vector(x), x0_hat, vector(eps), path, 1, 0, 1.0)
    assert log_prob(vector(following), mean, std).item() / 108 == pytest.approx(average, rel=2e-6)


def test_flow_grpo_is_the_sde_of_sit_and_dancegrpo():
    """SiT counts time from noise to data and its velocity the other way; DanceGRPO writes the same step with the score."""
    x, v = randn(2, 3, 4, 4).double(), randn(2, 3, 4, 4, seed=1).double()
    for t, s, eta in ((0.9, 0.8, 0.7), (0.5, 0.3, 1.3), (0.2, 0.15, 0.3)):
        level = eta * math.sqrt(t / (1 - t))
        mean, std = transition(x, *predictions(x, v, t), FLOW, t, s, eta, "flow-grpo")
        time, velocity, dt, w = 1 - t, -v, t - s, level**2 / 2
        score = (time * velocity - x) / (1 - time)
        torch.testing.assert_close(mean.double(), x + (velocity + w * score) * dt, atol=1e-6, rtol=1e-6)
        assert std[0].item() == pytest.approx(math.sqrt(2 * w * dt), rel=1e-6)
        x0, d = x - t * v, s - t
        score = -(x - (1 - t) * x0) / t**2
        torch.testing.assert_close(mean.double(), x + d * v - 0.5 * level**2 * score * d, atol=1e-6, rtol=1e-6)
        assert std[1].item() == pytest.approx(level * math.sqrt(abs(d)), rel=1e-6)


def test_cps_formula():
    x, v = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    for t, s, eta in ((1.0, 0.9, 0.8), (0.5, 0.3, 0.5), (0.2, 0.0, 0.8), (0.6, 0.4, 1.0)):
        x0_hat, eps_hat = predictions(x, v, t)
        mean, std = transition(x, x0_hat, eps_hat, FLOW, t, s, eta, "cps")
        expected = s * math.sin(eta * math.pi / 2)
        torch.testing.assert_close(mean, (1 - s) * x0_hat + math.sqrt(s**2 - expected**2) * eps_hat, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(std, torch.full((2, 1, 1, 1), expected), atol=1e-7, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Exact scores.

WEIGHT, CENTRE, WIDTH = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [-1.2, 0.8], [0.25, 0.4]))


def mixture(n, generator):
    k = (torch.rand(n, generator=generator) > WEIGHT[0]).long()
    return CENTRE[k] + WIDTH[k] * torch.randn(n, generator=generator, dtype=torch.float64)


def mixture_posterior(x, alpha, sigma):
    """E[x_0 | x_t] and E[eps | x_t] of the mixture, exactly: x [n, 1]."""
    x, variance = x.double(), alpha**2 * WIDTH**2 + sigma**2
    weight = (WEIGHT.log() - variance.log() / 2 - (x - alpha * CENTRE) ** 2 / (2 * variance)).softmax(1)
    x0_hat = (weight * (CENTRE + alpha * WIDTH**2 / variance * (x - alpha * CENTRE))).sum(1, keepdim=True)
    return x0_hat, (x - alpha * x0_hat) / sigma


MARGINAL_CASES = [(name, kernel, eta) for name in PATHS for kernel, eta in
                  [("ancestral", 0.0), ("ancestral", 0.5), ("ancestral", 1.0), ("cps", 0.2), ("flow-grpo", 0.7)]
                  if kernel != "flow-grpo" or "flow" in name]


@pytest.mark.parametrize("name, kernel, eta", MARGINAL_CASES)
def test_exact_scores_carry_noise_to_the_mixture(name, kernel, eta):
    """With many steps. cps at a small eta only: its bias falls with eta, not with the number of steps."""
    path = PATHS[name]
    generator, n = torch.Generator().manual_seed(0), 10000
    data, times = mixture(n, generator), path.times(200)
    x = (path.alpha(times[0]) * data + path.sigma(times[0]) * torch.randn(n, generator=generator, dtype=torch.float64))[:, None].float()
    for t, s in zip(times, times[1:]):
        mean, std = transition(x, *mixture_posterior(x, path.alpha(t), path.sigma(t)), path, t, s, eta, kernel)
        x = mean + std * torch.randn(x.shape, generator=generator)
    x, exact = x[:, 0].double(), mixture(40 * n, generator)
    assert x.mean().item() == pytest.approx(exact.mean().item(), abs=0.03)
    assert x.std().item() == pytest.approx(exact.std().item(), rel=0.025)
    assert (x < -0.3).double().mean().item() == pytest.approx((exact < -0.3).double().mean().item(), abs=0.016)
    levels = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert (x.quantile(levels) - exact.quantile(levels)).abs().mean() < 0.035


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("kernel, eta", [("ancestral", 0.0), ("ancestral", 0.6), ("ancestral", 1.0), ("cps", 0.3), ("cps", 0.8)])
def test_the_noise_level_is_kept_at_any_number_of_steps(path, kernel, eta):
    """Where the picture is known, x_s = alpha_s x_0 + N(0, sigma_s^2) holds after every step, also after few and noisy ones."""
    generator, n, x0 = torch.Generator().manual_seed(1), 20000, 0.7
    times = path.times(5)
    x = path.alpha(times[0]) * x0 + path.sigma(times[0]) * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    for t, s in zip(times, times[1:]):
        eps_hat = (x.double() - path.alpha(t) * x0) / path.sigma(t)
        mean, std = transition(x, torch.full_like(x, x0), eps_hat, path, t, s, eta, kernel)
        x = mean + std * torch.randn(x.shape, generator=generator)
        centre, noise = (path.alpha(s) * x0).item(), path.sigma(s).item()
        assert x.mean().item() == pytest.approx(centre, abs=0.03 * noise + 1e-5)
        assert x.std().item() == pytest.approx(noise, rel=0.025, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The Gaussian of a step.

def test_log_prob_is_the_sum_of_normal_log_densities():
    x, mean, std = randn(5, 3, 4, 4), randn(5, 3, 4, 4, seed=1), torch.rand(5, 1, 1, 1, generator=torch.Generator().manual_seed(2)) + 0.05
    expected = torch.distributions.Normal(mean.double(), std.double()).log_prob(x.double()).flatten(1).sum(1)
    assert log_prob(x, mean, std).shape == (5,) and log_prob(x.double(), mean, std).dtype == torch.float32
    torch.testing.assert_close(log_prob(x, mean, std).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name, kernel", [("flow", "flow-grpo")] + [(name, kernel) for name in PATHS for kernel in ("ancestral", "cps")])
def test_steps_are_finite_at_both_ends(name, kernel):
    path = PATHS[name]
    for steps in (1, 2, 8):
        times = path.times(steps)
        x = randn(2, 3, 4, 4)
        for k in range(steps):
            mean, std = transition(x, randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2), path, times[k], times[k + 1], 0.8, kernel)
            assert mean.isfinite().all() and std.isfinite().all() and mean.shape == x.shape and std.shape == (2, 1, 1, 1)
            last = k == steps - 1
            if last and kernel != "flow-grpo":
                assert (std == 0).all()
            else:
                assert (std > 0).all() and log_prob(x, mean, std).isfinite().all()


@pytest.mark.parametrize("path, kernel", [(FLOW, "ancestral"), (VP(ABAR), "ancestral"), (EDM, "cps"), (FLOW, "flow-grpo")])
def test_each_sample_has_its_own_times_and_eta(path, kernel):
    times, k, eta = path.times(6), torch.tensor([0, 2, 5]), torch.tensor([1.0, 0.0, 0.5])
    x, x0_hat, eps_hat = randn(3, 2, 4), randn(3, 2, 4, seed=1), randn(3, 2, 4, seed=2)
    mean, std = transition(x, x0_hat, eps_hat, path, times[k], times[k + 1], eta, kernel)
    for i in range(3):
        one = [v[i:i + 1] for v in (x, x0_hat, eps_hat)]
        one_mean, one_std = transition(*one, path, times[k[i]], times[k[i] + 1], eta[i].item(), kernel)
        torch.testing.assert_close(mean[i:i + 1], one_mean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(std[i:i + 1], one_std, atol=1e-6, rtol=1e-6)
    assert std[1] == 0 and std[0] > 0


def test_no_step_for_an_unknown_kernel_or_another_path():
    x = randn(2, 3)
    for path in (VP(ABAR), EDM):
        times = path.times(4)
        for k in range(4):
            with pytest.raises(ValueError, match="flow-grpo"):
                transition(x, x, x, path, times[k], times[k + 1], kernel="flow-grpo")
    with pytest.raises(ValueError, match="'euler' is none of ancestral, cps, flow-grpo"):
        transition(x, x, x, FLOW, 0.5, 0.4, kernel="euler")


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts.

class Tiny(nn.Module):
    """A flow's network of 2 x 6 x 6 numbers with a prompt of two embeddings, [B, 5, 4] and [B, 4]."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
            self.time, self.tokens, self.pooled = nn.Linear(1, 8), nn.Linear(20, 8), nn.Linear(4, 8)

    def forward(self, x, t, prompt):
        tokens, pooled = prompt
        h = self.first(x) + (self.time(t[:, None]) + self.tokens(tokens.flatten(1)) + self.pooled(pooled))[:, :, None, None]
        return predictions(x, self.last(torch.nn.functional.gelu(h)), t)


MODEL, B, D = Tiny().requires_grad_(False), 7, 72
PROMPT, NULL = (randn(B, 5, 4, seed=1), randn(B, 4, seed=2)), (randn(1, 5, 4, seed=3), randn(1, 4, seed=4))


def noisy_prompt(rows, u):
    """A prompt that changes with the rollout and the step, as DRIFT's does."""
    return PROMPT[0][rows] + u[:, None, None] * randn(B, 5, 4, seed=5)[rows], PROMPT[1][rows]


def clean_prompt(rows, u):
    return tuple(y[rows] for y in PROMPT)


def policy(window=range(0, 4), eta=0.8, kernel="cps", guidance=1.0, steps=6):
    return Policy(FLOW, FLOW.times(steps), window, eta, kernel, guidance)


def roll(policy, condition=noisy_prompt, rows=slice(None), **options):
    x_T, noise = randn(B, 2, 6, 6, seed=6)[rows], randn(B, len(policy.window), 2, 6, 6, seed=7)[rows]
    return rollout(MODEL, policy, condition, x_T, noise, NULL, **options)


def replay_error(policy, trajectory, k, rows):
    """The largest |log-prob of the replay - log-prob of the rollout| / D over the rows."""
    steps = torch.full_like(rows, k)
    mean, std, _ = policy.step(MODEL, trajectory.latents[k, rows], steps, trajectory.condition(rows, policy.fraction(steps)), NULL)
    difference = log_prob(trajectory.latents[k + 1, rows], mean, std) - trajectory.log_probs[k - policy.window.start, rows]
    return difference.abs().max().item() / D


@pytest.mark.parametrize("kernel, eta", [("ancestral", 1.0), ("cps", 0.8), ("flow-grpo", 0.7)])
@pytest.mark.parametrize("window, guidance", [(range(0, 4), 1.0), (range(2, 5), 4.5)])
def test_replay_repeats_the_log_probs(kernel, eta, window, guidance):
    p = policy(window, eta, kernel, guidance)
    trajectory = roll(p)
    assert trajectory.latents.shape == (7, B, 2, 6, 6) and trajectory.x0_hats.shape == (6, B, 2, 6, 6)
    assert trajectory.log_probs.shape == (len(window), B)
    assert trajectory.latents.dtype == trajectory.x0_hats.dtype == trajectory.log_probs.dtype == torch.float32
    for k in window:
        assert replay_error(p, trajectory, k, torch.arange(B)) == 0      # the same batch: the ratio is exactly 1
        for rows in torch.arange(B).split(2):
            assert replay_error(p, trajectory, k, rows) < 1e-6


def test_replay_of_a_batch_of_mixed_steps():
    p = policy(range(1, 5))
    trajectory = roll(p)
    row, k = torch.tensor([0, 3, 3, 6, 1, 5, 2, 4, 0]), torch.tensor([1, 1, 4, 2, 3, 3, 4, 1, 2])
    mean, std, _ = p.step(MODEL, trajectory.latents[k, row], k, trajectory.condition(row, p.fraction(k)), NULL)
    difference = log_prob(trajectory.latents[k + 1, row], mean, std) - trajectory.log_probs[k - 1, row]
    assert difference.abs().max() / D < 1e-6


def test_replay_shows_latents_stored_in_low_precision():
    p = policy()
    trajectory = roll(p)
    rounded = Trajectory(trajectory.latents.bfloat16().float(), trajectory.x0_hats, trajectory.log_probs, trajectory.condition)
    assert min(replay_error(p, rounded, k, torch.arange(B)) for k in p.window) > 1e-5


def test_replay_shows_another_prompt_guidance_or_time():
    p = policy(guidance=2.0)
    trajectory = roll(p)
    cleaned = Trajectory(trajectory.latents, trajectory.x0_hats, trajectory.log_probs, clean_prompt)
    late = Policy(FLOW, Flow(1.1).times(6), p.window, p.eta, p.kernel, p.guidance)
    for wrong, rollouts in ((p, cleaned), (policy(guidance=1.9), trajectory), (late, trajectory)):
        assert replay_error(wrong, rollouts, 1, torch.arange(B)) > 1e-5


def test_noise_enters_in_the_window_only():
    p = policy(range(1, 3))
    trajectory, noise = roll(p), randn(B, 2, 2, 6, 6, seed=7)
    for k in range(6):
        steps = torch.full((B,), k)
        mean, std, x0_hat = p.step(MODEL, trajectory.latents[k], steps, noisy_prompt(torch.arange(B), p.fraction(steps)), NULL)
        assert torch.equal(x0_hat, trajectory.x0_hats[k])
        if k in (1, 2):
            assert (std > 0).all() and torch.equal(trajectory.latents[k + 1], mean + std * noise[:, k - 1])
        else:
            assert (std == 0).all() and torch.equal(trajectory.latents[k + 1], mean)


@pytest.mark.parametrize("kernel", ["ancestral", "cps", "flow-grpo"])
def test_sample_is_a_rollout_without_a_window(kernel):
    """flow-grpo without noise is Euler's step too, written in another order."""
    p = policy(range(0, 0), kernel=kernel, guidance=3.0)
    trajectory = roll(p, clean_prompt)
    pictures = sample(MODEL, FLOW, FLOW.times(6), PROMPT, randn(B, 2, 6, 6, seed=6), 3.0, NULL)
    assert trajectory.log_probs.shape == (0, B)
    torch.testing.assert_close(trajectory.latents[-1], pictures, atol=1e-5 if kernel == "flow-grpo" else 0, rtol=0)


def test_rollouts_do_not_depend_on_their_batch():
    p = policy(guidance=2.0)
    whole = roll(p)
    for batch in (1, 3, 5):
        parts = roll(p, batch=batch)
        for name in ("latents", "x0_hats", "log_probs"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-4 if name == "log_probs" else 1e-5, rtol=1e-5)


def test_rollout_keeps_no_graph():
    network = Tiny()
    p = policy()
    trajectory = rollout(network, p, noisy_prompt, randn(B, 2, 6, 6), randn(B, 4, 2, 6, 6), NULL)
    assert not (trajectory.latents.requires_grad or trajectory.x0_hats.requires_grad or trajectory.log_probs.requires_grad)
    steps = torch.zeros(B, dtype=torch.long)
    mean, std, _ = p.step(network, trajectory.latents[0], steps, noisy_prompt(torch.arange(B), p.fraction(steps)), NULL)
    log_prob(trajectory.latents[1], mean, std).sum().backward()
    assert all(w.grad is not None and w.grad.abs().max() > 0 for w in network.parameters())


def test_guidance_is_two_forwards():
    x, t = randn(B, 2, 6, 6), torch.linspace(0.1, 0.9, B)
    with_prompt = MODEL(x, t, PROMPT)
    without = MODEL(x, t, tuple(n.repeat(B, *[1] * (n.dim() - 1)) for n in NULL))
    for guidance in (0.0, 0.5, 4.5):
        for ours, w, n in zip(predict(MODEL, x, t, PROMPT, guidance, NULL), with_prompt, without):
            torch.testing.assert_close(ours, guidance * w + (1 - guidance) * n, atol=1e-5, rtol=1e-5)
    for ours, w in zip(predict(MODEL, x, t, PROMPT), with_prompt):
        assert torch.equal(ours, w)


def test_fraction_counts_the_steps_to_go():
    torch.testing.assert_close(policy(steps=8).fraction(torch.arange(8)), torch.tensor([8, 7, 6, 5, 4, 3, 2, 1]) / 8)


def test_seeded_noise_is_a_function_of_key_and_sample():
    rows = seeded_noise((0, 5, 2), [3, 7, 11, 7], (2, 4))
    assert rows.shape == (4, 2, 4) and torch.equal(rows[1], rows[3])
    for i, sample_number in enumerate((3, 7, 11)):
        assert torch.equal(seeded_noise((0, 5, 2), torch.tensor([sample_number]), (2, 4))[0], rows[i])
    torch.manual_seed(3)
    state = torch.get_rng_state()
    seeded_noise((0, 5, 2), [3], (2, 4))
    assert torch.equal(torch.get_rng_state(), state)                     # leaves the global generator alone


def test_seeded_noise_is_normal_and_its_streams_are_apart():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0, 0), (1, 0, 0, 1), (2, 0), (2, 1)]
    noise = torch.cat([seeded_noise(key, range(20), (500,)) for key in keys]).double()                 # 140 rows
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02 and abs((noise**4).mean() - 3) < 0.2
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 0.25                                # 5.6 standard errors; a repeated row would give 1


# ---------------------------------------------------------------------------------------------------------------------
# The subset.

def naive_variance(rewards, subsets):
    """rewards [P, N], subsets [P, S, K] -> [P, S], centred first and then squared."""
    values = rewards.double().gather(1, subsets.flatten(1)).reshape(subsets.shape)
    return (values - values.mean(2, keepdim=True)).square().mean(2)


def draws(kind, shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=g)
    if kind == "cauchy":
        return normal / torch.randn(shape, generator=g)
    if kind == "ties":
        return torch.randint(0, 3, shape, generator=g).float()
    if kind == "offset":
        return 1e6 + normal.double() * 1e-2
    return normal


@pytest.mark.parametrize("kind", ["normal", "cauchy", "ties", "offset"])
@pytest.mark.parametrize("rule", ["window", "spread"])
def test_window_and_spread_are_the_extreme_variances(kind, rule):
    for N in (2, 5, 8):
        for keep in range(1, N + 1):
            rewards = draws(kind, (300, N), seed=10 * N + keep)
            index = concentrated_subset(rewards, keep, rule)
            variances = naive_variance(rewards, torch.tensor(list(combinations(range(N), keep))).expand(300, -1, keep))
            best = variances.min(1).values if rule == "window" else variances.max(1).values
            torch.testing.assert_close(naive_variance(rewards, index[:, None])[:, 0], best, rtol=1e-6, atol=1e-18)


@pytest.mark.parametrize("kind", ["normal", "cauchy", "ties", "offset"])
@pytest.mark.parametrize("rule", ["window", "median", "band", "trim", "spread", "all"])
def test_an_index_is_ascending_without_repeats(kind, rule):
    for keep in (1, 4, 7) if rule != "all" else (7,):
        index = concentrated_subset(draws(kind, (50, 7)), keep, rule)
        assert index.shape == (50, keep) and index.dtype == torch.long
        assert (index.diff(dim=1) > 0).all() and (index >= 0).all() and (index < 7).all()
        assert rule != "all" or torch.equal(index, torch.arange(7).expand(50, 7))


@pytest.mark.parametrize("rule", ["window", "median", "band", "trim", "spread"])
def test_a_subset_does_not_depend_on_shift_and_scale(rule):
    rewards = draws("normal", (200, 8)).double()
    index = concentrated_subset(rewards, 5, rule)
    for changed in (rewards + 1000, 0.01 * rewards, 37 * rewards - 12):
        assert torch.equal(concentrated_subset(changed, 5, rule), index)


def test_the_other_rules_by_their_definitions():
    rewards = draws("normal", (100, 9))
    for keep in (1, 4, 8):
        rules = (["median"], ["trim"], ["band"], ["band", 1.5])
        median, trim, band, wide = (concentrated_subset(rewards, keep, *rule).tolist() for rule in rules)
        for p, row in enumerate(rewards.double().numpy()):
            assert median[p] == sorted(sorted(range(9), key=lambda i: abs(row[i] - np.median(row)))[:keep])
            assert trim[p] == sorted(sorted(range(9), key=lambda i: row[i])[:keep])
            for ours, width in ((band[p], 1.0), (wide[p], 1.5)):
                outside = [max(0.0, abs(r - row.mean()) - width * row.std(ddof=1)) for r in row]
                inside = [i for i in range(9) if outside[i] == 0]
                others = sorted((i for i in range(9) if outside[i] > 0), key=lambda i: outside[i])
                assert ours == sorted((inside + others)[:keep])


def test_window_drops_the_outlier_and_spread_keeps_it():
    rewards = torch.tensor([[0.1, 9.0, 0.2, 0.0], [-5.0, 1.0, 1.1, 1.2]])
    assert concentrated_subset(rewards, 3).tolist() == [[0, 2, 3], [1, 2, 3]]
    assert concentrated_subset(rewards, 2, "spread").tolist() == [[1, 3], [0, 3]]


@pytest.mark.parametrize("keep, rule", [(0, "window"), (5, "window"), (-1, "median"), (3, "all"), (2, "best")])
def test_a_bad_size_or_rule_is_refused(keep, rule):
    with pytest.raises(ValueError, match=rule):
        concentrated_subset(torch.zeros(2, 4), keep, rule)


def test_window_is_exact_beside_a_huge_outlier():
    index = concentrated_subset(torch.tensor([[0, 1, 1.1, 1.2, 5, 1e9]], dtype=torch.float64), 3)
    assert index.tolist() == [[1, 2, 3]]


def test_the_fraction_to_go_is_never_rounded_up():
    """One step above tau1 would no longer be the clean prompt."""
    for steps in range(1, 65):
        p = policy(steps=steps, window=range(0, 1))
        for k in range(steps):
            assert p.fraction(torch.tensor([k])).item() <= torch.tensor((steps - k) / steps, dtype=torch.float32).item()


@pytest.mark.parametrize("steps", [1000, 1001, 5000])
def test_a_schedule_that_does_not_fit_is_refused(steps):
    with pytest.raises(ValueError, match=f"{steps} steps"):
        VP(torch.linspace(0.999, 0.01, 1000), offset=1).times(steps)
