"""The serving contract, held against a live Triton server over gRPC and HTTP."""

import json
import shutil
import socket
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper
from PIL import Image
from serving_fixtures import CLASSES, CLUSTERS, exported_run, region_processes
from tls_proxy import https, self_signed
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from serving.client import Client
from serving.drift import embed
from serving.load import measure, measure_direct
from serving.predict import predict
from serving.repository import model_config, write_model
from serving.server import LOOPBACK, EmbeddedTriton
from serving.timing import milliseconds
from unlabeled.errors import CheckFailed, InputError
from unlabeled.export.models import KINDS, load_served
from unlabeled.export.onnx import OnnxModel
from unlabeled.export.parity import torch_outputs

MODEL = "1/model.onnx"


@pytest.fixture(scope="module")
def run():
    return exported_run()


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    repository = tmp_path_factory.mktemp("live") / "repository"
    shutil.copytree(run.repository, repository)
    with EmbeddedTriton(repository) as server:
        yield server


@pytest.fixture(scope="module", params=["grpc", "http"])
def client(request, server):
    url = server.grpc_url if request.param == "grpc" else server.http_url
    with Client(url, request.param) as client:
        yield client


@pytest.fixture
def alive(server, run):
    """After the test the server still answers rightly."""
    yield
    with Client(server.grpc_url, retry_seconds=0) as client:
        answer = client.infer("classifier", run.images(2))["probabilities"]
    assert np.abs(answer - OnnxModel(run.repository / "classifier" / MODEL)(run.images(2))).max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 16, 16), (32, 16, 16), (3, 50, 31)])
def test_answers_equal_torch(run, client, kind, shape):
    images = run.images(shape[0], seed=3, height=shape[1], width=shape[2])
    (answer,) = client.infer(kind, images).values()
    assert answer.dtype == np.float32
    assert np.abs(answer - torch_outputs(load_served(kind, **run.inputs), images)).max() < 1e-5


def test_many_clients_are_answered_in_batches_and_each_its_own(run, server):
    images = run.images(160, seed=5)
    expected = OnnxModel(run.repository / "classifier" / MODEL)(images)
    with triton.InferenceServerClient(server.grpc_url) as raw, Client(server.grpc_url) as client:
        before = raw.get_inference_statistics("classifier", as_json=True)["model_stats"][0]
        with ThreadPoolExecutor(16) as pool:
            ask = lambda i: client.infer("classifier", images[i : i + 1])["probabilities"]  # noqa: E731
            answers = np.concatenate(list(pool.map(ask, range(160))))
        after = raw.get_inference_statistics("classifier", as_json=True)["model_stats"][0]
    assert np.abs(answers - expected).max() < 1e-6
    inferences, executions = (
        int(after[key]) - int(before[key]) for key in ("inference_count", "execution_count")
    )
    assert inferences == 160 and executions < 160


def test_answers_by_class_name(run, server):
    with triton.InferenceServerClient(server.grpc_url) as raw:
        tensor = triton.InferInput("images", [1, 3, 16, 16], "UINT8")
        tensor.set_data_from_numpy(run.images(1))
        asked = [triton.InferRequestedOutput("probabilities", class_count=len(CLASSES))]
        answer = raw.infer("classifier", [tensor], outputs=asked).as_numpy("probabilities")
    assert {entry.decode().split(":")[2] for entry in answer[0]} == set(CLASSES)


@pytest.mark.parametrize(
    ("model", "images", "version", "reason"),
    [
        pytest.param("encoder", np.zeros((1, 1, 16, 16), np.uint8), "", "shape", id="channels"),
        pytest.param("encoder", np.zeros((3, 16, 16), np.uint8), "", "shape", id="rank"),
        pytest.param("encoder", np.zeros((33, 3, 16, 16), np.uint8), "", "32", id="oversized batch"),
        pytest.param("encoder", np.zeros((0, 3, 16, 16), np.uint8), "", "mismatch", id="empty batch"),
        pytest.param("decoder", np.zeros((1, 3, 16, 16), np.uint8), "", "decoder", id="unknown model"),
        pytest.param("encoder", np.zeros((1, 3, 16, 16), np.uint8), "7", "version", id="unknown version"),
        pytest.param(
            "encoder", np.zeros((1, 3, 16, 16), np.uint8), "one", "one|Not Found", id="version is no number"
        ),
    ],
)
def test_wrong_requests_are_refused(client, alive, model, images, version, reason):
    with pytest.raises(InputError, match=f"Triton refuses the request to {model}.*({reason})") as caught:
        client.infer(model, images, version)
    assert "\n" not in str(caught.value)


