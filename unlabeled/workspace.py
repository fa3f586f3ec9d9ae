"""Where things lie on this machine: the cache of data and checkpoints, and the threads of a step."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unlabeled.digest import json_digest

CACHE = "UNLABELED_CACHE"
# The threads of OpenMP, and so of torch, from the start of a process.
THREADS = "OMP_NUM_THREADS"


def cache_folder() -> Path:
    """Return the folder for what can be made again: $UNLABELED_CACHE, else `~/.cache/unlabeled`."""
    return Path(os.environ.get(CACHE) or "~/.cache/unlabeled").expanduser()


def checkpoint_folder(*key: Any) -> Path:
    """Return the folder of a training's checkpoints; `key` (JSON values) holds all its result depends on."""
    return cache_folder() / "checkpoints" / json_digest(key)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the body with `count` CPU threads in torch, BLAS and OpenMP; 0 leaves them as they are."""
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        with threadpool_limits(count or None):
            yield
    finally:
        torch.set_num_threads(before)
