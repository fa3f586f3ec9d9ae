"""The watch over a served model as a pipeline: recent inputs against the training images, and an alert."""

from typing import NamedTuple

from kfp import dsl

from components.drift.component import drift
from components.drift_alert.component import drift_alert


class Outputs(NamedTuple):
    summary: dsl.Artifact
    report: dsl.HTML


@dsl.pipeline(name="unlabeled-drift", description="Are recent inputs like the images that the model knows?")
def drift_watch(
    run: str,
    registry: str,
    remote: str,
    recent: str,
    code_digest: str,
    parameters: dict,
    seed: int,
    url: str,
) -> Outputs:
    """Measure, then fail where there is drift: servers before 2.16 keep no report of a step that fails.

    Args:
        run: the recorded run that is served, or its stage, as `encoder#prod`; empty: the newest.
        registry: git URL of the registry.
        remote: URL of its DVC remote.
        recent: path or URL of recent inputs, as applications log them.
        code_digest: digest of the four packages.
        parameters: section `drift`.
        seed: of the test.
        url: gRPC address of a server that embeds images; empty: the run's own model, in the step.
    """
    measured = drift(
        run=run,
        registry=registry,
        remote=remote,
        recent=recent,
        url=url,
        parameters=parameters,
        seed=seed,
        code_digest=code_digest,
    )
    # What lies at `recent` changes under its name.
    measured.set_caching_options(enable_caching=False)
    drift_alert(summary=measured.outputs["summary"], code_digest=code_digest)
    return Outputs(summary=measured.outputs["summary"], report=measured.outputs["report"])
