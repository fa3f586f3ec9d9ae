"""One clustering out of several heads, chosen without a label: heads that reach a low loss and agree."""

import numpy as np
from scipy.optimize import linear_sum_assignment


def match(reference: np.ndarray, other: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Match two clusterings of the same images one to one, so that most images agree (Kuhn 1955).

    Args:
        reference, other: clusters, int (N,), 0 to k - 1.

    Returns:
        The cluster of `other` that each cluster of `reference` is, int64 (K,); the share of images that agree.
    """
    shared = np.bincount(reference * k + other, minlength=k * k).reshape(k, k)
    rows, columns = linear_sum_assignment(shared, maximize=True)
    return columns, float(shared[rows, columns].sum() / len(reference))


def consensus(
    weights: np.ndarray, biases: np.ndarray, assignments: np.ndarray, losses: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Average the heads of the lower half of the losses, their clusters matched to those of the lowest.

    The lowest loss alone is no sure choice: on Fashion-MNIST heads of nearly the same loss differ by 0.03 in
    accuracy. What is good in one head is found by others too, and what is bad in it mostly by none, so that
    an average of logits, linear again, comes near the best head whichever that is.

    Args:
        weights: (H, K, D). biases: (H, K). assignments: int (N, H), of images to each head's clusters.
        losses: (H,).

    Returns:
        weight (K, D) and bias (K,); agreements, float (H,): the share of images on which each head agrees
        with the one of lowest loss.
    """
    by_loss = np.argsort(losses, kind="stable")
    first = assignments[:, by_loss[0]]
    matched = [match(first, clusters, biases.shape[1]) for clusters in assignments.T]
    half = by_loss[: -(-len(losses) // 2)]
    weight = np.mean([weights[head][matched[head][0]] for head in half], axis=0)
    bias = np.mean([biases[head][matched[head][0]] for head in half], axis=0)
    return weight, bias, np.array([share for _, share in matched])
