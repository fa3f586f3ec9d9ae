"""The U-Net of a diffusion model, whose contracting path is the encoder that is trained."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.nets.encoder import Encoder
from unlabeled.nets.pointwise import Pointwise


def time_embedding(share: Tensor, dim: int) -> Tensor:
    """Return sinusoids, float (B, dim), of times (B,) in [0, 1], as of positions up to 1000."""
    frequencies = torch.logspace(0, -4, dim // 2, device=share.device)
    angles = 1000 * share.unsqueeze(1) * frequencies
    return torch.cat((angles.sin(), angles.cos()), 1)


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group norm of eight groups, or fewer where the channels do not divide."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


class Block(nn.Module):
    """A residual block that the time scales and shifts in its middle; it starts as its shortcut."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, 1, 1)
        self.modulation = nn.Linear(embedding, 2 * channels_out)
        self.norm2 = group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1)
        self.shortcut = Pointwise(channels_in, channels_out)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(time)[..., None, None].chunk(2, 1)
        return self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift)) + self.shortcut(x)


class UNet(nn.Module):
    """Noised images (B, C, H, W) in about [-1, 1] and times (B,) in [0, 1] to the noise in them.

    The encoder sees the whole image and gives the bottleneck. Beside it runs a light path, at half the size
    with two by two pixels in the channels (no value is lost) and at a quarter, that skips to the decoding
    blocks what the bottleneck cannot hold. Any size from 2 x 2 goes. The output is zero at first.

    Args:
        channels: C.
        map_channels: channels of the encoder's last map.
        width: channels at half the size; twice as many at a quarter.
    """

    def __init__(self, channels: int, map_channels: int, width: int) -> None:
        super().__init__()
        self.frequencies, embedding = width, 4 * width
        self.time = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.stem = nn.Conv2d(4 * channels, width, 3, 1, 1)
        self.light_half = Block(width, width, embedding)
        self.light_quarter = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.bottleneck = Block(map_channels, 2 * width, embedding)
        self.up_quarter = Block(4 * width, 2 * width, embedding)
        self.up_half = Block(3 * width, width, embedding)
        self.norm = group_norm(width)
        self.out = nn.Conv2d(width, 4 * channels, 3, 1, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.get_parameter("bias"))

    def forward(self, noised: Tensor, time: Tensor, encoder: Encoder) -> Tensor:
        rows, columns = noised.shape[-2:]
        embedding = F.silu(self.time(time_embedding(time, self.frequencies)))
        even = F.pad(noised, (0, columns % 2, 0, rows % 2))
        half = self.light_half(self.stem(F.pixel_unshuffle(even, 2)), embedding)
        quarter = self.light_quarter(half)
        y = self.bottleneck(encoder.feature_map((noised + 1) / 2), embedding)
        y = self.up_quarter(torch.cat((F.interpolate(y, quarter.shape[-2:]), quarter), 1), embedding)
        y = self.up_half(torch.cat((F.interpolate(y, half.shape[-2:]), half), 1), embedding)
        return F.pixel_shuffle(self.out(F.silu(self.norm(y))), 2)[..., :rows, :columns]
