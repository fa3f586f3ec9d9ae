"""The number of clusters, told without labels: where it is right, where it misleads, and how the report shows it."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_bundle import build_bundle
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from test_report import Page, report

from unlabeled.errors import InputError
from unlabeled.selflabel import sweep
from unlabeled.selflabel.sweep import stability, sweep_clusters


def groups(sizes: tuple[int, ...], spread: float = 1.0, dim: int = 6, seed: int = 0) -> np.ndarray:
    """Return standardised points around centres of distance about 5: float32 (N, D)."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    x = 2 * rng.normal(size=(len(sizes), dim))[labels] + spread * 0.5 * rng.normal(size=(len(labels), dim))
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32)


@pytest.mark.parametrize("count", [3, 6])
def test_it_finds_the_number_of_groups(count: int) -> None:
    found = sweep_clusters(groups((150,) * count), [2, 3, 4, 5, 6, 7, 8, 10], 0)
    assert found["suggested"] == count
    row = {row["k"]: row for row in found["rows"]}[count]
    assert row["stability"] > 0.95
    assert row["criterion"] == pytest.approx((1 - 1 / count) * (row["stability"] - row["chance"]))


def test_points_without_groups_have_no_criterion_worth_the_name() -> None:
    """A long Gaussian is cut in two alike, again and again: stability alone would say two clusters."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(1200, 6)) * [6, 2, 1, 1, 1, 1]).astype(np.float32)
    found = sweep_clusters(x, [2, 3, 5, 8], 0)
    assert {row["k"]: row["stability"] for row in found["rows"]}[2] > 0.9
    assert all(abs(row["criterion"]) < 0.25 for row in found["rows"])


def test_small_groups_are_lost() -> None:
    """A known failure: groups of few images hardly weigh, and k-means cuts the largest one instead."""
    assert sweep_clusters(groups((800, 100, 100, 15, 15)), [2, 3, 4, 5, 6], 0)["suggested"] < 5


def test_groups_are_counted_rather_than_groups_of_groups() -> None:
    """Three pairs of groups: three are found as surely as six, and tell fewer images apart."""
    rng = np.random.default_rng(0)
    centres = 6 * rng.normal(size=(3, 6))[:, None] + 2 * rng.normal(size=(3, 2, 6))
    x = centres.reshape(6, 6)[np.repeat(np.arange(6), 150)] + 0.4 * rng.normal(size=(900, 6))
    found = sweep_clusters(((x - x.mean(0)) / x.std(0)).astype(np.float32), [8, 2, 3, 4, 5, 6, 4], 3)
    rows = {row["k"]: row for row in found["rows"]}
    assert list(rows) == [2, 3, 4, 5, 6, 8] and all(row["error"] >= 0 for row in rows.values())
    assert rows[3]["stability"] > 0.95 and rows[6]["stability"] > 0.95
    assert found["suggested"] == 6


def test_stability_is_the_agreement_of_the_halves_clusterings() -> None:
    z = groups((90, 90, 90), spread=3)
    order = np.random.default_rng(7).permutation(len(z))
    one, two = (
        KMeans(4, n_init=3, max_iter=50, random_state=7).fit(half).predict(z)
        for half in np.array_split(z[order], 2)
    )
    assert stability(z, 4, 7) == pytest.approx(adjusted_rand_score(one, two))
    assert stability(groups((60, 60)), 2, 0) == 1


def test_same_seed_same_sweep_and_only_a_sample_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    z = groups((300, 300))
    assert sweep_clusters(z, [2, 3], 0) == sweep_clusters(z, [3, 2], 0) != sweep_clusters(z, [2, 3], 1)
    monkeypatch.setattr(sweep, "IMAGES", 100)
    with pytest.raises(
        InputError, match=r"self_label\.sweep takes numbers of clusters from 2 to 49, got \[2, 50\]"
    ):
        sweep_clusters(z, [2, 50], 0)


@pytest.mark.parametrize("ks", [[], [1, 2], [2, 6]])
def test_numbers_out_of_range_are_refused(ks: list[int]) -> None:
    with pytest.raises(InputError, match=r"from 2 to 5, got"):
        sweep_clusters(groups((6, 6)), ks, 0)


def test_the_report_shows_the_sweep_and_tells_pure_from_mixed_clusters(tmp_path: Path) -> None:
    bundle = build_bundle(tmp_path)
    plain = Page(report(bundle)).text
    assert (
        "How many clusters?" not in plain and "Pure: 75% or more of one class" in plain and "Mixed" in plain
    )
    path = bundle / "labels" / "scores.json"
    scores = json.loads(path.read_text())
    rows = [
        {"k": k, "criterion": value, "error": 0.02, "stability": value + 0.2, "chance": 0.2}
        for k, value in ((5, 0.3), (8, 0.4), (12, 0.6), (16, 0.5))
    ]
    told = {"clustering": "sela", "top5": 0.987, "classes": 10, "sweep": {"rows": rows, "suggested": 12}}
    path.write_text(json.dumps(scores | told))
    html = report(bundle)
    text = Page(html).text
    assert "SeLa on simclr" in text and "98.7" in text and "suggested: 12" in text
    assert "have 12 clusters by this count; this run made 10" in text
    assert text.index("Pure: 75%") < text.index("Mixed")


def test_without_labels_the_report_sorts_clusters_by_confidence(tmp_path: Path) -> None:
    bundle = build_bundle(tmp_path, labelled=False)
    rows = pd.read_parquet(bundle / "labels" / "labels.parquet")
    rows.assign(confidence=0.5 + 0.04 * rows["cluster"]).to_parquet(bundle / "labels" / "labels.parquet")
    text = Page(report(bundle)).text
    assert "By confidence" in text and "Mixed" not in text
    assert text.index("Cluster 9 86.0") < text.index("Cluster 0 50.0")


def test_of_many_clusters_the_purest_and_the_least_pure_are_shown(tmp_path: Path) -> None:
    bundle = build_bundle(tmp_path, methods=["simclr"])
    rows = pd.read_parquet(bundle / "labels" / "labels.parquet")
    rows.assign(cluster=np.arange(len(rows)) % 30).to_parquet(bundle / "labels" / "labels.parquet")
    np.save(bundle / "labels" / "gallery.npy", np.zeros((30, 10, 1, 8, 8), np.uint8))
    html = report(bundle)
    assert "24 of 30 clusters: those of highest and of lowest purity." in Page(html).text
    assert html.count('<article class="cluster">') == 24
    # Clusters by an image's place hold every class: none is pure.
    assert "Mixed" in html and "or more of one class" not in html
