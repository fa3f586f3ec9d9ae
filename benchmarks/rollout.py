"""Roll-out: requests that fail while promoted versions replace each other in the embedded Triton server.

python benchmarks/rollout.py [--requests 10000] [--clients 4] [--rounds 6] [--json]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.pop(0)  # the folder of this script, in which its own name would hide the package `serving`

import numpy as np
import torch
from torch import nn

from serving.client import Client
from serving.index import Index, write_index
from serving.repository import model_config, write_model
from serving.rollout import place, point, roll_out
from serving.server import EmbeddedTriton
from serving.soak import Answer, Soak
from unlabeled.errors import CheckFailed
from unlabeled.export.models import Served, ServedClassifier, ServedClusterer, ServedEncoder
from unlabeled.export.onnx import onnx_bytes
from unlabeled.export.parity import torch_outputs
from unlabeled.nets.encoder import Encoder

SHAPE = (1, 28, 28)
TOLERANCE = 1e-4


def networks(seed: int) -> dict[str, Served]:
    """Return the three served networks of a run, untrained: another seed is another run."""
    torch.manual_seed(seed)
    encoder, other = (Encoder("small_resnet", 16, 2, SHAPE, 0.3, 0.35) for _ in range(2))
    size = encoder.feature_dim
    clusters = torch.zeros(size), torch.ones(size), torch.randn(10, size), torch.zeros(10)
    return {
        "encoder": ServedEncoder(encoder).eval(),
        "classifier": ServedClassifier(other, nn.Linear(size, 10)).eval(),
        "clusterer": ServedClusterer(encoder, *clusters).eval(),
    }


def bundle(folder: Path, seed: int) -> Index:
    """Write what the follower fetches of a run: `repository/` and `index/`."""
    golden = {"images": np.random.default_rng(0).integers(0, 256, (8, *SHAPE)).astype(np.uint8)}
    models = {}
    for kind, served in networks(seed).items():
        golden[kind] = torch_outputs(served, golden["images"])
        config = model_config(kind, SHAPE[0], served.output, golden[kind].shape[1], max_batch_size=64)
        write_model(folder / "repository", config, onnx_bytes(served))
        models[kind] = {"output": served.output}
    nothing = {"ids": np.array([""]), "embeddings": np.zeros((1, 1)), "thumbnails": np.zeros((1, *SHAPE))}
    write_index(folder / "index", nothing, golden, models)
    return Index(folder / "index")


def measure(folder: Path, requests: int, clients: int, rounds: int) -> dict[str, Any]:
    """Roll two versions out in turn while clients ask, until enough requests were answered."""
    repository = folder / "repository"
    indexes = {}
    for seed in (1, 2):
        index = bundle(folder / "incoming", seed)
        indexes[place(folder / "incoming", repository)] = index
        if seed == 1:
            point(repository, 1)
        (folder / "incoming" / "index").rename(folder / f"index-{seed}")
    image = indexes[1].golden["images"][:1]
    times: list[float] = []
    marks: list[tuple[float, int]] = []
    mixed: list[float] = []
    with (
        EmbeddedTriton(repository) as server,
        Client(server.grpc_url) as client,
        Soak(server.grpc_url, dict.fromkeys(indexes[1].models, image), clients) as soak,
    ):
        for turn in range(1, rounds + 1):
            soak.wait(requests // (rounds + 1), seconds=600)
            number = 1 + turn % 2
            started = time.monotonic()
            roll_out(repository, number, indexes[number], client, "", TOLERANCE)
            marks.append((time.monotonic(), number))
            times.append(marks[-1][0] - started)
            mixed.append(mixed_seconds(soak.answers, started, number))
        soak.wait(max(requests - len(soak.answers), 100), seconds=600)
    failed = [answer.error for answer in soak.answers if answer.error]
    wrong = [answer for answer in soak.answers if not answer.error and not right(answer, indexes)]
    late = [
        answer for answer in soak.answers if not answer.error and answer.version != str(due(answer, marks))
    ]
    latencies = [(answer.ended - answer.started) * 1e3 for answer in soak.answers]
    p50, p99, worst = np.percentile(latencies, [50, 99, 100])
    bad = len(failed) + len(wrong) + len(late)
    return {
        "what": f"{len(soak.answers):,} requests over {rounds} roll-outs, {clients} clients: failed or wrong",
        "value": bad,
        "bar": 0,
        "passed": bad == 0 and len(soak.answers) >= requests,
        "requests": len(soak.answers),
        "failed": len(failed),
        "wrong": len(wrong),
        "of the old version after the switch": len(late),
        "errors": sorted(set(failed))[:3],
        "roll-out seconds": {"median": float(np.median(times)), "longest": max(times)},
        "seconds between the models": {"median": float(np.median(mixed)), "longest": max(mixed)},
        "milliseconds": {"p50": float(p50), "p99": float(p99), "longest": float(worst)},
    }


def right(answer: Answer, indexes: dict[int, Index]) -> bool:
    """Tell whether an answer is that of the version which it names."""
    expected = indexes[int(answer.version)].golden[answer.model][:1]
    assert answer.output is not None
    return bool(np.abs(answer.output - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max()))


def due(answer: Answer, marks: list[tuple[float, int]]) -> int:
    """Return the version that must answer; of a request during a roll-out, the one that did."""
    before = [number for ended, number in marks if ended <= answer.started]
    if len(before) == len(marks):
        return before[-1]
    # A roll-out may have switched this model already.
    current = before[-1] if before else 1
    return int(answer.version) if answer.version in (str(current), str(marks[len(before)][1])) else current


def mixed_seconds(answers: list[Answer], started: float, number: int) -> float:
    """Return for how long, of the roll-out that started then, one model gave new answers and another old ones."""
    during = [answer for answer in answers if answer.started >= started and not answer.error]
    first_new = min(answer.ended for answer in during if answer.version == str(number))
    last_old = max((answer.ended for answer in during if answer.version != str(number)), default=first_new)
    return max(last_old - first_new, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="at least")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6, help="roll-outs")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Path(folder), arguments.requests, arguments.clients, arguments.rounds)
    if arguments.json:
        print(json.dumps({"cores": len(os.sched_getaffinity(0)), "rows": [row]}, indent=2))
    else:
        print(f"{row['what']:<66} {row['value']:>6}  bar 0  {'ok' if row['passed'] else 'MISSED'}")
        seconds, times = row["roll-out seconds"], row["milliseconds"]
        print(f"  a roll-out takes {seconds['median']:.1f} s (longest {seconds['longest']:.1f} s)")
        between = row["seconds between the models"]
        print(f"  the models switch within {between['median']:.1f} s (longest {between['longest']:.1f} s)")
        print(
            f"  requests p50 {times['p50']:.1f} ms  p99 {times['p99']:.1f} ms  longest {times['longest']:.0f} ms"
        )
        for error in row["errors"]:
            print(f"  {error}")
    if not row["passed"]:
        raise CheckFailed("a request failed or was answered wrongly during a roll-out")


if __name__ == "__main__":
    main()
