"""Checkpoints: atomic, verified, the last two kept."""

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import torch

from unlabeled.files import write_bytes

log = logging.getLogger(__name__)
KEPT = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write the state after `step` steps, named by step and sha256 of the bytes; all but the last two go."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    write_bytes(folder / f"step-{step:08d}-{_digest(data)}.pt", data)
    for old in _checkpoints(folder)[KEPT:]:
        old.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the latest whole checkpoint, tensors on the CPU; None where there is none.

    A damaged one is passed over with a warning: the one before it, or a start from the beginning, ends in
    the same bits.
    """
    for path in _checkpoints(folder):
        data = path.read_bytes()
        if path.stem.endswith(_digest(data)):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        log.warning(
            "checkpoint %s is damaged: its bytes are not those that were written; an earlier one is used",
            path,
        )
    return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)
