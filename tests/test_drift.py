"""Drift: as many false alerts as were asked for, real shifts found, and logs of inputs read for what they are."""

import itertools
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import binom, kstest
from serving_fixtures import CLUSTERS, exported_run

from components.drift_alert.component import drift_alert
from serving.drift import check_drift, measure_drift
from serving.index import Index, unit
from serving.recent import read_recent
from serving.reservoir import Reservoir
from unlabeled.data.drift import (
    drift_test,
    gaussian_kernel,
    kernel_width,
    occupancy,
    occupancy_distance,
    squared_mmd,
)
from unlabeled.errors import CheckFailed, InputError
from unlabeled.files import read_json
from unlabeled.lineage.step import Artifact
from unlabeled.parameters import Drift

SMALL = Drift(permutations=199, alpha=0.05, min_images=5)


def mixture(count: int, seed: int, classes: int = 10, shift: float = 0.0) -> np.ndarray:
    """Embeddings of so many classes, as an index keeps them: float16 (count, 16)."""
    centres = np.random.default_rng(7).normal(size=(10, 16))
    random = np.random.default_rng(seed)
    return unit(centres[random.integers(classes, size=count)] + 0.4 * random.normal(size=(count, 16)) + shift)


# The statistic


def test_the_distance_of_a_tiny_example_is_what_the_formula_gives() -> None:
    x, y = np.array([[0.0], [1.0]]), np.array([[0.0], [2.0], [2.0]])
    # k(d) = exp(-d^2 / 2): within x k(1); within y k(2), k(2), k(0); across k(0), 2 k(2), k(1), 2 k(1).
    k = np.exp(-(np.arange(3) ** 2) / 2)
    expected = k[1] + (2 * k[2] + 1) / 3 - 2 * (k[0] + 2 * k[2] + 3 * k[1]) / 6
    assert squared_mmd(x, y, width=1.0) == pytest.approx(expected, abs=1e-12)
    # Distances of rows that differ: 3, 3, 4, 7, 7.
    assert kernel_width(np.array([[0.0], [0.0], [3.0], [7.0]])) == pytest.approx(4 / 2)
    assert gaussian_kernel(x, y, 2.0)[1, 1] == pytest.approx(np.exp(-1 / 8))


def test_the_exchanges_are_those_of_recent_with_held_out_images_and_the_training_images_stay() -> None:
    recent, held_out, training = (mixture(count, seed) for count, seed in ((5, 1), (3, 2), (9, 3)))
    test = drift_test(recent, training, held_out, Drift(permutations=2000, min_images=3))
    pool, rest = np.concatenate([recent, held_out]).astype(np.float64), training.astype(np.float64)
    width = kernel_width(rest)
    by_hand = {
        round(squared_mmd(pool[list(chosen)], rest, width), 9)
        for chosen in itertools.combinations(range(8), 5)
    }
    assert {round(value, 9) for value in test.exchanges} == by_hand
    assert test.distance == pytest.approx(squared_mmd(recent.astype(np.float64), rest, width))
    assert test.held_out == pytest.approx(squared_mmd(held_out.astype(np.float64), rest, width))


def test_false_alerts_are_as_rare_as_asked_for_even_where_held_out_is_not_like_training() -> None:
    # As by a test split that other people drew: a plain two-sample test would see it.
    training, checks = mixture(200, 0, shift=0.5), 300
    found = []
    for seed in range(checks):
        both = mixture(100, 1000 + seed)
        found.append(drift_test(both[:50], training, both[50:], SMALL, seed))
    assert np.mean([test.held_out for test in found]) > 0.02
    alerts = sum(test.drifted for test in found)
    assert binom.ppf(0.001, checks, SMALL.alpha) <= alerts <= binom.ppf(0.999, checks, SMALL.alpha)
    assert kstest([test.p_value for test in found], "uniform").pvalue > 0.001


