"""The whole run: wall time over the steps' own compute, and with --kills N its survival of `kill -9`.

python benchmarks/pipeline.py [--profile smoke] [--kills 20] [--json]
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from unlabeled.digest import file_digest, files_below

UNLABELED = Path(sys.executable).with_name("unlabeled")
# Times, names of the run or digests of such files stand in these; every other file has to be the same to the bit.
TIMED = {
    "record.json",
    "leaderboard.json",
    "metrics.json",
    "bundle.dvc",
    "report.html",
    "request.json",
    "progress.jsonl",
    "pipeline.log",
    "lock",
}


def run(workspace: Path, *arguments: str) -> tuple[float, Path]:
    """Run the pipeline in a workspace to its end; return wall seconds and the run's folder."""
    started = time.perf_counter()
    subprocess.run([UNLABELED, "run", "--workspace", workspace, *arguments], check=True, capture_output=True)
    return time.perf_counter() - started, max((workspace / "runs").iterdir(), key=lambda folder: folder.name)


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of a run's files; not of those with times, nor of the drift from an earlier run."""
    files = files_below(folder).items()
    return {
        name: file_digest(file)
        for name, file in files
        if name not in TIMED and not name.startswith("validation/")
    }


def compute_seconds(folder: Path) -> dict[str, float]:
    """Return each step's own compute, as the step logged it."""
    record = json.loads((folder / "record.json").read_text())
    return {step["name"]: step["seconds"] for step in record["predicate"]["steps"]}


def kill_and_resume(workspace: Path, kills: int, seconds: float, *arguments: str) -> Path:
    """Start the run, kill the command after a random time, again and again; then let it finish."""
    clock = random.Random(0)
    for _ in range(kills):
        process = subprocess.Popen(
            [UNLABELED, "run", "--workspace", workspace, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(clock.uniform(0.5, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    return run(workspace, *arguments)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    arguments = ["--profile", options.profile]
    with tempfile.TemporaryDirectory() as room:
        wall, folder = run(Path(room) / "undisturbed", *arguments)
        steps = compute_seconds(folder)
        started = time.perf_counter()
        subprocess.run(
            [UNLABELED, "audit", "--workspace", Path(room) / "undisturbed"], check=True, capture_output=True
        )
        figures: dict[str, Any] = {
            "profile": options.profile,
            "wall_seconds": wall,
            "compute_seconds": sum(steps.values()),
            "wall_over_compute": wall / sum(steps.values()),
            "audit_seconds": time.perf_counter() - started,
            "steps": steps,
        }
        if options.kills:
            disturbed = kill_and_resume(Path(room) / "disturbed", options.kills, wall / 2, *arguments)
            audit = subprocess.run(
                [UNLABELED, "audit", "--workspace", Path(room) / "disturbed"], capture_output=True
            )
            figures["kills"] = options.kills
            here, there = digests(folder), digests(disturbed)
            figures["files"] = len(here)
            figures["differing"] = sorted(
                name for name in here.keys() | there.keys() if here.get(name) != there.get(name)
            )
            figures["registry_valid"] = audit.returncode == 0
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        for name, value in figures.items():
            print(f"{name:<20} {value}")


if __name__ == "__main__":
    main()
