"""Smooth warps of square images whose map of points is known in both directions, exactly.

Points are (x, y) in `grid_sample`'s coordinates of `align_corners=False`: -1 to 1 between the outer edges of
the image. There a map of any stride lies on its image without an offset: the centre of its cell i of n is
(2 i + 1) / n - 1, in pixels s · i + (s - 1) / 2 with s = H / n.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled.views.random import uniform


@dataclass(frozen=True)
class Warp:
    """A map g of the plane for each of B images: a wave along x, a wave along y, then an affine map.

    Each wave moves points along one axis by an amount that depends on the other alone, so that it can be
    taken back in closed form, however strong it is.

    Attributes:
        matrices: float (B, 2, 2), the affine map's.
        shifts: float (B, 2), the affine map's, of x and y.
        waves: float (B, 2, 3), along x and along y: amplitude, angular frequency, phase in radians.
    """

    matrices: Tensor
    shifts: Tensor
    waves: Tensor

    def forward(self, points: Tensor) -> Tensor:
        """Return g(points): where what lies at the points (B, N, 2) of an image lies in the warped image."""
        x, y = points.unbind(-1)
        x = x + self._wave(0, y)
        y = y + self._wave(1, x)
        return torch.stack((x, y), -1) @ self.matrices.mT + self.shifts.unsqueeze(1)

    def inverse(self, points: Tensor) -> Tensor:
        """Return where what lies at the points (B, N, 2) of the warped image came from."""
        x, y = ((points - self.shifts.unsqueeze(1)) @ torch.linalg.inv(self.matrices).mT).unbind(-1)
        y = y - self._wave(1, x)
        x = x - self._wave(0, y)
        return torch.stack((x, y), -1)

    def apply(self, maps: Tensor) -> Tensor:
        """Warp images, or feature maps of images, float (B, C, h, w): the result at g(u) is the map at u.

        Bilinear; what came from beyond the border is the border repeated.
        """
        sources = self.inverse(cell_centres(maps).expand(len(maps), -1, -1))
        grid = sources.view(len(maps), *maps.shape[-2:], 2).to(maps.dtype)
        return F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def weights(self, maps: Tensor) -> Tensor:
        """Return float (B, h · w, h · w), whose product with the cells of maps (…, h, w) warps them.

        Row u holds the share of each cell in the result at u, as `apply` takes it. For small maps of many
        channels: one product of matrices is faster than looking up every channel by itself.
        """
        height, width = maps.shape[-2:]
        cells = cell_centres(maps)
        sources = self.inverse(cells.expand(len(self.shifts), -1, -1)).clamp(cells.amin(0), cells.amax(0))
        distances = (
            (sources.unsqueeze(2) - cells).abs() * torch.tensor((width, height), device=maps.device) / 2
        )
        return (1 - distances).clamp(min=0).prod(-1)

    def _wave(self, axis: int, along: Tensor) -> Tensor:
        amplitude, frequency, phase = self.waves[:, axis].unsqueeze(-1).unbind(1)
        return amplitude * torch.sin(frequency * along + phase)


def cell_centres(maps: Tensor) -> Tensor:
    """Return the points (h · w, 2), x and y, at the centres of the cells of maps (…, h, w), row by row."""
    height, width = maps.shape[-2:]
    y, x = ((2 * torch.arange(cells, device=maps.device) + 1) / cells - 1 for cells in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(-1, 2)


def in_frame(points: Tensor) -> Tensor:
    """Return bool (…), which of the points (…, 2) lie in the image."""
    return (points.abs() <= 1).all(-1)


def random_warp(
    images: Tensor,
    degrees: float = 15.0,
    scale: float = 0.1,
    shift: float = 0.1,
    wave: float = 0.05,
    generator: torch.Generator | None = None,
) -> Warp:
    """Draw a warp for each of the square images (B, C, H, H); zeros give the identity.

    Args:
        degrees: the largest turn.
        scale: the largest relative change of size.
        shift: the largest shift, a share of the image's side.
        wave: the largest amplitude of the waves, a share of the side; a quarter to three quarters of a
            period span it.
    """

    def draw(low: float, high: float) -> Tensor:
        return uniform(images, low, high, generator)

    angles, scales = torch.deg2rad(draw(-degrees, degrees)), draw(1 - scale, 1 + scale)
    cosine, sine = scales * angles.cos(), scales * angles.sin()
    matrices = torch.stack((cosine, -sine, sine, cosine), 1).view(-1, 2, 2)
    # A side is 2 long.
    shifts = torch.stack((draw(-2 * shift, 2 * shift), draw(-2 * shift, 2 * shift)), 1)
    quarter = torch.pi / 4
    waves = [
        torch.stack((draw(-2 * wave, 2 * wave), draw(quarter, 3 * quarter), draw(0, 2 * torch.pi)), 1)
        for _ in range(2)
    ]
    return Warp(matrices, shifts, torch.stack(waves, 1))
