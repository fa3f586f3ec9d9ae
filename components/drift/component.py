from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def drift(
    run: str,
    registry: str,
    remote: str,
    recent: str,
    url: str,
    parameters: dict,
    seed: int,
    code_digest: str,
    summary: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
):
    """Measure how far recent inputs of a server lie from the training images of a recorded run."""
    from pathlib import Path

    from serving.drift import measure_drift, recorded
    from unlabeled.lineage.registry import Registry
    from unlabeled.lineage.step import step
    from unlabeled.parameters import Drift, validated

    with step("drift", {}, {"summary": summary, "report": report}, code_digest, metrics) as result:
        checked = validated(Drift, parameters, "drift")
        with recorded(Registry(registry, remote), run) as (name, folder):
            written = Path(summary.path), Path(report.path)
            result.update(measure_drift(name, folder, recent, url, *written, checked, seed))
