"""The sections of the report: each reads its folder of the bundle and returns what the page shows of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from unlabeled.data.table import ImageTable
from unlabeled.files import read_json
from unlabeled.report import plots

# What a page of under three megabytes has room for.
CLUSTERS, CLUSTER_IMAGES, PICTURE_ROWS, PICTURE_COLUMNS = 24, 10, 8, 8
SAMPLE_IMAGES, MATRIX_CLASSES, MISTAKES, LISTED = 32, 24, 5, 100
# The share of its commonest class from which on a cluster counts as pure.
PURE = 0.75
CLUSTERINGS = {"kmeans": "k-means", "scan": "SCAN", "sela": "SeLa"}


def optional_json(path: Path) -> Any:
    """Return the content of a JSON file, None where there is none."""
    return read_json(path) if path.is_file() else None


def tiles(images: np.ndarray, largest: int = 64) -> list[str]:
    """Return images, uint8 (N, C, H, W), as data URIs of at most `largest` pixels a side."""
    return [plots.data_uri(image, largest) for image in images]


def method(folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """How a method was trained, and what its features are like. `row` is the leaderboard's."""
    metrics, picture = folder / "model" / "metrics.jsonl", folder / "model" / "picture.npy"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    shown = np.load(picture)[:PICTURE_ROWS, :PICTURE_COLUMNS] if picture.is_file() else None
    evaluation = optional_json(folder / "evaluation" / "evaluation.json") or {}
    last = lines[-1] if lines else {}
    config = optional_json(folder / "model" / "config.json")
    return {
        "name": row["method"],
        "config": config,
        "seconds": row.get("seconds"),
        "images_per_second": row.get("images_per_second"),
        "curves": plots.curves(lines, row["method"]) if lines else None,
        "logged": {key: value for key, value in last.items() if key not in ("step", "learning_rate")},
        "objective": row.get("objective") or {},
        "picture": [] if shown is None else tiles(shown.reshape(-1, *shown.shape[2:]), 48),
        "picture_rows": (config or {}).get("picture_rows", []),
        "picture_columns": 0 if shown is None else shown.shape[1],
        "collapse": evaluation.get("collapse"),
    }


