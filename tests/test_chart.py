"""The Helm chart renders valid and safe objects for the values that matter, and refuses wrong ones."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml
from lineage_bundle import record_run

from unlabeled.digest import tree_digest
from unlabeled.lineage.registry import Registry

CHART = Path(__file__).parents[1] / "charts" / "unlabeled"
URLS = {"git": "https://git.example.com/runs.git", "remote": "s3://runs/store", "secret": "registry"}
VALUES: dict[str, dict[str, Any]] = {
    "run on a claim": {"serving": {"run": "digits-1"}, "registry": {"claim": "registry"}},
    "run from URLs": {
        "serving": {"run": "digits-1"},
        "registry": URLS,
        "networkPolicy": {"egress": [{"ports": [{"port": 443, "protocol": "TCP"}]}]},
    },
    "model claim": {"serving": {"claim": "models", "arguments": ["--log-verbose=1"]}},
    "GPU": {
        "serving": {
            "run": "digits-1",
            "gpus": 1,
            "nodeSelector": {"pool": "gpu"},
            "tolerations": [{"key": "dedicated", "operator": "Exists"}],
            "affinity": {"podAntiAffinity": {}},
            "podAnnotations": {"team": "vision"},
            "image": {"digest": "sha256:" + "a" * 64},
        },
        "service": {"type": "LoadBalancer", "annotations": {"internal": "true"}},
        "imagePullSecrets": ["pull"],
        "serviceAccount": {"annotations": {"role": "reader"}},
    },
    "autoscaling": {
        "serving": {"run": "digits-1"},
        "autoscaling": {"enabled": True},
        "networkPolicy": {
            "clients": [{"namespaceSelector": {"matchLabels": {"team": "apps"}}}],
            "monitoring": [{"namespaceSelector": {"matchLabels": {"team": "metrics"}}}],
        },
    },
    "schedule": {
        "serving": {"enabled": False},
        "registry": URLS,
        "schedule": {"enabled": True, "methods": ["simclr", "autoencoder"], "dataDigest": "0" * 32 + ".dir"},
    },
    "bare": {
        "serving": {"run": "digits-1"},
        "podDisruptionBudget": {"enabled": False},
        "networkPolicy": {"enabled": False},
    },
}


@pytest.fixture(scope="module")
def chart() -> Iterator[helm.Chart]:
    with helm.Chart.load(CHART) as loaded:
        yield loaded


def render(chart: helm.Chart, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rendered objects by their kind."""
    chart.validate_schema(chart.merge_values(values))
    rendered = chart.render(values, name="fashion", namespace="ml")
    texts = [text for name, text in rendered.items() if name.endswith(".yaml")]
    objects = [found for text in texts for found in yaml.safe_load_all(text) if found]
    assert len({found["kind"] for found in objects}) == len(objects)
    return {found["kind"]: found for found in objects}


def pods(objects: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [objects[kind]["spec"]["template"]["spec"] for kind in ("Deployment", "Job") if kind in objects]


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_lint_finds_nothing(values: dict[str, Any]) -> None:
    report = helm.lint(CHART, values, strict=True, kube_version="v1.30.0")
    assert report["errors"] == []
    assert [message["error"] for message in report["messages"]] == ["icon is recommended"]


def test_defaults_lint() -> None:
    assert helm.lint(CHART, strict=True)["errors"] == []


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("version", ["1.28", "1.30", "1.37"])
def test_objects_are_valid(chart: helm.Chart, values: dict[str, Any], version: str) -> None:
    for found in render(chart, values).values():
        kubernetes_validate.validate(found, version, strict=True)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_pods_are_confined(chart: helm.Chart, values: dict[str, Any]) -> None:
    objects = render(chart, values)
    assert pods(objects)
    for pod in pods(objects):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all("hostPath" not in volume for volume in pod["volumes"])
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] and container["resources"]["limits"]
            assert ":latest" not in container["image"]
            assert ":" in container["image"].rsplit("/", 1)[-1] or "@sha256:" in container["image"]
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts <= {volume["name"] for volume in pod["volumes"]}
            assert "tmp" in mounts


