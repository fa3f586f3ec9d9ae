"""The report: self-contained, deterministic, safe against hostile names, complete."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_bundle import build_bundle

from unlabeled.errors import InputError
from unlabeled.files import read_json, write_json
from unlabeled.report.plots import data_uri
from unlabeled.report.report import duration, number, percent, write_report

VOID = {"meta", "img", "br", "hr", "input", "link", "source", "wbr"}
HOSTILE = "<script>alert('x')</script>\"&"


class Page(HTMLParser):
    """A parsed page: its text, its tags and the attributes that could load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.images_without_alt = 0
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attributes)
        self.ids += [value for name, value in attributes if name == "id" and value]
        self.loads += [
            values[name] or "" for name in ("src", "href", "xlink:href", "srcset", "action") if name in values
        ]
        self.loads += re.findall(r"url\((.*?)\)", values.get("style") or "")
        self.images_without_alt += tag == "img" and "alt" not in values
        assert not [name for name in values if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def report(bundle: Path) -> str:
    """Write the bundle's report and return it."""
    write_report(bundle, bundle / "report.html")
    return (bundle / "report.html").read_text()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def html(bundle: Path) -> str:
    return report(bundle)


def test_the_page_is_well_formed_and_holds_everything_it_shows(html: str) -> None:
    page = Page(html)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    assert all(load.startswith(("data:image/", "#")) for load in page.loads)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert len(page.ids) == len(set(page.ids))
    assert page.images_without_alt == 0
    assert {load[1:] for load in page.loads if load.startswith("#")} <= set(page.ids)
    assert len(html.encode()) < 1_000_000


def test_equal_bundles_give_equal_bytes(bundle: Path, html: str, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / bundle.name)
    assert report(tmp_path / bundle.name) == html
    assert str(bundle.parent) not in html


def test_every_number_of_the_leaderboard_is_there(bundle: Path, html: str) -> None:
    text = Page(html).text
    board = read_json(bundle / "leaderboard.json")
    for row in board["rows"] + board["baselines"]:
        assert row["method"] in text
        for value in {**row, **row.get("cluster", {})}.values():
            if isinstance(value, int | float):
                assert f"{value:.4g}" in text
    for row in board["rows"]:
        assert f"{100 * row['linear']:.1f}\N{NO-BREAK SPACE}%" in html
    assert "4.6 points above raw pixels" in text and "4.7 points above PCA-128" in text
    assert "11.6 points above random init" in text


def test_a_method_below_a_baseline_is_said_to_be_below(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "run")
    board = read_json(copy / "leaderboard.json")
    board["rows"][0]["linear"] = 0.8
    (copy / "leaderboard.json").write_text(json.dumps(board))
    text = Page(report(copy)).text
    assert "simclr selected, but does not beat raw pixels" in text and "4.1 points below raw pixels" in text
    ahead = 100 * board["rows"][1]["linear"]
    assert f"On the test split autoencoder is ahead, with {ahead:.1f} %." in text
    assert "On the test split" not in Page(report(bundle)).text


def test_checks_steps_parameters_and_next_commands_are_there(bundle: Path, html: str) -> None:
    text = Page(html).text
    record = read_json(bundle / "record.json")
    for step in record["predicate"]["steps"]:
        assert step["name"] in text
        assert all(digest[:8] in text for digest in step["outputs"].values())
    for expectation in read_json(bundle / "validation" / "validation.json")["expectations"]:
        assert expectation["name"] in text
    assert record["digest"][:8] in text and "training.batch_size 256" in text
    assert "✓ closed" in text and "7.2 × 10⁻⁷" in text and "0.8 ms" in text
    for command in ("serve", "predict", "audit"):
        assert f"unlabeled {command} " in text
    assert (
        f"unlabeled predict IMAGE --run {record['predicate']['runDetails']['metadata']['invocationId']} "
        in text
    )


def test_made_in_is_the_time_from_first_step_to_last(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "run")
    record = read_json(copy / "record.json")
    steps = record["predicate"]["steps"]
    steps[-1]["ended"] = steps[0]["started"] + 4000
    (copy / "record.json").write_text(json.dumps(record))
    assert "Made in 1 h 6 min from first step to last" in Page(report(copy)).text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    bundle = build_bundle(
        tmp_path,
        classes=[f"{HOSTILE} {number}" for number in range(10)],
        broken=[(f"train/{HOSTILE}.png", f"truncated {HOSTILE}")],
    )
    html = report(bundle)
    page = Page(html)
    assert "<script" not in html and "script" not in page.tags
    assert f"train/{HOSTILE}.png" in page.text and f"{HOSTILE} 7" in page.text


def test_without_labels_no_accuracy_is_shown_and_the_page_says_why(tmp_path: Path) -> None:
    text = Page(report(build_bundle(tmp_path, labelled=False))).text
    assert "No labels: accuracy cannot be measured" in text
    assert "No labels: how well the clusters agree" in text
    assert "No labels: the classifier was trained on the clusters" in text
    assert "Linear probe" not in text and "Effective rank" in text


def test_the_image_that_undid_the_classes_is_named(tmp_path: Path) -> None:
    bundle = build_bundle(tmp_path, labelled=False)
    summary = read_json(bundle / "table" / "summary.json")
    write_json(bundle / "table" / "summary.json", summary | {"labels_note": "<cover>.png lies outside"})
    text = Page(report(bundle)).text
    assert "Classes none" in text and "<cover>.png lies outside" in text


def test_broken_files_warnings_and_offenders_are_shown(tmp_path: Path) -> None:
    broken = [(f"train/photo {index}.jpg", "truncated: 12 of 400 bytes") for index in range(120)]
    bundle = build_bundle(tmp_path, broken=broken, warnings=True)
    html = report(bundle)
    text = Page(html).text
    assert "train/photo 0.jpg" in text and "truncated: 12 of 400 bytes" in text
    assert "The first 100 of 120" in text
    assert "2 warnings" in text and "▲ warning" in text and "std 0.31" in text
    offenders = html[html.index("near duplicates") :]
    assert offenders[: offenders.index("</td>")].count("<img") == 10


@pytest.mark.parametrize(
    "missing", ["record.json", "validation", "serving", "classifier", "labels", "baselines", "selection"]
)
def test_a_part_that_the_bundle_lacks_is_told(bundle: Path, tmp_path: Path, missing: str) -> None:
    copy = shutil.copytree(bundle, tmp_path / "run")
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = Page(report(copy)).text
    expected = {
        "record.json": "no record", "validation": "was not validated", "serving": "Serving was not checked",
        "classifier": "trained no classifier", "labels": "made no clusters",
    }  # fmt: skip
    assert expected.get(missing, "simclr") in text


def test_methods_without_their_files_do_not_break_the_page(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "run")
    shutil.rmtree(copy / "methods")
    assert "simclr selected" in Page(report(copy)).text


def test_one_method_is_no_contest(tmp_path: Path) -> None:
    assert "simclr trained" in Page(report(build_bundle(tmp_path, methods=["simclr"]))).text


def test_twenty_methods_with_pictures_of_colour_noise_stay_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 3, 96, 96)).astype(np.uint8)
    methods = [f"autoencoder{index}" for index in range(20)]
    bundle = build_bundle(tmp_path, methods=methods, images=noise, labels=np.arange(300) % 10)
    html = report(bundle)
    text = Page(html).text
    assert all(method in text for method in methods) and "pretrain × 20" in text
    assert len(html.encode()) < 3_000_000


def test_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"leaderboard\.json"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_numbers_read_well() -> None:
    assert percent(0.8874) == "88.7\N{NO-BREAK SPACE}%" and percent(None) == "–"
    assert [number(value) for value in (60000, 0.88743, 2.13e-7, 0, None, "a", True)] == [
        "60,000", "0.8874", "2.1\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}10⁻⁷", "0", "–", "a", "True",
    ]  # fmt: skip
    assert [duration(value) for value in (2.44, 59.99, 200, 3900)] == [
        "2.4 s",
        "60.0 s",
        "3 min 20 s",
        "1 h 5 min",
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_keep_their_pixels(channels: int) -> None:
    import base64
    import io

    from PIL import Image

    image = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (channels, 32, 1))
    uri = data_uri(image, 64)
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))
    assert (
        np.abs(decoded.astype(int) - np.moveaxis(image[[0] * 3 if channels == 1 else [0, 1, 2]], 0, -1)).max()
        <= 6
    )
    wide = Image.open(
        io.BytesIO(base64.b64decode(data_uri(np.zeros((channels, 100, 200), np.uint8), 64).split(",")[1]))
    )
    assert wide.size == (64, 32)
