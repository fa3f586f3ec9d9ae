from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def baselines(
    parameters: dict,
    seed: int,
    data_digest: str,
    code_digest: str,
    table: dsl.Input[dsl.Dataset],
    baselines: dsl.Output[dsl.Artifact],
):
    """Score raw pixels and PCA: what every learning signal has to beat."""
    from pathlib import Path

    from unlabeled.lineage.step import step
    from unlabeled.parameters import Evaluation, validated
    from unlabeled.probes.evaluate import evaluate_baselines

    with step("baselines", {"table": table}, {"baselines": baselines}, code_digest) as result:
        checked = validated(Evaluation, parameters, "evaluation")
        result.update(evaluate_baselines(Path(table.path), Path(baselines.path), checked, seed))
