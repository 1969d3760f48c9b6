"""The checks that a new generator needs: python train.py --model module:Class:PATH --check.

Each prints one line. They ask for what the algorithm assumes and no error message would show: the
prediction lies on the path, no dropout is left, a text's embedding does not depend on its
neighbours, the first ratio is 1, gradients reach what learns, and what is saved loads the same.
"""

import contextlib
import io
import math
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

import bases
from bases.generator import Generator
from bases.lora import add_lora, lora_layers
from commands.checks import need
from prompting import noised_prompt, read_prompts
from sampling import Policy, log_prob, rollout, sample, seeded_noise
from support import files, flags, processes

TEXTS = 3  # prompts that are tried
STEPS = 4  # of a rollout
TOLERANCE = 1e-4  # of what is equal but for rounding, relative to the largest number


@dataclass
class Case:
    """A loaded generator, some prompts, and states between noise and picture."""

    args: object  # the flags of train.py
    model: Generator
    texts: list  # B of them
    prompt: tuple  # their embeddings [B, ...]
    x_t: torch.Tensor  # [B, ...]
    t: torch.Tensor  # [B]


def check_generator(args):
    """Loads --model and prints a line a check -> the exit code: 0 if all of them passed, else 1."""
    device = processes.start(args.device)
    with flags.refusing():
        case = open_case(args, device)
    lines = [outcome(check, case) for check in CHECKS]
    failed = [line for line in lines if not line.startswith("ok")]
    if processes.rank() == 0:
        print("\n".join(lines))
        print(f"{args.model}: {len(lines) - len(failed)} of {len(lines)} checks passed")
    processes.finish()
    return 1 if failed else 0


def open_case(args, device):
    """The Case of --model: its first prompts, at three times from noise to picture."""
    folder = bases.check(args.model)
    prompts = read_prompts(args.prompts or folder / "prompts.jsonl")
    model = bases.load(args.model, device, args.precision)
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))[:TEXTS]
    texts = (texts * TEXTS)[:TEXTS]
    with torch.no_grad():
        prompt = model.encode(texts)
    times = model.path.times(STEPS)[:TEXTS].to(model.device)  # the last time of all is the picture
    noise = seeded_noise((0,), range(TEXTS), model.shape).to(model.device)
    other = seeded_noise((1,), range(TEXTS), model.shape).to(model.device)
    alpha = column(model.path.alpha(times), noise)
    sigma = column(model.path.sigma(times), noise)
    return Case(args, model, texts, prompt, alpha * noise + sigma * other, times.float())


def outcome(check, case):
    """One line: ok or FAILED, the check's docstring, and what it found."""
    name = check.__doc__.split(".")[0]
    try:
        # A library may write on its own; the line stays one line.
        with contextlib.redirect_stdout(io.StringIO()):
            return f"ok      {name}: {check(case)}"
    except ValueError as error:
        return f"FAILED  {name}: {error}"
    except Exception as error:  # the class's own: of any class
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())[:300]
        place = f"{Path(last.filename).name}, line {last.lineno}"
        return f"FAILED  {name}: {type(error).__name__}: {reason} ({place})"


def column(values, like):
    """[B] -> float32 [B, 1, ...], to be multiplied with `like` [B, ...]."""
    ones = [1] * (like.dim() - 1)
    return values.reshape(-1, *ones).float()


