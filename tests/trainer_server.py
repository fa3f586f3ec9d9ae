"""A small Kubernetes with Kubeflow Trainer: it checks each TrainJob strictly, and runs its nodes as processes here."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1ClusterTrainingRuntime, TrainerV1alpha1TrainJob

TRAINER = "trainer.kubeflow.org/v1alpha1"
JOBS = f"/apis/{TRAINER}/namespaces/ml/trainjobs"
RUNTIME = {
    "apiVersion": TRAINER,
    "kind": "ClusterTrainingRuntime",
    "metadata": {"name": "torch-distributed", "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {
                                "labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
                            },
                            "spec": {
                                "template": {
                                    "spec": {"containers": [{"name": "node", "image": "pytorch/pytorch"}]}
                                }
                            },
                        },
                    }
                ]
            }
        },
    },
}


@dataclass
class Job:
    """A TrainJob as it was asked for, and its processes."""

    body: dict[str, Any]
    nodes: list[subprocess.Popen]
    restarting: bool = False

    def phases(self) -> list[str]:
        codes = [node.poll() for node in self.nodes]
        return ["Running" if code is None else "Failed" if code else "Succeeded" for code in codes]

    def condition(self) -> str | None:
        phases = self.phases()
        if self.restarting:
            return None
        if "Failed" in phases:
            self.end()
            return "Failed"
        return "Complete" if set(phases) == {"Succeeded"} else None

    def end(self) -> None:
        for node in self.nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGTERM)
                try:
                    node.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(node.pid, signal.SIGKILL)
                    node.wait()


class Refused(Exception):
    """Another HTTP status than 200."""


class TrainerServer:
    """Namespace `ml` of a cluster.

    Args:
        folder: where logs lie.
        may: whether the caller may create TrainJobs.
        runtime: whether the cluster has one.
        log_ends: whether a node's log is closed with its process, or left open as by a dead connection.
    """

    def __init__(self, folder: Path, may: bool = True, runtime: bool = True, log_ends: bool = True) -> None:
        self.folder, self.may, self.runtime, self.log_ends = folder, may, runtime, log_ends
        self.jobs: dict[str, Job] = {}
        self.asked: list[dict[str, Any]] = []
        self.deleted: list[str] = []
        self.kubeconfig = folder / "kubeconfig"

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        if path.startswith("/api/v1/namespaces/kubeflow-system/configmaps/"):
            return {"data": {"kubeflow_trainer_version": "v2.3.0"}}
        if path == f"/apis/{TRAINER}/clustertrainingruntimes/torch-distributed" and self.runtime:
            assert TrainerV1alpha1ClusterTrainingRuntime.from_dict(RUNTIME).to_dict() == RUNTIME
            return RUNTIME
        if re.fullmatch(rf"/apis/{TRAINER}/(namespaces/ml/)?(cluster)?trainingruntimes/[\w-]+", path):
            raise Refused(404)
        if (method, path) == ("POST", JOBS):
            if not self.may:
                raise Refused(403)
            return self._start(body)
        name = path.removeprefix(JOBS + "/")
        if name in self.jobs and method == "DELETE":
            self.jobs.pop(name).end()
            self.deleted.append(name)
            return {}
        if name in self.jobs:
            job = self.jobs[name]
            found = job.condition()
            conditions = [{"type": found, "status": "True", "reason": found, "message": "",
                           "lastTransitionTime": "2026-01-01T00:00:00Z"}] if found else []  # fmt: skip
            return {**job.body, "status": {"conditions": conditions}}
        if path == "/api/v1/namespaces/ml/pods":
            (name,) = re.findall(r"jobset-name=([\w-]+)", query["labelSelector"])
            count = len(self.jobs[name].nodes) if name in self.jobs else 0
            return {"items": [self._pod(name, index) for index in range(count)]}
        raise Refused(404)

    def _start(self, body: dict[str, Any]) -> dict[str, Any]:
        assert TrainerV1alpha1TrainJob.from_dict(body).to_dict() == body
        name = body["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])", name)
        self.asked.append(json.loads(json.dumps(body)))
        made = {**body["metadata"], "namespace": "ml", "creationTimestamp": "2026-01-01T00:00:00Z"}
        job = self.jobs[name] = Job({**body, "metadata": made}, self._launch(body))
        threading.Thread(target=self._control, args=(job,), daemon=True).start()
        return job.body

    def _control(self, job: Job) -> None:
        """End all nodes with the first that fails, and when their time is up."""
        deadline = time.monotonic() + job.body["spec"]["activeDeadlineSeconds"]
        while not job.condition():
            if time.monotonic() > deadline:
                job.end()
            time.sleep(0.02)

    def restart(self, name: str) -> None:
        """Give a job new pods, as a runtime does that allows restarts."""
        job = self.jobs[name]
        job.restarting = True
        job.end()
        job.nodes = self._launch(job.body)
        job.restarting = False

    def _launch(self, body: dict[str, Any]) -> list[subprocess.Popen]:
        """Start the nodes, each with what Trainer's torch plugin tells torchrun."""
        trainer, name = body["spec"]["trainer"], body["metadata"]["name"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        asked = {one["name"]: one["value"] for one in trainer["env"]}
        assert not [one for one in asked if one.startswith("PET_")], "reserved"
        common = {
            **os.environ,
            **asked,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": "auto",
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port),
        }
        nodes = []
        for index in range(trainer["numNodes"]):
            with (self.folder / "log").open("wb") as log:
                node = subprocess.Popen(
                    trainer["command"],
                    env=common | {"PET_NODE_RANK": str(index)},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            (self.folder / "log").rename(self.folder / f"{name}-{index}-{node.pid}.log")
            nodes.append(node)
        return nodes

    def _pod(self, name: str, index: int) -> dict[str, Any]:
        labels = {
            "jobset.sigs.k8s.io/jobset-name": name,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        metadata = {
            "name": f"{name}-{index}-{self.jobs[name].nodes[index].pid}",
            "labels": labels,
            "creationTimestamp": "2026-01-01T00:00:00Z",
        }
        return {
            "metadata": metadata,
            "spec": {"containers": [{"name": "node", "image": "x"}]},
            "status": {"phase": self.jobs[name].phases()[index]},
        }

    def log(self, pod: str) -> Iterator[bytes]:
        """Yield a node's log as it grows, until its process has ended."""
        name, index, _ = pod.rsplit("-", 2)
        node = self.jobs[name].nodes[int(index)]
        with (self.folder / f"{pod}.log").open("rb") as log:
            while True:
                ended = node.poll() is not None
                yield log.read()
                if ended and self.log_ends:
                    return
                time.sleep(0.02)


@contextmanager
def serve(server: TrainerServer) -> Iterator[TrainerServer]:
    """Let the cluster answer on a free port, named by its kubeconfig; its jobs end with it."""
    failures: list[BaseException] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            url = urlparse(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            if log := re.fullmatch(r"/api/v1/namespaces/ml/pods/([\w-]+)/log", url.path):
                # As it grows, in chunks, as the real server does.
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for part in filter(None, server.log(log[1])):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                self.wfile.write(b"0\r\n\r\n")
                return
            try:
                status, answer = 200, server.answer(self.command, url.path, query, body)
            except Refused as refused:
                status = refused.args[0]
                answer = {"kind": "Status", "code": status, "message": f"{url.path} is refused"}
            except Exception as error:
                failures.append(error)
                status, answer = 500, {"message": repr(error)}
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = handle_any

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = True
        threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        cluster = {"server": f"http://127.0.0.1:{listener.server_address[1]}"}
        context = {"cluster": "here", "user": "me", "namespace": "ml"}
        server.kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "here", "cluster": cluster}],
                    "users": [{"name": "me", "user": {}}],
                    "contexts": [{"name": "here", "context": context}],
                    "current-context": "here",
                }
            )
        )
        try:
            yield server
        finally:
            for job in server.jobs.values():
                job.end()
            listener.shutdown()
    if failures:
        raise failures[0]
