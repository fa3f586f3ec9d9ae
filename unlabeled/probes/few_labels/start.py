"""What a method begins with: an untrained net, a pretrained one under its linear probe, or one under its clusters."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from unlabeled.errors import InputError
from unlabeled.features import accelerator, extract
from unlabeled.nets.encoder import Encoder, load_encoder
from unlabeled.probes.classifier import Classifier
from unlabeled.probes.few_labels.task import Task
from unlabeled.probes.linear import LinearProbe, fit_linear_probe
from unlabeled.probes.subsets import hold_out
from unlabeled.selflabel.cluster import LABELS
from unlabeled.selflabel.clusters import Clusters, load_clustered_encoder
from unlabeled.selflabel.metrics import contingency, hungarian_map


@dataclass(frozen=True)
class Start:
    """Makes fresh classifiers, the same at every call.

    Attributes:
        encoder: `Encoder.settings` of the one backbone.
        seed: of an untrained net.
        held_out_share: share of the labels that chooses the probe's penalty.
        model: folder of the pretrained model, where the method has one.
        clusters: folder of its self-labels, where the method has them.
    """

    encoder: dict[str, Any]
    seed: int
    held_out_share: float
    model: Path | None = None
    clusters: Path | None = None

    def __call__(self, task: Task) -> Classifier:
        """Return a classifier for the task: from the clusters if there are any, else the model, else untrained."""
        if self.clusters:
            return self.clustered(task)
        if self.model:
            return self.probed(load_encoder(self.model), task)
        return Classifier.untrained(self.encoder, task.classes, self.seed).to(accelerator())

    def probed(self, encoder: Encoder, task: Task) -> Classifier:
        """Return an encoder under a linear probe of the task's labels."""
        encoder = encoder.to(accelerator())
        features = extract(encoder, task.table, task.labelled)
        fit, held_out = hold_out(task.targets, self.held_out_share, self.seed)
        probe = fit_linear_probe(features, task.targets, task.classes, fit, held_out)
        return Classifier.from_probe(encoder, probe).to(accelerator())

    def clustered(self, task: Task) -> Classifier:
        """Return the clusters' encoder and head, each cluster under the name of the class that the labels match to it.

        One to one, by the Hungarian method: with more clusters than classes the surplus is dropped, with fewer
        some classes are never predicted.
        """
        encoder, clusters = self._load_clusters()
        assigned = clusters.assign(extract(encoder, task.table, task.labelled))
        counts = contingency(assigned, task.targets, len(clusters.bias), task.classes)
        names = hungarian_map(counts)
        # The head of a class without a cluster is far below every other.
        weight = np.zeros((task.classes, encoder.feature_dim), np.float32)
        bias = np.full(task.classes, -1e4, np.float32)
        head = clusters.weight / clusters.scale
        matched = names >= 0
        weight[names[matched]] = head[matched]
        bias[names[matched]] = (clusters.bias - head @ clusters.mean)[matched]
        return Classifier.from_probe(encoder, LinearProbe(weight, bias, 0.0)).to(accelerator())

    def cluster_task(self, task: Task) -> Task:
        """Return the task of telling the clusters apart: every train image has its cluster as its label.

        Raises:
            InputError: the clusters are of other images.
        """
        assert self.clusters
        _, clusters = self._load_clusters()
        assigned = pd.read_parquet(self.clusters / LABELS)
        if list(assigned["id"]) != list(task.table.rows["id"].iloc[task.unlabelled]):
            raise InputError(f"{self.clusters / LABELS} is of other images than {task.table.folder}")
        targets = assigned["cluster"].to_numpy(np.int64)
        return replace(task, labelled=task.unlabelled, targets=targets, classes=len(clusters.bias))

    def _load_clusters(self) -> tuple[Encoder, Clusters]:
        assert self.clusters and self.model
        encoder = load_clustered_encoder(self.clusters, self.model).to(accelerator())
        return encoder, Clusters.load(self.clusters)
