"""Methods and baselines on common scales: who won, and how far above the baselines."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# What is drawn, the deciding score first; and all that is listed.
SCORES = {"linear": "Linear probe", "knn": "Weighted kNN", "acc": "Cluster accuracy"}
LABEL_FREE_SCORES = {"view_retrieval": "Views found", "effective_rank": "Effective rank"}
NUMBERS = {
    "linear": "linear probe", "knn": "kNN", "knn_standardised": "kNN std.", "held_out_knn": "kNN held out",
    "acc": "ACC", "purity": "purity", "nmi": "NMI", "ami": "AMI", "ari": "ARI",
    "view_retrieval": "views found", "effective_rank": "effective rank",
    "images_per_second": "images/s", "seconds": "seconds",
}  # fmt: skip


def ranking(leaderboard: Mapping[str, Any], labelled: bool) -> dict[str, Any]:
    """Return what the page says of the leaderboard.

    Args:
        labelled: without labels view retrieval and the effective rank take the place of accuracies.

    Returns:
        `entries`: methods and baselines, best first, each {"method", "kind", "selected", "numbers"};
        `columns`: the scores to draw (see `_column`); `numbers`: titles of the numbers that some entry has.
    """
    titles = SCORES if labelled else LABEL_FREE_SCORES
    rows = [("method", row) for row in leaderboard["rows"]]
    rows += [("baseline", row) for row in leaderboard["baselines"]]
    entries = [
        {
            "method": row["method"],
            "kind": kind,
            "selected": kind == "method" and row["method"] == leaderboard["selected"],
            "numbers": _numbers({**row, **(row.get("cluster") or {})}),
        }
        for kind, row in rows
    ]
    entries.sort(key=lambda entry: [-entry["numbers"].get(key, -math.inf) for key in titles])
    known = {key for entry in entries for key in entry["numbers"]}
    return {
        "entries": entries,
        "columns": [_column(key, title, entries) for key, title in titles.items() if key in known],
        "numbers": {key: title for key, title in NUMBERS.items() if key in known},
    }


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, int | float)}


def _column(key: str, title: str, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A score that some entry has: its scale from `low` to `high`, the selected method's `value`, the `best`
    baseline, and how far the value is `above` each baseline, best first."""
    having = [entry for entry in entries if key in entry["numbers"]]
    values = [entry["numbers"][key] for entry in having]
    step = 0.1 if max(values) <= 1 else 10 ** math.floor(math.log10(max(values)))
    value = next((entry["numbers"][key] for entry in having if entry["selected"]), None)
    baselines = {entry["method"]: entry["numbers"][key] for entry in having if entry["kind"] == "baseline"}
    best = max(baselines, key=lambda method: baselines[method], default=None)
    return {
        "key": key,
        "title": title,
        "low": step * math.floor(min(values) / step),
        "high": step * math.floor(max(values) / step + 1),
        "value": value,
        "best": best and {"method": best, "value": baselines[best]},
        "above": {name: value - other for name, other in baselines.items()} if value is not None else {},
    }
