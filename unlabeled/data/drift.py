"""Drift of inputs: are recent images farther from the training images than held-out images are?

Held-out images are never quite like the training images: an encoder has learned the latter, and often somebody else
drew or took the former. A plain two-sample test of recent against training images would raise an alert for that alone.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import jensenshannon

from unlabeled.errors import InputError
from unlabeled.parameters import Drift

# Squared distances of equal rows come out as a few of the last bits.
EQUAL = 1e-9


class DriftTest(NamedTuple):
    """What `drift_test` found.

    Attributes:
        distance: squared maximum mean discrepancy of recent to training images, unbiased: about 0 for equal
            distributions, and then below 0 as often as above.
        held_out: that of held-out to training images.
        threshold: what `distance` reaches in a share `alpha` of the exchanges.
        p_value: share of the exchanges that reach `distance`, itself counted: 1 / (permutations + 1) to 1.
        exchanges: float64 (permutations,), the distance after each exchange.
    """

    distance: float
    held_out: float
    threshold: float
    p_value: float
    exchanges: np.ndarray

    @property
    def drifted(self) -> bool:
        """Whether the distance is above the threshold, which is p_value <= alpha."""
        return self.distance > self.threshold


def drift_test(
    recent: np.ndarray, training: np.ndarray, held_out: np.ndarray, parameters: Drift, seed: int = 0
) -> DriftTest:
    """Test whether recent images lie farther from the training images than held-out images do.

    The distance is the squared maximum mean discrepancy (Gretton et al. 2012, unbiased) with a Gaussian kernel, half
    as wide as the median distance between training images: that finds a missing class sooner than the whole median.
    Its level without drift comes from exchanging recent with held-out images at random: where both are draws of one
    distribution every exchange is as probable as what was observed, whatever that distribution, the training images
    and the numbers are, so that the share of false alerts is at most `alpha`.

    The order of the rows does not matter. Of each set at most `images` rows are taken, at random.

    Args:
        recent, training, held_out: embeddings, floats (N, D), (M, D), (H, D), each of length 1.
        parameters: `alpha`, `permutations`, `images`, `min_images`.
        seed: of the exchanges and of what is taken.

    Raises:
        InputError: too few images in one of the sets, or too few permutations for `alpha`, or all training
            embeddings are equal.
    """
    allowed = int(parameters.alpha * (parameters.permutations + 1) + 1e-9)
    if not allowed:
        raise InputError(
            f"drift.alpha {parameters.alpha:g} takes at least {math.ceil(1 / parameters.alpha) - 1} drift.permutations"
        )
    for name, rows in (("recent", recent), ("training", training), ("held-out", held_out)):
        if len(rows) < parameters.min_images:
            raise InputError(
                f"{len(rows)} {name} images are too few to tell of drift: drift.min_images asks for "
                f"{parameters.min_images}"
            )
    random = np.random.default_rng(seed)
    recent, training, held_out = (
        _sample(rows, parameters.images, random) for rows in (recent, training, held_out)
    )
    width = kernel_width(training)
    n, pool = len(recent), np.concatenate([recent, held_out])
    among = gaussian_kernel(pool, pool, width)
    np.fill_diagonal(among, 0)
    to_training = gaussian_kernel(pool, training, width).mean(1)
    # A row per exchange, 1 where the image counts as recent; the first row is what was observed.
    counts_as_recent = np.zeros((parameters.permutations + 1, len(pool)))
    counts_as_recent[:, :n] = 1
    random.permuted(counts_as_recent[1:], axis=1, out=counts_as_recent[1:])
    within = ((counts_as_recent @ among) * counts_as_recent).sum(1) / (n * (n - 1))
    across = counts_as_recent @ to_training / n
    distances = _mean_off_diagonal(gaussian_kernel(training, training, width)) + within - 2 * across
    # Equal exchanges differ in their last bits.
    distances = distances.round(12)
    observed, exchanges = float(distances[0]), distances[1:]
    return DriftTest(
        distance=observed,
        held_out=squared_mmd(held_out, training, width),
        threshold=float(np.sort(exchanges)[-allowed]),
        p_value=float((distances >= observed).mean()),
        exchanges=exchanges,
    )


def squared_mmd(x: np.ndarray, y: np.ndarray, width: float) -> float:
    """Return the unbiased squared maximum mean discrepancy of two sets, floats (N, D) and (M, D), N and M above 1."""
    within = _mean_off_diagonal(gaussian_kernel(x, x, width)) + _mean_off_diagonal(
        gaussian_kernel(y, y, width)
    )
    return float(within - 2 * gaussian_kernel(x, y, width).mean())


def gaussian_kernel(x: np.ndarray, y: np.ndarray, width: float) -> np.ndarray:
    """Return exp(-|x - y|^2 / (2 width^2)) of every pair of rows, float64 (N, M)."""
    return np.exp(_squared_distances(x, y) / (-2 * width**2))


def kernel_width(rows: np.ndarray) -> float:
    """Return half the median distance between rows that differ.

    Raises:
        InputError: all rows are equal.
    """
    distances = _squared_distances(rows, rows)[np.triu_indices(len(rows), 1)]
    distances = distances[distances > EQUAL]
    if not len(distances):
        raise InputError("the embeddings of all training images are equal: the encoder has collapsed")
    return math.sqrt(np.median(distances)) / 2


def occupancy(clusters: np.ndarray, count: int) -> np.ndarray:
    """Return the share of each of `count` clusters, float64 (count,), among the clusters of images, int (N,)."""
    return np.bincount(clusters, minlength=count) / len(clusters)


def occupancy_distance(shares: np.ndarray, others: np.ndarray) -> float:
    """Return the Jensen-Shannon distance of two distributions over the same clusters: 0 equal, 1 disjoint."""
    return float(jensenshannon(shares, others, base=2))


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    distances = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T
    return np.maximum(distances, 0)


def _mean_off_diagonal(kernel: np.ndarray) -> float:
    return float((kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1)))


def _sample(rows: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Return at most `count` of the rows as float64; their order tells nothing of the one they came in."""
    rows = rows[np.argsort([row.tobytes() for row in rows])]
    if len(rows) > count:
        rows = rows[np.sort(random.choice(len(rows), count, replace=False))]
    return rows.astype(np.float64)
