"""Pictures of the report: Matplotlib curves as inline SVG in the page's colours, images as data URIs."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from PIL import Image

# Matplotlib draws in these; the page's style sheet decides what they look like, in light and in dark.
INK, MUTED, LINE, ACCENT, WARM = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", ACCENT: "--accent", WARM: "--warm"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 11, "text.color": INK,
    "axes.edgecolor": LINE, "axes.labelcolor": MUTED, "grid.color": LINE,
    "xtick.color": LINE, "xtick.labelcolor": MUTED, "ytick.color": LINE, "ytick.labelcolor": MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "grid.linewidth": 0.6, "figure.constrained_layout.use": True,
}  # fmt: skip


def data_uri(image: np.ndarray, largest: int) -> str:
    """Return an image, uint8 (C, H, W), C 1 or 3, as a data URI of at most `largest` pixels a side."""
    picture = Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1))
    picture.thumbnail((largest, largest))
    buffer = io.BytesIO()
    # Small gray images take fewer bytes without loss, others far fewer with it.
    lossless = len(image) == 1 and max(picture.size) <= 32
    picture.save(buffer, "WEBP", lossless=lossless, quality=85, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def curves(lines: Sequence[Mapping[str, float]], name: str) -> Markup:
    """Return the loss and the learning rate over the steps of one training, as SVG."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(5.05, 2.9))
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        steps = [line["step"] for line in lines]
        loss.plot(steps, [line["loss"] for line in lines], color=ACCENT, linewidth=1.6)
        loss.set_ylabel("loss")
        rate.fill_between(
            steps, [line.get("learning_rate", np.nan) for line in lines], color=LINE, linewidth=0
        )
        rate.set(ylabel="rate", xlabel="step", yticks=[])
        rate.grid(False)
        rate.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _thousands(rate)
        last = lines[-1]
        return svg(figure, f"Training of {name}: loss {last['loss']:.4g} at step {last['step']:.0f}")


def efficiency(rows: Sequence[Mapping[str, float]]) -> Markup:
    """Return test accuracy over the number of labels, as SVG: fine-tuned, linear probe and from scratch."""
    series = (
        ("finetuned", "fine-tuned", ACCENT, "o", "-"),
        ("probe", "linear probe", WARM, "s", "-"),
        ("scratch", "from scratch", MUTED, "^", "--"),
    )
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "efficiency"}):
        figure = Figure(figsize=(5.5, 3.5))
        axes = figure.subplots()
        labels = [row["labels"] for row in rows]
        for key, title, colour, marker, dashes in series:
            values = [row[key] for row in rows]
            axes.plot(
                labels, values, dashes, color=colour, marker=marker, markersize=5, linewidth=1.6, label=title
            )
        axes.set_xscale("log")
        axes.set_xticks(labels, [f"{row['labels']:,}\n{row['share']:.0%}" for row in rows])
        axes.minorticks_off()
        axes.set(xlabel="labels used", ylabel="test accuracy")
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(frameon=False, labelcolor=INK)
        return svg(figure, "Test accuracy over the number of labels; the numbers are in the table beside it")


