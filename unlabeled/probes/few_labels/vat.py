"""Virtual adversarial training and entropy minimisation (Miyato et al. 2018; Grandvalet & Bengio 2004)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.probes.classifier import Classifier
from unlabeled.probes.few_labels.training import Batch, Views

XI = 1e-2


@dataclass(frozen=True)
class EntropyMinimisation:
    """Cross-entropy on the labelled images + mean entropy of the predictions on the unlabelled ones, ramped up.

    Attributes:
        weight: of the entropy, at last.
    """

    views: Views
    weight: float = 1.0

    def __call__(self, classifier: Classifier, batch: Batch) -> Tensor:
        labelled = F.cross_entropy(classifier(self.views.weak(batch.images)), batch.targets)
        unsure = entropy(classifier(self.views.weak(batch.unlabelled)))
        return labelled + self.weight * ramp_up(batch.progress) * unsure


@dataclass(frozen=True)
class VirtualAdversarial:
    """Cross-entropy + KL(p(x) || p(x + r)) for the worst r of length `radius` + entropy of p(x), x unlabelled.

    The two terms without labels are ramped up.

    Attributes:
        radius: length of r, L2, of an image in [0, 1].
    """

    views: Views
    radius: float

    def __call__(self, classifier: Classifier, batch: Batch) -> Tensor:
        labelled = F.cross_entropy(classifier(self.views.weak(batch.images)), batch.targets)
        images = self.views.weak(batch.unlabelled)
        logits = classifier(images)
        perturbation = adversarial_perturbation(classifier, images, logits, self.radius)
        with frozen_statistics(classifier):
            perturbed = classifier(images + perturbation)
        return labelled + ramp_up(batch.progress) * (divergence(logits, perturbed) + entropy(logits))


def ramp_up(progress: float) -> float:
    """Return the weight of terms without labels, 0.007 to 1 over the first half of the steps (Laine & Aila 2017).

    An untrained net that is made sure of its guesses learns them.
    """
    return math.exp(-5 * max(0.0, 1 - 2 * progress) ** 2)


def adversarial_perturbation(
    classifier: nn.Module, images: Tensor, logits: Tensor, radius: float, xi: float = XI
) -> Tensor:
    """Return, for each image, the r of length `radius` that changes its prediction most: float (B, C, H, W).

    One step of the power iteration: r = radius g / |g|, g the gradient of KL(p(x) || p(x + xi d)) in d, from a
    random direction d of length 1.

    Args:
        classifier: float images (B, C, H, W) to logits; its weights get no gradient, its statistics stay.
        images: float (B, C, H, W).
        logits: (B, classes), the classifier's on `images`.
        xi: 1e-2 is far above float32's noise, and still within the linear range.
    """
    direction = unit(torch.randn_like(images)).requires_grad_()
    with frozen_statistics(classifier):
        change = divergence(logits, classifier(images + xi * direction))
    return radius * unit(torch.autograd.grad(change, direction)[0])


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Return the mean of KL(p || q) over the rows of two logits (B, C); no gradient goes to the first, p."""
    return F.kl_div(
        others.log_softmax(1), logits.detach().log_softmax(1), reduction="batchmean", log_target=True
    )


def entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy, in nats, of the rows of logits (B, C)."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def unit(images: Tensor) -> Tensor:
    """Return each of the images (B, C, H, W) at length 1 (L2)."""
    return images / images.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norm use the statistics of its batch, but leave the running ones as they are."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    tracking = [layer.track_running_stats for layer in norms]
    try:
        for layer in norms:
            layer.track_running_stats = False
        yield
    finally:
        for layer, tracked in zip(norms, tracking, strict=True):
            layer.track_running_stats = tracked
