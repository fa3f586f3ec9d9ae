"""SimCLR: two views of an image agree, the other images of the batch repel (Chen et al. 2020)."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from unlabeled import views
from unlabeled.distributed import gather, rank
from unlabeled.nets.encoder import Encoder
from unlabeled.nets.heads import projector
from unlabeled.signals.signal import Signal
from unlabeled.views.recipe import contrastive_view

Share = Annotated[float, Field(ge=0, le=1)]


def contrast_logits(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return NT-Xent as a classification: logits over the views of all ranks, and each view's partner.

    Args:
        z1, z2: embeddings (N, D) of the first and of the second views; row i of both is the same image.

    Returns:
        Cosine similarities over temperature, float (2N, 2N · processes), -inf where a view meets itself;
        and the partners' columns, int64 (2N,).
    """
    z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
    all1, all2 = gather(z1), gather(z2)
    logits = torch.cat((z1, z2)) @ torch.cat((all1, all2)).T / temperature
    first = torch.arange(len(z1), device=z1.device) + rank() * len(z1)
    second = first + len(all1)
    itself, partner = torch.cat((first, second)), torch.cat((second, first))
    return logits.scatter(1, itself.unsqueeze(1), float("-inf")), partner


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the NT-Xent loss, the mean over all 2N ordered positive pairs (equation 1 of Chen et al. 2020).

    Args:
        z1, z2: embeddings (N, D) of the two views, N at least 2, of any length. Over several processes each
            gives its own; the mean of their losses is the loss of the joined batch.
    """
    return F.cross_entropy(*contrast_logits(z1, z2, temperature))


class SimCLR(Signal):
    """SimCLR; the defaults are a recipe for small images, weaker than the paper's for photographs."""

    family = "dataset contrast"
    equation = "f(x1) <-> f(x2)"
    paper = "Chen et al. 2020, A Simple Framework for Contrastive Learning of Visual Representations"
    picture_rows = ("image", "view", "view", "view")

    def __init__(
        self,
        encoder: Encoder,
        temperature: Annotated[float, Field(gt=0, description="of the softmax over similarities")] = 0.1,
        hidden_dim: Annotated[int, Field(ge=1, description="hidden units of the projection head")] = 512,
        projection_dim: Annotated[int, Field(ge=2, description="dimension of the embeddings compared")] = 128,
        crop: Annotated[float, Field(gt=0, le=1, description="smallest share of the image in a crop")] = 0.4,
        flip: Annotated[Share, Field(description="probability of a mirrored view")] = 0.5,
        rotation: Annotated[float, Field(ge=0, le=180, description="largest turn, degrees")] = 10.0,
        brightness: Annotated[Share, Field(description="largest relative change")] = 0.5,
        contrast: Annotated[Share, Field(description="largest relative change")] = 0.5,
        saturation: Annotated[Share, Field(description="largest relative change; colour images")] = 0.5,
        hue: Annotated[
            float, Field(ge=0, le=0.5, description="largest turn of the hue; colour images")
        ] = 0.1,
        grayscale: Annotated[Share, Field(description="probability of a gray view; colour images")] = 0.2,
        blur: Annotated[Share, Field(description="probability of a blurred view")] = 0.3,
        blur_sigma: Annotated[
            float, Field(gt=0, description="largest blur, share of the image's height")
        ] = 0.04,
    ) -> None:
        super().__init__(encoder)
        self.projector = projector(encoder.feature_dim, hidden_dim, projection_dim)
        self.temperature = temperature
        self.crop: dict[str, Any] = {"area": (crop, 1.0), "flip": flip, "degrees": rotation}
        self.color = (brightness, contrast, saturation, hue)
        self.grayscale, self.blur, self.blur_sigma = grayscale, blur, blur_sigma

    def view(self, images: Tensor) -> Tensor:
        """Return a random view, float (B, C, H, W) in [0, 1], of each of the uint8 images."""
        return contrastive_view(images, self.crop, self.color, self.grayscale, self.blur, self.blur_sigma)

    def two_views(self, images: Tensor) -> Tensor:
        """Return float (2B, C, H, W): a view of each of the uint8 images, then a second one of each."""
        return self.view(images.repeat(2, 1, 1, 1))

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.encoder(self.two_views(images))
        z1, z2 = self.projector(features).chunk(2)
        logits, partner = contrast_logits(z1, z2, self.temperature)
        loss = F.cross_entropy(logits, partner)
        with torch.no_grad():
            accuracy = (logits.argmax(1) == partner).float().mean()
            # 1/√D where the features fill their space, 0 where they have collapsed.
            feature_std = F.normalize(features.float(), dim=1).std(0).mean()
        return loss, {"contrastive_accuracy": accuracy, "feature_std": feature_std}

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return how often a view finds its partner among the views of all images."""
        accuracy = self.loss(images)[1]["contrastive_accuracy"]
        return {"accuracy": accuracy, "chance": torch.tensor(1 / (2 * len(images) - 1))}

    def picture(self, images: Tensor) -> Tensor:
        images = images[:8]
        return torch.stack([views.to_float(images)] + [self.view(images) for _ in range(3)])
