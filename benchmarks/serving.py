"""Serving: the embedded Triton server against FastAPI + onnxruntime, and onnxruntime in this process.

Servers and load generator share the cores, or each have their own (--server-cores); all are measured in turns within
one run of four minutes. The options of export (precision, response cache, warm-up) are measured over the same model
without.

python benchmarks/serving.py [--seconds 2.5] [--rounds 2] [--backend FOLDER] [--server-cores N] [--json]
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
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Setting:
    """How everything is measured.

    Args:
        seconds: of each measurement.
        rounds: of which the fastest counts.
        backend: folder of Triton's backend `onnxruntime`.
        server_cores, generator_cores: where servers run, and what asks them.
    """

    seconds: float
    rounds: int
    backend: Path
    server_cores: frozenset[int]
    generator_cores: frozenset[int]

    def measure(self, url: str, model: str, images: np.ndarray, clients: int) -> Load:
        """Ask Triton over gRPC."""
        with on(self.generator_cores):
            return measure(url, model, images, clients, self.seconds, warm_up=0.5)

    def measure_http(self, url: str, request: bytes, clients: int) -> Load:
        """Ask a server over HTTP, an image a request."""
        with on(self.generator_cores):
            return measure_http(url, request, 1, clients, self.seconds, warm_up=0.5)


@contextmanager
def on(cores: frozenset[int]) -> Iterator[None]:
    """Keep this thread, and what it starts, on some of the cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def images_like(served: Served, count: int) -> np.ndarray:
    """Return random images of the training size, uint8 (count, C, H, W)."""
    return np.random.default_rng(0).integers(0, 256, (count, *served.image_shape)).astype(np.uint8)


@contextmanager
def fastapi(model: Path, shape: tuple[int, ...], workers: int) -> Iterator[str]:
    """Serve a model with FastAPI; its `HOST:PORT`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MODEL": str(model), "SHAPE": ",".join(map(str, shape))}
    command = [sys.executable, str(FASTAPI), str(port), str(workers)]
    # A group of its own, so that no worker outlives it.
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        example = raw_request("/infer", bytes(int(np.prod(shape))))
        while True:
            try:
                measure_http(f"127.0.0.1:{port}", example, 1, 4 * workers, seconds=0.2, warm_up=0)
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


def direct(path: Path, images: np.ndarray, setting: Setting) -> Load:
    """onnxruntime in this process at its best batch: one run over all of the servers' cores, or one on each."""
    cores, seconds = len(setting.server_cores), setting.seconds / 4
    found = []
    with on(setting.server_cores):
        for batch in DIRECT_BATCHES:
            inputs = np.resize(images, (batch, *images.shape[1:]))
            for workers in {1, cores}:
                found.append(measure_direct(path, inputs, seconds, workers, cores // workers))
    return best(found)


def row(what: str, value: float, bar: float | None, passed: bool, **loads: Any) -> dict[str, Any]:
    return {"what": what, "value": value, "bar": bar, "passed": passed, **loads}


def speed(folder: Path, name: str, setting: Setting) -> list[dict[str, Any]]:
    """Measure one model; the rounds of all that is compared alternate."""
    encoder, bar = SETUPS[name]
    served = ServedEncoder(encoder).eval()
    write_model(folder, _config("encoder", served), onnx_bytes(served))
    path = folder / "encoder" / MODEL
    image, batch = images_like(served, 1), images_like(served, 64)
    loads: dict[str, list[Load]] = defaultdict(list)
    with contextlib.ExitStack() as servers:
        with on(setting.server_cores):
            triton = servers.enter_context(EmbeddedTriton(folder, backend=setting.backend))
            workers = len(setting.server_cores)
            baseline = servers.enter_context(fastapi(path, served.image_shape, workers))
        asks: dict[str, Callable[[int], Load]] = {
            "grpc": partial(setting.measure, triton.grpc_url, "encoder", image),
            "http": partial(setting.measure_http, triton.http_url, triton_request("encoder", image)),
            "fastapi": partial(setting.measure_http, baseline, raw_request("/infer", image.tobytes())),
        }
        for _ in range(setting.rounds):
            for clients in CLIENTS:
                for server, ask in asks.items():
                    loads[f"{server} {clients}"].append(ask(clients))
            if name == "small encoder":
                loads["batches of 64"].append(setting.measure(triton.grpc_url, "encoder", batch, 4))
            loads["onnxruntime"].append(direct(path, image, setting))
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


def options(folder: Path, name: str, setting: Setting) -> list[dict[str, Any]]:
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
    with contextlib.ExitStack() as servers:
        with on(setting.server_cores):
            triton = servers.enter_context(EmbeddedTriton(folder / "options", backend=setting.backend))
        for _ in range(setting.rounds):
            for model in models:
                loads[model].append(setting.measure(triton.grpc_url, model, image, 32))
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
        with EmbeddedTriton(repository, backend=setting.backend) as triton, Client(triton.grpc_url) as client:
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
    parser.add_argument(
        "--server-cores", type=int, default=0, metavar="N",
        help="of the servers' own, the load generator has the others; 0: they share all",
    )  # fmt: skip
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if not 0 <= arguments.server_cores < len(cores):
        parser.error(f"--server-cores: of the {len(cores)} cores here the load generator needs one")
    own = arguments.server_cores
    setting = Setting(
        arguments.seconds,
        arguments.rounds,
        arguments.backend,
        server_cores=frozenset(cores[:own] if own else cores),
        generator_cores=frozenset(cores[own:]),
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(SETUPS):
            rows += speed(Path(folder) / str(number), name, setting)
            rows += options(Path(folder) / f"{number}-options", name, setting)
        rows.append(parity(Path(folder) / "parity", arguments.backend))
    if arguments.json:
        print(json.dumps({"cores": len(cores), "load": os.getloadavg(), "rows": rows}, indent=2))
    else:
        for found in rows:
            bar = f"bar {found['bar']:g}  {'ok' if found['passed'] else 'MISSED'}" if found["bar"] else ""
            print(f"{found['what']:<66} {found['value']:>9.3g}  {bar}")
            for key, load in found.get("loads", {}).items():
                latency = f"p50 {load['p50_milliseconds']:>6.1f} ms  p99 {load['p99_milliseconds']:>6.1f} ms"
                used = f"{load['own_cores']:.2f} cores in this process"
                print(f"  {key:<14} {load['images_per_second']:>7,.0f} images/s  {latency}  {used}")
        print(f"load average {os.getloadavg()[0]:.1f} on {len(cores)} cores")
    if not all(found["passed"] for found in rows):
        raise CheckFailed("a serving bar was missed")


if __name__ == "__main__":
    main()
