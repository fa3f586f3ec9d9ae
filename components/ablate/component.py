from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ablate(
    cell: dict,
    parameters: dict,
    data_digest: str,
    code_digest: str,
    table: dsl.Input[dsl.Dataset],
    result: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Train and probe one cell of the ablation of augmentations."""
    from pathlib import Path

    from unlabeled import workspace
    from unlabeled.lineage.step import step
    from unlabeled.parameters import validated
    from unlabeled.probes.ablation import Ablation, Cell, measure

    one = validated(Cell, cell, "cell")
    with step(f"ablate/{one.name}", {"table": table}, {"result": result}, code_digest, metrics) as found:
        checked = validated(Ablation, parameters, "ablation")
        with workspace.threads(checked.threads):
            found.update(measure(Path(table.path), one, checked, Path(result.path)))
