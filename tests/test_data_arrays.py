"""Ingest of IDX files, npz files and digits: pixels and labels, and one clear line for every bad file."""

import gzip
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import idx_folder, write_idx

from unlabeled.data.idx import open_idx, read_idx_labels
from unlabeled.data.ingest import ingest
from unlabeled.data.sources import data_digest
from unlabeled.data.table import ImageTable
from unlabeled.digest import dvc_digest, tree_digest
from unlabeled.errors import InputError
from unlabeled.parameters import Ingest

RNG = np.random.default_rng(1)
IMAGES = RNG.integers(0, 256, (60, 8, 8), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(60) % 3


def make(source: Path | str, output: Path, **parameters: Any) -> ImageTable:
    digest = data_digest(str(source), output)
    ingest(str(source), digest, output / "table", output / "raw", Ingest(**parameters), output / "cache")
    assert dvc_digest(output / "raw") == digest == data_digest(str(output / "raw"), output)
    return ImageTable(output / "table")


def savez(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_folder(tmp_path: Path, end: str) -> None:
    source = idx_folder(tmp_path / "in", end=end)
    table = make(source, tmp_path / "out")
    train, test = (open_idx(source / f"{split}-images-idx3-ubyte{end}") for split in ("train", "t10k"))
    images = np.concatenate([next(train.batches(1000)), next(test.batches(1000))])
    assert np.array_equal(table.images(slice(None)), images)
    assert table.indices("train").tolist() == list(range(100))
    assert table.labels(np.arange(120)).tolist() == [*(np.arange(100) % 10), *(np.arange(20) % 10)]
    assert table.rows["id"].iloc[[0, 99, 100]].tolist() == ["train-000000", "train-000099", "test-000000"]
    assert (table.summary["kind"], table.summary["image_size"], table.summary["channels"]) == ("idx", 8, 1)


def test_idx_table_does_not_depend_on_packing_but_for_its_digest(tmp_path: Path) -> None:
    plain = make(idx_folder(tmp_path / "in"), tmp_path / "1")
    packed = make(idx_folder(tmp_path / "packed", end=".gz"), tmp_path / "2")
    assert (plain.folder / "images.npy").read_bytes() == (packed.folder / "images.npy").read_bytes()
    assert (plain.folder / "table.parquet").read_bytes() == (packed.folder / "table.parquet").read_bytes()
    assert plain.summary | {"digest": ""} == packed.summary | {"digest": ""}


def test_idx_without_test_files_is_split_by_content(tmp_path: Path) -> None:
    write_idx(tmp_path / "in" / "train-images-idx3-ubyte", IMAGES)
    write_idx(tmp_path / "in" / "train-labels-idx1-ubyte", LABELS.astype(np.uint8))
    table = make(tmp_path / "in", tmp_path / "out")
    assert 3 <= len(table.indices("test")) <= 25
    assert table.rows["id"][0] == "image-000000"
    assert table.labels(np.arange(60)).tolist() == LABELS.tolist()


def test_single_idx_file(tmp_path: Path) -> None:
    path = write_idx(tmp_path / "photos-idx3-ubyte.gz", IMAGES)
    table = make(path, tmp_path / "out")
    assert np.array_equal(table.images(slice(None))[:, 0], IMAGES)
    assert table.classes == []
    assert data_digest(str(path), tmp_path) == dvc_digest(tmp_path / "out" / "raw")


def test_classes_are_the_labels_in_use(tmp_path: Path) -> None:
    table = make(
        savez(tmp_path / "a.npz", images=IMAGES, labels=np.array([7, -1, 40] * 20)), tmp_path / "out"
    )
    assert table.classes == ["7", "40"]
    assert table.labels(np.arange(3)).tolist() == [0, -1, 1]
    assert table.rows["label"].isna().sum() == 20


@pytest.mark.parametrize(
    "arrays",
    [
        {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:9], "y_test": LABELS[:9]},
        {
            "train_images": IMAGES,
            "train_labels": LABELS[:, None],
            "test_images": IMAGES[:9],
            "val_images": IMAGES,
        },
        {
            "images": IMAGES[..., None],
            "labels": LABELS.astype(np.uint8),
            "split": ["train"] * 51 + ["test"] * 9,
        },
        {"images": IMAGES[:, None], "labels": LABELS, "split": np.array([b"train"] * 51 + [b"test"] * 9)},
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, arrays: dict[str, Any], save: Callable[..., None]) -> None:
    save(tmp_path / "a.npz", **arrays)
    table = make(tmp_path / "a.npz", tmp_path / "out")
    assert np.array_equal(table.images(np.arange(60))[:, 0], IMAGES)
    assert table.labels(np.arange(51)).tolist() == LABELS[:51].tolist()
    assert len(table.indices("test")) == 9
    assert table.summary["kind"] == "npz"


@pytest.mark.parametrize("images", [COLOUR, COLOUR.transpose(0, 3, 1, 2)])
def test_npz_colour(tmp_path: Path, images: np.ndarray) -> None:
    source = savez(tmp_path / "a.npz", images=np.ascontiguousarray(images))
    table = make(source, tmp_path / "out")
    assert np.array_equal(table.images(slice(None)), COLOUR.transpose(0, 3, 1, 2))
    gray = make(source, tmp_path / "gray", channels="gray").images(slice(None))
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])
    assert np.abs(gray[:, 0] - luma).max() <= 0.51


