"""The chart refuses wrong values with a word on what is wrong, and documents every one that it takes."""

import json
import re
from collections.abc import Iterator
from typing import Any

import helm_python as helm
import pytest
import yaml
from chart_rendering import CHART, CLAIM, URLS

WATCHED = {"serviceMonitor": {"enabled": True}, "rules": {"enabled": True}}
SERVED = {"serving": {"run": "a"}, "registry": CLAIM}


@pytest.fixture(scope="module")
def chart() -> Iterator[helm.Chart]:
    with helm.Chart.load(CHART) as loaded:
        yield loaded


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"servings": {}}, "servings"),
    ({"serving": {"replica": 3}}, "replica"),
    ({"serving": {"replicas": "3"}}, "replicas"),
    ({"serving": {"replicas": -1}}, "replicas"),
    ({"serving": {"gpus": 0.5}}, "gpus"),
    ({"serving": {"image": {"tag": "latest"}}}, "tag"),
    ({"serving": {"image": {"tag": ""}}}, "tag"),
    ({"serving": {"image": {"digest": "sha256:12"}}}, "digest"),
    ({"serving": {"bucket": "https://models.example.com"}}, "bucket"),
    ({"serving": {"claimPath": "/repository"}}, "claimPath"),
    ({"serving": {"claimPath": "../repository"}}, "claimPath"),
    ({"serving": {"claimPath": "a/../../b"}}, "claimPath"),
    ({"serving": {"arguments": ["log-verbose"]}}, "arguments"),
    ({"serving": {"arguments": ["--model-control-mode=poll"]}}, "arguments"),
    ({"serving": {"responseCacheBytes": -1}}, "responseCacheBytes"),
    ({"serving": {"exitTimeoutSeconds": 0}}, "exitTimeoutSeconds"),
    ({"serving": {"resources": {"limits": {"nvidia.com/gpu": "1"}}}}, "limits"),
    ({"serving": {"resources": {"limits": {"memory": "much"}}}}, "memory"),
    ({"serving": {"resources": {"requests": {"cpu": -1}}}}, "cpu"),
    ({"serving": {"sharedMemorySize": "lots"}}, "sharedMemorySize"),
    ({"serving": {"tolerations": [{"key": "a", "effect": "Never"}]}}, "effect"),
    ({"serving": {"affinity": {"nodeAfinity": {}}}}, "nodeAfinity"),
    ({"serving": {"nodeSelector": {"pool": 1}}}, "pool"),
    ({"serving": {"controlSecret": "Control_1"}}, "controlSecret"),
    ({"serving": {"follow": {"enabled": "yes"}}}, "enabled"),
    ({"serving": {"follow": {"stage": "Prod!"}}}, "stage"),
    ({"serving": {"canary": {"intervalSeconds": 0}}}, "intervalSeconds"),
    ({"serving": {"canary": {"interval": 2}}}, "interval"),
    ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
    ({"imagePullSecrets": [{"name": "pull"}]}, "imagePullSecrets"),
    ({"service": {"type": "ExternalName"}}, "type"),
    ({"autoscaling": {"minReplicas": 0}}, "minReplicas"),
    ({"autoscaling": {"target": "5 ms"}}, "target"),
    ({"podDisruptionBudget": {"maxUnavailable": 0}}, "maxUnavailable"),
    ({"networkPolicy": {"egress": ["all"]}}, "egress"),
    ({"networkPolicy": {"clients": [{"podSelektor": {}}]}}, "podSelektor"),
    ({"networkPolicy": {"clients": [{"ipBlock": {"cidr": "10.0.0.0"}}]}}, "cidr"),
    ({"registry": {"claim": "Registry_1"}}, "claim"),
    ({"monitoring": {"crds": "maybe"}}, "crds"),
    ({"monitoring": {"labels": {"release": "a b"}}}, "release"),
    ({"monitoring": {"serviceMonitor": {"intervalSeconds": 60}}}, "intervalSeconds"),
    ({"monitoring": {"rules": {"models": []}}}, "models"),
    ({"monitoring": {"rules": {"errorShare": 1}}}, "errorShare"),
    ({"monitoring": {"rules": {"queueMilliseconds": 0}}}, "queueMilliseconds"),
    ({"schedule": {"cron": "0 3 * * *"}}, "cron"),
    ({"schedule": {"name": "Fashion nightly"}}, "name"),
    ({"schedule": {"host": "ml-pipeline:8888"}}, "host"),
    ({"schedule": {"dataDigest": "abc"}}, "dataDigest"),
    ({"schedule": {"drift": {"cron": "0 6 * * *"}}}, "cron"),
    ({"schedule": {"drift": {"recents": "s3://inputs"}}}, "recents"),
    ({"schedule": {"set": {"training.steps": None}}}, "set"),
    ({"trainer": {"scope": "global"}}, "scope"),
    ({"trainer": {"nodes": 0}}, "nodes"),
    ({"trainer": {"restarts": -1}}, "restarts"),
]


