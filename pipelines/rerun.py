"""Do a recorded run again, with nothing reused, and compare bits."""

import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines import display, local
from pipelines.request import pipeline_arguments
from unlabeled.files import read_json
from unlabeled.lineage.audit import Report, compare, same_environment
from unlabeled.lineage.record import dependency
from unlabeled.lineage.registry import Registry
from unlabeled.parameters import Parameters, validated
from unlabeled.workspace import THREADS


def rerun(registry: Registry, run: str, report: Report, console: Console) -> Report:
    """Execute the recorded parameters on the recorded data in a room of their own; add what differs to the report.

    On other hardware or with another thread count bits cannot be equal: the report says so, and compares metrics.
    """
    with tempfile.TemporaryDirectory(prefix="unlabeled-rerun-") as room:
        recorded = Path(room) / "recorded"
        registry.fetch(run, recorded)
        record = registry.show(run)
        arguments = _arguments(record, recorded, registry)
        folder = local.open_run(Path(room) / "workspace", arguments, _threads(record))
        local.execute(folder, lambda events, ended: display.watch(events, ended, console), cache=False)
        comparable, reasons = same_environment(record, read_json(folder / local.RECORD))
        return report.with_rerun(compare(recorded, folder, comparable), comparable, reasons)


def _arguments(record: dict[str, Any], recorded: Path, registry: Registry) -> dict[str, Any]:
    """Return the arguments that the run was started with, on data and reference as the registry gives them back."""
    external = record["predicate"]["buildDefinition"]["externalParameters"]
    parameters = validated(Parameters, external["parameters"])
    data = dependency(record, "data")
    reference = data["annotations"].get("reference", "")
    if reference:
        room = recorded.with_name("reference")
        registry.fetch(reference, room, ["table/table.parquet", "table/summary.json"])
        reference = str(room / "table")
    # Without a registry nothing is pushed, and the reference is a folder.
    arguments = pipeline_arguments(parameters, recorded, "", "", reference, data["digest"]["dvc"])
    return {**arguments, "source": str(recorded / "raw")}


def _threads(record: dict[str, Any]) -> dict[str, str]:
    """Return OMP_NUM_THREADS of each recorded step that had it set, by component: on Kubeflow, as many as its CPUs."""
    predicate = record["predicate"]
    variables = {step["name"].split("/")[0]: step["machine"]["variables"] for step in predicate["steps"]}
    variables["record"] = predicate["runDetails"]["builder"]["environment"]["variables"]
    return {name: found[THREADS] for name, found in variables.items() if THREADS in found}
