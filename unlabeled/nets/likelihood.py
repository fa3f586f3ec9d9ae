"""Likelihoods of 8-bit images: the mass that a density gives to each of the 256 levels."""

import torch
from torch import Tensor
from torch.nn import functional as F

HALF_BIN = 1 / 510


def discretized_logistic(images: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return log P(level) of each pixel under a logistic density (Salimans et al. 2017).

    The levels' masses sum to one: the bins of 0 and 255 are open, so what lies outside [0, 1] is theirs.

    Args:
        images: float in [0, 1], multiples of 1/255.
        mean, log_scale: of the same shape, or broadcast to it; in units of the images.
    """
    scale = log_scale.exp()
    below = F.logsigmoid((images - mean + HALF_BIN) / scale)
    above = F.logsigmoid((mean - images + HALF_BIN) / scale)
    # σ(b) − σ(a) = σ(b) σ(−a) (1 − exp(a − b)): exact far out in the tails too.
    inside = (-torch.expm1(-2 * HALF_BIN / scale)).log() + below + above
    return torch.where(images <= 0, below, torch.where(images >= 1, above, inside))


def discretized_gaussian(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return log P(level) of each pixel under a Gaussian density; arguments as `discretized_logistic`'s."""
    distance = images - mean
    below = torch.special.log_ndtr((HALF_BIN + distance) / std)
    above = torch.special.log_ndtr((HALF_BIN - distance) / std)
    # The bin is mirrored to the lower tail, where the logarithm of Φ keeps its precision.
    upper = torch.special.log_ndtr((HALF_BIN - distance.abs()) / std)
    lower = torch.special.log_ndtr((-HALF_BIN - distance.abs()) / std)
    inside = upper + (-torch.expm1(lower - upper)).log()
    return torch.where(images <= 0, below, torch.where(images >= 1, above, inside))
