"""Ingest: time for 70,000 Fashion-MNIST images, and the peak memory as a source grows.

    python benchmarks/ingest.py [--quick] [--json]

Each ingest runs in its own process. Its memory is the peak of that process above what its imports took.
Bars: 70,000 IDX images in 3 s, statistics in 5 s of CPU, memory flat from 10,000 to 1,000,000 images.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unlabeled.data.ingest import ingest
from unlabeled.data.sources import FASHION_MNIST, data_digest, fetch
from unlabeled.data.statistics import image_statistics, pixel_digests
from unlabeled.data.table import ImageTable
from unlabeled.parameters import Ingest
from unlabeled.workspace import cache_folder

BLOCK = np.random.default_rng(0).integers(0, 256, (10_000, 28, 28), dtype=np.uint8)


def write_idx(folder: Path, count: int) -> Path:
    """Write an IDX file of `count` random 28 x 28 images."""
    with open(folder / "train-images-idx3-ubyte", "wb") as file:
        file.write(b"\0\0\x08\x03" + np.array([count, 28, 28], ">u4").tobytes())
        for _ in range(count // len(BLOCK)):
            file.write(BLOCK.data)
    return folder


def write_npz(folder: Path, count: int) -> Path:
    """Write an npz file of `count` random 28 x 28 images."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 28, 28)}
    path = folder / "images.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("images.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(count // len(BLOCK)):
            file.write(BLOCK.data)
    return path


def write_pngs(folder: Path, count: int) -> Path:
    """Write `count` PNG files of 28 x 28 pixels, a thousand to a folder."""
    for index in range(count):
        path = folder / f"{index // 1000:04d}" / f"{index:06d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(BLOCK[index % len(BLOCK)]).save(path, compress_level=0)
    return folder


def status(key: str) -> float:
    """Return a memory figure of this process in MB, as the kernel states it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def ingest_here(source: str) -> dict[str, float]:
    """Ingest a source in this process; return its times and memory."""
    imported = status("VmRSS")
    digest = data_digest(source, cache_folder())
    with tempfile.TemporaryDirectory() as room:
        cpu = time.process_time()
        result = ingest(source, digest, Path(room, "table"), Path(room, "raw"), Ingest())
        cpu = time.process_time() - cpu
    peak = status("VmHWM")
    return {
        "images": result["images"],
        "seconds": round(result["seconds"], 2),
        "cpu_seconds": round(cpu, 2),
        "peak_mb": round(peak, 1),
        "above_imports_mb": round(peak - imported, 1),
    }


def ingest_in_process(source: Path | str) -> dict[str, float]:
    """Run `ingest_here` in a process of its own."""
    output = subprocess.run(
        [sys.executable, __file__, "--ingest", str(source)], check=True, capture_output=True
    )
    return json.loads(output.stdout)


def statistics_seconds() -> float:
    """Return CPU seconds of every statistic and digest of Fashion-MNIST's images."""
    with tempfile.TemporaryDirectory() as room:
        digest = data_digest(FASHION_MNIST, cache_folder())
        ingest(FASHION_MNIST, digest, Path(room, "table"), Path(room, "raw"), Ingest())
        images = ImageTable(Path(room, "table")).images(slice(None))
    started = time.process_time()
    image_statistics(images)
    pixel_digests(images)
    return round(time.process_time() - started, 2)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the images")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--ingest", metavar="SOURCE", help="only ingest this source, in this process")
    arguments = parser.parse_args()
    if arguments.ingest:
        print(json.dumps(ingest_here(arguments.ingest)))
        return
    fetch(FASHION_MNIST, data_digest(FASHION_MNIST, cache_folder()), cache_folder())
    figures: dict[str, Any] = {
        "fashion_mnist": ingest_in_process(FASHION_MNIST),
        "statistics_cpu_seconds": statistics_seconds(),
    }
    large = 100_000 if arguments.quick else 1_000_000
    sources: list[tuple[str, Callable[[Path, int], Path], tuple[int, int]]] = [
        ("idx", write_idx, (10_000, large)),
        ("npz", write_npz, (10_000, large)),
        ("folder", write_pngs, (5_000, large // 50)),
    ]
    for name, write, counts in sources:
        figures[name] = []
        for count in counts:
            with tempfile.TemporaryDirectory() as room:
                figures[name].append(ingest_in_process(write(Path(room), count)))
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{'source':14}{'images':>10}{'seconds':>10}{'CPU s':>10}{'peak MB':>10}{'above imports':>16}")
    for name in ("fashion_mnist", "idx", "npz", "folder"):
        rows = figures[name] if isinstance(figures[name], list) else [figures[name]]
        for row in rows:
            print(f"{name:14}{row['images']:>10,}{row['seconds']:>10}{row['cpu_seconds']:>10}", end="")
            print(f"{row['peak_mb']:>10}{row['above_imports_mb']:>16}")
    print(f"statistics and digests of 70,000 images: {figures['statistics_cpu_seconds']} s of CPU")


if __name__ == "__main__":
    main()
