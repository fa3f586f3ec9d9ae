"""Few labels: the same ones for every method, losses as their papers have them, test images out of reach."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import write_model, write_table
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from torch.nn import functional as F

from pipelines.cli import main
from pipelines.cluster.jobs import compile_pipeline
from pipelines.commands import compare
from pipelines.label_efficiency import label_efficiency
from unlabeled.data.table import ImageTable
from unlabeled.errors import InputError
from unlabeled.features import extract
from unlabeled.files import read_json
from unlabeled.nets.encoder import load_encoder
from unlabeled.parameters import FewLabels, Parameters, SelfLabel, validated
from unlabeled.probes.classifier import Classifier
from unlabeled.probes.few_labels.comparison import Comparison, summarise
from unlabeled.probes.few_labels.fixmatch import FixMatch
from unlabeled.probes.few_labels.label_spreading import ALPHA, NeighbourGraph
from unlabeled.probes.few_labels.methods import METHODS, find_method, fit_within_labels
from unlabeled.probes.few_labels.pseudo_label import PseudoLabel, confident_predictions, train_pseudo_label
from unlabeled.probes.few_labels.self_training import Distillation
from unlabeled.probes.few_labels.start import Start
from unlabeled.probes.few_labels.supervised import Supervised
from unlabeled.probes.few_labels.task import label_task
from unlabeled.probes.few_labels.training import (
    Batch,
    Views,
    class_probabilities,
    train_semi_supervised,
)
from unlabeled.probes.few_labels.vat import (
    EntropyMinimisation,
    VirtualAdversarial,
    adversarial_perturbation,
    divergence,
    entropy,
    frozen_statistics,
    ramp_up,
)
from unlabeled.probes.knn import weighted_knn
from unlabeled.report.label_efficiency import spread, write_comparison
from unlabeled.selflabel.cluster import self_label
from unlabeled.selflabel.clusters import Clusters
from unlabeled.views import to_float

ROOT = Path(__file__).parents[1]
VIEWS = Views(crop=0.8, flip=0.0)
QUICK = FewLabels(
    steps=4, batch_size=16, unlabelled_batch_size=16, draws=2, shares=(0.02, 0.1), flip=0.0,
    learning_rates=(3e-3,), radii=(1.0,),
)  # fmt: skip


@pytest.fixture
def classifier(digits_table: Path, model_folder: Path) -> Classifier:
    """A net that has seen two hundred labels: its predictions differ from image to image."""
    task = label_task(ImageTable(digits_table), 0.15, 0)
    start = Classifier(load_encoder(model_folder), 10)
    few = FewLabels(steps=30, batch_size=64, unlabelled_batch_size=2)
    trained = train_semi_supervised(start, task, Supervised(VIEWS), few, 3e-3, 0)
    trained.zero_grad()
    return trained


@pytest.fixture
def batch(digits_table: Path) -> Batch:
    images = torch.from_numpy(ImageTable(digits_table).images(np.arange(80)))
    targets = torch.from_numpy(ImageTable(digits_table).labels(np.arange(16)))
    return Batch(images[:16], targets, torch.arange(64), lambda: images[16:], 1.0)


def statistics(classifier: Classifier) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in classifier.named_buffers()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# --- the task ---


def test_subsets_are_nested_stratified_and_at_least_four_of_each_class(digits_table: Path) -> None:
    table = ImageTable(digits_table)
    small, large = label_task(table, 0.01, 3), label_task(table, 0.1, 3)
    assert np.isin(small.labelled, large.labelled).all()
    np.testing.assert_array_equal(np.bincount(small.targets), 4)
    shares = np.bincount(large.targets) / np.bincount(table.labels(table.indices("train")))
    np.testing.assert_allclose(shares, 0.1, atol=0.01)
    np.testing.assert_array_equal(table.labels(large.labelled), large.targets)
    assert label_task(table, 0.01, 3).digest == small.digest != label_task(table, 0.01, 4).digest


def test_the_pool_is_train_and_holds_no_test_image(digits_table: Path) -> None:
    table = ImageTable(digits_table)
    task = label_task(table, 0.1, 0)
    np.testing.assert_array_equal(task.unlabelled, table.indices("train"))
    assert not np.isin(np.r_[task.unlabelled, task.labelled], table.indices("test")).any()


@pytest.mark.parametrize("name", ["pseudo_label", "vat", "simclr_self_training", "scan_fine_tuned"])
def test_no_test_image_and_no_other_label_reaches_a_method(
    name: str, tmp_path: Path, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    """Other test images, and other labels beyond the subset, give the same answers to the bit."""
    images, labels = digits[0][:300], digits[1][:300]
    test, names = np.arange(300) % 5 == 4, [str(digit) for digit in range(10)]
    table = ImageTable(write_table(tmp_path / "table", images, labels, test, names))
    task = label_task(table, 0.1, 0)
    spoiled = images.copy()
    spoiled[test] = 255 - spoiled[test]
    shuffled = np.where(np.isin(np.arange(300), task.labelled), labels, (labels + 1) % 10)
    other = ImageTable(write_table(tmp_path / "other", spoiled, shuffled, test, names))

    model = write_model(tmp_path / "model", (1, 8, 8))
    answers = []
    for each in (table, other):
        clusters = tmp_path / f"clusters-{each.folder.name}"
        self_label(model, each.folder, clusters, SelfLabel(restarts=1), 0)
        method = find_method(name)
        start = Start(
            load_encoder(model).settings, 0, 0.2,
            model if method.pretraining else None, clusters if method.clusters else None,
        )  # fmt: skip
        predict, _ = fit_within_labels(method, start, replace(task, table=each), QUICK, 0)
        answers.append(predict(each, task.unlabelled))
    np.testing.assert_array_equal(*answers)


def test_labels_are_needed(make_table) -> None:
    with pytest.raises(InputError, match="fewer than two classes"):
        label_task(ImageTable(make_table("none", labels=np.full(300, -1))), 0.1, 0)
    labels = np.where(np.arange(300) % 5 == 4, -1, np.arange(300) % 10)
    unscored = make_table("unscored", labels=labels)
    with pytest.raises(InputError, match="no label in test"):
        Comparison(unscored, unscored, Parameters(few_labels=QUICK), "").cells("supervised")


# --- the losses ---


def test_divergence_and_entropy_are_those_of_the_distributions() -> None:
    logits, others = torch.randn(2, 32, 10, dtype=torch.float64)
    p, q = torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=others)
    torch.testing.assert_close(divergence(logits, others), torch.distributions.kl_divergence(p, q).mean())
    torch.testing.assert_close(entropy(logits), p.entropy().mean())
    assert entropy(torch.zeros(4, 10)).item() == pytest.approx(math.log(10))
    assert divergence(logits, logits).item() == pytest.approx(0, abs=1e-12)


def test_the_worst_direction_of_a_linear_classifier_is_the_difference_of_its_weights() -> None:
    """For two classes p depends on (w1 - w0)x alone: there is one direction that changes it."""
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    with torch.no_grad():
        linear[1].weight *= 0.3
    images = torch.rand(20, 1, 8, 8)
    r = adversarial_perturbation(linear, images, linear(images).detach(), 2.0)
    difference = linear[1].weight.detach()[1] - linear[1].weight.detach()[0]
    cosines = F.cosine_similarity(r.flatten(1), difference.expand(20, -1))
    torch.testing.assert_close(cosines.abs(), torch.ones(20), atol=1e-3, rtol=0)


@pytest.mark.parametrize("radius", [0.5, 2.0])
def test_the_perturbation_has_its_length_and_hurts_more_than_a_random_one(
    classifier: Classifier, batch: Batch, radius: float
) -> None:
    classifier.train()
    images = VIEWS.weak(batch.unlabelled)
    logits = classifier(images).detach()
    before = statistics(classifier)
    worst = adversarial_perturbation(classifier, images, logits, radius)
    torch.testing.assert_close(worst.flatten(1).norm(dim=1), torch.full((64,), radius))
    assert not worst.requires_grad
    assert all(weight.grad is None for weight in classifier.parameters())
    with frozen_statistics(classifier), torch.no_grad():
        growth = divergence(logits, classifier(images + worst))
        for _ in range(5):
            noise = F.normalize(torch.randn_like(images).flatten(1), dim=1).view_as(images)
            # Of 64 directions a random one has on average an eighth along the worst; KL grows with the square.
            assert growth > 3 * divergence(logits, classifier(images + radius * noise))
    assert equal(before, statistics(classifier))
    assert all(norm.track_running_stats for norm in classifier.modules() if hasattr(norm, "running_mean"))


def test_no_gradient_goes_through_the_target_of_the_divergence() -> None:
    logits, others = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10, requires_grad=True)
    divergence(logits, others).backward()
    assert logits.grad is None
    torch.testing.assert_close(others.grad, (others.softmax(1) - logits.softmax(1)).detach() / 8)


def test_each_loss_is_the_supervised_one_plus_its_own_term(classifier: Classifier, batch: Batch) -> None:
    """In eval mode, on whole images, nothing is random but VAT's first direction."""

    class WholeImages(Views):
        def weak(self, images: torch.Tensor) -> torch.Tensor:
            return to_float(images)

    classifier.eval()
    views = WholeImages(crop=1.0, flip=0.0)
    with torch.no_grad():
        labelled = F.cross_entropy(classifier(to_float(batch.images)), batch.targets)
        p = classifier(to_float(batch.unlabelled)).softmax(1)
    losses = {
        "supervised": Supervised(views),
        "entropy": EntropyMinimisation(views),
        "vat": VirtualAdversarial(views, 1.0),
        "guesses": PseudoLabel(views, p.argmax(1)),
    }
    found = {name: loss(classifier, batch).item() for name, loss in losses.items()}
    uncertainty = -(p * p.log()).sum(1).mean().item()
    guessed = -p.max(1).values.log().mean().item()
    assert found["supervised"] == pytest.approx(labelled.item(), rel=1e-5)
    assert found["entropy"] == pytest.approx(labelled.item() + uncertainty, rel=1e-4)
    assert found["guesses"] == pytest.approx(labelled.item() + guessed, rel=1e-4)
    assert found["vat"] > found["entropy"] + 0.01


