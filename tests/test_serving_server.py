"""The life of the embedded server, and the step that checks a repository with it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from serving_fixtures import exported_run, region_processes

from serving.check import check_serving
from serving.client import Client
from serving.index import Index
from serving.repository import model_config, write_model
from serving.server import BACKEND, EmbeddedTriton, triton_environment
from unlabeled.digest import file_digest
from unlabeled.errors import CheckFailed, InputError
from unlabeled.export.models import KINDS
from unlabeled.files import read_json, write_json
from unlabeled.parameters import Export

MODEL = "1/model.onnx"


@pytest.fixture(scope="module")
def run():
    return exported_run()


def test_a_changed_byte_is_caught_before_serving(run, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(run.repository, repository)
    data = bytearray((repository / "encoder" / MODEL).read_bytes())
    data[len(data) // 2] ^= 1
    (repository / "encoder" / MODEL).write_bytes(data)
    with pytest.raises(CheckFailed, match=r"encoder.*was changed"):
        check_serving(repository, run.index, tmp_path / "serving", Export())
    assert not (tmp_path / "serving").exists()


def test_a_folder_of_any_name_is_served(run, tmp_path):
    repository = tmp_path / "meine Läufe & $HOME" / "repository"
    shutil.copytree(run.repository, repository)
    with EmbeddedTriton(repository) as server, Client(server.grpc_url) as client:
        answer = client.infer("encoder", Index(run.index).golden["images"][:1])
    assert np.isfinite(answer["embedding"]).all()


def test_temporary_files_lie_where_a_shell_reads_the_name(run, tmp_path, monkeypatch):
    odd = tmp_path / "with space"
    odd.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(odd))
    with EmbeddedTriton(run.repository) as server:
        assert " " not in str(server.folder) and not list(odd.iterdir())


@pytest.mark.slow
def test_check_serving_proves_the_repository(run, tmp_path):
    result = check_serving(run.repository, run.index, tmp_path / "serving", Export(max_batch_size=32))
    written = read_json(tmp_path / "serving" / "serving.json")
    assert set(written["models"]) == set(KINDS) and written["tolerance"] == 1e-5
    for kind in KINDS:
        assert written["models"][kind]["triton"] < 1e-5 and result[f"{kind}_milliseconds"] > 0


@pytest.mark.slow
def test_wrong_answers_are_caught_by_the_golden_images(run, tmp_path):
    """Where file and digest were changed together, the golden answers still tell."""
    repository, index = tmp_path / "repository", tmp_path / "index"
    shutil.copytree(run.repository, repository)
    shutil.copytree(run.index, index)
    path = repository / "classifier" / MODEL
    model = onnx.load(path)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "head.bias")
    bias.CopyFrom(
        onnx.numpy_helper.from_array(
            onnx.numpy_helper.to_array(bias) + np.float32([0.01, 0, 0, 0]), "head.bias"
        )
    )
    onnx.save(model, path)
    models = read_json(index / "models.json")
    models["classifier"]["sha256"] = file_digest(path)
    write_json(index / "models.json", models)
    with pytest.raises(
        CheckFailed, match=r"answers of model classifier differ from the golden.*export.tolerance"
    ):
        check_serving(repository, index, tmp_path / "serving", Export())


def nothing_left(region, folder):
    shared = list(Path("/dev/shm").glob(f"{region}*"))
    return not region_processes(region) and not shared and not Path(folder).exists()


@pytest.mark.slow
def test_sigterm_ends_the_server_and_leaves_nothing(run, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(run.repository / "encoder", repository / "encoder")
    with EmbeddedTriton(repository) as server:
        folder = server.folder
        assert region_processes(server.region) and list(Path("/dev/shm").glob(f"{server.region}*"))
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(30) == 0
    assert nothing_left(server.region, folder)


@pytest.mark.slow
def test_sigterm_to_serve_while_the_server_starts_leaves_nothing(run, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(run.repository / "encoder", repository / "encoder")
    code = """if True:
        import sys, time
        from pathlib import Path
        import pipelines.cli as cli
        from serving.server import EmbeddedTriton, triton_environment

        def never_ready(self, process):
            ready(self, process)
            print(self.region, self.folder, flush=True)
            time.sleep(60)

        ready, EmbeddedTriton._wait_ready = EmbeddedTriton._wait_ready, never_ready
        folder = Path(sys.argv.pop())
        cli._run_folder = lambda *_: folder
        cli.main()
    """
    ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
    command = [sys.executable, "-c", code, "serve", *ports, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        region, folder = process.stdout.readline().split()
        assert region_processes(region)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 130
    assert nothing_left(region, folder)


@pytest.mark.slow
def test_a_killed_server_leaves_nothing(run, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(run.repository / "encoder", repository / "encoder")
    with EmbeddedTriton(repository) as server:
        folder = server.folder
        server.process.kill()
        server.process.wait()
    assert nothing_left(server.region, folder)


@pytest.mark.slow
def test_a_server_that_ends_unasked_is_a_failure(run, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(run.repository / "encoder", repository / "encoder")
    with EmbeddedTriton(repository) as server:
        server.process.terminate()
        with pytest.raises(CheckFailed, match="ended unasked, with code 0"):
            server.wait()


@pytest.mark.parametrize("name", ["http", "grpc", "metrics"])
def test_a_taken_port_is_told_before_the_start(run, name):
    """Another server's readiness is not taken for this one's."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(
                InputError, match=f"port {port} is taken; give another with --{name}-port, 0 takes a"
            ),
            EmbeddedTriton(run.repository, **{f"{name}_port": port}),
        ):
            pass


