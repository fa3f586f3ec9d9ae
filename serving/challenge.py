"""Champion and challenger on the same held-out images: the difference of two accuracies and its interval."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from serving.gates import Gate
from serving.repository import CONFIG, LABELS, MODEL, read_config, read_labels
from unlabeled.data.table import TABLE, ImageTable
from unlabeled.export.onnx import OnnxModel

NAME = "champion"
BATCH = 256


def challenge(challenger: Path, champion: Path | None, champion_name: str, margin: float) -> Gate:
    """Compare the classifiers of two runs on test images of the challenger that neither trained on.

    The challenger passes when the lower bound of its accuracy minus the champion's (95 %, see `newcombe`) is at
    least `-margin`. Without labels only the agreement of the two clusterers is told, and nobody is refused.

    Args:
        challenger: bundle with `repository/` and `table/`.
        champion: bundle with `repository/` and `table/table.parquet`; None: the stage holds nothing yet.
        champion_name: of its version, for the reader.
        margin: how much worse the challenger may be, as a share.

    Raises:
        InputError: a file is missing or broken.
    """
    table = ImageTable(challenger / "table")
    test, told = _held_out(table, champion)
    labels = table.labels(test)
    labelled = test[labels >= 0]
    if champion is not None and (refused := _other_channels(table, champion)):
        return Gate(NAME, False, refused)
    if not len(labelled):
        return _without_labels(table, test, told, challenger, champion)
    truth = np.array(table.classes)[labels[labels >= 0]]
    ours = _answers(challenger / "repository", "classifier", table, labelled) == truth
    figures: dict[str, Any] = {"images": len(labelled), "challenger": float(ours.mean())}
    if champion is None:
        why = f"the stage holds nothing yet; accuracy {ours.mean():.4f} on {told}"
        return Gate(NAME, True, why, figures)
    if all(_bytes(challenger, name) == _bytes(champion, name) for name in (MODEL, LABELS)):
        why = f"the classifier of {champion_name}, byte for byte; accuracy {ours.mean():.4f} on {told}"
        return Gate(NAME, True, why, figures | {"difference": 0.0})
    theirs = _answers(champion / "repository", "classifier", table, labelled) == truth
    low, high = newcombe(ours, theirs)
    difference = float(ours.mean() - theirs.mean())
    figures |= {
        "champion": float(theirs.mean()),
        "difference": difference,
        "low": low,
        "high": high,
        "margin": margin,
    }
    why = (
        f"accuracy {ours.mean():.4f}, {champion_name} has {theirs.mean():.4f}: difference {difference:+.4f}, "
        f"95 % [{low:+.4f}, {high:+.4f}] on {told}; allowed from {-margin:+.4f}"
    )
    return Gate(NAME, low >= -margin, why, figures)


def newcombe(ours: np.ndarray, theirs: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Return the confidence interval of the difference of two accuracies on the same images.

    Newcombe's square-and-add interval for paired proportions: the Wilson intervals of both, joined by their
    correlation with a continuity correction (Newcombe 1998, Statistics in Medicine 17, 2635, method 10). It
    keeps a width where both answer alike, unlike a bootstrap.

    Args:
        ours, theirs: bool (N,), whether the answer to an image is right.
    """
    from scipy.stats import binomtest

    n = len(ours)
    both, neither = int((ours & theirs).sum()), int((~ours & ~theirs).sum())
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    p, q = ours.mean(), theirs.mean()
    first, second = (
        binomtest(int(right.sum()), n).proportion_ci(confidence, method="wilson") for right in (ours, theirs)
    )
    product = both * neither - only_ours * only_theirs
    spread = math.sqrt(
        math.prod([both + only_ours, neither + only_theirs, both + only_theirs, neither + only_ours])
    )
    correlation = (max(product - n / 2, 0) if product > 0 else product) / spread if spread else 0.0
    below, above = p - first.low, first.high - p
    below_theirs, above_theirs = q - second.low, second.high - q
    down = math.sqrt(max(below**2 - 2 * correlation * below * above_theirs + above_theirs**2, 0))
    up = math.sqrt(max(above**2 - 2 * correlation * above * below_theirs + below_theirs**2, 0))
    return float(p - q - down), float(p - q + up)


def _held_out(table: ImageTable, champion: Path | None) -> tuple[np.ndarray, str]:
    """Return the test images that occur, by their sha256, in neither train split; and which these are, in words."""
    test = table.indices("test")
    digests = table.rows["sha256"].to_numpy()
    trained = set(digests[table.indices("train")])
    if champion is not None:
        rows = pd.read_parquet(champion / "table" / TABLE, columns=["sha256", "split"])
        trained |= set(rows["sha256"][rows["split"] == "train"])
    kept = test[[digest not in trained for digest in digests[test]]]
    left_out = (
        f", {len(test) - len(kept)} left out that one of them trained on" if len(kept) < len(test) else ""
    )
    return kept, f"{len(kept)} test images of the challenger{left_out}"


def _other_channels(table: ImageTable, champion: Path) -> str:
    channels = read_config(champion / "repository" / "classifier" / CONFIG).input[0].dims[0]
    if channels == table.image_shape[0]:
        return ""
    return (
        f"the champion takes images of {channels} channels, the challenger of {table.image_shape[0]}: they cannot "
        "be compared; promote to another stage"
    )


def _bytes(bundle: Path, name: str) -> bytes:
    return (bundle / "repository" / "classifier" / name).read_bytes()


def _answers(repository: Path, kind: str, table: ImageTable, indices: np.ndarray) -> np.ndarray:
    """Return the name of the class (or cluster) that a model answers with, per image."""
    model, names = OnnxModel(repository / kind / MODEL), np.array(read_labels(repository, kind))
    batches = np.array_split(indices, math.ceil(len(indices) / BATCH))
    return names[np.concatenate([model(table.images(batch)).argmax(1) for batch in batches])]


def _without_labels(
    table: ImageTable, test: np.ndarray, told: str, challenger: Path, champion: Path | None
) -> Gate:
    if champion is None or not len(test):
        return Gate(NAME, True, f"no labelled test image, so nothing to compare ({told})", {"images": 0})
    from sklearn.metrics import normalized_mutual_info_score

    ours, theirs = (
        _answers(bundle / "repository", "clusterer", table, test) for bundle in (challenger, champion)
    )
    agreement = float(normalized_mutual_info_score(theirs, ours))
    why = (
        f"no labelled test image, so accuracy was not compared; the two clusterers agree by NMI {agreement:.3f} on "
        f"{told}: for information, it refuses nobody"
    )
    return Gate(NAME, True, why, {"images": 0, "nmi": agreement})
