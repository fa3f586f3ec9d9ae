"""Equal and nearly equal images, found without comparing every pair.

Two images are nearly equal when the root mean square of the differences of their pixels is at most a bound.
Box means, weighted by the root of their area, never lie farther apart than the pixels do (Cauchy-Schwarz),
and an orthogonal projection only shortens distances. So every nearly equal pair is close in a few principal
components of the box means: a k-d tree finds these candidates, the pixels decide. Memory: about 500 bytes an
image.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from unlabeled import progress
from unlabeled.data.table import ImageTable

BOXES = 7  # box means along a side
COMPONENTS = 16
CANDIDATES = 8  # nearest candidates looked at for each image
SAMPLE = 4096  # images that the principal components are fitted on
CHUNK_BYTES = 2**24


def equal_groups(digests: pd.Series) -> np.ndarray:
    """Return for each row the position of the first of equal digest, int64 (N,); a null equals nothing."""
    codes = pd.factorize(digests)[0].astype(np.int64)
    missing = codes < 0
    codes[missing] = len(codes) + np.flatnonzero(missing)
    return first_of_group(codes)


def near_groups(table: ImageTable, equal: np.ndarray, bound: float) -> np.ndarray:
    """Group the images that are linked by nearly equal pairs.

    Args:
        equal: result of `equal_groups`; one image of each group is looked at.
        bound: largest root mean square difference of the pixels of a pair, in gray levels (0 to 255).

    Returns:
        Position of the first image of each image's group, int64 (N,): its own where nothing is near. No pair
        is missed, unless an image has more than `CANDIDATES` others that are nearer in projection.
    """
    singles = np.unique(equal)
    if len(singles) < 2:
        return equal
    sample = singles[:: -(-len(singles) // SAMPLE)]
    boxes = np.concatenate([_boxes(table.images(chunk)) for chunk in _chunks(sample, table)])
    boxes -= boxes.mean(0)
    axes = np.linalg.eigh(boxes.T @ boxes)[1][:, -COMPONENTS:]
    # Rounded, so that the last bits of a matrix product decide nothing; the search radius allows for it.
    points = np.empty((len(singles), axes.shape[1]), np.float32)
    done = 0
    for chunk in _chunks(singles, table):
        points[done : done + len(chunk)] = (_boxes(table.images(chunk)) @ axes).round(2)
        done += len(chunk)
        progress.report(done, len(singles), "images")
    first, second = _candidate_pairs(points, bound + 0.01 * COMPONENTS**0.5)
    near = _near(table, singles[first], singles[second], bound)
    links = coo_array((np.ones(near.sum()), (first[near], second[near])), shape=(len(singles),) * 2)
    groups = connected_components(links, directed=False)[1].astype(np.int64)
    return singles[first_of_group(groups)][np.searchsorted(singles, equal)]


def first_of_group(groups: np.ndarray) -> np.ndarray:
    """Return for every row the position of the first row with the same group number, int64 (N,)."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return first[inverse]


def _chunks(positions: np.ndarray, table: ImageTable) -> Iterator[np.ndarray]:
    size = max(1, CHUNK_BYTES // int(np.prod(table.image_shape)))
    for start in range(0, len(positions), size):
        yield positions[start : start + size]


def _boxes(images: np.ndarray) -> np.ndarray:
    """Return float32 (B, boxes): sums over boxes, scaled: distances are at most those of the pixels."""
    count, channels, *sides = images.shape
    edges = [np.arange(min(BOXES, side)) * side // min(BOXES, side) for side in sides]
    sums = np.add.reduceat(images, edges[0], axis=2, dtype=np.uint32)
    sums = np.add.reduceat(sums, edges[1], axis=3).sum(axis=1, dtype=np.float32)
    rows, columns = (np.diff(edge, append=side) for edge, side in zip(edges, sides))
    area = channels * np.outer(rows, columns)
    return (sums / np.sqrt(area * images[0].size, dtype=np.float32)).reshape(count, -1)


def _candidate_pairs(points: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions, int64 (P,) and (P,), of near points; each pair once, the earlier first."""
    _, neighbours = KDTree(points).query(points, k=CANDIDATES + 1, distance_upper_bound=radius, workers=-1)
    first, rank = np.nonzero(neighbours < len(points))
    second = neighbours[first, rank]
    # Equal points beyond the number of candidates: a chain through their order holds them together.
    order = np.lexsort(points.T)
    same = (points[order[1:]] == points[order[:-1]]).all(axis=1)
    first, second = np.append(first, order[1:][same]), np.append(second, order[:-1][same])
    pairs = np.unique(np.minimum(first, second) * len(points) + np.maximum(first, second))
    first, second = np.divmod(pairs, len(points))
    return first[first < second], second[first < second]


def _near(table: ImageTable, first: np.ndarray, second: np.ndarray, bound: float) -> np.ndarray:
    near = [np.zeros(0, bool)]
    for chunk in _chunks(np.arange(len(first)), table):
        difference = table.images(first[chunk]).astype(np.float32) - table.images(second[chunk])
        near.append((difference**2).mean(axis=(1, 2, 3), dtype=np.float64) <= bound**2)
    return np.concatenate(near)
