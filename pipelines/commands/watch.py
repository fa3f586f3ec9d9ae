"""`unlabeled drift`: recent inputs of a server against the training images of the run that it serves."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.options import (
    DEFAULT_WORKSPACE,
    Json,
    ParametersFile,
    Profile,
    RegistryUrl,
    RemoteUrl,
    Seed,
    Set,
    Workspace,
    open_registry,
    parameters_of,
)
from pipelines.printing import print_json

app = typer.Typer()

SUMMARY, REPORT = "drift.json", "drift.html"


@app.command()
def drift(
    recent: Annotated[
        str,
        typer.Argument(
            help="Recent inputs: a folder of images, an npz of `images` or `embeddings`, or a URL of these."
        ),
    ],
    run: Annotated[
        str, typer.Option(help="The run that is served, or its stage, as encoder#prod; default: the newest.")
    ] = "",
    url: Annotated[
        str,
        typer.Option(help="gRPC address of a Triton server that embeds images; default: in this process."),
    ] = "",
    profile: Profile = "cpu",
    seed: Seed = None,
    set_: Set = None,
    parameters: ParametersFile = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
    registry: RegistryUrl = "",
    remote: RemoteUrl = "",
    as_json: Json = False,
) -> None:
    """Tell whether recent inputs are like the images that the model knows; exit code 1 where they are not."""
    asked = parameters_of(profile, None, None, seed, set_, parameters)
    source = open_registry(workspace, registry, remote)

    from serving.drift import check_drift, measure_drift, recorded
    from unlabeled.files import read_json

    with recorded(source, run) as (name, folder):
        output = workspace.resolve() / "drift" / name
        summary, report = output / SUMMARY, output / REPORT
        measure_drift(name, folder, recent, url, summary, report, asked.drift, asked.seed)
    result = read_json(summary)
    if as_json:
        print_json(result)
    else:
        _print_summary(result, report)
    check_drift(result)


def _print_summary(result: dict[str, Any], report: Path) -> None:
    inputs = result["recent"]
    print(f"recent   {inputs['images']:,} of {inputs['seen']:,} inputs, run {result['run']}")
    if inputs["broken"]:
        first = inputs["broken"][0]
        print(f"broken   {len(inputs['broken']):,} files; the first: {first['path']} ({first['reason']})")
    print(
        f"distance {result['distance']:.2g}, threshold {result['threshold']:.2g}, p {result['p_value']:.2g}; "
        f"held-out images {result['held_out_distance']:.2g}"
    )
    for name, key, what in (
        ("clusters", "cluster_distance", "Jensen-Shannon distance to the training shares"),
        ("nearest ", "similarity", "median cosine to the nearest training image"),
    ):
        print(f"{name} {result[key]['recent']:.3f} {what}; held-out images {result[key]['held_out']:.3f}")
    print(f"report   {report}")
