"""Probes against naive references and scikit-learn, and the properties of METHODS section 23."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_model, write_table
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from unlabeled.data.table import ImageTable
from unlabeled.digest import tree_digest
from unlabeled.errors import InputError
from unlabeled.features import Standardisation, extract, random_encoder
from unlabeled.nets.encoder import Encoder, load_encoder
from unlabeled.parameters import Encoder as EncoderParameters
from unlabeled.parameters import Evaluation, Training
from unlabeled.probes.baselines import pixels, principal_components
from unlabeled.probes.classifier import Classifier
from unlabeled.probes.collapse import collapse
from unlabeled.probes.evaluate import BASELINES, EVALUATION, evaluate, evaluate_baselines
from unlabeled.probes.few_labels.training import class_probabilities
from unlabeled.probes.knn import weighted_knn
from unlabeled.probes.linear import choose_regularisation, fit_linear_probe
from unlabeled.probes.retrieval import view_retrieval
from unlabeled.probes.subsets import hold_out, label_subset
from unlabeled.training.pretrain import pretrain


@pytest.fixture(scope="module")
def split(digits: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Digits as float32 pixels: 1,198 to train and 599 to test, with labels."""
    images, labels = digits
    x, test = images.reshape(len(images), -1).astype(np.float32) / 255, np.arange(len(images)) % 3 == 2
    return x[~test], labels[~test], x[test], labels[test]


# Features


def test_extraction_leaves_the_encoder_as_it_was(digits_table: Path, model_folder: Path) -> None:
    encoder, table = load_encoder(model_folder).train(), ImageTable(digits_table)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    features = extract(encoder, table, table.indices("test"), batch_size=100)
    assert encoder.training, "the mode is given back"
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert (
        features.shape == (len(table.indices("test")), encoder.feature_dim) and features.dtype == np.float32
    )


def test_extraction_is_in_eval_mode_and_does_not_depend_on_the_batch(
    digits_table: Path, model_folder: Path
) -> None:
    encoder, table = load_encoder(model_folder), ImageTable(digits_table)
    indices = np.array([5, 3, 900, 5])
    features = extract(encoder.train(), table, indices, batch_size=3)
    with torch.no_grad():
        expected = encoder.eval()(torch.from_numpy(table.images(indices)).float() / 255).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-5)
    np.testing.assert_allclose(features[0], features[3], atol=1e-6)


@pytest.mark.parametrize(
    ("side", "expected"), [(8, [500, 20]), (32, [500, 20]), (128, [31, 9]), (800, [1, 1])]
)
def test_the_larger_images_are_the_fewer_are_embedded_together(
    side: int, expected: list[int], tmp_path: Path
) -> None:
    count = sum(expected)
    images, none = np.zeros((count, 1, side, side), np.uint8), np.full(count, -1)
    table = ImageTable(write_table(tmp_path / "table", images, none, none > 0, []))
    classifier, seen = Classifier(Encoder("pixel_cnn", 1, 1, (1, side, side), 0.5, 0.3), 2), []
    classifier.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    extract(classifier.encoder, table, np.arange(count))
    class_probabilities(classifier, table, np.arange(count))
    assert seen == 2 * expected


def test_extraction_refuses_a_diverged_encoder(digits_table: Path, model_folder: Path) -> None:
    encoder = load_encoder(model_folder)
    with torch.no_grad():
        next(encoder.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="diverged"):
        extract(encoder, ImageTable(digits_table), np.arange(10))


def test_random_encoder_has_measured_statistics_and_keeps_the_global_random_state(
    digits_table: Path, model_folder: Path
) -> None:
    table, settings = ImageTable(digits_table), load_encoder(model_folder).settings
    state = torch.get_rng_state()
    first, second = (
        random_encoder(settings, table, table.indices("train"), 7, torch.device("cpu")) for _ in range(2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert not first.training
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    norm = next(module for module in first.modules() if isinstance(module, torch.nn.BatchNorm2d))
    assert not torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))


