"""The label-efficiency table: methods by shares of the labels by draws, each cell a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from unlabeled import progress
from unlabeled.data.batches import pixel_statistics
from unlabeled.data.table import ImageTable
from unlabeled.digest import json_digest
from unlabeled.errors import InputError
from unlabeled.files import read_json, write_json
from unlabeled.parameters import Parameters, SelfLabel
from unlabeled.probes.few_labels.methods import find_method, fit_within_labels
from unlabeled.probes.few_labels.start import Start
from unlabeled.probes.few_labels.task import label_task
from unlabeled.selflabel.cluster import self_label
from unlabeled.training.pretrain import pretrain
from unlabeled.training.reproducible import reproducible


@dataclass(frozen=True)
class Comparison:
    """One backbone, one pool of images, the same labels for every method.

    What is found under `work` is not computed again, so a killed comparison goes on: pretrained models, their
    clusters and each cell of the table lie there under a digest of all that they depend on.

    Attributes:
        table: an image table. Its test labels score, and decide nothing.
        work: folder of what can be made again.
        parameters: resolved: threads counted, the settings in `pretrain` complete.
        code: digest of the code.
    """

    table: Path
    work: Path
    parameters: Parameters
    code: str

    def cells(self, name: str) -> list[dict[str, Any]]:
        """Return the cells of one method, for each share and draw.

        Raises:
            InputError: an unknown method, or a table without labels in train or in test.
        """
        few = self.parameters.few_labels
        cells = []
        for share in (0.0,) if find_method(name).without_labels else sorted(set(few.shares)):
            with progress.current_step(f"{name}, {share:.3g} of the labels"):
                progress.emit("start")
                found = [self.cell(name, share, draw) for draw in range(few.draws)]
                mean = float(np.mean([cell["top1"] for cell in found]))
                progress.report(few.draws, few.draws, "draws", top1=mean)
                progress.emit("end")
            cells += found
        return cells

    def cell(self, name: str, share: float, draw: int) -> dict[str, Any]:
        """Return what a method reaches on test with one draw of the labels.

        Returns:
            method, share (0: without labels), draw; labels, how many, and images, the sha256 of their ids;
            top1 and topk, accuracies; setting and held_out of `fit_within_labels`.
        """
        method, seed = find_method(name), self.parameters.seed + draw
        few = self.parameters.few_labels
        depends = [name, share, draw, few.model_dump(mode="json", exclude={"shares", "draws"}), self.backbone]
        if method.pretraining:
            depends.append(self._pretraining(method.pretraining))
        if method.clusters:
            depends.append(self.scan.model_dump(mode="json"))
        path = self.work / "cells" / f"{name}-{share:g}-{draw}-{self._key(depends)}.json"
        if path.exists():
            return read_json(path)

        truth = self.images.labels(self.test)
        # Without labels, those of all train images name the clusters, for the score alone.
        task = label_task(self.images, share or 1.0, draw)
        start = Start(
            self.backbone,
            seed,
            few.held_out_share,
            self.model(method.pretraining) if method.pretraining else None,
            self.clusters(method.pretraining, draw) if method.clusters else None,
        )
        with reproducible(self.parameters.training.threads):
            predict, fitted = fit_within_labels(method, start, task, few, seed)
            probabilities = predict(self.images, self.test)
        k = top_k(task.classes)
        found = {
            "method": name,
            "share": share,
            "draw": draw,
            "labels": len(task.labelled) if share else 0,
            "images": task.digest if share else None,
            "top1": float((probabilities.argmax(1) == truth).mean()),
            "topk": float((np.argsort(-probabilities, 1)[:, :k] == truth[:, None]).any(1).mean()),
            **fitted,
        }
        write_json(path, found)
        return found

    def model(self, signal: str) -> Path:
        """Return the folder of the encoder that a learning signal pretrains on the train images, without labels."""
        settings = self._pretraining(signal)
        key = self._key(settings)
        folder = self.work / "models" / f"{signal}-{key}"
        if not folder.exists():
            parameters = self.parameters
            method = {"name": signal, **settings["method"]}
            checkpoints = self.work / "checkpoints" / key
            pretrain(
                self.table,
                folder,
                method,
                parameters.encoder,
                parameters.training,
                parameters.seed,
                checkpoints,
            )
        return folder

    def clusters(self, signal: str, draw: int) -> Path:
        """Return the folder of that encoder's SCAN clusters, found without labels; each draw has its own seed."""
        key = self._key([draw, self._pretraining(signal), self.scan.model_dump(mode="json")])
        folder = self.work / "clusters" / f"{signal}-{draw}-{key}"
        if not folder.exists():
            with reproducible(self.parameters.training.threads):
                self_label(self.model(signal), self.table, folder, self.scan, self.parameters.seed + draw)
        return folder

    @property
    def scan(self) -> SelfLabel:
        """The section `self_label`, with SCAN as its method."""
        return self.parameters.self_label.model_copy(update={"method": "scan"})

    @cached_property
    def images(self) -> ImageTable:
        return ImageTable(self.table)

    @cached_property
    def test(self) -> np.ndarray:
        """Table positions of the test images with a label, int64.

        Raises:
            InputError: there is none.
        """
        test = self.images.indices("test")
        test = test[self.images.labels(test) >= 0]
        if not len(test):
            raise InputError(
                f"{self.images.folder} has no label in test, and scores need them: give images in class folders"
            )
        return test

    @cached_property
    def backbone(self) -> dict[str, Any]:
        """`Encoder.settings` of every method's net."""
        mean, std = pixel_statistics(self.images)
        net = self.parameters.encoder.model_dump()
        return {**net, "image_shape": list(self.images.image_shape), "mean": mean, "std": std}

    def _pretraining(self, signal: str) -> dict[str, Any]:
        parameters = self.parameters
        return {
            "signal": signal,
            "method": parameters.pretrain.get(signal, {}),
            "encoder": parameters.encoder.model_dump(mode="json"),
            "training": parameters.training.model_dump(mode="json"),
        }

    def _key(self, depends: Any) -> str:
        common = [
            self.images.summary["digest"],
            self.code,
            self.parameters.seed,
            self.parameters.training.threads,
        ]
        return json_digest([common, depends])[:16]


def top_k(classes: int) -> int:
    """Return the k of the second accuracy: 5, or 2 with fewer than 20 classes."""
    return 5 if classes >= 20 else 2


def summarise(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the table, in the order of the cells: mean and standard deviation over draws, by share.

    The deviation is that of a sample; of a single draw it is None.
    """

    def over_draws(values: list[float]) -> dict[str, float | None]:
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return {"mean": float(np.mean(values)), "std": std}

    rows: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for cell in cells:
        rows.setdefault(cell["method"], {}).setdefault(cell["share"], []).append(cell)
    return [
        {
            "method": name,
            "title": find_method(name).title,
            "does": find_method(name).does,
            "shares": [
                {
                    "share": share,
                    "labels": found[0]["labels"],
                    "draws": len(found),
                    "top1": over_draws([cell["top1"] for cell in found]),
                    "topk": over_draws([cell["topk"] for cell in found]),
                }
                for share, found in sorted(shares.items())
            ],
        }
        for name, shares in rows.items()
    ]
