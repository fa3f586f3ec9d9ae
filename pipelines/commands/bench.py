"""`unlabeled bench`: each figure of benchmarks/RESULTS.md comes from one of these scripts."""

import subprocess
import sys
from pathlib import Path

import typer

from unlabeled.errors import CheckFailed, InputError

app = typer.Typer(
    help="Measure: each figure of benchmarks/RESULTS.md comes from one of these scripts of a checkout.",
    no_args_is_help=True,
)
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@app.command("all")
def all_() -> None:
    """Run every benchmark, one after another; the first that fails ends it."""
    if not BENCHMARKS.is_dir():
        raise InputError("the benchmarks come with a checkout of the project, not with the installed package")
    for script in _scripts():
        print(f"\n== {script.stem}", flush=True)
        _run_script(script, [])


def _scripts() -> list[Path]:
    return sorted(BENCHMARKS.glob("*.py"))


def _add_benchmark(script: Path) -> None:
    with open(script) as file:
        aim = file.readline().strip('"\n')

    # Options, --help among them, are the script's own.
    @app.command(
        script.stem,
        help=aim,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def command(context: typer.Context) -> None:
        _run_script(script, context.args)


for _script in _scripts():
    _add_benchmark(_script)


def _run_script(script: Path, arguments: list[str]) -> None:
    code = subprocess.run([sys.executable, str(script), *arguments]).returncode
    if code == 2:  # a wrong option; the script has said which
        raise typer.Exit(2)
    if code:
        raise CheckFailed(f"benchmark {script.stem} failed")
