"""Every method's training step over its pure nets, and SimCLR's against lightly as its documentation shows it.

    python benchmarks/training.py [--methods a,b] [--encoder resnet18] [--batch-size 1024] [--rounds 15] [--compile]

Fashion-MNIST 28 x 28, the method's net and batch size, one thread. What is compared takes turns in one process; figures
are medians of CPU time, on a GPU of wall time. lightly: `SimCLRTransform` on PIL images in a DataLoader (with a
GPU one worker a core, else none), `NTXentLoss`, SGD: the example of its documentation, with our encoder and head in
it; that example leaves memory format and compilation at PyTorch's defaults.
A method's step and its nets are compared in float32; beside them stands the step with its nets in bfloat16, as
`training.precision` chooses by itself where the processor has instructions for it. SimCLR's step is measured
against lightly's, which is float32, in both.
Bars: step over nets at most 1.10 for SimCLR, 1.15 for the others; images/s over lightly's at least 2.2, views alone 20.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightly.loss import NTXentLoss
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from unlabeled.data.batches import Batches, evenly_spread, pixel_statistics
from unlabeled.data.ingest import ingest
from unlabeled.data.sources import FASHION_MNIST, data_digest
from unlabeled.data.table import ImageTable
from unlabeled.features import accelerator
from unlabeled.nets.discriminator import judge_frozen
from unlabeled.nets.encoder import Encoder
from unlabeled.parameters import Encoder as EncoderParameters
from unlabeled.parameters import Ingest, Training
from unlabeled.signals import all_signals, encoder_section, find_signal
from unlabeled.signals.contrast.simclr import SimCLR
from unlabeled.signals.signal import Signal
from unlabeled.training.loop import step_seed
from unlabeled.training.optimizers import build_optimizer
from unlabeled.training.precision import bfloat16_nets, computes_in_bfloat16
from unlabeled.workspace import cache_folder

BATCH = 256


class PilImages(Dataset):
    """Images of a table as lightly's datasets give them: PIL, transformed one by one."""

    def __init__(self, images: np.ndarray, transform: Callable[[Image.Image], Any]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.images[index, 0]))


def build(method: str, table: ImageTable, net: EncoderParameters) -> Any:
    """Return a method as `pretrain` makes it, in PyTorch's own memory format."""
    kind, encoder = find_signal(method), encoder_section({"name": method}, net)
    mean, std = pixel_statistics(table)
    torch.manual_seed(0)
    signal = kind(Encoder(**encoder.model_dump(), image_shape=table.image_shape, mean=mean, std=std))
    train = table.indices("train")
    signal.prepare(torch.from_numpy(table.images(evenly_spread(train, 2000))), len(train))
    return signal


def section(method: str, batch_size: int = 0) -> Training:
    """Return a method's training section, its own defaults in it; 0: its own batch size."""
    given = {"batch_size": batch_size} if batch_size else {}
    return Training(**{**find_signal(method).training_defaults, **given})


def prepare(signal: Any, compiled: bool) -> Any:
    """Return a signal as the training loop makes it ready."""
    signal.to(accelerator(), memory_format=torch.channels_last)
    if compiled:
        for net in signal.children():
            net.compile()
    return signal


def training_step(signal: Signal, table: ImageTable, training: Training) -> Callable[[], None]:
    """Return the loop's step: read, views, forward, loss, backward, optimizer."""
    optimizer = build_optimizer(signal, training)
    images = Batches(table, training.batch_size, 0).read(0, 10**6, accelerator())
    counter = itertools.count()

    def step() -> None:
        torch.manual_seed(step_seed(0, next(counter)))
        optimizer.zero_grad()
        loss, _ = signal(*next(images))
        loss.backward()
        if training.gradient_clip:
            nn.utils.clip_grad_norm_(signal.parameters(), training.gradient_clip)
        optimizer.step()
        signal.after_step()

    return step


def pure_nets(signal: Signal, images: Tensor, indices: Tensor) -> Callable[[], None]:
    """Return forward and backward of a step's nets alone, each on the input that the step gave it.

    A net is every outermost module that the loss calls; what the loss does between two nets is left out. A net that
    the loss judges by frozen weights is frozen here too, and has no gradient of its weights.
    """
    calls: list[tuple[Callable[..., Any], tuple[Any, ...], bool]] = []
    call, depth = nn.Module.__call__, 0

    def noting(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        nonlocal depth
        if depth == 1 and not keywords:
            # `judge_frozen` has put weights without a gradient in their place.
            frozen = not any(weight.requires_grad for weight in module.parameters())
            net = partial(judge_frozen, module) if frozen else module
            calls.append((net, arguments, torch.is_grad_enabled()))
        depth += 1
        try:
            return call(module, *arguments, **keywords)
        finally:
            depth -= 1

    nn.Module.__call__ = noting  # type: ignore[method-assign]
    try:
        signal(images, indices)
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]
    ready = [
        (
            net,
            [a.detach().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in given],
            grad,
        )
        for net, given, grad in calls
    ]

    def step() -> None:
        signal.zero_grad()
        for net, arguments, grad in ready:
            for argument in arguments:
                if torch.is_tensor(argument):
                    argument.grad = None
            with torch.set_grad_enabled(grad):
                outputs = net(*arguments)
            tensors = [outputs] if torch.is_tensor(outputs) else list(outputs)
            moving = [output for output in tensors if output.requires_grad]
            if moving:
                torch.autograd.backward(moving, [torch.ones_like(output) for output in moving])

    return step


