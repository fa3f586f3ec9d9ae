"""The export step: checkpoints to a Triton model repository and the index beside it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.index import unit, write_index
from serving.repository import MODEL, model_config, write_model
from unlabeled import progress
from unlabeled.data.table import ImageTable
from unlabeled.digest import file_digest
from unlabeled.export.models import KINDS, class_names, cluster_classes, fit, load_served
from unlabeled.export.onnx import OnnxModel, onnx_bytes, onnx_digest
from unlabeled.export.parity import compare, torch_outputs
from unlabeled.export.quantize import CALIBRATION_IMAGES, accuracy_cost, check_cost, reduce_precision
from unlabeled.features import accelerator, extract
from unlabeled.files import atomic_path, write_bytes
from unlabeled.nets.encoder import load_encoder
from unlabeled.parameters import Export

GOLDEN_IMAGES = 32
COST_IMAGES = 2000
THUMBNAIL_SIDE = 32
# Drift compares fewer.
HELD_OUT_IMAGES = 2000
# Positions in the table to embeddings, float32 (N, D).
Embed = Callable[[np.ndarray], np.ndarray]


def export(
    model: Path,
    labels: Path,
    classifier: Path,
    table: Path,
    repository: Path,
    index: Path,
    parameters: Export,
) -> dict[str, Any]:
    """Write the models `encoder`, `classifier` and `clusterer` as ONNX into a Triton model repository.

    Args:
        model: the selected pretraining.
        labels: its self-labels.
        classifier: the fine-tuned classifier.
        table: the image table; of its test images the index keeps embeddings, and less precision is measured on them.
        repository: folder to write; per model `config.pbtxt`, `1/model.onnx` and, of classes, `labels.txt`.
        index: folder to write (see `serving.index.Index`).

    Returns:
        Per model `MODEL_difference`, `MODEL_cosine`, `MODEL_top1`: the worst of onnxruntime against torch, in
        float32. With less precision also `MODEL_PRECISION_…`, what that costs on held-out images (see
        `unlabeled.export.quantize.accuracy_cost`).

    Raises:
        CheckFailed: onnxruntime's outputs differ from torch's by more than `parameters.tolerance`, or less
            precision costs more than `parameters.max_accuracy_drop`.
        InputError: an artifact is missing or broken.
    """
    images = ImageTable(table)
    # First of all, since it refuses labels that were made from another table.
    matched = cluster_classes(labels, images.classes)
    train = images.indices("train")
    golden = {"images": images.images(_spread(train, GOLDEN_IMAGES))}
    models: dict[str, dict[str, Any]] = {}
    result: dict[str, float] = {}
    with atomic_path(repository) as folder:
        for done, kind in enumerate(KINDS):
            progress.report(done, len(KINDS), "models")
            served = load_served(kind, model, labels, classifier)
            names = class_names(kind, labels, classifier)
            golden[kind] = torch_outputs(served, golden["images"])
            config = model_config(
                name=kind,
                channels=served.image_shape[0],
                output=served.output,
                output_size=golden[kind].shape[1],
                max_batch_size=parameters.max_batch_size,
                instances=parameters.instances,
                labelled=bool(names),
                response_cache=parameters.response_cache,
                warmup=parameters.warmup,
                side=served.image_shape[1:],
            )
            write_model(folder, config, onnx_bytes(served), names)
            path = folder / kind / MODEL
            worst = compare(served, path, golden["images"], parameters.tolerance)
            result |= {
                f"{kind}_difference": worst["max_difference"],
                f"{kind}_cosine": worst["min_cosine"],
                f"{kind}_top1": worst["top1_agreement"],
            }
            reduced: dict[str, Any] = {}
            if parameters.precision != "float32":
                cost = _reduce(path, kind, images, parameters)
                result |= {f"{kind}_{parameters.precision}_{name}": value for name, value in cost.items()}
                reduced = {"precision": parameters.precision, "cost": cost}
                # What is served is another function than torch's now, and has to stay that one.
                golden[kind] = OnnxModel(path)(golden["images"])
            models[kind] = {
                "output": served.output,
                "sha256": file_digest(path),
                "tensors": onnx_digest(path),
                **reduced,
            }
    models["clusterer"]["classes"] = matched
    embed = _embed(model, repository, images, parameters)
    write_index(index, _index(embed, images, _spread(train, parameters.index_images)), golden, models)
    return result


def _reduce(path: Path, kind: str, images: ImageTable, parameters: Export) -> dict[str, float]:
    """Replace a float32 file by one of less precision; return what that costs on held-out images."""
    exact, train, test = OnnxModel(path), images.indices("train"), images.indices("test")
    calibration = images.images(_spread(train, CALIBRATION_IMAGES))
    write_bytes(path, reduce_precision(path.read_bytes(), parameters.precision, calibration))
    held_out = _spread(test if len(test) else train, COST_IMAGES)
    # The columns of the clusterer are no classes.
    labels = images.labels(held_out) if kind != "clusterer" and images.classes else None
    cost = accuracy_cost(
        exact, OnnxModel(path), images.images(held_out), labels, embeddings=kind == "encoder"
    )
    check_cost(kind, parameters.precision, cost, parameters.max_accuracy_drop)
    return cost


def _spread(indices: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` of the indices, evenly spread: every class of a sorted table is among them."""
    return indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(np.int64)]


def _embed(model: Path, repository: Path, images: ImageTable, parameters: Export) -> Embed:
    """Return what gives the embeddings of images as the served encoder does; torch is the faster one, in float32."""
    if parameters.precision == "float32":
        return partial(extract, load_encoder(model).to(accelerator()), images)
    encoder = OnnxModel(repository / "encoder" / MODEL)

    def embed(indices: np.ndarray) -> np.ndarray:
        parts = np.array_split(indices, -(-len(indices) // parameters.max_batch_size))
        return np.concatenate([encoder(images.images(part)) for part in parts])

    return embed


def _index(embed: Embed, images: ImageTable, chosen: np.ndarray) -> dict[str, np.ndarray]:
    held_out, embeddings = _spread(images.indices("test"), HELD_OUT_IMAGES), unit(embed(chosen))
    return {
        "ids": images.rows["id"].to_numpy()[chosen].astype(str),
        "embeddings": embeddings,
        "thumbnails": np.concatenate(
            [_thumbnails(images.images(part)) for part in np.array_split(chosen, max(1, len(chosen) // 500))]
        ),
        "held_out": unit(embed(held_out)) if len(held_out) else embeddings[:0],
    }


def _thumbnails(images: np.ndarray) -> np.ndarray:
    height, width = (min(side, THUMBNAIL_SIDE) for side in images.shape[2:])
    return fit(torch.from_numpy(images), (height, width)).round().to(torch.uint8).numpy()
