"""Gaussian blur as two matrix products: it is separable, `A_y · X · A_xᵀ`, and every image has its own A."""

import torch
from torch import Tensor

from unlabeled.views.random import chance, uniform


def gaussian_blur(images: Tensor, sigmas: Tensor, radius: int) -> Tensor:
    """Blur each image with its own Gaussian, reflecting at the borders.

    Args:
        images: float (B, C, H, W).
        sigmas: float (B,), standard deviations in pixels; 0 keeps the image.
        radius: the kernel has 2 · radius + 1 taps; less than H and W.
    """
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    # Relative to the centre tap, which is 1 whatever sigma is: sigma 0 gives the identity, not 0/0.
    weights = torch.exp(-0.5 * (offsets / sigmas.clamp(min=1e-3).unsqueeze(1)) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    channels, height, width = images.shape[1:]
    across_columns = _matrices(weights, width)
    across_rows = across_columns if height == width else _matrices(weights, height)
    # The channels are stacked, so that an image's matrix is not copied for each of them.
    blurred = (images.reshape(-1, channels * height, width) @ across_columns.mT).view_as(images)
    blurred = blurred.mT.reshape(-1, channels * width, height) @ across_rows.mT
    return blurred.view(-1, channels, width, height).mT


def _matrices(weights: Tensor, size: int) -> Tensor:
    """Return (B, size, size): row i holds the taps of pixel i at the pixels they fall on."""
    taps = weights.shape[1]
    positions = torch.arange(size, device=weights.device).view(-1, 1)
    positions = (positions + torch.arange(taps, device=weights.device) - taps // 2).abs()
    positions = torch.where(positions >= size, 2 * (size - 1) - positions, positions)
    landing = torch.nn.functional.one_hot(positions, size).to(weights).transpose(0, 1)
    return (weights @ landing.reshape(taps, -1)).view(-1, size, size)


def random_blur(
    images: Tensor,
    sigma: tuple[float, float] = (0.1, 2.0),
    probability: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Blur an image with `probability`, sigma uniform in a range of pixels; the kernel reaches to 2 sigma."""
    radius = min(max(1, round(2 * sigma[1])), min(images.shape[-2:]) - 1)
    sigmas = uniform(images, *sigma, generator)
    sigmas = torch.where(chance(images, probability, generator), sigmas, torch.zeros_like(sigmas))
    return gaussian_blur(images, sigmas, radius)
