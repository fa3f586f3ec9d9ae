"""`unlabeled verify`: the whole registry, every object read once."""

import typer

from pipelines.options import DEFAULT_WORKSPACE, Json, RegistryUrl, RemoteUrl, Workspace, open_registry
from pipelines.printing import print_json

app = typer.Typer()


@app.command()
def verify(
    workspace: Workspace = DEFAULT_WORKSPACE,
    registry: RegistryUrl = "",
    remote: RemoteUrl = "",
    as_json: Json = False,
) -> None:
    """Read every record and every object of the registry again; name what is missing or damaged."""
    from unlabeled.lineage.verification import verify as reports

    unsound, found = 0, []
    for report in reports(open_registry(workspace, registry, remote)):
        unsound += not report.proven
        found.append(report.to_json())
        if as_json:
            continue
        print(f"{'sound   ' if report.proven else 'DAMAGED '} {report.run}")
        for difference in report.differences:
            print(f"         {difference}")
    if as_json:
        print_json({"sound": not unsound, "runs": found})
    else:
        runs = f"{len(found)} run{'s' * (len(found) != 1)}"
        print(f"{runs}: sound" if not unsound else f"{unsound} of {runs} damaged")
    raise typer.Exit(1 if unsound else 0)
