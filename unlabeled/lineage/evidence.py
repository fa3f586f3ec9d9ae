"""What the registry holds of a run against what its record says: the differences, claim by claim."""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unlabeled.digest import Digests, code_digest, json_digest
from unlabeled.errors import InputError
from unlabeled.files import json_bytes, read_json
from unlabeled.lineage.chain import Content, below, maker, open_inputs
from unlabeled.lineage.findings import Difference
from unlabeled.lineage.leaderboard import leaderboard
from unlabeled.lineage.record import dependency
from unlabeled.lineage.registry import Registry
from unlabeled.lineage.signature import contradiction
from unlabeled.lineage.store import Store
from unlabeled.lineage.tracked import LEADERBOARD, RECORD, SIGNATURE

# Files of a run's commit that are no evidence: where the remote lies, what git ignores.
NO_EVIDENCE = re.compile(r"\.dvc/.*|\.gitignore|\.dvcignore|README\.md")
# What a record that has not the form of one raises where it is read.
MALFORMED = (KeyError, TypeError, AttributeError, ValueError, StopIteration)
ONNX = re.compile(r"repository/([^/]+)/\d+/model\.onnx")


class Evidence:
    """A run as its record tells it, and the registry that must agree.

    Args:
        hashed: digests of an object of the store by its name; default: every object is read.

    Attributes:
        damaged: top-level files and folders of the bundle that are found missing or changed.
        notes: what could not be checked.
    """

    def __init__(
        self,
        registry: Registry,
        run: str,
        record: Mapping[str, Any],
        hashed: Callable[[str], Digests] | None = None,
    ) -> None:
        self.registry, self.run, self.record = registry, run, record
        self.hashed = hashed
        self.damaged: set[str] = set()
        self.notes: list[str] = []
        predicate = record["predicate"]
        details = predicate["runDetails"]
        self.content = Content.of(record)
        self.size = sum(subject["annotations"]["size"] for subject in record["subject"])
        self.steps, self.artifacts = predicate["steps"], predicate["artifacts"]
        self.made_by = {name: artifact["step"] for name, artifact in self.artifacts.items()}
        self.tracked = {entry["name"]: entry["digest"]["sha256"] for entry in details["byproducts"]}
        self.invocation = details["metadata"]["invocationId"]
        self.parameters = predicate["buildDefinition"]["externalParameters"]
        self.data, self.code = dependency(record, "data"), dependency(record, "code")["digest"]["tree"]
        self.reference = self.data["annotations"]["reference"]

    def _step(self, file: str) -> str:
        return maker(file, self.artifacts) or "record"

    def of_record(self) -> Iterator[Difference]:
        if self.registry.read(self.run, RECORD) != json_bytes(self.record):
            yield Difference("record", RECORD, "is not written as a record is: a key may stand there twice")
        digest = json_digest({key: value for key, value in self.record.items() if key != "digest"})
        if digest != self.record["digest"]:
            yield Difference(
                "record", RECORD, "was changed after it was written", self.record["digest"], digest
            )
        if self.invocation != self.run:
            yield Difference("record", RECORD, "is the record of another run", self.run, self.invocation)
        if json_digest(self.parameters["parameters"]) != self.parameters["digest"]:
            yield Difference(
                "record", RECORD, "parameters do not have their digest", self.parameters["digest"]
            )
        for name, recorded in self.tracked.items():
            try:
                found = hashlib.sha256(self.registry.read(self.run, name)).hexdigest()
            except InputError as error:
                self.damaged.add(name)
                yield Difference("record", name, str(error))
                continue
            if found != recorded:
                self.damaged.add(name)
                yield Difference("record", name, "was changed after it was recorded", recorded, found)
        for name in self.registry.files(self.run):
            if name not in (*self.tracked, RECORD, SIGNATURE) and not NO_EVIDENCE.fullmatch(name):
                yield Difference("record", name, "lies in the run's commit, but the record does not know it")

    def of_signature(self, key: Path | None) -> Iterator[Difference]:
        if SIGNATURE not in self.registry.files(self.run):
            if key:
                yield Difference("record", SIGNATURE, "is missing: the record is not signed")
            else:
                self.notes.append("the record is not signed")
            return
        try:
            signature = self.registry.read(self.run, SIGNATURE)
        except InputError as error:
            yield Difference("record", SIGNATURE, str(error))
            return
        if not key:
            self.notes.append("the signature was not checked: that needs the signer's public key")
        elif found := contradiction(self.registry.read(self.run, RECORD), signature, key):
            yield found

    def of_store(self) -> Iterator[Difference]:
        hashed = self.hashed or Store(self.registry.remote).digests
        for name, object_name in self.content.objects().items():
            # What is no file is the listing that DVC keeps of a folder.
            recorded = self.content.sha256.get(name, "")
            subject = "" if recorded else "DVC's listing of this folder "
            try:
                found = hashed(object_name)
            except OSError as error:
                self.damaged.add(name.split("/")[0])
                missing = isinstance(error, FileNotFoundError)
                what = "is missing in the store" if missing else f"cannot be read: {error.strerror}"
                yield Difference(self._step(name), name, subject + what, object_name)
                continue
            if found.md5 != object_name.removesuffix(".dir") or (recorded and found.sha256 != recorded):
                self.damaged.add(name.split("/")[0])
                values = (recorded, found.sha256) if recorded else (object_name, found.md5)
                yield Difference(self._step(name), name, f"{subject}was changed in the store", *values)

    def of_chain(self) -> Iterator[Difference]:
        for step, name, digest in open_inputs(self.steps):
            yield Difference(step, name, "was read, but no earlier step wrote it", digest)
        signed = {step["name"]: step["outputs"].values() for step in self.steps}
        for name, step in self.made_by.items():
            digest, recorded = self.content.tree(name), self.artifacts[name]["digest"]
            if digest != recorded or digest not in signed.get(step, ()):
                yield Difference(
                    step, name, "its recorded files are not what the step signed", recorded, digest
                )
        for name in self.content.md5:
            if maker(name, self.artifacts) is None:
                yield Difference("record", name, "belongs to no artifact of any step")
        for record in self.steps:
            if record["code"] != self.code:
                yield Difference(
                    record["name"], "code", "is not the code of the run", self.code, record["code"]
                )

    def of_data(self) -> Iterator[Difference]:
        pinned, found = self.data["digest"]["dvc"], self.content.dvc("raw")
        if found != pinned:
            yield Difference("ingest", "raw", "are not the pinned data", pinned, found)
        if self.made_by.get("raw") != self.made_by.get("table"):
            yield Difference(self._step("table"), "table", "was not made by the step that read the raw data")

    def of_drift(self, needed: Sequence[str]) -> Iterator[Difference]:
        """The one thing that a run reads of another: the table that drift is measured against."""
        validation = "validation/validation.json"
        try:
            recorded = Content.of(self.registry.show(self.reference)).sha256["table/table.parquet"]
        except InputError as error:
            yield Difference(self._step(validation), validation, f"its reference is gone: {error}")
            return
        with tempfile.TemporaryDirectory(prefix="unlabeled-") as folder:
            [file] = self.registry.fetch(self.run, Path(folder), [validation])
            found = read_json(file)["drift"].get("reference", "")
        if found != recorded:
            what = f"drift was not measured against the table of run {self.reference}"
            yield Difference(self._step(validation), validation, what, recorded, found)

    def of_leaderboard(self, needed: Sequence[str]) -> Iterator[Difference]:
        if self.code != code_digest():
            self.notes.append(
                "the leaderboard was not derived again: the code here is not the code of the run"
            )
            return
        scores = [
            name for name in self.content.md5 if name.startswith(tuple(needed)) and name.endswith(".json")
        ]
        steps = {step["name"]: step for step in self.steps}
        makers = {name: steps[step] for name, step in self.made_by.items()}
        recorded = json.loads(self.registry.read(self.run, LEADERBOARD))
        with tempfile.TemporaryDirectory(prefix="unlabeled-") as folder:
            self.registry.fetch(self.run, Path(folder), scores)
            derived = leaderboard(Path(folder), self.run, recorded["data"], makers)
        for key, value in derived.items():
            if value != recorded.get(key):
                yield Difference("record", LEADERBOARD, f"`{key}` is not what the artifacts say")

    def of_onnx(self, needed: Sequence[str]) -> Iterator[Difference]:
        served = {name: found[1] for name in self.content.md5 if (found := ONNX.fullmatch(name))}
        if not served:
            self.notes.append("the run serves no ONNX file")
            return
        import torch

        from unlabeled.export.parity import onnx_equals_checkpoint

        # What the file says of itself would let it choose how it is compared.
        machines = {step["name"]: step["machine"] for step in self.steps}
        torch_version = (machines[self._step(next(iter(served)))]["torch"] or {}).get("version", "")
        precision = self.parameters["parameters"].get("export", {}).get("precision", "float32")
        if torch_version != torch.__version__:
            here = f"exported by torch {torch_version or 'unknown'}, here is {torch.__version__}"
            self.notes.append(f"of the served ONNX files only the outputs were compared: {here}")
        with tempfile.TemporaryDirectory(prefix="unlabeled-") as room:
            folder = Path(room)
            self.registry.fetch(self.run, folder, [name for name in needed if below(self.content.md5, name)])
            checkpoint = (folder / "model", folder / "labels", folder / "classifier")
            for name, kind in served.items():
                try:
                    lines = onnx_equals_checkpoint(folder / name, kind, *checkpoint, torch_version, precision)
                except Exception as error:  # whatever a strange file does to the libraries that read it
                    lines = [f"cannot be compared: {error or type(error).__name__}"]
                for line in lines:
                    yield Difference(self._step(name), name, line.replace(f"{room}/", ""))
