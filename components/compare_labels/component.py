from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def compare_labels(
    group: dict,
    parameters: str,
    data_digest: str,
    code_digest: str,
    table: dsl.Input[dsl.Dataset],
    cells: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Measure rows of the label-efficiency table: all those that share a pretrained encoder."""
    import json
    from pathlib import Path

    from unlabeled import workspace
    from unlabeled.files import write_json
    from unlabeled.lineage.step import step
    from unlabeled.parameters import Parameters, validated
    from unlabeled.probes.few_labels.comparison import Comparison

    with step(
        f"compare_labels/{group['name']}", {"table": table}, {"cells": cells}, code_digest, metrics
    ) as result:
        checked = validated(Parameters, json.loads(parameters))
        work = workspace.cache_folder() / "few_labels"
        comparison = Comparison(Path(table.path), work, checked, code_digest)
        with workspace.threads(checked.training.threads):
            measured = [cell for name in group["methods"] for cell in comparison.cells(name)]
        write_json(cells.path, measured)
        result["cells"] = len(measured)
