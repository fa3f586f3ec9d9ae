"""The pipeline on Kubeflow: what is compiled, and what is said to the Pipelines server and by it."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2
from lineage_bundle import record_run, run_steps
from pipelines_server import PipelinesServer, serve

from components.pin.component import pin
from components.pretrain.train_job import VARIABLE, TrainJob
from components.record.component import record
from components.validate.component import validate
from pipelines import cli
from pipelines.ablation import ablation
from pipelines.cluster.cron import check_cron
from pipelines.cluster.jobs import compile_pipeline, schedule, submit
from pipelines.cluster.resources import CREDENTIALS, RETRIES, STEPS, WAITING, Cluster
from pipelines.drift import drift_watch
from pipelines.label_efficiency import label_efficiency
from pipelines.training import training, training_on_fresh_data
from unlabeled import progress
from unlabeled.digest import code_digest, dvc_digest, json_digest
from unlabeled.errors import InputError
from unlabeled.lineage.registry import Registry
from unlabeled.lineage.step import Artifact
from unlabeled.workspace import CACHE

ROOT = Path(__file__).parents[1]
MANY = Cluster(gpus=2, nodes=4, cache_claim="checkpoints")
ARGUMENTS: dict[str, Any] = dict.fromkeys(
    training.pipeline_spec.root.input_definitions.parameters.keys(), "x"
) | {"methods": [{"name": "simclr"}]}


def documents(path: Path) -> list[Any]:
    return list(yaml.load_all(path.read_text(), yaml.CSafeLoader))


def executors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the containers and the Kubernetes settings of a compiled pipeline by step, both parsed strictly."""
    spec, platform = documents(path)
    message = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(
        json_format.MessageToDict(message.deployment_spec), pipeline_spec_pb2.PipelineDeploymentConfig()
    )
    json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for one in settings.values():
        json_format.ParseDict(one, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    containers = spec["deploymentSpec"]["executors"]
    assert containers.keys() == settings.keys()

    def step(executor: str) -> str:
        return executor.removeprefix("exec-").replace("-", "_")

    return (
        {step(name): one["container"] for name, one in containers.items()},
        {step(name): one for name, one in settings.items()},
    )


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container["env"]}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline for four nodes of two GPUs."""
    path = tmp_path_factory.mktemp("many") / "pipeline.yaml"
    compile_pipeline(path, cluster=MANY)
    return path


# What is compiled


def test_every_step_has_its_resources() -> None:
    assert STEPS.keys() == {path.parent.name for path in (ROOT / "components").glob("*/component.py")}


def test_the_guide_tells_the_resources_as_they_are() -> None:
    rows = re.findall(
        r"^\| (`\w+`.*) \| (\d+) \| (\d+) GiB \| (\d*) ?\| (\d+) h \|$",
        (ROOT / "docs/kubeflow.md").read_text(),
        re.MULTILINE,
    )
    told = {
        name: (int(cpu), int(memory), int(hours), bool(gpu))
        for names, cpu, memory, gpu, hours in rows
        for name in re.findall(r"`(\w+)`", names)
    }
    kept = {name: (step.cpu, step.memory, step.hours, step.gpu) for name, step in STEPS.items()}
    assert told == {name: kept[name] for name in told} and len(told) > 12


def test_the_watch_compiles_to_the_golden_file(tmp_path: Path) -> None:
    """After a meant change: `unlabeled compile --pipeline drift -o tests/golden/drift.yaml`, and read it."""
    compile_pipeline(tmp_path / "drift.yaml", drift_watch)
    assert (tmp_path / "drift.yaml").read_text() == (ROOT / "tests/golden/drift.yaml").read_text()
    tasks = documents(tmp_path / "drift.yaml")[0]["root"]["dag"]["tasks"]
    # The log changes under its name. The alert comes after the report, whose step has not failed.
    assert not tasks["drift"]["cachingOptions"].get("enableCache")
    assert tasks["drift-alert"]["dependentTasks"] == ["drift"]
    assert "retryPolicy" in tasks["drift"] and "retryPolicy" not in tasks["drift-alert"]


def test_the_watch_finds_logs_on_the_claim(tmp_path: Path) -> None:
    compile_pipeline(tmp_path / "drift.yaml", drift_watch, Cluster(cache_claim="inputs"))
    _, settings = executors(tmp_path / "drift.yaml")
    (mount,) = settings["drift"]["pvcMount"]
    assert (mount["constant"], mount["mountPath"]) == ("inputs", "/cache")
    assert "pvcMount" not in settings["drift_alert"]


@pytest.mark.parametrize(
    "pipeline",
    [training, training_on_fresh_data, ablation, label_efficiency, drift_watch],
    ids=lambda one: one.name,
)
def test_steps_ask_for_what_the_table_gives_them(pipeline: Any, tmp_path: Path) -> None:
    local = json_format.MessageToDict(pipeline.pipeline_spec)
    compile_pipeline(tmp_path / "pipeline.yaml", pipeline)
    containers, settings = executors(tmp_path / "pipeline.yaml")
    for name, container in containers.items():
        step, resources = STEPS[name], container["resources"]
        assert resources["resourceCpuRequest"] == resources["resourceCpuLimit"] == str(step.cpu), name
        assert resources["resourceMemoryRequest"] == resources["resourceMemoryLimit"] == f"{step.memory}Gi", (
            name
        )
        assert environment(container) == {"OMP_NUM_THREADS": str(step.cpu), "UNLABELED_PROGRESS": "-"}
        assert settings[name]["activeDeadlineSeconds"] == str(step.hours * 3600)
        (memory,) = settings[name]["emptyDirMounts"]
        assert (memory["mountPath"], memory["medium"]) == ("/dev/shm", "Memory")
        assert "accelerator" not in resources and "tolerations" not in settings[name]
    # The local runner executes the pipeline as it was.
    assert json_format.MessageToDict(pipeline.pipeline_spec) == local
    assert "resources" not in json.dumps(local) and "retryPolicy" not in json.dumps(local)


def test_every_task_but_a_gate_is_retried_and_the_run_has_an_end(compiled: Path) -> None:
    spec, platform = documents(compiled)
    dags = [
        component["dag"] for component in [spec["root"], *spec["components"].values()] if "dag" in component
    ]
    tasks = {name: task for dag in dags for name, task in dag["tasks"].items() if "for-loop" not in name}
    assert len(tasks) == 13
    # A gate would fail three times over.
    assert "retryPolicy" not in tasks.pop("check-validation")
    assert all(task["retryPolicy"]["maxRetryCount"] == RETRIES for task in tasks.values())
    assert all(task["retryPolicy"]["backoffDuration"] == "30s" for task in tasks.values())
    deadline = platform["platforms"]["kubernetes"]["pipelineConfig"]["activeDeadlineSeconds"]
    assert deadline == 72 * 3600
    # Counted from the start of the first try: whatever a step's hours, it is tried again as long as the run lasts.
    assert all(task["retryPolicy"]["backoffMaxDuration"] == f"{deadline}s" for task in tasks.values())


def test_the_steps_know_the_digest_that_their_image_is_named_by(tmp_path: Path) -> None:
    digest = "sha256:" + "a" * 64
    for image, told in (
        (f"registry:5000/unlabeled-python@{digest}", digest),
        ("registry:5000/unlabeled-python:0.1.0", None),
    ):
        command = [sys.executable, "-m", "pipelines.cli", "compile", "-o", str(tmp_path / "pipeline.yaml")]
        subprocess.run(command, env={**os.environ, "UNLABELED_IMAGE": image}, check=True)
        containers, _ = executors(tmp_path / "pipeline.yaml")
        for container in containers.values():
            assert container["image"] == image
            assert environment(container).get("UNLABELED_IMAGE_DIGEST") == told


def test_gpus_go_to_the_steps_that_use_them(tmp_path: Path) -> None:
    compile_pipeline(tmp_path / "pipeline.yaml", cluster=Cluster(gpus=1))
    containers, settings = executors(tmp_path / "pipeline.yaml")
    with_gpu = {name for name, container in containers.items() if "accelerator" in container["resources"]}
    assert with_gpu == {"baselines", "pretrain", "self_label", "evaluate", "finetune"}
    toleration = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    for name in containers:
        assert settings[name].get("tolerations", []) == ([toleration] if name in with_gpu else [])
    for name in with_gpu:
        accelerator = containers[name]["resources"]["accelerator"]
        assert (accelerator["resourceType"], accelerator["resourceCount"]) == ("nvidia.com/gpu", "1")
    assert VARIABLE not in environment(containers["pretrain"])


@pytest.mark.parametrize("pipeline", [training_on_fresh_data, drift_watch], ids=["training", "drift"])
def test_the_steps_that_use_the_registry_have_its_credentials(pipeline: Any, tmp_path: Path) -> None:
    compile_pipeline(tmp_path / "pipeline.yaml", pipeline, Cluster(secret="registry-credentials"))
    _, settings = executors(tmp_path / "pipeline.yaml")
    for name, one in settings.items():
        source = (ROOT / "components" / name / "component.py").read_text()
        if "registry: str" not in source:
            assert "secretAsEnv" not in one, name
            continue
        (secret,) = one["secretAsEnv"]
        # A registry by HTTPS and another by SSH need not have the same keys.
        assert (secret["secretName"], secret["optional"]) == ("registry-credentials", True)
        keys = {key["secretKey"]: key["envVar"] for key in secret["keyToEnv"]}
        assert keys == {key: key for key in CREDENTIALS}


def test_git_sends_the_credentials_that_a_pod_has(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{listener.server_address[1]}"
        monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
        monkeypatch.setenv("GIT_CONFIG_KEY_0", f"http.{url}/.extraHeader")
        monkeypatch.setenv("GIT_CONFIG_VALUE_0", "Authorization: Basic dXNlcjp0b2tlbg==")
        with pytest.raises(InputError):
            Registry(f"{url}/runs.git", "s3://runs/store").runs()
        listener.shutdown()
    assert set(seen) == {"Basic dXNlcjp0b2tlbg=="}


def test_for_several_nodes_pretraining_waits_and_the_nodes_get_what_it_asked_for(compiled: Path) -> None:
    containers, settings = executors(compiled)
    waiting = containers["pretrain"]
    assert (
        waiting["resources"]["resourceCpuLimit"] == str(WAITING.cpu)
        and "accelerator" not in waiting["resources"]
    )
    job = TrainJob(**json.loads(environment(waiting)[VARIABLE]))
    step = STEPS["pretrain"]
    assert (job.gpus, job.cpu, job.memory) == (2, 2 * step.cpu, 2 * step.memory)
    assert job.seconds < int(settings["pretrain"]["activeDeadlineSeconds"])
    assert [name for name in containers if VARIABLE in environment(containers[name])] == ["pretrain"]
    with_claim = {name: one["pvcMount"] for name, one in settings.items() if "pvcMount" in one}
    assert with_claim.keys() == {"ingest", "pretrain"}
    for name, (mount,) in with_claim.items():
        assert (mount["constant"], mount["mountPath"]) == ("checkpoints", job.folder)
        assert environment(containers[name])[CACHE] == job.folder


@pytest.mark.parametrize("more", [{"nodes": 2}, {"gpus": 2}])
def test_several_processes_need_a_common_volume(more: dict[str, int]) -> None:
    with pytest.raises(InputError, match="--cache-claim"):
        Cluster(**more)


def test_kubernetes_objects_carry_the_version_in_the_name(compiled: Path, tmp_path: Path) -> None:
    compile_pipeline(tmp_path / "objects.yaml", cluster=MANY, kubernetes=True, namespace="ml")
    pipeline, release = documents(tmp_path / "objects.yaml")
    for document, kind in ((pipeline, "Pipeline"), (release, "PipelineVersion")):
        assert document.keys() == {"apiVersion", "kind", "metadata", "spec"}
        assert document["apiVersion"] == "pipelines.kubeflow.org/v2beta1" and document["kind"] == kind
        assert document["metadata"]["namespace"] == "ml"
    assert pipeline["metadata"]["name"] == release["spec"]["pipelineName"] == "unlabeled-training"
    made = [release["spec"]["pipelineSpec"], release["spec"]["platformSpec"]]
    assert made == documents(compiled)
    # A version cannot be changed: whatever it depends on stands in its name.
    name = f"unlabeled-training-{version('unlabeled')}-{code_digest()[:12]}-{json_digest(made)[:8]}"
    assert release["metadata"]["name"] == name and re.fullmatch(r"[a-z0-9][-a-z0-9.]{0,61}[a-z0-9]", name)


def test_steps_tell_their_progress_to_the_log_of_their_pod(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(progress.VARIABLE, progress.LOG)
    monkeypatch.setattr(progress, "_last_report", time.monotonic() - 31)
    with progress.current_step("pretrain/simclr"):
        for step in range(1, 1001):
            progress.report(step, 1000, "step", loss=1.5)
    out, error = capsys.readouterr()
    lines = [json.loads(line) for line in error.splitlines()]
    assert out == "" and [line["done"] for line in lines] == [1, 1000], "one in half a minute, and the last"
    assert lines[0]["step"] == "pretrain/simclr" and lines[0]["values"] == {"loss": 1.5}


# The schedule's times


@pytest.mark.parametrize(
    "cron",
    ["0 0 3 * * *", "*/30 * * * * *", "0 0 8-18/2 1,15 JAN-jun ?", "59 59 23 31 12 6", "0 0 3 * * SUN,tue"],
)
def test_a_cron_that_kubeflow_takes_passes(cron: str) -> None:
    check_cron(cron)


@pytest.mark.parametrize(
    ("cron", "words"),
    [
        ("0 3 * * *", "did you mean '0 0 3 \\* \\* \\*'"),
        ("@daily", "1 fields"),
        ("60 0 3 * * *", "'60' is no second"),
        ("0 61 3 * * *", "'61' is no minute"),
        ("0 0 24 * * *", "'24' is no hour"),
        ("0 0 3 0 * *", "'0' is no day of month"),
        ("0 0 3 * 13 *", "'13' is no month"),
        ("0 0 3 * * 7", "'7' is no day of week, it takes 0 to 6 or SUN to SAT"),
        ("0 0 3 * * FUNDAY", "'FUNDAY' is no day of week"),
        ("0 0 18-8 * * *", "'18-8' is no hour"),
        ("0 */0 * * * *", "'\\*/0' is no minute"),
        ("0 5, * * * *", "'' is no minute"),
        ("0 0 3 L * *", "'L' is no day of month"),
    ],
)
def test_a_cron_that_kubeflow_would_refuse_or_misread_is_named(cron: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_cron(cron)


# What is said to the server


def recurring(name: str, identifier: str) -> dict[str, Any]:
    return {"display_name": name, "recurring_run_id": identifier}


def test_submit_makes_one_run_with_all_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "token").write_text("secret")
    with serve(PipelinesServer(namespaces=("ml",), token="secret")) as server:
        with pytest.raises(InputError, match="does not know you: the token is missing or has expired"):
            submit(server.host, "studies", "run-1", ARGUMENTS, "ml")
        monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
        run = submit(server.host, "studies", "run-1", ARGUMENTS, "ml", MANY)
    assert server.runs.keys() == {run}
    made = server.runs[run]
    assert made["display_name"] == "run-1" and made["namespace"] == "ml"
    assert made["runtime_config"]["parameters"] == ARGUMENTS
    assert [one["display_name"] for one in server.experiments.values()] == ["studies"]
    tasks = made["pipeline_spec"]["pipeline_spec"]["root"]["dag"]["tasks"]
    assert tasks["ingest"]["cachingOptions"]["enableCache"]
    assert not tasks["record"].get("cachingOptions", {}).get("enableCache"), "a record is never cached"
    assert capsys.readouterr().out == "", "standard output is for the result"


def test_schedule_replaces_every_recurring_run_of_its_name_and_no_other() -> None:
    server = PipelinesServer(page=2)
    server.experiments["1"] = {"display_name": "unlabeled", "experiment_id": "1"}
    # Two of one name, on different pages of the list.
    for number, name in enumerate(["nightly", "weekly", "a", "b", "nightly"]):
        server.recurring_runs[str(number)] = recurring(name, str(number))
    with serve(server):
        made = schedule(server.host, "unlabeled", "nightly", "0 30 4 * * *", ARGUMENTS, None)
    assert [one["display_name"] for one in server.recurring_runs.values()] == ["weekly", "a", "b", "nightly"]
    run = server.recurring_runs[made]
    assert run["experiment_id"] == "1"
    assert run["trigger"] == {"cron_schedule": {"cron": "0 30 4 * * *"}}
    assert (run["no_catchup"], run["max_concurrency"], run["mode"]) == (True, 1, "ENABLE")
    # Found on all pages, deleted, and only then made anew.
    asked = [request.split("/")[0] for request in server.requests if "recurringruns" in request]
    assert asked == ["GET recurringruns"] * 3 + ["DELETE recurringruns"] * 2 + ["POST recurringruns"]


def test_a_bad_schedule_leaves_the_old_one() -> None:
    server = PipelinesServer()
    server.recurring_runs["1"] = recurring("nightly", "1")
    with serve(server), pytest.raises(InputError, match="'99' is no hour"):
        schedule(server.host, "unlabeled", "nightly", "0 0 99 * * *", ARGUMENTS, None)
    assert server.recurring_runs.keys() == {"1"}


# What the user sees


def unlabeled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str
) -> tuple[int, str, str]:
    """Run the command line in this process; return its exit code, standard output and error."""
    monkeypatch.setattr(sys, "argv", ["unlabeled", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return (ended.value.code or 0, *capsys.readouterr())


@pytest.fixture
def login_page() -> Any:
    """What stands before a Kubeflow that wants a login: a web page for whatever is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html><title>Log in</title></html>")

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listener.server_address[1]}"
        listener.shutdown()


