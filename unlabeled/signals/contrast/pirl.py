"""PIRL: an image and its jigsawed version match the same memory of it (Misra & van der Maaten 2020)."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled import views
from unlabeled.measures.matching import match_accuracy
from unlabeled.nets.encoder import Encoder
from unlabeled.nets.heads import projector
from unlabeled.nets.memory import memory_nce
from unlabeled.signals.contrast import instdisc
from unlabeled.signals.contrast.instdisc import InstDisc


def shuffled_tiles(images: Tensor, grid: int, gap: float) -> Tensor:
    """Cut images (B, C, H, H) into a grid, a tile at a random place in each cell, and shuffle the tiles.

    Args:
        grid: cells in a row and in a column; H at the most.
        gap: share of a cell's side that its tile leaves free, so that no edge runs on in the next tile.

    Returns:
        (B, grid², C, t, t).
    """
    cell = images.shape[-1] // grid
    tile = max(1, int(cell * (1 - gap)))
    order = torch.rand(len(images), grid * grid, device=images.device).argsort(1)
    down, right = torch.randint(cell - tile + 1, (2, *order.shape), device=images.device)
    return views.cut_patches(images, order // grid * cell + down, order % grid * cell + right, tile)


class PIRL(InstDisc):
    """PIRL on jigsaws: instance discrimination of images and, with the same memory, of their shuffled tiles."""

    paper = "Misra & van der Maaten 2020, Self-Supervised Learning of Pretext-Invariant Representations"
    equation = "f(pi(x)) = f(x), f(x1) <-> f(x2)"
    picture_rows = ("image", "jigsaw", "jigsaw", "nearest", "second nearest", "third nearest")

    def __init__(
        self,
        encoder: Encoder,
        weight: Annotated[
            float, Field(gt=0, lt=1, description="of the jigsaws' loss; the images' has the rest")
        ] = 0.5,
        grid: Annotated[int, Field(ge=2, le=4, description="tiles in a row and in a column")] = 2,
        gap: Annotated[
            float, Field(ge=0, le=0.5, description="share of a cell's side that its tile leaves free")
        ] = 0.15,
        temperature: instdisc.Temperature = 0.07,
        hidden_dim: instdisc.HiddenDim = 512,
        projection_dim: instdisc.ProjectionDim = 128,
        negatives: instdisc.Negatives = 2048,
        momentum: instdisc.Momentum = 0.5,
        crop: instdisc.Crop = 0.4,
        jitter: instdisc.Jitter = 0.5,
    ) -> None:
        super().__init__(encoder, temperature, hidden_dim, projection_dim, negatives, momentum, crop, jitter)
        self.tile_projector = nn.Linear(encoder.feature_dim, projection_dim)
        self.jigsaw_projector = projector(grid * grid * projection_dim, hidden_dim, projection_dim)
        self.weight, self.grid, self.gap = weight, grid, gap

    def jigsaw(self, images: Tensor) -> Tensor:
        """Return the shuffled tiles (B, grid², C, t, t) of a random view of each of the uint8 images."""
        return shuffled_tiles(self.view(images), self.grid, self.gap)

    def embed_jigsaw(self, images: Tensor) -> Tensor:
        """Return embeddings (B, projection_dim) of jigsaws; each tile is encoded alone, at half the image's side."""
        tiles = self.jigsaw(images).flatten(0, 1)
        tiles = F.interpolate(tiles, -(-images.shape[-1] // 2), mode="bilinear")
        features = self.tile_projector(self.encoder(tiles))
        return self.jigsaw_projector(features.view(len(images), -1))

    def forward(self, images: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        own = self.memory.recall(indices, lambda: self.embed(images))
        jigsaw, image = self.embed_jigsaw(images), self.embed(images)
        others, same = self.memory.negatives(indices, own, self.negatives)
        jigsaw_loss, jigsaw_accuracy = memory_nce(jigsaw, own, others, same, self.temperature)
        image_loss, image_accuracy = memory_nce(image, own, others, same, self.temperature)
        self.memory.remember(indices, image)
        loss = self.weight * jigsaw_loss + (1 - self.weight) * image_loss
        return loss, {"jigsaw_accuracy": jigsaw_accuracy, "image_accuracy": image_accuracy}

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return how often a jigsaw finds, among views of all images, the one of its own image."""
        accuracy = match_accuracy(self.embed_jigsaw(images), self.embed(images))
        return {"accuracy": accuracy, "chance": torch.tensor(1 / len(images))}

    def picture(self, images: Tensor) -> Tensor:
        shown = images[:8]
        jigsaws = [views.lay_patches(self.jigsaw(shown), images.shape[2]) for _ in range(2)]
        return torch.cat((torch.stack([views.to_float(shown), *jigsaws]), self.near(images)))
