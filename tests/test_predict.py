"""`unlabeled predict` by the real Triton: names and neighbours are those of the run that it serves, or none."""

import json
import shutil
from pathlib import Path

import pytest
from lineage_bundle import record_run
from PIL import Image
from served_bundle import IMAGES, head, serve
from serving_fixtures import exported_run
from typer.testing import CliRunner

from pipelines.cli import app
from serving.client import Client
from serving.predict import predict
from serving.server import EmbeddedTriton
from unlabeled.errors import CheckFailed, InputError
from unlabeled.lineage.promotion import promote
from unlabeled.lineage.registry import Registry

pytestmark = pytest.mark.slow
RUNS = ("served", "newest")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A workspace whose registry holds two runs of equal shapes; `served` is at the stage `prod`."""
    work = tmp_path_factory.mktemp("workspace")
    registry = Registry.embedded(work / "registry")
    for seed, name in enumerate(RUNS):
        serve(work / "made" / name, head(seed), head(seed))
        record_run(registry, work / "made" / f"run-{name}", name, seed, served=work / "made" / name)
    promote(registry, "served", "prod", None)
    return work


@pytest.fixture(scope="module")
def server(workspace):
    with EmbeddedTriton(workspace / "made" / "served" / "repository") as server:
        yield server


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(IMAGES[-1].transpose(1, 2, 0)).save(path)
    return path


def called(*arguments):
    result = CliRunner().invoke(app, ["predict", *map(str, arguments), "--json"])
    return json.loads(result.stdout) if result.exit_code == 0 else result.exception


def test_the_run_that_is_served_is_told_and_the_newest_is_refused(workspace, server, image):
    address = ("--url", server.grpc_url, "--workspace", workspace)
    error = called(image, *address)
    assert isinstance(error, InputError)
    assert str(error) == (
        f"the server at {server.grpc_url} serves another classifier than run newest; "
        "name the run that it serves with --run"
    )
    here = called(image, "--run", "served", "--workspace", workspace)
    for name in ("served", "encoder#prod"):
        [row] = called(image, *address, "--run", name)
        assert row["class"] == here[0]["class"]
        assert row["class_probability"] == pytest.approx(here[0]["class_probability"], abs=1e-5)


def test_a_registry_elsewhere_needs_no_workspace(workspace, server, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = ("--url", server.grpc_url)
    assert "no registry in workspace" in str(called(image, *here))
    registry = (
        "--registry",
        f"file://{workspace}/registry/git",
        "--remote",
        workspace / "registry" / "store",
    )
    [row] = called(image, *here, *registry, "--run", "encoder#prod")
    assert row["image"] == str(image)
    assert [row] == called(image, *here, "--run", "served", "--workspace", workspace)
    assert "serves another classifier than run newest" in str(called(image, *here, *registry))
    assert "give both" in str(called(image, *here, *registry[:2]))
    assert list(tmp_path.iterdir()) == [image]


def test_whatever_else_is_served_is_refused_in_one_line(workspace, image, tmp_path):
    """Models of another width and other classes; of equal shapes, where the weights of one differ."""
    run, repository = workspace / "made" / "served", tmp_path / "repository"
    shutil.copytree(run / "repository", repository)
    with EmbeddedTriton(repository) as server, Client(server.grpc_url) as client:

        def refused(kind, folder=run):
            with pytest.raises(InputError, match=f"serves another {kind} than run {folder.name}; ") as error:
                predict([image], folder, server.grpc_url)
            return "\n" not in str(error.value)

        assert predict([image], run, server.grpc_url)
        assert refused("classifier", exported_run().folder)
        other = workspace / "made" / "newest" / "repository" / "clusterer" / "1" / "model.onnx"
        shutil.copy(other, repository / "clusterer" / "1" / "model.onnx")
        client.connection.load_model("clusterer")
        assert refused("clusterer")


def test_no_server_is_no_other_run(workspace, image):
    with pytest.raises(InputError, match=r"no Triton server|not ready") as error:
        predict([image], Path(workspace / "made" / "served"), "127.0.0.1:9")
    assert "another" not in str(error.value)


def test_a_run_that_was_changed_in_the_workspace_is_refused_and_brought_again(workspace, image):
    asked = (image, "--workspace", workspace, "--run", "served")
    rows, folder = called(*asked), workspace / "runs" / "served"
    assert called(*asked) == rows
    labels, added = folder / "repository/classifier/labels.txt", folder / "repository/classifier/2/model.onnx"
    recorded = labels.read_bytes()

    def swapped():
        labels.write_text("blue\nred\nbright\ndark\n")

    def with_a_newer_version():
        labels.write_bytes(recorded)
        added.parent.mkdir()
        added.write_bytes(b"")

    def without_names():
        shutil.rmtree(added.parent)
        labels.unlink()

    for change, name in ((swapped, labels), (with_a_newer_version, added), (without_names, labels)):
        change()
        for command in (asked, None):
            refused = called(*command) if command else served_by(workspace, "served")
            assert isinstance(refused, CheckFailed)
            assert str(refused) == (
                f"run served was changed in the workspace since it was recorded: {name.relative_to(folder)}; "
                f"move {folder} away, and the same command brings the run from the registry"
            )
    shutil.rmtree(folder)
    assert called(*asked) == rows


def served_by(workspace, run):
    return CliRunner().invoke(app, ["serve", run, "--workspace", str(workspace)]).exception
