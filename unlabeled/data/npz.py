"""Image arrays in npz files, read batch by batch out of the archive."""

import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from unlabeled.data.arrays import ImageArray, Part, read_parts
from unlabeled.data.reading import Reading
from unlabeled.errors import InputError
from unlabeled.parameters import Ingest

# (images, labels) of train, test; and of a set with an optional `split`.
TRAIN = (("x_train", "y_train"), ("train_images", "train_labels"))
TEST = (("x_test", "y_test"), ("test_images", "test_labels"))
WHOLE = (("images", "labels"), ("x", "y"))


def read_npz(path: Path, parameters: Ingest) -> Reading:
    """Return the reading of an npz file.

    Its keys: x_train, y_train, x_test, y_test; or train_images, train_labels, test_images, test_labels; or
    images, labels, split (`train` or `test` of each image). Only the (train) images must be there; other keys
    are ignored. Images are uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), labels integers (N,), -1 for none.

    Raises:
        InputError: it is no npz file, an array is missing, pickled or of the wrong type, or lengths differ.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            keys = {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: no npz file, {error}") from None
    if any(images in keys for images, _ in TRAIN):
        names = {"train": TRAIN, "test": TEST}
        parts = [
            Part(split, *part, split)
            for split, pairs in names.items()
            if (part := _images_and_labels(path, keys, pairs)) is not None
        ]
        if len(parts) == 1:
            parts[0].prefix, parts[0].splits = "image", None
    else:
        whole = _images_and_labels(path, keys, WHOLE)
        if whole is None:
            expected = "x_train (y_train, x_test, y_test) or images (labels, split)"
            raise InputError(
                f"{path}: no images; keys {expected} are expected, found: {', '.join(sorted(keys)) or 'none'}"
            )
        splits = _splits(path, whole[0].shape[0]) if "split" in keys else None
        parts = [Part("image", *whole, splits)]
    return read_parts("npz", parts, parameters)


def _images_and_labels(
    path: Path, keys: set[str], pairs: tuple[tuple[str, str], ...]
) -> tuple[ImageArray, np.ndarray | None] | None:
    for images, labels in pairs:
        if images in keys:
            return _open_images(path, images), _labels(path, labels) if labels in keys else None
    return None


def _open_images(path: Path, key: str) -> ImageArray:
    def open_array() -> tuple[IO[bytes], tuple[int, ...], bool, np.dtype]:
        file = zipfile.ZipFile(path).open(f"{key}.npy")  # noqa: SIM115
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        return file, *read_header(file)

    try:
        file, shape, fortran_order, dtype = open_array()
        file.close()
    except Exception as error:  # zip and npy readers raise errors of many types on damaged bytes
        raise InputError(f"{path}: key {key} cannot be read, {error}") from None
    if dtype != np.uint8:
        raise InputError(f"{path}: key {key} holds {dtype}, images are expected as uint8, 0 to 255")
    if fortran_order:
        raise InputError(f"{path}: key {key} is in Fortran order; save numpy.ascontiguousarray of it")
    return ImageArray(f"{path}, key {key}", shape, lambda: open_array()[0])


def _load(path: Path, key: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[key]
    except Exception as error:  # as above; a pickled array is a ValueError
        raise InputError(f"{path}: key {key} cannot be read, {' '.join(str(error).split())}") from None


def _labels(path: Path, key: str) -> np.ndarray:
    labels = _load(path, key)
    if not np.issubdtype(labels.dtype, np.integer) or labels.size != len(np.atleast_1d(labels)):
        raise InputError(
            f"{path}: key {key} holds {labels.dtype} {labels.shape}, labels are integers of shape (N,)"
        )
    return labels.reshape(-1).astype(np.int64)


def _splits(path: Path, count: int) -> np.ndarray:
    splits = _load(path, "split")
    if splits.dtype.kind == "S":
        splits = splits.astype(str)
    if splits.shape != (count,) or splits.dtype.kind != "U" or not np.isin(splits, ["train", "test"]).all():
        raise InputError(
            f"{path}: key split is expected to hold 'train' or 'test' for each of the {count} images"
        )
    return splits
