"""A client of the Kubeflow Pipelines server, whose errors are one line each."""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api
import urllib3

from unlabeled.errors import InputError

TOKEN = "/var/run/secrets/kubeflow/pipelines/token"
ANSWER_SECONDS = 20
MEANINGS = {
    401: "does not know you: the token is missing or has expired",
    403: "gives you no right to this; is the namespace{namespace} yours, and spelt right?",
    404: "does not know what was asked for",
}


@contextmanager
def pipelines_client(host: str, namespace: str | None) -> Iterator[kfp.Client]:
    """Give a client of the server at `host`; what the server answers to it becomes one line.

    Raises:
        InputError: the server does not answer or refuses.
    """
    if not host.startswith(("http://", "https://")):
        raise InputError(f"--host {host}: give a URL, as http://localhost:8888")
    credentials = None
    token = os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", TOKEN)
    if Path(token).exists():
        credentials = kfp.client.ServiceAccountTokenVolumeCredentials(path=token)
    try:
        _check_server(host, namespace, credentials)
        # The client tells of itself in warnings and on standard output, which is for the result alone.
        with warnings.catch_warnings(action="ignore", category=FutureWarning), redirect_stdout(sys.stderr):
            yield kfp.Client(host=host, namespace=namespace or "kubeflow", credentials=credentials)
    except kfp_server_api.ApiException as error:
        meaning = MEANINGS.get(error.status, "refuses").format(namespace=f" {namespace}" if namespace else "")
        raise InputError(
            f"Kubeflow Pipelines at {host} {meaning} ({error.status} {error.reason}){_message(error.body)}"
        ) from None
    except urllib3.exceptions.HTTPError as error:
        words = " ".join(str(error).split())[:200]
        raise InputError(
            f"no Kubeflow Pipelines server answers at {host}: {type(error).__name__}: {words}"
        ) from None


def _check_server(host: str, namespace: str | None, credentials: Any) -> None:
    """Ask the server how it is: the client itself would ask for half a minute, and take any web page for it."""
    configuration = kfp_server_api.Configuration(host=host.rstrip("/"))
    if credentials:
        credentials.refresh_api_key_hook(configuration)
        configuration.api_key_prefix["authorization"] = "Bearer"
    with kfp_server_api.ApiClient(configuration) as api:
        health, _, headers = kfp_server_api.HealthzServiceApi(api).healthz_service_get_healthz_with_http_info(
            _request_timeout=ANSWER_SECONDS
        )
    if "json" not in headers.get("Content-Type", ""):
        raise InputError(
            f"what answers at {host} is not Kubeflow Pipelines, perhaps its login page: give the address of ml-pipeline"
        )
    if health.multi_user and not namespace:
        raise InputError(
            f"Kubeflow Pipelines at {host} has several users: name your namespace with --namespace"
        )


def _message(body: Any) -> str:
    """Return what the server says of an error, on one line."""
    try:
        body = json.loads(body)
        text = body.get("message") or body.get("error") or ""
    except (TypeError, ValueError, AttributeError):
        return ""
    return f": {' '.join(str(text).split())[:300]}"
