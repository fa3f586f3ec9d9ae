"""Values of the chart that matter, and the objects that it renders from them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

CHART = Path(__file__).parents[1] / "charts" / "unlabeled"
URLS = {"git": "https://git.example.com/runs.git", "remote": "s3://runs/store", "secret": "registry"}
CLAIM = {"claim": "registry"}
# Kinds that Kubernetes itself does not know.
CUSTOM = ("ServiceMonitor", "PrometheusRule", "TrainingRuntime", "ClusterTrainingRuntime")
CANARY = {"controlSecret": "control", "canary": {"enabled": True}}
FOLLOW = {"controlSecret": "control", "follow": {"enabled": True}}
SIDECARS = {**CANARY, **FOLLOW}
MONITORING = {
    "crds": "assume",
    "labels": {"release": "prometheus"},
    "serviceMonitor": {"enabled": True},
    "rules": {"enabled": True},
    "dashboard": {"enabled": True},
}
VALUES: dict[str, dict[str, Any]] = {
    "run on a claim": {"serving": {"run": "digits-1"}, "registry": CLAIM},
    "run from URLs": {"serving": {"run": "digits-1"}, "registry": URLS},
    "follow on a claim": {"serving": FOLLOW, "registry": CLAIM},
    "model claim": {"serving": {"claim": "models", "arguments": ["--log-verbose=1"]}},
    "bucket": {"serving": {"bucket": "s3://models/repository", "bucketSecret": "bucket"}},
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
        "registry": CLAIM,
        "service": {"type": "LoadBalancer", "annotations": {"internal": "true"}},
        "imagePullSecrets": ["pull"],
        "serviceAccount": {"annotations": {"role": "reader"}},
    },
    "autoscaling": {
        "serving": {"run": "digits-1"},
        "registry": CLAIM,
        "autoscaling": {"enabled": True},
        "networkPolicy": {
            "clients": [{"namespaceSelector": {"matchLabels": {"team": "apps"}}}],
            "monitoring": [{"namespaceSelector": {"matchLabels": {"team": "metrics"}}}],
            "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 8443}]}],
        },
    },
    "schedule": {
        "serving": {"enabled": False},
        "registry": URLS,
        "schedule": {"enabled": True, "methods": ["simclr", "autoencoder"], "dataDigest": "0" * 32 + ".dir"},
    },
    "training in a namespace": {
        "serving": {"enabled": False},
        "trainer": {"enabled": True, "serviceAccount": "default-editor", "namespace": "vision", "gpus": 2},
    },
    "everything": {
        "serving": {"run": "digits-1", **SIDECARS},
        "registry": URLS,
        "autoscaling": {"enabled": True},
        "monitoring": MONITORING,
        "schedule": {
            "enabled": True,
            "namespace": "vision",
            "secret": "registry-credentials",
            "drift": {
                "enabled": True,
                "recent": "s3://inputs/recent",
                "claim": "inputs",
                "set": {"drift.alpha": 0.001},
            },
        },
        "trainer": {
            "enabled": True,
            "scope": "cluster",
            "serviceAccount": "default-editor",
            "claim": "work",
            "secret": "store",
            "nodeSelector": {"pool": "cpu"},
        },
    },
    "bare": {
        "serving": {"run": "digits-1"},
        "registry": CLAIM,
        "podDisruptionBudget": {"enabled": False},
        "networkPolicy": {"enabled": False},
    },
}


def render(
    chart: helm.Chart, values: dict[str, Any], name: str = "fashion"
) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the rendered objects by kind and by what comes after the release's name in their own."""
    chart.validate_schema(chart.merge_values(values))
    rendered = chart.render(values, name=name, namespace="ml")
    texts = [text for file, text in rendered.items() if file.endswith(".yaml")]
    objects = [found for text in texts for found in yaml.load_all(text, yaml.CSafeLoader) if found]
    keyed = {
        (found["kind"], found["metadata"]["name"].rpartition("unlabeled")[2]): found for found in objects
    }
    assert len(keyed) == len(objects)
    return keyed


def pod_specs(found: Any) -> Iterator[dict[str, Any]]:
    """Every pod specification anywhere in an object."""
    if isinstance(found, dict):
        if "containers" in found:
            yield found
        for value in found.values():
            yield from pod_specs(value)
    elif isinstance(found, list):
        for value in found:
            yield from pod_specs(value)


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def container(pod: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [found for found in containers(pod) if found["name"] == name]
    return found


def serving_pod(objects: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    return objects["Deployment", ""]["spec"]["template"]["spec"]
