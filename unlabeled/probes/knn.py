"""Weighted nearest-neighbour classification of frozen features."""

import numpy as np
import torch
from torch.nn import functional as F

from unlabeled import progress
from unlabeled.features import accelerator


def weighted_knn(
    train: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    neighbours: int = 20,
    temperature: float = 0.07,
    batch_size: int = 500,
) -> np.ndarray:
    """Return the predicted label of each query, int64 (M,), as in DINO (Caron et al. 2021).

    Features are L2-normalised; each of the k nearest train images votes for its label with weight
    exp(cosine / temperature). Exact, in blocks: memory is batch_size x N.

    Args:
        train: float (N, D).
        labels: int (N,), not negative.
        queries: float (M, D).
        neighbours: k; at most N / 2 (at least 1) are asked, so that in a tiny set the votes still differ.
        temperature: above 0; small: the nearest decides, large: a plain majority.
    """
    device = accelerator()
    bank = F.normalize(torch.from_numpy(train).float().to(device), dim=1)
    votes = F.one_hot(torch.from_numpy(labels).to(device)).float()
    k = max(1, min(neighbours, len(train) // 2))
    predictions = np.empty(len(queries), np.int64)
    # One block serves all: a fresh one each time costs a quarter more.
    block = bank.new_empty(min(batch_size, len(queries)), len(bank))
    for start in range(0, len(queries), batch_size):
        batch = torch.from_numpy(queries[start : start + batch_size]).float().to(device)
        cosines, nearest = torch.mm(F.normalize(batch, dim=1), bank.T, out=block[: len(batch)]).topk(k)
        # Relative to the nearest: the same ranking of classes, and no overflow at a small temperature.
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        scores = (weights[:, :, None] * votes[nearest]).sum(1)
        predictions[start : start + len(batch)] = scores.argmax(1).cpu().numpy()
        progress.report(start + len(batch), len(queries), "queries")
    return predictions
