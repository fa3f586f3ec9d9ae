from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def pin(
    source: str,
    ingest_parameters: dict,
    data_digest: str,
    reference: str,
    registry: str,
    remote: str,
    code_digest: str,
) -> NamedTuple("Outputs", [("data_digest", str), ("reference", str)]):
    """Settle which bytes the run is of, and against which earlier run its drift is measured."""
    from unlabeled.data import sources
    from unlabeled.lineage.reference import newest_of
    from unlabeled.lineage.registry import Registry
    from unlabeled.lineage.signature import check_signing_key
    from unlabeled.lineage.step import step
    from unlabeled.parameters import Ingest, validated
    from unlabeled.workspace import cache_folder

    with step("pin", {}, {}, code_digest):
        check_signing_key()
        asked = validated(Ingest, ingest_parameters, "ingest")
        digest = data_digest or sources.data_digest(source, cache_folder())
        return digest, reference or newest_of(Registry(registry, remote), source, asked)
