"""Cluster metrics against METHODS section 19, k-means, and the self_label step."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_table
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from unlabeled.data.table import ImageTable
from unlabeled.digest import tree_digest
from unlabeled.errors import InputError
from unlabeled.features import extract
from unlabeled.nets.encoder import load_encoder
from unlabeled.parameters import SelfLabel
from unlabeled.selflabel import kmeans
from unlabeled.selflabel.cluster import fit_clusters, self_label
from unlabeled.selflabel.clusters import Clusters
from unlabeled.selflabel.metrics import cluster_scores, contingency, hungarian_map, majority_map

CONFUSION = np.array([[40, 10, 0], [35, 5, 10], [0, 35, 65]])


def images_of(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return clusters and labels, int (N,), of a contingency table (K, C)."""
    k, classes = counts.shape
    return np.repeat(np.repeat(np.arange(k), classes), counts.ravel()), np.repeat(
        np.tile(np.arange(classes), k), counts.ravel()
    )


# Metrics


@pytest.mark.parametrize("counts", [CONFUSION, CONFUSION.T])
def test_hungarian_and_purity_of_the_known_confusion(counts: np.ndarray) -> None:
    clusters, labels = images_of(counts)
    np.testing.assert_array_equal(contingency(clusters, labels, 3, 3), counts)
    scores = cluster_scores(clusters, labels, clusters, labels, 3, 3)
    assert scores["acc"] == pytest.approx(0.55)
    if counts is CONFUSION:
        assert scores["purity"] == pytest.approx(0.70)


def test_permuted_labels_are_perfect() -> None:
    labels = np.random.default_rng(0).integers(0, 7, 500)
    clusters = np.random.default_rng(1).permutation(7)[labels]
    scores = cluster_scores(clusters, labels, clusters, labels, 7, 7)
    for key in ("acc", "purity", "nmi", "ari", "ami"):
        assert scores[key] == pytest.approx(1)


def test_random_clusters_are_at_chance_when_corrected() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 20_000)
    few, many = rng.integers(0, 10, 20_000), rng.integers(0, 2000, 20_000)
    scores = cluster_scores(few, labels, few, labels, 10, 10)
    assert abs(scores["ari"]) < 0.01 and abs(scores["ami"]) < 0.01 and 0.1 <= scores["acc"] < 0.12
    surplus = cluster_scores(many, labels, many, labels, 2000, 10)
    assert surplus["nmi"] > 0.1 and abs(surplus["ari"]) < 0.01, "NMI is not corrected for chance"


def test_purity_is_never_below_accuracy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        k, classes = rng.integers(1, 12, 2)
        clusters, labels = images_of(rng.integers(0, 20, (k, classes)))
        if len(labels):
            scores = cluster_scores(clusters, labels, clusters, labels, k, classes)
            assert scores["purity"] >= scores["acc"] - 1e-12
            assert scores["acc"] >= (1 / classes if k == classes else 0) - 1e-12


def test_surplus_clusters_are_errors_and_surplus_classes_too() -> None:
    more = np.array([[10, 0], [0, 6], [0, 5]])
    assert hungarian_map(more).tolist() == [0, 1, -1] and majority_map(more).tolist() == [0, 1, 1]
    clusters, labels = images_of(more)
    scores = cluster_scores(clusters, labels, clusters, labels, 3, 2)
    assert scores["acc"] == pytest.approx(16 / 21) and scores["purity"] == 1
    clusters, labels = images_of(more.T)
    assert cluster_scores(clusters, labels, clusters, labels, 2, 3)["acc"] == pytest.approx(16 / 21)
    assert majority_map(np.array([[0, 0], [1, 2]])).tolist() == [-1, 1]


def test_maps_are_fitted_on_train_and_applied_to_test() -> None:
    train_clusters, train_labels = np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0])
    clusters, labels = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 1])
    scores = cluster_scores(train_clusters, train_labels, clusters, labels, 2, 2)
    assert scores["acc"] == scores["purity"] == 0 and scores["ari"] == 1
    # One cluster per test image would be pure if the map were fitted there.
    alone = np.arange(4)
    assert cluster_scores(np.array([0]), np.array([0]), alone, np.array([1, 2, 3, 1]), 4, 4)["purity"] == 0