def difference(a, b):
    """The largest difference of two tensors, relative to the largest number in b."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-9)).item()


def need_close(a, b, what, largest=TOLERANCE):
    """-> the difference as text. Raises ValueError if it is larger than `largest`."""
    error = difference(a, b)
    need(error <= largest, f"{what} differ by {error:.1e} of the largest number")
    return f"largest difference {error:.1e}"


# --------------------------------------------------------------------------------------------------
# The checks: Case -> what was found. The first sentence of a docstring is the check's name.


@torch.no_grad()
def shapes(case):
    """Shapes of embeddings, prediction and pictures."""
    model = case.model
    for embedding in (*case.prompt, *model.encode([""])):
        need(
            embedding.dim() > 1 and embedding.isfinite().all(),
            f"an embedding of the shape {tuple(embedding.shape)}; embed gives finite [B, ...]",
        )
    for name, value in zip(("x0_hat", "eps_hat"), model(case.x_t, case.t, case.prompt)):
        need(
            value.shape == case.x_t.shape and value.dtype == torch.float32,
            f"{name} is {value.dtype} {list(value.shape)}; expected float32 {list(case.x_t.shape)}",
        )
        need(value.isfinite().all(), f"{name} holds NaN or infinity")
    picture = model.picture(case.x_t)
    need(
        picture.dim() == 4 and len(picture) == len(case.x_t) and picture.shape[1] in (1, 3),
        f"picture gives {list(picture.shape)}; expected [B, 1 or 3, H, W]",
    )
    sizes = [list(embedding.shape[1:]) for embedding in case.prompt]
    return f"embeddings {sizes}, latents {list(model.shape)}, pictures {list(picture.shape[1:])}"


@torch.no_grad()
def path_and_prediction(case):
    """x_t is alpha x0_hat + sigma eps_hat."""
    x0_hat, eps_hat = case.model(case.x_t, case.t, case.prompt)
    alpha = column(case.model.path.alpha(case.t.double()), case.x_t)
    sigma = column(case.model.path.sigma(case.t.double()), case.x_t)
    return need_close(alpha * x0_hat + sigma * eps_hat, case.x_t, "the sum and x_t")


def times_of_the_path(case):
    """Times run from noise to picture."""
    path, steps = case.model.path, case.args.steps
    times = path.times(steps)
    need(len(times) == steps + 1, f"times({steps}) gives {len(times)} times, not {steps + 1}")
    need(bool((times.diff() < 0).all()), "the times do not fall")
    last = float(path.sigma(times[-1:])[0])
    need(last < 0.05, f"sigma is {last:.3g} at the end; a picture has no noise")
    first = float(path.sigma(times[:1])[0])
    expected = case.model.initial_std
    need(
        abs(first / expected - 1) < 0.1,
        f"sigma is {first:.3g} at the start, and initial_std {expected:.3g}; they should agree",
    )
    return f"{float(times[0]):.4g} to {float(times[-1]):.4g}, sigma {first:.4g} to {last:.4g}"


@torch.no_grad()
def repeatable(case):
    """The same input gives the same prediction, also in train() mode."""
    model = case.model
    first = model(case.x_t, case.t, case.prompt)[0]
    model.network.train()
    second = model(case.x_t, case.t, case.prompt)[0]
    model.network.eval()
    need(torch.equal(first, second), f"off by {difference(second, first):.1e}; leave out dropout")
    return "bit-equal"


@torch.no_grad()
def neighbours(case):
    """Neither texts nor pictures depend on their neighbours in a batch."""
    model = case.model
    alone = model.encode(case.texts[:1])
    for one, many in zip(alone, case.prompt):
        need_close(one, many[:1], "the embeddings of a text alone and among others")
    whole = model(case.x_t, case.t, case.prompt)[0]
    single = model(case.x_t[:1], case.t[:1], alone)[0]
    return need_close(single, whole[:1], "predictions alone and among others", 1e-3)


def learning(case):
    """Gradients reach what learns."""
    model = case.model
    names = []
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(case.args.train == "all" or model.trained(name))
        if parameter.requires_grad:
            names.append(name)
    need(names, "no parameter learns")
    found = gradients(case)
    idle = [name for name in names if name not in found]
    need(len(idle) < len(names), "no gradient reaches a parameter that learns")
    count = sum(parameter.numel() for parameter in found.values())
    text = f"{len(found)} of {len(names)} tensors, {count:,} numbers (--train {case.args.train})"
    if idle:
        text += f"; none reaches {idle[0]}" + (f" and {len(idle) - 1} more" if idle[1:] else "")
    return text


def gradients(case):
    """-> {name: gradient} of the parameters that a gradient reaches."""
    model = case.model
    model.network.zero_grad()
    x0_hat, _ = model(case.x_t, case.t, case.prompt)
    (x0_hat * case.x_t).mean().backward()
    found = {}
    for name, parameter in model.network.named_parameters():
        if parameter.grad is not None and bool((parameter.grad != 0).any()):
            found[name] = parameter.grad.clone()
    model.network.zero_grad()
    return found


def first_ratio(case):
    """The update takes the rollout's steps again: the first ratio is 1."""
    args, model = case.args, case.model
    times = model.path.times(STEPS).to(model.device)
    policy = Policy(model.path, times, range(2), args.eta, args.kernel, args.guidance)
    noise = seeded_noise((2,), range(TEXTS), (3, *model.shape)).to(model.device)
    drawn = []
    for embedding in case.prompt:
        drawn.append(seeded_noise((3,), range(TEXTS), embedding.shape[1:]).to(embedding))
    scale = args.prompt_noise or 0.5  # noise is asked of every generator
    condition = noised_prompt(case.prompt, drawn, scale, args.tau1, args.tau2, args.psi)
    null_prompt = tuple(embedding.detach() for embedding in model.encode([""]))
    x_T = noise[:, 0] * model.initial_std
    trajectory = rollout(model, policy, condition, x_T, noise[:, 1:], null_prompt)

    rows = torch.arange(TEXTS, device=model.device)
    worst = 0.0
    for k in policy.window:
        steps = torch.full_like(rows, k)
        prompt = condition(rows, policy.fraction(steps))
        mean, std, _ = policy.step(model, trajectory.latents[k], steps, prompt, null_prompt)
        new = log_prob(trajectory.latents[k + 1], mean, std)
        change = (new - trajectory.log_probs[k]) / math.prod(model.shape)
        worst = max(worst, change.exp().sub(1).abs().max().item())
    need(worst < 1e-5, f"off by {worst:.1e}; the forward with gradients is another than without")
    return f"off by {worst:.1e}"


