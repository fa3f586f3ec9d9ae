"""The finetune step: starts from its probe, never ends below it, same labels for all, same bits again."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_table
from safetensors.numpy import load_file

from unlabeled.data.table import ImageTable
from unlabeled.digest import tree_digest
from unlabeled.errors import InputError
from unlabeled.features import extract
from unlabeled.files import read_json
from unlabeled.nets.encoder import load_encoder
from unlabeled.parameters import Finetuning, SelfLabel
from unlabeled.probes.classifier import Classifier, train_classifier
from unlabeled.probes.finetune import clearly_better, finetune
from unlabeled.probes.linear import fit_linear_probe
from unlabeled.probes.subsets import hold_out
from unlabeled.selflabel.cluster import self_label
from unlabeled.selflabel.clusters import Clusters

QUICK = Finetuning(steps=6, batch_size=32, label_shares=(0.05, 1.0))


@pytest.fixture(scope="module")
def labels_folder(digits_table: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels") / "labels"
    self_label(model_folder, digits_table, folder, SelfLabel(restarts=2), 0)
    return folder


def test_classifier_starts_as_its_probe(digits_table: Path, model_folder: Path) -> None:
    table, encoder = ImageTable(digits_table), load_encoder(model_folder)
    train, test = table.indices("train"), table.indices("test")
    features, labels = extract(encoder, table, train), table.labels(train)
    probe = fit_linear_probe(features, labels, 10, *hold_out(labels, 0.2, 0))
    classifier = Classifier.from_probe(encoder, probe)
    np.testing.assert_array_equal(
        classifier.predict(table, test), probe.predict(extract(encoder, table, test))
    )


def test_training_learns_repeats_and_leaves_the_global_random_state(
    digits_table: Path, model_folder: Path
) -> None:
    table, parameters = ImageTable(digits_table), Finetuning(steps=30, batch_size=64)
    train = table.indices("train")[:200]
    state = torch.get_rng_state()
    weights, losses = [], []
    for _ in range(2):
        torch.manual_seed(1)
        classifier = Classifier(load_encoder(model_folder), 10)
        torch.set_rng_state(state)
        before = classifier.encoder.net[0].weight.clone()
        losses.append(list(train_classifier(classifier, table, train, table.labels(train), parameters, 3)))
        assert not torch.equal(before, classifier.encoder.net[0].weight) and not classifier.training
        weights.append(classifier.state_dict())
    assert torch.equal(state, torch.get_rng_state())
    assert losses[0] == losses[1] and len(losses[0]) == 30
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert losses[0][0][0] == pytest.approx(math.log(10), abs=0.5)
    assert np.mean([loss for loss, _ in losses[0][-5:]]) < 0.5 * losses[0][0][0]
    rates = [rate for _, rate in losses[0]]
    assert max(rates) == parameters.learning_rate and rates[-1] < 0.05 * max(rates)


def test_crops_are_views_of_the_same_images(digits_table: Path, model_folder: Path) -> None:
    table = ImageTable(digits_table)
    train = table.indices("train")[:64]
    losses = []
    for area in (1.0, 0.5):
        torch.manual_seed(0)
        classifier = Classifier(load_encoder(model_folder), 10)
        parameters = Finetuning(steps=60, batch_size=64, crop_area=area)
        steps = train_classifier(classifier, table, train, table.labels(train), parameters, 0)
        losses.append([loss for loss, _ in steps])
    assert losses[1][-1] > losses[0][-1], "crops are harder to learn by heart"
    assert losses[1][-1] < 0.7 * losses[1][0]


def test_clearly_better_asks_for_more_than_luck() -> None:
    old = np.arange(100) < 80
    assert not clearly_better(old, old)
    assert not clearly_better(old, np.ones(100, bool))
    assert clearly_better(np.ones(100, bool), old)
    swapped = old.copy()
    swapped[:10], swapped[80:91] = False, True
    assert swapped.mean() > old.mean() and not clearly_better(swapped, old)
    assert not clearly_better(old[:0], old[:0])


def test_finetune_digits(digits_table: Path, model_folder: Path, labels_folder: Path, tmp_path: Path) -> None:
    output, before = tmp_path / "classifier", tree_digest(model_folder)
    parameters = Finetuning(steps=20, batch_size=64, label_shares=(0.01, 0.1, 1.0))
    returned = finetune(model_folder, labels_folder, digits_table, output, parameters, 0)
    assert tree_digest(model_folder) == before
    config, rows = read_json(output / "config.json"), read_json(output / "efficiency.json")["rows"]
    assert returned["rows"] == rows
    assert [row["labels"] for row in rows] == [40, 144, 1438]
    assert config["target"] == "labels" and config["classes"] == [str(digit) for digit in range(10)]
    for row in rows:
        assert all(0 <= row[key] <= 1 for key in ("probe", "finetuned", "scratch"))
        better = row["held_out"]["finetuned"] > row["held_out"]["probe"]
        assert row["kept"] == "probe" or better, "on held-out labels it never ends below its own probe"
        if row["kept"] == "probe":
            assert row["finetuned"] == row["probe"]
    assert rows[2]["finetuned"] > rows[0]["finetuned"] and rows[2]["finetuned"] > 0.85

    table, weights = ImageTable(digits_table), load_file(output / "model.safetensors")
    encoder, test = load_encoder(output), table.indices("test")
    predictions = (extract(encoder, table, test) @ weights["head.weight"].T + weights["head.bias"]).argmax(1)
    assert (predictions == table.labels(test)).mean() == pytest.approx(
        rows[-1]["finetuned"], abs=2 / len(test)
    )
    confusion = read_json(output / "confusion.json")
    assert np.trace(confusion["matrix"]) / len(test) == pytest.approx(rows[-1]["finetuned"])
    assert np.sum(confusion["matrix"], 1).tolist() == np.bincount(table.labels(test)).tolist()

    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert {(line["share"], line["start"]) for line in lines} == {
        (share, start) for share in (0.01, 0.1, 1.0) for start in ("pretrained", "scratch")
    }
    assert all(line["step"] <= 20 and line["loss"] > 0 for line in lines)


def test_finetune_gives_the_same_bytes_twice(
    make_table: Callable[..., Path], model_folder: Path, labels_folder: Path, tmp_path: Path
) -> None:
    table = make_table("table")
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        finetune(model_folder, labels_folder, table, tmp_path / name, QUICK, seed)
    first, second, other = (tree_digest(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second != other


def test_every_method_sees_the_same_labels(
    make_table: Callable[..., Path], model_folder: Path, labels_folder: Path, tmp_path: Path
) -> None:
    table = make_table("table")
    other = Finetuning(steps=2, batch_size=16, label_shares=(0.05,))
    first, second, third = (
        finetune(model_folder, labels_folder, table, tmp_path / "out", parameters, seed)["rows"][0]["images"]
        for parameters, seed in ((QUICK, 0), (other, 0), (other, 1))
    )
    assert first == second != third


def test_without_labels_the_clusters_are_learned(
    make_table: Callable[..., Path], model_folder: Path, tmp_path: Path
) -> None:
    table = make_table("table", labels=np.full(300, -1))
    self_label(model_folder, table, tmp_path / "labels", SelfLabel(clusters=6, restarts=3), 0)
    returned = finetune(model_folder, tmp_path / "labels", table, tmp_path / "out", QUICK, 0)
    config = read_json(tmp_path / "out" / "config.json")
    assert config["target"] == returned["target"] == "clusters"
    assert config["classes"] == [f"cluster {number}" for number in range(6)]
    assert read_json(tmp_path / "out" / "efficiency.json") == {"rows": []}
    (row,) = returned["rows"]
    assert row["finetuned"] > 0.7 and row["scratch"] is None and row["labels"] == 240
    assert load_file(tmp_path / "out" / "model.safetensors")["head.weight"].shape == (6, 128)
    assert np.sum(read_json(tmp_path / "out" / "confusion.json")["matrix"]) == 60


def test_clusters_on_an_encoder_of_their_own_are_learned(
    make_table: Callable[..., Path], model_folder: Path, tmp_path: Path
) -> None:
    table, labels = make_table("table", labels=np.full(300, -1)), tmp_path / "labels"
    parameters = SelfLabel(clusters=6, restarts=3, self_training_steps=3, confidence=0.3)
    self_label(model_folder, table, labels, parameters, 0)
    finetune(model_folder, labels, table, tmp_path / "out", QUICK, 0)
    images, clusters = ImageTable(table), Clusters.load(labels)
    own, pretrained = (
        np.bincount(
            clusters.assign(extract(load_encoder(folder), images, images.indices("test"))), minlength=6
        )
        for folder in (labels, model_folder)
    )
    targets = np.sum(read_json(tmp_path / "out" / "confusion.json")["matrix"], axis=1)
    assert targets.tolist() == own.tolist() != pretrained.tolist()


def test_some_labels_are_enough(
    make_table: Callable[..., Path],
    digits: tuple[np.ndarray, np.ndarray],
    model_folder: Path,
    labels_folder: Path,
    tmp_path: Path,
) -> None:
    known = np.arange(300) < 60
    table = make_table("some", labels=np.where(known, digits[1][:300], -1), test=np.zeros(300, bool))
    returned = finetune(model_folder, labels_folder, table, tmp_path / "out", QUICK, 0)
    assert returned["target"] == "labels" and returned["rows"][-1]["labels"] == 60
    assert returned["rows"][-1]["finetuned"] is None and not (tmp_path / "out" / "confusion.json").exists()
    few = make_table("few", count=20)
    assert finetune(model_folder, labels_folder, few, tmp_path / "out", QUICK, 0)["rows"][0]["labels"] <= 16


def test_finetune_refuses_what_it_cannot_use(
    make_table: Callable[..., Path], model_folder: Path, labels_folder: Path, tmp_path: Path
) -> None:
    table = make_table("table", labels=np.full(300, -1))
    with pytest.raises(InputError, match="is no self-label folder"):
        finetune(model_folder, tmp_path, table, tmp_path / "out", QUICK, 0)
    self_label(model_folder, table, tmp_path / "one", SelfLabel(clusters=1, restarts=1), 0)
    with pytest.raises(InputError, match="fewer than two"):
        finetune(model_folder, tmp_path / "one", table, tmp_path / "out", QUICK, 0)
    frame = pd.read_parquet(tmp_path / "one" / "labels.parquet")
    frame[:100].to_parquet(tmp_path / "one" / "labels.parquet")
    with pytest.raises(InputError, match="made from another table"):
        finetune(model_folder, tmp_path / "one", table, tmp_path / "out", QUICK, 0)
    assert not (tmp_path / "out").exists()


def test_held_out_labels_train_nothing(
    make_table: Callable[..., Path],
    digits: tuple[np.ndarray, np.ndarray],
    model_folder: Path,
    labels_folder: Path,
    tmp_path: Path,
) -> None:
    """Two held-out labels of each other's class, swapped: subsets, weights and losses stay the same."""
    labels, test = digits[1][:300].copy(), np.arange(300) % 5 == 4
    train = np.flatnonzero(~test)
    _, held_out = hold_out(labels[train], QUICK.held_out_share, 0)
    first = make_table("first", labels=labels)
    images, _ = digits
    a = train[held_out[0]]
    b = next(train[i] for i in held_out if labels[train[i]] != labels[a])
    swapped = images[:300].copy()
    swapped[[a, b]] = swapped[[b, a]]
    second = write_table(tmp_path / "second", swapped, labels, test, [str(digit) for digit in range(10)])
    losses = []
    for table in (first, second):
        parameters = Finetuning(steps=6, batch_size=32, label_shares=(1.0,))
        finetune(model_folder, labels_folder, table, tmp_path / "out", parameters, 0)
        lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if "scratch" in line])
    assert losses[0] == losses[1]
