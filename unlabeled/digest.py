"""Digests of files, folders, code and tensors: the words in which lineage is told."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

CODE_PACKAGES = ("unlabeled", "serving", "components", "pipelines")
CODE_SUFFIXES = {".py", ".html", ".css", ".yaml"}


class Digests(NamedTuple):
    """What a record tells of a file's bytes."""

    sha256: str
    md5: str
    size: int


def json_digest(value: Any) -> str:
    """Return the sha256 (hex) of a JSON value in canonical form: sorted keys, no white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(path: Path | str, algorithm: str = "sha256") -> str:
    """Return the digest (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def blocks(file: BinaryIO) -> Iterator[bytes]:
    """Yield what is left in an open binary file, 1 MiB at a time."""
    while block := file.read(1 << 20):
        yield block


def stream_digests(content: Iterable[bytes]) -> Digests:
    """Return sha256, md5 and size of a file's content, given block by block, in one pass."""
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    for block in content:
        sha256.update(block)
        md5.update(block)
        size += len(block)
    return Digests(sha256.hexdigest(), md5.hexdigest(), size)


def files_below(path: Path | str) -> dict[str, Path]:
    """Return every file below a folder by its relative POSIX path, sorted; of a file, itself by its name.

    As DVC does, links to files are followed, links to folders are not.
    """
    path = Path(path)
    if path.is_file():
        return {path.name: path}
    return {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}


def tree_digest(path: Path | str) -> str:
    """Return one sha256 (hex) for a file or a folder tree: its names and bytes, nothing else.

    A folder's digest is that of the JSON object {relative path: sha256}; a file's is the sha256 of its bytes.

    Raises:
        FileNotFoundError: nothing lies at `path`.
    """
    path = Path(path)
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        raise FileNotFoundError(path)
    return json_digest({name: file_digest(file) for name, file in files_below(path).items()})


def dvc_listing(md5s: Mapping[str, str]) -> bytes:
    """Return the object that DVC stores for a folder: its files' md5 by relative path, as JSON."""
    entries = [{"md5": md5s[name], "relpath": name} for name in sorted(md5s)]
    return json.dumps(entries, sort_keys=True).encode()


def dvc_listing_digest(md5s: Mapping[str, str]) -> str:
    """Return the name of that object: its md5, ending in `.dir`."""
    return hashlib.md5(dvc_listing(md5s), usedforsecurity=False).hexdigest() + ".dir"


def dvc_digest(path: Path | str) -> str:
    """Return DVC's digest of a file (md5) or a folder (md5 ending in `.dir`), as `dvc add` records it."""
    path = Path(path)
    if path.is_file():
        return file_digest(path, "md5")
    return dvc_listing_digest({name: file_digest(file, "md5") for name, file in files_below(path).items()})


def code_digest() -> str:
    """Return one sha256 (hex) for the source of the four packages, as they lie beside this one."""
    root = Path(__file__).parents[1]
    digests = {}
    for package in CODE_PACKAGES:
        for name, file in files_below(root / package).items():
            if file.suffix in CODE_SUFFIXES:
                digests[f"{package}/{name}"] = file_digest(file)
    return json_digest(digests)


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    """Return the canonical sha256 (hex) of named NumPy arrays: name, dtype, shape, bytes, by order of names.

    Two models with equal weights have equal canonical digests, whatever file holds them.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
