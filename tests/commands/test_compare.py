"""commands/compare.py: gains at equal alignment, hypervolumes, the table, the figures."""

import doctest
import json
import math
import shutil

import numpy as np
import pytest
from conftest import launch, small
from PIL import Image

import eval as evaluation
from commands import compare

JUDGED = (
    "run",
    "seeds",
    "accuracy",
    "log-prob",
    "Vendi",
    "pairwise distance",
    "FID",
    "diversity at equal alignment, %",
    "at the highest, %",
    "alignment at equal diversity, %",
    "hypervolume",
    "minutes",
)


def command(*argv):
    """eval.py in this process."""
    return evaluation.main([str(word) for word in argv])


def curve(alignment, diversity, **others):
    """The evaluations of a run, as `load` gives them."""
    rows = {
        "eval/log_prob": alignment,
        "eval/vendi": diversity,
        "eval/accuracy": [0.8] * len(alignment),
        "eval/distance": [5.0] * len(alignment),
        "eval/fid": [9.0] * len(alignment),
    }
    return {name: np.array(values, float) for name, values in (rows | others).items()}


def table_of(runs):
    """The markdown table of runs -> {label: {column: cell}}."""
    return cells_of(compare.table(runs))


def cells_of(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert tuple(rows[0]) == JUDGED
    return {row[0]: dict(zip(JUDGED, row)) for row in rows[1:]}


# --------------------------------------------------------------------------------------------------
# Gains and volumes by hand.


def test_the_examples_in_the_docstrings_are_true():
    found = doctest.testmod(compare)
    assert found.attempted == 2
    assert found.failed == 0


def test_a_front_is_the_best_at_this_alignment_or_more():
    x = [-1.0, -0.5, -0.8]
    y = [10.0, 20.0, 40.0]
    best = compare.front(x, y, [-1.0, -0.65, -0.5, -0.4])
    assert best[0] == 40  # a later evaluation with more alignment counts
    assert best[1] == pytest.approx(30, abs=0.3)  # halfway on the line from the second to the third
    assert best[2] == 20
    assert math.isnan(best[3])


def test_the_gain_at_equal_alignment_by_hand():
    """Both fronts are straight lines over the same alignments, up to -0.6, where both end."""
    plain = curve([-1.0, -0.6], [20, 12])
    method = curve([-1.0, -0.6, -0.4], [20, 18, 17])
    levels = np.linspace(-1.0, -0.6, 11)[1:]
    plain_mean = np.mean(20 - (levels + 1) * 20)
    method_mean = np.mean(20 - (levels + 1) * 5)
    mean, highest = compare.gain_at_equal_alignment(method, plain)
    assert mean == pytest.approx(method_mean / plain_mean - 1, abs=2e-3)
    assert highest == pytest.approx(18 / 12 - 1, abs=1e-6)


def test_the_gain_at_equal_diversity_by_hand():
    """At each diversity from 20 down to 12 the method has gained twice the alignment."""
    plain = curve([-1.0, -0.6], [20, 12])
    method = curve([-1.0, -0.2], [20, 12])
    assert compare.gain_at_equal_diversity(method, plain) == pytest.approx(1.0, abs=1e-6)
    assert compare.gain_at_equal_diversity(plain, plain) == 0


def test_the_gains_stand_beside_those_of_the_tilted_base():
    """All three curves are straight: the tilted base loses a quarter of what plain loses."""
    plain = curve([-1.0, -0.6], [20, 12])
    method = curve([-1.0, -0.6], [20, 16])
    tilted = curve([-1.0, -0.6], [20, 18]) | {"tilted": True}
    runs = {"plain": {0: plain}, "ours": {0: method}, "limit": {0: tilted}}
    head, _, *rows = compare.table(runs).splitlines()
    assert head.split("|")[-2].strip() == compare.OF_TILTED
    shares = {row.split("|")[1].strip(): row.split("|")[-2].strip() for row in rows}
    assert shares["plain"] == "0, 0, 0"
    assert shares["limit"] == "100, 100, 100"
    at_alignment, at_highest, _ = (int(share) for share in shares["ours"].split(", "))
    assert at_highest == round(100 * (16 - 12) / (18 - 12))
    assert at_alignment == pytest.approx(100 * 4 / 6, abs=2)


def test_where_modes_are_counted_the_gains_are_in_them():
    """Both runs rise alike; one keeps twice the modes, and has half of the other's Vendi score."""
    plain = curve([-2, -1], [10, 20], **{"eval/modes": [1.0, 0.4]})
    ours = curve([-2, -1], [10, 10], **{"eval/modes": [1.0, 0.8]})
    text = compare.table({"plain": {0: plain}, "ours": {0: ours}})
    head, _, _, row, last = text.splitlines()
    cells = dict(zip(head.split(" | "), row.split(" | ")))
    assert cells["at the highest, %"] == "+100.0"
    assert last == "Diversity, in the gains, is the modes that are left."


def test_a_run_that_never_rises_has_no_gain():
    plain = curve([-1, -0.5], [20, 10])
    flat = curve([-1, -1.2, -1.1], [20, 25, 30])
    for pair in ((flat, plain), (plain, flat), (flat, flat)):
        assert all(map(math.isnan, compare.gain_at_equal_alignment(*pair)))
    no_diversity_lost = curve([-1, -0.5], [20, 22])
    no_alignment_gained = curve([-1, -1.5], [20, 10])
    assert math.isnan(compare.gain_at_equal_diversity(plain, no_diversity_lost))
    assert math.isnan(compare.gain_at_equal_diversity(plain, no_alignment_gained))


def test_hypervolumes_by_hand():
    corner = (1, 1)
    assert compare.hypervolume([3], [5], corner) == 8  # one rectangle
    assert compare.hypervolume([3, 2], [5, 4], corner) == 8  # a dominated point adds nothing
    assert compare.hypervolume([3, 2, 2], [5, 7, 7], corner) == 8 + 2
    assert compare.hypervolume([2, 3, 4], [4, 3, 2], corner) == 3 + 2 + 1
    assert compare.hypervolume([0, 3, 2], [9, 0.5, 1], corner) == 0  # none exceeds it in both


def test_spread_is_mean_and_standard_error():
    nan = float("nan")
    assert compare.spread([0.1, 0.3]) == "+20.0 +- 10.0"
    assert compare.spread([0.1, nan, 0.3]) == "+20.0 +- 10.0 (2 of 3)"
    assert compare.spread([0.1]) == "+10.0"
    assert compare.spread([2.0, 4.0], scale=1, digits=3, sign="") == "3.000 +- 1.000"
    assert compare.spread([nan]) == compare.spread([]) == "-"


def test_the_band_is_of_the_fronts_of_the_seeds():
    a = curve([-1, -0.5], [20, 10], iteration=[0, 10], **{"eval/fid": [4, 9]})
    b = curve([-1, -0.7], [20, 16], iteration=[0, 20], **{"eval/fid": [4, 1]})
    levels, values = compare.band([a, b], "eval/log_prob", "eval/vendi")
    assert (levels[0], levels[-1]) == (-1, -0.7)  # it ends where the first seed does
    assert values[:, 0].tolist() == [20, 20]
    assert values[:, -1] == pytest.approx([14, 16], abs=0.2)

    _, values = compare.band([a, b], "eval/log_prob", "eval/fid")
    assert values[:, 0].tolist() == [4, 1]  # the lowest at this alignment or more
    assert values[:, -1] == pytest.approx([7, 1], abs=0.1)

    levels, values = compare.band([a, b], "iteration", "eval/fid")
    assert levels[-1] == 10
    assert values[:, -1].tolist() == [9, 2.5]


# --------------------------------------------------------------------------------------------------
# The table.


def test_each_seed_is_compared_with_its_own_plain_run():
    runs = {"plain": {}, "ours": {}}
    for seed in range(2):
        diversity = np.array([20, 16, 12]) + 10 * seed
        runs["plain"][seed] = curve([-1.0, -0.8, -0.6], diversity)
        runs["ours"][seed] = curve([-1.0, -0.8, -0.6], 1.5 * diversity)
    runs["ours"][7] = curve([-1.0, -0.6], [20, 19])  # no plain run has its seed
    table = table_of(runs)
    assert list(table) == ["plain", "ours"]
    assert table["plain"]["seeds"] == "2"
    assert table["plain"]["diversity at equal alignment, %"] == "+0.0 +- 0.0"
    assert table["plain"]["alignment at equal diversity, %"] == "+0.0 +- 0.0"
    assert table["ours"]["seeds"] == "3"
    assert table["ours"]["diversity at equal alignment, %"] == "+50.0 +- 0.0"
    assert table["ours"]["at the highest, %"] == "+50.0 +- 0.0"


def test_the_final_metrics_are_those_of_the_last_evaluation():
    first = curve([-1.0, -0.6], [20, 12], **{"eval/fid": [9, 7], "minutes": 4.0})
    second = curve([-1.0, -0.6], [20, 22], **{"eval/fid": [9, 7], "minutes": 5.0})
    row = table_of({"a": {0: first, 1: second}})["a"]
    assert row["accuracy"] == "0.800 +- 0.000"
    assert row["log-prob"] == "-0.600 +- 0.000"
    assert row["Vendi"] == "17.000 +- 5.000"
    assert row["pairwise distance"] == "5.000 +- 0.000"
    assert row["FID"] == "7.000 +- 0.000"
    assert row["minutes"] == "4.5 +- 0.5"


def test_the_corner_of_the_hypervolume_is_the_lowest_start_of_all_runs():
    """Runs of different labels and seeds start at different alignments; all share one corner."""
    runs = {
        "a": {0: curve([-1.0, -0.5], [20, 10]), 1: curve([-1.4, -0.5], [20, 10])},
        "b": {0: curve([-1.2, -0.5], [20, 10])},
    }
    corner = (-1.4, 1.0)
    expected = {}
    for label, seeds in runs.items():
        for seed, run in seeds.items():
            start = run["eval/log_prob"][0]
            # Two points: (-0.5, 10), and (start, 20), which is higher and to the left.
            area = (-0.5 - corner[0]) * (10 - 1) + (start - corner[0]) * (20 - 10)
            expected[label, seed] = area
    table = table_of(runs)
    volumes = [expected["a", 0], expected["a", 1]]
    error = np.std(volumes, ddof=1) / 2**0.5
    assert table["a"]["hypervolume"] == f"{np.mean(volumes):.3f} +- {error:.3f}"
    assert table["b"]["hypervolume"] == f"{expected['b', 0]:.3f}"


@pytest.mark.parametrize(
    "vendi, few, label",
    [(1.4, False, "a COLLAPSED"), (1.4, True, "a"), (1.6, False, "a")],
)
def test_a_run_that_ends_with_copies_is_marked(vendi, few, label):
    run = curve([-1, -0.5], [20, vendi]) | {"few": few}
    whole = curve([-1, -0.5], [20, 15])
    assert list(table_of({"a": {0: whole, 1: run}})) == [label]


# --------------------------------------------------------------------------------------------------
# Reading run folders.

PLAIN = [(-1.0, 20, 9), (-0.8, 16, 8), (-0.6, 12, 7)]


def write_run(folder, rows=PLAIN, seed=0, **config):
    """A run folder of train.py with these (log_prob, vendi, fid) at its evaluations."""
    grids = folder / "grids"
    grids.mkdir(parents=True)
    defaults = {"eval_images": 640, "eval_steps": 10, "eval_seed": 0, "eval_prompts": "?"}
    config = {"seed": seed} | defaults | config
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"iteration": 5, "seconds_sample": 60.0, "seconds_train": 30.0}]
    for number, (log_prob, vendi, fid) in enumerate(rows):
        line = {"iteration": 10 * number, "seconds_sample": 60.0}
        line["eval/accuracy"] = 0.8 + number / 100
        line["eval/log_prob"] = log_prob
        line["eval/vendi"] = vendi
        line["eval/distance"] = 5.0
        line["eval/fid"] = fid
        lines.append(line)
        color = (80 * (number > 0), 40 * (seed or 0) + 20, 0)
        Image.new("RGB", (20, 30), color).save(grids / f"{10 * number:05d}.png")
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def test_load_reads_the_evaluations_and_the_time_of_all_iterations(tmp_path):
    curves = compare.load(write_run(tmp_path / "run"))
    assert curves["iteration"].tolist() == [0, 10, 20]
    assert curves["eval/vendi"].tolist() == [20, 16, 12]
    assert curves["minutes"] == (60 + 30 + 3 * 60) / 60