def test_shards_equal_the_whole(tmp_path: Path) -> None:
    source = savez(tmp_path / "a.npz", x_train=IMAGES, x_test=IMAGES[:7])
    whole, sharded = (make(source, tmp_path / str(n), shard_images=n) for n in (1000, 9))
    assert len(list(sharded.folder.glob("images-*.npy"))) == 8
    assert np.array_equal(sharded.images(slice(None)), whole.images(slice(None)))
    exact = make(source, tmp_path / "exact", shard_images=67)
    assert tree_digest(exact.folder) == tree_digest(whole.folder)


def test_a_shard_has_the_bytes_that_numpy_writes(tmp_path: Path) -> None:
    table = make(savez(tmp_path / "a.npz", images=IMAGES), tmp_path / "out")
    np.save(tmp_path / "expected.npy", IMAGES[:, None])
    assert (table.folder / "images.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_digits(tmp_path: Path, digits: tuple[np.ndarray, np.ndarray]) -> None:
    table = make("digits", tmp_path / "out")
    images, labels = digits
    assert np.array_equal(table.images(slice(None)), images)
    assert table.labels(np.arange(len(labels))).tolist() == labels.tolist()
    shares = np.bincount(table.labels(table.indices("test"))) / np.bincount(labels)
    assert np.abs(shares - 0.2).max() < 0.005
    assert table.summary["source"] == "digits"
    again = make(tmp_path / "out" / "raw", tmp_path / "again")
    assert tree_digest(again.folder) == tree_digest(table.folder)


def idx_bytes(*magic: int, sizes: tuple[int, ...], count: int) -> bytes:
    return bytes(magic) + struct.pack(f">{len(sizes)}I", *sizes) + bytes(count)


# What stands as train-images-idx3-ubyte, and the words that the message must have.
BAD_IDX = {
    "empty": (b"", "empty, an IDX file is expected"),
    "short magic": (b"\0\0\x08", "no IDX file, it starts with 00 00 08"),
    "text": (b"hello world, I am text", "no IDX file, it starts with 68 65 6c 6c"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "no IDX file, it starts with 89 50 4e 47"),
    "gzip inside": (gzip.compress(bytes(100)), "no IDX file, it starts with 1f 8b"),
    "no dimension": (idx_bytes(0, 0, 8, 0, sizes=(), count=9), "no IDX file"),
    "five dimensions": (idx_bytes(0, 0, 8, 5, sizes=(1, 1, 1, 1, 9), count=9), "no IDX file"),
    "floats": (idx_bytes(0, 0, 13, 3, sizes=(1, 8, 8), count=256), "type 0x0d, expected are unsigned bytes"),
    "integers": (idx_bytes(0, 0, 12, 3, sizes=(1, 8, 8), count=256), "type 0x0c"),
    "half a header": (bytes([0, 0, 8, 3, 0, 0, 0, 9, 0]), "truncated within its header"),
    "truncated": (idx_bytes(0, 0, 8, 3, sizes=(9, 8, 8), count=575), r"591 bytes, .* promises 592"),
    "trailing bytes": (idx_bytes(0, 0, 8, 3, sizes=(9, 8, 8), count=577), "593 bytes, .* promises 592"),
    "huge promise": (idx_bytes(0, 0, 8, 4, sizes=(2**32 - 1,) * 4, count=9), "promises 3402823"),
    "no images": (idx_bytes(0, 0, 8, 3, sizes=(0, 8, 8), count=0), "holds nothing"),
    "no pixels": (idx_bytes(0, 0, 8, 3, sizes=(9, 0, 8), count=0), "holds nothing"),
    "labels as images": (idx_bytes(0, 0, 8, 1, sizes=(9,), count=9), r"\(N, H, W\).* its shape is \(9,\)"),
    "not square": (idx_bytes(0, 0, 8, 3, sizes=(9, 8, 9), count=648), "these are 8 x 9; crop or resize"),
    "too small": (idx_bytes(0, 0, 8, 3, sizes=(9, 2, 2), count=36), "square images of 4 to 1024 px"),
    "two channels": (idx_bytes(0, 0, 8, 4, sizes=(9, 2, 8, 8), count=1152), "gray or RGB images"),
}  # fmt: skip


def refused(source: Path, output: Path) -> str:
    """Return the message with which a source is refused; nothing may be left behind."""
    with pytest.raises(InputError) as error:
        make(source, output)
    assert not output.exists() or not list(output.iterdir())
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    return str(error.value)


@pytest.mark.parametrize("name", BAD_IDX)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_idx(tmp_path: Path, name: str, packed: bool) -> None:
    data, message = BAD_IDX[name]
    path = tmp_path / "in" / ("train-images-idx3-ubyte" + ".gz" * packed)
    path.parent.mkdir()
    path.write_bytes(gzip.compress(data) if packed else data)
    found = refused(path.parent, tmp_path / "out")
    assert str(path) in found
    # How long a gzipped file really is shows while it is read.
    packed_message = {
        "truncated": "truncated, its header",
        "trailing bytes": "more bytes than the 9",
        "huge promise": "",
    }

    assert re.search(packed_message.get(name, message) if packed else message, found)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "train-labels-idx1-ubyte",
            lambda b: b[:4] + struct.pack(">I", 90) + b[8:98],
            "100 images but 90 labels",
        ),
        ("t10k-labels-idx1-ubyte", lambda b: b[:-1], "27 bytes, its header"),
        ("train-labels-idx1-ubyte", lambda b: b"\0\0\x08\x03" + b[4:], "its header"),
        (
            "train-labels-idx1-ubyte",
            lambda b: b"\0\0\x08\x02" + struct.pack(">II", 50, 2) + b[8:],
            "one dimension",
        ),
        (
            "t10k-images-idx3-ubyte",
            lambda b: idx_bytes(0, 0, 8, 3, sizes=(20, 9, 9), count=1620),
            r"\(1, 9, 9\), those of",
        ),
        ("train-images-idx3-ubyte", None, "no IDX file of train images"),
        ("t10k-images-idx3-ubyte", None, "labels without their images"),
    ],
)
def test_idx_files_that_do_not_fit(tmp_path: Path, name: str, change: Any, message: str) -> None:

    path = idx_folder(tmp_path / "in") / name
    if change:
        path.write_bytes(change(path.read_bytes()))
    else:
        path.unlink()
    assert re.search(message, refused(path.parent, tmp_path / "out"))


