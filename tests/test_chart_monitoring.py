"""What the chart watches is there to be watched: rules, dashboard and canary against a real Triton server."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import numpy as np
import onnx
import pytest
import tritonclient.grpc
import yaml
from chart_rendering import CHART, MONITORING, SIDECARS, VALUES, container, render, serving_pod
from onnx import TensorProto
from serving_fixtures import region_processes
from tritonclient.utils import InferenceServerException

from serving.client import Client
from serving.repository import MODEL, model_config, write_model
from serving.server import LOOPBACK, EmbeddedTriton
from unlabeled.errors import CheckFailed, InputError

KEY = "sesame"
# Cached answers must not hide a dead backend.
MODELS = {"encoder": False, "cached": True}
IMAGE = np.ones((1, 1, 8, 8), np.uint8)
# Prometheus itself makes `up`, and its operator gives every series where it comes from.
OWN_METRICS, OWN_LABELS = {"up"}, {"namespace", "pod", "job"}


@pytest.fixture(scope="module")
def chart() -> Iterator[helm.Chart]:
    with helm.Chart.load(CHART) as loaded:
        yield loaded


def mean_model() -> bytes:
    """The smallest model that keeps the contract: the mean of each channel."""
    images = onnx.helper.make_tensor_value_info("images", TensorProto.UINT8, ["b", 1, "h", "w"])
    embedding = onnx.helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["b", 1])
    nodes = [
        onnx.helper.make_node("Cast", ["images"], ["gray"], to=TensorProto.FLOAT),
        onnx.helper.make_node("ReduceMean", ["gray"], ["embedding"], axes=[2, 3], keepdims=0),
    ]
    graph = onnx.helper.make_graph(nodes, "mean", [images], [embedding])
    opset = [onnx.helper.make_opsetid("", 17)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


@pytest.fixture(scope="module")
def server(chart: helm.Chart, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedTriton]:
    """A real server with the arguments of the chart that are not the embedded server's own."""
    repository = tmp_path_factory.mktemp("repository")
    for name, cached in MODELS.items():
        config = model_config(name, 1, "embedding", 1, 8, instances=1, response_cache=cached)
        write_model(repository, config, mean_model())
    arguments = container(serving_pod(render(chart, VALUES["everything"])), "triton")["args"]
    restrictions = [
        argument.replace("$(TRITON_CONTROL_KEY)", KEY) for argument in arguments if "-restricted-" in argument
    ]
    assert len(restrictions) == 2
    with EmbeddedTriton(repository, arguments=(*restrictions, "--disable-auto-complete-config")) as running:
        yield running


@pytest.fixture(scope="module")
def exposed(server: EmbeddedTriton) -> str:
    # The port of the metrics opens a little after the server is ready.
    for _ in range(100):
        with contextlib.suppress(OSError):
            return LOOPBACK.open(f"http://{server.metrics_url}/metrics", timeout=10).read().decode()
        time.sleep(0.1)
    raise AssertionError("no metrics")


@pytest.fixture(scope="module")
def metrics(exposed: str) -> set[str]:
    return set(re.findall(r"^(nv_\w+)", exposed, re.MULTILINE))


def without_strings(expression: str) -> str:
    return re.sub(r'"[^"]*"', '""', expression)


def metrics_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression names: all words that are no function, label, range or operator."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|on)\s*\([^)]*\)", " ", without_strings(expression))
    return set(re.findall(r"\b[a-zA-Z_]\w*\b(?!\s*\()", bare)) - {"and", "or", "unless"}


def labels_in(expression: str) -> set[str]:
    """The labels that a PromQL expression matches or groups by."""
    bare = without_strings(expression)
    matched = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*""', bare)
    grouped = [
        label for group in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", bare) for label in group.split(",")
    ]
    return {label.strip() for label in matched + grouped}


def dashboard() -> dict[str, Any]:
    return json.loads((CHART / "dashboards" / "serving.json").read_text())


def rules(chart: helm.Chart, **serving: Any) -> list[dict[str, Any]]:
    values = {**VALUES["run on a claim"], "monitoring": MONITORING, "serving": {"run": "a", **serving}}
    [group] = render(chart, values)["PrometheusRule", ""]["spec"]["groups"]
    return group["rules"]


def adapter_rule() -> dict[str, Any]:
    """The rule for prometheus-adapter that the README gives."""
    blocks = re.findall(r"```yaml\n(.*?)```", (CHART / "README.md").read_text(), re.DOTALL)
    [rule] = [yaml.safe_load(block)["rules"]["custom"] for block in blocks if "seriesQuery" in block]
    return rule[0]


