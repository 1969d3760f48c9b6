"""Metrics, the Frechet distance, and the rewards by name."""
import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file

import eval as evaluation
from commands import picture_sets
import rewards
from rewards import classifier
from dist_reward import frechet_distance, moments, sqrt_psd
from rewards.metrics import mean_distance, vendi_score
from prompting import Prompt
from sampling import FLOW


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Diversity metrics.

def naive_vendi(features, scale):
    x = features.double().numpy()
    kernel = np.exp(-((x[:, None] - x[None]) ** 2).sum(2) / (2 * scale**2))
    eigenvalues = np.linalg.eigvals(kernel / len(x)).real
    return math.exp(-sum(v * math.log(v) for v in eigenvalues if v > 0))


def test_vendi_counts_the_different_pictures():
    one = randn(1, 5)
    assert vendi_score(one.expand(7, 5), 1.0) == pytest.approx(1, abs=1e-6)
    assert vendi_score(100 * torch.eye(7), 1.0) == pytest.approx(7, abs=1e-6)
    two = torch.cat([one.expand(6, 5), one.expand(2, 5) + 100])          # two piles, 3/4 and 1/4: exp of their entropy
    assert vendi_score(two, 1.0) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), rel=1e-6)
    pair = torch.tensor([[0.0], [1.0]])                                  # eigenvalues (1 +- k) / 2, k = exp(-1 / 2 h^2)
    k = math.exp(-1 / (2 * 0.8**2))
    assert vendi_score(pair, 0.8) == pytest.approx(math.exp(-sum((1 + s * k) / 2 * math.log((1 + s * k) / 2) for s in (1, -1))), rel=1e-9)


def test_vendi_by_its_definition():
    for n, D, scale, seed in ((5, 3, 1.0, 0), (12, 8, 2.5, 1), (20, 2, 0.5, 2)):
        features = randn(n, D, seed=seed)
        assert vendi_score(features, scale) == pytest.approx(naive_vendi(features, scale), rel=1e-8)
        assert vendi_score(features.float(), scale) == pytest.approx(naive_vendi(features, scale), rel=1e-4)
        assert 1 < vendi_score(features, 2 * scale) < vendi_score(features, scale) < n


def test_mean_distance_by_its_definition():
    features = randn(6, 4)
    distances = [math.dist(features[i].tolist(), features[j].tolist()) for i in range(6) for j in range(i)]
    assert mean_distance(features) == pytest.approx(sum(distances) / len(distances), rel=1e-12)
    assert mean_distance(features[:1].expand(5, 4)) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Frechet distance.

def covariance(D, rank, seed):
    a = randn(D, rank, seed=seed)
    return a @ a.T / rank


def naive_frechet(mu1, sigma1, mu2, sigma2):
    root = scipy.linalg.sqrtm((sigma1 @ sigma2).numpy())
    return float(((mu1 - mu2) ** 2).sum() + sigma1.trace() + sigma2.trace() - 2 * np.trace(root).real)


@pytest.mark.parametrize("D", [1, 3, 16])
def test_frechet_is_that_of_a_matrix_square_root(D):
    for seed in range(3):
        first, second = (randn(D, seed=seed), covariance(D, 2 * D, seed)), (randn(D, seed=9 + seed), 2 * covariance(D, 3 * D, 9 + seed))
        expected = naive_frechet(*first, *second)
        assert frechet_distance(*first, *second) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(*second, *first) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(*(m.numpy() for m in (*first, *second))) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_singular_covariances():
    """Fewer pictures than dimensions: the matrix square root of a singular product is only accurate to about 1e-6."""
    first, second = moments(randn(10, 16)), moments(2 * randn(12, 16, seed=1) + 0.3)
    expected = naive_frechet(*first, *second)
    assert expected > 1 and frechet_distance(*first, *second) == pytest.approx(expected, rel=1e-5)
    a, b = (x - x.mean(0) for x in (randn(10, 16), 2 * randn(12, 16, seed=1)))
    cross = torch.linalg.svdvals(a @ b.T).sum() / math.sqrt(9 * 11)      # the trace of the root is also a nuclear norm
    exact = (first[0] - second[0]).square().sum() + first[1].trace() + second[1].trace() - 2 * cross
    assert frechet_distance(*first, *second) == pytest.approx(exact.item(), rel=1e-7)
    point = torch.zeros(4), torch.zeros(4, 4)
    assert frechet_distance(*point, torch.ones(4), torch.eye(4)) == pytest.approx(8)           # |mu|^2 + the trace


def test_frechet_of_diagonal_gaussians():
    mu1, mu2, s1, s2 = randn(6), randn(6, seed=1), randn(6, seed=2).abs(), randn(6, seed=3).abs()
    expected = ((mu1 - mu2) ** 2 + (s1 - s2) ** 2).sum().item()
    assert frechet_distance(mu1, (s1**2).diag(), mu2, (s2**2).diag()) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_equals_is_zero_and_never_negative():
    for rank in (3, 20):
        mu, sigma = randn(8), covariance(8, rank, 1)
        assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-6
        assert frechet_distance(mu, sigma, mu + 0.1, sigma) == pytest.approx(8 * 0.01, abs=1e-6)


