"""The command line. Heavy libraries are imported by the command that needs them, so that help comes at once."""

import errno
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands import (
    ablate,
    bench,
    by_hand,
    compare,
    describe,
    follow,
    kubeflow,
    promote,
    verify,
    watch,
)
from pipelines.options import (
    DEFAULT_WORKSPACE,
    Data,
    Json,
    Methods,
    ParametersFile,
    Profile,
    RegistryUrl,
    RemoteUrl,
    RunName,
    Seed,
    Set,
    VerifyKey,
    Workspace,
    open_registry,
    open_workspace,
    parameters_of,
)
from pipelines.printing import print_json, print_table
from unlabeled import __version__
from unlabeled.errors import CheckFailed, InputError
from unlabeled.files import read_json

app = typer.Typer(
    name="unlabeled",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"unlabeled {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """From a folder of unlabeled images to a served, audited model."""


# A place that the user named cannot be read or written. Anything else that the system refuses is a fault of ours.
PLACE_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOENT, errno.ENOTDIR}

INTERRUPTED = 130  # what Typer makes of a KeyboardInterrupt


def main() -> None:
    """Run the command line: 0 done, 1 the check or run failed, 2 bad input, 130 interrupted."""
    # SIGTERM ends a command as Ctrl-C does, so that what it started (a server, temporary folders) goes with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except InputError as error:
        print(f"unlabeled: {error}", file=sys.stderr)
        sys.exit(2)
    except CheckFailed as error:
        print(f"unlabeled: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.filename is None or error.errno not in PLACE_ERRORS:
            raise
        print(f"unlabeled: {error.filename}: {error.strerror.lower()}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            print("unlabeled: interrupted; the same command resumes from here", file=sys.stderr)
        raise


@app.command()
def run(
    profile: Profile = "cpu",
    data: Data = None,
    methods: Methods = None,
    seed: Seed = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
    set_: Set = None,
    parameters: ParametersFile = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Execute every step, whatever was computed before.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline on this machine; the same command again resumes where it stopped."""
    wanted = parameters_of(profile, data, methods, seed, set_, parameters)
    workspace = open_workspace(workspace, wanted.data)

    from rich.console import Console

    from pipelines import display, local
    from pipelines.request import pipeline_arguments, resolve
    from unlabeled.lineage import signature
    from unlabeled.lineage.reference import newest_of
    from unlabeled.lineage.registry import Registry

    asked = resolve(wanted)
    registry = Registry.embedded(workspace / "registry")
    reference = newest_of(registry, asked.data, asked.ingest)
    arguments = pipeline_arguments(asked, workspace / "cache", registry.url, registry.remote, reference)
    signature.check_signing_key()
    folder = local.open_run(workspace, arguments)
    console = Console(stderr=True)
    console.print(f"run {folder.name}", highlight=False)
    local.execute(folder, lambda events, ended: display.watch(events, ended, console), cache=not fresh)
    leaderboard = read_json(folder / "leaderboard.json")
    summary = read_json(folder / "table" / "summary.json")
    if "labels_note" in summary:
        print(f"no classes: {summary['labels_note']}", file=sys.stderr)
    if as_json:
        print_json(leaderboard)
    else:
        _print_leaderboard(leaderboard, folder)


@app.command()
def runs(
    workspace: Workspace = DEFAULT_WORKSPACE,
    registry: RegistryUrl = "",
    remote: RemoteUrl = "",
    as_json: Json = False,
) -> None:
    """List the recorded runs, newest first."""
    rows = open_registry(workspace, registry, remote).runs()
    if as_json:
        print_json(rows)
    elif rows:
        flat = [{**row, "data": row["data"].get("source", "")} for row in rows]
        print_table(flat, ["run", "finished", "data", "selected"])
    else:
        print(
            f"no run is recorded in {registry or workspace}; start one with `unlabeled run`", file=sys.stderr
        )


@app.command()
def show(
    run: RunName = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
    registry: RegistryUrl = "",
    remote: RemoteUrl = "",
    as_json: Json = False,
) -> None:
    """Show one run's record."""
    from unlabeled.lineage.promotion import find_run

    opened = open_registry(workspace, registry, remote)
    record = opened.show(find_run(opened, run))
    if as_json:
        print_json(record)
        return
    from unlabeled.lineage.record import describe

    for line in describe(record):
        print(line)


@app.command()
def audit(
    run: RunName = "",
    rerun: Annotated[bool, typer.Option("--rerun", help="Execute the run again and compare bits.")] = False,
    key: VerifyKey = None,
    live: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Ask a running server (gRPC) whether it serves these models."),
    ] = "",
    live_tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Largest difference of its answers, as 1e-3 for a GPU; default: the run's export.tolerance.",
        ),
    ] = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
    registry: RegistryUrl = "",
    remote: RemoteUrl = "",
    as_json: Json = False,
) -> None:
    """Prove a run from the registry alone, with --live what a server serves, and with --rerun reproduce it."""
    from unlabeled.lineage.audit import audit as prove
    from unlabeled.lineage.promotion import find_run

    opened = open_registry(workspace, registry, remote)
    name = find_run(opened, run)
    report = prove(opened, name, key)
    failure: Exception | None = None
    try:
        if live:
            from serving.live import live as ask

            report = ask(opened, name, report, live, live_tolerance)
        if rerun:
            from rich.console import Console

            from pipelines.rerun import rerun as reproduce

            report = reproduce(opened, name, report, Console(stderr=True))
    except (CheckFailed, InputError) as error:
        failure = error  # what was found before is told all the same
    if as_json:
        print_json(report.to_json())
    else:
        for line in report.lines():
            print(line)
    if failure:
        raise failure
    raise typer.Exit(0 if report.proven else 1)