def test_the_commands_speak_to_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, login_page: str
) -> None:
    records = ("--registry", "https://git.example.com/runs.git", "--remote", "s3://runs/store")
    request = ("--profile", "smoke", "--workspace", str(tmp_path), *records)
    refusals = {
        "no server": (["--host", "http://127.0.0.1:9"], "no Kubeflow Pipelines server answers at http://127.0.0.1:9"),
        "no URL": (["--host", "localhost:8888"], "give a URL, as http://localhost:8888"),
        "login page": (["--host", login_page], "perhaps its login page: give the address of ml-pipeline"),
        "no namespace": ([], "name your namespace with --namespace"),
        "another's namespace": (["--namespace", "theirs"], "gives you no right to this; is the namespace theirs yours"),
        "nodes without a claim": (["--namespace", "ml", "--set", "training.nodes=2"], "--cache-claim"),
    }  # fmt: skip
    with serve(PipelinesServer(namespaces=("ml",))) as server:
        for name, (options, words) in refusals.items():
            given = options if "--host" in options else ["--host", server.host, *options]
            code, out, error = unlabeled(monkeypatch, capsys, "submit", *request, *given)
            assert (code, out) == (2, ""), name
            assert words in error and error.count("\n") == 1, error
        options = (
            "--host",
            server.host,
            "--namespace",
            "ml",
            "--cache-claim",
            "checkpoints",
            "--secret",
            "store",
        )
        nodes = ("--set", "pretrain.simclr.training.nodes=2", "--methods", "simclr")
        code, out, error = unlabeled(monkeypatch, capsys, "submit", *request, *options, *nodes)
        assert code == 0, error
        (run,) = server.runs.values()
        assert out == run["run_id"] + "\n"
        cron = ("--cron", "0 0 3 * * *", "--name", "nightly")
        code, out, error = unlabeled(monkeypatch, capsys, "schedule", *request, *options, *cron)
        assert code == 0, error
        (again,) = server.recurring_runs.values()
        assert out == again["recurring_run_id"] + "\n"

    parameters = run["runtime_config"]["parameters"]
    assert parameters["registry"] == records[1] and parameters["code_digest"] == code_digest()
    assert parameters["methods"][0]["training"] == {"nodes": 2}
    # As many threads as the step has cores, however many this machine has.
    assert parameters["threads"] == parameters["training_parameters"]["threads"] == STEPS["pretrain"].cpu
    for started in (run, again):
        settings = started["pipeline_spec"]["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]
        assert settings["executors"]["exec-record"]["secretAsEnv"][0]["secretName"] == "store"
    assert VARIABLE in json.dumps(run["pipeline_spec"]) and VARIABLE not in json.dumps(again["pipeline_spec"])
    assert again["runtime_config"]["parameters"]["run"] == "nightly-{job}"


def test_each_run_of_a_schedule_is_recorded_under_a_name_of_its_own(tmp_path: Path) -> None:
    compile_pipeline(tmp_path / "pipeline.yaml")
    given = documents(tmp_path / "pipeline.yaml")[0]["root"]["dag"]["tasks"]["record"]["inputs"]["parameters"]
    # The server replaces this constant where it is the whole value, and only there.
    assert given["job"] == {"runtimeValue": {"constant": "{{$.pipeline_job_uuid}}"}}
    registry = Registry.embedded(tmp_path / "registry")
    artifacts = run_steps(tmp_path / "steps", size=20)
    several = {
        kind: [artifacts[name] for name in sorted(artifacts) if re.fullmatch(rf"methods/\w+/{kind}", name)]
        for kind in ("model", "labels", "evaluation")
    }
    for job in ("0a1b2c3d-17f5-4c2e", "99887766-17f5-4c2e", "99887766-17f5-4c2e"):
        record.python_func(
            run="nightly-{job}",
            job=job,
            source="mini",
            parameters="{}",
            reference="",
            registry=registry.url,
            remote=registry.remote,
            data_digest=dvc_digest(artifacts["raw"].path),
            code_digest=code_digest(),
            models=several["model"],
            labels=several["labels"],
            evaluations=several["evaluation"],
            model_labels=artifacts["labels"],
            bundle=Artifact(str(tmp_path / f"bundle-{time.monotonic_ns()}")),
            **{name: one for name, one in artifacts.items() if "/" not in name and name != "labels"},
        )
    # A step that is tried again has the same id.
    assert {row["run"] for row in registry.runs()} == {"nightly-0a1b2c3d", "nightly-99887766"}


def test_every_step_of_a_scheduled_run_takes_what_its_first_step_pins(tmp_path: Path) -> None:
    compile_pipeline(tmp_path / "pipeline.yaml", training_on_fresh_data)
    spec = documents(tmp_path / "pipeline.yaml")[0]
    tasks = spec["root"]["dag"]["tasks"]
    assert not tasks["pin"]["cachingOptions"].get("enableCache"), "what lies there changes under its name"
    held = {"componentInputParameter": "data_digest"}, {"componentInputParameter": "reference"}
    for name, task in tasks.items():
        given = task["inputs"]["parameters"].values()
        assert any(value in held for value in given) is (name == "pin"), name
    assert tasks["validate"]["inputs"]["parameters"]["reference"] == {
        "taskOutputParameter": {"producerTask": "pin", "outputParameterKey": "reference"}
    }
    assert spec["pipelineInfo"]["name"] == "unlabeled-training", "the cache is the pipeline's"


def test_the_pin_holds_what_it_is_given_and_finds_what_it_is_not(tmp_path: Path) -> None:
    registry = Registry.embedded(tmp_path / "registry")
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"one")

    def pinned(
        source: str = str(folder), digest: str = "", reference: str = "", image_size: float = 32.0
    ) -> tuple[str, str]:
        return pin.python_func(
            source=source,
            ingest_parameters={"image_size": image_size},  # in a dict, KFP's numbers are floats
            data_digest=digest,
            reference=reference,
            registry=registry.url,
            remote=registry.remote,
            code_digest=code_digest(),
        )

    before = pinned()
    assert before == (dvc_digest(folder), "")
    record_run(registry, tmp_path / "first", "mini-1")
    (folder / "b.png").write_bytes(b"two")
    assert pinned()[0] == dvc_digest(folder) != before[0]
    assert pinned("mini", "0" * 32 + ".dir") == ("0" * 32 + ".dir", "mini-1")
    assert pinned("mini", "a", image_size=16.0) == ("a", ""), "other tables than those of that run"
    assert pinned(digest="a", reference="mini-0") == ("a", "mini-0")


