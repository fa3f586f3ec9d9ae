"""One step of the pipeline: it proves its inputs, runs, and signs its outputs.

Every artifact carries, as metadata, its digest and the record of the step that made it. So the chain of a run
(which bytes went into what) travels with the artifacts themselves, on one machine and on a cluster.
"""

import base64
import json
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from unlabeled import progress
from unlabeled.digest import code_digest, tree_digest
from unlabeled.environment import machine
from unlabeled.errors import CheckFailed, InputError

DIGEST, STEP = "digest", "step"


class ArtifactLike(Protocol):
    """What a step needs of an artifact; KFP's artifacts fit."""

    path: str
    metadata: dict[str, Any]


@dataclass
class Artifact:
    """An artifact outside KFP: a file or folder and its metadata."""

    path: str
    metadata: dict[str, Any] = field(default_factory=dict)


@contextmanager
def step(
    name: str,
    inputs: Mapping[str, ArtifactLike | Sequence[ArtifactLike]],
    outputs: Mapping[str, ArtifactLike],
    expected_code: str = "",
    metrics: ArtifactLike | None = None,
) -> Iterator[dict[str, Any]]:
    """Run the body as the step `name`.

    The record of a step: name, code (digest), machine, started and ended (seconds since 1970), seconds (of
    the body), cpu_seconds (of the process and its children, imports included), inputs and outputs ({name:
    digest, or a list}), metrics (what the body left in the result).

    Args:
        name: `ingest`, `pretrain/simclr`, …
        inputs: artifacts read; one that carries a digest is hashed again and must match it, another gets one.
        outputs: artifacts that the body writes; their metadata receive `digest` and `step`.
        expected_code: digest of the code that the run was started with; another one here is refused.
        metrics: a KFP metrics artifact, filled with the numbers of the result.

    Yields:
        A dict, empty, for the body to fill with results: JSON values, and scalars of NumPy and torch. A body that
        let another machine compute leaves that one's `machine()` under `machine`: it is the step's, and no metric.

    Raises:
        CheckFailed: an input's bytes are not those that its maker signed.
        InputError: the code here is not the code that the run was started with.
    """
    # Kubeflow ends a step by SIGTERM: as an exception, it lets the body clear up. Only a main thread may say so.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with progress.current_step(name):
        progress.emit("start")
        started, result = time.time(), dict[str, Any]()
        try:
            code = code_digest()
            if expected_code and expected_code != code:
                raise InputError(
                    f"step {name}: the code here has digest {code[:12]}, the run was started with "
                    f"{expected_code[:12]}; run the image that was built from that code, or start a new run"
                )
            input_digests = {key: _digests(name, key, value) for key, value in inputs.items()}
            body_started = time.perf_counter()
            yield result
            seconds = time.perf_counter() - body_started
            # Taken back in JSON: a NumPy scalar is a number there, a NaN is null.
            metrics_found = json.loads(json.dumps(result, default=_number), parse_constant=lambda name: None)
            record = {
                "name": name,
                "code": code,
                "machine": metrics_found.pop("machine", None) or machine(),
                "started": started,
                "ended": time.time(),
                "seconds": seconds,
                "cpu_seconds": sum(os.times()[:4]),
                "inputs": input_digests,
                "outputs": {key: _written(name, key, output) for key, output in outputs.items()},
                "metrics": metrics_found,
            }
            for key, output in outputs.items():
                sign(output, record["outputs"][key], record)
            if metrics is not None:
                _fill_metrics(metrics, metrics_found)
        except BaseException as error:
            kind = (
                "input"
                if isinstance(error, InputError)
                else "check"
                if isinstance(error, CheckFailed)
                else "error"
            )
            progress.emit("fail", kind=kind, message=str(error) or type(error).__name__)
            raise
        progress.emit("end", seconds=seconds, metrics=metrics_found)


def _number(value: Any) -> Any:
    return value.item()


def _written(step_name: str, key: str, output: ArtifactLike) -> str:
    try:
        return tree_digest(output.path)
    except FileNotFoundError:
        raise RuntimeError(f"step {step_name} did not write its output {key}") from None


def _digests(step_name: str, key: str, artifacts: ArtifactLike | Sequence[ArtifactLike]) -> str | list[str]:
    if isinstance(artifacts, Sequence):
        return [_digests(step_name, key, artifact) for artifact in artifacts]  # type: ignore[misc]
    digest, signed = tree_digest(artifacts.path), artifacts.metadata.get(DIGEST)
    if signed and signed != digest:
        raise CheckFailed(
            f"step {step_name}: input {key} has digest {digest[:12]}, its maker signed {signed[:12]}: the "
            f"bytes at {artifacts.path} were changed; remove that folder and run again"
        )
    artifacts.metadata[DIGEST] = digest
    return digest


def _fill_metrics(metrics: ArtifactLike, result: Mapping[str, Any]) -> None:
    metrics.metadata.update({key: value for key, value in result.items() if isinstance(value, int | float)})
    # KFP's cache takes a metrics artifact for lost when no file lies at its path.
    os.makedirs(Path(metrics.path).parent, exist_ok=True)
    Path(metrics.path).write_text(json.dumps(result, sort_keys=True))


def sign(artifact: ArtifactLike, digest: str, record: Mapping[str, Any]) -> None:
    """Write an artifact's digest and the record of the step that made it into its metadata.

    The record is packed: a step that gathers every method gets the metadata of all their artifacts in one
    argument of a command line, which Linux limits to 128 KiB.
    """
    artifact.metadata[DIGEST] = digest
    artifact.metadata[STEP] = base64.b64encode(zlib.compress(json.dumps(record).encode(), 9)).decode()


def step_record(artifact: ArtifactLike) -> dict[str, Any]:
    """Return the record of the step that made `artifact`."""
    return json.loads(zlib.decompress(base64.b64decode(artifact.metadata[STEP])))
