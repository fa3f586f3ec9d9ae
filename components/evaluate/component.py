from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    method: dict,
    parameters: dict,
    threads: int,
    seed: int,
    data_digest: str,
    code_digest: str,
    table: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Probe the frozen features of one method."""
    from pathlib import Path

    from unlabeled import workspace
    from unlabeled.lineage.step import step
    from unlabeled.parameters import Evaluation, validated
    from unlabeled.probes import evaluate

    inputs = {"table": table, "model": model}
    with step(
        f"evaluate/{method['name']}", inputs, {"evaluation": evaluation}, code_digest, metrics
    ) as result:
        checked = validated(Evaluation, parameters, "evaluation")
        with workspace.threads(threads):
            scores = evaluate.evaluate(
                Path(model.path), Path(table.path), Path(evaluation.path), checked, seed
            )
        result.update(scores)
