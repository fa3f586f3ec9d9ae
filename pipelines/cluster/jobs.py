"""The pipeline on Kubeflow: compile it, submit it, schedule it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kfp
from google.protobuf import json_format
from kfp import compiler

from pipelines.cluster.client import pipelines_client
from pipelines.cluster.cron import check_cron
from pipelines.cluster.resources import Cluster, on_cluster
from pipelines.training import training
from unlabeled.digest import code_digest, json_digest
from unlabeled.errors import InputError
from unlabeled.files import atomic_path


def compile_pipeline(
    output: Path,
    pipeline: Any = training,
    cluster: Cluster | None = None,
    kubernetes: bool = False,
    namespace: str | None = None,
) -> None:
    """Write a pipeline as IR YAML: byte for byte the same for the same code.

    Args:
        kubernetes: write `pipelines.kubeflow.org/v2beta1` objects instead, a Pipeline and a PipelineVersion. A version
            cannot be changed, so its name holds all it depends on: package, code, and the pipeline as compiled.
        namespace: of those objects.

    Raises:
        InputError: the file name does not end in .yaml.
    """
    if output.suffix not in (".yaml", ".yml"):
        raise InputError(f"{output}: the compiled pipeline is a .yaml file")
    settled = on_cluster(pipeline, cluster or Cluster())
    options = None
    if kubernetes:
        made = [json_format.MessageToDict(part) for part in (settled.pipeline_spec, settled.platform_spec)]
        release = f"{version('unlabeled')}-{code_digest()[:12]}-{json_digest(made)[:8]}"
        options = compiler.compiler_utils.KubernetesManifestOptions(
            pipeline_version_name=f"{pipeline.name}-{release}",
            pipeline_version_display_name=release,
            namespace=namespace,
            include_pipeline_manifest=True,
        )
    with atomic_path(output) as temporary:
        compiler.Compiler().compile(
            settled,
            str(temporary),
            kubernetes_manifest_format=kubernetes,
            kubernetes_manifest_options=options,
        )


def submit(
    host: str,
    experiment: str,
    run: str,
    arguments: dict[str, Any],
    namespace: str | None,
    cluster: Cluster | None = None,
    pipeline: Any = training,
) -> str:
    """Start one run on the Kubeflow Pipelines server at `host`; return its id.

    Raises:
        InputError: the server does not answer or refuses.
    """
    with pipelines_client(host, namespace) as client, _compiled(pipeline, cluster) as package:
        result = client.create_run_from_pipeline_package(
            str(package), arguments, run_name=run, experiment_name=experiment, namespace=namespace
        )
    return result.run_id


def schedule(
    host: str,
    experiment: str,
    name: str,
    cron: str,
    arguments: dict[str, Any],
    namespace: str | None,
    cluster: Cluster | None = None,
    pipeline: Any = training,
) -> str:
    """Make (or make anew) the recurring run `name`; return its id. One run at a time, missed ones are not made up for.

    Raises:
        InputError: the cron expression is not valid, or the server does not answer or refuses.
    """
    check_cron(cron)
    with pipelines_client(host, namespace) as client, _compiled(pipeline, cluster) as package:
        experiment_id = client.create_experiment(experiment, namespace=namespace).experiment_id
        # The API has no update: the old one goes, the new one comes.
        for old in _recurring_runs(client, name, namespace):
            client.delete_recurring_run(old.recurring_run_id)
        made = client.create_recurring_run(
            experiment_id=experiment_id,
            job_name=name,
            cron_expression=cron,
            max_concurrency=1,
            no_catchup=True,
            params=arguments,
            pipeline_package_path=str(package),
        )
    return made.recurring_run_id


def _recurring_runs(client: kfp.Client, name: str, namespace: str | None) -> list[Any]:
    """Return those of that name, whatever experiment they belong to."""
    found, token = [], ""
    while True:
        page = client.list_recurring_runs(page_token=token, page_size=100, namespace=namespace)
        found += [run for run in page.recurring_runs or [] if run.display_name == name]
        token = page.next_page_token
        if not token:
            return found


@contextmanager
def _compiled(pipeline: Any, cluster: Cluster | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "pipeline.yaml"
        compile_pipeline(package, pipeline, cluster)
        yield package
