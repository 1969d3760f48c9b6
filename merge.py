"""Merging checkpoints of one base, and RL over the merging coefficients (arXiv 2607.02291).

    python merge.py average A B C --out FOLDER                     theta = sum_k c_k theta_k
    python merge.py ema runs/x/snapshots/*-0.* --out FOLDER        post-hoc EMA of any length (EDM2)
    torchrun merge.py rl runs/x/snapshots/* --out FOLDER           c found by policy gradient

sum_k c_k = 1 and negative c_k are allowed, so a merge is a point of an affine space: c = c_0 + z Q.
c_0 is the best merge that needs no search. The rows of Q [K - 1, K] sum to zero and move the
weights equally far: snapshots of one run are nearly alike, and a step in plain coefficients would
go far along one direction and nowhere along the others. The policy is z ~ N(mean, std^2). Its
pictures come from the deterministic sampler that inference uses. The paper searches a vector for
the whole model; the space, the blocks and pricing against a reference set are our reading.
Left out on purpose: different architectures, and policies with a full covariance (CMA-ES).
"""

import copy
import json
import math
import time
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import bases
import dist_reward
import eval as evaluation
from bases.tensors import Over, block_of, open_weights, put
from commands import compare
from commands.checks import check_merge, numbers
from commands.picture_sets import generate, stream
from rewards import Reward
from rewards.targets import check_target, load_target, open_reference_set
from sampling import seeded_noise
from shaping import group_advantage
from support import files, flags, guards, processes
from support.averages import rivals, sweep

# Each purpose draws from its own stream of noise; 0 to 3 are the training's and the evaluation's.
SEARCH_STREAM, REFERENCE_STREAM, POLICY_STREAM, RANDOM_STREAM = 4, 5, 6, 7

# Shapes: K checkpoints, B blocks (1: the whole model), G candidates an update, n pictures of each,
#         M members of the reference set, P prompts, F features of a picture.


@dataclass
class Args:
    command: Literal["average", "ema", "rl"]
    """what to do"""
    checkpoints: list
    """models, snapshots of train.py or LoRA files, all of one base"""

    # any command
    out: str = ""
    """folder to write (required)"""
    model: str = ""
    """base model (default: what the checkpoints name)"""

    # average
    coefficients: str = ""
    """one number a checkpoint, as in 0.5,0.8,-0.3, of sum 1 (default: all equal)"""

    # ema and rl
    sigma_rel: str = "0.03,0.05,0.07,0.1,0.15,0.2"
    """lengths of the average relative to the training; ema writes a folder for each"""

    # rl: the policy
    blocks: bool = False
    """coefficients for each block of the network, not for the whole model"""
    updates: int = 30
    """policy updates"""
    group_size: int = 8
    """coefficient vectors an update, in mirrored pairs"""
    std: float = 0.1
    """the policy's std at the start, in units of the checkpoints' rms distance from their mean"""
    lr: float = 0.5
    """step of the mean, in units of its std; log std takes a tenth of it"""
    seed: int = 0
    """of the policy and of the search's noise"""

    # rl: the reward
    reward: str = "fid:1"
    """as train.py's"""
    features: str = "reward"
    """as train.py's"""
    target: str = ""
    """real pictures of the search (default: one half of them, the model folder's real-1.npz)"""
    images: int = 210
    """pictures of each coefficient vector; a multiple of the prompts, to which the default rises,
    as do those of --reference and --report_images"""
    reference: int = 1050
    """M, pictures of the mean's in the reference set, of which `images` are replaced"""
    prompts: str = ""
    """what is drawn (default: the model folder's prompts.jsonl)"""

    # rl: the table
    report_target: str = ""
    """real pictures of the table (default: the other half, real-2.npz; with --target, that one)"""
    report_images: int = 5000
    """pictures of each row, at noise that no search has seen"""
    report_seed: int = 1000
    """of that noise"""

    # rl: sampling, machine
    steps: int = 10
    """deterministic sampling steps"""
    guidance: float = 1.0
    """classifier-free guidance"""
    batch: int = 500
    """pictures in one forward: memory only"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the networks' forwards"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to run"""


# --------------------------------------------------------------------------------------------------
# Merging.


