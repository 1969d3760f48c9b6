"""Comparing runs of train.py: a run that is more diverse may only have learned less, so runs are compared where they are equally good.

Alignment is the evaluator's log-probability, diversity its within-prompt Vendi score, from the evaluations in metrics.jsonl. The front of a
run is, at each alignment a, the largest diversity its curve shows at alignment a or more (linear between evaluations).
    gain at equal alignment    of the two fronts' means over ten alignments that both reach, seed by seed; and at the highest of them
    gain at equal diversity    the same along the other axis, of alignment gained over the base model
    hypervolume                area of all (alignment, diversity) that some evaluation beats in both, above the base's alignment and one picture
"""
import json
import numpy as np
import re
from pathlib import Path
from support import files
from prompting import read_prompts

ALIGNMENT = "eval/log_prob", "alignment: held-out log-probability (higher is better)"
PANELS = [("eval/vendi", "diversity: Vendi score within a prompt (higher is better)"),
          ("eval/fid", "Frechet distance to real pictures (lower is better)")]
METRICS = ("accuracy", "log_prob", "vendi", "distance", "fid")
COLUMNS = ("run", "seeds", "accuracy", "log-prob", "Vendi", "pairwise distance", "FID", "diversity at equal alignment, %", "at the highest, %",
           "alignment at equal diversity, %", "hypervolume", "minutes")
COLLAPSED = 1.5                                                          # a Vendi score below this, of eight pictures a prompt or more


def load(folder):
    """A run's evaluations -> {"iteration" and every "eval/..." metric: array}, and "minutes", a number: what sampling and training took.

    Raises ValueError, in one line, where metrics.jsonl does not hold them.
    """
    path = Path(folder) / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in lines if "eval/fid" in row]
        names = [name for name in rows[0] if name.startswith("eval/")] if rows else []
        curves = {name: np.array([row[name] for row in rows], float) for name in ("iteration", *names)}
        curves["minutes"] = sum(row.get("seconds_sample", 0) + row.get("seconds_train", 0) for row in lines) / 60
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not the metrics of a run ({type(error).__name__}: {error})") from None
    missing = [name for name in METRICS if "eval/" + name not in curves]
    if missing:
        raise ValueError(f"{path}: holds no evaluation with {', '.join(missing)}; give a run folder of train.py")
    return curves


def labels_of(folders, labels):
    """The label of each run folder: from --labels, else the folder's name without a trailing -NUMBER. Raises ValueError."""
    found = [label.strip() for label in labels.split(",")] if labels else [re.sub(r"-\d+$", "", Path(folder).resolve().name) for folder in folders]
    if len(found) != len(folders) or not all(found):
        raise ValueError(f"--labels {labels}: {len([x for x in found if x])} labels for {len(folders)} runs; write one for each, with commas between")
    return found


def open_runs(folders, labels):
    """Run folders and --labels -> {label: {seed: evaluations}}, in the order given. Raises ValueError, in one line."""
    runs, configs = {}, [read_config(folder) for folder in folders]
    for folder, label, config in zip(folders, labels_of(folders, labels), configs):
        for name, why in (("eval_images", "the bias of FID falls with their number"), ("eval_steps", "pictures of more steps are others"),
                          ("eval_seed", "only the same noise is paired"), ("eval_prompts", "other prompts are harder, or more diverse")):
            if said(config, name) != said(configs[0], name):
                raise ValueError(f"{folder}: --{name} was {config.get(name)}, and {configs[0].get(name)} in {folders[0]}: {why}; compare equal ones")
        seeds, seed = runs.setdefault(label, {}), config.get("seed")
        if type(seed) is not int:
            raise ValueError(f"{folder}: its config.json names no seed, by which runs are paired")
        if seed in seeds:
            raise ValueError(f"{folder}: a second run {label!r} with seed {seed}; give runs of different methods different --labels")
        seeds[seed] = load(folder) | {"few": few_a_prompt(config)}
    return runs


def read_config(folder):
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
        return config
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable ({error}); give a run folder of train.py") from None


def said(config, name):
    """What a run's flag was; of eval_prompts what the file holds, for it may lie elsewhere too, or the path if it cannot be read any more."""
    try:
        return read_prompts(config[name]) if name == "eval_prompts" else config.get(name)
    except (KeyError, TypeError, ValueError):
        return config.get(name)


def few_a_prompt(config):
    """Whether an evaluation has fewer than eight pictures of a prompt, too few to speak of collapse."""
    try:
        return config["eval_images"] < 8 * len(read_prompts(config["eval_prompts"]))
    except (KeyError, TypeError, ValueError):                            # the prompt file has moved
        return False


