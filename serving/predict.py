"""Answers for image files: class, cluster, nearest training images."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from serving.client import Client, in_batches
from serving.index import Index
from serving.repository import CONFIG, MODEL, read_config, read_labels
from unlabeled.data.images import BrokenImage, read_image
from unlabeled.errors import InputError
from unlabeled.export.onnx import OnnxModel

MAX_PIXELS = 64_000_000


def predict(images: Sequence[Path], run: Path, url: str = "", neighbours: int = 3) -> list[dict[str, Any]]:
    """Return a row per image file.

    Args:
        images: files of any format that ingest reads.
        run: folder of a run, with `repository/` and `index/`.
        url: gRPC address of a Triton server; default: the ONNX files in this process.
        neighbours: training images to name.

    Returns:
        {"image", "class", "class_probability", "cluster", "cluster_probability", "cluster_class": the class
        matched to the cluster, "" for none, "nearest": [{"id", "similarity"}]}.

    Raises:
        InputError: a file is no image, the run was not exported, or the server refuses.
    """
    repository, index = run / "repository", Index(run / "index")
    pixels = np.stack([_read(path, index.image_shape) for path in images])
    if url:
        with Client(url) as client:

            def ask(kind: str, batch: np.ndarray) -> np.ndarray:
                return client.infer(kind, batch)[index.models[kind]["output"]]

            answers = {
                kind: in_batches(partial(ask, kind), pixels, _largest(repository / kind))
                for kind in index.models
            }
    else:
        answers = {kind: OnnxModel(repository / kind / MODEL)(pixels) for kind in index.models}
    classes, clusters = (read_labels(repository, kind) for kind in ("classifier", "clusterer"))
    # An index of older exports knows no classes of clusters; without labels nobody does.
    matched = index.models["clusterer"].get("classes") or [""] * len(clusters)
    nearest, similarities = index.nearest(answers["encoder"], neighbours)
    return [
        {
            "image": str(path),
            "class": classes[int(class_.argmax())],
            "class_probability": float(class_.max()),
            "cluster": clusters[int(cluster.argmax())],
            "cluster_probability": float(cluster.max()),
            "cluster_class": matched[int(cluster.argmax())],
            "nearest": [
                {"id": str(index.ids[i]), "similarity": float(s)} for i, s in zip(positions, similarity)
            ],
        }
        for path, class_, cluster, positions, similarity in zip(
            images, answers["classifier"], answers["clusterer"], nearest, similarities
        )
    ]


def _largest(model: Path) -> int:
    return read_config(model / CONFIG).max_batch_size or 1


def _read(path: Path, image_shape: tuple[int, int, int]) -> np.ndarray:
    channels, side, _ = image_shape
    try:
        return read_image(path, "L" if channels == 1 else "RGB", side, MAX_PIXELS)[0]
    except BrokenImage as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
