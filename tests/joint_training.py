"""A training without chance, for the comparison of two processes with one; and one whose second process dies."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled import progress
from unlabeled.data.batches import Batches
from unlabeled.data.table import ImageTable
from unlabeled.distributed import processes, rank
from unlabeled.parameters import Training
from unlabeled.signals.signal import Signal
from unlabeled.training import pretrain
from unlabeled.training.loop import train

DIES_AT = 7


class Reconstruction(Signal):
    """Images from a code of eight numbers: no view is drawn, and no statistic of the batch is taken."""

    def __init__(self, pixels: int) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(pixels, 8), nn.Tanh()))
        self.decoder = nn.Linear(8, pixels)

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = images.float() / 255
        return F.mse_loss(self.decoder(self.encoder(x)), x.flatten(1)), {"brightness": x.mean()}


def curve(table: Path, checkpoints: Path, batch_size: int = 32) -> tuple[list[dict[str, float]], Tensor]:
    """Train on `batch_size` images a step over all processes; return every step's values, and the weights."""
    images = ImageTable(table)
    torch.manual_seed(0)
    reconstruction = Reconstruction(64)
    training = Training(steps=15, log_every=1, gradient_clip=1, compile="no", precision="float32")
    batches = Batches(images, batch_size, 0, rank(), processes())
    metrics, _ = train(reconstruction, batches, training, 0, torch.device("cpu"), checkpoints)
    return metrics, nn.utils.parameters_to_vector(reconstruction.parameters()).detach()


if __name__ == "__main__":

    def report(done: int, *_: object, **__: object) -> None:
        if done == DIES_AT and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    progress.report = report
    sys.exit(pretrain.main())
