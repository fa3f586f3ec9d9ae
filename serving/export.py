"""The export step: checkpoints to a Triton model repository and the index beside it."""

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
from unlabeled.files import atomic_path, write_bytes
from unlabeled.nets.encoder import load_encoder
from unlabeled.parameters import Export
from unlabeled.probes.features import accelerator, extract

GOLDEN_IMAGES = 32
COST_IMAGES = 2000
THUMBNAIL_SIDE = 32
# Drift compares fewer.
HELD_OUT_IMAGES = 2000


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
            models[kind] = {
                "output": served.output,
                "sha256": file_digest(path),
                "tensors": onnx_digest(path),
                **reduced,
            }
    models["clusterer"]["classes"] = cluster_classes(labels, images.classes)
    write_index(index, _index(model, images, _spread(train, parameters.index_images)), golden, models)
    return result


def _reduce(path: Path, kind: str, images: ImageTable, parameters: Export) -> dict[str, float]:
    """Replace a float32 file by one of less precision; return what that costs on held-out images."""
    exact, train, test = OnnxModel(path), images.indices("train"), images.indices("test")
    calibration = images.images(_spread(train, CALIBRATION_IMAGES))
    write_bytes(path, reduce_precision(path.read_bytes(), parameters.precision, calibration))
    held_out = _spread(test if len(test) else train, COST_IMAGES)
    labels = images.labels(held_out) if kind == "classifier" and images.classes else None
    cost = accuracy_cost(exact, OnnxModel(path), images.images(held_out), labels)
    if kind != "encoder":  # its columns are no classes
        check_cost(kind, parameters.precision, cost, parameters.max_accuracy_drop)
    return cost


def _spread(indices: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` of the indices, evenly spread: every class of a sorted table is among them."""
    return indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(np.int64)]


def _index(model: Path, images: ImageTable, chosen: np.ndarray) -> dict[str, np.ndarray]:
    encoder = load_encoder(model).to(accelerator())
    held_out = _spread(images.indices("test"), HELD_OUT_IMAGES)
    return {
        "ids": images.rows["id"].to_numpy()[chosen].astype(str),
        "embeddings": unit(extract(encoder, images, chosen)),
        "thumbnails": np.concatenate(
            [_thumbnails(images.images(part)) for part in np.array_split(chosen, max(1, len(chosen) // 500))]
        ),
        "held_out": unit(extract(encoder, images, held_out)),
    }


def _thumbnails(images: np.ndarray) -> np.ndarray:
    height, width = (min(side, THUMBNAIL_SIDE) for side in images.shape[2:])
    return fit(torch.from_numpy(images), (height, width)).round().to(torch.uint8).numpy()
