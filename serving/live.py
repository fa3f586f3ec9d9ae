"""The audit of a running server: it answers as the recorded models do, and is configured as they are."""

import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from serving.client import Client, in_batches
from serving.index import Index
from serving.repository import CONFIG, LABELS, MODEL, read_config, read_labels
from unlabeled.errors import CheckFailed, InputError
from unlabeled.export.onnx import OnnxModel
from unlabeled.export.parity import difference
from unlabeled.lineage.findings import Check, Difference, Report
from unlabeled.lineage.registry import Registry

# What of a model's configuration its callers see; how many instances there are is the platform's affair.
FIELDS = ("backend", "max_batch_size", "input", "output")
PROBES = 32


def live(
    registry: Registry,
    run: str,
    report: Report,
    url: str,
    tolerance: float | None = None,
    seed: int | None = None,
) -> Report:
    """Ask a running Triton server what the recorded models are asked, and add what differs to the report.

    Asked are the recorded golden images, whose answers the index holds, and fresh random images, whose answers
    onnxruntime gives here from the recorded ONNX files; answers must agree within `tolerance`. Where a model's
    columns have names, the server must give each column the recorded one.
    What moves no answer by more than that is not seen.

    Args:
        url: gRPC address, `HOST:PORT`.
        tolerance: largest difference; None: the run's own `export.tolerance`, which a GPU may exceed.
        seed: of the random images; None: a fresh one, so that no server can be prepared for them. A note tells it.

    Raises:
        InputError: there is no such run, or no server at `url`.
    """
    definition = registry.show(run)["predicate"]["buildDefinition"]
    if tolerance is None:
        tolerance = definition["externalParameters"]["parameters"]["export"]["tolerance"]
    seed = secrets.randbits(32) if seed is None else seed
    claim = f"the server at {url} answers as the recorded models do"
    with tempfile.TemporaryDirectory(prefix="unlabeled-") as room, Client(url, retry_seconds=2.0) as client:
        client.check_server()
        try:
            registry.fetch(run, Path(room), ["repository", "index"])
            index = Index(Path(room) / "index")
        except (CheckFailed, InputError) as error:
            damaged = Difference("live", "repository", f"no answer was checked: {error}")
            return report.with_check(Check(claim, (damaged,)))
        found = [
            line
            for kind in index.models
            for line in _model(client, kind, index, Path(room) / "repository", tolerance, seed)
        ]
    told = f"the {PROBES} random images that the server was asked were drawn with seed {seed}"
    return replace(report.with_check(Check(claim, tuple(found))), notes=[*report.notes, told])


def _model(
    client: Client, kind: str, index: Index, repository: Path, tolerance: float, seed: int
) -> Iterator[Difference]:
    recorded = read_config(repository / kind / CONFIG)
    try:
        served = client.connection.get_model_config(kind, **client.settings).config
    except InferenceServerException as error:
        yield Difference("live", kind, f"is not served: {error.message()}")
        return
    for field in FIELDS:
        a, b = (_told(getattr(config, field)) for config in (recorded, served))
        if a != b:
            yield Difference("live", kind, f"is served with another {field}", a, b)
    golden = index.golden["images"]
    probes = np.random.default_rng(seed).integers(0, 256, (PROBES, *index.image_shape), dtype=np.uint8)
    expected = OnnxModel(repository / kind / MODEL, threads=1)
    batch = recorded.max_batch_size or 1
    for name, images, answers in (
        ("golden", golden, index.golden[kind]),
        ("random", probes, expected(probes)),
    ):
        try:
            given = in_batches(
                lambda part: client.infer(kind, part)[index.models[kind]["output"]], images, batch
            )
        except (CheckFailed, InputError, KeyError) as error:
            yield Difference("live", kind, f"does not answer the {name} images: {error}")
            continue
        worst = difference(answers, given)["max_difference"]
        if worst > tolerance:
            what = f"answers the {name} images otherwise, by {worst:.1e}; allowed {tolerance:.0e}"
            yield Difference("live", kind, what)
    if names := read_labels(repository, kind):
        yield from _names(client, kind, index.models[kind]["output"], golden[:1], names)


def _names(
    client: Client, kind: str, output: str, image: np.ndarray, recorded: list[str]
) -> Iterator[Difference]:
    """Compare the names that the server gives the columns of an output: it tells them of the K likeliest classes."""
    file, columns = f"{kind}/{LABELS}", len(recorded)
    tensor = InferInput("images", list(image.shape), "UINT8")
    tensor.set_data_from_numpy(image)
    asked = InferRequestedOutput(output, class_count=columns)
    try:
        answer = client.connection.infer(kind, [tensor], outputs=[asked], **client.settings)
    except InferenceServerException as error:
        yield Difference("live", file, f"no class name was checked: {error.message()}")
        return
    # `value:column:name`; a server that has no name for a column leaves the last part away.
    parts = [text.decode(errors="replace").split(":", 2) for text in answer.as_numpy(output).ravel()]
    served = {int(column): "".join(name) for _, column, *name in parts}
    others = [column for column in range(columns) if served.get(column, "") != recorded[column]]
    if others:
        first = others[0]
        what = (
            f"{len(others)} of {columns} classes are served under another name, the first is column {first}"
        )
        yield Difference("live", file, what, recorded[first], served.get(first) or "no name")


def _told(value: Any) -> str:
    """A value of a configuration on one line; of inputs and outputs what their callers see."""
    if isinstance(value, (str, int)):
        return str(value)
    return ", ".join(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}" for tensor in value)
