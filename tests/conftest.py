"""Inputs that many tests share: an image table of real digits, and a model folder with a fresh encoder."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from unlabeled.data.table import SUMMARY, TABLE
from unlabeled.files import write_json
from unlabeled.nets.encoder import CONFIG, MODEL, Encoder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow tests first: side by side, the longest files must not start last."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


def write_table(
    folder: Path, images: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: list[str]
) -> Path:
    """Write an image table: uint8 (N, C, H, W), int (N,) labels (-1: none), bool (N,) which are in test."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = images.reshape(len(images), -1) / 255
    counts = [np.bincount(image.ravel(), minlength=256) / image.size for image in images]
    np.save(folder / "images.npy", images)
    pd.DataFrame(
        {
            "id": [f"{number:05d}" for number in range(len(images))],
            "split": np.where(test, "test", "train"),
            "label": pd.array(labels, dtype="Int64"),
            "sha256": [hashlib.sha256(image.tobytes()).hexdigest() for image in images],
            "height": images.shape[2],
            "width": images.shape[3],
            "mean": flat.mean(1),
            "std": flat.std(1),
            "entropy": [-(p[p > 0] * np.log2(p[p > 0])).sum() for p in counts],
        }
    ).assign(label=lambda frame: frame["label"].mask(frame["label"] < 0)).to_parquet(folder / TABLE)
    write_json(
        folder / SUMMARY,
        {
            "source": "digits",
            "digest": hashlib.sha256(images.tobytes()).hexdigest(),
            "classes": classes,
            "channels": images.shape[1],
            "image_size": images.shape[2],
            "counts": {"train": int((~test).sum()), "test": int(test.sum())},
            "broken": [],
        },
    )
    return folder


def write_model(
    folder: Path, image_shape: tuple[int, int, int], seed: int = 0, method: str = "simclr"
) -> Path:
    """Write a model folder: a fresh small ResNet of 128 features, and a head as pretraining leaves one."""
    torch.manual_seed(seed)
    encoder = Encoder("small_resnet", 16, 2 if image_shape[1] < 32 else 1, image_shape, 0.3, 0.35)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}
    save_file(weights | {"projector.weight": torch.zeros(2, 2)}, folder / MODEL)
    config = {
        "method": method, "family": "contrast", "equation": "f(x1) <-> f(x2)", "paper": "", "settings": {},
        "encoder": encoder.settings, "training": {}, "steps": 0, "seed": seed,
    }  # fmt: skip
    write_json(folder / CONFIG, config)
    return folder


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: uint8 (1797, 1, 8, 8) and int64 (1797,)."""
    data = load_digits()
    return np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None], data.target.astype(np.int64)


@pytest.fixture(scope="session")
def digits_table(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> Path:
    """An image table of all digits, every fifth in test."""
    images, labels = digits
    folder = tmp_path_factory.mktemp("digits") / "table"
    return write_table(
        folder, images, labels, np.arange(len(images)) % 5 == 4, [str(digit) for digit in range(10)]
    )


@pytest.fixture
def make_table(tmp_path: Path, digits: tuple[np.ndarray, np.ndarray]) -> Callable[..., Path]:
    """Return a function that writes a table of the first digits: `make_table(name, count, labels, test)`."""

    def make(
        name: str, count: int = 300, labels: np.ndarray | None = None, test: np.ndarray | None = None
    ) -> Path:
        images, truth = digits
        labels = truth[:count] if labels is None else labels
        test = np.arange(count) % 5 == 4 if test is None else test
        classes = [str(digit) for digit in range(10)] if (labels >= 0).any() else []
        return write_table(tmp_path / name, images[:count], labels, test, classes)

    return make


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a fresh encoder for the digits."""
    return write_model(tmp_path_factory.mktemp("model") / "model", (1, 8, 8))