@torch.no_grad()
def own_sampler(case):
    """Deterministic samples are those of the library that the base comes from."""
    model = case.model
    x_T = seeded_noise((4,), range(TEXTS), model.shape).to(model.device) * model.initial_std
    theirs = model.stock_sample(case.texts, x_T, case.args.eval_steps)
    if theirs is None:
        return "nothing to compare with (stock_sample)"
    times = model.path.times(case.args.eval_steps)
    ours = sample(model, model.path, times, case.prompt, x_T)
    return need_close(ours, theirs, "our samples and theirs", 1e-3)


def recomputation(case):
    """--checkpointing gives the same gradients."""
    plain = gradients(case)
    device, precision = case.model.device, case.args.precision
    other = bases.load(case.args.model, device, precision, checkpointing=True)
    for name, parameter in other.network.named_parameters():
        parameter.requires_grad_(case.args.train == "all" or other.trained(name))
    again = gradients(Case(case.args, other, case.texts, case.prompt, case.x_t, case.t))
    need(plain.keys() == again.keys(), "gradients reach other parameters")
    worst = max(difference(again[name], plain[name]) for name in plain)
    need(worst < 1e-3, f"off by {worst:.1e} of the largest number")
    return f"largest difference {worst:.1e}"


def lora(case):
    """A new LoRA changes nothing, and gradients reach it."""
    model = case.model
    with torch.no_grad():
        before = model(case.x_t, case.t, case.prompt)[0]
    twin = model.frozen()  # of which the network is a copy
    trained = add_lora(twin.network, 4, 4, twin.lora_targets())
    with torch.no_grad():
        after = twin(case.x_t, case.t, case.prompt)[0]
    need_close(after, before, "predictions with a new LoRA and without")
    found = gradients(Case(case.args, twin, case.texts, case.prompt, case.x_t, case.t))
    ups = [name for name in trained if "lora_B" in name]
    reached = [name for name in ups if name in found]
    need(reached, "no gradient reaches it; name the layers in lora_targets")
    return f"gradients reach {len(reached)} of {len(lora_layers(twin.network))} layers"


@torch.no_grad()
def saving(case):
    """What is saved loads the same."""
    model = case.model
    before = model(case.x_t, case.t, case.prompt)[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        files.save_model(path, model)
        other = bases.load(str(path), model.device, case.args.precision)
        after = other(case.x_t, case.t, other.encode(case.texts))[0]
    need(torch.equal(after, before), f"off by {difference(after, before):.1e}")
    return "bit-equal"


CHECKS = (
    shapes,
    path_and_prediction,
    times_of_the_path,
    repeatable,
    neighbours,
    learning,
    first_ratio,
    own_sampler,
    recomputation,
    lora,
    saving,
)
