from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def select(
    data_digest: str,
    code_digest: str,
    evaluations: dsl.Input[list[dsl.Artifact]],
    models: dsl.Input[list[dsl.Model]],
    labels: dsl.Input[list[dsl.Dataset]],
    selection: dsl.Output[dsl.Artifact],
    model: dsl.Output[dsl.Model],
    model_labels: dsl.Output[dsl.Dataset],
):
    """Choose the method to serve by a criterion that touches no test label."""
    from pathlib import Path

    from unlabeled.lineage.step import step
    from unlabeled.probes.select import select

    inputs = {"evaluations": evaluations, "models": models, "labels": labels}
    outputs = {"selection": selection, "model": model, "model_labels": model_labels}
    with step("select", inputs, outputs, code_digest) as result:
        candidates = ([Path(artifact.path) for artifact in artifacts] for artifacts in inputs.values())
        result.update(select(*candidates, *(Path(output.path) for output in outputs.values())))
