"""The earlier run whose images a new run's are held against."""

from collections.abc import Mapping
from typing import Any

from unlabeled.lineage.registry import Registry
from unlabeled.parameters import Ingest


def newest_of(registry: Registry, source: str, ingest: Ingest) -> str:
    """Return the newest recorded run of a data source that was ingested alike, or an empty string.

    The same images give other tables, with other statistics, at another size: that is no drift.
    """
    asked = ingest.model_dump(mode="json")
    of_source = (row["run"] for row in registry.runs() if row["data"].get("source") == source)
    return next((run for run in of_source if _ingest_of(registry.show(run)) == asked), "")


def _ingest_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's parameters of `ingest`; one that it does not know yet had what is now its default."""
    recorded = record["predicate"]["buildDefinition"]["externalParameters"]["parameters"].get("ingest", {})
    return {**Ingest().model_dump(mode="json"), **recorded}
