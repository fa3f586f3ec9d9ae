"""Statistics of images: what validation bounds and what drift compares."""

import hashlib
from functools import lru_cache

import numpy as np

CHUNK_VALUES = 1 << 20


def image_statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """Return mean, standard deviation (0 to 1) and entropy (0 to 8 bits) of each image: float64 (N,) each.

    Args:
        images: uint8 (N, C, H, W), N at least 1. The values of all channels of an image count alike.
    """
    flat = images.reshape(len(images), -1)
    length = max(1, CHUNK_VALUES // flat.shape[1])
    chunks = [_histogram_statistics(flat[start : start + length]) for start in range(0, len(flat), length)]
    mean, std, entropy = np.concatenate(chunks, axis=1)
    return {"mean": mean, "std": std, "entropy": entropy}


def _histogram_statistics(flat: np.ndarray) -> np.ndarray:
    count, size = flat.shape
    positions = flat + np.arange(0, 256 * count, 256)[:, None]
    histogram = np.bincount(positions.ravel(), minlength=256 * count).reshape(count, 256)
    # Sums of whole numbers below 2**53: exact, whatever the order of summation.
    first, second = (histogram @ np.stack([np.arange(256.0), np.arange(256.0) ** 2], axis=1)).T
    mean = first / size
    variance = (second * size - first**2) / size**2
    entropy = np.log2(size) - _n_log_n(size)[histogram].sum(axis=1) / size
    return np.stack([mean / 255, np.sqrt(variance) / 255, np.maximum(entropy, 0)])


@lru_cache
def _n_log_n(size: int) -> np.ndarray:
    counts = np.arange(size + 1)
    return counts * np.log2(np.maximum(counts, 1))


def pixel_digests(images: np.ndarray) -> list[str]:
    """Return the sha256 (hex) of the pixels of each image: uint8 (N, C, H, W), in that order of axes."""
    return [hashlib.sha256(image).hexdigest() for image in np.ascontiguousarray(images)]