def expressions(chart: helm.Chart) -> dict[str, str]:
    """Every PromQL expression of the chart by where it stands."""
    found = {
        f"panel {panel['id']} {panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard()["panels"]
        for target in panel["targets"]
    }
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            found[f"variable {variable['name']}"] = (
                variable["query"]["query"].removeprefix("label_values(").rpartition(",")[0]
            )
    for mode, serving in (("", {}), (" with canary", SIDECARS)):
        for number, rule in enumerate(rules(chart, **serving)):
            found[f"rule {number} {rule['alert']}{mode}"] = rule["expr"]
    found["adapter"] = (
        adapter_rule()["metricsQuery"].replace("<<.LabelMatchers>>", "").replace("<<.GroupBy>>", "pod")
    )
    return found


def test_the_reading_of_expressions_is_right() -> None:
    expression = (
        'sum by (pod, model) (rate(nv_a{job="nv_x", model=~"a|b"}[5m])) / on (pod) up > 1e3 unless nv_b'
    )
    assert metrics_in(expression) == {"nv_a", "up", "nv_b"}
    assert labels_in(expression) == {"pod", "model", "job"}


def test_expressions_name_what_triton_exposes(chart: helm.Chart, exposed: str, metrics: set[str]) -> None:
    labels = set(re.findall(r'[{,](\w+)="', exposed)) | OWN_LABELS
    found = expressions(chart)
    assert len(found) > 30
    for place, expression in found.items():
        named = metrics_in(expression)
        assert named and named <= metrics | OWN_METRICS, place
        assert labels_in(expression) <= labels, place
        assert all(expression.count(left) == expression.count(right) for left, right in ("()", "[]", "{}")), (
            place
        )


def test_rules_have_all_that_prometheus_asks(chart: helm.Chart) -> None:
    found = render(chart, VALUES["everything"])["PrometheusRule", ""]
    assert found["apiVersion"] == "monitoring.coreos.com/v1"
    assert found["metadata"]["labels"]["release"] == "prometheus"
    assert found["spec"].keys() == {"groups"}
    [group] = found["spec"]["groups"]
    assert group.keys() == {"name", "rules"} and group["name"]
    for rule in group["rules"]:
        assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"[A-Z]\w+", rule["alert"]) and re.fullmatch(r"\d+m", rule["for"])
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"} and all(rule["annotations"].values())
        assert 'namespace="ml", job="fashion-unlabeled"' in rule["expr"]
        # A label that the expression sums away cannot be told.
        told = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert told <= labels_in(rule["expr"]) | rule["labels"].keys()
    names = [rule["alert"] for rule in group["rules"]]
    assert set(names) == {
        "TritonDown",
        "TritonModelNotReady",
        "TritonNoInference",
        "TritonErrors",
        "TritonQueue",
    }
    watched = [rule["labels"]["model"] for rule in group["rules"] if rule["alert"] == "TritonModelNotReady"]
    assert watched == ["encoder", "classifier", "clusterer"]


def test_monitor_scrapes_the_port_of_the_service(chart: helm.Chart) -> None:
    objects = render(chart, VALUES["everything"])
    monitor = objects["ServiceMonitor", ""]
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"].keys() == {"selector", "namespaceSelector", "endpoints"}
    assert monitor["spec"]["namespaceSelector"] == {"matchNames": ["ml"]}
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint == {"port": "metrics", "path": "/metrics", "interval": "10s", "scrapeTimeout": "10s"}
    assert endpoint["port"] in {port["name"] for port in objects["Service", ""]["spec"]["ports"]}
    # Scraped once, not a second time by annotation.
    assert (
        "prometheus.io/scrape" not in objects["Deployment", ""]["spec"]["template"]["metadata"]["annotations"]
    )
    alone = render(chart, VALUES["run on a claim"])["Deployment", ""]["spec"]["template"]["metadata"]
    assert alone["annotations"]["prometheus.io/scrape"] == "true"


def test_custom_objects_are_made_only_where_they_are_known(chart: helm.Chart) -> None:
    values = {**VALUES["run on a claim"], "monitoring": {**MONITORING, "crds": "detect"}}
    objects = render(chart, values)
    kinds = {kind for kind, _ in objects}
    # No ServiceMonitor, so by annotation.
    annotations = objects["Deployment", ""]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true"
    assert not kinds & {"ServiceMonitor", "PrometheusRule"} and "ConfigMap" in kinds


def test_dashboard_is_whole(chart: helm.Chart) -> None:
    found = render(chart, VALUES["everything"])["ConfigMap", "-dashboard"]
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    board = json.loads(found["data"]["unlabeled-serving.json"])
    assert board == dashboard()
    variables = {variable["name"] for variable in board["templating"]["list"]}
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 10
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & cells, panel["title"]
        cells |= own
        for target in panel["targets"]:
            assert (
                target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            )
            used = set(re.findall(r"\$(\w+)", target["expr"]))
            assert used <= variables | {"__rate_interval"}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels_in(target["expr"])


