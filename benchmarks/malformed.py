"""Robustness: 10,000 malformed requests of all kinds among good ones, to the embedded Triton server.

python benchmarks/malformed.py [--requests 10000] [--json]
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.pop(0)  # the folder of this script, in which `serving.py` would hide the package `serving`

import numpy as np

from serving.malformed import Target, memory, storm
from serving.repository import MODEL, model_config, write_model
from serving.server import EmbeddedTriton
from unlabeled.errors import CheckFailed
from unlabeled.export.models import ServedEncoder
from unlabeled.export.onnx import OnnxModel, onnx_bytes
from unlabeled.nets.encoder import Encoder

ROUNDS = 5
# What the allocators of the server and its two backends keep for themselves after the first round.
GROWTH_BAR = 32 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    encoder = Encoder("small_resnet", 16, 2, (1, 28, 28), 0.3, 0.35)
    served = ServedEncoder(encoder).eval()
    images = np.random.default_rng(0).integers(0, 256, (2, 1, 28, 28)).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        config = model_config("encoder", 1, served.output, encoder.feature_dim, max_batch_size=64)
        write_model(Path(folder), config, onnx_bytes(served))
        answer = OnnxModel(Path(folder) / "encoder" / MODEL)(images)
        with EmbeddedTriton(folder) as server:
            assert server.process is not None
            target = Target(server.http_url, server.grpc_url, "encoder", images, answer, max_batch_size=64)
            sizes, good, started = [], 0, time.perf_counter()
            for number in range(ROUNDS):
                good += storm(target, arguments.requests // ROUNDS, seed=number)["good"]
                sizes.append(memory(server.process.pid))
            alive = server.process.poll() is None
    result = {
        "malformed": arguments.requests,
        "good": good,
        "seconds": time.perf_counter() - started,
        "megabytes": [round(size / 2**20, 1) for size in sizes],
        "passed": alive and max(sizes) - sizes[0] <= GROWTH_BAR,
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        passed = "ok" if result["passed"] else "MISSED"
        print(f"{arguments.requests:,} malformed requests refused, {good:,} good ones answered  {passed}")
        print(f"server and backends after each fifth, MB: {', '.join(map(str, result['megabytes']))}")
    if not result["passed"]:
        raise CheckFailed("the server died or grew")


if __name__ == "__main__":
    main()