def test_triton_is_probed_drained_and_reached(chart: helm.Chart) -> None:
    objects = render(chart, {"serving": {"run": "digits-1", "drainSeconds": 7, "exitTimeoutSeconds": 50}})
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    [triton] = pod["containers"]
    assert {port["name"]: port["containerPort"] for port in triton["ports"]} == {
        "http": 8000,
        "grpc": 8001,
        "metrics": 8002,
    }
    assert {port["name"]: port["port"] for port in objects["Service"]["spec"]["ports"]} == {
        "http": 8000,
        "grpc": 8001,
        "metrics": 8002,
    }
    assert triton["livenessProbe"]["httpGet"] == {"path": "/v2/health/live", "port": "http"}
    assert triton["readinessProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": "http"}
    startup = triton["startupProbe"]
    assert startup["httpGet"]["path"] == "/v2/health/ready"
    assert startup["periodSeconds"] * startup["failureThreshold"] == 300
    assert triton["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert "--exit-timeout-secs=50" in triton["args"]
    assert pod["terminationGracePeriodSeconds"] > 7 + 50
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert {"name": "shm", "mountPath": "/dev/shm"} in triton["volumeMounts"]


def test_everything_selects_the_pods_and_only_them(chart: helm.Chart) -> None:
    objects = render(chart, VALUES["autoscaling"])
    deployment = objects["Deployment"]
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert selector.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert objects["Service"]["spec"]["selector"] == selector
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == selector
    assert objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == selector
    assert (
        objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    )
    assert "replicas" not in deployment["spec"]
    scheduled = render(chart, {**VALUES["schedule"], "serving": {"run": "digits-1"}})["Job"]
    assert not selector.items() <= scheduled["spec"]["template"]["metadata"]["labels"].items()


def test_a_run_is_fetched_and_proven_before_triton_starts(chart: helm.Chart) -> None:
    pod = render(chart, VALUES["run from URLs"])["Deployment"]["spec"]["template"]["spec"]
    [fetch] = pod["initContainers"]
    assert {entry["name"]: entry["value"] for entry in fetch["env"]}.items() >= {
        ("RUN", "digits-1"),
        ("REGISTRY_GIT", URLS["git"]),
        ("REGISTRY_REMOTE", URLS["remote"]),
    }
    assert fetch["envFrom"] == [{"secretRef": {"name": "registry"}}]
    assert "--model-repository=/models/repository" in pod["containers"][0]["args"]
    claimed = render(chart, VALUES["model claim"])["Deployment"]["spec"]["template"]["spec"]
    assert (
        "initContainers" not in claimed and "--model-repository=/models" in claimed["containers"][0]["args"]
    )
    assert claimed["volumes"][0]["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}


def test_the_fetching_command_fetches(chart: helm.Chart, tmp_path: Path) -> None:
    registry = Registry.embedded(tmp_path / "registry")
    bundle = record_run(registry, tmp_path / "work", "digits-1")
    pod = render(chart, VALUES["run on a claim"])["Deployment"]["spec"]["template"]["spec"]
    environment = {entry["name"]: entry["value"] for entry in pod["initContainers"][0]["env"]}
    # Where the claim is mounted, and where the models go, lie elsewhere here.
    environment |= {
        key: value.replace("/registry", str(tmp_path / "registry"), 1) for key, value in environment.items()
    }
    _, option, program = pod["initContainers"][0]["command"]
    program = program.replace('"/models"', repr(str(tmp_path / "models")))
    command = [sys.executable, option, program]
    subprocess.run(command, check=True, env={**os.environ, **environment, "HOME": str(tmp_path)})
    assert tree_digest(tmp_path / "models" / "repository") == tree_digest(bundle / "repository")


def test_gpus_are_asked_for_only_when_wanted(chart: helm.Chart) -> None:
    pod = render(chart, VALUES["GPU"])["Deployment"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert [toleration["key"] for toleration in pod["tolerations"]] == ["nvidia.com/gpu", "dedicated"]
    assert pod["containers"][0]["image"].endswith("/tritonserver@sha256:" + "a" * 64)
    assert "nvidia" not in json.dumps(
        render(chart, VALUES["bare"])["Deployment"]["spec"]["template"]["spec"]["containers"][0]["resources"]
    )


def test_network_is_closed_but_for_what_is_named(chart: helm.Chart) -> None:
    policy = render(chart, VALUES["autoscaling"])["NetworkPolicy"]["spec"]
    asking, scraping = policy["ingress"]
    assert asking["from"] == [{"namespaceSelector": {"matchLabels": {"team": "apps"}}}]
    assert {port["port"] for port in asking["ports"]} == {"http", "grpc"}
    assert scraping["from"] == [{"namespaceSelector": {"matchLabels": {"team": "metrics"}}}]
    assert policy["egress"] == [] and policy["policyTypes"] == ["Ingress", "Egress"]
    default = render(chart, VALUES["run on a claim"])["NetworkPolicy"]["spec"]
    assert [rule["from"] for rule in default["ingress"]] == [[{"podSelector": {}}]] * 2


def test_schedule_calls_the_command_line_with_a_projected_token(chart: helm.Chart) -> None:
    values = {
        **VALUES["schedule"],
        "schedule": {**VALUES["schedule"]["schedule"], "set": {"training.steps": 2000000, "data": "x"}},
    }
    objects = render(chart, values)
    assert "Deployment" not in objects and "Service" not in objects
    job = objects["Job"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "post-install,post-upgrade"
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["args"] == [
        "--cron=0 0 3 * * *",
        "--name=unlabeled",
        "--host=http://ml-pipeline.kubeflow.svc.cluster.local:8888",
        "--namespace=ml",
        "--experiment=unlabeled",
        "--profile=gpu",
        "--data=fashion-mnist",
        f"--registry={URLS['git']}",
        f"--remote={URLS['remote']}",
        "--workspace=/tmp/workspace",
        f"--data-digest={'0' * 32}.dir",
        "--methods=simclr,autoencoder",
        '--set=data="x"',
        "--set=training.steps=2000000",
    ]
    token = next(volume for volume in pod["volumes"] if volume["name"] == "token")
    [source] = token["projected"]["sources"]
    assert source["serviceAccountToken"]["audience"] == "pipelines.kubeflow.org"
    [mount] = [mount for mount in container["volumeMounts"] if mount["name"] == "token"]
    place = f"{mount['mountPath']}/{source['serviceAccountToken']['path']}"
    assert place == "/var/run/secrets/kubeflow/pipelines/token"
    assert {"name": "UNLABELED_IMAGE", "value": container["image"]} in container["env"]


def test_schedule_options_exist(chart: helm.Chart) -> None:
    from typer.main import get_command

    from pipelines.cli import app

    known = {
        option for parameter in get_command(app).commands["schedule"].params for option in parameter.opts
    }  # type: ignore[attr-defined]
    [container] = render(chart, VALUES["schedule"])["Job"]["spec"]["template"]["spec"]["containers"]
    assert {argument.split("=")[0] for argument in container["args"]} <= known


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"servings": {}}, "servings"),
    ({"serving": {"replica": 3}}, "replica"),
    ({"serving": {"replicas": "3"}}, "replicas"),
    ({"serving": {"replicas": -1}}, "replicas"),
    ({"serving": {"image": {"tag": "latest"}}}, "tag"),
    ({"serving": {"image": {"tag": ""}}}, "tag"),
    ({"serving": {"image": {"digest": "sha256:12"}}}, "digest"),
    ({"serving": {"arguments": ["log-verbose"]}}, "arguments"),
    ({"serving": {"resources": {"limits": {"nvidia.com/gpu": "1"}}}}, "limits"),
    ({"serving": {"sharedMemorySize": "lots"}}, "sharedMemorySize"),
    ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
    ({"service": {"type": "ExternalName"}}, "type"),
    ({"autoscaling": {"minReplicas": 0}}, "minReplicas"),
    ({"schedule": {"cron": "0 3 * * *"}}, "cron"),
    ({"schedule": {"host": "ml-pipeline:8888"}}, "host"),
    ({"schedule": {"dataDigest": "abc"}}, "dataDigest"),
    ({"registry": {"claim": "Registry_1"}}, "claim"),
    ({"networkPolicy": {"egress": ["all"]}}, "egress"),
]


@pytest.mark.parametrize(("values", "key"), REFUSED, ids=[json.dumps(values) for values, _ in REFUSED])
def test_schema_refuses(chart: helm.Chart, values: dict[str, Any], key: str) -> None:
    with pytest.raises(helm.HelmValuesError, match=key):
        chart.validate_schema(chart.merge_values(values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "serving.run is empty"),
        ({"serving": {"run": "a", "claim": "b"}}, "exclude each other"),
        (
            {"serving": {"run": "a"}, "autoscaling": {"enabled": True, "minReplicas": 9}},
            "minReplicas 9 is above",
        ),
        ({"serving": {"enabled": False}, "schedule": {"enabled": True}}, "is a folder"),
    ],
)
def test_contradictions_are_told(chart: helm.Chart, values: dict[str, Any], words: str) -> None:
    with pytest.raises(helm.HelmRenderError, match=words):
        chart.render(values, name="fashion", namespace="ml")


def test_every_value_is_in_the_schema_and_used() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    templates = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    for section, value in values.items():
        assert section in templates
        if isinstance(value, dict):
            assert set(schema["properties"][section]["properties"]) == set(value)
            assert schema["properties"][section]["additionalProperties"] is False
            assert all(f".{key}" in templates for key in value), section
