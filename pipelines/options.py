"""The options that commands share, and the parameters that they make."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from unlabeled.errors import InputError

Workspace = Annotated[
    Path, typer.Option(envvar="UNLABELED_WORKSPACE", help="Folder of runs, cache and registry.")
]
Profile = Annotated[str, typer.Option(help="Profile of params.yaml.")]
ParametersFile = Annotated[
    Path | None, typer.Option("--parameters", help="Parameter file; default: params.yaml here, else our own.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a parameter, as training.epochs=3."),
]
Data = Annotated[
    str | None,
    typer.Option(help="A name in data.dvc, 'digits', 'stamps', a folder, IDX files or an npz file."),
]
Methods = Annotated[str | None, typer.Option(help="Learning signals, comma-separated; 'all': every one.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")]
RegistryUrl = Annotated[
    str, typer.Option("--registry", help="Git URL of a registry elsewhere; goes with --remote.")
]
RemoteUrl = Annotated[str, typer.Option("--remote", help="DVC URL of that registry's remote.")]
RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A recorded run, its version or a stage, as encoder@v1.2.0 or encoder#prod; default: the newest.",
    ),
]
VerifyKey = Annotated[
    Path | None,
    typer.Option(
        "--key", envvar="UNLABELED_VERIFY_KEY", help="Public key (PEM) that the record must be signed with."
    ),
]
DEFAULT_WORKSPACE = Path("workspace")


def parameters_of(
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
    if methods not in (None, "all"):
        overrides["methods"] = [name.strip() for name in methods.split(",") if name.strip()]
    if seed is not None:
        overrides["seed"] = seed
    parameters = load_parameters(file or _parameters_file(profile), profile, overrides)
    parameters = _with_all_methods(parameters) if methods == "all" else parameters
    return _set_for_methods(parameters, overrides)


def _set_for_methods(parameters: Any, overrides: Mapping[str, Any]) -> Any:
    """Let a `training.KEY` that was asked for go before the methods' own defaults, though it be the section's."""
    from unlabeled.parameters import Training

    pretrain = {method: dict(settings) for method, settings in parameters.pretrain.items()}
    for path in overrides:
        section, _, key = path.partition(".")
        if section != "training" or getattr(parameters.training, key) != Training.model_fields[key].default:
            continue
        from unlabeled.signals import find_signal  # imports torch, for this rare case alone

        for method in parameters.methods:
            if key in find_signal(method).training_defaults:
                settings = pretrain.setdefault(method, {})
                settings["training"] = {key: getattr(parameters.training, key)} | settings.get("training", {})
    return parameters.model_copy(update={"pretrain": pretrain})


def open_workspace(folder: Path, data: str = "") -> Path:
    """Return the workspace's full path, made unless it is there.

    Args:
        data: name or path of the data that will be read: what is written in the workspace must not become part of it.

    Raises:
        InputError: it cannot be made or written, or lies inside the data.
    """
    from unlabeled.data.sources import NAMES

    folder = folder.resolve()
    images = Path(data).expanduser().resolve()
    inside = data and data not in NAMES and folder.is_relative_to(images)
    # Hidden folders are no part of the data.
    if inside and not any(part.startswith(".") for part in folder.relative_to(images).parts):
        raise InputError(
            f"the workspace {folder} lies inside the data {images}; give another with --workspace"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror.lower()
    else:
        reason = "" if os.access(folder, os.W_OK) else "not writable"
    if reason:
        raise InputError(f"workspace {folder}: {reason}; give another with --workspace")
    return folder


def check_output(path: Path) -> None:
    """Refuse an output before any work is done for it: it exists, or cannot be written where it is to be."""
    if path.exists():
        raise InputError(f"{path} exists already; give another --output, or remove it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {path}: {folder} is no writable folder; give another --output")


def open_registry(workspace: Path, registry: str = "", remote: str = "") -> Any:
    """Return the registry of a workspace, or the one at a git URL and a DVC URL."""
    from unlabeled.lineage.registry import Registry

    if bool(registry) != bool(remote):
        raise InputError("--registry GITURL and --remote DVCURL name a registry together; give both")
    if registry:
        return Registry(registry, remote)
    if not (workspace / "registry").is_dir():
        begun = len(list(workspace.glob("runs/*")))
        if begun:
            raise InputError(
                f"no run in workspace {workspace.resolve()} has come to its end, {begun} begun; "
                "the `unlabeled run` that began one resumes it"
            )
        raise InputError(
            f"no registry in workspace {workspace.resolve()}; start a run with `unlabeled run`, or give --workspace"
        )
    return Registry.embedded(workspace.resolve() / "registry")


def _with_all_methods(parameters: Any) -> Any:
    """Ask for every method that the data serves: those that need colour only where colour is certain."""
    from unlabeled.data.stamps import STAMPS
    from unlabeled.signals import all_signals

    signals = all_signals()
    if parameters.data != STAMPS and parameters.ingest.channels != "rgb":
        needing = [name for name, signal in signals.items() if signal.needs_color]
        print(
            f"left out, for colour images (--set ingest.channels=rgb): {', '.join(needing)}", file=sys.stderr
        )
        signals = {name: signal for name, signal in signals.items() if name not in needing}
    return parameters.model_copy(update={"methods": tuple(signals)})


def _parameters_file(profile: str) -> Path:
    """Return params.yaml of the current directory, else the one that comes with the program.

    Raises:
        InputError: the one here has no such profile, or a wrong one; it may be another program's, as DVC's.
    """
    from unlabeled.parameters import load_parameters

    here, ours = Path("params.yaml").absolute(), Path(__file__).parents[1] / "params.yaml"
    if not here.exists():
        return ours
    try:
        load_parameters(here, profile)
    except InputError as error:
        raise InputError(
            f"{error} (the file was taken because it lies here; --parameters names another, as {ours})"
        ) from None
    return here
