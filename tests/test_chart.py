"""The Helm chart renders valid objects for the values that matter, and they say what they should."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
from chart_rendering import CHART, CUSTOM, URLS, VALUES, container, pod_specs, render, serving_pod
from lineage_bundle import record_run
from pipelines_server import PipelinesServer, serve

from components.pretrain.train_job import VARIABLE
from pipelines import cli
from unlabeled.digest import tree_digest
from unlabeled.lineage.promotion import promote
from unlabeled.lineage.registry import Registry


@pytest.fixture(scope="module")
def chart() -> Iterator[helm.Chart]:
    with helm.Chart.load(CHART) as loaded:
        yield loaded


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_lint_finds_nothing(values: dict[str, Any]) -> None:
    report = helm.lint(CHART, values, strict=True, kube_version="v1.30.0")
    assert report["errors"] == []
    assert [message["error"] for message in report["messages"]] == ["icon is recommended"]


def test_defaults_lint() -> None:
    assert helm.lint(CHART, strict=True)["errors"] == []


@cache
def validate_text(text: str, version: str) -> None:
    kubernetes_validate.validate(json.loads(text), version, strict=True)


def validate(found: dict[str, Any], version: str) -> None:
    """Validate an object strictly: no unknown key, no wrong type. Of a custom one, the Job within."""
    if found["kind"] not in CUSTOM:
        validate_text(json.dumps(found, sort_keys=True), version)
    elif found["kind"].endswith("TrainingRuntime"):
        for job in found["spec"]["template"]["spec"]["replicatedJobs"]:
            within = {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {},
                "spec": job["template"]["spec"],
            }
            validate_text(json.dumps(within, sort_keys=True), version)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_objects_are_valid(chart: helm.Chart, values: dict[str, Any]) -> None:
    for found in render(chart, values).values():
        validate(found, "1.30")


@pytest.mark.parametrize("version", ["1.28", "1.37"])
def test_objects_are_valid_on_older_and_newer_clusters(chart: helm.Chart, version: str) -> None:
    for found in render(chart, VALUES["everything"]).values():
        validate(found, version)


def test_amounts_may_be_numbers(chart: helm.Chart) -> None:
    amounts = {"requests": {"cpu": 2, "memory": 4294967296}, "limits": {"memory": 4294967296}}
    values = {
        **VALUES["autoscaling"],
        "serving": {"run": "digits-1", "resources": amounts, "modelsSize": 4294967296},
        "autoscaling": {"enabled": True, "target": 5000},
    }
    objects = render(chart, values)
    for found in objects.values():
        validate(found, "1.30")
    assert container(serving_pod(objects), "triton")["resources"]["requests"]["cpu"] == 2
    metric = objects["HorizontalPodAutoscaler", ""]["spec"]["metrics"][0]["pods"]
    assert metric["target"]["averageValue"] == "5000"


def test_every_template_is_rendered_by_some_values(chart: helm.Chart) -> None:
    rendered = {
        name
        for values in VALUES.values()
        for name, text in chart.render(values, name="fashion", namespace="ml").items()
        if text.strip()
    }
    templates = {f"unlabeled/templates/{path.name}" for path in (CHART / "templates").iterdir()}
    assert rendered == {name for name in templates if not name.endswith(".tpl")}


def test_long_release_names_are_cut(chart: helm.Chart) -> None:
    for found in render(chart, VALUES["everything"], name="a" * 53).values():
        # The names of roles may be longer.
        assert len(found["metadata"]["name"]) <= (253 if "Role" in found["kind"] else 63)
        validate(found, "1.30")


PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}


def test_triton_is_probed_drained_and_reached(chart: helm.Chart) -> None:
    serving = {"run": "digits-1", "drainSeconds": 30, "exitTimeoutSeconds": 50}
    objects = render(chart, {**VALUES["run on a claim"], "serving": serving})
    pod = serving_pod(objects)
    [triton] = pod["containers"]
    assert {port["name"]: port["containerPort"] for port in triton["ports"]} == PORTS
    service = objects["Service", ""]["spec"]["ports"]
    assert {port["name"]: port["port"] for port in service} == PORTS
    assert all(port["targetPort"] == port["name"] for port in service)
    assert triton["livenessProbe"]["httpGet"] == {"path": "/v2/health/live", "port": "http"}
    assert triton["readinessProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": "http"}
    startup = triton["startupProbe"]
    assert startup["httpGet"]["path"] == "/v2/health/ready"
    assert (startup["periodSeconds"], startup["failureThreshold"]) == (10, 30)
    assert triton["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "30"]
    assert "--exit-timeout-secs=50" in triton["args"]
    assert pod["terminationGracePeriodSeconds"] > 30 + 50
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in triton["volumeMounts"]


def test_pods_that_follow_stay_in_the_service_while_they_load_and_when_they_cannot(chart: helm.Chart) -> None:
    """Triton's own way, where only what is asked for at the start is loaded, is to be ready with all of it."""
    follows, alone = (
        container(serving_pod(render(chart, VALUES[case])), "triton")
        for case in ("follow on a claim", "run on a claim")
    )
    assert "--strict-readiness=false" in follows["args"]
    assert not any("readiness" in argument for argument in alone["args"])
    for triton in (follows, alone):
        for kind in ("readinessProbe", "livenessProbe"):
            assert triton[kind]["periodSeconds"] * triton[kind].get("failureThreshold", 3) <= 30


