"""report.png of a run: the same noise before and after, the front so far, curves; and the table.

`eval.py compare` draws the same figure for several runs.
A metric has a word for what it is and for the way that is better. The figure and the table of the
end both say which numbers got worse. Nothing here changes what is trained.
"""

from pathlib import Path

import numpy as np

from commands import compare
from commands.compare import BLUE, COLORS, GREY, ORANGE
from prompting import read_prompts

# Metric "eval/NAME": (1: higher is better, -1: lower is better; what it is).
MEANING = {
    "accuracy": (1, "share that shows what the prompt says"),
    "log_prob": (1, "log-probability of what it says"),
    "vendi": (1, "different pictures within a prompt"),
    "distance": (1, "mean distance within a prompt"),
    "fid": (-1, "distance to real pictures"),
    "fid_trained": (-1, "distance that the FID reward sees"),
    "modes": (1, "share that is left of what is open"),
}
SMALL = 0.02  # a change of less than this share of the number before is called none


def meaning(name):
    """The direction of a metric that is better, and words for it."""
    if name in MEANING:
        return MEANING[name]
    if name.startswith("modes_"):
        return 1, f"the same of {name.removeprefix('modes_')} alone"
    if name.startswith("reward_"):
        return 1, "a reward that training raises"
    return 1, ""


def judgement(name, before, after):
    """How a metric changed: better, worse, or the same."""
    direction, _ = meaning(name)
    change = direction * (after - before)
    if abs(change) <= SMALL * abs(before):
        return "same"
    return "better" if change > 0 else "worse"


def table(out):
    """The table that ends a run: the first and the last evaluation in metrics.jsonl, in words."""
    rows = [row for row in compare.read_rows(Path(out) / "metrics.jsonl") if "eval/vendi" in row]
    first = rows[0]
    last = rows[-1]
    names = [name.removeprefix("eval/") for name in first if name.startswith("eval/")]
    width = max(12, *(len(name) for name in names))

    lines = [f"{'':{width}}{'before':>10}{'after':>10}"]
    for name in names:
        before = first[f"eval/{name}"]
        after = last[f"eval/{name}"]
        direction, words = meaning(name)
        better = "higher" if direction > 0 else "lower"
        what = f"{words}; {better} is better".removeprefix("; ")
        mark = {"worse": "WORSE", "better": "better", "same": ""}[judgement(name, before, after)]
        lines.append(f"{name:{width}}{before:10.3f}{after:10.3f}  {mark:6}  {what}")
    lines.append(
        f"{out}: {last['iteration']} iterations; see report.png first; pictures in grids/, "
        "the tuned model in model/"
    )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The figure.


