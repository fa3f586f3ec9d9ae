"""Where data comes from: names, paths, the pin of Fashion-MNIST; nothing but the pinned bytes gets in."""

import shutil
from pathlib import Path

import pytest
import yaml
from images import gray_folder, idx_folder

from unlabeled.data.download import FILES, WAYS, fetch_fashion_mnist
from unlabeled.data.files import source_digest
from unlabeled.data.ingest import ingest
from unlabeled.data.pin import VARIABLE, read_pin
from unlabeled.data.sources import FASHION_MNIST, KNOWN, absolute, data_digest, fetch
from unlabeled.data.table import ImageTable
from unlabeled.digest import dvc_digest, tree_digest
from unlabeled.errors import InputError
from unlabeled.parameters import Ingest
from unlabeled.workspace import CACHE, cache_folder

PIN = Path(__file__).parents[1] / "data.dvc"


@pytest.fixture(scope="session")
def fashion_mnist() -> Path:
    """The raw files of Fashion-MNIST, downloaded where the cache does not have them."""
    return fetch(FASHION_MNIST, data_digest(FASHION_MNIST, cache_folder()), cache_folder())


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no commands, no installed package: only what the cache or a DVC remote holds."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("unlabeled.data.download.DEBIAN_FOLDER", "nowhere")


def repository(folder: Path, data: Path) -> Path:
    """Make a DVC repository with the data pinned and pushed to a remote; return that remote."""
    from dvc.repo import Repo

    folder.mkdir()
    shutil.copytree(data, folder / "data")
    with Repo.init(str(folder), no_scm=True) as repo:
        with repo.config.edit() as config:
            config["remote"]["store"] = {"url": str(folder / "store")}
            config["core"]["remote"] = "store"
        repo.add(str(folder / "data"))
        repo.push()
    shutil.rmtree(folder / "data")
    shutil.rmtree(folder / ".dvc" / "cache")
    return folder / "store"


def pin(folder: Path) -> None:
    """Give the data of a repository the name that ingest looks for."""
    content = yaml.safe_load((folder / "data.dvc").read_text())
    (folder / "data.dvc").write_text(yaml.safe_dump({**content, "meta": {"name": FASHION_MNIST}}))


def test_pin_is_what_dvc_writes(tmp_path: Path, fashion_mnist: Path) -> None:
    repository(tmp_path / "repository", fashion_mnist)
    written = yaml.safe_load((tmp_path / "repository" / "data.dvc").read_text())
    ours = yaml.safe_load(PIN.read_text())
    assert ours["outs"] == written["outs"]
    assert ours["meta"]["name"] == FASHION_MNIST


def test_dvc_reads_the_pin(tmp_path: Path, fashion_mnist: Path) -> None:
    """`dvc status` finds the raw files unchanged under our data.dvc."""
    from dvc.repo import Repo

    shutil.copytree(fashion_mnist, tmp_path / "data")
    shutil.copy(PIN, tmp_path / "data.dvc")
    with Repo.init(str(tmp_path), no_scm=True) as repo:
        (output,) = repo.index.outs
        assert (output.def_path, output.get_hash().value) == ("data", output.hash_info.value)
        assert output.hash_info.value == read_pin().digest


def test_named_classes_belong_to_the_pinned_bytes() -> None:
    name, classes = KNOWN[read_pin().digest]
    assert (name, len(classes), classes[0], classes[9]) == (FASHION_MNIST, 10, "T-shirt/top", "Ankle boot")


def test_digest_of_the_name_needs_no_data(tmp_path: Path, offline: None) -> None:
    assert (
        data_digest(FASHION_MNIST, tmp_path / "nothing") == yaml.safe_load(PIN.read_text())["outs"][0]["md5"]
    )
    assert not (tmp_path / "nothing").exists()


def test_folder_digest_is_that_of_dvc(tmp_path: Path) -> None:
    from dvc.repo import Repo

    names = ["b/1.png", "b-c.png", "b.d", "ü/図 🙂.png", 'a"q\\.png', "z/empty", "B/x", "b0/x"]
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    (tmp_path / "data" / "no file in here").mkdir()
    with Repo.init(str(tmp_path), no_scm=True) as repo:
        repo.add(str(tmp_path / "data"))
    written = yaml.safe_load((tmp_path / "data.dvc").read_text())["outs"][0]["md5"]
    assert source_digest(tmp_path / "data") == dvc_digest(tmp_path / "data") == written


