"""Merging checkpoints of one base, and RL over the merging coefficients (distribution-wise rewards, arXiv 2607.02291, second half).

    python merge.py average A B C --out FOLDER                                      theta = sum_k c_k theta_k, sum_k c_k = 1; negatives are allowed
    python merge.py ema runs/x/snapshots/*-0.* --sigma_rel 0.15 --out FOLDER        post-hoc EMA of any length (EDM2, arXiv 2312.02696, section 3.1)
    torchrun merge.py rl runs/x/snapshots/* --out FOLDER                            coefficients found by policy gradient, beside every baseline
A merge is a point c of an affine space, c = c_0 + z Q: c_0 is the best merge that needs no search, and the rows of Q [K - 1, K] sum to zero and move
the weights equally far (snapshots of one run are nearly alike: a step in plain coefficients goes far along one direction and nowhere along the others).
The policy is z ~ N(mean, std^2). Its pictures come from the deterministic sampler that inference uses: the randomness of RL is in the weights' place,
not in the step's. The paper's abstract says no more than this; the policy, its space, the blocks and the pricing against a pool are our reading.
Left out: merging models of different architectures, and policies with a full covariance (CMA-ES; there are fewer than 20 numbers).
"""
import copy
import json
import math
import time
import torch
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm
from typing import Literal
import bases
from bases import files as base_files
from commands import compare
from commands import picture_sets
import dist_reward
import eval as evaluation
from support import files
from support import flags
from support import guards
from support import processes
from bases.tensors import Over, Weights, block_of, put
from commands.checks import check_merge, numbers
from commands.picture_sets import stream
from rewards import Reward
from rewards.targets import check_target, load_target, open_reference_set
from sampling import seeded_noise
from shaping import group_advantage
from support.averages import rivals, sweep

SEARCH_STREAM, POOL_STREAM, POLICY_STREAM, RANDOM_STREAM = 4, 5, 6, 7    # 0 to 3 are the training's and the evaluation's


@dataclass
class Args:
    command: Literal["average", "ema", "rl"]        # what to do
    checkpoints: list                               # model folders, snapshots of train.py or LoRA files, all of one base
    # any command
    out: str = ""                                   # folder to write (required)
    model: str = ""                                 # base model folder (default: what the checkpoints name)
    # average
    coefficients: str = ""                          # one number a checkpoint, as in 0.5,0.8,-0.3; they must sum to 1 (default: all equal)
    # ema and rl
    sigma_rel: str = "0.03,0.05,0.07,0.1,0.15,0.2"  # lengths of the average relative to the training; ema writes a folder for each
    # rl: the policy
    blocks: bool = False                            # coefficients for each block of the network, not for the whole model
    updates: int = 30                               # policy updates
    group_size: int = 8                             # coefficient vectors an update, in mirrored pairs
    std: float = 0.1                                # the policy's std at the start, in units of the checkpoints' rms distance from their mean
    lr: float = 0.5                                 # step of the mean, in units of its std; log std takes a tenth of it
    seed: int = 0                                   # of the policy and of the search's noise
    # rl: the reward
    reward: str = "fid:1"                           # as train.py's
    features: str = "reward"                        # as train.py's
    target: str = ""                                # real pictures of the search (default: one half, the model folder's real-1.npz)
    images: int = 210                               # pictures of each coefficient vector; a multiple of the prompts
    reference: int = 1050                           # M, pictures of the mean's in the reference, of which `images` are replaced
    prompts: str = ""                               # what is drawn (default: the model folder's prompts.jsonl)
    # rl: the table
    report_target: str = ""                         # real pictures of the table (default: the other half, real-2.npz; with a --target, that one)
    report_images: int = 5000                       # pictures of each row, at noise that no search has seen
    report_seed: int = 1000                         # of that noise
    # rl: sampling, machine
    steps: int = 10                                 # deterministic sampling steps
    guidance: float = 1.0                           # classifier-free guidance
    batch: int = 500                                # pictures in one forward: memory only
    precision: Literal["float32", "bfloat16"] = "float32"  # of the networks' forwards
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to run


