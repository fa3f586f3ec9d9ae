"""Nearest neighbours of every image among all others: exact, in blocks."""

import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled import progress


def mine_neighbours(features: Tensor, count: int, queries: int = 1_000, candidates: int = 65_536) -> Tensor:
    """Return the `count` nearest other images of each image by cosine, nearest first: int64 (N, count).

    Exact. No more than `queries` x `candidates` cosines are held at a time, beside the best so far. An image
    is never its own neighbour; a copy of it may be.

    Args:
        features: float32 (N, D).
        count: less than N.
    """
    unit = F.normalize(features, dim=1)
    nearest = []
    # One block serves all: a fresh one each time costs half as much as the products.
    block = unit.new_empty(min(queries, len(unit)), min(candidates, len(unit)))
    for start in range(0, len(unit), queries):
        rows = unit[start : start + queries]
        best, found = rows.new_empty(len(rows), 0), torch.empty_like(rows[:, :0], dtype=torch.int64)
        for first in range(0, len(unit), candidates):
            some = unit[first : first + candidates]
            cosines = torch.mm(rows, some.T, out=block[: len(rows), : len(some)])
            cosines.diagonal(start - first).fill_(-torch.inf)  # where an image meets itself
            values, columns = cosines.topk(min(count, cosines.shape[1]))
            values, columns = torch.cat((best, values), 1), torch.cat((found, columns + first), 1)
            best, order = values.topk(min(count, values.shape[1]))
            found = columns.gather(1, order)
        nearest.append(found)
        progress.report(start + len(rows), len(unit), "images searched")
    return torch.cat(nearest)


def principal_axes(z: Tensor, count: int) -> Tensor:
    """Return the `count` directions (at most D) of largest variance of centred rows (N, D): (D, count), orthonormal."""
    # eigh gives them with rising variance.
    return torch.linalg.eigh(z.T @ z).eigenvectors.flip(1)[:, :count]
