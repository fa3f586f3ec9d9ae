"""Whether predicted errors are the true ones: coverage (calibration) and order (sparsification)."""

from typing import Literal

import torch
from torch import Tensor


def confidence_levels(errors: Tensor, scales: Tensor, distribution: Literal["laplace", "gaussian"]) -> Tensor:
    """Return how much of each predicted distribution lies nearer to its middle than the truth, in [0, 1].

    Calibrated predictions make these uniform: a tenth of the truths lies within the innermost tenth.

    Args:
        errors: truth minus the predicted middle, float, any shape.
        scales: predicted standard deviations above 0, of the same shape.
    """
    ratio = errors.abs() / scales
    if distribution == "gaussian":
        return torch.erf(ratio / 2**0.5)
    return -torch.expm1(-(2**0.5) * ratio)


def reliability(levels: Tensor, bins: int = 20) -> tuple[Tensor, Tensor]:
    """Return coverages that were predicted, k / bins, and the shares of truths that they held, float (bins,).

    The diagram of the two is the diagonal for calibrated predictions, below it for overconfident ones.

    Args:
        levels: of `confidence_levels`, any shape.
    """
    predicted = torch.arange(1, bins + 1, device=levels.device) / bins
    bin_of_each = (levels.flatten().float() * bins).long().clamp(0, bins - 1)
    held = torch.bincount(bin_of_each, minlength=bins).cumsum(0) / levels.numel()
    return predicted, held


def calibration_error(levels: Tensor, bins: int = 20) -> Tensor:
    """Return the mean distance of `reliability` from the diagonal: 0 is calibrated, 1/2 the worst."""
    predicted, held = reliability(levels, bins)
    return (predicted - held).abs().mean()


def sparsification(errors: Tensor, uncertainties: Tensor, steps: int = 20) -> Tensor:
    """Return the mean error of what is left when the most uncertain 0, 1 / steps, 2 / steps … are taken away.

    Args:
        errors: float (N,) ≥ 0.
        uncertainties: float (N,), in any unit: only their order counts.

    Returns:
        float (steps,), divided by the mean of all errors, so that it starts at 1.
    """
    kept = errors.double()[uncertainties.argsort(stable=True)].cumsum(0)
    counts = (len(errors) * (steps - torch.arange(steps, device=errors.device))).div(steps).ceil().long()
    means = kept[counts - 1] / counts
    return (means / means[0].clamp(min=1e-12)).float()


def sparsification_error(errors: Tensor, uncertainties: Tensor, steps: int = 20) -> tuple[Tensor, Tensor]:
    """Return the area between the sparsification curve and the oracle's (AUSE, Ilg et al. 2018), and chance's.

    The oracle knows the errors; a random order keeps the mean error, a flat curve at 1. An order worse than
    random gives more than chance's area.

    Args:
        errors: float (N,) ≥ 0.
        uncertainties: float (N,).
    """
    oracle = sparsification(errors, errors, steps)
    return (sparsification(errors, uncertainties, steps) - oracle).mean(), (1 - oracle).mean()
