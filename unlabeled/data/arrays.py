"""Image arrays in files, read batch by batch: what IDX and npz files have in common."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from unlabeled.data.reading import Batch, Reading, batch_length
from unlabeled.errors import InputError
from unlabeled.parameters import Ingest

SMALLEST, LARGEST = 4, 1024


@dataclass
class ImageArray:
    """A uint8 array of images in a file.

    Attributes:
        where: the file (and key), for messages.
        shape: (N, H, W), (N, H, W, C) or (N, C, H, W), C = 1 or 3.
        open: gives the file, standing at the first pixel.
    """

    where: str
    shape: tuple[int, ...]
    open: Callable[[], IO[bytes]]

    def image_shape(self) -> tuple[int, int, int]:
        """Return (C, H, W).

        Raises:
            InputError: the array holds no square gray or RGB images.
        """
        if len(self.shape) not in (3, 4) or self.shape[0] == 0:
            raise InputError(
                f"{self.where}: images of shape (N, H, W), (N, H, W, C) or (N, C, H, W) are expected, "
                f"N at least 1; its shape is {self.shape}"
            )
        sizes = (1, *self.shape[1:]) if len(self.shape) == 3 else self.shape[1:]
        channels, height, width = (sizes[2], *sizes[:2]) if self._channels_last else sizes
        if channels not in (1, 3):
            raise InputError(
                f"{self.where}: gray or RGB images are expected, shape {self.shape} has {channels} channels"
            )
        if height != width or not SMALLEST <= height <= LARGEST:
            raise InputError(
                f"{self.where}: square images of {SMALLEST} to {LARGEST} px are expected, "
                f"these are {height} x {width}; crop or resize them"
            )
        return channels, height, width

    @property
    def _channels_last(self) -> bool:
        return len(self.shape) == 4 and self.shape[-1] in (1, 3)

    def batches(self, length: int) -> Iterator[np.ndarray]:
        """Yield the images as uint8 (n, C, H, W), n at most `length`.

        Raises:
            InputError: the file holds fewer or more bytes than its header says.
        """
        with self.open() as file:
            for start in range(0, self.shape[0], length):
                shape = (min(length, self.shape[0] - start), *self.shape[1:])
                data = self._read(file, int(np.prod(shape)))
                if len(data) < np.prod(shape):
                    raise InputError(f"{self.where}: truncated, its header promises {self.shape[0]} images")
                images = np.frombuffer(data, np.uint8).reshape(shape)
                if images.ndim == 3:
                    images = images[:, None]
                yield np.moveaxis(images, -1, 1) if self._channels_last else images
            if self._read(file, 1):
                raise InputError(
                    f"{self.where}: more bytes than the {self.shape[0]} images that its header promises"
                )

    def _read(self, file: IO[bytes], count: int) -> bytes:
        try:
            return file.read(count)
        except Exception as error:  # gzip and zip files raise errors of many types on damaged bytes
            raise InputError(f"{self.where}: damaged, {error}") from None


@dataclass
class Part:
    """Images with their labels and split.

    Attributes:
        prefix: first word of the ids.
        images: the images.
        labels: int64 (N,), negative where there is none; None: no labels at all.
        splits: the split of all, or (N,) one of each; None: the table's writer decides by content.
    """

    prefix: str
    images: ImageArray
    labels: np.ndarray | None
    splits: str | np.ndarray | None


def read_parts(kind: str, parts: Sequence[Part], parameters: Ingest) -> Reading:
    """Return the reading of image arrays, one after the other.

    Raises:
        InputError: the parts do not fit each other.
    """
    shapes = [part.images.image_shape() for part in parts]
    for part, shape in zip(parts, shapes):
        count = part.images.shape[0]
        if shape != shapes[0]:
            first = parts[0].images.where
            raise InputError(
                f"{part.images.where}: images of shape {shape}, those of {first} have {shapes[0]}"
            )
        if part.labels is not None and len(part.labels) != count:
            raise InputError(f"{part.images.where}: {count} images but {len(part.labels)} labels")
    channels, size, _ = shapes[0]
    channels = {"auto": channels, "gray": 1, "rgb": 3}[parameters.channels]
    labels = [np.unique(part.labels) for part in parts if part.labels is not None]
    values = np.unique(np.concatenate([np.empty(0, np.int64), *labels]))
    values = values[values >= 0]
    return Reading(
        kind=kind,
        classes=[str(value) for value in values],
        image_shape=(channels, size, size),
        found=sum(part.images.shape[0] for part in parts),
        batches=_batches(parts, (channels, size, size), values),
    )


def _batches(parts: Sequence[Part], image_shape: tuple[int, int, int], values: np.ndarray) -> Iterator[Batch]:
    for part in parts:
        start = 0
        for images in part.images.batches(batch_length(image_shape)):
            rows = slice(start, start + len(images))
            labels = np.full(len(images), -1) if part.labels is None else part.labels[rows]
            yield Batch(
                images=convert_channels(images, image_shape[0]),
                ids=[f"{part.prefix}-{index:06d}" for index in range(start, start + len(images))],
                splits=_splits(part.splits, rows, len(images)),
                labels=np.where(labels < 0, -1, np.searchsorted(values, labels)),
                sizes=np.full((len(images), 2), images.shape[-1]),
            )
            start += len(images)


def _splits(splits: str | np.ndarray | None, rows: slice, count: int) -> list[str] | None:
    if splits is None:
        return None
    return [splits] * count if isinstance(splits, str) else splits[rows].tolist()


def convert_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Return uint8 images (n, C, H, W) with 1 or 3 channels; gray is ITU-R 601 luma, as in Pillow."""
    if images.shape[1] == channels:
        return np.ascontiguousarray(images)
    if channels == 3:
        return np.repeat(images, 3, axis=1)
    red, green, blue = images.astype(np.uint32).transpose(1, 0, 2, 3)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)[:, None]
