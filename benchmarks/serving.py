"""Serving: the embedded Triton server against FastAPI + onnxruntime, and onnxruntime in this process.

Servers and load generator share the cores; all are measured in turns within one run of four minutes. The options
of export (precision, response cache, warm-up) are measured over the same model without.

python benchmarks/serving.py [--seconds 2.5] [--rounds 2] [--backend FOLDER] [--json]
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.pop(0)  # the folder of this script, in which its own name would hide the package `serving`

import numpy as np
import torch
from torch import nn

from serving.client import Client
from serving.load import Load, measure, measure_direct, measure_http, raw_request, triton_request
from serving.repository import MODEL, model_config, write_model
from serving.server import BACKEND, EmbeddedTriton
from serving.timing import milliseconds
from unlabeled.errors import CheckFailed
from unlabeled.export.models import Served, ServedClassifier, ServedEncoder
from unlabeled.export.onnx import OnnxModel, onnx_bytes
from unlabeled.export.parity import BATCH_SIZES, difference, torch_outputs
from unlabeled.export.quantize import reduce_precision
from unlabeled.nets.encoder import Encoder

# name: encoder, bar of the throughput at 32 clients over FastAPI's
SETUPS: dict[str, tuple[Encoder, float]] = {
    "small encoder": (Encoder("small_resnet", 64, 2, (1, 28, 28), 0.3, 0.35), 1.5),
    "resnet18": (Encoder("resnet18", 64, 2, (3, 32, 32), 0.5, 0.25), 2.6),
}
CLIENTS = (1, 8, 32)
DIRECT_BATCHES = (1, 8, 32)
# Of client batches of 64 with the small encoder, and of 32 clients with ResNet18, over onnxruntime at its best.
DIRECT_BARS = {"small encoder": 0.65, "resnet18": 0.75}
P99_BAR = 0.5
PARITY_BAR = 1e-5
FASTAPI = Path(__file__).parent / "baselines" / "fastapi_server.py"
CORES = len(os.sched_getaffinity(0))


def images_like(served: Served, count: int) -> np.ndarray:
    """Return random images of the training size, uint8 (count, C, H, W)."""
    return np.random.default_rng(0).integers(0, 256, (count, *served.image_shape)).astype(np.uint8)


@contextmanager
def fastapi(model: Path, shape: tuple[int, ...]) -> Iterator[str]:
    """Serve a model with FastAPI, a worker per core; its `HOST:PORT`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MODEL": str(model), "SHAPE": ",".join(map(str, shape))}
    command = [sys.executable, str(FASTAPI), str(port), str(CORES)]
    # A group of its own, so that no worker outlives it.
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        example = raw_request("/infer", bytes(int(np.prod(shape))))
        while True:
            try:
                measure_http(f"127.0.0.1:{port}", example, 1, 4 * CORES, seconds=0.2, warm_up=0)
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise CheckFailed("the FastAPI server does not start") from None
                time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def best(loads: list[Load]) -> Load:
    """Return the fastest of several rounds: what else the machine does only ever slows one down."""
    return max(loads, key=lambda load: load.images_per_second)


