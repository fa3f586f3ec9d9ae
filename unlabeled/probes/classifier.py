"""A classifier: an encoder and a linear head, and its training on labels."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.data.table import ImageTable
from unlabeled.features import extract, load_images
from unlabeled.nets.encoder import Encoder
from unlabeled.parameters import Finetuning, Training
from unlabeled.probes.linear import LinearProbe
from unlabeled.training.optimizers import build_optimizer
from unlabeled.training.precision import bfloat16_nets, computes_in_bfloat16
from unlabeled.training.schedule import learning_rate_share
from unlabeled.views import random_crop

WARMUP_SHARE = 0.1


class Classifier(nn.Module):
    """An encoder with a linear head: float images (B, C, H, W) in [0, 1] to logits (B, classes)."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.feature_dim, classes)

    @classmethod
    def untrained(cls, settings: dict[str, Any], classes: int, seed: int) -> "Classifier":
        """Return a classifier with an encoder of these `Encoder.settings`, at the random init of `seed`."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return cls(Encoder(**settings), classes)

    @classmethod
    def from_probe(cls, encoder: Encoder, probe: LinearProbe) -> "Classifier":
        """Return a classifier that answers exactly as the probe does on the encoder's features."""
        classifier = cls(encoder, len(probe.bias))
        weights = {"weight": torch.from_numpy(probe.weight), "bias": torch.from_numpy(probe.bias)}
        classifier.head.load_state_dict(weights)
        return classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))

    def predict(self, table: ImageTable, indices: np.ndarray) -> np.ndarray:
        """Return the most probable class of the images at `indices`, int64 (N,)."""
        features = torch.from_numpy(extract(self.encoder, table, indices)).to(self.head.weight.device)
        with torch.inference_mode():
            return self.head(features).argmax(1).cpu().numpy()


def train_classifier(
    classifier: Classifier,
    table: ImageTable,
    indices: np.ndarray,
    targets: np.ndarray,
    parameters: Finetuning,
    seed: int,
) -> Iterator[tuple[float, float]]:
    """Train all weights in place, one optimizer step per item; yield its loss and learning rate.

    AdamW, cosine schedule after a short warm-up; the nets compute in bfloat16 where the processor does. Crops are
    never mirrored: that changes what a digit or a letter is. The order of the images and the crops follow from `seed`.

    Args:
        indices, targets: table positions (N,) and their classes (N,). Every epoch shows each image once; a
            batch may span epochs, so that each step has `parameters.batch_size` images however few there are.
    """
    device = classifier.head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = build_optimizer(
        classifier, Training(learning_rate=parameters.learning_rate, weight_decay=parameters.weight_decay)
    )
    classifier.to(memory_format=torch.channels_last).train()
    with bfloat16_nets(classifier, device, computes_in_bfloat16(device)):
        for step, batch in enumerate(batches(len(indices), parameters.batch_size, parameters.steps, seed)):
            rate = parameters.learning_rate * learning_rate_share(
                step, parameters.steps, "cosine", WARMUP_SHARE, 0
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            images = load_images(table, indices[batch], device)
            if parameters.crop_area < 1:
                images = random_crop(images, area=(parameters.crop_area, 1.0), flip=0.0, generator=generator)
            loss = F.cross_entropy(classifier(images), torch.from_numpy(targets[batch]).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item(), rate
    classifier.eval()


def batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `steps` batches of positions below `count`, int64: every epoch has each once, in an order of its own."""
    generator, order = np.random.default_rng(seed), np.empty(0, np.int64)
    for _ in range(steps):
        while len(order) < batch_size:
            order = np.concatenate([order, generator.permutation(count)])
        batch, order = order[:batch_size], order[batch_size:]
        yield batch