def merge(state_dicts, coefficients):
    """sum_k c_k theta_k, tensor by tensor: K mappings of the same names and shapes, coefficients [K] (or [1, K]) or [B, K] -> dict.

    Rows of [B, K] belong to the blocks in the order sorted({block_of(name)}). A checkpoint of coefficient 0 is not even read, so that a one-hot
    merge is that checkpoint bit for bit; sums are float64 and come back in the widest type of the others. What is no floating-point number
    (a counter) is taken from the checkpoint with the largest coefficient. Mappings may read lazily: one tensor of each is held at a time.
    Raises ValueError naming the first entry that differs, or if a row does not sum to one.

    >>> merge([{"w": torch.tensor([1.0, 5.0])}, {"w": torch.tensor([3.0, 5.0])}], [1.5, -0.5])    # beyond the first, away from the second
    {'w': tensor([0., 5.])}
    """
    first, c = state_dicts[0], torch.as_tensor(coefficients, dtype=torch.float64)
    blocks = sorted({block_of(name) for name in first})
    if c.shape not in ((len(state_dicts),), (1, len(state_dicts)), (len(blocks), len(state_dicts))):
        raise ValueError(f"coefficients of the shape {tuple(c.shape)} for {len(state_dicts)} checkpoints and {len(blocks)} blocks")
    if not ((c.sum(-1) - 1).abs() < 1e-6).all():
        raise ValueError(f"coefficients sum to {c.sum(-1).flatten()[(c.sum(-1) - 1).abs().argmax()]:.6g}, not to 1")
    for k, other in enumerate(state_dicts):
        if odd := sorted({*first} ^ {*other}):
            raise ValueError(f"checkpoint {k + 1}: {odd[0]} is in only one of it and the first")
    rows = dict(zip(blocks, c.expand(len(blocks), -1).tolist()))
    return {name: _merge_entry(name, state_dicts, rows[block_of(name)]) for name in first}


def _merge_entry(name, state_dicts, c):
    total, types, shape = None, [], None
    for k in sorted((k for k in range(len(c)) if c[k]), key=lambda k: -c[k]):
        value = state_dicts[k][name]
        if shape not in (None, value.shape):
            raise ValueError(f"checkpoint {k + 1}: {name} has the shape {tuple(value.shape)}, another {tuple(shape)}")
        if not value.is_floating_point():
            return value.clone()
        total = c[k] * value.double() if total is None else total.add_(value.double(), alpha=c[k])
        shape, types = value.shape, types + [value.dtype]
    return total.to(reduce(torch.promote_types, types))


def directions(views, blocks=1, floor=0.01):
    """Q [B, K - 1, K] for K checkpoints: the principal directions of the checkpoints about their mean, in the space of a block's weights.

    A row sums to zero; a step of 1 along it moves the weights by the checkpoints' rms distance from their mean, whichever row. A direction in which
    they differ less than `floor` times as much as in the first is left out: its row is zero. Tensors are read one at a time.
    """
    K, names = len(views), sorted({block_of(name) for name in views[0]})
    gram, Q = torch.zeros(blocks, K, K, dtype=torch.float64), torch.zeros(blocks, K - 1, K, dtype=torch.float64)
    for name in views[0]:
        if views[0][name].is_floating_point():
            x = torch.stack([view[name].double().flatten() for view in views])
            gram[names.index(block_of(name)) if blocks > 1 else 0] += (x - x.mean(0)) @ (x - x.mean(0)).T
    for b, (squares, vectors) in enumerate(map(torch.linalg.eigh, gram)):
        kept = (squares > floor**2 * squares.max()) & (torch.arange(K) > 0)                   # the smallest is that of all alike, and only rounding
        rows = (vectors[:, kept] * (squares.sum() / K / squares[kept]).sqrt()).T
        rows = rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()               # an eigenvector's sign is the library's whim
        Q[b, :len(rows)] = (rows - rows.mean(1, keepdim=True)).flip(0)
    return Q


def coefficients_of(z, start, Q):
    """z [..., B, K - 1], the origin start [K], of sum one, and directions Q [B, K - 1, K] -> c [..., B, K], of sum one."""
    return start + torch.einsum("...bi,bik->...bk", z, Q)


def policy_step(mean, log_std, z, advantage, lr):
    """One natural-gradient step of E[A] for z [G, ...] ~ N(mean, std^2), advantage [G] -> mean, log_std.

    grad log N, times the inverse Fisher information, is std^2 (z - mean) / std^2 for the mean and ((z - mean)^2 / std^2 - 1) / 2 for log std:
    in units of the policy's own std, so that one lr serves however far the search has narrowed.
    """
    eps, A = (z - mean) / log_std.exp(), advantage.reshape(-1, *[1] * mean.dim()).double()
    return mean + lr * log_std.exp() * (A * eps).mean(0), log_std + 0.1 * lr * (A * (eps**2 - 1)).mean(0) / 2


