"""The pipeline on Kubeflow: `unlabeled compile`, `submit` and `schedule`."""

import time
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

app = typer.Typer()

Host = Annotated[str, typer.Option(envvar="KFP_HOST", help="URL of the Kubeflow Pipelines API.")]
Experiment = Annotated[str, typer.Option(help="Kubeflow experiment.")]
Namespace = Annotated[str | None, typer.Option(help="Kubernetes namespace of the user.")]
RegistryUrl = Annotated[str, typer.Option("--registry", help="Git URL of the registry.")]
Remote = Annotated[str, typer.Option(help="URL of the registry's DVC remote.")]
Digest = Annotated[str, typer.Option("--data-digest", help="DVC digest of data that is not on this machine.")]
Gpus = Annotated[int, typer.Option(min=0, help="GPUs of a node that trains; 0: none.")]
CacheClaim = Annotated[
    str, typer.Option(help="PersistentVolumeClaim for checkpoints; several nodes need one.")
]
Runtime = Annotated[str, typer.Option(help="Kubeflow Trainer runtime for several nodes.")]
TORCH_RUNTIME = "torch-distributed"


@app.command("compile")
def compile_(
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("pipeline.yaml"),
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="Write Pipeline and PipelineVersion objects for kubectl.")
    ] = False,
    namespace: Namespace = None,
    gpus: Gpus = 0,
    nodes: Annotated[int, typer.Option(min=1, help="The most nodes that training.nodes may ask for.")] = 1,
    cache_claim: CacheClaim = "",
    runtime: Runtime = TORCH_RUNTIME,
) -> None:
    """Compile the pipeline for Kubeflow."""
    from pipelines.cluster import Cluster, compile_pipeline

    cluster = Cluster(gpus, nodes, cache_claim, runtime)
    compile_pipeline(output, cluster=cluster, kubernetes=kubernetes, namespace=namespace)
    print(output)


@app.command()
def submit(
    host: Host, registry: RegistryUrl, remote: Remote, experiment: Experiment = "unlabeled",
    namespace: Namespace = None, profile: Profile = "cpu", data: Data = None, data_digest: Digest = "",
    methods: Methods = None, seed: Seed = None, set_: Set = None, parameters: ParametersFile = None,
    gpus: Gpus = 0, cache_claim: CacheClaim = "", runtime: Runtime = TORCH_RUNTIME,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:  # fmt: skip
    """Start one run on Kubeflow."""
    asked = parameters_of(profile, data, methods, seed, set_, parameters)
    name, arguments, cluster = _request(
        asked, data_digest, registry, remote, gpus, cache_claim, runtime, workspace
    )

    from pipelines.cluster import submit as start

    run = f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    print(start(host, experiment, run, {"run": run, **arguments}, namespace, cluster))


@app.command()
def schedule(
    host: Host, registry: RegistryUrl, remote: Remote,
    cron: Annotated[str, typer.Option(help="Six fields, seconds first, as '0 0 3 * * *'.")],
    name: Annotated[
        str, typer.Option(help="Name of the recurring run; one of that name is replaced.")
    ] = "unlabeled",
    experiment: Experiment = "unlabeled", namespace: Namespace = None, profile: Profile = "cpu",
    data: Data = None, data_digest: Digest = "", methods: Methods = None, seed: Seed = None, set_: Set = None,
    parameters: ParametersFile = None, gpus: Gpus = 0, cache_claim: CacheClaim = "",
    runtime: Runtime = TORCH_RUNTIME, workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:  # fmt: skip
    """Run the pipeline on Kubeflow again and again."""
    from pipelines.cron import check_cron

    check_cron(cron)
    asked = parameters_of(profile, data, methods, seed, set_, parameters)
    _, arguments, cluster = _request(
        asked, data_digest, registry, remote, gpus, cache_claim, runtime, workspace
    )

    from pipelines.cluster import schedule as repeat

    arguments = {"run": f"{name}-[[ScheduledTime]]", **arguments}
    print(repeat(host, experiment, name, cron, arguments, namespace, cluster))


def _request(
    asked: Any, digest: str, registry: str, remote: str, gpus: int, claim: str, runtime: str, workspace: Path
) -> tuple[str, dict[str, Any], Any]:
    """Return the data's name, the pipeline's arguments without `run`, and what the cluster is to give."""
    from pipelines import request
    from pipelines.resources import STEPS, Cluster

    # The cores are those of a step, not of this machine.
    threads = asked.training.threads or STEPS["pretrain"].cpu
    training = asked.training.model_copy(update={"threads": threads})
    asked = request.resolve(asked.model_copy(update={"training": training}), on_cluster=True)
    arguments = request.pipeline_arguments(asked, workspace / "cache", registry, remote, digest=digest)
    return request.short_name(asked.data), arguments, Cluster(gpus, request.nodes(asked), claim, runtime)
