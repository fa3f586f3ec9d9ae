"""The image table: every image of a data set with what is known of it, read without loading the whole."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from unlabeled.errors import InputError
from unlabeled.files import read_json

TABLE, SUMMARY, MASKS = "table.parquet", "summary.json", "masks.npy"


class ImageTable:
    """A folder with uint8 images (N, C, H, W) in memory-mapped shards and a row per image.

    Files: `images.npy`, or `images-00000.npy`, …; `table.parquet` with the columns id, split (train/test), label
    (nullable Int64, an index into `summary["classes"]`), sha256, height, width (of the file as found), mean, std
    (0 to 1), entropy (bits); `summary.json` with source, digest, classes, channels, image_size, counts and the
    list of broken files; and `masks.npy`, bool (N, H, W), where the source knows the object in each image.

    Raises:
        InputError: the folder is no image table.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        shards = sorted(self.folder.glob("images*.npy"))
        if not shards or not (self.folder / TABLE).is_file() or not (self.folder / SUMMARY).is_file():
            raise InputError(
                f"{self.folder} is no image table: images*.npy, {TABLE} and {SUMMARY} belong there"
            )
        self.summary: dict[str, Any] = read_json(self.folder / SUMMARY)
        self._shards = [np.load(shard, mmap_mode="r") for shard in shards]
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self._shards[0].shape[1:]
        return channels, height, width

    @property
    def classes(self) -> list[str]:
        """Names of the classes; empty where there are no labels."""
        return self.summary["classes"]

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The whole table, a row per image, in the order of the images."""
        return pd.read_parquet(self.folder / TABLE)

    def indices(self, split: str) -> np.ndarray:
        """Return the int64 positions of a split's images, reading no other column of the table."""
        column = pd.read_parquet(self.folder / TABLE, columns=["split"])["split"]
        return np.flatnonzero(column.to_numpy() == split)

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Return int64 labels of the images at `indices`, -1 where there is none."""
        return self.rows["label"].fillna(-1).to_numpy(np.int64)[indices]

    def images(self, indices: Sequence[int] | np.ndarray | slice) -> np.ndarray:
        """Return a copy of the images at `indices`: uint8 (B, C, H, W)."""
        if isinstance(indices, slice):
            indices = np.arange(*indices.indices(len(self)))
        indices = np.asarray(indices, dtype=np.int64)
        if len(self._shards) == 1:
            return np.ascontiguousarray(self._shards[0][indices])
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        owner = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(owner):
            mine = owner == shard
            images[mine] = self._shards[shard][indices[mine] - self._starts[shard]]
        return images
