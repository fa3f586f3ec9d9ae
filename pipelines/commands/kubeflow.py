"""The pipeline on Kubeflow: `unlabeled compile`, `submit` and `schedule`."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.options import (
    DEFAULT_WORKSPACE,
    Data,
    Methods,
    ParametersFile,
    Profile,
    Seed,
    Set,
    Workspace,
    parameters_of,
)
from unlabeled.errors import InputError

app = typer.Typer()


class Pipeline(StrEnum):
    """What is run on the cluster; the studies (`ablate`, `compare`) have a `compile` of their own."""

    TRAINING, DRIFT = "training", "drift"


Which = Annotated[Pipeline, typer.Option("--pipeline", help="What to run.")]
ServedRun = Annotated[
    str,
    typer.Option(
        "--run",
        help="drift: the run that is served, or its stage, as encoder#prod; default: the newest then.",
    ),
]
RecentInputs = Annotated[
    str, typer.Option("--recent", help="drift: path or URL, for the pods, of what applications log.")
]
ServerUrl = Annotated[
    str, typer.Option("--url", help="drift: gRPC address of the server that embeds images; default: none.")
]
Host = Annotated[str, typer.Option(envvar="KFP_HOST", help="URL of the Kubeflow Pipelines API.")]
Experiment = Annotated[str, typer.Option(help="Kubeflow experiment.")]
Namespace = Annotated[str | None, typer.Option(help="Kubernetes namespace of the user.")]
RegistryUrl = Annotated[str, typer.Option("--registry", help="Git URL of the registry.")]
Remote = Annotated[str, typer.Option(help="URL of the registry's DVC remote.")]
Digest = Annotated[str, typer.Option("--data-digest", help="DVC digest of data that is not on this machine.")]
HeldDigest = Annotated[
    str,
    typer.Option("--data-digest", help="DVC digest to hold to; default: that of the data when a run starts."),
]
Gpus = Annotated[int, typer.Option(min=0, help="GPUs of a node that trains; 0: none.")]
CacheClaim = Annotated[
    str, typer.Option(help="PersistentVolumeClaim for checkpoints; several nodes need one.")
]
Runtime = Annotated[str, typer.Option(help="Kubeflow Trainer runtime for several nodes.")]
Secret = Annotated[
    str, typer.Option(help="Secret with the registry's credentials, for the steps that use it.")
]
TORCH_RUNTIME = "torch-distributed"


@app.command("compile")
def compile_(
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("pipeline.yaml"),
    pipeline: Which = Pipeline.TRAINING,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="Write Pipeline and PipelineVersion objects for kubectl.")
    ] = False,
    namespace: Namespace = None,
    gpus: Gpus = 0,
    nodes: Annotated[int, typer.Option(min=1, help="The most nodes that training.nodes may ask for.")] = 1,
    cache_claim: CacheClaim = "",
    runtime: Runtime = TORCH_RUNTIME,
    secret: Secret = "",
) -> None:
    """Compile the pipeline for Kubeflow."""
    from pipelines.cluster.jobs import Cluster, compile_pipeline

    cluster = Cluster(gpus, nodes, cache_claim, runtime, secret)
    compile_pipeline(output, _pipeline(pipeline), cluster, kubernetes, namespace)
    print(output)


@app.command()
def submit(
    host: Host, registry: RegistryUrl, remote: Remote, experiment: Experiment = "unlabeled",
    namespace: Namespace = None, profile: Profile = "cpu", data: Data = None, data_digest: Digest = "",
    methods: Methods = None, seed: Seed = None, set_: Set = None, parameters: ParametersFile = None,
    gpus: Gpus = 0, cache_claim: CacheClaim = "", runtime: Runtime = TORCH_RUNTIME,
    workspace: Workspace = DEFAULT_WORKSPACE, pipeline: Which = Pipeline.TRAINING, served: ServedRun = "",
    recent: RecentInputs = "", url: ServerUrl = "", secret: Secret = "",
) -> None:  # fmt: skip
    """Start one run on Kubeflow."""
    asked = parameters_of(profile, data, methods, seed, set_, parameters)
    _check_options(pipeline, data, data_digest, methods, gpus, served, recent, url)
    if pipeline == Pipeline.DRIFT:
        name, arguments, cluster = _watch(asked, registry, remote, served, recent, url, cache_claim, secret)
    else:
        name, arguments, cluster = _request(
            asked, data_digest or None, registry, remote, gpus, cache_claim, runtime, secret, workspace
        )

    from pipelines.cluster.jobs import submit as start

    run = f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    print(start(host, experiment, run, {"run": run} | arguments, namespace, cluster, _pipeline(pipeline)))


@app.command()
def schedule(
    host: Host, registry: RegistryUrl, remote: Remote,
    cron: Annotated[str, typer.Option(help="Six fields, seconds first, as '0 0 3 * * *'.")],
    name: Annotated[
        str | None,
        typer.Option(help="Name of the recurring run; one of that name is replaced. Default: unlabeled[-drift]."),
    ] = None,
    experiment: Experiment = "unlabeled", namespace: Namespace = None, profile: Profile = "cpu",
    data: Data = None, data_digest: HeldDigest = "", methods: Methods = None, seed: Seed = None, set_: Set = None,
    parameters: ParametersFile = None, gpus: Gpus = 0, cache_claim: CacheClaim = "",
    runtime: Runtime = TORCH_RUNTIME, workspace: Workspace = DEFAULT_WORKSPACE,
    pipeline: Which = Pipeline.TRAINING, served: ServedRun = "", recent: RecentInputs = "", url: ServerUrl = "",
    secret: Secret = "",
) -> None:  # fmt: skip
    """Run a pipeline on Kubeflow again and again."""
    from pipelines.cluster.cron import check_cron
    from unlabeled.data import sources
    from unlabeled.lineage.commit import check_name

    check_cron(cron)
    asked = parameters_of(profile, data, methods, seed, set_, parameters)
    _check_options(pipeline, data, data_digest, methods, gpus, served, recent, url)
    if pipeline == Pipeline.DRIFT:
        name = name or "unlabeled-drift"
        _, arguments, cluster = _watch(asked, registry, remote, served, recent, url, cache_claim, secret)
    else:
        name = name or "unlabeled"
        check_name(f"{name}-0")
        if not data_digest and "/" not in asked.data:  # a name is known here, a path is one of the pods
            sources.data_digest(asked.data, workspace / "cache")
        _, arguments, cluster = _request(
            asked, data_digest, registry, remote, gpus, cache_claim, runtime, secret, workspace
        )

    from pipelines.cluster.jobs import schedule as repeat

    # Every run of a schedule has these arguments: `record` puts KFP's id of the run in place of the last word.
    arguments = {"run": f"{name}-{{job}}"} | arguments
    what = _pipeline(pipeline, fresh=not data_digest)
    print(repeat(host, experiment, name, cron, arguments, namespace, cluster, what))


def _pipeline(name: Pipeline, fresh: bool = False) -> Any:
    """Return what is to run; fresh: on the data as they are when it starts."""
    if name == Pipeline.DRIFT:
        from pipelines.drift import drift_watch

        return drift_watch
    from pipelines.training import training, training_on_fresh_data

    return training_on_fresh_data if fresh else training


def _check_options(
    pipeline: Pipeline, data: str | None, digest: str, methods: str | None, gpus: int, run: str, recent: str, url: str
) -> None:  # fmt: skip
    """Refuse what only the other pipeline takes."""
    given = {
        Pipeline.TRAINING: {"data": data, "data-digest": digest, "methods": methods, "gpus": gpus},
        Pipeline.DRIFT: {"run": run, "recent": recent, "url": url},
    }
    for owner, options in given.items():
        for option, value in options.items():
            if value and owner != pipeline:
                raise InputError(f"--{option} goes with --pipeline {owner}, not with {pipeline}")


def _watch(
    asked: Any, registry: str, remote: str, run: str, recent: str, url: str, claim: str, secret: str
) -> tuple[str, dict[str, Any], Any]:
    """Return the same as `_request`, for drift; its `run` is the one that is served."""
    from pipelines.cluster.resources import Cluster
    from unlabeled.digest import code_digest

    if not recent:
        raise InputError("--pipeline drift takes --recent: where applications log, as s3://inputs/recent")
    arguments = {
        "run": run,
        "registry": registry,
        "remote": remote,
        "recent": recent,
        "url": url,
        "code_digest": code_digest(),
        "parameters": asked.drift.model_dump(mode="json"),
        "seed": asked.seed,
    }
    return "drift", arguments, Cluster(cache_claim=claim, secret=secret)


def _request(
    asked: Any,
    digest: str | None,
    registry: str,
    remote: str,
    gpus: int,
    claim: str,
    runtime: str,
    secret: str,
    workspace: Path,
) -> tuple[str, dict[str, Any], Any]:
    """Return the data's name, the pipeline's arguments without `run`, and what the cluster is to give."""
    from pipelines import request
    from pipelines.cluster.resources import STEPS, Cluster

    # The cores are those of a step, not of this machine.
    threads = asked.training.threads or STEPS["pretrain"].cpu
    training = asked.training.model_copy(update={"threads": threads})
    asked = request.resolve(asked.model_copy(update={"training": training}), on_cluster=True)
    arguments = request.pipeline_arguments(asked, workspace / "cache", registry, remote, digest=digest)
    return (
        request.short_name(asked.data),
        arguments,
        Cluster(gpus, request.nodes(asked), claim, runtime, secret),
    )
