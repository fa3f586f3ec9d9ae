"""Scores of clusters: known confusions, K other than C, and scikit-learn and SciPy as oracles."""

from itertools import permutations

import numpy as np
import pytest
from scipy.stats import hypergeom
from sklearn.metrics import (
    accuracy_score,
    adjusted_mutual_info_score,
    adjusted_rand_score,
    normalized_mutual_info_score,
    top_k_accuracy_score,
)
from sklearn.metrics.cluster import contingency_matrix

from unlabeled.selflabel.metrics import (
    cluster_scores,
    contingency,
    hungarian_map,
    majority_map,
    purities,
    top_accuracy,
)

CONFUSION = np.array([[40, 10, 0], [35, 5, 10], [0, 35, 65]])


def images_of(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return clusters and labels, int (N,), of a contingency table (K, C)."""
    k, classes = counts.shape
    pairs = np.repeat(np.indices((k, classes)).reshape(2, -1), counts.ravel(), axis=1)
    return pairs[0], pairs[1]


def random_tables(count: int) -> list[np.ndarray]:
    """Return contingency tables of 1 to 6 clusters and classes, some of them empty."""
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 30, shape) * (rng.random(shape) < 0.7) for shape in rng.integers(2, 7, (count, 2))
    ]


def scores_of(counts: np.ndarray) -> dict:
    clusters, labels = images_of(counts)
    return cluster_scores(clusters, labels, clusters, labels, *counts.shape)


def test_accuracy_and_purity_of_the_known_confusion_differ() -> None:
    scores = scores_of(CONFUSION)
    assert scores["acc"] == pytest.approx(0.55) and scores["purity"] == pytest.approx(0.70)
    assert scores["mean_purity"] == pytest.approx((0.8 + 0.7 + 0.65) / 3)
    # Clusters 0 and 1 both hold class 0 most often: only one of them may have it.
    assert majority_map(CONFUSION).tolist() == [0, 0, 2] and hungarian_map(CONFUSION).tolist() == [0, 1, 2]


def test_greedy_matching_is_not_the_best() -> None:
    """Whoever gives the largest cell away first ends at 10 of 27 right."""
    counts = np.array([[10, 9], [8, 0]])
    assert hungarian_map(counts).tolist() == [1, 0] and scores_of(counts)["acc"] == pytest.approx(17 / 27)


@pytest.mark.parametrize("counts", random_tables(20), ids=lambda counts: "x".join(map(str, counts.shape)))
def test_the_map_is_the_best_of_all_one_to_one_maps(counts: np.ndarray) -> None:
    k, classes = counts.shape
    wide = counts if k <= classes else counts.T
    best = max(
        wide[np.arange(len(wide)), list(order)].sum()
        for order in permutations(range(wide.shape[1]), len(wide))
    )
    assert scores_of(counts)["acc"] == pytest.approx(best / counts.sum())
    assert (hungarian_map(counts) >= 0).sum() == min(k, classes)


@pytest.mark.parametrize("counts", random_tables(20), ids=lambda counts: "x".join(map(str, counts.shape)))
def test_scores_are_scikit_learns(counts: np.ndarray) -> None:
    clusters, labels = images_of(counts)
    scores = scores_of(counts)
    np.testing.assert_array_equal(
        counts[counts.sum(1) > 0][:, counts.sum(0) > 0], contingency_matrix(clusters, labels)
    )
    assert scores["acc"] == pytest.approx(accuracy_score(labels, hungarian_map(counts)[clusters]))
    assert scores["nmi"] == pytest.approx(normalized_mutual_info_score(labels, clusters))
    assert scores["ari"] == pytest.approx(adjusted_rand_score(labels, clusters))
    assert scores["ami"] == pytest.approx(adjusted_mutual_info_score(labels, clusters))
    assert scores["purity"] >= scores["acc"]


def test_mutual_information_by_its_definition() -> None:
    """NMI is 2 I / (H + H); AMI takes away the mean of I over all tables of the same margins (hypergeometric)."""

    def entropy(counts: np.ndarray) -> float:
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    n, rows, columns = CONFUSION.sum(), CONFUSION.sum(1), CONFUSION.sum(0)
    information = entropy(rows) + entropy(columns) - entropy(CONFUSION.ravel())
    expected = 0.0
    for a in rows:
        for b in columns:
            cell = np.arange(1, min(a, b) + 1)
            expected += (hypergeom.pmf(cell, n, a, b) * cell / n * np.log(n * cell / (a * b))).sum()
    mean = (entropy(rows) + entropy(columns)) / 2
    scores = scores_of(CONFUSION)
    assert scores["nmi"] == pytest.approx(information / mean)
    assert scores["ami"] == pytest.approx((information - expected) / (mean - expected))
    geometric = information / np.sqrt(entropy(rows) * entropy(columns))
    assert abs(scores["nmi"] - geometric) > 1e-6


def test_more_clusters_than_classes_both_ways() -> None:
    """A class in two pure clusters: one to one half of it is an error, many to one none is."""
    scores = scores_of(np.array([[10, 0], [0, 6], [0, 5]]))
    assert scores["hungarian_map"] == [0, 1, -1] and scores["majority_map"] == [0, 1, 1]
    assert scores["acc"] == pytest.approx(16 / 21) and scores["purity"] == scores["mean_purity"] == 1
    assert scores["classes"] == 2 and scores["ami"] < 1


def test_fewer_clusters_than_classes() -> None:
    scores = scores_of(np.array([[10, 0, 0], [0, 6, 5]]))
    assert scores["acc"] == scores["purity"] == pytest.approx(16 / 21)


def test_a_cluster_for_each_train_image_is_not_pure_on_test() -> None:
    """Purity goes to 1 as K goes to N, unless the map is fitted on other images than it is scored on."""
    rng = np.random.default_rng(0)
    labels, test_labels = rng.integers(0, 10, (2, 500))
    alone, drawn = np.arange(500), rng.integers(0, 500, 500)
    fitted_on_test = cluster_scores(alone, test_labels, alone, test_labels, 500, 10)
    assert fitted_on_test["purity"] == 1 and fitted_on_test["nmi"] > 0.5
    honest = cluster_scores(alone, labels, drawn, test_labels, 500, 10)
    assert honest["purity"] < 0.2 and abs(honest["ami"]) < 0.05 and abs(honest["ari"]) < 0.01


def test_random_clusters_of_many_kinds_have_information_by_chance() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 10_000)
    nmi = []
    for k in (10, 100, 1000):
        clusters = rng.integers(0, k, 10_000)
        scores = cluster_scores(clusters, labels, clusters, labels, k, 10)
        assert abs(scores["ari"]) < 0.01 and abs(scores["ami"]) < 0.01
        nmi.append(scores["nmi"])
    assert nmi[0] < nmi[1] < nmi[2] and nmi[2] > 0.1
    equal = rng.permutation(np.repeat(np.arange(10), 1000))
    assert scores_of(contingency(equal, labels, 10, 10))["acc"] >= 0.1


def test_classes_and_clusters_that_a_split_lacks() -> None:
    train_clusters, train_labels = np.array([0, 0, 1, 1, 3]), np.array([4, 4, 0, 0, 2])
    scores = cluster_scores(train_clusters, train_labels, np.array([0, 1, 2]), np.array([4, 0, 4]), 5, 6)
    # Cluster 2 was empty: whatever the one-to-one map gives it, the majority gives it nothing.
    assert scores["majority_map"] == [4, 0, -1, 2, -1]
    assert scores["purity"] == pytest.approx(2 / 3) and scores["mean_purity"] == 1
    assert np.isfinite(purities(np.zeros((3, 2), int))).all()


@pytest.mark.parametrize("top", [1, 2, 5])
def test_top_accuracy_is_scikit_learns_for_as_many_clusters_as_classes(top: int) -> None:
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet(np.ones(8), 300), rng.integers(0, 8, 300)
    mapping = rng.permutation(8)
    by_class = np.empty_like(probabilities)
    by_class[:, mapping] = probabilities
    expected = top_k_accuracy_score(labels, by_class, k=top, labels=np.arange(8))
    assert top_accuracy(probabilities, labels, mapping, top) == pytest.approx(expected)


def test_top_five_of_clusters() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 400)
    probabilities = rng.dirichlet(np.ones(30), 400)
    clusters = probabilities.argmax(1)
    scores = cluster_scores(clusters, labels, clusters, labels, 30, 10, probabilities)
    mapping = np.array(scores["hungarian_map"])
    assert scores["acc"] == pytest.approx(top_accuracy(probabilities, labels, mapping, 1))
    hits = [label in mapping[np.argsort(-row)[:5]] for row, label in zip(probabilities, labels, strict=True)]
    assert scores["top5"] == pytest.approx(np.mean(hits)) and scores["top5"] > scores["acc"]
    # A cluster that stands for no class is never right, not even for a label of none.
    assert top_accuracy(np.eye(3), np.array([0, 1, 1]), np.array([0, 1, -1]), 1) == pytest.approx(2 / 3)
    assert top_accuracy(np.full((2, 3), 1 / 3), np.array([0, 2]), np.arange(3)) == 1
    assert "top5" not in scores_of(CONFUSION)
