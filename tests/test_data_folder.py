"""Ingest of image folders: splits, classes, broken files, order; and the same bytes whatever the workers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from images import BROKEN, READABLE, gray_folder, pixels
from PIL import Image

from unlabeled.data.ingest import ingest
from unlabeled.data.sources import data_digest
from unlabeled.data.table import ImageTable
from unlabeled.digest import dvc_digest, tree_digest
from unlabeled.errors import CheckFailed, InputError
from unlabeled.parameters import Ingest


def make(source: Path, output: Path, workers: int = 0, **parameters: Any) -> ImageTable:
    digest = data_digest(str(source), output)
    ingest(
        str(source), digest, output / "table", output / "raw", Ingest(**parameters), output / "cache", workers
    )
    assert dvc_digest(output / "raw") == digest
    return ImageTable(output / "table")


def save(path: Path, seed: int = 0, channels: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, channels=channels)).save(path)


def test_odd_folder(tmp_path: Path) -> None:
    """Every format and kind of broken file in one folder: the sound are in the table, the others listed."""
    source = tmp_path / "my images"
    for name, write in READABLE.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        write(source / name)
    for name, (write, _) in BROKEN.items():
        write(source / name)
    table = make(source, tmp_path / "out", max_broken_share=0.5, image_size=24)
    assert table.rows["id"].tolist() == sorted(READABLE)
    assert table.image_shape == (3, 24, 24)
    assert np.array_equal(
        table.images([sorted(READABLE).index("rgb.png")])[0].transpose(1, 2, 0), pixels(channels=3)
    )
    broken = {file["path"]: file["reason"] for file in table.summary["broken"]}
    assert list(broken) == sorted(BROKEN)
    for name, (_, reason) in BROKEN.items():
        assert reason in broken[name]
    assert table.summary["counts"]["broken"] == len(BROKEN)
    assert str(tmp_path) not in (tmp_path / "out" / "table" / "summary.json").read_text()


def test_too_many_broken_files_stop_the_run(tmp_path: Path) -> None:
    source = gray_folder(tmp_path / "in", 30)
    (source / "a.png").touch()
    (source / "b c.png").write_text("x" * 50)
    for _ in range(2):
        with pytest.raises(CheckFailed) as failed:
            make(source, tmp_path / "out")
        assert str(failed.value).startswith("2 of 32 files are broken, 6.2%; ")
        assert "a.png (empty file); b c.png (no image" in str(failed.value)
        assert "\n" not in str(failed.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert len(make(source, tmp_path / "out", max_broken_share=0.07)) == 30


def test_files_broken_behind_their_header_stop_the_run_too(tmp_path: Path) -> None:
    source = gray_folder(tmp_path / "in", 30)
    BROKEN["truncated.png"][0](source / "truncated.png")
    with pytest.raises(CheckFailed, match=r"1 of 31 .* truncated.png \(damaged"):
        make(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_nothing_but_broken_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "readme.txt").write_text("hello")
    with pytest.raises(CheckFailed, match="1 of 1 files are broken"):
        make(tmp_path / "in", tmp_path / "out")
    with pytest.raises(InputError, match="none of its 1 files is an image"):
        make(tmp_path / "in", tmp_path / "out", max_broken_share=1)


@contextmanager
def ordinary_user() -> Iterator[Path]:
    """Give a folder of a user who is not root, and be that user: root may read every file."""
    root = os.geteuid() == 0
    with TemporaryDirectory() as folder:
        if root:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)


def test_unreadable_files_are_listed_and_recorded(tmp_path: Path) -> None:
    """The recorded raw files give the same table to anyone."""
    make(gray_folder(tmp_path / "in", 1), tmp_path / "out")  # imports what it needs while it may read it
    with ordinary_user() as room:
        source = gray_folder(room / "in", 20)
        save(source / "closed.png")
        (source / "closed.png").chmod(0o000)
        table = make(source, room / "out", max_broken_share=0.1)
        assert table.summary["broken"] == [{"path": "closed.png", "reason": "unreadable: permission denied"}]
        again = make(room / "out" / "raw", room / "again", max_broken_share=0.1)
        assert tree_digest(again.folder) == tree_digest(table.folder)


def test_unlistable_folder(tmp_path: Path) -> None:
    with ordinary_user() as room:
        closed = gray_folder(room / "in", 1) / "closed"
        closed.mkdir(mode=0o000)
        with pytest.raises(InputError, match=r"cannot list the folder .*closed: Permission denied"):
            data_digest(str(room / "in"), room)


def test_train_and_test_folders_with_classes(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for split, label, count in [
        ("train", "cat", 5),
        ("train", "dog", 4),
        ("test", "cat", 2),
        ("test", "eel", 1),
    ]:
        for index in range(count):
            save(source / split / label / "deep" / f"{index}.png", index)
    table = make(source, tmp_path / "out")
    assert table.classes == ["cat", "dog", "eel"]
    assert table.labels(table.indices("train")).tolist() == [0] * 5 + [1] * 4
    assert table.labels(table.indices("test")).tolist() == [0, 0, 2]
    assert table.rows["id"][0] == "test/cat/deep/0.png"


def test_files_outside_the_splits_are_listed(tmp_path: Path) -> None:
    for name in ("train/a/0.png", "train/b/0.png", "test/a/0.png", "extra/0.png", "1.png"):
        save(tmp_path / "in" / name)
    table = make(tmp_path / "in", tmp_path / "out", max_broken_share=0.5)
    assert [file["path"] for file in table.summary["broken"]] == ["1.png", "extra/0.png"]
    assert table.summary["broken"][0]["reason"] == "outside of train/ and test/"
    assert table.classes == ["a", "b"]


def test_train_alone_is_split_by_content(tmp_path: Path) -> None:
    gray_folder(tmp_path / "in" / "train" / "a")
    gray_folder(tmp_path / "in" / "train" / "b")
    table = make(tmp_path / "in", tmp_path / "out")
    assert table.classes == ["a", "b"]
    assert 0 < len(table.indices("test")) < len(table.indices("train"))


@pytest.mark.parametrize(
    "names", [["0.png", "a/0.png", "b/0.png"], ["0.png", "1.png"], ["a/0.png", "a/1.png"]]
)
def test_no_classes(tmp_path: Path, names: list[str]) -> None:
    for seed, name in enumerate(names):
        save(tmp_path / "in" / name, seed)
    table = make(tmp_path / "in", tmp_path / "out")
    assert table.classes == []
    assert table.rows["label"].isna().all()


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (["a/0.png", "b/0.png", "cover.png", "d.png"], "cover.png lies outside a class folder"),
        (
            ["train/a/0.png", "train/b/0.png", "test/a/0.png", "test/1.png"],
            "test/1.png lies outside a class folder",
        ),
        (["a/0.png", "b/0.png"], None),
        (["0.png", "1.png"], None),
        (["a/0.png", "1.png"], None),  # one class would be none all the same
    ],
)
def test_the_image_that_undoes_the_classes_is_named(
    tmp_path: Path, names: list[str], note: str | None
) -> None:
    for seed, name in enumerate(names):
        save(tmp_path / "in" / name, seed)
    assert make(tmp_path / "in", tmp_path / "out").summary.get("labels_note") == note


def test_a_stray_text_file_does_not_undo_the_classes(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a" / "0.png")
    save(tmp_path / "in" / "b" / "0.png")
    (tmp_path / "in" / "README").write_text("two classes")
    assert make(tmp_path / "in", tmp_path / "out", max_broken_share=0.5).classes == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "message"),
    [(["test/0.png"], "test/ but no train/"), (["train/0.png", "val/0.png"], "train/ and val/ but no test/")],
)
def test_split_folders_that_are_not_understood(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        save(tmp_path / "in" / name)
    with pytest.raises(InputError, match=message):
        make(tmp_path / "in", tmp_path / "out")


def test_split_depends_on_content_alone(tmp_path: Path) -> None:
    """Another name, another neighbour or a second copy never moves an image to the other split."""
    one = make(gray_folder(tmp_path / "one", 200, 8), tmp_path / "1", image_size=8)
    for path in sorted((tmp_path / "one").iterdir())[::2]:
        (tmp_path / "two" / "sub").mkdir(parents=True, exist_ok=True)
        for copy in ("x", "y"):
            (tmp_path / "two" / "sub" / f"{copy}{path.name}").write_bytes(path.read_bytes())
    two = make(tmp_path / "two", tmp_path / "2", image_size=8)
    split = dict(zip(one.rows["sha256"], one.rows["split"]))
    assert 20 <= list(split.values()).count("test") <= 60
    assert [split[digest] for digest in two.rows["sha256"]] == two.rows["split"].tolist()


def test_workers_and_shards_change_nothing(tmp_path: Path) -> None:
    source = gray_folder(tmp_path / "in", 150)
    for index in range(0, 150, 10):
        (source / f"{index:04d}.png").write_bytes(b"broken")
    tables = [
        make(source, tmp_path / str(workers), workers, max_broken_share=0.2, image_size=256)
        for workers in (1, 2, 7)
    ]
    assert len({tree_digest(table.folder) for table in tables}) == 1
    sharded = make(source, tmp_path / "sharded", max_broken_share=0.2, image_size=256, shard_images=50)
    names = sorted(path.name for path in sharded.folder.glob("*.npy"))
    assert names == ["images-00000.npy", "images-00001.npy", "images-00002.npy"]
    assert np.array_equal(sharded.images(slice(None)), tables[0].images(slice(None)))
    assert (sharded.folder / "table.parquet").read_bytes() == (
        tables[0].folder / "table.parquet"
    ).read_bytes()


def test_recorded_raw_files_give_the_same_bytes(tmp_path: Path) -> None:
    source = gray_folder(tmp_path / "in" / "a", 10).parent
    save(source / "b" / "ü 図.png", 5)
    first = make(source, tmp_path / "1")
    assert tree_digest(make(tmp_path / "1" / "raw", tmp_path / "2").folder) == tree_digest(first.folder)


@pytest.mark.parametrize(("channels", "count"), [("auto", 1), ("gray", 1), ("rgb", 3)])
def test_channels_of_gray_images(tmp_path: Path, channels: str, count: int) -> None:
    table = make(gray_folder(tmp_path / "in", 5), tmp_path / "out", channels=channels, image_size=24)
    assert table.image_shape == (count, 24, 24)
    assert np.array_equal(table.images([0])[0], np.repeat(pixels(0)[None], count, axis=0))


def test_one_colour_image_makes_all_rgb(tmp_path: Path) -> None:
    save(gray_folder(tmp_path / "in", 5) / "zz.png", channels=3)
    assert make(tmp_path / "in", tmp_path / "1").image_shape[0] == 3
    assert make(tmp_path / "in", tmp_path / "2", channels="gray").image_shape[0] == 1


def test_hidden_files_links_and_loops(tmp_path: Path) -> None:
    source = gray_folder(tmp_path / "in" / "a", 3).parent
    gray_folder(source / ".cache", 3)
    (source / ".DS_Store").write_bytes(b"x")
    (source / "a" / "up").symlink_to(source)
    (source / "a" / "self").symlink_to(source / "a" / "self")
    (source / "a" / "gone.png").symlink_to(source / "nothing")
    gray_folder(tmp_path / "elsewhere", 2)
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(source / "pipe.png")
    table = make(source, tmp_path / "out")
    assert table.rows["id"].tolist() == [
        "a/0000.png",
        "a/0001.png",
        "a/0002.png",
        "linked/0000.png",
        "linked/0001.png",
    ]
    assert table.summary["broken"] == []


def test_names_that_are_no_utf8_are_listed(tmp_path: Path) -> None:
    source = gray_folder(tmp_path / "in", 4)
    (source / os.fsdecode(b"\xe9 \xf0\x9f\x99\x82.png")).write_bytes((source / "0000.png").read_bytes())
    (source / os.fsdecode(b"caf\xe9.png")).write_bytes((source / "0000.png").read_bytes())
    table = make(source, tmp_path / "out", max_broken_share=0.5)
    assert len(table) == 4
    reason = "the file's name is not valid UTF-8"
    assert table.summary["broken"] == [
        {"path": "\\udce9 🙂.png", "reason": reason},
        {"path": "caf\\udce9.png", "reason": reason},
    ]


def test_odd_names(tmp_path: Path) -> None:
    names = [
        "a b.png",
        "a/1.png",
        "a-b.png",
        "a.b/1.png",
        'quote".png',
        "back\\slash.png",
        "new\nline.png",
        "🙂.png",
    ]
    for seed, name in enumerate(names):
        save(tmp_path / "in" / name, seed)
    assert make(tmp_path / "in", tmp_path / "out").rows["id"].tolist() == sorted(names)


def test_raw_files_are_copies(tmp_path: Path) -> None:
    source = gray_folder(tmp_path / "in", 3)
    make(source, tmp_path / "out")
    before = (source / "0000.png").read_bytes()
    with open(tmp_path / "out" / "raw" / "0000.png", "r+b") as file:
        file.write(b"changed")
    assert (source / "0000.png").read_bytes() == before
