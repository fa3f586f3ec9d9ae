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


def purities(counts: np.ndarray) -> np.ndarray:
    """Return the share of each cluster's commonest class, float (K,), of clusters that have images."""
    sizes = counts.sum(1)
    return counts.max(1)[sizes > 0] / sizes[sizes > 0]


def top_accuracy(probabilities: np.ndarray, labels: np.ndarray, mapping: np.ndarray, top: int = 5) -> float:
    """Return the share of images with the class of one of their most probable clusters.

    Args:
        probabilities: (M, K).
        labels: int (M,).
        mapping: the class of each cluster, int (K,), -1 for none, which is never right.
        top: clusters that count, all where there are no more.
    """
    probable = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    return float((mapping[probable] == labels[:, None]).any(1).mean())


def cluster_scores(
    train_clusters: np.ndarray,
    train_labels: np.ndarray,
    clusters: np.ndarray,
    labels: np.ndarray,
    k: int,
    classes: int,
    probabilities: np.ndarray | None = None,
) -> dict[str, Any]:
    """Score clusters against labels; both maps from cluster to class are fitted on train.

    Args:
        train_clusters, train_labels: int (N,), what the maps are fitted on.
        clusters, labels: int (M,), what is scored (the same again for the standard protocol).
        k, classes: K and C, which need not be equal.
        probabilities: of the scored images, (M, K), for `top5`.

    Returns:
        classes: C.
        acc: accuracy of the Hungarian map, where surplus clusters and surplus classes are errors.
        purity: accuracy of the majority map, which grows with K.
        mean_purity: of the train images, the clusters' shares of their commonest class, each cluster alike.
        top5: accuracy of the Hungarian map of the five most probable clusters, with `probabilities` alone.
        nmi: mutual information over the arithmetic mean of the entropies; grows with K.
        ari, ami: corrected for chance, 0 for random clusters: to compare different K by.
        hungarian_map, majority_map: the class of each cluster, -1 for none.
    """
    counts = contingency(train_clusters, train_labels, k, classes)
    hungarian, majority = hungarian_map(counts), majority_map(counts)
    top5 = {} if probabilities is None else {"top5": top_accuracy(probabilities, labels, hungarian)}
    return {
        "classes": classes,
        "acc": float((hungarian[clusters] == labels).mean()),
        "purity": float((majority[clusters] == labels).mean()),
        "mean_purity": float(purities(counts).mean()),
        **top5,
        "nmi": float(normalized_mutual_info_score(labels, clusters, average_method="arithmetic")),
        "ari": float(adjusted_rand_score(labels, clusters)),
        "ami": float(adjusted_mutual_info_score(labels, clusters, average_method="arithmetic")),
        "hungarian_map": hungarian.tolist(),
        "majority_map": majority.tolist(),
    }
