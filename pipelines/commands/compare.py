"""`unlabeled compare`: methods side by side on the same images and the same labels."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.options import (
    DEFAULT_WORKSPACE,
    Data,
    Json,
    ParametersFile,
    Profile,
    Seed,
    Set,
    Workspace,
    open_workspace,
    parameters_of,
)
from pipelines.printing import print_json
from unlabeled.errors import InputError

# The names of `unlabeled.probes.few_labels.methods.METHODS`, whose import would make help wait for torch.
ROWS = (
    "supervised, pseudo_label, entropy_minimisation, vat, instdisc, bigan, pirl, cpc, simclr, simclr_probe, scan, "
    "scan_fine_tuned, scan_self_training, simclr_fixmatch, simclr_self_training"
)

app = typer.Typer(help="Compare methods on the same images and the same labels.", no_args_is_help=True)


@app.command()
def labels(
    data: Data = None,
    shares: Annotated[
        str | None, typer.Option(help="Shares of the train labels, comma-separated; default: 0.01,0.1.")
    ] = None,
    draws: Annotated[int | None, typer.Option(help="Draws of the labels.")] = None,
    methods: Annotated[
        str | None, typer.Option(help=f"Rows of the table, comma-separated; default: all: {ROWS}.")
    ] = None,
    profile: Profile = "cpu",
    seed: Seed = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
    set_: Set = None,
    parameters: ParametersFile = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """What few labels are worth to each method; the same command again resumes where it stopped."""
    set_ = list(set_ or [])
    if shares is not None:
        set_.append(f"few_labels.shares=[{shares}]")
    if draws is not None:
        set_.append(f"few_labels.draws={draws}")
    wanted = parameters_of(profile, data, None, seed, set_, parameters)
    workspace = open_workspace(workspace, wanted.data)

    from pipelines.study import PAGE, carry_out, open_study

    arguments = _arguments(wanted, methods, workspace / "cache")
    study = open_study(workspace / "comparisons", arguments)
    result = carry_out(study, "pipelines.label_efficiency", "comparison")
    if as_json:
        print_json(result)
    else:
        _print_table(result, study / PAGE)


@app.command("compile")
def compile_(
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path(
        "label-efficiency.yaml"
    ),
) -> None:
    """Compile the comparison for Kubeflow."""
    from pipelines.cluster.jobs import compile_pipeline
    from pipelines.label_efficiency import label_efficiency

    compile_pipeline(output, label_efficiency)
    print(output)


def _arguments(wanted: Any, methods: str | None, cache: Path) -> dict[str, Any]:
    """Return the arguments of `pipelines.label_efficiency.label_efficiency`."""
    from pipelines.request import PARALLEL_METHODS, resolve
    from unlabeled.data.sources import data_digest
    from unlabeled.digest import code_digest
    from unlabeled.probes.few_labels.methods import METHODS, find_method

    names = (
        list(METHODS) if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    )
    if not names:
        raise InputError(f"--methods names no row; valid: {', '.join(METHODS)}")
    grouped: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        grouped.setdefault(find_method(name).pretraining, []).append(name)
    threads = wanted.training.threads or max(
        1, len(os.sched_getaffinity(0)) // min(len(grouped), PARALLEL_METHODS)
    )
    # Rows from random weights name no signal, and a run's parameters need one.
    signals = tuple(signal for signal in grouped if signal) or wanted.methods
    asked = wanted.model_copy(
        update={"methods": signals, "training": wanted.training.model_copy(update={"threads": threads})}
    )
    asked = resolve(asked)
    return {
        "source": asked.data,
        "data_digest": data_digest(asked.data, cache),
        "code_digest": code_digest(),
        "groups": [{"name": signal or "scratch", "methods": rows} for signal, rows in grouped.items()],
        "ingest_parameters": asked.ingest.model_dump(mode="json"),
        # As text: in a dict KFP would turn integers into floats and lose the order.
        "parameters": json.dumps(asked.model_dump(mode="json"), sort_keys=True),
    }


def _print_table(result: dict[str, Any], report: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from unlabeled.probes.few_labels.methods import find_method
    from unlabeled.report.label_efficiency import spread

    shares = sorted(
        {cell["share"]: cell["labels"] for row in result["rows"] for cell in row["shares"]}.items()
    )
    columns = [f"{100 * share:g} %, {labels:,} labels" if share else "no label" for share, labels in shares]
    headed = (title for column in columns for title in (column, f"top {result['k']}"))
    table = Table("method", *headed, box=box.SIMPLE)
    for row in result["rows"]:
        scores = {cell["share"]: cell for cell in row["shares"]}
        cells = (scores.get(share) for share, _ in shares)
        texts = ((spread(cell["top1"]), spread(cell["topk"])) if cell else ("–", "–") for cell in cells)
        table.add_row(row["title"], *(text for pair in texts for text in pair))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table, highlight=False)
    few = result["settings"]["few_labels"]
    notes = [
        f"Test accuracy, per cent, over {few['draws']} draw{'s' if few['draws'] > 1 else ''}.",
        f"Settings chosen on {few['held_out_share']:.0%} of the labels given.",
    ]
    if any(find_method(row["method"]).clusters for row in result["rows"]):
        bits = result["matching_bits"]
        notes.append(f"Matching clusters to classes tells up to {bits:.1f} bits of the labels.")
    console.print(" ".join(notes), highlight=False)
    for subset in result["subsets"]:
        given = f"{subset['share']:g}, draw {subset['draw']}: {subset['labels']:,} images"
        print(f"labels   {given}, sha256 {subset['images'][:16]}")
    print(f"report   {report}")
