"""Comparing runs of train.py: at equal alignment, since a more diverse run may have learned less.

Alignment is the evaluator's log-probability, diversity its Vendi score within a prompt, or in the
gains the modes that are left where they can be counted (assets/shapes): a Vendi score rises for
broken pictures, too. All are from the evaluations in metrics.jsonl. Runs of a base without an
evaluator are compared by what they logged: alignment is then a reward that all of them trained on,
and diversity is measured in --diversity_features. The front of a run is, at each alignment a, the
largest diversity that its curve shows at alignment a or more (linear between evaluations).

    gain at equal alignment    ratio of the two fronts' means over ten alignments, from the base
                               model's to the highest that both runs reach; and at that highest
    gain at equal diversity    the same along the other axis, of alignment gained over the base
    hypervolume                area of all (alignment, diversity) that some evaluation exceeds in
                               both, above the lowest start of all runs and a Vendi score of 1

Where the tilted base is among the runs (experiments/tilted.py), the table says how much of its
three gains each run reaches: it is what choosing among the base's own pictures gives.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

from prompting import read_prompts
from rewards.targets import read_picture
from support import files

ALIGNMENT = ("eval/log_prob", "alignment: held-out log-probability (higher is better)")
PANELS = [
    ("eval/vendi", "diversity: Vendi score within a prompt (higher is better)"),
    ("eval/fid", "Frechet distance to real pictures (lower is better)"),
]
MODES = ("eval/modes", "modes left: share of what real scenes have (higher is better)")
TRAINED = "eval/fid_trained"  # the distance that the reward lowers; alignment is minus that
UNJUDGED = "alignment/fid_trained"  # minus TRAINED, for runs that log nothing else

# Of Okabe and Ito's palette, which colour-blind readers tell apart.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
COLORS = [BLUE, "#E69F00", "#009E73", "#CC79A7", ORANGE, "#56B4E9", GREY]

# The columns of metrics, by name; others keep their own.
TITLES = {
    "accuracy": "accuracy",
    "log_prob": "log-prob",
    "vendi": "Vendi",
    "distance": "pairwise distance",
    "fid": "FID",
    "modes": "modes",
}
GAINS = (
    "diversity at equal alignment, %",
    "at the highest, %",
    "alignment at equal diversity, %",
    "hypervolume",
    "minutes",
)
OF_TILTED = "of the tilted base's three gains, %"
COLLAPSED = 1.5  # a judge's Vendi score below this, of eight pictures a prompt or more

# Flags that runs must share to be compared, and why.
EQUAL_FLAGS = {
    "eval_images": "the bias of FID falls with their number",
    "eval_steps": "pictures of more steps are others",
    "eval_seed": "only the same noise is paired",
    "eval_prompts": "other prompts are harder, or more diverse",
}


# --------------------------------------------------------------------------------------------------
# Reading runs.


def load(folder):
    """A run's evaluations -> {"iteration", every "eval/..." metric: array [E]}, and "minutes".

    minutes: a number, what sampling and training took. Raises ValueError, in one line, where
    metrics.jsonl does not hold them.
    """
    path = Path(folder) / "metrics.jsonl"
    try:
        curves = read_curves(path)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not the metrics of a run ({reason})") from None
    if "eval/vendi" not in curves:
        raise ValueError(f"{path}: holds no evaluation; give a run folder of train.py")
    return curves


def read_curves(path):
    """metrics.jsonl -> {"iteration", "eval/..."} of the evaluations as arrays, and "minutes"."""
    rows = read_rows(path)
    evaluations = [row for row in rows if "eval/vendi" in row]
    names = ["iteration"]
    if evaluations:
        names += [name for name in evaluations[0] if name.startswith("eval/")]
    curves = {}
    for name in names:
        curves[name] = np.array([row[name] for row in evaluations], float)
    if TRAINED in curves:
        curves[UNJUDGED] = -curves[TRAINED]
    seconds = sum(row.get("seconds_sample", 0) + row.get("seconds_train", 0) for row in rows)
    curves["minutes"] = seconds / 60
    curves["tilted"] = any("beta" in row for row in evaluations)  # experiments/tilted.py
    return curves


def is_tilted(seeds):
    """Whether runs {seed: evaluations} are the tilted base: no training, only a choice."""
    return any(curve.get("tilted") for curve in seeds.values())


def read_rows(path):
    """The lines of a metrics.jsonl -> a list of objects."""
    return [json.loads(line) for line in files.read_log(path)]


def labels_of(folders, labels):
    """The label of each run folder: from --labels, else the folder's name without -NUMBER.

    Raises ValueError unless there is one for each.
    """
    if labels:
        names = [label.strip() for label in labels.split(",")]
    else:
        names = [re.sub(r"-\d+$", "", Path(folder).resolve().name) for folder in folders]
    given = [name for name in names if name]
    if len(names) != len(folders) or len(given) != len(folders):
        raise ValueError(
            f"--labels {labels}: {len(given)} labels for {len(folders)} runs; "
            "write one for each, with commas between"
        )
    return names


def open_runs(folders, labels):
    """Run folders and --labels -> {label: {seed: evaluations}}, in the order given.

    Raises ValueError, in one line, for folders that are not runs or cannot be compared.
    """
    runs = {}
    configs = [read_config(folder) for folder in folders]
    names = labels_of(folders, labels)
    for folder, label, config in zip(folders, names, configs):
        check_comparable(folder, config, folders[0], configs[0])
        seed = config.get("seed")
        if type(seed) is not int:
            raise ValueError(f"{folder}: its config.json names no seed, by which runs are paired")
        seeds = runs.setdefault(label, {})
        if seed in seeds:
            raise ValueError(
                f"{folder}: a second run {label!r} with seed {seed}; "
                "give runs of different methods different --labels"
            )
        seeds[seed] = load(folder)
        seeds[seed]["few"] = few_a_prompt(config)
    return runs


def check_comparable(folder, config, first_folder, first_config):
    """Raises ValueError if two runs were evaluated in different ways."""
    for name, reason in EQUAL_FLAGS.items():
        if saved_value(config, name) != saved_value(first_config, name):
            raise ValueError(
                f"{folder}: --{name} was {config.get(name)}, "
                f"and {first_config.get(name)} in {first_folder}: {reason}; compare equal ones"
            )


def read_config(folder):
    """The config.json of a run folder. Raises ValueError."""
    try:
        return files.read_json(Path(folder) / "config.json")
    except ValueError as error:
        raise ValueError(f"{error}; or give a run folder of train.py") from None


def saved_value(config, name):
    """The value of a flag of a run. Of eval_prompts the prompts themselves, if they can be read.

    The same prompts may lie in several files; a file that has moved counts by its path.
    """
    if name == "eval_prompts":
        try:
            return read_prompts(config[name])
        except (KeyError, TypeError, ValueError):
            pass
    return config.get(name)


def few_a_prompt(config):
    """Whether an evaluation has fewer than eight pictures a prompt, too few to see a collapse."""
    try:
        prompts = read_prompts(config["eval_prompts"])
        return config["eval_images"] < 8 * len(prompts)
    except (KeyError, TypeError, ValueError):  # the prompt file has moved
        return False


# --------------------------------------------------------------------------------------------------
# What runs have in common.


def common_metrics(runs):
    """The metrics "eval/..." that every run logged, in the order of the first."""
    curves = [curve for seeds in runs.values() for curve in seeds.values()]
    first, *others = curves
    names = [name for name in first if name.startswith("eval/")]
    return [name for name in names if all(name in other for other in others)]


def alignment_of(runs):
    """The metric that is their alignment, and the label of its axis.

    The judge's, or a reward that all runs trained on, or minus the distance that it lowers. Raises
    ValueError where they have none of these in common.
    """
    common = common_metrics(runs)
    if ALIGNMENT[0] in common:
        return ALIGNMENT
    for name in common:
        if name.startswith("eval/reward_"):
            reward = name.removeprefix("eval/reward_")
            return name, f"alignment: the reward {reward}, which training raises"
    if TRAINED in common:
        return UNJUDGED, "alignment: minus the Frechet distance that training lowers"
    logged = []
    for label, seeds in runs.items():
        names = [name for name in next(iter(seeds.values())) if name.startswith("eval/")]
        logged.append(f"{label}: {', '.join(name.removeprefix('eval/') for name in names)}")
    raise ValueError(
        f"the runs have no alignment in common ({'; '.join(logged)}); "
        "compare runs of one reward, or of a base with an evaluator/"
    )


def panels_of(runs):
    """The panels of their figure: modes, diversity and a Frechet distance, if all logged them.

    Modes are counted, and stand first; the Vendi score rises also for pictures that are broken.
    """
    common = common_metrics(runs)
    diversity, fid = PANELS
    panels = [panel for panel in (MODES, diversity, fid) if panel[0] in common]
    if fid not in panels and TRAINED in common:
        panels.append((TRAINED, "Frechet distance that the FID reward sees (lower is better)"))
    return panels


# --------------------------------------------------------------------------------------------------
# Comparing curves.


def front(x, y, levels):
    """The largest y that the curve (x, y) shows where x is at least each level -> [L].

    NaN where x never gets there.

    >>> front([0, 1, 2], [10, 8, 3], [0.5, 1, 2]).tolist()
    [9.0, 8.0, 3.0]
    """
    points = np.arange(len(x))
    fine = np.linspace(0, len(x) - 1, 50 * (len(x) - 1) + 1)  # holds the evaluations themselves
    fine_x = np.interp(fine, points, x)
    fine_y = np.interp(fine, points, y)
    largest = []
    for level in levels:
        reached = fine_x >= level
        largest.append(fine_y[reached].max() if reached.any() else np.nan)
    return np.array(largest)


def gain_at_equal_alignment(method, plain, diversity="eval/vendi", x=ALIGNMENT[0]):
    """Relative gain in diversity over ten alignments that both runs reach; and at the highest.

    Where a run never rises above the base model there is no such range: (NaN, NaN), and not 0,
    since nothing was compared.
    """
    start = plain[x][0]
    highest = min(plain[x].max(), method[x].max())
    if not highest > start:
        return float("nan"), float("nan")
    levels = np.linspace(start, highest, 11)[1:] - 1e-9
    ours = front(method[x], method[diversity], levels)
    theirs = front(plain[x], plain[diversity], levels)
    return float(ours.mean() / theirs.mean() - 1), float(ours[-1] / theirs[-1] - 1)


def gain_at_equal_diversity(method, plain, diversity="eval/vendi", x=ALIGNMENT[0]):
    """Relative gain in alignment over the base model's, at ten diversities.

    They go from the base model's down to the plain run's lowest. NaN if the plain run loses no
    diversity or gains no alignment: then there is nothing to be relative to.
    """
    start = plain[diversity][0]
    lowest = plain[diversity].min()
    levels = np.linspace(start, lowest, 11)[1:] + 1e-9
    ours = front(method[diversity], method[x], levels).mean() - plain[x][0]
    theirs = front(plain[diversity], plain[x], levels).mean() - plain[x][0]
    if not (lowest < start and theirs > 0):
        return float("nan")
    return float(ours / theirs - 1)


def hypervolume(x, y, corner):
    """Area of the union of the rectangles from `corner` (x, y) up to each point.

    A point that does not exceed the corner in both coordinates adds nothing.

    >>> hypervolume([1, 2], [10, 5], (0, 0))
    15.0
    """
    left = float(corner[0])
    height = float(corner[1])
    area = 0.0
    points = [(float(a), float(b)) for a, b in zip(x, y) if a > left]
    for a, b in sorted(points, reverse=True):
        area += (a - left) * max(0.0, b - height)
        height = max(height, b)
    return area


def spread(values, scale=100, digits=1, sign="+"):
    """Mean and standard error over the values that are not NaN, by default in per cent -> text.

    Says how many these are where some are NaN.
    """
    kept = [value for value in values if np.isfinite(value)]
    if not kept:
        return "-"
    text = f"{scale * np.mean(kept):{sign}.{digits}f}"
    if len(kept) > 1:
        error = scale * np.std(kept, ddof=1) / len(kept) ** 0.5
        text += f" +- {error:.{digits}f}"
    if len(kept) < len(values):
        text += f" ({len(kept)} of {len(values)})"
    return text


def table(runs):
    """Runs {label: {seed: evaluations}} -> markdown: final metrics, and gains over the first label.

    A run is compared with the first label's run of the same seed. Raises ValueError where runs have
    no alignment in common.
    """
    plain = next(iter(runs.values()))
    x, description = alignment_of(runs)
    is_judged = x == ALIGNMENT[0]
    metrics = common_metrics(runs)
    axes = (x, MODES[0] if MODES[0] in metrics else "eval/vendi")
    if is_judged:
        metrics = [f"eval/{name}" for name in TITLES if f"eval/{name}" in metrics]
    starts = [curve[x][0] for seeds in runs.values() for curve in seeds.values()]
    corner = (min(starts), 1.0)

    names = [name.removeprefix("eval/") for name in metrics]
    columns = ["run", "seeds", *(TITLES.get(name, name) for name in names), *GAINS]
    tilted = next((seeds for seeds in runs.values() if is_tilted(seeds)), None)
    if tilted:
        columns.append(OF_TILTED)
    lines = ["| " + " | ".join(columns) + " |"]
    count = len(columns)
    lines.append("|---" * count + "|")
    for label, seeds in runs.items():
        cells = table_row(label, seeds, plain, corner, metrics, axes)
        if tilted:
            cells.append(shares_of(gains(seeds, plain, *axes), gains(tilted, plain, *axes)))
        lines.append("| " + " | ".join(cells) + " |")
    if MODES[0] in axes:
        lines.append("Diversity, in the gains, is the modes that are left.")
    if not is_judged:
        lines.append(f"No evaluator judges these runs. {description[0].upper()}{description[1:]}.")
    return "\n".join(lines)


def is_collapsed(curve, is_judged):
    """Whether a run ends with pictures of a prompt that are nearly alike.

    The kernel of a run without a judge may see little difference in any pictures. There it is a
    tenth of what the base model had above 1.
    """
    if curve.get("few"):
        return False
    limit = COLLAPSED
    if not is_judged:
        limit = 1 + 0.1 * (curve["eval/vendi"][0] - 1)
    return bool(curve["eval/vendi"][-1] < limit)


def gains(seeds, plain, x, diversity):
    """The three gains of a label's runs over the plain runs of the same seeds -> three lists."""
    pairs = [(curve, plain[seed]) for seed, curve in seeds.items() if seed in plain]
    at_alignment = [gain_at_equal_alignment(*pair, diversity, x) for pair in pairs]
    at_diversity = [gain_at_equal_diversity(*pair, diversity, x) for pair in pairs]
    return [mean for mean, _ in at_alignment], [top for _, top in at_alignment], at_diversity


