"""CPU time of validation on 70,000 images, imports apart: statistics, near duplicates, suite, the whole step.

    python benchmarks/validation.py [--table FOLDER] [--images 70000]

Without a table, one is made of 28 x 28 images: smooth shapes, dark at the edges, like Fashion-MNIST.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from unlabeled.data.duplicates import equal_groups, near_groups
from unlabeled.data.expectations import validate
from unlabeled.data.faults import with_faults
from unlabeled.data.statistics import image_statistics, pixel_digests
from unlabeled.data.suite import expect_rows, run
from unlabeled.data.table import SUMMARY, TABLE, ImageTable
from unlabeled.files import write_json
from unlabeled.parameters import Validation


def main() -> None:
    """Print one JSON object of CPU seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, help="an image table; default: a made one")
    parser.add_argument("--images", type=int, default=70_000, help="images of the made table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = arguments.table or make_table(Path(folder) / "table", arguments.images)
        print(json.dumps(measure(table, Path(folder) / "validation"), indent=2))


def measure(table: Path, output: Path) -> dict[str, float]:
    """Return CPU seconds of the parts and of the whole step."""
    parameters = Validation(max_drift=1)
    images = ImageTable(table)
    rows = images.rows
    seconds: dict[str, float] = {"images": len(images)}
    started = time.process_time()
    image_statistics(images.images(slice(None)))
    seconds["statistics"] = time.process_time() - started
    started = time.process_time()
    near_groups(images, equal_groups(rows["sha256"]), parameters.near_difference)
    seconds["near_duplicates"] = time.process_time() - started
    frame, _ = with_faults(images, rows, parameters)
    started = time.process_time()
    run(frame, expect_rows(frame, len(images), len(images.classes), parameters))
    seconds["suite"] = time.process_time() - started
    started = time.process_time()
    validate(table, output, parameters, table / TABLE)
    seconds["validate"] = time.process_time() - started
    return {name: round(value, 2) for name, value in seconds.items()}


def make_table(folder: Path, count: int) -> Path:
    """Write an image table of `count` blurred random shapes, 28 x 28, a seventh of them in test."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (count, 1, 28, 28))
    place = np.linspace(-1, 1, 28, dtype=np.float32)
    waves = (
        np.cos(np.pi * np.arange(8, dtype=np.float32)[:, None] * (place + 1) / 2)
        / (1 + np.arange(8))[:, None]
    )
    window = 1 - place**4
    for start in range(0, count, 5000):
        shape = rng.standard_normal((min(5000, count - start), 8, 8), np.float32) * 400
        smooth = np.einsum(
            "nab,ay,bx->nyx", shape, waves.astype(np.float32), waves.astype(np.float32), optimize=True
        )
        noise = rng.normal(0, 8, smooth.shape).astype(np.float32)
        images[start : start + len(smooth), 0] = np.clip(
            (np.abs(smooth) + noise) * np.outer(window, window), 0, 255
        )
    images.flush()
    rows = pd.DataFrame(
        {
            "id": [f"{number:08d}" for number in range(count)],
            "split": np.where(np.arange(count) < count * 6 // 7, "train", "test"),
            "label": pd.array(rng.integers(0, 10, count), dtype="Int64"),
            "sha256": pixel_digests(images),
            "height": 28,
            "width": 28,
            **image_statistics(images),
        }
    )
    rows.to_parquet(folder / TABLE)
    summary = {"source": "made", "digest": "", "classes": [str(label) for label in range(10)], "broken": []}
    write_json(folder / SUMMARY, summary)
    return folder


if __name__ == "__main__":
    main()
