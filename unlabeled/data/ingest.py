"""The step `ingest`: a source at a pinned version becomes an image table."""

import os
import time
from itertools import islice
from pathlib import Path
from typing import Any

from unlabeled import progress
from unlabeled.data.digits import read_digits
from unlabeled.data.files import copy_files, source_files
from unlabeled.data.folder import read_folder
from unlabeled.data.idx import read_idx_files
from unlabeled.data.npz import read_npz
from unlabeled.data.reading import Reading
from unlabeled.data.sources import DIGITS_FILE, IDX_NAME, KNOWN, fetch
from unlabeled.data.stamps import STAMPS_DIGEST, read_stamps
from unlabeled.data.table import SUMMARY
from unlabeled.data.writer import TableWriter
from unlabeled.errors import InputError
from unlabeled.files import atomic_path, write_json
from unlabeled.parameters import Ingest
from unlabeled.workspace import cache_folder


def ingest(
    source: str,
    digest: str,
    table: Path,
    raw: Path,
    parameters: Ingest,
    cache: Path | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """Make an image table of a source, and keep the source's raw files.

    The table depends on the raw files and the parameters only: ingesting `raw` again gives the same bytes.

    Args:
        source: a name or path, as of `unlabeled.data.sources.data_digest`.
        digest: the source's DVC digest, as that function gave it.
        table: becomes an `ImageTable` folder.
        raw: becomes a folder with copies of the source's files; its DVC digest is `digest`.
        parameters: of the step.
        cache: folder of downloaded data; default: $UNLABELED_CACHE, or ~/.cache/unlabeled.
        workers: threads that decode an image folder; 0: one per core. The result does not depend on it.

    Returns:
        images, train, test, broken, classes, channels, image_size, seconds, images_per_second.

    Raises:
        InputError: there is no such source, its digest differs, or its files are not sound.
        CheckFailed: more than `max_broken_share` of an image folder's files are broken.
    """
    started = time.perf_counter()
    files = fetch(source, digest, cache_folder() if cache is None else cache)
    reading = read_stamps(files, parameters) if digest == STAMPS_DIGEST else _read(files, parameters, workers)
    name, classes = KNOWN.get(digest, (reading.kind, reading.classes))
    with atomic_path(raw) as raw_folder, atomic_path(table) as folder:
        copy_files(files, raw_folder)
        writer = TableWriter(folder, reading.image_shape, parameters.shard_images, parameters.test_share)
        for batch in reading.batches:
            writer.append(batch)
            progress.report(writer.counts.total() + len(reading.broken), reading.found, "images")
        writer.close()
        reading.check_broken(parameters.max_broken_share)
        if not writer.counts.total():
            raise InputError(f"{source}: no image can be read; the first: {reading.broken[0]}")
        counts = {**writer.counts, "broken": len(reading.broken)}
        summary = {
            "source": name,
            "kind": reading.kind,
            "digest": digest,
            "classes": classes,
            "channels": reading.image_shape[0],
            "image_size": reading.image_shape[1],
            "counts": counts,
            "broken": sorted(reading.broken, key=lambda file: file["path"]),
        }
        if reading.labels_note and not classes:
            summary["labels_note"] = reading.labels_note
        write_json(folder / SUMMARY, summary)
    seconds = time.perf_counter() - started
    images = writer.counts.total()
    return {
        "images": images,
        **counts,
        "classes": len(classes),
        "channels": summary["channels"],
        "image_size": summary["image_size"],
        "seconds": seconds,
        "images_per_second": images / seconds,
    }


def _read(path: Path, parameters: Ingest, workers: int) -> Reading:
    """Open a source by what its files are called."""
    if path.is_file():
        idx = {path.name: path} if IDX_NAME.search(path.name) else {}
    else:
        names = sorted(
            name for name in os.listdir(path) if IDX_NAME.search(name) and not name.startswith(".")
        )
        idx = {name: path / name for name in names}
    if idx:
        return read_idx_files(idx, parameters)
    (name, file), *more = islice(source_files(path), 2)
    if not more and name == DIGITS_FILE:
        return read_digits(file, parameters)
    if not more and name.endswith(".npz"):
        return read_npz(file, parameters)
    if path.is_file():
        raise InputError(
            f"{path} is neither an IDX file (…-idx3-ubyte) nor an npz file; give a folder of images"
        )
    return read_folder(path, parameters, workers)
