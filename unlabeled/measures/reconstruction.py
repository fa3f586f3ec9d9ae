"""How near a reconstruction comes."""

from torch import Tensor


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, the mean over the images; at most 100 for equal ones.

    Args:
        images, originals: float (B, ...) in [0, 1], so that the data range is 1.
    """
    error = (images - originals).float().square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10().mean()