def merge(state_dicts, coefficients):
    """sum_k c_k theta_k, tensor by tensor: K mappings of the same names -> dict.

    coefficients: [K] (or [1, K]), or [B, K] with a row for each block in the order
    sorted({block_of(name)}). Rows sum to one.

    A checkpoint of coefficient 0 is not read, so a one-hot merge is that checkpoint bit for bit.
    Sums are float64 and come back in the widest type of the others. What is not a floating-point
    number (a counter) is taken from the checkpoint with the largest coefficient. Mappings may read
    lazily: one tensor of each is held at a time. Raises ValueError naming the first entry that
    differs, or if a row does not sum to one.

    >>> one, three = {"w": torch.tensor([1.0, 5.0])}, {"w": torch.tensor([3.0, 5.0])}
    >>> merge([one, three], [1.5, -0.5])  # beyond the first, away from the second
    {'w': tensor([0., 5.])}
    """
    first = state_dicts[0]
    blocks = sorted({block_of(name) for name in first})
    c = torch.as_tensor(coefficients, dtype=torch.float64)
    check_coefficients(c, len(state_dicts), len(blocks))
    for number, other in enumerate(state_dicts, 1):
        in_one_only = sorted(set(first) ^ set(other))
        if in_one_only:
            raise ValueError(
                f"checkpoint {number}: {in_one_only[0]} is in only one of it and the first"
            )
    rows = dict(zip(blocks, c.expand(len(blocks), -1).tolist()))
    return {name: merge_entry(name, state_dicts, rows[block_of(name)]) for name in first}


def check_coefficients(c, K, B):
    """Raises ValueError unless c is [K], [1, K] or [B, K] and each row sums to one."""
    if c.shape not in ((K,), (1, K), (B, K)):
        raise ValueError(
            f"coefficients of the shape {tuple(c.shape)} for {K} checkpoints and {B} blocks"
        )
    sums = c.sum(-1).flatten()
    error = (sums - 1).abs()
    if not (error < 1e-6).all():
        raise ValueError(f"coefficients sum to {sums[error.argmax()]:.6g}, not to 1")


def merge_entry(name, state_dicts, c):
    """One tensor of the merge, c a list of K numbers: the largest coefficients first."""
    used = [k for k in range(len(c)) if c[k]]
    used.sort(key=lambda k: -c[k])
    total = None
    types = []
    for k in used:
        value = state_dicts[k][name]
        if not value.is_floating_point():
            check_shape(name, k, value, total)
            return value.clone()
        check_shape(name, k, value, total)
        types.append(value.dtype)
        if total is None:
            total = c[k] * value.double()
        else:
            total.add_(value.double(), alpha=c[k])
    return total.to(reduce(torch.promote_types, types))


def check_shape(name, k, value, total):
    """Raises ValueError if checkpoint k's tensor has another shape than the sum so far."""
    if total is not None and value.shape != total.shape:
        raise ValueError(
            f"checkpoint {k + 1}: {name} has the shape {tuple(value.shape)}, "
            f"another {tuple(total.shape)}"
        )


# --------------------------------------------------------------------------------------------------
# The policy over the coefficients: pure functions.


def directions(views, blocks=1, floor=0.01):
    """Q [B, K - 1, K]: the principal directions of K checkpoints about their mean, by block.

    A row sums to zero, and a step of 1 along it moves the weights by the checkpoints' rms distance
    from their mean, whichever row. A direction in which they differ less than `floor` times as much
    as in the first is left out: its row is zero. Tensors are read one at a time.
    """
    K = len(views)
    names = sorted({block_of(name) for name in views[0]})
    gram = torch.zeros(blocks, K, K, dtype=torch.float64)
    for name in views[0]:
        if views[0][name].is_floating_point():
            x = torch.stack([view[name].double().flatten() for view in views])
            centred = x - x.mean(0)
            block = names.index(block_of(name)) if blocks > 1 else 0
            gram[block] += centred @ centred.T

    Q = torch.zeros(blocks, K - 1, K, dtype=torch.float64)
    for block in range(blocks):
        squares, vectors = torch.linalg.eigh(gram[block])
        is_kept = squares > floor**2 * squares.max()
        is_kept[0] = False  # the smallest is that of all alike, and only rounding
        scale = (squares.sum() / K / squares[is_kept]).sqrt()
        rows = (vectors[:, is_kept] * scale).T
        # eigh returns an arbitrary sign; fix it.
        largest = rows.abs().argmax(1, keepdim=True)
        rows = rows * rows.gather(1, largest).sign()
        Q[block, : len(rows)] = (rows - rows.mean(1, keepdim=True)).flip(0)
    return Q


