"""Small artifacts of the steps before export, made in a second."""

import atexit
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from safetensors.torch import save_file

from serving.export import export
from unlabeled.files import write_json
from unlabeled.nets.encoder import Encoder
from unlabeled.parameters import Export

CLASSES = ["ankle boot", "schön", "zero", "one"]
CLUSTERS = 5


@dataclass
class Run:
    """The folders that export reads and writes."""

    folder: Path
    channels: int
    size: int
    result: dict[str, float] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Path]:
        return {name: self.folder / name for name in ("model", "labels", "classifier")}

    @property
    def table(self) -> Path:
        return self.folder / "table"

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    @property
    def index(self) -> Path:
        return self.folder / "index"

    def images(self, count: int, seed: int = 0, height: int = 0, width: int = 0) -> np.ndarray:
        """Random smooth images, uint8 (count, C, H, W); by default of the training size."""
        height, width = height or self.size, width or self.size
        return smooth_images(count, self.channels, height, width, seed)

    def export(self, **parameters) -> dict:
        return export(
            **self.inputs,
            table=self.table,
            repository=self.repository,
            index=self.index,
            parameters=Export(**parameters),
        )


def smooth_images(count: int, channels: int, height: int, width: int, seed: int) -> np.ndarray:
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (fine * 255).round().to(torch.uint8).numpy()


def make_run(folder: Path, channels: int = 3, size: int = 16, images: int = 80) -> Run:
    """Write a table, a pretrained model, its clusters and a classifier, all random but well conditioned."""
    run = Run(folder, channels, size)
    generator = torch.Generator().manual_seed(1)
    pixels = run.images(images, seed=2)
    run.table.mkdir(parents=True)
    np.save(run.table / "images.npy", pixels)
    rows = {
        "id": [f"image-{i:03d}" for i in range(images)],
        "split": ["train"] * (images - 20) + ["test"] * 20,
    }
    pd.DataFrame(rows | {"label": pd.array([i % 4 for i in range(images)], dtype="Int64")}).to_parquet(
        run.table / "table.parquet"
    )
    write_json(run.table / "summary.json", {"classes": CLASSES, "channels": channels, "image_size": size})

    for name in ("model", "classifier"):
        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            encoder = Encoder("small_resnet", 16, 2, (channels, size, size), 0.4, 0.3)
            # Batch norm that is not the identity, so that its folding into the convolutions is seen.
            for _ in range(3):
                encoder(torch.from_numpy(pixels).float() / 255)
        tensors = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
        config = {"encoder": encoder.settings}
        if name == "model":
            config |= {"method": "none", "family": "none"}
        if name == "classifier":
            tensors["head.weight"] = torch.randn(len(CLASSES), encoder.feature_dim, generator=generator) * 0.3
            tensors["head.bias"] = torch.randn(len(CLASSES), generator=generator) * 0.3
            config |= {"classes": CLASSES, "target": "labels"}
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        write_json(folder / name / "config.json", config)
    (folder / "labels").mkdir()
    save_file(
        {
            "mean": torch.rand(encoder.feature_dim, generator=generator),
            "scale": torch.rand(encoder.feature_dim, generator=generator) + 0.5,
            "weight": torch.randn(CLUSTERS, encoder.feature_dim, generator=generator) / 40,
            "bias": torch.randn(CLUSTERS, generator=generator),
        },
        folder / "labels" / "clusters.safetensors",
    )
    write_json(folder / "labels" / "scores.json", {"hungarian_map": [2, -1, 0, 3, 1]})
    return run


@cache
def exported_run() -> Run:
    """One exported run for all test modules, since an export takes seconds; not to be changed."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    run = make_run(folder / "run")
    run.result = run.export(index_images=40, max_batch_size=32)
    return run


def region_processes(region: str) -> list[psutil.Process]:
    """The backend stubs of a server, by the name of its shared memory."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(argument.startswith(region) for argument in process.info["cmdline"] or [])
    ]
