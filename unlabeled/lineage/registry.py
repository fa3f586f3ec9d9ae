"""The registry of runs: a git repository and a DVC remote. A run is a commit with the tag `run/<id>`.

A recorder pushes its tag after its objects are on the remote and were read back. So recorders never wait for
each other, and one that is killed leaves a valid registry: objects without a tag, which the next record uses.
"""

import copy
import difflib
import io
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from unlabeled.digest import dvc_listing, file_digest
from unlabeled.errors import CheckFailed, InputError
from unlabeled.files import atomic_path, read_json, write_bytes
from unlabeled.lineage.chain import Content, below, top_level
from unlabeled.lineage.commit import TAGS, check_name, create_repository, is_folder, push_tag
from unlabeled.lineage.git import GitError, git
from unlabeled.lineage.store import Store
from unlabeled.lineage.tracked import LEADERBOARD, PROVENANCE, RECORD, SIGNATURE, STATEMENT

ALL_TAGS = "+refs/tags/*:refs/tags/*"
# What every reader of a record relies on.
REQUIRED = (
    "digest",
    "subject",
    "predicate.artifacts",
    "predicate.steps",
    "predicate.buildDefinition.externalParameters.parameters",
    "predicate.buildDefinition.resolvedDependencies",
    "predicate.runDetails.builder.environment",
    "predicate.runDetails.byproducts",
    "predicate.runDetails.metadata.invocationId",
)