def sweep(rows: Sequence[Mapping[str, float]], suggested: int) -> Markup:
    """Return the criterion over the number of clusters, as SVG, and what it is made of; `sweep_clusters` has both."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "sweep"}):
        figure = Figure(figsize=(5.5, 3.3))
        axes = figure.subplots()
        ks = [row["k"] for row in rows]
        for key, title, dashes in (("stability", "halves agree", "--"), ("chance", "a Gaussian's do", ":")):
            axes.plot(
                ks, [row[key] for row in rows], dashes, color=MUTED, linewidth=1.2, label=f"{title} (ARI)"
            )
        axes.errorbar(
            ks, [row["criterion"] for row in rows], [row["error"] for row in rows],
            color=ACCENT, marker="o", markersize=5, linewidth=1.6, elinewidth=1,
            label="criterion: the difference × (1 – 1 / clusters)",
        )  # fmt: skip
        axes.axvline(suggested, color=WARM, linewidth=1, label=f"suggested: {suggested}")
        axes.set(xlabel="clusters", ylabel="adjusted Rand index")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=INK, fontsize=9)
        return svg(figure, f"Criterion over the number of clusters: {suggested} are suggested")


def heat_map(rows: Sequence[Sequence[float]], names: Sequence[str], key: str, title: str) -> Markup:
    """Return SimCLR's figure 5 as SVG: row the first transform, column the second, the diagonal one alone.

    The last column is the mean of each row.

    Args:
        rows: accuracies (T, T), 0 to 1.
        names: of the T transforms.
        key: tells this picture's ids from others in the page.
        title: what is measured.
    """
    values = np.array(rows)
    shown = np.column_stack((values, values.mean(1)))
    count = len(names)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": key, "axes.grid": False}):
        figure = Figure(figsize=(0.78 * count + 2.1, 0.58 * count + 1.2))
        axes = figure.subplots()
        lefts = [*range(count), count + 0.25]
        scale = Normalize(values.min(), values.max())
        for row in range(count):
            for left, value in zip(lefts, shown[row], strict=True):
                colour = matplotlib.colormaps["viridis"](scale(value))
                axes.add_patch(Rectangle((left, row), 1, 1, facecolor=colour, linewidth=0))
                # Dark on bright cells, bright on dark ones, whatever the page's colours are.
                ink = "#111111" if scale(value) > 0.6 else "#ffffff"
                axes.text(left + 0.5, row + 0.5, f"{100 * value:.1f}", color=ink, ha="center", va="center")
        axes.set(xlim=(0, count + 1.25), ylim=(count, 0), xlabel="second transform", ylabel="first transform")
        axes.set_xticks([left + 0.5 for left in lefts], [*names, "mean"])
        axes.set_yticks([row + 0.5 for row in range(count)], list(names))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return svg(figure, f"{title}, per cent, for each pair of transforms; the numbers are in its cells")


def label_efficiency(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Return test accuracy of each method, a dot per share of the labels with its deviation over draws, as SVG.

    Args:
        rows: of `unlabeled.probes.few_labels.comparison.summarise`, the first on top.
    """
    shares = sorted({cell["share"] for row in rows for cell in row["shares"]})
    colours = {0.0: MUTED} | dict(zip((share for share in shares if share), (WARM, ACCENT), strict=False))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "label-efficiency", "axes.grid.axis": "x"}):
        figure = Figure(figsize=(7.6, 0.42 * len(rows) + 1.3))
        axes = figure.subplots()
        for share in shares:
            found = [
                (place, cell)
                for place, row in enumerate(rows)
                for cell in row["shares"]
                if cell["share"] == share
            ]
            label = f"{share:.3g} of the labels" if share else "no label"
            axes.errorbar(
                [cell["top1"]["mean"] for _, cell in found],
                [place for place, _ in found],
                xerr=[cell["top1"]["std"] or 0 for _, cell in found],
                fmt="o", color=colours.get(share, INK), markersize=6, elinewidth=1.4, capsize=3, label=label,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="test accuracy, mean and deviation over the draws")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        figure.legend(loc="outside upper left", ncols=len(shares), frameon=False, labelcolor=INK)
        return svg(
            figure, "Test accuracy of each method by its share of the labels; the numbers are in the table"
        )


def _thousands(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def svg(figure: Figure, title: str) -> Markup:
    """Return a figure drawn in STYLE as inline SVG in the page's colours; `title` says what it shows."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()  # type: ignore[union-attr]
    head = f'<svg class="plot" role="img" aria-label="{escape(title)}" width="{width}" '
    head += f'viewBox="0 0 {width} {height}">'
    svg = re.sub(r".*?<svg [^>]*>", head, svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    # Ids must be unique in the page: only those that something refers to stay.
    referred = set(re.findall(r"#([\w-]+)[\")]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in referred else "", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(re.sub(r"\s*\n\s*", " ", svg))