def test_normalised_mutual_information_is_arithmetic() -> None:
    clusters, labels = images_of(CONFUSION)
    expected = normalized_mutual_info_score(labels, clusters, average_method="arithmetic")
    assert cluster_scores(clusters, labels, clusters, labels, 3, 3)["nmi"] == pytest.approx(expected)
    assert expected != pytest.approx(
        normalized_mutual_info_score(labels, clusters, average_method="geometric"), abs=1e-6
    )


# k-means


def blobs(count: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    return (rng.normal(size=(4, 6))[labels] * 12 + rng.normal(size=(count, 6))).astype(np.float32), labels


def centroids_of(clusters: Clusters, temperature: float) -> np.ndarray:
    return clusters.weight * temperature


def test_clusters_find_blobs_and_their_own_scale() -> None:
    x, labels = blobs()
    x[:, 0] *= 1000
    clusters, values = fit_clusters(x, 4, SelfLabel(), 0)
    found = clusters.assign(x)
    assert cluster_scores(found, labels, found, labels, 4, 4)["acc"] == 1
    z = (x - clusters.mean) / clusters.scale
    np.testing.assert_allclose(z.std(0), 1, atol=1e-3)
    centroids = centroids_of(clusters, values["temperature"])
    np.testing.assert_allclose(centroids, [z[found == k].mean(0) for k in range(4)], atol=1e-4)
    distances = np.square(z[:, None] - centroids).sum(2)
    assert values["inertia"] == pytest.approx(distances.min(1).mean(), rel=1e-4)


def test_best_restart_is_kept() -> None:
    x, _ = blobs(300)
    z = (x - x.mean(0)) / x.std(0)
    alone = [
        KMeans(12, n_init=1, max_iter=100, random_state=5 + run).fit(z).inertia_ / 300 for run in range(6)
    ]
    assert max(alone) > min(alone) * 1.001, "the restarts differ"
    _, values = fit_clusters(x, 12, SelfLabel(restarts=6), 5)
    assert values["inertia"] == pytest.approx(min(alone), rel=1e-3)


def test_many_images_are_clustered_from_a_sample_and_finished_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = blobs(3000)
    _, whole = fit_clusters(x, 4, SelfLabel(), 0)
    monkeypatch.setattr(kmeans, "RESTART_IMAGES", 200)
    _, sampled = fit_clusters(x, 4, SelfLabel(), 0)
    assert sampled["inertia"] == pytest.approx(whole["inertia"], rel=1e-4)


def test_soft_assignment_is_by_squared_distances() -> None:
    x, _ = blobs()
    clusters, values = fit_clusters(x, 5, SelfLabel(), 0)
    p, z = clusters.probabilities(x), (x - clusters.mean) / clusters.scale
    distances = np.square(z[:, None] - centroids_of(clusters, values["temperature"])).sum(2)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(clusters.assign(x), distances.argmin(1))
    exact = torch.softmax(-torch.from_numpy(distances).double() / (2 * values["temperature"]), 1)
    np.testing.assert_allclose(p, exact, atol=1e-5)
    nearest = np.sort(p, axis=1)[:, ::-1]
    assert np.median(nearest[:, 0] / nearest[:, 1]) == pytest.approx(9, rel=1e-2)


def test_degenerate_features_do_not_break_clustering() -> None:
    for features in (np.ones((30, 4), np.float32), np.repeat(np.eye(2, 4, dtype=np.float32), 15, 0)):
        clusters, values = fit_clusters(features, 3, SelfLabel(restarts=2), 0)
        assert np.isfinite(clusters.weight).all() and values["temperature"] > 0
        assert np.isfinite(clusters.probabilities(features)).all()
        assert values["inertia"] == pytest.approx(0, abs=1e-6)
    clusters, _ = fit_clusters(blobs(50)[0], 1, SelfLabel(restarts=1), 0)
    np.testing.assert_array_equal(clusters.probabilities(blobs(50)[0]), 1)


# The step


def test_self_label_digits(digits_table: Path, model_folder: Path, tmp_path: Path) -> None:
    output, table = tmp_path / "labels", ImageTable(digits_table)
    returned = self_label(model_folder, digits_table, output, SelfLabel(), 0)
    scores = json.loads((output / "scores.json").read_text())
    frame = pd.read_parquet(output / "labels.parquet")
    train, test = table.indices("train"), table.indices("test")
    assert frame["id"].tolist() == table.rows["id"].iloc[train].tolist()
    assert scores["k"] == 10 and scores["method"] == "simclr" and scores["scored_on"] == "test"
    assert scores["sizes"] == np.bincount(frame["cluster"], minlength=10).tolist() and sum(
        scores["sizes"]
    ) == len(train)
    assert 0.4 < scores["acc"] <= 1 and scores["nmi"] > 0.3 and scores["ari"] > 0.2
    assert "seconds" in returned and "seconds" not in scores

    clusters, encoder = Clusters.load(output), load_encoder(model_folder)
    features = extract(encoder, table, train)
    np.testing.assert_array_equal(clusters.assign(features), frame["cluster"])
    np.testing.assert_allclose(clusters.probabilities(features).max(1), frame["confidence"], atol=1e-5)
    found = clusters.assign(extract(encoder, table, test))
    mapping = np.array(scores["hungarian_map"])
    assert (mapping[found] == table.labels(test)).mean() == pytest.approx(scores["acc"])

    gallery = np.load(output / "gallery.npy")
    assert gallery.shape == (10, 10, 1, 8, 8) and gallery.dtype == np.uint8
    members = np.flatnonzero(frame["cluster"] == 3)
    z = (features[members] - clusters.mean) / clusters.scale
    central = members[np.square(z - z.mean(0)).sum(1).argmin()]
    np.testing.assert_array_equal(gallery[3, 0], table.images([train[central]])[0])


def test_self_label_gives_the_same_bytes_twice(
    make_table: Callable[..., Path], model_folder: Path, tmp_path: Path
) -> None:
    table = make_table("table")
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        self_label(model_folder, table, tmp_path / name, SelfLabel(restarts=2), seed)
    first, second, other = (tree_digest(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second != other


def test_self_label_never_reads_labels_to_cluster(
    make_table: Callable[..., Path], digits: tuple[np.ndarray, np.ndarray], model_folder: Path, tmp_path: Path
) -> None:
    parameters = SelfLabel(clusters=7, restarts=2)
    tables = {
        "true": make_table("true"),
        "shuffled": make_table("shuffled", labels=np.random.default_rng(0).permutation(digits[1][:300])),
        "none": make_table("none", labels=np.full(300, -1)),
    }
    for name, table in tables.items():
        self_label(model_folder, table, tmp_path / f"labels {name}", parameters, 0)
    for file in ("labels.parquet", "clusters.safetensors", "gallery.npy"):
        contents = {(tmp_path / f"labels {name}" / file).read_bytes() for name in tables}
        assert len(contents) == 1, file
    assert "acc" not in json.loads((tmp_path / "labels none" / "scores.json").read_text())


def test_self_label_small_sets(make_table: Callable[..., Path], model_folder: Path, tmp_path: Path) -> None:
    no_test = make_table("no test", count=20, test=np.zeros(20, bool))
    scores = self_label(model_folder, no_test, tmp_path / "out", SelfLabel(restarts=1), 0)
    assert scores["scored_on"] == "train" and scores["k"] == 10
    few = make_table("few", count=6, labels=np.full(6, -1), test=np.zeros(6, bool))
    assert self_label(model_folder, few, tmp_path / "out", SelfLabel(restarts=1), 0)["k"] == 3
    gallery = np.load(tmp_path / "out" / "gallery.npy")
    assert (gallery.reshape(3, 10, -1).max(2) > 0).sum() == 6, "the rest is black"


def test_self_label_refuses_more_clusters_than_images(
    make_table: Callable[..., Path], model_folder: Path, tmp_path: Path
) -> None:
    table = make_table("few", count=20, test=np.zeros(20, bool))
    with pytest.raises(InputError, match=r"21 clusters need as many train images.*self_label\.clusters"):
        self_label(model_folder, table, tmp_path / "out", SelfLabel(clusters=21), 0)
    with pytest.raises(InputError, match="is no self-label folder"):
        Clusters.load(tmp_path)
    assert not (tmp_path / "out").exists()


def test_threads_are_given_back(make_table: Callable[..., Path], model_folder: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    self_label(model_folder, make_table("table"), tmp_path / "out", SelfLabel(restarts=1), 0)
    assert torch.get_num_threads() == before


def test_clusters_of_images_that_differ_in_brightness(tmp_path: Path, model_folder: Path) -> None:
    labels = np.arange(60) % 2
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 30, (60, 1, 8, 8)) + 200 * labels[:, None, None, None]).astype(np.uint8)
    table = write_table(tmp_path / "table", images, labels, np.arange(60) >= 40, ["dark", "bright"])
    assert self_label(model_folder, table, tmp_path / "out", SelfLabel(), 0)["acc"] == 1