def test_guesses_of_the_first_steps_do_not_count(classifier: Classifier, batch: Batch) -> None:
    weights = [ramp_up(share) for share in np.linspace(0, 1, 11)]
    assert weights[0] == pytest.approx(math.exp(-5)) and weights == sorted(weights)
    assert weights[5:] == [1.0] * 6
    classifier.eval()
    first = replace(batch, progress=0.0)
    for loss in (EntropyMinimisation(VIEWS), VirtualAdversarial(VIEWS, 1.0)):
        found = []
        for given in (batch, first):
            torch.manual_seed(0)
            found.append(loss(classifier, given).item())
        torch.manual_seed(0)
        labelled = Supervised(VIEWS)(classifier, batch).item()
        assert found[1] - labelled == pytest.approx(math.exp(-5) * (found[0] - labelled), rel=1e-3)


def test_entropy_minimisation_makes_predictions_sure(digits_table: Path, model_folder: Path) -> None:
    task = label_task(ImageTable(digits_table), 0.05, 0)
    few = FewLabels(steps=25, batch_size=32, unlabelled_batch_size=64)
    entropies = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        net = Classifier(load_encoder(model_folder), 10)
        net = train_semi_supervised(net, task, EntropyMinimisation(VIEWS, weight), few, 3e-3, 0)
        p = class_probabilities(net, task.table, task.unlabelled)
        entropies.append(-(p * np.log(p.clip(1e-12))).sum(1).mean())
    assert entropies[1] < entropies[0]


