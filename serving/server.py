"""The embedded Triton server: the real Triton on this machine's CPU, on loopback, for checks and trials.

The binary comes from the PyPI package nvidia-pytriton, in an environment of its own, since it needs other
versions of its dependencies. The backend `onnxruntime` is `serving/backend/model.py` on its Python backend.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import psutil

from serving.repository import CONFIG, model_names, read_config
from unlabeled.errors import CheckFailed, InputError

VARIABLE = "UNLABELED_TRITON"
BACKEND = Path(__file__).parent / "backend"
HOST = "127.0.0.1"
# A proxy that the environment names has no business on loopback.
LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))
CACHE_BYTES = 64 << 20
START_SECONDS = 120.0
NO_LIBRARY = "error while loading shared libraries"
STOP_SECONDS = 20.0


def triton_environment() -> Path:
    """Return the Triton server's virtual environment: $UNLABELED_TRITON, else `.venv-triton` beside this one.

    Raises:
        InputError: there is none.
    """
    folder = Path(os.environ.get(VARIABLE) or Path(sys.prefix).parent / ".venv-triton")
    if not (folder / "bin" / "python").exists():
        raise InputError(f"no Triton environment at {folder}: run `make setup`, or name one in {VARIABLE}")
    return folder


class EmbeddedTriton:
    """A context in which Triton serves a model repository on loopback.

    All models are loaded at the start, and can be loaded and unloaded through the API (explicit control). The
    server ends with the context, and nothing of it remains; SIGTERM has to be an exception for that, as the
    commands and the steps make it. It also ends with a process that is killed, which leaves a temporary folder of
    3 MB, and, if killed while the server starts, its stubs and their shared memory. Where a model asks for a
    response cache, the server has one, of 64 MB.

    Args:
        http_port, grpc_port, metrics_port: 0 takes a free one.
        arguments: further arguments of `tritonserver`.
        backend: folder of the backend `onnxruntime`: ours, or a native one built for this server.

    Attributes:
        http_url, grpc_url, metrics_url: `127.0.0.1:PORT`.
        process: the running server.
        log: its log file, while it runs.

    Raises:
        InputError: no Triton environment, no repository, a port that is taken, or a model that does not load; with
            the reason.
        CheckFailed: the server does not get ready in time.
    """

    def __init__(
        self,
        repository: Path | str,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        arguments: tuple[str, ...] = (),
        backend: Path = BACKEND,
    ) -> None:
        self.repository = Path(repository).resolve()
        self.wanted_ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        self.arguments = arguments
        self.backend = backend
        model_names(self.repository)
        self.environment = triton_environment()

    def __enter__(self) -> "EmbeddedTriton":
        self.folder = Path(tempfile.mkdtemp(prefix="unlabeled-triton-", dir=_plain_folder()))
        self.log = self.folder / "log"
        self.process: subprocess.Popen | None = None
        self.region = f"unlabeled-{uuid.uuid4().hex[:12]}-"
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def http_url(self) -> str:
        return f"{HOST}:{self.ports['http']}"

    @property
    def grpc_url(self) -> str:
        return f"{HOST}:{self.ports['grpc']}"

    @property
    def metrics_url(self) -> str:
        return f"{HOST}:{self.ports['metrics']}"

    @property
    def addresses(self) -> str:
        """The three addresses, for a reader."""
        return f"HTTP {self.http_url}  gRPC {self.grpc_url}  metrics {self.metrics_url}/metrics"

    def wait(self) -> None:
        """Wait until this process gets Ctrl-C, or a SIGTERM that is handled as one.

        Raises:
            CheckFailed: the server ended unasked.
        """
        assert self.process is not None
        with contextlib.suppress(KeyboardInterrupt):
            # A signal that comes just before an endless wait would be heard at its end only.
            while (code := self.process.poll()) is None:
                time.sleep(0.2)
            # Ended by a signal, it says nothing worth reading.
            reason = f": {self._errors()}" if code else ""
            raise CheckFailed(f"Triton ended unasked, with code {code}{reason}")

    def control(self, action: str, model: str) -> None:
        """`load` or `unload` a model; a loaded one is read again while what was loaded before keeps serving.

        Raises:
            InputError: Triton cannot do it (with its reason); what was loaded before keeps serving.
        """
        request = urllib.request.Request(
            f"http://{self.http_url}/v2/repository/models/{model}/{action}", data=b"{}"
        )
        try:
            LOOPBACK.open(request, timeout=START_SECONDS).close()
        except urllib.error.HTTPError as error:
            raise InputError(f"Triton cannot {action} model {model}: {_reason(error.read())}") from None

    def stop(self) -> None:
        """End the server: orderly, or by force after 20 seconds. Nothing of it is left behind."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        # A server that was killed leaves its stubs and their shared memory: both carry the region's name.
        for stub in psutil.process_iter(["cmdline"]):
            if any(argument.startswith(self.region) for argument in stub.info["cmdline"] or []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    stub.kill()
        for region in Path("/dev/shm").glob(f"{self.region}*"):
            region.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        python = _python_of(self.environment)
        packages = Path(python["packages"])
        triton = packages / "pytriton" / "tritonserver"
        stub = triton / "python_backend_stubs" / python["version"] / "triton_python_backend_stub"
        if not stub.is_file():
            raise InputError(f"{self.environment} holds no whole Triton server: run `make clean setup`")
        # The Python backend starts its processes by a shell, which takes a space in the path for its end.
        models = self.folder / "models"
        models.symlink_to(self.repository)
        backends = self.folder / "backends"
        shutil.copytree(triton / "backends" / "python", backends / "python")
        shutil.copy(stub, backends / "python")
        shutil.copytree(self.backend, backends / "onnxruntime")
        # Debian packs Python's shared library by itself, so that it may have been put into the environment.
        libraries = (python["library"], self.environment / "lib", packages / "nvidia_pytriton.libs")
        # Nothing of our environment leaks into the server's: its stubs import their own NumPy, onnxruntime.
        environment = {
            "PATH": f"{self.environment / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "PYTHONPATH": str(packages),
            "HOME": str(self.folder),
            "LANG": "C.UTF-8",
            # This is the CPU server: a GPU stays out of sight.
            "CUDA_VISIBLE_DEVICES": "",
        }
        # Checked before the start: the readiness probe would be answered by whoever has the port.
        for name, port in self.wanted_ports.items():
            if port:
                _check_free(name, port)
        for last_attempt in (False, False, True):
            self.ports = {name: port or _free_port() for name, port in self.wanted_ports.items()}
            command = self._command(triton / "bin" / "tritonserver", models, backends)
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                    cwd=self.folder, start_new_session=True,
                )  # fmt: skip
            if self._wait_ready(self.process):
                return
            # Another process may have taken a free port since it was found.
            if last_attempt or "in use" not in self.log.read_text(errors="replace"):
                raise InputError(f"Triton cannot serve {self.repository}: {self._errors()}")

    def _command(self, server: Path, models: Path, backends: Path) -> list[str]:
        cache = [
            f"--cache-config=local,size={CACHE_BYTES}",
            f"--cache-directory={server.parents[1] / 'caches'}",
        ]
        # The server ends with the thread that started it, even when that is killed.
        with_parent = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
        return [
            *with_parent, str(server),
            f"--model-repository={models}", f"--backend-directory={backends}",
            "--model-control-mode=explicit", "--load-model=*",
            # Else a version that was once refused keeps it from being ready, though the one before answers.
            "--strict-readiness=false",
            f"--backend-config=python,shm-region-prefix-name={self.region}",
            f"--http-address={HOST}", f"--http-port={self.ports['http']}",
            f"--grpc-address={HOST}", f"--grpc-port={self.ports['grpc']}",
            f"--metrics-address={HOST}", f"--metrics-port={self.ports['metrics']}",
            "--metrics-config=summary_latencies=true", "--allow-gpu-metrics=false",
            "--exit-timeout-secs=10", *(cache if self._caches() else []), *self.arguments,
        ]  # fmt: skip

    def _caches(self) -> bool:
        """Whether a model asks for a response cache: without one in the server it would load and cache nothing."""
        return any(read_config(path).response_cache.enable for path in self.repository.glob(f"*/{CONFIG}"))

    def _wait_ready(self, process: subprocess.Popen) -> bool:
        # Triton opens its ports when every model is loaded, and ends when one cannot be.
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            # Triton waits for a stub that cannot start as for one that takes long.
            if process.poll() is not None or self._stub_errors():
                return False
            with contextlib.suppress(OSError):
                LOOPBACK.open(f"http://{self.http_url}/v2/health/ready", timeout=5).close()
                return True
            time.sleep(0.02)
        raise CheckFailed(f"Triton is not ready after {START_SECONDS:.0f} seconds: {self._errors()}")

    def _errors(self) -> str:
        """Return Triton's own words: the errors in its log, else its last lines."""
        lines = self.log.read_text(errors="replace").splitlines()
        # Without a GPU there is always an error about CUDA.
        errors = [line.partition("] ")[2] for line in lines if line.startswith("E") and "Cuda" not in line]
        errors += self._stub_errors()
        return " | ".join(" ".join(line.split()) for line in (errors or lines)[-4:])

    def _stub_errors(self) -> list[str]:
        """Return what a stub says that cannot start: it speaks for itself, each time in the same words."""
        lines = self.log.read_text(errors="replace").splitlines()
        return list(dict.fromkeys(line for line in lines if NO_LIBRARY in line))


