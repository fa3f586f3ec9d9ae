"""The earlier run whose images a new run's are held against."""

from unlabeled.lineage.registry import Registry


def newest_of(registry: Registry, source: str) -> str:
    """Return the newest recorded run of a data source, or an empty string."""
    return next((row["run"] for row in registry.runs() if row["data"].get("source") == source), "")
