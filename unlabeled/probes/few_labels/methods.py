"""The rows of the label-efficiency table, and how each is fitted within its labels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from unlabeled.data.table import ImageTable
from unlabeled.errors import InputError
from unlabeled.parameters import FewLabels, nearest
from unlabeled.probes.classifier import Classifier
from unlabeled.probes.few_labels.fixmatch import FixMatch
from unlabeled.probes.few_labels.pseudo_label import train_pseudo_label
from unlabeled.probes.few_labels.self_training import train_self_training
from unlabeled.probes.few_labels.start import Start
from unlabeled.probes.few_labels.supervised import Supervised
from unlabeled.probes.few_labels.task import Task
from unlabeled.probes.few_labels.training import Loss, Views, class_probabilities, train_semi_supervised
from unlabeled.probes.few_labels.vat import EntropyMinimisation, VirtualAdversarial
from unlabeled.probes.subsets import hold_out

Setting = Mapping[str, float]
# Table positions (N,) to p(class), float (N, C).
Predict = Callable[[ImageTable, np.ndarray], np.ndarray]
Fit = Callable[[Start, Task, FewLabels, Setting, int], Predict]

RATES = ("learning_rates",)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: its name there.
        does: one sentence.
        fit: start, task, parameters, setting and seed to what predicts.
        tuned: the parameters that hold values to choose from; a setting has one value of each.
        pretraining: the learning signal whose encoder it starts from; empty: from random weights.
        clusters: it starts from the clusters of that encoder.
        without_labels: it uses labels to name its clusters for the score, and for nothing else.
    """

    title: str
    does: str
    fit: Fit
    tuned: tuple[str, ...] = RATES
    pretraining: str = ""
    clusters: bool = False
    without_labels: bool = False


def training_with(loss_of: Callable[[FewLabels, Setting], Loss], float32: bool = False) -> Fit:
    """Return the fit that trains all weights of the start with one loss."""

    def fit(start: Start, task: Task, parameters: FewLabels, setting: Setting, seed: int) -> Predict:
        classifier, loss, rate = start(task), loss_of(parameters, setting), setting["learning_rates"]
        train_semi_supervised(classifier, task, loss, parameters, rate, seed, float32)
        return predictor(classifier, parameters)

    return fit


def pseudo_label(start: Start, task: Task, parameters: FewLabels, setting: Setting, seed: int) -> Predict:
    rate = setting["learning_rates"]
    return predictor(train_pseudo_label(start, task, views(parameters), parameters, rate, seed), parameters)


def self_training(start: Start, task: Task, parameters: FewLabels, setting: Setting, seed: int) -> Predict:
    return train_self_training(start, task, views(parameters), parameters, setting["learning_rates"], seed)


def as_it_is(start: Start, task: Task, parameters: FewLabels, setting: Setting, seed: int) -> Predict:
    return predictor(start(task), parameters)


def clusters_then_labels(
    start: Start, task: Task, parameters: FewLabels, setting: Setting, seed: int
) -> Predict:
    """Train the net to tell the clusters of all images apart, then a probe and the net on the labels."""
    loss, rate = Supervised(views(parameters)), setting["learning_rates"]
    clusters = start.cluster_task(task)
    taught = train_semi_supervised(start.clustered(clusters), clusters, loss, parameters, rate, seed)
    classifier = start.probed(taught.encoder, task)
    train_semi_supervised(classifier, task, loss, parameters, rate, seed)
    return predictor(classifier, parameters)


def predictor(classifier: Classifier, parameters: FewLabels) -> Predict:
    return partial(class_probabilities, classifier, mirrored=parameters.flip > 0)


def views(parameters: FewLabels) -> Views:
    return Views(parameters.crop, parameters.flip)


fine_tuned = training_with(lambda parameters, _: Supervised(views(parameters)))
entropy_minimisation = training_with(lambda parameters, _: EntropyMinimisation(views(parameters)))
# In bfloat16 the first step of the power iteration would be lost in rounding.
vat = training_with(
    lambda parameters, setting: VirtualAdversarial(views(parameters), setting["radii"]), float32=True
)
fixmatch = training_with(lambda parameters, _: FixMatch(views(parameters), parameters.threshold))

