"""Evaluation: how well a model does what was asked, and how different its pictures are. Judged by a network that training never sees.

Pictures come from the deterministic sampler at clean prompts and fixed seeds, the same ones for every model, n for each of P prompts.
    accuracy, log_prob    of the prompt's class under the evaluator (log_prob in nats, floored like the reward)         alignment
    vendi                 exp(-sum l ln l), l the eigenvalues of K/n (arXiv 2210.02410), K_ij = exp(-|f_i - f_j|^2 / 2 h^2),
                          h half the real pictures' mean distance within a class: 1 for n copies, n at most; mean over prompts
    distance              mean pairwise distance within a prompt                                                       diversity
    fid                   squared Frechet distance of all pictures to the real training set, always at the same n      both
all in the evaluator's 64 features. Left out here: intervals, precision and recall, other people's models and folders of pictures.
"""
import zipfile
from pathlib import Path

import numpy as np
import torch

import rewards
from dist_reward import frechet_distance, moments
from runtime import gather, share
from sampling import sample, seeded_noise

EVAL_STREAM = 2                                                          # keeps held-out noise apart from the training's


def pairwise_distances(features):
    """features [..., n, D] -> Euclidean distances [..., n, n], float64."""
    return torch.cdist(features.double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist")


def vendi_score(features, scale):
    """features [n, D] -> the effective number of different pictures, 1 to n, with the RBF kernel of width `scale`."""
    kernel = torch.exp(-pairwise_distances(features) ** 2 / (2 * scale**2))
    l = torch.linalg.eigvalsh(kernel / len(features)).clamp(min=0)
    return float(torch.exp(-torch.special.xlogy(l, l).sum()))


def mean_distance(features):
    """features [n, D] -> the mean distance of two different pictures."""
    n = len(features)
    return float(pairwise_distances(features).sum() / (n * (n - 1)))


def check_real(path):
    """Raises ValueError, in one line, if the moments of the real pictures cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as real:
            missing = {"mu", "sigma", "scale"} - set(real.files)
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an npz file of numbers ({error})") from None
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}")


class Judge:
    """A classifier that a run is judged by, and the moments of the real pictures in its features: a folder as assets/tiny/evaluator."""

    def __init__(self, model_folder, name, device="cpu", real="real.npz"):
        self.network, self.real = rewards.load_classifier(Path(model_folder) / name, device), np.load(Path(model_folder) / name / real)


@torch.inference_mode()
def pictures(model, prompts, n, numbers, steps, guidance, key, batch):
    """The pictures `numbers` of P prompts, n each, by the deterministic sampler -> [len(numbers), 3, H, W]. Picture i has prompt i // n, and
    noise that is a function of (key, i) alone."""
    times, images = model.path.times(steps), []
    table, null = model.encode([p.text for p in prompts]), model.encode([""])
    for i in torch.as_tensor(numbers, dtype=torch.long).split(batch):
        x_T = seeded_noise(key, i, model.shape).to(model.device) * model.path.sigma(times[0]).item()
        prompt = tuple(y[i.to(model.device) // n] for y in table)
        images.append(model.decode(sample(model, model.path, times, prompt, x_T, guidance, null)).float())
    return torch.cat(images) if images else torch.empty(0, 3, *model.shape[1:], device=model.device)


def generate(model, prompts, n, steps, guidance, seed, batch):
    """n pictures for each of P prompts -> [P * n, 3, H, W], prompt by prompt, on every process; each draws its share."""
    mine = pictures(model, prompts, n, list(share(len(prompts) * n)), steps, guidance, (EVAL_STREAM, seed), batch)
    return gather(mine, len(prompts) * n)


@torch.inference_mode()
def score(images, labels, evaluator, real):
    """images [P * n, 3, H, W], labels [P] -> the metrics of the header. real: an npz with mu, sigma, scale in the evaluator's features."""
    features = torch.cat([evaluator.features(x) for x in images.split(500)])
    groups = features.reshape(len(labels), -1, features.shape[1])
    target = torch.tensor(labels, device=images.device).repeat_interleave(groups.shape[1])
    log_p = evaluator.head(features).log_softmax(1)
    return {"accuracy": (log_p.argmax(1) == target).double().mean().item(),
            "log_prob": log_p.gather(1, target[:, None]).clamp(min=rewards.FLOOR).double().mean().item(),
            "vendi": sum(vendi_score(f, float(real["scale"])) for f in groups) / len(groups),
            "distance": sum(mean_distance(f) for f in groups) / len(groups),
            "fid": frechet_distance(*moments(features.cpu()), real["mu"], real["sigma"])}
