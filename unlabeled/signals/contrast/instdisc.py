"""Instance discrimination: every image is a class of its own, held in a memory (Wu et al. 2018)."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from unlabeled import views
from unlabeled.measures.matching import match_accuracy, nearest
from unlabeled.nets.encoder import Encoder
from unlabeled.nets.heads import projector
from unlabeled.nets.memory import MemoryBank, memory_nce
from unlabeled.signals.signal import Signal
from unlabeled.views.recipe import contrastive_view

Temperature = Annotated[float, Field(gt=0, description="of the softmax over similarities")]
HiddenDim = Annotated[int, Field(ge=1, description="hidden units of the projection head")]
ProjectionDim = Annotated[int, Field(ge=2, description="dimension of the embeddings remembered")]
Negatives = Annotated[
    int, Field(ge=1, description="remembered images drawn per step to tell an image from; all where fewer")
]
Momentum = Annotated[
    float, Field(ge=0, lt=1, description="weight of what is remembered when an image is seen again")
]
Crop = Annotated[float, Field(gt=0, le=1, description="smallest share of the image in a crop")]
Jitter = Annotated[
    float,
    Field(ge=0, le=1, description="largest relative change of the colours; a fifth of it turns the hue"),
]


class InstDisc(Signal):
    """Instance discrimination, one view of each image per step: `contrastive_view`, as SimCLR here.

    The softmax runs over the batch and a fresh draw of the memory, the whole memory where that is no
    larger: one formula for both, where noise-contrastive estimation has a normalisation constant to estimate.
    """

    family = "dataset contrast"
    equation = "f(x1) <-> f(x2)"
    paper = "Wu et al. 2018, Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
    picture_rows = ("image", "view", "view", "nearest", "second nearest", "third nearest")

    def __init__(
        self,
        encoder: Encoder,
        temperature: Temperature = 0.07,
        hidden_dim: HiddenDim = 512,
        projection_dim: ProjectionDim = 128,
        negatives: Negatives = 2048,
        momentum: Momentum = 0.5,
        crop: Crop = 0.4,
        jitter: Jitter = 0.5,
    ) -> None:
        super().__init__(encoder)
        self.projector = projector(encoder.feature_dim, hidden_dim, projection_dim)
        self.memory = MemoryBank(0, projection_dim, momentum)
        self.temperature, self.negatives = temperature, negatives
        self.crop: dict[str, Any] = {"area": (crop, 1.0), "flip": 0.5, "degrees": 10.0}
        self.color = (jitter, jitter, jitter, jitter / 5)

    def prepare(self, sample: Tensor, count: int) -> None:
        self.memory = MemoryBank(count, self.memory.vectors.shape[1], self.memory.momentum)

    def view(self, images: Tensor) -> Tensor:
        """Return a random view, float (B, C, H, W) in [0, 1], of each of the uint8 images."""
        return contrastive_view(images, self.crop, self.color)

    def embed(self, images: Tensor) -> Tensor:
        """Return embeddings (B, projection_dim) of a random view of each of the uint8 images."""
        return self.projector(self.encoder(self.view(images)))

    def forward(self, images: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        own = self.memory.recall(indices, lambda: self.embed(images))
        z = self.embed(images)
        others, same = self.memory.negatives(indices, own, self.negatives)
        loss, accuracy = memory_nce(z, own, others, same, self.temperature)
        self.memory.remember(indices, z)
        return loss, {"instance_accuracy": accuracy}

    def after_step(self) -> None:
        self.memory.update()

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return how often a view finds, among views of all images, the one of its own image.

        Held-out images are not in the memory.
        """
        accuracy = match_accuracy(self.embed(images), self.embed(images))
        return {"accuracy": accuracy, "chance": torch.tensor(1 / len(images))}

    def picture(self, images: Tensor) -> Tensor:
        shown = images[:8]
        return torch.cat(
            (torch.stack([views.to_float(shown), self.view(shown), self.view(shown)]), self.near(images))
        )

    def near(self, images: Tensor) -> Tensor:
        """Return the three images whose features lie nearest to those of the first eight: float (3, 8, C, H, W)."""
        originals = views.to_float(images)
        return originals[nearest(self.encoder(originals), 3)[:8].T]
