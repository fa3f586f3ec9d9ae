"""IDX files (LeCun's MNIST format), plain or gzipped: magic, sizes as big-endian 32-bit integers, bytes."""

import gzip
import re
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from unlabeled.data.arrays import ImageArray, Part, read_parts
from unlabeled.data.reading import Reading
from unlabeled.errors import InputError
from unlabeled.parameters import Ingest

UINT8 = 0x08


def read_idx_files(files: dict[str, Path], parameters: Ingest) -> Reading:
    """Return the reading of a folder's IDX files.

    Args:
        files: by name, which tells what they hold: `labels`, else images; `t10k` or `test`, else train.
        parameters: of the step.

    Raises:
        InputError: no train images, two files for one thing, or a file that is no sound IDX file.
    """
    named: dict[tuple[str, str], Path] = {}
    for name, file in files.items():
        split = "test" if re.search("(?<![a-z])(t10k|test)(?![a-z])", name) else "train"
        key = (split, "labels" if "labels" in name else "images")
        if key in named:
            raise InputError(
                f"two IDX files of {split} {key[1]}: {named[key]} and {file}; leave one in the folder"
            )
        named[key] = file
    if ("train", "images") not in named:
        raise InputError(
            f"no IDX file of train images among {', '.join(files)}: train-images-idx3-ubyte is expected"
        )
    if ("test", "labels") in named and ("test", "images") not in named:
        raise InputError(
            f"{named['test', 'labels']}: labels without their images, t10k-images-idx3-ubyte is expected"
        )
    parts = []
    whole = ("test", "images") not in named
    for split in ["train"] if whole else ["train", "test"]:
        images = open_idx(named[split, "images"])
        labels = read_idx_labels(named[split, "labels"]) if (split, "labels") in named else None
        parts.append(Part("image" if whole else split, images, labels, None if whole else split))
    return read_parts("idx", parts, parameters)


def open_idx(path: Path) -> ImageArray:
    """Return the array in an IDX file, its bytes still unread.

    Raises:
        InputError: it is no IDX file of uint8, or not as long as its header says.
    """
    shape = _header(path)

    def pixels() -> IO[bytes]:
        file = _open(path)
        file.read(4 + 4 * len(shape))
        return file

    expected = 4 + 4 * len(shape) + int(np.prod(shape, dtype=object))
    if path.suffix != ".gz" and path.stat().st_size != expected:
        raise InputError(f"{path}: {path.stat().st_size} bytes, its header {shape} promises {expected}")
    return ImageArray(str(path), shape, pixels)


def read_idx_labels(path: Path) -> np.ndarray:
    """Return the labels of an IDX file: int64 (N,).

    Raises:
        InputError: it holds no labels, or not as many as its header says.
    """
    array = open_idx(path)
    if len(array.shape) != 1:
        raise InputError(f"{path}: labels are expected, one dimension; its shape is {array.shape}")
    with array.open() as file:
        data = _read(path, file, -1)
    if len(data) != array.shape[0]:
        raise InputError(f"{path}: {len(data)} labels, its header promises {array.shape[0]}")
    return np.frombuffer(data, np.uint8).astype(np.int64)


def _header(path: Path) -> tuple[int, ...]:
    with _open(path) as file:
        magic = _read(path, file, 4)
        if not magic:
            raise InputError(f"{path}: empty, an IDX file is expected")
        if len(magic) < 4 or magic[:2] != b"\0\0" or not 1 <= magic[3] <= 4:
            raise InputError(
                f"{path}: no IDX file, it starts with {magic.hex(' ')}; expected is 00 00 08 03 or 01"
            )
        if magic[2] != UINT8:
            raise InputError(
                f"{path}: values of IDX type 0x{magic[2]:02x}, expected are unsigned bytes, 0x08"
            )
        sizes = _read(path, file, 4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise InputError(f"{path}: truncated within its header, {magic[3]} sizes are expected")
    shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
    if 0 in shape:
        raise InputError(f"{path}: holds nothing, its header says {shape}")
    return shape


def _open(path: Path) -> IO[bytes]:
    try:
        return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _read(path: Path, file: IO[bytes], count: int) -> bytes:
    try:
        return file.read(count)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file, {error}") from None
