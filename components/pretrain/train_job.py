"""Pretraining on several nodes: a TrainJob of Kubeflow Trainer, watched to its end."""

import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from unlabeled import progress
from unlabeled.errors import CheckFailed, InputError
from unlabeled.files import atomic_path, read_json
from unlabeled.parameters import Encoder, Training
from unlabeled.workspace import CACHE

log = logging.getLogger(__name__)

# Set by the pipeline where pretraining is to take several processes: a TrainJob as JSON.
VARIABLE = "UNLABELED_TRAIN_JOB"
GPU = "nvidia.com/gpu"
POLL_SECONDS = 5.0
# The API server of a cluster may be away for some minutes, the training goes on.
PATIENCE = 60
# The log of a job that has ended is waited for so long.
LOG_SECONDS = 30.0
LAST_LINES = 40
# What a line of a log looks like that names an exception; and one that only tells of the fall of another process.
RAISED = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Failed)\b")
ECHO = re.compile(r"ChildFailedError|SignalException|[Cc]onnection (closed|reset)|gloo|NCCL")
SILENT = (
    "none of its nodes tells of an error of its own: one may have run out of memory, or its machine was lost"
)


@dataclass(frozen=True)
class TrainJob:
    """What each node of a TrainJob is given.

    Args:
        runtime: ClusterTrainingRuntime or TrainingRuntime, made for torchrun.
        image: that of the steps.
        claim: PersistentVolumeClaim that this process and every node mount at `folder`.
        cpu, gpus: of a node; it runs a process per GPU, or one.
        memory: GiB of a node.
        shared_memory: size of /dev/shm.
        seconds: a job that takes longer has failed.
    """

    runtime: str
    image: str
    claim: str
    folder: str
    cpu: int
    memory: int
    gpus: int
    shared_memory: str
    seconds: int


def wanted() -> bool:
    """Tell whether the pipeline was compiled for several nodes, or several GPUs of one."""
    return VARIABLE in os.environ


def pretrain(
    table: Path,
    model: Path,
    method: dict[str, Any],
    encoder: Encoder,
    training: Training,
    seed: int,
    checkpoints: Path,
) -> dict[str, Any]:
    """Do what `unlabeled.training.pretrain.pretrain` does, on `training.nodes` nodes of the cluster.

    The result holds, beside, the `machine` that the first process ran on: this one's only waits.

    Table, model and checkpoints pass through the claim: `checkpoints` lies on it.

    Raises:
        InputError: the cluster has no such runtime, or gives this step no right to start jobs.
        CheckFailed: a node failed, and the message says how as far as its log does; or the time is up.
    """
    job = TrainJob(**json.loads(os.environ[VARIABLE]))
    room = checkpoints / "job"
    if not (room / "table").exists():
        with atomic_path(room / "table") as temporary:
            shutil.copytree(table, temporary)
    command = [
        "python", "-m", "torch.distributed.run", f"--nproc-per-node={max(1, job.gpus)}",
        "-m", "unlabeled.training.pretrain", str(room / "table"), str(room / "model"),
        "--method", json.dumps(method),
        "--encoder", encoder.model_dump_json(),
        "--training", training.model_dump_json(),
        "--seed", str(seed),
        "--checkpoints", str(checkpoints),
        "--result", str(room / "result.json"),
    ]  # fmt: skip
    # A method may ask for nodes of its own, as for every key of the training.
    nodes = Training(**(training.model_dump() | method.get("training", {}))).nodes
    name = f"pretrain-{method['name'].replace('_', '-')}-{uuid.uuid4().hex[:8]}"
    run_job(name, command, nodes, job)
    with atomic_path(model) as temporary:
        shutil.copytree(room / "model", temporary)
    return read_json(room / "result.json")


def run_job(name: str, command: list[str], nodes: int, job: TrainJob) -> None:
    """Run `command` as a TrainJob, its log on standard error; whatever happens, no job is left behind.

    SIGTERM, which Kubeflow sends when a run is cancelled or the step's time is up, ends it as well.
    """
    from kubeflow.trainer import CustomTrainerContainer, TrainerClient
    from kubeflow.trainer.options import ActiveDeadlineSeconds, Name, TrainerCommand

    client = TrainerClient()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"TrainJob {name} is ended: SIGTERM"))
    resources = {"cpu": str(job.cpu), "memory": f"{job.memory}Gi"}
    if job.gpus:
        resources[GPU] = str(job.gpus)
    environment = {CACHE: job.folder, progress.VARIABLE: progress.LOG}
    try:
        client.train(
            runtime=job.runtime,
            trainer=CustomTrainerContainer(job.image, nodes, resources, environment),
            options=[Name(name), TrainerCommand(command), ActiveDeadlineSeconds(job.seconds), _patch(job)],
        )
        _watch(client, name, time.monotonic() + job.seconds)
    except (RuntimeError, TimeoutError) as error:
        raise _explained(error, job.runtime) from error
    finally:
        # Nothing may keep the job from being deleted, not even a second SIGTERM.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _delete(client, name)
        signal.signal(signal.SIGTERM, before)


