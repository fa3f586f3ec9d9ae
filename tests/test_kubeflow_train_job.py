"""Pretraining on several nodes: the TrainJob is well formed, watched, told of, and never left behind."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import kubernetes.config.kube_config
import pytest
from trainer_server import TrainerServer, serve

from components.pretrain import train_job
from components.pretrain.component import pretrain
from components.pretrain.train_job import VARIABLE, TrainJob, run_job
from unlabeled.digest import code_digest
from unlabeled.environment import machine
from unlabeled.errors import CheckFailed, InputError
from unlabeled.lineage.step import Artifact, step_record
from unlabeled.parameters import Encoder, Training
from unlabeled.workspace import CACHE

JOB = TrainJob(
    runtime="torch-distributed",
    image="registry.example.com/unlabeled:1",
    claim="checkpoints",
    folder="/cache",
    cpu=8,
    memory=32,
    gpus=2,
    shared_memory="2Gi",
    seconds=600,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_job, "POLL_SECONDS", 0.1)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainerServer]:
    server = TrainerServer(tmp_path)
    monkeypatch.setattr(kubernetes.config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(server.kubeconfig))
    with serve(server):
        yield server


def python(code: str) -> list[str]:
    return ["python", "-c", "import os, sys, time\nnode = os.environ['PET_NODE_RANK']\n" + code]


def test_the_job_asks_for_what_its_nodes_need(cluster: TrainerServer, capfd: pytest.CaptureFixture) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run_job("pretrain-simclr-1", python("for i in range(3): print('node', node, 'line', i)"), 2, JOB)
    assert cluster.jobs == {} and cluster.deleted == ["pretrain-simclr-1"]
    assert signal.getsignal(signal.SIGTERM) is before
    (asked,) = cluster.asked
    spec = asked["spec"]
    assert spec["runtimeRef"]["name"] == "torch-distributed"
    assert spec["activeDeadlineSeconds"] == 600
    assert spec["trainer"]["image"] == JOB.image and spec["trainer"]["numNodes"] == 2
    resources = {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "2"}
    assert spec["trainer"]["resourcesPerNode"] == {"requests": resources, "limits": resources}
    environment = {one["name"]: one["value"] for one in spec["trainer"]["env"]}
    assert environment == {CACHE: "/cache", "UNLABELED_PROGRESS": "-"}
    (patch,) = spec["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]
    assert node["name"] == "node" and pod["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"
    assert pod["spec"]["volumes"] == [
        {"name": "cache", "persistentVolumeClaim": {"claimName": "checkpoints"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
    ]
    (container,) = pod["spec"]["containers"]
    assert {one["mountPath"] for one in container["volumeMounts"]} == {"/cache", "/dev/shm"}
    assert pod["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    # The first node's log, each line once.
    out, error = capfd.readouterr()
    assert out == "" and [line for line in error.splitlines() if line.startswith("node")] == [
        f"node 0 line {i}" for i in range(3)
    ]


def test_the_log_comes_while_the_job_runs(cluster: TrainerServer, capfd: pytest.CaptureFixture) -> None:
    code = python("print('begun', flush=True)\ntime.sleep(60)")
    seen = []

    def cancel() -> None:
        while "begun" not in (text := capfd.readouterr().err):
            time.sleep(0.05)
        seen.append(text)
        # To this thread: the one that waits for the log is not woken, as where a signal comes just before it waits.
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    threading.Thread(target=cancel, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(SystemExit, match="SIGTERM"):
        run_job("pretrain-simclr-1", code, 2, JOB)
    assert seen and time.monotonic() - started < 30
    assert cluster.jobs == {} and cluster.deleted == ["pretrain-simclr-1"]


@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_failed_node_fails_the_step_with_the_end_of_its_log(
    cluster: TrainerServer, failing: str, capfd: pytest.CaptureFixture
) -> None:
    code = f"""
if node == "{failing}":
    for i in range(50): print("line", i)
    raise ValueError("images are missing")