@pytest.mark.parametrize(
    ("recent", "least"),
    [
        pytest.param(lambda seed: mixture(300, seed, classes=9), 0.9, id="a class is missing"),
        pytest.param(lambda seed: mixture(300, seed, shift=0.3), 1.0, id="all are moved"),
        pytest.param(lambda seed: unit(np.random.default_rng(seed).normal(size=(60, 16))), 1.0, id="other data"),
        pytest.param(lambda seed: np.repeat(mixture(1, seed), 60, 0), 1.0, id="one image again and again"),
    ],
)  # fmt: skip
def test_what_has_drifted_is_found(recent: Any, least: float) -> None:
    training, held_out = mixture(1000, 0), mixture(400, 1)
    tests = [drift_test(recent(seed), training, held_out, Drift()) for seed in range(10, 20)]
    assert np.mean([test.drifted for test in tests]) >= least


def test_recent_inputs_nearer_to_training_than_held_out_images_are_no_drift() -> None:
    training, held_out = mixture(500, 0), mixture(200, 1, shift=0.5)
    test = drift_test(mixture(200, 2), training, held_out, Drift())
    assert test.distance < test.held_out and test.p_value > 0.9 and not test.drifted


def test_the_order_of_the_images_tells_nothing() -> None:
    sets = mixture(120, 1), mixture(300, 2), mixture(90, 3)
    parameters = Drift(images=80)
    expected = drift_test(*sets, parameters, seed=4)
    shuffled = drift_test(*(np.random.default_rng(5).permutation(rows) for rows in sets), parameters, seed=4)
    assert shuffled[:4] == expected[:4] and (shuffled.exchanges == expected.exchanges).all()
    assert drift_test(*sets, parameters, seed=6).p_value != expected.p_value


def test_the_alert_is_p_at_most_alpha() -> None:
    training, held_out = mixture(100, 0), mixture(60, 1)
    for seed in range(40):
        test = drift_test(mixture(60, seed, classes=8), training, held_out, SMALL)
        assert test.drifted == (test.p_value <= SMALL.alpha), seed
        assert test.p_value == (1 + (test.exchanges >= test.distance).sum()) / 200


def test_equal_images_everywhere_are_no_drift_and_a_collapsed_encoder_is_told() -> None:
    one = mixture(1, 0)
    same = np.repeat(one, 60, 0)
    training = np.concatenate([same, mixture(40, 1)])
    test = drift_test(same, training, same, SMALL)
    assert test.p_value == 1 and not test.drifted
    with pytest.raises(InputError, match="collapsed"):
        drift_test(mixture(60, 2), same, mixture(60, 3), SMALL)


def test_too_little_to_tell_is_refused_with_what_it_takes() -> None:
    many = mixture(60, 0)
    with pytest.raises(InputError, match=r"49 recent images are too few .* drift.min_images asks for 50"):
        drift_test(many[:49], many, many, Drift())
    with pytest.raises(InputError, match="20 held-out images"):
        drift_test(many, many, many[:20], Drift())
    with pytest.raises(InputError, match="at least 9999 "):
        drift_test(many, many, many, Drift(alpha=1e-4))


def test_occupancy() -> None:
    shares = occupancy(np.array([0, 0, 2, 2]), 3)
    assert shares.tolist() == [0.5, 0, 0.5]
    assert occupancy_distance(shares, shares) == 0
    assert occupancy_distance(shares, np.array([0.0, 1.0, 0.0])) == pytest.approx(1)
    # Entropy of the mean, 1.5 bits, less the mean entropy, 1 bit and 1 bit.
    assert occupancy_distance(shares, np.array([0.5, 0.5, 0.0])) == pytest.approx(np.sqrt(0.5))


# What an application logs


def test_a_reservoir_is_a_uniform_sample(tmp_path: Path) -> None:
    kept = np.zeros(100)
    for _ in range(400):
        with Reservoir(tmp_path / "recent.npz", size=10) as recent:
            for start in range(0, 100, 7):
                recent.add(np.arange(start, min(start + 7, 100), dtype=np.float32)[:, None])
        with np.load(tmp_path / "recent.npz") as log:
            assert log["seen"] == 100 and len(np.unique(log["embeddings"])) == 10
            kept[log["embeddings"][:, 0].astype(int)] += 1
    # Each row is kept in a tenth of the samples: binomial(400, 0.1), 100 times.
    assert binom.ppf(1e-8, 400, 0.1) <= kept.min() and kept.max() <= binom.ppf(1 - 1e-8, 400, 0.1)


