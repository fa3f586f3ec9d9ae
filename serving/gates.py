"""Gates before a promotion: served answers are the golden ones, and they come in time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from serving.client import Client
from serving.index import Index
from serving.repository import MODEL
from serving.server import EmbeddedTriton, triton_environment
from serving.timing import milliseconds
from unlabeled.errors import CheckFailed, InputError
from unlabeled.export.onnx import OnnxModel
from unlabeled.export.parity import difference
from unlabeled.files import read_json

REQUESTS, WARM_UP = 200, 20
Infer = Callable[[str, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Gate:
    """The outcome of a gate: its name, whether the run passes, one line that says why, and the figures."""

    name: str
    passed: bool
    why: str
    figures: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{'passed ' if self.passed else 'REFUSED'}  {self.name}: {self.why}"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values: name, passed, why, figures."""
        return asdict(self)


def measured(name: str, measure: Callable[[], Gate]) -> Gate:
    """Return a gate's outcome; one that cannot be measured, for damaged or missing files, is refused."""
    try:
        return measure()
    except (CheckFailed, InputError) as error:
        return Gate(name, False, str(error))


def parity(bundle: Path, tolerance: float) -> Gate:
    """Compare with the golden answers: what `check_serving` recorded of onnxruntime and Triton, and onnxruntime anew.

    Args:
        bundle: with `repository/`, `index/` and `serving/`.
        tolerance: the run's own `export.tolerance`.

    Raises:
        InputError: a file is missing or broken.
    """
    index = Index(bundle / "index")
    recorded = read_json(bundle / "serving" / "serving.json")["models"]
    figures = {}
    for kind in index.models:
        fresh = OnnxModel(bundle / "repository" / kind / MODEL, threads=1)(index.golden["images"])
        figures[kind] = {**recorded[kind], "here": difference(index.golden[kind], fresh)["max_difference"]}
    kind, where, worst = max(
        ((kind, where, value) for kind, values in figures.items() for where, value in values.items()),
        key=lambda item: item[2],
    )
    places = {"onnx": "recorded, onnxruntime", "triton": "recorded, Triton", "here": "onnxruntime here"}
    why = f"at most {worst:.1e} from the golden answers ({kind}, {places[where]}); allowed {tolerance:.0e}"
    return Gate("parity", worst <= tolerance, why, {"tolerance": tolerance, "models": figures})


def latency(bundle: Path, budget: float) -> Gate:
    """Measure the milliseconds of a request with one image, one at a time, per model.

    Measured is the embedded Triton over gRPC; where there is none, onnxruntime in this process, and it says so.

    Args:
        bundle: with `repository/` and `index/`.
        budget: largest p99, milliseconds.

    Raises:
        InputError: a file is missing or broken, or Triton cannot load a model.
    """
    index = Index(bundle / "index")
    with _infer(bundle / "repository", index) as (where, infer):
        shape, figures = (1, *index.image_shape), {}
        for kind in index.models:
            times = milliseconds(partial(infer, kind), shape, REQUESTS, WARM_UP)
            figures[kind] = dict(zip(("median", "p99"), np.percentile(times, [50, 99]).tolist(), strict=True))
    told = ", ".join(f"{kind} {times['median']:.1f}/{times['p99']:.1f}" for kind, times in figures.items())
    why = f"median/p99 of {REQUESTS} requests in ms: {told}; allowed p99 {budget:g} ({where})"
    passed = all(times["p99"] <= budget for times in figures.values())
    return Gate("latency", passed, why, {"budget": budget, "where": where, "milliseconds": figures})


@contextmanager
def _infer(repository: Path, index: Index) -> Iterator[tuple[str, Infer]]:
    try:
        triton_environment()
    except InputError:
        models = {kind: OnnxModel(repository / kind / MODEL, threads=1) for kind in index.models}
        yield "onnxruntime: no Triton server here", lambda kind, images: models[kind](images)
        return
    with (
        EmbeddedTriton(repository, arguments=("--disable-auto-complete-config",)) as server,
        Client(server.grpc_url) as client,
    ):
        yield (
            "Triton on this machine",
            lambda kind, images: client.infer(kind, images)[index.models[kind]["output"]],
        )
