"""SimCLR's ablation of augmentations (Chen et al. 2020, figure 5): a small training and a probe for each cell."""

import tempfile
import time
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from unlabeled.data.batches import Batches, evenly_spread, pixel_statistics
from unlabeled.data.table import ImageTable
from unlabeled.errors import InputError
from unlabeled.features import accelerator, extract, random_encoder
from unlabeled.files import write_json
from unlabeled.nets.encoder import Encoder
from unlabeled.parameters import Section, Training, nearest
from unlabeled.probes.linear import fit_linear_probe
from unlabeled.probes.subsets import hold_out
from unlabeled.signals.contrast.simclr import SimCLR
from unlabeled.training.loop import train
from unlabeled.training.pretrain import assess
from unlabeled.training.reproducible import reproducible
from unlabeled.views import to_float
from unlabeled.views.transforms import TRANSFORMS

# Cells that are measured again where every cell has one seed, and how often: what tells the noise.
REPEATED_CELLS, REPEATS = 2, 2
HELD_OUT_SHARE = 0.1


class Ablation(Section):
    """How each cell is trained and probed: the same for all."""

    images: int = Field(8000, ge=20, description="images of each split, at most")
    steps: int = Field(400, ge=1, description="optimizer steps")
    batch_size: int = Field(128, ge=2, description="images per step")
    learning_rate: float = Field(3e-3, gt=0, description="peak learning rate of AdamW")
    temperature: float = Field(0.1, gt=0, description="of the softmax over similarities")
    width: int = Field(32, ge=4, le=1024, description="of the small ResNet")
    linear_iterations: int = Field(60, ge=1, description="L-BFGS iterations of the linear probe, at most")
    threads: int = Field(1, ge=1, description="CPU threads of a cell")


class Cell(Section):
    """One measurement: transforms in the order they are applied (none: the untrained net), and a seed."""

    transforms: tuple[str, ...] = Field(max_length=2)
    seed: int = Field(ge=0, lt=2**31)

    @property
    def name(self) -> str:
        return f"{'+'.join(self.transforms) or 'untrained'}/{self.seed}"


class OneBranch(SimCLR):
    """SimCLR with the studied transforms on one branch, nothing on the other.

    Both branches start from the same random crop of an image, as the crop that brings photographs to one size. Were
    they drawn apart, every cell would hold the crop as a transform already, and the paper's other ones alone (blur
    2.6 % of ImageNet) could hardly lie so far below its crop alone (33.1 %). Studied, the crop is a second one.
    """

    def __init__(self, encoder: Encoder, transforms: Sequence[str], temperature: float = 0.1) -> None:
        super().__init__(encoder, temperature, hidden_dim=256)
        self.transforms = [TRANSFORMS[name] for name in transforms]

    def two_views(self, images: Tensor) -> Tensor:
        cropped = TRANSFORMS["crop"](to_float(images))
        transformed = reduce(lambda view, transform: transform(view), self.transforms, cropped)
        return torch.cat((transformed, cropped))


class Part(ImageTable):
    """An image table cut down to a number of evenly spread images of each split."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(folder)
        self.count = count

    def indices(self, split: str) -> np.ndarray:
        return evenly_spread(super().indices(split), self.count)


def grid(transforms: Sequence[str], seeds: int, seed: int) -> list[Cell]:
    """Return the cells: the untrained net, every transform alone, every two in both orders, with each of `seeds` seeds.

    With one seed the first two trained cells are measured again with others, so that the noise is known.

    Raises:
        InputError: a transform is unknown or named twice, or there are fewer than two.
    """
    for name in transforms:
        if name not in TRANSFORMS:
            raise InputError(f"unknown transform '{name}'{nearest(name, list(TRANSFORMS))}")
    if len(set(transforms)) != len(transforms) or len(transforms) < 2:
        raise InputError(
            f"transforms {','.join(transforms) or '(none)'}: name two or more, each once, of {', '.join(TRANSFORMS)}"
        )
    studied = [
        (first,) if first == second else (first, second) for first in transforms for second in transforms
    ]
    cells = [Cell(transforms=names, seed=seed + n) for n in range(seeds) for names in [(), *studied]]
    repeated = studied[:REPEATED_CELLS] if seeds == 1 else []
    return cells + [
        Cell(transforms=names, seed=seed + n) for n in range(1, 1 + REPEATS) for names in repeated
    ]


def measure(table: Path, cell: Cell, parameters: Ablation, output: Path) -> dict[str, Any]:
    """Train one cell without labels and probe its frozen features; write the result as JSON to `output`.

    The same seed gives every cell the same initial weights, the same batches and the same first crops.

    Returns:
        What is written: transforms, seed, linear (accuracy of the linear probe on test), contrastive_accuracy (how
        often a view of a test image finds its partner) and chance (of that); the last two are None for the
        untrained net. And `seconds`, which is not written.

    Raises:
        InputError: the table has no labels in one of its splits, or too few images.
        CheckFailed: the training diverged.
    """
    started = time.perf_counter()
    images, device = Part(table, parameters.images), accelerator()
    known, known_test = (_labelled(images, split) for split in ("train", "test"))
    mean, std = pixel_statistics(images)
    net: dict[str, Any] = {"name": "small_resnet", "width": parameters.width, "pool": 2}
    net |= {"image_shape": images.image_shape, "mean": mean, "std": std}
    with reproducible(parameters.threads):
        aim: dict[str, float] = {}
        if cell.transforms:
            torch.manual_seed(cell.seed)
            signal = OneBranch(Encoder(**net), cell.transforms, parameters.temperature)
            _train(signal, images, parameters, cell.seed, device)
            torch.manual_seed(cell.seed)
            aim, _ = assess(signal, images, device)
            encoder = signal.encoder
        else:
            encoder = random_encoder(net, images, images.indices("train"), cell.seed, device)
        features, test_features = extract(encoder, images, known), extract(encoder, images, known_test)
    labels = images.labels(known)
    fit, held_out = hold_out(labels, HELD_OUT_SHARE, cell.seed)
    probe = fit_linear_probe(
        features, labels, len(images.classes), fit, held_out, parameters.linear_iterations
    )
    result = {
        "transforms": list(cell.transforms),
        "seed": cell.seed,
        "linear": float((probe.predict(test_features) == images.labels(known_test)).mean()),
        "contrastive_accuracy": aim.get("accuracy"),
        "chance": aim.get("chance"),
    }
    write_json(output, result)
    return {**result, "seconds": time.perf_counter() - started}


def _train(signal: OneBranch, images: Part, parameters: Ablation, seed: int, device: torch.device) -> None:
    batches = Batches(images, parameters.batch_size, seed)
    training = Training(
        steps=parameters.steps,
        batch_size=batches.batch_size,
        learning_rate=parameters.learning_rate,
        compile="no",
        checkpoint_every=parameters.steps,
    )
    # A cell takes less than a minute: it is done again rather than resumed.
    with tempfile.TemporaryDirectory() as scratch:
        train(signal, batches, training, seed, device, Path(scratch))


def _labelled(images: ImageTable, split: str) -> np.ndarray:
    indices = images.indices(split)
    indices = indices[images.labels(indices) >= 0]
    if len(np.unique(images.labels(indices))) < 2:
        raise InputError(
            f"the {split} split has labels of fewer than two classes; the ablation is scored by a linear probe, "
            "so give data with labels, as a folder per class"
        )
    return indices
