"""What every method of the comparison is given: the same few labels, the same many images."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from unlabeled.data.table import ImageTable
from unlabeled.errors import InputError
from unlabeled.probes.subsets import label_subset


@dataclass(frozen=True)
class Task:
    """All that a method may learn from. The test images are not in it.

    Attributes:
        table: where the images lie.
        labelled: int64 (n,), table positions of the images whose labels are given.
        targets: int64 (n,), their classes.
        unlabelled: int64 (N,), table positions of all train images, without labels.
        classes: number of classes, C.
    """

    table: ImageTable
    labelled: np.ndarray
    targets: np.ndarray
    unlabelled: np.ndarray
    classes: int

    def take(self, positions: np.ndarray) -> "Task":
        """Return the task with the labels at `positions` (of the n) alone, and the same unlabelled images."""
        return replace(self, labelled=self.labelled[positions], targets=self.targets[positions])

    @property
    def digest(self) -> str:
        """sha256 (hex) of the labelled images' ids, in the table's order, one a line."""
        ids = self.table.rows["id"].iloc[self.labelled].astype(str)
        return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def label_task(table: ImageTable, share: float, draw: int) -> Task:
    """Return a task with a stratified share of the train labels, at least four of each class.

    The same draw of a smaller share is a subset of that of a larger one.

    Args:
        share: above 0, up to 1, of the train images that have a label.
        draw: which of the random subsets, from 0.

    Raises:
        InputError: train has labels of fewer than two classes.
    """
    train = table.indices("train")
    labels = table.labels(train)
    known = np.flatnonzero(labels >= 0)
    if len(np.unique(labels[known])) < 2:
        raise InputError(
            f"{table.folder} has labels of fewer than two classes in train; "
            "methods that learn from few labels need them: give images in class folders"
        )
    chosen = known[label_subset(labels[known], share, draw)]
    return Task(table, train[chosen], labels[chosen], train, len(table.classes))