def draw(out):
    """Writes report.png in the run folder; nothing, where there is no second evaluation yet."""
    out = Path(out)
    curves = compare.load(out)
    if len(curves["iteration"]) < 2:
        return
    runs = {out.name: {0: curves}}
    alignment = compare.alignment_of(runs)
    panels = compare.panels_of(runs)
    plt = compare.pyplot()
    figure = plt.figure(figsize=(2.7 * (3 + len(panels)), 9.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(5.6, 4))
    figure.suptitle(verdict(out.name, curves, alignment, panels), fontsize=12)

    sheets = above.subplots(1, 2)
    last = int(curves["iteration"][-1])
    draw_sheet(sheets[0], out / "grids" / "00000.png", "before")
    title = f"after {last} iterations: the same noise in the same place"
    draw_sheet(sheets[1], out / "grids" / f"{last:05d}.png", title)
    write_prompts(sheets[0], out)

    axes = below.subplots(1, 3 + len(panels))
    draw_front(axes[0], curves, alignment, panels[0])
    draw_rewards(axes[1], [out], [out.name])
    for axis, panel in zip(axes[2:], (alignment, *panels)):
        draw_curve(axis, curves, panel)
    compare.save_figure(figure, out / "report.png", dpi=80)


def draw_runs(folders, labels, path):
    """The same figure of several runs, for `eval.py compare`: a sheet and a colour for each label.

    Of a label with several seeds the sheet is the first run's, and a line is the mean of the seeds.
    """
    runs = compare.open_runs(folders, labels)
    alignment = compare.alignment_of(runs)
    panels = compare.panels_of(runs)
    first_folders = {}
    for folder, label in zip(folders, compare.labels_of(folders, labels)):
        first_folders.setdefault(label, Path(folder))
    sheets = sheets_of(first_folders)
    plt = compare.pyplot()
    count = max(2, len(sheets))
    width = max(2.7 * (3 + len(panels)), 4.5 * count)
    figure = plt.figure(figsize=(width, 9.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(5, 4))

    for axis, (title, png) in zip(above.subplots(1, count, squeeze=False)[0], sheets.items()):
        draw_sheet(axis, png, title)
        if title == "before":
            write_prompts(axis, png.parent.parent)

    axes = below.subplots(1, 3 + len(panels))
    compare.draw_panel(axes[0], runs, alignment, panels[0])
    axes[0].set(xlabel="alignment", ylabel=short(panels[0][1]))
    axes[0].set_title("the front\nbetter: right and up", fontsize=10)
    axes[0].legend(fontsize=7, loc="lower left")
    axes[0].locator_params(axis="x", nbins=4)
    draw_rewards(axes[1], folders, compare.labels_of(folders, labels))
    for axis, (metric, label) in zip(axes[2:], (alignment, *panels)):
        compare.draw_panel(axis, runs, ("iteration", "iteration"), (metric, ""))
        axis.set_title(two_lines(metric, label), fontsize=10)
    compare.save_figure(figure, path, dpi=80)


def sheets_of(folders):
    """{label: run folder} -> {title: PNG}: the first run's pictures before, each run's after.

    A run without two sheets is left out.
    """
    sheets = {}
    for label, folder in folders.items():
        pngs = sorted(folder.glob("grids/[0-9]*.png"))
        if len(pngs) < 2:
            continue
        sheets.setdefault("before", pngs[0])
        sheets[f"{label}, after {int(pngs[-1].stem)} iterations"] = pngs[-1]
    return sheets


def verdict(name, curves, alignment, panels):
    """The headline: what became of alignment, diversity and the distance to real pictures."""
    words = []
    for metric, label in (alignment, *panels):
        before = curves[metric][0]
        after = curves[metric][-1]
        how = judgement(metric.removeprefix("eval/"), before, after)
        change = f"{100 * (after / before - 1):+.0f} %, " if before > 0 else ""
        words.append(f"{short(label)} {before:.3g} to {after:.3g} ({change}{how})")
    return f"{name}\n{';  '.join(words)}"


def draw_sheet(axis, png, title):
    """One grid: a row a prompt, the same noise in the same place. A lost one stays empty."""
    axis.set_title(title)
    axis.axis("off")
    try:
        axis.imshow(compare.pyplot().imread(png), interpolation="nearest")
    except (OSError, SyntaxError):
        axis.text(0.5, 0.5, f"{png.name} cannot be read", ha="center")


def write_prompts(axis, out):
    """The prompts beside the rows of a sheet, where their file has not moved."""
    try:
        prompts = read_prompts(compare.read_config(out)["eval_prompts"])
    except (KeyError, TypeError, ValueError):
        return
    if len(prompts) > 30:  # the rows are lower than a line of text
        return
    bottom, top = axis.get_ylim()
    height = (bottom - top) / len(prompts)
    for row, prompt in enumerate(prompts):
        place = top + (row + 0.5) * height
        axis.text(
            -0.01,
            place,
            prompt.text[:40],
            ha="right",
            va="center",
            fontsize=8,
            transform=axis.get_yaxis_transform(),
        )


def draw_front(axis, curves, alignment, diversity):
    """Diversity over alignment, from the base (a star) on."""
    x = curves[alignment[0]]
    y = curves[diversity[0]]
    axis.plot(x, y, "o-", color=BLUE, ms=4)
    axis.plot(x[0], y[0], "*", color="black", ms=15, label="the base")
    axis.plot(x[-1], y[-1], "s", color=BLUE, ms=8, label="now")
    axis.set(xlabel="alignment", ylabel=short(diversity[1]))
    axis.set_title("from the base on\nbetter: right and up", fontsize=10)
    axis.set_ylim(bottom=0, top=1.1 * y.max())
    axis.legend(fontsize=8, loc="lower left")
    axis.locator_params(axis="x", nbins=4)
    axis.grid(alpha=0.3)


def draw_rewards(axis, folders, labels):
    """The mean reward of each iteration's rollouts, a line a run, a colour a label.

    Of several runs it is the first term of --reward that all have, since sums of others differ.
    """
    rewards = []
    for folder in folders:
        rows = compare.read_rows(Path(folder) / "metrics.jsonl")
        # The rows of the tilted base are no iterations.
        rewards.append([row for row in rows if "reward" in row and "beta" not in row])
    name = "reward"
    first_rows = [rows[0] for rows in rewards if rows]
    if len(folders) > 1 and first_rows:
        terms = [term for term in first_rows[0] if term.startswith("reward/")]
        common = [term for term in terms if all(term in row for row in first_rows)]
        name = common[0] if common else name
    colors = {}
    for label in labels:
        color = COLORS[len(colors) % len(COLORS)]
        colors.setdefault(label, GREY if len(folders) == 1 else color)
    for rows, label in zip(rewards, labels):
        iterations = [row["iteration"] for row in rows]
        axis.plot(iterations, [row[name] for row in rows], color=colors[label])
    what = name.replace("reward/", "reward ")
    axis.set_xlabel("iteration")
    axis.set_title(f"{what} of the rollouts\nhigher is better", fontsize=10)
    axis.grid(alpha=0.3)


def two_lines(metric, label, mark=""):
    """The title of a panel of a metric: what it is, and which way is better."""
    better = "higher" if meaning(metric.removeprefix("eval/"))[0] > 0 else "lower"
    return f"{short(label)}\n{better} is better{mark}"


def short(label):
    """What stands before the explanation in the label of a panel."""
    return label.partition(":")[0].partition(" (")[0]


def draw_curve(axis, curves, panel):
    """A metric over the iterations; orange where it got worse."""
    metric, label = panel
    values = curves[metric]
    how = judgement(metric.removeprefix("eval/"), values[0], values[-1])
    color = ORANGE if how == "worse" else BLUE
    axis.plot(curves["iteration"], values, "o-", color=color, ms=4)
    axis.axhline(values[0], color="black", lw=1, ls=":")
    mark = ": GOT WORSE" if how == "worse" else ""
    axis.set_xlabel("iteration (dotted: the base)")
    axis.set_title(two_lines(metric, label, mark), fontsize=10)
    axis.set_ylim(top=1.05 * max(values.max(), 0), bottom=min(0, 1.05 * values.min()))
    axis.grid(alpha=0.3)


def is_collapsing(out):
    """Whether diversity is below half of the base's while the reward rises.

    By the Vendi scores above 1 of the first and the last evaluation, or the modes where they are
    logged, and the mean rewards of the first and the last five iterations.
    """
    rows = compare.read_rows(Path(out) / "metrics.jsonl")
    evaluations = [row for row in rows if "eval/vendi" in row]
    scores = [row.get("eval/modes", row["eval/vendi"] - 1) for row in evaluations]
    rewards = [row["reward"] for row in rows if "reward" in row]
    if len(scores) < 2 or len(rewards) < 2:
        return False
    rises = np.mean(rewards[-5:]) > np.mean(rewards[:5])
    return bool(rises and scores[-1] < 0.5 * scores[0])
