"""Diagnostics of collapse: do the features use the space they live in?"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Collapse:
    """How much of their space features (N, D) use.

    Attributes:
        std: standard deviation per dimension of the L2-normalised features, averaged over the dimensions;
            about 1/sqrt(D) where they spread, 0 where they collapsed.
        cosine: mean cosine of two different images; collapsed: 1.
        effective_rank: exp of the entropy of the normalised singular values of the centred features, up to
            min(N - 1, D); 0 where all features are equal (Roy & Vetterli 2007; RankMe, Garrido et al. 2023,
            is the same without centring).
        participation_ratio: (sum l)^2 / sum l^2 of the covariance's eigenvalues l, with the same bounds.
        dimensions: D.
    """

    std: float
    cosine: float
    effective_rank: float
    participation_ratio: float
    dimensions: int


def collapse(features: np.ndarray) -> Collapse:
    """Return the diagnostics of float features (N, D), N at least 2.

    Memory beyond float32 features: five times their size, for a float32 and two float64 copies, and D x D.
    """
    n, dimensions = features.shape
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    # Over ordered pairs i != j: |sum u|^2 counts the n pairs (i, i) too.
    squared_norms = float(np.square(unit, dtype=np.float64).sum())
    cosine = (np.square(unit.sum(0, dtype=np.float64)).sum() - squared_norms) / (n * (n - 1))

    centred = features - features.mean(0, dtype=np.float64)
    eigenvalues = np.linalg.eigvalsh(centred.T @ centred / n).clip(0)
    # What lies below float32's rounding of the features is noise, and noise has full rank.
    if eigenvalues.sum() <= 1e-10 * np.square(features, dtype=np.float64).sum() / n:
        rank = participation = 0.0
    else:
        p = np.sqrt(eigenvalues) / np.sqrt(eigenvalues).sum()
        rank = float(np.exp(-(p * np.log(np.where(p > 0, p, 1))).sum()))
        participation = float(eigenvalues.sum() ** 2 / np.square(eigenvalues).sum())
    return Collapse(
        float(unit.std(0, dtype=np.float64).mean()), float(cosine), rank, participation, dimensions
    )
