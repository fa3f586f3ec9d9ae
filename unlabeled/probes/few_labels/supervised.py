"""Supervised training on the labelled images alone: the baseline, and how a pretrained net is fine-tuned."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from unlabeled.probes.classifier import Classifier
from unlabeled.probes.few_labels.training import Batch, Views


@dataclass(frozen=True)
class Supervised:
    """Cross-entropy on weak views of the labelled images; the unlabelled ones are not looked at."""

    views: Views

    def __call__(self, classifier: Classifier, batch: Batch) -> Tensor:
        return F.cross_entropy(classifier(self.views.weak(batch.images)), batch.targets)
