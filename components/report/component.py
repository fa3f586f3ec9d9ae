from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report(
    data_digest: str,
    code_digest: str,
    bundle: dsl.Input[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
):
    """Draw the run as one self-contained HTML page."""
    from pathlib import Path

    from unlabeled.lineage.step import step
    from unlabeled.report.report import write_report

    with step("report", {"bundle": bundle}, {"report": report}, code_digest):
        write_report(Path(bundle.path), Path(report.path))
