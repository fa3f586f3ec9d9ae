"""Self-training: the whole net learns its own confident answers on strong views (Van Gansbeke et al. 2020, step 3)."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled import progress, views
from unlabeled.data.batches import Batches
from unlabeled.data.table import ImageTable
from unlabeled.nets.encoder import Encoder
from unlabeled.parameters import SelfLabel, Training
from unlabeled.selflabel.clusters import Clusters
from unlabeled.training.optimizers import build_optimizer
from unlabeled.training.schedule import learning_rate_share
from unlabeled.views.holes import random_blocks

BATCH = 256
WEIGHT_DECAY, WARMUP_SHARE = 1e-4, 0.05


class ClusterNet(nn.Module):
    """An encoder under clusters: float images (B, C, H, W) in [0, 1] to logits (B, K)."""

    mean: Tensor
    scale: Tensor

    def __init__(self, encoder: Encoder, clusters: Clusters) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(*clusters.weight.T.shape)
        self.head.load_state_dict(
            {"weight": torch.from_numpy(clusters.weight), "bias": torch.from_numpy(clusters.bias)}
        )
        self.register_buffer("mean", torch.from_numpy(clusters.mean))
        self.register_buffer("scale", torch.from_numpy(clusters.scale))

    def forward(self, images: Tensor) -> Tensor:
        return self.head((self.encoder(images) - self.mean) / self.scale)

    def clusters(self) -> Clusters:
        """Return the clusters as they are now."""
        tensors = (self.mean, self.scale, self.head.weight, self.head.bias)
        return Clusters(*(tensor.detach().cpu().numpy().copy() for tensor in tensors))


def confident_labels(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return which of the images have a cluster more probable than `threshold`, bool (B,), and their clusters.

    No gradient flows through either.

    Args:
        logits: float (B, K), of the plain images.
    """
    probabilities, labels = logits.detach().softmax(1).max(1)
    confident = probabilities > threshold
    return confident, labels[confident]


def balanced_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean, over the clusters among the labels, of their images' mean cross-entropy: a scalar.

    Args:
        logits: float (B, K), of strong views, B at least 1.
        labels: int64 (B,).
    """
    counts = labels.bincount(minlength=logits.shape[1])
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses / counts[labels]).sum() / (counts > 0).sum()


def strong_view(images: Tensor, fill: Tensor) -> Tensor:
    """Return a strong view of float images (B, C, H, W) in [0, 1]: crop, turn, colour, a hole.

    Never mirrored: that changes what a digit or a letter is.
    """
    images = views.random_crop(images, area=(0.8, 1.0), flip=0.0, degrees=15.0)
    images = views.random_color(images, 0.5, 0.5, 0.5, 0.1)
    return torch.where(random_blocks(images, share=0.1, count=1), fill, images)


def self_train(
    encoder: Encoder, clusters: Clusters, table: ImageTable, parameters: SelfLabel, seed: int
) -> tuple[Encoder, Clusters, dict[str, Any]]:
    """Train a copy of the encoder and its clusters on the train images' own confident answers.

    A batch's labels are the answers of the net as it is then, in eval mode, to the plain images. Images
    without a confident answer are left out, and a batch of such images is passed over.

    Returns:
        The encoder on its device, in eval mode; the clusters; steps, and the share of confident images at the
        last one.
    """
    device = encoder.mean.device
    steps, rate = parameters.self_training_steps, parameters.self_training_rate
    share = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ClusterNet(copy.deepcopy(encoder), clusters).to(device)
        net.to(memory_format=torch.channels_last)
        optimizer = build_optimizer(net, Training(learning_rate=rate, weight_decay=WEIGHT_DECAY))
        for step, (batch, _) in enumerate(Batches(table, BATCH, seed).read(0, steps, device)):
            images = views.to_float(batch).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                confident, labels = confident_labels(net.eval()(images), parameters.confidence)
            share = len(labels) / len(images)
            progress.report(step + 1, steps, "steps, self-training", confident=share)
            if len(labels) < 2:  # batch norm needs two
                continue
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate_share(step, steps, "cosine", WARMUP_SHARE, 0)
            logits = net.train()(strong_view(images[confident], encoder.mean))
            loss = balanced_cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.encoder.eval(), net.clusters(), {"steps": steps, "confident": share}
