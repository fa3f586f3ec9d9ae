"""scikit-learn's digits: 1,797 gray images of 8 x 8 pixels, classes 0 to 9 (Alpaydin and Kaynak 1998)."""

import io
from pathlib import Path

import numpy as np

from unlabeled.data.arrays import ImageArray, Part, read_parts
from unlabeled.data.reading import Reading
from unlabeled.errors import InputError
from unlabeled.parameters import Ingest

TEST_SHARE = 0.2


def read_digits(path: Path, parameters: Ingest) -> Reading:
    """Return the reading of scikit-learn's `digits.csv.gz`: values 0 to 16 scaled to 0 to 255.

    The last fifth of each class, in the order of the file, is the test split.

    Raises:
        InputError: it is not that file.
    """
    try:
        values = np.loadtxt(path, delimiter=",", dtype=np.int64)
        pixels, labels = values[:, :64].reshape(-1, 8, 8), values[:, 64]
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise InputError(f"{path}: not scikit-learn's digits, {error}") from None
    if pixels.min() < 0 or pixels.max() > 16:
        raise InputError(f"{path}: not scikit-learn's digits, values {pixels.min()} to {pixels.max()}")
    splits = np.full(len(labels), "train")
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        splits[members[len(members) - round(TEST_SHARE * len(members)) :]] = "test"
    data = np.rint(pixels * (255 / 16)).astype(np.uint8)
    images = ImageArray(str(path), data.shape, lambda: io.BytesIO(data.tobytes()))
    return read_parts("digits", [Part("image", images, labels, splits)], parameters)
