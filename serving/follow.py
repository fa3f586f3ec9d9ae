"""The serving side of a promotion: what is at a stage of the registry comes into a running Triton."""

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.client import Client
from serving.index import Index
from serving.rollout import place, proven_number, prune, roll_out
from unlabeled.errors import CheckFailed, InputError
from unlabeled.lineage.promotion import Promotion, at_stage
from unlabeled.lineage.registry import Registry

INCOMING, LOCK = ".incoming", ".lock"
Say = Callable[[str], None]


def bring(registry: Registry, promotion: Promotion, repository: Path) -> tuple[int, Index]:
    """Fetch a promoted run's models, every file proven, and put them beside those that are served.

    Returns:
        The number of the version, and the index of the run.

    Raises:
        CheckFailed: a file is missing or damaged in the registry's store.
        InputError: the registry cannot be reached.
    """
    incoming = repository.parent / INCOMING
    with _alone(repository.parent):
        shutil.rmtree(incoming, ignore_errors=True)
        try:
            registry.fetch(promotion.run, incoming, ["repository", "index"])
            index = Index(incoming / "index")
            return place(incoming, repository), index
        finally:
            shutil.rmtree(incoming, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process brings models into this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Follower:
    """Brings what a stage holds into a running Triton; started again, it finds what is done already.

    Args:
        url: gRPC address of the server, `HOST:PORT`.
        repository: the server's model repository; its folder must be writable too.
        key: of Triton's control API; empty: it asks for none.
        tolerance: see `serving.rollout.roll_out`.
        say: told one line at a time.
    """

    def __init__(
        self,
        registry: Registry,
        stage: str,
        url: str,
        repository: Path,
        key: str = "",
        tolerance: float = 1e-3,
        say: Say = print,
    ) -> None:
        self.registry, self.stage, self.url, self.repository = registry, stage, url, repository
        self.key, self.tolerance, self.say = key, tolerance, say
        self.settled: Promotion | None = None
        self.brought: tuple[Promotion, int, Index] | None = None

    def look(self) -> None:
        """Ask the registry once, and roll out what is new there.

        Raises:
            CheckFailed: the promoted version cannot be served or is damaged; the one before serves on.
            InputError: registry or server cannot be reached, or nothing was promoted yet.
        """
        self.registry.refresh()
        promotion = at_stage(self.registry, self.stage)
        if promotion is None:
            raise InputError(f"stage '{self.stage}' of {self.registry.url} holds nothing yet")
        if promotion == self.settled:
            return
        started = time.monotonic()
        with Client(self.url, retry_seconds=0) as client:
            # A run is large: it is brought once, and for a server that is there.
            client.check_server()
            if self.brought is None or self.brought[0] != promotion:
                self.brought = promotion, *bring(self.registry, promotion, self.repository)
            _, number, index = self.brought
            before = proven_number(self.repository)
            try:
                changed = roll_out(self.repository, number, index, client, self.key, self.tolerance)
            except CheckFailed:
                # Once refused it is not tried again, unless it is promoted again.
                self.settled = promotion
                raise
        self.settled = promotion
        if before != number:
            prune(self.repository, keep=[number, before])
        took = f"in {time.monotonic() - started:.1f} s" if changed else "already"
        self.say(f"{promotion} serves {took}: run {promotion.run}, version {number} in Triton")

    def follow(self, interval: float) -> None:
        """Look again and again; whatever fails is said once and tried again.

        Args:
            interval: seconds between two looks.
        """
        said = ""
        while True:
            try:
                self.look()
                said = ""
            except (CheckFailed, InputError, OSError) as error:
                if str(error) != said:
                    said = str(error)
                    self.say(f"not rolled out: {said}")
            time.sleep(interval)
