"""Patches of images: cut at whole pixels, and freed of what would give away where they come from."""

from functools import cache
from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled.views.random import chance


def cut_patches(images: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Cut square patches out of each image; nothing is resampled.

    Args:
        images: (B, C, H, W) of any type.
        top, left: int64 (B, P), the patches' first rows and columns, 0 to H - size and to W - size.
        size: side of a patch in pixels.

    Returns:
        (B, P, C, size, size).
    """
    offsets = torch.arange(size, device=images.device)
    image = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    rows, columns = top[:, :, None, None] + offsets[:, None], left[:, :, None, None] + offsets
    return images.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 1, 4, 2, 3)


def normalize_patches(patches: Tensor, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> Tensor:
    """Bring every channel of every patch, float (…, C, h, w), to one mean and standard deviation.

    The mean and spread of a patch tell its neighbours from others, and say nothing of what it shows. A flat
    patch has no spread and becomes `mean`.
    """
    centred = patches - patches.mean((-2, -1), keepdim=True)
    spread = centred.square().mean((-2, -1), keepdim=True).sqrt()
    return centred * (std / spread.clamp(min=1e-4)) + mean


def drop_colors(
    patches: Tensor,
    mean: Tensor | float = 0.0,
    std: Tensor | float = 1.0,
    probability: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keep one channel of a patch, drawn for each, and put faint noise in the others' place.

    A lens bends red less than blue, so the shift between channels tells where in the photograph a patch lay
    (Doersch et al. 2015). Gray patches are kept as they are.

    Args:
        patches: float (B, C, h, w), normalised to `mean` and `std`.
        mean, std: of the noise, whose deviation is a hundredth of `std`, as in the paper.
        probability: of a patch to lose two of its channels.
    """
    channels = patches.shape[1]
    if channels == 1:
        return patches
    device = patches.device
    kept = torch.randint(channels, (len(patches), 1), device=device, generator=generator)
    keep = kept == torch.arange(channels, device=device)
    keep |= ~chance(patches, probability, generator).unsqueeze(1)
    noise = torch.randn(patches.shape, device=device, generator=generator) * (0.01 * std) + mean
    return torch.where(keep[:, :, None, None], patches, noise)


def lay_patches(patches: Tensor, size: int) -> Tensor:
    """Lay float patches (B, n², C, h, h) on gray, each in the middle of its cell of n x n: (B, C, size, size)."""
    side, patch = isqrt(patches.shape[1]), patches.shape[-1]
    cell = size // side
    before, after = (cell - patch) // 2, (cell - patch + 1) // 2
    cells = F.pad(patches, (before, after, before, after), value=0.5).unflatten(1, (side, side))
    laid = cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return F.pad(laid, (0, size - side * cell, 0, size - side * cell), value=0.5)


def random_resolution(
    patches: Tensor,
    smallest: float = 0.3,
    probability: float = 1 / 3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Take the detail out of a patch with `probability`: down to a lower resolution and back.

    Args:
        patches: square, float (B, C, h, h).
        smallest: the lowest resolution, a share of h; uniform from there to h - 1 pixels.
    """
    size = patches.shape[-1]
    lowest = min(max(2, round(smallest * size)), size)
    sides = torch.randint(
        lowest, max(lowest + 1, size), (len(patches),), device=patches.device, generator=generator
    )
    sides = torch.where(chance(patches, probability, generator), sides, size)
    # Down and up again is linear and separable: a matrix for each resolution, applied from both sides.
    matrices = _through_lower_resolutions(size).to(patches)[sides - 1].unsqueeze(1)
    return matrices @ patches @ matrices.mT


@cache
def _through_lower_resolutions(size: int) -> Tensor:
    """Return float (size, size, size): matrix i takes a row of pixels through i + 1 pixels."""
    with torch.inference_mode(False):  # what is kept must serve training too
        identity = torch.eye(size).unsqueeze(1)
        through = [
            F.interpolate(F.interpolate(identity, side, mode="area"), size, mode="linear").squeeze(1).T
            for side in range(1, size + 1)
        ]
        return torch.stack(through)
