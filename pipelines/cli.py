"""The command line. Heavy libraries are imported by the command that needs them, so that help comes at once."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from unlabeled.errors import CheckFailed, InputError

app = typer.Typer(
    name="unlabeled",
    help="From a folder of unlabeled images to a served, audited model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure: each figure of benchmarks/RESULTS.md comes from one of these.")

Workspace = Annotated[Path, typer.Option(help="Folder of runs, cache and registry.")]
Profile = Annotated[str, typer.Option(help="Profile of params.yaml.")]
ParametersFile = Annotated[
    Path | None, typer.Option("--parameters", help="Parameter file; default: params.yaml here.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a parameter, as training.epochs=3."),
]
Data = Annotated[
    str | None, typer.Option(help="A name in data.dvc, 'digits', a folder, IDX files or an npz file.")
]
Methods = Annotated[str | None, typer.Option(help="Learning signals, comma-separated; 'all': every one.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")]
RunName = Annotated[str, typer.Argument(metavar="[RUN]", help="A recorded run; default: the newest.")]
DEFAULT_WORKSPACE = Path("workspace")


def main() -> None:
    """Run the command line: 0 done, 1 the check or run failed, 2 bad input."""
    try:
        app()
    except InputError as error:
        print(f"unlabeled: {error}", file=sys.stderr)
        sys.exit(2)
    except CheckFailed as error:
        print(f"unlabeled: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("unlabeled: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


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
    """Run the whole pipeline on this machine; the same command again goes on where it was stopped."""
    from rich.console import Console

    from pipelines import display, local
    from pipelines.request import pipeline_arguments, resolve
    from unlabeled.lineage.registry import Registry

    workspace = _workspace(workspace)
    asked = resolve(_parameters(profile, data, methods, seed, set_, parameters))
    registry = Registry.embedded(workspace / "registry")
    reference = next(
        (entry["run"] for entry in registry.runs() if entry["data"].get("source") == asked.data), ""
    )
    arguments = pipeline_arguments(asked, workspace / "cache", registry.url, registry.remote, reference)
    folder = local.open_run(workspace, arguments)
    console = Console(stderr=True)
    console.print(f"run {folder.name}", highlight=False)
    local.execute(folder, lambda events, ended: display.watch(events, ended, console), cache=not fresh)
    leaderboard = json.loads((folder / "leaderboard.json").read_text())
    if as_json:
        _print_json(leaderboard)
    else:
        _print_leaderboard(leaderboard, folder)


@app.command("methods")
def methods_(as_json: Json = False) -> None:
    """List every learning signal: name, family, equation, paper."""
    from unlabeled.signals import all_signals

    rows = [
        {"name": name, "family": signal.family, "equation": signal.equation, "paper": signal.paper}
        for name, signal in sorted(all_signals().items())
    ]
    if as_json:
        _print_json(rows)
    else:
        _print_table(rows, ["name", "family", "equation", "paper"])


@app.command()
def runs(workspace: Workspace = DEFAULT_WORKSPACE, as_json: Json = False) -> None:
    """List the recorded runs, newest first."""
    rows = _registry(workspace).runs()
    if as_json:
        _print_json(rows)
    elif rows:
        flat = [{**row, "data": row["data"].get("source", "")} for row in rows]
        _print_table(flat, ["run", "started", "data", "selected"])
    else:
        print(f"no run is recorded in {workspace}; start one with `unlabeled run`", file=sys.stderr)


@app.command()
def show(run: RunName = "", workspace: Workspace = DEFAULT_WORKSPACE, as_json: Json = False) -> None:
    """Show one run's record."""
    registry = _registry(workspace)
    record = registry.show(_named(registry, run))
    if as_json:
        _print_json(record)
        return
    from unlabeled.lineage.record import describe

    for line in describe(record):
        print(line)


@app.command()
def audit(
    run: RunName = "",
    rerun: Annotated[bool, typer.Option("--rerun", help="Execute the run again and compare bits.")] = False,
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: Json = False,
) -> None:
    """Prove a run from the registry alone, and with --rerun reproduce it."""
    from unlabeled.lineage.audit import audit as verify

    registry = _registry(workspace)
    name = _named(registry, run)
    report = verify(registry, name)
    if rerun:
        from rich.console import Console

        from pipelines.rerun import rerun as reproduce

        report = reproduce(registry, name, report, Console(stderr=True))
    if as_json:
        _print_json(report.to_json())
    else:
        for line in report.lines():
            print(line)
    raise typer.Exit(0 if report.proven else 1)


