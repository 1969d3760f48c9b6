"""The scripts in experiments/ at small size, and the embedded base that one of them built."""

import gzip
import json
import re
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import build_shapes
import build_tiny
import collapse
import cost
import distribution
import evidence
import memory
import merging
import numpy as np
import price_benchmark
import pytest
import results
import speed
import tilted
import torch
from conftest import ROOT, launch, launch_process, read_metrics
from safetensors import safe_open

import bases
import eval as evaluation
import merge
import train
from commands import picture_sets
from commands.checks import check
from prompting import Prompt
from rewards.classifier import load_classifier
from support import flags

TINY = ROOT / "assets" / "tiny"
SCRIPTS = [
    train,
    merge,
    evaluation,
    build_shapes,
    build_tiny,
    collapse,
    cost,
    distribution,
    evidence,
    memory,
    merging,
    price_benchmark,
    results,
    speed,
    tilted,
]


@pytest.fixture
def call(monkeypatch):
    """A function: runs a script's main in this process with these words behind its name."""

    def run(script, *words):
        argv = [Path(script.__file__).name, *map(str, words)]
        monkeypatch.setattr(sys, "argv", argv)
        script.main()

    return run


@pytest.fixture
def help_of(call, capsys):
    """A function: what a script prints for --help."""

    def run(script):
        with suppress(SystemExit):  # torchrun's @record returns where others exit with 0
            call(script, "--help")
        return capsys.readouterr().out

    return run


def test_every_script_explains_itself(help_of):
    for script in SCRIPTS:
        text = help_of(script)
        assert text.startswith(f"usage: {Path(script.__file__).name} [-h]")
        assert script.__doc__.splitlines()[0] in text


def checked(words):
    """The flags of a command line of train.py, if it is accepted."""
    args = flags.parse_args(train.Args, "", ["--model", str(TINY), *words])
    return check(args, train.Args())[0]


def assert_accepted(run_flags):
    """That train.py takes {name: value} and changes none of them -> all its flags.

    But for the FID, which --fid puts beside the reward.
    """
    args = checked(evidence.command_line(run_flags))
    for name, value in run_flags.items():
        if name == "reward":
            assert args.reward in (value, f"{value},fid:{args.fid:g}")
        else:
            assert getattr(args, name) == value, name
    return args


# --------------------------------------------------------------------------------------------------
# The embedded base.


def files_in(folder):
    """Every file under a folder, by its path in it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_embedded_base_is_small_and_whole_and_holds_no_code():
    names = files_in(TINY)
    assert sum((TINY / name).stat().st_size for name in names) < 8e6
    assert {Path(name).suffix for name in names} == {".json", ".jsonl", ".safetensors", ".npz"}
    network = TINY / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(network, "pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]
    assert 2e6 < sum(np.prod(shape) for shape in shapes) < 4e6
    assert bases.check(TINY) == TINY


@pytest.mark.slow
def test_a_prompt_of_the_embedded_base_says_what_is_drawn():
    """Brightness is not part of any reward: words alone must change it."""
    model = bases.load(TINY)
    judge = load_classifier(TINY / "evaluator")
    texts = ["photo of a dark bag", "photo of a light bag", "picture of trousers", "a boot"]
    labels = torch.tensor([8, 8, 1, 9])
    prompts = [Prompt(text) for text in texts]
    images = picture_sets.generate(model, prompts, 12, 10, 1.5, seed=3, batch=48)
    dark, light, _, _ = images.mean((1, 2, 3)).reshape(4, 12).mean(1)
    assert light > dark + 0.15
    drawn = judge(images).argmax(1).reshape(4, 12)
    correct = (drawn == labels[:, None]).float().mean(1)  # [4]
    assert (correct > 0.7).all()


@pytest.mark.slow
def test_a_short_run_on_the_embedded_base(tmp_path):
    out = tmp_path / "run"
    words = "--iterations 2 --eval_images 40 --eval_every 2 --device cpu".split()
    launch(["--out", str(out), *words])
    before, *rows = read_metrics(out)
    assert before["eval/accuracy"] > 0.75
    assert before["eval/vendi"] > 2.5
    for row in rows:
        assert row["ratio_error"] <= 1e-6
        assert row["grad_norm"] > 0


# --------------------------------------------------------------------------------------------------
# Building it.


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def data(tmp_path):
    """Four idx files: pictures with a bright box whose place depends on the class."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 600), ("t10k", 60)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 20, (count, 28, 28))
        for image, label in zip(images, labels):
            image[4:24, 2 + label : 8 + 2 * label] = rng.integers(60, 255)
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.mark.slow
def test_the_build_command_makes_a_base_that_trains(data, tmp_path):
    base = tmp_path / "base"
    argv = ["--data", str(data), "--out", str(base), "--pictures", "20"]
    size = ["--steps", "3", "--classifier_epochs", "1", "--recogniser_steps", "3"]
    code, out, error = launch_process([*argv, *size], script="experiments/build_tiny.py")
    assert code == 0 and "built in" in out, error
    assert files_in(base) == files_in(TINY)

    code, out, error = launch_process([*argv, "--report"], script="experiments/build_tiny.py")
    assert code == 0, error
    # Of real pictures, and at four strengths of guidance.
    assert len(re.findall(r"Frechet distance \d", out)) == 5

    words = "--iterations 1 --eval_images 20 --eval_steps 2 --prompts_per_step 2 --group_size 4"
    run = tmp_path / "run"
    launch(["--model", str(base), "--out", str(run), "--device", "cpu", *words.split()])
    assert read_metrics(run)[-1]["iteration"] == 1


