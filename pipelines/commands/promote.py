"""`unlabeled promote`: a recorded run to a stage, once it has passed every gate."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.options import (
    DEFAULT_WORKSPACE,
    Json,
    RegistryUrl,
    RemoteUrl,
    VerifyKey,
    Workspace,
    open_registry,
)
from pipelines.printing import print_json
from unlabeled.errors import InputError

app = typer.Typer()


@app.command()
def promote(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A recorded run; default: the newest, or what to go back to.")
    ] = "",
    stage: Annotated[str, typer.Option(help="Stage that a server follows.")] = "prod",
    version: Annotated[
        str, typer.Option(help="Version of the run, as v1.2.0; default: the next minor one.")
    ] = "",
    rollback: Annotated[
        bool,
        typer.Option(
            "--rollback", help="Back to what the stage held before, or to RUN; only the audit is a gate."
        ),
    ] = False,
    margin: Annotated[
        float,
        typer.Option(min=0, max=1, help="How much accuracy may be lost to the run at the stage, a share."),
    ] = 0.02,
    latency_budget: Annotated[
        float, typer.Option(min=0, help="Largest p99 of one image's request, milliseconds.")
    ] = 250.0,
    key: VerifyKey = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
    registry: RegistryUrl = "",
    remote: RemoteUrl = "",
    as_json: Json = False,
) -> None:
    """Put a recorded run at a stage, once it has passed every gate."""
    from unlabeled.errors import CheckFailed
    from unlabeled.lineage import promotion

    promotion.check_stage(stage)
    opened = open_registry(workspace, registry, remote)
    holder = promotion.at_stage(opened, stage)
    run = _held_before(opened, stage, run) if rollback else promotion.find_run(opened, run)
    opened.require(run)
    if holder and holder.run == run:
        raise InputError(f"run {run} is at stage '{stage}' already, as {holder.version}")

    gates = []
    for gate in _gates(opened, run, holder, margin, latency_budget, key, only_audit=rollback):
        gates.append(gate)
        if not as_json:
            print(gate, flush=True)
    failed = [gate.name for gate in gates if not gate.passed]
    promoted = None if failed else promotion.promote(opened, run, stage, holder, version)
    if as_json:
        print_json(_document(run, stage, gates, holder, promoted))
    if promoted is None:
        raise CheckFailed(
            f"run {run} is not promoted to '{stage}': {', '.join(failed)} refused; nothing was tagged"
        )
    if not as_json:
        print(f"promoted  {promoted}: run {run}" + (f", instead of {holder.version}" if holder else ""))


def _held_before(registry: Any, stage: str, run: str) -> str:
    from unlabeled.lineage.promotion import find_run, history, previous

    if not run:
        return previous(registry, stage).run
    run = find_run(registry, run)
    if run not in {promotion.run for promotion in history(registry, stage)}:
        raise InputError(f"run {run} never was at stage '{stage}': promote it without --rollback")
    return run


def _gates(
    registry: Any,
    run: str,
    holder: Any,
    margin: float,
    latency_budget: float,
    key: Path | None,
    only_audit: bool,
) -> Iterator[Any]:
    """Measure gate by gate: a failed one does not keep the others from being told."""
    from serving.challenge import NAME, challenge
    from serving.gates import latency, measured, parity

    yield measured("audit", partial(_audit, registry, run, key))
    if only_audit:
        return
    with tempfile.TemporaryDirectory(prefix="unlabeled-") as room:
        challenger, champion = Path(room, "challenger"), Path(room, "champion")

        def fetched(*paths: str) -> Path:
            registry.fetch(run, challenger, paths)
            return challenger

        def champions() -> Path | None:
            if holder is None:
                return None
            registry.fetch(holder.run, champion, ["repository", "table/table.parquet"])
            return champion

        def equal() -> Any:
            parameters = registry.show(run)["predicate"]["buildDefinition"]["externalParameters"][
                "parameters"
            ]
            folder = fetched("repository", "index", "serving")
            return parity(folder, parameters["export"]["tolerance"])

        yield measured("parity", equal)
        name = holder.version if holder else ""
        yield measured(NAME, lambda: challenge(fetched("repository", "table"), champions(), name, margin))
        yield measured("latency", lambda: latency(fetched("repository", "index"), latency_budget))


def _audit(registry: Any, run: str, key: Path | None) -> Any:
    from serving.gates import Gate
    from unlabeled.lineage.audit import audit

    report = audit(registry, run, key)
    differences = [str(difference) for difference in report.differences]
    why = f"{len(report.checks)} claims proven from the registry alone"
    if differences:
        more = f" (and {len(differences) - 1} more: unlabeled audit {run})" if len(differences) > 1 else ""
        why = differences[0] + more
    return Gate("audit", report.proven, why, {"record": report.record, "differences": differences})


def _document(run: str, stage: str, gates: list[Any], holder: Any, promoted: Any) -> dict[str, Any]:
    return {
        "run": run,
        "stage": stage,
        "promoted": promoted is not None,
        "version": promoted.version if promoted else None,
        "replaced": {"run": holder.run, "version": holder.version} if holder else None,
        "gates": [gate.to_json() for gate in gates],
    }
