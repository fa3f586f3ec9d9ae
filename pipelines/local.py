"""The pipeline on this machine: KFP's local runner in a process of its own, watched, resumable."""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pipelines.request import request_key, short_name
from unlabeled import progress
from unlabeled.errors import CheckFailed, InputError
from unlabeled.files import atomic_path, link_or_copy, read_json, write_json
from unlabeled.workspace import CACHE

REQUEST, EVENTS, LOG, RECORD, REPORT, VALIDATION = (
    "request.json",
    "progress.jsonl",
    "pipeline.log",
    "record.json",
    "report.html",
    "validation.html",
)


def open_run(workspace: Path, arguments: dict[str, Any], threads: dict[str, str] | None = None) -> Path:
    """Return the folder of the run to execute: an unfinished one that asked for the same, else a new one.

    Args:
        threads: OMP_NUM_THREADS of steps, by component; None: all have this process's.
    """
    key = request_key(arguments)
    for request in sorted(
        workspace.glob(f"runs/*/{REQUEST}"), key=lambda path: path.stat().st_mtime, reverse=True
    ):
        if read_json(request)["key"] == key and not (request.parent / REPORT).exists():
            return request.parent
    run = f"{short_name(arguments['source'])}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{key[:6]}"
    folder = workspace / "runs" / run
    asked = {"key": key, "arguments": {"run": run, **arguments}, "threads": threads or {}}
    write_json(folder / REQUEST, asked)
    return folder


def execute(
    folder: Path,
    watch: Callable[[Path, Callable[[], bool]], None],
    cache: bool = True,
    module: str = "pipelines.local",
) -> None:
    """Run the pipeline of `folder/request.json`; its artifacts, `record.json` and `report.html` end up in the folder.

    Args:
        folder: `<workspace>/runs/<run-id>`.
        watch: draws the progress file (first argument) until the second, called, says that the pipeline has ended.
        cache: reuse the steps of earlier runs.
        module: what is executed: `python -m MODULE FOLDER cached|fresh` runs the pipeline.

    Raises:
        InputError: a step refused its input, or the run is in progress in another process.
        CheckFailed: a step failed; the message names it.
    """
    workspace = folder.parent.parent
    with _locked(folder):
        _kill_leftovers(folder)
        for name in (EVENTS, VALIDATION):
            (folder / name).unlink(missing_ok=True)
        # Threads that wait by spinning stand in each other's way where another process has a core: a step once took
        # 47 times as long. Asleep they cost an eighth at most.
        environment = (
            {"OMP_WAIT_POLICY": "PASSIVE"}
            | os.environ
            | {
                progress.VARIABLE: str(folder / EVENTS),
                CACHE: str(workspace / "cache"),
                "PYTHONUNBUFFERED": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
        )
        command = [sys.executable, "-m", module, str(folder), "cached" if cache else "fresh"]
        with open(folder / LOG, "ab") as log:
            worker = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        try:
            watch(folder / EVENTS, lambda: worker.poll() is not None)
            worker.wait()
        finally:
            _kill_leftovers(folder)
    if worker.returncode:
        raise _failure(folder)


@contextmanager
def _locked(folder: Path):
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"run {folder.name} is in progress in another process; wait for it or end it"
            ) from None
        yield


def _kill_leftovers(folder: Path) -> None:
    """End what is left of the run's processes: those that write to its progress file."""
    leftovers = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(progress.VARIABLE) == str(
                folder / EVENTS
            ):
                process.kill()
                leftovers.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    psutil.wait_procs(leftovers, timeout=10)


def _failure(folder: Path) -> Exception:
    failures = [event for event in progress.read(folder / EVENTS)[0] if event["event"] == "fail"]
    if not failures:
        lines = (folder / LOG).read_text(errors="replace").strip().splitlines()
        return CheckFailed(
            f"the pipeline ended early: {lines[-1] if lines else 'no output'} (log: {folder / LOG})"
        )
    first = failures[0]
    if first["kind"] == "input":
        return InputError(first["message"])
    if first["step"] == "check_validation":
        # Its page lies deep in the cache.
        reason, _, page = first["message"].rpartition("; see ")
        if Path(page).is_file():
            link_or_copy(page, folder / VALIDATION)
            first["message"] = f"{reason}; see {folder / VALIDATION}"
    log = "" if first["kind"] == "check" else f" (log: {folder / LOG})"
    return CheckFailed(f"step {first['step']} failed: {first['message']}{log}")


def start_runner(folder: Path, cache: bool) -> None:
    """Make this process, started by `execute`, KFP's local runner; it ends with the process that started it."""
    from kfp import local

    _die_with_parent()
    work = folder.parent.parent / "cache"
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(work / "artifacts"),
        cache_root=str(work / "steps"),
        enable_caching=cache,
    )


def _run_pipeline(folder: Path, cache: bool) -> None:
    from pipelines.tasks import with_threads
    from pipelines.training import training

    asked = read_json(folder / REQUEST)
    pipeline = with_threads(training, asked["threads"]) if asked["threads"] else training
    start_runner(folder, cache)
    run = pipeline(**asked["arguments"])
    bundle, report = Path(run.outputs["bundle"].path), Path(run.outputs["report"].path)
    for artifact in sorted(bundle.iterdir(), key=lambda path: path.name == RECORD):
        with atomic_path(folder / artifact.name) as temporary:
            link_or_copy(artifact, temporary)
    with atomic_path(folder / REPORT) as temporary:
        link_or_copy(report, temporary)


def _die_with_parent() -> None:
    """End this process and all its steps when the process that started it is gone."""
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    _run_pipeline(Path(sys.argv[1]), cache=sys.argv[2] == "cached")
