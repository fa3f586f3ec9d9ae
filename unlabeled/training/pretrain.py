"""Pretraining: an image table and a learning signal in, a model artifact out.

Over several processes: `torchrun --nproc-per-node 2 -m unlabeled.training.pretrain TABLE MODEL --method
'{"name": "simclr"}' --training '{"steps": 100}'`.
"""

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from unlabeled import parameters
from unlabeled.data.batches import Batches, evenly_spread, pixel_statistics
from unlabeled.data.table import ImageTable
from unlabeled.digest import json_digest
from unlabeled.distributed import alone, process_group, processes, rank
from unlabeled.environment import machine
from unlabeled.files import atomic_path, write_json
from unlabeled.nets.encoder import CONFIG, MODEL, Encoder
from unlabeled.parameters import Training
from unlabeled.signals import encoder_section, find_signal, method_settings
from unlabeled.signals.signal import Signal
from unlabeled.training.loop import train
from unlabeled.training.reproducible import reproducible
from unlabeled.training.resolve import resolve_training

METRICS, OBJECTIVE, PICTURE = "metrics.jsonl", "objective.json", "picture.npy"
PREPARED_IMAGES, OBJECTIVE_IMAGES, OBJECTIVE_BATCH, PICTURE_IMAGES = 2000, 1000, 250, 64


def pretrain(
    table: Path,
    model: Path,
    method: dict[str, Any],
    encoder: parameters.Encoder,
    training: Training,
    seed: int,
    checkpoints: Path,
) -> dict[str, Any]:
    """Train an encoder on a table's train images with one learning signal; no label is read.

    Killed at any moment and called again, it goes on from its last checkpoint and ends with the same bits.

    Args:
        table: an image table.
        model: the artifact to write: model.safetensors (the signal's whole state, the encoder's under
            `encoder.`), config.json, metrics.jsonl, objective.json (the method's own aim on held-out images)
            and, where the method draws one, picture.npy (uint8, rows x columns x C x H x W).
        method: {"name": "simclr", **settings}; `training` and `encoder` in it override keys of those.
        checkpoints: a folder that outlives the process, used by no other data and code than these.

    Returns:
        loss, steps, images (seen in all), objective, and of this call: resumed_at, seconds,
        images_per_second.

    Raises:
        InputError: an unknown method or setting, or too few images.
        CheckFailed: the training diverged.
    """
    with process_group() as device:
        images = ImageTable(table)
        settings = {key: value for key, value in method.items() if key != "name"}
        settings = method_settings(method["name"], settings)
        overrides = settings.pop("training")
        del settings["encoder"]
        kind = find_signal(method["name"])
        training = resolve_training(training, kind, overrides, images, device)
        mean, std = pixel_statistics(images)
        net = encoder_section(method, encoder).model_dump()
        net |= {"image_shape": list(images.image_shape), "mean": mean, "std": std}
        config = {
            "method": method["name"],
            "family": kind.family,
            "equation": kind.equation,
            "paper": kind.paper,
            "picture_rows": list(kind.picture_rows),
            "encoder": net,
            "settings": settings,
            "training": training.model_dump(),
            "steps": training.steps,
            "seed": seed,
            "device": device.type,
            "processes": processes(),
        }
        with reproducible(training.threads):
            torch.manual_seed(seed)
            signal = kind(Encoder(**net), **settings)
            train_images = images.indices("train")
            sample = images.images(evenly_spread(train_images, PREPARED_IMAGES))
            signal.prepare(torch.from_numpy(sample), len(train_images))
            batches = Batches(images, training.batch_size, seed, rank(), processes())
            own = checkpoints / json_digest([config, images.summary["digest"]])[:16]
            started = time.perf_counter()
            metrics, resumed_at = train(signal, batches, training, seed, device, own)
            seconds = time.perf_counter() - started
            objective: dict[str, float] = {}
            if rank() == 0:
                torch.manual_seed(seed)
                with alone():
                    objective = write_model(model, signal, config, metrics, images, device)
    seen = (training.steps - resumed_at) * training.batch_size
    return {
        "loss": metrics[-1]["loss"],
        "steps": training.steps,
        "images": training.steps * training.batch_size,
        "objective": objective,
        "resumed_at": resumed_at,
        "seconds": seconds,
        "images_per_second": seen / seconds,
    }


def write_model(
    model: Path,
    signal: Signal,
    config: dict[str, Any],
    metrics: list[dict[str, float]],
    table: ImageTable,
    device: torch.device,
) -> dict[str, float]:
    """Write the model artifact, whole or not at all, and return the objective."""
    with atomic_path(model) as folder:
        folder.mkdir()
        state = {name: tensor.cpu().contiguous() for name, tensor in signal.state_dict().items()}
        (folder / MODEL).write_bytes(save(state))
        write_json(folder / CONFIG, config)
        (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in metrics))
        objective, picture = assess(signal, table, device)
        write_json(folder / OBJECTIVE, objective)
        if picture is not None:
            np.save(folder / PICTURE, picture)
    return objective


def assess(
    signal: Signal, table: ImageTable, device: torch.device
) -> tuple[dict[str, float], np.ndarray | None]:
    """Return the method's objective on held-out images, the train split's where there are none, and its picture.

    The picture is uint8 (rows, columns, C, H, W), or None.
    """
    held_out = table.indices("test")
    held_out = evenly_spread(held_out if len(held_out) > 1 else table.indices("train"), OBJECTIVE_IMAGES)
    batches = np.array_split(held_out, -(-len(held_out) // OBJECTIVE_BATCH))
    totals: dict[str, float] = defaultdict(float)
    signal.eval()
    # Other batch sizes than the training's are not worth compiling for.
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        for batch in batches:
            values = signal.objective(torch.from_numpy(table.images(batch)).to(device))
            for name, value in values.items():
                totals[name] += value.item() * len(batch) / len(held_out)
        shown = table.images(evenly_spread(held_out, PICTURE_IMAGES))
        picture = signal.picture(torch.from_numpy(shown).to(device))
    if picture is None:
        return dict(totals), None
    return dict(totals), (picture * 255).round().clamp(0, 255).byte().cpu().numpy()


def main() -> None:
    """The entry for torchrun: prints the result of `pretrain`, and the machine that rank 0 trained on."""
    parser = argparse.ArgumentParser(description="Pretrain an encoder without labels.")
    parser.add_argument("table", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--method", type=json.loads, default={"name": "simclr"}, help="JSON: name and settings"
    )
    parser.add_argument("--encoder", type=json.loads, default={}, help="JSON: the encoder section")
    parser.add_argument("--training", type=json.loads, default={}, help="JSON: the training section")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=Path, help="default: none are kept")
    parser.add_argument("--result", type=Path, help="JSON file to write what is printed to as well")
    given = parser.parse_args()
    encoder = parameters.validated(parameters.Encoder, given.encoder, "encoder")
    training = parameters.validated(Training, given.training, "training")
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = given.checkpoints or Path(scratch)
        result = pretrain(given.table, given.model, given.method, encoder, training, given.seed, checkpoints)
    if int(os.environ.get("RANK", 0)) == 0:
        result["machine"] = machine()
        print(json.dumps(result))
        if given.result:
            write_json(given.result, result)


if __name__ == "__main__":
    main()
