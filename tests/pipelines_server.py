"""A small Kubeflow Pipelines server: the v2beta1 endpoints that the project calls, each body checked strictly."""

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlparse

import kfp_server_api
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

API = "/apis/v2beta1/"
UNAUTHENTICATED, INVALID, FORBIDDEN, MISSING = (401, 16), (400, 3), (403, 7), (404, 5)


class Refused(Exception):
    """An answer other than 200: HTTP status and gRPC code as the real server pairs them, and its words."""


class PipelinesServer:
    """What the server keeps, and how it answers.

    Args:
        namespaces: those that the user may work in; none: the server has a single user.
        token: what a request must carry as its bearer token, or nothing.
        page: recurring runs on a page of the list, whatever the client asks for.
    """

    def __init__(self, namespaces: tuple[str, ...] = (), token: str = "", page: int = 2) -> None:
        self.namespaces, self.token, self.page = namespaces, token, page
        self.experiments: dict[str, dict[str, Any]] = {}
        self.recurring_runs: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        self.host = ""

    def answer(self, method: str, path: str, query: dict[str, str], body: Any, token: str) -> Any:
        self.requests.append(f"{method} {path}")
        if self.token and token != f"Bearer {self.token}":
            raise Refused(UNAUTHENTICATED, "Request header error: there is no user identity header")
        if (method, path) == ("GET", "healthz"):
            return {"multi_user": bool(self.namespaces), "commit_sha": "unknown"}
        if (method, path) == ("GET", "experiments"):
            (predicate,) = json.loads(query["filter"])["predicates"]
            assert predicate["key"] == "display_name"
            mine = self._in_namespace(self.experiments, query)
            return {
                "experiments": [found for found in mine if found["display_name"] == predicate["stringValue"]]
            }
        if (method, path) == ("POST", "experiments"):
            checked(body, "V2beta1Experiment")
            self._allow(body.get("namespace", ""))
            return self._keep(self.experiments, "experiment_id", body)
        if (method, path) == ("GET", "recurringruns"):
            first = int(query.get("page_token") or 0)
            mine = list(self._in_namespace(self.recurring_runs, query))
            rest = {"next_page_token": str(first + self.page)} if len(mine) > first + self.page else {}
            return {"recurringRuns": mine[first : first + self.page], **rest}
        if (method, path) == ("POST", "recurringruns"):
            checked(body, "V2beta1RecurringRun")
            return self._keep(self.recurring_runs, "recurring_run_id", self._runnable(body))
        if (method, path) == ("POST", "runs"):
            checked(body, "V2beta1Run")
            return self._keep(self.runs, "run_id", self._runnable(body))
        if method == "DELETE" and path.startswith("recurringruns/"):
            if self.recurring_runs.pop(path.split("/")[1], None) is None:
                raise Refused(MISSING, "Recurring run not found")
            return {}
        raise AssertionError(f"{method} {path} is none of the endpoints that the project calls")

    def _allow(self, namespace: str) -> None:
        if self.namespaces and namespace not in self.namespaces:
            raise Refused(
                FORBIDDEN, f"Failed to authorize: User 'ann' is not authorized in namespace '{namespace}'"
            )
        if not self.namespaces and namespace:
            raise Refused(INVALID, "In single-user mode, the namespace must be empty")

    def _in_namespace(self, kept: dict[str, Any], query: dict[str, str]) -> Iterator[dict[str, Any]]:
        namespace = query.get("namespace", "")
        self._allow(namespace)
        return (one for one in kept.values() if one.get("namespace", "") == namespace)

    def _runnable(self, body: dict[str, Any]) -> dict[str, Any]:
        """Check a run as the server does: it belongs to an experiment, and its arguments fit its pipeline."""
        if body["experiment_id"] not in self.experiments:
            raise Refused(MISSING, "Experiment not found")
        namespace = self.experiments[body["experiment_id"]].get("namespace", "")
        self._allow(namespace)
        spec = json_format.ParseDict(body["pipeline_spec"]["pipeline_spec"], pipeline_spec_pb2.PipelineSpec())
        json_format.ParseDict(body["pipeline_spec"]["platform_spec"], pipeline_spec_pb2.PlatformSpec())
        given, taken = (
            body["runtime_config"]["parameters"].keys(),
            spec.root.input_definitions.parameters.keys(),
        )
        if given != taken:
            raise Refused(INVALID, f"Invalid input error: parameters {sorted(given ^ taken)}")
        return {**body, "namespace": namespace}

    @staticmethod
    def _keep(kept: dict[str, Any], key: str, body: dict[str, Any]) -> dict[str, Any]:
        name = str(uuid.uuid4())
        kept[name] = {**body, key: name}
        return kept[name]


def checked(body: dict[str, Any], model: str) -> None:
    """Refuse a body that the API's own model does not give back as it came."""
    api = kfp_server_api.ApiClient()
    parsed = api.deserialize(SimpleNamespace(data=json.dumps(body)), model)
    back = api.sanitize_for_serialization(parsed)
    # An int64: a number or its digits.
    for one in (back, body):
        if "max_concurrency" in one:
            one["max_concurrency"] = int(one["max_concurrency"])
    assert back == body


@contextmanager
def serve(server: PipelinesServer) -> Iterator[PipelinesServer]:
    """Let the server answer on a free port; a body that fails a check fails the test."""
    failures: list[BaseException] = []

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            url = urlparse(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            token = self.headers.get("Authorization", "")
            try:
                assert url.path.startswith(API)
                path = url.path.removeprefix(API)
                status, answer = 200, server.answer(self.command, path, query, body, token)
            except Refused as refused:
                (status, code), words = refused.args
                answer = {"error": words, "code": code, "message": words, "details": []}
            except Exception as error:
                failures.append(error)
                status, answer = 500, {"message": str(error)}
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        do_GET = do_POST = do_DELETE = handle_any

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        server.host = f"http://127.0.0.1:{listener.server_address[1]}"
        yield server
        listener.shutdown()
    if failures:
        raise failures[0]
