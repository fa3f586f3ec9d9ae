"""A study: a pipeline that ends in a summary and a page, in a folder of its own. The same arguments find it again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines import local
from pipelines.request import request_key, short_name
from unlabeled.files import atomic_path, link_or_copy, read_json, write_json

SUMMARY, PAGE = "summary.json", local.REPORT


def open_study(folder: Path, arguments: dict[str, Any]) -> Path:
    """Return the study of these arguments below `folder`: begun, finished or new."""
    key = request_key(arguments)
    study = folder / f"{short_name(arguments['source'])}-{key[:6]}"
    write_json(study / local.REQUEST, {"key": key, "arguments": arguments})
    return study


def carry_out(study: Path, module: str, told: str) -> dict[str, Any]:
    """Return the summary of a study; what of it is not finished is done first.

    Args:
        module: `python -m MODULE STUDY` runs its pipeline.
        told: a line that says what is done.

    Raises:
        InputError, CheckFailed: see `pipelines.local.execute`.
    """
    from rich.console import Console

    from pipelines import display

    if not (study / PAGE).exists():
        console = Console(stderr=True)
        console.print(f"{told} in {study}", highlight=False, soft_wrap=True)
        local.execute(study, lambda events, ended: display.watch(events, ended, console), module=module)
    return read_json(study / SUMMARY)


def run_pipeline(pipeline: Callable[..., Any], study: Path) -> None:
    """Run a study's pipeline with KFP's local runner: what `python -m MODULE STUDY` does."""
    local.start_runner(study, cache=True)
    run = pipeline(**read_json(study / local.REQUEST)["arguments"])
    # The page last: with it the study is finished.
    for name, output in ((SUMMARY, "summary"), (PAGE, "report")):
        with atomic_path(study / name) as temporary:
            link_or_copy(run.outputs[output].path, temporary)
