"""Pseudo-Label: the net's own confident predictions become labels (Lee 2013)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled.parameters import FewLabels
from unlabeled.probes.classifier import Classifier
from unlabeled.probes.few_labels.supervised import Supervised
from unlabeled.probes.few_labels.task import Task
from unlabeled.probes.few_labels.training import Batch, Views, class_probabilities, train_semi_supervised


@dataclass(frozen=True)
class PseudoLabel:
    """Cross-entropy on the labelled images, and as much on the pseudo-labelled ones.

    Attributes:
        pseudo_labels: int64 (N,), the class of each of `Task.unlabelled`.
    """

    views: Views
    pseudo_labels: Tensor

    def __call__(self, classifier: Classifier, batch: Batch) -> Tensor:
        logits = classifier(self.views.weak(torch.cat((batch.images, batch.unlabelled))))
        labelled, unlabelled = logits.split((len(batch.images), len(batch.unlabelled)))
        guesses = self.pseudo_labels[batch.numbers]
        return F.cross_entropy(labelled, batch.targets) + F.cross_entropy(unlabelled, guesses)


def train_pseudo_label(
    start: Callable[[Task], Classifier],
    task: Task,
    views: Views,
    parameters: FewLabels,
    learning_rate: float,
    seed: int,
) -> Classifier:
    """Train on the labels, label the pool where p > threshold, train anew on both; `parameters.rounds` times.

    Args:
        start: makes the untrained classifier, the same at every call.
    """
    classifier = train_semi_supervised(start(task), task, Supervised(views), parameters, learning_rate, seed)
    for _ in range(parameters.rounds):
        confident, guesses = confident_predictions(classifier, task, parameters.threshold)
        if not len(confident):
            break
        pool = replace(task, unlabelled=task.unlabelled[confident])
        loss = PseudoLabel(views, torch.from_numpy(guesses).to(classifier.head.weight.device))
        classifier = train_semi_supervised(start(task), pool, loss, parameters, learning_rate, seed)
    return classifier


def confident_predictions(
    classifier: Classifier, task: Task, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions in `task.unlabelled` with p > threshold, int64 (M,), and their classes, int64 (M,)."""
    probabilities = class_probabilities(classifier, task.table, task.unlabelled)
    confident = np.flatnonzero(probabilities.max(1) > threshold)
    return confident, probabilities[confident].argmax(1)
