"""How many clusters? Each number is tried, and told by how well two halves of the images agree on theirs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from unlabeled import progress
from unlabeled.errors import InputError
from unlabeled.selflabel.neighbours import principal_axes

IMAGES, AXES = 10_000, 32
REPEATS, RESTARTS, ITERATIONS = 5, 3, 50


def sweep_clusters(z: np.ndarray, ks: Sequence[int], seed: int) -> dict[str, Any]:
    """Return a criterion for each number of clusters, and the number that it suggests. No label is used.

    The criterion is the stability of k-means (Ben-Hur et al. 2002; von Luxburg 2010): two halves of the
    images are clustered apart, both clusterings are extended to all images, and compared by the adjusted Rand
    index. Any long cloud is cut in two alike, clusters or none. So the same is done with a Gaussian of the
    same covariance, which has no cluster, and what counts is how much more the images' halves agree. Few large
    clusters are agreed upon easily and say little: so it is multiplied by the share of pairs that k even
    clusters tell apart, 1 - 1/k. Suggested is the number with the largest criterion.

    It counts the clusters of the *features*, which need not be a person's classes. Thirteen encoders of
    Fashion-MNIST were given 6 to 12, four of digits 8 to 12; the curve shows what else is as stable. It misleads
    where small clusters stand beside large ones, which are cut instead; where clusters lie in groups, which may
    be counted for them; and where nothing is clustered: then all criteria are near 0, and one is still largest.

    Args:
        z: standardised features, float32 (N, D); of at most 10,000 of them the 32 principal axes are used.
        ks: numbers of clusters, 2 to N/2 - 1.

    Returns:
        rows: {"k", "criterion", "error" (standard, of the mean), "stability", "chance" (the Gaussian's)},
        by rising k; suggested: one of the `ks`.

    Raises:
        InputError: a number of clusters is out of range.
    """
    rng = np.random.default_rng(seed)
    z = z[rng.choice(len(z), min(len(z), IMAGES), replace=False)]
    if not ks or min(ks) < 2 or max(ks) > len(z) // 2 - 1:
        raise InputError(
            f"self_label.sweep takes numbers of clusters from 2 to {len(z) // 2 - 1}, got {list(ks)}"
        )
    x = torch.from_numpy(z - z.mean(0))
    images = (x @ principal_axes(x, AXES)).numpy()
    # The axes are uncorrelated: their deviations are the whole covariance.
    gaussian = rng.standard_normal(images.shape).astype(np.float32) * images.std(0)
    rows = []
    # scikit-learn adds up its threads' parts in the order they end: one thread alone repeats bit for bit.
    with threadpool_limits(1, user_api="openmp"):
        for done, k in enumerate(sorted(set(ks)), 1):
            ours, chance = (
                np.array([stability(points, k, (seed + repeat) % 2**32) for repeat in range(REPEATS)])
                for points in (images, gaussian)
            )
            apart = 1 - 1 / k
            row = {
                "k": k,
                "criterion": apart * float(ours.mean() - chance.mean()),
                "error": apart * float(np.sqrt((ours.var(ddof=1) + chance.var(ddof=1)) / REPEATS)),
                "stability": float(ours.mean()),
                "chance": float(chance.mean()),
            }
            rows.append(row)
            progress.report(done, len(set(ks)), "numbers of clusters", criterion=row["criterion"])
    return {"rows": rows, "suggested": max(rows, key=lambda row: row["criterion"])["k"]}


def stability(points: np.ndarray, k: int, seed: int) -> float:
    """Return the adjusted Rand index of two clusterings of points (N, D), each found on another half of them."""
    order = np.random.default_rng(seed).permutation(len(points))
    halves = np.array_split(points[order], 2)
    found = [
        KMeans(k, n_init=RESTARTS, max_iter=ITERATIONS, random_state=seed).fit(half).predict(points)
        for half in halves
    ]
    return float(adjusted_rand_score(*found))
