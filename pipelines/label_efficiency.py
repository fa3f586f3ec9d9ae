"""The label-efficiency table as a pipeline: a loop over the groups of methods that share a pretrained encoder."""

import sys
from pathlib import Path
from typing import NamedTuple

from kfp import dsl

from components.compare_labels.component import compare_labels
from components.compare_labels_report.component import compare_labels_report
from components.ingest.component import ingest
from pipelines.study import run_pipeline


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


if __name__ == "__main__":
    run_pipeline(label_efficiency, Path(sys.argv[1]))
