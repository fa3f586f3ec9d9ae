"""The label-efficiency table as a pipeline: a loop over the groups of methods that share a pretrained encoder."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from kfp import dsl

from components.compare_labels.component import compare_labels
from components.compare_labels_report.component import compare_labels_report
from components.ingest.component import ingest
from pipelines import local
from pipelines.request import request_key, short_name
from unlabeled.files import atomic_path, link_or_copy, read_json, write_json

SUMMARY, REPORT = "compare.json", "compare.html"


class Outputs(NamedTuple):
    summary: dsl.Artifact
    report: dsl.HTML


@dsl.pipeline(name="unlabeled-label-efficiency", description="What few labels are worth to each method")
def label_efficiency(
    source: str,
    data_digest: str,
    code_digest: str,
    groups: list,
    ingest_parameters: dict,
    parameters: str,
) -> Outputs:
    """Measure every method on the same labels, then put the table together.

    Args:
        source: what `ingest` reads.
        data_digest: DVC's digest of the source.
        code_digest: digest of the four packages.
        groups: {"name": learning signal or `scratch`, "methods": [names]} each.
        parameters: all parameters as JSON.
    """
    common = {"data_digest": data_digest, "code_digest": code_digest}
    table = ingest(source=source, parameters=ingest_parameters, **common).outputs["table"]
    with dsl.ParallelFor(groups, name="groups") as group:
        measured = compare_labels(group=group, parameters=parameters, table=table, **common)
    page = compare_labels_report(
        parameters=parameters, table=table, cells=dsl.Collected(measured.outputs["cells"]), **common
    )
    return Outputs(summary=page.outputs["summary"], report=page.outputs["report"])


def open_comparison(workspace: Path, arguments: dict[str, Any]) -> Path:
    """Return the folder of the comparison of these arguments, begun, finished or new."""
    key = request_key(arguments)
    folder = workspace / "comparisons" / f"{short_name(arguments['source'])}-{key[:6]}"
    write_json(folder / local.REQUEST, {"key": key, "arguments": arguments})
    return folder


def _run_pipeline(folder: Path) -> None:
    local.start_runner(folder, cache=True)
    run = label_efficiency(**read_json(folder / local.REQUEST)["arguments"])
    # The page last: with it the comparison is finished.
    for name, output in ((SUMMARY, "summary"), (REPORT, "report")):
        with atomic_path(folder / name) as temporary:
            link_or_copy(run.outputs[output].path, temporary)


if __name__ == "__main__":
    _run_pipeline(Path(sys.argv[1]))