def test_fixmatch_learns_from_confident_images_alone(classifier: Classifier, batch: Batch) -> None:
    """No gradient goes through a pseudo-label; below the threshold there is none."""
    classifier.train()
    before = statistics(classifier)
    torch.manual_seed(5)
    with torch.no_grad(), frozen_statistics(classifier):
        guess = classifier(VIEWS.weak(batch.unlabelled)).softmax(1)
    assert equal(before, statistics(classifier))
    threshold = float(guess.max(1).values.median())
    confident = guess.max(1).values > threshold
    both = torch.cat((VIEWS.weak(batch.images), VIEWS.strong(batch.unlabelled)))
    twin = copy.deepcopy(classifier)
    labelled, unlabelled = twin(both).split((16, 64))
    expected = F.cross_entropy(labelled, batch.targets)
    expected += F.cross_entropy(unlabelled[confident], guess.argmax(1)[confident], reduction="sum") / 64
    expected.backward()

    torch.manual_seed(5)
    loss = FixMatch(VIEWS, threshold)(classifier, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for weight, twins in zip(classifier.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, twins.grad, rtol=1e-4, atol=1e-6)


def test_pseudo_labels_are_the_confident_predictions(classifier: Classifier, digits_table: Path) -> None:
    task = label_task(ImageTable(digits_table), 0.1, 0)
    p = class_probabilities(classifier, task.table, task.unlabelled)
    confident, guesses = confident_predictions(classifier, task, 0.9)
    np.testing.assert_array_equal(confident, np.flatnonzero(p.max(1) > 0.9))
    np.testing.assert_array_equal(guesses, p.argmax(1)[confident])
    assert 0 < len(confident) < len(p)


def test_pseudo_label_without_a_confident_image_is_supervised_training(
    digits_table: Path, model_folder: Path
) -> None:
    task = label_task(ImageTable(digits_table), 0.05, 0)
    start = Start(load_encoder(model_folder).settings, 0, 0.2)
    few = QUICK.model_copy(update={"threshold": 0.999999})
    alone = train_semi_supervised(start(task), task, Supervised(VIEWS), few, 3e-3, 0)
    with_pool = train_pseudo_label(start, task, VIEWS, few, 3e-3, 0)
    assert equal(alone.state_dict(), with_pool.state_dict())


# --- self-training ---


def test_label_spreading_solves_its_equation(digits_table: Path) -> None:
    """F = alpha S F + (1 - alpha) Y has one solution, (1 - alpha) (1 - alpha S)^-1 Y; the iteration nears it."""
    table = ImageTable(digits_table)
    task = label_task(table, 0.05, 0)
    graph = NeighbourGraph(table.images(task.unlabelled).reshape(len(task.unlabelled), -1).astype(np.float32))
    weights = graph.weights.toarray()
    np.testing.assert_allclose(weights, weights.T)
    assert (weights.diagonal() == 0).all() and np.abs(np.linalg.eigvalsh(weights)).max() <= 1 + 1e-9
    numbers = np.searchsorted(task.unlabelled, task.labelled)
    y = np.zeros((len(weights), 10))
    y[numbers, task.targets] = 1
    solution = np.linalg.solve(np.eye(len(weights)) - ALPHA * weights, y)
    spread = graph.spread(numbers, task.targets, 10)
    np.testing.assert_allclose(spread.sum(1), 1)
    # What is left of the start after 50 steps: 0.9^50 = 0.005.
    np.testing.assert_allclose(spread, solution / solution.sum(1, keepdims=True), atol=0.01)
    truth = table.labels(task.unlabelled)
    flat = table.images(task.unlabelled).reshape(len(truth), -1)
    nearest = weighted_knn(flat[numbers].astype(np.float32), task.targets, flat.astype(np.float32), 1)
    assert (spread.argmax(1) == truth).mean() > (nearest == truth).mean()


def test_labels_are_carried_to_other_images_by_their_nearest() -> None:
    generator = np.random.default_rng(0)
    centres = 20 * generator.standard_normal((4, 16))
    groups = np.repeat(np.arange(4), 30)
    pool = (centres[groups] + generator.standard_normal((120, 16))).astype(np.float32)
    graph = NeighbourGraph(pool)
    spread = graph.spread(np.array([0, 30, 60]), np.array([2, 0, 1]), 4)
    np.testing.assert_array_equal(spread.argmax(1)[:90], np.array([2, 0, 1])[groups[:90]])
    np.testing.assert_allclose(spread[90:], 0.25)  # a group that no label reaches
    others = (centres[[0, 1, 2]] + generator.standard_normal((3, 16))).astype(np.float32)
    carried = graph.carry(spread, others)
    np.testing.assert_allclose(carried.sum(1), 1)
    np.testing.assert_array_equal(carried.argmax(1), [2, 0, 1])


def test_the_student_learns_what_the_teachers_say(classifier: Classifier, batch: Batch) -> None:
    """Teachers that are sure are labels; those that know nothing ask for equal probabilities."""

    class WholeImages(Views):
        def weak(self, images: torch.Tensor) -> torch.Tensor:
            return to_float(images)

        strong = weak

    classifier.eval()
    views = WholeImages(crop=1.0, flip=0.0)
    with torch.no_grad():
        log_p = classifier(to_float(batch.unlabelled)).log_softmax(1)
        labels = log_p.argmax(1)
        sure = Distillation(views, F.one_hot(labels, 10).float())(classifier, batch)
        unsure = Distillation(views, torch.full((64, 10), 0.1))(classifier, batch)
        torch.testing.assert_close(sure, PseudoLabel(views, labels)(classifier, batch), rtol=1e-4, atol=0)
        torch.testing.assert_close(
            unsure - sure, log_p.max(1).values.mean() - log_p.mean(), rtol=1e-3, atol=0
        )


# --- the start ---


def test_clusters_start_as_their_classes(digits_table: Path, model_folder: Path, tmp_path: Path) -> None:
    """More clusters than classes: the surplus is dropped; each image gets the class of the best that is left."""
    table, encoder = ImageTable(digits_table), load_encoder(model_folder)
    task = label_task(table, 0.2, 0)
    for k in (6, 10, 14):
        self_label(model_folder, digits_table, tmp_path / str(k), SelfLabel(clusters=k, restarts=2), 0)
        start = Start(encoder.settings, 0, 0.2, model_folder, tmp_path / str(k))
        classifier, clusters = start(task), Clusters.load(tmp_path / str(k))
        features = extract(encoder, table, task.unlabelled)
        assigned = clusters.assign(features)
        names = np.full(k, -1)
        for cluster in range(k):  # whose class it is, told by its own images
            answers = classifier.predict(table, task.unlabelled)[assigned == cluster]
            if k <= 10:
                assert len(np.unique(answers)) == 1
            names[cluster] = np.bincount(answers, minlength=10).argmax()
        if k <= 10:
            assert len(np.unique(names)) == k
        right = np.mean(names[clusters.assign(extract(encoder, table, task.labelled))] == task.targets)
        assert right > 0.3
        learned = start.cluster_task(task)
        np.testing.assert_array_equal(learned.targets, assigned)
        assert learned.classes == k


def test_clusters_of_other_images_are_refused(
    digits_table: Path, model_folder: Path, make_table, tmp_path: Path
) -> None:
    self_label(model_folder, make_table("few"), tmp_path / "clusters", SelfLabel(restarts=1), 0)
    start = Start({}, 0, 0.2, model_folder, tmp_path / "clusters")
    with pytest.raises(InputError, match="other images"):
        start.cluster_task(label_task(ImageTable(digits_table), 0.1, 0))


# --- the comparison ---


def comparison(work: Path, table: Path, **few: object) -> Comparison:
    parameters = Parameters.model_validate(
        {
            "encoder": {"width": 16},
            "training": {"steps": 4, "batch_size": 64, "threads": 1, "compile": "no"},
            "self_label": {"restarts": 1, "heads": 2, "steps": 20, "batch_size": 200},
            "few_labels": QUICK.model_dump() | few,
        }
    )
    return Comparison(table, work, parameters, "code")


def test_more_labels_make_a_better_classifier(digits_table: Path, tmp_path: Path) -> None:
    few = {"shares": (0.03, 0.1, 0.4), "draws": 2, "steps": 40, "batch_size": 32}
    (row,) = summarise(comparison(tmp_path, digits_table, **few).cells("supervised"))
    few, more, many = (cell["top1"]["mean"] for cell in row["shares"])
    assert 0.3 < few < more < many


def test_every_method_sees_the_same_labels(digits_table: Path, tmp_path: Path) -> None:
    runs = comparison(tmp_path, digits_table, steps=1)
    seen = {
        name: {(cell["share"], cell["draw"]): cell["images"] for cell in runs.cells(name)}
        for name, method in METHODS.items()
        if method.pretraining in ("", "simclr") and not method.without_labels
    }
    assert len(seen) > 5 and len(set(seen["supervised"].values())) == 4
    assert all(subsets == seen["supervised"] for subsets in seen.values())
    assert len(list((tmp_path / "models").iterdir())) == 1  # pretrained once, not per draw
    (without,) = {(cell["labels"], cell["images"]) for cell in runs.cells("scan")}
    assert without == (0, None)


def test_settings_are_chosen_on_a_held_out_part_of_the_labels(digits_table: Path, tmp_path: Path) -> None:
    runs = comparison(tmp_path, digits_table, learning_rates=(1e-6, 3e-3), steps=40, shares=(0.3,), draws=1)
    (cell,) = runs.cells("supervised")
    assert cell["setting"] == {"learning_rates": 3e-3}
    assert [tried["learning_rates"] for tried in cell["held_out"]] == [1e-6, 3e-3]
    assert cell["held_out"][1]["accuracy"] > cell["held_out"][0]["accuracy"]


KILLED = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from test_label_efficiency import comparison
comparison(Path(sys.argv[1]), Path(sys.argv[2])).cells("simclr_probe")
"""


@pytest.mark.slow
def test_killed_and_called_again_it_ends_with_the_same_bytes(digits_table: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(digits_table)]
    process = subprocess.Popen(command, env=environment)
    while process.poll() is None and not list(tmp_path.glob("killed/cells/*.json")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(tmp_path.glob("killed/cells/*.json"))) < 4

    pages = []
    for room in ("killed", "whole"):
        runs = comparison(tmp_path / room, digits_table)
        (tmp_path / f"{room}.cells").write_text(json.dumps(runs.cells("simclr_probe")))
        outputs = [tmp_path / f"{room}.{kind}" for kind in ("json", "html")]
        write_comparison([tmp_path / f"{room}.cells"], digits_table, runs.parameters, *outputs)
        pages.append([output.read_bytes() for output in outputs])
    assert pages[0] == pages[1]


def test_rows_are_means_over_draws() -> None:
    cells = [
        {"method": "vat", "share": share, "draw": draw, "labels": 40, "top1": top1, "topk": 0.9}
        for share, draw, top1 in [(0.1, 0, 0.8), (0.1, 1, 0.9), (0.01, 0, 0.5)]
    ]
    (row,) = summarise(cells)
    assert [cell["share"] for cell in row["shares"]] == [0.01, 0.1]
    assert row["shares"][0]["top1"] == {"mean": 0.5, "std": None}
    assert row["shares"][1]["top1"]["mean"] == pytest.approx(0.85)
    assert row["shares"][1]["top1"]["std"] == pytest.approx(math.sqrt(0.005))
    assert spread(row["shares"][1]["top1"]) == "85.0 ± 7.1" and spread({"mean": 0.5, "std": None}) == "50.0"


def test_the_page_tells_all_and_needs_nothing(digits_table: Path, tmp_path: Path) -> None:
    runs = comparison(tmp_path, digits_table, steps=1)
    files = []
    for name in ("scan", "supervised"):
        files.append(tmp_path / name)
        files[-1].write_text(json.dumps(runs.cells(name)))
    write_comparison(files, digits_table, runs.parameters, tmp_path / "compare.json", tmp_path / "page.html")
    result, page = read_json(tmp_path / "compare.json"), (tmp_path / "page.html").read_text()
    assert [row["method"] for row in result["rows"]] == ["supervised", "scan"]
    assert result["matching_bits"] == pytest.approx(21.79, abs=0.01) and result["k"] == 2
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    first = spread(result["rows"][0]["shares"][0]["top1"])
    for words in ("SCAN, no label", "21.79", result["subsets"][0]["images"][:16], first):
        assert words in page
    assert str(tmp_path) not in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shares", "0.1,2"], "parameter few_labels.shares.1 must be at most 1"),
        (["--shares", "many"], "parameter few_labels.shares"),
        (["--draws", "0"], "parameter few_labels.draws"),
        (["--methods", "scann"], "unknown method 'scann'; did you mean 'scan'?"),
        (["--methods", ","], "--methods names no row"),
        (["--set", "few_labels.radius=3"], "unknown parameter few_labels.radius; did you mean 'radii'?"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    asked = ["compare", "labels", "--profile", "smoke", "--workspace", str(tmp_path), *arguments]
    monkeypatch.setattr(sys, "argv", ["unlabeled", *asked])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and words in told and told.count("\n") == 1


def test_rows_that_need_no_pretraining_can_be_asked_for_alone(tmp_path: Path) -> None:
    asked = Parameters(data="digits", seed=0)
    arguments = compare._arguments(asked, "vat, supervised", tmp_path)
    assert arguments["groups"] == [{"name": "scratch", "methods": ["vat", "supervised"]}]
    assert validated(Parameters, json.loads(arguments["parameters"])).few_labels == asked.few_labels


def test_the_compiled_pipeline_loops_over_groups_and_keys_every_step(tmp_path: Path) -> None:
    compile_pipeline(tmp_path / "compare.yaml", label_efficiency)
    spec = next(yaml.safe_load_all((tmp_path / "compare.yaml").read_text()))
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec(), ignore_unknown_fields=False)
    (loop,) = (task for name, task in spec["root"]["dag"]["tasks"].items() if name.startswith("for-loop"))
    assert loop["parameterIterator"]["items"] == {"inputParameter": "pipelinechannel--groups"}
    leaves = [component for component in spec["components"].values() if "executorLabel" in component]
    assert len(leaves) == 3
    for leaf in leaves:
        assert {"data_digest", "code_digest"} <= leaf["inputDefinitions"]["parameters"].keys()


@pytest.mark.slow
def test_the_command_ends_with_table_json_and_page(tmp_path: Path) -> None:
    settings = ["training.steps=10", "few_labels.steps=4", "few_labels.flip=0", "training.threads=1"]
    command = [
        Path(sys.executable).with_name("unlabeled"), "compare", "labels", "--profile", "smoke", "--workspace", tmp_path,
        "--methods", "supervised,simclr_probe", "--shares", "0.02", "--draws", "2",
        *(part for setting in settings for part in ("--set", setting)),
    ]  # fmt: skip
    first = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    (page,) = tmp_path.glob("comparisons/*/report.html")
    assert json.loads(page.with_name("summary.json").read_text()) == result
    assert [row["method"] for row in result["rows"]] == ["supervised", "simclr_probe"]
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0 and "SimCLR, linear probe" in second.stdout and str(page) in second.stdout
    assert "over 2 draws." in second.stdout and "Matching clusters" not in second.stdout
    assert result["subsets"][0]["images"][:16] in second.stdout