def coefficients_of(z, start, Q):
    """c = c_0 + z Q: z [..., B, K - 1], start [K] of sum one, Q [B, K - 1, K] -> [..., B, K]."""
    return start + torch.einsum("...bi,bik->...bk", z, Q)


def policy_step(mean, log_std, z, advantage, lr):
    """One natural-gradient step of E[A] for z [G, ...] ~ N(mean, std^2) -> mean, log_std.

    grad log N times the inverse Fisher information is z - mean for the mean, and
    ((z - mean)^2 / std^2 - 1) / 2 for log std. In units of the policy's own std one lr serves
    however far the search has narrowed. advantage: [G].
    """
    std = log_std.exp()
    noise = (z - mean) / std
    ones = [1] * mean.dim()
    A = advantage.reshape(-1, *ones).double()
    new_mean = mean + lr * std * (A * noise).mean(0)
    new_log_std = log_std + 0.1 * lr * (A * (noise**2 - 1)).mean(0) / 2
    return new_mean, new_log_std


def distance_fall(members, new, replaced):
    """What the distance falls by if features new [n, F] replace the members `replaced` [n].

    Times M / n, as if all M members changed so.
    """
    M = len(members.features)
    if len(new) < M:
        return M / len(new) * members.price(new[None], replaced, "exact").item()
    changed = copy.deepcopy(members)  # a price of all M would need M^2 numbers
    changed.refresh(new)
    return members.value() - changed.value()


