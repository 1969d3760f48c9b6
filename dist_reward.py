"""Distances between distributions of images: moments in float64 and the Frechet distance of two Gaussians.

FID (arXiv 1706.08500): |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)). With R = S2^(1/2), Tr (S1 S2)^(1/2) is the sum of the square roots of
the eigenvalues of R S1 R, which is symmetric: no general matrix square root is needed, and singular covariances are no exception.
Not here yet: the distance as a reward through subset-replace (arXiv 2607.02291).
"""
import torch


def moments(features):
    """features [M, D] -> mu [D], sigma [D, D] in float64; the covariance is divided by M - 1."""
    x = features.double()
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])


def sqrt_psd(matrix):
    """The symmetric square root of a positive semi-definite matrix, float64; eigenvalues below 0 are rounding, and taken as 0."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The squared Frechet distance of N(mu1, sigma1) and N(mu2, sigma2) -> float, never negative. Biased upward at finite M: compare equal M."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(m).double() for m in (mu1, sigma1, mu2, sigma2))
    root = sqrt_psd(sigma2)
    cross = torch.linalg.eigvalsh(root @ sigma1 @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross))
