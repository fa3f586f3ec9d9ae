"""SCAN against METHODS section 17: neighbours, loss, heads, their consensus, self-training."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from unlabeled.data.table import ImageTable
from unlabeled.digest import tree_digest
from unlabeled.export.models import load_served
from unlabeled.features import Standardisation, extract
from unlabeled.files import read_json
from unlabeled.nets.encoder import load_encoder
from unlabeled.parameters import SelfLabel
from unlabeled.selflabel.cluster import self_label
from unlabeled.selflabel.clusters import Clusters, load_clustered_encoder
from unlabeled.selflabel.consensus import consensus, match
from unlabeled.selflabel.metrics import cluster_scores
from unlabeled.selflabel.neighbours import mine_neighbours, principal_axes
from unlabeled.selflabel.scan import fit_scan, head_losses, scan_loss, train_heads
from unlabeled.selflabel.self_training import (
    ClusterNet,
    balanced_cross_entropy,
    confident_labels,
    self_train,
)

QUICK = {"heads": 6, "steps": 60, "batch_size": 200}


def blobs(count: int = 600, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Standardised features, float32 (N, 12), of well separated classes, and the classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    x = rng.normal(size=(classes, 12))[labels] * 4 + rng.normal(size=(count, 12))
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32), labels


def accuracy(clusters: np.ndarray, labels: np.ndarray, k: int) -> float:
    return cluster_scores(clusters, labels, clusters, labels, k, k)["acc"]


# Neighbours


@pytest.mark.parametrize(("queries", "candidates"), [(1_000, 65_536), (64, 100), (33, 5), (70, 7)])
def test_neighbours_equal_scikit_learns_in_any_blocks(queries: int, candidates: int) -> None:
    x = torch.randn(300, 8)
    oracle = NearestNeighbors(n_neighbors=8, metric="cosine", algorithm="brute").fit(x)
    expected = oracle.kneighbors(x)[1][:, 1:]  # the first is the image itself
    np.testing.assert_array_equal(mine_neighbours(x, 7, queries, candidates), expected)


def test_no_image_is_its_own_neighbour_but_its_copy_is() -> None:
    x = torch.randn(50, 8).repeat(2, 1)
    nearest = mine_neighbours(x, 3, queries=16, candidates=30)
    assert not (nearest == torch.arange(100)[:, None]).any()
    np.testing.assert_array_equal(nearest[:, 0], (torch.arange(100) + 50) % 100)


def test_neighbours_are_by_angle_and_all_can_be_asked_for() -> None:
    x = torch.randn(40, 8)
    nearest = mine_neighbours(x, 39)
    assert torch.equal(mine_neighbours(x * torch.rand(40, 1).add(0.1), 39), nearest)
    others = torch.arange(40).expand(40, -1)[~torch.eye(40, dtype=torch.bool)].view(40, 39)
    assert torch.equal(nearest.sort(1).values, others)


def test_principal_axes_are_the_directions_of_largest_variance() -> None:
    z = torch.randn(500, 6) * torch.tensor([3.0, 1, 5, 2, 0.1, 0.5])
    axes = principal_axes(z, 3)
    torch.testing.assert_close(axes.T @ axes, torch.eye(3))
    assert axes.abs().argmax(0).tolist() == [2, 0, 3]
    assert principal_axes(z, 128).shape == (6, 6)


# The loss


def logits_of(clusters: list[int], k: int = 10) -> torch.Tensor:
    """Sure answers: logits (B, 1, K)."""
    return 1000 * torch.nn.functional.one_hot(torch.tensor(clusters), k).float().unsqueeze(1)


def test_loss_has_the_known_values() -> None:
    uniform, balanced, collapsed = torch.zeros(10, 1, 10), logits_of([*range(10)]), logits_of([3] * 10)
    assert scan_loss(uniform, uniform, 5).item() == pytest.approx(math.log(10) - 5 * math.log(10), abs=1e-5)
    assert scan_loss(uniform, uniform, 5).item() == pytest.approx(-9.2103, abs=1e-4)
    assert scan_loss(balanced, balanced, 5).item() == pytest.approx(-11.5129, abs=1e-4)
    assert scan_loss(collapsed, collapsed, 5).item() == pytest.approx(0, abs=1e-6)


def test_usage_is_that_of_the_anchors_alone() -> None:
    uniform, collapsed = torch.zeros(10, 1, 10), logits_of([3] * 10)
    assert scan_loss(uniform, collapsed, 5).item() == pytest.approx(-4 * math.log(10), abs=1e-5)
    assert scan_loss(collapsed, uniform, 5).item() == pytest.approx(math.log(10), abs=1e-5)


def test_loss_is_by_hand_for_two_images() -> None:
    p, q = torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    agreement = (math.log(0.9 * 0.7 + 0.1 * 0.3) + math.log(0.4 * 0.2 + 0.6 * 0.8)) / 2
    usage = 0.65 * math.log(0.65) + 0.35 * math.log(0.35)
    loss = scan_loss(p.log().unsqueeze(1) + 3, q.log().unsqueeze(1) - 7, 2)
    assert loss.item() == pytest.approx(2 * usage - agreement, abs=1e-6)


def test_heads_do_not_see_each_other_and_clusters_have_no_names() -> None:
    anchors, neighbours = torch.randn(2, 16, 3, 5)
    together = scan_loss(anchors, neighbours, 2)
    alone = [scan_loss(anchors[:, [h]], neighbours[:, [h]], 2).item() for h in range(3)]
    assert together.tolist() == pytest.approx(alone, abs=1e-6)
    order = torch.randperm(5)
    torch.testing.assert_close(scan_loss(anchors[..., order], neighbours[..., order], 2), together)


def test_gradients_stay_finite_where_probabilities_vanish() -> None:
    anchors, neighbours = logits_of([0, 1, 1, 2]).requires_grad_(), logits_of([5, 1, 2, 2]).requires_grad_()
    scan_loss(anchors, neighbours, 5).sum().backward()
    assert torch.isfinite(anchors.grad).all() and torch.isfinite(neighbours.grad).all()
    assert anchors.grad[0].abs().max() > 0.1, "an image far from its neighbour is still pulled"


# Heads


def test_heads_find_blobs_and_repeat() -> None:
    z, labels = blobs()
    weight, bias, values = fit_scan(z, 4, SelfLabel(**QUICK), 0)
    assert accuracy((z @ weight.T + bias).argmax(1), labels, 4) == 1
    assert weight.shape == (4, 12) and weight.dtype == bias.dtype == np.float32
    assert len(values["head_losses"]) == len(values["head_agreements"]) == 6
    again, other = fit_scan(z, 4, SelfLabel(**QUICK), 0), fit_scan(z, 4, SelfLabel(**QUICK), 1)
    np.testing.assert_array_equal(weight, again[0])
    assert not np.array_equal(weight, other[0])


def test_heads_are_trained_to_a_low_loss_and_judged_over_all_neighbours() -> None:
    x, _ = map(torch.from_numpy, blobs())
    neighbours = mine_neighbours(x, 5)
    parameters = SelfLabel(**QUICK)
    weight, bias = train_heads(x, neighbours, 4, parameters, 0)
    losses = head_losses(x, neighbours, weight, bias, 2.0)
    p = (x @ weight[1].T + bias[1]).softmax(1).double()
    pairs = (p.unsqueeze(1) * p[neighbours]).sum(2).log().mean()
    usage = p.mean(0)
    assert losses[1] == pytest.approx((2 * (usage * usage.log()).sum() - pairs).item(), abs=1e-4)
    untrained = head_losses(x, neighbours, torch.zeros(1, 4, 12), torch.zeros(1, 4), 2.0)[0]
    assert untrained == pytest.approx(-math.log(4), abs=1e-5)
    assert losses.min() < -1.9 * math.log(4), "near the lowest possible, -2 log 4"


def test_heads_on_sets_that_leave_little_room() -> None:
    for z, k in (
        (np.zeros((30, 4), np.float32), 3),
        (np.repeat(np.eye(2, 4, dtype=np.float32), 15, 0), 3),
        (np.eye(2, dtype=np.float32), 2),
        (blobs(20)[0], 1),
        (blobs(20)[0], 20),
    ):
        weight, bias, values = fit_scan(z, k, SelfLabel(heads=1, steps=5), 0)
        assert weight.shape == (k, z.shape[1]) and np.isfinite(weight).all() and np.isfinite(bias).all()
        assert np.isfinite(values["head_losses"]).all()


# Consensus


def test_match_undoes_a_permutation() -> None:
    rng = np.random.default_rng(0)
    first, order = rng.integers(0, 6, 500), rng.permutation(6)
    found, share = match(first, order[first], 6)
    np.testing.assert_array_equal(found, order)
    assert share == 1
    noisy = np.where(rng.random(500) < 0.2, (order[first] + 1) % 6, order[first])
    assert match(first, noisy, 6)[1] == pytest.approx((noisy == order[first]).mean())


def test_permuted_copies_of_a_head_average_to_that_head() -> None:
    z, _ = blobs()
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(4, 12)), rng.normal(size=4)
    orders = [rng.permutation(4) for _ in range(5)]
    assignments = np.stack([(z @ weight[order].T + bias[order]).argmax(1) for order in orders], 1)
    found, found_bias, agreements = consensus(
        np.stack([weight[order] for order in orders]),
        np.stack([bias[order] for order in orders]),
        assignments,
        np.arange(5.0),
    )
    np.testing.assert_allclose(agreements, 1)
    matched = [int(np.abs(weight - row).sum(1).argmin()) for row in found]
    assert sorted(matched) == [0, 1, 2, 3]
    np.testing.assert_allclose(found, weight[matched])
    np.testing.assert_allclose(found_bias, bias[matched])


def test_consensus_leaves_out_high_losses_and_outvotes_a_lone_low_one() -> None:
    z, labels = blobs()
    rng = np.random.default_rng(0)
    centroids = np.stack([z[labels == label].mean(0) for label in range(4)])
    good = [(centroids + rng.normal(size=centroids.shape) * 0.05)[rng.permutation(4)] for _ in range(4)]
    bad = [rng.normal(size=centroids.shape) for _ in range(5)]
    weights = np.stack([*good, *bad])
    biases = -np.square(weights).sum(2) / 2
    assignments = np.stack([(z @ w.T + b).argmax(1) for w, b in zip(weights, biases)], 1)
    # One of the bad heads has the lowest loss of all.
    losses = np.array([1.0, 1.1, 1.2, 1.3, 0.5, 3, 3, 3, 3])
    alone = accuracy(assignments[:, 4], labels, 4)
    weight, bias, agreements = consensus(weights, biases, assignments, losses)
    assert alone < 0.8 < 0.95 < accuracy((z @ weight.T + bias).argmax(1), labels, 4)
    assert agreements[4] == 1 > 0.95 > agreements[:4].max()


# Self-training


def test_only_confident_images_are_learned_and_no_gradient_reaches_their_labels() -> None:
    probabilities = torch.tensor([[0.98, 0.02], [0.4, 0.6], [0.005, 0.995]])
    logits = probabilities.log().requires_grad_()
    confident, labels = confident_labels(logits, 0.9)
    assert confident.tolist() == [True, False, True] and labels.tolist() == [0, 1]
    assert not labels.requires_grad and not confident.requires_grad
    assert confident_labels(logits, 0.999)[1].tolist() == []


def test_every_cluster_has_equal_weight() -> None:
    logits = torch.randn(7, 3, requires_grad=True)
    labels = torch.tensor([0, 0, 0, 0, 0, 2, 2])
    loss = balanced_cross_entropy(logits, labels)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert loss.item() == pytest.approx(((losses[:5].mean() + losses[5:].mean()) / 2).item())
    oracle = torch.nn.functional.cross_entropy(logits, labels, weight=torch.tensor([1 / 5, 0, 1 / 2]))
    assert loss.item() == pytest.approx(oracle.item())


def test_net_answers_as_the_clusters_do(digits_table: Path, model_folder: Path) -> None:
    table, encoder = ImageTable(digits_table), load_encoder(model_folder)
    features = extract(encoder, table, np.arange(40))
    standardise, rng = Standardisation(features), np.random.default_rng(0)
    weight, bias = rng.normal(size=(5, 128)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    clusters = Clusters(standardise.mean, standardise.scale, weight, bias)
    net = ClusterNet(encoder, clusters).eval()
    with torch.no_grad():
        logits = net(torch.from_numpy(table.images(np.arange(40))).float() / 255)
    np.testing.assert_allclose(logits, clusters.logits(features), atol=1e-3)
    for name, value in vars(net.clusters()).items():
        np.testing.assert_array_equal(value, getattr(clusters, name))


def test_without_a_confident_answer_nothing_is_learned(digits_table: Path, model_folder: Path) -> None:
    table, encoder = ImageTable(digits_table), load_encoder(model_folder)
    unsure = Clusters(*(np.full(shape, value, np.float32) for shape, value in
                        ((128, 0), (128, 1), ((10, 128), 0), (10, 0))))  # fmt: skip
    trained, clusters, values = self_train(encoder, unsure, table, SelfLabel(self_training_steps=3), 0)
    assert values == {"steps": 3, "confident": 0}
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name
    assert not clusters.weight.any() and not trained.training


def test_self_training_leaves_the_encoder_given_and_the_random_state_alone(
    digits_table: Path, model_folder: Path
) -> None:
    table, encoder = ImageTable(digits_table), load_encoder(model_folder)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    sure = Clusters(np.zeros(128, np.float32), np.ones(128, np.float32),
                    np.random.default_rng(0).normal(size=(10, 128)).astype(np.float32) * 30,
                    np.zeros(10, np.float32))  # fmt: skip
    state = torch.random.get_rng_state()
    trained, clusters, values = self_train(encoder, sure, table, SelfLabel(self_training_steps=3), 0)
    assert values["confident"] > 0.5 and not np.array_equal(clusters.weight, sure.weight)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(trained.state_dict()["net.0.weight"], before["net.0.weight"])


# The step


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "scan", **QUICK},
        {"method": "sela", "restarts": 1},
        {"method": "kmeans", "restarts": 2, "self_training_steps": 3, "confidence": 0.5},
        {"method": "scan", **QUICK, "self_training_steps": 3},
    ],
    ids=["scan", "sela", "kmeans and self-training", "scan and self-training"],
)
def test_without_labels_the_same_bits(
    make_table: Callable[..., Path],
    digits: tuple[np.ndarray, np.ndarray],
    model_folder: Path,
    tmp_path: Path,
    settings: dict,
) -> None:
    parameters = SelfLabel(clusters=7, **settings)
    tables = {
        "true": make_table("true"),
        "shuffled": make_table("shuffled", labels=np.random.default_rng(0).permutation(digits[1][:300])),
        "none": make_table("none", labels=np.full(300, -1)),
    }
    for name, table in tables.items():
        self_label(model_folder, table, tmp_path / f"labels {name}", parameters, 0)
    files = {file.name for file in (tmp_path / "labels true").iterdir()}
    assert files >= {"labels.parquet", "clusters.safetensors", "gallery.npy"}
    assert ("model.safetensors" in files) == ("self_training_steps" in settings)
    for file in files - {"scores.json"}:
        assert len({(tmp_path / f"labels {name}" / file).read_bytes() for name in tables}) == 1, file
    scores = read_json(tmp_path / "labels true" / "scores.json")
    assert scores["clustering"] == settings["method"] and 0 <= scores["acc"] <= 1
    assert "acc" not in read_json(tmp_path / "labels none" / "scores.json")


def test_self_training_gives_the_artifact_its_own_encoder_and_export_serves_it(
    make_table: Callable[..., Path], model_folder: Path, tmp_path: Path
) -> None:
    folder, table = make_table("table"), tmp_path / "labels"
    parameters = SelfLabel(method="scan", **QUICK, self_training_steps=3, confidence=0.5)
    self_label(model_folder, folder, table, parameters, 0)
    self_label(model_folder, folder, tmp_path / "again", parameters, 0)
    assert tree_digest(table) == tree_digest(tmp_path / "again")
    images = ImageTable(folder)
    train = images.indices("train")
    own, clusters = load_clustered_encoder(table, model_folder), Clusters.load(table)
    frame = pd.read_parquet(table / "labels.parquet")
    np.testing.assert_array_equal(clusters.assign(extract(own, images, train)), frame["cluster"])
    served = load_served("clusterer", model_folder, table, model_folder)
    with torch.inference_mode():
        probabilities = served(torch.from_numpy(images.images(train)))
    np.testing.assert_allclose(probabilities.max(1).values, frame["confidence"], atol=1e-5)
    pretrained = extract(load_encoder(model_folder), images, train)
    assert np.abs(extract(own, images, train) - pretrained).max() > 1e-3
