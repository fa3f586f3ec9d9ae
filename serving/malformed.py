"""Malformed requests of many kinds, among good ones: what a server has to survive."""

import http.client
import json
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import numpy as np
import psutil
from tritonclient.grpc import service_pb2 as messages

from serving.client import Client, channel_options
from serving.load import INFER, raw_request
from unlabeled.errors import CheckFailed

SECONDS = 30.0
Random = np.random.Generator


@dataclass(frozen=True)
class Target:
    """A model with a single output, and what it is asked for.

    Attributes:
        images: uint8 (B, C, H, W) of a good request.
        answer: float32 (B, D), right to them.
        max_batch_size: of the model.
    """

    http_url: str
    grpc_url: str
    model: str
    images: np.ndarray
    answer: np.ndarray
    max_batch_size: int


def _http(
    target: Target, change: dict, data: bytes | None = None, path: str = "", length: object = None
) -> bytes:
    """Return a binary HTTP request for an answer in which something is not as it should be."""
    data = target.images.tobytes() if data is None else data
    tensor = {"name": "images", "datatype": "UINT8", "shape": target.images.shape}
    tensor |= {"parameters": {"binary_data_size": len(data)}} | change
    head = json.dumps({"inputs": [tensor]}).encode()
    header = f"Inference-Header-Content-Length: {len(head) if length is None else length}"
    return raw_request(path or f"/v2/models/{target.model}/infer", head + data, header)


def _json(target: Target, body: bytes) -> bytes:
    return raw_request(f"/v2/models/{target.model}/infer", body)


def _grpc(
    target: Target, name: str = "images", datatype: str = "UINT8", shape: object = None, data: bytes | None = None,
    model: str = "", version: str = "",
) -> bytes:  # fmt: skip
    tensor = messages.ModelInferRequest.InferInputTensor(
        name=name, datatype=datatype, shape=target.images.shape if shape is None else shape
    )
    data = target.images.tobytes() if data is None else data
    return messages.ModelInferRequest(
        model_name=model or target.model, model_version=version, inputs=[tensor], raw_input_contents=[data]
    ).SerializeToString()


def _shape(target: Target, *first: int) -> list[int]:
    return [*first, *target.images.shape[len(first) :]]


def _batch(target: Target, random: Random) -> tuple[list[int], bytes]:
    size = target.max_batch_size + int(random.integers(1, 9))
    return _shape(target, size), bytes(size * target.images[0].nbytes)


def _garbage(random: Random, most: int = 2000) -> bytes:
    return random.bytes(int(random.integers(1, most)))


def _cut(data: bytes, random: Random) -> bytes:
    return data[: int(random.integers(1, len(data)))]


Make = Callable[[Target, Random], bytes]
HTTP: dict[str, Make] = {
    "shape": lambda t, r: _http(t, {"shape": _shape(t, len(t.images), int(r.integers(4, 99)))}),
    "rank": lambda t, r: _http(t, {"shape": [int(t.images.size)]}),
    "negative shape": lambda t, r: _http(t, {"shape": _shape(t, -1)}),
    "huge shape": lambda t, r: _http(t, {"shape": [1, t.images.shape[1], 2**31, 2**31]}),
    "type": lambda t, r: _http(
        t, {"datatype": str(r.choice(["FP32", "INT8", "BYTES", "FP16", "UINT9", ""]))}
    ),
    "name": lambda t, r: _http(t, {"name": str(r.choice(["image", "", "Images", "ímages"]))}),
    "model": lambda t, r: _http(t, {}, path=f"/v2/models/m{r.integers(99)}/infer"),
    "version": lambda t, r: _http(t, {}, path=f"/v2/models/{t.model}/versions/{r.integers(2, 99)}/infer"),
    "no version": lambda t, r: _http(t, {}, path=f"/v2/models/{t.model}/versions/new/infer"),
    "oversize batch": lambda t, r: _http(t, {"shape": (batch := _batch(t, r))[0]}, batch[1]),
    "empty batch": lambda t, r: _http(t, {"shape": _shape(t, 0)}, b""),
    "too few bytes": lambda t, r: _http(t, {}, _cut(t.images.tobytes(), r)),
    "too many bytes": lambda t, r: _http(t, {}, t.images.tobytes() + _garbage(r)),
    "stated size": lambda t, r: _http(t, {"parameters": {"binary_data_size": int(r.integers(1, 2**40))}}),
    "header too long": lambda t, r: _http(t, {}, length=int(r.integers(10**6, 10**12))),
    "header too short": lambda t, r: _http(t, {}, length=int(r.integers(1, 20))),
    "header no number": lambda t, r: _http(t, {}, length=str(r.choice(["-1", "abc", "1e3", "0x20"]))),
    "bad JSON": lambda t, r: _json(t, _cut(json.dumps({"inputs": [{"name": "images"}]}).encode(), r)),
    "JSON of another form": lambda t, r: _json(
        t, [b"[]", b"3", b"null", b'{"inputs": 3}', b"{}"][r.integers(5)]
    ),
    "garbage": lambda t, r: _json(t, _garbage(r)),
    "truncated body": lambda t, r: _http(t, {})[: -int(r.integers(1, t.images.nbytes))],
    "no HTTP": lambda t, r: b"\x00" + _garbage(r) + b"\r\n\r\n",
}
GRPC: dict[str, Make] = {
    "gRPC shape": lambda t, r: _grpc(t, shape=_shape(t, len(t.images), int(r.integers(4, 99)))),
    "gRPC rank": lambda t, r: _grpc(t, shape=[t.images.size]),
    "gRPC negative shape": lambda t, r: _grpc(t, shape=_shape(t, -1)),
    "gRPC type": lambda t, r: _grpc(t, datatype=str(r.choice(["FP32", "INT8", "BYTES", "UINT9", ""]))),
    "gRPC name": lambda t, r: _grpc(t, name=str(r.choice(["image", "", "Images"]))),
    "gRPC model": lambda t, r: _grpc(t, model=f"m{r.integers(99)}"),
    "gRPC version": lambda t, r: _grpc(t, version=str(r.choice(["7", "new", "-1"]))),
    "gRPC oversize batch": lambda t, r: _grpc(t, shape=(batch := _batch(t, r))[0], data=batch[1]),
    "gRPC empty batch": lambda t, r: _grpc(t, shape=_shape(t, 0), data=b""),
    "gRPC too few bytes": lambda t, r: _grpc(t, data=_cut(t.images.tobytes(), r)),
    "gRPC too many bytes": lambda t, r: _grpc(t, data=t.images.tobytes() + _garbage(r)),
    "garbage protobuf": lambda t, r: b"\xff" + _garbage(r),
    "truncated protobuf": lambda t, r: _grpc(t)[: -int(r.integers(1, t.images.nbytes))],
}
KINDS = HTTP | GRPC


def storm(target: Target, requests: int, seed: int = 0, threads: int = 4) -> Counter[str]:
    """Send malformed requests of all kinds in turn, a good one after each third, several at a time.

    Returns:
        How many of each kind were sent, all refused; of `good` ones, all answered rightly.

    Raises:
        CheckFailed: a malformed request was answered, or a good one was not, or wrongly.
    """

    def work(thread: int) -> Counter[str]:
        random, sent = np.random.default_rng([seed, thread]), Counter[str]()
        names = list(KINDS)
        with (
            Client(target.grpc_url, retry_seconds=0) as by_grpc,
            Client(target.http_url, "http", retry_seconds=0) as by_http,
            grpc.insecure_channel(target.grpc_url, options=channel_options(target.grpc_url)) as channel,
        ):
            infer = channel.unary_unary(INFER)
            for number in range(thread, requests, threads):
                kind = names[number % len(names)]
                request = KINDS[kind](target, random)
                refused = _refused_http(target, request) if kind in HTTP else _refused_grpc(infer, request)
                if not refused:
                    raise CheckFailed(f"a malformed request was answered: {kind}, {request[:300]!r}")
                sent[kind] += 1
                if random.integers(3) == 0:
                    client = (by_grpc, by_http)[random.integers(2)]
                    [answer] = client.infer(target.model, target.images).values()
                    if not np.allclose(answer, target.answer, atol=1e-5):
                        raise CheckFailed(f"after {kind} a good request was answered wrongly")
                    sent["good"] += 1
        return sent

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, range(threads)), Counter())


def _refused_http(target: Target, request: bytes) -> bool:
    """Send bytes and end sending: an error status, or a connection that is closed without an answer."""
    host, port = target.http_url.split(":")
    with socket.create_connection((host, int(port)), SECONDS) as connection:
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            answer = http.client.HTTPResponse(connection, method="POST")
            answer.begin()
            return answer.status >= 400
        except (ConnectionError, http.client.BadStatusLine):
            return True


def _refused_grpc(infer: grpc.UnaryUnaryMultiCallable, request: bytes) -> bool:
    try:
        infer(request, timeout=SECONDS)
    except grpc.RpcError as error:
        return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return False


def memory(pid: int) -> int:
    """Return the resident bytes of a server and its backends' processes."""
    server = psutil.Process(pid)
    return sum(process.memory_info().rss for process in (server, *server.children(recursive=True)))
