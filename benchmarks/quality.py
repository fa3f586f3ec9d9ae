"""What a few core-minutes of pretraining are worth: probes of the features, one thread, or one GPU.

    python benchmarks/quality.py [--data fashion-mnist] [--methods simclr] [--minutes 6 | --steps N] [--seeds 1]

A row is printed as soon as it is found: each method's first seed comes before any second one.

A run is a fixed number of steps. `--minutes` makes it as many as fit into that time on this machine, by the speed of
twenty steps before; the time that they took in the end is measured and printed. So it wants a core to itself. Bars
on Fashion-MNIST: for SimCLR after 6 core-minutes linear probe at least 0.885, kNN on standardised features at least
0.875; after 4 linear probe at least 0.86 for simclr, instdisc, dino, cpc, rotation, denoising and inpainting, the
best 0.885.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from unlabeled.data.ingest import ingest
from unlabeled.data.sources import FASHION_MNIST, data_digest
from unlabeled.files import read_json
from unlabeled.parameters import Encoder, Evaluation, Ingest, Training
from unlabeled.probes.evaluate import evaluate, evaluate_baselines
from unlabeled.signals import encoder_section
from unlabeled.training.pretrain import pretrain
from unlabeled.workspace import cache_folder

SCORES = ("knn", "knn_standardised", "linear")


def train(table: Path, model: Path, method: str, steps: int, seed: int) -> dict[str, Any]:
    """Pretrain; return the result of the step."""
    training = Training(steps=steps, threads=1, checkpoint_every=steps)
    with tempfile.TemporaryDirectory() as checkpoints:
        return pretrain(table, model, {"name": method}, Encoder(), training, seed, Path(checkpoints))


def steps_within(room: Path, table: Path, method: str, minutes: float) -> int:
    """Return how many steps fit into so much time, by the speed of twenty."""
    seconds = [train(table, room / f"speed-{steps}", method, steps, 0)["seconds"] for steps in (2, 22)]
    return int(60 * minutes / ((seconds[1] - seconds[0]) / 20))


def measure(
    room: Path, data: str, methods: list[str], minutes: float, steps: int, seeds: range
) -> Iterator[dict[str, Any]]:
    """Yield a row for each baseline, then one for each seed and method."""
    table = room / "table"
    ingest(data, data_digest(data, cache_folder()), table, room / "raw", Ingest())
    nets = list(dict.fromkeys(encoder_section({"name": method}, Encoder()) for method in methods))
    evaluate_baselines(table, room / "baselines", Evaluation(), 0, nets)
    yield from read_json(room / "baselines" / "baselines.json")["rows"]
    length = {method: steps or steps_within(room / method, table, method, minutes) for method in methods}
    for seed in seeds:
        for method in methods:
            here = room / method / str(seed)
            result = train(table, here / "model", method, length[method], seed)
            evaluate(here / "model", table, here / "evaluation", Evaluation(), seed)
            scores = read_json(here / "evaluation" / "evaluation.json")
            yield {
                "method": method,
                "seed": seed,
                "steps": length[method],
                "minutes": round(result["seconds"] / 60, 2),
                "images_per_second": round(result["images_per_second"]),
                **{score: scores[score] for score in SCORES},
                "objective": result["objective"],
            }


def printed(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    cells = [str(row.get(key, "")) for key in ("seed", "steps", "minutes")]
    cells += [f"{row[score]:.4f}" for score in SCORES]
    objective = "  ".join(f"{name} {value:.4g}" for name, value in row.get("objective", {}).items())
    return f"{row['method']:20}{cells[0]:>5}{cells[1]:>7}{''.join(f'{cell:>9}' for cell in cells[2:])}  {objective}"


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=FASHION_MNIST, help="a source of labelled images")
    parser.add_argument("--methods", default="simclr", help="names, separated by commas")
    parser.add_argument("--minutes", type=float, default=6.0, help="core-minutes of pretraining, about")
    parser.add_argument("--steps", type=int, default=0, help="instead: exactly so many steps")
    parser.add_argument("--seeds", type=int, default=1, help="runs")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    out = sys.stderr if given.json else sys.stdout
    print(f"{'':20} seed  steps  minutes      kNN kNN std.   linear  objective", file=out)
    rows = []
    with tempfile.TemporaryDirectory() as room:
        methods = given.methods.split(",")
        for row in measure(Path(room), given.data, methods, given.minutes, given.steps, seeds):
            rows.append(row)
            print(printed(row), file=out, flush=True)
    if given.json:
        print(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