def test_two_files_for_one_thing(tmp_path: Path) -> None:
    source = idx_folder(idx_folder(tmp_path / "in"), end=".gz")
    assert "two IDX files of test images" in refused(source, tmp_path / "out")


@pytest.mark.parametrize("cut", [0.3, 0.9, 0.99])
def test_truncated_gzip(tmp_path: Path, cut: float) -> None:
    path = write_idx(tmp_path / "train-images-idx3-ubyte.gz", IMAGES)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    assert "damaged" in refused(path, tmp_path / "out")


def test_plain_file_named_gz(tmp_path: Path) -> None:
    path = write_idx(tmp_path / "train-images-idx3-ubyte", IMAGES)
    assert "damaged gzip file" in refused(path.rename(f"{path}.gz"), tmp_path / "out")


def test_labels_alone(tmp_path: Path) -> None:
    path = write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(9, dtype=np.uint8))
    assert read_idx_labels(path).tolist() == list(range(9))
    assert "no IDX file of train images" in refused(path, tmp_path / "out")


def _pickled(path: Path) -> None:
    savez(path, images=np.array([[1], [2, 3]], dtype=object))


def _pickled_labels(path: Path) -> None:
    savez(path, images=IMAGES, labels=np.array(["a"] * 59 + [None], dtype=object))


def _cut(path: Path) -> None:
    savez(path, images=IMAGES)
    path.write_bytes(path.read_bytes()[:2000])


