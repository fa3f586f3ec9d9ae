"""Data parallel training under torchrun, and one process as its simplest case."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the processes that torchrun started, if any, and give this one's device: its GPU, else the CPU."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield device
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


_by_itself = False


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work as if it were the only one: what rank 0 does after training waits for nobody."""
    global _by_itself
    _by_itself = True
    try:
        yield
    finally:
        _by_itself = False


def processes() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() and not _by_itself else 1


def rank() -> int:
    """Return this process's number, 0 first."""
    return dist.get_rank() if dist.is_initialized() and not _by_itself else 0


def broadcast(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather(values: Tensor) -> Tensor:
    """Return the rows of all ranks, in the order of ranks: (B, …) to (processes · B, …).

    Gradients flow to every rank's rows, summed over the losses of all ranks: with a loss per rank that is a
    mean over that rank's rows, DistributedDataParallel's average is the gradient of the mean over all rows.
    """
    return values if processes() == 1 else _Gather.apply(values)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(processes())]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(processes())[rank()]