@app.command()
def serve(
    run: RunName = "",
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0: a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0: a free one.")] = 8001,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of Prometheus' metrics; 0: a free one.")
    ] = 8002,
    stage: Annotated[str, typer.Option(help="Instead of a run: follow what is promoted to this stage.")] = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Serve a run's models with the embedded Triton server, on this machine only, until interrupted."""
    from serving.server import EmbeddedTriton

    ports = {"http_port": http_port, "grpc_port": grpc_port, "metrics_port": metrics_port}
    if stage:
        if run:
            raise InputError(f"serve run {run} or stage {stage}, not both")
        follow.serve_stage(workspace, stage, ports)
        return
    folder = _run_folder(workspace, run)
    with EmbeddedTriton(folder / "repository", **ports) as server:
        print(f"Triton serves {folder.name}: {server.addresses}  (Ctrl-C ends it)", file=sys.stderr)
        server.wait()


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    run: Annotated[
        str,
        typer.Option(help="A recorded run, its version or a stage, as encoder#prod; default: the newest."),
    ] = "",
    url: Annotated[
        str,
        typer.Option(help="gRPC address of a Triton server, as 127.0.0.1:8001; default: in this process."),
    ] = "",
    neighbours: Annotated[int, typer.Option(min=1, help="Nearest training images to name.")] = 3,
    workspace: Workspace = DEFAULT_WORKSPACE,
    registry: RegistryUrl = "",
    remote: RemoteUrl = "",
    as_json: Json = False,
) -> None:
    """Tell class, cluster and nearest training images of image files."""
    from serving.predict import predict as answer

    with tempfile.TemporaryDirectory(prefix="unlabeled-") as room:
        if registry or remote:
            folder = _fetched(open_registry(workspace, registry, remote), run, Path(room))
        else:
            folder = _run_folder(workspace, run)
        rows = answer(images, folder, url, neighbours)
    if as_json:
        print_json(rows)
        return
    flat = [
        {
            "image": row["image"],
            "class": f"{row['class']} {row['class_probability']:.1%}",
            "cluster": f"{row['cluster']} {row['cluster_probability']:.1%}",
            "its class": row["cluster_class"],
            "nearest training images": ", ".join(item["id"] for item in row["nearest"]),
        }
        for row in rows
    ]
    print_table(flat, list(flat[0]))


def _run_folder(workspace: Path, run: str) -> Path:
    """Return the folder of a recorded run, fetched from the registry where the workspace lacks it.

    Raises:
        CheckFailed: what is served of it is not as it was recorded.
    """
    from unlabeled.lineage.chain import Content
    from unlabeled.lineage.promotion import find_run

    registry = open_registry(workspace)
    name = find_run(registry, run)
    folder = workspace.resolve() / "runs" / name
    if not (folder / "record.json").exists():
        registry.fetch(name, folder)
        return folder
    content = Content.of(registry.show(name))
    if changed := content.changed(folder, "repository") + content.changed(folder, "index"):
        raise CheckFailed(
            f"run {name} was changed in the workspace since it was recorded: {', '.join(changed)}; "
            f"move {folder} away, and the same command brings the run from the registry"
        )
    return folder


def _fetched(registry: Any, run: str, room: Path) -> Path:
    """Bring what `predict` needs of a run in a registry elsewhere; a workspace may have another run of that name."""
    from unlabeled.lineage.promotion import find_run

    name = find_run(registry, run)
    registry.fetch(name, room / name, ["repository", "index"])
    return room / name


def _print_leaderboard(leaderboard: dict[str, Any], folder: Path) -> None:
    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    def scores(row: dict[str, Any]) -> dict[str, str]:
        if not labelled:
            rank = row.get("effective_rank")
            return {
                "views found": share(row.get("view_retrieval")),
                "effective rank": "–" if rank is None else f"{rank:.1f}",
            }
        cluster = row.get("cluster") or {}
        return {
            "kNN": share(row.get("knn")),
            "linear": share(row.get("linear")),
            "cluster ACC": share(cluster.get("acc")),
            "NMI": share(cluster.get("nmi")),
        }

    all_rows = leaderboard["rows"] + leaderboard["baselines"]
    labelled = any(row.get("linear") is not None for row in all_rows)
    rows = []
    for row in all_rows:
        chosen = " ←" if row["method"] == leaderboard["selected"] else ""
        rows.append(
            {
                "method": row["method"] + chosen,
                **scores(row),
                "images/s": f"{row['images_per_second']:,.0f}" if row.get("images_per_second") else "–",
                "seconds": f"{row['seconds']:,.0f}" if row.get("seconds") else "–",
            }
        )
    print_table(rows, list(rows[0]))
    selection = folder / "selection" / "selection.json"
    if selection.exists():
        print(f"selected {leaderboard['selected']}, by {read_json(selection)['meaning']}")
    name = folder.name
    print(f"report   {folder / 'report.html'}")
    workspace = folder.parents[1]
    there = "" if workspace == DEFAULT_WORKSPACE.resolve() else f" --workspace {shlex.quote(str(workspace))}"
    for command in (f"serve {name}", f"predict --run {name} IMAGE", f"audit {name}"):
        print(f"next     unlabeled {command}{there}")


app.add_typer(describe.app)
app.add_typer(kubeflow.app)
app.add_typer(watch.app)
app.add_typer(by_hand.app)
app.add_typer(promote.app)
app.add_typer(follow.app)
app.add_typer(verify.app)
app.add_typer(ablate.app, name="ablate")
app.add_typer(compare.app, name="compare")
app.add_typer(bench.app, name="bench")

if __name__ == "__main__":
    main()