class Search:
    """What a merge is worth by its pictures: the model, its checkpoints, prompts and reward, and the reference that subset-replace works on."""

    def __init__(self, args, model, views, prompts):
        self.args, self.model, self.views, self.prompts = args, model, views, prompts
        self.reward, self.pool = Reward(args.reward, model.folder, model.device), None
        if self.reward.distribution:
            blank = model.decode(torch.zeros(1, *model.shape, device=model.device))
            reference_set = open_reference_set(self.reward.distribution, args.features, args.target, model.folder, args.reference, blank)
            self.pool, self.measure = reference_set.members, reference_set.features
            check_target(Path(args.report_target), self.measure(blank).shape[1])

    def batches(self, c, numbers, count, key):
        """Draws the pictures `numbers` of `count`, every prompt alike often, by the merge with coefficients c [K] or [B, K]: yields (b prompts, b pictures)."""
        put(self.model.network, merge(self.views, c))
        each = count // len(self.prompts)
        for i, images in stream(self.model, self.prompts, each, numbers, self.args.steps, self.args.guidance, key, self.args.batch):
            yield [self.prompts[n // each] for n in i.tolist()], images

    def features_of(self, c, count, key):
        """Features [count, D] of the merge's pictures; each process draws its share."""
        mine = [self.measure(images) for _, images in self.batches(c, processes.share(count), count, key)]
        return processes.gather(torch.cat([self.pool.features[:0], *mine]), count)              # a process may have none

    def group(self, candidates, count, key, pool, replaced):
        """Reward terms {name: [G]} of coefficient vectors [G, B, K], all at the same noise and prompts; each process builds, samples and prices its own."""
        mine, names, rows = processes.share(len(candidates)), [*self.reward.weights], []
        for c in candidates[mine.start:mine.stop]:
            terms, features = dict.fromkeys(names, 0.0), []
            for who, images in self.batches(c, range(count), count, key):
                for name, values in self.reward(images, [p.text for p in who], [p.metadata for p in who]).items():
                    terms[name] += values.double().sum().item() / count
                features += [self.measure(images)] if pool else []
            if pool:
                terms[self.reward.distribution] = fall(pool, torch.cat(features), replaced)
            rows.append([*terms.values()])
        rows = torch.tensor(rows, dtype=torch.float64, device=self.model.device).reshape(-1, len(names))
        return dict(zip(names, processes.gather(rows, len(candidates)).T.cpu()))

    def advantage(self, terms):
        """Reward terms {name: [G]} -> [G]: each centred, in units of its own std over the group, then weighted."""
        index = torch.arange(len(next(iter(terms.values()))))[None]
        return sum(weight * group_advantage(terms[name][None], index)[0] for name, weight in self.reward.weights.items())


def fall(pool, new, replaced):
    """What the distance falls by if features new [n, D] take the place of the members `replaced` [n]; times M / n, as if all M changed so."""
    if len(new) < len(pool.features):
        return len(pool.features) / len(new) * pool.price(new[None], replaced, "exact").item()
    changed = copy.deepcopy(pool)                                        # of all, a price would need M^2 numbers
    changed.refresh(new)
    return pool.value() - changed.value()


def members_of(update, n, M, P):
    """Which n of the M members an update replaces -> [n]: the next n / P of each of the P prompts, which both lists hold one after another. A new
    picture takes the place of one with its prompt, or the mixture of prompts in the reference would change, and be priced."""
    slots = (update * (n // P) + torch.arange(n // P)) % (M // P)
    return (torch.arange(P)[:, None] * (M // P) + slots).flatten()


def search(args, task, blocks, fixed, log, interrupt):
    """The policy's updates, each beside as many random vectors; both start from the best of `fixed`, {name: coefficients [K]}, by its own M pictures.
    -> final coefficients [B, K], {name: those of the best rivals}; None if stopped."""
    G, n, M, shape, out = args.group_size, args.images, args.reference, (blocks, len(task.views) - 1), Path(args.out)
    zeros = lambda *size: torch.zeros(*size, dtype=torch.float64)
    names, pool_key = [*task.reward.weights], (POOL_STREAM, args.seed)
    own = {"mean": zeros(shape), "log_std": zeros(shape) + math.log(args.std), "fixed": zeros(len(names), len(fixed)), "random": zeros(len(names), args.updates * G),
           "directions": zeros(*shape, shape[1] + 1)}
    everything = own | (task.pool.state() if task.pool else {})
    draw = lambda stream, update, size: seeded_noise((stream, args.seed, update), range(size), shape).double()
    newest, state = files.newest_checkpoint(out)
    guards.check_start(out, state["step"], task.model.device)
    if newest:
        files.load_checkpoint(newest, everything)
    else:
        if task.pool:                                                    # every rival is priced by replacing all of one reference
            task.pool.refresh(task.features_of(fixed["uniform average"], M, pool_key))
        terms = task.group(torch.stack(list(fixed.values()))[:, None], M, pool_key, task.pool, torch.arange(M))
        own["fixed"].copy_(torch.stack([terms[name] for name in names]))
        own["directions"].copy_(directions(task.views, blocks))
    worth = dict(zip(fixed, task.advantage(dict(zip(names, own["fixed"]))).tolist()))
    start, first = fixed[max(worth, key=worth.get)], copy.deepcopy(task.pool)                 # c_0; its pictures, unchanged, for the random vectors
    if task.pool:
        first.refresh(task.features_of(start, M, pool_key))
        newest or task.pool.refresh(first.features)
    for update in tqdm(range(state["step"], args.updates), initial=state["step"], total=args.updates, disable=processes.rank() > 0, desc="merge rl"):
        began, members, key = time.time(), members_of(update, n, M, len(task.prompts)), (SEARCH_STREAM, args.seed, update)
        # ------------------------------------------------ the policy
        noise = draw(POLICY_STREAM, update, G // 2)
        z = own["mean"] + own["log_std"].exp() * torch.cat([noise, -noise])                   # mirrored pairs: [G, B, K - 1]
        terms = task.group(coefficients_of(z, start, own["directions"]), n, key, task.pool, members)
        for name, value in zip(("mean", "log_std"), policy_step(own["mean"], own["log_std"], z, task.advantage(terms), args.lr)):
            own[name].copy_(value)
        c = coefficients_of(own["mean"], start, own["directions"])
        if task.pool:                                                    # the mean's pictures, at the noise that the group had
            task.pool.replace(members, task.features_of(c, n, key))
        # ------------------------------------------------ its rival at equal cost: random vectors, one noise and one reference for all
        tried = coefficients_of(args.std * draw(RANDOM_STREAM, update, G), start, own["directions"])
        tried = task.group(tried, n, (SEARCH_STREAM, args.seed, 0), first, members_of(0, n, M, len(task.prompts)))
        own["random"][:, update * G:(update + 1) * G] = torch.stack([tried[name] for name in names])
        log.write({"update": update + 1} | {f"reward/{name}": value.mean().item() for name, value in terms.items()}
                  | ({"reference": task.pool.value()} if task.pool else {}) | {"coefficients": c.tolist(), "std": own["log_std"].exp().mean(1).tolist(),
                  "sum_error": (c.sum(1) - 1).abs().max().item(), "seconds": time.time() - began})
        files.save_checkpoint(out, update + 1, everything, None, log.lines, 2)
        if interrupt.asked(task.model.device):
            return None
    best = lambda among: max(among, key=worth.get)
    single, lengths = best([*fixed][:len(task.views)]), [name for name in fixed if name.startswith("EMA ")]
    chosen = {f"best single checkpoint ({single})": fixed[single], "uniform average": fixed["uniform average"]}
    chosen |= {f"best post-hoc {best(lengths)}": fixed[best(lengths)]} if lengths else {}
    at = int(task.advantage(dict(zip(names, own["random"]))).argmax())
    chosen["random search"] = coefficients_of(args.std * draw(RANDOM_STREAM, at // G, G)[at % G], start, own["directions"])
    return coefficients_of(own["mean"], start, own["directions"]), chosen


def report(args, task, base, judged, rows):
    """The table: each row's merge judged by fresh pictures, against --report_target: the half of the real ones that no search has seen, unless
    --target alone was given. -> markdown lines"""
    lines, real, folder, who = [], None, task.model.folder, [p for p in judged for _ in range(args.report_images // len(judged))]
    if task.pool:
        *real, _ = load_target(Path(args.report_target), task.measure, task.model.decode(torch.zeros(1, *task.model.shape, device=task.model.device)))
    other = "reward" if args.features == "evaluator" else "evaluator"    # who has not been searched by
    judge = evaluation.Judge(folder, other, task.model.device, "real-2.npz") if (folder / other).is_dir() else None
    for name, c in rows.items():
        put(task.model.network, base if c is None else merge(task.views, c))
        images = picture_sets.generate(task.model, judged, args.report_images // len(judged), args.steps, args.guidance, args.report_seed, args.batch)
        paid = task.reward(images, [p.text for p in who], [p.metadata for p in who])
        scores = {f"reward {name}": value.double().mean().item() for name, value in paid.items()}
        if task.pool:
            found = torch.cat([task.measure(x) for x in images.split(args.batch)])
            scores["FD, searched features"] = dist_reward.frechet_distance(*dist_reward.moments(found), *real)
        if judge:
            found = evaluation.score(images, [p.metadata["label"] for p in judged], judge.network, judge.real)
            scores |= {"FD, held-out features": found["fid"], "Vendi": found["vendi"], "accuracy": found["accuracy"]}
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in scores.values()) + " |")
    return "\n".join(["| merge | " + " | ".join(scores) + " |", "|---" * (1 + len(scores)) + "|", *lines])


@record
def main(argv=None):
    args = flags.parse_args(Args, __doc__, argv)
    with flags.refusing():
        args, folder, views, prompts, judged = check_merge(args, Args(args.command, args.checkpoints))
    with guards.writing(args.out):
        if args.command == "rl":
            rl(args, folder, views, prompts, judged)
        elif processes.rank() == 0:
            average(args, folder, views)
    processes.finish()


def average(args, folder, views):
    """`average` and `ema`: the merged model in args.out; of several lengths a folder of each there, beside a config.json, by which the same
    command knows it again and makes those that are missing."""
    lengths, out = numbers("sigma_rel", args.sigma_rel), Path(args.out)
    rows = sweep(views, lengths) if args.command == "ema" else [numbers("coefficients", args.coefficients) or [1 / len(views)] * len(views)]
    with flags.refusing():
        model = bases.load(str(folder))
    (out if len(rows) > 1 else out.parent).mkdir(parents=True, exist_ok=True)
    len(rows) > 1 and files.write_atomic(out / "config.json", lambda path: path.write_text(json.dumps(vars(args), indent=2) + "\n"))
    for length, c in zip(lengths, rows):
        folder = out / str(length) if len(rows) > 1 else out
        if not folder.exists():
            put(model.network, merge(views, c))
            files.save_model(folder, model)
        print(f"{folder}: " + ", ".join(f"{x:.4f} {Path(p).stem or p}" for x, p in zip(c, args.checkpoints)))


def rl(args, folder, views, prompts, judged):
    """Search, table, plot and the merged model, in args.out."""
    device, out = processes.start(args.device), Path(args.out)
    blocks = len({block_of(name) for name in views[0]}) if args.blocks else 1
    with flags.refusing():                                             # what the files hold, and a function gives, is known only now
        model, base = bases.load(str(folder), device, args.precision), Weights(base_files.network_files(folder))
        model.encode([p.text for p in prompts + judged])
        task = Search(args, model, views, prompts)
    log = files.Log(out, vars(args), files.newest_checkpoint(out)[1]["lines"])
    with processes.Interrupt() as interrupt:
        found = search(args, task, blocks, rivals(views, args.checkpoints, numbers("sigma_rel", args.sigma_rel)), log, interrupt)
    c, rows = found or interrupt.leave(files.stopped(out, interrupt.signal))
    table = report(args, task, Over({}, base, list(views[0])), judged, {"base model": None} | rows | {"RL": c})
    put(model.network, merge(views, c))
    files.save_model(out / "model", model)
    if processes.rank() == 0:
        files.write_atomic(out / "table.md", lambda path: path.write_text(table + "\n"))
        compare.draw_coefficients(out, [Path(p).stem or p for p in args.checkpoints])
        print(table, f"{out}: coefficients.png, table.md, and the merged model in model/", sep="\n")
if __name__ == "__main__":
    main()