def test_standardisation_turns_constant_features_into_zeros() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (500, 4)).astype(np.float32)
    x[:, 2] = 0.1
    z = Standardisation(x)(x)
    np.testing.assert_allclose(z[:, [0, 1, 3]].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(z[:, [0, 1, 3]].std(0), 1, atol=1e-5)
    np.testing.assert_allclose(z[:, 2], 0, atol=1e-5)


# Weighted kNN


def test_knn_of_one_neighbour_is_the_nearest_neighbour(split: tuple[np.ndarray, ...]) -> None:
    x, y, test_x, _ = split
    expected = KNeighborsClassifier(1, metric="cosine", algorithm="brute").fit(x, y).predict(test_x)
    np.testing.assert_array_equal(weighted_knn(x, y, test_x, neighbours=1), expected)


def test_knn_knows_its_training_points(split: tuple[np.ndarray, ...]) -> None:
    x, y, *_ = split
    assert (weighted_knn(x, y, x, neighbours=1) == y).all()


def test_knn_equals_a_naive_reference(split: tuple[np.ndarray, ...]) -> None:
    x, y, test_x, _ = split
    x, y, test_x = x[:200], y[:200], test_x[:60]
    expected = []
    for query in test_x:
        cosines = [query @ image / np.linalg.norm(query) / np.linalg.norm(image) for image in x]
        votes = np.zeros(10)
        for neighbour in np.argsort(cosines)[::-1][:20]:
            votes[y[neighbour]] += np.exp(cosines[neighbour] / 0.07)
        expected.append(votes.argmax())
    np.testing.assert_array_equal(weighted_knn(x, y, test_x, 20, 0.07, batch_size=7), expected)


def test_knn_weights_decide_between_one_near_and_two_far() -> None:
    train = np.array([[1, 0], [0.6, 0.8], [0.6, -0.8], [-1, 0], [-1, 0.1], [-1, -0.1]], np.float32)
    labels, query = np.array([0, 1, 1, 2, 2, 2]), np.array([[1, 0]], np.float32)
    assert weighted_knn(train, labels, query, 3, temperature=0.07) == 0
    assert weighted_knn(train, labels, query, 3, temperature=10) == 1
    assert weighted_knn(train, labels, query, 3, temperature=1e-4) == 0, "no overflow"


def test_knn_asks_half_of_a_tiny_set_at_most() -> None:
    train, labels = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 1]], np.float32), np.array([0, 0, 1, 1])
    np.testing.assert_array_equal(weighted_knn(train, labels, train, neighbours=20), labels)
    assert weighted_knn(train[:1], labels[:1], train, neighbours=20).tolist() == [0, 0, 0, 0]


# Linear probe


def test_linear_probe_is_scikit_learns_logistic_regression(split: tuple[np.ndarray, ...]) -> None:
    x, y, test_x, _ = split
    x, test_x = principal_components(x, test_x, dimensions=20)
    fit, held_out = hold_out(y, 0.1, 0)
    probe = fit_linear_probe(x, y, 10, fit, held_out, iterations=2000)
    z = Standardisation(x)
    reference = LogisticRegression(C=probe.regularisation, max_iter=5000, tol=1e-8).fit(z(x).astype(float), y)
    np.testing.assert_allclose(probe.weight * z.scale, reference.coef_, atol=0.02)
    logits = test_x @ probe.weight.T + probe.bias
    np.testing.assert_allclose(logits, reference.decision_function(z(test_x)), atol=0.1)
    assert (probe.predict(test_x) == reference.predict(z(test_x))).mean() > 0.995


def test_linear_probe_of_two_classes_and_of_missing_classes(split: tuple[np.ndarray, ...]) -> None:
    x, y, test_x, test_y = split
    x, test_x = principal_components(x, test_x, dimensions=20)
    for present in ([3, 8], [1, 3, 8]):
        mine, theirs = np.isin(y, present), np.isin(test_y, present)
        fit, held_out = hold_out(y[mine], 0.2, 0)
        probe = fit_linear_probe(x[mine], y[mine], 10, fit, held_out, iterations=2000)
        predictions = probe.predict(test_x)
        assert probe.weight.shape == (10, 20) and np.isfinite(probe.bias).all()
        assert set(predictions) <= set(present), "a class without an image is never predicted"
        assert (predictions[theirs] == test_y[theirs]).mean() > 0.9
        z = Standardisation(x[mine])
        reference = LogisticRegression(C=probe.regularisation, max_iter=5000, tol=1e-8)
        reference.fit(z(x[mine]).astype(float), y[mine])
        logits = (test_x @ probe.weight.T + probe.bias)[:, present]
        odds = np.exp(logits - logits.max(1, keepdims=True))
        # Under a weak penalty the minimum is flat: float32 ends a little before float64.
        np.testing.assert_allclose(
            odds / odds.sum(1, keepdims=True), reference.predict_proba(z(test_x)), atol=0.1
        )