def shares_of(own, limit):
    """Three gains (lists over the seeds) as per cent of three others, by their means -> text."""
    words = []
    for values, limits in zip(own, limit):
        share = np.nan
        if np.isfinite(values).any() and np.isfinite(limits).any() and np.nanmean(limits):
            share = 100 * np.nanmean(values) / np.nanmean(limits)
        words.append(f"{share:.0f}" if np.isfinite(share) else "-")
    return ", ".join(words)


def table_row(label, seeds, plain, corner, metrics, axes):
    """The cells of one label: its metrics, and its gains; axes: metrics (alignment, diversity)."""
    x, _ = axes
    curves = list(seeds.values())
    is_judged = x == ALIGNMENT[0]
    has_collapsed = any(is_collapsed(curve, is_judged) for curve in curves)
    cells = [f"{label} COLLAPSED" if has_collapsed else label]
    cells.append(str(len(curves)))
    for name in metrics:
        final = [curve[name][-1] for curve in curves]
        cells.append(spread(final, scale=1, digits=3, sign=""))

    cells += [spread(values) for values in gains(seeds, plain, *axes)]
    volumes = [hypervolume(curve[x], curve["eval/vendi"], corner) for curve in curves]
    cells.append(spread(volumes, scale=1, digits=3, sign=""))
    minutes = [curve.get("minutes", np.nan) for curve in curves]
    cells.append(spread(minutes, scale=1, digits=1, sign=""))
    return cells