@app.command()
def serve(
    run: RunName = "",
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0: a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0: a free one.")] = 8001,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Serve a run's models with the embedded Triton server, on this machine only, until interrupted."""
    from serving.server import EmbeddedTriton

    folder = _run_folder(workspace, run)
    with EmbeddedTriton(folder / "repository", http_port=http_port, grpc_port=grpc_port) as server:
        print(
            f"Triton serves {folder.name}: HTTP {server.http_url}  gRPC {server.grpc_url}  (Ctrl-C ends it)",
            file=sys.stderr,
        )
        server.wait()


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    run: Annotated[str, typer.Option(help="A run in the workspace; default: the newest.")] = "",
    url: Annotated[
        str,
        typer.Option(help="gRPC address of a Triton server, as 127.0.0.1:8001; default: in this process."),
    ] = "",
    neighbours: Annotated[int, typer.Option(min=1, help="Nearest training images to name.")] = 3,
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: Json = False,
) -> None:
    """Tell class, cluster and nearest training images of image files."""
    from serving.predict import predict as answer

    rows = answer(images, _run_folder(workspace, run), url, neighbours)
    if as_json:
        _print_json(rows)
        return
    flat = [
        {
            "image": row["image"],
            "class": f"{row['class']} {row['class_probability']:.1%}",
            "cluster": f"{row['cluster']} {row['cluster_probability']:.1%}",
            "nearest training images": ", ".join(item["id"] for item in row["nearest"]),
        }
        for row in rows
    ]
    _print_table(flat, list(flat[0]))


@app.command("compile")
def compile_(
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("pipeline.yaml"),
) -> None:
    """Compile the pipeline for Kubeflow."""
    from pipelines.cluster import compile_pipeline

    compile_pipeline(output)
    print(output)


Host = Annotated[str, typer.Option(envvar="KFP_HOST", help="URL of the Kubeflow Pipelines API.")]
Experiment = Annotated[str, typer.Option(help="Kubeflow experiment.")]
Namespace = Annotated[str | None, typer.Option(help="Kubernetes namespace of the user.")]
RegistryUrl = Annotated[str, typer.Option("--registry", help="Git URL of the registry.")]
Remote = Annotated[str, typer.Option(help="URL of the registry's DVC remote.")]
Digest = Annotated[str, typer.Option("--data-digest", help="DVC digest of data that is not on this machine.")]


