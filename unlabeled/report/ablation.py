"""The report of the ablation of augmentations: a summary in JSON and one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from unlabeled.data.batches import evenly_spread
from unlabeled.data.table import ImageTable
from unlabeled.files import read_json, write_bytes, write_json
from unlabeled.page import fill
from unlabeled.probes.claims import PUBLISHED, sentences, summarise
from unlabeled.report import plots
from unlabeled.report.report import number, percent
from unlabeled.report.sections import tiles
from unlabeled.views import to_float
from unlabeled.views.transforms import TRANSFORMS

SHOWN_IMAGES = 10


def write_ablation(
    cells: Sequence[Path], table: Path, settings: Mapping[str, Any], summary: Path, page: Path
) -> dict[str, Any]:
    """Put the cells together, as a summary and as a page; the same cells give the same bytes.

    Args:
        cells: files that `unlabeled.probes.ablation.measure` wrote.
        table: the image table they were measured on.
        settings: the parameters they were measured with.
        summary: the JSON file to write: data, settings, what `summarise` returns, and cells.
        page: the HTML file to write.

    Returns:
        The claims.
    """
    images = ImageTable(table)
    measured = sorted(map(read_json, cells), key=lambda cell: (cell["seed"], cell["transforms"]))
    result = {
        "data": {
            key: images.summary[key] for key in ("source", "digest", "counts", "channels", "image_size")
        },
        "settings": dict(settings),
        **summarise(measured),
        "cells": measured,
    }
    write_json(summary, result)
    write_bytes(page, _page(result, images).encode())
    return result["claims"]


def _page(result: dict[str, Any], images: ImageTable) -> str:
    names = result["transforms"]
    columns = [list(PUBLISHED).index(name) for name in names]
    paper = [[PUBLISHED[name][column] / 100 for column in columns] for name in names]
    shown = {
        "sentences": sentences(result),
        "heat_map": plots.heat_map(result["linear"], names, "linear", "Linear accuracy on test"),
        "contrastive": plots.heat_map(
            result["contrastive_accuracy"], names, "contrastive", "Contrastive accuracy on test images"
        ),
        "paper": plots.heat_map(paper, names, "paper", "Linear accuracy on ImageNet, the paper's"),
        "gallery": _gallery(images, names),
    }
    filters = {"percent": percent, "number": number}
    return fill(Path(__file__).with_name("ablation.html"), filters, result | shown)


def _gallery(images: ImageTable, names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return test images as they are, and under each transform."""
    sample = to_float(torch.from_numpy(images.images(evenly_spread(images.indices("test"), SHOWN_IMAGES))))
    rows = [("as it is", sample)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows += [(name, TRANSFORMS[name](sample)) for name in names]
    return [(name, tiles((row * 255).round().byte().numpy())) for name, row in rows]
