"""Shaping: how different a rollout is from its group, and how that is paid for step by step.

DRIFT (arXiv 2601.12401) part (iii) is a "potential-based reward shaping" of intra-group diversity.
Our reading: the potential Phi of a rollout before step t is its distance to its group, measured on
the clean picture x0_hat predicted there. Each step is paid (Ng, Harada & Russell, 1999)
    F_t = gamma Phi(s_{t+1}) - Phi(s_t),
and a step's advantage is that of the return-to-go, so the step that made a rollout different is the
one that is paid. The sum of F telescopes to gamma^T Phi(s_T) - Phi(s_0).
Left out on purpose: kernels and clusters. A distance to the k nearest neighbours says it.
"""

import torch
from torch.nn.functional import normalize

# Shapes: P prompts, N rollouts a prompt, K of them kept, T steps.


def group_diversity(features, metric="euclidean", nearest=0):
    """How far each rollout is from the others of its group: features [P, N, ...] -> [P, N].

    metric: euclidean, or cosine (1 - cos, which contrast alone cannot raise).
    nearest: the mean is over so many nearest members of the group (0: over all others). With few,
        a group of two far clusters counts as little diverse.

    >>> two_alike = torch.tensor([[[0.0], [0.1], [3.0]]])
    >>> group_diversity(two_alike)
    tensor([[1.5500, 1.5000, 2.9500]])
    >>> group_diversity(two_alike, nearest=1)
    tensor([[0.1000, 0.1000, 2.9000]])
    """
    features = features.flatten(2).float()  # [P, N, F]
    if metric == "cosine":
        # float64: in a collapsed group float32 would leave rounding noise, of either sign.
        unit = normalize(features.double(), dim=2)
        distance = (1 - unit @ unit.transpose(1, 2)).clamp(min=0)  # [P, N, N]
    elif metric == "euclidean":
        distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    else:
        raise ValueError(f"metric {metric!r} is none of cosine, euclidean")

    N = features.shape[1]
    itself = torch.eye(N, dtype=torch.bool, device=features.device)
    to_others = distance.masked_fill(itself, float("inf")).sort(dim=2).values
    count = min(nearest, N - 1) if nearest else N - 1
    return to_others[:, :, :count].mean(2).float()


def shaped_returns(reward, potential, gamma=1.0, weight=1.0, terminal="keep"):
    """Return-to-go of every step: reward [P, N], paid at the last step, potential [T + 1, P, N].

    G_t = gamma^(T-1-t) reward + weight sum_{k >= t} gamma^(k-t) F_k  -> [T, P, N]

    terminal: zero sets Phi(s_T) = 0, the theorem's condition: the optimal policy does not change.
        keep takes it as given: a bonus gamma^T Phi(s_T) remains, and moves the optimum on purpose.

    >>> potential = torch.tensor([0.2, 0.5, 0.9]).reshape(3, 1, 1)  # of one rollout of two steps
    >>> shaped_returns(torch.zeros(1, 1), potential).flatten()  # Phi_T - Phi_t
    tensor([0.7000, 0.4000])
    >>> shaped_returns(torch.zeros(1, 1), potential, terminal="zero").flatten()  # -Phi_t
    tensor([-0.2000, -0.5000])
    """
    if terminal not in ("keep", "zero"):
        raise ValueError(f"terminal {terminal!r} is none of keep, zero")
    if terminal == "zero":
        potential = torch.cat([potential[:-1], torch.zeros_like(potential[-1:])])

    T = len(potential) - 1
    pay = weight * (gamma * potential[1:] - potential[:-1])  # [T, P, N]
    pay[-1] = pay[-1] + reward
    returns = [pay[-1]]
    for t in range(T - 2, -1, -1):
        returns.insert(0, pay[t] + gamma * returns[0])
    return torch.stack(returns)


def group_advantage(values, index, std="group", floor=1e-3, limit=5.0):
    """Values [..., P, N] centred by group, in units of a std, of the kept rollouts index [P, K].

    -> float64 [..., P, K], limited to +-`limit`.
    std: that of the kept group (group), of all the kept together (batch), or 1 (none).
    floor: a std below it counts as the floor, so that a group of equals gets 0 and no noise is
        blown up. It is in units of the largest deviation of the batch, at most as it stands, and
        never below rounding.
    """
    values = values.double()
    index = index.to(values.device)
    index = index.expand(*values.shape[:-1], index.shape[-1])
    kept = values.gather(-1, index)
    centred = kept - kept.mean(-1, keepdim=True)

    largest = centred.abs().max().clamp(max=1)
    rounding = 1e-5 * kept.abs().max()
    smallest_std = torch.maximum(floor * largest, rounding).clamp(min=1e-12)
    if std == "group":
        centred = centred / kept.std(-1, keepdim=True).clamp(min=smallest_std)
    elif std == "batch":
        batch_std = centred.square().mean((-2, -1), keepdim=True).sqrt()
        centred = centred / batch_std.clamp(min=smallest_std)
    return centred.clamp(-limit, limit)


def gardo(advantage, nearest, index):
    """GARDO (arXiv 2512.24138): a positive advantage times the rollout's relative distance.

    advantage [P, K] of the rollouts index [P, K]; nearest [P, N] is each rollout's distance to the
    nearest of its group -> [P, K].
    """
    relative = nearest / nearest.mean(1, keepdim=True).clamp(min=1e-8)
    return torch.where(advantage > 0, advantage * relative.gather(1, index), advantage)
