"""SimCLR's training step: over its pure net, and against lightly as its documentation shows it.

    python benchmarks/training.py [--rounds 15] [--compile] [--json]

Fashion-MNIST 28 x 28, batch 256, one thread. What is compared takes turns in one process; figures are medians
of CPU time. lightly: `SimCLRTransform` on PIL images in a DataLoader without workers, `NTXentLoss`, SGD: the
example of its documentation, with our encoder and head in it; that example leaves memory format and compilation
at PyTorch's defaults.
Bars: step over net at most 1.10, the autoencoder's 1.15; images/s over lightly's at least 2.2, views alone 20.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightly.loss import NTXentLoss
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from unlabeled.data.ingest import ingest
from unlabeled.data.sources import FASHION_MNIST, data_digest
from unlabeled.data.table import ImageTable
from unlabeled.nets.encoder import Encoder
from unlabeled.parameters import Encoder as EncoderParameters
from unlabeled.parameters import Ingest, Training
from unlabeled.signals.bottleneck.autoencoder import Autoencoder
from unlabeled.signals.contrast.simclr import SimCLR
from unlabeled.signals.signal import Signal
from unlabeled.training.batches import Batches, pixel_statistics
from unlabeled.training.loop import step_seed
from unlabeled.training.optimizers import build_optimizer
from unlabeled.views import to_float
from unlabeled.workspace import cache_folder

BATCH = 256
CPU = torch.device("cpu")


class PilImages(Dataset):
    """Images of a table as lightly's datasets give them: PIL, transformed one by one."""

    def __init__(self, images: np.ndarray, transform: Callable[[Image.Image], Any]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.images[index, 0]))


def build(kind: type[Signal], table: ImageTable) -> Any:
    """Return a method with the default encoder, in PyTorch's own memory format."""
    mean, std = pixel_statistics(table)
    torch.manual_seed(0)
    settings = EncoderParameters().model_dump()
    return kind(Encoder(**settings, image_shape=table.image_shape, mean=mean, std=std))


def prepare(signal: Any, compiled: bool) -> Any:
    """Return a signal as the training loop makes it ready."""
    signal.to(memory_format=torch.channels_last)
    if compiled:
        for net in signal.children():
            net.compile()
    return signal


def training_step(signal: Signal, table: ImageTable) -> Callable[[], None]:
    """Return the loop's step: read, views, forward, loss, backward, optimizer."""
    optimizer = build_optimizer(signal, Training())
    images = Batches(table, BATCH, 0).read(0, 10**6, CPU)
    counter = itertools.count()

    def step() -> None:
        torch.manual_seed(step_seed(0, next(counter)))
        optimizer.zero_grad()
        loss, _ = signal(*next(images))
        loss.backward()
        optimizer.step()
        signal.after_step()

    return step


def pure_net(nets: list[nn.Module], images: Tensor) -> Callable[[], None]:
    """Return forward and backward of the nets alone, one after the other, on images that are ready."""

    def step() -> None:
        for net in nets:
            net.zero_grad()
        output = images
        for net in nets:
            output = net(output)
        output.backward(torch.ones_like(output))

    return step


def lightly_step(signal: SimCLR, table: ImageTable) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return lightly's step, and its views alone."""
    mean, std = pixel_statistics(table)
    transform = SimCLRTransform(input_size=table.image_shape[1], normalize={"mean": [mean], "std": [std]})
    dataset = PilImages(table.images(table.indices("train")[: 40 * BATCH]), transform)
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=0)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    model = nn.Sequential(signal.encoder, signal.projector)
    criterion, optimizer = NTXentLoss(), torch.optim.SGD(model.parameters(), lr=0.06)

    def step() -> None:
        x0, x1 = next(batches)
        loss = criterion(model(x0), model(x1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: next(batches)


def medians(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median CPU milliseconds of each, run in turns after two warm-up calls."""
    for run in contestants.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            started = time.process_time()
            run()
            times[name].append(1000 * (time.process_time() - started))
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def measure(table: ImageTable, rounds: int, compiled: bool) -> dict[str, Any]:
    """Return milliseconds and ratios."""
    simclr = prepare(build(SimCLR, table), compiled)
    autoencoder = prepare(build(Autoencoder, table), compiled)
    images = torch.from_numpy(table.images(np.arange(BATCH)))
    lightly, lightly_views = lightly_step(build(SimCLR, table), table)
    milliseconds = medians(
        {
            "simclr_step": training_step(simclr, table),
            "simclr_net": pure_net(
                [simclr.encoder, simclr.projector], simclr.view(images.repeat(2, 1, 1, 1))
            ),
            "simclr_views": lambda: simclr.view(images.repeat(2, 1, 1, 1)),
            "autoencoder_step": training_step(autoencoder, table),
            "autoencoder_net": pure_net(
                [autoencoder.encoder, autoencoder.code, autoencoder.decoder], to_float(images)
            ),
            "lightly_step": lightly,
            "lightly_views": lightly_views,
        },
        rounds,
    )
    return {
        "milliseconds": milliseconds,
        "compiled": compiled,
        "simclr_step_over_net": round(milliseconds["simclr_step"] / milliseconds["simclr_net"], 3),
        "autoencoder_step_over_net": round(
            milliseconds["autoencoder_step"] / milliseconds["autoencoder_net"], 3
        ),
        "images_per_second": round(1000 * BATCH / milliseconds["simclr_step"]),
        "images_per_second_over_lightly": round(
            milliseconds["lightly_step"] / milliseconds["simclr_step"], 2
        ),
        "views_over_lightly": round(milliseconds["lightly_views"] / milliseconds["simclr_views"], 1),
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="measured calls of each")
    parser.add_argument("--compile", action="store_true", help="torch.compile our nets")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as room:
        digest = data_digest(FASHION_MNIST, cache_folder())
        ingest(FASHION_MNIST, digest, Path(room, "table"), Path(room, "raw"), Ingest())
        figures = measure(ImageTable(Path(room, "table")), arguments.rounds, arguments.compile)
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.pop("milliseconds").items():
        print(f"{name:36}{value:10} ms")
    for name, value in figures.items():
        print(f"{name:36}{value:10}")


if __name__ == "__main__":
    main()