def test_a_run_that_cannot_be_signed_fails_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry.embedded(tmp_path / "registry")
    monkeypatch.setenv("UNLABELED_SIGNING_KEY", str(tmp_path / "none.pem"))
    common = {
        "reference": "",
        "registry": registry.url,
        "remote": registry.remote,
        "code_digest": code_digest(),
    }
    with pytest.raises(InputError, match="is no private key that signs"):
        pin.python_func(source="mini", ingest_parameters={}, data_digest="0" * 32 + ".dir", **common)
    (tmp_path / "table").mkdir()
    with pytest.raises(InputError, match="is no private key that signs"):
        validate.python_func(
            parameters={},
            data_digest="",
            table=Artifact(str(tmp_path / "table")),
            validation=Artifact(str(tmp_path / "validation")),
            **common,
        )


@pytest.mark.parametrize("digest", ["", "0" * 32 + ".dir"])
def test_a_schedule_takes_the_data_of_the_day_unless_it_is_given_a_digest(
    digest: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    records = ("--registry", "https://git.example.com/runs.git", "--remote", "s3://runs/store")
    with serve(PipelinesServer()) as server:
        options = ("--cron", "0 0 3 * * *", "--host", server.host, "--data-digest", digest)
        # The folder is on the claim, not here.
        data = ("--profile", "smoke", "--data", "/cache/images")
        code, _, error = unlabeled(monkeypatch, capsys, "schedule", *data, *records, *options)
    assert code == 0, error
    (made,) = server.recurring_runs.values()
    assert made["runtime_config"]["parameters"]["data_digest"] == digest
    tasks = made["pipeline_spec"]["pipeline_spec"]["root"]["dag"]["tasks"]
    assert ("pin" in tasks) is not bool(digest)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--name", "Fashion nightly"), "cannot name a run"),
        (("--data", "fashion-mnits"), "did you mean 'fashion-mnist'"),
    ],
)
def test_a_schedule_whose_runs_would_fail_is_not_made(
    option: tuple[str, str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    records = ("--registry", "https://git.example.com/runs.git", "--remote", "s3://runs/store")
    with serve(PipelinesServer()) as server:
        options = ("--cron", "0 0 3 * * *", "--host", server.host, *option)
        code, out, error = unlabeled(
            monkeypatch, capsys, "schedule", "--profile", "smoke", *records, *options
        )
    assert (code, out) == (2, "") and server.requests == []
    assert words in error and error.count("\n") == 1


def test_the_watch_is_scheduled_beside_the_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    records = ("--registry", "https://git.example.com/runs.git", "--remote", "s3://runs/store")
    watch = ("--pipeline", "drift", "--run", "digits-1", "--recent", "s3://inputs/recent")
    refusals = {
        "where the log is": (["--pipeline", "drift"], "takes --recent: where applications log"),
        "what training takes": ([*watch, "--methods", "simclr"], "--methods goes with --pipeline training"),
        "what the watch takes": (["--run", "digits-1"], "--run goes with --pipeline drift, not with training"),
        "its parameters": ([*watch, "--set", "drift.alfa=1"], "did you mean 'alpha'?"),
    }  # fmt: skip
    server = PipelinesServer()
    server.recurring_runs["1"] = recurring("unlabeled", "1")
    with serve(server):
        cron = ("--cron", "0 0 6 * * *", "--host", server.host)
        for name, (options, words) in refusals.items():
            code, out, error = unlabeled(monkeypatch, capsys, "schedule", *records, *cron, *options)
            assert (code, out) == (2, ""), name
            assert words in error and error.count("\n") == 1, error
        options = (*watch, "--set", "drift.alpha=0.001", "--seed", "3", "--secret", "registry-credentials")
        code, out, error = unlabeled(monkeypatch, capsys, "schedule", *records, *cron, *options)
        assert code == 0, error
        code, _, error = unlabeled(monkeypatch, capsys, "submit", *records, *cron[2:], *options)
        assert code == 0, error
    (submitted,) = server.runs.values()
    old, made = server.recurring_runs.values()
    assert (old["display_name"], made["display_name"]) == ("unlabeled", "unlabeled-drift")
    assert submitted["display_name"].startswith("drift-")
    parameters = made["runtime_config"]["parameters"]
    assert parameters == submitted["runtime_config"]["parameters"]
    assert parameters.keys() == drift_watch.pipeline_spec.root.input_definitions.parameters.keys()
    assert (parameters["run"], parameters["recent"], parameters["seed"]) == (
        "digits-1",
        "s3://inputs/recent",
        3,
    )
    assert parameters["parameters"]["alpha"] == 0.001 and parameters["code_digest"] == code_digest()
    assert made["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == "unlabeled-drift"
    assert "registry-credentials" in json.dumps(made) and "registry-credentials" in json.dumps(submitted)


@pytest.mark.parametrize(
    "command",
    [
        ["run", "--profile", "smoke", "--set", "training.nodes=2"],
        ["run", "--profile", "smoke", "--set", "pretrain.simclr.training.nodes=2"],
        [
            "pretrain",
            "simclr",
            "--profile",
            "smoke",
            "--set",
            "training.nodes=2",
            "--table",
            ".",
            "-o",
            "model",
        ],
    ],
)
def test_this_machine_is_one_node(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, error = unlabeled(monkeypatch, capsys, *command)
    assert (code, out) == (2, "")
    assert error.startswith("unlabeled: training.nodes is 2, this machine is one") and error.count("\n") == 1
