"""The evaluate and baselines steps: how good are the frozen features, and how good are none?"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from unlabeled.data.batches import pixel_statistics
from unlabeled.data.table import ImageTable
from unlabeled.errors import InputError
from unlabeled.features import Standardisation, accelerator, extract, random_encoder
from unlabeled.files import atomic_path, read_json, write_json
from unlabeled.nets.encoder import CONFIG, load_encoder
from unlabeled.parameters import Encoder, Evaluation
from unlabeled.probes.baselines import pixels, principal_components
from unlabeled.probes.collapse import collapse
from unlabeled.probes.knn import weighted_knn
from unlabeled.probes.linear import fit_linear_probe
from unlabeled.probes.retrieval import view_retrieval
from unlabeled.probes.subsets import hold_out

EVALUATION, BASELINES = "evaluation.json", "baselines.json"


def evaluate(model: Path, table: Path, output: Path, parameters: Evaluation, seed: int) -> dict[str, Any]:
    """Evaluate a model's frozen encoder; write `output`/evaluation.json.

    Its keys: method, family, `view_retrieval` and the scores of `score_features`.

    Returns:
        The same without the confusion matrix, and `seconds`.

    Raises:
        InputError: no model or no table lies there, or the table has fewer than two train images.
    """
    started = time.perf_counter()
    encoder, images = load_encoder(model).to(accelerator()), ImageTable(table)
    train, test = _splits(images)
    config = read_json(Path(model) / CONFIG)
    features, test_features = extract(encoder, images, train), extract(encoder, images, test)
    labels, test_labels = images.labels(train), images.labels(test)
    scores = score_features(
        features, labels, test_features, test_labels, len(images.classes), parameters, seed
    )
    scores["view_retrieval"] = view_retrieval(encoder, images, train, seed)
    result = {"method": config["method"], "family": config["family"], **scores}
    with atomic_path(output) as folder:
        write_json(folder / EVALUATION, result)
    del result["confusion"]
    return {**result, "seconds": time.perf_counter() - started}


def evaluate_baselines(
    table: Path, output: Path, parameters: Evaluation, seed: int, encoders: Sequence[Encoder] = ()
) -> dict[str, Any]:
    """Score features that nobody learned; write `output`/baselines.json.

    They are raw pixels, their first 128 principal components, and what `encoders` give at random init.

    Its keys: rows, a list of {method, family, the scores of `score_features` without the confusion matrix}, and
    `view_retrieval` of the encoders.

    Raises:
        InputError: no table lies there, or it has fewer than two train images.
    """
    started = time.perf_counter()
    images = ImageTable(table)
    train, test = _splits(images)
    labels, test_labels = images.labels(train), images.labels(test)
    rows = []
    for method, features, test_features, further in _unlearned(images, train, test, encoders, seed):
        scores = score_features(
            features, labels, test_features, test_labels, len(images.classes), parameters, seed
        )
        del scores["confusion"]
        rows.append({"method": method, "family": "baseline", **scores, **further})
    with atomic_path(output) as folder:
        write_json(folder / BASELINES, {"rows": rows})
    return {"rows": rows, "seconds": time.perf_counter() - started}


def _unlearned(
    images: ImageTable, train: np.ndarray, test: np.ndarray, encoders: Sequence[Encoder], seed: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray, dict[str, float]]]:
    """Yield each baseline's name, its features of the two splits and further scores, one in memory at a time."""
    raw = pixels(images, train), pixels(images, test)
    yield "raw pixels", *raw, {}
    components, test_components = principal_components(*raw)
    yield "PCA-128", components, test_components, {}
    del raw
    mean, std = pixel_statistics(images)
    for number, section in enumerate(encoders):
        settings = section.model_dump() | {"image_shape": images.image_shape, "mean": mean, "std": std}
        net = random_encoder(settings, images, train, seed, accelerator())
        name = f"random init, {section.name} {section.width}" if number else "random init"
        found = {"view_retrieval": view_retrieval(net, images, train, seed)}
        yield name, extract(net, images, train), extract(net, images, test), found


def score_features(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    classes: int,
    parameters: Evaluation,
    seed: int,
) -> dict[str, Any]:
    """Score frozen features of the train and the test split.

    Args:
        features, test_features: float32 (N, D) and (M, D); M may be 0.
        labels, test_labels: int64 (N,) and (M,), -1 where there is none.
        classes: C, number of classes.

    Returns:
        A dict; a score is None where the labels for it are missing, or train's are all the same:

        - knn, knn_standardised, linear: accuracy on test of weighted kNN on plain and on standardised
          features, and of the linear probe; majority: of always naming the commonest class.
        - confusion: counts (C, C) of the linear probe on test, rows are labels.
        - held_out_knn: accuracy of weighted kNN on a held-out part of train.
        - regularisation: C of the linear probe, chosen on that part.
        - collapse, effective_rank: diagnostics on that part; they need no label.
        - train_images, test_images, labelled: counts; labelled are those of train.
    """
    fit, held_out = hold_out(labels, parameters.held_out_share, seed)
    diagnostics = collapse(features[held_out] if len(held_out) > 1 else features)
    scores: dict[str, Any] = {
        "knn": None,
        "knn_standardised": None,
        "linear": None,
        "majority": None,
        "confusion": None,
        "held_out_knn": None,
        "regularisation": None,
        "effective_rank": diagnostics.effective_rank,
        "collapse": asdict(diagnostics),
        "train_images": len(labels),
        "test_images": len(test_labels),
        "labelled": int((labels >= 0).sum()),
    }
    if len(np.unique(labels[labels >= 0])) < 2:
        return scores

    def knn_accuracy(bank: np.ndarray, y: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> float:
        found = weighted_knn(bank, y, queries, parameters.neighbours, parameters.temperature)
        return float((found == truth).mean())

    fit, held_out = fit[labels[fit] >= 0], held_out[labels[held_out] >= 0]
    if len(held_out):
        scores["held_out_knn"] = knn_accuracy(
            features[fit], labels[fit], features[held_out], labels[held_out]
        )
    known, test_known = np.union1d(fit, held_out), np.flatnonzero(test_labels >= 0)
    if len(test_known):
        y, truth = labels[known], test_labels[test_known]
        scores["knn"] = knn_accuracy(features[known], y, test_features[test_known], truth)
        standardise = Standardisation(features[known])
        scores["knn_standardised"] = knn_accuracy(
            standardise(features[known]), y, standardise(test_features[test_known]), truth
        )
        probe = fit_linear_probe(features, labels, classes, fit, held_out, parameters.linear_iterations)
        predictions = probe.predict(test_features[test_known])
        scores["linear"] = float((predictions == truth).mean())
        scores["majority"] = float((truth == np.bincount(y).argmax()).mean())
        scores["confusion"] = confusion(truth, predictions, classes).tolist()
        scores["regularisation"] = probe.regularisation
    return scores


def confusion(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Return counts, int64 (C, C): row the label, column the prediction."""
    return np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)


def _splits(table: ImageTable) -> tuple[np.ndarray, np.ndarray]:
    train, test = table.indices("train"), table.indices("test")
    if len(train) < 2:
        raise InputError(f"{table.folder} has {len(train)} train images, 2 are needed; ingest more")
    return train, test
