"""`unlabeled follow`: a running Triton serves what is promoted."""

import os
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()
INTERVAL = 10.0


@app.command()
def follow(
    registry: Annotated[str, typer.Option(help="Git URL of the registry, or its folder.")],
    remote: Annotated[str, typer.Option(help="DVC URL of the registry, or its folder.")],
    repository: Annotated[
        Path, typer.Option(help="Model repository of the server; it and its parent are written.")
    ],
    stage: Annotated[str, typer.Option(help="Stage to follow.")] = "prod",
    url: Annotated[str, typer.Option(help="gRPC address of the Triton server.")] = "127.0.0.1:8001",
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = INTERVAL,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest difference to the golden answers; a GPU rounds otherwise.")
    ] = 1e-3,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
) -> None:
    """Bring what is promoted to a stage into a running Triton, until interrupted."""
    from serving.follow import Follower
    from unlabeled.lineage.promotion import check_stage
    from unlabeled.lineage.registry import Registry

    check_stage(stage)
    key = os.environ.get("TRITON_CONTROL_KEY", "")
    follower = Follower(
        Registry(registry, remote),
        stage,
        url,
        repository.absolute(),
        key,
        tolerance,
        partial(print, flush=True),
    )
    if once:
        follower.look()
        return
    with suppress(KeyboardInterrupt):
        follower.follow(interval)


def serve_stage(workspace: Path, stage: str, ports: dict[str, int]) -> None:
    """Serve what is promoted with the embedded Triton server, and follow the stage, until interrupted.

    Args:
        ports: `http_port`, `grpc_port` and `metrics_port` of the server.

    Raises:
        InputError: nothing was promoted to the stage yet.
    """
    import sys

    from pipelines.options import open_registry
    from serving.follow import Follower, bring
    from serving.rollout import point
    from serving.server import EmbeddedTriton
    from unlabeled.errors import InputError
    from unlabeled.lineage.promotion import at_stage, check_stage

    check_stage(stage)
    registry = open_registry(workspace)
    promotion = at_stage(registry, stage)
    if promotion is None:
        raise InputError(f"stage '{stage}' holds nothing yet: `unlabeled promote RUN --stage {stage}`")
    repository = workspace.resolve() / "serving" / stage / "repository"
    number, _ = bring(registry, promotion, repository)
    point(repository, number)
    say = partial(print, file=sys.stderr, flush=True)
    with EmbeddedTriton(repository, **ports) as server:
        say(f"Triton serves {promotion}: {server.addresses}  (Ctrl-C ends it)")
        follower = Follower(registry, stage, server.grpc_url, repository, say=say)
        threading.Thread(target=follower.follow, args=(INTERVAL,), daemon=True).start()
        server.wait()
