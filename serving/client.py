"""A client of the served models, over gRPC or HTTP."""

import time
from typing import Any, Literal

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from unlabeled.errors import CheckFailed, InputError

REFUSED = ("StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND", "400", "404")
UNAVAILABLE = ("StatusCode.UNAVAILABLE", "503")
# What a server says of a model that it is just loading or changing.
NO_VERSION = "no available versions"


LOOPBACK = ("127.0.0.1:", "localhost:", "[::1]:")


def _channel(url: str) -> list[tuple[str, int]]:
    """The options of a gRPC channel: messages of any size; no proxy of the environment on the way to this machine."""
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    return [*options, ("grpc.enable_http_proxy", 0)] if url.startswith(LOOPBACK) else options


class Client:
    """Asks a Triton server for the answers of its models.

    Args:
        url: `HOST:PORT`.
        protocol: `grpc` (port 8001) or `http` (port 8000).
        retry_seconds: for how long a server that is not there, or not ready, is asked again.
        timeout_seconds: for how long an answer is waited for.
    """

    def __init__(
        self,
        url: str,
        protocol: Literal["grpc", "http"] = "grpc",
        retry_seconds: float = 10.0,
        timeout_seconds: float = 60.0,
    ) -> None:
        self.url = url
        self.retry_seconds = retry_seconds
        if protocol == "grpc":
            self.triton: Any = tritonclient.grpc
            self.connection = tritonclient.grpc.InferenceServerClient(url, channel_args=_channel(url))
            self.settings: dict[str, Any] = {"client_timeout": timeout_seconds}
        else:
            self.triton = tritonclient.http
            self.connection = tritonclient.http.InferenceServerClient(url, network_timeout=timeout_seconds)
            self.settings = {}

    def check_server(self) -> None:
        """Raise InputError where no server answers at the address."""
        try:
            self.connection.is_server_live(**self.settings)
        except (InferenceServerException, OSError) as error:
            raise InputError(f"no Triton server at {self.url}: {_told(error)}") from None

    def infer(self, model: str, images: np.ndarray, version: str = "") -> dict[str, np.ndarray]:
        """Return a model's outputs by name, a row per image.

        Args:
            model: `encoder`, `classifier` or `clusterer`.
            images: uint8 (B, C, H, W), any height and width.
            version: of the model; default: the newest.

        Raises:
            InputError: the server is not there, or refuses the request (shape, type, batch, model, version).
            CheckFailed: the server fails at it.
        """
        tensor = self.triton.InferInput("images", list(images.shape), np_to_triton_dtype(images.dtype))
        tensor.set_data_from_numpy(np.ascontiguousarray(images))
        deadline = time.monotonic() + self.retry_seconds
        pause = 0.05
        while True:
            try:
                result = self.connection.infer(model, [tensor], model_version=version, **self.settings)
                break
            except InferenceServerException as error:
                status, reason = error.status() or "", error.message() or ""
                if status in UNAVAILABLE or NO_VERSION in reason:
                    failure: Exception = InputError(
                        f"Triton at {self.url} is not ready to answer {model}: {reason}"
                    )
                elif status in REFUSED:
                    raise InputError(f"Triton refuses the request to {model}: {reason}") from None
                else:
                    raise CheckFailed(
                        f"Triton failed at the request to {model}: {reason or status}"
                    ) from None
            except OSError as error:
                failure = InputError(f"no Triton server at {self.url}: {error}")
            if time.monotonic() + pause > deadline:
                raise failure from None
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        response = result.get_response()
        outputs = response["outputs"] if isinstance(response, dict) else response.outputs
        names = [output["name"] if isinstance(output, dict) else output.name for output in outputs]
        return {name: result.as_numpy(name) for name in names}

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _told(error: Exception) -> str:
    return error.message() if isinstance(error, InferenceServerException) else str(error)
