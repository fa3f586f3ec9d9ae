"""`unlabeled ablate`: what a method depends on, measured on your images."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.options import DEFAULT_WORKSPACE, Json, Workspace, open_workspace
from pipelines.printing import print_json

app = typer.Typer(help="Study what a method depends on.", no_args_is_help=True)


@app.command()
def augmentations(
    data: Annotated[
        str, typer.Option(help="'fashion-mnist', 'stamps', 'digits', or a path; it needs labels, for the probe.")
    ] = "fashion-mnist",
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of a cell.")] = None,
    images: Annotated[int | None, typer.Option(min=20, help="Images of each split, at most.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every cell.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    transforms: Annotated[
        str | None, typer.Option(help="Transforms, comma-separated; default: the paper's seven.")
    ] = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: Json = False,
) -> None:  # fmt: skip
    """SimCLR's Figure 5: every transform and every two of them, on one branch; the same command again resumes."""
    from pipelines.request import PARALLEL_METHODS
    from pipelines.study import PAGE, carry_out, open_study

    workspace = open_workspace(workspace, data)
    threads = max(1, len(os.sched_getaffinity(0)) // PARALLEL_METHODS)
    given = {"steps": steps, "images": images, "threads": threads}
    arguments = _arguments(data, given, seeds, seed, transforms, workspace / "cache")
    study = open_study(workspace / "ablations", arguments)
    summary = carry_out(study, "pipelines.ablation", f"{len(arguments['cells'])} cells")
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary, study / PAGE)


@app.command("compile")
def compile_(
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("ablation.yaml"),
) -> None:
    """Compile the ablation for Kubeflow."""
    from pipelines.ablation import ablation
    from pipelines.cluster.jobs import compile_pipeline

    compile_pipeline(output, ablation)
    print(output)


def _arguments(
    data: str, given: dict[str, Any], seeds: int, seed: int, transforms: str | None, cache: Path
) -> dict[str, Any]:
    """Return the arguments of `pipelines.ablation.ablation`."""
    from unlabeled.data.sources import data_digest
    from unlabeled.data.stamps import TEST_SHARE
    from unlabeled.digest import code_digest
    from unlabeled.parameters import Ingest, validated
    from unlabeled.probes.ablation import Ablation, grid
    from unlabeled.views.transforms import TRANSFORMS

    names = (
        list(TRANSFORMS)
        if transforms is None
        else [name.strip() for name in transforms.split(",") if name.strip()]
    )
    parameters = validated(Ablation, {key: value for key, value in given.items() if value is not None})
    composites = round(parameters.images / (1 - TEST_SHARE))
    return {
        "source": data,
        "data_digest": data_digest(data, cache),
        "code_digest": code_digest(),
        "cells": [cell.model_dump(mode="json") for cell in grid(names, seeds, seed)],
        "ingest_parameters": Ingest(composites=composites).model_dump(mode="json"),
        "parameters": parameters.model_dump(mode="json"),
    }


def _print_summary(summary: dict[str, Any], report: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from unlabeled.probes.claims import sentences

    names = summary["transforms"]
    table = Table("first \\ second", *names, "mean", box=box.SIMPLE)
    for name, row, mean in zip(names, summary["linear"], summary["row_means"], strict=True):
        table.add_row(name, *(f"{100 * value:.1f}" for value in [*row, mean]))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table, highlight=False)
    console.print(f"untrained net {summary['untrained']:.1%}", highlight=False)
    for claim, answer, because in sentences(summary):
        console.print(f"{claim}: {answer}. {because}", highlight=False)
    print(f"report   {report}")
