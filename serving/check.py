"""The check_serving step: a real Triton server loads the repository and gives the golden answers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from serving.client import Client
from serving.index import Index
from serving.repository import CONFIG, MODEL, read_config
from serving.server import EmbeddedTriton
from serving.timing import milliseconds
from unlabeled import progress
from unlabeled.digest import file_digest
from unlabeled.errors import CheckFailed
from unlabeled.export.onnx import OnnxModel
from unlabeled.export.parity import difference
from unlabeled.files import write_json
from unlabeled.parameters import Export

BATCH_SIZES = (1, 2, 7, 64)
REQUESTS = 30
Infer = Callable[[np.ndarray], np.ndarray]


def check_serving(repository: Path, index: Path, output: Path, parameters: Export) -> dict[str, Any]:
    """Serve the repository with Triton and compare its answers with the golden ones, over gRPC and HTTP.

    Args:
        repository, index: as `export` wrote them.
        output: folder to write; `serving.json` holds, per model, the largest difference of onnxruntime and of
            Triton to the golden answers, as `unlabeled.export.parity.difference` has it, to two digits; of models of
            less precision also, under `reduced`, what that costs against torch, which export has gated.

    Returns:
        Per model `MODEL_onnx` and `MODEL_triton` (those differences) and `MODEL_milliseconds`, the median
        time of a request with one image over gRPC.

    Raises:
        CheckFailed: a `model.onnx` is not the exported one, or an answer differs by more than the tolerance.
        InputError: Triton cannot load a model.
    """
    expected = Index(index)
    for kind, model in expected.models.items():
        digest = file_digest(repository / kind / MODEL)
        if digest != model["sha256"]:
            raise CheckFailed(
                f"{repository / kind / MODEL} has sha256 {digest[:12]}, export wrote {model['sha256'][:12]}: "
                "the file was changed; export again"
            )
    result: dict[str, float] = {}
    # Complete configurations need no completing, which would cost a start of Python per model.
    with (
        EmbeddedTriton(repository, arguments=("--disable-auto-complete-config",)) as server,
        Client(server.grpc_url) as grpc,
        Client(server.http_url, "http") as http,
    ):
        for done, (kind, model) in enumerate(expected.models.items()):
            progress.report(done, len(expected.models), "models")
            by_grpc, by_http = (partial(_infer, client, kind, model["output"]) for client in (grpc, http))
            largest = read_config(repository / kind / CONFIG).max_batch_size
            sizes = sorted({min(size, largest) for size in BATCH_SIZES})
            direct = OnnxModel(repository / kind / MODEL, threads=1)
            images, answers = expected.golden["images"], expected.golden[kind]
            result[f"{kind}_onnx"] = _worst(images, answers, direct, sizes)
            result[f"{kind}_triton"] = max(
                _worst(images, answers, infer, sizes) for infer in (by_grpc, by_http)
            )
            result[f"{kind}_milliseconds"] = float(
                np.median(milliseconds(by_grpc, (1, *expected.image_shape), REQUESTS))
            )
            for name in ("onnx", "triton"):
                worst = result[f"{kind}_{name}"]
                if worst > parameters.tolerance:
                    raise CheckFailed(
                        f"{name} answers of model {kind} differ from the golden ones by {worst:.2e}; "
                        f"export.tolerance allows {parameters.tolerance:.0e}"
                    )
    rounded = {
        kind: {name: float(f"{result[f'{kind}_{name}']:.1e}") for name in ("onnx", "triton")}
        for kind in expected.models
    }
    costs = {
        kind: {"precision": model["precision"], **model["cost"]}
        for kind, model in expected.models.items()
        if "precision" in model
    }
    reduced = {"reduced": costs} if costs else {}
    write_json(output / "serving.json", {"tolerance": parameters.tolerance, "models": rounded} | reduced)
    return result


def _infer(client: Client, kind: str, output: str, images: np.ndarray) -> np.ndarray:
    return client.infer(kind, images)[output]


def _worst(images: np.ndarray, answers: np.ndarray, infer: Infer, sizes: list[int]) -> float:
    """Return the largest difference to the right answers over batches of these sizes."""
    return max(
        difference(
            np.resize(answers, (size, *answers.shape[1:])),
            infer(np.resize(images, (size, *images.shape[1:]))),
        )["max_difference"]
        for size in sizes
    )
