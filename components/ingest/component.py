from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ingest(
    source: str,
    parameters: dict,
    data_digest: str,
    code_digest: str,
    table: dsl.Output[dsl.Dataset],
    raw: dsl.Output[dsl.Dataset],
):
    """Turn a source at a pinned version into an image table."""
    from pathlib import Path

    from unlabeled.data import ingest
    from unlabeled.lineage.step import step
    from unlabeled.parameters import Ingest, validated

    with step("ingest", {}, {"table": table, "raw": raw}, code_digest) as result:
        checked = validated(Ingest, parameters, "ingest")
        result.update(ingest.ingest(source, data_digest, Path(table.path), Path(raw.path), checked))
