"""The commands in experiments/ at small size, and the embedded base that one of them built."""
import gzip
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import build_tiny
import cost
import distribution
import evidence
import merging
import bases
import results
import train
from conftest import ROOT, launch, read_metrics

TINY = ROOT / "assets" / "tiny"


# ---------------------------------------------------------------------------------------------------------------------
# The embedded base.

def test_the_embedded_base_is_small_whole_and_free_of_code():
    files = [f for f in TINY.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 8e6
    assert {f.suffix for f in files} == {".json", ".jsonl", ".safetensors", ".npz"}
    with safe_open(TINY / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as weights:
        assert 2e6 < sum(int(np.prod(weights.get_slice(k).get_shape())) for k in weights.keys()) < 4e6
    assert bases.check(TINY) == TINY


def test_a_prompt_of_the_embedded_base_says_what_is_drawn():
    """Brightness is not part of any reward: words alone must change it."""
    import eval as evaluation
    from prompting import Prompt
    from rewards.classifier import load_classifier
    model, judge = bases.load(TINY), load_classifier(TINY / "evaluator")
    prompts = [Prompt("photo of a dark bag"), Prompt("photo of a light bag"), Prompt("picture of trousers"), Prompt("a boot")]
    images = picture_sets.generate(model, prompts, 12, 10, 1.5, seed=3, batch=48)
    brightness = images.mean((1, 2, 3)).reshape(4, 12).mean(1)
    assert brightness[1] > brightness[0] + 0.15
    drawn = judge(images).argmax(1).reshape(4, 12)
    assert all((drawn[row] == label).float().mean() > 0.7 for row, label in ((0, 8), (1, 8), (2, 1), (3, 9)))


def test_a_short_run_on_the_embedded_base(tmp_path):
    launch(["--out", str(tmp_path / "run"), "--iterations", "2", "--eval_images", "40", "--eval_every", "2", "--device", "cpu"])
    rows = read_metrics(tmp_path / "run")
    assert rows[0]["eval/accuracy"] > 0.75 and rows[0]["eval/vendi"] > 2.5
    assert all(row["ratio_error"] <= 1e-6 and row["grad_norm"] > 0 for row in rows[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Building it.

def write_idx(path, array):
    with gzip.open(path, "wb") as file:
        file.write(b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes())


@pytest.fixture
def data(tmp_path):
    """Four idx files: pictures with a bright box whose place depends on the class."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 600), ("t10k", 60)):
        labels, images = np.arange(n) % 10, rng.integers(0, 20, (n, 28, 28))
        for image, label in zip(images, labels):
            image[4:24, 2 + label:8 + 2 * label] = rng.integers(60, 255)
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", images), write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", labels)
    return tmp_path


def test_the_build_command_makes_a_base_that_trains(data, tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "build_tiny.py"), "--data", str(data), "--out", str(tmp_path / "base"), "--steps", "3",
               "--classifier_epochs", "1", "--pictures", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "built in" in done.stdout, done.stderr
    done = subprocess.run([*command, "--report"], capture_output=True, text=True, timeout=600)
    assert len(re.findall(r"Frechet distance \d", done.stdout)) == 5     # real pictures, and four strengths of guidance
    made = {str(f.relative_to(tmp_path / "base")) for f in (tmp_path / "base").rglob("*") if f.is_file()}
    assert made == {str(f.relative_to(TINY)) for f in TINY.rglob("*") if f.is_file()}
    launch(["--model", str(tmp_path / "base"), "--out", str(tmp_path / "run"), "--iterations", "1", "--eval_images", "20", "--eval_steps", "2",
            "--prompts_per_step", "2", "--group_size", "4", "--device", "cpu"])
    assert read_metrics(tmp_path / "run")[-1]["iteration"] == 1


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x01\0\0\0\x05abc", b"not an idx file at all", b"\x1f\x8b broken gzip"])
def test_a_broken_idx_file_is_named(tmp_path, content):
    path = tmp_path / ("images.gz" if content.startswith(b"\x1f") else "images")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}.*idx"):
        build_tiny.read_idx(path)


def test_captions_are_true_of_their_pictures():
    images, labels = torch.zeros(90, 1, 28, 28), torch.zeros(90, dtype=torch.long)
    for i in range(90):                                                  # three shades, three widths
        images[i, :, 5:20, 2:6 + 8 * (i // 30)] = 0.3 * (1 + i % 3)
    shades, widths = build_tiny.attributes(images, labels)
    assert shades.tolist() == [i % 3 for i in range(90)] and widths.tolist() == [i // 30 for i in range(90)]
    rng, said = np.random.default_rng(0), set()
    for _ in range(300):
        words = build_tiny.caption(rng, 4, 0, 2).split()
        assert not {"grey", "light", "narrow"} & set(words) and {"coat", "jacket"} & set(words)
        said |= set(words)
    assert {"dark", "wide", "photo", "picture", "coat", "jacket"} <= said


# ---------------------------------------------------------------------------------------------------------------------
# Comparing runs.

def curve(alignment, diversity):
    return {"eval/log_prob": np.array(alignment, float), "eval/vendi": np.array(diversity, float)}


def test_the_front_is_the_best_that_a_curve_shows():
    x, y = np.array([0.0, 1, 2, 1.5]), np.array([10.0, 8, 4, 9])
    assert evidence.front(x, y, [0, 1, 2]).tolist() == pytest.approx([10, 9, 4], abs=0.1)
    assert np.isnan(evidence.front(x, y, [2.5])).all()


def test_gains_of_a_curve_against_itself_are_zero_and_of_a_shifted_one_the_shift():
    plain = curve([-1, -0.8, -0.6, -0.4], [20, 16, 12, 8])
    assert evidence.gain_at_equal_alignment(plain, plain) == (0, 0) and evidence.gain_at_equal_diversity(plain, plain) == 0
    better = curve([-1, -0.8, -0.6, -0.4], [30, 24, 18, 12])
    assert evidence.gain_at_equal_alignment(better, plain) == pytest.approx((0.5, 0.5))
    faster = curve([-1, -0.7, -0.4, -0.1], [20, 16, 12, 8])              # half as much again, at every diversity
    assert evidence.gain_at_equal_diversity(faster, plain) == pytest.approx(0.5, abs=1e-6)
    short = curve([-1, -0.8], [20, 18])                                  # what it never reached is not credited
    assert evidence.gain_at_equal_alignment(short, plain) == pytest.approx((0.0625 * 1.1, 0.125), abs=0.03)


def test_the_report_reads_runs_and_draws(tmp_path, capsys):
    for name, end in (("plain GRPO", 5.0), ("DRIFT, all three", 9.0)):
        for seed in range(2):
            (tmp_path / f"{name}-{seed}" / "model").mkdir(parents=True)
            height = 10 * (1 + seed)                                     # each seed is compared with its own plain run
            rows = [{"iteration": i, "eval/accuracy": 0.8 + 0.01 * i, "eval/log_prob": -0.5 + 0.01 * i, "eval/vendi": height * (1 + (end / 10 - 1) * i / 20),
                     "eval/distance": 5.0, "eval/fid": 2.0} for i in (0, 10, 20)]
            (tmp_path / f"{name}-{seed}" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    runs = evidence.table(tmp_path, evidence.METHODS, range(2))
    lines = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "+0.0 +- 0.0" in lines["plain GRPO"] and "+80.0 +- 0.0" in lines["DRIFT, all three"]
    evidence.draw(runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10000


def test_the_runs_of_the_distribution_script_are_command_lines():
    for flags in distribution.RUNS.values():
        argv = evidence.command_line(distribution.COMMON | flags)
        args, _, _ = train.check(train.runtime.parse_args(train.Args, "", [*argv, "--model", str(TINY)]), train.Args())
        assert args.reward == "fid" and args.drift == "off" and all(getattr(args, k) == v for k, v in flags.items())


def test_the_distribution_script_reports_its_runs(tmp_path, capsys, monkeypatch):
    """One tiny run, judged by 200 pictures: every number in the tables is one, and the figure is drawn."""
    launch(["--model", str(TINY), "--reward", "fid", "--out", str(tmp_path / "potential-0"), "--iterations", "1", "--eval_images", "20",
            "--eval_steps", "2", "--device", "cpu", "--prompts_per_step", "2", "--group_size", "4", "--keep", "4", "--select", "all",
            "--reference", "20"])
    capsys.readouterr()
    monkeypatch.setattr(distribution, "ROOT", tmp_path)
    (tmp_path / "experiments").mkdir()
    monkeypatch.setattr(distribution.sys, "argv", ["distribution.py", "--report", "--out", ".", "--pictures", "200"])
    distribution.main()
    first, second = capsys.readouterr().out.split("\n\n")
    rows = [line.split("|")[1:-1] for line in first.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["base model", "potential"] and float(rows[1][2]) > 0
    judged, _ = distribution.cached(tmp_path / "judged" / "potential-0-200.npz", tmp_path / "potential-0" / "model", 200)
    assert float(rows[1][2]) == pytest.approx(judged["fid_trained"], abs=0.01)
    assert len(second.splitlines()) == 5 and (tmp_path / "experiments" / "distribution.png").stat().st_size > 10000


def test_the_price_benchmark_prints_a_row_for_each_size():
    done = subprocess.run([sys.executable, str(ROOT / "experiments" / "price_benchmark.py"), "--dims", "16", "32", "--members", "300",
                           "--replaced", "4", "--rollouts", "5"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if re.match(r"\| \d", line)]
    assert [row[0].strip() for row in rows] == ["16", "32"]
    assert all(float(row[10]) < 1e-6 and float(row[11]) > 0.99 for row in rows)


@pytest.mark.parametrize("reward", ["class", "margin"])
def test_the_methods_of_the_evidence_are_command_lines(reward):
    made = {}
    for name in evidence.METHODS:
        flags = evidence.flags_of(name, reward, 3)
        args, _, _ = train.check(train.runtime.parse_args(train.Args, "", [*evidence.command_line(flags), "--model", str(TINY)]), train.Args())
        assert all(getattr(args, k) == v for k, v in flags.items()) and args.seed == 3
        made[name] = args.reward
    assert made.pop("FID beside the reward") == made.pop("both lines") == f"{reward}:1,fid:0.3" and {*made.values()} == {f"{reward}:1"}
    assert {*evidence.DRAWN, *evidence.SECOND} <= {*evidence.METHODS}


def test_the_merging_script_reports_its_merges(tmp_path, capsys, monkeypatch):
    """Two written-down tables: means over the merges, and each row against the best single checkpoint of the same merge."""
    for seed, scale in ((0, 1.0), (1, 2.0)):
        folder = tmp_path / "runs" / f"one vector-{seed}"
        folder.mkdir(parents=True)
        (folder / "table.md").write_text(
            "| merge | FD, searched features | FD, held-out features | Vendi | accuracy |\n|---|---|---|---|---|\n"
            f"| base model | {10 * scale} | {20 * scale} | 5.0 | 0.9 |\n| best single checkpoint (0003-0.05) | {8 * scale} | {16 * scale} | 5.0 | 0.9 |\n"
            f"| best post-hoc EMA 0.1 | {7.6 * scale} | {16 * scale} | 5.0 | 0.9 |\n| RL | {(7.2 if seed else 6.4) * scale} | {12 * scale} | 6.0 | 0.9 |\n")
    monkeypatch.setattr(merging, "ROOT", tmp_path)
    monkeypatch.setattr(merging.sys, "argv", ["merging.py", "--report", "--out", "runs"])
    merging.main()
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in capsys.readouterr().out.splitlines() if "|" in line}
    assert rows["base model"][:2] == ["15.000", "30.000"] and rows["base model"][4:] == ["+25.0 +- 0.0", "+25.0 +- 0.0"]
    assert rows["best post-hoc EMA"][4:] == ["-5.0 +- 0.0", "+0.0 +- 0.0"] and rows["RL"][4:] == ["-15.0 +- 5.0", "-25.0 +- 0.0"]


def test_the_merging_script_says_what_it_needs(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "experiments" / "merging.py"), "--runs", str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "potential-0 has not been run" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "run" / "snapshots").mkdir(parents=True)
    for name in ("00003", "00006", "00009", "00012"):
        for suffix in ("", "-0.050", "-0.100"):
            (tmp_path / "run" / "snapshots" / f"{name}{suffix}.safetensors").touch()
    assert [name.split("/")[-1].removesuffix(".safetensors") for name in merging.checkpoints(tmp_path / "run")] == [
        "tiny", "00003", "00006", "00009", "00012", "00006-0.050", "00006-0.100", "00012-0.050", "00012-0.100"]


def test_one_command_makes_all_results_part_by_part(monkeypatch, capsys):
    """Each part gets flags that it knows, no more seeds than its own, and a part that fails ends the whole."""
    ran, failing = [], []
    monkeypatch.setattr(results.subprocess, "run", lambda command: ran.append(command) or subprocess.CompletedProcess(command, int(len(ran) in failing)))
    for argv, seeds in (([], ["5", "3", "3", "3"]), (["--seeds", "1", "--report"], ["1"] * 4)):
        ran.clear()
        monkeypatch.setattr(results.sys, "argv", ["results.py", *argv])
        results.main()
        assert [Path(command[1]).name for command in ran] == ["evidence.py", "evidence.py", "distribution.py", "merging.py"]
        assert [command[command.index("--seeds") + 1] for command in ran] == seeds and all(("--report" in command) == bool(argv) for command in ran)
        for module, command in zip((evidence, evidence, distribution, merging), ran):
            known = Path(module.__file__).read_text()
            assert all(f'"{flag}"' in known for flag in command if flag.startswith("--"))
    failing.append(6)
    with pytest.raises(SystemExit, match="evidence.py stopped"):
        results.main()
    assert len(ran) == 6


def test_a_report_of_no_runs_says_so(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "experiments" / "evidence.py"), "--report", "--out", str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "no finished run" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# What it costs.

@pytest.mark.slow
@pytest.mark.parametrize("flags", [{"processes": 2}, {"pixels": 64, "lora": 4, "reward": "jpeg", "diversity_features": "latents", "checkpointing": True}])
def test_the_cost_of_a_row_is_measured(tmp_path, flags):
    sample, train_, memory = cost.measure({"prompts_per_step": 2, "group_size": 4, "nearest": 2, "steps": 4, "window": "0:2"} | flags, tmp_path)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert 0 < sample < 60 and 0 < train_ < 60 and 0.1 < memory < 20 and all(config[name] == value for name, value in flags.items() if name in config)
    assert "pixels" not in flags or bases.load(str(tmp_path / "base")).shape == (4, 8, 8)


def test_every_row_of_the_cost_is_a_command_that_train_accepts(capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("a boot\na bag\n")
    for common, rows in list(cost.PARTS.values())[:2]:
        for row in rows:
            flags = {name: value for name, value in (common | row).items() if name != "processes"}
            launch([*cost.SHORT, *evidence.command_line(flags), "--out", str(tmp_path / "run"), "--dry_run"])
            assert "rollouts of" in capsys.readouterr().out