def test_wrong_input_name_is_refused(server, alive):
    with triton.InferenceServerClient(server.grpc_url) as raw:
        tensor = triton.InferInput("pictures", [1, 3, 16, 16], "UINT8")
        tensor.set_data_from_numpy(np.zeros((1, 3, 16, 16), np.uint8))
        with pytest.raises(InferenceServerException, match="pictures"):
            raw.infer("encoder", [tensor])


def post(server, path, body, content_type="application/json"):
    request = urllib.request.Request(
        f"http://{server.http_url}{path}", data=body, headers={"Content-Type": content_type}
    )
    with LOOPBACK.open(request, timeout=30) as response:
        return json.loads(response.read())


def test_json_without_a_client(server, run):
    images = run.images(1)
    tensor = {
        "name": "images",
        "shape": list(images.shape),
        "datatype": "UINT8",
        "data": images.ravel().tolist(),
    }
    (output,) = post(server, "/v2/models/classifier/infer", json.dumps({"inputs": [tensor]}).encode())[
        "outputs"
    ]
    assert (
        np.abs(np.array(output["data"]) - OnnxModel(run.repository / "classifier" / MODEL)(images)[0]).max()
        < 1e-6
    )


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b'{"inputs": 3}', b"\xff\x00"])
def test_bad_json_is_refused(server, alive, body):
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server, "/v2/models/encoder/infer", body)
    assert caught.value.code >= 400 and "error" in json.loads(caught.value.read())


def test_a_large_octet_stream_is_answered(server, run, alive):
    images = run.images(3, height=1200, width=1100)
    assert images.nbytes > 8 << 20
    tensor = {
        "name": "images",
        "shape": list(images.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": images.nbytes},
    }
    header = json.dumps({"inputs": [tensor]}).encode()
    request = urllib.request.Request(
        f"http://{server.http_url}/v2/models/classifier/infer",
        data=header + images.tobytes(),
        headers={
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(header)),
        },
    )
    with LOOPBACK.open(request, timeout=30) as response:
        (output,) = json.loads(response.read())["outputs"]
    expected = OnnxModel(run.repository / "classifier" / MODEL)(images)
    assert np.abs(np.reshape(output["data"], expected.shape) - expected).max() < 1e-6


def test_metrics_count_the_requests(server, client, run):
    def successes():
        with LOOPBACK.open(f"http://{server.metrics_url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith('nv_inference_request_success{model="clusterer"')
        )

    before = successes()
    client.infer("clusterer", run.images(2))
    assert successes() == before + 1


def test_corrupt_new_version_leaves_the_old_one_serving(server, run, alive):
    broken = server.repository / "encoder" / "2" / "model.onnx"
    broken.parent.mkdir()
    broken.write_bytes((run.repository / "encoder" / MODEL).read_bytes()[:5000])
    try:
        with pytest.raises(InputError, match="cannot load model encoder"):
            server.control("load", "encoder")
    finally:
        shutil.rmtree(broken.parent)
    with Client(server.grpc_url) as client:
        answer = client.infer("encoder", run.images(2), version="1")["embedding"]
    assert np.abs(answer - OnnxModel(run.repository / "encoder" / MODEL)(run.images(2))).max() < 1e-6


def test_a_new_version_takes_over(server, run):
    second = server.repository / "clusterer" / "2" / "model.onnx"
    second.parent.mkdir()
    shutil.copy(run.repository / "clusterer" / MODEL, second)
    server.control("load", "clusterer")
    with Client(server.grpc_url, retry_seconds=0) as client:
        assert client.infer("clusterer", run.images(2), version="2")["probabilities"].shape == (2, CLUSTERS)
        with pytest.raises(InputError, match="version"):
            client.infer("clusterer", run.images(2), version="1")