class Registry:
    """A registry of runs.

    Args:
        url: URL or folder of the git repository; a folder that does not exist is created by the first `push`.
        remote: URL or folder of the DVC remote.
    """

    def __init__(self, url: str, remote: str) -> None:
        # Git works in folders of its own, where a relative path would lead elsewhere.
        self.url, self.remote = (
            str(Path(place).absolute()) if is_folder(place) else place for place in (str(url), str(remote))
        )
        self._mirror: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def embedded(cls, folder: Path | str) -> "Registry":
        """Return the registry that lives in a folder: `git/`, a bare repository, and `store/`, its remote."""
        return cls(f"{folder}/git", f"{folder}/store")

    def push(self, run: str, bundle: Path) -> dict[str, Any]:
        """Record a bundle as `record` laid it out.

        A run that is recorded already stays as it is; its record and its signature take the place of the bundle's,
        which tells the same, perhaps by another machine. Objects that lie damaged on the remote are replaced.

        Returns:
            {"commit", "objects": how many, "mended": names of those that were replaced}.

        Raises:
            InputError: no run can have that name, another one has it, or git or the remote cannot be written.
            CheckFailed: the bundle is not what its record says, or the remote gives back other bytes.
        """
        check_name(run)
        record = read_json(bundle / RECORD)
        create_repository(self.url)
        objects = _objects(record, bundle)
        mended = Store(self.remote).add(objects)
        if run in self._names() or not self._push_tag(run, record, bundle):
            self._keep(run, record, bundle)
        commit = self._git("rev-parse", f"{TAGS}{run}^{{commit}}").decode().strip()
        return {"commit": commit, "objects": len(objects), "mended": mended}

    def _push_tag(self, run: str, record: Mapping[str, Any], bundle: Path) -> bool:
        """Push the commit and tag of a run; False where another recorder of it was first."""
        names = [*_tracked(record), *([SIGNATURE] if (bundle / SIGNATURE).exists() else [])]
        files = {name: (bundle / name).read_bytes() for name in names}
        ignored = "".join(
            f"/{name}\n" for name in top_level(subject["name"] for subject in record["subject"])
        )
        date = record["predicate"]["runDetails"]["metadata"]["finishedOn"].split(".")[0] + "Z"
        message = f"record {record['digest']}"
        try:
            push_tag(self.url, self.remote, run, {**files, ".gitignore": ignored.encode()}, message, date)
        except InputError:
            self._mirror = None
            if run in self._names():
                return False
            raise
        self._mirror = None
        return True

    def _keep(self, run: str, record: Mapping[str, Any], bundle: Path) -> None:
        """Put a run's recorded record and signature into a bundle that is recorded again.

        Raises:
            InputError: the bundle is another run's; nothing of it was changed.
        """
        if _apart_from_recorder(self.show(run)) != _apart_from_recorder(record):
            raise InputError(
                f"run {run} is recorded already, with other content; take another name for this one"
            )
        kept = {name: self.read(run, name) for name in self.files(run) if name in (RECORD, SIGNATURE)}
        # A signature never lies beside a record that it does not sign.
        (bundle / SIGNATURE).unlink(missing_ok=True)
        for name in (RECORD, SIGNATURE):
            if name in kept:
                write_bytes(bundle / name, kept[name])

    def runs(self) -> list[dict[str, Any]]:
        """Return the recorded runs, newest first: run, started, finished, data, selected, digest.

        The newest is the one that finished last: its first steps may be as old as the cache that they came from.
        A run whose record cannot be read has the key `error`, and nothing but its name is filled.
        """
        names = self._names()
        files = self._read_all([f"{TAGS}{run}:{name}" for run in names for name in (RECORD, LEADERBOARD)])
        rows = [_row(run, *pair) for run, pair in zip(names, zip(files[::2], files[1::2]))]
        return sorted(rows, key=lambda row: (row["finished"], row["started"], row["run"]), reverse=True)

    def show(self, run: str) -> dict[str, Any]:
        """Return a run's record.

        Raises:
            InputError: there is no such run, or its record is broken.
        """
        return _parsed(run, self.read(run, RECORD))

    def read(self, run: str, name: str) -> bytes:
        """Return a file of a run's commit: `record.json`, `leaderboard.json`, `params.yaml` …

        Raises:
            InputError: there is no such run, or it has no such file, or git cannot read it.
        """
        # Git would read `a^` as the parent of a.
        if re.search(r"[\^~:?*\[\\\s]|\.\.|@\{", run):
            self.require(run)
        try:
            return self._git("cat-file", "blob", f"{TAGS}{run}:{name}")
        except GitError as error:
            self.require(run)
            raise InputError(f"the registry cannot give {name} of run {run}: {error}") from None

    def _read_all(self, objects: Sequence[str]) -> list[bytes]:
        """Read many files at once; one that cannot be read comes back empty."""
        try:
            output = io.BytesIO(self._git("cat-file", "--batch", input="\n".join(objects).encode()))
        except GitError:
            # Git ends at the first damaged object.
            return [self._read_all([name])[0] for name in objects] if len(objects) > 1 else [b""]
        found = []
        for _ in objects:
            *_, kind, size = output.readline().split()
            found.append(output.read(int(size)) if kind == b"blob" else b"")
            output.read(1 if kind == b"blob" else 0)
        return found

    def files(self, run: str) -> list[str]:
        """Return the names of the files of a run's commit."""
        self.require(run)
        return self._git("ls-tree", "-r", "-z", "--name-only", TAGS + run).decode().split("\0")[:-1]

    def objects(self, run: str) -> dict[str, str]:
        """Return the object on the remote of every file and top-level folder, by its path in the bundle."""
        return Content.of(self.show(run)).objects()

    def fetch(self, run: str, folder: Path, paths: Sequence[str] | None = None) -> list[Path]:
        """Bring files of a run into a folder, as they lay in its bundle, and prove each.

        Args:
            paths: files or folders of the bundle, as `model` or `table/table.parquet`; None: all of it.

        Raises:
            InputError: the run or a path does not exist, the remote cannot be reached, or the folder not written.
            CheckFailed: a file is missing on the remote or damaged there.
        """
        record, folder = self.show(run), Path(folder)
        content, store = Content.of(record), Store(self.remote)
        for path in paths or ():
            if path not in content.md5 and not below(content.md5, path):
                raise InputError(f"run {run} has no artifact '{path}'{_hint(path, list(content.objects()))}")
        wanted = [
            name
            for name in content.md5
            if paths is None or any(name == path or name.startswith(path + "/") for path in paths)
        ]
        tracked = _tracked(record) if paths is None else []
        if paths is None and SIGNATURE in self.files(run):
            tracked.append(SIGNATURE)
        for name in wanted + tracked:
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise InputError(f"the record of run {run} is broken: {name} leads out of the bundle")
        for name in wanted:
            try:
                with atomic_path(folder / name) as temporary:
                    with open(temporary, "wb") as copy:
                        copy.writelines(store.read(content.md5[name]))
                    if file_digest(temporary) != content.sha256[name]:
                        raise CheckFailed(f"run {run}: {name} is damaged in the registry's store")
            except FileNotFoundError:
                raise CheckFailed(f"run {run}: {name} is missing in the registry's store") from None
            except OSError as error:
                raise InputError(f"cannot bring {name} of run {run} into {folder}: {error}") from None
        for name in tracked:
            write_bytes(folder / name, self.read(run, name))
        return [folder / name for name in wanted + tracked]

    @property
    def absent(self) -> bool:
        """The git repository is a folder that is not there (yet); one elsewhere shows when it is read."""
        return is_folder(self.url) and not Path(self.url).exists()

    def require(self, run: str) -> None:
        """Raise InputError, with the nearest name, where there is no such run."""
        names = self._names()
        if run not in names:
            hint = _hint(run, names) if names else "; it holds no run yet"
            raise InputError(f"no run '{run}' in the registry{hint}")

    def tags(self, *patterns: str) -> list[tuple[str, str, int]]:
        """Return name, commit and time (seconds since 1970) of the annotated tags whose names match a pattern.

        Raises:
            InputError: git cannot read the registry.
        """
        if self.absent:
            return []
        form = "--format=%(refname:lstrip=2) %(*objectname) %(taggerdate:unix)"
        try:
            lines = self._git("for-each-ref", form, *(f"refs/tags/{pattern}" for pattern in patterns))
        except GitError as error:
            raise InputError(f"cannot read the registry {self.url}: {error}") from None
        # A tag without annotation has neither; GTO takes no notice of it either.
        found = [parts for line in lines.decode().splitlines() if len(parts := line.split()) == 3]
        return [(name, commit, int(time)) for name, commit, time in found]

    def refresh(self) -> None:
        """See what was recorded and promoted since; a registry in a folder is read as it is in any case.

        Raises:
            InputError: git cannot read the registry.
        """
        if self._mirror is not None:
            try:
                git("fetch", "--quiet", "--no-tags", "--prune", self.url, ALL_TAGS, folder=self._mirror.name)
            except GitError as error:
                raise InputError(f"cannot read the registry {self.url}: {error}") from None

    def _names(self) -> list[str]:
        if self.absent:
            return []
        try:
            return self._git("for-each-ref", "--format=%(refname:lstrip=3)", TAGS).decode().split()
        except GitError as error:
            raise InputError(f"{self.url} is no registry: {error}") from None

    def _git(self, *arguments: str, input: bytes | None = None) -> bytes:
        """Run git on the registry; one that lies elsewhere is fetched first, without any data."""
        if is_folder(self.url):
            # Without --git-dir, git would look for a repository in the folders above.
            inner = Path(self.url) / ".git"
            return git("--git-dir", str(inner if inner.exists() else self.url), *arguments, input=input)
        if self._mirror is None:
            mirror = tempfile.TemporaryDirectory(prefix="unlabeled-")
            git("init", "--quiet", "--bare", "--template=", mirror.name)
            git("fetch", "--quiet", "--no-tags", self.url, ALL_TAGS, folder=mirror.name)
            self._mirror = mirror
        return git(*arguments, folder=self._mirror.name, input=input)


