"""What each step asks of the cluster: the one place of these values. A run on this machine uses none of them."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from kfp import dsl, kubernetes
from kfp.dsl.structures import ResourceSpec

from components import IMAGE
from components.pretrain.train_job import GPU, TrainJob
from components.pretrain.train_job import VARIABLE as TRAIN_JOB
from pipelines.tasks import with_tasks
from unlabeled import progress
from unlabeled.environment import IMAGE_DIGEST
from unlabeled.errors import InputError
from unlabeled.workspace import CACHE, THREADS


@dataclass(frozen=True)
class Step:
    """What a step asks for.

    Args:
        cpu: cores, and threads.
        memory: GiB. Request and limit are one for both: no step is throttled below what it asked for, or evicted
            because it took more.
        hours: a try that takes longer is ended.
        gpu: computes on a GPU where the cluster gives one.
    """

    cpu: int
    memory: int
    hours: int
    gpu: bool = False


DATA = Step(cpu=2, memory=8, hours=4)
PROBE = Step(cpu=4, memory=8, hours=4, gpu=True)
TRAINING = Step(cpu=4, memory=16, hours=24, gpu=True)
SERVING = Step(cpu=2, memory=4, hours=1)
REPORT = Step(cpu=1, memory=2, hours=1)
# A pretraining that only waits for the nodes that train.
WAITING = Step(cpu=1, memory=2, hours=25)

STEPS = {
    "pin": DATA,
    "ingest": DATA,
    "validate": DATA,
    "check_validation": REPORT,
    "baselines": PROBE,
    "pretrain": TRAINING,
    "self_label": PROBE,
    "evaluate": PROBE,
    "select": REPORT,
    "finetune": TRAINING,
    "export": SERVING,
    "check_serving": SERVING,
    "record": REPORT,
    "report": REPORT,
    "ablate": PROBE,
    "ablation_report": REPORT,
    "compare_labels": TRAINING,
    "compare_labels_report": REPORT,
    "drift": SERVING,
    "drift_alert": REPORT,
}
# They keep something between tries: fetched data, checkpoints. Data may lie there, and what applications log.
CACHED = {"pin", "ingest", "pretrain", "compare_labels", "drift"}
# A program that fails, or an evicted pod: a step may be done again, and a training goes on from its checkpoint. A pod
# that is gone with its node is an error to Argo, not a failure, and KFP leaves Argo to try only failures again.
RETRIES, BACKOFF = 2, "30s"
# Their failure is an answer, and the same each time.
GATES = {"check_validation", "drift_alert"}
# Of the processes and loaders of one step; it counts as memory.
SHARED_MEMORY = "2Gi"
# A run that hangs must not hold the schedule for ever.
RUN_HOURS = 72
CACHE_FOLDER = "/cache"
# What git and AWS clients read from their environment; a Secret holds those that its registry asks for.
CREDENTIALS = (
    "GIT_CONFIG_COUNT",
    "GIT_CONFIG_KEY_0",
    "GIT_CONFIG_VALUE_0",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
)


@dataclass(frozen=True)
class Cluster:
    """What the cluster gives to a pipeline.

    Args:
        gpus: GPUs of each node that trains; 0: none.
        nodes: the most nodes that a pretraining takes.
        cache_claim: PersistentVolumeClaim for fetched data and checkpoints, so that a retried training resumes;
            steps that run at once, on several nodes, all write to it. Empty: none.
        runtime: the Kubeflow Trainer runtime that several nodes, or several GPUs of one, train with.
        secret: Secret with the registry's credentials, keys of CREDENTIALS. Empty: none.

    Raises:
        InputError: several nodes, and no claim.
    """

    gpus: int = 0
    nodes: int = 1
    cache_claim: str = ""
    runtime: str = "torch-distributed"
    secret: str = ""

    def __post_init__(self) -> None:
        if self.train_jobs and not self.cache_claim:
            raise InputError(
                "several nodes, or several GPUs of one, train through a volume that all of them can write: name its "
                "PersistentVolumeClaim with --cache-claim"
            )

    @property
    def train_jobs(self) -> bool:
        """Whether pretraining takes more than one process."""
        return self.nodes > 1 or self.gpus > 1


def on_cluster(pipeline: Any, cluster: Cluster) -> Any:
    """Return a pipeline whose steps ask for what STEPS gives them; the one given stays as it is.

    Args:
        pipeline: made by `dsl.pipeline`.
    """
    return with_tasks(
        pipeline,
        lambda name, task: _settle(name, task, cluster),
        pipeline_config=dsl.PipelineConfig(active_deadline_seconds=RUN_HOURS * 3600),
    )


def _settle(name: str, task: dsl.PipelineTask, cluster: Cluster) -> None:
    step = STEPS[name]
    environment = {progress.VARIABLE: progress.LOG}
    # A name's digest follows its @; a tag can be moved, and tells nothing for a record.
    if digest := IMAGE.partition("@")[2]:
        environment[IMAGE_DIGEST] = digest
    if cluster.cache_claim and name in CACHED:
        environment[CACHE] = CACHE_FOLDER
        kubernetes.mount_pvc(task, cluster.cache_claim, CACHE_FOLDER)
    if cluster.secret and "registry" in task.component_spec.inputs:
        keys = {key: key for key in CREDENTIALS}
        kubernetes.use_secret_as_env(task, cluster.secret, keys, optional=True)
    if name == "pretrain" and cluster.train_jobs:
        environment[TRAIN_JOB] = json.dumps(asdict(_train_job(step, cluster)), sort_keys=True)
        step = WAITING
    resources = ResourceSpec(str(step.cpu), str(step.cpu), f"{step.memory}Gi", f"{step.memory}Gi")
    if step.gpu and cluster.gpus:
        resources.accelerator_type, resources.accelerator_count = GPU, "1"
        kubernetes.add_toleration(task, key=GPU, operator="Exists", effect="NoSchedule")
    # The task's own setters do the same, and look through the whole stack each time: seconds, in a test.
    task.container_spec.resources = resources
    task.container_spec.env = {**environment, THREADS: str(step.cpu)}
    if name not in GATES:
        # Argo counts this from the start of the first try: KFP's default of an hour would leave a long training, which
        # fails later than that, without another try, and end a second try an hour after the first began.
        task.set_retry(RETRIES, backoff_duration=BACKOFF, backoff_max_duration=f"{RUN_HOURS}h")
    kubernetes.set_timeout(task, step.hours * 3600)
    kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=SHARED_MEMORY)


def _train_job(step: Step, cluster: Cluster) -> TrainJob:
    return TrainJob(
        runtime=cluster.runtime,
        image=IMAGE,
        claim=cluster.cache_claim,
        folder=CACHE_FOLDER,
        cpu=step.cpu * max(1, cluster.gpus),
        memory=step.memory * max(1, cluster.gpus),
        gpus=cluster.gpus,
        shared_memory=SHARED_MEMORY,
        seconds=step.hours * 3600,
    )
