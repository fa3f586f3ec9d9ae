"""A log of what an application asks or is answered: a small uniform sample of each day, for `unlabeled drift`."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from unlabeled.errors import InputError
from unlabeled.files import atomic_path


class Reservoir:
    """A uniform sample of rows, written when its time is over or it is closed (Vitter 1985, algorithm R).

    The file is npz: `images` or `embeddings`, at most `size` rows; `seen`, of how many they are a sample;
    `started` and `ended`, seconds since 1970. Each time replaces the file of the one before, whole. Safe to use from
    several threads; several processes need a file each.

    Args:
        path: the file to write, ending in `.npz`.
        kind: `embeddings`, as `encoder` answers them, float32 (B, D); or `images`, uint8 (B, C, H, W).
        size: rows to keep.
        hours: after which a sample is written and the next begins.
        clock: returns seconds since 1970.

    Raises:
        InputError: the file's name does not end in `.npz`.
    """

    def __init__(
        self,
        path: Path | str,
        kind: Literal["embeddings", "images"] = "embeddings",
        size: int = 1000,
        hours: float = 24.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path, self.kind, self.size, self.hours, self.clock = Path(path), kind, size, hours, clock
        if self.path.suffix != ".npz":
            raise InputError(f"{path}: a log of inputs is an .npz file")
        self._random = np.random.default_rng()
        self._lock = threading.Lock()
        self._begin()

    def add(self, rows: np.ndarray) -> None:
        """Show rows to the sample: of one shape and type from the first to the last.

        Raises:
            InputError: they have another shape than those before.
            OSError: the file cannot be written.
        """
        with self._lock:
            if self.clock() >= self._started + 3600 * self.hours:
                self._write()
            for row in rows:
                if self._rows and row.shape != self._rows[0].shape:
                    raise InputError(f"{self.path} is a log of {self._rows[0].shape}, got {row.shape}")
                self._seen += 1
                if self._seen <= self.size:
                    self._rows.append(row.copy())
                elif (place := int(self._random.integers(self._seen))) < self.size:
                    self._rows[place] = row.copy()

    def close(self) -> None:
        """Write what is there."""
        with self._lock:
            self._write()

    def __enter__(self) -> "Reservoir":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        self._rows: list[np.ndarray] = []
        self._seen, self._started = 0, self.clock()

    def _write(self) -> None:
        if self._rows:
            with atomic_path(self.path) as temporary:
                np.savez(
                    temporary, seen=self._seen, started=self._started, ended=self.clock(),
                    **{self.kind: np.stack(self._rows)},
                )  # fmt: skip
        self._begin()
