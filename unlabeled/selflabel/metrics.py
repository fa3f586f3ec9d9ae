"""How well clusters agree with classes. Labels are used to score, never to cluster."""

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score


def contingency(clusters: np.ndarray, labels: np.ndarray, k: int, classes: int) -> np.ndarray:
    """Return counts, int64 (K, C), of images by cluster and class."""
    return np.bincount(clusters * classes + labels, minlength=k * classes).reshape(k, classes)


def hungarian_map(counts: np.ndarray) -> np.ndarray:
    """Return the class of each cluster, int64 (K,), one to one with the most images right (Kuhn 1955).

    With more clusters than classes the surplus gets -1, always wrong; with fewer, some classes get none.
    """
    clusters, classes = linear_sum_assignment(counts, maximize=True)
    mapping = np.full(len(counts), -1)
    mapping[clusters] = classes
    return mapping


def majority_map(counts: np.ndarray) -> np.ndarray:
    """Return the commonest class of each cluster, int64 (K,), many to one; of an empty cluster -1."""
    return np.where(counts.sum(1) > 0, counts.argmax(1), -1)


def cluster_scores(
    train_clusters: np.ndarray,
    train_labels: np.ndarray,
    clusters: np.ndarray,
    labels: np.ndarray,
    k: int,
    classes: int,
) -> dict[str, Any]:
    """Score clusters against labels; both maps from cluster to class are fitted on train.

    Args:
        train_clusters, train_labels: int (N,), what the maps are fitted on.
        clusters, labels: int (M,), what is scored (the same again for the standard protocol).
        k, classes: K and C.

    Returns:
        acc: accuracy of the Hungarian map; purity: accuracy of the majority map, which grows with K.
        nmi: mutual information over the arithmetic mean of the entropies.
        ari, ami: corrected for chance, 0 for random clusters.
        hungarian_map, majority_map: the class of each cluster, -1 for none.
    """
    counts = contingency(train_clusters, train_labels, k, classes)
    hungarian, majority = hungarian_map(counts), majority_map(counts)
    return {
        "acc": float((hungarian[clusters] == labels).mean()),
        "purity": float((majority[clusters] == labels).mean()),
        "nmi": float(normalized_mutual_info_score(labels, clusters, average_method="arithmetic")),
        "ari": float(adjusted_rand_score(labels, clusters)),
        "ami": float(adjusted_mutual_info_score(labels, clusters, average_method="arithmetic")),
        "hungarian_map": hungarian.tolist(),
        "majority_map": majority.tolist(),
    }
