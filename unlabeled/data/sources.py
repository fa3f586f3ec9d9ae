"""From the name or path of a data set to its raw files, proven by their DVC digest."""

import re
from importlib.util import find_spec
from pathlib import Path

from unlabeled.data.download import fetch_fashion_mnist
from unlabeled.data.files import source_digest, source_files
from unlabeled.data.pin import read_pin
from unlabeled.data.stamps import CLASSES, STAMPS, STAMPS_DIGEST, fetch_stamps
from unlabeled.errors import InputError
from unlabeled.parameters import nearest

FASHION_MNIST, DIGITS = "fashion-mnist", "digits"
NAMES = (DIGITS, FASHION_MNIST, STAMPS)
DIGITS_FILE = "digits.csv.gz"
IDX_NAME = re.compile(r"idx\d-ubyte(\.gz)?$")

# Names belong to bytes, not to the way they came: a folder with these files gives the same table as the name.
KNOWN = {
    "5f974fc07a228533b94e96f0786e9bcc.dir": (
        FASHION_MNIST,
        [
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ],
    ),
    STAMPS_DIGEST: (STAMPS, list(CLASSES)),
}


def absolute(source: str) -> str:
    """Return a source as it is called from any folder: the full path of a file or folder here, a name as it is.

    A link stays one: it may be the constant name of changing data.
    """
    path = None if source in NAMES else _existing(source)
    return str(path.parent.resolve() / path.name) if path else source


def data_digest(source: str, cache: Path) -> str:
    """Return the DVC digest (md5 ending in `.dir`) of a source; a single file counts as a folder holding it.

    Args:
        source: a name (`fashion-mnist`: as data.dvc states, nothing is fetched; `digits`; `stamps`), or the path
            of an image folder, a folder of IDX files, an IDX file or an npz file.
        cache: folder of downloaded data.

    Raises:
        InputError: there is no such source.
    """
    if source == FASHION_MNIST:
        pin = read_pin()
        if pin.name != source:
            raise InputError(f"{pin.file} pins '{pin.name}', not '{source}'")
        return pin.digest
    if source == STAMPS:
        return STAMPS_DIGEST
    return source_digest(_local_path(source))


def fetch(source: str, digest: str, cache: Path) -> Path:
    """Return the local folder or file with a source's raw files, their DVC digest proven equal to `digest`.

    Args:
        source: as of `data_digest`. `fashion-mnist` and `stamps` are downloaded into `cache` once, then used offline.
        digest: what `data_digest` gave when the run was started.
        cache: folder of downloaded data.

    Raises:
        InputError: there is no such source, or its bytes differ; both digests are named.
    """
    if source == FASHION_MNIST:
        return fetch_fashion_mnist(digest, cache / "data" / digest)
    if source == STAMPS:
        return fetch_stamps(digest, cache / "data" / digest)
    path = _local_path(source)
    found = source_digest(path)
    if found != digest:
        raise InputError(
            f"the data at {path} has digest {found}, expected was {digest}: the files were changed"
        )
    return path


def _local_path(source: str) -> Path:
    if source == DIGITS:
        package = find_spec("sklearn")  # its import would take a second
        assert package is not None and package.origin is not None
        return Path(package.origin).parent / "datasets" / "data" / DIGITS_FILE
    path = _existing(source)
    if path is None:
        hint = nearest(source, NAMES)
        raise InputError(f"no data '{source}': neither a name nor a file or folder here{hint}")
    if next(source_files(path), None) is None:
        raise InputError(f"no data in {path}: the folder holds no file")
    return path


def _existing(source: str) -> Path | None:
    path = Path(source).expanduser()
    try:
        return path if source and path.exists() else None
    except (OSError, ValueError):  # a name too long, a folder closed to us, a null byte
        return None
