"""The report of a run: one HTML file that holds everything it shows, and needs nothing from outside."""

from pathlib import Path
from typing import Any

from unlabeled.data.table import ImageTable
from unlabeled.errors import InputError
from unlabeled.files import read_json, write_bytes
from unlabeled.page import fill
from unlabeled.report import provenance, ranking, sections

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def write_report(bundle: Path, output: Path) -> None:
    """Write the report of a recorded run.

    The same bundle gives the same bytes. What the bundle lacks (labels, a classifier, a serving check …) the
    page says in words.

    Args:
        bundle: folder of the run, as `record` lays it out.
        output: the HTML file to write.

    Raises:
        InputError: `bundle` holds no leaderboard or no image table.
    """
    bundle = Path(bundle)
    if not (bundle / "leaderboard.json").is_file():
        raise InputError(f"{bundle} is no run: leaderboard.json belongs there")
    filters = {"percent": percent, "number": number, "duration": duration}
    write_bytes(output, fill(Path(__file__).with_name("run.html"), filters, _view(bundle)).encode())


def _view(bundle: Path) -> dict[str, Any]:
    table = ImageTable(bundle / "table")
    leaderboard = read_json(bundle / "leaderboard.json")
    methods = [sections.method(bundle / "methods" / row["method"], row) for row in leaderboard["rows"]]
    return {
        "run": leaderboard["run"],
        "selected": leaderboard["selected"],
        "selection": sections.optional_json(bundle / "selection" / "selection.json"),
        "ranking": ranking.ranking(leaderboard, bool(table.classes)),
        "methods": methods,
        "clusters": sections.clusters(bundle / "labels", table),
        "classifier": sections.classifier(bundle / "classifier"),
        "data": sections.data(table, leaderboard["data"]),
        "validation": sections.validation(bundle / "validation", table),
        "serving": sections.serving(bundle),
        "lineage": provenance.lineage(bundle / "record.json"),
    }


def percent(share: float | None) -> str:
    """Return 0.8874 as `88.7 %`."""
    return "–" if share is None else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def number(value: Any) -> str:
    """Return a number with thousands separated and at most four significant digits, anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return (
            f"{mantissa}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}10{str(int(exponent)).translate(SUPERSCRIPTS)}"
        )
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return seconds as `3 min 20 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"
