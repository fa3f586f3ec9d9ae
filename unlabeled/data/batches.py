"""The train images of a table: in batches, and in numbers."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from unlabeled.data.table import ImageTable


class Batches:
    """The train images in batches, forever, in an order drawn anew from (seed, epoch) for each epoch.

    Only images and the column `split` are read: no label can reach the training. What an epoch has over its
    last full batch is left out (other images each time).

    Args:
        table: the images.
        batch_size: images per step over all processes; where the split has fewer, all of them are one batch.
        seed: of the order.
        rank, processes: this process's part: every `processes`-th image of each batch.
    """

    def __init__(
        self, table: ImageTable, batch_size: int, seed: int, rank: int = 0, processes: int = 1
    ) -> None:
        self._table, self._seed, self._rank, self._processes = table, seed, rank, processes
        self._indices = table.indices("train")
        # Every process has equally many images, or their gradients would not average to that of the whole
        # batch.
        self.batch_size = min(batch_size, len(self._indices)) // processes * processes
        self.per_epoch = len(self._indices) // self.batch_size if self.batch_size else 0
        self._epoch, self._order = -1, self._indices

    def indices(self, step: int) -> np.ndarray:
        """Return the table positions of this process's images at a step: a function of (seed, step) alone."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._indices)
            self._epoch = epoch
        batch = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        return batch[self._rank :: self._processes]

    def read(self, first: int, end: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of steps `first` to `end` - 1 on the device, reading one ahead.

        Returns:
            Images, uint8 (B, C, H, W), and their numbers among the train images, int64 (B,).
        """

        def load(step: int) -> tuple[Tensor, Tensor]:
            # Sorted: the disk is read forwards. The loss does not depend on the order within a batch.
            indices = np.sort(self.indices(step))
            images = torch.from_numpy(self._table.images(indices))
            numbers = torch.from_numpy(np.searchsorted(self._indices, indices))
            return (images.pin_memory(), numbers.pin_memory()) if device.type == "cuda" else (images, numbers)

        with ThreadPoolExecutor(1, "batches") as reader:
            ahead = reader.submit(load, first) if first < end else None
            for step in range(first, end):
                assert ahead is not None
                images, numbers = ahead.result()
                ahead = reader.submit(load, step + 1) if step + 1 < end else None
                yield images.to(device, non_blocking=True), numbers.to(device, non_blocking=True)


def pixel_statistics(table: ImageTable, sample: int = 10_000) -> tuple[float, float]:
    """Return mean and standard deviation of the train pixels (0 to 1), from `sample` evenly spread images."""
    chosen = evenly_spread(table.indices("train"), sample)
    counts = np.zeros(256, np.int64)
    for start in range(0, len(chosen), 500):
        counts += np.bincount(table.images(chosen[start : start + 500]).reshape(-1), minlength=256)
    values, shares = np.arange(256) / 255, counts / counts.sum()
    mean = float(shares @ values)
    return round(mean, 6), round(float(np.sqrt(shares @ (values - mean) ** 2)), 6)


def evenly_spread(indices: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` of the indices, the first and the last among them."""
    return indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(np.int64)]
