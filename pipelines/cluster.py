"""The pipeline on Kubeflow: compile it, submit it, schedule it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unlabeled.errors import InputError
from unlabeled.files import atomic_path

PIPELINE = "unlabeled-training"


def compile_pipeline(output: Path) -> None:
    """Write the pipeline as IR YAML, byte for byte the same for the same code.

    Raises:
        InputError: the file name does not end in .yaml.
    """
    from kfp import compiler

    from pipelines.training import training

    if output.suffix not in (".yaml", ".yml"):
        raise InputError(f"{output}: the compiled pipeline is a .yaml file")
    with atomic_path(output) as temporary:
        compiler.Compiler().compile(training, str(temporary))


def submit(host: str, experiment: str, run: str, arguments: dict[str, Any], namespace: str | None) -> str:
    """Start one run on the Kubeflow Pipelines server at `host`; return its id.

    Raises:
        InputError: the server does not answer or refuses.
    """
    from pipelines.training import training

    with _errors_of(host):
        result = _client(host, namespace).create_run_from_pipeline_func(
            training,
            arguments,
            run_name=run,
            experiment_name=experiment,
            enable_caching=True,
            namespace=namespace,
        )
    return result.run_id


def schedule(
    host: str, experiment: str, name: str, cron: str, arguments: dict[str, Any], namespace: str | None
) -> str:
    """Make (or make anew) the recurring run `name`; return its id. One run at a time, missed ones are not made up for.

    Raises:
        InputError: the cron expression has not six fields, or the server does not answer or refuses.
    """
    check_cron(cron)
    with _errors_of(host), tempfile.TemporaryDirectory() as folder:
        client = _client(host, namespace)
        package = Path(folder) / "pipeline.yaml"
        compile_pipeline(package)
        experiment_id = client.create_experiment(experiment, namespace=namespace).experiment_id
        # The API has no update: the old one goes, the new one comes.
        for old in _recurring_runs(client, experiment_id, name):
            client.delete_recurring_run(old.recurring_run_id)
        made = client.create_recurring_run(
            experiment_id=experiment_id,
            job_name=name,
            cron_expression=cron,
            max_concurrency=1,
            no_catchup=True,
            params=arguments,
            pipeline_package_path=str(package),
            enable_caching=True,
        )
    return made.recurring_run_id


def check_cron(cron: str) -> None:
    """Refuse a cron expression that Kubeflow would misread: it takes six fields, seconds first."""
    fields = cron.split()
    if len(fields) != 6:
        hint = f"; did you mean '0 {cron}'?" if len(fields) == 5 else ""
        raise InputError(
            f"cron '{cron}' has {len(fields)} fields, Kubeflow takes six, seconds first, as '0 0 3 * * *'{hint}"
        )
    for text in fields:
        if not all(character.isalnum() or character in "*/,-?" for character in text):
            raise InputError(f"cron '{cron}': field '{text}' is not valid")


def _recurring_runs(client: Any, experiment_id: str, name: str) -> list[Any]:
    found, token = [], ""
    while True:
        page = client.list_recurring_runs(page_token=token, page_size=100, experiment_id=experiment_id)
        found += [run for run in page.recurring_runs or [] if run.display_name == name]
        token = page.next_page_token
        if not token:
            return found


def _client(host: str, namespace: str | None) -> Any:
    import kfp

    token = Path("/var/run/secrets/kubeflow/pipelines/token")
    credentials = kfp.client.ServiceAccountTokenVolumeCredentials(path=str(token)) if token.exists() else None
    return kfp.Client(host=host, namespace=namespace or "kubeflow", credentials=credentials)


@contextmanager
def _errors_of(host: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        status, reason = getattr(error, "status", None), getattr(error, "reason", None)
        if status:
            raise InputError(f"Kubeflow Pipelines at {host} refused: {status} {reason}") from None
        words = " ".join(str(error).split())[:200]
        raise InputError(
            f"no Kubeflow Pipelines server answers at {host}: {type(error).__name__}: {words}"
        ) from None
