"""Likelihoods of images of so many levels: the mass that a density gives to each of them."""

import torch
from torch import Tensor
from torch.nn import functional as F


def discretized_logistic(images: Tensor, mean: Tensor, log_scale: Tensor, levels: int = 256) -> Tensor:
    """Return log P(level) of each pixel under a logistic density (Salimans et al. 2017).

    The levels' masses sum to one: the bins of 0 and 1 are open, so what lies outside [0, 1] is theirs.

    Args:
        images: float in [0, 1], multiples of 1/(levels - 1).
        mean, log_scale: of the same shape, or broadcast to it; in units of the images.
    """
    half_bin = 0.5 / (levels - 1)
    inverse = (-log_scale).exp()
    distance = images - mean
    below = F.logsigmoid((distance + half_bin) * inverse)
    above = F.logsigmoid((half_bin - distance) * inverse)
    # σ(b) − σ(a) = σ(b) σ(−a) (1 − exp(a − b)): exact far out in the tails too.
    inside = (-torch.expm1(-2 * half_bin * inverse)).log() + below + above
    return torch.where(images <= 0, below, torch.where(images >= 1, above, inside))


def discretized_gaussian(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return log P(level) of each of 256 levels under a Gaussian density; arguments as `discretized_logistic`'s."""
    half_bin = 1 / 510
    distance = images - mean
    below = torch.special.log_ndtr((half_bin + distance) / std)
    above = torch.special.log_ndtr((half_bin - distance) / std)
    # The bin is mirrored to the lower tail, where the logarithm of Φ keeps its precision.
    upper = torch.special.log_ndtr((half_bin - distance.abs()) / std)
    lower = torch.special.log_ndtr((-half_bin - distance.abs()) / std)
    inside = upper + (-torch.expm1(lower - upper)).log()
    return torch.where(images <= 0, below, torch.where(images >= 1, above, inside))
