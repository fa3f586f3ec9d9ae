"""Atomic writes."""

from pathlib import Path

import pytest

from unlabeled.files import atomic_path


def test_a_body_that_writes_nothing_costs_no_older_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "model"):
        pass
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_replaces_an_older_one_whole(tmp_path: Path) -> None:
    for files in (("a", "b"), ("b", "c")):
        with atomic_path(tmp_path / "model") as temporary:
            temporary.mkdir()
            for name in files:
                (temporary / name).write_text(name)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["b", "c"]
