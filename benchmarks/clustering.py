"""Images in clusters without labels: Fashion-MNIST, one thread, every seed from its own encoder on.

    python benchmarks/clustering.py [--seeds 5] [--steps 1000] [--self-training 200] [--json]

SimCLR is trained, clusters are found on the train images, and scored on the test images; the map from clusters
to classes is fitted on train. `choice / best`: accuracy of SCAN's consensus over that of its best head, which
only labels can tell. Times are CPU seconds of one core. Bars, of means over 5 seeds: accuracy at least 0.70,
its deviation at most 0.02, within 10 core-minutes, the encoder included; choice over best at least 0.97; mining
and heads at most 60 s.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unlabeled.data.ingest import ingest
from unlabeled.data.sources import FASHION_MNIST, data_digest
from unlabeled.data.table import ImageTable
from unlabeled.features import Standardisation, extract
from unlabeled.nets.encoder import Encoder, load_encoder
from unlabeled.parameters import Encoder as EncoderParameters
from unlabeled.parameters import Ingest, SelfLabel, Training
from unlabeled.selflabel.clusters import Clusters
from unlabeled.selflabel.consensus import consensus
from unlabeled.selflabel.kmeans import fit_kmeans
from unlabeled.selflabel.metrics import cluster_scores
from unlabeled.selflabel.scan import fit_heads
from unlabeled.selflabel.self_training import self_train
from unlabeled.training.pretrain import pretrain
from unlabeled.workspace import cache_folder

COLUMNS = ("seed", "k-means", "SCAN", "choice / best", "self-trained", "encoder s", "SCAN s", "minutes")
CLASSES = 10


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Return what a call returns, and its CPU seconds."""
    started = time.process_time()
    result = function(*arguments)
    return result, time.process_time() - started


def train(table: Path, model: Path, steps: int, seed: int) -> Encoder:
    """Pretrain SimCLR; return its encoder."""
    training = Training(steps=steps, threads=1, checkpoint_every=steps)
    with tempfile.TemporaryDirectory() as checkpoints:
        pretrain(table, model, {"name": "simclr"}, EncoderParameters(), training, seed, Path(checkpoints))
    return load_encoder(model)


def accuracy(clusters: Clusters, features: list[np.ndarray], labels: list[np.ndarray]) -> float:
    """Return the accuracy on test; the Hungarian map is fitted on train."""
    train, test = (clusters.assign(part) for part in features)
    return float(cluster_scores(train, labels[0], test, labels[1], CLASSES, CLASSES)["acc"])


def measure(table: Path, model: Path, steps: int, self_training: int, seed: int) -> dict[str, Any]:
    """Return the row of one seed."""
    images, parameters = ImageTable(table), SelfLabel(self_training_steps=self_training)
    splits = [images.indices("train"), images.indices("test")]
    labels = [images.labels(split) for split in splits]
    encoder, encoder_seconds = timed(train, table, model, steps, seed)
    train_features, extract_seconds = timed(extract, encoder, images, splits[0])
    features = [train_features, extract(encoder, images, splits[1])]
    standardise = Standardisation(train_features)
    z = standardise(train_features)

    def clusters(weight: np.ndarray, bias: np.ndarray) -> Clusters:
        return Clusters(standardise.mean, standardise.scale, weight, bias)

    weight, bias, _ = fit_kmeans(z, CLASSES, parameters, seed)
    kmeans = accuracy(clusters(weight, bias), features, labels)
    heads, scan_seconds = timed(fit_heads, z, CLASSES, parameters, seed)
    (weight, bias, _), consensus_seconds = timed(consensus, *heads)
    chosen = clusters(weight, bias)
    scan = accuracy(chosen, features, labels)
    best = max(accuracy(clusters(w, b), features, labels) for w, b in zip(heads[0], heads[1]))
    seconds = encoder_seconds + extract_seconds + scan_seconds + consensus_seconds
    self_trained = None
    if self_training:
        (encoder, learned, _), more = timed(self_train, encoder, chosen, images, parameters, seed)
        learned_features, again = timed(extract, encoder, images, splits[0])
        self_trained = accuracy(learned, [learned_features, extract(encoder, images, splits[1])], labels)
        seconds += more + again
    row = (seed, kmeans, scan, scan / best, self_trained, encoder_seconds, scan_seconds, seconds / 60)
    return dict(zip(COLUMNS, row, strict=True))


def line(row: dict[str, Any]) -> str:
    """Return a row as text."""
    cells = ("" if value is None else f"{value:.4g}" if column != "seed" else f"{value}"
             for column, value in row.items())  # fmt: skip
    return "".join(f"{cell:>14}" for cell in cells)


def main() -> None:
    """Print the figures, a row as soon as its seed is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs")
    parser.add_argument("--steps", type=int, default=1000, help="of SimCLR")
    parser.add_argument("--self-training", type=int, default=200, help="steps; 0: none")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as room:
        digest = data_digest(FASHION_MNIST, cache_folder())
        ingest(FASHION_MNIST, digest, Path(room, "table"), Path(room, "raw"), Ingest())
        if not arguments.json:
            print("".join(f"{column:>14}" for column in COLUMNS))
        for seed in range(arguments.seeds):
            model = Path(room, f"model-{seed}")
            rows.append(measure(Path(room, "table"), model, arguments.steps, arguments.self_training, seed))
            if not arguments.json:
                print(line(rows[-1]), flush=True)
    values = {column: [row[column] for row in rows if row[column] is not None] for column in COLUMNS[1:]}
    mean = {column: statistics.fmean(found) for column, found in values.items() if found}
    deviation = {column: statistics.pstdev(found) for column, found in values.items() if found}
    if arguments.json:
        print(json.dumps({"rows": rows, "mean": mean, "deviation": deviation}, indent=2))
        return
    for name, found in (("mean", mean), ("deviation", deviation)):
        print(line({"seed": name, **{column: found.get(column) for column in COLUMNS[1:]}}))


if __name__ == "__main__":
    main()
