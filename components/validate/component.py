from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def validate(
    parameters: dict,
    reference: str,
    registry: str,
    remote: str,
    data_digest: str,
    code_digest: str,
    table: dsl.Input[dsl.Dataset],
    validation: dsl.Output[dsl.Artifact],
):
    """Hold the image table against its expectations, and against the table of an earlier run."""
    from pathlib import Path

    from unlabeled.data import expectations
    from unlabeled.lineage.registry import reference_table
    from unlabeled.lineage.signature import check_signing_key
    from unlabeled.lineage.step import step
    from unlabeled.parameters import Validation, validated

    with step("validate", {"table": table}, {"validation": validation}, code_digest) as result:
        check_signing_key()
        checked = validated(Validation, parameters, "validation")
        with reference_table(registry, remote, reference) as earlier:
            result.update(expectations.validate(Path(table.path), Path(validation.path), checked, earlier))
