from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def compare_labels_report(
    parameters: str,
    data_digest: str,
    code_digest: str,
    table: dsl.Input[dsl.Dataset],
    cells: dsl.Input[list[dsl.Artifact]],
    summary: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
):
    """Put the cells of the label-efficiency table together, as a summary and as a page."""
    import json
    from pathlib import Path

    from unlabeled.lineage.step import step
    from unlabeled.parameters import Parameters, validated
    from unlabeled.report.label_efficiency import write_comparison

    inputs, outputs = {"table": table, "cells": cells}, {"summary": summary, "report": report}
    with step("compare_labels_report", inputs, outputs, code_digest) as result:
        checked = validated(Parameters, json.loads(parameters))
        files = [Path(cell.path) for cell in cells]
        written = (Path(output.path) for output in outputs.values())
        result.update(write_comparison(files, Path(table.path), checked, *written))
