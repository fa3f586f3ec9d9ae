"""The self_label step: k-means on standardised features gives every train image a label that nobody wrote."""

import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save
from scipy.special import softmax
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from unlabeled import progress
from unlabeled.data.table import ImageTable
from unlabeled.errors import InputError
from unlabeled.files import atomic_path, read_json, write_bytes, write_json
from unlabeled.nets.encoder import CONFIG, load_encoder
from unlabeled.parameters import SelfLabel
from unlabeled.probes.features import Standardisation, accelerator, extract
from unlabeled.selflabel.metrics import cluster_scores

LABELS, CLUSTERS, GALLERY, SCORES = "labels.parquet", "clusters.safetensors", "gallery.npy", "scores.json"
RESTART_IMAGES = 20_000
GALLERY_IMAGES = 10


@dataclass(frozen=True)
class Clusters:
    """Centroids in standardised feature space, and how softly an image belongs to them.

    p(k) = softmax_k(-|z - c_k|^2 / (2 temperature)), z = (feature - mean) / scale.

    Attributes:
        mean, scale: float32 (D,).
        centroids: float32 (K, D).
        temperature: float32 (1,).
    """

    mean: np.ndarray
    scale: np.ndarray
    centroids: np.ndarray
    temperature: np.ndarray

    def distances(self, features: np.ndarray) -> np.ndarray:
        """Return squared distances of features (N, D) to the centroids: float32 (N, K)."""
        z = (features - self.mean) / self.scale
        squares = np.square(z).sum(1, keepdims=True) + np.square(self.centroids).sum(1)
        return np.maximum(squares - 2 * z @ self.centroids.T, 0)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Return the soft assignment of features (N, D): float32 (N, K), rows sum to 1."""
        return softmax(-self.distances(features) / (2 * self.temperature), axis=1)

    @classmethod
    def load(cls, folder: Path | str) -> "Clusters":
        """Read the clusters of a self_label artifact.

        Raises:
            InputError: the folder is none.
        """
        path = Path(folder) / CLUSTERS
        if not path.is_file():
            raise InputError(f"{folder} is no self-label folder: {CLUSTERS} belongs there")
        return cls(**load_file(path))


def self_label(model: Path, table: Path, output: Path, parameters: SelfLabel, seed: int) -> dict[str, Any]:
    """Cluster the train split by the model's features, without labels.

    Writes into `output`: labels.parquet (id, cluster, confidence; the train images in the table's order),
    clusters.safetensors (`Clusters`), gallery.npy (uint8 (K, 10, C, H, W): each cluster's images nearest to
    its centroid, black where it has fewer) and scores.json (method, k, inertia per image, sizes, temperature,
    mean confidence; with labels `cluster_scores` on test, or on train where test has no label, as `scored_on`
    says).

    Returns:
        The scores and `seconds`.

    Raises:
        InputError: no model or no table lies there, or there are fewer train images than clusters.
    """
    started = time.perf_counter()
    images = ImageTable(table)
    train, test = images.indices("train"), images.indices("test")
    k = number_of_clusters(parameters, images, len(train))
    encoder = load_encoder(model).to(accelerator())
    features = extract(encoder, images, train)
    clusters, inertia = fit_clusters(features, k, parameters, seed)
    distances = clusters.distances(features)
    assignment = distances.argmin(1)
    confidence = clusters.probabilities(features).max(1)
    scores: dict[str, Any] = {
        "method": read_json(Path(model) / CONFIG)["method"],
        "k": k,
        "inertia": inertia,
        "sizes": np.bincount(assignment, minlength=k).tolist(),
        "temperature": float(clusters.temperature[0]),
        "confidence": float(confidence.mean()),
    }
    labels, test_labels = images.labels(train), images.labels(test)
    known = labels >= 0
    if len(np.unique(labels[known])) >= 2:
        scored, truth, scores["scored_on"] = assignment[known], labels[known], "train"
        if (test_labels >= 0).any():
            scored = clusters.distances(extract(encoder, images, test[test_labels >= 0])).argmin(1)
            truth, scores["scored_on"] = test_labels[test_labels >= 0], "test"
        scores |= cluster_scores(assignment[known], labels[known], scored, truth, k, len(images.classes))

    with atomic_path(output) as folder:
        folder.mkdir()
        frame = {"id": images.rows["id"].to_numpy()[train], "cluster": assignment, "confidence": confidence}
        pd.DataFrame(frame).to_parquet(folder / LABELS)
        write_bytes(folder / CLUSTERS, save(vars(clusters)))
        np.save(folder / GALLERY, gallery(images, train, distances, assignment))
        write_json(folder / SCORES, scores)
    return {**scores, "seconds": time.perf_counter() - started}


def number_of_clusters(parameters: SelfLabel, table: ImageTable, images: int) -> int:
    """Return K: as asked, else the number of classes, else 10 (at most half the images).

    Raises:
        InputError: more clusters than images are asked for, or there are fewer than two images.
    """
    if parameters.clusters > images or images < 2:
        raise InputError(
            f"{max(parameters.clusters, 2)} clusters need as many train images, {table.folder} has {images}; "
            "lower self_label.clusters or ingest a larger source"
        )
    return parameters.clusters or min(
        len(table.classes) if len(table.classes) > 1 else 10, max(images // 2, 1)
    )


def fit_clusters(features: np.ndarray, k: int, parameters: SelfLabel, seed: int) -> tuple[Clusters, float]:
    """Return k-means clusters of features (N, D) and their inertia per image.

    Lloyd's algorithm from k-means++ starts (Arthur & Vassilvitskii 2007), best of `restarts` by inertia.
    Beyond 20,000 images all restarts run on the same random 20,000, so that their inertias compare, and the
    best one goes on over all images.

    The temperature makes the median image's own cluster nine times as probable as its next.
    """
    standardise = Standardisation(features)
    z = standardise(features)
    sample = z
    if len(z) > RESTART_IMAGES:
        sample = z[np.sort(np.random.default_rng(seed).choice(len(z), RESTART_IMAGES, replace=False))]
    best: KMeans | None = None
    # scikit-learn adds up its threads' parts in the order they end: one thread alone repeats bit for bit.
    with threadpool_limits(1, user_api="openmp"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct images than clusters
        for restart in range(parameters.restarts):
            run = KMeans(
                k, n_init=1, max_iter=parameters.iterations, random_state=(seed + restart) % 2**32
            ).fit(sample)
            if best is None or run.inertia_ < best.inertia_:
                best = run
            progress.report(restart + 1, parameters.restarts, "restarts", inertia=best.inertia_ / len(sample))
        assert best is not None
        if sample is not z:
            best = KMeans(k, init=best.cluster_centers_, n_init=1, max_iter=parameters.iterations).fit(z)
    clusters = Clusters(
        standardise.mean, standardise.scale, best.cluster_centers_.astype(np.float32), np.ones(1, np.float32)
    )
    margin = 0.0
    if k > 1:
        nearest = np.partition(clusters.distances(features), 1, axis=1)
        margin = float(np.median(nearest[:, 1] - nearest[:, 0]))
    if margin > 0:
        clusters.temperature[0] = margin / (2 * math.log(9))
    return clusters, float(best.inertia_) / len(features)


def gallery(
    table: ImageTable, train: np.ndarray, distances: np.ndarray, assignment: np.ndarray
) -> np.ndarray:
    """Return uint8 (K, 10, C, H, W): of each cluster the images nearest to its centroid, nearest first."""
    pictures = np.zeros((distances.shape[1], GALLERY_IMAGES, *table.image_shape), np.uint8)
    for cluster in range(len(pictures)):
        members = np.flatnonzero(assignment == cluster)
        central = members[np.argsort(distances[members, cluster], kind="stable")[:GALLERY_IMAGES]]
        pictures[cluster, : len(central)] = table.images(train[central])
    return pictures
