"""The page of a drift check: one HTML file that needs nothing from outside."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from unlabeled.files import write_bytes
from unlabeled.page import fill
from unlabeled.report.plots import ACCENT, INK, LINE, MUTED, STYLE, WARM, data_uri, svg
from unlabeled.report.report import number, percent

PICTURE_SIDE = 64
COLOURS = {"training": LINE, "held_out": MUTED, "recent": ACCENT}


@dataclass(frozen=True)
class Pair:
    """A recent image and the training image nearest to it: uint8 (C, H, W) both, the latter's id, their cosine."""

    image: np.ndarray
    nearest: np.ndarray
    id: str
    cosine: float


def write_page(path: Path, result: dict[str, Any], exchanges: np.ndarray, farthest: Sequence[Pair]) -> None:
    """Write the page; the same result gives the same bytes.

    Args:
        path: the HTML file.
        result: the summary of `serving.drift.measure_drift`.
        exchanges: float64 (permutations,), the distances after exchanges of recent and held-out images.
        farthest: recent images least like any training image; empty where only embeddings are known.
    """
    pictures = [
        {
            "image": data_uri(pair.image, PICTURE_SIDE),
            "nearest": data_uri(pair.nearest, PICTURE_SIDE),
            "id": pair.id,
            "cosine": pair.cosine,
        }
        for pair in farthest
    ]
    shown = {
        "distances": _distances(result, exchanges),
        "shares": _shares(result["clusters"]),
        "farthest": pictures,
    }
    filters = {"percent": percent, "number": number, "moment": _moment}
    write_bytes(path, fill(Path(__file__).with_name("drift.html"), filters, result | shown).encode())


def _distances(result: dict[str, Any], exchanges: np.ndarray) -> Markup:
    """Return the distances after exchanges as a histogram, with threshold and what was observed, as SVG."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "distances"}):
        figure = Figure(figsize=(7.6, 3.2))
        axes = figure.subplots()
        axes.hist(exchanges, bins=40, color=LINE)
        axes.axvline(result["threshold"], color=WARM, linestyle="--", linewidth=1.4, label="threshold")
        axes.axvline(result["distance"], color=ACCENT, linewidth=2, label="recent inputs")
        axes.set(xlabel="squared MMD to the training images", ylabel="exchanges")
        figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=INK)
        return svg(
            figure, "Distances after random exchanges, the threshold, and the distance of recent inputs"
        )


def _shares(clusters: Sequence[dict[str, Any]]) -> Markup:
    """Return the share of each cluster among training, held-out and recent images as SVG."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "shares"}):
        figure = Figure(figsize=(7.6, 3.2))
        axes = figure.subplots()
        places = np.arange(len(clusters))
        for offset, (name, colour) in enumerate(COLOURS.items()):
            shares = [cluster[name] for cluster in clusters]
            axes.bar(places + 0.27 * (offset - 1), shares, 0.25, color=colour, label=name.replace("_", "-"))
        axes.xaxis.set_major_locator(MaxNLocator(20, integer=True))
        axes.set(xlabel="cluster", ylabel="share of the images")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        figure.legend(loc="outside upper left", ncols=3, frameon=False, labelcolor=INK)
        return svg(figure, "Share of each cluster; the numbers are in the table")


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