@pytest.mark.parametrize(("values", "key"), REFUSED, ids=[json.dumps(values) for values, _ in REFUSED])
def test_schema_refuses(chart: helm.Chart, values: dict[str, Any], key: str) -> None:
    with pytest.raises(helm.HelmValuesError, match=key):
        chart.validate_schema(chart.merge_values(values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "serving.run is empty"),
        ({"serving": {"run": "a", "claim": "b"}}, "exclude each other: a, b"),
        ({"serving": {"claim": "b", "bucket": "s3://c"}}, "exclude each other: b, s3://c"),
        ({"serving": {"run": "a"}}, "a folder lies on a claim"),
        (
            {"serving": {"claim": "b", "follow": {"enabled": True}}},
            "serving.follow serves what is promoted",
        ),
        (
            {"serving": {"bucket": "s3://c", "claimPath": "repository"}},
            "claimPath is a folder on serving.claim",
        ),
        (
            {**SERVED, "serving": {"canary": {"enabled": True}, "run": "a"}},
            "kubectl -n ml create secret generic control .* name it as serving.controlSecret",
        ),
        ({**SERVED, "autoscaling": {"enabled": True, "minReplicas": 9}}, "minReplicas 9 is above"),
        ({"serving": {"enabled": False}, "schedule": {"enabled": True}}, "is a folder"),
        ({**SERVED, "monitoring": {"rules": {"enabled": True}}}, "needs monitoring.serviceMonitor"),
        (
            {"registry": URLS, "schedule": {"enabled": True, "drift": {"enabled": True}}},
            "needs schedule.drift.recent",
        ),
    ],
)
def test_contradictions_are_told(chart: helm.Chart, values: dict[str, Any], words: str) -> None:
    with pytest.raises(helm.HelmRenderError, match=words):
        chart.render(values, name="fashion", namespace="ml")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (SERVED, "Triton serves run a as fashion-unlabeled.ml"),
        (SERVED, "--url 127.0.0.1:8001 --registry GITURL --remote DVCURL --run a\n"),
        (
            {"serving": {"follow": {"enabled": True}, "controlSecret": "key"}, "registry": URLS},
            f"--url 127.0.0.1:8001 --registry {URLS['git']} --remote {URLS['remote']} --run encoder#prod\n",
        ),
        ({**SERVED, "service": {"type": "LoadBalancer"}}, "LoadBalancer: name networkPolicy.clients"),
        ({**SERVED, "monitoring": WATCHED}, "Not made, for this cluster does not know"),
        (
            {"serving": {"enabled": False}, "registry": URLS, "schedule": {"enabled": True}},
            "disabling the schedule or renaming it leaves it there",
        ),
        (
            {"serving": {"enabled": False}, "trainer": {"enabled": True}},
            "TrainJobs in ml name the runtime fashion-unlabeled",
        ),
    ],
)
def test_notes_say_what_is_there_and_what_is_not(
    chart: helm.Chart, values: dict[str, Any], words: str
) -> None:
    assert words in chart.render(values, name="fashion", namespace="ml")["unlabeled/templates/NOTES.txt"]


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its dotted path; a list, and a mapping without keys, is a value."""
    if isinstance(values, dict) and values and path != "monitoring.dashboard.labels":
        for key, value in values.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, values


def test_every_value_is_in_the_schema() -> None:
    """An unknown key is refused wherever the chart itself sets the keys."""
    schema = json.loads((CHART / "values.schema.json").read_text())

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        return schema["definitions"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node

    def compare(values: Any, node: dict[str, Any], path: str) -> None:
        node = resolve(node)
        if isinstance(values, dict) and "properties" in node:
            assert node["additionalProperties"] is False, path
            assert values.keys() <= node["properties"].keys(), path
            for key, value in values.items():
                compare(value, node["properties"][key], f"{path}.{key}")

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert schema["properties"].keys() - {"global"} == values.keys()
    compare(values, schema, "")


def test_every_value_is_used() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    templates = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    unused = [path for path, _ in leaves(values) if f".{path.split('.')[-1]}" not in templates]
    # Requests and limits are handed on whole.
    assert [path for path in unused if not re.search(r"\.(requests|limits)\.(cpu|memory)$", path)] == []


def test_readme_lists_every_value_with_its_default() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    rows = re.findall(
        r"^\| `([\w.]+)` \| `(.*?)` \| \S.*\|$", (CHART / "README.md").read_text(), re.MULTILINE
    )
    resources = re.compile(r"(.+\.resources)\.(requests|limits)\.\w+$")
    expected = {
        path: json.dumps(value, ensure_ascii=False)
        for path, value in leaves(values)
        if not resources.match(path)
    }
    for path in {match[1] for path, _ in leaves(values) if (match := resources.match(path))}:
        node = values
        for key in path.split("."):
            node = node[key]
        expected[path] = json.dumps(node)
    assert dict(rows) == expected
