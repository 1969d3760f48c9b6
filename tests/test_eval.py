"""eval.py: what training logs, and the score command's metrics, intervals, table and refusals."""

import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT, build_model, launch, launch_process
from PIL import Image

import bases
import eval as evaluation
from commands import picture_sets
from commands.checks import EVAL_USES, check_eval
from dist_reward import KernelReplace, frechet_distance, moments
from prompting import Prompt, read_prompts
from rewards import Reward, metrics
from support import files

CPU = ["--device", "cpu"]
STEPS = ["--steps", "2", *CPU]
RESAMPLES = ["--resamples", "20"]


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_pictures(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 28, 28, generator=generator)


def command(*argv):
    """eval.py in this process."""
    return evaluation.main([str(word) for word in argv])


def two_processes(*argv):
    """eval.py under torchrun -> exit code, stdout, stderr."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line += ["--", str(ROOT / "eval.py"), *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, env=environment)
    return done.returncode, done.stdout, done.stderr


def naive_vendi(kernel):
    """exp of the entropy of the eigenvalues of a kernel [n, n] of trace 1."""
    eigenvalues = np.linalg.eigvals(kernel).real
    return math.exp(-sum(value * math.log(value) for value in eigenvalues if value > 0))


def rbf_kernel(features, scale):
    x = features.double().numpy()
    squares = ((x[:, None] - x[None]) ** 2).sum(2)
    return np.exp(-squares / (2 * scale**2)) / len(x)


def naive_frechet(mu1, sigma1, mu2, sigma2):
    root = scipy.linalg.sqrtm((sigma1 @ sigma2).numpy())
    trace = sigma1.trace() + sigma2.trace() - 2 * np.trace(root).real
    return float(((mu1 - mu2) ** 2).sum() + trace)


# --------------------------------------------------------------------------------------------------
# What training logs.


def test_the_scores_of_a_judge_by_their_definitions(tiny):
    """Two prompts, four pictures each; the second prompt asks for a class nobody drew."""
    judge = evaluation.Judge(tiny, "evaluator").network
    with torch.no_grad():
        judge.head[1].weight.mul_(10)  # so that some log-probabilities fall below the floor
    images = random_pictures(8)
    logits = judge(images).double()
    labels = [3, logits[5].argmin().item()]
    real_features = randn(80, 64, seed=2)
    mu, sigma = moments(real_features)
    real = {"mu": mu.numpy(), "sigma": sigma.numpy(), "scale": np.array(0.4)}
    prompts = [Prompt("", {"label": label}) for label in labels]
    scores = evaluation.score(images, prompts, judge, real)

    asked = [labels[0]] * 4 + [labels[1]] * 4
    log_p = logits.log_softmax(1)
    correct = [log_p[i].argmax().item() == label for i, label in enumerate(asked)]
    floored = [max(log_p[i, label].item(), -6.0) for i, label in enumerate(asked)]
    assert -6.0 in floored
    features = judge.features(images)
    groups = [features[:4], features[4:]]
    vendi = [naive_vendi(rbf_kernel(group, 0.4)) for group in groups]
    assert scores["accuracy"] == sum(correct) / 8
    assert scores["log_prob"] == pytest.approx(sum(floored) / 8, rel=1e-4)
    assert scores["vendi"] == pytest.approx(np.mean(vendi), rel=1e-3)
    distances = [metrics.mean_distance(group) for group in groups]
    assert scores["distance"] == pytest.approx(np.mean(distances), rel=1e-4)
    expected = naive_frechet(*moments(features), mu, sigma)
    assert scores["fid"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("in_features", [False, True])
def test_the_scores_without_a_judge_by_their_definitions(tiny, in_features):
    """The rewards themselves, and diversity by the cosine, of pixels or of features."""
    images = random_pictures(6)
    prompts = [Prompt("a", {"label": 1}), Prompt("b", {"label": 2})]
    reward = Reward("ink:1", tiny)
    network = evaluation.Judge(tiny, "reward").network
    look = network.features if in_features else None
    scores = evaluation.score_without_judge(images, prompts, reward, look, 4)

    paid = reward(images, ["a"] * 3 + ["b"] * 3, [{"label": 1}] * 3 + [{"label": 2}] * 3)
    assert scores["reward_ink"] == pytest.approx(paid["ink"].mean().item(), rel=1e-6)
    features = network.features(images) if in_features else images.flatten(1)
    x = features.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    kernels = [group @ group.T / 3 for group in (x[:3], x[3:])]
    expected = np.mean([naive_vendi(kernel) for kernel in kernels])
    assert scores["vendi"] == pytest.approx(expected, rel=1e-6)
    pairs = [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
    distances = [1 - x[i] @ x[j] for i, j in pairs]
    assert scores["distance"] == pytest.approx(np.mean(distances), rel=1e-4)


class Averages:
    """Stands for the averages of a training: notes when they are applied."""

    def __init__(self):
        self.on = False

    @contextmanager
    def applied(self):
        self.on = True
        yield
        self.on = False


@pytest.fixture
def setup(tiny):
    """What an Evaluator needs of the Setup of a training."""
    model = bases.load(tiny)
    reward = Reward("class:1", tiny)
    return SimpleNamespace(
        model=model,
        reward=reward,
        diversity_features=None,
        reference_set=None,
        averages=Averages(),
    )


def evaluator_of(setup, out, features="reward"):
    args = SimpleNamespace(
        features=features,
        out=str(out),
        eval_images=20,
        eval_steps=2,
        eval_seed=3,
        guidance=1.0,
        batch=7,
        reward_batch=0,
    )
    prompts = read_prompts(Path(setup.model.folder) / "eval_prompts.jsonl")
    return evaluation.Evaluator(args, setup, prompts, "cpu")


def test_an_evaluator_scores_and_draws_the_same_pictures_every_time(setup, tmp_path, monkeypatch):
    """With the averaged weights in the network, and only then."""
    averaged = []
    generate = picture_sets.generate

    def noting(*args):
        averaged.append(setup.averages.on)
        return generate(*args)

    monkeypatch.setattr(evaluation, "generate", noting)
    evaluate = evaluator_of(setup, tmp_path)
    first = evaluate(0)
    again = evaluate(30)
    assert averaged == [True, True] and not setup.averages.on
    assert first == again

    judge = evaluation.Judge(setup.model.folder, "evaluator")
    images = generate(setup.model, evaluate.eval_prompts, 2, 2, 1.0, 3, 7)
    expected = evaluation.score(images, evaluate.eval_prompts, judge.network, judge.real)
    assert first == {f"eval/{name}": value for name, value in expected.items()}

    names = sorted(path.name for path in (tmp_path / "grids").iterdir())
    assert names == ["00000.png", "00030.png"]
    files.save_grid(tmp_path / "expected.png", images.reshape(10, 2, 3, 28, 28))
    grid = (tmp_path / "grids" / "00000.png").read_bytes()
    assert grid == (tmp_path / "expected.png").read_bytes()


def test_the_judge_is_never_the_network_of_the_reward(setup, tmp_path):
    network = evaluation.Judge(setup.model.folder, "reward").network
    setup.reference_set = SimpleNamespace(features=network.features, target=moments(randn(70, 64)))
    widths = {}
    for features in ("reward", "evaluator"):
        evaluate = evaluator_of(setup, tmp_path, features)
        widths[features] = evaluate.judge.network.width
    assert widths == {"reward": 4, "evaluator": 2}  # the evaluator's is 4, the reward's 2

    scores = evaluate(0)
    images = evaluate.draw()
    expected = frechet_distance(*moments(network.features(images)), *setup.reference_set.target)
    assert scores["eval/fid_trained"] == pytest.approx(expected, rel=1e-6)


def test_an_evaluator_without_a_judge_logs_the_rewards(tiny, setup, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    shutil.rmtree(folder / "evaluator")
    setup.model.folder = folder
    scores = evaluator_of(setup, tmp_path)(0)
    assert list(scores) == ["eval/reward_class", "eval/vendi", "eval/distance"]


# --------------------------------------------------------------------------------------------------
# Estimates and their resamples, in numpy.

P, N, R = 4, 24, 6
SCALE = 1.3


def estimates(outputs, prompts=P, real=None, seed=5):
    args = SimpleNamespace(seed=seed, resamples=R)
    mu, sigma = moments(2 * randn(50, 3, seed=1) - 1)
    return evaluation.estimates(args, outputs, prompts, SCALE, (mu, sigma, real))


def outputs_of(seed=0):
    """Made-up features and log-probabilities of 24 pictures."""
    log_prob = randn(N, seed=seed + 10)
    return {"features": 3 + randn(N, 3, seed=seed), "log_prob": log_prob}


def draws(size, stream, seed=5):
    """The rows of a bootstrap, each a list of indices; the first is everything once."""
    rng = np.random.default_rng([seed, stream])
    counts = rng.multinomial(size, np.full(size, 1 / size), size=R)
    return [list(range(size))] + [list(np.repeat(range(size), row)) for row in counts]


def assert_resampled(values, expected):
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx(expected, rel=1e-6)


def test_means_over_prompts_are_resampled_by_prompt():
    outputs = outputs_of()
    values = estimates(outputs)
    groups = outputs["features"].reshape(P, N // P, 3)
    by_prompt = {
        "log_prob": outputs["log_prob"].reshape(P, -1).mean(1).tolist(),
        "vendi": [naive_vendi(rbf_kernel(group, SCALE)) for group in groups],
        "distance": [metrics.mean_distance(group) for group in groups],
        "distance_min": [metrics.smallest_distance(group) for group in groups],
    }
    rows = draws(P, stream=0)
    for name, numbers in by_prompt.items():
        assert_resampled(values[name], [np.mean([numbers[i] for i in row]) for row in rows])


def test_distances_between_sets_are_resampled_by_picture():
    """A resample is the metric of the pictures that it draws, as often as it draws them."""
    outputs = outputs_of()
    features = outputs["features"]
    values = estimates(outputs)
    target = moments(2 * randn(50, 3, seed=1) - 1)
    fid = [naive_frechet(*moments(features[row]), *target) for row in draws(N, stream=1)]
    assert_resampled(values["fid"], fid)
    rows = draws(N, stream=2)
    vendi = [naive_vendi(rbf_kernel(features[row], SCALE)) for row in rows]
    assert_resampled(values["vendi_set"], vendi)
    distance = [metrics.mean_distance(features[row]) for row in rows]
    assert_resampled(values["distance_set"], distance)


@pytest.mark.parametrize("reals", [40, 15])
def test_real_pictures_give_kid_and_neighbourhoods(reals):
    """As many real pictures as generated ones, or all; recall and coverage resample the real."""
    features = outputs_of()["features"]
    real = 3 + 0.8 * randn(reals, 3, seed=3) + torch.tensor([3.0, 0, 0])
    values = estimates({"features": features}, real=real)
    assert values["kid"][0].item() == pytest.approx(KernelReplace(features, real).value(), rel=1e-4)

    chosen = [i * reals // N for i in range(N)] if reals > N else list(range(reals))
    each = metrics.neighbourhoods(features, real[chosen])
    for name, stream in (("precision", 1), ("density", 1), ("recall", 3), ("coverage", 3)):
        rows = draws(len(each[name]), stream)
        expected = [each[name][row].mean().item() for row in rows]
        assert_resampled(values[name], expected)
        assert len(set(expected)) > 1


def test_without_prompts_there_are_only_metrics_of_the_set():
    assert list(estimates({"features": randn(N, 3)}, prompts=0)) == [
        "vendi_set",
        "distance_set",
        "fid",
    ]


def test_one_prompt_has_no_resamples_of_its_mean():
    """One prompt says nothing about others."""
    values = estimates(outputs_of(), prompts=1)
    assert len(values["vendi"]) == len(values["log_prob"]) == 1
    assert len(values["fid"]) == R + 1


def test_one_picture_a_prompt_has_no_diversity_within_it():
    values = estimates(outputs_of(), prompts=N)
    assert "log_prob" in values and "vendi" not in values


def test_two_sets_are_resampled_alike():
    """So the difference of nearly equal sets is known far better than either of them."""
    first = outputs_of()
    second = outputs_of()
    second["features"] = second["features"] + 0.02 * randn(N, 3, seed=8)
    a = estimates(first)
    b = estimates(second)
    other = estimates(first, seed=6)
    for name in ("fid", "distance_set", "vendi"):
        assert (b[name] - a[name]).std() < 0.2 * a[name].std()
        assert not torch.equal(other[name], a[name])


def test_only_some_pictures_make_the_kernel_of_the_set(monkeypatch):
    monkeypatch.setattr(evaluation, "MOST", 6)
    features = outputs_of()["features"]
    values = estimates({"features": features}, prompts=0)
    some = features[[0, 4, 8, 12, 16, 20]]
    expected = naive_vendi(rbf_kernel(some, SCALE))
    assert values["vendi_set"][0].item() == pytest.approx(expected, rel=1e-6)


# --------------------------------------------------------------------------------------------------
# The report.


def report(tmp_path, P=None, N=80, vendi=5.0):
    """Prints and writes made-up estimates of one set -> the JSON."""
    args = evaluation.Args("score", ["x"], out=str(tmp_path / "out" / "s.json"), resamples=2)
    prompts = [Prompt("a")] * P if P else None
    picture_set = picture_sets.Pictures("x", N, prompts, None, None)
    values = {"fid": torch.tensor([2.0, 1.0, 3.0])}
    values["vendi" if P else "vendi_set"] = torch.tensor([vendi])
    evaluation.report(args, [picture_set], {"x": values})
    return json.loads(Path(args.out).read_text())


def test_the_table_and_the_json_hold_values_and_intervals(tmp_path, capsys):
    result = report(tmp_path, P=10)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "80 pictures of 10 prompts, in the features evaluator; 95 % intervals of 2 resamples",
        "| metric | x |",
        "|---|---|",
        "| fid | 2 [1.05, 2.95] |",
        "| vendi | 5 |",
    ]
    assert result["pictures"] == 80 and result["collapsed"] == []
    assert result["settings"]["resamples"] == 2
    fid, vendi = result["metrics"]["x"].values()
    assert fid == {"value": 2, "low": pytest.approx(1.05), "high": pytest.approx(2.95)}
    assert vendi == {"value": 5, "low": None, "high": None}


@pytest.mark.parametrize(
    "P, N, vendi, said",
    [
        (10, 80, 1.2, "8 pictures of a prompt count as 1.20 different ones"),
        (10, 80, 1.6, None),
        (10, 70, 1.2, None),  # seven pictures of a prompt are too few to tell
        (None, 20, 1.2, "20 pictures count as 1.20 different ones"),
    ],
)
def test_a_set_of_copies_is_flagged(tmp_path, capsys, P, N, vendi, said):
    collapsed = report(tmp_path, P, N, vendi)["collapsed"]
    lines = capsys.readouterr().out.splitlines()
    flagged = [line for line in lines if line.startswith("COLLAPSED: ")]
    if said:
        assert collapsed == ["x"]
        assert flagged == [f"COLLAPSED: x: {said} (Vendi)"]
    else:
        assert collapsed == flagged == []


# --------------------------------------------------------------------------------------------------
# eval.py score.


@pytest.fixture(scope="module")
def sets(tiny, tmp_path_factory):
    """A set as a folder and as an npz, another, and a folder of 100 that count as real ones."""
    folder = tmp_path_factory.mktemp("sets")
    for name in ("set", "set.npz"):
        command("images", tiny, "--n", 80, "--out", folder / name, *STEPS)
    command("images", tiny, "--n", 80, "--out", folder / "other.npz", "--seed", 1, *STEPS)
    command("images", tiny, "--n", 100, "--out", folder / "real", "--seed", 2, *STEPS)
    (folder / "real" / "config.json").unlink()
    return folder


def score(tmp_path, *argv):
    """The score command -> the columns of its JSON, {metric: {value, low, high}} each."""
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    command("score", *argv, *CPU, *RESAMPLES, "--out", out)
    return list(json.loads(out.read_text())["metrics"].values())


def pixels_of(out):
    """The pictures of a folder or an npz -> uint8 [N, H, W, 3]."""
    if str(out).endswith(".npz"):
        with np.load(out) as file:
            return file["arr_0"]
    return np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))])


@pytest.mark.run
def test_a_model_its_folder_and_its_npz_score_alike(tiny, sets, tmp_path):
    target = ["--target", sets / "real"]
    (model,) = score(tmp_path, tiny, "--n", 80, "--steps", 2, *target)
    assert list(model) == (
        "accuracy log_prob reward/class vendi distance distance_min vendi_set distance_set "
        "fid kid precision recall density coverage"
    ).split(" ")
    for name in ("set", "set.npz"):
        (stored,) = score(tmp_path, sets / name, *target)
        for metric, row in model.items():
            assert stored[metric] == pytest.approx(row, rel=1e-6, abs=1e-9), metric
    for row in model.values():
        assert row["low"] - 1e-9 <= row["value"] <= row["high"] + 1e-9


@pytest.mark.run
def test_the_score_is_what_training_logs(tiny, sets, tmp_path):
    """Only the rounding of pictures to bytes is between them."""
    (found,) = score(tmp_path, sets / "set")
    model = bases.load(tiny)
    judge = evaluation.Judge(tiny, "evaluator")
    prompts = read_prompts(tiny / "eval_prompts.jsonl")
    images = picture_sets.generate(model, prompts, 8, 2, 1.0, 0, 500)
    images = files.to_uint8(images) / 255
    logged = evaluation.score(images, prompts, judge.network, judge.real)
    for name, value in logged.items():
        assert found[name]["value"] == pytest.approx(value, rel=1e-4), name


@pytest.mark.slow
def test_features_target_and_reward_are_those_asked_for(tiny, sets, tmp_path):
    flags = ["--target", sets / "real", "--features", "reward", "--reward", "ink"]
    (found,) = score(tmp_path, sets / "set.npz", *flags)
    network = evaluation.Judge(tiny, "reward").network

    def features_of(out):
        images = torch.from_numpy(pixels_of(out)).permute(0, 3, 1, 2).float() / 255
        return network.features(images)

    features = features_of(sets / "set.npz")
    real = features_of(sets / "real")
    expected = frechet_distance(*moments(features), *moments(real))
    assert found["fid"]["value"] == pytest.approx(expected, rel=1e-5)
    expected = KernelReplace(features, real).value()
    assert found["kid"]["value"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert "reward/ink" in found and "reward/class" not in found


@pytest.mark.slow
def test_a_set_against_itself_and_another(sets, tmp_path, capsys):
    target = ["--target", sets / "real"]
    a, b, difference = score(tmp_path, sets / "set", sets / "set.npz", *target)
    assert a == b and len(difference) == 14
    assert all(row == {"value": 0, "low": 0, "high": 0} for row in difference.values())

    capsys.readouterr()
    a, b, difference = score(tmp_path, sets / "set", sets / "other.npz", *target)
    for name, row in difference.items():
        assert row["value"] == pytest.approx(b[name]["value"] - a[name]["value"])
    assert difference["fid"]["low"] < difference["fid"]["value"] < difference["fid"]["high"]
    header = f"| metric | A: {sets / 'set'} | B: {sets / 'other.npz'} | B - A |"
    assert header in capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_fewer_pictures_are_the_first_of_each_prompt(tiny, sets, tmp_path):
    first = [number for number in range(80) if number % 8 < 4]
    np.savez(tmp_path / "part.npz", arr_0=pixels_of(sets / "set.npz")[first])
    prompts = ["--prompts", tiny / "eval_prompts.jsonl"]
    (part,) = score(tmp_path, sets / "set.npz", "--n", 40)
    (whole,) = score(tmp_path, tmp_path / "part.npz", "--model", tiny, *prompts)
    assert part == whole


@pytest.mark.slow
def test_pictures_without_prompts_have_no_alignment(tiny, sets, tmp_path):
    shutil.copytree(sets / "set", tmp_path / "photos")
    (tmp_path / "photos" / "config.json").unlink()
    last = tmp_path / "photos" / "000079.png"
    Image.open(last).save(last.with_suffix(".jpg"), quality=95)
    last.unlink()
    (found,) = score(tmp_path, tmp_path / "photos", "--model", tiny)
    assert list(found) == ["vendi_set", "distance_set", "fid"]
    prompts = ["--prompts", tiny / "eval_prompts.jsonl"]
    (found,) = score(tmp_path, tmp_path / "photos", "--model", tiny, *prompts)
    assert "accuracy" in found


@pytest.mark.slow
def test_own_features_and_their_kernel_width(sets, tmp_path, monkeypatch):
    """The width is half the root mean square distance of two real pictures, by brute force."""
    text = "def f(images):\n    return 5 * images[:, 0, :4, 0] + 1\n"
    (tmp_path / "corner_features.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--features", "corner_features:f", "--target", sets / "real"]
    (found,) = score(tmp_path, sets / "set.npz", *flags)

    def features_of(out):
        return 5 * torch.from_numpy(pixels_of(out) / 255)[:, :4, 0, 0] + 1

    real = features_of(sets / "real")
    squares = torch.cdist(real, real).square()
    width = math.sqrt(squares.sum() / (100 * 99)) / 2
    expected = naive_vendi(rbf_kernel(features_of(sets / "set.npz"), width))
    assert found["vendi_set"]["value"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_folder_without_classifiers_is_scored_by_other_features(sets, tmp_path, monkeypatch):
    model = build_model(tmp_path / "bare")
    shutil.rmtree(model / "reward")
    shutil.rmtree(model / "evaluator")
    text = "def f(images):\n    return images[:, :, ::9, 5].flatten(1)[:, :5]\n"
    (tmp_path / "mean_features.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--steps", 2, "--features", "mean_features:f", "--target", sets / "real"]
    (found,) = score(tmp_path, model, "--n", 20, *flags)
    assert list(found)[0] == "vendi"


@pytest.mark.slow
def test_a_policy_that_was_made_to_collapse_is_flagged(tmp_path, monkeypatch, capsys):
    """The only reward is for the black picture: the pictures count as one, and both say so."""
    text = "def black(images, prompts, metadata):\n    return -images.mean((1, 2, 3))\n"
    (tmp_path / "one_mode.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "gone"
    base = ROOT / "assets" / "tiny"
    training = "--reward one_mode:black --drift off --std none --lr 1e-3 --iterations 20"
    evaluating = "--eval_every 20 --eval_images 320 --snapshot_every 0"
    launch([*training.split(" "), *evaluating.split(" "), *CPU, "--out", str(out)])
    capsys.readouterr()
    command("compare", out)
    assert "| gone COLLAPSED |" in capsys.readouterr().out
    before, after, _ = score(tmp_path, base, out / "model", "--n", 320)
    lines = capsys.readouterr().out.splitlines()
    flagged = [line for line in lines if line.startswith("COLLAPSED: ")]
    assert len(flagged) == 1 and "B: " in flagged[0]
    assert after["vendi"]["value"] < 1.2 < 8 < before["vendi"]["value"]


@pytest.mark.slow
def test_two_processes_score_alike(tiny, sets, tmp_path):
    argv = ["score", tiny, sets / "other.npz", "--n", 80, "--target", sets / "real"]
    argv += [*STEPS, *RESAMPLES]
    command(*argv, "--out", tmp_path / "one.json")
    code, out, error = two_processes(*argv, "--out", tmp_path / "two.json")
    assert code == 0, error
    assert out.count("| fid |") == 1
    one = json.loads((tmp_path / "one.json").read_text())
    two = json.loads((tmp_path / "two.json").read_text())
    for title, column in one["metrics"].items():
        for name, row in column.items():
            found = two["metrics"][title][name]
            assert found == pytest.approx(row, rel=1e-3, abs=1e-4), (title, name)


@pytest.mark.slow
def test_eval_as_a_command(sets, tmp_path):
    argv = ["score", str(sets / "set"), *CPU, *RESAMPLES]
    code, out, error = launch_process(argv, script="eval.py")
    assert code == 0 and "| fid |" in out, error
    code, out, error = launch_process(["score", str(tmp_path / "none")], script="eval.py")
    assert code == 2 and out == ""
    assert len(error.splitlines()) == 1 and error.startswith("error: ")


# --------------------------------------------------------------------------------------------------
# Flags that cannot be used: one case a kind. Files that cannot be read are in tests/commands/.


def test_every_flag_belongs_to_a_command():
    used = set().union(*EVAL_USES.values())
    flags = set(vars(evaluation.Args("score", [])))
    assert used == flags - {"command", "inputs"}


def test_the_help_names_every_flag(capsys):
    command("--help")
    text = capsys.readouterr().out
    for name in EVAL_USES["score"] | EVAL_USES["compare"]:
        assert f"--{name}" in text


def check(line):
    """What main does with a command line before it loads anything. Raises ValueError."""
    command_name, *words = line.split(" ")
    first_flag = next((n for n, word in enumerate(words) if word.startswith("--")), len(words))
    inputs = words[:first_flag]
    flags = words[first_flag:]
    default = evaluation.Args(command_name, inputs)
    given = {}
    for flag, value in zip(flags[::2], flags[1::2]):
        name = flag.removeprefix("--")
        given[name] = type(getattr(default, name))(value)
    return check_eval(evaluation.Args(command_name, inputs, **given), default)


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """Good and bad inputs in one folder, with the random base model as `tiny`."""
    place = tmp_path_factory.mktemp("place")
    (place / "tiny").symlink_to(tiny)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 3), dtype=np.uint8)
    np.savez(place / "good.npz", arr_0=pixels)
    np.savez(place / "more.npz", arr_0=np.concatenate([pixels, pixels]))
    np.savez(place / "few.npz", arr_0=pixels[:5])
    np.savez(place / "large.npz", arr_0=pixels.repeat(2, 1).repeat(2, 2))
    asked = {"model": "gone-model", "n": 20}
    for name, prompts in (("asked", "tiny/eval_prompts.jsonl"), ("other", "ten.jsonl")):
        np.savez(place / f"{name}.npz", arr_0=pixels)
        (place / f"{name}.npz.json").write_text(json.dumps(asked | {"prompts": prompts}))
    for name in ("photos", "stale.npz.parts"):
        (place / name).mkdir()
        Image.fromarray(pixels[0]).save(place / name / "000000.png")
    (place / "odd").mkdir()
    for number, image in enumerate(map(Image.fromarray, pixels)):
        size = (32, 32) if number == 7 else (28, 28)
        image.resize(size).save(place / "odd" / f"{number:06d}.png")
    coat = '{"prompt": "a coat", "label": 4}\n'
    (place / "ten.jsonl").write_text(coat * 10)
    (place / "unlabelled.jsonl").write_text(coat + '{"prompt": "a bag"}\n')
    (place / "file.json").write_text("{}")
    return place


REFUSED = [  # command line, what the message must hold
    ("images tiny", "--out: name the folder or the .npz to write"),
    ("images tiny tiny --out new", "takes 1 at most"),
    ("images none --out new", "--model none"),
    ("images tiny --out new --n 25", "30 is the next"),
    ("images tiny --out new --guidance nan", "--guidance nan: must be a finite number"),
    ("images tiny --out new --features reward", "--features: means nothing to eval.py images"),
    ("images tiny --out new --prompts none.txt", "none.txt"),
    ("images tiny --out photos", "photos exists, and no config.json says how it was made"),
    ("images tiny --out stale.npz", "stale.npz.parts exists"),
    ("images tiny --out file.json/new", "its parent file.json is a file"),
    ("score none", "none: neither pictures"),
    ("score good.npz --out file.json", "--out file.json: exists"),
    ("score good.npz --steps 5", "--steps: means nothing to pictures that are there"),
    ("score asked.npz", "gone-model"),
    ("score few.npz --model tiny", "5 pictures are too few"),
    ("score large.npz --model tiny", "56 x 56, and tiny/evaluator sees 28 x 28"),
    ("score odd --model tiny", "odd/000007.png: of 32 x 32, and tiny/evaluator sees 28 x 28"),
    ("score good.npz more.npz --model tiny", "compare equal ones; --n 20"),
    ("score asked.npz other.npz --model tiny", "of different prompts"),
    ("score good.npz --model tiny --reward ink", "--reward ink: needs to know what was asked for"),
    ("score asked.npz --model tiny --reward fid", "fid and kid come with --target"),
    ("score good.npz --model tiny --prompts unlabelled.jsonl", "unlabelled.jsonl:2"),
    ("score good.npz --model tiny --features nothing", "--features nothing"),
    ("score good.npz --model tiny --features json:loads", "needs --target"),
    ("score good.npz --model tiny --target photos", "are too few for the covariance"),
    ("compare none --out new.json", "--out new.json: must end in .png"),
]


@pytest.mark.parametrize("line, message", REFUSED)
def test_a_command_line_that_cannot_run_is_refused(place, monkeypatch, line, message):
    monkeypatch.chdir(place)
    with pytest.raises(ValueError) as caught:
        check(line)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_inputs_of_the_refused_command_lines_are_good_but_for_their_mistake(place, monkeypatch):
    """Else a line might be refused for another reason than the one it is there for."""
    monkeypatch.chdir(place)
    for line in (
        "images tiny --out new --n 20 --guidance 2",
        "images tiny --out new.npz --prompts ten.jsonl",
        "score good.npz --model tiny --out new.json",
        "score asked.npz --model tiny --reward ink",
        "score asked.npz asked.npz --model tiny",
        "score good.npz --model tiny --prompts ten.jsonl",
        "score tiny --n 20 --steps 5",
    ):
        check(line)


def test_more_processes_than_pictures_are_refused(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("WORLD_SIZE", "21")
    with pytest.raises(ValueError, match="--nproc_per_node 21: there are only 20 pictures"):
        check("score good.npz --model tiny")


def test_a_refused_command_line_ends_with_one_line_and_nothing_written(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        command("images", "tiny", "--n", 25, "--out", "new")
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert error.startswith("error: --n 25") and len(error.splitlines()) == 1
    assert sorted(place.rglob("*")) == before
