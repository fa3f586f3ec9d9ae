from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def finetune(
    parameters: dict,
    seed: int,
    data_digest: str,
    code_digest: str,
    table: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    labels: dsl.Input[dsl.Dataset],
    classifier: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Train classifiers on few and on all labels, or on the pseudo-labels where there are none."""
    from pathlib import Path

    from unlabeled.lineage.step import step
    from unlabeled.parameters import Finetuning, validated
    from unlabeled.probes import finetune

    inputs = {"table": table, "model": model, "labels": labels}
    with step("finetune", inputs, {"classifier": classifier}, code_digest, metrics) as result:
        checked = validated(Finetuning, parameters, "finetuning")
        folders = (Path(model.path), Path(labels.path), Path(table.path), Path(classifier.path))
        result.update(finetune.finetune(*folders, checked, seed))
