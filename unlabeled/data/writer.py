"""Writing an image table as a stream: shards of images, groups of rows."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from unlabeled.data.reading import Batch
from unlabeled.data.statistics import image_statistics, pixel_digests
from unlabeled.data.table import MASKS, TABLE

ROW_GROUP = 16_384
COLUMNS = {
    "id": "str", "split": "str", "label": "Int64", "sha256": "str", "height": "int64", "width": "int64",
    "mean": "float64", "std": "float64", "entropy": "float64",
}  # fmt: skip
SCHEMA = pa.Schema.from_pandas(pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in COLUMNS.items()}))


class TableWriter:
    """Appends batches of images to an image table in `folder` (without its summary).

    Args:
        folder: is made.
        image_shape: (C, H, W).
        shard_images: images per shard.
        test_share: share of the images that become test where the source has no splits: by the sha256 of the
            pixels, so that equal images never stand on both sides.

    Attributes:
        counts: images in train and test.
    """

    def __init__(
        self, folder: Path, image_shape: tuple[int, int, int], shard_images: int, test_share: float
    ) -> None:
        folder.mkdir(parents=True)
        self.counts = Counter({"train": 0, "test": 0})
        self._folder, self._image_shape, self._test_share = folder, image_shape, test_share
        self._shard_images, self._in_shard = shard_images, 0
        self._shards: list[Path] = []
        self._rows: list[pa.Table] = []
        self._masks: list[np.ndarray] = []
        self._parquet = pq.ParquetWriter(folder / TABLE, SCHEMA)

    def append(self, batch: Batch) -> None:
        """Append images and their rows."""
        digests = pixel_digests(batch.images)
        splits = batch.splits or [self._split(digest) for digest in digests]
        self.counts.update(splits)
        columns: dict[str, Any] = {
            "id": batch.ids,
            "split": splits,
            "label": pa.array(batch.labels, mask=batch.labels < 0),
            "sha256": digests,
            "height": batch.sizes[:, 0],
            "width": batch.sizes[:, 1],
            **image_statistics(batch.images),
        }
        self._rows.append(pa.table(columns, schema=SCHEMA))
        self._write_rows(ROW_GROUP)
        self._write_images(batch.images)
        if batch.masks is not None:
            self._masks.append(batch.masks)

    def close(self) -> None:
        """Write what is left; the table is complete."""
        self._write_rows(1)
        self._parquet.close()
        self._end_shard()
        if len(self._shards) == 1:
            self._shards[0].rename(self._folder / "images.npy")
        if self._masks:
            np.save(self._folder / MASKS, np.concatenate(self._masks))

    def _split(self, digest: str) -> str:
        return "test" if int(digest[:8], 16) < self._test_share * 2**32 else "train"

    def _write_rows(self, at_least: int) -> None:
        while sum(len(table) for table in self._rows) >= at_least:
            rows = pa.concat_tables(self._rows)
            self._parquet.write_table(rows.slice(0, ROW_GROUP).combine_chunks())
            self._rows = [rows.slice(ROW_GROUP)]

    def _write_images(self, images: np.ndarray) -> None:
        while len(images):
            if self._in_shard in (0, self._shard_images):
                self._start_shard()
            some = images[: self._shard_images - self._in_shard]
            with open(self._shards[-1], "ab") as file:
                file.write(np.ascontiguousarray(some).data)
            self._in_shard += len(some)
            images = images[len(some) :]

    def _start_shard(self) -> None:
        self._end_shard()
        self._shards.append(self._folder / f"images-{len(self._shards):05d}.npy")
        self._shards[-1].touch()
        self._in_shard = 0
        self._write_header()

    def _end_shard(self) -> None:
        if self._shards:
            self._write_header()

    def _write_header(self) -> None:
        # NumPy leaves room for the count to grow, so that the final header fits over the first one.
        header = {"descr": "|u1", "fortran_order": False, "shape": (self._in_shard, *self._image_shape)}
        with open(self._shards[-1], "r+b") as file:
            np.lib.format.write_array_header_1_0(file, header)
