"""What a validation comes to: the run goes on, or stops with one line that says why."""

from pathlib import Path
from typing import Any

from unlabeled.errors import CheckFailed
from unlabeled.files import read_json

REPORT, PAGE = "validation.json", "index.html"


def check(validation: Path) -> None:
    """Let a run go on whose images met every critical expectation.

    Args:
        validation: folder that `unlabeled.data.expectations.validate` wrote.

    Raises:
        CheckFailed: one failed; it names the expectation, the parameter that sets its bound, the count and the first
            offending images.
    """
    failed = [
        result
        for result in read_json(validation / REPORT)["expectations"]
        if not result["success"] and result["severity"] == "critical"
    ]
    if failed:
        reasons = "; ".join(_sentence(result) for result in failed[:3])
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise CheckFailed(f"validation failed: {reasons}{more}; see {validation / PAGE}")


def _sentence(result: dict[str, Any]) -> str:
    observed = f"{result['observed']:.4g}" if isinstance(result["observed"], float) else result["observed"]
    text = f"{result['name']} {observed}, {result['relation']} {result['bound']}"
    if result["parameter"]:
        text += f" by validation.{result['parameter']}"
    if not result["offenders"]:
        return text
    first = ", ".join(result["ids"][:3]) + (", …" if result["offenders"] > 3 else "")
    return f"{text} ({result['offenders']} images: {first})"