def test_everything_selects_the_pods_and_only_them(chart: helm.Chart) -> None:
    objects = render(chart, VALUES["everything"])
    deployment = objects["Deployment", ""]
    selector = deployment["spec"]["selector"]["matchLabels"]
    template = deployment["spec"]["template"]
    assert selector.items() <= template["metadata"]["labels"].items()
    [spread] = template["spec"]["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert spread["labelSelector"]["matchLabels"] == selector
    assert objects["Service", ""]["spec"]["selector"] == selector
    assert objects["PodDisruptionBudget", ""]["spec"]["selector"]["matchLabels"] == selector
    assert objects["NetworkPolicy", ""]["spec"]["podSelector"]["matchLabels"] == selector
    monitored = objects["ServiceMonitor", ""]["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= objects["Service", ""]["metadata"]["labels"].items()
    job = objects["Job", "-schedule"]["spec"]["template"]["metadata"]["labels"]
    [node] = objects["ClusterTrainingRuntime", ""]["spec"]["template"]["spec"]["replicatedJobs"]
    training = node["template"]["spec"]["template"]["metadata"]["labels"]
    assert not selector.items() <= job.items() and not selector.items() <= training.items()
    scheduled = objects["NetworkPolicy", "-schedule"]["spec"]["podSelector"]["matchLabels"]
    assert scheduled.items() <= job.items()


def test_autoscaler_looks_at_the_time_in_the_queue(chart: helm.Chart) -> None:
    objects = render(chart, VALUES["autoscaling"])
    spec = objects["HorizontalPodAutoscaler", ""]["spec"]
    deployment = objects["Deployment", ""]
    assert "replicas" not in deployment["spec"]
    assert spec["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 8)
    target = {"type": "AverageValue", "averageValue": "5000"}
    assert spec["metrics"] == [
        {"type": "Pods", "pods": {"metric": {"name": "avg_time_queue_us"}, "target": target}}
    ]


def test_a_run_is_fetched_and_proven_before_triton_starts(chart: helm.Chart) -> None:
    pod = serving_pod(render(chart, VALUES["run from URLs"]))
    [fetch] = pod["initContainers"]
    assert {entry["name"]: entry["value"] for entry in fetch["env"]}.items() >= {
        ("RUN", "digits-1"),
        ("REGISTRY_GIT", URLS["git"]),
        ("REGISTRY_REMOTE", URLS["remote"]),
    }
    assert fetch["envFrom"] == [{"secretRef": {"name": "registry"}}]
    assert "--model-repository=/models/repository" in container(pod, "triton")["args"]


def test_models_come_from_a_claim_or_a_bucket_too(chart: helm.Chart) -> None:
    pod = serving_pod(render(chart, VALUES["model claim"]))
    assert "initContainers" not in pod
    assert "--model-repository=/models" in container(pod, "triton")["args"]
    [models] = [volume for volume in pod["volumes"] if volume["name"] == "models"]
    assert models["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    within = {"serving": {"claim": "models", "claimPath": "runs/digits-1/repository"}}
    triton = container(serving_pod(render(chart, within)), "triton")
    assert "--model-repository=/models/runs/digits-1/repository" in triton["args"]
    pod = serving_pod(render(chart, VALUES["bucket"]))
    triton = container(pod, "triton")
    assert "initContainers" not in pod and "models" not in {volume["name"] for volume in pod["volumes"]}
    assert "--model-repository=s3://models/repository" in triton["args"]
    assert triton["envFrom"] == [{"secretRef": {"name": "bucket"}}]


def fetched(chart: helm.Chart, tmp_path: Path, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run the init container's command on `tmp_path/registry`; the models end up in `tmp_path/models`."""
    fetch = container(serving_pod(render(chart, values)), "fetch")
    environment = {entry["name"]: entry["value"] for entry in fetch["env"]}
    # Where the claim is mounted, and where the models go, lie elsewhere here.
    environment |= {
        key: value.replace("/registry", str(tmp_path / "registry"), 1) for key, value in environment.items()
    }
    _, option, program = fetch["command"]
    program = program.replace('"/models"', repr(str(tmp_path / "models")))
    environment = {**os.environ, **environment, "HOME": str(tmp_path)}
    return subprocess.run([sys.executable, option, program], env=environment, capture_output=True, text=True)


def test_the_fetching_command_fetches(chart: helm.Chart, tmp_path: Path) -> None:
    registry = Registry.embedded(tmp_path / "registry")
    bundle = record_run(registry, tmp_path / "work", "digits-1")
    assert fetched(chart, tmp_path, VALUES["run on a claim"]).returncode == 0
    assert tree_digest(tmp_path / "models" / "repository") == tree_digest(bundle / "repository")


def test_a_new_pod_starts_with_what_is_promoted(chart: helm.Chart, tmp_path: Path) -> None:
    values = VALUES["follow on a claim"]
    registry = Registry.embedded(tmp_path / "registry")
    served = {
        run: record_run(registry, tmp_path / run, run, seed)
        for seed, run in enumerate(("digits-1", "digits-2"))
    }
    refused = fetched(chart, tmp_path, values)
    assert refused.returncode == 1 and not (tmp_path / "models").exists()
    assert refused.stderr == "stage 'prod' holds nothing yet: promote a run, or name one in serving.run\n"
    # Until something is promoted, the run that is named.
    named = {**values, "serving": {**values["serving"], "run": "digits-1"}}
    assert "run digits-1" in fetched(chart, tmp_path, named).stdout
    promote(registry, "digits-2", "prod", None)
    shutil.rmtree(tmp_path / "models")
    assert "run digits-2, encoder@v" in fetched(chart, tmp_path, named).stdout
    assert tree_digest(tmp_path / "models" / "repository") == tree_digest(served["digits-2"] / "repository")


def test_the_follower_starts_where_the_fetcher_left_off(chart: helm.Chart) -> None:
    pod = serving_pod(render(chart, VALUES["everything"]))
    follow = container(pod, "follow")
    assert follow["command"] == ["unlabeled", "follow"]
    assert follow["args"] == [
        f"--registry={URLS['git']}",
        f"--remote={URLS['remote']}",
        "--stage=prod",
        "--url=127.0.0.1:8001",
        "--repository=/models/repository",
    ]
    assert follow["envFrom"] == container(pod, "fetch")["envFrom"]
    assert "--model-repository=/models/repository" in container(pod, "triton")["args"]


def test_gpus_are_asked_for_only_when_wanted(chart: helm.Chart) -> None:
    pod = serving_pod(render(chart, VALUES["GPU"]))
    triton = container(pod, "triton")
    assert triton["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert [toleration["key"] for toleration in pod["tolerations"]] == ["nvidia.com/gpu", "dedicated"]
    assert triton["image"].endswith("/tritonserver@sha256:" + "a" * 64)
    assert "nvidia" not in json.dumps(
        container(serving_pod(render(chart, VALUES["bare"])), "triton")["resources"]
    )


def test_network_is_closed_but_for_what_is_named(chart: helm.Chart) -> None:
    policy = render(chart, VALUES["autoscaling"])["NetworkPolicy", ""]["spec"]
    asking, scraping = policy["ingress"]
    assert asking["from"] == [{"namespaceSelector": {"matchLabels": {"team": "apps"}}}]
    assert {port["port"] for port in asking["ports"]} == {"http", "grpc"}
    assert scraping["from"] == [{"namespaceSelector": {"matchLabels": {"team": "metrics"}}}]
    assert [port["port"] for port in scraping["ports"]] == ["metrics"]
    assert policy["egress"] == VALUES["autoscaling"]["networkPolicy"]["egress"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    closed = render(chart, VALUES["run on a claim"])["NetworkPolicy", ""]["spec"]
    assert [rule["from"] for rule in closed["ingress"]] == [[{"podSelector": {}}]] * 2
    assert closed["egress"] == []
    half = {"serving": {"run": "digits-1"}, "registry": {"git": URLS["git"], "claim": "registry"}}
    for values in (VALUES["run from URLs"], VALUES["bucket"], half):
        [fetching] = render(chart, values)["NetworkPolicy", ""]["spec"]["egress"]
        assert [port["port"] for port in fetching["ports"]] == [53, 53, 443]


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("http://ml-pipeline.kubeflow.svc.cluster.local:8888", 8888),
        ("https://kubeflow.example.com/pipeline", 443),
        ("http://kubeflow", 80),
    ],
)
def test_the_schedule_reaches_kubeflow_and_nothing_else(chart: helm.Chart, host: str, port: int) -> None:
    values = {**VALUES["schedule"], "schedule": {"enabled": True, "host": host}}
    policy = render(chart, values)["NetworkPolicy", "-schedule"]["spec"]
    [rule] = policy["egress"]
    assert [entry["port"] for entry in rule["ports"]] == [53, 53, port]
    assert policy["ingress"] == [] and policy["policyTypes"] == ["Ingress", "Egress"]


def test_only_nodes_reach_nodes(chart: helm.Chart) -> None:
    objects = render(chart, VALUES["training in a namespace"])
    policy = objects["NetworkPolicy", "-training"]
    assert policy["metadata"]["namespace"] == objects["TrainingRuntime", ""]["metadata"]["namespace"]
    [node] = objects["TrainingRuntime", ""]["spec"]["template"]["spec"]["replicatedJobs"]
    labels = node["template"]["spec"]["template"]["metadata"]["labels"]
    selector = policy["spec"]["podSelector"]
    assert selector["matchLabels"].items() <= labels.items()
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": selector}]}]
    assert policy["spec"]["policyTypes"] == ["Ingress"]


def test_every_object_says_where_it_lies(chart: helm.Chart) -> None:
    for (kind, name), found in render(chart, VALUES["everything"]).items():
        own = "vision" if name in ("-trainer", "-training") or "Role" in kind else "ml"
        assert found["metadata"].get("namespace") == (None if kind.startswith("Cluster") else own), kind


def test_schedule_calls_the_command_line_with_a_projected_token(chart: helm.Chart) -> None:
    parameters = {"set": {"training.steps": 2000000, "data": "x"}}
    values = {**VALUES["schedule"], "schedule": {**VALUES["schedule"]["schedule"], **parameters}}
    objects = render(chart, values)
    assert not {kind for kind, _ in objects} & {"Deployment", "Service"}
    job = objects["Job", "-schedule"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "post-install,post-upgrade,post-rollback"
    # A sidecar that goes on after the containers would keep the hook from ever finishing.
    assert job["spec"]["template"]["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"
    [pod] = pod_specs(job)
    schedule = container(pod, "schedule")
    assert schedule["args"] == [
        "--cron=0 0 3 * * *",
        "--name=unlabeled",
        "--host=http://ml-pipeline.kubeflow.svc.cluster.local:8888",
        "--namespace=ml",
        "--experiment=unlabeled",
        "--profile=cpu",
        f"--registry={URLS['git']}",
        f"--remote={URLS['remote']}",
        "--workspace=/tmp/workspace",
        "--data=fashion-mnist",
        f"--data-digest={'0' * 32}.dir",
        "--methods=simclr,autoencoder",
        '--set=data="x"',
        "--set=training.steps=2000000",
    ]
    [token] = [volume for volume in pod["volumes"] if volume["name"] == "token"]
    [source] = token["projected"]["sources"]
    assert source["serviceAccountToken"]["audience"] == "pipelines.kubeflow.org"
    [mount] = [mount for mount in schedule["volumeMounts"] if mount["name"] == "token"]
    place = f"{mount['mountPath']}/{source['serviceAccountToken']['path']}"
    assert place == "/var/run/secrets/kubeflow/pipelines/token"
    assert {"name": "UNLABELED_IMAGE", "value": schedule["image"]} in schedule["env"]


def test_schedule_options_exist(chart: helm.Chart) -> None:
    from typer.main import get_command

    from pipelines.cli import app

    command = get_command(app).commands["schedule"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    for case in ("schedule", "everything"):
        [pod] = pod_specs(render(chart, VALUES[case])["Job", "-schedule"])
        for found in pod["containers"]:
            assert {argument.split("=")[0] for argument in found["args"]} <= known


def test_the_schedule_asks_for_what_its_steps_need(
    chart: helm.Chart, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rendered Job's own arguments, given to the command line, before a server."""
    asked = {"profile": "gpu", "gpus": 2, "cacheClaim": "checkpoints", "runtime": "fashion-unlabeled"}
    asked["secret"] = "registry-credentials"
    values = {**VALUES["schedule"], "schedule": {"enabled": True, "namespace": "vision", **asked}}
    [pod] = pod_specs(render(chart, values)["Job", "-schedule"])
    found = container(pod, "schedule")
    with serve(PipelinesServer(namespaces=("vision",))) as server:
        monkeypatch.setattr(sys, "argv", [*found["command"], *found["args"], f"--host={server.host}"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    [made] = server.recurring_runs.values()
    [trains] = [
        executor["container"]
        for name, executor in made["pipeline_spec"]["pipeline_spec"]["deploymentSpec"]["executors"].items()
        if name == "exec-pretrain"
    ]
    [job] = [json.loads(one["value"]) for one in trains["env"] if one["name"] == VARIABLE]
    assert "registry-credentials" in json.dumps(made["pipeline_spec"]["platform_spec"])
    assert (job["gpus"], job["claim"], job["runtime"]) == (2, "checkpoints", "fashion-unlabeled")


def test_drift_is_scheduled_beside_the_training_for_the_run_that_is_served(chart: helm.Chart) -> None:
    [pod] = pod_specs(render(chart, VALUES["everything"])["Job", "-schedule"])
    schedule, drift = container(pod, "schedule"), container(pod, "drift")
    own = {"--pipeline=drift", "--name=unlabeled-drift", "--cron=0 0 6 * * *"}
    own |= {
        "--recent=s3://inputs/recent",
        "--run=encoder#prod",
        "--cache-claim=inputs",
        "--set=drift.alpha=0.001",
    }
    assert own <= set(drift["args"])
    where = ("--secret", "--host", "--namespace", "--experiment", "--profile", "--registry", "--remote")
    for option in where:
        [one], [other] = (
            [argument for argument in made["args"] if argument.startswith(option + "=")]
            for made in (schedule, drift)
        )
        assert one == other
    shared = schedule.keys() - {"name", "args"}
    assert {key: drift[key] for key in shared} == {key: schedule[key] for key in shared}
    [pod] = pod_specs(render(chart, VALUES["schedule"])["Job", "-schedule"])
    assert [one["name"] for one in pod["containers"]] == ["schedule"]


@pytest.mark.parametrize(
    ("case", "kind", "namespace", "gpus"),
    [
        ("everything", "ClusterTrainingRuntime", None, None),
        ("training in a namespace", "TrainingRuntime", "vision", 2),
    ],
)
def test_training_runtime_runs_torch_on_every_node(
    chart: helm.Chart, case: str, kind: str, namespace: str | None, gpus: int | None
) -> None:
    runtime = render(chart, VALUES[case])[kind, ""]
    assert runtime["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    # The SDK knows a runtime's framework by its label only.
    assert runtime["metadata"]["labels"]["trainer.kubeflow.org/framework"] == "torch"
    assert runtime["metadata"].get("namespace") == namespace
    spec = runtime["spec"]
    assert spec.keys() == {"mlPolicy", "template"}
    assert spec["mlPolicy"] == {"numNodes": 2, "torch": {}}
    jobs = spec["template"]["spec"]
    assert jobs.keys() == {"failurePolicy", "replicatedJobs"}
    assert jobs["failurePolicy"] == {"maxRestarts": 3}
    # Trainer finds the nodes by the names of job and container, and by the label.
    [job] = jobs["replicatedJobs"]
    assert job["name"] == "node"
    assert job["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    [pod] = pod_specs(job)
    node = container(pod, "node")
    assert node["command"] == ["torchrun", "-m", "unlabeled.training.pretrain"]
    assert node["resources"]["limits"].get("nvidia.com/gpu") == gpus
    assert bool(pod.get("tolerations")) is bool(gpus)
    [shared] = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
    assert shared["emptyDir"]["medium"] == "Memory"
