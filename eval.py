"""Evaluation: how well a model does what was asked, and how different its pictures are. Judged by a network that training never sees.

    python eval.py images MODEL --n 1000 --out DIR          pictures: a folder of PNG, or one FILE.npz as evaluation suites read it
    python eval.py score MODEL|DIR|FILE.npz [SECOND]        alignment, diversity and distance to real pictures, with 95 % intervals
    python eval.py compare RUN... --out compare.png         runs of train.py, compared where they are equally good
    python eval.py grid RUN... --out grid.png               the same noise before, and after each run
The first two also as `torchrun --nproc_per_node 8 -- eval.py ...` (without the --, torchrun takes --n for its own): any number of processes,
and any --batch, gives the same pictures. Pictures come from the deterministic sampler at clean prompts and fixed seeds, the same ones for every
model, n for each of P prompts.
    accuracy, log_prob        of the prompt's class under the evaluator (log_prob in nats, floored like the reward)         alignment
    vendi, distance           within a prompt, mean over prompts; distance_min of the two nearest; ..._set over all         diversity
    fid, kid, precision, recall, density, coverage          against real pictures; compare them at equal n                  both
in the evaluator's 64 features, or in those of --features; h of the Vendi score is half the real pictures' mean distance within a class in the
features of the model folder's classifiers, and half the root mean square distance of any two in all others.
Left out here: metrics that need another network than the features, and file formats that can run code.
"""
import dataclasses
import json
import math
import numpy as np
import torch
from dataclasses import dataclass
from pathlib import Path
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm
from typing import Literal
from commands import compare
import rewards
from rewards import classifier
from rewards import metrics
from support import files
from support import flags
from support import guards
from support import processes
from commands.picture_sets import generate, make_images
from dist_reward import frechet_distance, moments
from rewards.features import TINY, load_features
from rewards.metrics import mean_distance, smallest_distance, vendi_score
from rewards.targets import load_target, target_path
from shaping import group_diversity
from support.processes import gather, share

MOST, MOST_REAL = 1000, 10000                                            # pictures of which ..._set is taken; real pictures of which KID is


@dataclass
class Args:
    command: Literal["images", "score", "compare", "grid"]  # what to do
    inputs: list                                    # images: a model folder; score: one or two of model, folder of pictures, .npz; else run folders
    out: str = ""                                   # to write: folder or .npz (images), .json (score, optional), .png (compare, optional; grid)
    # images and score
    n: int = 0                                      # pictures, a multiple of the prompts (default: 1000 of a model, all of a folder or .npz)
    prompts: str = ""                               # what is drawn (default: the model folder's eval_prompts.jsonl; of pictures: what their config.json says)
    seed: int = 0                                   # of the pictures' noise, and of the resampling
    steps: int = 10                                 # deterministic sampling steps, of a model
    guidance: float = 1.0                           # classifier-free guidance, of a model
    precision: Literal["float32", "bfloat16"] = "float32"  # of the model's forwards
    batch: int = 500                                # pictures in one forward of a process: memory only
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to run
    # score
    model: str = ""                                 # folder whose classifiers judge (default: the first input's model, else assets/tiny)
    reward: str = ""                                # rewards to report, as train.py's (default: class, where the folder has its classifier)
    features: str = "evaluator"                     # of diversity and distances: evaluator, reward, inception:FILE, dinov2, clip, module:function
    target: str = ""                                # real pictures, folder or idx file; or moments, .npz, for FID alone (default: the model folder's)
    resamples: int = 200                            # bootstrap resamples behind an interval
    # compare and grid
    labels: str = ""                                # one a run; equal labels are seeds of one method (default: the folder's name without -NUMBER)


class Judge:
    """A classifier that a run is judged by, and the moments of the real pictures in its features: a folder as assets/tiny/evaluator."""

    def __init__(self, model_folder, name, device="cpu", real="real.npz"):
        self.network, self.real = classifier.load_classifier(Path(model_folder) / name, device), np.load(Path(model_folder) / name / real)


