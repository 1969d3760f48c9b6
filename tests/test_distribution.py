"""The distribution-wise reward in the loop: what it pays, what it composes with, and that nothing is lost when it is interrupted."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import dist_reward
from rewards import classifier
from support import flags
import train
from conftest import launch, launch_process, read_metrics, read_weights, small
from test_train import LONG, agree, at_call, assert_equal_runs, killed, spy

FID = "--reward fid --reference 16".split()


def reference(out, at=-1):
    saved = read_weights(out)
    return {name: value for name, value in saved.items() if name.startswith("reference.")}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Moments that no picture has, so that there is something to learn."""
    path = tmp_path_factory.mktemp("target") / "target.npz"
    np.savez(path, mu=np.linspace(-1, 1, 64), sigma=np.diag(np.linspace(0.01, 0.5, 64)))
    return path


@pytest.fixture
def pictures(tmp_path):
    """70 noisy pictures in a folder: more than the 64 features that their covariance is of."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for i in range(70):
        Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8)).save(folder / f"{i}.png")
    return folder


def test_the_reward_is_the_fall_of_the_distance(tiny, tmp_path, monkeypatch, target):
    """Brute force: the reference's features with the oldest members replaced, and its Frechet distance."""
    fresh, groups = spy(monkeypatch, "fresh_reference"), spy(monkeypatch, "sample_groups")
    paid = []
    right = dist_reward.price_groups
    monkeypatch.setattr(dist_reward, "price_groups", lambda *args: paid.append(right(*args)) or paid[-1])
    launch(small(tiny, tmp_path / "run", *FID, "--target", target, "--price", "exact", "--iterations", 3))
    real = np.load(target)
    distance = lambda f: dist_reward.frechet_distance(*dist_reward.moments(f), real["mu"], real["sigma"])
    members, oldest = fresh[0].double(), 0
    for step, (batch, price) in enumerate(zip(groups, paid)):
        found = batch[2]                                                 # [P, N, D]
        for n in range(4):
            changed = members.clone()
            changed[[(oldest + p) % 16 for p in range(2)]] = found[:, n].double()
            assert price[:, n].tolist() == [pytest.approx(16 / 2 * (distance(members) - distance(changed)), rel=1e-5, abs=1e-6)] * 2
        members[[(oldest + i) % 16 for i in range(8)]], oldest = found.flatten(0, 1).double(), oldest + 8
        assert read_metrics(tmp_path / "run")[step + 1]["reference"] == pytest.approx(distance(members), rel=1e-5)
    torch.testing.assert_close(reference(tmp_path / "run")["reference.features"], members.float())


def test_the_distance_of_fresh_pictures_is_logged_in_the_features_trained_on(tiny, tmp_path, monkeypatch):
    made = []
    at_call(monkeypatch, train.evaluation, "generate", 2, lambda images, args: made.append(images) or images)
    launch(small(tiny, tmp_path / "run", *FID, "--iterations", 1))
    real, network = np.load(tiny / "reward" / "real.npz"), classifier.load_classifier(tiny / "reward")
    row = read_metrics(tmp_path / "run")[-1]
    f = network.features(made[0])
    assert row["eval/fid_trained"] == pytest.approx(dist_reward.frechet_distance(*dist_reward.moments(f), real["mu"], real["sigma"]), rel=1e-4)
    assert row["eval/fid"] != row["eval/fid_trained"]                    # the judge's features are others


def test_with_the_judge_s_own_features_the_other_classifier_judges(tiny, tmp_path):
    launch(small(tiny, tmp_path / "a", *FID, "--features", "reward", "--iterations", 1))
    launch(small(tiny, tmp_path / "b", *FID, "--features", "evaluator", "--iterations", 1))
    a, b = read_metrics(tmp_path / "a")[0], read_metrics(tmp_path / "b")[0]
    assert (a["eval/fid"], a["eval/fid_trained"]) == pytest.approx((b["eval/fid_trained"], b["eval/fid"]), rel=1e-4)


@pytest.mark.parametrize("flags", [
    "--drift off --select all --prompt_noise 0 --diversity 0", "--select spread", "--gardo", "--kl 0.1", "--ema 0.5 --train all", "--diversity_features latents --no-success",
    "--reward fid:1,class:0.5", "--reward class:1,fid:0.5 --price quadratic --replace 1 --reference 192", "--std none", "--refresh 1", "--guidance 2",
    "--precision bfloat16", "--batch 3", "--passes 2 --updates 1", "--kernel flow-grpo"])
def test_it_works_with_every_other_mechanism(tiny, tmp_path, flags):
    launch(small(tiny, tmp_path / "run", *FID, "--prompt_noise", 0.25, "--diversity", 0.3, *flags.split()))
    rows = read_metrics(tmp_path / "run")
    assert all(row["grad_norm"] > 0 and row["ratio_error"] <= 1e-6 and "reward/fid" in row for row in rows[1:])
    assert ("drift" in rows[1]) == ("refresh" in flags) and ("reward/class" in rows[1]) == ("class" in flags)


