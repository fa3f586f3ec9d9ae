"""A client of the served models, over gRPC or HTTP."""

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import tritonclient.grpc
import tritonclient.http
from geventhttpclient.response import HTTPParseError
from tritonclient.utils import InferenceServerException

from unlabeled.errors import CheckFailed, InputError

REFUSED = ("StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND", "400", "404")
UNAVAILABLE = ("StatusCode.UNAVAILABLE", "503")
# What a server says of a model that it is just loading or changing.
NO_VERSION = "no available versions"
HEADERS = "UNLABELED_TRITON_HEADERS"
AUTHORITY = "UNLABELED_TRITON_CA"
SECURE = ("https://", "grpcs://")
LOOPBACK = ("127.0.0.1:", "localhost:", "[::1]:")


class Refused(InputError):
    """A server that is there does not take the request: no such model or version, or other images than it knows."""


def channel_options(url: str) -> list[tuple[str, int]]:
    """The options of a gRPC channel: messages of any size; no proxy of the environment on the way to this machine."""
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    return [*options, ("grpc.enable_http_proxy", 0)] if url.startswith(LOOPBACK) else options


class Client:
    """Asks a Triton server for the answers of its models, from any number of threads.

    Args:
        url: `HOST:PORT`; `https://` or `grpcs://` before it asks for TLS. A certificate authority that the system does
            not know is named by `UNLABELED_TRITON_CA`, a PEM file.
        protocol: `grpc` (port 8001) or `http` (port 8000).
        retry_seconds: for how long a server that is not there, or not ready, is asked again.
        timeout_seconds: for how long an answer is waited for.
        ssl: whether to speak TLS, as with an ingress.
        headers: sent with each request; default: those of the environment, `UNLABELED_TRITON_HEADERS`.

    Raises:
        InputError: `url` or a header of the environment is none, or there is no such file.
    """

    def __init__(
        self,
        url: str,
        protocol: Literal["grpc", "http"] = "grpc",
        retry_seconds: float = 10.0,
        timeout_seconds: float = 60.0,
        ssl: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.url, self.protocol = url, protocol
        self.retry_seconds, self.timeout = retry_seconds, timeout_seconds
        self.ssl = ssl or url.startswith(SECURE)
        self.address = url.partition("://")[2] if url.startswith(SECURE) else url
        host, _, port = self.address.rpartition(":")
        if not host or "/" in host or not (port.isdecimal() and 0 < int(port) < 65536):
            raise InputError(f"'{url}' is no address of a server: HOST:PORT, as 127.0.0.1:8001")
        found = _environment_headers() if headers is None else headers
        # gRPC takes no capitals.
        self.headers = {name.lower(): value for name, value in found.items()}
        self.triton: Any = tritonclient.grpc if protocol == "grpc" else tritonclient.http
        self.settings: dict[str, Any] = {"headers": self.headers}
        if protocol == "grpc":
            self.settings["client_timeout"] = timeout_seconds
        self.authority = os.environ.get(AUTHORITY) or None
        if self.authority and not os.path.isfile(self.authority):
            raise InputError(f"{AUTHORITY} names no file: {self.authority}")
        self._own, self._opened = threading.local(), list[Any]()

    @property
    def connection(self) -> Any:
        """This thread's connection: tritonclient's over HTTP hangs when several threads share one."""
        if not hasattr(self._own, "connection"):
            options: dict[str, Any] = {"network_timeout": self.timeout}
            if self.protocol == "grpc":
                options = {"channel_args": channel_options(self.address), "root_certificates": self.authority}
            elif self.authority:
                options["ssl_options"] = {"ca_certs": self.authority}
            options["ssl"] = self.ssl
            self._own.connection = self.triton.InferenceServerClient(self.address, **options)
            self._opened.append(self._own.connection)
        return self._own.connection

    def check_server(self) -> None:
        """Raise InputError where no server answers at the address."""
        try:
            self.connection.is_server_live(**self.settings)
        except (InferenceServerException, OSError, HTTPParseError) as error:
            reason = error.message() if isinstance(error, InferenceServerException) else error
            raise InputError(f"no Triton server at {self.url}: {reason}{_untrusted(reason)}") from None

    def infer(self, model: str, images: np.ndarray, version: str = "") -> dict[str, np.ndarray]:
        """Return a model's outputs by name, a row per image.

        Args:
            model: `encoder`, `classifier` or `clusterer`.
            images: uint8 (B, C, H, W), any height and width.
            version: of the model; default: the newest.

        Raises:
            Refused: the server refuses the request (shape, batch, model, version).
            InputError: the server is not there, or the images are not uint8.
            CheckFailed: the server fails at it, or does not answer in time.
        """
        try:
            images = np.asarray(images)
        except ValueError as error:
            raise InputError(f"images are no array: {error}") from None
        if images.dtype != np.uint8:
            raise InputError(f"images are {images.dtype}, expected is uint8 (B, C, H, W)")
        tensor = self.triton.InferInput("images", list(images.shape), "UINT8")
        tensor.set_data_from_numpy(np.ascontiguousarray(images))
        deadline = time.monotonic() + self.retry_seconds
        pause = 0.05
        while True:
            try:
                result = self.connection.infer(model, [tensor], model_version=version, **self.settings)
                break
            except InferenceServerException as error:
                status, reason = error.status() or "", error.message() or ""
                if status == "StatusCode.UNAVAILABLE":
                    reason += _untrusted(reason) or "; is this the gRPC port?"
                if status in UNAVAILABLE or NO_VERSION in reason:
                    failure: Exception = InputError(
                        f"Triton at {self.url} is not ready to answer {model}: {reason}"
                    )
                elif status in REFUSED:
                    raise Refused(f"Triton refuses the request to {model}: {reason}") from None
                else:
                    raise CheckFailed(
                        f"Triton failed at the request to {model}: {reason or status}"
                    ) from None
            except TimeoutError:
                raise CheckFailed(f"Triton at {self.url} did not answer {model} in time") from None
            except HTTPParseError as error:
                failure = InputError(f"no answer over HTTP from {self.url}: {error}; is this the HTTP port?")
            except OSError as error:
                failure = InputError(f"no Triton server at {self.url}: {error}{_untrusted(error)}")
            if time.monotonic() + pause > deadline:
                raise failure from None
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        response = result.get_response()
        outputs = response["outputs"] if isinstance(response, dict) else response.outputs
        names = [output["name"] if isinstance(output, dict) else output.name for output in outputs]
        return {name: result.as_numpy(name) for name in names}

    def close(self) -> None:
        """Close the connections of all threads."""
        for connection in self._opened:
            connection.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _untrusted(reason: object) -> str:
    """Return what to do where TLS failed because nobody vouches for the server."""
    if "CERTIFICATE_VERIFY_FAILED" not in str(reason):
        return ""
    return f"; if its authority is your own, name its PEM file in {AUTHORITY}"


def in_batches(infer: Callable[[np.ndarray], np.ndarray], images: np.ndarray, size: int) -> np.ndarray:
    """Return the answers to images, at least one, asked for in batches of at most `size`."""
    parts = np.array_split(images, -(-len(images) // size))
    return np.concatenate([infer(part) for part in parts])


def _environment_headers() -> dict[str, str]:
    """Return the headers of UNLABELED_TRITON_HEADERS, one a line."""
    lines = [line for line in os.environ.get(HEADERS, "").splitlines() if line.strip()]
    pairs = [line.partition(":") for line in lines]
    if not all(name.strip() and colon for name, colon, _ in pairs):
        raise InputError(f"{HEADERS} holds a line that is no header: `Name: value`, one a line")
    return {name.strip(): value.strip() for name, _, value in pairs}
