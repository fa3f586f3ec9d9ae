"""The verification of a registry: every record and every object of every run, each object read once."""

from collections.abc import Iterator
from functools import cache

from unlabeled.errors import InputError
from unlabeled.lineage.evidence import MALFORMED, Evidence
from unlabeled.lineage.findings import Check, Report, unreadable
from unlabeled.lineage.registry import Registry
from unlabeled.lineage.store import Store


def verify(registry: Registry) -> Iterator[Report]:
    """Yield a report per run, the newest first: its record is intact, and its objects have the recorded bytes.

    An object that many runs share is read once, and named by each of them.

    Raises:
        InputError: there is no registry, or its DVC remote cannot be reached.
    """
    if registry.absent:
        raise InputError(f"there is no registry at {registry.url}")
    hashed = cache(Store(registry.remote).digests)
    for row in registry.runs():
        run = row["run"]
        try:
            record = registry.show(run)
            registry.files(run)  # a damaged listing is the record's fault, told as such
        except InputError as error:
            yield unreadable(run, str(error))
            continue
        try:
            evidence = Evidence(registry, run, record, hashed)
            checks = [
                Check("the record is intact", (*evidence.of_record(), *evidence.of_signature(None))),
                Check("every artifact is in the store with the recorded bytes", tuple(evidence.of_store())),
            ]
            yield Report(run, row["digest"], checks)
        except MALFORMED as error:
            yield unreadable(run, f"has not the form of a record: {error!r}")