def test_adapter_serves_the_metric_that_the_autoscaler_asks_for(chart: helm.Chart) -> None:
    rule = adapter_rule()
    spec = render(chart, VALUES["autoscaling"])["HorizontalPodAutoscaler", ""]["spec"]
    assert rule["name"] == {"as": spec["metrics"][0]["pods"]["metric"]["name"]}
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}
    # All waiting by all requests: a mean over the models would count those that nobody asks.
    waited, requests = rule["metricsQuery"].split(" / ")
    assert re.fullmatch(r"sum\(increase\(nv_inference_queue_duration_us\{\S+\)\) by \(<<.GroupBy>>\)", waited)
    assert re.fullmatch(
        r"\(1 \+ sum\(increase\(nv_inference_request_success\{\S+\)\) by \(<<.GroupBy>>\)\)", requests
    )
    # Two scrapes at least have to lie in each range.
    ranges = [int(seconds) for seconds in re.findall(r"\[(\d+)s\]", rule["metricsQuery"])]
    schema = json.loads((CHART / "values.schema.json").read_text())
    interval = schema["properties"]["monitoring"]["properties"]["serviceMonitor"]["properties"][
        "intervalSeconds"
    ]
    assert ranges and all(seconds >= 2 * interval["maximum"] for seconds in ranges)


def wait_for(happened: Callable[[], bool], seconds: float) -> float:
    """Return after how many seconds it happened."""
    started = time.monotonic()
    while not happened():
        assert time.monotonic() - started < seconds, "it did not happen in time"
        time.sleep(0.05)
    return time.monotonic() - started


@pytest.fixture
def canary(chart: helm.Chart, server: EmbeddedTriton, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start the canary as the chart does, against this server; ends it in the end."""
    started: list[subprocess.Popen] = []

    def start(url: str = server.grpc_url, key: str = KEY) -> tuple[subprocess.Popen, Path]:
        found = container(serving_pod(render(chart, VALUES["everything"])), "canary")
        own = {"TRITON_URL": url, "ANSWERING": str(tmp_path / "answering"), "TRITON_CONTROL_KEY": key}
        environment = {entry["name"]: entry.get("value", "") for entry in found["env"]} | own
        _, option, program = found["command"]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, option, program],
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
        return process, tmp_path / "answering"

    yield start
    for process in started:
        process.kill()
        process.wait()


def answers(server: EmbeddedTriton) -> bool:
    image = np.random.default_rng().integers(0, 256, IMAGE.shape, np.uint8)
    with Client(server.grpc_url, retry_seconds=0) as client:
        try:
            given = [client.infer(model, image)["embedding"][0, 0] for model in MODELS]
            return bool(np.allclose(given, image.mean()))
        except (CheckFailed, InputError):
            return False


@pytest.mark.slow
def test_a_dead_backend_is_noticed_and_mended_within_ten_seconds(
    server: EmbeddedTriton, canary: Callable[..., Any]
) -> None:
    """The server says ready all the time, and is not started again."""
    process, answering = canary()
    wait_for(answering.exists, 60)
    pid = server.process.pid
    for stub in region_processes(server.region):
        stub.kill()
    assert not answers(server)
    LOOPBACK.open(f"http://{server.http_url}/v2/health/ready", timeout=5).close()
    started = time.monotonic()
    wait_for(lambda: not answering.exists(), 10)
    wait_for(lambda: answers(server), 10)
    assert time.monotonic() - started < 10
    wait_for(answering.exists, 10)
    assert server.process.pid == pid and server.process.poll() is None
    # A process that is the first of its container has to end on SIGTERM by itself.
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 0


@pytest.mark.slow
def test_a_model_that_is_gone_is_loaded_as_soon_as_that_works(
    server: EmbeddedTriton, canary: Callable[..., Any]
) -> None:
    """Until then the pod is not ready. Who has not the key cannot unload a model."""
    _, answering = canary()
    wait_for(answering.exists, 60)
    with contextlib.closing(tritonclient.grpc.InferenceServerClient(server.grpc_url)) as connection:
        with pytest.raises(InferenceServerException, match="restricted"):
            connection.unload_model("encoder")
        with pytest.raises(InputError, match="restricted"):
            server.control("unload", "encoder")
        model = server.repository / "encoder" / MODEL
        model.rename(model.with_suffix(".away"))
        connection.unload_model("encoder", headers={"triton-grpc-protocol-control-key": KEY})
    log = answering.with_name("log")
    wait_for(lambda: "encoder cannot be loaded" in log.read_text(), 15)
    assert not answering.exists() and not answers(server)
    model.with_suffix(".away").rename(model)
    wait_for(answering.exists, 30)
    assert answers(server)


def test_a_server_that_is_away_is_not_judged(server: EmbeddedTriton, canary: Callable[..., Any]) -> None:
    process, answering = canary(url="127.0.0.1:9")
    answering.touch()
    log = answering.with_name("log")
    wait_for(lambda: "no answer from Triton" in log.read_text(), 60)
    assert answering.exists() and process.poll() is None
    assert "unloaded" not in log.read_text()
