"""What all views need: float images, and one random number per image."""

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1]."""
    return images.float().div_(255)


def uniform(images: Tensor, low: float, high: float, generator: torch.Generator | None = None) -> Tensor:
    """Return a float32 number (B,) in [low, high) for each of the images."""
    return torch.rand(len(images), device=images.device, generator=generator).mul_(high - low).add_(low)


def chance(images: Tensor, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """Return a bool (B,) for each of the images, true with the given probability."""
    return torch.rand(len(images), device=images.device, generator=generator) < probability
