"""The leaderboard of a run, read from what its steps wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlabeled.files import read_json

CLUSTER_SCORES = ("acc", "nmi", "ari", "ami", "purity")
EVALUATION = ("method", "family", "knn", "knn_standardised", "linear", "held_out_knn", "effective_rank")
# Rows of older runs are without.
LATER = ("view_retrieval",)


def leaderboard(
    bundle: Path, run: str, data: Mapping[str, Any], steps: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the leaderboard: {"run", "data", "rows", "baselines", "selected"}; the best linear probe first.

    A row holds method, family, the scores of `evaluation.json` (null without labels), `cluster` with those of
    `scores.json`, `objective` (the method's own aim on held-out images), and images_per_second and seconds of
    the pretraining.

    Args:
        bundle: folder of the run.
        steps: record of the step that made an artifact, by its path, as `methods/simclr/model`.
    """
    rows = []
    for folder in sorted((bundle / "methods").glob("*")):
        evaluation = _read(folder / "evaluation" / "evaluation.json")
        clusters = _read(folder / "labels" / "scores.json")
        training = steps[f"methods/{folder.name}/model"]
        metrics = training["metrics"]
        rows.append(
            {
                "method": folder.name,
                **{key: evaluation.get(key) for key in EVALUATION[1:]},
                **{key: evaluation[key] for key in LATER if key in evaluation},
                "cluster": {key: clusters.get(key) for key in CLUSTER_SCORES},
                "objective": _read(folder / "model" / "objective.json"),
                "images_per_second": metrics.get("images_per_second"),
                "seconds": metrics.get("seconds", training["seconds"]),
            }
        )
    rows.sort(
        key=lambda row: (
            -(row["linear"] or 0),
            -(row["held_out_knn"] or 0),
            -row.get("view_retrieval", 0),
            -(row["effective_rank"] or 0),
            row["method"],
        )
    )
    return {
        "run": run,
        "data": dict(data),
        "rows": rows,
        "baselines": _read(bundle / "baselines" / "baselines.json").get("rows", []),
        "selected": _read(bundle / "selection" / "selection.json").get("selected"),
    }


def metrics(board: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaderboard as nested numbers by method, as `dvc metrics diff` compares them."""
    rows = [*board["rows"], *board["baselines"]]
    return {
        row["method"]: {key: value for key, value in row.items() if isinstance(value, int | float | dict)}
        for row in rows
    }


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
