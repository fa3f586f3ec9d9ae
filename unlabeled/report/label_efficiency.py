"""The report of the label-efficiency comparison: a summary in JSON and one self-contained HTML page."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unlabeled.data.table import ImageTable
from unlabeled.files import read_json, write_bytes, write_json
from unlabeled.page import fill
from unlabeled.parameters import Parameters
from unlabeled.probes.few_labels.comparison import summarise, top_k
from unlabeled.probes.few_labels.methods import METHODS
from unlabeled.probes.few_labels.task import label_task
from unlabeled.report import plots
from unlabeled.report.report import number, percent

SETTINGS = ("encoder", "training", "self_label", "few_labels", "seed")


def write_comparison(
    cells: Sequence[Path], table: Path, parameters: Parameters, summary: Path, page: Path
) -> dict[str, Any]:
    """Put the cells together, as a summary and as a page; the same cells give the same bytes.

    Args:
        cells: files, each a list of what `Comparison.cells` returned.
        table: the image table they were measured on.
        parameters: what they were measured with.
        summary: the JSON file to write: data, settings, k (of `topk`), matching_bits (what naming C clusters
            can tell of the labels: log2 C!), subsets (share, draw, labels, images: sha256 of the ids), rows of
            `summarise`, cells.
        page: the HTML file to write.

    Returns:
        For each method its best mean accuracy.
    """
    images = ImageTable(table)
    # In the order of the table, whatever the order of the files.
    order = list(METHODS)
    measured = sorted(
        (cell for file in cells for cell in read_json(file)),
        key=lambda cell: (order.index(cell["method"]), cell["share"], cell["draw"]),
    )
    rows = summarise(measured)
    few = parameters.few_labels
    tasks = {
        (share, draw): label_task(images, share, draw)
        for share in sorted(set(few.shares))
        for draw in range(few.draws)
    }
    result: dict[str, Any] = {
        "data": {key: images.summary[key] for key in ("source", "digest", "counts", "classes")},
        "settings": parameters.model_dump(mode="json", include=set(SETTINGS)),
        "k": top_k(len(images.classes)),
        "matching_bits": math.log2(math.factorial(len(images.classes))),
        "subsets": [
            {"share": share, "draw": draw, "labels": len(task.labelled), "images": task.digest}
            for (share, draw), task in tasks.items()
        ],
        "rows": rows,
        "cells": measured,
    }
    write_json(summary, result)
    write_bytes(page, render(result).encode())
    return {row["method"]: max(cell["top1"]["mean"] for cell in row["shares"]) for row in rows}


def render(result: dict[str, Any]) -> str:
    """Return the page of a summary."""
    filters: dict[str, Callable[..., Any]] = {"percent": percent, "number": number, "spread": spread}
    best: dict[float, dict[str, Any]] = {}
    for row in result["rows"]:
        for cell in row["shares"]:
            if cell["share"] not in best or cell["top1"]["mean"] > best[cell["share"]]["top1"]["mean"]:
                best[cell["share"]] = {"title": row["title"], "method": row["method"], **cell}
    shown = {"best": best, "shares": sorted(best), "plot": plots.label_efficiency(result["rows"])}
    return fill(Path(__file__).with_name("label_efficiency.html"), filters, result | shown)


def spread(score: dict[str, float | None]) -> str:
    """Return {"mean": 0.8312, "std": 0.0051} as `83.1 ± 0.5`, in per cent."""
    mean, std = score["mean"], score["std"]
    assert mean is not None
    return f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")