def test_a_reservoir_is_written_when_its_time_is_over_and_starts_anew(tmp_path: Path) -> None:
    now = 1000.0
    recent = Reservoir(tmp_path / "recent.npz", "images", hours=1, clock=lambda: now)
    recent.add(np.zeros((3, 1, 2, 2), np.uint8))
    assert not (tmp_path / "recent.npz").exists()
    now += 3600
    recent.add(np.ones((1, 1, 2, 2), np.uint8))
    with np.load(tmp_path / "recent.npz") as log:
        assert log["images"].shape == (3, 1, 2, 2) and log["images"].dtype == np.uint8
        assert (log["seen"], log["started"], log["ended"]) == (3, 1000, 4600)
    with pytest.raises(InputError, match=r"log of \(1, 2, 2\), got \(1, 3, 3\)"):
        recent.add(np.ones((1, 1, 3, 3), np.uint8))
    recent.close()
    with np.load(tmp_path / "recent.npz") as log:
        assert log["images"].max() == 1 and log["seen"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recent.npz"]
    with pytest.raises(InputError, match=r"\.npz file"):
        Reservoir(tmp_path / "recent")


def test_a_reservoir_serves_many_threads(tmp_path: Path) -> None:
    with Reservoir(tmp_path / "recent.npz", size=50) as recent:
        rows = np.ones((200, 4), np.float32)
        threads = [threading.Thread(target=recent.add, args=(rows,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with np.load(tmp_path / "recent.npz") as log:
        assert log["seen"] == 1600 and log["embeddings"].shape == (50, 4)


SHAPE = (1, 8, 8)


def write_images(folder: Path, count: int) -> None:
    (folder / "deep").mkdir(parents=True)
    for number in range(count):
        Image.fromarray(np.full((12, 10), number, np.uint8)).save(folder / "deep" / f"{number}.png")


def test_a_folder_of_images_is_read_as_ingest_reads_it(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 30)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    (tmp_path / "images" / ".hidden").write_bytes(b"")
    recent = read_recent(str(tmp_path / "images"), SHAPE, Drift(), 0)
    assert recent.images is not None and recent.images.shape == (30, *SHAPE) and recent.seen == 31
    assert sorted(np.unique(recent.images)) == list(range(30))
    assert [Path(file["path"]).name for file in recent.broken] == ["broken.png"]
    some = read_recent(str(tmp_path / "images"), SHAPE, Drift(images=5), 0)
    assert some.images is not None and len(some.images) + len(some.broken) == 5 and some.seen == 31
    coloured = read_recent(str(tmp_path / "images"), (3, 8, 8), Drift(images=5), 0)
    assert coloured.images is not None and coloured.images.shape[1:] == (3, 8, 8)


def test_logs_of_several_processes_are_read_as_one_from_anywhere() -> None:
    memory = fsspec.filesystem("memory")
    now = time.time()
    for name, count, started in (("a", 10, now - 7200), ("b", 30, now - 3600)):
        with memory.open(f"/inputs/{name}.npz", "wb") as file:
            np.savez(
                file, embeddings=np.full((count, 4), count, np.float32), seen=50, started=started, ended=now
            )
    recent = read_recent("memory://inputs", SHAPE, Drift(), 0)
    assert recent.embeddings is not None and recent.images is None
    assert np.bincount(recent.embeddings[:, 0].astype(int))[[10, 30]].tolist() == [10, 30]
    assert (recent.seen, recent.started, recent.ended) == (100, now - 7200, now)
    one = read_recent("memory://inputs/b.npz", SHAPE, Drift(images=7), 0)
    assert one.embeddings is not None and len(one.embeddings) == 7 and one.seen == 50
    memory.rm("/inputs", recursive=True)


OLD = time.time() - 100 * 3600


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"rows": np.zeros((9, 4))}, "neither `images` nor `embeddings`"),
        ({"images": np.zeros((9, 8, 8), np.uint8)}, r"expected is uint8 \(N, 1, H, W\)"),
        ({"images": np.zeros((9, 1, 8, 8), np.float32)}, "images are float32"),
        ({"images": np.zeros((9, 3, 8, 8), np.uint8)}, r"expected is uint8 \(N, 1, H, W\)"),
        ({"embeddings": np.zeros((9, 4), np.int64)}, "embeddings are int64"),
        ({"embeddings": np.full((9, 4), np.nan)}, "finite"),
        ({"embeddings": np.zeros((9, 4)), "started": OLD, "ended": OLD}, r"ended 100 hours ago, .*allows 48"),
    ],
)
def test_what_is_no_log_of_inputs_is_refused(tmp_path: Path, arrays: Any, words: str) -> None:
    np.savez(tmp_path / "recent.npz", **arrays)
    with pytest.raises(InputError, match=words) as refusal:
        read_recent(str(tmp_path / "recent.npz"), SHAPE, Drift(), 0)
    assert "recent.npz" in str(refusal.value) and "\n" not in str(refusal.value)


