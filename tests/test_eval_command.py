"""eval.py as a command: sets of pictures, their scores with intervals, runs against each other."""
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from commands import checks
from commands import compare
import eval as evaluation
from rewards import metrics
import bases
from bases import files as base_files
from commands import picture_sets
from support import files
from conftest import ROOT, build_model, contents, files_up_to, launch, launch_process, small
from dist_reward import KernelReplace, frechet_distance, moments
from prompting import read_prompts
from test_bad_input import rewrite
from test_models import build_sit


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ones(n):
    return torch.ones(1, n, dtype=torch.float64)


def repeated(counts):
    """What a row of counts stands for, written out: picture i as often as it was drawn."""
    return [i for i, c in enumerate(counts.tolist()) for _ in range(int(c))]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics by their definitions.

def naive_neighbourhoods(generated, real, k):
    d = lambda a, b: math.dist(a.tolist(), b.tolist())
    radius = lambda x, i, others: sorted(d(x, y) for j, y in enumerate(others) if j != i)[k - 1]
    of_real = [radius(y, j, real) for j, y in enumerate(real)]
    of_generated = [radius(x, i, generated) for i, x in enumerate(generated)]
    inside = [[d(x, y) <= of_real[j] for j, y in enumerate(real)] for x in generated]
    return {"precision": [float(any(row)) for row in inside], "density": [sum(row) / k for row in inside],
            "recall": [float(any(d(x, y) <= of_generated[i] for i, x in enumerate(generated))) for y in real],
            "coverage": [float(any(row[j] for row in inside)) for j in range(len(real))]}


@pytest.mark.parametrize("n, m, D, k, shift, seed", [(12, 15, 2, 3, 0.0, 0), (20, 9, 3, 5, 0.7, 1), (8, 8, 1, 1, 1.5, 2), (30, 30, 2, 5, 2.0, 3)])
def test_neighbourhoods_by_brute_force(n, m, D, k, shift, seed):
    generated, real = 0.6 * randn(n, D, seed=seed) + shift, randn(m, D, seed=seed + 100)
    expected = naive_neighbourhoods(generated, real, k)
    for shard in (3, 1000):
        found = metrics.neighbourhoods(generated, real, k, shard)
        assert found.keys() == expected.keys()
        for name, values in found.items():
            assert values.tolist() == pytest.approx(expected[name]), name
    means = {name: np.mean(v) for name, v in expected.items()}
    assert len({round(v, 6) for v in means.values()}) > 1               # the four are not one number here


def test_neighbourhoods_of_equal_and_of_disjoint_sets():
    x = randn(40, 3)
    equal = {name: v.mean().item() for name, v in metrics.neighbourhoods(x, x).items()}
    assert equal["precision"] == equal["recall"] == equal["coverage"] == 1
    assert equal["density"] == pytest.approx(1 + 1 / 5)                  # each lies in its own ball and, on average, in k others'
    assert all(v.sum() == 0 for v in metrics.neighbourhoods(x + 1000, x).values())
    copies = metrics.neighbourhoods(x[:1].expand(40, 3), x)              # one good picture: precise, and nothing is recalled but itself
    assert copies["precision"].mean() == 1 and copies["recall"].sum() == 1 and 0 < copies["coverage"].mean() < 0.5
    with pytest.raises(ValueError, match="5 pictures have no 5-th"):
        metrics.neighbourhoods(x[:5], x)


