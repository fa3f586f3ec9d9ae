"""The chain of a run: which step wrote which bytes, and which step read them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from unlabeled.digest import dvc_listing_digest, file_digest, files_below, json_digest
from unlabeled.errors import CheckFailed

Step = dict[str, Any]


def inputs(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and digest of everything that a step read; the members of a list as `models[0]`."""
    for name, value in step["inputs"].items():
        if isinstance(value, list):
            yield from ((f"{name}[{number}]", digest) for number, digest in enumerate(value))
        else:
            yield name, value


def ordered(records: Iterable[Step]) -> list[Step]:
    """Return step records, each once, every step after those that wrote what it read.

    A step that read what none wrote comes where its clock puts it (see `open_inputs`).

    Raises:
        CheckFailed: two different records name one step.
    """
    steps: dict[str, Step] = {}
    for step in records:
        if steps.setdefault(step["name"], step) != step:
            raise CheckFailed(f"step {step['name']}: the artifacts come from two executions of it")
    waiting = sorted(steps.values(), key=lambda step: (step["started"], step["name"]))
    found: list[Step] = []
    made: set[str] = set()
    while waiting:
        ready = (step for step in waiting if made.issuperset(digest for _, digest in inputs(step)))
        step = next(ready, waiting[0])
        waiting.remove(step)
        found.append(step)
        made.update(step["outputs"].values())
    return found


def open_inputs(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Return (step, input, digest) of every input that no earlier step wrote; none: the chain is closed."""
    made: set[str] = set()
    found = []
    for step in steps:
        found += [(step["name"], name, digest) for name, digest in inputs(step) if digest not in made]
        made.update(step["outputs"].values())
    return found


def below(values: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Return the entries of a mapping by path that lie in `folder`, by their path in it."""
    prefix = folder + "/"
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def top_level(names: Iterable[str]) -> list[str]:
    """Return the files and folders at the top of a bundle that holds these files."""
    return sorted({PurePosixPath(name).parts[0] for name in names})


def maker(file: str, artifacts: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the step that made a file of the bundle; None where it belongs to no artifact."""
    names = [file, *map(str, PurePosixPath(file).parents)]
    return next((artifacts[name]["step"] for name in names if name in artifacts), None)


class Content:
    """What a bundle holds, by the digests of its files alone.

    Args:
        sha256, md5: by path in the bundle.
    """

    def __init__(self, sha256: Mapping[str, str], md5: Mapping[str, str]) -> None:
        self.sha256, self.md5 = sha256, md5

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Content":
        """Return what a record says that the bundle holds."""
        digests = {subject["name"]: subject["digest"] for subject in record["subject"]}
        sha256 = {name: digest["sha256"] for name, digest in digests.items()}
        return cls(sha256, {name: digest["md5"] for name, digest in digests.items()})

    def tree(self, name: str) -> str:
        """Return the digest of the file or folder `name`, as `tree_digest` gives it."""
        return self.sha256[name] if name in self.sha256 else json_digest(below(self.sha256, name))

    def dvc(self, name: str) -> str:
        """Return DVC's digest of the file or folder `name`, as `dvc_digest` gives it."""
        return self.md5[name] if name in self.md5 else dvc_listing_digest(below(self.md5, name))

    def changed(self, bundle: Path, name: str) -> list[str]:
        """Return the files of the folder `name` of a bundle that are not as recorded: changed, missing or added."""
        recorded, found = below(self.sha256, name), files_below(bundle / name)
        return [
            f"{name}/{file}"
            for file in sorted(recorded.keys() | found.keys())
            if file not in found or file_digest(found[file]) != recorded.get(file)
        ]

    def objects(self) -> dict[str, str]:
        """Return the name in a DVC remote of every file and every top-level folder, by its path."""
        return {**self.md5, **{name: self.dvc(name) for name in top_level(self.md5)}}
