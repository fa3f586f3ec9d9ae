"""CPC v2: what is seen of an image tells which patches follow (Hénaff et al. 2020)."""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled import views
from unlabeled.distributed import gather, rank
from unlabeled.errors import InputError
from unlabeled.nets.encoder import Encoder
from unlabeled.nets.pixel_cnn import RowContext
from unlabeled.signals.signal import Signal
from unlabeled.views.patches import cut_patches, drop_colors

Share = Annotated[float, Field(ge=0, le=1)]


def info_nce_logits(
    predictions: Tensor, targets: Tensor, patches: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return InfoNCE as a classification: which patch, of all images of all ranks, was predicted?

    Args:
        predictions: (B, P, D), for each image P predictions of its own patches.
        targets: (B, G, D), the embeddings of its G patches.
        patches: int64 (P,), which patch each prediction is of, 0 to G - 1.

    Returns:
        Cosine similarities over temperature, float (B · P, processes · B · G), and the columns of the patches
        predicted, int64 (B · P,).
    """
    count, grid = targets.shape[:2]
    predictions = F.normalize(predictions.float(), dim=2).flatten(0, 1)
    targets = gather(F.normalize(targets.float(), dim=2).flatten(0, 1))
    images = torch.arange(count, device=targets.device) + rank() * count
    return predictions @ targets.T / temperature, (images.unsqueeze(1) * grid + patches).flatten()


class CPC(Signal):
    """Contrastive predictive coding over a grid of overlapping patches, in four directions.

    Patches keep their resolution, so that the encoder meets the same sizes of things in whole images. Its
    batch norm, which the paper avoids, mixes statistics of all images and patches; the objective is measured
    in eval mode, without them. Cosine similarities over a temperature stand for the paper's scaled products.
    """

    family = "dataset contrast"
    equation = "f(x1) <-> f(x2)"
    paper = "Hénaff et al. 2020, Data-Efficient Image Recognition with Contrastive Predictive Coding"
    picture_rows = ("image", "seen by the context", "patches it expects below", "the same, of other images")
    training_defaults: ClassVar[dict[str, Any]] = {"batch_size": 64, "learning_rate": 2e-3}

    def __init__(
        self,
        encoder: Encoder,
        temperature: Annotated[float, Field(gt=0, description="of the softmax over similarities")] = 0.1,
        grid: Annotated[int, Field(ge=2, le=16, description="patches along each side of the image")] = 3,
        patch: Annotated[float, Field(gt=0, lt=1, description="side of a patch, share of the image's")] = 0.5,
        first_distance: Annotated[
            int, Field(ge=1, description="nearest row predicted; 1: the next, which overlaps what is seen")
        ] = 2,
        projection_dim: Annotated[int, Field(ge=2, description="dimension of the embeddings compared")] = 64,
        context_dim: Annotated[int, Field(ge=4, description="channels of the context network")] = 128,
        context_blocks: Annotated[
            int,
            Field(
                ge=1, description="residual blocks of it; each sees a row further, of grid - first_distance"
            ),
        ] = 1,
        crop: Annotated[float, Field(gt=0, le=1, description="smallest share of the image in a crop")] = 0.8,
        patch_crop: Annotated[float, Field(gt=0, le=1, description="smallest share of a patch kept")] = 1.0,
        flip: Annotated[Share, Field(description="probability of a mirrored image, and of a patch")] = 0.5,
        rotation: Annotated[float, Field(ge=0, le=180, description="largest turn of a patch, degrees")] = 0.0,
        brightness: Annotated[Share, Field(description="largest relative change")] = 0.5,
        contrast: Annotated[Share, Field(description="largest relative change")] = 0.5,
        drop_colors: Annotated[
            Share, Field(description="probability of a patch to keep one colour only")
        ] = 0.5,
    ) -> None:
        super().__init__(encoder)
        if first_distance >= grid:
            raise InputError(
                f"cpc: a grid of {grid} rows has none {first_distance} further; lower first_distance"
            )
        self.temperature, self.grid, self.patch = temperature, grid, patch
        self.distances = range(first_distance, grid)
        self.crop: dict[str, Any] = {"area": (crop, 1.0), "flip": flip}
        self.patch_crop: dict[str, Any] = {"area": (patch_crop, 1.0), "flip": flip, "degrees": rotation}
        self.color, self.drop_colors = (brightness, contrast), drop_colors
        self.embedding = nn.Linear(encoder.feature_dim, projection_dim)
        # Down, left, up and right differ in what they find: a network for each.
        self.contexts = nn.ModuleList(
            RowContext(encoder.feature_dim, context_dim, context_blocks) for _ in range(4)
        )
        self.predictors = nn.ModuleList(
            nn.Conv2d(context_dim, projection_dim * len(self.distances), 1) for _ in range(4)
        )

    def cut(self, images: Tensor) -> Tensor:
        """Return the grid's patches, row by row, (B, grid², C, p, p) of images (B, C, H, W)."""
        starts, size = self.starts(images.shape[2])
        first = torch.tensor(starts, device=images.device).expand(len(images), -1)
        return cut_patches(images, first.repeat_interleave(self.grid, 1), first.repeat(1, self.grid), size)

    def starts(self, side: int) -> tuple[list[int], int]:
        """Return the first rows (and columns) of the grid's patches, and their side, in pixels."""
        size = max(2, int(self.patch * side))
        return [number * (side - size) // (self.grid - 1) for number in range(self.grid)], size

    def view(self, images: Tensor) -> Tensor:
        """Return patches (B, grid², C, p, p) of the uint8 images, each with changes of its own."""
        cut = self.cut(views.random_crop(views.to_float(images), **self.crop))
        patches = views.random_crop(cut.flatten(0, 1), **self.patch_crop)
        patches = views.random_color(patches, *self.color, 0.0, 0.0)
        patches = drop_colors(patches, self.encoder.mean, self.encoder.std, self.drop_colors)
        return patches.view_as(cut)

    def predict(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return predictions (B, P, D), targets (B, G, D) and the patches predicted (P,) of patches (B, G, …)."""
        features = self.encoder(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        maps = features.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        numbers = torch.arange(self.grid**2, device=patches.device).view(self.grid, self.grid)
        predictions, predicted = [], []
        for turns, (context, predictor) in enumerate(zip(self.contexts, self.predictors, strict=True)):
            # The grid is turned, so that each network looks up and predicts downwards; nothing is left to
            # predict from its last rows.
            seen = maps.rot90(turns, (2, 3))[:, :, : -self.distances[0]]
            said = predictor(context(seen)).chunk(len(self.distances), 1)
            for distance, further in zip(self.distances, said, strict=True):
                predictions.append(further[:, :, : self.grid - distance].flatten(2))
                predicted.append(numbers.rot90(turns)[distance:].flatten())
        return torch.cat(predictions, 2).transpose(1, 2), self.embedding(features), torch.cat(predicted)

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.contrast(self.view(images))

    def contrast(self, patches: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return InfoNCE, the mean over all predictions, and how often the patch predicted is the nearest."""
        logits, columns = info_nce_logits(*self.predict(patches), self.temperature)
        accuracy = (logits.argmax(1) == columns).float().mean()
        return F.cross_entropy(logits, columns), {"contrastive_accuracy": accuracy}

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return how often the patch predicted is found among those of all images, as they are."""
        accuracy = self.contrast(self.cut(views.to_float(images)))[1]["contrastive_accuracy"]
        return {"accuracy": accuracy, "chance": torch.tensor(1 / (len(images) * self.grid**2))}

    def picture(self, images: Tensor) -> Tensor:
        """Show which patches, of all images given, the first context expects in the last row."""
        originals, shown = views.to_float(images), min(8, len(images))
        patches = self.cut(originals)
        predictions, targets, _ = self.predict(patches)
        # The first network's predictions at its first distance come first, row by row.
        rows = self.grid - self.distances[0]
        below = predictions[:shown, (rows - 1) * self.grid : rows * self.grid]
        similar = torch.einsum("ipd,jgd->ipjg", below, F.normalize(targets, dim=2))
        itself = torch.eye(shown, len(images), dtype=torch.bool, device=images.device)
        of_others = similar.masked_fill(itself[:, None, :, None], float("-inf"))

        starts, size = self.starts(images.shape[2])
        seen = originals[:shown].clone()
        seen[:, :, starts[rows - 1] + size :] = 0.5
        found = []
        for similarity in (similar, of_others):
            best = patches.flatten(0, 1)[similarity.flatten(2).argmax(2)]
            found.append(seen.clone())
            found[-1][:, :, starts[-1] : starts[-1] + size] = self.row(best, starts, images.shape[3])
        return torch.stack((originals[:shown], seen, *found))

    def row(self, patches: Tensor, starts: list[int], width: int) -> Tensor:
        """Return patches (B, grid, C, p, p) side by side (B, C, p, width), the mean where they overlap."""
        count, _, channels, size, _ = patches.shape
        total, times = patches.new_zeros(count, channels, size, width), patches.new_zeros(width)
        for column, start in enumerate(starts):
            total[..., start : start + size] += patches[:, column]
            times[start : start + size] += 1
        return torch.where(times > 0, total / times.clamp(min=1), 0.5)
