"""A load generator for a served model, and the same model without a server to compare with."""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2 as messages

from serving.client import channel_options
from unlabeled.errors import CheckFailed
from unlabeled.export.onnx import OnnxModel

INFER = "/inference.GRPCInferenceService/ModelInfer"
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Load:
    """What a load test measured.

    Attributes:
        images_per_second, p50_milliseconds, p99_milliseconds: of requests, as a client sees them.
        requests: answered within the time.
        own_cores: how many cores this process kept busy: towards 1 the generator, one thread of Python, is the
            limit and not the server. Of `measure_direct` it is the model's work.
    """

    images_per_second: float
    p50_milliseconds: float
    p99_milliseconds: float
    requests: int
    own_cores: float


def measure(
    url: str, model: str, images: np.ndarray, clients: int, seconds: float, warm_up: float = 1.0
) -> Load:
    """Let `clients` ask Triton for the same images again and again over gRPC, each waiting for its answer first.

    Args:
        url: gRPC address, `HOST:PORT`.
        images: uint8 (B, C, H, W) of one request.

    Raises:
        grpc.RpcError: a request failed.
    """
    request = grpc_request(model, images)

    async def run() -> Load:
        async with grpc.aio.insecure_channel(url, options=channel_options(url)) as channel:
            infer = partial(channel.unary_unary(INFER), request)
            return await _load([infer] * clients, len(images), seconds, warm_up)

    return asyncio.run(run())


def measure_http(
    url: str, request: bytes, images: int, clients: int, seconds: float, warm_up: float = 1.0
) -> Load:
    """Let `clients` send the same HTTP/1.1 request of so many images again and again, a connection each.

    Args:
        url: `HOST:PORT`.
        request: head and body, see `triton_request` and `raw_request`.

    Raises:
        CheckFailed: an answer's status is not 200.
        OSError: the server is not there.
    """

    async def run() -> Load:
        streams = [await asyncio.open_connection(*url.split(":")) for _ in range(clients)]
        load = await _load([partial(_ask, *stream, request) for stream in streams], images, seconds, warm_up)
        for _, writer in streams:
            writer.close()
        return load

    return asyncio.run(run())


def grpc_request(model: str, images: np.ndarray) -> bytes:
    """Return the gRPC message that asks Triton for a model's answer, for the method `INFER`.

    Once, as bytes: a generator shares the cores with the server, so it spends as little as it can.
    """
    tensor = messages.ModelInferRequest.InferInputTensor(name="images", datatype="UINT8", shape=images.shape)
    request = messages.ModelInferRequest(
        model_name=model, inputs=[tensor], raw_input_contents=[images.tobytes()]
    )
    return request.SerializeToString()


def triton_request(model: str, images: np.ndarray) -> bytes:
    """Return the HTTP request that asks Triton for a model's answer, bytes in and bytes out."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": images.shape}
    tensor |= {"parameters": {"binary_data_size": images.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    header = f"Inference-Header-Content-Length: {len(head)}"
    return raw_request(f"/v2/models/{model}/infer", head + images.tobytes(), header)


def raw_request(path: str, body: bytes, *headers: str) -> bytes:
    """Return an HTTP/1.1 POST request of bytes."""
    fixed = ("Host: localhost", "Content-Type: application/octet-stream", f"Content-Length: {len(body)}")
    return "\r\n".join([f"POST {path} HTTP/1.1", *fixed, *headers, "", ""]).encode() + body


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = LENGTH.search(head)
    body = await reader.readexactly(int(length[1])) if length else b""
    if not head.startswith(b"HTTP/1.1 200"):
        raise CheckFailed(f"a request failed: {head.splitlines()[0].decode()} {body[:200]!r}")


async def _load(asks: Sequence[Callable[[], Awaitable]], images: int, seconds: float, warm_up: float) -> Load:
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    begin = loop.time() + warm_up
    end = begin + seconds
    used = 0.0

    async def client(ask: Callable[[], Awaitable]) -> None:
        while (started := loop.time()) < end:
            await ask()
            if started >= begin:
                latencies.append(loop.time() - started)

    async def mark_begin() -> None:
        nonlocal used
        await asyncio.sleep(warm_up)
        used = time.process_time()

    await asyncio.gather(mark_begin(), *(client(ask) for ask in asks))
    return _result(latencies, images, loop.time() - begin, time.process_time() - used)


def measure_direct(
    path: Path, images: np.ndarray, seconds: float, workers: int = 1, threads: int = 0
) -> Load:
    """Run an ONNX file on the same images again and again in this process, without a server.

    Args:
        images: uint8 (B, C, H, W) of one run.
        workers: runs at a time.
        threads: of onnxruntime in each run; 0: one per core.
    """
    model = OnnxModel(path, threads)
    for _ in range(3):
        model(images)
    latencies: list[float] = []
    begin, used = time.perf_counter(), time.process_time()

    def work(_: int) -> None:
        while (started := time.perf_counter()) < begin + seconds:
            model(images)
            latencies.append(time.perf_counter() - started)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    return _result(latencies, len(images), time.perf_counter() - begin, time.process_time() - used)


def _result(latencies: Sequence[float], images: int, elapsed: float, used: float) -> Load:
    p50, p99 = (float(value) * 1e3 for value in np.percentile(latencies, [50, 99]))
    return Load(len(latencies) * images / elapsed, p50, p99, len(latencies), used / elapsed)
