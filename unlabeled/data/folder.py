"""A folder of images: which split and class each file belongs to, and its pixels, decoded in parallel."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from unlabeled import progress
from unlabeled.data.files import source_files
from unlabeled.data.images import BrokenImage, Mode, is_gray, read_image
from unlabeled.data.reading import Batch, Reading, batch_length
from unlabeled.errors import InputError
from unlabeled.parameters import Ingest

Result = TypeVar("Result")


def read_folder(folder: Path, parameters: Ingest, workers: int = 0) -> Reading:
    """Return the reading of an image folder.

    Splits: `train/` and `test/` at the top, where both are there; `train/` may also stand alone. Classes:
    where every image lies in a sub-folder (below its split), the first one names it; a single class is none.

    All headers are read first: they tell most broken files, the classes, and whether every image is gray.

    Args:
        folder: the images, in any depth.
        parameters: of the step.
        workers: threads that decode; 0: one per core. The result does not depend on it.

    Raises:
        InputError: `test/` or a validation folder stands where it is not understood, or no file is an image.
        CheckFailed: more than `max_broken_share` of the headers are broken.
    """
    workers = workers or len(os.sched_getaffinity(0))
    splits = _split_folders(folder)
    found = sum(1 for _ in source_files(folder))
    broken: dict[str, str] = {}
    classes: set[str] = set()
    gray, outside, done = True, "", 0

    def header(name: str, path: Path) -> bool:
        if splits and name.split("/")[0] not in splits:
            raise BrokenImage(f"outside of {' and '.join(f'{split}/' for split in splits)}")
        if name != name.encode(errors="ignore").decode():
            raise BrokenImage("the file's name is not valid UTF-8")
        return is_gray(path, parameters.max_pixels)

    for chunk in _parallel(header, source_files(folder), workers, 1024):
        for name, result in chunk:
            if isinstance(result, BrokenImage):
                broken[name] = str(result)
                continue
            gray = gray and result
            first, *rest = _below_split(name, splits)
            if rest:
                classes.add(first)
            else:
                outside = outside or name
        done += len(chunk)
        progress.report(done, found, "headers")
    several = len(classes) > 1
    names = sorted(classes) if several and not outside else []
    channels = {"auto": 1 if gray else 3, "gray": 1, "rgb": 3}[parameters.channels]
    image_shape = (channels, parameters.image_size, parameters.image_size)
    reading = Reading("images", names, image_shape, found, iter(()))
    if several and outside:
        reading.labels_note = f"{outside} lies outside a class folder"
    for name, reason in broken.items():
        reading.add_broken(name, reason)
    reading.check_broken(parameters.max_broken_share)
    if len(broken) == found:
        raise InputError(f"{folder}: none of its {found} files is an image that can be read")
    sound = ((name, path) for name, path in source_files(folder) if name not in broken)
    reading.batches = _batches(reading, sound, splits, parameters, workers)
    return reading


def _batches(
    reading: Reading,
    files: Iterator[tuple[str, Path]],
    splits: tuple[str, ...],
    parameters: Ingest,
    workers: int,
) -> Iterator[Batch]:
    mode: Mode = "L" if reading.image_shape[0] == 1 else "RGB"
    label_of = {name: label for label, name in enumerate(reading.classes)}

    def decode(name: str, path: Path) -> tuple[np.ndarray, int, int]:
        return read_image(path, mode, parameters.image_size, parameters.max_pixels)

    for chunk in _parallel(decode, files, workers, batch_length(reading.image_shape)):
        decoded = []
        for name, result in chunk:
            if isinstance(result, BrokenImage):
                reading.add_broken(name, str(result))
            else:
                decoded.append((name, *result))
        if decoded:
            names, images, heights, widths = zip(*decoded)
            yield Batch(
                images=np.stack(images),
                ids=list(names),
                splits=[name.split("/")[0] for name in names] if len(splits) == 2 else None,
                labels=np.array(
                    [label_of.get(_below_split(name, splits)[0], -1) for name in names], np.int64
                ),
                sizes=np.array([heights, widths], np.int64).T,
            )


def _split_folders(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
    if {"train", "test"} <= names:
        return "train", "test"
    if "test" in names and len(names) == 1:
        raise InputError(f"{folder} has test/ but no train/")
    validation = sorted(names & {"val", "valid", "validation"})
    if "train" in names and validation:
        raise InputError(
            f"{folder} has train/ and {validation[0]}/ but no test/; give the held-out folder that name"
        )
    return ("train",) if names == {"train"} else ()


def _below_split(name: str, splits: tuple[str, ...]) -> list[str]:
    parts = name.split("/")
    return parts[1:] if splits else parts


def _parallel(
    function: Callable[[str, Path], Result], files: Iterable[tuple[str, Path]], workers: int, length: int
) -> Iterator[list[tuple[str, Result | BrokenImage]]]:
    """Yield names and what `function` returns or raises, for up to `length` files at a time, in their order.

    Threads: Pillow decodes and resizes without the interpreter's lock.
    """

    def some(part: list[tuple[str, Path]]) -> list[tuple[str, Result | BrokenImage]]:
        results: list[tuple[str, Result | BrokenImage]] = []
        for name, path in part:
            try:
                results.append((name, function(name, path)))
            except BrokenImage as error:
                results.append((name, error))
        return results

    files = iter(files)
    with ThreadPoolExecutor(workers) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on odd metadata; what matters is raised
        while chunk := list(islice(files, length)):
            step = -(-len(chunk) // (4 * workers))
            parts = [chunk[start : start + step] for start in range(0, len(chunk), step)]
            yield [result for part in pool.map(some, parts) for result in part]