def test_data_that_are_missing_or_damaged_are_named(data):
    images, labels = build_tiny.load_split(data, "train")
    assert images.shape == (600, 1, 28, 28) and labels.tolist()[:3] == [0, 1, 2]
    path = data / "train-images-idx3-ubyte.gz"
    path.write_bytes(b"\x1f\x8b broken gzip")
    with pytest.raises(SystemExit, match=f"{path}.*idx"):
        build_tiny.load_split(data, "train")
    path.unlink()
    with pytest.raises(SystemExit, match=r"no train-images-idx3-ubyte\[.gz\]; install"):
        build_tiny.load_split(data, "train")


def test_shades_and_widths_are_thirds():
    images = torch.zeros(90, 1, 28, 28)
    expected_shades, expected_widths = [], []
    for n in range(90):
        shade, width = n % 3, n // 30
        images[n, :, 5:20, 2 : 6 + 8 * width] = 0.3 * (1 + shade)
        expected_shades.append(shade)
        expected_widths.append(width)
    shades, widths = build_tiny.attributes(images, torch.zeros(90, dtype=torch.long))
    assert shades.tolist() == expected_shades
    assert widths.tolist() == expected_widths


def test_captions_are_true_of_their_pictures():
    """A dark wide coat, 300 times in other words."""
    rng = np.random.default_rng(0)
    used = set()
    for _ in range(300):
        words = set(build_tiny.caption(rng, (4, 0, 2)).split())
        assert not {"grey", "light", "narrow"} & words
        assert {"coat", "jacket"} & words
        used |= words
    assert {"dark", "wide", "photo", "picture", "coat", "jacket"} <= used


# --------------------------------------------------------------------------------------------------
# Evidence: DRIFT and its rivals.


@pytest.mark.parametrize("reward", ["class", "recogniser"])
def test_the_methods_of_the_evidence_are_command_lines(reward):
    rewards = {}
    for name in evidence.METHODS:
        args = assert_accepted(evidence.flags_of(name, reward, seed=3))
        assert args.seed == 3
        rewards[name] = args.reward
    with_fid = ("FID beside the reward", "both lines", "the default's FID alone", "the default")
    for name in (*with_fid, "the default for 100 iterations"):
        assert rewards.pop(name) == f"{reward},fid:0.3"
    assert set(rewards.values()) == {reward}
    assert {*evidence.DRAWN, *evidence.SECOND} <= {*evidence.METHODS}