def direct(path: Path, images: np.ndarray, seconds: float) -> Load:
    """onnxruntime in this process at its best batch: one run over all cores, or one on each."""
    return best(
        [
            measure_direct(path, np.resize(images, (batch, *images.shape[1:])), seconds, workers, CORES // workers)
            for batch in DIRECT_BATCHES
            for workers in {1, CORES}
        ]
    )  # fmt: skip


def row(what: str, value: float, bar: float | None, passed: bool, **loads: Any) -> dict[str, Any]:
    return {"what": what, "value": value, "bar": bar, "passed": passed, **loads}


def speed(folder: Path, name: str, seconds: float, rounds: int, backend: Path) -> list[dict[str, Any]]:
    """Measure one model; the rounds of all that is compared alternate."""
    encoder, bar = SETUPS[name]
    served = ServedEncoder(encoder).eval()
    write_model(folder, _config("encoder", served), onnx_bytes(served))
    path = folder / "encoder" / MODEL
    image, batch = images_like(served, 1), images_like(served, 64)
    loads: dict[str, list[Load]] = defaultdict(list)
    with EmbeddedTriton(folder, backend=backend) as triton, fastapi(path, served.image_shape) as baseline:
        servers: dict[str, Callable[[int], Load]] = {
            "grpc": lambda clients: measure(triton.grpc_url, "encoder", image, clients, seconds, 0.5),
            "http": lambda clients: measure_http(
                triton.http_url, triton_request("encoder", image), 1, clients, seconds, 0.5
            ),
            "fastapi": lambda clients: measure_http(
                baseline, raw_request("/infer", image.tobytes()), 1, clients, seconds, 0.5
            ),
        }
        for _ in range(rounds):
            for clients in CLIENTS:
                for server, ask in servers.items():
                    loads[f"{server} {clients}"].append(ask(clients))
            if name == "small encoder":
                loads["batches of 64"].append(measure(triton.grpc_url, "encoder", batch, 4, seconds, 0.5))
            loads["onnxruntime"].append(direct(path, image, seconds / 4))
    found = {key: best(value) for key, value in loads.items()}
    batched, plain = max((found["grpc 32"], found["http 32"]), key=rate), found["fastapi 32"]
    over = rate(batched) / rate(plain)
    tail = batched.p99_milliseconds / plain.p99_milliseconds
    last = found.get("batches of 64", batched)
    over_direct = rate(last) / rate(found["onnxruntime"])
    direct_bar = DIRECT_BARS[name]
    what = "4 clients, batches of 64" if name == "small encoder" else "32 clients"
    return [
        row(f"{name}, 32 clients: Triton over FastAPI, images/s", over, bar, over >= bar,
            loads={key: vars(load) for key, load in found.items()}),
        row(f"{name}, 32 clients: p99 of Triton over FastAPI's", tail, P99_BAR, tail <= P99_BAR),
        row(f"{name}, {what}: Triton over onnxruntime, images/s", over_direct, direct_bar, over_direct >= direct_bar),
    ]  # fmt: skip


def options(folder: Path, name: str, seconds: float, rounds: int, backend: Path) -> list[dict[str, Any]]:
    """Measure what each option of export brings to one model, at 32 clients over the same model without."""
    encoder, _ = SETUPS[name]
    served = ServedEncoder(encoder).eval()
    exact, image = onnx_bytes(served), images_like(served, 1)
    models = {"float32": exact, "response_cache": exact}
    models |= {kind: reduce_precision(exact, kind, images_like(served, 64)) for kind in ("int8", "float16")}
    for model, content in models.items():
        cached = model == "response_cache"
        write_model(folder / "options", _config(model, served, response_cache=cached), content)
    loads: dict[str, list[Load]] = defaultdict(list)
    with EmbeddedTriton(folder / "options", backend=backend) as triton:
        for _ in range(rounds):
            for model in models:
                loads[model].append(measure(triton.grpc_url, model, image, 32, seconds, 0.5))
    found = {model: best(value) for model, value in loads.items()}
    rows = [
        row(f"{name}, 32 clients: {model} over float32, images/s", rate(load) / rate(found["float32"]), None, True)
        for model, load in found.items()
        if model != "float32"
    ]  # fmt: skip
    rows[0]["loads"] = {model: vars(load) for model, load in found.items()}
    first = {}
    for warmup in ((), (64,)):
        repository = folder / f"warmed-{len(warmup)}"
        write_model(repository, _config("encoder", served, warmup=warmup), exact)
        with EmbeddedTriton(repository, backend=backend) as triton, Client(triton.grpc_url) as client:
            ask = partial(client.infer, "encoder")
            first[warmup] = float(milliseconds(ask, images_like(served, 64).shape, 1)[0])
    told = f"{name}, first request of 64 images: {first[()]:.1f} ms, warmed {first[(64,)]:.1f} ms; ratio"
    return [*rows, row(told, first[()] / first[(64,)], None, True)]


def _config(name: str, served: Served, **options: Any) -> Any:
    channels, *side = served.image_shape
    size = served.encoder.feature_dim
    return model_config(name, channels, served.output, size, max_batch_size=64, side=side, **options)


def rate(load: Load) -> float:
    return load.images_per_second


def parity(folder: Path, backend: Path) -> dict[str, Any]:
    """Compare the probabilities of torch, onnxruntime and Triton over several batch sizes."""
    torch.manual_seed(0)
    encoder = SETUPS["resnet18"][0]
    served = ServedClassifier(encoder, nn.Linear(encoder.feature_dim, 10)).eval()
    config = model_config("classifier", served.image_shape[0], served.output, 10, max_batch_size=64)
    write_model(folder, config, onnx_bytes(served))
    direct = OnnxModel(folder / "classifier" / MODEL)
    worst = {"onnxruntime": 0.0, "triton": 0.0}
    with EmbeddedTriton(folder, backend=backend) as server, Client(server.grpc_url) as client:
        for size in BATCH_SIZES:
            images = images_like(served, size)
            expected = torch_outputs(served, images)
            answers = {
                "onnxruntime": direct(images),
                "triton": client.infer("classifier", images)["probabilities"],
            }
            for name, answer in answers.items():
                worst[name] = max(worst[name], difference(expected, answer)["max_difference"])
    value = max(worst.values())
    what = "torch against ONNX against Triton, probabilities"
    return row(what, value, PARITY_BAR, value <= PARITY_BAR, **worst)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--backend", type=Path, default=BACKEND, help="folder of another backend `onnxruntime`"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(SETUPS):
            how = name, arguments.seconds, arguments.rounds, arguments.backend
            rows += speed(Path(folder) / str(number), *how)
            rows += options(Path(folder) / f"{number}-options", *how)
        rows.append(parity(Path(folder) / "parity", arguments.backend))
    if arguments.json:
        print(json.dumps({"cores": CORES, "load": os.getloadavg(), "rows": rows}, indent=2))
    else:
        for found in rows:
            bar = f"bar {found['bar']:g}  {'ok' if found['passed'] else 'MISSED'}" if found["bar"] else ""
            print(f"{found['what']:<66} {found['value']:>9.3g}  {bar}")
            for key, load in found.get("loads", {}).items():
                latency = f"p50 {load['p50_milliseconds']:>6.1f} ms  p99 {load['p99_milliseconds']:>6.1f} ms"
                used = f"{load['own_cores']:.2f} cores in this process"
                print(f"  {key:<14} {load['images_per_second']:>7,.0f} images/s  {latency}  {used}")
        print(f"load average {os.getloadavg()[0]:.1f} on {CORES} cores")
    if not all(found["passed"] for found in rows):
        raise CheckFailed("a serving bar was missed")


if __name__ == "__main__":
    main()
