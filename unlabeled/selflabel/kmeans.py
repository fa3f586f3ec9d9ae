"""k-means: the baseline that every other clustering has to beat."""

import math
import warnings
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from unlabeled import progress
from unlabeled.parameters import SelfLabel

RESTART_IMAGES = 20_000


def fit_kmeans(
    z: np.ndarray, k: int, parameters: SelfLabel, seed: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Fit k-means: Lloyd's algorithm from k-means++ starts (Arthur & Vassilvitskii 2007), best of `restarts`.

    Beyond 20,000 images (K if more) all restarts run on the same random ones, so that their inertias compare, and the
    best one goes on over all images.

    An image belongs to the centroids c softly, p = softmax(-|z - c|^2 / (2 temperature)): the posterior of a
    mixture of equal spherical Gaussians. |z|^2 is the same for every cluster, so that this is linear in z.
    The temperature makes the median image's own cluster nine times as probable as its next.

    Args:
        z: standardised features, float32 (N, D), N at least `k`.

    Returns:
        weight, float32 (K, D), and bias, float32 (K,), of the logits; inertia (mean squared distance to the
        nearest centroid) and temperature.
    """
    sample, size = z, max(RESTART_IMAGES, k)
    if len(z) > size:
        sample = z[np.sort(np.random.default_rng(seed).choice(len(z), size, replace=False))]
    best: KMeans | None = None
    # scikit-learn adds up its threads' parts in the order they end: one thread alone repeats bit for bit.
    with threadpool_limits(1, user_api="openmp"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct images than clusters
        for restart in range(parameters.restarts):
            run = KMeans(
                k, n_init=1, max_iter=parameters.iterations, random_state=(seed + restart) % 2**32
            ).fit(sample)
            if best is None or run.inertia_ < best.inertia_:
                best = run
            progress.report(restart + 1, parameters.restarts, "restarts", inertia=best.inertia_ / len(sample))
        assert best is not None
        if sample is not z:
            best = KMeans(k, init=best.cluster_centers_, n_init=1, max_iter=parameters.iterations).fit(z)
    centroids = best.cluster_centers_.astype(np.float64)
    bias = -np.square(centroids).sum(1) / 2
    temperature = 1.0
    if k > 1:
        first, second = np.sort(z @ centroids.T.astype(np.float32) + bias, axis=1)[:, :-3:-1].T
        margin = float(np.median(first - second))
        temperature = margin / math.log(9) if margin > 0 else 1.0
    values = {"inertia": float(best.inertia_) / len(z), "temperature": temperature}
    return (centroids / temperature).astype(np.float32), (bias / temperature).astype(np.float32), values
