"""How the tests of learning signals train them: in one process, or in two under torchrun."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from unlabeled.signals.signal import Signal


def train(signal: Signal, images: Tensor, steps: int, rate: float = 3e-3, batch: int = 64) -> list[float]:
    """Train on random batches of the images, cooling down at the end; return the reconstruction errors."""
    optimizer = torch.optim.AdamW(signal.parameters(), rate)
    errors = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, 3 * (1 - step / steps))
        optimizer.zero_grad()
        loss, values = signal.loss(images[torch.randperm(len(images))[:batch]])
        loss.backward()
        optimizer.step()
        errors.append(values["reconstruction"].item())
    return errors


def accuracy_after(signal: Signal, images: Callable[[], Tensor], steps: int) -> float:
    """Train on ever new images, and return the accuracy on more of them."""
    optimizer = torch.optim.AdamW(signal.train().parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        signal.loss(images())[0].backward()
        optimizer.step()
    with torch.inference_mode():
        signal.eval()
        return sum(signal.objective(images())["accuracy"].item() for _ in range(10)) / 10


def torchrun(*command: str, fails: bool = False) -> str:
    """Run a command in two processes that train together; return what they print, on standard error if it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(port),
    ]
    # A worker finds what it shares with its test.
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [*launcher, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert bool(result.returncode) == fails, result.stderr[-3000:]
    return result.stderr if fails else result.stdout
