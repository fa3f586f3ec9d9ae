"""Crop, flip and rotation, as one resampling."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled.views.random import chance, uniform


def resample(
    images: Tensor,
    boxes: Tensor,
    flips: Tensor | None = None,
    angles: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Cut a box out of each image, flip it, turn it and bring it to one size: one bilinear interpolation.

    What a turned box sees beside itself are the image's own pixels; beyond the image its border is repeated.
    No anti-aliasing: meant for boxes that are not much larger than `size`.

    Args:
        images: float (B, C, H, W).
        boxes: float (B, 4), top, left, height and width in pixels, fractions allowed.
        flips: bool (B,), mirror left and right; None: no image.
        angles: float (B,), degrees counter-clockwise; None: no rotation.
        size: height and width of the result; None: those of the images.

    Returns:
        float (B, C, *size).
    """
    height, width = images.shape[-2:]
    rows, columns = size or (height, width)
    # Positions in the box, from -1/2 to 1/2 between the outer edges of its outer pixels, and a 1 for the
    # shift.
    y, x = torch.meshgrid(_centres(rows, images.device), _centres(columns, images.device), indexing="ij")
    positions = torch.stack((x, y, torch.ones_like(x))).view(3, -1)
    top, left, box_height, box_width = boxes.unbind(1)
    mirror = 1.0 if flips is None else torch.where(flips, -1.0, 1.0)
    turns = torch.zeros_like(top) if angles is None else torch.deg2rad(angles)
    # A turn is taken in pixels of the result, so that it keeps shapes where that is not square.
    cosine, sine, ratio = turns.cos(), turns.sin(), columns / rows
    across, down = box_width * mirror * (2 / width), box_height * (2 / height)
    # To grid_sample's coordinates: -1 to 1 between the outer edges of the image.
    shift_x, shift_y = (left + box_width / 2) * (2 / width) - 1, (top + box_height / 2) * (2 / height) - 1
    matrices = torch.stack(
        (across * cosine, -across * sine / ratio, shift_x, down * sine * ratio, down * cosine, shift_y), 1
    )
    grid = (matrices.view(-1, 3) @ positions).view(-1, 2, rows, columns).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _centres(pixels: int, device: torch.device) -> Tensor:
    return (torch.arange(pixels, device=device) + 0.5) / pixels - 0.5


def random_crop(
    images: Tensor,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    degrees: float = 0.0,
    size: tuple[int, int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random resized crop (Szegedy et al. 2015), mirrored with probability `flip`, turned by ±`degrees`.

    Area (a share of the image) is uniform, aspect (width / height) log-uniform; a side longer than the
    image is cut to it, where torchvision draws again. Where aspect and area are 1, no flip and no turn, the
    image is kept. The crops have `size` (height, width), by default that of the images.
    """
    height, width = images.shape[-2:]
    areas = uniform(images, *area, generator) * (height * width)
    aspects = uniform(images, math.log(aspect[0]), math.log(aspect[1]), generator).exp_()
    box_height = (areas / aspects).sqrt_().clamp_(max=height)
    box_width = (areas * aspects).sqrt_().clamp_(max=width)
    top = uniform(images, 0, 1, generator) * (height - box_height)
    left = uniform(images, 0, 1, generator) * (width - box_width)
    flips = chance(images, flip, generator) if flip > 0 else None
    angles = uniform(images, -degrees, degrees, generator) if degrees > 0 else None
    return resample(images, torch.stack((top, left, box_height, box_width), 1), flips, angles, size)