def test_where_no_log_is_and_where_logs_do_not_fit_is_told(tmp_path: Path) -> None:
    def refused(source: Path | str, words: str) -> None:
        with pytest.raises(InputError, match=words):
            read_recent(str(source), SHAPE, Drift(), 0)

    refused(tmp_path / "nothing", "no such file, or an empty folder")
    refused("carrier-pigeon://inputs", "cannot read recent inputs at carrier-pigeon://inputs")
    write_images(tmp_path / "both", 2)
    np.savez(tmp_path / "both" / "a.npz", embeddings=np.zeros((9, 4)))
    refused(tmp_path / "both", "npz files and others")
    shutil.rmtree(tmp_path / "both" / "deep")
    np.savez(tmp_path / "both" / "b.npz", embeddings=np.zeros((9, 5)))
    refused(tmp_path / "both", "different kinds or shapes")
    (tmp_path / "torn.npz").write_bytes((tmp_path / "both" / "a.npz").read_bytes()[:100])
    refused(tmp_path / "torn.npz", "torn.npz is no npz file")


# A run and its recent inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What drift reads of a run: 40 training images, 20 held out."""
    run, folder = exported_run(), tmp_path_factory.mktemp("run")
    shutil.copytree(run.index, folder / "index")
    shutil.copytree(run.repository / "encoder", folder / "repository" / "encoder")
    (folder / "labels").mkdir()
    clusters = pd.DataFrame({"id": [f"image-{i:03d}" for i in range(60)]})
    clusters.assign(cluster=np.arange(60) % CLUSTERS).to_parquet(folder / "labels" / "labels.parquet")
    return folder


def measured(folder: Path, output: Path, source: Path | str, url: str = "") -> dict[str, Any]:
    parameters = Drift(min_images=20, permutations=199)
    metrics = measure_drift("run-1", folder, str(source), url, output / "s", output / "p", parameters, 0)
    summary = read_json(output / "s")
    assert metrics["p_value"] == summary["p_value"] and metrics["images"] == summary["recent"]["images"]
    return summary


