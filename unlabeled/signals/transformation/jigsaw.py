"""Jigsaw: in which order have an image's tiles been shuffled (Noroozi & Favaro 2016)."""

from functools import cache
from itertools import chain
from itertools import permutations as orders
from math import factorial
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled import views
from unlabeled.nets.encoder import Encoder
from unlabeled.nets.heads import classifier
from unlabeled.signals.signal import Signal


@cache
def permutation_set(tiles: int, count: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Return `count` orders of the tiles that are far apart, greedily chosen among all.

    Each next one is the farthest from its nearest among those chosen, by Hamming distance; ties are broken
    by the mean distance, then by chance. The minimum is what counts: any random set has the largest mean.

    Args:
        tiles: 4 or 9.
        count: at most tiles!.
        seed: of the first one and of the ties; the same seed gives the same set.
    """
    every = np.fromiter(chain.from_iterable(orders(range(tiles))), np.int8).reshape(-1, tiles)
    every = np.ascontiguousarray(every[np.random.default_rng(seed).permutation(len(every))].T)
    nearest, total = np.full(every.shape[1], tiles, np.int8), np.zeros(every.shape[1], np.int32)
    chosen = [0]
    while len(chosen) < count:
        distance = (every != every[:, chosen[-1:]]).sum(0, dtype=np.int8)
        nearest, total = np.minimum(nearest, distance), total + distance
        farthest = np.flatnonzero(nearest == nearest.max())
        chosen.append(int(farthest[total[farthest].argmax()]))
    return tuple(map(tuple, every[:, chosen].T.tolist()))


def shuffle_tiles(tiles: Tensor, permutations: Tensor) -> Tensor:
    """Put tile `permutations[b, slot]` into each slot: (B, T, …) by int64 (B, T); its argsort undoes it."""
    return tiles[torch.arange(len(tiles), device=tiles.device).unsqueeze(1), permutations]


class Jigsaw(Signal):
    """The context-free network: one tower for every tile, and a head that sees all of them at once."""

    family = "transformation estimation"
    equation = "f(pi(x, theta)) = theta"
    paper = "Noroozi & Favaro 2016, Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles"
    picture_rows = ("image", "tiles, shuffled", "put back as predicted")
    permutations: Tensor

    def __init__(
        self,
        encoder: Encoder,
        grid: Annotated[
            Literal[0, 2, 3], Field(description="tiles along a side; 0: 3 from 24 pixels on, below it 2")
        ] = 0,
        permutations: Annotated[
            int, Field(ge=2, le=1000, description="orders to tell apart; a grid of 2 has 24 at most")
        ] = 24,
        gap: Annotated[
            float, Field(ge=0, le=0.5, description="share of a cell's side that its tile leaves free")
        ] = 0.25,
        normalize: Annotated[bool, Field(description="bring tiles to one mean and spread")] = True,
        color_drop: Annotated[
            float, Field(ge=0, le=1, description="probability of a tile with one channel; colour images")
        ] = 1.0,
        zoom: Annotated[
            float, Field(gt=0, le=1, description="side that tiles are brought to, share of the image's")
        ] = 0.5,
        tile_dim: Annotated[int, Field(ge=1, description="numbers that the head sees of each tile")] = 128,
        hidden_dim: Annotated[int, Field(ge=1, description="hidden units of the head")] = 512,
    ) -> None:
        super().__init__(encoder)
        size = encoder.image_shape[1]
        self.grid = grid or (3 if size >= 24 else 2)
        count = min(permutations, factorial(self.grid**2))
        self.register_buffer("permutations", torch.tensor(permutation_set(self.grid**2, count)))
        self.cell = size // self.grid
        self.tile = max(1, int(self.cell * (1 - gap)))
        self.zoomed = max(self.tile, round(zoom * size))
        self.normalize, self.color_drop = normalize, color_drop
        self.tile_features = nn.Linear(encoder.feature_dim, tile_dim)
        self.head = classifier(self.grid**2 * tile_dim, hidden_dim, count)

    def cut(self, images: Tensor) -> Tensor:
        """Return the tiles (B, T, C, t, t) of images (B, C, H, H), row by row, each somewhere in its cell."""
        corners = torch.arange(self.grid, device=images.device) * self.cell
        top, left = corners.repeat_interleave(self.grid), corners.repeat(self.grid)
        free = self.cell - self.tile + 1
        down, right = torch.randint(free, (2, len(images), self.grid**2), device=images.device)
        return views.cut_patches(images, top + down, left + right, self.tile)

    def tower_input(self, tiles: Tensor) -> Tensor:
        """Return what the encoder sees of float tiles (B, T, C, t, t): (B · T, C, zoomed, zoomed)."""
        tiles = F.interpolate(tiles.flatten(0, 1), self.zoomed, mode="bilinear")
        if self.normalize:
            tiles = views.normalize_patches(tiles, self.encoder.mean, self.encoder.std)
        if self.color_drop > 0:
            tiles = views.drop_colors(tiles, self.encoder.mean, self.encoder.std, self.color_drop)
        return tiles

    def logits(self, tiles: Tensor) -> Tensor:
        """Return float (B, N) of float tiles (B, T, C, t, t): the evidence for each permutation."""
        features = self.tile_features(self.encoder(self.tower_input(tiles)))
        return self.head(F.relu(features).view(len(tiles), -1)).float()

    def puzzle(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shuffled float tiles of uint8 images, and the number of each one's permutation."""
        numbers = torch.randint(len(self.permutations), (len(images),), device=images.device)
        tiles = self.cut(views.to_float(images))
        return shuffle_tiles(tiles, self.permutations[numbers]), numbers

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        tiles, numbers = self.puzzle(images)
        logits = self.logits(tiles)
        return F.cross_entropy(logits, numbers), {"accuracy": (logits.argmax(1) == numbers).float().mean()}

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return how often the permutation is told right, one puzzle for each image."""
        return {
            "accuracy": self.loss(images)[1]["accuracy"],
            "chance": torch.tensor(1 / len(self.permutations)),
        }

    def picture(self, images: Tensor) -> Tensor:
        images = images[:8]
        tiles, _ = self.puzzle(images)
        told = self.permutations[self.logits(tiles).argmax(1)]
        size = images.shape[2]
        restored = views.lay_patches(shuffle_tiles(tiles, told.argsort(1)), size)
        return torch.stack((views.to_float(images), views.lay_patches(tiles, size), restored))
