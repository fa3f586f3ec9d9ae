"""The steps by hand: each command calls the component's own function on folders."""

import importlib
import inspect
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.options import (
    DEFAULT_WORKSPACE,
    Data,
    ParametersFile,
    Profile,
    Seed,
    Set,
    Workspace,
    check_output,
    parameters_of,
)
from unlabeled.errors import InputError

app = typer.Typer()

TableFolder = Annotated[Path, typer.Option("--table", help="Image table (a folder made by ingest).")]
ModelFolder = Annotated[Path, typer.Option("--model", help="Model (a folder made by pretrain).")]
LabelsFolder = Annotated[Path, typer.Option("--labels", help="Pseudo-labels (a folder made by self-label).")]
# The step that makes an input, and what its config.json holds that the nets of other steps lack.
MADE_BY = {
    "model": ("pretrain", {"encoder", "method", "family"}),
    "classifier": ("finetune", {"encoder", "classes", "target"}),
}
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder to write; must not exist.")]


@app.command()
def ingest(
    output: Output, data: Data = None, profile: Profile = "cpu", set_: Set = None, parameters: ParametersFile = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:  # fmt: skip
    """One step by hand: a source of images to an image table (and its raw files in OUTPUT-raw)."""
    from unlabeled.data.sources import data_digest
    from unlabeled.data.table import SUMMARY
    from unlabeled.files import read_json

    asked = parameters_of(profile, data, None, None, set_, parameters)
    digest = data_digest(asked.data, workspace / "cache")
    outputs = {"table": output, "raw": Path(f"{output}-raw")}
    _by_hand("ingest", {}, outputs, source=asked.data, parameters=asked.ingest, data_digest=digest)
    summary = read_json(output / SUMMARY)
    counts, broken = summary["counts"], summary["broken"]
    print(
        f"{counts['train']:,} train and {counts['test']:,} test images, {len(summary['classes']) or 'no'} classes, "
        f"broken files: {len(broken) or 'none'}",
        file=sys.stderr,
    )
    if "labels_note" in summary:
        print(f"no classes: {summary['labels_note']}", file=sys.stderr)
    for file in broken:
        print(f"left out {file['path']}: {file['reason']}", file=sys.stderr)


@app.command()
def validate(
    table: TableFolder, output: Output, profile: Profile = "cpu", set_: Set = None, parameters: ParametersFile = None,
    reference: Annotated[str, typer.Option(help="An earlier run's table.parquet, for drift.")] = "",
) -> None:  # fmt: skip
    """Two steps by hand: an image table against its expectations; where a critical one failed, that is said."""
    from unlabeled.data import verdict

    asked = parameters_of(profile, None, None, None, set_, parameters)
    _by_hand(
        "validate", {"table": table}, {"validation": output},
        parameters=asked.validation, reference=reference, registry="", remote="",
    )  # fmt: skip
    verdict.check(output)


@app.command()
def pretrain(
    method: Annotated[str, typer.Argument(help="A learning signal, see `unlabeled methods`.")],
    table: TableFolder, output: Output, profile: Profile = "cpu", seed: Seed = None, set_: Set = None,
    parameters: ParametersFile = None,
) -> None:  # fmt: skip
    """One step by hand: train an encoder with one learning signal."""
    from pipelines.request import resolve
    from unlabeled.signals import find_signal

    find_signal(method)  # one method: neither a list nor `all`
    asked = resolve(parameters_of(profile, None, method, seed, set_, parameters))
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
    asked = parameters_of(profile, None, None, seed, set_, parameters)
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
    asked = parameters_of(profile, None, None, seed, set_, parameters)
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
    asked = parameters_of(profile, None, None, seed, set_, parameters)
    inputs = {"table": table, "model": model, "labels": labels}
    _by_hand("finetune", inputs, {"classifier": output}, parameters=asked.finetuning, seed=asked.seed)


@app.command()
def export(
    table: TableFolder, model: ModelFolder, labels: LabelsFolder,
    classifier: Annotated[Path, typer.Option(help="Classifier (a folder made by finetune).")],
    output: Output, profile: Profile = "cpu", set_: Set = None, parameters: ParametersFile = None,
) -> None:  # fmt: skip
    """One step by hand: write the Triton model repository (and its index in OUTPUT-index)."""
    asked = parameters_of(profile, None, None, None, set_, parameters)
    inputs = {"table": table, "model": model, "labels": labels, "classifier": classifier}
    outputs = {"repository": output, "index": Path(f"{output}-index")}
    _by_hand("export", inputs, outputs, parameters=asked.export)


def _by_hand(name: str, inputs: dict[str, Path], outputs: dict[str, Path], **arguments: Any) -> None:
    """Call a component's own function on folders."""
    from unlabeled.digest import code_digest
    from unlabeled.lineage.step import Artifact

    for key, folder in inputs.items():
        if not folder.exists():
            raise InputError(f"--{key} {folder}: no such folder")
    for folder in outputs.values():
        check_output(folder)
    for key in MADE_BY.keys() & inputs.keys():
        _check_net(key, inputs[key], inputs["table"])
    function = getattr(importlib.import_module(f"components.{name}.component"), name).python_func
    arguments = {"data_digest": "", "code_digest": code_digest()} | {
        key: value.model_dump(mode="json") if hasattr(value, "model_dump") else value
        for key, value in arguments.items()
    }
    artifacts = {key: Artifact(str(folder)) for key, folder in (inputs | outputs).items()}
    if "metrics" in inspect.signature(function).parameters:
        first = next(iter(outputs.values()))
        artifacts["metrics"] = Artifact(f"{first}-metrics.json")
    try:
        function(**arguments, **artifacts)
    except BaseException:
        # The corrected command shall not find what this one wrote before it failed.
        for folder in outputs.values():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    for folder in outputs.values():
        print(folder)


def _check_net(key: str, folder: Path, table: Path) -> None:
    """Refuse a folder that another step wrote, and one whose net takes images of other channels than the table's."""
    from unlabeled.data.table import ImageTable
    from unlabeled.files import read_json
    from unlabeled.nets.encoder import CONFIG

    images, (step, kept) = ImageTable(table), MADE_BY[key]
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if not kept <= config.keys():
        raise InputError(f"--{key} {folder} is no {key} of {step}")
    channels, trained_on = images.image_shape[0], config["encoder"]["image_shape"][0]
    if channels != trained_on:
        raise InputError(
            f"--table {table} has images of {channels} channels, --{key} {folder} takes {trained_on}; "
            "give the table that it was trained on"
        )