def alignment(logits, labels):
    """Logits [B, 10] of the evaluator, labels [B] -> {name: [B]}."""
    log_p = logits.log_softmax(1)
    return {"accuracy": (log_p.argmax(1) == labels).double(), "log_prob": log_p.gather(1, labels[:, None])[:, 0].clamp(min=classifier.FLOOR).double()}


@torch.inference_mode()
def score(images, labels, evaluator, real):
    """images [P * n, 3, H, W], labels [P] -> {metric: number}. real: an npz with mu, sigma, scale in the evaluator's features."""
    features = torch.cat([evaluator.features(x) for x in images.split(500)])
    groups = features.reshape(len(labels), -1, features.shape[1])
    target = torch.tensor(labels, device=images.device).repeat_interleave(groups.shape[1])
    return {name: value.mean().item() for name, value in alignment(evaluator.head(features), target).items()} | {
        "vendi": sum(vendi_score(f, float(real["scale"])) for f in groups) / len(groups),
        "distance": sum(mean_distance(f) for f in groups) / len(groups),
        "fid": frechet_distance(*moments(features.cpu()), real["mu"], real["sigma"])}


@torch.inference_mode()
def score_without_judge(images, prompts, reward, look, batch):
    """For a base that nobody was trained to judge: the rewards themselves, and the diversity of P prompts' pictures [P * n, 3, H, W] in the space
    of --diversity_features (None: pixels), with the cosine as kernel. -> {metric: number}; the rewards are what training raises, so beware."""
    who = [prompt for prompt in prompts for _ in range(len(images) // len(prompts))]
    terms = reward(images, [p.text for p in who], [p.metadata for p in who])
    features = torch.cat([look(x) if look else x.flatten(1) for x in images.split(batch)]).double()
    groups = torch.nn.functional.normalize(features, dim=1).reshape(len(prompts), -1, features.shape[1])
    l = torch.linalg.eigvalsh(groups @ groups.transpose(1, 2) / groups.shape[1]).clamp(min=0)         # [P, n]
    return {f"reward_{name}": value.double().mean().item() for name, value in terms.items()} | {
        "vendi": torch.exp(-torch.special.xlogy(l, l).sum(1)).mean().item(),
        "distance": group_diversity(groups, "cosine").double().mean().item()}


def evaluate(args, model, judged, judge, reward, look, measure, target, iteration):
    """What train.py logs: pictures at held-out seeds, the same ones every time -> {"eval/...": number}, and grids/NNNNN.png."""
    images = generate(model, judged, args.eval_images // len(judged), args.eval_steps, args.guidance, args.eval_seed, args.batch)
    if processes.rank() == 0:
        files.save_grid(Path(args.out) / "grids" / f"{iteration:05d}.png", images.reshape(len(judged), -1, *images.shape[1:])[:, :10])
    if judge:
        scores = score(images, [p.metadata["label"] for p in judged], judge.network, judge.real)
    else:
        scores = score_without_judge(images, judged, reward, look, args.reward_batch or args.batch)
    if measure:
        trained = torch.cat([measure(x) for x in images.split(args.reward_batch or args.batch)])
        scores["fid_trained"] = frechet_distance(*moments(trained), *target)
    return {"eval/" + name: value for name, value in scores.items()}


class Evaluator:
    """What a training is judged by, at the same prompts and noise every time."""

    def __init__(self, args, setup, prompts, device):
        self.args, self.setup, self.prompts = args, setup, prompts
        folder = setup.model.folder
        rewarded_by_evaluator = args.features == "evaluator" and setup.reference_set
        name = "reward" if rewarded_by_evaluator else "evaluator"           # who judges is not who rewards
        self.judge = Judge(folder, name, device) if (folder / name).is_dir() else None

    def __call__(self, iteration):
        setup = self.setup
        members = setup.reference_set
        with setup.averages.applied():
            return evaluate(self.args, setup.model, self.prompts, self.judge, setup.reward, setup.diversity_features,
                            members and members.features, members and members.target, iteration)





def open_networks(args, folder, labelled, device):
    """-> see: pictures [B, 3, H, W] and their B prompts (or None) -> {"features": [B, D]} and, if there are prompts, the alignments [B]."""
    network = load_features(args.features, folder, device)
    evaluator = classifier.load_classifier(folder / "evaluator", device) if labelled and (folder / "evaluator").is_dir() else None
    reward = rewards.Reward(args.reward, folder, device) if args.reward else None

    @torch.inference_mode()
    def see(images, prompts=None):
        found = {"features": network(images)}
        if evaluator and prompts:
            found |= alignment(evaluator(images), torch.tensor([p.metadata["label"] for p in prompts], device=device))
        if reward and prompts:
            terms = reward(images, [p.text for p in prompts], [p.metadata for p in prompts])
            found |= {"reward/" + name: value.double() for name, value in terms.items()}
        return found
    return see


def look_at(chosen, see, device):
    """What the networks see in a set, each process its share -> {name: [N, ...]} on every process."""
    mine, rows, at = share(chosen.total), [], 0
    bar = tqdm(total=len(mine), disable=processes.rank() > 0, desc=chosen.name[-30:], unit="")
    for images in chosen.read(mine, device):
        numbers = mine[at:at + len(images)]
        rows.append(see(images, [chosen.prompts[i * len(chosen.prompts) // chosen.total] for i in numbers] if chosen.prompts else None))
        at += len(images)
        bar.update(len(images))
    bar.close()
    return {name: gather(torch.cat([row[name] for row in rows]), chosen.total) for name in rows[0]}


def estimates(args, found, P, scale, target):
    """What was seen in a set of N pictures of P prompts (0: unknown) -> {metric: float64 [1 + resamples]}, the metric and its resamples.

    A function of the seed, so that two sets of one size are resampled alike, prompt by prompt and picture by picture: their difference is
    a paired one. scale: h of the Vendi score; target: mu, sigma and features of the real pictures, or None for the last.
    """
    features, (mu, sigma, real), values = found["features"], target, {}
    N, counts = len(features), lambda n, stream: metrics.resample_counts(n, args.resamples, (args.seed, stream)).to(features.device)

    def shared(function, rows, *inputs):                                 # each process takes its share of the resamples
        mine = share(len(rows))
        return gather(function(inputs[0], rows[mine.start:mine.stop], *inputs[1:]), len(rows))
    if P:
        by_prompt = {name: value.reshape(P, -1).mean(1) for name, value in found.items() if name != "features"}
        groups = features.reshape(P, N // P, -1)
        if N // P > 1:
            for name, function in (("vendi", lambda f: vendi_score(f, scale)), ("distance", mean_distance), ("distance_min", smallest_distance)):
                by_prompt[name] = torch.tensor([function(f) for f in groups], dtype=torch.float64, device=features.device)
        rows = counts(P, 0)[:None if P > 1 else 1]                       # one prompt says nothing about others: no interval
        values |= {name: metrics.resampled_mean(value, rows) for name, value in by_prompt.items()}
    few = features[metrics.evenly(N, MOST)]
    values["vendi_set"] = shared(metrics.resampled_vendi, counts(len(few), 2), few, scale)
    values["distance_set"] = metrics.resampled_distance(few, counts(len(few), 2))
    values["fid"] = shared(metrics.resampled_fid, counts(N, 1), features, mu, sigma)
    if real is not None:
        values["kid"] = shared(metrics.resampled_kid, counts(N, 1), features, real[metrics.evenly(len(real), MOST_REAL)])
        real = real[metrics.evenly(len(real), N)]                        # as many as generated, as the papers do
        for name, value in metrics.neighbourhoods(features, real).items():
            values[name] = metrics.resampled_mean(value, counts(N, 1) if name in ("precision", "density") else counts(len(real), 3))
    return {name: value.cpu() for name, value in values.items()}


def score_sets(args, folder, sets):
    """Prints the table of one set, or of two and their difference; --out writes the numbers."""
    device, prompts = processes.start(args.device), sets[0].prompts if all(s.prompts for s in sets) else None
    sets = [dataclasses.replace(s, prompts=prompts) for s in sets]
    with flags.refusing():                                             # what the files hold, and how many features there are, is known only now
        see = open_networks(args, folder, bool(prompts) and "label" in prompts[0].metadata, device)
        first, *_ = [next(iter(s.read([0], device))) for s in sets]
        target = load_target(target_path(args.target, args.features, folder), lambda images: see(images)["features"], first)
    if args.features in TINY:
        with np.load(folder / args.features / "real.npz") as real:
            scale = float(real["scale"])
    else:                                                                # half the root mean square distance of two real pictures, 2 tr C
        scale = math.sqrt(2 * float(target[1].trace())) / 2
    found = [estimates(args, look_at(s, see, device), len(prompts or ()), scale, target) for s in sets]
    columns = {sets[0].name: found[0]}
    if len(sets) == 2:
        a, b = found
        columns = {f"A: {sets[0].name}": a, f"B: {sets[1].name}": b, "B - A": {name: b[name] - a[name] for name in a}}
    if processes.rank() == 0:
        report(args, sets, columns)


def report(args, sets, columns):
    """Columns {title: estimates} -> a markdown table on stdout, a line for each collapsed set, and the numbers in --out."""
    P, N = len(sets[0].prompts or ()), sets[0].total
    numbers = {title: {name: [float(values[0]), *metrics.interval(values)] for name, values in column.items()} for title, column in columns.items()}
    print(f"{N} pictures" + f" of {P} prompts" * bool(P) + f", in the features {args.features}; 95 % intervals of {args.resamples} resamples")
    print("| metric | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|", sep="\n")
    for name in next(iter(columns.values())):
        rows = [found[name] for found in numbers.values()]
        cells = [f"{value:.4g}" + f" [{low:.4g}, {high:.4g}]" * (not math.isnan(low)) for value, low, high in rows]
        print(f"| {name} | " + " | ".join(cells) + " |")
    collapsed = []
    for picture_set, (title, found) in zip(sets, numbers.items()):
        number, each = found.get("vendi", found["vendi_set"])[0], N // P if "vendi" in found else N
        if number < compare.COLLAPSED and each >= 8:
            collapsed.append(picture_set.name)
            print(f"COLLAPSED: {title}: {each} pictures" + " of a prompt" * ("vendi" in found) + f" count as {number:.2f} different ones (Vendi)")
    if args.out:
        whole = {"settings": vars(args), "pictures": N, "collapsed": collapsed, "metrics": {
            title: {name: {key: None if math.isnan(x) else x for key, x in zip(("value", "low", "high"), row)} for name, row in found.items()}
            for title, found in numbers.items()}}
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(args.out, lambda path: path.write_text(json.dumps(whole, indent=2) + "\n"))


@record
def main(argv=None):
    from commands.checks import check_eval
    args = flags.parse_args(Args, __doc__, argv)
    with flags.refusing():
        args, opened = check_eval(args, Args(args.command, args.inputs))
    with guards.writing(args.out or "stdout"):
        if args.command == "images":
            make_images(args, opened)
        elif args.command == "score":
            score_sets(args, *opened)
        elif processes.rank() == 0:
            if args.command == "compare":
                print(compare.table(opened), flush=True)
            if args.out:
                Path(args.out).parent.mkdir(parents=True, exist_ok=True)
                (compare.draw if args.command == "compare" else compare.draw_grids)(opened, args.out)
                print(f"{args.out}: written")
    processes.finish()
if __name__ == "__main__":
    main()
