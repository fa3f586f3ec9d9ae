"""The drift step: recent inputs of a server against the training images of the run that it serves."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from serving.client import Client
from serving.index import Index, unit
from serving.recent import Recent, read_recent
from serving.repository import CONFIG, MODEL, read_config
from unlabeled import progress
from unlabeled.data.drift import drift_test, occupancy, occupancy_distance
from unlabeled.errors import CheckFailed, InputError
from unlabeled.export.onnx import OnnxModel
from unlabeled.files import write_json
from unlabeled.lineage.promotion import find_run
from unlabeled.lineage.registry import Registry
from unlabeled.parameters import Drift
from unlabeled.report.drift import Pair, write_page

# What is read of a run.
INDEX, LABELS, ENCODER = "index", "labels/labels.parquet", "repository/encoder"
SHOWN = 16


@contextmanager
def recorded(registry: Registry, run: str) -> Iterator[tuple[str, Path]]:
    """Give the name of a recorded run and a folder with what drift reads of it.

    Args:
        run: see `find_run`.

    Raises:
        InputError: there is no such run.
    """
    run = find_run(registry, run)
    with tempfile.TemporaryDirectory(prefix="unlabeled-") as folder:
        registry.fetch(run, Path(folder), [INDEX, LABELS, ENCODER])
        yield run, Path(folder)


def measure_drift(
    run: str, folder: Path, source: str, url: str, summary: Path, page: Path, parameters: Drift, seed: int
) -> dict[str, Any]:
    """Measure how far recent inputs lie from the training images, and write what was found.

    Args:
        run: name of the run.
        folder: of the run, with `index/`, `labels/labels.parquet` and `repository/encoder/`.
        source: the recent inputs, see `serving.recent.read_recent`.
        url: gRPC address of a server that embeds images; empty: the run's own model, in this process. Embeddings
            are taken as they are.
        summary: JSON file to write: run, recent (source, images, seen, started, ended, broken), distance, threshold,
            p_value, held_out_distance, drift (whether the distance is above the threshold); clusters (cluster,
            class, shares of training, held_out and recent), cluster_distance and similarity of recent and held_out
            (Jensen-Shannon distance to the training shares; median cosine to the nearest training image);
            parameters, seed.
        page: HTML file to write, the same for people.

    Returns:
        distance, threshold, p_value, cluster_distance, similarity, images.

    Raises:
        InputError: the inputs cannot be read, are too few, or are no embeddings of this run's encoder; or the run
            was exported without held-out images.
    """
    index = Index(folder / INDEX)
    if not len(index.held_out):
        raise InputError(
            f"run {run} was exported without held-out embeddings: run it again, or export it again"
        )
    recent = read_recent(source, index.image_shape, parameters, seed)
    if recent.images is not None and recent.broken and len(recent.images) < parameters.min_images:
        first = "; ".join(f"{file['path']} ({file['reason']})" for file in recent.broken[:3])
        more = f"; and {len(recent.broken) - 3} more" if len(recent.broken) > 3 else ""
        raise InputError(
            f"{len(recent.images)} recent images are too few, drift.min_images asks for {parameters.min_images}; "
            f"broken files: {first}{more}"
        )
    embeddings = recent.embeddings
    if recent.images is not None:
        embeddings = embed(recent.images, folder / ENCODER, url)
    if embeddings.shape[1] != index.embeddings.shape[1]:
        raise InputError(
            f"{source} holds embeddings of {embeddings.shape[1]} numbers, the encoder of run {run} answers with "
            f"{index.embeddings.shape[1]}: another model was asked"
        )
    sets = {"held_out": index.held_out, "recent": unit(embeddings)}
    test = drift_test(sets["recent"], index.embeddings, index.held_out, parameters, seed)
    assigned = pd.read_parquet(folder / LABELS).set_index("id")["cluster"]
    cluster_of = assigned.loc[index.ids].to_numpy()
    count = int(cluster_of.max()) + 1
    nearest = {name: _nearest(index, rows) for name, rows in sets.items()}
    shares = {"training": occupancy(cluster_of, count)}
    shares |= {name: occupancy(cluster_of[places], count) for name, (places, _) in nearest.items()}
    classes = index.models["clusterer"].get("classes") or [""] * count
    result = {
        "run": run,
        "recent": {
            "source": source, "images": len(sets["recent"]), "seen": recent.seen,
            "started": recent.started, "ended": recent.ended, "broken": recent.broken,
        },
        "distance": test.distance, "threshold": test.threshold, "p_value": test.p_value,
        "held_out_distance": test.held_out, "drift": test.drifted,
        "clusters": [
            {"cluster": cluster, "class": classes[cluster]}
            | {name: float(values[cluster]) for name, values in shares.items()}
            for cluster in range(count)
        ],
        "cluster_distance": {name: occupancy_distance(shares[name], shares["training"]) for name in sets},
        "similarity": {name: float(np.median(cosines)) for name, (_, cosines) in nearest.items()},
        "parameters": parameters.model_dump(mode="json"), "seed": seed,
    }  # fmt: skip
    write_json(summary, result)
    write_page(page, result, test.exchanges, _farthest(recent, index, *nearest["recent"]))
    return {
        "distance": test.distance, "threshold": test.threshold, "p_value": test.p_value,
        "cluster_distance": result["cluster_distance"]["recent"],
        "similarity": result["similarity"]["recent"], "images": len(sets["recent"]),
    }  # fmt: skip


def check_drift(summary: dict[str, Any]) -> None:
    """Raise CheckFailed where a summary of `measure_drift` tells of drift, naming distance and threshold."""
    if summary["drift"]:
        recent, alpha = summary["recent"], summary["parameters"]["alpha"]
        raise CheckFailed(
            f"drift: {recent['images']} recent inputs from {recent['source']} lie at squared MMD "
            f"{summary['distance']:.2g} from the training images of run {summary['run']}; the threshold is "
            f"{summary['threshold']:.2g} (p {summary['p_value']:.2g}, alpha {alpha:g}), held-out images lie at "
            f"{summary['held_out_distance']:.2g}"
        )


def embed(images: np.ndarray, encoder: Path, url: str) -> np.ndarray:
    """Return what the encoder, or the server at `url`, answers to uint8 images (N, C, H, W): float32 (N, D)."""
    config = read_config(encoder / CONFIG)
    output = config.output[0]
    starts = range(0, len(images), config.max_batch_size)
    answers = [np.empty((0, output.dims[0]), np.float32)]
    with Client(url) if url else nullcontext() as client:
        model = None if client else OnnxModel(encoder / MODEL)
        for start in starts:
            batch = images[start : start + config.max_batch_size]
            answers.append(client.infer(config.name, batch)[output.name] if client else model(batch))
            progress.report(len(answers) - 1, len(starts), "batches")
    return np.concatenate(answers)


def _nearest(index: Index, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the position in the index of the training image nearest to each row, and the cosine between them."""
    cosines = rows.astype(np.float32) @ index.embeddings.astype(np.float32).T
    return cosines.argmax(1), cosines.max(1)


def _farthest(recent: Recent, index: Index, places: np.ndarray, cosines: np.ndarray) -> list[Pair]:
    """Return the recent images least like any training image, the farthest first, each with the nearest of these."""
    if recent.images is None:
        return []
    return [
        Pair(recent.images[i], index.thumbnails[places[i]], str(index.ids[places[i]]), float(cosines[i]))
        for i in np.argsort(cosines, kind="stable")[:SHOWN]
    ]
