"""The audit of a recorded run: what is proven, and every difference by step and artifact.

Everything is read from the registry, and every byte is hashed here: neither git nor DVC is taken at its word.
"""

from pathlib import Path

from unlabeled.errors import InputError
from unlabeled.lineage.comparison import compare, same_environment
from unlabeled.lineage.evidence import MALFORMED, Evidence
from unlabeled.lineage.findings import Check, Difference, Report, unreadable
from unlabeled.lineage.registry import Registry
from unlabeled.lineage.signature import fingerprint
from unlabeled.lineage.tracked import LEADERBOARD

__all__ = ["Check", "Difference", "Report", "audit", "compare", "same_environment"]


def audit(registry: Registry, run: str, key: Path | None = None) -> Report:
    """Prove a run from the registry alone.

    Claims: the record and every file of its commit are intact; every artifact is in the store with the
    recorded sha256 and md5; the chain of steps is closed from the data to what is served; the data are the
    pinned data; drift was measured against the recorded reference; the leaderboard is what the artifacts say;
    the served ONNX files equal their checkpoints.

    Args:
        key: public key (PEM) that the record must be signed with; None: a signature is not checked.

    Raises:
        InputError: there is no such run, no registry, no such key, or the DVC remote cannot be reached.
    """
    signer = fingerprint(key) if key else ""
    registry.require(run)
    try:
        record = registry.show(run)
        registry.files(run)  # a damaged listing is the record's fault, told as such
    except InputError as error:
        return unreadable(run, str(error))
    try:
        return _examined(Evidence(registry, run, record), key, signer)
    except MALFORMED as error:
        return unreadable(run, f"has not the form of a record: {error!r}")


def _examined(evidence: Evidence, key: Path | None, signer: str) -> Report:
    signature = tuple(evidence.of_signature(key))
    size = f"{len(evidence.content.md5)} files, {evidence.size / 1e6:.1f} MB"
    checks = [
        Check("the record is intact", tuple(evidence.of_record())),
        Check(f"every artifact is in the store with the recorded bytes ({size})", tuple(evidence.of_store())),
        Check("every step read what an earlier step wrote", tuple(evidence.of_chain())),
        Check("the data are the pinned data", tuple(evidence.of_data())),
    ]
    if signer or signature:
        checks.insert(1, Check(f"the record is signed with the key {signer[:12] or '?'}", signature))
    # These read artifacts, so that they need them sound.
    further = [
        ("the leaderboard is what the artifacts say", evidence.of_leaderboard,
         [LEADERBOARD, "methods", "baselines", "selection"]),
        ("the served ONNX files equal their checkpoints", evidence.of_onnx,
         ["model", "labels", "classifier", "repository"]),
    ]  # fmt: skip
    if evidence.reference:
        claim = f"drift was measured against the table of run {evidence.reference}"
        further.insert(0, (claim, evidence.of_drift, ["validation"]))
    for claim, differences, needed in further:
        if damaged := sorted(evidence.damaged.intersection(needed)):
            evidence.notes.append(f"not checked, since {' and '.join(damaged)} lie damaged: {claim}")
        else:
            checks.append(Check(claim, tuple(differences(needed))))
    _, reasons = same_environment(evidence.record)
    notes = [*evidence.notes, *(f"here is not where the run was made: {reason}" for reason in reasons)]
    return Report(evidence.run, evidence.record["digest"], checks, notes)
