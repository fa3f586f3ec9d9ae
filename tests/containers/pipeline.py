"""The smoke pipeline with every step in a container of its own: `python tests/containers/pipeline.py WORKSPACE`.

KFP's DockerRunner starts the containers, through the socket that DOCKER_HOST names. Each gets what a pod on a cluster
gets, and no more: a read-only root, /tmp in memory, no capability, the workspace as its one volume.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

from docker.types import Mount
from kfp import local

from pipelines.options import parameters_of
from pipelines.request import pipeline_arguments, resolve
from pipelines.training import training
from unlabeled.lineage.registry import Registry
from unlabeled.workspace import CACHE


def main(workspace: Path) -> None:
    """Run the pipeline; its leaderboard ends up in the workspace."""
    # The containers' user writes to the folders made here. One that is missing podman makes itself, as root's alone.
    os.umask(0)
    cache, artifacts = workspace / "cache", workspace / "artifacts"
    artifacts.mkdir(parents=True)
    registry = Registry.embedded(workspace / "registry")
    local.init(
        local.DockerRunner(
            network_mode="host",
            read_only=True,
            tmpfs={"/tmp": "mode=1777"},
            cap_drop=["ALL"],
            shm_size="2g",
            mounts=[Mount(str(workspace), str(workspace), type="bind")],
            environment={CACHE: str(cache), "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]},
        ),
        pipeline_root=str(artifacts),
        enable_caching=False,
    )
    asked = resolve(parameters_of("smoke", None, None, None, None, None))
    arguments = pipeline_arguments(asked, cache, registry.url, registry.remote)
    started = time.perf_counter()
    run = training(run="containers", **arguments)
    print(f"{time.perf_counter() - started:.1f} s")
    shutil.copy(Path(run.outputs["bundle"].path) / "leaderboard.json", workspace)


def comparable(value: object) -> object:
    """Return a leaderboard without its run's name and times."""
    if isinstance(value, dict):
        apart = ("run", "seconds", "images_per_second")
        return {key: comparable(inner) for key, inner in value.items() if key not in apart}
    return [comparable(inner) for inner in value] if isinstance(value, list) else value


def compare(first: Path, second: Path) -> None:
    """End with status 1 unless two leaderboards are equal but for times."""
    ours, theirs = (comparable(json.loads(path.read_text())) for path in (first, second))
    if ours != theirs:
        sys.exit(f"{first} and {second} differ")
    print(f"equal: {first} and {second}")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]).resolve())
    else:
        compare(Path(sys.argv[1]), Path(sys.argv[2]))
