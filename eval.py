"""Evaluates models and pictures: alignment with the prompts, diversity, distance to real pictures.

    python eval.py images MODEL --n 1000 --out DIR      draw pictures: a folder of PNG, or FILE.npz
    python eval.py score MODEL|DIR|FILE.npz [SECOND]    metrics of one or two sets, with intervals
    python eval.py compare RUN... --out compare.png     runs of train.py, at equal alignment
    python eval.py grid RUN... --out grid.png           the same noise before, and after each run

images and score run on several processes as `torchrun --nproc_per_node 8 -- eval.py ...` (without
the --, torchrun takes --n for its own). Neither their number nor --batch changes a picture: each is
drawn by the deterministic sampler, from a clean prompt and noise that depends only on the seed and
the picture's number. So every model is evaluated with the same noise.

    accuracy, log_prob     of the prompt's class, by a classifier that training never sees (nats)
    modes                  values left of what a prompt leaves open: 1, as many as real pictures
    vendi, distance        diversity within a prompt, mean over prompts; ..._set over all pictures
    distance_min           distance of the two nearest pictures of a prompt
    fid, kid, precision, recall, density, coverage      against real pictures; compare at equal n

The kernel width h of the Vendi score is half the mean distance of real pictures of one class in the
features of the model folder's classifiers, and half the root mean square distance of any two in all
other features. Left out: metrics that need a network besides the features, and file formats that
can run code.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from commands import compare
from commands import report as run_report
from commands.checks import check_eval
from commands.picture_sets import generate, make_images
from dist_reward import frechet_distance, moments
from rewards import Reward, classifier, metrics, names_any
from rewards.features import TINY, load_features
from rewards.metrics import effective_number, mean_distance, smallest_distance, vendi_score
from rewards.targets import load_target, target_path
from shaping import group_diversity
from support import files, flags, guards, processes

MOST = 1000  # pictures of which vendi_set and distance_set are taken
MOST_REAL = 10000  # real pictures of which KID is taken

# Each kind of bootstrap resample draws from its own stream of random numbers.
PROMPT_STREAM, PICTURE_STREAM, SET_STREAM, REAL_STREAM = 0, 1, 2, 3

# Shapes: N pictures of P prompts, n of each; F features of a picture; R resamples, and the estimate
#         itself before them: [1 + R].


@dataclass
class Args:
    command: Literal["images", "score", "compare", "grid"]
    """what to do"""
    inputs: list
    """images: a model; score: one or two of model, folder of pictures, .npz; else run folders"""
    out: str = ""
    """to write: folder or .npz (images), .json (score, optional), .png (compare, optional; grid)"""

    # images and score
    n: int = 0
    """pictures, a multiple of the prompts (default: 1000 of a model, or the next multiple; all of a
    folder or .npz)"""
    prompts: str = ""
    """what is drawn (default: the model folder's eval_prompts.jsonl, or else its prompts.jsonl; of
    pictures: as when drawn)"""
    seed: int = 0
    """of the pictures' noise, and of the resampling"""
    steps: int = 10
    """deterministic sampling steps, of a model"""
    guidance: float = 1.0
    """classifier-free guidance, of a model"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the model's forwards"""
    batch: int = 500
    """pictures in one forward of a process: memory only"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to run"""

    # score
    model: str = ""
    """folder whose classifiers judge (default: the first input's model, else assets/tiny)"""
    reward: str = ""
    """rewards to report, as train.py's (default: class, where the folder has its classifier)"""
    features: str = "evaluator"
    """measured in: evaluator, reward, pixels, inception:FILE, dinov2[:MODEL], clip[:MODEL],
    module:function (default: evaluator where the model folder has it, else pixels)"""
    target: str = ""
    """real pictures, folder or idx file, or .npz of moments (default: the model folder's)"""
    resamples: int = 200
    """bootstrap resamples behind an interval"""

    # compare and grid
    labels: str = ""
    """one a run; equal labels are seeds of one method (default: folder name without -NUMBER)"""


# --------------------------------------------------------------------------------------------------
# What training logs.


class Judge:
    """A classifier of the model folder, and the moments of real pictures in its features.

    `real` holds mu [F], sigma [F, F] and scale, the kernel width of the Vendi score.
    """

    def __init__(self, model_folder, name, device="cpu", real="real.npz"):
        folder = Path(model_folder) / name
        self.network = classifier.load_classifier(folder, device)
        self.real = np.load(folder / real)