def test_equal_labels_are_seeds_of_one_method(tmp_path):
    folders = [write_run(tmp_path / f"run{n}", seed=n) for n in range(3)]
    runs = compare.open_runs(folders, "a, b,b")
    assert {label: list(seeds) for label, seeds in runs.items()} == {"a": [0], "b": [1, 2]}


def test_a_label_is_the_name_of_the_folder_without_its_number(tmp_path):
    folders = [tmp_path / "ours-0", tmp_path / "ours-1", tmp_path / "run2"]
    assert compare.labels_of(folders, "") == ["ours", "ours", "run2"]


@pytest.fixture
def prompt_files(tmp_path):
    """Two files with the same prompts, and one with others."""
    (tmp_path / "ten.txt").write_text("a coat\n" * 10)
    (tmp_path / "twin.txt").write_text("a coat\n" * 10)
    (tmp_path / "three.txt").write_text("a coat\n" * 3)
    return tmp_path


def test_fewer_than_eight_pictures_of_a_prompt_are_few(prompt_files):
    config = {"eval_prompts": str(prompt_files / "ten.txt")}
    assert compare.few_a_prompt(config | {"eval_images": 70})
    assert not compare.few_a_prompt(config | {"eval_images": 80})
    assert not compare.few_a_prompt({"eval_prompts": "moved.txt", "eval_images": 70})
    folder = write_run(prompt_files / "run", eval_images=70, **config)
    assert compare.open_runs([folder], "")["run"][0]["few"]