def test_name_and_folder_give_the_same_table(tmp_path: Path, fashion_mnist: Path) -> None:
    digest = data_digest(FASHION_MNIST, cache_folder())
    assert data_digest(str(fashion_mnist), cache_folder()) == digest
    for source, output in [(FASHION_MNIST, tmp_path / "1"), (str(fashion_mnist), tmp_path / "2")]:
        result = ingest(source, digest, output / "table", output / "raw", Ingest())
        assert (result["train"], result["test"], result["broken"]) == (60_000, 10_000, 0)
    assert tree_digest(tmp_path / "1" / "table") == tree_digest(tmp_path / "2" / "table")
    assert dvc_digest(tmp_path / "1" / "raw") == digest
    table = ImageTable(tmp_path / "1" / "table")
    assert (table.summary["source"], table.classes[1], table.image_shape) == (
        FASHION_MNIST,
        "Trouser",
        (1, 28, 28),
    )
    assert sorted(table.rows["label"].value_counts()) == [7000] * 10
    # Published: mean 0.2860, std 0.3530 of the train pixels.
    train = table.rows[:60_000]
    assert train["mean"].mean() == pytest.approx(0.2860, abs=1e-4)
    assert (train["std"] ** 2 + train["mean"] ** 2).mean() - 0.2860**2 == pytest.approx(0.3530**2, abs=1e-4)


def test_offline_once_it_is_there(tmp_path: Path, fashion_mnist: Path, offline: None) -> None:
    digest = read_pin().digest
    shutil.copytree(fashion_mnist, tmp_path / "data" / digest)
    assert fetch(FASHION_MNIST, digest, tmp_path) == tmp_path / "data" / digest


def test_changed_cache_is_refused_offline(tmp_path: Path, offline: None) -> None:
    digest = read_pin().digest
    folder = idx_folder(tmp_path / "cache" / "data" / digest)
    found = source_digest(folder)
    with pytest.raises(InputError) as error:
        fetch(FASHION_MNIST, digest, tmp_path / "cache")
    message = str(error.value)
    assert f"cannot get Fashion-MNIST with digest {digest}" in message
    assert f"cache {folder}: digest {found}" in message
    for way in WAYS:
        assert f"{way}: " in message
    assert "no apt-get here" in message
    assert "\n" not in message
    assert source_digest(folder) == found
    assert [path.name for path in folder.parent.iterdir()] == [digest]


