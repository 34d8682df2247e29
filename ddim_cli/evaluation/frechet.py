"""How far two sets of feature vectors are apart: Frechet distance and kernel distance, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# The values of Binkowski et al.'s code, so that numbers compare.
SUBSETS, LARGEST_SUBSET = 100, 1000
# A kernel matrix is computed in blocks of so many rows, which stay in a core's cache.
ROWS = 64


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of features, float64; ``count`` of how many, None where that is not known."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None


class Moments:
    """Mean and covariance of features that come batch by batch (Chan, Golub and LeVeque 1979, eq. 2.1)."""

    def __init__(self) -> None:
        self._count, self._mean, self._scatter = 0, np.zeros(()), np.zeros(())

    def add(self, features: np.ndarray) -> None:
        """Take in ``features``, [N, D]."""
        features = features.astype(np.float64)
        count, mean = len(features), features.mean(0)
        centred, shift, total = features - mean, mean - self._mean, self._count + count
        self._scatter = self._scatter + centred.T @ centred + np.outer(shift, shift) * (self._count * count / total)
        self._mean = self._mean + shift * (count / total)
        self._count = total

    def gaussian(self) -> Gaussian:
        """Of at least two feature vectors; the covariance is the unbiased one."""
        return Gaussian(self._mean, self._scatter / (self._count - 1), self._count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance of two Gaussians, at least 0: what FID is of Inception's features.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al., arXiv:1706.08500, eq. 6). The product has the
    eigenvalues of R S_b R, where R is the root of S_a; that is symmetric, so they stay real where a covariance is
    singular.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(min=0)).sum()
    shift = np.square(a.mean - b.mean).sum()
    return max(0.0, float(shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap))


class KernelDistance(NamedTuple):
    """Mean and standard deviation of `squared_mmd` over subsets, and how many of what size these were."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of features [N, D] and [M, D]; N and M are at least 2.

    With the kernel (x.y / D + 1)^3 (Binkowski et al., arXiv:1801.01401, section 4.1). It can be negative.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)

    dimension = a.shape[1]

    def kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
        total = 0.0
        for start in range(0, len(x), ROWS):
            k = x[start : start + ROWS] @ y.T / dimension + 1
            total += np.vdot(k * k, k)
        return total

    def mean_of_others(x: np.ndarray) -> float:
        with_itself = ((np.square(x).sum(1) / dimension + 1) ** 3).sum()
        return (kernel_sum(x, x) - with_itself) / (len(x) * (len(x) - 1))

    return float(mean_of_others(a) + mean_of_others(b) - 2 * kernel_sum(a, b) / (len(a) * len(b)))


def kernel_distance(a: np.ndarray, b: np.ndarray, seed: int = 0) -> KernelDistance | None:
    """`squared_mmd` of random subsets of 1,000, or of half the smaller set; what KID is of Inception's features.

    Not of the whole sets: subsets of one size make numbers of sets of different sizes comparable, and tell a spread.
    None for sets of fewer than four.
    """
    size = min(LARGEST_SUBSET, len(a) // 2, len(b) // 2)
    if size < 2:
        return None
    generator = np.random.default_rng(seed)

    def subset(x: np.ndarray) -> np.ndarray:
        return x[generator.choice(len(x), size, replace=False)]

    distances = [squared_mmd(subset(a), subset(b)) for _ in range(SUBSETS)]
    return KernelDistance(math.fsum(distances) / SUBSETS, float(np.std(distances)), SUBSETS, size)
