"""The one training loop of the comparison, and the views that all its methods share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from unlabeled import progress
from unlabeled.data.table import ImageTable
from unlabeled.errors import CheckFailed
from unlabeled.features import images_at_once, load_images
from unlabeled.parameters import FewLabels, Training
from unlabeled.probes.classifier import WARMUP_SHARE, Classifier, batches
from unlabeled.probes.few_labels.task import Task
from unlabeled.training.loop import step_seed
from unlabeled.training.optimizers import build_optimizer
from unlabeled.training.precision import bfloat16_nets, computes_in_bfloat16
from unlabeled.training.schedule import learning_rate_share
from unlabeled.views import random_crop, to_float
from unlabeled.views.recipe import contrastive_view


@dataclass(frozen=True)
class Batch:
    """What a loss sees in one step.

    Attributes:
        images: uint8 (B, C, H, W), labelled.
        targets: int64 (B,), their classes.
        numbers: int64 (U,), positions in `Task.unlabelled`.
        read_unlabelled: reads the images at `numbers`.
        progress: share of the steps that is done, 0 to 1.
    """

    images: Tensor
    targets: Tensor
    numbers: Tensor
    read_unlabelled: Callable[[], Tensor]
    progress: float

    @cached_property
    def unlabelled(self) -> Tensor:
        """The images at `numbers`, uint8 (U, C, H, W), read when a loss asks for them."""
        return self.read_unlabelled()


Loss = Callable[[Classifier, Batch], Tensor]


@dataclass(frozen=True)
class Views:
    """Random views of uint8 images (B, C, H, W): float (B, C, H, W) in [0, 1].

    Attributes:
        crop: smallest share of an image that a weak view keeps.
        flip: probability of a mirrored view.
    """

    crop: float
    flip: float

    def weak(self, images: Tensor) -> Tensor:
        """Crop and flip: what every method trains on."""
        return random_crop(to_float(images), area=(self.crop, 1.0), flip=self.flip)

    def strong(self, images: Tensor) -> Tensor:
        """Contrastive views: a smaller crop, a turn, other colours, sometimes blurred."""
        crop = {"area": (0.4, 1.0), "flip": self.flip, "degrees": 10.0}
        return contrastive_view(images, crop, (0.5, 0.5, 0.5, 0.1))


def train_semi_supervised(
    classifier: Classifier,
    task: Task,
    loss: Loss,
    parameters: FewLabels,
    learning_rate: float,
    seed: int,
    float32: bool = False,
) -> Classifier:
    """Train all weights in place with a loss on labelled and unlabelled images; return the classifier, in eval mode.

    AdamW, cosine schedule after a short warm-up, `parameters.steps` steps of `batch_size` labelled and
    `unlabelled_batch_size` unlabelled images. The order of both and the views follow from `seed`; the global
    random state is left alone.

    Args:
        float32: of what the net computes; else bfloat16, where the processor does.
    """
    device = classifier.head.weight.device
    optimizer = build_optimizer(
        classifier, Training(learning_rate=learning_rate, weight_decay=parameters.weight_decay)
    )
    classifier.to(memory_format=torch.channels_last).train()
    few = batches(len(task.labelled), parameters.batch_size, parameters.steps, seed)
    many = batches(len(task.unlabelled), parameters.unlabelled_batch_size, parameters.steps, seed)

    def images(indices: np.ndarray) -> Tensor:
        return torch.from_numpy(task.table.images(indices)).to(device)

    bfloat16 = not float32 and computes_in_bfloat16(device)
    with torch.random.fork_rng(), bfloat16_nets(classifier, device, bfloat16):
        for step, (labelled, numbers) in enumerate(zip(few, many, strict=True)):
            torch.manual_seed(step_seed(seed, step))
            rate = learning_rate * learning_rate_share(step, parameters.steps, "cosine", WARMUP_SHARE, 0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = Batch(
                images(task.labelled[labelled]),
                torch.from_numpy(task.targets[labelled]).to(device),
                torch.from_numpy(numbers).to(device),
                partial(images, task.unlabelled[numbers]),
                step / parameters.steps,
            )
            value = loss(classifier, batch)
            if not torch.isfinite(value):
                raise CheckFailed(
                    f"the loss is {value.item()} at step {step + 1}: the training diverged; "
                    "lower few_labels.learning_rates"
                )
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            progress.report(step + 1, parameters.steps, "steps", loss=value.item())
    return classifier.eval()


def class_probabilities(
    classifier: Classifier,
    table: ImageTable,
    indices: np.ndarray,
    mirrored: bool = False,
) -> np.ndarray:
    """Return p(class) of the images at `indices`, whole images without a crop: float32 (N, C).

    Args:
        mirrored: the mean over an image and its mirror image.
    """
    device = classifier.head.weight.device
    found = [np.empty((0, classifier.head.out_features), np.float32)]
    batch_size = images_at_once(table)
    classifier.eval()
    with torch.inference_mode(), bfloat16_nets(classifier, device, computes_in_bfloat16(device)):
        for start in range(0, len(indices), batch_size):
            images = load_images(table, indices[start : start + batch_size], device)
            p = classifier(images).softmax(1)
            if mirrored:
                p = (p + classifier(images.flip(3)).softmax(1)) / 2
            found.append(p.cpu().numpy())
            progress.report(start + len(images), len(indices), "images")
    return np.concatenate(found)
