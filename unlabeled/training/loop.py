"""The one training loop."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from unlabeled import progress
from unlabeled.data.batches import Batches
from unlabeled.distributed import broadcast, processes, rank
from unlabeled.errors import CheckFailed
from unlabeled.nets.encoder import Encoder
from unlabeled.parameters import Training
from unlabeled.signals.signal import Signal
from unlabeled.training.checkpoints import load_checkpoint, save_checkpoint
from unlabeled.training.optimizers import build_optimizer
from unlabeled.training.precision import bfloat16_nets, nets_of
from unlabeled.training.schedule import learning_rate_share


def train(
    signal: Signal, batches: Batches, training: Training, seed: int, device: torch.device, checkpoints: Path
) -> tuple[list[dict[str, float]], int]:
    """Train a signal in place for `training.steps` steps, from the last checkpoint where there is one.

    Each step's randomness is seeded from (seed, step, rank) and its images from (seed, epoch), so that a
    run that was killed and resumed ends with the bits of one that was not.

    Args:
        signal: on the CPU; it ends on `device`, in training mode.
        training: resolved: steps above 0, compile `yes` or `no`.
        checkpoints: a folder of this very run (parameters, data, code).

    Returns:
        The metrics, a dict for each logged step (step, learning_rate, loss and the method's values), and
        the step that the run resumed at, 0 for a fresh one.

    Raises:
        CheckFailed: the loss is not finite.
    """
    signal.to(device).train()
    if training.channels_last:
        signal.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(signal, training)
    metrics: list[dict[str, float]] = []
    resumed_at = 0
    if state := broadcast(load_checkpoint(checkpoints) if rank() == 0 else None):
        signal.load_state_dict(state["signal"])
        optimizer.load_state_dict(state["optimizer"])
        metrics, resumed_at = state["metrics"], state["step"]
    if training.compile == "yes":
        compile_nets(signal)
    model = parallel(signal, device)
    shape = training.schedule, training.warmup_share, training.cooldown_share
    with bfloat16_nets(signal, device, training.precision == "bfloat16"):
        for done, batch in enumerate(batches.read(resumed_at, training.steps, device), resumed_at + 1):
            torch.manual_seed(step_seed(seed, done))
            signal.progress = (done - 1) / training.steps
            rate = training.learning_rate * learning_rate_share(done - 1, training.steps, *shape)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            loss, values = model(*batch)
            loss.backward()
            if training.gradient_clip:
                nn.utils.clip_grad_norm_(signal.parameters(), training.gradient_clip)
            optimizer.step()
            signal.after_step()
            save = done % training.checkpoint_every == 0 or done == training.steps
            if save or done == 1 or done % training.log_every == 0:
                line = {"step": done, "learning_rate": rate, **mean_over_ranks({"loss": loss, **values})}
                check_finite(line, metrics)
                metrics.append(line)
            if save and rank() == 0:
                state = {
                    "signal": signal.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "metrics": metrics,
                    "step": done,
                }
                save_checkpoint(checkpoints, done, state)
            progress.report(done, training.steps, "step", loss=metrics[-1]["loss"])
    signal.progress = 1.0
    return metrics, resumed_at


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a step on this rank: 64 bits mixed from seed, step and rank."""
    return int(np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def compile_nets(signal: Signal) -> None:
    """Compile the nets alone: views draw from PyTorch's generators, which compiled code would replace by its own."""
    for net in nets_of(signal):
        if isinstance(net, Encoder):
            # It has two ways in, `forward` and `feature_map`; both call its net. Each of the few sizes of its images
            # gets code of its own: PyTorch cannot compile a ViT's positions for all sizes at once.
            net.net.compile(dynamic=False)
        else:
            net.compile()


def parallel(signal: Signal, device: torch.device) -> nn.Module:
    """Return the signal, over several processes in DistributedDataParallel; GPUs share batch statistics."""
    if processes() == 1:
        return signal
    model = nn.SyncBatchNorm.convert_sync_batchnorm(signal) if device.type == "cuda" else signal
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """Return scalar tensors as numbers, averaged over the processes."""
    numbers = torch.stack([value.detach().float() for value in values.values()])
    if processes() > 1:
        dist.all_reduce(numbers)
        numbers /= processes()
    return dict(zip(values, numbers.tolist(), strict=True))


def check_finite(line: dict[str, Any], metrics: list[dict[str, float]]) -> None:
    """Refuse a loss that is not finite.

    Raises:
        CheckFailed: it names the step, the last good one, and what to change.
    """
    if math.isfinite(line["loss"]):
        return
    before = f", {metrics[-1]['loss']:.4g} at step {metrics[-1]['step']:.0f}" if metrics else ""
    raise CheckFailed(
        f"the loss is {line['loss']} at step {line['step']}{before}: the training diverged; "
        "lower training.learning_rate or set training.gradient_clip (1.0)"
    )
