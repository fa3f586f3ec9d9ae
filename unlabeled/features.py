"""Frozen features: what an encoder makes of the images of a table."""

from typing import Any

import numpy as np
import torch
from torch import nn

from unlabeled import progress
from unlabeled.data.table import ImageTable
from unlabeled.errors import InputError
from unlabeled.nets.encoder import Encoder
from unlabeled.views import to_float

CALIBRATION_IMAGES = 4_000
# Of all images that are embedded together: `pixel_cnn` holds some 3 KB for each of their pixels, 1.5 GB in all.
PIXELS_AT_ONCE = 500 * 32**2


def accelerator() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_images(table: ImageTable, indices: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return images as float32 (B, C, H, W) in [0, 1] on `device`, in channels-last memory: 1.4 x faster."""
    return to_float(torch.from_numpy(table.images(indices)).to(device)).contiguous(
        memory_format=torch.channels_last
    )


def images_at_once(table: ImageTable) -> int:
    """Return how many images of a table to embed together: 500, fewer where they are larger than 32 x 32 px."""
    _, height, width = table.image_shape
    return max(1, min(500, PIXELS_AT_ONCE // (height * width)))


def extract(
    encoder: Encoder, table: ImageTable, indices: np.ndarray, batch_size: int | None = None
) -> np.ndarray:
    """Return the features of the images at `indices`: float32 (N, D), one whole image each, no augmentation.

    Runs in eval mode on the device the encoder lies on; its weights and its mode stay as they were. Images
    are read batch by batch, so only the features are held in memory.

    Args:
        batch_size: None: `images_at_once`.

    Raises:
        InputError: a feature is not finite.
    """
    device = next(encoder.parameters()).device
    batch_size = batch_size or images_at_once(table)
    features = np.empty((len(indices), encoder.feature_dim), np.float32)
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(indices), batch_size):
                batch = load_images(table, indices[start : start + batch_size], device)
                features[start : start + len(batch)] = encoder(batch).cpu().numpy()
                progress.report(start + len(batch), len(indices), "images")
    finally:
        encoder.train(was_training)
    if not np.isfinite(features).all():
        raise InputError(
            "the encoder's features are not finite: its training diverged; lower training.learning_rate"
        )
    return features


def random_encoder(
    settings: dict[str, Any], table: ImageTable, indices: np.ndarray, seed: int, device: torch.device
) -> Encoder:
    """Return an encoder at random init with measured batch-norm statistics, in eval mode: the baseline.

    A fresh batch norm believes in mean 0 and variance 1, which no layer inside the net has. Measuring them
    trains nothing and makes the baseline stronger (Fashion-MNIST: kNN 0.825 instead of 0.807), so it is the
    honest one.

    Args:
        settings: `Encoder.settings`.
        indices: train images; 4,000 to 8,000 of them, evenly spread, are looked at.
        seed: of the weights; the global random state is left alone.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = Encoder(**settings).to(device)
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return encoder.eval()
    for norm in norms:
        norm.momentum = None  # a plain average over the batches
    chosen = indices[:: max(1, len(indices) // CALIBRATION_IMAGES)]
    encoder.train()
    with torch.no_grad():
        for batch in np.array_split(chosen, max(1, len(chosen) // 500)):
            encoder(load_images(table, batch, device))
    return encoder.eval()


class Standardisation:
    """Zero mean and unit variance per feature, by the statistics of the train features (N, D).

    A feature that is constant up to float32's precision keeps scale 1, so it becomes 0 instead of noise.

    Attributes:
        mean, scale: float32 (D,).
    """

    def __init__(self, features: np.ndarray) -> None:
        mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
        constant = scale <= 1e-5 * np.abs(mean) + 1e-10
        self.mean = mean.astype(np.float32)
        self.scale = np.where(constant, 1.0, scale).astype(np.float32)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return standardised features, float32 (N, D)."""
        return (features - self.mean) / self.scale
