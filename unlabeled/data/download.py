"""The ways to Fashion-MNIST's raw files. No way is trusted: what it brings is hashed."""

import gzip
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from unlabeled.data.files import source_digest
from unlabeled.data.pin import read_pin
from unlabeled.errors import InputError
from unlabeled.files import atomic_path

FILES = (
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
)
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = "usr/share/datasets/fashion-mnist"


def fetch_fashion_mnist(digest: str, folder: Path) -> Path:
    """Return `folder` holding the four raw IDX files, downloaded unless there, proven by their DVC digest.

    Raises:
        InputError: no way gives files of that digest; each way is named with what it gave.
    """
    return fetch_proven("Fashion-MNIST", digest, folder, WAYS, _unpack)


def fetch_proven(
    title: str,
    digest: str,
    folder: Path,
    ways: Mapping[str, Callable[[Path], Path]],
    unpack: Callable[[Path, Path], None],
) -> Path:
    """Return `folder` holding raw files of a DVC digest: as it is there, or by the first way that gives them.

    Args:
        ways: each returns a folder with the files, in a temporary one or elsewhere.
        unpack: copies them from there into a new folder, as they are to lie.

    Raises:
        InputError: no way gives files of that digest; each way is named with what it gave.
    """
    found = source_digest(folder) if folder.is_dir() else ""
    if found == digest:
        return folder
    tried = [f"cache {folder}: " + (f"digest {found}" if found else "not there")]
    for way, download in ways.items():
        try:
            with TemporaryDirectory() as room, atomic_path(folder) as temporary:
                temporary.mkdir()
                unpack(download(Path(room)), temporary)
                found = source_digest(temporary)
                if found != digest:
                    raise InputError(f"digest {found}")
            return folder
        except Exception as error:  # DVC and torchvision raise errors of many types when offline
            tried.append(f"{way}: {' '.join(str(error).split())[:200] or type(error).__name__}")
    raise InputError(
        f"cannot get {title} with digest {digest}; tried {'; '.join(tried)}. "
        "Connect once, or give a folder of your own as the data"
    )


def _unpack(source: Path, folder: Path) -> None:
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
        else:
            with gzip.open(source / f"{name}.gz") as packed, open(folder / name, "wb") as file:
                shutil.copyfileobj(packed, file)


def _from_dvc_remote(room: Path) -> Path:
    pin = read_pin()
    if not (pin.file.parent / ".dvc").is_dir():
        raise InputError("none is configured")
    from dvc.api import DVCFileSystem

    DVCFileSystem(str(pin.file.parent)).get(pin.path, str(room / "data"), recursive=True)
    return room / "data"


def _from_installed_package(room: Path) -> Path:
    folder = Path("/", DEBIAN_FOLDER)
    if not folder.is_dir():
        raise InputError("not installed")
    return folder


def _from_debian(room: Path) -> Path:
    return debian_package(DEBIAN_PACKAGE, room) / DEBIAN_FOLDER


def debian_package(name: str, room: Path) -> Path:
    """Download a Debian package into a folder and return the folder of its unpacked files.

    Raises:
        InputError: it cannot be had here.
    """
    download = ["apt-get", "download", "-o", "Acquire::Retries=2", name]
    try:
        _command(download, room)
    except InputError as error:
        if "Unable to locate package" not in str(error) or os.geteuid() != 0:
            raise
        _command(["apt-get", "update"], room)
        _command(download, room)
    package = next(room.glob(f"{name}_*.deb"))
    _command(["dpkg-deb", "-x", package.name, "unpacked"], room)
    return room / "unpacked"


def _command(arguments: list[str], folder: Path) -> None:
    """Run a command in a folder; raise InputError with its last error line when it fails."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
    except FileNotFoundError:
        raise InputError(f"no {arguments[0]} here") from None
    if done.returncode:
        errors = [
            line for line in done.stderr.splitlines() if line.startswith("E:")
        ] or done.stderr.splitlines()
        raise InputError(errors[-1] if errors else f"{arguments[0]} ended with {done.returncode}")


def _from_torchvision(room: Path) -> Path:
    import torchvision

    torchvision.datasets.FashionMNIST(room, download=True)
    return room / "FashionMNIST" / "raw"


WAYS: dict[str, Callable[[Path], Path]] = {
    "DVC remote": _from_dvc_remote,
    "installed Debian package": _from_installed_package,
    "Debian package": _from_debian,
    "torchvision": _from_torchvision,
}
