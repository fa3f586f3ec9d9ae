"""DINO: a student sees in any crop what its own slow average sees in a large one (Caron et al. 2021)."""

import copy
import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from unlabeled import views
from unlabeled.distributed import gather
from unlabeled.nets.encoder import Encoder
from unlabeled.nets.prototypes import PrototypeHead
from unlabeled.nets.vit import VisionTransformer
from unlabeled.signals.signal import Signal

Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(gt=0)]

# Probabilities of a blurred view: the first and the second global crop, the local ones.
BLUR = 1.0, 0.1, 0.5
# Probability of jitter.
JITTER = 0.8


def teacher_probabilities(outputs: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Return the teacher's targets (…, K): centred against one winner, sharpened against uniformity."""
    return ((outputs.float() - center) / temperature).softmax(-1)


def dino_loss(targets: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Return the mean cross-entropy over all pairs of a teacher's and another view of the student's.

    Args:
        targets: the teacher's probabilities (T, B, K); T is 2, the global crops.
        student: outputs (V, B, K); its first T views are the teacher's, in the same order.
    """
    log_probabilities = (student.float() / temperature).log_softmax(-1)
    losses = -torch.einsum("tbk,vbk->tv", targets, log_probabilities) / targets.shape[1]
    same_view = losses.diagonal()
    return (losses.sum() - same_view.sum()) / (losses.numel() - same_view.numel())


def moved_center(center: Tensor, outputs: Tensor, momentum: float) -> Tensor:
    """Return the center (K,) after the teacher's outputs (T, B, K): a moving average over all ranks' means."""
    mean = gather(outputs.float().mean((0, 1)).unsqueeze(0)).mean(0)
    return center * momentum + mean * (1 - momentum)


def teacher_momentum(progress: float, start: float) -> float:
    """Return the teacher's momentum at a share of the run: from `start` to 1 on a cosine."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


def teacher_temperature(progress: float, start: float, end: float, warmup: float) -> float:
    """Return the teacher's temperature at a share of the run: linear over the first `warmup` of it."""
    return start + (end - start) * min(1, progress / warmup)


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy of each distribution (…, K), in nats."""
    return torch.special.entr(probabilities).sum(-1)


class DINO(Signal):
    """Self-distillation without labels; `encoder` is the teacher, which no gradient reaches.

    Schedules run over shares of the run where the paper counts epochs. Weight decay is constant and there is
    no drop path: both are for trainings that are long and nets that are deep.
    """

    family = "invariance"
    equation = "f(pi(x)) = f(x)"
    paper = "Caron et al. 2021, Emerging Properties in Self-Supervised Vision Transformers"
    picture_rows = (
        "image", "global crop", "global crop", "local crop", "local crop",
        "attention", "attention", "attention",
    )  # fmt: skip
    training_defaults: ClassVar[dict[str, Any]] = {
        "batch_size": 128,
        "learning_rate": 2e-3,
        "weight_decay": 0.04,
        "gradient_clip": 3.0,
    }

    center: Tensor

    def __init__(
        self,
        encoder: Encoder,
        prototypes: Annotated[int, Field(ge=2, description="K, outputs that are compared")] = 1024,
        hidden_dim: Annotated[int, Field(ge=1, description="hidden units of the projection head")] = 512,
        bottleneck_dim: Annotated[int, Field(ge=2, description="dimension of the normalised code")] = 128,
        batch_norm: Annotated[bool, Field(description="in the projection head; the paper has none")] = True,
        student_temperature: Annotated[Temperature, Field(description="of the student's softmax")] = 0.1,
        teacher_temperature_start: Annotated[
            Temperature, Field(description="of the teacher's softmax, first")
        ] = 0.04,
        teacher_temperature_end: Annotated[
            Temperature, Field(description="of the teacher's softmax, after the warm-up")
        ] = 0.04,
        temperature_warmup: Annotated[
            float, Field(gt=0, le=1, description="share of the steps in which the temperature moves")
        ] = 0.3,
        momentum: Annotated[Share, Field(description="of the teacher, at the start; it ends at 1")] = 0.95,
        center_momentum: Annotated[Share, Field(description="of the center; 1: no centring")] = 0.9,
        frozen: Annotated[Share, Field(description="share of the steps with the first prototypes")] = 0.02,
        local_crops: Annotated[int, Field(ge=0, le=16, description="small crops, the student's alone")] = 2,
        local_size: Annotated[
            float, Field(gt=0, le=1, description="side of a local crop, share of the image's")
        ] = 0.5,
        split: Annotated[
            float, Field(gt=0, le=1, description="share of the image that parts local from global crops")
        ] = 0.4,
        smallest: Annotated[
            float, Field(gt=0, le=1, description="smallest share of the image in a local crop")
        ] = 0.1,
        flip: Annotated[Share, Field(description="probability of a mirrored view")] = 0.5,
        brightness: Annotated[Share, Field(description="largest relative change")] = 0.4,
        contrast: Annotated[Share, Field(description="largest relative change")] = 0.4,
        saturation: Annotated[Share, Field(description="largest relative change; colour images")] = 0.2,
        hue: Annotated[
            float, Field(ge=0, le=0.5, description="largest turn of the hue; colour images")
        ] = 0.1,
        grayscale: Annotated[Share, Field(description="probability of a gray view; colour images")] = 0.2,
        blur_sigma: Annotated[
            float, Field(gt=0, description="largest blur, share of the image's height")
        ] = 0.02,
        solarize: Annotated[Share, Field(description="probability, in the second global crop")] = 0.0,
    ) -> None:
        super().__init__(encoder)
        self.student = copy.deepcopy(encoder)
        self.head = PrototypeHead(encoder.feature_dim, hidden_dim, bottleneck_dim, prototypes, batch_norm)
        self.teacher_head = copy.deepcopy(self.head)
        for teacher in (self.encoder, self.teacher_head):
            teacher.requires_grad_(False)
        self.register_buffer("center", torch.zeros(prototypes))
        self.student_temperature = student_temperature
        self.temperatures = teacher_temperature_start, teacher_temperature_end, temperature_warmup
        self.momentum, self.center_momentum, self.frozen = momentum, center_momentum, frozen
        self.local_crops, self.local_size = local_crops, local_size
        self.global_area, self.local_area = (split, 1.0), (min(smallest, split), split)
        self.flip, self.grayscale, self.solarize = flip, grayscale, solarize
        self.color = (brightness, contrast, saturation, hue)
        self.blur_sigma = blur_sigma

    def view(
        self, images: Tensor, area: tuple[float, float], size: int, blur: float, solarize: float = 0.0
    ) -> Tensor:
        """Return a random view (B, C, size, size) of each of the float images."""
        view = views.random_crop(images, area, flip=self.flip, size=(size, size))
        view = views.random_grayscale(views.random_color(view, *self.color, JITTER), self.grayscale)
        view = views.random_blur(view, (0.1, max(0.1, self.blur_sigma * images.shape[2])), blur)
        return views.random_solarize(view, solarize) if solarize > 0 else view

    def global_crops(self, images: Tensor) -> Tensor:
        """Return the two large crops of uint8 images, float (2B, C, H, W): all first ones, all second ones."""
        originals, size = views.to_float(images), images.shape[2]
        first = self.view(originals, self.global_area, size, BLUR[0])
        return torch.cat((first, self.view(originals, self.global_area, size, BLUR[1], self.solarize)))

    def local_views(self, images: Tensor, count: int) -> Tensor:
        """Return small crops, float (count · B, C, h, w)."""
        size = max(2, round(self.local_size * images.shape[2]))
        originals = views.to_float(images).repeat(count, 1, 1, 1)
        return self.view(originals, self.local_area, size, BLUR[2])

    def teach(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's outputs for crops, and the probabilities that it makes of them, (B, K) both."""
        with torch.no_grad():
            outputs = self.teacher_head(self.encoder(crops))
            temperature = teacher_temperature(self.progress, *self.temperatures)
            return outputs, teacher_probabilities(outputs, self.center, temperature)

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        crops = self.global_crops(images)
        features = [self.student(crops)]
        if self.local_crops:
            features.append(self.student(self.local_views(images, self.local_crops)))
        student = self.head(torch.cat(features), self.progress < self.frozen)
        outputs, targets = (rows.unflatten(0, (2, -1)) for rows in self.teach(crops))
        loss = dino_loss(targets, student.unflatten(0, (-1, len(images))), self.student_temperature)
        self.center.copy_(moved_center(self.center, outputs, self.center_momentum))
        teacher_entropy = entropy(targets).mean()
        # The loss is their sum; where the divergence is 0, all has collapsed.
        values = {"teacher_entropy": teacher_entropy, "divergence": loss.detach() - teacher_entropy}
        return loss, values | {"prototypes_used": entropy(targets.mean((0, 1))).exp()}

    @torch.no_grad()
    def after_step(self) -> None:
        momentum = teacher_momentum(self.progress, self.momentum)
        teacher: list[Tensor] = [*self.encoder.parameters(), *self.teacher_head.parameters()]
        student: list[Tensor] = [*self.student.parameters(), *self.head.parameters()]
        torch._foreach_mul_(teacher, momentum)
        torch._foreach_add_(teacher, list(torch._foreach_mul(student, 1 - momentum)))

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return what tells learning from collapse, in nats, and how often two crops of an image agree.

        `teacher_entropy` is 0 where one prototype has won and `entropy_uniform` where none has; `divergence`,
        of the student from the teacher's other crop, is 0 in both, and stands beside that from another
        image's crop. `prototypes_used` is the effective number over all images. `accuracy`: of all images, the
        student's crop diverges least from the teacher's crop of the same one; beside `chance`.
        """
        first, second = self.global_crops(images).chunk(2)
        targets = self.teach(first)[1]
        student = (self.head(self.student(second)) / self.student_temperature).log_softmax(1)
        entropies, count = entropy(targets), len(images)
        # Row: the student's image, column: the teacher's.
        divergence = -(student @ targets.T) - entropies
        own = divergence.diagonal()
        return {
            "teacher_entropy": entropies.mean(),
            "entropy_uniform": torch.tensor(math.log(targets.shape[1])),
            "divergence": own.mean(),
            "divergence_of_another": (divergence.sum() - own.sum()) / (count * (count - 1)),
            "prototypes_used": entropy(targets.mean(0)).exp(),
            "prototypes": torch.tensor(float(targets.shape[1])),
            "accuracy": (divergence.argmin(1).cpu() == torch.arange(count)).float().mean(),
            "chance": torch.tensor(1 / count),
        }

    def picture(self, images: Tensor) -> Tensor:
        """Return crops, and three attention maps each: a ViT's heads, or a ResNet's principal components."""
        images = images[:8]
        local = F.interpolate(self.local_views(images, 2), images.shape[2:])
        rows = [views.to_float(images), *self.global_crops(images).chunk(2), *local.chunk(2)]
        net, originals = self.encoder.net, views.to_float(images)
        if isinstance(net, VisionTransformer):
            maps = net.attention(self.encoder.normalised(originals))
        else:
            maps = principal_components(self.encoder.feature_map(originals), 3)
        low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
        maps = F.interpolate((maps - low) / (high - low).clamp(min=1e-12), images.shape[2:], mode="bilinear")
        return torch.stack(rows + [one.expand_as(originals) for one in maps.split(1, dim=1)])


def principal_components(maps: Tensor, count: int) -> Tensor:
    """Return the first principal components (B, count, h, w) of all positions of maps (B, C, h, w).

    Signs are such that a component is high where the map is strong.
    """
    positions = maps.float().movedim(1, -1)
    centred = positions - positions.mean((0, 1, 2))
    flat = centred.flatten(0, 2)
    directions = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -count:].flip(1)
    energy = positions.norm(dim=-1).flatten()
    signs = (flat @ directions).T @ (energy - energy.mean())
    return (centred @ (directions * torch.where(signs < 0, -1.0, 1.0))).movedim(-1, 1)
