"""No values make the chart render a pod that restricted Pod Security refuses, a right too many, or a secret."""

import copy
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import helm_python as helm
import pytest
from chart_rendering import (
    CANARY,
    CHART,
    CLAIM,
    FOLLOW,
    SIDECARS,
    URLS,
    VALUES,
    container,
    containers,
    pod_specs,
    render,
)

SOURCES: dict[str, dict[str, Any]] = {
    "claim": {"serving": {"run": "a"}, "registry": CLAIM},
    "URLs": {"serving": {"run": "a"}, "registry": URLS},
    "models": {"serving": {"claim": "models"}, "registry": URLS},
    "bucket": {"serving": {"bucket": "s3://models", "bucketSecret": "bucket"}, "registry": URLS},
}
VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


@pytest.fixture(scope="module")
def chart() -> Iterator[helm.Chart]:
    with helm.Chart.load(CHART) as loaded:
        yield loaded


def every_combination() -> Iterator[dict[str, Any]]:
    """Values over all that changes a pod."""
    sidecars = [{}, CANARY, SIDECARS]
    switches = itertools.product(SOURCES, sidecars, (0, 1), (False, True), ("", "namespace", "cluster"))
    for source, added, gpus, scheduled, trained in switches:
        values = SOURCES[source]
        if (added is SIDECARS and "run" not in values["serving"]) or (scheduled and source == "claim"):
            continue
        yield {
            **values,
            "serving": {**values["serving"], **added, "gpus": gpus},
            "schedule": {"enabled": scheduled},
            "trainer": {"enabled": bool(trained), "scope": trained or "cluster", "gpus": gpus, "claim": "w"},
        }


def assert_restricted(pod: dict[str, Any]) -> None:
    """Assert what the Pod Security Standard `restricted` (v1.30) asks of a pod, and a read-only root on top."""
    assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"))
    for volume in pod.get("volumes", []):
        [kind] = volume.keys() - {"name"}
        assert kind in VOLUMES, volume
    common = pod.get("securityContext", {})
    assert "sysctls" not in common and "seLinuxOptions" not in common and "windowsOptions" not in common
    assert not pod.get("ephemeralContainers")
    for found in containers(pod):
        own = found.get("securityContext", {})
        assert own.get("runAsNonRoot", common.get("runAsNonRoot")) is True
        assert own.get("runAsUser", common.get("runAsUser")) != 0
        assert own.get("seccompProfile", common.get("seccompProfile")) == {"type": "RuntimeDefault"}
        assert own.get("allowPrivilegeEscalation") is False
        assert own.get("capabilities") == {"drop": ["ALL"]}
        assert own.get("readOnlyRootFilesystem") is True
        assert not {"privileged", "procMount", "seLinuxOptions", "windowsOptions"} & own.keys()
        assert all("hostPort" not in port for port in found.get("ports", []))
        handlers = [found.get(f"{kind}Probe", {}) for kind in ("startup", "liveness", "readiness")]
        handlers += found.get("lifecycle", {}).values()
        assert not any("host" in handler.get("httpGet", {}) for handler in handlers)


def assert_well_kept(pod: dict[str, Any]) -> None:
    """Assert our own rules: no token, bounded resources and volumes, a version on every image, mounts that exist."""
    assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
    for volume in pod["volumes"]:
        assert volume.get("emptyDir", {"sizeLimit": ""}).keys() >= {"sizeLimit"}, volume
    for found in containers(pod):
        assert found["resources"]["requests"] and "memory" in found["resources"]["limits"]
        assert re.search(r"(:(?!latest)[\w.-]+|@sha256:[0-9a-f]{64})$", found["image"])
        mounts = {mount["name"]: mount["mountPath"] for mount in found["volumeMounts"]}
        assert mounts.keys() <= {volume["name"] for volume in pod["volumes"]}
        assert mounts["tmp"] == "/tmp"


def test_every_pod_of_every_combination_is_restricted(chart: helm.Chart) -> None:
    seen = 0
    for values in every_combination():
        for found in render(chart, values).values():
            for pod in pod_specs(found):
                assert_restricted(pod)
                assert_well_kept(pod)
                seen += 1
    assert seen > 200


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pod: pod.update(hostNetwork=True),
        lambda pod: pod.update(hostPID=True),
        lambda pod: pod["volumes"].append({"name": "node", "hostPath": {"path": "/"}}),
        lambda pod: pod["securityContext"].pop("runAsNonRoot"),
        lambda pod: pod["securityContext"].update(runAsUser=0),
        lambda pod: pod["securityContext"].update(seccompProfile={"type": "Unconfined"}),
        lambda pod: pod["initContainers"][0].pop("securityContext"),
        lambda pod: pod["containers"][-1]["securityContext"].update(allowPrivilegeEscalation=True),
        lambda pod: pod["containers"][-1]["securityContext"].update(privileged=True),
        lambda pod: pod["containers"][-1]["securityContext"]["capabilities"].update(add=["NET_ADMIN"]),
        lambda pod: pod["containers"][0]["ports"][0].update(hostPort=80),
    ],
)
def test_the_check_itself_sees_what_is_not_restricted(
    chart: helm.Chart, spoil: Callable[[dict[str, Any]], Any]
) -> None:
    [pod] = pod_specs(render(chart, VALUES["run on a claim"])["Deployment", ""])
    assert_restricted(pod)
    spoiled = copy.deepcopy(pod)
    spoil(spoiled)
    with pytest.raises((AssertionError, KeyError)):
        assert_restricted(spoiled)


