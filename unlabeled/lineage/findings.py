"""What an audit finds: claims that are proven, and every difference that keeps one from being proven."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from unlabeled.lineage.tracked import RECORD


@dataclass(frozen=True)
class Difference:
    """Something that is not as it was recorded.

    Attributes:
        step: the step that made it; `record` for what the record itself holds.
        file: a file or artifact of the bundle, or an input of the step.
        what: what is wrong with it, in words.
        recorded, found: the two values, where there are two.
    """

    step: str
    file: str
    what: str
    recorded: str = ""
    found: str = ""

    def __str__(self) -> str:
        pairs = (("recorded", self.recorded), ("found", self.found))
        values = ", ".join(f"{name} {value}" for name, value in pairs if value)
        return f"{self.step}: {self.file}: {self.what}" + (f" ({values})" if values else "")


@dataclass(frozen=True)
class Check:
    """A claim, and the differences that contradict it."""

    claim: str
    differences: tuple[Difference, ...] = ()

    @property
    def proven(self) -> bool:
        return not self.differences


@dataclass(frozen=True)
class Report:
    """The outcome of an audit.

    Attributes:
        run, record: the run, and the digest of its record.
        checks: what was checked, in order.
        notes: what could not be checked, and what an auditor should know; none of it contradicts the record.
    """

    run: str
    record: str
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def differences(self) -> list[Difference]:
        return [difference for check in self.checks for difference in check.differences]

    @property
    def proven(self) -> bool:
        return bool(self.checks) and not self.differences

    def with_check(self, check: Check) -> "Report":
        """Return this report with one more check."""
        return replace(self, checks=[*self.checks, check])

    def with_rerun(
        self, differences: Iterable[Difference], comparable: bool, reasons: Iterable[str]
    ) -> "Report":
        """Return this report with what `compare` and `same_environment` tell of a fresh execution."""
        claim, notes = "a fresh execution gives the same bits", self.notes
        if not comparable:
            claim = "a fresh execution gives the same data and, within tolerance, the same scores"
            notes = [*notes, f"the bits of a fresh execution are not comparable: {'; '.join(reasons)}"]
        return replace(self, checks=[*self.checks, Check(claim, tuple(differences))], notes=notes)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values: run, record, proven, checks (claim, proven, differences), notes."""
        checks = [
            {
                "claim": check.claim,
                "proven": check.proven,
                "differences": [asdict(difference) for difference in check.differences],
            }
            for check in self.checks
        ]
        return {
            "run": self.run,
            "record": self.record,
            "proven": self.proven,
            "checks": checks,
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """Return the report as lines of text; the last one is the verdict."""
        lines = [f"run {self.run}, record {self.record}"]
        for check in self.checks:
            lines.append(f"{'proven ' if check.proven else 'DIFFERS'}  {check.claim}")
            lines += [f"         {difference}" for difference in check.differences]
        lines += [f"note     {note}" for note in self.notes]
        count = len(self.differences)
        return [*lines, "proven" if self.proven else f"not proven: {count} difference{'s' * (count != 1)}"]


def unreadable(run: str, why: str) -> Report:
    """Return the report of a run whose record cannot be read."""
    check = Check("the record is intact", (Difference("record", RECORD, why),))
    return Report(run, "", [check], ["the record cannot be read: nothing else was checked"])
