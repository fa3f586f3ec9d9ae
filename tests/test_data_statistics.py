"""Statistics of images against their definitions, and the rows of a large table."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from unlabeled.data.reading import Batch
from unlabeled.data.statistics import image_statistics, pixel_digests
from unlabeled.data.writer import ROW_GROUP, TableWriter

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(50, 1, 8, 8), (7, 3, 33, 33), (3, 3, 700, 700), (5000, 1, 28, 28)])
def test_statistics_equal_their_definitions(shape: tuple[int, ...]) -> None:
    images = (RNG.integers(0, 256, shape) * RNG.random((shape[0], 1, 1, 1))).astype(np.uint8)
    found = image_statistics(images)
    flat = images.reshape(shape[0], -1) / 255
    assert np.allclose(found["mean"], flat.mean(1), rtol=0, atol=1e-12)
    assert np.allclose(found["std"], flat.std(1), rtol=0, atol=1e-9)
    for image, entropy in list(zip(images, found["entropy"]))[:20]:
        p = np.unique(image, return_counts=True)[1] / image.size
        assert entropy == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-9)


def test_statistics_at_their_ends() -> None:
    black, white = np.zeros((1, 1, 16, 16), np.uint8), np.full((1, 1, 16, 16), 255, np.uint8)
    every = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    halves = np.repeat([0, 255], 128).astype(np.uint8).reshape(1, 1, 16, 16)
    found = image_statistics(np.concatenate([black, white, every, halves]))
    assert found["mean"].tolist() == [0, 1, 0.5, 0.5]
    assert found["std"][[0, 1, 3]].tolist() == [0, 0, 0.5]
    assert found["entropy"].tolist() == [0, 0, 8, 1]


def test_statistics_of_an_image_do_not_depend_on_its_neighbours() -> None:
    images = RNG.integers(0, 256, (3000, 1, 28, 28), dtype=np.uint8)
    whole, single = image_statistics(images), image_statistics(images[2999:])
    assert {key: value[2999:].tolist() for key, value in whole.items()} == {
        key: value.tolist() for key, value in single.items()
    }


def test_digests_are_of_the_pixels_in_order() -> None:
    images = RNG.integers(0, 256, (4, 3, 5, 5), dtype=np.uint8)
    swapped = images.transpose(0, 1, 3, 2)
    assert pixel_digests(images) == [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    assert pixel_digests(swapped) == [hashlib.sha256(image.tobytes()).hexdigest() for image in swapped]


def test_rows_and_images_do_not_depend_on_batches(tmp_path: Path) -> None:
    count = ROW_GROUP + 5000
    images = RNG.integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)
    labels = np.arange(count) % 7 - 1
    for name, length in [("small", 999), ("large", count)]:
        writer = TableWriter(tmp_path / name, (1, 4, 4), shard_images=30_000, test_share=0.3)
        for start in range(0, count, length):
            rows = slice(start, start + length)
            ids = [f"ü-{index}" for index in range(count)[rows]]
            size = np.full((len(ids), 2), [50, 60])
            writer.append(Batch(images[rows], ids, None, labels[rows], size))
        writer.close()
    for path in sorted((tmp_path / "small").iterdir()):
        assert path.read_bytes() == (tmp_path / "large" / path.name).read_bytes(), path.name
    file = pq.ParquetFile(tmp_path / "small" / "table.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [ROW_GROUP, 5000]
    rows = pd.read_parquet(tmp_path / "small" / "table.parquet")
    assert list(rows) == ["id", "split", "label", "sha256", "height", "width", "mean", "std", "entropy"]
    assert rows["label"].dtype == "Int64"
    assert rows["label"].isna().tolist() == (labels < 0).tolist()
    assert rows["label"].fillna(-1).tolist() == labels.tolist()
    assert (rows["split"] == "test").mean() == pytest.approx(0.3, abs=0.01)
    assert (rows["height"].unique().tolist(), rows["width"].unique().tolist()) == ([50], [60])
