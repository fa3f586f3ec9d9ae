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
from unlabeled.export.onnx import onnx_bytes, onnx_digest
from unlabeled.export.parity import compare, torch_outputs
from unlabeled.files import atomic_path
from unlabeled.nets.encoder import load_encoder
from unlabeled.parameters import Export
from unlabeled.probes.features import accelerator, extract

GOLDEN_IMAGES = 32
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
        table: the image table; of its test images only the index knows, by their embeddings.
        repository: folder to write; per model `config.pbtxt`, `1/model.onnx` and, of classes, `labels.txt`.
        index: folder to write (see `serving.index.Index`).

    Returns:
        Per model `MODEL_difference`, `MODEL_cosine`, `MODEL_top1`: the worst of onnxruntime against torch.

    Raises:
        CheckFailed: onnxruntime's outputs differ from torch's by more than `parameters.tolerance`.
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
            )
            write_model(folder, config, onnx_bytes(served), names)
            path = folder / kind / MODEL
            worst = compare(served, path, golden["images"], parameters.tolerance)
            result |= {
                f"{kind}_difference": worst["max_difference"],
                f"{kind}_cosine": worst["min_cosine"],
                f"{kind}_top1": worst["top1_agreement"],
            }
            models[kind] = {
                "output": served.output,
                "sha256": file_digest(path),
                "tensors": onnx_digest(path),
            }
    models["clusterer"]["classes"] = cluster_classes(labels, images.classes)
    write_index(index, _index(model, images, _spread(train, parameters.index_images)), golden, models)
    return result


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
