"""CIE Lab: lightness apart from colour, and distances that are near to what an eye sees.

The numbers are those of sRGB (IEC 61966-2-1) under its own white, D65, which is (1, 1, 1) in the XYZ used
here: a gray pixel has a = b = 0 to the last digits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Linear RGB to XYZ, each row divided by its sum (0.95047, 1, 1.08883).
_TO_XYZ = (
    (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
    (0.2126729, 0.7151522, 0.0721749),
    (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
)
_TO_RGB = torch.tensor(_TO_XYZ, dtype=torch.float64).inverse().tolist()
# Below this share of white, lightness is linear (CIE 15): (6/29)³.
_LINEAR_BELOW, _SLOPE, _OFFSET = (6 / 29) ** 3, (29 / 6) ** 2 / 3, 4 / 29


def rgb_to_lab(images: Tensor) -> Tensor:
    """Return L in [0, 100] and a, b in about ±110, float32 (B, 3, H, W), of sRGB images in [0, 1]."""
    images = images.float()
    linear = torch.where(
        images > 0.04045, ((images.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4, images / 12.92
    )
    xyz = _mix(_TO_XYZ, linear)
    roots = torch.where(xyz > _LINEAR_BELOW, xyz.clamp(min=_LINEAR_BELOW) ** (1 / 3), _SLOPE * xyz + _OFFSET)
    x, y, z = roots.unbind(1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), 1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Return sRGB images (B, 3, H, W) in [0, 1] of Lab ones; colours that a screen lacks are cut to it."""
    lightness, a, b = lab.float().unbind(1)
    y = (lightness + 16) / 116
    roots = torch.stack((y + a / 500, y, y - b / 200), 1)
    linear = _mix(_TO_RGB, torch.where(roots > 6 / 29, roots**3, (roots - _OFFSET) / _SLOPE))
    gamma = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, gamma, 12.92 * linear).clamp(0, 1)


def _mix(matrix: Sequence[Sequence[float]], images: Tensor) -> Tensor:
    """Apply a 3x3 matrix to the channels; no matrix product, which autocast would round to bfloat16."""
    red, green, blue = images.unbind(1)
    return torch.stack([r * red + g * green + b * blue for r, g, b in matrix], 1)