def _patch(job: TrainJob) -> Any:
    """Return what the pods of the runtime are given beside a command: the claim, shared memory, a way to GPUs."""
    from kubeflow.trainer import options

    volumes = [
        {"name": "cache", "persistentVolumeClaim": {"claimName": job.claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": job.shared_memory}},
    ]
    mounts = [
        {"name": "cache", "mountPath": job.folder},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    pod = options.PodTemplatePatch(
        # A mesh's proxy beside the training would keep the pod from ending, and sees no traffic of nccl or gloo.
        metadata={"labels": {"sidecar.istio.io/inject": "false"}},
        spec=options.PodSpecPatch(
            volumes=volumes,
            containers=[options.ContainerPatch("node", volume_mounts=mounts)],
            tolerations=[{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}] if job.gpus else None,
        ),
    )
    node = options.ReplicatedJobPatch("node", options.JobTemplatePatch(spec=options.JobSpecPatch(pod)))
    jobs = options.JobSetTemplatePatch(spec=options.JobSetSpecPatch([node]))
    return options.RuntimePatch(options.TrainingRuntimeSpecPatch(jobs))


def _watch(client: Any, name: str, deadline: float) -> None:
    """Print the first node's log as it comes, until the job has ended.

    Raises:
        CheckFailed: it failed, is gone, or goes on past the deadline (of time.monotonic).
        RuntimeError: the cluster does not answer any more.
    """
    from kubeflow.trainer.constants import constants

    status, pod, printed, failures = "", None, 0, 0
    lines: SimpleQueue[str | None] | None = None
    last = deque[str](maxlen=LAST_LINES)
    while time.monotonic() < deadline:
        try:
            job = client.get_job(name)
        except (RuntimeError, TimeoutError) as error:
            failures += 1
            if _status(error) == 404:
                raise CheckFailed(f"TrainJob {name} is gone: somebody deleted it") from error
            if failures > PATIENCE or _status(error) in (401, 403):
                raise
            time.sleep(POLL_SECONDS)
            continue
        failures = 0
        if job.status != status:
            status = job.status
            print(f"TrainJob {name}: {status}", file=sys.stderr, flush=True)
        first = next((step.pod_name for step in job.steps if step.name == "node-0"), pod)
        if first != pod:
            pod, printed, lines = first, 0, None
        if lines is None:
            lines = _follow(client, name, "node-0", printed)
        ended = job.status in (constants.TRAINJOB_COMPLETE, constants.TRAINJOB_FAILED)
        try:
            while (line := lines.get(timeout=LOG_SECONDS if ended else POLL_SECONDS)) is not None:
                print(line, file=sys.stderr, flush=True)
                last.append(line)
                printed += 1
            # A log breaks off where its connection lives too long: the next turn reads on.
            lines = None
        except Empty:
            pass
        if job.status == constants.TRAINJOB_COMPLETE:
            return
        if job.status == constants.TRAINJOB_FAILED:
            raise CheckFailed(f"TrainJob {name} failed: {_reason(client, job, last)}")
        if lines is None:
            time.sleep(POLL_SECONDS)
    raise CheckFailed(f"TrainJob {name} is not done in the time it has; {printed} lines of its log are above")


def _follow(client: Any, name: str, node: str, skip: int = 0) -> SimpleQueue[str | None]:
    """Return the lines of a node's log but the first, as they come; None where it ends or cannot be read on.

    They are read by a thread of their own. Python handles a signal between two steps of its main thread: one that
    comes just before that waits for a line would be heard with the next line only, and a dead connection has none.
    """
    lines: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        try:
            for line in islice(client.get_job_logs(name, node, follow=True), skip, None):
                lines.put(line)
        except (RuntimeError, TimeoutError) as error:
            log.warning("%s: %s", error, error.__cause__)
        finally:
            lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _reason(client: Any, job: Any, last: deque[str]) -> str:
    """Print the last lines of each failed node but the first, whose log is printed; return the line that tells most."""
    lines = list(last)
    for step in job.steps:
        if step.status == "Failed" and step.name != "node-0":
            ending = deque(iter(_follow(client, job.name, step.name).get, None), LAST_LINES)
            print(f"The last lines of {step.name}:", *ending, sep="\n", file=sys.stderr, flush=True)
            lines += ending
    causes = [line for line in lines if RAISED.match(line) and not ECHO.search(line)]
    return causes[-1].strip() if causes else SILENT


def _delete(client: Any, name: str) -> None:
    try:
        client.delete_job(name)
    except (RuntimeError, TimeoutError) as error:
        if _status(error) != 404:
            log.warning("TrainJob %s may be left behind: %s: %s", name, error, error.__cause__)


def _status(error: Exception) -> int | None:
    """Return the HTTP status that the cluster answered with."""
    return getattr(error.__cause__, "status", None)


def _explained(error: Exception, runtime: str) -> Exception:
    """Return what the cluster's answer means to the one who asked for several nodes."""
    status = _status(error)
    answer = " ".join(str(getattr(error.__cause__, "body", None) or error.__cause__).split())[:300]
    if status in (401, 403):
        return InputError(
            "this step may not run TrainJobs: its service account has to create, get and delete trainjobs, to get "
            f"runtimes, and to read pods and their logs: {answer}"
        )
    if status == 404:
        return InputError(f"the cluster has no runtime {runtime}, or no Kubeflow Trainer: {answer}")
    if status in (400, 422):
        return InputError(f"the cluster refuses the TrainJob: {answer}")
    return CheckFailed(f"the cluster does not answer: {error}: {answer}")
