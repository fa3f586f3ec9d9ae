from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def drift_alert(code_digest: str, summary: dsl.Input[dsl.Artifact]):
    """Fail where the recent inputs have drifted, so that the run is seen to fail."""
    from serving.drift import check_drift
    from unlabeled.files import read_json
    from unlabeled.lineage.step import step

    with step("drift_alert", {"summary": summary}, {}, code_digest):
        check_drift(read_json(summary.path))
