from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ablation_report(
    parameters: dict,
    data_digest: str,
    code_digest: str,
    table: dsl.Input[dsl.Dataset],
    cells: dsl.Input[list[dsl.Artifact]],
    summary: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
):
    """Answer the paper's claims from the cells, and draw the heat map."""
    from pathlib import Path

    from unlabeled.lineage.step import step
    from unlabeled.parameters import validated
    from unlabeled.probes.ablation import Ablation
    from unlabeled.report.ablation import write_ablation

    inputs, outputs = {"table": table, "cells": cells}, {"summary": summary, "report": report}
    with step("ablation_report", inputs, outputs, code_digest) as result:
        settings = validated(Ablation, parameters, "ablation").model_dump()
        files = [Path(cell.path) for cell in cells]
        written = (Path(output.path) for output in outputs.values())
        result.update(write_ablation(files, Path(table.path), settings, *written))
