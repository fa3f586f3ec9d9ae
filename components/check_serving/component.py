from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def check_serving(
    parameters: dict,
    data_digest: str,
    code_digest: str,
    repository: dsl.Input[dsl.Model],
    index: dsl.Input[dsl.Dataset],
    serving: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Load the repository into a real Triton server and hold its answers against the golden ones."""
    from pathlib import Path

    from serving.check import check_serving
    from unlabeled.lineage.step import step
    from unlabeled.parameters import Export, validated

    inputs = {"repository": repository, "index": index}
    with step("check_serving", inputs, {"serving": serving}, code_digest, metrics) as result:
        checked = validated(Export, parameters, "export")
        result.update(check_serving(Path(repository.path), Path(index.path), Path(serving.path), checked))
