"""Kubeflow's cron expressions: six fields, seconds first."""

import re

from unlabeled.errors import InputError

MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
DAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]
# Name, least and greatest value, names of the values from the least on.
FIELDS = (
    ("second", 0, 59, []),
    ("minute", 0, 59, []),
    ("hour", 0, 23, []),
    ("day of month", 1, 31, []),
    ("month", 1, 12, MONTHS),
    ("day of week", 0, 6, DAYS),
)
_PART = re.compile(r"(?:[*?]|(\w+)(?:-(\w+))?)(?:/([1-9]\d*))?")


def check_cron(cron: str) -> None:
    """Refuse a cron expression that Kubeflow would refuse, or misread: it takes five fields for another time.

    Raises:
        InputError: it names the field, and what the field takes.
    """
    fields = cron.split()
    if len(fields) != len(FIELDS):
        hint = f"; did you mean '0 {cron}'?" if len(fields) == 5 else ""
        raise InputError(
            f"cron '{cron}' has {len(fields)} fields, Kubeflow takes six, seconds first, as '0 0 3 * * *'{hint}"
        )
    for text, (name, least, greatest, names) in zip(fields, FIELDS, strict=True):
        for part in text.split(","):
            match = _PART.fullmatch(part)
            bounds = (
                [_number(bound, least, names) for bound in match.groups()[:2] if bound] if match else [-1]
            )
            if not all(least <= bound <= greatest for bound in bounds) or bounds != sorted(bounds):
                named = f" or {names[0]} to {names[-1]}" if names else ""
                raise InputError(
                    f"cron '{cron}': '{part}' is no {name}, it takes {least} to {greatest}{named}, *, ranges as 1-5, "
                    "lists as 1,3 and steps as */10"
                )


def _number(text: str, least: int, names: list[str]) -> int:
    if text.upper() in names:
        return least + names.index(text.upper())
    return int(text) if text.isdecimal() else -1