def _flipped(path: Path) -> None:
    savez(path, images=IMAGES)
    data = bytearray(path.read_bytes())
    data[1500] ^= 1
    path.write_bytes(data)


def _no_npy(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"no array")


def _too_short(path: Path) -> None:
    savez(path.with_suffix(".whole.npz"), images=IMAGES)
    with zipfile.ZipFile(path.with_suffix(".whole.npz")) as archive:
        data = archive.read("images.npy")
    path.with_suffix(".whole.npz").unlink()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", data[:-10])


def _npz(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: savez(path, **arrays) and None


BAD_NPZ: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda path: path.touch(), "no npz file"),
    "text": (lambda path: path.write_text("no zip") and None, "no npz file"),
    "npy": (lambda path: path.write_bytes(b"\x93NUMPY\x01\0v\0") and None, "no npz file"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(IMAGES)) and None, "no npz file"),
    "cut": (_cut, "no npz file"),
    "flipped bit": (_flipped, "Bad CRC-32"),
    "no npy inside": (_no_npy, "key images cannot be read"),
    "truncated array": (_too_short, "truncated, its header promises 60 images"),
    "no arrays": (_npz(), "no images; keys x_train"),
    "other keys": (_npz(a=IMAGES, b=LABELS), "found: a, b"),
    "test alone": (_npz(x_test=IMAGES), "no images; keys x_train"),
    "pickled images": (_pickled, "images holds object, images are expected as uint8"),
    "pickled labels": (_pickled_labels, "key labels cannot be read, Object arrays cannot be loaded"),
    "float images": (_npz(images=IMAGES / 255), "holds float64, images are expected as uint8, 0 to 255"),
    "signed images": (_npz(images=IMAGES.astype(np.int64)), "holds int64"),
    "flat images": (_npz(images=IMAGES.reshape(60, 64)), r"its shape is (60, 64)"),
    "one image": (_npz(images=np.uint8(3)), "its shape is ()"),
    "no images": (_npz(images=IMAGES[:0]), "N at least 1"),
    "RGBA images": (_npz(images=np.zeros((9, 8, 8, 4), np.uint8)), "gray or RGB images are expected"),
    "not square": (_npz(images=np.zeros((9, 8, 12), np.uint8)), "these are 8 x 12"),
    "too large": (_npz(images=np.zeros((1, 1030, 1030), np.uint8)), "square images of 4 to 1024 px"),
    "Fortran order": (_npz(images=np.asfortranarray(IMAGES)), "is in Fortran order"),
    "few labels": (_npz(images=IMAGES, labels=LABELS[:-1]), "60 images but 59 labels"),
    "label scores": (_npz(images=IMAGES, labels=np.eye(60)), "labels are integers of shape (N,)"),
    "label rows": (_npz(images=IMAGES, labels=np.eye(60, dtype=int)), "labels are integers of shape (N,)"),
    "label names": (_npz(images=IMAGES, labels=np.array(["cat"] * 60)), "labels are integers of shape (N,)"),
    "split names": (_npz(images=IMAGES, split=["train"] * 59 + ["valid"]), "'train' or 'test' for each"),
    "split numbers": (_npz(images=IMAGES, split=np.zeros(60)), "'train' or 'test' for each"),
    "short split": (_npz(images=IMAGES, split=["train"] * 59), "each of the 60 images"),
    "other test shape": (_npz(x_train=IMAGES, x_test=np.zeros((9, 9, 9), np.uint8)), "(1, 9, 9), those of"),
    "colour test": (_npz(x_train=IMAGES, x_test=COLOUR), "(3, 8, 8), those of"),
}


@pytest.mark.parametrize("name", BAD_NPZ)
def test_bad_npz(tmp_path: Path, name: str) -> None:
    write, message = BAD_NPZ[name]
    path = tmp_path / "a.npz"
    write(path)
    found = refused(path, tmp_path / "out")
    assert message in found
    assert str(path) in found


@pytest.mark.filterwarnings("ignore:loadtxt")
@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"a,b\n"), gzip.compress(b"1,2\n3,4\n")],
    ids=["empty", "not packed", "words", "two columns"],
)
def test_bad_digits(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "digits.csv.gz").write_bytes(content)
    assert "not scikit-learn's digits" in refused(tmp_path / "digits.csv.gz", tmp_path / "out")


def test_single_file_of_no_known_kind(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"x")
    assert "give a folder of images" in refused(tmp_path / "photo.png", tmp_path / "out")