def test_recent_images_of_the_same_kind_pass_and_darker_ones_do_not(folder: Path, tmp_path: Path) -> None:
    images = exported_run().images(60, seed=9)
    np.savez(tmp_path / "same.npz", images=images)
    np.savez(tmp_path / "darker.npz", images=images // 3)
    summary = measured(folder, tmp_path, tmp_path / "same.npz")
    assert not summary["drift"] and summary["p_value"] > 0.01
    check_drift(summary)
    drift_alert.python_func(code_digest="", summary=Artifact(str(tmp_path / "s")))
    for name in ("training", "held_out", "recent"):
        assert sum(row[name] for row in summary["clusters"]) == pytest.approx(1)
    first = (tmp_path / "s").read_bytes(), (tmp_path / "p").read_bytes()
    measured(folder, tmp_path, tmp_path / "same.npz")
    assert first == ((tmp_path / "s").read_bytes(), (tmp_path / "p").read_bytes())

    summary = measured(folder, tmp_path, tmp_path / "darker.npz")
    assert summary["drift"] and summary["similarity"]["recent"] < summary["similarity"]["held_out"]
    words = rf"squared MMD {summary['distance']:.2g} .* run-1; the threshold is {summary['threshold']:.2g}"
    with pytest.raises(CheckFailed, match=words):
        drift_alert.python_func(code_digest="", summary=Artifact(str(tmp_path / "s")))
    page = (tmp_path / "p").read_text()
    assert "have drifted" in page and page.count("A recent image") == 16
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/", "")


def test_embeddings_as_the_server_answers_them_are_their_images(folder: Path, tmp_path: Path) -> None:
    """Of any length: an index keeps directions."""
    from unlabeled.export.onnx import OnnxModel

    images = exported_run().images(60, seed=9)
    np.savez(tmp_path / "images.npz", images=images)
    with Reservoir(tmp_path / "answers.npz") as recent:
        recent.add(OnnxModel(folder / "repository/encoder/1/model.onnx")(images))
    by_images, by_answers = (
        measured(folder, tmp_path, tmp_path / f"{name}.npz") for name in ("images", "answers")
    )
    for key in ("distance", "threshold", "p_value", "clusters", "similarity"):
        assert by_images[key] == by_answers[key], key
    assert by_answers["recent"]["ended"] is not None
    assert "Least like training" not in (tmp_path / "p").read_text()
    np.savez(tmp_path / "other.npz", embeddings=np.ones((60, 7)))
    with pytest.raises(InputError, match="another model was asked"):
        measured(folder, tmp_path, tmp_path / "other.npz")


def test_the_run_itself_as_recent_input_lies_at_no_distance(folder: Path, tmp_path: Path) -> None:
    index = Index(folder / "index")
    np.savez(tmp_path / "training.npz", embeddings=index.embeddings)
    summary = measured(folder, tmp_path, tmp_path / "training.npz")
    assert summary["similarity"]["recent"] == pytest.approx(1, abs=1e-3)
    assert summary["cluster_distance"]["recent"] == 0 and not summary["drift"]


def test_broken_files_are_named_where_too_few_images_are_left(folder: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 3)
    (tmp_path / "images" / "empty.png").touch()
    words = (
        r"3 recent images are too few, drift.min_images asks for 20; broken files: .*empty.png \(empty file\)"
    )
    with pytest.raises(InputError, match=words):
        measured(folder, tmp_path, tmp_path / "images")


def test_an_index_of_an_older_export_is_told(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    with np.load(folder / "index" / "index.npz") as arrays:
        kept = {name: array for name, array in arrays.items() if name != "held_out"}
    np.savez(tmp_path / "run" / "index" / "index.npz", **kept)
    with pytest.raises(InputError, match="run run-1 was exported without held-out embeddings"):
        measured(tmp_path / "run", tmp_path, "nowhere.npz")


@pytest.mark.parametrize(
    ("key", "value"),
    [("ended", "2026-01-01"), ("ended", np.nan), ("started", [1, 2]), ("seen", np.arange(3))],
)
def test_a_log_with_odd_times_is_told_in_a_line(tmp_path, key, value):
    rows = {"embeddings": np.ones((60, 4), np.float32), "ended": time.time()}
    np.savez(tmp_path / "log.npz", **(rows | {key: value}))
    with pytest.raises(InputError, match=f"log.npz: `{key}` is .*, expected is a number"):
        read_recent(str(tmp_path / "log.npz"), (1, 8, 8), Drift(), 0)


def test_a_log_may_tell_its_end_alone(tmp_path):
    ended = time.time()
    np.savez(tmp_path / "log.npz", embeddings=np.ones((60, 4), np.float32), ended=ended)
    recent = read_recent(str(tmp_path / "log.npz"), (1, 8, 8), Drift(), 0)
    assert recent.started == recent.ended == ended
