"""Recorders at once, killed at random moments: the registry stays sound, and no run is lost.

    python benchmarks/recorders.py [--recorders 8] [--kills 50] [--kilobytes 200] [--seed 0]

Each recorder is a process that pushes a prepared run of its own into one embedded registry, again and again under new
names. One of them, chosen at random, is killed (SIGKILL) at a random moment, and another takes its place, which records
the interrupted run first. At the end every run that a recorder was told to be recorded must be there, and `verify` must
find every record and every object of every tag sound.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lineage import make_run

from unlabeled.digest import dvc_digest
from unlabeled.lineage.git import git
from unlabeled.lineage.record import record
from unlabeled.lineage.registry import Registry
from unlabeled.lineage.step import Artifact
from unlabeled.lineage.store import Store
from unlabeled.lineage.verification import verify

FORK = multiprocessing.get_context("fork")


def main() -> None:
    """Print one JSON object; exit 1 where the registry is not sound or a run is lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recorders", type=int, default=8, help="recorders at once")
    parser.add_argument("--kills", type=int, default=50, help="recorders to kill")
    parser.add_argument("--kilobytes", type=int, default=200, help="size of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        size = arguments.kilobytes * 1000
        outcome = trial(Path(room), arguments.recorders, arguments.kills, size, arguments.seed)
    json.dump(outcome, sys.stdout, indent=2)
    print()
    sys.exit(0 if outcome["sound"] and not outcome["lost"] else 1)


def trial(room: Path, recorders: int, kills: int, size: int, seed: int = 0) -> dict[str, Any]:
    """Let recorders record until so many of them were killed; return what the registry then holds.

    Returns:
        seconds, kills, recorded (runs told to be recorded), runs (in the registry), lost, sound, and damaged (what
        `verify` names), `fsck` (what git finds).
    """
    registry, chance = Registry.embedded(room / "registry"), random.Random(seed)
    Store(str(room))  # DVC is imported once, before the forks
    ends = [start(registry, room, number, size) for number in range(recorders)]
    started, killed = time.monotonic(), 0
    while killed < kills:
        time.sleep(chance.uniform(0.1, 1.5))
        number = chance.randrange(recorders)
        process = ends[number]
        assert process.pid and process.is_alive(), "a recorder ended by itself"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += 1
        ends[number] = start(registry, room, number, size)
    (room / "enough").touch()
    for process in ends:
        process.join()
        assert process.exitcode == 0, "a recorder failed"
    told = {name for journal in room.glob("journal-*") for name in journal.read_text().split()}
    names = {row["run"] for row in registry.runs()}
    damaged = [str(difference) for report in verify(registry) for difference in report.differences]
    return {
        "seconds": round(time.monotonic() - started, 1),
        "kills": killed,
        "recorded": len(told),
        "runs": len(names),
        "lost": sorted(told - names),
        "sound": not damaged,
        "damaged": damaged,
        "fsck": git("fsck", "--strict", folder=registry.url).decode().split("\n")[:-1],
    }


def start(registry: Registry, room: Path, number: int, size: int) -> Any:
    """Start a recorder."""
    process = FORK.Process(target=keep_recording, args=(registry, room, number, size))
    process.start()
    return process


def keep_recording(registry: Registry, room: Path, number: int, size: int) -> None:
    """Record runs, and note each in the journal once it is recorded, until there is enough."""
    journal = room / f"journal-{number}"
    done = len(journal.read_text().split()) if journal.exists() else 0
    while not (room / "enough").exists():
        run = f"run-{number}-{done}"
        record_one(registry, room / run, run, size, seed=1000 * number + done)
        with open(journal, "a") as file:
            file.write(f"{run}\n")
        done += 1


def record_one(registry: Registry, work: Path, run: str, size: int, seed: int) -> None:
    """Record a run; one that was interrupted is recorded from the bundle that its recorder left."""
    bundle = work / "bundle"
    if not bundle.exists():
        attempt = work / f"{os.getpid()}"
        artifacts: dict[str, Artifact] = make_run(attempt, size, seed)
        data = {"source": "random", "digest": dvc_digest(artifacts["raw"].path), "reference": ""}
        record(run, artifacts, {}, data, "", "", bundle)
    registry.push(run, bundle)


if __name__ == "__main__":
    main()
