"""Features without a learned network: what every method must beat."""

import numpy as np
import torch
from sklearn.decomposition import PCA

from unlabeled.data.table import ImageTable
from unlabeled.nets.encoder import average_pool
from unlabeled.views import to_float

LARGEST_SIDE = 32


def pixels(table: ImageTable, indices: np.ndarray, batch_size: int = 1000) -> np.ndarray:
    """Return raw pixels as features: float32 (N, C*H*W) in [0, 1].

    Images of more than 32 pixels a side are averaged to 32 x 32 first.
    """
    channels, height, width = table.image_shape
    large = max(height, width) > LARGEST_SIDE
    size = LARGEST_SIDE * LARGEST_SIDE if large else height * width
    features = np.empty((len(indices), channels * size), np.float32)
    for start in range(0, len(indices), batch_size):
        images = to_float(torch.from_numpy(table.images(indices[start : start + batch_size])))
        images = average_pool(images, LARGEST_SIDE) if large else images
        features[start : start + len(images)] = images.flatten(1).numpy()
    return features


def principal_components(train: np.ndarray, *others: np.ndarray, dimensions: int = 128) -> list[np.ndarray]:
    """Return features (N, D) on the first principal components of `train`, float32; `train` comes first."""
    dimensions = min(dimensions, *train.shape)
    pca = PCA(dimensions, svd_solver="covariance_eigh").fit(train)
    return [pca.transform(features) for features in (train, *others)]