def test_sqrt_psd():
    for matrix in (covariance(7, 20, 0), covariance(7, 3, 1), torch.zeros(2, 2)):
        root = sqrt_psd(matrix)
        torch.testing.assert_close(root @ root, matrix.double(), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(root, root.T, atol=1e-12, rtol=0)
        assert torch.linalg.eigvalsh(root).min() > -1e-7


@pytest.mark.parametrize("D", [1, 5])
def test_moments_are_those_of_numpy(D):
    features = (randn(30, D) * 3 + 100).float()
    mu, sigma = moments(features)
    assert mu.dtype == sigma.dtype == torch.float64
    np.testing.assert_allclose(mu, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features.double().numpy(), rowvar=False).reshape(D, D), rtol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Rewards.

@pytest.mark.parametrize("spec, weights", [("class", {"class": 1.0}), ("class:1,ink:0.2", {"class": 1.0, "ink": 0.2}),
                                           (" margin:-2.5 , ink ", {"margin": -2.5, "ink": 1.0}), ("ink:1e-3", {"ink": 0.001})])
def test_reward_mixtures(spec, weights):
    assert rewards.parse(spec) == weights and list(rewards.parse(spec)) == list(weights)


@pytest.mark.parametrize("spec, words", [
    ("", "none of class, margin, ink"), ("beauty", "'beauty'"), ("class:1,", "''"), ("class,class:2", "'class' is named twice"),
    ("class:one", "'one' is not a number"), ("class:1:2", "'1:2'"), ("class:nan", "finite"), ("class:inf", "finite"),
    ("ink:0", "not zero"), ("class;ink", "'class;ink'"), ("Class", "'Class'"),
])
def test_bad_reward_mixtures_are_refused(spec, words):
    with pytest.raises(ValueError) as caught:
        rewards.parse(spec)
    assert words in str(caught.value) and spec in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """A model folder with a random classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = classifier.Classifier(2)
    with torch.no_grad():
        model.head[1].weight.mul_(150)                                   # so that some log-probabilities pass the floor
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "config.json").write_text(json.dumps({"width": 2}))
    save_file(model.state_dict(), tmp_path / "reward" / "model.safetensors")
    return tmp_path


LABELS = [3, 0, 9, 3, 5, 1, 7, 2]
PROMPTS, METADATA = ["?"] * len(LABELS), [{"label": label} for label in LABELS]
IMAGES = torch.rand(len(LABELS), 3, 28, 28, generator=torch.Generator().manual_seed(1))


def test_rewards_by_their_definitions(folder):
    reward = rewards.Reward("class:2,margin:-0.5,ink:3", folder)
    terms = reward(IMAGES, PROMPTS, METADATA)
    assert list(terms) == ["class", "margin", "ink"] and terms["ink"].dtype == torch.float32
    assert reward.weights == {"class": 2.0, "margin": -0.5, "ink": 3.0} and reward.distribution is None
    for i, label in enumerate(LABELS):
        logits = reward.classifier(IMAGES[i:i + 1])[0].double().tolist()
        p = math.exp(logits[label]) / sum(math.exp(v) for v in logits)
        naive = {"class": max(math.log(p), -6.0), "margin": math.log(p) - math.log(1 - p), "ink": 10 * p * IMAGES[i].double().mean().item()}
        for name, value in naive.items():
            assert terms[name].shape == (len(LABELS),) and terms[name][i].item() == pytest.approx(value, rel=1e-3, abs=1e-4)
    assert (terms["class"] == classifier.FLOOR).any() and (terms["class"] > classifier.FLOOR).any()


def test_a_reward_does_not_depend_on_batch_and_order(folder):
    reward, order = rewards.Reward("class,ink", folder), [4, 2, 7, 0, 1, 3, 6, 5]
    terms, shuffled = reward(IMAGES, PROMPTS, METADATA), reward(IMAGES[order], PROMPTS, [METADATA[i] for i in order])
    for name, values in terms.items():
        torch.testing.assert_close(shuffled[name], values[order], atol=1e-5, rtol=1e-5)
        for i in range(len(LABELS)):
            torch.testing.assert_close(reward(IMAGES[i:i + 1], ["?"], METADATA[i:i + 1])[name], values[i:i + 1], atol=1e-5, rtol=1e-5)


def test_distribution_wise_rewards_are_named_and_left_to_others(folder):
    reward = rewards.Reward("fid:2,class:0.5", folder)
    assert reward.weights == {"fid": 2.0, "class": 0.5} and reward.distribution == "fid" and list(reward(IMAGES, PROMPTS, METADATA)) == ["class"]
    assert rewards.Reward("kid", folder)(IMAGES, ["?"] * 8, [{}] * 8) == {} and rewards.Reward("kid", folder).distribution == "kid"


@pytest.mark.parametrize("name", ["class", "margin", "ink"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_an_error_with_its_name(folder, name, bad):
    images = IMAGES.clone()
    images[2, 1, 5, 5] = bad
    with pytest.raises(FloatingPointError, match=f"the reward {name} returned a non-finite number"):
        rewards.Reward(name, folder)(images, PROMPTS, METADATA)


def test_a_reward_of_a_wrong_shape_is_an_error(folder, monkeypatch):
    monkeypatch.setitem(classifier.NAMES, "ink", lambda logits, labels, images: logits)
    with pytest.raises(FloatingPointError, match=r"the reward ink returned the shape \(8, 10\)"):
        rewards.Reward("class,ink", folder)(IMAGES, PROMPTS, METADATA)


def test_the_classifier_of_a_reward_is_frozen(folder):
    reward = rewards.Reward("class", folder)
    assert not reward.classifier.training and not any(p.requires_grad for p in reward.classifier.parameters())
    features, grey = reward.classifier.features, IMAGES.mean(1, keepdim=True)                 # pictures of one channel are read too
    assert features(IMAGES).shape == (8, 64)
    torch.testing.assert_close(features(grey), features(IMAGES), atol=1e-5, rtol=1e-5)


def test_labels_are_checked_by_line():
    rewards.check_labels([Prompt("a", {"label": 0}), Prompt("b", {"label": 9})], "p.jsonl")
    for bad in ({}, {"label": 10}, {"label": -1}, {"label": "3"}, {"label": 1.0}, {"label": True}, {"label": None}):
        with pytest.raises(ValueError, match="p.jsonl:2: "):
            rewards.check_labels([Prompt("a", {"label": 0}), Prompt("b", bad)], "p.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# The evaluation as a whole.

def test_scores_by_their_definitions(folder):
    evaluator = classifier.load_classifier(folder / "reward")
    labels = [3, evaluator(IMAGES)[5].argmin().item()]                   # 2 prompts, 4 pictures each; the second finds the floor
    real_features = randn(80, 64, seed=2)
    mu, sigma = moments(real_features)
    ours = evaluation.score(IMAGES, labels, evaluator, {"mu": mu.numpy(), "sigma": sigma.numpy(), "scale": np.array(0.4)})
    features = evaluator.features(IMAGES)
    log_p = evaluator(IMAGES).double().log_softmax(1)
    target = [labels[0]] * 4 + [labels[1]] * 4
    assert log_p[5, labels[1]] < -6
    assert ours["accuracy"] == sum(log_p[i].argmax().item() == c for i, c in enumerate(target)) / 8
    assert ours["log_prob"] == pytest.approx(sum(max(log_p[i, c].item(), -6.0) for i, c in enumerate(target)) / 8, rel=1e-4)
    assert ours["vendi"] == pytest.approx((naive_vendi(features[:4], 0.4) + naive_vendi(features[4:], 0.4)) / 2, rel=1e-3)
    assert ours["distance"] == pytest.approx((mean_distance(features[:4]) + mean_distance(features[4:])) / 2, rel=1e-4)
    assert ours["fid"] == pytest.approx(naive_frechet(*moments(features), mu, sigma), rel=1e-4)


class Blend:
    """A model whose picture tells its noise and its prompt; knows two words."""
    path, shape, device = FLOW, (1, 4, 4), torch.device("cpu")
    initial_std = 1.0

    def __call__(self, x, t, prompt):
        v = torch.tanh(x) - prompt[0][:, None, None, :4]
        t = t.reshape(-1, 1, 1, 1)
        return x - t * v, x + (1 - t) * v

    def encode(self, texts):
        return (torch.tensor([[{"": 0.0, "coat": 1.0, "bag": -1.0}[text]] * 4 for text in texts]),)

    def decode(self, latents):
        return latents.expand(-1, 3, -1, -1)


def test_pictures_are_a_function_of_seed_and_number():
    prompts = [Prompt("coat"), Prompt("bag")]
    make = lambda n=3, seed=0, batch=100, guidance=1.0, prompts=prompts: picture_sets.generate(Blend(), prompts, n, 4, guidance, seed, batch)
    images = make()
    assert images.shape == (6, 3, 4, 4) and images.dtype == torch.float32
    for batch in (1, 4):
        torch.testing.assert_close(make(batch=batch), images, atol=1e-6, rtol=1e-6)
    assert images[:3].mean() - images[3:].mean() > 0.5                   # prompt by prompt
    torch.testing.assert_close(make(n=6, prompts=prompts[:1])[:3], images[:3], atol=1e-6, rtol=1e-6)
    assert torch.unique(images.flatten(1).round(decimals=4), dim=0).shape[0] == 6
    assert (make(seed=1) - images).abs().max() > 0.1 and (make(guidance=3.0) - images).abs().max() > 0.1