def members_of(update, n, M, P):
    """Which n of the M members an update replaces -> [n]: the next n / P of each prompt.

    Pictures of a prompt stand one after another. A new picture takes the place of one of its
    prompt; else the mixture of prompts in the reference would change, and be priced.
    """
    slots = (update * (n // P) + torch.arange(n // P)) % (M // P)
    first_of_prompt = torch.arange(P)[:, None] * (M // P)
    return (first_of_prompt + slots).flatten()


# --------------------------------------------------------------------------------------------------
# The search.


class Merges:
    """What merges of the checkpoints are worth by their pictures.

    It holds the model, the checkpoints, the prompts, the reward and its reference set.
    """

    def __init__(self, args, model, views, prompts):
        self.args = args
        self.model = model
        self.views = views
        self.prompts = prompts
        self.reward = Reward(args.reward, model.folder, model.device)
        self.reference_set = None
        if self.reward.distribution:
            blank = self.blank()
            self.reference_set = open_reference_set(
                self.reward.distribution,
                args.features,
                args.target,
                model.folder,
                args.reference,
                blank,
            )
            D = self.reference_set.features(blank).shape[1]
            check_target(Path(args.report_target), D)

    @property
    def members(self):
        """The reference set's members, or None."""
        return self.reference_set.members if self.reference_set else None

    def blank(self):
        """One picture [1, 3, H, W] as the model makes them."""
        return self.model.decode(torch.zeros(1, *self.model.shape, device=self.model.device))

    def batches(self, c, numbers, count, key):
        """Draws the pictures `numbers` of `count` by the merge with c [K] or [B, K].

        Every prompt has equally many. Yields (b prompts, b pictures).
        """
        args = self.args
        put(self.model.network, merge(self.views, c))
        each = count // len(self.prompts)
        drawn = stream(
            self.model, self.prompts, each, numbers, args.steps, args.guidance, key, args.batch
        )
        for batch_numbers, images in drawn:
            yield [self.prompts[number // each] for number in batch_numbers.tolist()], images

    def features_of(self, c, count, key):
        """Features [count, F] of a merge's pictures; each process draws its share."""
        features = [self.members.features[:0]]  # a process may have no picture
        for _, images in self.batches(c, processes.share(count), count, key):
            features.append(self.reference_set.features(images))
        return processes.gather(torch.cat(features), count)

    def worth(self, c, count, key, members, replaced):
        """Rewards {name: number} of one merge: means over its pictures, and the distance's fall."""
        totals = dict.fromkeys(self.reward.weights, 0.0)
        features = []
        for prompts, images in self.batches(c, range(count), count, key):
            texts = [prompt.text for prompt in prompts]
            metadata = [prompt.metadata for prompt in prompts]
            for name, values in self.reward(images, texts, metadata).items():
                totals[name] += values.double().sum().item() / count
            if members:
                features.append(self.reference_set.features(images))
        if members:
            fall = distance_fall(members, torch.cat(features), replaced)
            totals[self.reward.distribution] = fall
        return totals

    def group(self, candidates, count, key, members, replaced):
        """Rewards {name: [G]} of candidates c [G, B, K], at the same noise and prompts.

        Each process builds, draws and prices its own candidates. members: the reference set that
        prices (None: no such reward), of which `replaced` [count] change.
        """
        names = list(self.reward.weights)
        share = processes.share(len(candidates))
        rows = []
        for c in candidates[share.start : share.stop]:
            totals = self.worth(c, count, key, members, replaced)
            rows.append([totals[name] for name in totals])
        rows = torch.tensor(rows, dtype=torch.float64, device=self.model.device)
        rows = processes.gather(rows.reshape(-1, len(names)), len(candidates))  # [G, names]
        return dict(zip(names, rows.T.cpu()))

    def advantage(self, rewards):
        """Rewards {name: [G]} -> [G]: each centred, in units of its std, then weighted."""
        total = 0
        for name, weight in self.reward.weights.items():
            values = rewards[name][None]  # one group
            index = torch.arange(values.shape[1])[None]
            total = total + weight * group_advantage(values, index)[0]
        return total


class Search:
    """The policy's updates, each beside as many random vectors at equal cost.

    Both start from the best of `fixed`, {name: coefficients [K]}, by its own M pictures.
    """

    def __init__(self, args, merges, blocks, fixed):
        G, K = args.group_size, len(merges.views)
        self.args = args
        self.merges = merges
        self.fixed = fixed
        self.shape = (blocks, K - 1)
        self.names = list(merges.reward.weights)
        count = len(self.names)
        self.state = {
            "mean": zeros(self.shape),
            "log_std": zeros(self.shape) + math.log(args.std),
            "fixed": zeros((count, len(fixed))),  # rewards of the fixed merges
            "random": zeros((count, args.updates * G)),  # rewards of the random vectors
            "directions": zeros((blocks, K - 1, K)),
        }
        self.tensors = self.state
        if merges.members:
            self.tensors = self.state | merges.members.state()

    def draw(self, stream, update, count):
        """Standard normal vectors [count, B, K - 1]."""
        key = (stream, self.args.seed, update)
        return seeded_noise(key, range(count), self.shape).double()

    def coefficients(self, z):
        """z [..., B, K - 1] -> c [..., B, K]."""
        return coefficients_of(z, self.start, self.state["directions"])

    def rewards_of(self, name):
        """The kept rewards of the fixed or the random merges -> {name: [...]}."""
        return dict(zip(self.names, self.state[name]))

    def begin(self, checkpoint):
        """Chooses c_0 and its reference set; of a new search, after pricing the fixed merges."""
        args, merges, members = self.args, self.merges, self.merges.members
        M = args.reference
        key = (REFERENCE_STREAM, args.seed)
        if checkpoint:
            files.load_checkpoint(checkpoint, self.tensors)
        else:
            # Every fixed merge is priced by replacing all of one reference set.
            if members:
                members.refresh(merges.features_of(self.fixed["uniform average"], M, key))
            candidates = torch.stack(list(self.fixed.values()))[:, None]
            rewards = merges.group(candidates, M, key, members, torch.arange(M))
            self.state["fixed"].copy_(torch.stack([rewards[name] for name in self.names]))
            self.state["directions"].copy_(directions(merges.views, self.shape[0]))

        worth = merges.advantage(self.rewards_of("fixed")).tolist()
        self.worth = dict(zip(self.fixed, worth))
        self.start = self.fixed[max(self.worth, key=self.worth.get)]
        # The pictures of c_0 stay as they are for the random vectors.
        self.start_members = copy.deepcopy(members)
        if members:
            self.start_members.refresh(merges.features_of(self.start, M, key))
            if not checkpoint:
                members.refresh(self.start_members.features)

    def step(self, update):
        """One update of the policy -> metrics."""
        args, merges, state = self.args, self.merges, self.state
        members, n = merges.members, args.images
        replaced = members_of(update, n, args.reference, len(merges.prompts))
        key = (SEARCH_STREAM, args.seed, update)

        # A group of coefficients, in mirrored pairs, and what they are worth.
        noise = self.draw(POLICY_STREAM, update, args.group_size // 2)
        z = state["mean"] + state["log_std"].exp() * torch.cat([noise, -noise])  # [G, B, K - 1]
        rewards = merges.group(self.coefficients(z), n, key, members, replaced)

        # A step towards the better ones.
        advantage = merges.advantage(rewards)
        mean, log_std = policy_step(state["mean"], state["log_std"], z, advantage, args.lr)
        state["mean"].copy_(mean)
        state["log_std"].copy_(log_std)
        c = self.coefficients(state["mean"])  # [B, K]
        if members:  # the mean's pictures, at the noise that the group had
            members.replace(replaced, merges.features_of(c, n, key))
        self.try_random(update)

        metrics = {"update": update + 1}
        for name, value in rewards.items():
            metrics[f"reward/{name}"] = value.mean().item()
        if members:
            metrics["reference"] = members.value()
        metrics["coefficients"] = c.tolist()
        metrics["std"] = state["log_std"].exp().mean(1).tolist()
        metrics["sum_error"] = (c.sum(1) - 1).abs().max().item()
        return metrics

    def random_coefficients(self, update):
        """The random vectors that stand beside an update's group -> c [G, B, K]."""
        z = self.args.std * self.draw(RANDOM_STREAM, update, self.args.group_size)
        return self.coefficients(z)

    def try_random(self, update):
        """As many random vectors as the group has, all at one noise and one reference set."""
        args, merges, G = self.args, self.merges, self.args.group_size
        rewards = merges.group(
            self.random_coefficients(update),
            args.images,
            (SEARCH_STREAM, args.seed, 0),
            self.start_members,
            members_of(0, args.images, args.reference, len(merges.prompts)),
        )
        columns = slice(update * G, (update + 1) * G)
        self.state["random"][:, columns] = torch.stack([rewards[name] for name in self.names])

    def best_of(self, names):
        """The fixed merge that is worth most."""
        return max(names, key=self.worth.get)

    def found(self):
        """The rivals' best and what the policy found -> {name: coefficients}."""
        rows = {}
        single = self.best_of(list(self.fixed)[: len(self.merges.views)])
        rows[f"best single checkpoint ({single})"] = self.fixed[single]
        rows["uniform average"] = self.fixed["uniform average"]
        lengths = [name for name in self.fixed if name.startswith("EMA ")]
        if lengths:
            best = self.best_of(lengths)
            rows[f"best post-hoc {best}"] = self.fixed[best]
        G = self.args.group_size
        number = int(self.merges.advantage(self.rewards_of("random")).argmax())
        rows["random search"] = self.random_coefficients(number // G)[number % G]
        rows["RL"] = self.coefficients(self.state["mean"])
        return rows


def zeros(shape):
    """float64 zeros."""
    return torch.zeros(shape, dtype=torch.float64)


def search(args, merges, blocks, fixed, log, interrupt):
    """Runs the search, or what is left of it -> {name: coefficients}; None if it was stopped."""
    out = Path(args.out)
    task = Search(args, merges, blocks, fixed)
    checkpoint, state = files.newest_checkpoint(out)
    device = merges.model.device
    guards.check_start(out, state["step"], device)
    task.begin(checkpoint)
    updates = tqdm(
        range(state["step"], args.updates),
        initial=state["step"],
        total=args.updates,
        disable=processes.rank() > 0,
        desc="merge rl",
    )
    for update in updates:
        began = time.time()
        metrics = task.step(update)
        metrics["seconds"] = time.time() - began
        log.write(metrics)
        files.save_checkpoint(out, update + 1, task.tensors, None, log.lines, 2)
        if interrupt.asked(device):
            return None
    return task.found()


# --------------------------------------------------------------------------------------------------
# The table.


def report(args, merges, base, eval_prompts, rows):
    """Each row's merge judged by fresh pictures, {name: coefficients, or None: the base}.

    The real pictures are those of --report_target, the half that no search has seen unless
    --target alone was given. base: the base's tensors. -> markdown
    """
    model = merges.model
    other = "reward" if args.features == "evaluator" else "evaluator"  # it was not searched by
    judge = None
    if (model.folder / other).is_dir():
        judge = evaluation.Judge(model.folder, other, model.device, "real-2.npz")
    target = None
    if merges.reference_set:
        mu, sigma, _ = load_target(
            Path(args.report_target), merges.reference_set.features, merges.blank()
        )
        target = (mu, sigma)

    lines = []
    for name, c in rows.items():
        put(model.network, base if c is None else merge(merges.views, c))
        scores = judged(args, merges, eval_prompts, judge, target)
        cells = [f"{value:.3f}" for value in scores.values()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    head = "| " + " | ".join(["merge", *scores]) + " |"
    rule = "|---" * (1 + len(scores)) + "|"
    return "\n".join([head, rule, *lines])


def judged(args, merges, eval_prompts, judge, target):
    """The table's numbers for the network as it is now -> {column: number}."""
    each = args.report_images // len(eval_prompts)
    images = generate(
        merges.model,
        eval_prompts,
        each,
        args.steps,
        args.guidance,
        args.report_seed,
        args.batch,
    )
    prompts = [prompt for prompt in eval_prompts for _ in range(each)]
    texts = [prompt.text for prompt in prompts]
    metadata = [prompt.metadata for prompt in prompts]

    scores = {}
    for name, value in merges.reward(images, texts, metadata).items():
        scores[f"reward {name}"] = value.double().mean().item()
    if target:
        parts = [merges.reference_set.features(part) for part in images.split(args.batch)]
        mu, sigma = dist_reward.moments(torch.cat(parts))
        scores["FD, searched features"] = dist_reward.frechet_distance(mu, sigma, *target)
    if judge:
        found = evaluation.score(images, eval_prompts, judge.network, judge.real)
        scores["FD, held-out features"] = found["fid"]
        scores["Vendi"] = found["vendi"]
        scores["accuracy"] = found["accuracy"]
    return scores


# --------------------------------------------------------------------------------------------------
# The commands.


@record
def main(argv=None):
    """The command: checks everything, then merges or searches."""
    args = flags.parse_args(Args, __doc__, argv)
    with flags.refusing():
        default = Args(args.command, args.checkpoints)
        args, name, views, prompts, eval_prompts = check_merge(args, default)
    with guards.writing(args.out):
        if args.command == "rl":
            rl(args, name, views, prompts, eval_prompts)
        elif processes.rank() == 0:
            average(args, name, views)
    processes.finish()


def average(args, name, views):
    """`average` and `ema`: the merged model in args.out, or one of each length in folders there.

    Beside several lies config.json, so that the same command makes those that are missing.
    """
    lengths = numbers("sigma_rel", args.sigma_rel)
    rows = [numbers("coefficients", args.coefficients) or [1 / len(views)] * len(views)]
    if args.command == "ema":
        rows = sweep(views, lengths)
    with flags.refusing():
        model = bases.load(name)

    out = Path(args.out)
    folders = [out]
    if len(rows) > 1:
        folders = [out / str(length) for length in lengths]
        out.mkdir(parents=True, exist_ok=True)
        config = json.dumps(vars(args), indent=2) + "\n"
        files.write_atomic(out / "config.json", lambda path: path.write_text(config))
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, c in zip(folders, rows):
        if not path.exists():
            put(model.network, merge(views, c))
            files.save_model(path, model)
        terms = [f"{x:.4f} {Path(p).stem or p}" for x, p in zip(c, args.checkpoints)]
        print(f"{path}: " + ", ".join(terms))


def rl(args, name, views, prompts, eval_prompts):
    """`rl`: search, table, plot and the merged model, in args.out. name: of the base."""
    device = processes.start(args.device)
    out = Path(args.out)
    blocks = len({block_of(name) for name in views[0]}) if args.blocks else 1
    with flags.refusing():  # some mistakes show only when files are read whole
        model = bases.load(name, device, args.precision)
        base = open_weights(name)
        model.encode([prompt.text for prompt in prompts + eval_prompts])
        merges = Merges(args, model, views, prompts)

    fixed = rivals(views, args.checkpoints, numbers("sigma_rel", args.sigma_rel))
    log = files.Log(out, vars(args), files.newest_checkpoint(out)[1]["lines"])
    with processes.Interrupt() as interrupt:
        found = search(args, merges, blocks, fixed, log, interrupt)
    if found is None:
        interrupt.leave(files.stopped(out, interrupt.signal))

    base = Over({}, base, list(views[0]))
    table = report(args, merges, base, eval_prompts, {"base model": None} | found)
    put(model.network, merge(views, found["RL"]))
    files.save_model(out / "model", model)
    if processes.rank() == 0:
        files.write_atomic(out / "table.md", lambda path: path.write_text(table + "\n"))
        names = [Path(path).stem or path for path in args.checkpoints]
        compare.draw_coefficients(out, names)
        print(table)
        print(f"{out}: coefficients.png, table.md, and the merged model in model/")


if __name__ == "__main__":
    main()
