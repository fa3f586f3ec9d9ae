"""The ablation of augmentations (Chen et al. 2020, figure 5) as a pipeline: a loop over the cells of the grid."""

import sys
from pathlib import Path
from typing import NamedTuple

from kfp import dsl

from components.ablate.component import ablate
from components.ablation_report.component import ablation_report
from components.ingest.component import ingest
from pipelines.study import run_pipeline


class Outputs(NamedTuple):
    summary: dsl.Artifact
    report: dsl.HTML


@dsl.pipeline(name="unlabeled-ablation", description="Which augmentations does contrastive learning need?")
def ablation(
    source: str,
    data_digest: str,
    code_digest: str,
    cells: list,
    ingest_parameters: dict,
    parameters: dict,
) -> Outputs:
    """Measure every cell, then answer the paper's claims.

    Args:
        source: what `ingest` reads.
        data_digest: DVC's digest of the source.
        code_digest: digest of the four packages.
        cells: {"transforms": [names], "seed": n} each, as `unlabeled.probes.ablation.grid` gives them.
        parameters: how each cell is trained and probed.
    """
    common = {"data_digest": data_digest, "code_digest": code_digest}
    table = ingest(source=source, parameters=ingest_parameters, **common).outputs["table"]
    with dsl.ParallelFor(cells, name="cells") as cell:
        measured = ablate(cell=cell, parameters=parameters, table=table, **common)
    page = ablation_report(
        parameters=parameters, table=table, cells=dsl.Collected(measured.outputs["result"]), **common
    )
    return Outputs(summary=page.outputs["summary"], report=page.outputs["report"])


if __name__ == "__main__":
    run_pipeline(ablation, Path(sys.argv[1]))
