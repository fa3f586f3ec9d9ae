"""The training section as it will run."""

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch

from unlabeled.data.batches import Batches
from unlabeled.data.table import ImageTable
from unlabeled.distributed import processes
from unlabeled.errors import InputError
from unlabeled.parameters import Training
from unlabeled.signals.signal import Signal
from unlabeled.training.precision import computes_in_bfloat16

# Compiling takes up to a minute, and saves little per step of a small net on a CPU.
COMPILE_PAYS_AFTER = {"cpu": 5000, "cuda": 500}


def resolve_training(
    training: Training, kind: type[Signal], overrides: dict[str, Any], table: ImageTable, device: torch.device
) -> Training:
    """Return the training section as it will run: nothing left to defaults, shares or the machine.

    In order of weight: the method's own overrides, what the section sets away from its defaults, the method's
    defaults, the section's.
    """
    chosen = {
        key: value
        for key, value in training.model_dump().items()
        if value != Training.model_fields[key].default
    }
    training = Training(**{**kind.training_defaults, **chosen, **overrides})
    if processes() % training.nodes:
        raise InputError(
            f"training.nodes is {training.nodes}, here {processes()} process trains: several nodes train on Kubeflow, "
            "by a pipeline that was compiled or submitted for them"
        )
    batches = Batches(table, training.batch_size, 0, 0, processes())
    if batches.batch_size < 2 * processes():
        raise InputError(
            f"{table.folder}: {processes()} processes cannot share a batch of {batches.batch_size} images, "
            "each needs two; give more train images or a larger training.batch_size"
        )
    steps = training.steps or max(1, round(training.epochs * batches.per_epoch))
    compiled = training.compile
    if compiled == "auto":
        compiled = "yes" if steps >= COMPILE_PAYS_AFTER[device.type] and compiler_found() else "no"
    precision = training.precision
    if precision == "auto":
        precision = "bfloat16" if computes_in_bfloat16(device) else "float32"
    return training.model_copy(
        update={
            "steps": steps,
            "epochs": round(steps / batches.per_epoch, 3),
            "batch_size": batches.batch_size,
            "precision": precision,
            "compile": compiled,
            "threads": training.threads or len(os.sched_getaffinity(0)),
        }
    )


def compiler_found() -> bool:
    """Tell whether torch.compile has what it needs: a C++ compiler and Python's headers."""
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return shutil.which(os.environ.get("CXX", "g++")) is not None and headers.is_file()