class Evaluator:
    """Evaluates the model of a training, with the same prompts and noise every time.

    A call gives {"eval/...": number} and writes grids/NNNNN.png, ten pictures of each prompt.
    Collective: call on every process.
    """

    def __init__(self, args, setup, eval_prompts, device):
        self.args = args
        self.setup = setup
        self.eval_prompts = eval_prompts

        # The network that judges must not be the one in whose features the reward is measured.
        rewarded_by_evaluator = args.features == "evaluator" and setup.reference_set
        name = "reward" if rewarded_by_evaluator else "evaluator"
        folder = setup.model.folder
        self.judge = None
        if (folder / name).is_dir():
            self.judge = Judge(folder, name, device)

    def __call__(self, iteration):
        with self.setup.averages.applied():
            images = self.draw()
        guards.finite({f"a picture of the evaluation at iteration {iteration}": images})
        self.save_grid(iteration, images)
        scores = self.alignment_and_diversity(images)
        if self.setup.reference_set:
            scores["fid_trained"] = self.trained_distance(images)
        return {f"eval/{name}": value for name, value in scores.items()}

    def draw(self):
        """The pictures of this evaluation, prompt by prompt -> [P n, 3, H, W]."""
        args = self.args
        each = args.eval_images // len(self.eval_prompts)
        return generate(
            self.setup.model,
            self.eval_prompts,
            each,
            args.eval_steps,
            args.guidance,
            args.eval_seed,
            args.batch,
        )

    def save_grid(self, iteration, images):
        """Writes grids/NNNNN.png, the first ten pictures of each prompt."""
        if processes.rank() == 0:
            rows = images.reshape(len(self.eval_prompts), -1, *images.shape[1:])
            path = Path(self.args.out) / "grids" / f"{iteration:05d}.png"
            files.save_grid(path, rows[:, :10])

    def alignment_and_diversity(self, images):
        """By the judge if the model folder has one, else by the rewards themselves."""
        setup = self.setup
        if self.judge:
            return score(images, self.eval_prompts, self.judge.network, self.judge.real)
        return score_without_judge(
            images, self.eval_prompts, setup.reward, setup.diversity_features, self.feature_batch
        )

    def trained_distance(self, images):
        """The Frechet distance in the features and to the target that the reward uses."""
        reference_set = self.setup.reference_set
        parts = images.split(self.feature_batch)
        features = torch.cat([reference_set.features(part) for part in parts])
        return frechet_distance(*moments(features), *reference_set.target)

    @property
    def feature_batch(self):
        return self.args.reward_batch or self.args.batch


def alignment(logits, asked, attributes):
    """Logits [B, K] of the evaluator, asked [B, A] as value_numbers gives -> {name: float64 [B]}.

    accuracy: whether all that is named is there. log_prob has the floor of the reward `class`: one
    hopeless picture must not outweigh the others.
    """
    log_p, _ = classifier.log_odds(logits, asked, attributes)
    is_right = classifier.read_values(logits, attributes) == asked
    is_open = asked == classifier.OPEN
    return {
        "accuracy": (is_right | is_open).all(1).double(),
        "log_prob": log_p.clamp(min=classifier.FLOOR).double(),
    }


@torch.inference_mode()
def score(images, prompts, evaluator, real):
    """Pictures [P n, 3, H, W] of P prompts, prompt by prompt -> {metric: number}.

    real: mapping with mu, sigma and scale of the real pictures in the evaluator's features, and the
    frequencies of the attributes' values.
    """
    P = len(prompts)
    attributes = evaluator.attributes
    features = torch.cat([evaluator.features(part) for part in images.split(500)])  # [P n, 64]
    guards.finite({"a feature of the evaluator": features})
    groups = features.reshape(P, -1, features.shape[1])  # [P, n, 64]
    asked = classifier.value_numbers(
        [prompt.metadata for prompt in prompts], attributes, images.device
    )  # [P, A]
    logits = evaluator.head(features)

    scores = {}
    repeated = asked.repeat_interleave(groups.shape[1], 0)
    for name, value in alignment(logits, repeated, attributes).items():
        scores[name] = value.mean().item()
    scale = float(real["scale"])
    scores["vendi"] = sum(vendi_score(group, scale) for group in groups) / P
    scores["distance"] = sum(mean_distance(group) for group in groups) / P
    scores["fid"] = frechet_distance(*moments(features.cpu()), real["mu"], real["sigma"])
    values = classifier.read_values(logits, attributes).reshape(P, -1, len(attributes))
    for name, prompt_modes in metrics.modes(values, asked, attributes, real).items():
        scores[name] = prompt_modes.nanmean().item()
    return scores