@pytest.mark.slow
def test_the_server_ends_with_a_killed_parent(run, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(run.repository / "encoder", repository / "encoder")
    code = (
        "import sys; from serving.server import EmbeddedTriton\n"
        "with EmbeddedTriton(sys.argv[1]) as server:\n"
        "    print(server.region, server.folder, flush=True); server.wait()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(repository)], stdout=subprocess.PIPE, text=True
    )
    region, folder = parent.stdout.readline().split()
    assert region_processes(region)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while region_processes(region) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not region_processes(region) and not list(Path("/dev/shm").glob(f"{region}*"))
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_model_that_does_not_load_is_told_in_a_line(run, tmp_path):
    write_model(
        tmp_path,
        model_config("broken", 3, "embedding", 128, 8),
        (run.repository / "encoder" / MODEL).read_bytes()[:999],
    )
    with pytest.raises(InputError, match=r"Triton cannot serve .*broken") as caught, EmbeddedTriton(tmp_path):
        pass
    assert "\n" not in str(caught.value) and "Protobuf parsing failed" in str(caught.value)


@pytest.mark.slow
def test_a_server_is_not_ready_before_its_models_are(run, tmp_path):
    slow = tmp_path / "slow"
    shutil.copytree(BACKEND, slow)
    with (slow / "model.py").open("a") as backend:
        backend.write(
            "\nimport time\ninitialize = TritonPythonModel.initialize\n"
            "TritonPythonModel.initialize = lambda *arguments: (time.sleep(1), initialize(*arguments))[1]\n"
        )
    started = time.monotonic()
    with (
        EmbeddedTriton(run.repository, backend=slow) as server,
        Client(server.grpc_url, retry_seconds=0) as client,
    ):
        assert time.monotonic() - started > 1
        for kind in KINDS:
            client.infer(kind, Index(run.index).golden["images"][:1])


@pytest.mark.slow
def test_a_folder_that_is_no_model_keeps_triton_from_starting(run, tmp_path):
    """As at the root of a volume: the chart's `serving.claimPath` names a folder below it."""
    shutil.copytree(run.repository / "encoder", tmp_path / "encoder")
    (tmp_path / "lost+found").mkdir()
    with pytest.raises(InputError, match=r"lost\+found"), EmbeddedTriton(tmp_path):
        pass


def test_a_missing_environment_is_told_in_a_line(run, tmp_path, monkeypatch):
    monkeypatch.setenv("UNLABELED_TRITON", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"no Triton environment at .*none: run `make setup`"):
        EmbeddedTriton(run.repository)


def test_a_backend_that_cannot_start_is_told_at_once(run, tmp_path, monkeypatch):
    environment = tmp_path / "environment"
    # Of a link, cp would copy the link, and the stubs below were those of the environment itself.
    subprocess.run(["cp", "-rs", triton_environment().resolve(), environment], check=True)
    assert not environment.is_symlink()
    for stub in environment.rglob("triton_python_backend_stub"):
        stub.unlink()
        stub.write_text(
            '#!/bin/sh\necho "$0: error while loading shared libraries: libpython" >&2; exit 127\n'
        )
        stub.chmod(0o755)
    monkeypatch.setenv("UNLABELED_TRITON", str(environment))
    started = time.monotonic()
    with (
        pytest.raises(InputError, match=r"cannot serve .*error while loading shared libraries: libpython$"),
        EmbeddedTriton(run.repository),
    ):
        pass
    assert time.monotonic() - started < 30


def test_a_folder_without_models_is_told_in_a_line(tmp_path):
    with pytest.raises(InputError, match="is no Triton model repository"):
        EmbeddedTriton(tmp_path)


def test_index_of_another_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no index"):
        Index(tmp_path)
