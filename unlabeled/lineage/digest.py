"""Digests of files, folders, code and tensors: the words in which lineage is told."""

import hashlib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CODE_PACKAGES = ("unlabeled", "serving", "components", "pipelines")
CODE_SUFFIXES = {".py", ".html", ".css", ".yaml"}


def json_digest(value: Any) -> str:
    """Return the sha256 (hex) of a JSON value in canonical form: sorted keys, no white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(path: Path | str, algorithm: str = "sha256") -> str:
    """Return the digest (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def files_below(path: Path | str) -> dict[str, Path]:
    """Return every file below a folder by its relative POSIX path, sorted; of a file, itself by its name."""
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


def dvc_digest(path: Path | str) -> str:
    """Return DVC's own digest of a file (md5) or a folder (md5 ending in `.dir`), as `dvc add` would record it."""
    path = Path(path)
    if path.is_file():
        return file_digest(path, "md5")
    entries = [{"md5": file_digest(file, "md5"), "relpath": name} for name, file in files_below(path).items()]
    listing = json.dumps(sorted(entries, key=lambda entry: entry["relpath"]), sort_keys=True)
    return hashlib.md5(listing.encode()).hexdigest() + ".dir"


def code_digest() -> str:
    """Return one sha256 (hex) for the source of the four packages as installed here."""
    digests = {}
    for package in CODE_PACKAGES:
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations is not None
        root = Path(next(iter(spec.submodule_search_locations)))
        for name, file in files_below(root).items():
            if file.suffix in CODE_SUFFIXES:
                digests[f"{package}/{name}"] = file_digest(file)
    return json_digest(digests)


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    """Return the canonical sha256 (hex) of named NumPy arrays: name, dtype, shape and bytes, in the order of names.

    Two models with equal weights have equal canonical digests, whatever file holds them.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
