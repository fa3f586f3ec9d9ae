"""The self_label step: gives every train image a label that nobody wrote."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from unlabeled.data.table import ImageTable
from unlabeled.errors import InputError
from unlabeled.features import Standardisation, accelerator, extract
from unlabeled.files import atomic_path, read_json, write_json
from unlabeled.nets.encoder import CONFIG, load_encoder
from unlabeled.parameters import SelfLabel
from unlabeled.selflabel.clusters import SCORES, Clusters, save_encoder
from unlabeled.selflabel.kmeans import fit_kmeans
from unlabeled.selflabel.metrics import cluster_scores
from unlabeled.selflabel.scan import fit_scan
from unlabeled.selflabel.sela import fit_sela
from unlabeled.selflabel.self_training import self_train
from unlabeled.selflabel.sweep import sweep_clusters
from unlabeled.training.reproducible import reproducible

LABELS, GALLERY = "labels.parquet", "gallery.npy"
GALLERY_IMAGES = 10
METHODS = {"kmeans": fit_kmeans, "scan": fit_scan, "sela": fit_sela}


def self_label(model: Path, table: Path, output: Path, parameters: SelfLabel, seed: int) -> dict[str, Any]:
    """Cluster the train split by the model's features, without labels.

    Writes into `output`: labels.parquet (id, cluster, confidence; the train images in the table's order),
    clusters.safetensors (`Clusters`), gallery.npy (uint8 (K, 10, C, H, W): each cluster's images nearest to
    their mean, black where it has fewer) and scores.json (method: of the pretraining; clustering: of
    `parameters`; k, sizes, mean confidence, what the clustering says of itself; with labels `cluster_scores`
    on test, or on train where test has no label, as `scored_on` says); after self-training model.safetensors
    (`encoder.*`) and config.json too, of the encoder that the clusters then stand on.

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
    with reproducible(torch.get_num_threads()):
        clusters, values = fit_clusters(features, k, parameters, seed)
        if parameters.sweep:
            values["sweep"] = sweep_clusters(Standardisation(features)(features), parameters.sweep, seed)
        if parameters.self_training_steps:
            encoder, clusters, values["self_training"] = self_train(
                encoder, clusters, images, parameters, seed
            )
            features = extract(encoder, images, train)
    probabilities = clusters.probabilities(features)
    assignment, confidence = probabilities.argmax(1), probabilities.max(1)
    scores: dict[str, Any] = {
        "method": read_json(Path(model) / CONFIG)["method"],
        "clustering": parameters.method,
        "k": k,
        "sizes": np.bincount(assignment, minlength=k).tolist(),
        "confidence": float(confidence.mean()),
        **values,
    }
    labels, test_labels = images.labels(train), images.labels(test)
    known = labels >= 0
    if len(np.unique(labels[known])) >= 2:
        scored, truth, scores["scored_on"] = probabilities[known], labels[known], "train"
        if (test_labels >= 0).any():
            scored = clusters.probabilities(extract(encoder, images, test[test_labels >= 0]))
            truth, scores["scored_on"] = test_labels[test_labels >= 0], "test"
        fitted_on = assignment[known], labels[known]
        scores |= cluster_scores(*fitted_on, scored.argmax(1), truth, k, len(images.classes), scored)

    with atomic_path(output) as folder:
        folder.mkdir()
        frame = {"id": images.rows["id"].to_numpy()[train], "cluster": assignment, "confidence": confidence}
        pd.DataFrame(frame).to_parquet(folder / LABELS)
        clusters.save(folder)
        if parameters.self_training_steps:
            save_encoder(folder, encoder, scores["method"])
        np.save(folder / GALLERY, gallery(images, train, features, clusters.scale, assignment, k))
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


def fit_clusters(
    features: np.ndarray, k: int, parameters: SelfLabel, seed: int
) -> tuple[Clusters, dict[str, Any]]:
    """Return the clusters of features (N, D) by `parameters.method`, and what the method says of them."""
    standardise = Standardisation(features)
    weight, bias, values = METHODS[parameters.method](standardise(features), k, parameters, seed)
    return Clusters(standardise.mean, standardise.scale, weight, bias), values


def gallery(
    table: ImageTable,
    train: np.ndarray,
    features: np.ndarray,
    scale: np.ndarray,
    assignment: np.ndarray,
    k: int,
) -> np.ndarray:
    """Return uint8 (K, 10, C, H, W): of each cluster the images nearest to their mean, nearest first."""
    pictures = np.zeros((k, GALLERY_IMAGES, *table.image_shape), np.uint8)
    for cluster in range(k):
        members = np.flatnonzero(assignment == cluster)
        if len(members):
            z = features[members] / scale
            distances = np.square(z - z.mean(0)).sum(1)
            central = members[np.argsort(distances, kind="stable")[:GALLERY_IMAGES]]
            pictures[cluster, : len(central)] = table.images(train[central])
    return pictures