# --------------------------------------------------------------------------------------------------
# Figures.


def band(curves, x, y):
    """Curves of a method's S seeds -> levels [L] of the metric x, and the values [S, L] of y there.

    The values are fronts (of a Frechet distance the lowest), or over iterations the curves
    themselves. The levels end where the first of the seeds does, so that the mean is over the same
    seeds everywhere.
    """
    start = min(curve[x][0] for curve in curves)
    end = min(curve[x].max() for curve in curves)
    levels = np.linspace(start, end, 101)
    if x == "iteration":
        return levels, np.stack([np.interp(levels, curve[x], curve[y]) for curve in curves])
    sign = -1 if y.startswith("eval/fid") else 1
    fronts = [front(curve[x], sign * curve[y], levels - 1e-12) for curve in curves]
    return levels, sign * np.stack(fronts)


def draw(runs, path, x=ALIGNMENT, panels=PANELS):
    """Draws metrics of the runs {label: {seed: evaluations}} over the metric x, a panel for each.

    A line is the mean over seeds, its band their range, dots are the evaluations.
    x and panels: (name of the metric, label of the axis).
    """
    plt = pyplot()
    size = (6.5 * len(panels), 5.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, panel in zip(axes[0], panels):
        draw_panel(axis, runs, x, panel)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path, dpi=110)