METHODS = {
    "supervised": Method("Supervised", "the labelled images alone, from random weights", fine_tuned),
    "pseudo_label": Method(
        "Pseudo-Label", "train, label the other images where confident, train anew", pseudo_label
    ),
    "entropy_minimisation": Method(
        "EntMin", "confident predictions on unlabelled images: VAT without its adversary", entropy_minimisation
    ),
    "vat": Method(
        "VAT + EntMin", "as confident, and the same after the worst small perturbation",
        vat, ("learning_rates", "radii"),
    ),
    "instdisc": Method("InstDisc", "every image its own class, then fine-tuned", fine_tuned, RATES, "instdisc"),
    "bigan": Method(
        "BiGAN", "the encoder of a bidirectional GAN, then fine-tuned; for BigBiGAN", fine_tuned, RATES, "bigan"
    ),
    "pirl": Method("PIRL", "a jigsawed view matches its image, then fine-tuned", fine_tuned, RATES, "pirl"),
    "cpc": Method("CPC v2", "patches predict the patches below, then fine-tuned", fine_tuned, RATES, "cpc"),
    "simclr": Method("SimCLR", "two views of an image agree, then fine-tuned", fine_tuned, RATES, "simclr"),
    "simclr_probe": Method("SimCLR, linear probe", "the same encoder, frozen", as_it_is, (), "simclr"),
    "scan": Method(
        "SCAN, no label", "neighbours share a cluster; labels name the clusters, for the score alone",
        as_it_is, (), "simclr", clusters=True, without_labels=True,
    ),
    "scan_fine_tuned": Method(
        "SCAN, fine-tuned", "the net learns the clusters of all images, then the few labels",
        clusters_then_labels, RATES, "simclr", clusters=True,
    ),
    "scan_self_training": Method(
        "SCAN + self-training", "clusters named by the few labels, then FixMatch",
        fixmatch, RATES, "simclr", clusters=True,
    ),
    "simclr_fixmatch": Method(
        "SimCLR + FixMatch", "from the linear probe: confident predictions teach strong views",
        fixmatch, RATES, "simclr",
    ),
    "simclr_self_training": Method(
        "SimCLR + self-training", "probe, label spreading and fine-tuned net together teach one net",
        self_training, RATES, "simclr",
    ),
}  # fmt: skip


def find_method(name: str) -> Method:
    """Return a row of the table.

    Raises:
        InputError: there is none of that name; the nearest is given.
    """
    if name not in METHODS:
        raise InputError(f"unknown method '{name}'{nearest(name, list(METHODS))}")
    return METHODS[name]


def fit_within_labels(
    method: Method, start: Start, task: Task, parameters: FewLabels, seed: int
) -> tuple[Predict, dict[str, Any]]:
    """Fit a method with the setting that does best on a held-out part of the task's own labels.

    Where there is more than one setting, each is fitted without that part; the best (the first of equals) is
    fitted again with all labels.

    Returns:
        What predicts; `setting`; and `held_out`, each setting with its accuracy there, empty without a choice.
    """
    settings = [
        dict(zip(method.tuned, values, strict=True))
        for values in product(*(getattr(parameters, key) for key in method.tuned))
    ]
    tried = []
    if len(settings) > 1:
        fit, held_out = hold_out(task.targets, parameters.held_out_share, seed)
        unseen, truth = task.labelled[held_out], task.targets[held_out]
        for setting in settings:
            predict = method.fit(start, task.take(fit), parameters, setting, seed)
            right = predict(task.table, unseen).argmax(1) == truth
            tried.append({**setting, "accuracy": float(right.mean())})
    best = max(range(len(tried)), key=lambda number: tried[number]["accuracy"]) if tried else 0
    predict = method.fit(start, task, parameters, settings[best], seed)
    return predict, {"setting": settings[best], "held_out": tried}