def test_killed_backend_fails_its_model_until_it_is_loaded_again(server, run, alive):
    stubs = [
        process for process in region_processes(server.region) if "/encoder/" in " ".join(process.cmdline())
    ]
    assert stubs
    for stub in stubs:
        stub.kill()
    with Client(server.grpc_url, retry_seconds=0) as client:
        with pytest.raises((CheckFailed, InputError)):
            for _ in range(len(stubs) + 1):
                client.infer("encoder", run.images(2))
        assert client.infer("classifier", run.images(2))["probabilities"].shape == (2, len(CLASSES))
        server.control("unload", "encoder")
        server.control("load", "encoder")
        answer = client.infer("encoder", run.images(2))["embedding"]
    assert np.abs(answer - OnnxModel(run.repository / "encoder" / MODEL)(run.images(2))).max() < 1e-6


def test_client_waits_for_a_model_that_is_not_there_yet(server, run):
    server.control("unload", "encoder")
    threading.Timer(0.5, server.control, ("load", "encoder")).start()
    with Client(server.grpc_url, retry_seconds=30) as client:
        assert client.infer("encoder", run.images(2))["embedding"].shape[0] == 2


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_no_server_is_told_in_a_line(run, protocol):
    with (
        Client("127.0.0.1:9", protocol, retry_seconds=0.2) as client,
        pytest.raises(InputError, match=r"127\.0\.0\.1:9"),
    ):
        client.infer("encoder", run.images(1))


def node_model(nodes, inputs, outputs):
    values = [
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in tensors]
        for tensors in (inputs, outputs)
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *values), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 8
    return model.SerializeToString()


def add_model(server, name, model, config=""):
    folder = server.repository / name
    (folder / "1").mkdir(parents=True)
    (folder / MODEL).write_bytes(model)
    (folder / "config.pbtxt").write_text(f'backend: "onnxruntime"\n{config}')
    server.control("load", name)


