"""The files of a source: which count, in which order, and their DVC digest. All of it streams."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from unlabeled.digest import file_digest
from unlabeled.errors import InputError

# Stands in for the bytes of a file that may not be read, in the digest and in the recorded raw files: so a
# run from the recorded files finds the same broken image, for the same reason.
UNREADABLE = b"unreadable: permission denied\n"


def source_files(
    path: Path, prefix: str = "", above: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[str, Path]]:
    """Yield (relative POSIX path, path) of every file below a folder, sorted; of a file, itself.

    Hidden files and folders are left out. Links are followed, except to a folder above them. Memory holds the
    names of one folder (and of those above it) at a time.

    Raises:
        InputError: a folder may not be listed.
    """
    if path.is_file():
        yield path.name, path
        return
    status = path.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    try:
        with os.scandir(path) as entries:
            visible = (entry for entry in entries if not entry.name.startswith("."))
            # With its slash a folder sorts where the paths of its files do.
            names = sorted(entry.name + "/" * _is_folder(entry) for entry in visible)
    except OSError as error:
        raise InputError(f"cannot list the folder {path}: {error.strerror}") from None
    for name in names:
        if name.endswith("/"):
            yield from source_files(path / name, prefix + name, (*above, identity))
        elif (path / name).is_file():
            yield prefix + name, path / name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def source_digest(path: Path) -> str:
    """Return the DVC digest (md5 ending in `.dir`) of a source; a single file counts as a folder holding it.

    It equals `dvc_digest` of a folder without hidden files, unreadable files and links to folders.

    Raises:
        InputError: the device fails, or a file goes away meanwhile.
    """
    digest = hashlib.md5(b"[")
    for count, (name, file) in enumerate(source_files(path)):
        try:
            md5 = file_digest(file, "md5")
        except PermissionError:
            md5 = hashlib.md5(UNREADABLE).hexdigest()
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}") from None
        digest.update(((", " if count else "") + json.dumps({"md5": md5, "relpath": name})).encode())
    digest.update(b"]")
    return digest.hexdigest() + ".dir"


def copy_files(path: Path, folder: Path) -> None:
    """Copy a source's files into `folder`, so that its DVC digest is the source's.

    Copies, not links: neither an edit of the originals nor one of the recorded files may reach the other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in source_files(path):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(file, target)
        except PermissionError:
            target.write_bytes(UNREADABLE)
