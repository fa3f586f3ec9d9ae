"""Do a recorded run again, with nothing reused, and compare bits."""

import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines import display, local
from pipelines.request import pipeline_arguments
from unlabeled.lineage.audit import Report, compare, same_environment
from unlabeled.lineage.registry import Registry
from unlabeled.parameters import Parameters, validated


def rerun(registry: Registry, run: str, report: Report, console: Console) -> Report:
    """Execute the recorded parameters on the recorded data in a room of their own; add what differs to the report.

    On other hardware or with another thread count bits cannot be equal: the report says so, and compares metrics.
    """
    record = registry.show(run)
    with tempfile.TemporaryDirectory(prefix="unlabeled-rerun-") as room:
        recorded = Path(room) / "recorded"
        registry.fetch(run, recorded)
        arguments = _arguments(record, recorded, registry, Path(room))
        folder = local.open_run(Path(room) / "workspace", arguments)
        local.execute(folder, lambda events, ended: display.watch(events, ended, console), cache=False)
        comparable, reasons = same_environment(record)
        return report.with_rerun(compare(recorded, folder, comparable), comparable, reasons)
