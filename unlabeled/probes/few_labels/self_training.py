"""Self-training on a pretrained encoder: several teachers label the pool together, and one net learns from them.

They err on different images: a linear head knows directions of the feature space, label spreading its
neighbourhoods, a fine-tuned net the pixels. Learning their mean is distillation (Hinton et al. 2015), as SimCLRv2
ends (Chen et al. 2020, Big Self-Supervised Models are Strong Semi-Supervised Learners). The student's features hold
the classes closer together than the encoder's: labels are spread once more there, for the answer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled.data.batches import evenly_spread
from unlabeled.data.table import ImageTable
from unlabeled.features import extract
from unlabeled.parameters import FewLabels
from unlabeled.probes.classifier import Classifier
from unlabeled.probes.few_labels.label_spreading import NeighbourGraph
from unlabeled.probes.few_labels.start import Start
from unlabeled.probes.few_labels.supervised import Supervised
from unlabeled.probes.few_labels.task import Task
from unlabeled.probes.few_labels.training import Batch, Views, class_probabilities, train_semi_supervised

POOL = 20_000


@dataclass(frozen=True)
class Distillation:
    """Cross-entropy on the labelled images + cross-entropy to the teachers on strong views of the pool.

    Attributes:
        teachers: float (N, C), p(class) of each of the pool.
    """

    views: Views
    teachers: Tensor

    def __call__(self, classifier: Classifier, batch: Batch) -> Tensor:
        both = torch.cat((self.views.weak(batch.images), self.views.strong(batch.unlabelled)))
        labelled, unlabelled = classifier(both).split((len(batch.images), len(batch.unlabelled)))
        taught = F.cross_entropy(unlabelled, self.teachers[batch.numbers])
        return F.cross_entropy(labelled, batch.targets) + taught


class SpreadingClassifier:
    """A net, and label spreading over the pool in its features; p(class) is the mean of both."""

    def __init__(self, classifier: Classifier, task: Task, mirrored: bool) -> None:
        self._classifier, self._task, self._mirrored = classifier, task, mirrored
        self._graph = NeighbourGraph(extract(classifier.encoder, task.table, task.unlabelled))
        labelled = np.searchsorted(task.unlabelled, task.labelled)
        self._spread = self._graph.spread(labelled, task.targets, task.classes)

    def pool(self) -> np.ndarray:
        """Return p(class) of the pool: float (N, C)."""
        return self._mean(self._task.table, self._task.unlabelled, self._spread)

    def __call__(self, table: ImageTable, indices: np.ndarray) -> np.ndarray:
        """Return p(class) of the images at these table positions: float (N, C)."""
        features = extract(self._classifier.encoder, table, indices)
        return self._mean(table, indices, self._graph.carry(self._spread, features))

    def _mean(self, table: ImageTable, indices: np.ndarray, spread: np.ndarray) -> np.ndarray:
        return (class_probabilities(self._classifier, table, indices, self._mirrored) + spread) / 2


def train_self_training(
    start: Start, task: Task, views: Views, parameters: FewLabels, learning_rate: float, seed: int
) -> Callable[[ImageTable, np.ndarray], np.ndarray]:
    """Return what tells p(class) of table positions: the student, with label spreading in its features.

    The teachers are the frozen encoder, under its probe and with label spreading, and the same net fine-tuned. Their
    mean is squared and rescaled, surer than before. The student starts where the fine-tuned teacher did. No more
    than 20,000 images of the pool are used, and the labelled ones.
    """
    some = np.union1d(evenly_spread(task.unlabelled, POOL), task.labelled)
    task, mirrored = replace(task, unlabelled=some), views.flip > 0
    tuned = train_semi_supervised(start(task), task, Supervised(views), parameters, learning_rate, seed)
    frozen = SpreadingClassifier(start(task), task, mirrored)
    squared = np.square((2 * frozen.pool() + class_probabilities(tuned, task.table, some, mirrored)) / 3)
    teachers = torch.from_numpy(squared / squared.sum(1, keepdims=True)).float()

    student = start(task)
    loss = Distillation(views, teachers.to(student.head.weight.device))
    # Another order of the images than the teacher's.
    train_semi_supervised(student, task, loss, parameters, learning_rate, seed + 1)
    return SpreadingClassifier(student, task, mirrored)
