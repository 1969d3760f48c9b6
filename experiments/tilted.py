"""The tilted base: what can be had by choosing among the base's own pictures, without training.

    python experiments/tilted.py --reward class --out runs/tilted
    python eval.py compare runs/drift=off runs/default runs/tilted --out compare.png

The optimum of RL with a KL penalty is p(x) exp(r(x) / beta) / Z: of all changes of the base p that
earn a given mean reward r it is the least. It is drawn here from a pool of the base's pictures of
each prompt, without replacement: the n largest r / beta + Gumbel noise. That is also what
best-of-n gives a user. The folder is one that eval.py compare reads as a run, with one evaluation
for each beta. What ends above it has added pictures that the base would not make.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import bases  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402
from commands import picture_sets  # noqa: E402
from commands.checks import check  # noqa: E402
from rewards import Reward  # noqa: E402
from support import files, flags  # noqa: E402

BETAS = (100, 30, 10, 3, 1, 0.6, 0.3, 0.2, 0.1, 0.06, 0.03, 0.02, 0.01)
POOL_SEED = 10**6  # no evaluation has the pool's noise


def tilt(rewards, n, beta, generator):
    """Rewards [P, M] -> the numbers [P, n] of n pictures of each prompt, drawn by exp(r / beta).

    Without replacement: one after the other, each with the share that it has among those left.
    """
    uniform = torch.rand(rewards.shape, generator=generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform))
    return (rewards.double() / beta + gumbel).topk(n, dim=1).indices


def draw_pool(args, model, prompts, each):
    """-> pictures [P, each, 3, H, W] of the base, by the sampler of the evaluations."""
    images = picture_sets.generate(
        model, prompts, each, args.eval_steps, args.guidance, POOL_SEED + args.seed, args.batch
    )
    return images.reshape(len(prompts), each, *images.shape[1:])


@torch.inference_mode()
def rewards_of(args, reward, prompts, pool):
    """The weighted sum of the terms for a pool [P, M, ...] -> [P, M]."""
    total = 0
    repeated = [prompt for prompt in prompts for _ in range(pool.shape[1])]
    texts = [prompt.text for prompt in repeated]
    metadata = [prompt.metadata for prompt in repeated]
    for name, values in reward(pool.flatten(0, 1), texts, metadata).items():
        total = total + reward.weights[name] * values.double()
    return total.reshape(len(prompts), -1)


def tilted_rows(args, judge, prompts, pool, rewards):
    """One row of metrics.jsonl for the base and for each beta."""
    n = args.eval_images // len(prompts)
    generator = torch.Generator().manual_seed(args.seed)
    rows = []
    for number, beta in enumerate((float("inf"), *BETAS)):
        chosen = tilt(rewards, n, beta, generator)  # [P, n]
        images = torch.cat([pictures[row] for pictures, row in zip(pool, chosen)])
        scores = evaluation.score(images, prompts, judge.network, judge.real)
        reward = rewards.gather(1, chosen).mean().item()
        row = {"iteration": number, "beta": beta if number else None, "reward": reward}
        rows.append(row | {f"eval/{name}": value for name, value in scores.items()})
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="assets/tiny", help="the base, with an evaluator/")
    parser.add_argument("--reward", default="class", help="as train.py's, without fid and kid")
    parser.add_argument("--pool", type=int, default=500, help="pictures of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/tilted", help="folder to write")
    given = parser.parse_args()

    out = Path(given.out)
    wanted = train.Args(model=given.model, reward=given.reward, seed=given.seed, out=given.out)
    with flags.refusing():
        args, _, prompts = check(wanted, train.Args())
        if out.exists():
            raise ValueError(f"--out {out}: exists; choose another")
    model = bases.load(args.model)
    judge = evaluation.Judge(model.folder, "evaluator")
    reward = Reward(args.reward, model.folder, batch=args.batch)
    pool = draw_pool(args, model, prompts, given.pool)
    rewards = rewards_of(args, reward, prompts, pool)
    rows = tilted_rows(args, judge, prompts, pool, rewards)

    out.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files.write_atomic(out / "metrics.jsonl", lambda path: path.write_text(lines))
    config = json.dumps(dataclasses.asdict(args), indent=2) + "\n"
    files.write_atomic(out / "config.json", lambda path: path.write_text(config))
    for row in rows:
        words = [f"{name.removeprefix('eval/')} {row[name]:.3f}" for name in row if "eval" in name]
        print(f"beta {row['beta']}: reward {row['reward']:.3f}, {', '.join(words)}")


if __name__ == "__main__":
    main()
