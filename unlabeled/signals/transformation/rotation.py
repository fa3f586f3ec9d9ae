"""Rotation: which of four ways up is the image (Gidaris et al. 2018)."""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from unlabeled import views
from unlabeled.nets.encoder import Encoder
from unlabeled.nets.heads import classifier
from unlabeled.signals.signal import Signal


def four_rotations(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return every image at its four rotations, and how many quarter turns each has made.

    Pixels are only moved, never resampled: an angle between would leave traces that give it away.

    Args:
        images: (B, C, H, H) of any type.

    Returns:
        (4B, C, H, H), the batch once for each rotation, counter-clockwise; and int64 (4B,), 0 to 3.
    """
    turns = torch.arange(4, device=images.device).repeat_interleave(len(images))
    return torch.cat([images.rot90(k, (2, 3)) for k in range(4)]), turns


class Rotation(Signal):
    """RotNet: all four rotations of each image of a batch, four classes."""

    family = "transformation estimation"
    equation = "f(pi(x, theta)) = theta"
    paper = "Gidaris et al. 2018, Unsupervised Representation Learning by Predicting Image Rotations"
    # The nets see four times as many images.
    training_defaults: ClassVar[dict[str, Any]] = {"batch_size": 64}
    picture_rows = ("as it is", "quarter turn", "half turn", "three quarters; inverted frame: told wrong")

    def __init__(
        self,
        encoder: Encoder,
        hidden_dim: Annotated[int, Field(ge=1, description="hidden units of the classifier")] = 256,
        flip: Annotated[
            float, Field(ge=0, le=1, description="probability of mirroring an image before it is turned")
        ] = 0.5,
        crop: Annotated[
            float, Field(gt=0, le=1, description="smallest share of the image in a crop; 1: no crops")
        ] = 1.0,
    ) -> None:
        super().__init__(encoder)
        self.head = classifier(encoder.feature_dim, hidden_dim, 4)
        self.flip, self.crop = flip, crop

    def logits(self, images: Tensor) -> Tensor:
        """Return float (B, 4) of float images (B, C, H, H): the evidence for each number of quarter turns."""
        return self.head(self.encoder(images)).float()

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        originals = views.to_float(images)
        if self.crop < 1:
            originals = views.random_crop(originals, (self.crop, 1.0), flip=self.flip)
        elif self.flip > 0:
            mirrored = views.chance(originals, self.flip).view(-1, 1, 1, 1)
            originals = torch.where(mirrored, originals.flip(3), originals)
        rotated, turns = four_rotations(originals)
        logits = self.logits(rotated)
        return F.cross_entropy(logits, turns), {"accuracy": (logits.argmax(1) == turns).float().mean()}

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return how often the rotation is told right, over all four of each image."""
        rotated, turns = four_rotations(views.to_float(images))
        accuracy = (self.logits(rotated).argmax(1) == turns).float().mean()
        return {"accuracy": accuracy, "chance": torch.tensor(1 / 4)}

    def picture(self, images: Tensor) -> Tensor:
        rotated, turns = four_rotations(views.to_float(images[:8]))
        wrong = self.logits(rotated).argmax(1) != turns
        width = max(1, images.shape[2] // 16)
        frame = torch.ones_like(rotated[0, 0], dtype=torch.bool)
        frame[width:-width, width:-width] = False
        marked = torch.where(frame & wrong.view(-1, 1, 1, 1), 1 - rotated, rotated)
        return marked.unflatten(0, (4, -1))