def front(x, y, levels):
    """The largest y that the curve (x, y) shows where x is at least each level; NaN where x never gets there.

    >>> front([0, 1, 2], [10, 8, 3], [0.5, 1, 2]).tolist()
    [9.0, 8.0, 3.0]
    """
    t = np.linspace(0, len(x) - 1, 50 * (len(x) - 1) + 1)               # holds the evaluations themselves
    fine_x, fine_y = np.interp(t, np.arange(len(x)), x), np.interp(t, np.arange(len(x)), y)
    return np.array([fine_y[fine_x >= level].max() if (fine_x >= level).any() else np.nan for level in levels])


def gain_at_equal_alignment(method, plain, diversity="eval/vendi"):
    """Relative gain in diversity over ten alignments, from the base model's to the highest that both runs reach; and at that highest.

    Where either run never rises above the base model there is no such range: (NaN, NaN), and not 0, for nothing was compared.
    """
    x = "eval/log_prob"
    start, top = plain[x][0], min(plain[x].max(), method[x].max())
    if not top > start:
        return float("nan"), float("nan")
    levels = np.linspace(start, top, 11)[1:] - 1e-9
    m, p = front(method[x], method[diversity], levels), front(plain[x], plain[diversity], levels)
    return float(m.mean() / p.mean() - 1), float(m[-1] / p[-1] - 1)


def gain_at_equal_diversity(method, plain, diversity="eval/vendi"):
    """Relative gain in alignment over the base model's, at ten diversities from the base model's down to the plain run's lowest.

    NaN if the plain run loses no diversity or gains no alignment: then there is nothing to be relative to.
    """
    x = "eval/log_prob"
    start, lowest = plain[diversity][0], plain[diversity].min()
    levels = np.linspace(start, lowest, 11)[1:] + 1e-9
    m, p = front(method[diversity], method[x], levels), front(plain[diversity], plain[x], levels)
    gained = p.mean() - plain[x][0]
    return float((m.mean() - plain[x][0]) / gained - 1) if lowest < start and gained > 0 else float("nan")


def hypervolume(x, y, corner):
    """Area of the union of the rectangles from `corner` (x, y) up to each point; a point that does not exceed the corner in both adds none.

    >>> hypervolume([1, 2], [10, 5], (0, 0))
    15.0
    """
    area, height = 0.0, float(corner[1])
    for a, b in sorted(((float(a), float(b)) for a, b in zip(x, y) if a > corner[0]), reverse=True):
        area, height = area + (a - corner[0]) * max(0.0, b - height), max(height, b)
    return area


def spread(values, scale=100, digits=1, sign="+"):
    """Mean and standard error over the values that are numbers, by default in per cent; says so where some are none."""
    kept = [v for v in values if np.isfinite(v)]
    if not kept:
        return "-"
    error = f" +- {scale * np.std(kept, ddof=1) / len(kept) ** 0.5:.{digits}f}" if len(kept) > 1 else ""
    return f"{scale * np.mean(kept):{sign}.{digits}f}" + error + f" ({len(kept)} of {len(values)})" * (len(kept) < len(values))


def table(runs):
    """Runs {label: {seed: evaluations}} -> markdown: final metrics, and gains over the first label's run with the same seed."""
    plain = next(iter(runs.values()))
    corner = min(c["eval/log_prob"][0] for curves in runs.values() for c in curves.values()), 1.0
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for label, curves in runs.items():
        collapsed = any(c["eval/vendi"][-1] < COLLAPSED and not c.get("few") for c in curves.values())
        end = [spread([c["eval/" + name][-1] for c in curves.values()], 1, 3, "") for name in METRICS]
        pairs = [(curve, plain[seed]) for seed, curve in curves.items() if seed in plain]
        equal, back = [gain_at_equal_alignment(*pair) for pair in pairs], [gain_at_equal_diversity(*pair) for pair in pairs]
        volume = [hypervolume(c["eval/log_prob"], c["eval/vendi"], corner) for c in curves.values()]
        cells = [spread(v) for v in ([e[0] for e in equal], [e[1] for e in equal], back)]
        cells += [spread(volume, 1, 3, ""), spread([c.get("minutes", np.nan) for c in curves.values()], 1, 1, "")]
        lines.append("| " + " | ".join([label + " COLLAPSED" * collapsed, str(len(curves)), *end, *cells]) + " |")
    return "\n".join(lines)


def band(curves, x, y):
    """Curves of a method's seeds -> levels [L] of x, from the start on, and y there [S, L]: fronts (the lowest of a Frechet distance), or over
    iterations the curves themselves. The levels end where the first of the seeds does, so that the mean is over the same seeds all along."""
    levels = np.linspace(min(c[x][0] for c in curves), min(c[x].max() for c in curves), 101)
    if x == "iteration":
        return levels, np.stack([np.interp(levels, c[x], c[y]) for c in curves])
    sign = -1 if y.startswith("eval/fid") else 1
    return levels, np.stack([sign * front(c[x], sign * c[y], levels - 1e-12) for c in curves])


