from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def check_validation(data_digest: str, code_digest: str, validation: dsl.Input[dsl.Artifact]):
    """Fail where a critical expectation failed, so that nothing is trained on such images."""
    from pathlib import Path

    from unlabeled.data import verdict
    from unlabeled.lineage.step import step

    with step("check_validation", {"validation": validation}, {}, code_digest):
        verdict.check(Path(validation.path))
