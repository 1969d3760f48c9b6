"""What a training is set up with, and what its run folder gets at which iteration."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import launch, small
from safetensors.torch import load_file, save_file
from torch import nn

import bases
import train
from bases.generator import Generator
from commands import checks, training
from rewards.classifier import Classifier
from sampling import EDM, FLOW
from support import files, flags, guards
from support.averages import EMA_LENGTHS, Averages

# --------------------------------------------------------------------------------------------------
# What learns, and how a step is taken.


def small_network():
    """Two layers of attention and one that is none."""
    network = nn.Module()
    network.attn = nn.ModuleDict({"to_q": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    network.mlp = nn.Linear(4, 4)
    return network


def small_model():
    """A generator of that network."""
    model = Generator(".", "cpu", "float32", 8)
    model.network = small_network()
    return model


ATTENTION = {"attn.to_q.weight", "attn.to_q.bias", "attn.norm.weight", "attn.norm.bias"}


@pytest.mark.parametrize(
    "args, names",
    [
        (train.Args(train="attention"), ATTENTION),
        (train.Args(train="all"), ATTENTION | {"mlp.weight", "mlp.bias"}),
        (train.Args(lora=2), {"attn.to_q.lora_A.weight", "attn.to_q.lora_B.weight"}),
    ],
    ids=["attention", "all", "lora"],
)
def test_what_is_chosen_learns_and_nothing_else(args, names):
    model = small_model()
    network = model.network
    network.attn["to_q"].requires_grad_(False)  # as a loaded network may be
    trained = training.choose_trained(args, model)
    assert trained.keys() == names
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (name in names)
        assert name not in names or trained[name] is parameter


def test_a_lora_has_its_rank_as_alpha_and_is_a_function_of_the_seed():
    starts = []
    for seed in (0, 0, 1):
        model = small_model()
        trained = training.choose_trained(train.Args(lora=2, seed=seed), model)
        assert model.network.attn["to_q"].lora_scale == 1
        starts.append(trained["attn.to_q.lora_A.weight"])
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("path", [FLOW, EDM], ids=["flow", "edm"])
def test_the_policy_is_that_of_the_flags(path):
    model = SimpleNamespace(path=path, device=torch.device("cpu"))
    args = train.Args(steps=6, window="1:4", eta=0.3, kernel="ancestral", guidance=2.5)
    policy = training.policy_of(args, model)
    assert policy.path is path
    assert policy.window == range(1, 4)
    assert torch.equal(policy.times, path.times(6))
    assert (policy.eta, policy.kernel, policy.guidance) == (0.3, "ancestral", 2.5)


@pytest.mark.parametrize("reward, is_asked", [("class", True), ("jpeg", False)])
def test_a_classifier_that_is_asked_sees_pictures_of_the_size_that_are_drawn(
    tmp_path, reward, is_asked
):
    (tmp_path / "reward").mkdir()
    network = Classifier(2, size=32)
    save_file(network.state_dict(), tmp_path / "reward" / "model.safetensors")
    (tmp_path / "reward" / "config.json").write_text('{"width": 2, "size": 32}')

    def decode(latents):
        return torch.zeros(len(latents), 3, 32, 28)

    model = SimpleNamespace(
        folder=tmp_path, shape=(1, 4, 4), device=torch.device("cpu"), decode=decode
    )
    args = train.Args(model="base", reward=reward, diversity_features="latents")
    if not is_asked:
        training.check_sizes_of_judges(args, model)
        return
    line = "^--model base: draws pictures of 32 x 28, and .*/reward sees 32 x 32; give a classif"
    with pytest.raises(ValueError, match=line):
        training.check_sizes_of_judges(args, model)


# --------------------------------------------------------------------------------------------------
# The setup.


@pytest.fixture
def setup_of(tiny, tmp_path):
    """setup_of(words): the flags of a small run and these -> args, Setup."""

    def run(words):
        argv = small(tiny, tmp_path / "run", *words.split())
        args = flags.parse_args(train.Args, "", argv)
        args, prompts, eval_prompts = checks.check(args, train.Args())
        device = torch.device("cpu")
        return args, training.open_setup(args, prompts, eval_prompts, device)

    return run


def test_only_what_the_flags_need_is_loaded(setup_of):
    _, setup = setup_of("--diversity_features latents")
    assert setup.frozen_model is None
    assert setup.diversity_features is None
    assert setup.reference_set is None
    assert setup.averages.tensors == {}

    # All prompts are known without the text encoders.
    assert setup.model.encoders == []
    setup.model.encode(["", *[prompt.text for prompt in setup.prompts]])


def test_all_that_the_flags_need_is_loaded(setup_of):
    words = "--kl 1 --reward class:1,fid:0.3 --reference 24 --ema 0.5 --snapshot_every 1 --lr 0.01"
    _, setup = setup_of(words)
    assert setup.averages.tensors.keys() == {"ema", *EMA_LENGTHS}
    assert setup.diversity_features(torch.zeros(2, 3, 28, 28)).shape == (2, 64)
    members = setup.reference_set.members.state()["reference.features"]
    assert members.shape == (24, 64)
    (group,) = setup.optimizer.param_groups
    assert group["lr"] == 0.01 and group["weight_decay"] == 0

    # The base is a copy that stays as it is.
    before = {name: value.clone() for name, value in setup.model.network.state_dict().items()}
    with torch.no_grad():
        for parameter in setup.trained.values():
            parameter.add_(1)
    frozen = setup.frozen_model.network.state_dict()
    assert all(torch.equal(frozen[name], value) for name, value in before.items())


def test_under_a_lora_the_kl_needs_no_second_network(setup_of):
    _, setup = setup_of("--kl 1 --lora 2")
    assert setup.frozen_model is None


def test_a_file_that_turns_out_to_be_bad_ends_with_one_line(setup_of, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ValueError("the weights are those of another network")

    monkeypatch.setattr(bases, "load", fail)
    with pytest.raises(SystemExit) as stopped:
        setup_of("")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: the weights are those of another network\n"


# --------------------------------------------------------------------------------------------------
# The run folder.


class Dot(nn.Module):
    """A network of one weight."""

    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([float(value)]))


def open_run(out, value=0.0, **changes):
    """A Run of five iterations over a network of one weight."""
    args = train.Args(out=str(out), iterations=5, ema=0.5, snapshot_every=2, save_every=3)
    for name, changed in changes.items():
        setattr(args, name, changed)
    network = Dot(value)
    trained = dict(network.named_parameters())
    setup = SimpleNamespace(
        base_facts={"base": "base"},
        model=SimpleNamespace(network=network),
        trained=trained,
        optimizer=torch.optim.AdamW(trained.values(), lr=0.1),
        averages=Averages(trained, args.ema, with_snapshots=True),
        reference_set=None,
        components=None,
    )
    return training.Run(args, setup, torch.device("cpu"))


def take_step(run, iteration, reward=0.0):
    """Moves the weight, its averages and the optimizer, and logs a line."""
    run.setup.trained["weight"].grad = torch.tensor([float(iteration)])
    run.setup.optimizer.step()
    run.setup.averages.update(iteration)
    run.log(iteration, {"reward": reward, "diversity": 0.0, "ratio_error": 0.0})


@pytest.mark.parametrize(
    "every, due",
    [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (5, [5]), (9, [5]), (0, [])],
)
def test_what_is_due_comes_every_so_many_iterations_and_at_the_end(tmp_path, every, due):
    run = open_run(tmp_path)
    assert [iteration for iteration in range(1, 6) if run.is_due(iteration, every)] == due


def test_a_new_run_begins_at_the_start_and_writes_nothing_before_its_log(tmp_path):
    out = tmp_path / "run"
    run = open_run(out)
    assert run.is_new
    assert list(run.steps()) == [0, 1, 2, 3, 4]
    assert not out.exists()
    run.open_log()
    run.log(0, {"eval/vendi": 1 / 3})
    assert json.loads((out / "config.json").read_text()) == vars(run.args)
    assert (out / "metrics.jsonl").read_text() == '{"iteration": 0, "eval/vendi": 0.333333}\n'


def test_a_statistic_that_teaches_nothing_is_said_once(tmp_path, capsys, monkeypatch):
    run = training.Run.__new__(training.Run)
    run.args, run.constant = train.Args(), {}
    guards.warn.cache_clear()
    equal = torch.ones(2, 4)
    other = torch.arange(8.0).reshape(2, 4)
    groups = train.Groups(None, {"class": other, "dull": equal}, None, equal[None], None)
    for iteration in range(30):
        # The reward differs once, in one group; the diversity never does.
        dull = torch.cat([equal[:1], other[:1]]) if iteration == 8 else equal
        run.watch(groups._replace(rewards={"class": other, "dull": dull}))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("warning: the diversity was the same for all rollouts")
    assert lines[1].startswith("warning: the reward dull was the same for all rollouts")


def test_a_run_goes_on_from_its_newest_checkpoint_and_forgets_later_lines(tmp_path):
    run = open_run(tmp_path, keep_checkpoints=1)
    run.open_log()
    run.steps()
    for iteration in (1, 2):
        take_step(run, iteration)
        run.save_checkpoint(iteration, stop=True)
    kept = {name: value.detach().clone() for name, value in run.tensors.items()}
    take_step(run, 3)  # and then it is killed
    assert [path.name for path in files.checkpoints(tmp_path)] == ["checkpoint-00002"]

    resumed = open_run(tmp_path, value=7, keep_checkpoints=1)
    assert not resumed.is_new
    assert list(resumed.steps()) == [2, 3, 4]
    names = {"weight", "average.ema.weight", "average.0.05.weight", "average.0.1.weight"}
    assert resumed.tensors.keys() == names
    for name, value in kept.items():
        assert torch.equal(resumed.tensors[name], value)
    resumed.open_log()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2]

    # The optimizer goes on, too: its next step is the one that was lost.
    take_step(resumed, 3)
    assert torch.equal(resumed.setup.trained["weight"], run.setup.trained["weight"])


def test_the_bar_shows_the_main_numbers(tmp_path):
    run = open_run(tmp_path)
    run.open_log()
    bar = run.steps()
    take_step(run, 1, reward=0.25)
    assert "reward=0.250" in bar.postfix and "vendi" not in bar.postfix
    run.log(2, {"reward": 0.5, "diversity": 0.0, "eval/accuracy": 0.75, "eval/vendi": 3.0})
    assert bar.postfix == "reward=0.500, diversity=0.000, accuracy=0.750, vendi=3.000"


@pytest.fixture
def written(monkeypatch):
    """What save_results hands to its writers, in order, instead of files."""
    rows = []

    def save_model(folder, model):
        rows.append((folder.name, model.network.weight.item()))

    def save_snapshots(out, iteration, trained, averages, facts, keep):
        values = [average["weight"].item() for average in averages.values()]
        rows.append(
            (f"snapshot {iteration}", trained["weight"].item(), *values, facts["base"], keep)
        )

    def export(network, folder, facts):
        rows.append((network.weight.item(), facts))
        folder.mkdir()

    monkeypatch.setattr(training.files, "save_model", save_model)
    monkeypatch.setattr(training, "save_snapshots", save_snapshots)
    monkeypatch.setattr(training, "export", export)
    return rows


def test_snapshots_hold_the_weights_and_their_averages(tmp_path, written):
    run = open_run(tmp_path, value=3, snapshot_every=2, keep_snapshots=4, model="base")
    run.setup.averages.tensors[0.05]["weight"].fill_(1)
    run.setup.averages.tensors[0.10]["weight"].fill_(2)
    for iteration in (1, 2, 3):
        run.save_results(iteration)
    assert written == [("snapshot 2", 3, 1, 2, "base", 4)]


def test_the_final_model_is_the_average_and_training_keeps_its_own_weights(tmp_path, written):
    run = open_run(tmp_path, value=3, snapshot_every=0)
    run.setup.averages.tensors["ema"]["weight"].fill_(8)
    for iteration in (4, 5):
        run.save_results(iteration)
    assert written == [("model", 8)]
    assert run.setup.trained["weight"].item() == 3


def test_a_lora_is_saved_beside_the_final_model_and_names_its_base(tmp_path, written):
    run = open_run(tmp_path, value=3, snapshot_every=0, ema=0.0, lora=2, model="base")
    run.save_results(5)
    assert written == [("model", 3), (3, {"base": "base", "iteration": 5})]
    assert (tmp_path / "lora").is_dir()


@pytest.mark.parametrize("shard, compared", [(False, 1), (True, 0)])
def test_processes_must_hold_equal_weights_unless_each_has_a_piece(
    tmp_path, monkeypatch, shard, compared
):
    seen = []
    monkeypatch.setattr(training.processes, "check_equal", lambda *args: seen.append(args))
    run = open_run(tmp_path, shard=shard)
    run.open_log()
    run.save_checkpoint(1, stop=True)
    assert len(seen) == compared
    saved = load_file(tmp_path / "checkpoint-00001" / "weights.safetensors")
    assert saved.keys() == run.tensors.keys()


def test_a_checkpoint_is_saved_when_it_is_due_and_at_a_stop(tmp_path):
    run = open_run(tmp_path)
    run.open_log()
    due = run.args.save_every
    run.save_checkpoint(due + 1, stop=False)
    assert list(tmp_path.glob("**/checkpoint-*")) == []
    run.save_checkpoint(due + 1, stop=True)
    run.save_checkpoint(2 * due, stop=False)
    names = sorted(path.name for path in tmp_path.glob("**/checkpoint-*"))
    assert names == sorted({f"checkpoint-{due + 1:05d}", f"checkpoint-{2 * due:05d}"})


@pytest.mark.slow
def test_a_signal_while_snapshots_are_written_stops_in_the_same_iteration(
    tiny, tmp_path, monkeypatch, capfd
):
    original = training.save_snapshots

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(training, "save_snapshots", interrupted)
    words = ["--iterations", 3, "--snapshot_every", 1, "--save_every", 3]
    with pytest.raises(SystemExit) as stopped:
        launch(small(tiny, tmp_path / "run", *words))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "stopped after checkpoint 1 by signal 15" in capfd.readouterr().out
    names = [path.name for path in files.checkpoints(tmp_path / "run")]
    assert names == ["checkpoint-00001"]
