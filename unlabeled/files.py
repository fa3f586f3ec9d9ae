"""Atomic writes: a file or folder appears whole under its name, or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `path`; what the body writes there (a file or a folder) takes its name at the end.

    An older file or folder of that name is replaced. On an exception nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary = room / path.name
    try:
        yield temporary
        temporary.lstat()  # what is not there replaces nothing
        if path.is_dir() and not path.is_symlink():
            os.replace(path, room / "replaced")
        os.replace(temporary, path)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically: equal values give equal bytes."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path | str) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text())


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Make `target` the same file or folder tree as `source`: hard links where the file system allows, else copies."""

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copyfile(a, b)

    if Path(source).is_dir():
        shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)
    else:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        link(str(source), str(target))
