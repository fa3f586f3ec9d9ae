"""What validation computes of an image table before it judges: faults of images, and drift."""

import numpy as np
import pandas as pd
from scipy.stats import ks_2samp

from unlabeled.data.duplicates import equal_groups, first_of_group, near_groups
from unlabeled.data.table import ImageTable
from unlabeled.parameters import Validation

# The names of the faults: their columns, and the expectations that look at these.
DUPLICATE, NEAR_DUPLICATE = "exact duplicates", "near duplicates"
LEAK, NEAR_LEAK = "test images equal to a train image", "test images nearly equal to a train image"
CONSTANT, RARE = "images of a single colour", "class balance in train"
STATISTICS = ["mean", "std", "entropy"]


def with_faults(
    table: ImageTable, rows: pd.DataFrame, parameters: Validation
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Find the images at fault.

    Args:
        table: the images.
        rows: their rows, with the columns of an image table, of any type.
        parameters: what is near, what is rare.

    Returns:
        The rows with a boolean column per fault (duplicates within a split, leaks from train to test); and
        for faults that are repetitions, by name, the position of the image repeated: int64 (N,), -1 for none.
    """
    position = np.arange(len(rows))
    train, test = ((rows["split"] == split).to_numpy(bool, na_value=False) for split in ("train", "test"))
    equal = equal_groups(rows["sha256"])
    # Rows and images that do not pair up cannot be compared on pixels; another expectation tells of that.
    near = near_groups(table, equal, parameters.near_difference) if len(table) == len(rows) else equal

    def first_in_split(groups: np.ndarray) -> np.ndarray:
        return first_of_group(2 * groups + train)

    def first_in_train(groups: np.ndarray) -> np.ndarray:
        first = np.full(len(rows), -1)
        first[groups[train][::-1]] = position[train][::-1]
        return first[groups]

    repeated = {
        DUPLICATE: first_in_split(equal),
        NEAR_DUPLICATE: first_in_split(near),
        LEAK: first_in_train(equal),
        NEAR_LEAK: first_in_train(near),
    }
    duplicate, leak = repeated[DUPLICATE] != position, test & (repeated[LEAK] >= 0)
    label = labels(rows).where(train)
    count = label.map(label.value_counts())
    faults = {
        DUPLICATE: duplicate,
        NEAR_DUPLICATE: (repeated[NEAR_DUPLICATE] != position) & ~duplicate,
        LEAK: leak,
        NEAR_LEAK: test & (repeated[NEAR_LEAK] >= 0) & ~leak,
        CONSTANT: (rows["std"] == 0).to_numpy(bool, na_value=False),
        RARE: (count < parameters.min_class_balance * count.max()).to_numpy(bool),
    }
    return rows.assign(**faults), repeated


def labels(rows: pd.DataFrame) -> pd.Series:
    """Return the labels as float64, NaN where there is none or no number."""
    return pd.to_numeric(rows["label"], errors="coerce").astype("float64")


def class_balance(rows: pd.DataFrame) -> float | None:
    """Return the count of the rarest class in train over that of the most frequent; None without labels."""
    counts = labels(rows[rows["split"] == "train"]).value_counts()
    return float(counts.min() / counts.max()) if len(counts) else None


def drift(rows: pd.DataFrame, earlier: pd.DataFrame) -> dict[str, float]:
    """Return how far each column lies from that of an earlier table, 0 to 1.

    Mean, std and entropy: Kolmogorov-Smirnov distance; label: total variation, where both tables have labels.
    A column without a number is at distance 1.
    """
    distances = {}
    for column in STATISTICS:
        now, then = (pd.to_numeric(table[column], errors="coerce").dropna() for table in (rows, earlier))
        known = len(now) > 0 and len(then) > 0
        distances[column] = float(ks_2samp(now, then, method="asymp").statistic) if known else 1.0
    now, then = (labels(table).value_counts(normalize=True) for table in (rows, earlier))
    if len(now) and len(then):
        distances["label"] = float(now.sub(then, fill_value=0).abs().sum() / 2)
    return distances