@contextmanager
def reference_table(registry: str, remote: str, reference: str) -> Iterator[Path | None]:
    """Give the `table.parquet` that drift is measured against.

    Args:
        registry, remote: git URL and DVC URL; empty: `reference` is a file, or the folder of a table.
        reference: an earlier run; empty: none, and None is given.

    Raises:
        InputError: there is no such run.
    """
    if not reference:
        yield None
    elif not registry:
        path = Path(reference)
        yield path / "table.parquet" if path.is_dir() else path
    else:
        with tempfile.TemporaryDirectory(prefix="unlabeled-") as folder:
            [table] = Registry(registry, remote).fetch(reference, Path(folder), ["table/table.parquet"])
            yield table


def _parsed(run: str, content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
        if (record["_type"], record["predicateType"]) != (STATEMENT, PROVENANCE):
            raise ValueError("it is no in-toto statement of SLSA provenance")
        for part in REQUIRED:
            reduce(getitem, part.split("."), record)
    except KeyError as error:
        raise InputError(f"the record of run {run} is broken: it has no {error}") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"the record of run {run} is broken: {error}") from None
    return record


def _apart_from_recorder(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record tells of its run. The machine that wrote it is another where an evicted recorder is tried again."""
    told = copy.deepcopy(dict(record))
    del told["digest"], told["predicate"]["runDetails"]["builder"]["environment"]
    return told


def _row(run: str, record: bytes, board: bytes) -> dict[str, Any]:
    row = {"run": run, "started": "", "finished": "", "data": {}, "selected": "", "digest": ""}
    try:
        statement, leaderboard = _parsed(run, record), json.loads(board)
        times = statement["predicate"]["runDetails"]["metadata"]
        told = {"started": times["startedOn"], "finished": times["finishedOn"], "digest": statement["digest"]}
        return {**row, **told, "data": leaderboard["data"], "selected": leaderboard["selected"]}
    except (InputError, ValueError, KeyError, TypeError) as error:
        return {**row, "error": str(error)}


def _objects(record: Mapping[str, Any], bundle: Path) -> dict[str, Path | bytes]:
    """Every object of a run by its name on the remote: a file, or the listing that DVC keeps of a folder."""
    content = Content.of(record)
    objects: dict[str, Path | bytes] = {md5: bundle / name for name, md5 in content.md5.items()}
    for name in top_level(content.md5):
        if name not in content.md5:
            objects[content.dvc(name)] = dvc_listing(below(content.md5, name))
    return objects


def _tracked(record: Mapping[str, Any]) -> list[str]:
    return [RECORD, *(entry["name"] for entry in record["predicate"]["runDetails"]["byproducts"])]


def _hint(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean '{near[0]}'?" if near else f"; there are {len(names)}, as '{names[-1]}'"
