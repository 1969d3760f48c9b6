"""Shaping: how different a rollout is from its group, and how that is paid for step by step.

DRIFT (arXiv 2601.12401) part (iii) is a "potential-based reward shaping" of intra-group diversity. Ours: the potential Phi of rollout i
before step t is its distance to the group, measured on the clean picture x0_hat predicted there; each step pays
    F_t = gamma Phi(s_{t+1}) - Phi(s_t)        (Ng, Harada & Russell 1999),
and the advantage at step t is that of the return-to-go, so that the step which made a rollout different is the one that is paid.
Summed up, F telescopes to gamma^T Phi(s_T) - Phi(s_0). Hence two modes: terminal="zero" sets Phi(s_T) = 0, the theorem's condition,
and leaves the optimal policy as it was; "keep" pays for the diversity of the finished pictures, and so moves the optimum on purpose. In train.py's
`credit` it pays the successful ones alone, Phi_T - Phi_t or nothing: a success that ends less different than it was predicted is fined.
Left out on purpose: kernels and clusters; a distance and its k nearest neighbours say it.
"""
import torch

def group_diversity(features, metric="euclidean", nearest=0):
    """How far each rollout is from the others of its group: features [P, N, ...] -> [P, N].

    metric "euclidean" or "cosine" (1 - cos: contrast alone cannot raise it); the mean over the group's other members, or over the
    `nearest` ones if that is not 0 (a group of two far clusters then counts as little diverse).

    >>> two_and_one = torch.tensor([[[0.0], [0.1], [3.0]]])                  # a group of three: two alike, one apart
    >>> group_diversity(two_and_one)
    tensor([[1.5500, 1.5000, 2.9500]])
    >>> group_diversity(two_and_one, nearest=1)
    tensor([[0.1000, 0.1000, 2.9000]])
    """
    x = features.flatten(2).float()
    if metric == "cosine":                                               # in float64: of a collapsed group, float32 would leave rounding, of either sign
        x = torch.nn.functional.normalize(x.double(), dim=2)
        distance = (1 - x @ x.transpose(1, 2)).clamp(min=0)              # [P, N, N]
    elif metric == "euclidean":
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    else:
        raise ValueError(f"metric {metric!r} is none of cosine, euclidean")
    N = x.shape[1]
    others = distance.masked_fill(torch.eye(N, dtype=torch.bool, device=x.device), float("inf"))
    return others.sort(dim=2).values[:, :, :min(nearest, N - 1) or N - 1].mean(2).float()


def shaped_returns(reward, potential, gamma=1.0, weight=1.0, terminal="keep"):
    """Return-to-go of every step: reward [P, N] paid at the last of T steps, potential [T + 1, P, N] -> [T, P, N].

    G_t = gamma^(T-1-t) reward + weight sum_{k >= t} gamma^(k-t) F_k,  F_k = gamma Phi_{k+1} - Phi_k
    terminal "zero": Phi_T := 0 (the optimal policy does not change); "keep": as given (a terminal bonus gamma^T Phi_T remains).

    >>> potential = torch.tensor([0.2, 0.5, 0.9]).reshape(3, 1, 1)          # of one rollout of two steps; it telescopes to Phi_T - Phi_t
    >>> shaped_returns(torch.zeros(1, 1), potential).flatten()
    tensor([0.7000, 0.4000])
    >>> shaped_returns(torch.zeros(1, 1), potential, terminal="zero").flatten()                  # -Phi_t: known before the step, so no preference
    tensor([-0.2000, -0.5000])
    """
    if terminal not in ("keep", "zero"):
        raise ValueError(f"terminal {terminal!r} is none of keep, zero")
    T = len(potential) - 1
    phi = torch.cat([potential[:-1], potential[-1:] * (terminal == "keep")])
    pay = weight * (gamma * phi[1:] - phi[:-1])                          # [T, P, N]
    pay[-1] = pay[-1] + reward
    returns = [pay[-1]]
    for t in range(T - 2, -1, -1):
        returns.append(pay[t] + gamma * returns[-1])
    return torch.stack(returns[::-1])


def group_advantage(values, index, std="group", floor=1e-3, limit=5.0):
    """Centres values [..., P, N] by group and divides them by a std, over the kept rollouts index [P, K] -> float64 [..., P, K].

    std: "group" the kept group's, "batch" that of all the kept together, "none" 1. A std below the floor counts as the floor: `floor` times the largest
    deviation of the batch, but no more than `floor` and no less than rounding, so a group of equals gets 0 and no noise is blown up, whatever the
    values' scale. The result is limited to +-`limit`.
    """
    values, index = values.double(), index.to(values.device)
    kept = values.gather(-1, index.expand(*values.shape[:-1], index.shape[-1]))
    centred = kept - kept.mean(-1, keepdim=True)
    floor = torch.maximum(floor * centred.abs().max().clamp(max=1), 1e-5 * kept.abs().max()).clamp(min=1e-12)
    if std == "group":
        centred = centred / kept.std(-1, keepdim=True).clamp(min=floor)
    elif std == "batch":
        centred = centred / centred.square().mean((-2, -1), keepdim=True).sqrt().clamp(min=floor)
    return centred.clamp(-limit, limit)


def gardo(advantage, closest, index):
    """GARDO (arXiv 2512.24138): positive advantages [P, K] of the rollouts index [P, K] times d / mean d, d [P, N] the distance to the nearest."""
    relative = closest / closest.mean(1, keepdim=True).clamp(min=1e-8)
    return torch.where(advantage > 0, advantage * relative.gather(1, index), advantage)
