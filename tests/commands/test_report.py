"""report.png and the table that ends a run."""

import json

import numpy as np
import pytest
from conftest import launch, small
from PIL import Image

from commands import compare, report


def write_run(out, evaluations, rewards=(), judged=True):
    """A run folder: evaluations [(alignment, vendi, fid)] ten iterations apart, and grids."""
    (out / "grids").mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({"eval_prompts": str(out / "prompts.txt")}))
    (out / "prompts.txt").write_text("a coat\na bag\n")
    name = "log_prob" if judged else "reward_jpeg"
    rows = {i: {"reward": reward} for i, reward in enumerate(rewards, 1)}
    for number, (alignment, vendi, fid) in enumerate(evaluations):
        row = {f"eval/{name}": alignment, "eval/vendi": vendi}
        if judged:
            row["eval/fid"] = fid
        rows.setdefault(10 * number, {}).update(row)
        grid = np.full((20, 50, 3), 40 * number, np.uint8)
        Image.fromarray(grid).save(out / "grids" / f"{10 * number:05d}.png")
    lines = [json.dumps({"iteration": i} | rows[i]) + "\n" for i in sorted(rows)]
    (out / "metrics.jsonl").write_text("".join(lines))
    return out


BETTER_AND_LESS_DIVERSE = [(-2.0, 20.0, 10.0), (-1.0, 15.0, 10.1)]


def test_the_table_says_what_got_worse_and_which_file_to_open(tmp_path):
    out = write_run(tmp_path / "run", BETTER_AND_LESS_DIVERSE)
    head, log_prob, vendi, fid, end = report.table(out).splitlines()
    assert head.split() == ["before", "after"]
    assert log_prob.split()[:4] == ["log_prob", "-2.000", "-1.000", "better"]
    assert vendi.split()[:4] == ["vendi", "20.000", "15.000", "WORSE"]
    assert fid.split()[:3] == ["fid", "10.000", "10.100"]  # by one per cent: neither
    assert "WORSE" not in fid and fid.endswith("lower is better")
    assert end.startswith(f"{out}: 10 iterations; see report.png")


@pytest.mark.parametrize(
    "name, before, after, expected",
    [
        ("vendi", 20.0, 19.0, "worse"),
        ("vendi", 20.0, 21.0, "better"),
        ("vendi", 20.0, 20.3, "same"),
        ("fid", 10.0, 12.0, "worse"),
        ("fid", 10.0, 8.0, "better"),
        ("log_prob", -2.0, -1.0, "better"),
        ("log_prob", -1.0, -2.0, "worse"),
        ("modes_cell", 1.0, 0.5, "worse"),
        ("reward_anything", 0.0, 0.1, "better"),
    ],
)
def test_which_way_is_better(name, before, after, expected):
    assert report.judgement(name, before, after) == expected


def drawn(out):
    report.draw(out)
    with Image.open(out / "report.png") as figure:
        return np.asarray(figure.convert("RGB")).astype(int)


def share(pixels, color):
    """How many of the pixels have a colour "#RRGGBB"."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return (abs(pixels - wanted).max(-1) < 8).mean()


@pytest.mark.run
def test_a_curve_that_got_worse_has_another_colour(tmp_path):
    worse = drawn(write_run(tmp_path / "a", BETTER_AND_LESS_DIVERSE, rewards=[0.1, 0.2]))
    better = drawn(write_run(tmp_path / "b", [(-2.0, 20.0, 10.0), (-1.0, 22.0, 9.0)]))
    assert worse.shape == better.shape
    assert share(worse, report.ORANGE) > 1e-4
    assert share(better, report.ORANGE) == 0 and share(better, report.BLUE) > 1e-4
    # Both sheets are there: black before, grey 40 after.
    assert share(worse, "#000000") > 0.02 and share(worse, "#282828") > 0.02


@pytest.mark.run
def test_a_run_without_a_judge_has_a_report(tmp_path):
    out = write_run(tmp_path / "run", BETTER_AND_LESS_DIVERSE, judged=False)
    assert drawn(out).size
    assert "a reward that training raises" in report.table(out)


@pytest.mark.run
def test_a_lost_grid_stops_no_run(tmp_path):
    out = write_run(tmp_path / "run", BETTER_AND_LESS_DIVERSE)
    (out / "grids" / "00000.png").unlink()
    (out / "grids" / "00010.png").write_bytes(b"no picture")
    assert drawn(out).size


def test_before_a_second_evaluation_there_is_nothing_to_draw(tmp_path):
    out = write_run(tmp_path / "run", BETTER_AND_LESS_DIVERSE[:1])
    report.draw(out)
    assert not (out / "report.png").exists()


@pytest.mark.parametrize(
    "vendi, rewards, expected",
    [
        (10.0, [0.0] * 5 + [1.0] * 5, True),  # (10 - 1) / (20 - 1) is below a half
        (11.0, [0.0] * 5 + [1.0] * 5, False),
        (3.0, [1.0] * 5 + [0.0] * 5, False),  # the reward falls
    ],
)
def test_a_collapse_is_half_of_the_diversity_lost_while_the_reward_rises(
    tmp_path, vendi, rewards, expected
):
    out = write_run(tmp_path / "run", [(-2.0, 20.0, 10.0), (-1.0, vendi, 10.0)], rewards)
    assert report.is_collapsing(out) == expected


def test_modes_count_before_the_vendi_score(tmp_path):
    """Broken pictures are unlike: the Vendi score rises while half of the values are lost."""
    out = write_run(tmp_path / "run", [(-2.0, 20.0, 10.0), (-1.0, 30.0, 90.0)], range(10))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for modes, collapsing in ((0.6, False), (0.4, True)):
        for row in rows:
            if "eval/vendi" in row:
                row["eval/modes"] = 1.0 if row["iteration"] == 0 else modes
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / "metrics.jsonl").write_text(text)
        assert report.is_collapsing(out) == collapsing
    panels = compare.panels_of({"run": {0: compare.load(out)}})
    assert [name for name, _ in panels] == ["eval/modes", "eval/vendi", "eval/fid"]


@pytest.mark.run
def test_a_run_writes_its_report_and_says_once_that_it_collapses(
    tiny, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(report, "is_collapsing", lambda out: True)
    launch(small(tiny, tmp_path / "run", "--iterations", 2, "--eval_every", 1))
    printed = capfd.readouterr()
    assert (tmp_path / "run" / "report.png").is_file()
    assert printed.err.count("a collapse has begun") == 1
    assert "see report.png" in printed.out


def test_the_sheets_of_several_runs_are_before_and_after_each(tmp_path):
    runs = {}
    for name in ("plain", "drift", "tilted"):
        runs[name] = write_run(tmp_path / name, BETTER_AND_LESS_DIVERSE)
    for png in (runs["tilted"] / "grids").iterdir():
        png.unlink()
    assert report.sheets_of(runs) == {
        "before": runs["plain"] / "grids" / "00000.png",
        "plain, after 10 iterations": runs["plain"] / "grids" / "00010.png",
        "drift, after 10 iterations": runs["drift"] / "grids" / "00010.png",
    }


@pytest.mark.run
def test_runs_of_which_none_has_a_sheet_are_drawn(tmp_path):
    folders = [write_run(tmp_path / f"run-{seed}", BETTER_AND_LESS_DIVERSE) for seed in (0, 1)]
    for folder, seed in zip(folders, (0, 1)):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"seed": seed}))
        for png in (folder / "grids").iterdir():
            png.unlink()
    report.draw_runs(folders, "", tmp_path / "runs.png")
    with Image.open(tmp_path / "runs.png") as figure:
        assert figure.width > 1000
