"""Recent inputs of a server as their applications keep them: image files, or npz files of images or of embeddings."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from unlabeled.data.images import BrokenImage, read_image
from unlabeled.errors import InputError
from unlabeled.parameters import Drift, Ingest


@dataclass
class Recent:
    """A sample of recent inputs.

    Attributes:
        images: uint8 (N, C, H, W); None where only embeddings were kept.
        embeddings: float32 (N, D), as `encoder` answered them; None where images were kept.
        seen: inputs that the sample was drawn from.
        started, ended: seconds since 1970; None where the files do not say.
        broken: {"path", "reason"} of each image file that cannot be read.
    """

    images: np.ndarray | None = None
    embeddings: np.ndarray | None = None
    seen: int = 0
    started: float | None = None
    ended: float | None = None
    broken: list[dict[str, str]] = field(default_factory=list)


def read_recent(source: str, image_shape: tuple[int, int, int], parameters: Drift, seed: int) -> Recent:
    """Read recent inputs; of many, `drift.images` at random.

    Args:
        source: an npz file of `images`, uint8 (N, C, H, W), or of `embeddings`, floats (N, D), as
            `serving.reservoir.Reservoir` writes it; or a folder of such files, or of image files. A path, or a URL
            as `s3://bucket/folder` that fsspec knows.
        image_shape: (C, H, W) of the training images: image files are brought to it as ingest does it.
        parameters: `images` and `max_age_hours`.
        seed: of what is taken.

    Raises:
        InputError: nothing can be read there, it is no such file, or a file's time ended too long ago.
    """
    random = np.random.default_rng(seed)
    with _opened(source) as (files, names):
        logs = [name for name in names if name.endswith(".npz")]
        if not logs:
            return _read_files(files, names, image_shape, parameters.images, random)
        if len(logs) < len(names):
            raise InputError(
                f"{source} holds .npz files and others; keep image files in a folder of their own"
            )
        return _read_logs(files(logs), logs, image_shape, parameters, random)


@contextmanager
def _opened(source: str) -> Iterator[tuple[Any, list[str]]]:
    """Give the names of the files at `source`, sorted, and a function that brings some of them to this machine."""
    try:
        filesystem, root = fsspec.core.url_to_fs(source)
        names = sorted(
            name for name in filesystem.find(root) if "/." not in name.removeprefix(root.rstrip("/"))
        )
    except Exception as error:  # each file system raises what it likes
        raise InputError(f"cannot read recent inputs at {source}: {_one_line(error)}") from None
    if not names:
        raise InputError(f"no recent inputs at {source}: no such file, or an empty folder")
    with tempfile.TemporaryDirectory(prefix="unlabeled-") as room:

        def files(chosen: Sequence[str]) -> list[Path]:
            if isinstance(filesystem, fsspec.implementations.local.LocalFileSystem):
                return [Path(name) for name in chosen]
            copies = [Path(room) / f"{number}{Path(name).suffix}" for number, name in enumerate(chosen)]
            try:
                filesystem.get(list(chosen), [str(copy) for copy in copies])
            except Exception as error:  # as above
                raise InputError(f"cannot read recent inputs at {source}: {_one_line(error)}") from None
            return copies

        yield files, names


def _read_files(
    files: Any, names: list[str], image_shape: tuple[int, int, int], count: int, random: np.random.Generator
) -> Recent:
    chosen = [names[place] for place in _some(len(names), count, random)]
    channels, side, _ = image_shape
    images, recent = [], Recent(seen=len(names))
    for name, path in zip(chosen, files(chosen)):
        try:
            images.append(read_image(path, "L" if channels == 1 else "RGB", side, Ingest().max_pixels)[0])
        except BrokenImage as error:
            recent.broken.append({"path": name, "reason": str(error)})
    recent.images = np.stack(images) if images else np.empty((0, *image_shape), np.uint8)
    return recent


def _read_logs(
    paths: list[Path], names: list[str], image_shape: tuple[int, int, int], parameters: Drift,
    random: np.random.Generator,
) -> Recent:  # fmt: skip
    kinds, rows, seen, started, ended = set[str](), [], 0, [], []
    for path, name in zip(paths, names):
        try:
            with np.load(path, allow_pickle=False) as log:
                values = dict(log)
        except Exception as error:  # zip and npy readers raise errors of many types on damaged bytes
            raise InputError(f"{name} is no npz file: {_one_line(error)}") from None
        kind = next((kind for kind in ("embeddings", "images") if kind in values), "")
        _check(name, kind, values.get(kind), image_shape[0])
        kinds.add(kind)
        rows.append(values[kind])
        seen += int(_number(name, values, "seen", len(values[kind])))
        if "ended" in values:
            ended.append(_number(name, values, "ended"))
            started.append(_number(name, values, "started", ended[-1]))
            age = (time.time() - ended[-1]) / 3600
            if age > parameters.max_age_hours:
                raise InputError(
                    f"{name} ended {age:.0f} hours ago, drift.max_age_hours allows {parameters.max_age_hours:g}: "
                    "the application logs no more, or the file is to be removed"
                )
    if len(kinds) > 1 or len({array.shape[1:] for array in rows}) > 1:
        raise InputError(f"{names[0]} and the files beside it hold rows of different kinds or shapes")
    sample = np.concatenate(rows)
    sample = sample[_some(len(sample), parameters.images, random)]
    times = {"started": min(started), "ended": max(ended)} if ended else {}
    return Recent(**{kinds.pop(): sample}, seen=seen, **times)


def _check(name: str, kind: str, rows: np.ndarray | None, channels: int) -> None:
    if rows is None:
        raise InputError(f"{name} holds neither `images` nor `embeddings`")
    if kind == "images" and (rows.dtype != np.uint8 or rows.ndim != 4 or rows.shape[1] != channels):
        raise InputError(
            f"{name}: images are {rows.dtype} {rows.shape}, expected is uint8 (N, {channels}, H, W)"
        )
    if kind == "embeddings" and (rows.dtype.kind != "f" or rows.ndim != 2 or not np.isfinite(rows).all()):
        raise InputError(
            f"{name}: embeddings are {rows.dtype} {rows.shape}, expected are finite floats (N, D)"
        )


def _number(name: str, values: dict[str, np.ndarray], key: str, default: float = np.nan) -> float:
    try:
        number = float(values.get(key, default))
    except (TypeError, ValueError):
        number = np.nan
    if not np.isfinite(number):
        raise InputError(f"{name}: `{key}` is {_one_line(ValueError(values[key]))}, expected is a number")
    return number


def _some(count: int, most: int, random: np.random.Generator) -> np.ndarray:
    return np.arange(count) if count <= most else np.sort(random.choice(count, most, replace=False))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
