"""The page of the validation: one HTML file that needs nothing from outside."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from unlabeled.data.suite import ids
from unlabeled.data.table import ImageTable
from unlabeled.page import fill

THUMBNAIL_SIDE = 96
BINS = 60
HISTOGRAMS = {"mean": 1.0, "std": 0.5, "entropy": 8.0}  # column: upper end of its axis
CLASSES_SHOWN = 60


@dataclass(frozen=True)
class Offender:
    """An image, by position, that breaks an expectation; `twin`: position of the image that it repeats."""

    position: int
    expectation: str
    twin: int | None = None


def thumbnails(images: ImageTable, positions: Sequence[int]) -> np.ndarray:
    """Return uint8 (n, C, H, W): the images at `positions`, thinned to at most 96 pixels a side."""
    stride = -(-max(images.image_shape[1:]) // THUMBNAIL_SIDE)
    return images.images(np.array(positions, np.int64))[:, :, ::stride, ::stride]


def render(
    report: dict[str, Any],
    images: ImageTable,
    rows: pd.DataFrame,
    earlier: pd.DataFrame | None,
    shown: Sequence[Offender],
) -> str:
    """Return the page.

    Args:
        report: what `validation.json` holds.
        images: the image table; `rows`: its rows; `earlier`: those of the reference.
        shown: offenders with their pictures, of one expectation after the other.
    """
    galleries = [
        {"name": name, "tiles": [_tile(images, rows, offender) for offender in offenders]}
        for name, offenders in groupby(shown, key=lambda offender: offender.expectation)
    ]
    values = {
        "report": report,
        "expectations": sorted(
            report["expectations"], key=lambda result: (result["success"], result["severity"])
        ),
        "galleries": galleries,
        "splits": rows["split"].value_counts().sort_index(ascending=False).to_dict(),
        "histograms": [_histogram(column, end, rows, earlier) for column, end in HISTOGRAMS.items()],
        "classes": _classes(images.classes, rows),
        "source": images.summary.get("source", ""),
        "broken": len(images.summary.get("broken", [])),
    }
    return fill(Path(__file__).with_name("validation.html"), {"figure": _figure}, values)


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)


def _tile(images: ImageTable, rows: pd.DataFrame, offender: Offender) -> dict[str, Any]:
    positions = [offender.position] if offender.twin is None else [offender.position, offender.twin]
    return {
        "ids": ids(rows, positions),
        "pictures": [_data_uri(picture) for picture in thumbnails(images, positions)],
    }


def _data_uri(picture: np.ndarray) -> str:
    pixels = picture[0] if len(picture) < 3 else picture[:3].transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _histogram(column: str, end: float, rows: pd.DataFrame, earlier: pd.DataFrame | None) -> dict[str, Any]:
    """Return SVG points of the histograms, in a box of `BINS` x 100."""
    tables = {"now": rows} if earlier is None else {"now": rows, "then": earlier}
    shares = {}
    for name, table in tables.items():
        values = pd.to_numeric(table[column], errors="coerce").dropna().to_numpy(float)
        shares[name] = np.histogram(values, BINS, (0, end))[0] / max(len(values), 1)
    top = max(share.max() for share in shares.values()) or 1
    points = {
        name: " ".join(
            f"{x},{100 - 96 * y / top:.1f} {x + 1},{100 - 96 * y / top:.1f}" for x, y in enumerate(share)
        )
        for name, share in shares.items()
    }
    return {"column": column, "end": end, "bins": BINS, "then": None, **points}


def _classes(names: list[str], rows: pd.DataFrame) -> list[dict[str, Any]]:
    labels = pd.to_numeric(rows["label"], errors="coerce")
    counts = {split: labels[rows["split"] == split].value_counts() for split in ("train", "test")}
    return [
        {"name": name, **{split: int(count.get(label, 0)) for split, count in counts.items()}}
        for label, name in enumerate(names[:CLASSES_SHOWN])
    ]