def test_kid_against_a_folder_of_pictures(tiny, tmp_path, pictures):
    flags = ["--reward", "kid", "--reference", 16, "--target", pictures, *LONG]
    launch(small(tiny, tmp_path / "whole", *flags))
    rows, real = read_metrics(tmp_path / "whole"), [np.asarray(Image.open(p)) / 255 for p in sorted(pictures.iterdir())]
    network = classifier.load_classifier(tiny / "reward")
    y = network.features(torch.tensor(np.stack(real), dtype=torch.float32)[:, None]).double()
    x = reference(tmp_path / "whole")["reference.features"].double()
    k = lambda a, b: (a @ b.T / 64 + 1) ** 3
    mean = lambda m: (m.sum() - m.trace()) / (len(m) * (len(m) - 1))
    assert rows[-1]["reference"] == pytest.approx((mean(k(x, x)) + mean(k(y, y)) - 2 * k(x, y).mean()).item(), rel=1e-4)
    assert_goes_on(tiny, tmp_path, flags)


def assert_goes_on(tiny, tmp_path, flags, iteration=4):
    """A run killed in an iteration ends like tmp_path/whole when the same command runs again."""
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, train, "update", iteration, killed)
        with pytest.raises(KeyboardInterrupt):
            launch(small(tiny, tmp_path / "run", *flags))
    launch(small(tiny, tmp_path / "run", *flags))
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("flags", ["--price potential", "--price exact --refresh 3", "--refresh 2 --reward fid:1,class:0.5"])
@pytest.mark.parametrize("iteration", [1, 3, 4])
def test_an_interrupted_run_keeps_its_reference(tiny, tmp_path, flags, iteration):
    flags = [*FID, *LONG, *flags.split()]
    launch(small(tiny, tmp_path / "whole", *flags))
    assert_goes_on(tiny, tmp_path, flags, iteration)


def test_a_refresh_replaces_all_members_and_finds_no_drift(tiny, tmp_path, monkeypatch):
    fresh = spy(monkeypatch, "fresh_reference")
    launch(small(tiny, tmp_path / "run", *FID, "--refresh", 2))
    assert len(fresh) == 2 and fresh[0].shape == (16, 64) and not torch.equal(*fresh)
    assert torch.equal(reference(tmp_path / "run")["reference.features"], fresh[1])
    assert 0 <= read_metrics(tmp_path / "run")[2]["drift"] < 1e-12


def test_two_processes_pay_what_one_pays(tiny, tmp_path, pictures):
    flags = [*FID, *"--prompts_per_step 3 --group_size 5 --keep 3 --updates 9 --std batch --eval_images 30 --refresh 1 --target".split(), pictures]
    launch(small(tiny, tmp_path / "one", *flags))
    code, _, error = launch_process(small(tiny, tmp_path / "two", *flags), processes=2)
    assert code == 0, error
    agree(tmp_path / "one", tmp_path / "two", tiny, 1e-3)                # 16 members of 64 features: a price divides by eigenvalues that are rounding
    one, two = reference(tmp_path / "one"), reference(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-3)


def test_features_that_are_none_stop_the_run(tiny, tmp_path, monkeypatch):
    (tmp_path / "broken_features.py").write_text(
        "import torch\nseen = []\n\ndef f(images):\n    seen.append(1)\n"
        "    return images.flatten(1)[:, :4] * (float('nan') if len(seen) == 6 else 1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    np.savez(tmp_path / "target.npz", mu=np.zeros(4), sigma=np.eye(4))
    argv = small(tiny, tmp_path / "run", *FID, "--features", "broken_features:f", "--target", tmp_path / "target.npz")
    with pytest.raises(FloatingPointError, match="iteration 2.*broken_features"):
        launch(argv)
    assert [row["iteration"] for row in read_metrics(tmp_path / "run")] == [0, 1]


def test_own_features_of_another_size_than_the_target_are_refused(tiny, tmp_path, monkeypatch, capfd):
    (tmp_path / "small_features.py").write_text("def f(images):\n    return images.flatten(1)[:, :4]\n")
    monkeypatch.syspath_prepend(tmp_path)
    np.savez(tmp_path / "target.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(SystemExit) as stop:
        launch(small(tiny, tmp_path / "run", *FID, "--features", "small_features:f", "--target", tmp_path / "target.npz"))
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "target.npz" in line and "5 features" in line and "4" in line and not (tmp_path / "run").exists()


TEACH = ("--iterations 16 --prompts_per_step 4 --group_size 16 --keep 16 --train all --lr 0.005 --kernel cps --eta 1 --std batch --clip 1 "
         "--eval_every 16 --eval_images 200 --save_every 16 --updates 2 --prompt_noise 0.25 --reference 64").split()
OFF = "--drift off --select all --prompt_noise 0"


@pytest.mark.parametrize("flags", [OFF, f"{OFF} --price exact --replace 1", f"{OFF} --price exact", "--diversity 0.1"])
def test_the_distance_of_fresh_pictures_falls(tiny, tmp_path, flags):
    launch(small(tiny, tmp_path / "run", *TEACH, "--reward", "fid", *flags.split()))
    rows = read_metrics(tmp_path / "run")
    print(json.dumps([row["eval/fid_trained"] for row in rows if "eval/fid_trained" in row]))
    assert rows[-1]["eval/fid_trained"] < 0.9 * rows[0]["eval/fid_trained"]
