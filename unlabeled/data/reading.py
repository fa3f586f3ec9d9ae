"""What every reader of a source gives to the writer of the table: the images, in batches."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from unlabeled.errors import CheckFailed

BATCH_BYTES = 4 << 20


@dataclass
class Batch:
    """Some images and what the source says of them.

    Attributes:
        images: uint8 (n, C, H, W).
        ids: n names.
        splits: n times `train` or `test`; None: the table's writer decides by content.
        labels: int64 (n,), an index into the classes, -1 where there is none.
        sizes: int64 (n, 2), height and width of the images as found.
        masks: bool (n, H, W), where the object is; None: not known.
    """

    images: np.ndarray
    ids: list[str]
    splits: list[str] | None
    labels: np.ndarray
    sizes: np.ndarray
    masks: np.ndarray | None = None


@dataclass
class Reading:
    """A source that is open for reading.

    Attributes:
        kind: `idx`, `npz`, `digits`, `stamps` or `images`.
        classes: names of the classes; empty where there are no labels.
        image_shape: (C, H, W), H = W.
        found: number of images and of files that are no image.
        batches: the images, in the order of the table.
        broken: {"path", "reason"} of each image that cannot be read; complete when `batches` is spent.
        labels_note: why there are no classes though the source seems to have some; empty: nothing to say.
    """

    kind: str
    classes: list[str]
    image_shape: tuple[int, int, int]
    found: int
    batches: Iterator[Batch]
    broken: list[dict[str, str]] = field(default_factory=list)
    labels_note: str = ""

    def add_broken(self, path: str, reason: str) -> None:
        """Note a file that cannot be used; bytes of its path that are no UTF-8 are shown escaped."""
        self.broken.append({"path": path.encode(errors="backslashreplace").decode(), "reason": reason})

    def check_broken(self, max_share: float) -> None:
        """Raise CheckFailed when more than `max_share` of what was found is broken."""
        count = len(self.broken)
        if count > max_share * self.found:
            first = "; ".join(f"{file['path']} ({file['reason']})" for file in self.broken[:3])
            more = f"; and {count - 3} more" if count > 3 else ""
            raise CheckFailed(
                f"{count} of {self.found} files are broken, {count / self.found:.1%}; "
                f"ingest.max_broken_share allows {max_share:.1%}: {first}{more}"
            )


def batch_length(image_shape: tuple[int, int, int]) -> int:
    """Return how many images make a batch of about 4 MiB."""
    return min(4096, max(1, BATCH_BYTES // math.prod(image_shape)))
