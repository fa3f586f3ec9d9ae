from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def baselines(
    parameters: dict,
    methods: list,
    encoder: dict,
    seed: int,
    data_digest: str,
    code_digest: str,
    table: dsl.Input[dsl.Dataset],
    baselines: dsl.Output[dsl.Artifact],
):
    """Score raw pixels, PCA and untrained nets: what every learning signal has to beat."""
    from pathlib import Path

    from unlabeled.lineage.step import step
    from unlabeled.parameters import Encoder, Evaluation, validated
    from unlabeled.probes.evaluate import evaluate_baselines
    from unlabeled.signals import encoder_section

    with step("baselines", {"table": table}, {"baselines": baselines}, code_digest) as result:
        checked, net = validated(Evaluation, parameters, "evaluation"), validated(Encoder, encoder, "encoder")
        nets = list(dict.fromkeys(encoder_section(method, net) for method in methods))
        result.update(evaluate_baselines(Path(table.path), Path(baselines.path), checked, seed, nets))
