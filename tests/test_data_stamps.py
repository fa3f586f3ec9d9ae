"""The composed colour set: repeatable, with exact masks, and nothing shared between train and test."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unlabeled.data import stamps
from unlabeled.data.files import source_digest
from unlabeled.data.ingest import ingest
from unlabeled.data.sources import data_digest, fetch
from unlabeled.data.table import MASKS, ImageTable
from unlabeled.digest import tree_digest
from unlabeled.errors import InputError
from unlabeled.parameters import Ingest
from unlabeled.workspace import cache_folder

FEW = Ingest(image_size=32, composites=400)


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stamps")
    ingest("stamps", data_digest("stamps", cache_folder()), folder / "table", folder / "raw", FEW)
    return folder


def test_the_table_has_classes_and_a_mask_for_every_image(composed: Path) -> None:
    table, masks = ImageTable(composed / "table"), np.load(composed / "table" / MASKS)
    assert table.image_shape == (3, 32, 32) and len(table) == 400
    assert table.summary["source"] == "stamps" and table.classes == list(stamps.CLASSES)
    assert masks.shape == (400, 32, 32) and masks.dtype == bool
    assert masks.any((1, 2)).all() and not masks.all((1, 2)).any()
    assert set(table.labels(np.arange(400))) == set(range(10))
    assert 50 < len(table.indices("test")) < 110
    classes = table.rows["id"].str.split("/").str[0]
    assert [table.classes.index(name) for name in classes] == table.labels(np.arange(400)).tolist()


def test_train_and_test_share_no_cutout_and_no_background(composed: Path) -> None:
    rows = ImageTable(composed / "table").rows
    parts = rows["id"].str.split("/")
    cutout, background = parts.str[0] + "/" + parts.str[1], parts.str[2]
    for column in (cutout, background):
        assert not set(column[rows["split"] == "train"]) & set(column[rows["split"] == "test"])


def test_raw_files_are_the_pinned_ones_and_give_the_same_table(composed: Path, tmp_path: Path) -> None:
    assert source_digest(composed / "raw") == stamps.STAMPS_DIGEST
    ingest(str(composed / "raw"), stamps.STAMPS_DIGEST, tmp_path / "table", tmp_path / "raw", FEW)
    assert tree_digest(tmp_path / "table") == tree_digest(composed / "table")


def test_a_shorter_set_is_the_beginning_of_a_longer_one(composed: Path) -> None:
    reading = stamps.read_stamps(composed / "raw", Ingest(image_size=32, composites=12))
    (batch,) = reading.batches
    assert np.array_equal(batch.images, ImageTable(composed / "table").images(np.arange(12)))


def test_the_mask_is_where_the_cutout_covers_the_background() -> None:
    red = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    for seed in range(20):
        layer = np.asarray(stamps._placed(red, 32, np.random.default_rng(seed)))
        inside = layer[:, :, 3] >= 128
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        assert 0.4 * 32 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 0.9 * 32 + 1
        assert (layer[inside][:, 0] > 200).all()


def test_other_photographs_are_refused(
    composed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / stamps.STAMPS_DIGEST
    shutil.copytree(composed / "raw", folder)
    next((folder / "backgrounds").iterdir()).write_bytes(b"other")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(stamps, "FOLDER", "nowhere")
    with pytest.raises(
        InputError, match=rf"cannot get the stamps with digest {stamps.STAMPS_DIGEST}.*not installed"
    ):
        fetch("stamps", stamps.STAMPS_DIGEST, tmp_path)
