"""Whole runs with a distribution-wise reward: what is paid, what it is combined with, resuming."""

import numpy as np
import pytest
import torch
from conftest import contents, launch, launch_process, read_metrics, read_weights, small
from PIL import Image

import bases
import dist_reward
import train
from commands import picture_sets
from prompting import read_prompts
from rewards import classifier

FID = "--reward fid --reference 16".split()
LONG = (
    "--iterations 4 --save_every 2 --keep_checkpoints 9 --ema 0.5 --kl 0.1 --prompt_noise 0.25 "
    "--diversity 0.3 --snapshot_every 1 --keep_snapshots 3"
).split()


# --------------------------------------------------------------------------------------------------
# Helpers.


def spy(monkeypatch, owner, name):
    """Lets owner.<name> work as before -> the list of what it returns."""
    function = getattr(owner, name)
    returned = []

    def wrapper(*args, **kwargs):
        returned.append(function(*args, **kwargs))
        return returned[-1]

    monkeypatch.setattr(owner, name, wrapper)
    return returned


def kill_in_iteration(monkeypatch, number):
    """The run stops as if killed, after the update of this iteration and before it is logged."""
    function = train.update
    calls = []

    def wrapper(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt("killed")
        return result

    monkeypatch.setattr(train, "update", wrapper)


def assert_equal_runs(a, b):
    """Two runs with the same flags ended with the same bits."""
    assert read_metrics(a) == read_metrics(b)
    first, second = read_weights(a), read_weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for part in ("model", "grids"):
        assert contents(a / part) == contents(b / part)


def assert_goes_on(tiny, tmp_path, flags, iteration):
    """A run killed in an iteration ends like tmp_path/whole when the same command runs again."""
    with pytest.MonkeyPatch.context() as patch:
        kill_in_iteration(patch, iteration)
        with pytest.raises(KeyboardInterrupt):
            launch(small(tiny, tmp_path / "run", *flags))
    launch(small(tiny, tmp_path / "run", *flags))
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def saved_reference(out):
    """The reference's tensors in the newest checkpoint."""
    saved = read_weights(out)
    return {name: value for name, value in saved.items() if name.startswith("reference.")}


def real_moments(path):
    with np.load(path) as file:
        return file["mu"], file["sigma"]


def distance_to(real, features):
    return dist_reward.frechet_distance(*dist_reward.moments(features), *real)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Moments that no picture has, so that there is something to learn."""
    path = tmp_path_factory.mktemp("target") / "target.npz"
    np.savez(path, mu=np.linspace(-1, 1, 64), sigma=np.diag(np.linspace(0.01, 0.5, 64)))
    return path


@pytest.fixture
def pictures(tmp_path):
    """70 noisy pictures in a folder: more than the 64 features that their covariance is of."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(70):
        pixels = random.integers(0, 256, (28, 28), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


# --------------------------------------------------------------------------------------------------
# What is paid and what is logged.


@pytest.mark.run
def test_the_reward_is_the_fall_of_the_distance(tiny, tmp_path, monkeypatch, target):
    """Brute force: the members with the oldest replaced, and their Frechet distance."""
    references = spy(monkeypatch, train, "reference_features")
    sampled = spy(monkeypatch, train, "sample_groups")
    paid = spy(monkeypatch, dist_reward, "price_groups")
    flags = [*FID, "--target", target, "--price", "exact", "--iterations", 3]
    launch(small(tiny, tmp_path / "run", *flags))

    real = real_moments(target)
    rows = read_metrics(tmp_path / "run")
    members = references[0].double()
    oldest = 0
    for step in range(3):
        features = sampled[step].set_features  # [2, 4, 64]
        for n in range(4):
            changed = members.clone()
            changed[[oldest % 16, (oldest + 1) % 16]] = features[:, n].double()
            fall = distance_to(real, members) - distance_to(real, changed)
            expected = pytest.approx(16 / 2 * fall, rel=1e-5, abs=1e-6)
            assert paid[step][0, n].item() == paid[step][1, n].item() == expected
        places = [(oldest + i) % 16 for i in range(8)]
        members[places] = features.flatten(0, 1).double()
        oldest += 8
        assert rows[step + 1]["reference"] == pytest.approx(distance_to(real, members), rel=1e-5)
    saved = saved_reference(tmp_path / "run")["reference.features"]
    torch.testing.assert_close(saved, members.float())


@pytest.mark.slow
def test_fresh_pictures_are_logged_in_the_features_trained_on(tiny, tmp_path):
    launch(small(tiny, tmp_path / "run", *FID, "--iterations", 1))
    row = read_metrics(tmp_path / "run")[-1]

    prompts = read_prompts(tiny / "eval_prompts.jsonl")
    model = bases.load(tmp_path / "run" / "model")
    images = picture_sets.generate(model, prompts, 20 // len(prompts), 2, 1.0, 0, 20)
    features = classifier.load_classifier(tiny / "reward").features(images)
    real = real_moments(tiny / "reward" / "real.npz")
    assert row["eval/fid_trained"] == pytest.approx(distance_to(real, features), rel=1e-3)
    assert row["eval/fid"] != row["eval/fid_trained"]  # the evaluator's features are others


@pytest.mark.slow
def test_trained_on_the_evaluator_s_features_the_other_classifier_evaluates(tiny, tmp_path):
    launch(small(tiny, tmp_path / "a", *FID, "--features", "reward", "--iterations", 1))
    launch(small(tiny, tmp_path / "b", *FID, "--features", "evaluator", "--iterations", 1))
    a, b = read_metrics(tmp_path / "a")[0], read_metrics(tmp_path / "b")[0]
    assert a["eval/fid"] == pytest.approx(b["eval/fid_trained"], rel=1e-4)
    assert a["eval/fid_trained"] == pytest.approx(b["eval/fid"], rel=1e-4)


@pytest.mark.slow
def test_a_refresh_replaces_all_members_and_finds_no_drift(tiny, tmp_path, monkeypatch):
    references = spy(monkeypatch, train, "reference_features")
    launch(small(tiny, tmp_path / "run", *FID, "--refresh", 2))
    first, second = references
    assert first.shape == (16, 64)
    assert not torch.equal(first, second)
    assert torch.equal(saved_reference(tmp_path / "run")["reference.features"], second)
    assert 0 <= read_metrics(tmp_path / "run")[2]["drift"] < 1e-12


# Two flags or more a case: each is one that the reward could get in the way of.
@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--drift off --select all --keep 4 --prompt_noise 0 --diversity 0 --std none",
        "--select spread --gardo --kl 0.1 --guidance 2",
        "--ema 0.5 --train all --refresh 1 --kernel flow-grpo",
        "--diversity_features latents --no-success --batch 3 --passes 2 --updates 1",
        "--reward fid:1,class:0.5 --precision bfloat16",
        "--reward class:1,fid:0.5 --price exact --replace 1 --reference 192",
    ],
)
def test_it_works_with_every_other_mechanism(tiny, tmp_path, flags):
    common = [*FID, "--prompt_noise", 0.25, "--diversity", 0.3]
    launch(small(tiny, tmp_path / "run", *common, *flags.split()))
    rows = read_metrics(tmp_path / "run")
    for row in rows[1:]:
        assert row["grad_norm"] > 0
        assert row["ratio_error"] <= 1e-6
        assert "reward/fid" in row
    assert ("drift" in rows[1]) == ("refresh" in flags)
    assert ("reward/class" in rows[1]) == ("class" in flags)


@pytest.mark.slow
def test_kid_against_a_folder_of_pictures(tiny, tmp_path, pictures):
    flags = ["--reward", "kid", "--reference", 16, "--target", pictures, *LONG]
    launch(small(tiny, tmp_path / "whole", *flags))

    real = [np.asarray(Image.open(path)) / 255 for path in sorted(pictures.iterdir())]
    images = torch.tensor(np.stack(real), dtype=torch.float32)[:, None]
    y = classifier.load_classifier(tiny / "reward").features(images).double()
    x = saved_reference(tmp_path / "whole")["reference.features"].double()

    def kernel(a, b):
        return (a @ b.T / 64 + 1) ** 3

    def mean_of_pairs(matrix):
        n = len(matrix)
        return (matrix.sum() - matrix.trace()) / (n * (n - 1))

    across = kernel(x, y).mean()
    expected = mean_of_pairs(kernel(x, x)) + mean_of_pairs(kernel(y, y)) - 2 * across
    logged = read_metrics(tmp_path / "whole")[-1]["reference"]
    assert logged == pytest.approx(expected.item(), rel=1e-4)
    assert_goes_on(tiny, tmp_path, flags, iteration=4)


# --------------------------------------------------------------------------------------------------
# Nothing is lost: kills, processes, bad features.


@pytest.mark.parametrize(
    "flags, iteration",
    [
        pytest.param("--price exact --refresh 3", 4, marks=pytest.mark.run),
        pytest.param("--price potential", 1, marks=pytest.mark.slow),
        pytest.param("--refresh 2 --reward fid:1,class:0.5", 3, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_keeps_its_reference(tiny, tmp_path, flags, iteration):
    flags = [*FID, *LONG, *flags.split()]
    launch(small(tiny, tmp_path / "whole", *flags))
    assert_goes_on(tiny, tmp_path, flags, iteration)


def flat_weights(weights, names):
    return torch.cat([weights[name].flatten() for name in names])


@pytest.mark.slow
def test_two_processes_pay_what_one_pays(tiny, tmp_path, pictures):
    flags = (
        "--prompts_per_step 3 --group_size 5 --keep 3 --updates 9 --std batch --eval_images 30 "
        "--refresh 1"
    ).split()
    flags = [*FID, *flags, "--target", pictures]
    launch(small(tiny, tmp_path / "one", *flags))
    code, _, error = launch_process(small(tiny, tmp_path / "two", *flags), processes=2)
    assert code == 0, error

    # 16 members have 64 features: a price divides by eigenvalues that come from rounding.
    rows, expected_rows = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert len(rows) == len(expected_rows) == 3
    for row, expected in zip(rows, expected_rows):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-3)
    reference, expected = saved_reference(tmp_path / "two"), saved_reference(tmp_path / "one")
    for name, value in expected.items():
        torch.testing.assert_close(reference[name], value, rtol=1e-3, atol=1e-3)

    base = bases.load(tiny).network.state_dict()
    one, two = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    trained = [name for name in one if name in base]
    difference = flat_weights(one, trained) - flat_weights(two, trained)
    moved = flat_weights(one, trained) - flat_weights(base, trained)
    assert moved.norm() > 0.01
    assert difference.norm() < 0.005 * moved.norm()


@pytest.mark.slow
def test_features_that_are_nan_stop_the_run(tiny, tmp_path, monkeypatch):
    (tmp_path / "broken_features.py").write_text(
        "calls = []\n"
        "\n"
        "def f(images):\n"
        "    calls.append(1)\n"
        "    scale = float('nan') if len(calls) == 6 else 1\n"
        "    return images.flatten(1)[:, :4] * scale\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    np.savez(tmp_path / "target.npz", mu=np.zeros(4), sigma=np.eye(4))
    own = ["--features", "broken_features:f", "--target", tmp_path / "target.npz"]
    with pytest.raises(FloatingPointError, match="iteration 2.*broken_features"):
        launch(small(tiny, tmp_path / "run", *FID, *own))
    assert [row["iteration"] for row in read_metrics(tmp_path / "run")] == [0, 1]


@pytest.mark.slow
def test_a_target_of_another_number_of_features_is_refused(tiny, tmp_path, monkeypatch, capfd):
    source = "def f(images):\n    return images.flatten(1)[:, :4]\n"
    (tmp_path / "small_features.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    np.savez(tmp_path / "target.npz", mu=np.zeros(5), sigma=np.eye(5))
    own = ["--features", "small_features:f", "--target", tmp_path / "target.npz"]
    with pytest.raises(SystemExit) as stop:
        launch(small(tiny, tmp_path / "run", *FID, *own))
    assert stop.value.code == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    for word in ("target.npz", "5 features", "4"):
        assert word in line
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------
# It learns.

TEACH = (
    "--iterations 16 --prompts_per_step 4 --group_size 16 --keep 16 --train all --lr 0.005 "
    "--kernel cps --eta 1 --std batch --clip 1 --eval_every 16 --eval_images 200 --save_every 16 "
    "--updates 2 --prompt_noise 0.25 --reference 64 --reward fid"
).split()
OFF = "--drift off --select all --prompt_noise 0"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [OFF, f"{OFF} --price exact --replace 1", f"{OFF} --price exact", "--diversity 0.1"],
    ids=["potential", "exact, one picture", "exact, one of each group", "with DRIFT"],
)
def test_the_distance_of_fresh_pictures_falls(tiny, tmp_path, flags):
    launch(small(tiny, tmp_path / "run", *TEACH, *flags.split()))
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["eval/fid_trained"] < 0.9 * rows[0]["eval/fid_trained"]