def draw_panel(axis, runs, x, y):
    """Draws y over x, each a metric and its label: lines, bands, dots and the start."""
    x_metric, x_label = x
    y_metric, y_label = y
    for number, (label, seeds) in enumerate(runs.items()):
        tilted = is_tilted(seeds)
        if tilted and x_metric == "iteration":
            continue
        color = "black" if tilted else COLORS[number % len(COLORS)]
        curves = list(seeds.values())
        levels, values = band(curves, x_metric, y_metric)
        count = "1 seed" if len(curves) == 1 else f"{len(curves)} seeds"
        style = "--" if tilted else "-"
        axis.plot(levels, values.mean(0), style, color=color, lw=2, label=f"{label} ({count})")
        axis.fill_between(levels, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
        for curve in curves:
            axis.plot(curve[x_metric], curve[y_metric], "o", color=color, ms=2.5, alpha=0.5)

    starts = []
    for seeds in runs.values():
        starts += [(curve[x_metric][0], curve[y_metric][0]) for curve in seeds.values()]
    axis.plot(*np.mean(starts, 0), "k*", ms=12, label="start: the base model")

    axis.set_title(panel_title(x_metric, y_metric), fontsize=9)
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.grid(alpha=0.3)


def panel_title(x_metric, y_metric):
    """What the lines of a panel are, and which way is better."""
    if x_metric == "iteration":
        return "line: mean of the seeds; band: their range"
    best, direction = "highest diversity", "up"
    if y_metric.startswith("eval/fid"):
        best, direction = "lowest distance", "down"
    return (
        f"line: the {best} at this alignment or more, mean of the seeds; band: their range\n"
        f"better: to the right and {direction}"
    )


def grid_files(folders, labels):
    """-> {title: PNG}: the first run's pictures before training, then each run's after it.

    Raises ValueError, in one line.
    """
    runs = open_runs(folders, labels)
    sheets = {}
    for folder, label in zip(folders, labels_of(folders, labels)):
        grids = (Path(folder) / "grids").glob("*.png")
        pngs = sorted(path for path in grids if not path.name.startswith("."))
        if len(pngs) < 2:
            raise ValueError(
                f"{folder}: {len(pngs)} pictures in grids/, and two are needed, before and after; "
                "let the run evaluate again"
            )
        if not sheets:
            sheets["before"] = pngs[0]
        title = label
        if len(runs[label]) > 1:
            title = f"{label}, seed {read_config(folder)['seed']}"
        sheets[title] = pngs[-1]
    for png in sheets.values():
        read_picture(png)  # raises if it is damaged
    return sheets


def draw_grids(sheets, path):
    """{title: PNG of a run's grids/} -> one picture, the sheets side by side.

    The same place has the same prompt and noise in all of them. The prompts stand beside the first
    sheet, where its rows are high enough and their file has not moved.
    """
    plt = pyplot()
    size = (5 * len(sheets), 5.3)
    figure, axes = plt.subplots(1, len(sheets), figsize=size, squeeze=False)
    for axis, (title, sheet) in zip(axes[0], sheets.items()):
        image = plt.imread(sheet)
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")

    first_run = Path(next(iter(sheets.values()))).parent.parent
    prompts = saved_value(read_config(first_run), "eval_prompts")
    if isinstance(prompts, list) and len(prompts) <= 30:
        height, width = image.shape[:2]
        row_height = height / len(prompts)
        font = {"ha": "right", "va": "center", "fontsize": min(8, 240 / len(prompts))}
        for row, prompt in enumerate(prompts):
            axes[0, 0].text(-0.01 * width, (row + 0.5) * row_height, prompt.text[:40], **font)
    figure.tight_layout()
    save_figure(figure, path, dpi=80)


def draw_coefficients(out, names):
    """out/coefficients.png of merge.py: the policy's mean and std over the updates.

    names: of the K checkpoints; a line each, its mean over the blocks.
    """
    plt = pyplot()
    rows = read_rows(Path(out) / "metrics.jsonl")
    updates = [row["update"] for row in rows]
    coefficients = np.array([row["coefficients"] for row in rows])  # [U, B, K], B blocks
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    colors = plt.get_cmap("turbo")
    for name, line, number in zip(names, coefficients.mean(1).T, range(len(names))):
        color = colors((number + 0.5) / len(names))
        left.plot(updates, line, label=name, color=color)
    left.set(xlabel="update", ylabel="mean of the policy: coefficient")
    left.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    right.plot(updates, [row["std"] for row in rows])
    right.set(xlabel="update", ylabel="its std, one line a block")
    right.set_ylim(bottom=0)
    save_figure(figure, Path(out) / "coefficients.png", dpi=100)


def save_figure(figure, path, dpi):
    """Writes a matplotlib figure as a PNG and closes it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=dpi, format="png"))
    pyplot().close(figure)


def pyplot():
    """matplotlib without a screen; imported here, since it takes a second.

    A notebook that has imported it keeps its own way to show figures.
    """
    if "matplotlib.pyplot" not in sys.modules:
        import matplotlib

        matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
