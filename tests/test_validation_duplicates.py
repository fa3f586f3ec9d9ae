"""Near duplicates: the same groups as comparing every pair, at any shape."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import write_table
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import pdist, squareform

from unlabeled.data import duplicates
from unlabeled.data.duplicates import equal_groups, near_groups
from unlabeled.data.table import ImageTable


def table_of(folder: Path, images: np.ndarray) -> ImageTable:
    return ImageTable(write_table(folder, images, np.full(len(images), -1), np.zeros(len(images), bool), []))


def smooth_noise(count: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Return images with structure at several scales, uint8 (count, C, H, W)."""
    rng = np.random.default_rng(seed)
    channels, height, width = shape
    coarse = rng.uniform(40, 215, (count, channels, -(-height // 5), -(-width // 5)))
    images = coarse.repeat(5, axis=2).repeat(5, axis=3)[:, :, :height, :width]
    return (images + rng.uniform(-20, 20, images.shape)).astype(np.uint8)


def test_equal_groups_name_the_first_and_leave_nulls_alone() -> None:
    digests = pd.Series(["a", "b", "a", None, "b", None, "a"])
    assert equal_groups(digests).tolist() == [0, 1, 0, 3, 1, 5, 0]


@pytest.mark.parametrize("bound", [0.0, 12.0, 18.0, 22.0])
def test_groups_are_those_of_all_pairs(
    tmp_path: Path, digits: tuple[np.ndarray, np.ndarray], bound: float
) -> None:
    images = digits[0]
    distance = squareform(pdist(images.reshape(len(images), -1).astype(float))) / 8
    components = connected_components(distance <= bound)[1]
    expected = np.array([np.argmax(components == component) for component in components])
    table = table_of(tmp_path / "table", images)
    found = near_groups(table, np.arange(len(images)), bound)
    assert np.array_equal(found, expected)
    assert (bound < 20) or (found != np.arange(len(images))).sum() > 5


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 20, 33), (1, 5, 90), (4, 7, 6), (3, 1, 1)])
def test_planted_pairs_are_found_and_no_others(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    # Colours of single pixels lie on a line: neighbours would be near by chance.
    images = (
        smooth_noise(200, shape)
        if shape != (3, 1, 1)
        else np.arange(0, 200, 10, np.uint8).repeat(3).reshape(-1, 3, 1, 1)
    )
    rng = np.random.default_rng(1)
    half = len(images) // 2
    images[half:] = np.clip(images[:half].astype(int) + rng.integers(-3, 4, images[:half].shape), 0, 255)
    images[-1] = 255 - images[half - 1]
    found = near_groups(table_of(tmp_path / "table", images), np.arange(len(images)), 4.0)
    assert found.tolist() == [*range(half), *range(half - 1), len(images) - 1]


def test_box_means_never_lie_farther_apart_than_the_pixels() -> None:
    for shape in ((1, 28, 28), (3, 33, 20), (2, 8, 8), (1, 3, 50)):
        images = np.concatenate(
            [smooth_noise(20, shape), np.random.default_rng(2).integers(0, 256, (20, *shape), np.uint8)]
        )
        boxes = pdist(duplicates._boxes(images))
        pixels = pdist(images.reshape(len(images), -1).astype(float)) / np.sqrt(images[0].size)
        assert (boxes <= pixels * (1 + 1e-5)).all()


def test_many_equal_images_make_one_group(tmp_path: Path) -> None:
    """Equal pixels in different files: far more of them than candidates that are looked at."""
    images = smooth_noise(600, (1, 12, 12))
    images[::2] = images[0]
    found = near_groups(table_of(tmp_path / "table", images), np.arange(600), 1.0)
    assert (found[::2] == 0).all() and (found[1::2] == np.arange(1, 600, 2)).all()


def test_shards_and_one_array_give_the_same_groups(tmp_path: Path) -> None:
    images = smooth_noise(300, (3, 16, 16))
    images[200:220] = images[20:40] + 1
    whole = table_of(tmp_path / "whole", images)
    sharded = write_table(tmp_path / "shards", images, np.full(300, -1), np.zeros(300, bool), [])
    (sharded / "images.npy").unlink()
    for number, start in enumerate(range(0, 300, 130)):
        np.save(sharded / f"images-{number:05d}.npy", images[start : start + 130])
    groups = [near_groups(table, np.arange(300), 4.0) for table in (whole, ImageTable(sharded))]
    assert np.array_equal(*groups) and groups[0][200:220].tolist() == list(range(20, 40))


def test_of_equal_images_one_stands_for_all(tmp_path: Path) -> None:
    images = smooth_noise(50, (1, 16, 16))
    images[10], images[11], images[12] = images[3], images[3], images[3] + 1
    table = table_of(tmp_path / "table", images)
    found = near_groups(table, equal_groups(table.rows["sha256"]), 4.0)
    assert found[[3, 10, 11, 12]].tolist() == [3, 3, 3, 3] and (found != np.arange(50)).sum() == 3
