"""The data side of the registry: a DVC remote, object by object. Nothing else here touches DVC's code.

Objects are named by their md5, as DVC names them, so that `dvc pull`, `dvc get` and `dvc status` work from
anywhere. DVC itself is content that an object is there; here every object is read back.
"""

import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from unlabeled import progress
from unlabeled.digest import Digests, blocks, stream_digests
from unlabeled.errors import CheckFailed, InputError

# A remote of this name in the user's own DVC configuration adds its settings: endpoint, credentials.
REMOTE = "store"


class Store:
    """A DVC remote.

    Args:
        url: a folder, or any URL that DVC knows (`s3://…`, `gs://…`, `ssh://…`).

    Raises:
        InputError: DVC does not know such a URL, or its plug-in is not installed.
    """

    def __init__(self, url: str) -> None:
        from dvc.config import Config
        from dvc.fs import get_cloud_fs
        from dvc_data.hashfile.db import get_odb

        self.url = url
        # By HTTPS botocore would send a checksum after the content, which not every S3 server takes (JuiceFS, MinIO and
        # Ceph of some age). Whatever is sent is read back and its digest compared anyway.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        try:
            config = Config()
            config["remote"].setdefault(REMOTE, {})["url"] = url
            filesystem, settings, path = get_cloud_fs(config, name=REMOTE)
            opened = filesystem(**settings)
            self._root, self._is_folder = path, opened.protocol == "local"
            self._objects: Any = get_odb(opened, opened.join(path, "files", "md5"), hash_name="md5")
        except Exception as error:  # plug-ins raise what they like
            raise InputError(f"cannot use {url} as a DVC remote: {_one_line(error)}") from None

    def read(self, name: str) -> Iterator[bytes]:
        """Yield an object's content, block by block.

        Raises:
            FileNotFoundError: it is not there.
            OSError: it lies in a folder and cannot be read.
            InputError: the remote cannot be reached, or is a folder that does not exist.
        """
        try:
            with self._objects.fs.open(self._objects.oid_to_path(name), "rb") as file:
                yield from blocks(file)
        except Exception as error:  # as above
            # A remote that was mistyped has lost nothing.
            nowhere = isinstance(error, FileNotFoundError | NotADirectoryError)
            if self._is_folder and nowhere and not self._objects.fs.isdir(self._root):
                raise InputError(f"no DVC remote at {self.url}") from None
            if self._is_folder or _not_there(error):
                raise
            # S3 says no more than "Forbidden" to a wrong secret.
            hint = "; check its credentials" if isinstance(error, PermissionError) else ""
            cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
            raise InputError(f"cannot read the DVC remote {self.url}: {_one_line(cause)}{hint}") from None

    def digests(self, name: str) -> Digests:
        """Read an object to its end and return its digests; raises what `read` raises."""
        return stream_digests(self.read(name))

    def add(self, objects: Mapping[str, Path | bytes]) -> list[str]:
        """Bring objects to the remote, and read every one of them back.

        Args:
            objects: content by name; an object that is there already is not sent again.

        Returns:
            The names of objects that lay there damaged and were replaced.

        Raises:
            CheckFailed: what the remote gives back is not what was sent.
            InputError: the remote cannot be reached or written.
        """
        # S3's client takes minutes to tell of each upload that no server is there, and seconds of a read.
        if not self._is_folder:
            with suppress(FileNotFoundError):
                next(self.read(next(iter(objects), "0" * 32)), b"")
        try:
            self._send({name: objects[name] for name in objects if not self._objects.exists(name)})
            damaged = self._damaged(objects)
            self._send({name: objects[name] for name in damaged})
        except Exception as error:  # as above
            raise InputError(f"cannot write to the DVC remote {self.url}: {_one_line(error)}") from None
        if still := self._damaged(damaged):
            raise CheckFailed(
                f"object {still[0]} comes back changed from the DVC remote {self.url}: the file sent is not "
                "what the record says, or the remote does not keep it"
            )
        return damaged

    def _send(self, objects: Mapping[str, Path | bytes]) -> None:
        from dvc_objects.fs.local import localfs

        with tempfile.TemporaryDirectory(prefix="unlabeled-") as room:
            files, listings = {}, {}
            for name, content in objects.items():
                if isinstance(content, bytes):
                    listings[name] = str(Path(room, name))
                    Path(room, name).write_bytes(content)
                else:
                    files[name] = str(content)
            # A folder's listing after its files: whoever sees it finds them.
            for group in filter(None, (files, listings)):
                self._objects.add(list(group.values()), localfs, list(group), check_exists=False)

    def _damaged(self, names: Collection[str]) -> list[str]:
        damaged = []
        for done, name in enumerate(names, 1):
            if self.digests(name).md5 != name.removesuffix(".dir"):
                damaged.append(name)
            progress.report(done, len(names), "objects")
        return damaged


def _not_there(error: Exception) -> bool:
    """Tell an object that is not there from a web server that does not answer: fsspec raises the same for both."""
    from aiohttp import ClientError

    cause = error.__cause__
    unanswered = isinstance(cause, ClientError) and getattr(cause, "status", 0) != 404
    return isinstance(error, FileNotFoundError) and not unanswered


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__