def draw(runs, path, x=ALIGNMENT, panels=PANELS):
    """The runs {label: {seed: evaluations}}, two metrics over x: a line is the mean over seeds, its band their range, dots the evaluations."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 5.6))
    for axis, (metric, label) in zip(np.atleast_1d(axes), panels):
        for n, (name, curves) in enumerate(runs.items()):
            curves = list(curves.values())
            levels, values = band(curves, x[0], metric)
            axis.plot(levels, values.mean(0), color=f"C{n}", lw=2, label=f"{name} ({len(curves)} seed{'s' * (len(curves) > 1)})")
            axis.fill_between(levels, values.min(0), values.max(0), color=f"C{n}", alpha=0.2, lw=0)
            for curve in curves:
                axis.plot(curve[x[0]], curve[metric], "o", color=f"C{n}", ms=2.5, alpha=0.5)
        starts = [(c[x[0]][0], c[metric][0]) for curves in runs.values() for c in curves.values()]
        axis.plot(*np.mean(starts, 0), "k*", ms=12, label="start: the base model")
        down, title = metric.startswith("eval/fid"), "line: mean of the seeds; band: their range"
        if x[0] != "iteration":
            title = (f"line: the {'lowest distance' if down else 'highest diversity'} at this alignment or more, mean of the seeds; band: their range\n"
                     f"better: to the right and {'down' if down else 'up'}")
        axis.set_title(title, fontsize=9)
        axis.set(xlabel=x[1], ylabel=label)
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].legend(fontsize=8)
    figure.tight_layout()
    files.write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    plt.close(figure)


def grid_files(folders, labels):
    """-> {title: PNG}: the first run's pictures before, then each run's after. Raises ValueError, in one line."""
    runs, labels, found = open_runs(folders, labels), labels_of(folders, labels), {}
    for folder, label in zip(folders, labels):
        files = sorted(path for path in (Path(folder) / "grids").glob("*.png") if not path.name.startswith("."))
        if len(files) < 2:
            raise ValueError(f"{folder}: {len(files)} pictures in grids/, and two are needed, before and after; let the run evaluate again")
        found = found or {"before": files[0]}
        found[label + f", seed {read_config(folder)['seed']}" * (len(runs[label]) > 1)] = files[-1]
    return found


def draw_grids(files, path):
    """{title: PNG of a run's grids/} -> one picture, the sheets side by side, with the prompts where a row is high enough for one: the same place
    has the same prompt and noise in all."""
    plt, prompts = pyplot(), said(read_config(Path(next(iter(files.values()))).parent.parent), "eval_prompts")
    figure, axes = plt.subplots(1, len(files), figsize=(5 * len(files), 5.3), squeeze=False)
    for axis, (title, file) in zip(axes[0], files.items()):
        axis.imshow(plt.imread(file), interpolation="nearest")
        axis.set_title(title), axis.axis("off")
    if isinstance(prompts, list) and len(prompts) <= 30:                 # else their file has moved, or there is no room
        high, wide = plt.imread(file).shape[:2]
        for row, prompt in enumerate(prompts):
            axes[0, 0].text(-0.01 * wide, (row + 0.5) * high / len(prompts), prompt.text[:40], ha="right", va="center", fontsize=min(8, 240 / len(prompts)))
    figure.tight_layout()
    files.write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=80, format="png"))
    plt.close(figure)


def draw_coefficients(out, names):
    """out/coefficients.png of merge.py: the policy's mean and std over the updates, a line for each checkpoint (the mean over blocks, if there are some)."""
    plt, rows = pyplot(), [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for k, (name, line) in enumerate(zip(names, np.mean([row["coefficients"] for row in rows], 1).T)):
        axes[0].plot([row["update"] for row in rows], line, label=name, color=plt.get_cmap("turbo")((k + 0.5) / len(names)))
    axes[1].plot([row["update"] for row in rows], [row["std"] for row in rows])
    axes[0].set(xlabel="update", ylabel="mean of the policy: coefficient"), axes[1].set(xlabel="update", ylabel="its std, one line a block")
    axes[0].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1)), axes[1].set_ylim(bottom=0)
    files.write_atomic(Path(out) / "coefficients.png", lambda path: figure.savefig(path, dpi=100, format="png"))
    plt.close(figure)


def pyplot():
    """matplotlib without a screen; imported here, for it takes a second."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt
