"""A load that goes on while something else happens to the server, and keeps every answer."""

import asyncio
import itertools
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2 as messages

from serving.client import channel_options
from serving.load import INFER, grpc_request

START_SECONDS = 30.0


@dataclass(frozen=True)
class Answer:
    """What came back of one request.

    Attributes:
        model, version: that answered; the version is empty where it failed.
        started, ended: `time.monotonic()`.
        output: float32 (B, D), the model's only output; None where it failed.
        error: empty where it did not fail.
    """

    model: str
    version: str
    started: float
    ended: float
    output: np.ndarray | None
    error: str = ""


class Soak:
    """A context in which clients ask one model after the other for the same images, unversioned, without retries.

    Args:
        url: gRPC address, `HOST:PORT`.
        images: uint8 (B, C, H, W) of each request, by model.
        clients: at a time, each waiting for an answer before it asks anew.

    Attributes:
        answers: in the order in which they came; complete once the context is left.
    """

    def __init__(self, url: str, images: Mapping[str, np.ndarray], clients: int = 4) -> None:
        self.url, self.clients = url, clients
        self.answers: list[Answer] = []
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._run, daemon=True)
        self._requests = {model: grpc_request(model, array) for model, array in images.items()}

    def __enter__(self) -> "Soak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait(self, count: int, seconds: float = START_SECONDS) -> None:
        """Wait until that many more answers have come.

        Raises:
            TimeoutError: they do not come in time.
        """
        wanted, deadline = len(self.answers) + count, time.monotonic() + seconds
        while len(self.answers) < wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{count} answers did not come in {seconds:.0f} s")
            time.sleep(0.005)

    def _run(self) -> None:
        asyncio.run(self._clients())

    async def _clients(self) -> None:
        async with grpc.aio.insecure_channel(self.url, options=channel_options(self.url)) as channel:
            infer = channel.unary_unary(INFER)
            await asyncio.gather(*(self._client(infer, first) for first in range(self.clients)))

    async def _client(self, infer: grpc.aio.UnaryUnaryMultiCallable, first: int) -> None:
        models = list(self._requests)
        for turn in itertools.count(first):
            if self._stop.is_set():
                return
            model, started = models[turn % len(models)], time.monotonic()
            try:
                response = messages.ModelInferResponse.FromString(await infer(self._requests[model]))
            except grpc.aio.AioRpcError as error:
                failure = f"{error.code().name}: {error.details()}"
                self.answers.append(Answer(model, "", started, time.monotonic(), None, failure))
                continue
            output = np.frombuffer(response.raw_output_contents[0], np.float32)
            output = output.reshape(list(response.outputs[0].shape))
            self.answers.append(Answer(model, response.model_version, started, time.monotonic(), output))