def clusters(folder: Path, table: ImageTable) -> dict[str, Any] | None:
    """Each cluster of the train split: its size, its central images and the classes in it, in groups.

    With labels the purest come first, the pure apart from the mixed; without, the most confident.
    """
    if not (folder / "labels.parquet").is_file():
        return None
    rows = pd.read_parquet(folder / "labels.parquet").merge(table.rows[["id", "label"]], on="id", how="left")
    gallery = np.load(folder / "gallery.npy")
    found = []
    for cluster, members in rows.groupby("cluster"):
        shares = members["label"].value_counts(normalize=True).head(3)
        found.append(
            {
                "number": cluster,
                "size": len(members),
                "confidence": float(members["confidence"].mean()),
                "purity": float(shares.max()) if len(shares) else None,
                "classes": [(table.classes[int(label)], float(share)) for label, share in shares.items()],
            }
        )
    labelled = all(cluster["purity"] is not None for cluster in found)
    order = "purity" if labelled else "confidence"
    found.sort(key=lambda cluster: (-cluster[order], -cluster["size"]))
    shown = found if len(found) <= CLUSTERS else found[: CLUSTERS // 2] + found[-CLUSTERS // 2 :]
    for cluster in shown:
        cluster["tiles"] = tiles(gallery[cluster["number"], : min(CLUSTER_IMAGES, cluster["size"])])
    pure, mixed = (
        [cluster for cluster in shown if labelled and (cluster["purity"] >= PURE) == asked]
        for asked in (True, False)
    )
    named = {f"Pure: {PURE:.0%} or more of one class": pure, "Mixed": mixed}
    groups = named if labelled else {"By confidence": shown}
    scores = optional_json(folder / "scores.json") or {}
    sweep = scores.get("sweep")
    return {
        "groups": {title: group for title, group in groups.items() if group},
        "shown": len(shown),
        "count": len(found),
        "order": order,
        "method": CLUSTERINGS[scores.get("clustering", "kmeans")],
        "scores": scores,
        "sweep": sweep and {**sweep, "plot": plots.sweep(sweep["rows"], sweep["suggested"])},
    }


def classifier(folder: Path) -> dict[str, Any] | None:
    """Accuracy by number of labels, and what the classifier confuses."""
    config = optional_json(folder / "config.json")
    if config is None:
        return None
    rows = (optional_json(folder / "efficiency.json") or {}).get("rows", [])
    confusion = optional_json(folder / "confusion.json")
    confusion = confusion and _confusion(confusion["classes"], np.array(confusion["matrix"]))
    return {
        "target": config["target"],
        "accuracy": rows[-1]["finetuned"] if rows else confusion and confusion["accuracy"],
        "efficiency": rows,
        "plot": plots.efficiency(rows) if rows else None,
        "confusion": confusion,
    }


def _confusion(classes: list[str], matrix: np.ndarray) -> dict[str, Any]:
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    mistakes = np.where(np.eye(len(matrix), dtype=bool), 0, matrix)
    worst = np.unravel_index(np.argsort(-mistakes, axis=None, kind="stable")[:MISTAKES], matrix.shape)
    return {
        "classes": classes,
        "matrix": matrix.tolist() if len(matrix) <= MATRIX_CLASSES else None,
        "shares": shares.tolist(),
        "accuracy": float(np.trace(matrix) / max(matrix.sum(), 1)),
        "mistakes": [
            {"true": classes[a], "predicted": classes[b], "share": float(shares[a, b])}
            for a, b in zip(*worst)
            if mistakes[a, b]
        ],
    }


def data(table: ImageTable, described: Mapping[str, Any]) -> dict[str, Any]:
    """What went in: counts, classes, a sample, and the files that could not be read."""
    train, test = table.indices("train"), table.indices("test")
    train_labels, test_labels = pd.Series(table.labels(train)), pd.Series(table.labels(test))
    in_train, in_test = (labels.value_counts() for labels in (train_labels, test_labels))
    sample = train[np.linspace(0, len(train) - 1, min(SAMPLE_IMAGES, len(train))).astype(int)]
    return {
        "source": described.get("source", table.summary["source"]),
        "digest": table.summary["digest"],
        "shape": table.image_shape,
        "train": len(train),
        "test": len(test),
        "classes": [
            {"name": name, "train": int(in_train.get(label, 0)), "test": int(in_test.get(label, 0))}
            for label, name in enumerate(table.classes)
        ],
        "sample": tiles(table.images(sample)),
        "labels_note": table.summary.get("labels_note"),
        "broken": table.summary.get("broken", []),
        "listed": LISTED,
    }


def validation(folder: Path, table: ImageTable) -> dict[str, Any] | None:
    """The expectations, those that failed or found images apart, with thumbnails."""
    result = optional_json(folder / "validation.json")
    if result is None:
        return None
    ids = table.rows["id"]
    notable = [found for found in result["expectations"] if not found["success"] or found["offenders"]]
    for expectation in notable:
        expectation["tiles"] = tiles(table.images(np.flatnonzero(ids.isin(expectation["ids"]))))
    return {
        **result,
        "failures": sum(not expectation["success"] for expectation in result["expectations"]),
        "notable": sorted(notable, key=lambda expectation: expectation["success"]),
        "plain": [expectation for expectation in result["expectations"] if expectation not in notable],
    }


def serving(bundle: Path) -> dict[str, Any] | None:
    """Differences from torch to what is served, and the time of a request, from the step's record."""
    result = optional_json(bundle / "serving" / "serving.json")
    if result is None:
        return None
    record = optional_json(bundle / "record.json") or {"predicate": {"steps": []}}
    metrics: dict[str, Any] = {
        key: value
        for step in record["predicate"]["steps"]
        if step["name"] == "check_serving"
        for key, value in step["metrics"].items()
    }
    times = {name: metrics.get(f"{name}_milliseconds") for name in result["models"]}
    return {
        "reduced": {},  # what runs of before do not tell
        **result,
        "difference": max(value for model in result["models"].values() for value in model.values()),
        "milliseconds": times if all(times.values()) else None,
    }
