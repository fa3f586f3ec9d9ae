from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def self_label(
    method: dict,
    parameters: dict,
    threads: int,
    seed: int,
    data_digest: str,
    code_digest: str,
    table: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    labels: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
):
    """Cluster the train split in the features of one method."""
    from pathlib import Path

    from unlabeled import workspace
    from unlabeled.lineage.step import step
    from unlabeled.parameters import SelfLabel, validated
    from unlabeled.selflabel import cluster

    inputs = {"table": table, "model": model}
    with step(f"self_label/{method['name']}", inputs, {"labels": labels}, code_digest, metrics) as result:
        checked = validated(SelfLabel, parameters, "self_label")
        with workspace.threads(threads):
            scores = cluster.self_label(Path(model.path), Path(table.path), Path(labels.path), checked, seed)
        result.update(scores)