def ask(raw, model, outputs=None, **arrays):
    tensors = []
    for name, array in arrays.items():
        tensors.append(triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        tensors[-1].set_data_from_numpy(array)
    return raw.infer(
        model, tensors, outputs=outputs and [triton.InferRequestedOutput(name) for name in outputs]
    )


def test_configuration_is_completed_and_only_asked_outputs_are_answered(server):
    """Two inputs, two outputs, nothing but the backend configured: as the native backend does."""
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Mul", ["a", "b"], ["product"])]
    floats = TensorProto.FLOAT
    inputs, outputs = (
        [(name, floats, ["n", 2]) for name in names] for names in (("a", "b"), ("sum", "product"))
    )
    add_model(server, "pair", node_model(nodes, inputs, outputs))
    with triton.InferenceServerClient(server.grpc_url) as raw:
        config = raw.get_model_config("pair").config
        assert config.max_batch_size == 4 and config.HasField("dynamic_batching")
        assert [list(tensor.dims) for tensor in (*config.input, *config.output)] == [[2]] * 4
        arrays = {"a": np.float32([[1, 2]]), "b": np.float32([[3, 5]])}
        both = ask(raw, "pair", **arrays)
        assert both.as_numpy("sum").tolist() == [[4, 7]] and both.as_numpy("product").tolist() == [[3, 10]]
        one = ask(raw, "pair", outputs=["product"], **arrays)
        assert one.as_numpy("product").tolist() == [[3, 10]] and one.as_numpy("sum") is None


def test_outputs_without_elements(server):
    """The places of the non-zero elements of zeros are none."""
    nodes = [helper.make_node("NonZero", ["x"], ["places"])]
    tensors = [("x", TensorProto.FLOAT, ["n"])], [("places", TensorProto.INT64, [1, "k"])]
    add_model(server, "places", node_model(nodes, *tensors))
    with triton.InferenceServerClient(server.grpc_url) as raw:
        assert ask(raw, "places", x=np.float32([0, 2, 0, 3])).as_numpy("places").tolist() == [[1, 3]]
        assert ask(raw, "places", x=np.zeros(4, np.float32)).as_numpy("places").shape == (1, 0)


def test_a_failing_run_fails_its_request_only(server, alive):
    nodes = [helper.make_node("Gather", ["x", "i"], ["y"])]
    inputs = [("x", TensorProto.FLOAT, [3]), ("i", TensorProto.INT64, ["m"])]
    add_model(server, "gather", node_model(nodes, inputs, [("y", TensorProto.FLOAT, ["m"])]))
    x = np.arange(3, dtype=np.float32)
    with triton.InferenceServerClient(server.grpc_url) as raw:
        with pytest.raises(InferenceServerException, match="out of data bounds"):
            ask(raw, "gather", x=x, i=np.array([9]))
        assert ask(raw, "gather", x=x, i=np.array([2, 0])).as_numpy("y").tolist() == [2, 0]


def test_configurations_that_do_not_fit_are_refused(server, run, alive):
    strings = node_model(
        [helper.make_node("Identity", ["x"], ["y"])], *([(n, TensorProto.STRING, ["n", 1])] for n in "xy")
    )
    text = "max_batch_size: 4 "
    text += (
        'input {name: "x" data_type: TYPE_STRING dims: 1} output {name: "y" data_type: TYPE_STRING dims: 1}'
    )
    with pytest.raises(InputError, match="TYPE_STRING"):
        add_model(server, "strings", strings, text)
    model = (run.repository / "encoder" / MODEL).read_bytes()
    for name, change, reason in (
        ("size", {"output_size": 9}, "embedding"),
        ("channels", {"channels": 1}, "images"),
        ("output", {"output": "probabilities"}, "no tensor 'probabilities'"),
    ):
        settings = {"channels": 3, "output": "embedding", "output_size": 128, "max_batch_size": 8} | change
        write_model(server.repository, model_config(name=name, **settings), model)
        with pytest.raises(InputError, match=reason):
            server.control("load", name)


def test_drift_embeds_in_process_and_by_triton_alike(run, server):
    encoder, images = run.repository / "encoder", run.images(75, seed=4, height=20, width=31)
    here, there = embed(images, encoder, ""), embed(images, encoder, server.grpc_url)
    assert here.shape == (75, 128) and np.abs(here - there).max() < 1e-5


def test_predict_in_process_and_by_triton(run, server, tmp_path):
    pixels = run.images(80, seed=2)
    paths = [tmp_path / "one.png", tmp_path / "zwei ü.png"]
    for path, image in zip(paths, pixels[[0, 59]]):
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    rows = predict(paths, run.folder, neighbours=2)
    assert [row["nearest"][0]["id"] for row in rows] == ["image-000", "image-059"]
    assert rows[0]["nearest"][0]["similarity"] == pytest.approx(1, abs=1e-3) and len(rows[0]["nearest"]) == 2
    probabilities = OnnxModel(run.repository / "classifier" / MODEL)(pixels[[0, 59]])
    assert [row["class"] for row in rows] == [CLASSES[i] for i in probabilities.argmax(1)]
    matched = [CLASSES[2], "", CLASSES[0], CLASSES[3], CLASSES[1]]
    assert [row["cluster_class"] for row in rows] == [matched[int(row["cluster"][8:])] for row in rows]
    served = predict(paths, run.folder, server.grpc_url, neighbours=2)
    assert [(row["class"], row["cluster"], row["nearest"][0]["id"]) for row in served] == [
        (row["class"], row["cluster"], row["nearest"][0]["id"]) for row in rows
    ]
    json.dumps(rows)
    for name, content, reason in (
        ("a.png", b"", "empty"),
        ("b.png", b"text", "no image"),
        ("gone.png", None, "gone.png"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=reason):
            predict([tmp_path / name], run.folder)
    with pytest.raises(InputError, match="no index"):
        predict(paths, tmp_path)


def test_load_generator_counts_what_the_server_answers(run, server):
    images = run.images(4)
    with triton.InferenceServerClient(server.grpc_url) as raw:
        before = raw.get_inference_statistics("classifier", as_json=True)["model_stats"][0][
            "inference_stats"
        ]["success"]
        load = measure(server.grpc_url, "classifier", images, clients=3, seconds=0.5, warm_up=0)
        after = raw.get_inference_statistics("classifier", as_json=True)["model_stats"][0]["inference_stats"][
            "success"
        ]
    assert int(after["count"]) - int(before["count"]) == load.requests > 10
    assert 0 < load.p50_milliseconds <= load.p99_milliseconds
    direct = measure_direct(run.repository / "classifier" / MODEL, images, seconds=0.2)
    assert direct.images_per_second > 0


def test_every_timed_request_has_images_of_its_own():
    """The same ones would be answered from a response cache."""
    asked = []
    assert len(milliseconds(asked.append, (1, 3, 8, 8), 5, warm_up=2)) == 5
    assert len({images.tobytes() for images in asked}) == 7
    assert {(images.shape, images.dtype) for images in asked} == {((1, 3, 8, 8), np.dtype(np.uint8))}


def test_a_client_is_for_many_threads(client, run):
    """One connection over HTTP for all of them hangs for ever."""
    images = run.images(1)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(client.infer, "encoder", images) for _ in range(20)]
        assert {future.result(30)["embedding"].tobytes() for future in futures}


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "127.0.0.1", "", "host:port", "127.0.0.1:99999"])
def test_what_is_no_address_is_told_in_a_line(url):
    with pytest.raises(InputError, match="is no address of a server: HOST:PORT"):
        Client(url)