def lightly_step(signal: SimCLR, table: ImageTable) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return lightly's step, and its views alone."""
    mean, std = pixel_statistics(table)
    transform = SimCLRTransform(input_size=table.image_shape[1], normalize={"mean": [mean], "std": [std]})
    dataset = PilImages(table.images(table.indices("train")[: 40 * BATCH]), transform)
    device = accelerator()
    workers = 0 if device.type == "cpu" else len(os.sched_getaffinity(0))
    loader = DataLoader(
        dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    model = nn.Sequential(signal.encoder, signal.projector).to(device)
    criterion, optimizer = NTXentLoss(), torch.optim.SGD(model.parameters(), lr=0.06)

    def step() -> None:
        x0, x1 = (view.to(device) for view in next(batches))
        loss = criterion(model(x0), model(x1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: next(batches)


def clock() -> float:
    """Return CPU seconds; with a GPU wall seconds, once it has done its work."""
    if accelerator().type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def medians(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each, run in turns after two warm-up calls."""
    for run in contestants.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            started = clock()
            run()
            times[name].append(1000 * (clock() - started))
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def measure_methods(
    methods: list[str],
    table: ImageTable,
    net: EncoderParameters,
    batch_size: int,
    rounds: int,
    compiled: bool,
) -> dict[str, dict[str, float]]:
    """Return each method's step and nets in milliseconds, and their ratio."""
    rows = {}
    for method in methods:
        signal = prepare(build(method, table, net), compiled)
        training = section(method, batch_size)
        batch = training.batch_size
        images = torch.from_numpy(table.images(np.arange(batch))).to(accelerator())
        nets = pure_nets(signal, images, torch.arange(batch, device=images.device))
        contestants = {"step": training_step(signal, table, training), "nets": nets}
        with ExitStack() as stack:
            if computes_in_bfloat16(accelerator()):
                rounded = prepare(build(method, table, net), compiled)
                stack.enter_context(bfloat16_nets(rounded, accelerator()))
                contestants["bfloat16"] = training_step(rounded, table, training)
            found = medians(contestants, rounds)
        rows[method] = {**found, "batch": batch, "step_over_nets": round(found["step"] / found["nets"], 3)}
    return rows


def measure_lightly(table: ImageTable, rounds: int, compiled: bool) -> dict[str, Any]:
    """Return SimCLR's and lightly's step and views in milliseconds, and their ratios."""
    net = EncoderParameters()
    simclr, rounded = (prepare(build("simclr", table, net), compiled) for _ in range(2))
    images = torch.from_numpy(table.images(np.arange(BATCH))).to(accelerator())
    lightly, lightly_views = lightly_step(build("simclr", table, net), table)
    with bfloat16_nets(rounded, accelerator()):
        milliseconds = medians(
            {
                "simclr_step": training_step(simclr, table, section("simclr")),
                "simclr_step_bfloat16": training_step(rounded, table, section("simclr")),
                "simclr_views": lambda: simclr.view(images.repeat(2, 1, 1, 1)),
                "lightly_step": lightly,
                "lightly_views": lightly_views,
            },
            rounds,
        )

    def over_lightly(step: str, theirs: str = "lightly_step") -> float:
        return round(milliseconds[theirs] / milliseconds[step], 2)

    return {
        "milliseconds": milliseconds,
        "images_per_second_over_lightly": over_lightly("simclr_step"),
        "images_per_second_over_lightly_bfloat16": over_lightly("simclr_step_bfloat16"),
        "views_over_lightly": over_lightly("simclr_views", "lightly_views"),
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", help="names, separated by commas; default: all that take gray images")
    parser.add_argument(
        "--encoder", default="small_resnet", help="net of the methods that have none of their own"
    )
    parser.add_argument("--batch-size", type=int, default=0, help="0: the method's own")
    parser.add_argument("--rounds", type=int, default=15, help="measured calls of each")
    parser.add_argument("--compile", action="store_true", help="torch.compile our nets")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gray = [name for name, signal in all_signals().items() if not signal.needs_color]
    methods = arguments.methods.split(",") if arguments.methods else gray
    with tempfile.TemporaryDirectory() as room:
        digest = data_digest(FASHION_MNIST, cache_folder())
        ingest(FASHION_MNIST, digest, Path(room, "table"), Path(room, "raw"), Ingest())
        table = ImageTable(Path(room, "table"))
        net, own = EncoderParameters(name=arguments.encoder), not arguments.batch_size
        rows = measure_methods(methods, table, net, arguments.batch_size, arguments.rounds, arguments.compile)
        compared = own and arguments.encoder == "small_resnet" and "simclr" in methods
        lightly = measure_lightly(table, arguments.rounds, arguments.compile) if compared else {}
    if arguments.json:
        print(json.dumps({"compiled": arguments.compile, "methods": rows, "lightly": lightly}, indent=2))
        return
    print(f"{'':22}{'batch':>6}{'step ms':>10}{'nets ms':>10}{'step / nets':>13}{'bfloat16 ms':>13}")
    for method, row in rows.items():
        cells = [row.get(name, "") for name in ("batch", "step", "nets", "step_over_nets", "bfloat16")]
        print(f"{method:22}{cells[0]:>6}{cells[1]:>10}{cells[2]:>10}{cells[3]:>13}{cells[4]:>13}")
    for name, value in {**lightly.pop("milliseconds", {}), **lightly}.items():
        print(f"{name:44}{value:10}")


if __name__ == "__main__":
    main()
