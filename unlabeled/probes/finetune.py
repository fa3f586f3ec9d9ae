"""The finetune step: classifiers from few and from all labels, and what the pretraining is worth to them."""

import copy
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save

from unlabeled import progress
from unlabeled.data.table import ImageTable
from unlabeled.errors import InputError
from unlabeled.features import accelerator, extract
from unlabeled.files import atomic_path, write_bytes, write_json
from unlabeled.nets.encoder import CONFIG, MODEL, Encoder, load_encoder
from unlabeled.parameters import Finetuning
from unlabeled.probes.classifier import Classifier, train_classifier
from unlabeled.probes.evaluate import confusion
from unlabeled.probes.linear import fit_linear_probe
from unlabeled.probes.subsets import hold_out, label_subset
from unlabeled.selflabel.cluster import LABELS
from unlabeled.selflabel.clusters import Clusters, load_clustered_encoder
from unlabeled.training.reproducible import reproducible

METRICS, EFFICIENCY, CONFUSION = "metrics.jsonl", "efficiency.json", "confusion.json"
MOST_HELD_OUT = 5_000
LOG_EVERY = 10


@dataclass(frozen=True)
class Part:
    """Images with targets: table positions int64 (N,), frozen features float32 (N, D), targets int64 (N,)."""

    indices: np.ndarray
    features: np.ndarray
    targets: np.ndarray

    def take(self, positions: np.ndarray) -> "Part":
        """Return the images at `positions`."""
        return Part(self.indices[positions], self.features[positions], self.targets[positions])


def finetune(
    model: Path, labels: Path, table: Path, output: Path, parameters: Finetuning, seed: int
) -> dict[str, Any]:
    """Train a classifier on each share of the labels, and the same net from scratch beside it.

    The classifier of the last share is written. Where train has fewer than two classes, clusters take the
    place of labels: one classifier of all train images, nothing from scratch.

    Args:
        model: folder of a pretrained model.
        labels: folder of its self-labels.
        output: receives model.safetensors (encoder.*, head.weight, head.bias); config.json (encoder, classes,
            target: `labels` or `clusters`, share, kept: `probe` or `finetuned`); metrics.jsonl (share, start:
            `pretrained` or `scratch`, step, loss, learning_rate); efficiency.json (the rows of
            `finetune_share`; of clusters none); confusion.json (classes, matrix of counts on test: rows are
            targets), where test has targets.

    Returns:
        target, rows, and `seconds`. For clusters an accuracy is the agreement with the clusters.

    Raises:
        InputError: an input is no artifact of its kind, or there are neither two classes nor two clusters.
    """
    started = time.perf_counter()
    images, encoder = ImageTable(table), load_encoder(model).to(accelerator())
    train, test = images.indices("train"), images.indices("test")
    targets, test_targets = images.labels(train), images.labels(test)
    target, classes, shares = "labels", images.classes, parameters.label_shares
    if len(np.unique(targets[targets >= 0])) < 2:
        target, shares = "clusters", (1.0,)
        classes, targets, test_targets = _cluster_targets(Path(labels), Path(model), images, train, test)

    def part(indices: np.ndarray, targets: np.ndarray) -> Part:
        indices, targets = indices[targets >= 0], targets[targets >= 0]
        return Part(indices, extract(encoder, images, indices), targets)

    training, testing = part(train, targets), part(test, test_targets)
    rows, metrics = [], []
    with reproducible(torch.get_num_threads()):
        for share in shares:
            subset = training.take(label_subset(training.targets, share, seed))
            classifier, row, lines = finetune_share(
                encoder, images, subset, testing, len(classes), parameters, seed, target == "labels"
            )
            rows.append({"share": share, **row})
            metrics += [{"share": share, **line} for line in lines]

    weights = {name: weight.cpu().contiguous() for name, weight in classifier.state_dict().items()}
    described = {"classes": classes, "target": target, "share": share, "kept": row["kept"]}
    with atomic_path(output) as folder:
        write_bytes(folder / MODEL, save(weights))
        write_json(folder / CONFIG, {"encoder": encoder.settings, **described})
        write_bytes(folder / METRICS, "".join(json.dumps(line) + "\n" for line in metrics).encode())
        write_json(folder / EFFICIENCY, {"rows": rows if target == "labels" else []})
        if len(testing.indices):
            matrix = confusion(testing.targets, classifier.predict(images, testing.indices), len(classes))
            write_json(folder / CONFUSION, {"classes": classes, "matrix": matrix.tolist()})
    return {"target": target, "rows": rows, "seconds": time.perf_counter() - started}