@pytest.mark.parametrize("images", [np.zeros((1, 3, 8, 8)), [[1]], [[1], [1, 2]], np.array([[None]])])
def test_what_are_no_images_is_told_in_a_line(images):
    with pytest.raises(InputError, match="images are"):
        Client("127.0.0.1:9").infer("encoder", images)


def test_the_other_protocols_port_is_told(server, run):
    for url, protocol, name in ((server.http_url, "grpc", "gRPC"), (server.grpc_url, "http", "HTTP")):
        with (
            Client(url, protocol, 0, 5) as client,
            pytest.raises(InputError, match=f"is this the {name} port"),
        ):
            client.infer("encoder", run.images(1))


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_that_does_not_answer_in_time_is_told(run, protocol):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        with Client(url, protocol, 0, 1) as client, pytest.raises(CheckFailed, match=r"in time|Deadline"):
            client.infer("encoder", run.images(1))


def test_headers_and_tls_come_from_the_environment_and_the_address(monkeypatch):
    monkeypatch.setenv("UNLABELED_TRITON_HEADERS", "Authorization: Bearer a:b\n\nX-Team: us")
    client = Client("grpcs://models.example:443")
    assert client.headers == {"authorization": "Bearer a:b", "x-team": "us"}
    assert client.ssl and client.address == "models.example:443"
    monkeypatch.setenv("UNLABELED_TRITON_HEADERS", "nothing")
    with pytest.raises(InputError, match="UNLABELED_TRITON_HEADERS holds a line that is no header"):
        Client("127.0.0.1:9")


@pytest.mark.parametrize(("protocol", "speaks"), [("grpc", "h2"), ("http", "http/1.1")])
def test_it_speaks_tls_to_a_server_whose_authority_it_is_told(
    server, run, tmp_path, monkeypatch, protocol, speaks
):
    certificate = self_signed(tmp_path / "certificate.pem")
    plain = server.grpc_url if protocol == "grpc" else server.http_url
    with https(f"http://{plain}", certificate, speaks) as url:
        with Client(url, protocol, retry_seconds=0) as client:
            for ask in (client.check_server, lambda: client.infer("encoder", run.images(3))):
                with pytest.raises(InputError, match="name its PEM file in UNLABELED_TRITON_CA"):
                    ask()
        monkeypatch.setenv("UNLABELED_TRITON_CA", str(certificate))
        with Client(url, protocol) as client:
            client.check_server()
            answer = client.infer("encoder", run.images(3))["embedding"]
    expected = OnnxModel(run.repository / "encoder" / MODEL)(run.images(3))
    np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-5)
    monkeypatch.setenv("UNLABELED_TRITON_CA", str(tmp_path / "other.pem"))
    with pytest.raises(InputError, match="UNLABELED_TRITON_CA names no file"):
        Client(plain, protocol)


def test_a_proxy_has_no_business_on_loopback(server, run, monkeypatch):
    for name in ("http_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert measure(server.grpc_url, "encoder", run.images(1), 1, 0.2, 0).requests