time.sleep(60)
"""
    with pytest.raises(
        CheckFailed, match="TrainJob pretrain-simclr-1 failed: ValueError: images are missing"
    ):
        run_job("pretrain-simclr-1", python(code), 2, JOB)
    assert cluster.jobs == {} and cluster.deleted == ["pretrain-simclr-1"]
    assert "line 49" in capfd.readouterr().err


def test_a_lost_node_fails_the_step_though_nobody_tells_why(cluster: TrainerServer) -> None:
    code = "if node == '1': os.kill(os.getpid(), 9)\ntime.sleep(60)"
    with pytest.raises(CheckFailed, match="one may have run out of memory, or its machine was lost"):
        run_job("pretrain-simclr-1", python(code), 2, JOB)
    assert cluster.deleted == ["pretrain-simclr-1"]


def test_a_job_has_the_time_of_its_step_and_no_more(cluster: TrainerServer) -> None:
    with pytest.raises(CheckFailed, match=r"failed|is not done in the time"):
        run_job("pretrain-simclr-1", python("time.sleep(60)"), 1, TrainJob(**(asdict(JOB) | {"seconds": 1})))
    assert cluster.deleted == ["pretrain-simclr-1"]


def test_the_log_of_a_replaced_node_is_read_from_its_start(
    cluster: TrainerServer, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    code = f"""
if os.path.exists({str(tmp_path / "second")!r}):
    print("second try")
else:
    print("first try", flush=True)
    time.sleep(60)
"""

    def restart() -> None:
        while "first try" not in capfd.readouterr().err:
            time.sleep(0.05)
        (tmp_path / "second").touch()
        cluster.restart("pretrain-simclr-1")

    thread = threading.Thread(target=restart, daemon=True)
    thread.start()
    run_job("pretrain-simclr-1", python(code), 1, JOB)
    thread.join()
    assert "second try\n" in capfd.readouterr().err


def test_a_log_that_never_ends_does_not_keep_an_ended_job(
    cluster: TrainerServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train_job, "LOG_SECONDS", 1.0)
    cluster.log_ends = False
    run_job("pretrain-simclr-1", python("print('trained')"), 1, JOB)
    assert capfd.readouterr().err.count("trained\n") == 1


def test_a_job_that_somebody_deletes_is_missed(cluster: TrainerServer) -> None:
    def delete() -> None:
        while not cluster.jobs:
            time.sleep(0.05)
        cluster.jobs.popitem()[1].end()

    threading.Thread(target=delete, daemon=True).start()
    with pytest.raises(CheckFailed, match=r"TrainJob pretrain-simclr-1 is gone|failed"):
        run_job("pretrain-simclr-1", python("time.sleep(60)"), 1, JOB)


def test_what_the_cluster_refuses_is_told_in_one_line(cluster: TrainerServer) -> None:
    cluster.may = False
    with pytest.raises(InputError, match="service account has to create, get and delete trainjobs"):
        run_job("pretrain-simclr-1", python(""), 2, JOB)
    cluster.runtime = False
    with pytest.raises(
        InputError, match="the cluster has no runtime torch-distributed, or no Kubeflow Trainer"
    ):
        run_job("pretrain-simclr-1", python(""), 2, JOB)
    assert cluster.asked == []


@pytest.mark.slow
def test_two_nodes_train_as_the_step_does(
    cluster: TrainerServer, digits_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The component itself, with real processes on two nodes: table, model and result pass through the claim."""
    job = asdict(JOB) | {"folder": str(tmp_path / "claim"), "gpus": 0}
    monkeypatch.setenv(VARIABLE, json.dumps(job))
    monkeypatch.setenv(CACHE, str(tmp_path / "claim"))
    training = Training(steps=6, batch_size=32, threads=1, checkpoint_every=3, log_every=2, compile="no")
    artifacts = {name: Artifact(str(tmp_path / name)) for name in ("model", "metrics")}
    pretrain.python_func(
        method={"name": "dense_equivariance", "training": {"nodes": 2}},
        encoder=Encoder(width=16).model_dump(),
        training=training.model_dump(),
        seed=0,
        data_digest="",
        code_digest=code_digest(),
        table=Artifact(str(digits_table)),
        **artifacts,
    )
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["processes"] == config["training"]["nodes"] == 2
    metrics = json.loads((tmp_path / "metrics").read_text())
    assert metrics["steps"] == 6 and metrics["images"] == 6 * 32 and metrics["loss"] > 0
    # The step's machine is the one that trained: this process is none of two.
    record = step_record(artifacts["model"])
    assert record["machine"]["variables"]["WORLD_SIZE"] == "2" and "WORLD_SIZE" not in os.environ
    assert record["machine"].keys() == machine().keys() and record["metrics"] == metrics
    assert "machine" not in metrics
    assert artifacts["model"].metadata["digest"]
    assert list((tmp_path / "claim/checkpoints").iterdir()) == [], (
        "a finished training leaves nothing on the claim"
    )
    (asked,) = cluster.asked
    assert cluster.deleted == [asked["metadata"]["name"]]
    assert cluster.deleted[0].startswith("pretrain-dense-equivariance-")