@app.command()
def submit(
    host: Host,
    registry: RegistryUrl,
    remote: Remote,
    experiment: Experiment = "unlabeled",
    namespace: Namespace = None,
    profile: Profile = "cpu",
    data: Data = None,
    data_digest: Digest = "",
    methods: Methods = None,
    seed: Seed = None,
    set_: Set = None,
    parameters: ParametersFile = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Start one run on Kubeflow."""
    import time

    from pipelines import cluster, request

    asked = request.resolve(_parameters(profile, data, methods, seed, set_, parameters))
    arguments = request.pipeline_arguments(asked, workspace / "cache", registry, remote, digest=data_digest)
    name = f"{request.short_name(asked.data)}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    print(cluster.submit(host, experiment, name, {"run": name, **arguments}, namespace))


@app.command()
def schedule(
    host: Host,
    registry: RegistryUrl,
    remote: Remote,
    cron: Annotated[str, typer.Option(help="Six fields, seconds first, as '0 0 3 * * *'.")],
    name: Annotated[
        str, typer.Option(help="Name of the recurring run; one of that name is replaced.")
    ] = "unlabeled",
    experiment: Experiment = "unlabeled",
    namespace: Namespace = None,
    profile: Profile = "cpu",
    data: Data = None,
    data_digest: Digest = "",
    methods: Methods = None,
    seed: Seed = None,
    set_: Set = None,
    parameters: ParametersFile = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Run the pipeline on Kubeflow again and again."""
    from pipelines import cluster, request

    cluster.check_cron(cron)
    asked = request.resolve(_parameters(profile, data, methods, seed, set_, parameters))
    arguments = request.pipeline_arguments(asked, workspace / "cache", registry, remote, digest=data_digest)
    arguments = {"run": f"{name}-[[ScheduledTime]]", **arguments}
    print(cluster.schedule(host, experiment, name, cron, arguments, namespace))


TableFolder = Annotated[Path, typer.Option("--table", help="Image table (a folder made by ingest).")]
ModelFolder = Annotated[Path, typer.Option("--model", help="Model (a folder made by pretrain).")]
LabelsFolder = Annotated[Path, typer.Option("--labels", help="Pseudo-labels (a folder made by self-label).")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder to write; must not exist.")]


@app.command()
def ingest(
    output: Output, data: Data = None, profile: Profile = "cpu", set_: Set = None, parameters: ParametersFile = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:  # fmt: skip
    """One step by hand: a source of images to an image table (and its raw files in OUTPUT-raw)."""
    from unlabeled.data.sources import data_digest

    asked = _parameters(profile, data, None, None, set_, parameters)
    digest = data_digest(asked.data, workspace / "cache")
    outputs = {"table": output, "raw": output.with_name(output.name + "-raw")}
    _by_hand("ingest", {}, outputs, source=asked.data, parameters=asked.ingest, data_digest=digest)


@app.command()
def validate(
    table: TableFolder, output: Output, profile: Profile = "cpu", set_: Set = None, parameters: ParametersFile = None,
    reference: Annotated[str, typer.Option(help="An earlier run's table.parquet, for drift.")] = "",
) -> None:  # fmt: skip
    """One step by hand: an image table against its expectations."""
    asked = _parameters(profile, None, None, None, set_, parameters)
    _by_hand(
        "validate", {"table": table}, {"validation": output},
        parameters=asked.validation, reference=reference, registry="", remote="",
    )  # fmt: skip


@app.command()
def pretrain(
    method: Annotated[str, typer.Argument(help="A learning signal, see `unlabeled methods`.")],
    table: TableFolder, output: Output, profile: Profile = "cpu", seed: Seed = None, set_: Set = None,
    parameters: ParametersFile = None,
) -> None:  # fmt: skip
    """One step by hand: train an encoder with one learning signal."""
    from pipelines.request import resolve

    asked = resolve(_parameters(profile, None, method, seed, set_, parameters))
    settings = {"name": method, **asked.pretrain[method]}
    _by_hand(
        "pretrain", {"table": table}, {"model": output},
        method=settings, encoder=asked.encoder, training=asked.training, seed=asked.seed,
    )  # fmt: skip


@app.command("self-label")
def self_label(
    table: TableFolder, model: ModelFolder, output: Output, profile: Profile = "cpu", seed: Seed = None,
    set_: Set = None, parameters: ParametersFile = None,
) -> None:  # fmt: skip
    """One step by hand: cluster the train split in a model's features."""
    asked = _parameters(profile, None, None, seed, set_, parameters)
    _by_hand(
        "self_label", {"table": table, "model": model}, {"labels": output},
        method={"name": model.name}, parameters=asked.self_label, threads=0, seed=asked.seed,
    )  # fmt: skip


@app.command()
def evaluate(
    table: TableFolder, model: ModelFolder, output: Output, profile: Profile = "cpu", seed: Seed = None,
    set_: Set = None, parameters: ParametersFile = None,
) -> None:  # fmt: skip
    """One step by hand: probe a model's frozen features."""
    asked = _parameters(profile, None, None, seed, set_, parameters)
    _by_hand(
        "evaluate", {"table": table, "model": model}, {"evaluation": output},
        method={"name": model.name}, parameters=asked.evaluation, threads=0, seed=asked.seed,
    )  # fmt: skip


@app.command()
def finetune(
    table: TableFolder, model: ModelFolder, labels: LabelsFolder, output: Output, profile: Profile = "cpu",
    seed: Seed = None, set_: Set = None, parameters: ParametersFile = None,
) -> None:  # fmt: skip
    """One step by hand: train classifiers on few and on all labels."""
    asked = _parameters(profile, None, None, seed, set_, parameters)
    inputs = {"table": table, "model": model, "labels": labels}
    _by_hand("finetune", inputs, {"classifier": output}, parameters=asked.finetuning, seed=asked.seed)


@app.command()
def export(
    table: TableFolder, model: ModelFolder, labels: LabelsFolder,
    classifier: Annotated[Path, typer.Option(help="Classifier (a folder made by finetune).")],
    output: Output, profile: Profile = "cpu", set_: Set = None, parameters: ParametersFile = None,
) -> None:  # fmt: skip
    """One step by hand: write the Triton model repository (and its index in OUTPUT-index)."""
    asked = _parameters(profile, None, None, None, set_, parameters)
    inputs = {"table": table, "model": model, "labels": labels, "classifier": classifier}
    outputs = {"repository": output, "index": output.with_name(output.name + "-index")}
    _by_hand("export", inputs, outputs, parameters=asked.export)


app.add_typer(bench_app, name="bench")


@bench_app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Run every benchmark."""
    if context.invoked_subcommand is None:
        for script in sorted(_benchmarks().glob("*.py")):
            print(f"\n== {script.stem}")
            _run_script(script, [])


def _add_benchmark(name: str) -> None:
    @bench_app.command(name, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def command(context: typer.Context) -> None:
        _run_script(_benchmarks() / f"{name}.py", context.args)

    command.__doc__ = f"benchmarks/{name}.py"


for _name in ("ingest", "validation", "training", "quality", "serving", "lineage", "pipeline"):
    _add_benchmark(_name)


def _benchmarks() -> Path:
    folder = Path(__file__).parents[1] / "benchmarks"
    if not folder.is_dir():
        raise InputError("the benchmarks come with a checkout of the project, not with the installed package")
    return folder


def _run_script(script: Path, arguments: list[str]) -> None:
    import subprocess

    if subprocess.run([sys.executable, str(script), *arguments]).returncode:
        raise CheckFailed(f"benchmark {script.stem} failed")


def _parameters(
    profile: str,
    data: str | None,
    methods: str | None,
    seed: int | None,
    set_: list[str] | None,
    file: Path | None,
) -> Any:
    from unlabeled.parameters import load_parameters

    overrides: dict[str, Any] = {}
    for assignment in set_ or []:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise InputError(f"--set {assignment}: write KEY=VALUE, as training.epochs=3")
        overrides[key.strip()] = value
    if data is not None:
        overrides["data"] = data
    if methods == "all":
        from unlabeled.signals import all_signals

        overrides["methods"] = sorted(all_signals())
    elif methods is not None:
        overrides["methods"] = [name.strip() for name in methods.split(",") if name.strip()]
    if seed is not None:
        overrides["seed"] = seed
    return load_parameters(file or _parameters_file(), profile, overrides)


def _parameters_file() -> Path:
    here = Path("params.yaml")
    return here if here.exists() else Path(__file__).parents[1] / "params.yaml"


def _workspace(folder: Path) -> Path:
    folder = folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"workspace {folder}: {error.strerror}; give another with --workspace") from None
    return folder


def _registry(workspace: Path) -> Any:
    from unlabeled.lineage.registry import Registry

    if not (workspace / "registry").is_dir():
        raise InputError(
            f"no registry in workspace {workspace}; start a run with `unlabeled run`, or give --workspace"
        )
    return Registry.embedded(workspace.resolve() / "registry")


def _named(registry: Any, run: str) -> str:
    if run:
        return run
    recorded = registry.runs()
    if not recorded:
        raise InputError("no run is recorded yet; start one with `unlabeled run`")
    return recorded[0]["run"]


def _run_folder(workspace: Path, run: str) -> Path:
    """Return the folder of a recorded run, fetched from the registry where the workspace lacks it."""
    registry = _registry(workspace)
    name = _named(registry, run)
    folder = workspace.resolve() / "runs" / name
    if not (folder / "record.json").exists():
        registry.fetch(name, folder)
    return folder


def _by_hand(name: str, inputs: dict[str, Path], outputs: dict[str, Path], **arguments: Any) -> None:
    """Call a component's own function on folders."""
    import importlib
    import inspect

    from unlabeled.lineage.digest import code_digest
    from unlabeled.lineage.step import Artifact

    for key, folder in inputs.items():
        if not folder.exists():
            raise InputError(f"--{key} {folder}: no such folder")
    for folder in outputs.values():
        if folder.exists():
            raise InputError(f"{folder} exists already; give another --output, or remove it")
    function = getattr(importlib.import_module(f"components.{name}.component"), name).python_func
    arguments = {"data_digest": "", "code_digest": code_digest()} | {
        key: value.model_dump(mode="json") if hasattr(value, "model_dump") else value
        for key, value in arguments.items()
    }
    artifacts = {key: Artifact(str(folder)) for key, folder in (inputs | outputs).items()}
    if "metrics" in inspect.signature(function).parameters:
        first = next(iter(outputs.values()))
        artifacts["metrics"] = Artifact(str(first.with_name(first.name + "-metrics.json")))
    function(**arguments, **artifacts)
    for folder in outputs.values():
        print(folder)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


def _print_table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console(width=None if sys.stdout.isatty() else 160).print(table, highlight=False)


def _print_leaderboard(leaderboard: dict[str, Any], folder: Path) -> None:
    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    rows = []
    for row in leaderboard["rows"] + leaderboard["baselines"]:
        chosen = " ←" if row["method"] == leaderboard["selected"] else ""
        cluster = row.get("cluster") or {}
        rows.append(
            {
                "method": row["method"] + chosen,
                "kNN": share(row.get("knn")),
                "linear": share(row.get("linear")),
                "cluster ACC": share(cluster.get("acc")),
                "NMI": share(cluster.get("nmi")),
                "images/s": f"{row['images_per_second']:,.0f}" if row.get("images_per_second") else "–",
                "seconds": f"{row['seconds']:,.0f}" if row.get("seconds") else "–",
            }
        )
    _print_table(rows, list(rows[0]))
    name = folder.name
    print(f"report   {folder / 'report.html'}")
    for command in (f"serve {name}", f"predict --run {name} IMAGE", f"audit {name}"):
        print(f"next     unlabeled {command}")


if __name__ == "__main__":
    main()
