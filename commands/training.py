"""Training: what it works with besides its flags (Setup), and its run folder (Run).

setup = open_setup(args, prompts, eval_prompts, device)    all networks, loaded and checked once
run = Run(args, setup, device)                             resumes, logs, saves what is due
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import bases
from bases.generator import Generator
from bases.lora import add_lora, export
from bases.tensors import base_facts, save_snapshots
from commands import report
from rewards import DISTRIBUTION, Reward, parse, readers
from rewards.classifier import check_classifier
from rewards.features import TINY, Components, load_features
from rewards.targets import ReferenceSet, open_reference_set, own_reference_set
from sampling import Policy
from support import compiling, files, flags, guards, processes, trackers
from support.averages import Averages
from support.sharding import shard


@dataclass
class Setup:
    """What never changes in a run, except the numbers in its tensors."""

    model: Generator
    frozen_model: Generator | None  # the base, for --kl without --lora
    policy: Policy  # how a step is taken
    trained: dict  # {name: parameter}, what learns
    optimizer: torch.optim.Optimizer
    averages: Averages  # of the trained parameters
    prompts: list  # of Prompt, to train on
    null_prompt: tuple  # embeddings of the empty prompt, for guidance
    reward: Reward
    diversity_features: Callable | None  # None: distances between latents
    reference_set: ReferenceSet | None  # None: no distribution-wise reward
    base_facts: dict  # what a snapshot says of its base, on the first process
    components: Components | None = None  # of the base's own pictures, where any features are


def open_setup(args, prompts, eval_prompts, device):
    """Loads the networks -> Setup. Exits with code 2 where a file is not what it should be."""
    with flags.refusing():
        model = bases.load(
            args.model, device, args.precision, args.checkpointing, args.decode_batch, args.compile
        )
        check_loaded(args, model)
        check_sizes_of_judges(args, model)
        texts = [prompt.text for prompt in prompts + eval_prompts]
        model.forget_text_encoders([*texts, ""])
        facts = {}
        if args.snapshot_every and processes.rank() == 0:
            facts = base_facts(args.model, model.network)
        trained = choose_trained(args, model)
        if args.compile:
            compiling.check_gradients(model, model.encode(texts[:1]), trained.values())
        reward = Reward(args.reward, model.folder, device, args.reward_batch or args.batch)
        components = None
        if "components" in (args.diversity_features, args.features):
            components = Components(blank_of(model))
        diversity_features = None
        if args.diversity_features == "components":
            diversity_features = components
        elif args.diversity_features != "latents":
            diversity_features = load_features(
                args.diversity_features, model.folder, device, "diversity_features"
            )
        reference_set = None
        if reward.distribution and args.features == "components":
            reference_set = own_reference_set(components, args.reference)
        elif reward.distribution:
            reference_set = empty_reference_set(args, model, reward.distribution)
        null_prompt = model.encode([""])
        policy = policy_of(args, model)

    frozen_model = model.frozen() if args.kl and not args.lora else None
    if args.shard:
        pieces = shard(model.network)
        trained = {name: pieces[name] for name in trained}
        if frozen_model:
            shard(frozen_model.network)
    return Setup(
        model=model,
        frozen_model=frozen_model,
        policy=policy,
        trained=trained,
        optimizer=torch.optim.AdamW(
            trained.values(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0
        ),
        averages=Averages(trained, args.ema, args.snapshot_every > 0),
        prompts=prompts,
        null_prompt=null_prompt,
        reward=reward,
        diversity_features=diversity_features,
        components=components,
        reference_set=reference_set,
        base_facts=facts,
    )


def check_loaded(args, model):
    """What only a loaded network can tell. Raises ValueError, in one line."""
    for steps in (args.steps, args.eval_steps):
        model.path.times(steps)
    is_flow = abs(float(model.path.alpha(0.5) + model.path.sigma(0.5)) - 1) < 1e-6
    if args.kernel == "flow-grpo" and not is_flow:
        raise ValueError(
            f"--kernel flow-grpo: is defined for flows, and {args.model} is none; "
            "take ancestral or cps"
        )
    has_scalars = any(parameter.dim() == 0 for parameter in model.network.parameters())
    if args.shard and has_scalars:
        raise ValueError(
            f"--shard: torch deals no weight that is one number, and {args.model} has some; "
            "leave it out"
        )


def check_sizes_of_judges(args, model):
    """The classifiers that are asked see pictures of the size that the model draws.

    Raises ValueError, in one line.
    """
    names = {args.diversity_features, "evaluator"}
    if any(name in DISTRIBUTION for name in parse(args.reward)):
        names.add(args.features)
    folders = readers(args.reward, model.folder)
    for name in TINY:
        if name in names and (model.folder / name).is_dir():
            folders[model.folder / name] = check_classifier(model.folder / name)
    if not folders:
        return
    height, width = blank_of(model).shape[2:]
    for folder, arguments in folders.items():
        side = arguments["size"]
        if (height, width) != (side, side):
            raise ValueError(
                f"--model {args.model}: draws pictures of {height} x {width}, and {folder} sees "
                f"{side} x {side}; give a classifier of their size"
            )


def blank_of(model):
    """One picture [1, 3, H, W] as the model makes them."""
    return model.decode(torch.zeros(1, *model.shape, device=model.device))


def policy_of(args, model):
    """The Policy that the flags name."""
    first, end = map(int, args.window.split(":"))
    times = model.path.times(args.steps).to(model.device)
    return Policy(model.path, times, range(first, end), args.eta, args.kernel, args.guidance)


def choose_trained(args, model):
    """Switches on the gradients of what learns -> {name: parameter}."""
    network = model.network
    if args.lora:
        return add_lora(network, args.lora, args.lora, model.lora_targets(), args.seed)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(args.train == "all" or model.trained(name))
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(f"--model {args.model}: no weight of it would be trained; --train all")
    return trained


def empty_reference_set(args, model, distribution):
    """The ReferenceSet of the reward fid or kid; train.py fills in its members."""
    return open_reference_set(
        distribution, args.features, args.target, model.folder, args.reference, blank_of(model)
    )


class Run:
    """Resumes from the newest checkpoint; logs; saves at the intervals that the flags name."""

    def __init__(self, args, setup, device):
        self.args = args
        self.setup = setup
        self.device = device
        self.out = Path(args.out)
        self.evaluated = {}  # {name: text} of the last evaluation, for the bar
        self.constant = {}  # {statistic: for how many iterations it was the same in each group}
        self.tensors = setup.trained | setup.averages.state()
        if setup.reference_set:
            self.tensors = self.tensors | setup.reference_set.members.state()
        if setup.components:
            self.tensors = self.tensors | setup.components.state()
        self.checkpoint, state = files.newest_checkpoint(self.out)
        self.first = state["step"]
        self.logged_lines = state["lines"]
        guards.check_start(self.out, self.first, device)
        if self.checkpoint:
            files.load_checkpoint(self.checkpoint, self.tensors, setup.optimizer)

    @property
    def is_new(self):
        """Whether there was no checkpoint to go on from."""
        return self.checkpoint is None

    def open_log(self):
        """Begins metrics.jsonl, or cuts it to the lines that belong to the checkpoint."""
        self.metrics = files.Log(self.out, vars(self.args), self.logged_lines)
        self.tracker = None
        if self.args.tracker != "none" and processes.rank() == 0:
            self.tracker = trackers.Tracker(self.args.tracker, self.out, vars(self.args))

    def steps(self):
        """The steps that are left, with a progress bar."""
        self.bar = tqdm(
            range(self.first, self.args.iterations),
            initial=self.first,
            total=self.args.iterations,
            disable=processes.rank() > 0,
            desc=self.out.name[:30],
        )
        return self.bar

    def is_due(self, iteration, every):
        """Every so many iterations, and after the last. every 0: never."""
        return every > 0 and (iteration % every == 0 or iteration == self.args.iterations)

    def log(self, iteration, metrics):
        """Writes a line of metrics.jsonl, shows the main numbers beside the bar, renews the report.

        Of alignment and diversity the bar shows the last evaluation.
        """
        self.metrics.write({"iteration": iteration} | metrics)
        for name in ("accuracy", "vendi"):
            if f"eval/{name}" in metrics:
                self.evaluated[name] = f"{metrics[f'eval/{name}']:.3f}"
        if iteration:
            self.bar.set_postfix(
                {"reward": f"{metrics['reward']:.3f}", "diversity": f"{metrics['diversity']:.3f}"}
                | self.evaluated
            )
        if "eval/vendi" in metrics and processes.rank() == 0:
            self.report()

    def report(self):
        """Writes report.png, and says once if the pictures become alike."""
        report.draw(self.out)
        if report.is_collapsing(self.out):
            guards.warn(
                "the diversity is below half of the base's while the reward rises: a collapse has "
                "begun; what helps: --fid 0.3, --diversity 0.2, --kl 0.1"
            )

    def watch(self, groups):
        """Says, once each, what has been the same within every group for ten iterations."""
        watched = {f"the reward {name}": reward for name, reward in groups.rewards.items()}
        if self.args.diversity:
            watched["the diversity"] = groups.potential[-1]
        for name, values in watched.items():
            is_constant = bool((values.std(1) < 1e-6).all())
            self.constant[name] = self.constant.get(name, 0) + 1 if is_constant else 0
            if self.constant[name] == 10:
                guards.warn(
                    f"{name} was the same for all rollouts of each group in 10 iterations, so it "
                    "teaches nothing; look at the pictures in grids/, and at --reward and --eta"
                )

    def save_results(self, iteration):
        """The final model and snapshots for merge.py: whichever is due."""
        args, setup = self.args, self.setup
        if iteration == args.iterations:
            self.save_final_model()
        if self.is_due(iteration, args.snapshot_every):
            save_snapshots(
                self.out,
                iteration,
                setup.trained,
                setup.averages.snapshots(),
                setup.base_facts,
                args.keep_snapshots,
            )

    def save_checkpoint(self, iteration, stop):
        """All that the same command needs to go on from here; when it is due, or at a stop."""
        if not stop and not self.is_due(iteration, self.args.save_every):
            return
        if not self.args.shard:
            processes.check_equal(self.setup.trained, self.device)
        files.save_checkpoint(
            self.out,
            iteration,
            self.tensors,
            self.setup.optimizer,
            self.metrics.lines,
            self.args.keep_checkpoints,
        )
        if self.tracker:
            self.tracker.send()
            if stop or iteration == self.args.iterations:
                self.tracker.close()

    def save_final_model(self):
        """model/, and lora/ if a LoRA was trained."""
        args, model = self.args, self.setup.model
        with self.setup.averages.applied():
            files.save_model(self.out / "model", model)
            if args.lora and processes.rank() == 0:
                facts = {"base": args.model, "iteration": args.iterations}
                files.write_atomic(
                    self.out / "lora", lambda folder: export(model.network, folder, facts)
                )