def _python_of(environment: Path) -> dict[str, str]:
    """Return where an environment's Python keeps its packages and its shared library, and its version."""
    code = (
        "import json, sysconfig; print(json.dumps({'packages': sysconfig.get_path('purelib'), "
        "'library': sysconfig.get_config_var('LIBDIR'), 'version': sysconfig.get_python_version()}))"
    )
    command = [str(environment / "bin" / "python"), "-I", "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise InputError(f"the Python of {environment} does not run: run `make clean setup`")
    return json.loads(answer.stdout)


def _plain_folder() -> str:
    """Return a folder for temporary files without a character that is special to a shell.

    The Python backend starts its processes by a shell; one that cannot start would be waited for in vain.
    """
    folders = (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")
    for folder in folders:
        if re.fullmatch(r"[\w./-]+", folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise InputError(f"no folder for temporary files with a plain name can be written: {', '.join(folders)}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _check_free(name: str, port: int) -> None:
    with socket.socket() as probe:
        # A port whose last connections are only closing is free, for Triton too.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            what = "taken" if error.errno == errno.EADDRINUSE else f"not to be had ({error.strerror.lower()})"
            raise InputError(
                f"port {port} is {what}; give another with --{name}-port, 0 takes a free one"
            ) from None


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip()