def write_finished_run(folder, alignment_gain, diversity):
    """A run folder with three evaluations; diversity: Vendi scores at the start and the end."""
    (folder / "model").mkdir(parents=True)
    start, end = diversity
    lines = []
    for part in (0, 0.5, 1):
        row = {"iteration": int(20 * part)}
        row["eval/accuracy"] = 0.8
        row["eval/log_prob"] = -0.5 + alignment_gain * part
        row["eval/vendi"] = start + (end - start) * part
        row["eval/distance"] = 5.0
        row["eval/fid"] = 2.0
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder that the scripts take for the project's; its docs/ gets the figures."""
    (tmp_path / "docs").mkdir()
    for script in (evidence, distribution, merging, collapse):
        monkeypatch.setattr(script, "ROOT", tmp_path)
    return tmp_path


def write_run_that_loses(folder, lost):
    """A run folder with evaluations at iterations 0 to 60; lost {attribute: share at the end}."""
    (folder / "model").mkdir(parents=True)
    lines = []
    for iteration in range(0, 61, 10):
        row = {"iteration": iteration, "eval/accuracy": 0.9, "eval/vendi": 9.0, "eval/fid": 2.0}
        for name in collapse.NAMES:
            end = lost.get(name.removeprefix("modes_"), 1.0)
            row[f"eval/{name}"] = 1 + (end - 1) * iteration / 60
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def test_the_collapse_reports_which_attribute_is_lost_and_when(home, call, capsys):
    for seed in range(2):
        lost = {"size": 0.3, "cell": 0.84 + 0.2 * seed}
        write_run_that_loses(home / "runs" / f"taste-plain GRPO-{seed}", lost)
        write_run_that_loses(home / "runs" / f"class-the default-{seed}", {})
    call(collapse, "--report", "--out", "runs", "--seeds", "3")
    head, _, *rows = capsys.readouterr().out.splitlines()
    names = [cell.strip() for cell in head.split("|")]
    found = {}
    for row in rows:
        if row.startswith("|"):
            cells = [cell.strip() for cell in row.split("|")]
            found[cells[1]] = dict(zip(names, cells))
    assert list(found) == ["base model", "class, the default", "taste, plain GRPO"]
    assert found["taste, plain GRPO"]["modes_size"] == "0.300 +- 0.000"
    assert found["taste, plain GRPO"]["modes_cell"] == "0.940 +- 0.100"
    assert found["base model"]["modes_size"] == "1.000 +- 0.000"
    # Of the sizes a tenth is gone at 10; of the cells at 40 in one seed, and never in the other.
    assert rows[-1] == "taste, plain GRPO: size 10, cell 40"
    assert rows[-2] == "class, the default: none"
    assert (home / "docs" / "collapse.png").is_file()


@pytest.mark.slow
def test_the_evidence_reports_its_runs(home, call, capsys):
    """Each seed is compared with its own plain run: seed 1 is twice as diverse as seed 0."""
    for seed in range(2):
        start = 10 * (1 + seed)
        write_finished_run(home / "runs" / f"plain GRPO-{seed}", 0.2, (start, 0.5 * start))
        write_finished_run(home / "runs" / f"DRIFT (i) to (iii)-{seed}", 0.2, (start, 0.9 * start))
    write_finished_run(home / "runs" / "KL 0.1-5", 0.2, (1, 1))  # not of these seeds
    call(evidence, "--report", "--seeds", 2, "--out", "runs")
    rows = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert {"plain GRPO", "DRIFT (i) to (iii)"} <= rows.keys()
    assert "KL 0.1" not in rows
    assert "+0.0 +- 0.0" in rows["plain GRPO"]
    assert "+80.0 +- 0.0" in rows["DRIFT (i) to (iii)"]
    assert (home / "docs" / "evidence.png").stat().st_size > 10000


def test_a_report_of_no_runs_says_so(home, call):
    with pytest.raises(SystemExit, match="runs: no finished run; python experiments/evidence.py"):
        call(evidence, "--report", "--out", "runs")


# --------------------------------------------------------------------------------------------------
# The FID alone, and what its price costs.