def test_secrets_are_named_never_held(chart: helm.Chart) -> None:
    objects = render(chart, VALUES["everything"])
    assert "Secret" not in {kind for kind, _ in objects}
    entries = [
        entry
        for found in objects.values()
        for pod in pod_specs(found)
        for part in containers(pod)
        for entry in part["env"]
    ]
    secret = [entry for entry in entries if re.search("KEY|SECRET|TOKEN|PASSWORD", entry["name"])]
    assert len(secret) == 3
    for entry in secret:
        assert entry["valueFrom"] == {"secretKeyRef": {"name": "control", "key": "key"}}


def test_every_part_has_its_own_account_with_the_least_rights(chart: helm.Chart) -> None:
    objects = render(chart, VALUES["everything"])
    accounts = {name for kind, name in objects if kind == "ServiceAccount"}
    assert accounts == {"", "-schedule"}
    assert all(objects["ServiceAccount", name]["automountServiceAccountToken"] is False for name in accounts)
    rules = {
        key: {
            (group, resource): " ".join(rule["verbs"])
            for rule in found["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
        }
        for key, found in objects.items()
        if key[0] in ("Role", "ClusterRole")
    }
    assert rules == {
        ("Role", "-schedule"): {
            ("pipelines.kubeflow.org", "experiments"): "create get list",
            ("pipelines.kubeflow.org", "jobs"): "create delete get list",
        },
        ("Role", "-trainer"): {
            ("trainer.kubeflow.org", "trainjobs"): "create delete get list watch",
            ("trainer.kubeflow.org", "trainingruntimes"): "get",
            ("", "events"): "get list watch",
            ("", "pods"): "get list watch",
            ("", "pods/log"): "get",
        },
        ("ClusterRole", "-trainer"): {("trainer.kubeflow.org", "clustertrainingruntimes"): "get"},
    }
    bindings = {key: found for key, found in objects.items() if key[0].endswith("Binding")}
    assert len(bindings) == 3
    for (kind, name), binding in bindings.items():
        role = objects[kind.removesuffix("Binding"), name]
        assert binding["roleRef"]["name"] == role["metadata"]["name"]
        assert binding["metadata"].get("namespace") == role["metadata"].get("namespace")
        [subject] = binding["subjects"]
        # The servers' own account is bound to nothing.
        expected = {
            "-schedule": ("fashion-unlabeled-schedule", "ml"),
            "-trainer": ("default-editor", "vision"),
        }
        assert (subject["name"], subject["namespace"]) == expected[name]
    assert objects["Role", "-schedule"]["metadata"]["namespace"] == "vision"
    silent = render(chart, {**VALUES["schedule"], "schedule": {"enabled": True, "rbac": False}})
    assert not {kind for kind, _ in silent} & {"Role", "RoleBinding"}


def test_models_are_loaded_and_unloaded_by_the_sidecars_only(chart: helm.Chart) -> None:
    [alone] = pod_specs(render(chart, VALUES["run from URLs"])["Deployment", ""])
    assert not any("control" in argument for argument in container(alone, "triton")["args"])
    for sidecars in (CANARY, FOLLOW, SIDECARS):
        values = {"serving": {"run": "digits-1", **sidecars}, "registry": URLS}
        [pod] = pod_specs(render(chart, values)["Deployment", ""])
        arguments = container(pod, "triton")["args"]
        assert {"--model-control-mode=explicit", "--load-model=*"} <= set(arguments)
        for interface in ("http-restricted-api", "grpc-restricted-protocol"):
            assert f"--{interface}=model-repository:control-key=$(TRITON_CONTROL_KEY)" in arguments
        # Who may load can send code along.
        keyless = {**values, "serving": {**values["serving"], "controlSecret": ""}}
        with pytest.raises(helm.HelmRenderError, match=r"name it as serving\.controlSecret"):
            render(chart, keyless)
    writable = {
        found["name"]
        for found in containers(pod)
        for mount in found["volumeMounts"]
        if mount["name"] == "models" and not mount.get("readOnly")
    }
    assert writable == {"fetch", "follow"}