def finetune_share(
    encoder: Encoder,
    table: ImageTable,
    subset: Part,
    test: Part,
    classes: int,
    parameters: Finetuning,
    seed: int,
    from_scratch: bool = True,
) -> tuple[Classifier, dict[str, Any], list[dict[str, Any]]]:
    """Train on one subset of the labels: a linear probe, the whole net started from it, and one from scratch.

    A part of the subset's labels is held out of all three. On it the fine-tuned net must beat its own probe
    by more than one standard error; otherwise the probe is kept, so that fine-tuning does not lose to it.

    Returns:
        The kept classifier; a row; the lines of metrics.jsonl. The row: labels, their number; images, sha256
        of their ids; test accuracies (None without test targets) of probe, finetuned (whichever is kept) and
        scratch; kept; held_out, accuracies of probe and fine-tuned net there (None if nothing is held out).
    """
    share = min(parameters.held_out_share, MOST_HELD_OUT / len(subset.indices))
    fit, held_out = hold_out(subset.targets, share, seed)
    fitted, unseen = subset.take(fit), subset.take(held_out)
    metrics: list[dict[str, Any]] = []

    def train(classifier: Classifier, start: str) -> Classifier:
        classifier.to(accelerator())
        steps = train_classifier(classifier, table, fitted.indices, fitted.targets, parameters, seed)
        for step, (loss, rate) in enumerate(steps, 1):
            values = {"loss": loss, "learning_rate": rate}
            progress.report(step, parameters.steps, f"steps, {len(subset.indices):,} labels", **values)
            if step % LOG_EVERY == 0 or step == parameters.steps:
                metrics.append({"start": start, "step": step, **values})
        return classifier

    probe = fit_linear_probe(subset.features, subset.targets, classes, fit, held_out, refit=False)
    tuned = train(Classifier.from_probe(copy.deepcopy(encoder), probe), "pretrained")
    probe_right = probe.predict(unseen.features) == unseen.targets
    tuned_right = tuned.predict(table, unseen.indices) == unseen.targets
    probe_test = _accuracy(probe.predict(test.features) == test.targets)
    row: dict[str, Any] = {
        "labels": len(subset.indices),
        "images": _digest(table, subset.indices),
        "probe": probe_test,
        "finetuned": probe_test,
        "scratch": None,
        "kept": "probe",
        "held_out": {"probe": _accuracy(probe_right), "finetuned": _accuracy(tuned_right)},
    }
    if from_scratch:
        scratch = train(Classifier.untrained(encoder.settings, classes, seed), "scratch")
        row["scratch"] = _accuracy(scratch.predict(table, test.indices) == test.targets)
    if not clearly_better(tuned_right, probe_right):
        return Classifier.from_probe(encoder, probe).to(accelerator()), row, metrics
    row |= {"kept": "finetuned", "finetuned": _accuracy(tuned.predict(table, test.indices) == test.targets)}
    return tuned, row, metrics


def clearly_better(new: np.ndarray, old: np.ndarray) -> bool:
    """Tell whether `new` is right more often than `old`, by more than one standard error of the difference.

    Args:
        new, old: bool (N,), which of the same images each got right.
    """
    gain = new.astype(float) - old
    return len(gain) > 0 and bool(gain.mean() > gain.std() / math.sqrt(len(gain)))


def _cluster_targets(
    labels: Path, model: Path, table: ImageTable, train: np.ndarray, test: np.ndarray
) -> tuple[list[str], np.ndarray, np.ndarray]:
    clusters = Clusters.load(labels)
    names = [f"cluster {number}" for number in range(len(clusters.bias))]
    assigned = pd.read_parquet(labels / LABELS).set_index("id")["cluster"]
    targets = assigned.reindex(table.rows["id"].iloc[train]).to_numpy()
    if not np.isfinite(targets).all():
        raise InputError(f"{labels / LABELS} lacks images of {table.folder}; it was made from another table")
    if len(np.unique(targets)) < 2:
        raise InputError(f"{table.folder} has fewer than two classes and {labels} fewer than two clusters")
    encoder = load_clustered_encoder(labels, model).to(accelerator())
    return names, targets.astype(np.int64), clusters.assign(extract(encoder, table, test))


def _accuracy(right: np.ndarray) -> float | None:
    return float(right.mean()) if len(right) else None


def _digest(table: ImageTable, indices: np.ndarray) -> str:
    ids = table.rows["id"].iloc[indices].astype(str)
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()