def test_the_runs_of_the_distribution_script_are_command_lines():
    for run_flags in distribution.RUNS.values():
        args = assert_accepted(distribution.COMMON | run_flags)
        assert args.reward == "fid" and args.drift == "off"
    assert distribution.RUNS.keys() == distribution.SEEDS.keys()


@pytest.mark.slow
def test_the_distribution_script_reports_its_runs(home, call, capsys):
    """One tiny run, judged by 200 pictures: both tables are of numbers, and the figure is drawn."""
    words = "--reward fid --iterations 1 --eval_images 20 --eval_steps 2 --device cpu "
    words += "--prompts_per_step 2 --group_size 4 --reference 20"
    run = home / "potential-0"
    launch(["--model", str(TINY), "--out", str(run), *words.split()])
    capsys.readouterr()
    call(distribution, "--report", "--out", ".", "--pictures", 200)
    distances, signals = capsys.readouterr().out.split("\n\n")
    rows = []
    for line in distances.splitlines()[2:]:
        rows.append([cell.strip() for cell in line.split("|")[1:-1]])
    assert [row[0] for row in rows] == ["base model", "potential"]

    path = home / "judged" / "potential-0-200.npz"
    scores, features = distribution.cached(path, run / "model", 200)
    assert features.shape == (200, 64)
    assert float(rows[1][2]) == pytest.approx(scores["fid_trained"], abs=0.01)
    assert float(rows[1][2]) > 0

    lines = signals.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["1", "10", "50"]
    assert (home / "docs" / "distribution.png").stat().st_size > 10000


@pytest.mark.slow
def test_the_price_benchmark_prints_a_row_for_each_size(call, capsys):
    sizes = "--dims 16 32 --members 300 --replaced 4 --rollouts 5"
    call(price_benchmark, *sizes.split())
    rows = []
    for line in capsys.readouterr().out.splitlines():
        if re.match(r"\| \d", line):
            rows.append([cell.strip() for cell in line.split("|")[1:-1]])
    assert [row[0] for row in rows] == ["16", "32"]
    for row in rows:
        error, correlation = map(float, row[8:])
        assert error < 1e-6
        assert correlation > 0.9


# --------------------------------------------------------------------------------------------------
# Merging.

TABLE = """| merge | FD, searched features | FD, held-out features | Vendi | accuracy |
|---|---|---|---|---|
| base model | {base[0]} | {base[1]} | 5.0 | 0.9 |
| best single checkpoint (0003-0.05) | {single[0]} | {single[1]} | 5.0 | 0.9 |
| best post-hoc EMA 0.1 | {ema[0]} | {ema[1]} | 5.0 | 0.9 |
| RL | {rl[0]} | {rl[1]} | 6.0 | 0.9 |
"""


def test_the_merging_script_reports_its_merges(home, call, capsys):
    """Means over the merges; each row against the best single checkpoint of the same merge."""
    first = home / "runs" / "one vector-0"
    second = home / "runs" / "one vector-1"
    for folder in (first, second):
        folder.mkdir(parents=True)
    rows = {"base": (10, 20), "single": (8, 16), "ema": (7.6, 16), "rl": (6.4, 12)}
    (first / "table.md").write_text(TABLE.format(**rows))
    rows = {"base": (20, 40), "single": (16, 32), "ema": (15.2, 32), "rl": (14.4, 24)}
    (second / "table.md").write_text(TABLE.format(**rows))
    (first / "coefficients.png").write_bytes(b"a figure")

    call(merging, "--report", "--out", "runs")
    cells = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("| "):
            name, *numbers = [cell.strip() for cell in line.split("|")[1:-1]]
            cells[name] = numbers
    base = cells["base model"]
    assert base[:4] == ["15.000", "30.000", "5.000", "0.900"]
    assert base[4:] == ["+25.0 +- 0.0", "+25.0 +- 0.0"]
    assert cells["best single checkpoint"][4:] == ["+0.0 +- 0.0", "+0.0 +- 0.0"]
    assert cells["best post-hoc EMA"][4:] == ["-5.0 +- 0.0", "+0.0 +- 0.0"]
    assert cells["RL"][4:] == ["-15.0 +- 5.0", "-25.0 +- 0.0"]
    assert (home / "docs" / "merging.png").read_bytes() == b"a figure"


