"""A load generator for a served model, and the same model without a server to compare with."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2 as messages

from unlabeled.export.onnx import OnnxModel

INFER = "/inference.GRPCInferenceService/ModelInfer"
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@dataclass(frozen=True)
class Load:
    """What a load test measured: images per second, and the latency of a request in milliseconds."""

    images_per_second: float
    p50_milliseconds: float
    p99_milliseconds: float
    requests: int


def measure(
    url: str, model: str, images: np.ndarray, clients: int, seconds: float, warm_up: float = 1.0
) -> Load:
    """Let `clients` ask for the same images again and again, each waiting for an answer before it asks anew.

    Args:
        url: gRPC address, `HOST:PORT`.
        images: uint8 (B, C, H, W) of one request.

    Raises:
        grpc.RpcError: a request failed.
    """
    return asyncio.run(_measure(url, model, images, clients, seconds, warm_up))


async def _measure(
    url: str, model: str, images: np.ndarray, clients: int, seconds: float, warm_up: float
) -> Load:
    tensor = messages.ModelInferRequest.InferInputTensor(name="images", datatype="UINT8", shape=images.shape)
    # Bytes in, bytes out: the generator shares the cores with the server, so it spends as little as it can.
    request = messages.ModelInferRequest(
        model_name=model, inputs=[tensor], raw_input_contents=[images.tobytes()]
    ).SerializeToString()
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    begin = loop.time() + warm_up
    end = begin + seconds

    async with grpc.aio.insecure_channel(url, options=UNLIMITED) as channel:
        infer = channel.unary_unary(INFER)

        async def client() -> None:
            while (started := loop.time()) < end:
                await infer(request)
                if started >= begin:
                    latencies.append(loop.time() - started)

        await asyncio.gather(*(client() for _ in range(clients)))
    elapsed = loop.time() - begin
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    return Load(len(latencies) * len(images) / elapsed, float(p50), float(p99), len(latencies))


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
    begin = time.perf_counter()

    def work(_: int) -> None:
        while (started := time.perf_counter()) < begin + seconds:
            model(images)
            latencies.append(time.perf_counter() - started)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    elapsed = time.perf_counter() - begin
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    return Load(len(latencies) * len(images) / elapsed, float(p50), float(p99), len(latencies))
