"""FixMatch: a confident prediction on a weak view is the label of a strong one (Sohn et al. 2020)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled.probes.classifier import Classifier
from unlabeled.probes.few_labels.training import Batch, Views
from unlabeled.probes.few_labels.vat import frozen_statistics


@dataclass(frozen=True)
class FixMatch:
    """Cross-entropy on the labelled images, and on strong views of the unlabelled ones where p(weak view) > threshold.

    Attributes:
        threshold: smallest probability of a label that the net gives itself.
    """

    views: Views
    threshold: float

    def __call__(self, classifier: Classifier, batch: Batch) -> Tensor:
        with torch.no_grad(), frozen_statistics(classifier):
            guess = classifier(self.views.weak(batch.unlabelled)).softmax(1)
        confidence, pseudo_labels = guess.max(1)
        both = torch.cat((self.views.weak(batch.images), self.views.strong(batch.unlabelled)))
        labelled, unlabelled = classifier(both).split((len(batch.images), len(batch.unlabelled)))
        consistent = F.cross_entropy(unlabelled, pseudo_labels, reduction="none")
        return F.cross_entropy(labelled, batch.targets) + (consistent * (confidence > self.threshold)).mean()
