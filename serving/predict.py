"""Answers for image files: class, cluster, nearest training images."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from serving.client import Client, Refused, in_batches
from serving.index import Index
from serving.repository import CONFIG, MODEL, read_config, read_labels
from unlabeled.data.images import BrokenImage, read_image
from unlabeled.errors import InputError
from unlabeled.export.onnx import OnnxModel
from unlabeled.export.parity import difference

MAX_PIXELS = 64_000_000
# A GPU, or int8 on another processor, may answer the golden images so far off; what is further off is another model.
ROUNDING = 0.02


def predict(images: Sequence[Path], run: Path, url: str = "", neighbours: int = 3) -> list[dict[str, Any]]:
    """Return a row per image file.

    Args:
        images: files of any format that ingest reads.
        run: folder of a run, with `repository/` and `index/`.
        url: gRPC address of a Triton server of that run; default: the ONNX files in this process.
        neighbours: training images to name.

    Returns:
        {"image", "class", "class_probability", "cluster", "cluster_probability", "cluster_class": the class
        matched to the cluster, "" for none, "nearest": [{"id", "similarity"}]}.

    Raises:
        InputError: a file is no image, the run was not exported, or the server is not there or serves another run.
    """
    repository, index = run / "repository", Index(run / "index")
    pixels = np.stack([_read(path, index.image_shape) for path in images])
    if url:
        with Client(url) as client:

            def infer(kind: str, batch: np.ndarray) -> np.ndarray:
                return client.infer(kind, batch)[index.models[kind]["output"]]

            def ask(kind: str, images: np.ndarray) -> np.ndarray:
                return in_batches(partial(infer, kind), images, _largest(repository / kind))

            _check_served(ask, index, url, run.name)
            answers = {kind: ask(kind, pixels) for kind in index.models}
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


def _check_served(ask: Callable[[str, np.ndarray], np.ndarray], index: Index, url: str, run: str) -> None:
    """Raise InputError where a server does not give the golden answers of the run that names its answers here."""
    for kind in index.models:
        expected = index.golden[kind]
        try:
            worst = difference(expected, ask(kind, index.golden["images"]))["max_difference"]
        except (Refused, KeyError):  # no such model, or one of other images, or of another output
            worst = float("inf")
        if worst > ROUNDING:
            raise InputError(
                f"the server at {url} serves another {kind} than run {run}; name the run that it serves with --run"
            )


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
