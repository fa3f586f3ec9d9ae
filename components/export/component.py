from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def export(
    parameters: dict,
    data_digest: str,
    code_digest: str,
    table: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    labels: dsl.Input[dsl.Dataset],
    classifier: dsl.Input[dsl.Model],
    repository: dsl.Output[dsl.Model],
    index: dsl.Output[dsl.Dataset],
):
    """Write the Triton model repository (encoder, classifier, clusterer as ONNX) and the index of training images."""
    from pathlib import Path

    from serving import export
    from unlabeled.lineage.step import step
    from unlabeled.parameters import Export, validated

    inputs = {"model": model, "labels": labels, "classifier": classifier, "table": table}
    outputs = {"repository": repository, "index": index}
    with step("export", inputs, outputs, code_digest) as result:
        folders = (Path(artifact.path) for artifact in (*inputs.values(), *outputs.values()))
        result.update(export.export(*folders, validated(Export, parameters, "export")))
