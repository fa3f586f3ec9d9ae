"""`data.dvc`, which pins the data: a DVC file, its name under `meta`."""

import os
from pathlib import Path
from typing import NamedTuple

import yaml

from unlabeled.errors import InputError

VARIABLE = "UNLABELED_DATA_DVC"


class Pin(NamedTuple):
    """What `data.dvc` states: the data set's name, its folder's DVC digest and path; and the file itself."""

    name: str
    digest: str
    path: str
    file: Path


def read_pin() -> Pin:
    """Read `data.dvc`: the one $UNLABELED_DATA_DVC names, else the working folder's, else the repository's.

    Raises:
        InputError: there is none, or it pins no named folder.
    """
    named = os.environ.get(VARIABLE)
    beside = Path(__file__).resolve().parents[2] / "data.dvc"
    places = [Path(named)] if named else [Path("data.dvc"), beside]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        tried = " or ".join(str(place.absolute()) for place in places)
        raise InputError(f"no data.dvc at {tried}: set {VARIABLE} to the file of that name in the repository")
    try:
        content = yaml.safe_load(file.read_text())
        output = content["outs"][0]
        return Pin(str(content["meta"]["name"]), str(output["md5"]), str(output["path"]), file.resolve())
    except (OSError, ValueError, yaml.YAMLError, KeyError, IndexError, TypeError):
        raise InputError(f"{file} is no pin of data: outs[0].md5 and meta.name are expected in it") from None
