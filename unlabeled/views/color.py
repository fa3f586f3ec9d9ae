"""Brightness, contrast, saturation, hue, gray and solarisation, with a factor per image."""

import math

import torch
from torch import Tensor

from unlabeled.views.random import chance, uniform

# Luma of ITU-R BT.601, as torchvision and PIL have it.
_LUMA = (0.2989, 0.587, 0.114)


def grayscale(images: Tensor) -> Tensor:
    """Return the luma, float (B, 1, H, W); gray images as they are."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(1)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply each image by its factor (B,) ≥ 0; 1 keeps it."""
    return (images * factors.view(-1, 1, 1, 1)).clamp_(0, 1)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Move each image away from its mean luma by its factor (B,) ≥ 0; 1 keeps it, 0 leaves flat gray."""
    factors = factors.view(-1, 1, 1, 1)
    means = grayscale(images).mean((1, 2, 3), keepdim=True)
    return torch.addcmul((1 - factors) * means, images, factors).clamp_(0, 1)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Move each image away from its gray version by its factor (B,) ≥ 0; 1 keeps it, 0 leaves gray."""
    factors = factors.view(-1, 1, 1, 1)
    return torch.addcmul((1 - factors) * grayscale(images), images, factors).clamp_(0, 1)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the colours of each image around the gray axis by its share (B,) of a full turn; 0 keeps it.

    A rotation of RGB space: 1/3 takes red to green to blue, as in HSV; between, it keeps the mean of the
    channels where HSV keeps their maximum, and costs a 3x3 matrix product.
    """
    if images.shape[1] == 1:
        return images
    angles = turns * (2 * math.pi)
    # The circulant matrix of the rotation by `angles` around (1, 1, 1).
    a, b, c = ((1 + 2 * torch.cos(angles + shift)) / 3 for shift in (0.0, 2 * math.pi / 3, -2 * math.pi / 3))
    matrices = torch.stack((a, b, c, c, a, b, b, c, a), 1).view(-1, 3, 3)
    return (matrices @ images.flatten(2)).view_as(images).clamp_(0, 1)


def solarize(images: Tensor, threshold: float = 0.5) -> Tensor:
    """Invert every value at or above `threshold`."""
    return torch.where(images >= threshold, 1 - images, images)


def random_color(
    images: Tensor,
    brightness_range: float = 0.4,
    contrast_range: float = 0.4,
    saturation_range: float = 0.4,
    hue_range: float = 0.1,
    probability: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Colour jitter: factors uniform in 1 ± range (never below 0), hue in ± range of a turn; in this order.

    Saturation and hue have no meaning for gray images and are left out there. An image is changed with
    `probability`.
    """
    chosen = chance(images, probability, generator)

    def factors(centre: float, spread: float) -> Tensor:
        values = uniform(images, centre - spread, centre + spread, generator)
        return torch.where(chosen, values, torch.full_like(values, centre))

    images = brightness(images, factors(1.0, brightness_range).clamp_(min=0))
    images = contrast(images, factors(1.0, contrast_range).clamp_(min=0))
    if images.shape[1] == 3:
        images = saturation(images, factors(1.0, saturation_range).clamp_(min=0))
        images = hue(images, factors(0.0, hue_range))
    return images


def random_grayscale(
    images: Tensor, probability: float = 0.2, generator: torch.Generator | None = None
) -> Tensor:
    """Take the colour out of an image with `probability`; it keeps its channels."""
    if images.shape[1] == 1:
        return images
    return torch.where(chance(images, probability, generator).view(-1, 1, 1, 1), grayscale(images), images)


def random_solarize(
    images: Tensor, probability: float = 0.2, threshold: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """Solarise an image with `probability` (BYOL, Grill et al. 2020)."""
    return torch.where(
        chance(images, probability, generator).view(-1, 1, 1, 1), solarize(images, threshold), images
    )