def test_the_same_prompts_may_lie_in_two_files(prompt_files):
    for seed, name in enumerate(("ten", "twin")):
        path = str(prompt_files / f"{name}.txt")
        write_run(prompt_files / f"run-{seed}", seed=seed, eval_prompts=path)
    runs = compare.open_runs([prompt_files / "run-0", prompt_files / "run-1"], "")
    assert list(runs["run"]) == [0, 1]


@pytest.mark.parametrize(
    "config, message",
    [
        ({"eval_images": 320}, "--eval_images was 320, and 640 in"),
        ({"eval_prompts": "three.txt"}, "--eval_prompts was three.txt, and ten.txt in"),
        ({"seed": None}, "names no seed"),
        ({"seed": 0}, "a second run 'run' with seed 0"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(prompt_files, monkeypatch, config, message):
    monkeypatch.chdir(prompt_files)
    write_run(prompt_files / "run-0", eval_prompts="ten.txt")
    write_run(prompt_files / "run-1", **({"seed": 1, "eval_prompts": "ten.txt"} | config))
    with pytest.raises(ValueError, match=message) as caught:
        compare.open_runs([prompt_files / "run-0", prompt_files / "run-1"], "")
    assert str(prompt_files / "run-1") in str(caught.value)


def damage_run(folder, kind):
    """Makes a run folder unreadable in the way that `kind` says."""
    metrics = folder / "metrics.jsonl"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no metrics":
        metrics.unlink()
    elif kind == "no evaluation":
        metrics.write_text('{"iteration": 0, "reward": 1.0}\n')
    elif kind == "truncated":
        metrics.write_text('{"iteration": 0}\n{"eval/f')


@pytest.mark.parametrize(
    "kind, message",
    [
        ("no config", "config.json"),
        ("no metrics", "metrics.jsonl: not the metrics of a run"),
        ("no evaluation", "holds no evaluation; give a run folder"),
        ("truncated", "metrics.jsonl: not the metrics of a run"),
    ],
)
def test_a_folder_that_is_no_run_is_named(tmp_path, kind, message):
    folder = write_run(tmp_path / "run")
    damage_run(folder, kind)
    with pytest.raises(ValueError, match=message) as caught:
        compare.open_runs([folder], "")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "labels, message",
    [
        ("a", "--labels a: 1 labels for 2 runs"),
        ("a,b,c", "3 labels for 2 runs"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        compare.labels_of(["x", "y"], labels)


# --------------------------------------------------------------------------------------------------
# Runs without a judge.


def unjudged(alignment, diversity, name="eval/reward_jpeg", **others):
    """The evaluations of a run of a base without an evaluator."""
    rows = {name: alignment, "eval/vendi": diversity, "eval/distance": [0.5] * len(alignment)}
    return {key: np.array(values, float) for key, values in (rows | others).items()}


def test_a_reward_takes_the_place_of_the_judge_with_the_same_numbers():
    alignment, diversity = ([-1, -0.8, -0.5], [-1, -0.7, -0.6]), ([20, 15, 9], [20, 18, 12])
    judged, other = {}, {}
    for label, a, d in zip(("plain", "ours"), alignment, diversity):
        judged[label] = {0: curve(a, d)}
        other[label] = {0: unjudged(a, d)}
    lines = compare.table(other).splitlines()
    names = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert names == ["run", "seeds", "reward_jpeg", "Vendi", "pairwise distance", *compare.GAINS]
    expected = table_of(judged)
    for line in lines[2:4]:
        cells = dict(zip(names, [cell.strip() for cell in line.split("|")[1:-1]]))
        for gain in compare.GAINS:
            assert cells[gain] == expected[cells["run"]][gain]
    assert lines[4] == (
        "No evaluator judges these runs. Alignment: the reward jpeg, which training raises."
    )


def test_the_alignment_is_what_all_runs_logged():
    one = unjudged([1, 2], [9, 8], **{"eval/reward_b": [1, 2]})
    two = unjudged([1, 2], [9, 8], name="eval/reward_b")
    judged = curve([1, 2], [9, 8])
    assert compare.alignment_of({"one": {0: one}})[0] == "eval/reward_jpeg"
    assert compare.alignment_of({"one": {0: one}, "two": {0: two}})[0] == "eval/reward_b"
    with pytest.raises(
        ValueError, match="no alignment in common .one: reward_jpeg, vendi"
    ) as found:
        compare.alignment_of({"one": {0: one}, "judged": {0: judged}})
    assert "judged: log_prob, vendi, accuracy" in str(found.value)


@pytest.mark.parametrize("end, is_marked", [(1.05, False), (1.01, True)])
def test_without_a_judge_a_collapse_is_relative_to_the_base(end, is_marked):
    runs = {"a": {0: unjudged([0, 1], [1.2, end])}}
    assert ("COLLAPSED" in compare.table(runs)) == is_marked


def test_runs_of_a_distance_alone_align_by_it(tmp_path):
    """Its fall is the alignment, and it is drawn as a distance: lower is better."""
    folder = write_run(tmp_path / "run-0")
    lines = []
    for number, distance in enumerate((9.0, 7.0, 6.0)):
        line = {"iteration": number, "eval/vendi": 9.0 - number, "eval/distance": 0.5}
        lines.append(line | {"eval/fid_trained": distance})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    runs = compare.open_runs([folder], "")
    x, label = compare.alignment_of(runs)
    assert runs["run"][0][x].tolist() == [-9, -7, -6] and "minus" in label
    panels = [name for name, _ in compare.panels_of(runs)]
    assert panels == ["eval/vendi", "eval/fid_trained"]
    assert "fid_trained" in compare.table(runs).splitlines()[0]


@pytest.mark.slow
def test_runs_of_a_base_without_an_evaluator_are_compared(tiny, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    shutil.rmtree(base / "evaluator")
    for seed in ("0", "1"):
        for name, words in (("plain", "--drift off --select all --keep 4"), ("drift", "")):
            out = tmp_path / f"{name}-{seed}"
            launch(small(base, out, "--reward", "jpeg", "--seed", seed, *words.split()))
    folders = sorted(tmp_path.glob("plain-*")) + sorted(tmp_path.glob("drift-*"))
    capsys.readouterr()
    command("compare", *folders, "--out", tmp_path / "c.png")
    out = capsys.readouterr().out
    assert "| plain | 2 |" in out and "| drift | 2 |" in out and "the reward jpeg" in out
    command("grid", *folders, "--out", tmp_path / "g.png")
    for name in ("c.png", "g.png"):
        assert len(np.unique(colors_of(tmp_path / name), axis=0)) > 50


# --------------------------------------------------------------------------------------------------
# Figures and commands.


def colors_of(path):
    """A PNG -> uint8 [pixels, 3]."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).reshape(-1, 3)


def test_the_sheets_of_a_grid_are_before_and_after(tmp_path):
    folders = [write_run(tmp_path / name, seed=int(name[-1])) for name in ("plain-0", "ours-0")]
    folders.append(write_run(tmp_path / "ours-1", seed=1))
    (folders[0] / "grids" / ".tmp-00020.png").write_bytes(b"half")
    sheets = compare.grid_files(folders, "")
    assert {title: str(path.relative_to(tmp_path)) for title, path in sheets.items()} == {
        "before": "plain-0/grids/00000.png",
        "plain": "plain-0/grids/00020.png",
        "ours, seed 0": "ours-0/grids/00020.png",
        "ours, seed 1": "ours-1/grids/00020.png",
    }


def test_a_grid_of_a_broken_picture_is_refused(tmp_path):
    folder = write_run(tmp_path / "plain-0")
    sheet = folder / "grids" / "00020.png"
    sheet.write_bytes(sheet.read_bytes()[:60])
    with pytest.raises(ValueError, match="00020.png: not a picture"):
        compare.grid_files([folder], "")


def test_a_grid_needs_two_pictures(tmp_path):
    folder = write_run(tmp_path / "run", PLAIN[:1])
    with pytest.raises(ValueError, match="1 pictures in grids/, and two are needed"):
        compare.grid_files([folder], "")


@pytest.mark.run
def test_the_commands_print_and_draw(tmp_path, capsys):
    folders = [write_run(tmp_path / "plain-0"), write_run(tmp_path / "ours-1", seed=1)]
    figure = tmp_path / "figures" / "c.png"
    command("compare", *folders, "--out", figure)
    out = capsys.readouterr().out
    assert list(cells_of(out)) == ["plain", "ours"]
    assert out.endswith(f"{figure}: written\n")
    colors = colors_of(figure)
    for color in ((0, 20, 0), (80, 20, 0), (80, 60, 0)):  # before, and after each run
        assert (colors == color).all(1).sum() > 1000

    command("grid", *folders, "--out", tmp_path / "g.png")
    colors = colors_of(tmp_path / "g.png")
    for color in ((0, 20, 0), (80, 20, 0), (80, 60, 0)):
        assert (colors == color).all(1).sum() > 10000


@pytest.mark.slow
def test_runs_of_train_are_compared(tiny, tmp_path, capsys):
    launch(small(tiny, tmp_path / "plain", "--drift", "off", "--select", "all", "--keep", "4"))
    launch(small(tiny, tmp_path / "drift"))
    capsys.readouterr()
    command("compare", tmp_path / "plain", tmp_path / "drift", "--out", tmp_path / "c.png")
    row = cells_of(capsys.readouterr().out)["drift"]
    lines = (tmp_path / "drift" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert row["FID"] == f"{last['eval/fid']:.3f}"
    assert row["accuracy"] == f"{last['eval/accuracy']:.3f}"
    command("grid", tmp_path / "plain", tmp_path / "drift", "--out", tmp_path / "g.png")
    assert len(np.unique(colors_of(tmp_path / "g.png"), axis=0)) > 50


@pytest.mark.slow
def test_coefficients_are_drawn(tmp_path):
    rows = []
    for update in range(3):
        coefficients = [[0.5 + update, 0.5 - update], [1.0, 0.0]]  # two blocks, two checkpoints
        rows.append({"update": update, "coefficients": coefficients, "std": [0.1, 0.2]})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    compare.draw_coefficients(tmp_path, ["first", "second"])
    assert len(np.unique(colors_of(tmp_path / "coefficients.png"), axis=0)) > 50
