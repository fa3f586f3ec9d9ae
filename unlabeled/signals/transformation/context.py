"""Context: where does one patch of an image lie, seen from another (Doersch et al. 2015)."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from unlabeled import views
from unlabeled.errors import InputError
from unlabeled.nets.encoder import Encoder
from unlabeled.nets.heads import classifier
from unlabeled.signals.signal import Signal


def direction(labels: Tensor) -> Tensor:
    """Return the steps down and right, int64 (B, 2) of -1, 0, 1, to the eight neighbours numbered by rows.

    Number 0 is up and left, 7 down and right: seen from the other patch, k is 7 - k.
    """
    place = labels + (labels >= 4)  # the fifth of nine is the patch itself
    return torch.stack((place // 3 - 1, place % 3 - 1), -1)


class Context(Signal):
    """Context prediction: a tower for both patches, a head that sees both in either order, eight places."""

    family = "transformation estimation"
    equation = "f(pi(x, theta)) = theta"
    paper = "Doersch et al. 2015, Unsupervised Visual Representation Learning by Context Prediction"
    picture_rows = ("both patches", "as they lie", "as predicted; the first in the middle")

    def __init__(
        self,
        encoder: Encoder,
        patch: Annotated[float, Field(gt=0, lt=0.5, description="side, share of the image's")] = 0.36,
        gap: Annotated[float, Field(ge=0, lt=1, description="between patches, share of the image")] = 0.11,
        jitter: Annotated[
            float, Field(ge=0, lt=0.5, description="largest shift of a patch, share of the gap, below half")
        ] = 0.4,
        normalize: Annotated[bool, Field(description="bring patches to one mean and spread")] = True,
        color_drop: Annotated[
            float, Field(ge=0, le=1, description="probability of a patch with one channel; colour images")
        ] = 1.0,
        low_resolution: Annotated[
            float, Field(ge=0, le=1, description="probability of a patch without its detail")
        ] = 1 / 3,
        zoom: Annotated[
            float, Field(gt=0, le=1, description="side that patches are brought to, share of the image's")
        ] = 0.5,
        hidden_dim: Annotated[int, Field(ge=1, description="hidden units of the head")] = 512,
    ) -> None:
        """Check that the patches fit.

        Raises:
            InputError: two patches, the gap and their jitter are wider than the image.
        """
        super().__init__(encoder)
        size = encoder.image_shape[1]
        self.patch = max(2, round(patch * size))
        self.gap = max(1, round(gap * size)) if gap > 0 else 0
        self.jitter = int(jitter * self.gap)  # below half the gap: two patches never touch
        if 2 * self.patch + self.gap + 2 * self.jitter > size:
            raise InputError(
                f"two patches of {self.patch} pixels, a gap of {self.gap} and a jitter of {self.jitter} do not fit "
                f"an image of {size}; lower pretrain.context.patch or pretrain.context.gap"
            )
        self.zoomed = max(self.patch, round(zoom * size))
        self.normalize, self.color_drop, self.low_resolution = normalize, color_drop, low_resolution
        self.head = classifier(2 * encoder.feature_dim, hidden_dim, 8)

    def corners(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first rows and columns, int64 (B, 2) each, of pairs of patches related as labels say.

        The pair lies anywhere in the image, each patch is jittered on its own, and none is cut by the border.
        """
        steps = direction(labels) * (self.patch + self.gap)
        size = self.encoder.image_shape[1]
        # From where the upper or left one of the two starts to where the last start leaves both inside.
        room = size - self.patch - 2 * self.jitter - steps.abs()
        start = (torch.rand(steps.shape, device=labels.device) * (room + 1)).long() - steps.clamp(max=0)
        pair = torch.stack((start, start + steps), 1)
        pair = pair + torch.randint(2 * self.jitter + 1, pair.shape, device=labels.device)
        return pair[..., 0], pair[..., 1]

    def tower_input(self, patches: Tensor) -> Tensor:
        """Return what the encoder sees of float patches (B, 2, C, p, p): (2B, C, zoomed, zoomed)."""
        patches = patches.flatten(0, 1)
        if self.low_resolution > 0:
            patches = views.random_resolution(patches, probability=self.low_resolution)
        patches = F.interpolate(patches, self.zoomed, mode="bilinear")
        if self.normalize:
            patches = views.normalize_patches(patches, self.encoder.mean, self.encoder.std)
        if self.color_drop > 0:
            patches = views.drop_colors(patches, self.encoder.mean, self.encoder.std, self.color_drop)
        return patches

    def logits(self, patches: Tensor) -> Tensor:
        """Return float (2B, 8) of float patches (B, 2, C, p, p): the pairs as they are, then the other way."""
        first, second = self.encoder(self.tower_input(patches)).unflatten(0, (-1, 2)).unbind(1)
        both = torch.cat((torch.cat((first, second), 1), torch.cat((second, first), 1)))
        return self.head(both).float()

    def pairs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return a pair of patches, float (B, 2, C, p, p), of each uint8 image, and the labels, balanced."""
        labels = torch.randperm(len(images), device=images.device) % 8
        return views.cut_patches(views.to_float(images), *self.corners(labels), self.patch), labels

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        patches, labels = self.pairs(images)
        logits, labels = self.logits(patches), torch.cat((labels, 7 - labels))
        return F.cross_entropy(logits, labels), {"accuracy": (logits.argmax(1) == labels).float().mean()}

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return how often the place is told right, one pair for each image, in both orders."""
        return {"accuracy": self.loss(images)[1]["accuracy"], "chance": torch.tensor(1 / 8)}

    def picture(self, images: Tensor) -> Tensor:
        labels = torch.arange(len(images[:8]), device=images.device)
        originals = views.to_float(images[:8])
        top, left = self.corners(labels)
        patches = views.cut_patches(originals, top, left, self.patch)
        told = self.logits(patches).chunk(2)[0].argmax(1)
        return torch.stack(
            (self.outline(originals, top, left), self.lay(patches, labels), self.lay(patches, told))
        )

    def outline(self, images: Tensor, top: Tensor, left: Tensor) -> Tensor:
        """Return float images with the patches that start at (B, 2) rows and columns framed by their inverse."""
        pixels = torch.arange(images.shape[2], device=images.device)

        def inside(margin: int) -> Tensor:
            start, end = margin, self.patch - margin
            rows = (pixels >= top.unsqueeze(2) + start) & (pixels < top.unsqueeze(2) + end)
            columns = (pixels >= left.unsqueeze(2) + start) & (pixels < left.unsqueeze(2) + end)
            return rows.unsqueeze(3) & columns.unsqueeze(2)

        frame = (inside(0) & ~inside(1)).any(1, keepdim=True)
        return torch.where(frame, 1 - images, images)

    def lay(self, patches: Tensor, labels: Tensor) -> Tensor:
        """Return float patches (B, 2, C, p, p) laid on gray, the first in the middle, the second at its place."""
        size = self.encoder.image_shape[1]
        small = F.interpolate(patches.flatten(0, 1), size // 3, mode="bilinear", antialias=True).clamp(0, 1)
        first, second = small.unflatten(0, (-1, 2)).unbind(1)
        board = small.new_full((len(first), 9, *small.shape[1:]), 0.5)
        board[:, 4] = first
        down, right = direction(labels).unbind(1)
        board[torch.arange(len(second), device=labels.device), 4 + 3 * down + right] = second
        return views.lay_patches(board, size)
