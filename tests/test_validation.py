"""The validate step: each expectation catches its own fault and tells how often and where."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import write_table

from unlabeled.data import verdict
from unlabeled.data.expectations import validate
from unlabeled.data.faults import drift
from unlabeled.digest import tree_digest
from unlabeled.errors import CheckFailed, InputError
from unlabeled.parameters import Validation

COUNT = 500
TEST = np.arange(COUNT) % 5 == 4
CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture
def build(tmp_path: Path, digits: tuple[np.ndarray, np.ndarray]) -> Callable[..., Path]:
    """Return a function that writes a table of 500 digits, 100 in test, with changes."""

    def write(
        images: Callable[[np.ndarray], None] | None = None,
        rows: Callable[[pd.DataFrame], pd.DataFrame | None] | None = None,
        labels: Callable[[np.ndarray], None] | None = None,
        classes: list[str] = CLASSES,
    ) -> Path:
        pixels, truth = digits[0][:COUNT].copy(), digits[1][:COUNT].copy()
        if images:
            images(pixels)
        if labels:
            labels(truth)
        folder = write_table(tmp_path / "table", pixels, truth, TEST, classes)
        if rows:
            frame = pd.read_parquet(folder / "table.parquet")
            changed = rows(frame)
            (frame if changed is None else changed).to_parquet(folder / "table.parquet")
        return folder

    return write


def judge(table: Path, reference: Path | None = None, **bounds: Any) -> tuple[dict[str, Any], str]:
    """Validate; return validation.json and the message of the failure, empty without one."""
    output, message = table.parent / "validation", ""
    try:
        validate(table, output, Validation(**bounds), reference)
        verdict.check(output)
    except CheckFailed as failure:
        message = str(failure)
    return json.loads((output / "validation.json").read_text()), message


def failed(report: dict[str, Any]) -> list[str]:
    return [result["name"] for result in report["expectations"] if not result["success"]]


def result_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(result for result in report["expectations"] if result["name"] == name)


def cell(row: int, column: str, value: Any) -> Callable[[pd.DataFrame], None]:
    def change(rows: pd.DataFrame) -> None:
        rows.loc[row, column] = value

    return change


def test_clean_table_passes_with_the_default_bounds(build: Callable[..., Path]) -> None:
    table = build()
    assert validate(table, table.parent / "out", Validation(), None) == {
        "images": COUNT,
        "expectations": 36,
        "failed": 0,
        "warnings": 0,
    }
    report = json.loads((table.parent / "out" / "validation.json").read_text())
    assert (report["success"], report["severity"], report["drift"]) == (True, None, {})
    assert len(pd.read_parquet(table.parent / "out" / "offenders.parquet")) == 0
    assert np.load(table.parent / "out" / "thumbnails.npy").shape == (0, 1, 8, 8)


def test_all_digits_pass_with_the_default_bounds(digits_table: Path, tmp_path: Path) -> None:
    assert validate(digits_table, tmp_path / "out", Validation(), None)["warnings"] == 0


ROW_FAULTS = {
    "missing id": (3, "id", None, "row 3"),
    "missing split": (6, "split", None, "00006"),
    "missing sha256": (5, "sha256", None, "00005"),
    "missing height": (7, "height", np.nan, "00007"),
    "missing mean": (7, "mean", np.nan, "00007"),
    "missing std": (8, "std", np.nan, "00008"),
    "missing entropy": (10, "entropy", np.nan, "00010"),
    "mean outside 0 to 1": (10, "mean", 1.01, "00010"),
    "std outside 0 to 1": (11, "std", -0.01, "00011"),
    "entropy outside 0 to 8": (12, "entropy", 8.01, "00012"),
    "height below 1": (13, "height", 0, "00013"),
    "width below 1": (13, "width", -4, "00013"),
    "split other than train and test": (1, "split", "valid", "00001"),
    "label that is no class": (14, "label", 10, "00014"),
}


def test_each_fault_of_a_row_fails_its_expectation(build: Callable[..., Path]) -> None:
    def change(rows: pd.DataFrame) -> None:
        for row, column, value, _ in ROW_FAULTS.values():
            rows.loc[row, column] = value

    report, message = judge(build(rows=change))
    # A whole-number column with a gap is read back as floats: its type fails too.
    assert set(failed(report)) == {*ROW_FAULTS, "type of height"}
    for name, (*_, number) in ROW_FAULTS.items():
        result = result_of(report, name)
        assert (result["severity"], result["offenders"], result["ids"]) == ("critical", 1, [number])
        assert result["observed"] == 1 / COUNT
    assert "split other than train and test 0.002, at most 0 (1 images: 00001)" in message
    assert "; and 12 more; see " in message and message.endswith("index.html") and "\n" not in message


def test_repeated_id_fails(build: Callable[..., Path]) -> None:
    report, message = judge(build(rows=cell(2, "id", "00001")))
    assert (
        failed(report) == ["repeated id"]
        and "repeated id 0.004, at most 0 (2 images: 00001, 00001)" in message
    )


def copy(targets: list[int], sources: list[int], add: int = 0) -> Callable[[np.ndarray], None]:
    def change(images: np.ndarray) -> None:
        images[targets] = np.clip(images[sources].astype(int) + add, 0, 255)

    return change


def paint(position: int) -> Callable[[np.ndarray], None]:
    def change(images: np.ndarray) -> None:
        images[position] = 37

    return change


TRAIN = np.flatnonzero(~TEST).tolist()
IMAGE_FAULTS = [
    ("exact duplicates", "critical", copy(TRAIN[100:111], TRAIN[:11]), TRAIN[100:111]),
    ("near duplicates", "warning", copy(TRAIN[100:126], TRAIN[:26], add=2), TRAIN[100:126]),
    ("test images equal to a train image", "critical", copy([14], [3]), [14]),
    ("test images nearly equal to a train image", "warning", copy([14, 24], [3, 5], add=-2), [14, 24]),
    ("images of a single colour", "critical", paint(50), [50]),
]


@pytest.mark.parametrize(
    ("name", "severity", "change", "positions"), IMAGE_FAULTS, ids=[fault[0] for fault in IMAGE_FAULTS]
)
def test_a_fault_of_an_image_fails_its_expectation(
    build: Callable[..., Path],
    name: str,
    severity: str,
    change: Callable[[np.ndarray], None],
    positions: list[int],
) -> None:
    table = build(images=change)
    report, message = judge(table)
    assert failed(report) == [name]
    assert bool(message) == (severity == "critical") == (not report["success"])
    assert report["severity"] == severity
    result, ids = result_of(report, name), [f"{position:05d}" for position in positions]
    assert (result["offenders"], result["ids"]) == (len(ids), ids[:10])
    output = table.parent / "validation"
    listing = pd.read_parquet(output / "offenders.parquet")
    assert listing["id"].tolist() == ids and set(listing["expectation"]) == {name}
    thumbnails = np.load(output / "thumbnails.npy")
    captions = json.loads((output / "thumbnails.json").read_text())
    assert captions == [{"id": number, "expectation": name} for number in ids[:8]]
    assert np.array_equal(thumbnails, np.load(table / "images.npy")[positions[:8]])


def test_faults_within_their_bound_are_listed_but_pass(build: Callable[..., Path]) -> None:
    table = build(images=copy(TRAIN[100:110], TRAIN[:10]))
    report, message = judge(table)
    assert not message and not failed(report)
    assert result_of(report, "exact duplicates")["observed"] == 10 / COUNT
    assert len(pd.read_parquet(table.parent / "validation" / "offenders.parquet")) == 10


def test_a_duplicate_in_the_other_split_is_a_leak_not_a_duplicate(build: Callable[..., Path]) -> None:
    report, _ = judge(build(images=copy([14], [3])))
    assert result_of(report, "exact duplicates")["offenders"] == 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_small_split_fails(build: Callable[..., Path], split: str) -> None:
    bound = {"train": 401, "test": 101}[split]
    report, message = judge(build(), min_images=bound)
    assert failed(report) == ["images in train", "images in test"][split == "test" :]
    assert f"images in {split} {bound - 1}, at least {bound}" in message


def test_absent_split_fails(build: Callable[..., Path]) -> None:
    report, _ = judge(build(rows=lambda rows: rows.assign(split="train")))
    assert failed(report) == ["images in test"]


def test_rare_class_fails_and_names_its_images(
    build: Callable[..., Path], digits: tuple[np.ndarray, np.ndarray]
) -> None:
    nines = np.flatnonzero((digits[1][:COUNT] == 9) & ~TEST)

    def relabel(labels: np.ndarray) -> None:
        labels[nines[2:]] = -1

    report, _ = judge(build(labels=relabel))
    assert failed(report) == ["class balance in train"]
    result = result_of(report, "class balance in train")
    assert result["ids"] == [f"{position:05d}" for position in nines[:2]]
    assert result["observed"] == pytest.approx(2 / np.bincount(digits[1][:COUNT][~TEST]).max())
    assert judge(build(labels=relabel), min_class_balance=0.01)[1] == ""


def test_class_absent_from_train_fails(build: Callable[..., Path]) -> None:
    report, message = judge(build(classes=[*CLASSES, "ten"]))
    assert failed(report) == ["classes in train"]
    assert "classes in train 10, at least 11" in message


def test_unlabeled_train_beside_a_labelled_test_is_a_warning(build: Callable[..., Path]) -> None:
    def unlabel(labels: np.ndarray) -> None:
        labels[~TEST] = -1

    report, message = judge(build(labels=unlabel))
    assert (failed(report), report["severity"], message) == (["classes in train"], "warning", "")


def test_labels_need_classes(build: Callable[..., Path]) -> None:
    report, _ = judge(build(classes=[]))
    assert failed(report) == ["label without classes"]
    report, message = judge(build(classes=[], labels=lambda labels: labels.fill(-1)))
    assert not message and not failed(report)


def test_columns_without_a_value_fail(build: Callable[..., Path]) -> None:
    def clear(rows: pd.DataFrame) -> pd.DataFrame:
        numbers = ["height", "width", "mean", "std", "entropy"]
        return rows.assign(
            **dict.fromkeys(numbers, np.nan),
            split=pd.Series(pd.NA, rows.index, "str"),
            sha256=pd.Series(pd.NA, rows.index, "str"),
        )

    report, _ = judge(build(rows=clear))
    for column in ("split", "sha256", "height", "width", "mean", "std", "entropy"):
        assert result_of(report, f"missing {column}")["offenders"] == COUNT
        assert f"missing {column}" in failed(report)


def test_columns_of_another_type_fail_without_a_traceback(build: Callable[..., Path]) -> None:
    table = build(rows=lambda rows: rows.assign(label="seven", height="tall", mean="bright", sha256=7))
    report, message = judge(table)
    for column in ("label", "height", "mean", "sha256"):
        assert f"type of {column}" in failed(report) and "type of label" in message
    assert result_of(report, "mean outside 0 to 1")["observed"] == "no comparable values"
    text = (table.parent / "validation" / "validation.json").read_text()
    assert str(table.parent) not in text and "Traceback" not in text


def test_empty_table_fails(tmp_path: Path, digits: tuple[np.ndarray, np.ndarray]) -> None:
    table = write_table(tmp_path / "table", digits[0][:2], digits[1][:2], np.zeros(2, bool), CLASSES)
    np.save(table / "images.npy", digits[0][:0])
    pd.read_parquet(table / "table.parquet").iloc[:0].to_parquet(table / "table.parquet")
    report, message = judge(table)
    assert "images in train" in failed(report) and "images in test" in failed(report)
    assert "images in train 0, at least 50 by validation.min_images" in message


def test_row_without_an_image_fails(build: Callable[..., Path]) -> None:
    report, message = judge(build(rows=lambda rows: rows.iloc[:-1]))
    assert failed(report) == ["rows, one per image"] and "rows, one per image 499, exactly 500" in message


@pytest.mark.parametrize(
    "column", ["id", "split", "label", "sha256", "height", "width", "mean", "std", "entropy"]
)
def test_missing_column_is_bad_input(build: Callable[..., Path], column: str) -> None:
    table = build(rows=lambda rows: rows.drop(columns=column))
    with pytest.raises(InputError, match=rf"lacks the column {column}: make the table again"):
        validate(table, table.parent / "out", Validation(), None)
    assert not (table.parent / "out").exists()


@pytest.mark.parametrize("content", [None, b"", b"no parquet"])
def test_broken_reference_is_bad_input(
    build: Callable[..., Path], tmp_path: Path, content: bytes | None
) -> None:
    reference = tmp_path / "reference.parquet"
    if content is not None:
        reference.write_bytes(content)
    with pytest.raises(InputError, match=r"reference\.parquet cannot be read as Parquet"):
        validate(build(), tmp_path / "out", Validation(), reference)


def test_no_drift_against_itself(build: Callable[..., Path]) -> None:
    table = build()
    report, message = judge(table, reference=table / "table.parquet")
    assert not message
    assert {key: report["drift"][key] for key in ("mean", "std", "entropy", "label")} == dict.fromkeys(
        ("mean", "std", "entropy", "label"), 0.0
    )


def test_drift_of_each_column_is_found(build: Callable[..., Path], tmp_path: Path) -> None:
    table, reference = build(), tmp_path / "reference.parquet"
    earlier = pd.read_parquet(table / "table.parquet")
    # The smallest of the values, a little more than a tenth, move to the other end.
    for column in ("mean", "std", "entropy", "label"):
        moved = earlier[column].sort_values().index[: int(0.12 * COUNT)]
        earlier.loc[moved, column] = earlier[column].max()
    earlier.to_parquet(reference)
    report, message = judge(table, reference=reference)
    assert failed(report) == ["drift of mean", "drift of std", "drift of entropy", "drift of label"]
    assert [report["drift"][column] for column in ("mean", "std", "entropy")] == pytest.approx([0.12] * 3)
    assert "drift of mean 0.12, at most 0.1" in message
    assert judge(table, reference=reference, max_drift=0.13)[1] == ""


def test_drift_of_hand_computed_tables() -> None:
    now = pd.DataFrame(
        {"mean": [0.0, 0, 1, 1], "std": 0.5, "entropy": [1.0, 2, 3, np.nan], "label": [0, 0, 1, None]}
    )
    then = pd.DataFrame({"mean": [0.0, 1, 1, 1], "std": 0.6, "entropy": np.nan, "label": [0, 1, 2, None]})
    assert drift(now, then) == pytest.approx({"mean": 0.25, "std": 1, "entropy": 1, "label": 1 / 3})


def test_same_table_gives_the_same_bytes(build: Callable[..., Path], tmp_path: Path) -> None:
    table = build(images=copy([14, *TRAIN[100:126]], [3, *TRAIN[:26]]))
    digests = []
    for name in ("one", "another"):
        counts = validate(table, tmp_path / name, Validation(), table / "table.parquet")
        assert counts["failed"] > 0
        digests.append(tree_digest(tmp_path / name))
    assert digests[0] == digests[1]


def test_page_holds_everything_itself(build: Callable[..., Path], tmp_path: Path) -> None:
    table = build(images=copy([14], [3]), rows=cell(20, "id", "<script>alert(1)</script>"))
    judge(table, reference=table / "table.parquet")
    page = (tmp_path / "validation" / "index.html").read_text()
    assert "test images equal to a train image" in page and "00014 repeats 00003" in page
    assert page.count("data:image/png;base64,") == 2 and "500 images from <b>digits</b>" in page
    assert "http" not in page and "<script" not in page and str(tmp_path) not in page


def test_validation_opens_no_connection(build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert judge(build())[1] == ""
