"""Holes in images: which pixels are taken away, and the fill that needs no learning."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def grid_blocks(images: Tensor, share: float, block: int = 4) -> Tensor:
    """Return holes, bool (B, 1, H, W): `share` of the squares of a grid of `block` pixels, drawn per image.

    The number of squares is the same for every image, rounded, one at least unless `share` is 0; those at the right
    and lower border may be cut.
    """
    rows, columns = (-(-size // block) for size in images.shape[-2:])
    scores = torch.rand(len(images), rows * columns, device=images.device)
    chosen = scores.argsort(1).argsort(1) < max(share > 0, round(share * rows * columns))
    holes = chosen.view(-1, 1, rows, columns).repeat_interleave(block, 2).repeat_interleave(block, 3)
    return holes[..., : images.shape[2], : images.shape[3]]


def central_square(images: Tensor, share: float) -> Tensor:
    """Return holes, bool (B, 1, H, W): a square of `share` of the area in the middle, the same for all."""
    rows, columns = (_middle(size, share, images.device) for size in images.shape[-2:])
    return (rows.view(-1, 1) & columns).expand(len(images), 1, -1, -1)


def random_blocks(images: Tensor, share: float, count: int = 4) -> Tensor:
    """Return holes, bool (B, 1, H, W): `count` squares at random places, together at most `share` of the area."""
    inside = []
    for size in images.shape[-2:]:
        side = max(1, int(size * math.sqrt(share / count)))
        starts = torch.randint(size - side + 1, (len(images), count, 1), device=images.device)
        offsets = torch.arange(size, device=images.device) - starts
        inside.append((offsets >= 0) & (offsets < side))
    rows, columns = inside
    return (rows.unsqueeze(3) & columns.unsqueeze(2)).any(1, keepdim=True)


def random_regions(images: Tensor, share: float, cells: int = 8) -> Tensor:
    """Return holes, bool (B, 1, H, W), of any shape: `share` of the area of each image.

    Noise of `cells` x `cells` values, upsampled bicubically; its lowest values are the hole (the authors' code
    of Pathak et al. 2016).
    """
    noise = torch.rand(len(images), 1, cells, cells, device=images.device)
    smooth = F.interpolate(noise, images.shape[-2:], mode="bicubic", align_corners=False).flatten(1)
    threshold = smooth.kthvalue(max(1, round(share * smooth.shape[1])), 1, keepdim=True).values
    return (smooth <= threshold).view(-1, 1, *images.shape[-2:])


def diffusion_fill(images: Tensor, holes: Tensor) -> Tensor:
    """Fill holes with the smoothest continuation of their borders: the solution of Laplace's equation.

    By conjugate gradients, until the residual has fallen a thousandfold, in at most a step for each pixel of a
    side: enough for holes of half of it.

    Args:
        images: float (B, C, H, W); what they hold inside the holes does not matter.
        holes: bool (B, 1, H, W).
    """
    across_rows, across_columns = (_second_differences(size, images) for size in images.shape[-2:])

    def laplacian(values: Tensor) -> Tensor:
        return (across_rows @ values + values @ across_columns) * holes

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((2, 3), keepdim=True)

    filled = images * ~holes
    residual = direction = -laplacian(filled)
    length = dot(residual, residual)
    enough = 1e-6 * length
    for _ in range(max(images.shape[-2:])):
        change = laplacian(direction)
        step = length / dot(direction, change).clamp(min=1e-12)
        filled = torch.addcmul(filled, step, direction)
        residual = torch.addcmul(residual, step, change, value=-1)
        previous, length = length, dot(residual, residual)
        if (length <= enough).all():
            break
        direction = torch.addcmul(residual, length / previous.clamp(min=1e-12), direction)
    return filled


def _second_differences(size: int, like: Tensor) -> Tensor:
    """Return (size, size): each value less its neighbours; at the ends it has one, so nothing flows out."""
    beside = torch.diag(like.new_ones(size - 1), 1)
    beside = beside + beside.T
    return torch.diag(beside.sum(1)) - beside


def _middle(size: int, share: float, device: torch.device) -> Tensor:
    side = max(1, round(size * math.sqrt(share)))
    positions = torch.arange(size, device=device) - (size - side) // 2
    return (positions >= 0) & (positions < side)