def test_linear_probe_without_refit_never_sees_the_held_out_part(split: tuple[np.ndarray, ...]) -> None:
    x, y, *_ = split
    fit, held_out = hold_out(y, 0.2, 0)
    probe = fit_linear_probe(x, y, 10, fit, held_out, refit=False)
    standardise = Standardisation(x[fit])
    reference = LogisticRegression(C=probe.regularisation, max_iter=200, tol=1e-6).fit(
        standardise(x[fit]), y[fit]
    )
    np.testing.assert_allclose(probe.weight * standardise.scale, reference.coef_, atol=1e-4)
    assert fit_linear_probe(x, y, 10, fit, held_out[:0]).regularisation == 1, "nothing to choose by"


def test_regularisation_is_strong_for_noise_and_weak_where_it_helps(split: tuple[np.ndarray, ...]) -> None:
    x, y, *_ = split
    rng = np.random.default_rng(0)
    fit, held_out = np.arange(300), np.arange(300, len(x))
    noisy = np.concatenate([x[:, :8], rng.normal(size=(len(x), 500)).astype(np.float32)], 1)
    assert choose_regularisation(noisy, y, fit, held_out, 200) <= 0.01
    assert choose_regularisation(x, y, fit, held_out, 200) >= 0.01


# Collapse


def test_collapse_of_constant_features_is_rank_zero() -> None:
    for features in (np.ones((50, 8), np.float32), np.zeros((50, 8), np.float32)):
        noise = np.random.default_rng(0).normal(0, 1e-7, features.shape).astype(np.float32)
        for collapsed in (features, features + noise * (features.max() > 0)):
            result = collapse(collapsed)
            assert result.effective_rank == result.participation_ratio == 0
            assert result.std == pytest.approx(0, abs=1e-5)
    assert collapse(np.ones((50, 8), np.float32)).cosine == pytest.approx(1)


def test_collapse_of_an_isotropic_gaussian_is_none() -> None:
    d = 16
    result = collapse(np.random.default_rng(0).normal(size=(20_000, d)).astype(np.float32))
    assert result.effective_rank == pytest.approx(d, rel=0.01)
    assert result.participation_ratio == pytest.approx(d, rel=0.02)
    assert result.std == pytest.approx(1 / np.sqrt(d), rel=0.02)
    assert result.cosine == pytest.approx(0, abs=0.01)


def test_collapse_equals_its_definitions(split: tuple[np.ndarray, ...]) -> None:
    x = split[0][:100].astype(np.float64)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = unit @ unit.T
    s = np.linalg.svd(x - x.mean(0), compute_uv=False)
    p = s[s > 1e-9] / s.sum()
    result = collapse(x.astype(np.float32))
    assert result.cosine == pytest.approx(cosines[~np.eye(100, dtype=bool)].mean(), abs=1e-5)
    assert result.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
    assert result.participation_ratio == pytest.approx((s**2).sum() ** 2 / (s**4).sum(), rel=1e-3)


def test_collapse_on_a_line_is_rank_one() -> None:
    line = np.outer(np.linspace(-1, 1, 50), np.arange(1, 9)).astype(np.float32)
    assert collapse(line).effective_rank == pytest.approx(1, abs=1e-3)


# Subsets


def test_label_subsets_are_nested_stratified_and_repeat() -> None:
    labels = np.random.default_rng(0).choice(5, 2000, p=[0.4, 0.3, 0.2, 0.09, 0.01])
    small, middle, whole = (label_subset(labels, share, 3) for share in (0.01, 0.1, 1.0))
    assert set(small) < set(middle) < set(whole) and len(whole) == 2000
    np.testing.assert_array_equal(small, label_subset(labels, 0.01, 3))
    assert not np.array_equal(small, label_subset(labels, 0.01, 4))
    counts = np.bincount(labels)
    np.testing.assert_array_equal(
        np.bincount(labels[middle]),
        np.minimum(counts, np.maximum(4, [round(0.1 * count) for count in counts])),
    )
    assert (np.bincount(labels[small]) >= np.minimum(4, counts)).all()


