"""Label spreading: labels flow along the graph of nearest neighbours (Zhou et al. 2004)."""

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

from unlabeled.features import Standardisation, accelerator
from unlabeled.selflabel.neighbours import mine_neighbours, principal_axes

AXES = 128
NEIGHBOURS = 10
TEMPERATURE = 0.1
ALPHA = 0.9
ITERATIONS = 50


class NeighbourGraph:
    """The pool's images, each tied to its 10 nearest by exp((cosine - 1) / 0.1).

    The cosines are of the first 128 principal components of the standardised features, divided by the square
    root of their deviations: half way to whitening, which keeps the first few from deciding alone.

    Args:
        features: of the pool, float32 (N, D), N at least 2.

    Attributes:
        weights: S = D^-1/2 W D^-1/2, symmetric (N, N).
    """

    def __init__(self, features: np.ndarray) -> None:
        self._standardise = Standardisation(features)
        z = torch.from_numpy(self._standardise(features)).to(accelerator())
        axes = principal_axes(z, AXES)
        self._axes = axes / (z @ axes).std(0).clamp(min=1e-6).sqrt()
        self._places = F.normalize(z @ self._axes, dim=1)
        nearest = mine_neighbours(self._places, min(NEIGHBOURS, len(features) - 1))
        ties = torch.stack([(self._places * self._places[column]).sum(1) for column in nearest.T], 1)
        w = _ties(ties, nearest, len(features))
        w = w + w.T
        scale = sparse.diags_array(1 / np.sqrt(w.sum(1)))
        self.weights = sparse.csr_array(scale @ w @ scale)

    def spread(self, labelled: np.ndarray, targets: np.ndarray, classes: int) -> np.ndarray:
        """Return p(class) of the pool: F = alpha S F + (1 - alpha) Y, 50 times, rows scaled to 1: float64 (N, C).

        Y is 1 at the labels. An image that no label reaches has equal probabilities.

        Args:
            labelled: int64 (n,), positions in the pool.
            targets: int64 (n,).
        """
        y = np.zeros((self.weights.shape[0], classes))
        y[labelled, targets] = 1
        spread = y
        for _ in range(ITERATIONS):
            spread = ALPHA * (self.weights @ spread) + (1 - ALPHA) * y
        return _rows_to_one(spread)

    def carry(self, probabilities: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Return p(class) of other images, from those of their nearest in the pool (N, C): float64 (M, C).

        Args:
            features: float32 (M, D).
        """
        places = torch.from_numpy(self._standardise(features)).to(self._axes.device) @ self._axes
        found = [
            (F.normalize(rows, dim=1) @ self._places.T).topk(min(NEIGHBOURS, len(self._places)))
            for rows in places.split(1_000)
        ]
        ties, nearest = (torch.cat(parts) for parts in zip(*found, strict=True))
        return _rows_to_one(_ties(ties, nearest, len(self._places)) @ probabilities)


def _ties(cosines: Tensor, nearest: Tensor, count: int) -> sparse.csr_array:
    """Return the weights (M, count) of each row's nearest, both given (M, k)."""
    weights = ((cosines - 1) / TEMPERATURE).exp().double().cpu().numpy()
    rows = np.repeat(np.arange(len(weights)), weights.shape[1])
    columns = nearest.cpu().numpy().ravel()
    return sparse.csr_array((weights.ravel(), (rows, columns)), shape=(len(weights), count))


def _rows_to_one(scores: np.ndarray) -> np.ndarray:
    total = scores.sum(1, keepdims=True)
    return np.where(total > 0, scores / np.where(total > 0, total, 1), 1 / scores.shape[1])