def test_changed_cache_is_replaced(
    tmp_path: Path, fashion_mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = read_pin().digest
    folder = idx_folder(tmp_path / digest)
    monkeypatch.setitem(WAYS, "DVC remote", lambda room: fashion_mnist)
    assert source_digest(fetch_fashion_mnist(digest, folder)) == digest
    assert sorted(path.name for path in folder.iterdir()) == list(FILES)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_other_bytes_are_refused(
    tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """An installed package with other bytes, plain or gzipped: the message names both digests."""
    found = source_digest(idx_folder(tmp_path / "plain"))
    monkeypatch.setattr(
        "unlabeled.data.download.DEBIAN_FOLDER", str(idx_folder(tmp_path / "package", end=end))
    )
    with pytest.raises(InputError, match=f"{read_pin().digest}; .*installed Debian package: digest {found}"):
        fetch(FASHION_MNIST, read_pin().digest, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "data").iterdir())


def test_dvc_remote(tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source = idx_folder(tmp_path / "source")
    store = repository(tmp_path / "repository", source)
    pin(tmp_path / "repository")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "repository" / "data.dvc"))
    digest = data_digest(FASHION_MNIST, tmp_path)
    assert digest == dvc_digest(source)
    fetched = fetch(FASHION_MNIST, digest, tmp_path / "cache")
    assert dvc_digest(fetched) == digest
    assert not (tmp_path / "repository" / "data").exists()

    # DVC itself does not notice a flipped bit on the remote.
    largest = max((path for path in store.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.chmod(0o644)
    data = bytearray(largest.read_bytes())
    data[-1] ^= 1
    largest.write_bytes(data)
    shutil.rmtree(tmp_path / "repository" / ".dvc" / "cache", ignore_errors=True)
    with pytest.raises(
        InputError, match=rf"digest {digest}; .*DVC remote: digest (?!{digest})[0-9a-f]{{32}}.dir"
    ):
        fetch(FASHION_MNIST, digest, tmp_path / "other")


@pytest.mark.slow
def test_debian_package_has_the_pinned_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlabeled.data.download.WAYS", {"Debian package": WAYS["Debian package"]})
    assert source_digest(fetch_fashion_mnist(read_pin().digest, tmp_path / "data")) == read_pin().digest


def test_changed_folder_is_refused_with_both_digests(tmp_path: Path) -> None:
    source = gray_folder(tmp_path / "in", 3)
    digest = data_digest(str(source), tmp_path)
    (source / "0000.png").write_bytes(b"other")
    with pytest.raises(InputError) as error:
        ingest(str(source), digest, tmp_path / "table", tmp_path / "raw", Ingest())
    assert digest in str(error.value)
    assert data_digest(str(source), tmp_path) in str(error.value)
    assert not (tmp_path / "table").exists()
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("fashion-minst", "did you mean 'fashion-mnist'"),
        ("digit", "did you mean 'digits'"),
        ("imagenet", "valid: digits, fashion-mnist"),
        ("/no/such/folder", "neither a name nor a file or folder"),
        ("x" * 5000, "neither a name"),
        ("a\0b", "neither a name"),
        ("", "neither a name"),
    ],
)
def test_no_such_source(tmp_path: Path, source: str, message: str) -> None:
    for call in (lambda: data_digest(source, tmp_path), lambda: fetch(source, "0" * 32 + ".dir", tmp_path)):
        with pytest.raises(InputError) as error:
            call()
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_folder_without_files(tmp_path: Path) -> None:
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").touch()
    with pytest.raises(InputError, match="the folder holds no file"):
        data_digest(str(tmp_path / "in"), tmp_path)


def test_home_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gray_folder(tmp_path / "in", 2)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert data_digest("~/in", tmp_path) == data_digest("in", tmp_path) == dvc_digest(tmp_path / "in")


def test_a_path_is_the_same_from_any_folder_and_a_name_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here / "in", here / "digits", there / "in"):
        gray_folder(folder, 2)
    (here / "link").symlink_to(there / "in")
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.chdir(here)
    same = ("in", "./in", "in/", "../here/in", "in/../in", "~/in", str(here / "in"))
    assert {absolute(source) for source in same} == {str(here / "in")}
    assert absolute("link") == str(here / "link"), "what it leads to may be other data tomorrow"
    assert absolute(".") == str(here)
    for name in ("digits", "stamps", FASHION_MNIST, "no-such-data", "", "a\0b", "n" * 300):
        assert absolute(name) == name
    monkeypatch.chdir(there)
    assert absolute("in") == str(there / "in")


def test_default_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(CACHE, raising=False)
    assert cache_folder() == tmp_path / ".cache" / "unlabeled"
    monkeypatch.setenv(CACHE, "~/else")
    assert cache_folder() == tmp_path / "else"


def test_pin_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert read_pin().file == PIN.resolve()
    shutil.copy(PIN, tmp_path / "data.dvc")
    assert read_pin().file == tmp_path / "data.dvc"


@pytest.mark.parametrize(
    "content", [None, "", "a: [", "outs: []", "outs: [{md5: x}]\nmeta: {}", "- 1", "\x00"]
)
def test_bad_pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None) -> None:
    file = tmp_path / "data.dvc"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv(VARIABLE, str(file))
    with pytest.raises(InputError, match=r"no data.dvc at|is no pin of data") as error:
        data_digest(FASHION_MNIST, tmp_path)
    assert str(file) in str(error.value)


def test_pin_of_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load(PIN.read_text()) | {"meta": {"name": "flowers"}}
    (tmp_path / "data.dvc").write_text(yaml.safe_dump(content))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "data.dvc"))
    with pytest.raises(InputError, match="pins 'flowers', not 'fashion-mnist'"):
        data_digest(FASHION_MNIST, tmp_path)