def test_held_out_part_is_disjoint_stratified_and_leaves_something_of_every_class() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 10, 2, 1])
    fit, held_out = hold_out(labels, 0.1, 0)
    assert sorted([*fit, *held_out]) == list(range(len(labels)))
    assert np.bincount(labels[held_out], minlength=4).tolist() == [10, 1, 1, 0]
    nothing = hold_out(np.arange(5), 0.5, 0)
    assert len(nothing[0]) == 5 and len(nothing[1]) == 0


# Baselines and the evaluate step


def test_pixels_and_principal_components(digits_table: Path, tmp_path: Path) -> None:
    table = ImageTable(digits_table)
    raw = pixels(table, np.array([3, 1]))
    np.testing.assert_allclose(raw, table.images([3, 1]).reshape(2, -1) / 255, atol=1e-6)
    large = np.random.default_rng(0).integers(0, 256, (4, 3, 64, 96), dtype=np.uint8)
    folder = write_table(tmp_path / "large", large, np.zeros(4, int), np.zeros(4, bool), ["a"])
    shrunk = pixels(ImageTable(folder), np.arange(4)).reshape(4, 3, 32, 32)
    np.testing.assert_allclose(shrunk, large.reshape(4, 3, 32, 2, 32, 3).mean((3, 5)) / 255, atol=1e-6)
    train, other = principal_components(raw, raw[:1])
    assert train.shape == (2, 2) and other.shape == (1, 2)
    everything = pixels(table, table.indices("train"))
    (projected,) = principal_components(everything, dimensions=5)
    centred = everything - everything.mean(0)
    assert projected.var(0).sum() == pytest.approx(
        (np.linalg.svd(centred)[1][:5] ** 2).sum() / len(centred), rel=1e-3
    )


