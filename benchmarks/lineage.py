"""Seconds of recording, listing and auditing a run, and of two recorders at once, for runs of two sizes.

    python benchmarks/lineage.py [--megabytes 1 150] [--runs 100]

The runs are made of random bytes, so that nothing compresses; they are recorded into an embedded registry in
a temporary folder.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from unlabeled.digest import code_digest, dvc_digest
from unlabeled.environment import distributions, environment
from unlabeled.files import write_json
from unlabeled.lineage.git import git
from unlabeled.lineage.record import record
from unlabeled.lineage.registry import Registry
from unlabeled.lineage.step import Artifact, step
from unlabeled.lineage.store import Store

FILES = 50


def main() -> None:
    """Print one JSON object of wall seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 150], help="sizes of the runs")
    parser.add_argument("--runs", type=int, default=100, help="recorded runs to list")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        seconds: dict[str, Any] = {"environment": clock(environment), "code digest": clock(code_digest)}
        for size in arguments.megabytes:
            seconds[f"{size:g} MB"] = measure(Path(room) / f"{size:g}", int(size * 1e6))
        seconds[f"list {arguments.runs} runs"] = listing(Path(room) / "many", arguments.runs)
    json.dump(seconds, sys.stdout, indent=2)
    print()


def clock(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the wall seconds of a call."""
    started = time.perf_counter()
    function(*arguments)
    return round(time.perf_counter() - started, 3)


def make_run(work: Path, size: int, seed: int) -> dict[str, Artifact]:
    """Return the artifacts of a run of two steps with `size` random bytes in 50 files."""
    generator = np.random.default_rng(seed)
    raw, table = Artifact(str(work / "raw")), Artifact(str(work / "table"))
    with step("ingest", {}, {"raw": raw, "table": table}):
        for number in range(FILES):
            folder = Path((raw, table)[number % 2].path) / str(number % 5)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.bin").write_bytes(generator.bytes(size // FILES))
        write_json(Path(table.path) / "summary.json", {"classes": []})
    validation = Artifact(str(work / "validation"))
    with step("validate", {"table": table}, {"validation": validation}):
        write_json(Path(validation.path) / "validation.json", {"success": True})
    return {"raw": raw, "table": table, "validation": validation}


def record_run(registry: Registry | None, work: Path, run: str, size: int, seed: int = 0) -> float:
    """Make a run and return the seconds of recording it."""
    artifacts = make_run(work, size, seed)
    data = {"source": "random", "digest": dvc_digest(artifacts["raw"].path), "reference": ""}
    url, remote = (registry.url, registry.remote) if registry else ("", "")
    return clock(record, run, artifacts, {}, data, url, remote, work / "bundle")


def measure(room: Path, size: int) -> dict[str, float]:
    """Return seconds by what was done, for runs of `size` bytes."""
    from unlabeled.lineage.audit import audit

    registry = Registry.embedded(room / "registry")
    seconds = {"bundle and record": record_run(None, room / "first", "first", size)}
    distributions.cache_clear()
    seconds["push"] = clock(registry.push, "first", room / "first" / "bundle")
    seconds["push again"] = clock(registry.push, "first", room / "first" / "bundle")
    seconds["audit"] = clock(audit, registry, "first")
    seconds["fetch"] = clock(registry.fetch, "first", room / "fetched")
    context = multiprocessing.get_context("fork")
    jobs = [(registry, room / f"{n}", f"run-{n}", size, n + 1) for n in range(2)]
    processes = [context.Process(target=record_run, args=job) for job in jobs]
    started = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    seconds["make and record two at once"] = round(time.perf_counter() - started, 3)
    assert len(registry.runs()) == 3
    return seconds


def listing(room: Path, count: int) -> float:
    """Return the seconds of `Registry.runs` over so many runs."""
    registry = Registry.embedded(room / "registry")
    record_run(registry, room / "run", "first", 10_000)
    commit = git("rev-parse", "refs/tags/run/first^{commit}", folder=registry.url).decode().strip()
    for number in range(1, count):
        git("tag", f"run/copy-{number}", commit, folder=registry.url)
    return clock(registry.runs)


if __name__ == "__main__":
    # What a first record in a process pays for is the import of DVC.
    imported = clock(Store, tempfile.gettempdir())
    print(f"import of DVC: {imported} s", file=sys.stderr)
    main()
