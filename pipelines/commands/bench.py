"""`unlabeled bench`: each figure of benchmarks/RESULTS.md comes from one of these scripts."""

import subprocess
import sys
from pathlib import Path

import typer

from unlabeled.errors import CheckFailed, InputError

app = typer.Typer(help="Measure: each figure of benchmarks/RESULTS.md comes from one of these.")


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Run every benchmark."""
    if context.invoked_subcommand is None:
        for script in sorted(_benchmarks().glob("*.py")):
            print(f"\n== {script.stem}")
            _run_script(script, [])


def _add_benchmark(name: str) -> None:
    @app.command(name, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def command(context: typer.Context) -> None:
        _run_script(_benchmarks() / f"{name}.py", context.args)

    command.__doc__ = f"benchmarks/{name}.py"


for _name in (
    "ingest",
    "validation",
    "training",
    "quality",
    "clustering",
    "serving",
    "malformed",
    "rollout",
    "lineage",
    "recorders",
    "pipeline",
):
    _add_benchmark(_name)


def _benchmarks() -> Path:
    folder = Path(__file__).parents[2] / "benchmarks"
    if not folder.is_dir():
        raise InputError("the benchmarks come with a checkout of the project, not with the installed package")
    return folder


def _run_script(script: Path, arguments: list[str]) -> None:
    if subprocess.run([sys.executable, str(script), *arguments]).returncode:
        raise CheckFailed(f"benchmark {script.stem} failed")