def test_view_retrieval_is_chance_for_features_that_tell_nothing(
    digits_table: Path, model_folder: Path
) -> None:
    encoder, table = load_encoder(model_folder), ImageTable(digits_table)
    train = table.indices("train")
    before = torch.get_rng_state()
    found = view_retrieval(encoder, table, train, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert found == view_retrieval(encoder, table, train, 0) != view_retrieval(encoder, table, train, 1)
    assert 0.05 < found < 0.9
    for parameter in encoder.parameters():
        parameter.data.zero_()
    assert view_retrieval(encoder, table, train, 0) == pytest.approx(1 / len(train))


def test_view_retrieval_prefers_what_was_learned_where_the_rank_prefers_what_was_not(
    digits_table: Path, tmp_path: Path
) -> None:
    training = Training(steps=100, batch_size=128, threads=1, checkpoint_every=100)
    settings = {"name": "simclr"}
    pretrain(
        digits_table,
        tmp_path / "model",
        settings,
        EncoderParameters(width=32),
        training,
        0,
        tmp_path / "checkpoints",
    )
    evaluate(tmp_path / "model", digits_table, tmp_path / "evaluation", Evaluation(), 0)
    learned = json.loads((tmp_path / "evaluation" / EVALUATION).read_text())
    evaluate_baselines(digits_table, tmp_path / "baselines", Evaluation(), 0, [EncoderParameters(width=32)])
    untrained = json.loads((tmp_path / "baselines" / BASELINES).read_text())["rows"][-1]
    assert untrained["method"] == "random init" and learned["linear"] > untrained["linear"]
    assert learned["view_retrieval"] > 1.2 * untrained["view_retrieval"]
    assert learned["effective_rank"] < untrained["effective_rank"]


def test_evaluate_digits(digits_table: Path, model_folder: Path, tmp_path: Path) -> None:
    before = tree_digest(model_folder)
    returned = evaluate(model_folder, digits_table, tmp_path / "evaluation", Evaluation(), 0)
    result = json.loads((tmp_path / "evaluation" / EVALUATION).read_text())
    assert tree_digest(model_folder) == before
    assert result["method"] == "simclr" and result["family"] == "contrast"
    for key in ("knn", "knn_standardised", "linear", "held_out_knn"):
        assert 0.7 < result[key] <= 1, key
    assert result["majority"] < 0.2 < result["linear"]
    matrix = np.array(result["confusion"])
    assert matrix.sum() == 359 and np.trace(matrix) / 359 == pytest.approx(result["linear"])
    assert 1 < result["effective_rank"] <= 128
    assert returned["seconds"] > 0 and "seconds" not in result and returned["linear"] == result["linear"]
    evaluate(model_folder, digits_table, tmp_path / "again", Evaluation(), 0)
    assert tree_digest(tmp_path / "evaluation") == tree_digest(tmp_path / "again")


def test_evaluate_baselines_of_digits(digits_table: Path, tmp_path: Path) -> None:
    nets = [EncoderParameters(width=16), EncoderParameters(width=8)]
    evaluate_baselines(digits_table, tmp_path / "baselines", Evaluation(), 0, nets)
    rows = json.loads((tmp_path / "baselines" / BASELINES).read_text())["rows"]
    names = ["raw pixels", "PCA-128", "random init", "random init, small_resnet 8"]
    assert [row["method"] for row in rows] == names
    assert all(row["knn"] > 0.95 and row["linear"] > 0.9 for row in rows[:2])
    assert all(row["majority"] + 0.5 < row["knn"] < rows[0]["knn"] for row in rows[2:])
    assert all("confusion" not in row and row["family"] == "baseline" for row in rows)


@pytest.mark.parametrize("labels", ["none", "one class"])
def test_evaluate_without_usable_labels_scores_null(
    labels: str, make_table: Callable[..., Path], model_folder: Path, tmp_path: Path
) -> None:
    table = make_table("table", labels=np.full(300, -1 if labels == "none" else 4))
    evaluate(model_folder, table, tmp_path / "evaluation", Evaluation(), 0)
    result = json.loads((tmp_path / "evaluation" / EVALUATION).read_text())
    for key in ("knn", "knn_standardised", "linear", "held_out_knn", "confusion"):
        assert result[key] is None
    assert result["effective_rank"] > 1 and result["collapse"]["std"] > 0
    assert evaluate_baselines(table, tmp_path / "baselines", Evaluation(), 0)["rows"][0]["knn"] is None


def test_evaluate_uses_the_labels_that_are_there(
    make_table: Callable[..., Path], digits: tuple[np.ndarray, np.ndarray], model_folder: Path, tmp_path: Path
) -> None:
    labels = np.where(np.arange(300) % 3 == 0, -1, digits[1][:300])
    result = evaluate(model_folder, make_table("table", labels=labels), tmp_path / "e", Evaluation(), 0)
    assert result["labelled"] == ((labels >= 0) & (np.arange(300) % 5 != 4)).sum()
    assert result["knn"] > 0.5 and result["linear"] > 0.5


@pytest.mark.parametrize("count", [2, 20])
def test_evaluate_tiny_sets_and_sets_without_test(
    count: int, make_table: Callable[..., Path], model_folder: Path, tmp_path: Path
) -> None:
    table = make_table("table", count=count, test=np.zeros(count, bool))
    result = evaluate(model_folder, table, tmp_path / "evaluation", Evaluation(), 0)
    assert result["knn"] is result["linear"] is None and result["test_images"] == 0
    assert (result["held_out_knn"] is None) == (count == 2)
    table = make_table("with test", count=20)
    assert evaluate(model_folder, table, tmp_path / "evaluation", Evaluation(), 0)["linear"] is not None


def test_evaluate_refuses_what_it_cannot_use(
    make_table: Callable[..., Path], digits_table: Path, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is no model"):
        evaluate(tmp_path / "empty", digits_table, tmp_path / "out", Evaluation(), 0)
    with pytest.raises(InputError, match="is no image table"):
        evaluate(model_folder, tmp_path / "empty", tmp_path / "out", Evaluation(), 0)
    table = make_table("one", count=20, test=np.arange(20) > 0)
    with pytest.raises(InputError, match="1 train images"):
        evaluate(model_folder, table, tmp_path / "out", Evaluation(), 0)
    assert not (tmp_path / "out").exists()


def test_colour_images_and_other_sizes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = rng.integers(0, 128, (60, 3, 20, 20)) + 100 * labels[:, None, None, None]
    table = write_table(
        tmp_path / "table", images.astype(np.uint8), labels, np.arange(60) >= 40, ["dark", "bright"]
    )
    model = write_model(tmp_path / "model", (3, 20, 20))
    result = evaluate(model, table, tmp_path / "evaluation", Evaluation(), 0)
    assert result["linear"] == result["knn_standardised"] == 1