def test_the_merging_script_says_what_it_needs(home, call):
    with pytest.raises(SystemExit, match="^runs: potential-0 has not been run; first python"):
        call(merging, "--runs", "runs")


def test_the_base_the_snapshots_and_two_averages_are_merged(tmp_path):
    (tmp_path / "snapshots").mkdir()
    for iteration in (3, 6, 9, 12):
        for length in ("", "-0.050", "-0.100"):
            (tmp_path / "snapshots" / f"{iteration:05d}{length}.safetensors").touch()
    base, *snapshots = merging.checkpoints(tmp_path)
    assert Path(base) == TINY
    assert [Path(path).stem for path in snapshots] == [
        "00003",
        "00006",
        "00009",
        "00012",
        "00006-0.050",
        "00006-0.100",
        "00012-0.050",
        "00012-0.100",
    ]


# --------------------------------------------------------------------------------------------------
# All results by one command.


@pytest.fixture
def parts(monkeypatch):
    """A list that grows: the script and the flags of each part that would be run.

    `parts.failing` is the number of the part that fails.
    """

    class Parts(list):
        failing = None

    ran = Parts()

    def note(command):
        _, script, *words = command
        ran.append((Path(script).name, words))
        return subprocess.CompletedProcess(command, int(len(ran) == ran.failing))

    monkeypatch.setattr(results.subprocess, "run", note)
    return ran


@pytest.mark.parametrize(
    "argv, seeds",
    [([], ["5", *["3"] * 5]), (["--seeds", "1", "--report"], ["1"] * 6)],
)
def test_one_command_makes_all_results_part_by_part(parts, call, help_of, argv, seeds):
    """Each part gets flags that it knows, and no more seeds than its own."""
    call(results, *argv)
    scripts = [evidence, evidence, evidence, distribution, merging, collapse]
    assert [name for name, _ in parts] == [Path(script.__file__).name for script in scripts]
    assert [words[words.index("--seeds") + 1] for _, words in parts] == seeds
    for script, (_, words) in zip(scripts, parts):
        assert ("--report" in words) == ("--report" in argv)
        for flag in [word for word in words if word.startswith("--")]:
            assert f"  {flag}" in help_of(script)


def test_a_part_that_fails_ends_the_whole(parts, call):
    parts.failing = 2
    with pytest.raises(SystemExit, match="evidence.py stopped; the same command goes on"):
        call(results)
    assert len(parts) == 2


# --------------------------------------------------------------------------------------------------
# What it costs.


def test_every_row_of_the_cost_is_a_command_that_train_accepts(tmp_path):
    """All but the U-Net's, whose base is not built yet."""
    for title, (common, rows) in cost.PARTS.items():
        for row in rows:
            row_flags = common | row
            row_flags.pop("processes", None)
            if title != "a small U-Net":
                out = ["--out", str(tmp_path / "run")]
                checked([*cost.SHORT, *evidence.command_line(row_flags), *out])


SMALL_ROW = {"prompts_per_step": 2, "group_size": 4, "nearest": 2, "steps": 4, "window": "0:2"}


@pytest.mark.slow
def test_the_cost_of_two_processes_is_measured(tmp_path):
    sample, update, gigabytes = cost.measure(SMALL_ROW | {"processes": 2}, tmp_path)
    assert 0 < sample < 60
    assert 0 < update < 60
    assert 0.1 < gigabytes < 20


@pytest.mark.slow
def test_the_cost_of_a_u_net_is_measured(tmp_path):
    row = cost.SMALL_UNET | {"nearest": 2, "checkpointing": True}
    sample, update, gigabytes = cost.measure(row | {"pixels": 64}, tmp_path)
    assert 0 < sample < 60
    assert 0 < update < 60
    assert 0.1 < gigabytes < 20
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for name, value in row.items():
        assert config[name] == value
    assert bases.load(str(tmp_path / "base")).shape == (4, 8, 8)
