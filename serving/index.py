"""What lies beside a model repository: golden answers, expected digests, training images to compare with."""

from pathlib import Path
from typing import Any

import numpy as np

from unlabeled.errors import InputError
from unlabeled.files import atomic_path, read_json, write_json

INDEX, GOLDEN, MODELS = "index.npz", "golden.npz", "models.json"
Arrays = dict[str, np.ndarray]


class Index:
    """The index of a run: training images by their embeddings.

    Attributes:
        ids: str (N,) of training images.
        embeddings: float16 (N, D), of the served `encoder`, each of length 1.
        thumbnails: uint8 (N, C, h, w).
        held_out: float16 (M, D), embeddings of test images; empty in an index of an older export.
        golden: `images` uint8 (B, C, H, W), and the right output of each served model by its name: torch's; of one of
            less precision onnxruntime's, on the machine that exported it.
        models: {model: {"output", "sha256" of model.onnx, "tensors": canonical digest of its weights}}; of
            `clusterer` also "classes", the class matched to each cluster, empty where there are no labels; of
            less than float32 also "precision", and "cost", what that costs on held-out images.
        image_shape: (C, H, W) of the training images.

    Raises:
        InputError: the folder is no index.
    """

    def __init__(self, folder: Path) -> None:
        try:
            index, self.golden = _read(folder / INDEX), _read(folder / GOLDEN)
            self.models: dict[str, dict[str, Any]] = read_json(folder / MODELS)
            self.ids, self.embeddings, self.thumbnails = (
                index[key] for key in ("ids", "embeddings", "thumbnails")
            )
            self.held_out = index.get("held_out", self.embeddings[:0])
            self.image_shape: tuple[int, int, int] = self.golden["images"].shape[1:]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder} is no index of a model repository: {error}") from None

    def nearest(self, embeddings: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return positions in the index, int64 (B, count), nearest first, and their cosine similarities.

        Args:
            embeddings: float32 (B, D), of the served `encoder`.
        """
        similarities = _normalised(embeddings) @ self.embeddings.astype(np.float32).T
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :count]
        return order, np.take_along_axis(similarities, order, axis=1)


def write_index(folder: Path, index: Arrays, golden: Arrays, models: dict[str, dict[str, Any]]) -> None:
    """Write an index. Equal values give equal bytes: NumPy stamps no time into an npz."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        np.savez(temporary / INDEX, allow_pickle=False, **index)
        np.savez(temporary / GOLDEN, allow_pickle=False, **golden)
        write_json(temporary / MODELS, models)


def unit(embeddings: np.ndarray) -> np.ndarray:
    """Return embeddings, floats (N, D), as an index keeps them: float16, each of length 1."""
    return _normalised(embeddings.astype(np.float32)).astype(np.float16)


def _normalised(embeddings: np.ndarray) -> np.ndarray:
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)


def _read(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)