@torch.inference_mode()
def score_without_judge(images, prompts, reward, diversity_features, batch):
    """Pictures [P n, 3, H, W] of P prompts -> {metric: number}, for a base without an evaluator.

    The rewards are those that training raises, so they say less than a judge of its own would.
    Diversity is that of --diversity_features (None: pixels), with the cosine as kernel.
    """
    P = len(prompts)
    repeated = [prompt for prompt in prompts for _ in range(len(images) // P)]
    texts = [prompt.text for prompt in repeated]
    metadata = [prompt.metadata for prompt in repeated]
    rewards = reward(images, texts, metadata)

    features = []
    for part in images.split(batch):
        features.append(diversity_features(part) if diversity_features else part.flatten(1))
    features = torch.cat(features).double()
    guards.finite({"a feature of --diversity_features": features})
    features = torch.nn.functional.normalize(features, dim=1)
    groups = features.reshape(P, -1, features.shape[1])  # [P, n, F]
    kernels = groups @ groups.transpose(1, 2) / groups.shape[1]  # [P, n, n], each of trace 1
    vendi = groups.new_tensor([effective_number(kernel) for kernel in kernels])  # [P]
    distance = group_diversity(groups, "cosine").double()  # [P, n]

    scores = {}
    for name, value in rewards.items():
        scores[f"reward_{name}"] = value.double().mean().item()
    scores["vendi"] = vendi.mean().item()
    scores["distance"] = distance.mean().item()
    return scores


# --------------------------------------------------------------------------------------------------
# eval.py score: what networks say of a set of pictures, and the metrics with their intervals.


class Networks:
    """What a set of pictures is shown to: the feature network, the evaluator and the rewards.

    The evaluator is None without its folder, or where the prompts name nothing that it knows; the
    reward is None without --reward.
    """

    def __init__(self, args, folder, prompts, device):
        self.device = device
        self.features = load_features(args.features, folder, device)
        self.evaluator = None
        if prompts and (folder / "evaluator").is_dir():
            evaluator = classifier.load_classifier(folder / "evaluator", device)
            if names_any(prompts, evaluator.attributes):
                self.evaluator = evaluator
                self.real_file = folder / "evaluator" / "real.npz"
        self.reward = None
        if args.reward:
            self.reward = Reward(args.reward, folder, device)

    @torch.inference_mode()
    def __call__(self, images, prompts):
        """Pictures [B, 3, H, W], their B prompts or None -> {"features": [B, F], others: [B]}.

        With an evaluator and prompts also {"values": [B, A]}, of its attributes.
        """
        outputs = {"features": self.features(images)}
        if prompts and self.evaluator:
            attributes = self.evaluator.attributes
            logits = self.evaluator(images)
            metadata = [prompt.metadata for prompt in prompts]
            asked = classifier.value_numbers(metadata, attributes, self.device)
            outputs |= alignment(logits, asked, attributes)
            outputs["values"] = classifier.read_values(logits, attributes)
        if prompts and self.reward:
            texts = [prompt.text for prompt in prompts]
            metadata = [prompt.metadata for prompt in prompts]
            for name, value in self.reward(images, texts, metadata).items():
                outputs[f"reward/{name}"] = value.double()
        return outputs

    def modes(self, values, prompts):
        """Values [P n, A] that the evaluator read -> {"modes": [P], "modes_NAME": [P]}."""
        attributes = self.evaluator.attributes
        if len(attributes) == 1:  # every prompt names it
            return {}
        asked = classifier.value_numbers([prompt.metadata for prompt in prompts], attributes)
        values = values.cpu().reshape(len(prompts), -1, len(attributes))
        return metrics.modes(values, asked, attributes, np.load(self.real_file))


def network_outputs(picture_set, networks, device):
    """What the networks say of every picture -> {"features": [N, F], others: [N]}.

    Each process looks at its share. Collective: call on every process.
    """
    N, prompts = picture_set.total, picture_set.prompts
    numbers = processes.share(N)
    batches = []
    done = 0
    bar = tqdm(
        total=len(numbers), disable=processes.rank() > 0, desc=picture_set.name[-30:], unit=""
    )
    for images in picture_set.read(numbers, device):
        batch_prompts = None
        if prompts:
            batch = numbers[done : done + len(images)]
            batch_prompts = [prompts[number * len(prompts) // N] for number in batch]
        guards.finite({f"a picture of {picture_set.name}": images})
        batches.append(networks(images, batch_prompts))
        guards.finite({f"{name} of {picture_set.name}": x for name, x in batches[-1].items()})
        done += len(images)
        bar.update(len(images))
    bar.close()

    outputs = {}
    for name in batches[0]:
        ours = torch.cat([batch[name] for batch in batches])
        outputs[name] = processes.gather(ours, N)
    return outputs


def resample_counts(args, size, stream, device):
    """How often each resample draws each of `size` things -> [1 + R, size]; row 0: once each."""
    return metrics.resample_counts(size, args.resamples, (args.seed, stream)).to(device)


def share_resamples(metric, features, counts, *others):
    """metric(features, counts, *others) -> [1 + R]; each process takes some rows of `counts`."""
    ours = processes.share(len(counts))
    values = metric(features, counts[ours.start : ours.stop], *others)
    return processes.gather(values, len(counts))


def estimates(args, outputs, P, scale, target, modes=None):
    """Outputs of the networks for N pictures of P prompts (0: unknown) -> {metric: [1 + R]}.

    The estimate comes first, then its resamples, in float64. All is a function of the seed, so two
    sets of one size are resampled alike, picture by picture: their difference is a paired one.
    scale: h of the Vendi score. target: mu, sigma and features of the real pictures, or None for
    the last. modes {name: [P]}: of the attributes that the prompts leave open.
    """
    features = outputs["features"]
    mu, sigma, real = target
    N = len(features)
    device = features.device
    values = {}
    if P:
        values |= prompt_estimates(args, outputs, P, scale, modes or {})

    # Diversity over all prompts, of some pictures at even steps: its kernel has n x n entries.
    some = features[metrics.evenly(N, MOST)]
    counts = resample_counts(args, len(some), SET_STREAM, device)
    values["vendi_set"] = share_resamples(metrics.resampled_vendi, some, counts, scale)
    values["distance_set"] = metrics.resampled_distance(some, counts)

    # Distance to the real pictures.
    counts = resample_counts(args, N, PICTURE_STREAM, device)
    values["fid"] = share_resamples(metrics.resampled_fid, features, counts, mu, sigma)
    if real is not None:
        some_real = real[metrics.evenly(len(real), MOST_REAL)]
        values["kid"] = share_resamples(metrics.resampled_kid, features, counts, some_real)

        # As many real pictures as generated ones, as the papers take. Recall and coverage are
        # means over the real pictures, so these are resampled.
        some_real = real[metrics.evenly(len(real), N)]
        real_counts = resample_counts(args, len(some_real), REAL_STREAM, device)
        for name, value in metrics.neighbourhoods(features, some_real).items():
            of_generated = name in ("precision", "density")
            rows = counts if of_generated else real_counts
            values[name] = metrics.resampled_mean(value, rows)
    return {name: value.cpu() for name, value in values.items()}


def prompt_estimates(args, outputs, P, scale, modes):
    """Alignment, and diversity within a prompt, as means over P prompts -> {metric: [1 + R]}.

    Prompts are resampled. One prompt says nothing about others, so it has no resamples: [1].
    """
    features = outputs["features"]
    by_prompt = {}  # {metric: [P]}
    for name, value in outputs.items():
        if name != "features":
            by_prompt[name] = value.reshape(P, -1).mean(1)
    for name, value in modes.items():
        by_prompt[name] = value.to(features.device)

    groups = features.reshape(P, len(features) // P, -1)  # [P, n, F]
    if groups.shape[1] > 1:
        vendi = [vendi_score(group, scale) for group in groups]
        distance = [mean_distance(group) for group in groups]
        smallest = [smallest_distance(group) for group in groups]
        by_prompt["vendi"] = groups.new_tensor(vendi, dtype=torch.float64)
        by_prompt["distance"] = groups.new_tensor(distance, dtype=torch.float64)
        by_prompt["distance_min"] = groups.new_tensor(smallest, dtype=torch.float64)

    counts = resample_counts(args, P, PROMPT_STREAM, features.device)
    if P == 1:
        counts = counts[:1]
    return {name: metrics.resampled_mean(value, counts) for name, value in by_prompt.items()}


def kernel_width(args, folder, sigma):
    """h of the Vendi score in the features of --features; sigma: the real pictures' covariance."""
    if args.features in TINY:
        with np.load(folder / args.features / "real.npz") as real:
            return float(real["scale"])
    mean_square_distance = 2 * float(sigma.trace())  # of two real pictures
    return math.sqrt(mean_square_distance) / 2


def score_sets(args, folder, sets):
    """Prints the table of one set, or of two and their difference; --out gets the numbers.

    folder: the model folder whose classifiers judge. Collective: call on every process.
    """
    device = processes.start(args.device)
    prompts = None
    if all(picture_set.prompts for picture_set in sets):
        prompts = sets[0].prompts
    sets = [dataclasses.replace(picture_set, prompts=prompts) for picture_set in sets]

    # What the files hold, and how many features there are, is known only now.
    with flags.refusing():
        networks = Networks(args, folder, prompts, device)
        first = [next(iter(picture_set.read([0], device))) for picture_set in sets]
        path = target_path(args.target, args.features, folder)
        target = load_target(path, networks.features, first[0])
    scale = kernel_width(args, folder, target[1])

    P = len(prompts) if prompts else 0
    found = []
    for picture_set in sets:
        outputs = network_outputs(picture_set, networks, device)
        modes = {}
        if networks.evaluator:
            modes = networks.modes(outputs.pop("values"), prompts)
        found.append(estimates(args, outputs, P, scale, target, modes))

    columns = {sets[0].name: found[0]}
    if len(sets) == 2:
        a, b = found
        columns = {}
        columns[f"A: {sets[0].name}"] = a
        columns[f"B: {sets[1].name}"] = b
        columns["B - A"] = {name: b[name] - a[name] for name in a}
    if processes.rank() == 0:
        report(args, sets, columns)


def report(args, sets, columns):
    """Prints {title: estimates} as a table and warns of collapse; --out gets the numbers."""
    P = len(sets[0].prompts) if sets[0].prompts else 0
    N = sets[0].total
    numbers = {}  # {title: {metric: (value, low, high)}}
    for title, values in columns.items():
        numbers[title] = {
            name: (float(value[0]), *metrics.interval(value)) for name, value in values.items()
        }

    drawn = f"{N} pictures of {P} prompts" if P else f"{N} pictures"
    intervals = f"95 % intervals of {args.resamples} resamples"
    print(f"{drawn}, in the features {args.features}; {intervals}")
    print("| metric | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for name in next(iter(columns.values())):
        cells = [cell(*found[name]) for found in numbers.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")

    collapsed = []
    for picture_set, (title, found) in zip(sets, numbers.items()):
        line = collapse(found, P, N)
        if line:
            collapsed.append(picture_set.name)
            print(f"COLLAPSED: {title}: {line}")
    if args.out:
        save_report(args, N, collapsed, numbers)


def cell(value, low, high):
    """A value and its interval, which is NaN where there is none."""
    if math.isnan(low):
        return f"{value:.4g}"
    return f"{value:.4g} [{low:.4g}, {high:.4g}]"


def collapse(found, P, N):
    """What to say of a set whose pictures are nearly alike, "" if they are not.

    found: {metric: (value, low, high)}. Fewer than eight pictures are too few to tell.
    """
    within_prompts = "vendi" in found
    vendi = found["vendi" if within_prompts else "vendi_set"][0]
    each = N // P if within_prompts else N
    if vendi >= compare.COLLAPSED or each < 8:
        return ""
    pictures = f"{each} pictures of a prompt" if within_prompts else f"{each} pictures"
    return f"{pictures} count as {vendi:.2f} different ones (Vendi)"


def save_report(args, N, collapsed, numbers):
    """Writes the JSON of --out; an interval that does not exist is null."""
    result = {"settings": vars(args), "pictures": N, "collapsed": collapsed, "metrics": {}}
    for title, found in numbers.items():
        column = {}
        for name, row in found.items():
            row = [None if math.isnan(number) else number for number in row]
            column[name] = dict(zip(("value", "low", "high"), row))
        result["metrics"][title] = column
    text = json.dumps(result, indent=2) + "\n"
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(args.out, lambda path: path.write_text(text))


# --------------------------------------------------------------------------------------------------
# The commands.


def compare_runs(args, runs):
    """Prints the table of the runs, and draws their figure if --out names one."""
    print(compare.table(runs), flush=True)
    if args.out:
        run_report.draw_runs(args.inputs, args.labels, args.out)
        print(f"{args.out}: written")


def show_grids(args, sheets):
    """Draws the grids of the runs side by side."""
    compare.draw_grids(sheets, args.out)
    print(f"{args.out}: written")


@record
def main(argv=None):
    """The command: checks everything, then runs what is asked for."""
    args = flags.parse_args(Args, __doc__, argv)
    with flags.refusing():
        args, inputs = check_eval(args, Args(args.command, args.inputs))
    with guards.writing(args.out or "stdout"):
        if args.command == "images":
            make_images(args, inputs)
        elif args.command == "score":
            folder, sets = inputs
            score_sets(args, folder, sets)
        elif processes.rank() == 0:
            if args.command == "compare":
                compare_runs(args, inputs)
            else:
                show_grids(args, inputs)
    processes.finish()


if __name__ == "__main__":
    main()
