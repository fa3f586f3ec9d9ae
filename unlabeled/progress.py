"""Progress of long steps, as JSON lines in the file named by the environment variable UNLABELED_PROGRESS.

The process that started the pipeline reads the file and draws it. `-` is standard error: the log of a pod. Without
the variable nothing is written.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

VARIABLE, LOG = "UNLABELED_PROGRESS", "-"
_step: ContextVar[str] = ContextVar("step", default="")
_last_report = 0.0


def emit(event: str, **fields: Any) -> None:
    """Append one event (`start`, `progress`, `end`, `fail`) of the current step."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    line = json.dumps({"time": time.time(), "step": _step.get(), "event": event, **fields}) + "\n"
    if path == LOG:
        print(line, end="", file=sys.stderr, flush=True)
        return
    # One write of a short line with O_APPEND: lines of parallel steps never interleave.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def report(done: int, total: int, unit: str = "", **values: float) -> None:
    """Tell how far the current step is (`done` of `total` units) and its values, five times a second at most.

    In a log twice a minute: there every line stays.
    """
    global _last_report
    now, pause = time.monotonic(), 30 if os.environ.get(VARIABLE) == LOG else 0.2
    if done < total and now - _last_report < pause:
        return
    _last_report = now
    emit("progress", done=done, total=total, unit=unit, values=values)


def read(path: Path | str, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Return the events of a progress file from a byte offset on, and the offset to go on from.

    A line that is still being written is left for the next call; a missing file has no events.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            whole, newline, _ = file.read().rpartition(b"\n")
    except FileNotFoundError:
        return [], offset
    return [json.loads(line) for line in whole.splitlines()], offset + len(whole) + len(newline)


@contextmanager
def current_step(name: str) -> Iterator[None]:
    """Name the step that the events of this process belong to."""
    token = _step.set(name)
    try:
        yield
    finally:
        _step.reset(token)