def naive_kid(x, y):
    k = lambda a, b: (sum(p * q for p, q in zip(a, b)) / len(a) + 1) ** 3
    x, y = x.tolist(), y.tolist()
    within = lambda z: sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))
    return within(x) + within(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize("shard", [4, 1000])
def test_kid_by_a_double_loop(shard):
    x, y = randn(9, 4), 1.3 * randn(14, 4, seed=1) + 0.4
    counts = metrics.resample_counts(9, 6, (3, 0))
    found = metrics.resampled_kid(x, counts, y, shard)
    assert found[0].item() == pytest.approx(naive_kid(x, y), rel=1e-9)
    assert found[0].item() == pytest.approx(KernelReplace(x, y).value(), rel=1e-5)
    for row, value in zip(counts, found.tolist()):
        assert value == pytest.approx(naive_kid(x[repeated(row)], y), rel=1e-9)


def test_kid_is_unbiased():
    """Two samples of one distribution: zero on average, where the plug-in estimate is above it."""
    values = [metrics.resampled_kid(randn(10, 3, seed=s), ones(10), randn(12, 3, seed=1000 + s)).item() for s in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20 and min(values) < 0


def test_fid_of_samples_of_two_gaussians():
    s1, s2, shift = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([1.5, 1.0, 0.5]).double(), torch.tensor([0.3, 0, -0.4]).double()
    expected = (shift.square().sum() + (s1 - s2).square().sum()).item()
    value = metrics.resampled_fid(randn(40000, 3) * s1 + shift, ones(40000), torch.zeros(3).double(), (s2**2).diag()).item()
    assert value == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("name", ["vendi", "distance", "fid", "mean"])
def test_a_resample_is_the_metric_of_the_pictures_it_draws(name):
    x, real = 3 + randn(12, 4), moments(2 * randn(50, 4, seed=1) - 1)
    counts = metrics.resample_counts(12, 8, (0, 1))
    assert counts.shape == (9, 12) and (counts[0] == 1).all() and (counts.sum(1) == 12).all() and (counts[1:] > 1).any()
    fast, slow = {
        "vendi": (lambda: metrics.resampled_vendi(x, counts, 1.3), lambda rows: metrics.vendi_score(rows, 1.3)),
        "distance": (lambda: metrics.resampled_distance(x, counts), metrics.mean_distance),
        "fid": (lambda: metrics.resampled_fid(x, counts, *real), lambda rows: frechet_distance(*moments(rows), *real)),
        "mean": (lambda: metrics.resampled_mean(x[:, 0], counts), lambda rows: rows[:, 0].mean().item())}[name]
    for row, value in zip(counts, fast().tolist(), strict=True):
        assert value == pytest.approx(slow(x[repeated(row)]), rel=1e-6)


def test_the_smallest_distance():
    x = torch.tensor([[0.0, 0], [3, 4], [3, 4.5], [10, 0]])
    assert metrics.smallest_distance(x) == 0.5 and metrics.smallest_distance(x[[0, 0, 1]]) == 0 and metrics.smallest_distance(x[:2]) == 5


def test_resamples_are_a_function_of_their_key():
    draw = lambda *key: metrics.resample_counts(20, 5, key)
    assert torch.equal(draw(0, 1), draw(0, 1)) and not torch.equal(draw(0, 1), draw(0, 2)) and not torch.equal(draw(0, 1), draw(1, 1))
    many = metrics.resample_counts(10, 4000, (0,))[1:]
    assert many.mean().item() == 1 and many.var().item() == pytest.approx(0.9, abs=0.03)
    torch.testing.assert_close(many.mean(0), ones(10)[0], atol=0.06, rtol=0)


def test_the_interval_of_a_mean_holds_the_truth_95_times_in_100():
    held = widths = 0
    for trial in range(200):
        values = 2 + randn(40, seed=trial)
        low, high = metrics.interval(metrics.resampled_mean(values, metrics.resample_counts(40, 200, (trial,))))
        held, widths = held + (low < 2 < high), widths + (high - low) / 200
    assert 0.90 <= held / 200 <= 0.99
    assert widths == pytest.approx(2 * 1.96 / math.sqrt(40), rel=0.1)


def test_the_interval_of_a_biased_metric_is_about_the_estimate():
    """A resample of 60 of 60 has about 38 different pictures, and a Frechet distance far above the sample's."""
    values = metrics.resampled_fid(randn(60, 16), metrics.resample_counts(60, 100, (0,)), torch.zeros(16).double(), torch.eye(16).double())
    low, high = metrics.interval(values)
    assert low < values[0] < high < values[1:].mean()
    assert high - low == pytest.approx(float(np.quantile(values[1:], 0.975) - np.quantile(values[1:], 0.025)))
    assert all(map(math.isnan, metrics.interval(values[:1])))


def test_even_numbers():
    assert metrics.evenly(3, 5) == [0, 1, 2] and metrics.evenly(10, 5) == [0, 2, 4, 6, 8] and metrics.evenly(7, 3) == [0, 2, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Curves.

def curve(alignment, diversity):
    return {"eval/log_prob": np.array(alignment, float), "eval/vendi": np.array(diversity, float)}


def test_a_run_that_never_rises_has_no_gain():
    plain, flat = curve([-1, -0.5], [20, 10]), curve([-1, -1.2, -1.1], [20, 25, 30])
    for pair in ((flat, plain), (plain, flat), (flat, flat)):
        assert all(map(math.isnan, compare.gain_at_equal_alignment(*pair)))
    assert math.isnan(compare.gain_at_equal_diversity(plain, curve([-1, -0.5], [20, 22])))            # it lost no diversity
    assert math.isnan(compare.gain_at_equal_diversity(plain, curve([-1, -1.5], [20, 10])))            # it gained no alignment
    assert compare.spread([0.1, float("nan"), 0.3]) == "+20.0 +- 10.0 (2 of 3)" and compare.spread([float("nan")]) == compare.spread([]) == "-"


def test_hypervolumes():
    assert compare.hypervolume([3], [5], (1, 1)) == 8                    # one rectangle
    assert compare.hypervolume([3, 2], [5, 4], (1, 1)) == 8              # what is dominated adds nothing
    assert compare.hypervolume([3, 2, 2], [5, 7, 7], (1, 1)) == 8 + 2
    assert compare.hypervolume([0, 3, 2], [9, 0.5, 1], (1, 1)) == 0      # not beyond the corner in both
    assert compare.hypervolume([1 + i for i in range(1, 4)], [4, 3, 2], (1, 1)) == 3 + 2 + 1


def write_run(folder, rows, seed=0, size=(20, 30), **config):
    """A run folder of train.py with these (log_prob, vendi, fid) at its evaluations."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": seed, "eval_images": 640, "eval_steps": 10, "eval_seed": 0, "eval_prompts": "?"} | config))
    lines = [{"iteration": 5, "seconds_sample": 60.0, "seconds_train": 30.0}]
    for i, (log_prob, vendi, fid) in enumerate(rows):
        lines.append({"iteration": 10 * i, "eval/accuracy": 0.8 + i / 100, "eval/log_prob": log_prob, "eval/vendi": vendi, "eval/distance": 5.0,
                      "eval/fid": fid, "seconds_sample": 60.0})
        (folder / "grids").mkdir(exist_ok=True)
        Image.new("RGB", size, (80 * (i > 0), 40 * (seed or 0) + 20, 0)).save(folder / "grids" / f"{10 * i:05d}.png")
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def command(*argv):
    """eval.py in this process."""
    return evaluation.main([str(a) for a in argv])


def two_processes(*argv):
    """eval.py under torchrun -> exit code, stdout, stderr. The -- keeps torchrun from taking --n for one of its own flags."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--", str(ROOT / "eval.py"), *map(str, argv)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


def rows_of(text):
    """A markdown table -> {first cell: the other cells}."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


PLAIN = [(-1.0, 20, 9), (-0.8, 16, 8), (-0.6, 12, 7)]


def test_compare_prints_and_draws(tmp_path, capsys):
    folders = []
    for seed in range(2):                                                # each seed is compared with its own plain run
        higher = [(a, v + 10 * seed, f) for a, v, f in PLAIN]
        folders.append(write_run(tmp_path / f"plain-{seed}", higher, seed))
        folders.append(write_run(tmp_path / f"ours-{seed}", [(a, 1.5 * v, f) for a, v, f in higher], seed))
    folders.append(write_run(tmp_path / "gone", [(-1, 20, 9), (-0.5, 1.2, 90)]))
    command("compare", *folders, "--out", tmp_path / "figures" / "c.png")
    out = capsys.readouterr().out
    table = rows_of(out)
    column = {name: i - 1 for i, name in enumerate(compare.COLUMNS)}
    assert list(table) == ["run", "plain", "ours", "gone COLLAPSED"] and len(table["plain"]) == len(compare.COLUMNS) - 1
    assert table["plain"][column["diversity at equal alignment, %"]] == "+0.0 +- 0.0" == table["plain"][column["alignment at equal diversity, %"]]
    assert table["ours"][column["diversity at equal alignment, %"]] == "+50.0 +- 0.0" == table["ours"][column["at the highest, %"]]
    assert table["ours"][column["seeds"]] == "2" and table["gone COLLAPSED"][column["seeds"]] == "1"
    assert table["plain"][column["Vendi"]] == "17.000 +- 5.000" and table["plain"][column["FID"]] == "7.000 +- 0.000"
    assert table["plain"][column["log-prob"]] == "-0.600 +- 0.000" and table["plain"][column["accuracy"]] == "0.820 +- 0.000"
    volumes = [0.2 * (16 - 1) + 0.2 * (12 - 1), 0.2 * (26 - 1) + 0.2 * (22 - 1)]
    assert table["plain"][column["hypervolume"]] == f"{np.mean(volumes):.3f} +- {np.std(volumes, ddof=1) / 2**0.5:.3f}"
    assert table["plain"][column["minutes"]] == "4.5 +- 0.0"
    with Image.open(tmp_path / "figures" / "c.png") as image:
        assert image.format == "PNG" and image.width > 1000 and len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_labels_make_seeds_of_one_method(tmp_path, capsys):
    for n in range(3):
        write_run(tmp_path / f"run{n}", [(a, v + n, f) for a, v, f in PLAIN], seed=n)
    command("compare", *(tmp_path / f"run{n}" for n in range(3)), "--labels", "a, b,b")
    table = rows_of(capsys.readouterr().out)
    assert [table[name][0] for name in ("a", "b")] == ["1", "2"]
    assert table["b"][6] == "-"                                          # no seed in common: nothing is paired
    command("compare", tmp_path / "run1")
    assert list(rows_of(capsys.readouterr().out)) == ["run", "run1"]


def test_few_pictures_of_a_prompt_are_no_collapse(tiny, tmp_path, capsys):
    for images, name in ((70, "r"), (80, "r COLLAPSED")):
        write_run(tmp_path / str(images) / "r", [(-1, 2, 1), (-0.5, 1.4, 1)], eval_images=images, eval_prompts=str(tiny / "eval_prompts.jsonl"))
        command("compare", tmp_path / str(images) / "r")
        assert list(rows_of(capsys.readouterr().out)) == ["run", name]


def test_the_band_is_of_the_seeds_fronts():
    a = {"eval/log_prob": np.array([-1, -0.5]), "eval/vendi": np.array([20.0, 10.0]), "eval/fid": np.array([4.0, 9.0]), "iteration": np.array([0, 10])}
    b = {"eval/log_prob": np.array([-1, -0.7]), "eval/vendi": np.array([20.0, 16.0]), "eval/fid": np.array([4.0, 1.0]), "iteration": np.array([0, 20])}
    levels, values = compare.band([a, b], "eval/log_prob", "eval/vendi")
    assert levels[0] == -1 and levels[-1] == -0.7 and values[:, -1] == pytest.approx([14, 16], abs=0.2) and values[:, 0].tolist() == [20, 20]
    _, values = compare.band([a, b], "eval/log_prob", "eval/fid")
    assert values[:, -1] == pytest.approx([7, 1], abs=0.1) and values[:, 0].tolist() == [4, 1]         # the lowest at this alignment or more
    levels, values = compare.band([a, b], "iteration", "eval/fid")
    assert levels[-1] == 10 and values[:, -1].tolist() == [9, 2.5]


def test_grid_puts_before_and_after_side_by_side(tmp_path):
    runs = [write_run(tmp_path / name, PLAIN, seed) for name, seed in (("plain-0", 0), ("ours-0", 0), ("ours-1", 1))]
    files = compare.grid_files(runs, "")
    assert {title: str(file.relative_to(tmp_path)) for title, file in files.items()} == {
        "before": "plain-0/grids/00000.png", "plain": "plain-0/grids/00020.png", "ours, seed 0": "ours-0/grids/00020.png",
        "ours, seed 1": "ours-1/grids/00020.png"}
    command("grid", *runs, "--out", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert image.width > 1200 and all((pixels == colour).all(1).sum() > 10000 for colour in ((0, 20, 0), (80, 20, 0), (80, 60, 0)))


def test_compare_and_grid_of_real_runs(tiny, tmp_path, capsys):
    for name, flags in (("plain", ["--drift", "off", "--select", "all"]), ("drift", [])):
        launch(small(tiny, tmp_path / name, *flags))
    capsys.readouterr()
    command("compare", tmp_path / "plain", tmp_path / "drift", "--out", tmp_path / "c.png")
    table = rows_of(capsys.readouterr().out)
    rows = [json.loads(line) for line in (tmp_path / "drift" / "metrics.jsonl").read_text().splitlines()]
    assert table["drift"][5] == f"{rows[-1]['eval/fid']:.3f}" and table["drift"][1] == f"{rows[-1]['eval/accuracy']:.3f}"
    command("grid", tmp_path / "plain", tmp_path / "drift", "--out", tmp_path / "g.png")
    assert (tmp_path / "c.png").stat().st_size > 10000 and (tmp_path / "g.png").stat().st_size > 5000


# ---------------------------------------------------------------------------------------------------------------------
# images.

STEPS = ["--steps", "2", "--device", "cpu"]


def pixels_of(out):
    if str(out).endswith(".npz"):
        with np.load(out) as file:
            assert file.files == ["arr_0"]
            return file["arr_0"]
    return np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))])


def same(a, b):
    """The same pictures: one level off in very few pixels at most, as other blockings of a sum may round."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    off = np.abs(a.astype(int) - b)
    assert off.max() <= 1 and (off > 0).mean() < 1e-3


def test_a_folder_and_an_npz_hold_the_pictures_of_generate(tiny, tmp_path, capsys):
    for name in ("set", "set.npz"):
        command("images", tiny, "--n", 30, "--out", tmp_path / name, "--seed", 3, "--guidance", 1.5, *STEPS)
        assert "30 pictures of 10 prompts" in capsys.readouterr().out
    model, prompts = bases.load(tiny), read_prompts(tiny / "eval_prompts.jsonl")
    expected = files.to_uint8(picture_sets.generate(model, prompts, 3, 2, 1.5, seed=3, batch=500)).permute(0, 2, 3, 1).numpy()
    folder, packed = pixels_of(tmp_path / "set"), pixels_of(tmp_path / "set.npz")
    assert np.array_equal(folder, packed) and packed.shape == (30, 28, 28, 3)
    same(packed, expected)
    assert [p.name for p in sorted((tmp_path / "set").glob("*.png"))] == [f"{i:06d}.png" for i in range(30)]
    assert {p.name for p in tmp_path.iterdir()} == {"set", "set.npz", "set.npz.json"}
    said = json.loads((tmp_path / "set" / "config.json").read_text())
    assert said == json.loads((tmp_path / "set.npz.json").read_text())
    assert len(said.pop("network_digest")) == len(said.pop("prompts_digest")) == 16 and said == {
        "model": str(tiny), "prompts": str(tiny / "eval_prompts.jsonl"), "n": 30, "steps": 2, "guidance": 1.5, "precision": "float32", "seed": 3}
    assert len(np.unique(packed.reshape(30, -1), axis=0)) == 30


@pytest.mark.parametrize("name", ["set", "set.npz"])
def test_the_batch_changes_no_picture(tiny, tmp_path, name):
    for batch in (500, 7):
        command("images", tiny, "--n", 30, "--out", tmp_path / str(batch) / name, "--batch", batch, *STEPS)
    same(pixels_of(tmp_path / "500" / name), pixels_of(tmp_path / "7" / name))


@pytest.mark.parametrize("flag, value", [("--seed", 1), ("--guidance", 4), ("--steps", 3), ("--prompts", "other.jsonl")])
def test_each_setting_changes_the_pictures_and_is_not_mixed(tiny, tmp_path, capsys, monkeypatch, flag, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.jsonl").write_text("".join(reversed((tiny / "eval_prompts.jsonl").read_text().splitlines(True))))
    command("images", tiny, "--n", 10, "--out", "a", *STEPS), command("images", tiny, "--n", 10, "--out", "b", *STEPS, flag, value)
    assert np.abs(pixels_of(tmp_path / "a").astype(int) - pixels_of(tmp_path / "b")).max() > 1
    capsys.readouterr()
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command("images", tiny, "--n", 10, "--out", "a", *STEPS, flag, value)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"{flag} " in error and f"{value}" in error and len(error.splitlines()) == 1 and contents(tmp_path) == before


def refused(argv, capsys):
    """A command that must be refused -> its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(*argv)
    *_, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ")
    return line


@pytest.mark.parametrize("name", ["set", "set.npz"])
def test_pictures_of_another_model_in_the_same_place_are_not_taken_for_its_own(tiny, tmp_path, capsys, name):
    """Trained again into the same folder, and copied with size and time, which say nothing then."""
    shutil.copytree(tiny, tmp_path / "model")
    argv = ["images", tmp_path / "model", "--n", 10, "--out", tmp_path / name, *STEPS]
    command(*argv)
    ours, other = (base_files.network_files(folder)[0] for folder in (tmp_path / "model", build_model(tmp_path / "other", seed=5)))
    before, kept = ours.stat(), ours.read_bytes()
    ours.write_bytes(other.read_bytes())
    os.utime(ours, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ours.stat().st_size == before.st_size and ours.read_bytes() != kept
    there = contents(tmp_path)
    assert f"--out {tmp_path / name}: the weights of {tmp_path / 'model'} have changed" in refused(argv, capsys) and contents(tmp_path) == there
    ours.write_bytes(kept)
    command(*argv)
    assert "already complete" in capsys.readouterr().out


def test_a_stopped_set_does_not_go_on_with_an_edited_prompt_file(tiny, tmp_path, capsys):
    prompts, text = tmp_path / "p.jsonl", (tiny / "eval_prompts.jsonl").read_text()
    argv = ["images", tiny, "--n", 10, "--prompts", prompts, "--out", tmp_path / "set", *STEPS]
    prompts.write_text(text)
    command(*argv)
    right = contents(tmp_path / "set")
    (tmp_path / "set" / "000007.png").unlink()                           # as if it had been stopped
    prompts.write_text(text.replace("coat", "boat"))
    there = contents(tmp_path)
    assert f"the texts of {prompts} have changed" in refused(argv, capsys) and contents(tmp_path) == there
    prompts.write_text(text)
    command(*argv)
    assert contents(tmp_path / "set") == right
    rewrite(network_digest=None, prompts_digest=None)(tmp_path / "set" / "config.json")                  # as older versions wrote it
    command(*argv), command("score", tmp_path / "set", "--device", "cpu", *RESAMPLES)
    assert "already complete" in capsys.readouterr().out


def test_a_prompt_that_is_no_class_and_weights_that_do_not_fit_leave_nothing_behind(tiny, tmp_path, capsys):
    name, prompts, out = build_sit(tmp_path / "sit"), tmp_path / "p.txt", tmp_path / "o1"
    argv = ["images", name, "--n", 2, "--prompts", prompts, "--out", out, *STEPS]
    prompts.write_text("goldfish\na boot\n")
    assert refused(argv, capsys).startswith("error: prompt 'a boot': a class is a number") and not out.exists()
    prompts.write_text("goldfish\n3\n")
    command(*argv)
    assert len(list(out.glob("*.png"))) == 2
    shutil.copytree(tiny, tmp_path / "model")
    rewrite(num_layers=2)(tmp_path / "model" / "transformer" / "config.json")
    for argv in (["images", tmp_path / "model", "--out", tmp_path / "o2"], ["score", tmp_path / "model"], ["score", tiny, tmp_path / "model"]):
        assert refused([*argv, "--n", 10, *STEPS], capsys).startswith(f"error: --model {tmp_path / 'model'}: transformer is not") and not (tmp_path / "o2").exists()


def test_a_full_disk_ends_with_one_line_and_the_set_goes_on(tiny, tmp_path, capsys):
    command("images", tiny, "--n", 30, "--out", tmp_path / "whole.npz", "--batch", 5, *STEPS)
    argv = ["images", tiny, "--n", 30, "--out", tmp_path / "set.npz", "--batch", 5, *STEPS]
    with files_up_to(20000), pytest.raises(SystemExit, match=r"^error: .*set.npz: .*too large.*what is there is whole; the same command goes on") as stop:
        command(*argv)
    assert "\n" not in stop.value.code and len(list((tmp_path / "set.npz.parts").glob("[0-9]*"))) == 6 and not (tmp_path / "set.npz").exists()
    command(*argv)
    assert np.array_equal(pixels_of(tmp_path / "set.npz"), pixels_of(tmp_path / "whole.npz"))


@pytest.mark.parametrize("name", ["set", "set.npz"])
@pytest.mark.parametrize("after", [1, 3, 4])                             # the first write is the json's, the fifth of an npz its assembly
def test_interrupted_and_resumed_is_uninterrupted(tiny, tmp_path, monkeypatch, name, after, capsys):
    command("images", tiny, "--n", 30, "--out", tmp_path / "whole" / name, "--batch", 10, *STEPS)
    argv, write, done = ["images", tiny, "--n", 30, "--out", tmp_path / "cut" / name, *STEPS], files.write_atomic, []

    def stops(path, content):
        if len(done) == after:
            (path.parent / f".tmp-{path.name}").write_bytes(b"half")     # what a kill leaves
            raise KeyboardInterrupt
        done.append(path)
        write(path, content)
    monkeypatch.setattr(files, "write_atomic", stops)
    with pytest.raises(KeyboardInterrupt):
        command(*argv, "--batch", 10)
    assert not str(name).endswith("npz") or not (tmp_path / "cut" / name).exists()
    monkeypatch.setattr(files, "write_atomic", write)
    drawn, stream = [], picture_sets.stream
    monkeypatch.setattr(picture_sets, "stream", lambda model, prompts, n, which, *rest: drawn.extend(which) or stream(model, prompts, n, which, *rest))
    command(*argv, "--batch", 7)                                         # other batches may go on
    there = (after - 1) * (10 if name.endswith("npz") else 1)
    assert sorted(drawn) == list(range(30))[min(there, 30):]             # what is there is kept
    same(pixels_of(tmp_path / "cut" / name), pixels_of(tmp_path / "whole" / name))
    assert contents(tmp_path / "cut").keys() == contents(tmp_path / "whole").keys()
    capsys.readouterr()
    before = contents(tmp_path)
    monkeypatch.setattr(bases, "load", lambda *args: pytest.fail("the model was loaded again"))
    command(*argv)
    assert "already complete" in capsys.readouterr().out and contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["set", "set.npz"])
def test_two_processes_draw_the_same(tiny, tmp_path, name):
    command("images", tiny, "--n", 30, "--out", tmp_path / "one" / name, *STEPS)
    code, out, error = two_processes("images", tiny, "--n", 30, "--out", tmp_path / "two" / name, *STEPS)
    assert code == 0 and out.count("30 pictures") == 1, error
    same(pixels_of(tmp_path / "one" / name), pixels_of(tmp_path / "two" / name))
    assert contents(tmp_path / "one").keys() == contents(tmp_path / "two").keys()


# ---------------------------------------------------------------------------------------------------------------------
# score.

@pytest.fixture(scope="module")
def sets(tiny, tmp_path_factory):
    """One set of pictures as a folder and as an npz, and a folder of 100 that count as real ones."""
    folder = tmp_path_factory.mktemp("sets")
    for name in ("set", "set.npz"):
        command("images", tiny, "--n", 80, "--out", folder / name, *STEPS)
    command("images", tiny, "--n", 80, "--out", folder / "other.npz", "--seed", 1, *STEPS)
    command("images", tiny, "--n", 100, "--out", folder / "real", "--seed", 2, *STEPS)
    (folder / "real" / "config.json").unlink()
    return folder


def numbers(out):
    """--out of score -> {title: {metric: {value, low, high}}}."""
    return json.loads(out.read_text())["metrics"]


RESAMPLES = ["--resamples", "20"]


def asked(tiny):
    return "--prompts", tiny / "eval_prompts.jsonl"


def test_a_model_its_folder_and_its_npz_score_alike(tiny, sets, tmp_path, capsys):
    command("score", tiny, "--n", 80, *STEPS, *RESAMPLES, "--target", sets / "real", "--out", tmp_path / "model.json")
    found = [numbers(tmp_path / "model.json")[str(tiny)]]
    for name in ("set", "set.npz"):
        command("score", sets / name, "--device", "cpu", *RESAMPLES, "--target", sets / "real", "--out", tmp_path / f"{name}.json")
        found.append(numbers(tmp_path / f"{name}.json")[str(sets / name)])
    assert list(found[0]) == ["accuracy", "log_prob", "reward/class", "vendi", "distance", "distance_min", "vendi_set", "distance_set", "fid", "kid",
                              "precision", "recall", "density", "coverage"]
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, row in found[0].items():
            assert other[name] == pytest.approx(row, rel=1e-6, abs=1e-9), name
    assert all(row["low"] <= row["value"] + 1e-9 and row["value"] - 1e-9 <= row["high"] for row in found[0].values())
    assert sum(row["low"] < row["high"] for row in found[0].values()) >= 10


def test_the_score_is_what_training_logs(tiny, sets, tmp_path):
    """From the same functions: only the rounding of pictures to bytes is between them."""
    command("score", sets / "set", "--device", "cpu", *RESAMPLES, "--out", tmp_path / "s.json")
    found = numbers(tmp_path / "s.json")[str(sets / "set")]
    model, prompts, judge = bases.load(tiny), read_prompts(tiny / "eval_prompts.jsonl"), evaluation.Judge(tiny, "evaluator")
    images = files.to_uint8(picture_sets.generate(model, prompts, 8, 2, 1.0, 0, 500)) / 255
    logged = evaluation.score(images, [p.metadata["label"] for p in prompts], judge.network, judge.real)
    for name, value in logged.items():
        assert found[name]["value"] == pytest.approx(value, rel=1e-4), name
    features = judge.network.features(images)
    assert found["vendi_set"]["value"] == pytest.approx(metrics.vendi_score(features, float(judge.real["scale"])), rel=1e-4)
    assert found["distance_set"]["value"] == pytest.approx(metrics.mean_distance(features), rel=1e-4)
    assert found["distance_min"]["value"] == pytest.approx(np.mean([metrics.smallest_distance(f) for f in features.reshape(10, 8, -1)]), rel=1e-4)


def test_distances_to_real_pictures_by_their_definitions(tiny, sets, tmp_path):
    command("score", sets / "set.npz", "--device", "cpu", *RESAMPLES, "--target", sets / "real", "--features", "reward", "--reward", "ink", "--out",
            tmp_path / "s.json")
    found = {name: row["value"] for name, row in numbers(tmp_path / "s.json")[str(sets / "set.npz")].items()}
    judge = evaluation.Judge(tiny, "reward")
    look = lambda pixels: judge.network.features(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    real = look(np.stack([np.asarray(Image.open(p).convert("RGB")) for p in sorted((sets / "real").glob("*.png"))]))
    features = look(pixels_of(sets / "set.npz"))
    assert found["fid"] == pytest.approx(frechet_distance(*moments(features), *moments(real)), rel=1e-5)
    assert found["kid"] == pytest.approx(KernelReplace(features, real).value(), rel=1e-3, abs=1e-5)
    expected = naive_neighbourhoods(features.double(), real[[i * 100 // 80 for i in range(80)]].double(), 5)         # as many as generated
    assert {name: found[name] for name in expected} == pytest.approx({name: np.mean(v) for name, v in expected.items()})
    assert 0 < found["precision"] < 1 and 0 < found["recall"] < 1
    assert "reward/ink" in found and "reward/class" not in found and 0 < found["reward/ink"] < 10


def test_fewer_real_pictures_than_generated(sets, tmp_path):
    """Recall and coverage are of the real ones, and these are resampled for them."""
    (tmp_path / "real").mkdir()
    for path in sorted((sets / "real").glob("*.png"))[:70]:
        shutil.copy(path, tmp_path / "real")
    command("score", sets / "set.npz", "--device", "cpu", *RESAMPLES, "--target", tmp_path / "real", "--out", tmp_path / "s.json")
    found = numbers(tmp_path / "s.json")[str(sets / "set.npz")]
    for name, n in (("precision", 80), ("recall", 70), ("coverage", 70)):
        assert 0 < found[name]["value"] < 1 and found[name]["value"] * n == pytest.approx(round(found[name]["value"] * n))
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]


def test_a_set_against_itself_and_another(sets, tmp_path, capsys):
    common = ["--device", "cpu", *RESAMPLES, "--target", sets / "real"]
    command("score", sets / "set", sets / "set.npz", *common, "--out", tmp_path / "same.json")
    a, b, difference = numbers(tmp_path / "same.json").values()
    assert a == b and all(row == {"value": 0, "low": 0, "high": 0} for row in difference.values()) and len(difference) == 14
    command("score", sets / "set", sets / "other.npz", *common, "--out", tmp_path / "two.json")
    a, b, difference = numbers(tmp_path / "two.json").values()
    for name, row in difference.items():
        assert row["value"] == pytest.approx(b[name]["value"] - a[name]["value"])
        assert row["low"] <= row["value"] + 1e-9 and row["value"] - 1e-9 <= row["high"]
    assert difference["fid"]["low"] < difference["fid"]["value"] < difference["fid"]["high"]
    table = rows_of(capsys.readouterr().out.split("evaluator")[-1])
    assert table["metric"] == [f"A: {sets / 'set'}", f"B: {sets / 'other.npz'}", "B - A"] and len(table["fid"]) == 3


def test_a_pair_is_resampled_alike(sets, tmp_path):
    """The second set is the first with a few pictures darkened: the difference is known far better than either."""
    pixels = pixels_of(sets / "set.npz")
    pixels[::9] = (pixels[::9] * 0.95).astype(np.uint8)
    np.savez(tmp_path / "dark.npz", arr_0=pixels)
    shutil.copy(sets / "set.npz.json", tmp_path / "dark.npz.json")
    command("score", sets / "set.npz", tmp_path / "dark.npz", "--device", "cpu", "--resamples", 100, "--out", tmp_path / "s.json")
    a, b, difference = numbers(tmp_path / "s.json").values()
    width = lambda row: row["high"] - row["low"]
    for name in ("fid", "distance_set", "log_prob", "vendi"):
        assert 0 < width(difference[name]) < 0.6 * width(a[name]), name


@pytest.mark.slow
def test_a_policy_that_was_made_to_collapse_is_flagged(tmp_path, monkeypatch, capsys):
    """Every reward comes from one mode, the black picture: what the run draws counts as one picture, and both commands say so."""
    (tmp_path / "one_mode.py").write_text("def black(images, prompts, metadata):\n    return -images.mean((1, 2, 3))\n")
    monkeypatch.syspath_prepend(tmp_path)
    out, base = tmp_path / "gone", ROOT / "assets" / "tiny"
    launch(["--reward", "one_mode:black", "--drift", "off", "--std", "none", "--lr", "1e-3", "--iterations", "20", "--eval_every", "20", "--eval_images", "320",
            "--precision", "bfloat16", "--snapshot_every", "0", "--device", "cpu", "--out", str(out)])
    capsys.readouterr()
    command("compare", out, "--out", tmp_path / "gone.png")
    assert "| gone COLLAPSED |" in capsys.readouterr().out
    command("score", base, out / "model", "--n", 320, "--resamples", 20, "--device", "cpu", "--out", tmp_path / "s.json")
    flagged = [line for line in capsys.readouterr().out.splitlines() if line.startswith("COLLAPSED: ")]
    before, after, _ = numbers(tmp_path / "s.json").values()
    assert len(flagged) == 1 and "B: " in flagged[0] and after["vendi"]["value"] < 1.2 < 8 < before["vendi"]["value"]


def test_copies_are_flagged(tiny, sets, tmp_path, capsys):
    pixels = pixels_of(sets / "set.npz")
    copies = pixels.reshape(10, 8, 28, 28, 3)[:, :1].repeat(8, 1).reshape(80, 28, 28, 3)
    np.savez(tmp_path / "copies.npz", arr_0=copies)
    flagged = lambda: [line for line in capsys.readouterr().out.splitlines() if line.startswith("COLLAPSED: ")]
    command("score", sets / "set.npz", "--device", "cpu", *RESAMPLES)
    assert flagged() == []
    command("score", tmp_path / "copies.npz", "--model", tiny, *asked(tiny), "--device", "cpu", *RESAMPLES, "--out", tmp_path / "c.json")
    lines = flagged()
    assert len(lines) == 1 and "copies.npz" in lines[0] and "1.00" in lines[0]
    assert numbers(tmp_path / "c.json")[str(tmp_path / "copies.npz")]["vendi"]["value"] == pytest.approx(1)
    command("score", sets / "set.npz", tmp_path / "copies.npz", *asked(tiny), "--device", "cpu", *RESAMPLES)
    lines = flagged()
    assert len(lines) == 1 and "B: " in lines[0]
    np.savez(tmp_path / "few.npz", arr_0=copies[[i for i in range(80) if i % 8 < 7]])                   # seven a prompt are too few to say so
    command("score", tmp_path / "few.npz", "--model", tiny, *asked(tiny), "--device", "cpu", *RESAMPLES)
    assert flagged() == []
    np.savez(tmp_path / "one.npz", arr_0=copies[:1].repeat(20, 0))       # without prompts: the whole set
    command("score", tmp_path / "one.npz", "--model", tiny, "--device", "cpu", *RESAMPLES)
    assert len(flagged()) == 1


def test_pictures_without_prompts_have_no_alignment(tiny, sets, tmp_path, capsys):
    shutil.copytree(sets / "set", tmp_path / "photos", ignore=shutil.ignore_patterns("config.json"))
    Image.open(tmp_path / "photos" / "000079.png").save(tmp_path / "photos" / "000079.jpg", quality=95)
    (tmp_path / "photos" / "000079.png").unlink()
    (tmp_path / "photos" / ".tmp-000080.png").write_bytes(b"half a picture")
    command("score", tmp_path / "photos", "--model", tiny, "--device", "cpu", *RESAMPLES)
    out = capsys.readouterr().out
    assert list(rows_of(out)) == ["metric", "vendi_set", "distance_set", "fid"] and out.startswith("80 pictures, ")
    command("score", tmp_path / "photos", "--model", tiny, *asked(tiny), "--device", "cpu", *RESAMPLES)
    assert "accuracy" in rows_of(capsys.readouterr().out)


def test_fewer_pictures_are_the_first_of_each_prompt(tiny, sets, tmp_path):
    command("score", sets / "set.npz", "--n", 40, "--device", "cpu", *RESAMPLES, "--out", tmp_path / "part.json")
    np.savez(tmp_path / "part.npz", arr_0=pixels_of(sets / "set.npz")[[i for i in range(80) if i % 8 < 4]])
    command("score", tmp_path / "part.npz", "--model", tiny, *asked(tiny), "--device", "cpu", *RESAMPLES, "--out", tmp_path / "whole.json")
    assert [*numbers(tmp_path / "part.json").values()] == [*numbers(tmp_path / "whole.json").values()]
    command("score", sets / "set.npz", tmp_path / "part.npz", *asked(tiny), "--n", 40, "--device", "cpu", *RESAMPLES, "--out", tmp_path / "two.json")
    assert all(row["value"] == 0 for row in numbers(tmp_path / "two.json")["B - A"].values())


def test_one_prompt_gives_no_interval_of_its_mean(tiny, tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text('{"prompt": "a coat", "label": 4}\n')
    command("score", tiny, "--n", 12, "--prompts", tmp_path / "one.jsonl", *STEPS, *RESAMPLES, "--out", tmp_path / "s.json")
    found = numbers(tmp_path / "s.json")[str(tiny)]
    assert found["vendi"]["low"] is None and found["fid"]["low"] < found["fid"]["high"] and "[" not in rows_of(capsys.readouterr().out)["vendi"][0]


def test_own_features_and_their_kernel_width(sets, tmp_path, monkeypatch):
    (tmp_path / "corner_features.py").write_text("def f(images):\n    return 5 * images[:, 0, :4, 0] + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    own = ["--features", "corner_features:f", "--target", sets / "real"]
    command("score", sets / "set.npz", "--device", "cpu", *RESAMPLES, *own, "--out", tmp_path / "s.json")
    found = numbers(tmp_path / "s.json")[str(sets / "set.npz")]
    look = lambda pixels: 5 * torch.from_numpy(pixels / 255).reshape(len(pixels), 28, 28, -1)[:, :4, 0, 0] + 1
    real = look(np.stack([np.asarray(Image.open(p)) for p in sorted((sets / "real").glob("*.png"))]))
    mean_square = np.mean([(a - b).square().sum() for i, a in enumerate(real) for j, b in enumerate(real) if i != j])
    assert found["vendi_set"]["value"] == pytest.approx(metrics.vendi_score(look(pixels_of(sets / "set.npz")), math.sqrt(mean_square) / 2), rel=1e-4)


@pytest.mark.slow
def test_two_processes_score_alike(tiny, sets, tmp_path):
    common = ["--device", "cpu", *RESAMPLES, "--target", str(sets / "real")]
    command("score", tiny, sets / "other.npz", "--n", 80, "--steps", 2, *common, "--out", tmp_path / "one.json")
    code, out, error = two_processes("score", tiny, sets / "other.npz", "--n", 80, "--steps", 2, *common, "--out", tmp_path / "two.json")
    assert code == 0 and out.count("| fid |") == 1, error
    one, two = numbers(tmp_path / "one.json"), numbers(tmp_path / "two.json")
    for column in one:
        for name in one[column]:
            assert two[column][name] == pytest.approx(one[column][name], rel=1e-3, abs=1e-4), (column, name)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, nothing loaded, nothing written.

BAD = [  # command line, what the line must name
    ("images {tiny}", "--out"), ("images {tiny} --n 25 --out {new}", "--n 25"), ("images {tiny} --n 25 --out {new}", "30 is the next"),
    ("images {tiny} --n -10 --out {new}", "--n -10"), ("images {tiny} {tiny} --out {new}", "1 at most"),
    ("images {tmp}/none --out {new}", "{tmp}/none"), ("images {tiny} --out {tmp}/photos", "{tmp}/photos"),
    ("images {tiny} --out {tmp}/file.txt", "{tmp}/file.txt"), ("images {tiny} --out {tmp}/good.npz", "{tmp}/good.npz"),
    ("images {tiny} --out {tmp}/file.txt/new", "{tmp}/file.txt is a file"), ("images {tiny} --out {tmp}/stale.npz", "stale.npz.parts"),
    ("images {tiny} --n 10 --out {tmp}/begun", "--n 20 there, 10 here"), ("images {tiny} --out {new} --features reward", "--features"),
    ("images {tiny} --out {new} --labels a", "--labels"), ("images {tiny} --out {new} --resamples 50", "--resamples"),
    ("images {tiny} --out {new} --steps 0", "--steps 0"), ("images {tiny} --out {new} --batch 0", "--batch 0"),
    ("images {tiny} --out {new} --guidance nan", "--guidance nan"), ("images {tiny} --out {new} --seed -1", "--seed -1"),
    ("images {tiny} --out {new} --prompts {tmp}/none.txt", "{tmp}/none.txt"), ("score {tmp}/none", "{tmp}/none"),
    ("score {tmp}/empty", "{tmp}/empty"), ("score {tmp}/none.npz", "none.npz"), ("score {tmp}/garbage.npz", "garbage.npz"),
    ("score {tmp}/cut.npz", "cut.npz"), ("score {tmp}/objects.npz", "objects.npz"), ("score {tmp}/float.npz", "arr_0 is float32 [20, 28, 28, 3]"),
    ("score {tmp}/first.npz", "arr_0 is uint8 [20, 3, 28, 28]"), ("score {tmp}/named.npz", "arr_0"), ("score {tmp}/large.npz", "28 x 28"),
    ("score {tmp}/few.npz", "too few"), ("score {tmp}/broken", "0.png"), ("score {tmp}/begun", "1 pictures of 20"),
    ("score {tmp}/said.npz", "said.npz.json"), ("score {run}", "{run}/model"), ("score {tmp}/good.npz --n 30", "--n 30"),
    ("score {tmp}/good.npz --prompts {tmp}/three.jsonl", "3 prompts"),
    ("score {tmp}/good.npz --prompts {tmp}/unlabelled.jsonl", "unlabelled.jsonl:2"), ("score {tmp}/good.npz --steps 5", "--steps"),
    ("score {tmp}/good.npz --reward ink", "--prompts"), ("score {tmp}/good.npz --prompts {tiny}/eval_prompts.jsonl --reward fid", "fid"),
    ("score {tmp}/good.npz --prompts {tiny}/eval_prompts.jsonl --reward beauty", "beauty"),
    ("score {tmp}/good.npz --features nothing", "nothing"), ("score {tmp}/good.npz --features json:loads", "--target"),
    ("score {tmp}/good.npz --target {tmp}/none", "{tmp}/none"), ("score {tmp}/good.npz --target {tmp}/photos", "too few"),
    ("score {tmp}/good.npz --model {tmp}/none", "{tmp}/none"), ("score {tmp}/good.npz --out {tmp}/file.json", "exists"),
    ("score {tmp}/good.npz --out {new}.txt", ".json"), ("score {tmp}/good.npz --resamples 1", "--resamples 1"),
    ("score {tmp}/good.npz {tmp}/good.npz {tmp}/good.npz", "2 at most"), ("score {tmp}/good.npz {tmp}/more.npz", "bias of FID"),
    ("score {tmp}/good.npz {tmp}/more.npz", "--n 20"), ("score {tmp}/good.npz {tiny}", "20"), ("score {tmp}/good.npz --labels a", "--labels"),
    ("score {tmp}/lost.npz", "gone.jsonl"), ("score {tmp}/lost.npz --prompts {tiny}/eval_prompts.jsonl", "gone-model"),
    ("score {tmp}/spoken.npz {tmp}/other.npz", "different prompts"), ("compare {tmp}/none", "{tmp}/none"),
    ("compare {tmp}/photos", "config.json"), ("compare {run} {tmp}/blank", "blank"), ("compare {tmp}/garbled", "metrics.jsonl"),
    ("compare {run} {run}", "second run"), ("compare {run} {run2} --labels a", "1 labels for 2 runs"),
    ("compare {run} {run2} --labels a,", "--labels a,"), ("compare {run} {run2} --labels a,b,c", "3 labels for 2 runs"),
    ("compare {run} {few}", "--eval_images was 320"), ("compare {run} {tmp}/asked", "--eval_prompts was {tmp}/ten.jsonl"),
    ("compare {tmp}/asked {tmp}/asked3", "--eval_prompts was {tmp}/three.jsonl"), ("grid {tmp}/asked {tmp}/asked3 --out {new}.png", "--eval_prompts was"),
    ("compare {run} {tmp}/seedless", "seed"), ("compare {run} --out {tmp}/file.json", ".png"),
    ("compare {run} --out {tmp}/there.png", "exists"), ("compare {run} --n 10", "--n"), ("grid {run}", "--out"),
    ("grid {tmp}/single --out {new}.png", "1 pictures in grids/"), ("grid {run} --seed 1 --out {new}.png", "--seed"), ("draw {run}", "draw"),
    ("score", "INPUT"), ("score {tiny} --numbers 3", "--numbers"),
    pytest.param("score {tmp}/good.npz --device cuda", "--device cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"))]


@pytest.fixture
def material(tiny, tmp_path):
    """Good and bad sets and runs in tmp_path -> the names that a command line may use."""
    rng = np.random.default_rng(0)
    good = rng.integers(0, 256, (20, 28, 28, 3), dtype=np.uint8)
    save = lambda name, **arrays: np.savez(tmp_path / f"{name}.npz", **arrays)
    save("good", arr_0=good), save("more", arr_0=np.concatenate([good, good])), save("float", arr_0=good.astype(np.float32) / 255)
    save("first", arr_0=good.transpose(0, 3, 1, 2)), save("named", images=good), save("few", arr_0=good[:5])
    save("large", arr_0=good.repeat(2, 1).repeat(2, 2))
    save("said", arr_0=good), save("lost", arr_0=good), save("spoken", arr_0=good), save("other", arr_0=good)
    (tmp_path / "said.npz.json").write_text("{half")
    said = {"model": "gone-model", "prompts": "gone.jsonl", "n": 20}
    (tmp_path / "lost.npz.json").write_text(json.dumps(said))
    (tmp_path / "spoken.npz.json").write_text(json.dumps(said | {"prompts": str(tiny / "eval_prompts.jsonl")}))
    (tmp_path / "other.npz.json").write_text(json.dumps(said | {"prompts": str(tmp_path / "ten.jsonl")}))
    (tmp_path / "ten.jsonl").write_text('{"prompt": "a coat", "label": 4}\n' * 10)
    np.savez(tmp_path / "objects.npz", arr_0=np.array([Trap(), None], dtype=object), allow_pickle=True)
    (tmp_path / "garbage.npz").write_bytes(b"no npz at all"), (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:-3000])
    for name in ("empty", "photos", "broken", "begun", "stale.npz.parts"):
        (tmp_path / name).mkdir()
    Image.fromarray(good[0]).save(tmp_path / "photos" / "0.png"), (tmp_path / "broken" / "0.png").write_bytes(b"\x89PNG half")
    Image.fromarray(good[0]).save(tmp_path / "begun" / "000000.png"), Image.fromarray(good[0]).save(tmp_path / "there.png")
    begun = {"model": str(tiny), "prompts": str(tiny / "eval_prompts.jsonl"), "n": 20, "steps": 10, "guidance": 1.0, "precision": "float32", "seed": 0}
    (tmp_path / "begun" / "config.json").write_text(json.dumps(begun))
    (tmp_path / "stale.npz.parts" / "000000.npz").write_bytes(b"?"), (tmp_path / "file.txt").write_text("text"), (tmp_path / "file.json").write_text("{}")
    (tmp_path / "three.jsonl").write_text('{"prompt": "a coat", "label": 4}\n' * 3)
    (tmp_path / "unlabelled.jsonl").write_text('{"prompt": "a coat", "label": 4}\n{"prompt": "a bag"}\n')
    write_run(tmp_path / "run", PLAIN), write_run(tmp_path / "run2", PLAIN), write_run(tmp_path / "few", PLAIN, 1, eval_images=320)
    for name, file in (("asked", "ten"), ("asked3", "three"), ("asked2", "twin")):
        write_run(tmp_path / name, PLAIN, 6 + (name == "asked2"), eval_prompts=str(tmp_path / f"{file}.jsonl"))
    shutil.copy(tmp_path / "ten.jsonl", tmp_path / "twin.jsonl")
    write_run(tmp_path / "seedless", PLAIN, seed=None), write_run(tmp_path / "single", PLAIN[:1], 3)
    write_run(tmp_path / "blank", [], 4), (write_run(tmp_path / "garbled", PLAIN, 5) / "metrics.jsonl").write_text('{"iteration": 0}\n{"eval/f')
    return {"tiny": tiny, "tmp": tmp_path, "new": tmp_path / "new", "run": tmp_path / "run", "run2": tmp_path / "run2", "few": tmp_path / "few"}


class Trap:
    """Unpickled, it would write a file."""

    def __reduce__(self):
        return open, ("SPRUNG", "w")


@pytest.mark.parametrize("line, naming", BAD)
def test_bad_command_lines(material, tiny, tmp_path, capfd, monkeypatch, line, naming):
    if "--model" not in line and line.startswith("score") and "lost" not in line and "score {tiny}" not in line and line != "score":
        line += " --model {tiny}"
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    for owner, name in ((models, "load"), (evaluation.rewards, "Reward"), (evaluation.rewards, "load_classifier"), (evaluation, "load_features")):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as stop:
        command(*line.format(**material).split())
    out, error = capfd.readouterr()
    lines = error.splitlines()
    assert stop.value.code == 2 and out == "" and (len(lines) == 1 or lines[0].startswith("usage:")), error
    assert "error: " in lines[-1] and naming.format(**material) in lines[-1] and len(lines[-1]) < 1000, error
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()


def test_the_material_of_the_bad_command_lines_is_good_but_for_its_mistake(material, tiny, tmp_path, capsys):
    """Else a line might be refused for another reason than the one it is there for."""
    command("score", tmp_path / "good.npz", "--model", tiny, "--device", "cpu", *RESAMPLES)
    command("compare", tmp_path / "run", tmp_path / "run2", "--labels", "a,b", "--out", tmp_path / "new.png")
    command("compare", tmp_path / "asked", tmp_path / "asked2")          # the same prompts in two places
    command("images", tiny, "--n", 20, "--out", tmp_path / "begun", "--device", "cpu")
    assert "20 pictures of 10 prompts" in capsys.readouterr().out


def test_a_picture_that_ends_early_is_named(sets, tmp_path, capsys):
    shutil.copytree(sets / "set", tmp_path / "set")
    bad = tmp_path / "set" / "000033.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    with pytest.raises(SystemExit) as stop:
        command("score", tmp_path / "set", "--device", "cpu", *RESAMPLES)
    assert stop.value.code == 2 and str(bad) in capsys.readouterr().err.splitlines()[-1]


def test_more_processes_than_pictures(material, tiny, tmp_path, monkeypatch, capsys):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "21"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        command("score", tmp_path / "good.npz", "--model", tiny, "--device", "cpu")
    assert "--nproc_per_node 21" in capsys.readouterr().err


def test_a_folder_without_classifiers_is_scored_by_other_features(sets, tmp_path, monkeypatch, capsys):
    model = build_model(tmp_path / "bare")
    shutil.rmtree(model / "reward"), shutil.rmtree(model / "evaluator")
    (tmp_path / "mean_features.py").write_text("def f(images):\n    return images[:, :, ::9, 5].flatten(1)[:, :5]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    command("score", model, "--n", 20, *STEPS, *RESAMPLES, "--features", "mean_features:f", "--target", sets / "real")
    assert list(rows_of(capsys.readouterr().out))[:2] == ["metric", "vendi"]


@pytest.mark.slow
def test_as_a_command(tiny, sets, tmp_path):
    code, out, error = launch_process(["score", str(sets / "set"), "--device", "cpu", *RESAMPLES], script="eval.py")
    assert code == 0 and "| fid |" in out, error
    code, out, error = launch_process(["score", str(tmp_path / "none")], script="eval.py")
    assert code == 2 and out == "" and len(error.splitlines()) == 1 and "Traceback" not in error
    code, out, _ = launch_process(["--help"], script="eval.py")
    assert code == 0 and all(f"--{name}" in out for name in vars(evaluation.Args("score", [])) if name not in ("command", "inputs"))


def test_every_flag_belongs_to_a_command():
    used = set().union(*checks.EVAL_USES.values())
    assert used == {*vars(evaluation.Args("score", []))} - {"command", "inputs"}
