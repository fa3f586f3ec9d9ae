"""The steps by hand: what does not fit together is one line, and a failed step leaves nothing behind."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import write_model, write_table
from serving_fixtures import make_run
from typer.testing import CliRunner

from pipelines.cli import app
from unlabeled.errors import InputError


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Table, model, labels and classifier of one run on colour images of four classes."""
    return make_run(tmp_path_factory.mktemp("by hand") / "run", channels=3)


def refused(*arguments):
    """Return the one line that a command ends in."""
    error = CliRunner().invoke(app, list(map(str, arguments))).exception
    assert isinstance(error, InputError), repr(error)
    assert "\n" not in str(error)
    return str(error)


def colour_table(folder, classes):
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 16, 16), dtype=np.uint8)
    labels, test = np.arange(40) % len(classes), np.arange(40) % 4 == 0
    return write_table(folder, images, labels, test, classes)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("simclr,rotation", "unknown method 'simclr,rotation'"),
        ("all", "unknown method 'all'"),
        ("simclrr", "unknown method 'simclrr'; did you mean 'simclr'"),
    ],
)
def test_pretrain_takes_one_method(method, words, digits_table, tmp_path):
    line = refused("pretrain", method, "--table", digits_table, "-o", tmp_path / "out")
    assert line.startswith(words)


@pytest.mark.parametrize("command", ["evaluate", "self-label", "finetune", "export"])
def test_what_another_step_wrote_is_no_model(command, artifacts, tmp_path):
    folders = ["--table", artifacts.table, "--model", artifacts.inputs["classifier"], "-o", tmp_path / "out"]
    more = further(command, artifacts)
    assert refused(command, *folders, *more) == (
        f"--model {artifacts.inputs['classifier']} is no model of pretrain"
    )


def further(command, artifacts):
    labels = ["--labels", artifacts.inputs["labels"]] if command in ("finetune", "export") else []
    return labels + (["--classifier", artifacts.inputs["classifier"]] if command == "export" else [])


@pytest.mark.parametrize("command", ["evaluate", "self-label", "finetune", "export"])
def test_a_table_of_other_channels_is_refused(command, artifacts, digits_table, model_folder, tmp_path):
    colour = artifacts.inputs["model"]
    line = refused(
        command,
        "--table",
        digits_table,
        "--model",
        colour,
        "-o",
        tmp_path / "out",
        *further(command, artifacts),
    )
    assert f"--table {digits_table} has images of 1 channels" in line
    line = refused(
        command,
        "--table",
        artifacts.table,
        "--model",
        model_folder,
        "-o",
        tmp_path / "out",
        *further(command, artifacts),
    )
    assert line == (
        f"--table {artifacts.table} has images of 3 channels, --model {model_folder} takes 1; "
        "give the table that it was trained on"
    )


def test_export_refuses_a_model_in_place_of_the_classifier_and_a_classifier_of_other_channels(
    artifacts, tmp_path
):
    folders = ["--table", artifacts.table, "--model", artifacts.inputs["model"]]
    folders += ["--labels", artifacts.inputs["labels"], "-o", tmp_path / "out"]
    model = artifacts.inputs["model"]
    assert (
        refused("export", *folders, "--classifier", model)
        == f"--classifier {model} is no classifier of finetune"
    )
    gray = write_model(tmp_path / "gray", (1, 8, 8))
    config = json.loads((gray / "config.json").read_text()) | {"classes": ["a"], "target": "labels"}
    (gray / "config.json").write_text(json.dumps(config))
    assert f"--classifier {gray} takes 1; " in refused("export", *folders, "--classifier", gray)


def test_export_refuses_a_table_of_other_data_and_takes_the_right_one_afterwards(artifacts, tmp_path):
    other, output = colour_table(tmp_path / "other", ["a", "b"]), tmp_path / "out" / "repository"
    rest = [argument for name, folder in artifacts.inputs.items() for argument in (f"--{name}", folder)]
    line = refused("export", "--table", other, *rest, "-o", output)
    assert line == (
        f"{artifacts.inputs['labels']} matches a cluster to class 3, the table has 2 classes: "
        "it was made from another table"
    )
    assert not output.exists()
    arguments = map(str, ["export", "--table", artifacts.table, *rest, "-o", output])
    assert CliRunner().invoke(app, list(arguments)).exit_code == 0
    assert (output / "classifier" / "labels.txt").exists()


def test_what_a_failed_step_has_written_is_removed(artifacts, tmp_path):
    """Export needs the images' names last, for the index, when the repository is written."""
    table, output = tmp_path / "table", tmp_path / "out" / "repository"
    shutil.copytree(artifacts.table, table)
    pd.read_parquet(table / "table.parquet").drop(columns="id").to_parquet(table / "table.parquet")
    rest = [argument for name, folder in artifacts.inputs.items() for argument in (f"--{name}", folder)]
    arguments = map(str, ["export", "--table", table, *rest, "-o", output])
    assert isinstance(CliRunner().invoke(app, list(arguments)).exception, KeyError)
    assert list((tmp_path / "out").iterdir()) == []
