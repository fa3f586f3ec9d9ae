"""The audit of a running server: the real Triton, on the recorded repository and on others."""

import shutil

import onnx
import pytest
from serving_fixtures import CLASSES, exported_run

from serving.client import Client
from serving.live import live
from serving.server import EmbeddedTriton
from unlabeled.digest import dvc_digest
from unlabeled.errors import InputError
from unlabeled.files import link_or_copy
from unlabeled.lineage.findings import Check, Report
from unlabeled.lineage.record import record
from unlabeled.lineage.registry import Registry
from unlabeled.lineage.step import Artifact, step

ORDER = ("encoder", "classifier", "clusterer")
INTACT = Report("one", "", [Check("the record is intact")])


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A registry with the run `one`, that serves three real models."""
    room, run = tmp_path_factory.mktemp("live"), exported_run()
    registry = Registry.embedded(room / "registry")
    names = ("raw", "table", "repository", "index")
    artifacts = {name: Artifact(str(room / name)) for name in names}
    with step("ingest", {}, {"raw": artifacts["raw"], "table": artifacts["table"]}):
        link_or_copy(run.inputs["labels"], room / "raw")
        link_or_copy(run.table, room / "table")
    outputs = {name: artifacts[name] for name in ("repository", "index")}
    with step("export", {"table": artifacts["table"]}, outputs):
        link_or_copy(run.repository, room / "repository")
        link_or_copy(run.index, room / "index")
    data = {"source": "mini", "digest": dvc_digest(room / "raw"), "reference": ""}
    record("one", artifacts, {"data": "mini"}, data, registry.url, registry.remote, room / "bundle")
    return registry


def findings(registry, server):
    report = live(registry, "one", INTACT, server.grpc_url)
    assert report.checks[0] == INTACT.checks[0]
    assert server.grpc_url in report.checks[-1].claim
    return [(difference.step, difference.file, difference.what) for difference in report.differences]


def change_weight(model):
    """Change one weight of an ONNX file."""
    content = bytearray(model.read_bytes())
    weights = max(onnx.load(model).graph.initializer, key=lambda tensor: len(tensor.raw_data))
    # The exponent of the first weight: a little-endian float's last byte.
    content[content.index(weights.raw_data) + 3] ^= 0x02
    model.write_bytes(content)


@pytest.mark.slow
def test_the_recorded_models_are_proven_and_whatever_else_is_served_is_named(registry, tmp_path):
    folder = tmp_path / "repository"
    shutil.copytree(exported_run().repository, folder)
    with EmbeddedTriton(folder) as server, Client(server.grpc_url) as client:
        assert findings(registry, server) == []

        change_weight(folder / "classifier" / "1" / "model.onnx")
        config = folder / "encoder" / "config.pbtxt"
        config.write_text(config.read_text().replace("max_batch_size: 32", "max_batch_size: 64"))
        for kind in ("classifier", "encoder"):
            client.connection.load_model(kind)
        client.connection.unload_model("clusterer")
        # A wider tolerance lets the changed weight pass, and nothing else.
        wide = live(registry, "one", INTACT, server.grpc_url, tolerance=1e9).differences
        assert {difference.file for difference in wide} == {"encoder", "clusterer"}
        encoder, golden, probes, clusterer = sorted(
            findings(registry, server), key=lambda found: ORDER.index(found[1])
        )
    assert encoder == ("live", "encoder", "is served with another max_batch_size")
    for name, found in (("golden", golden), ("random", probes)):
        assert found[:2] == ("live", "classifier")
        assert found[2].startswith(f"answers the {name} images otherwise, by ")
    assert clusterer[:2] == ("live", "clusterer")
    assert clusterer[2].startswith("is not served: ")


@pytest.mark.slow
def test_other_class_names_are_named_and_the_recorded_ones_proven(registry, tmp_path):
    folder = tmp_path / "repository"
    shutil.copytree(exported_run().repository, folder)
    labels = folder / "classifier" / "labels.txt"
    assert labels.read_text().splitlines() == CLASSES
    with EmbeddedTriton(folder) as server:

        def served(names):
            # A new file: the folder may be linked to what the other tests serve.
            labels.unlink()
            labels.write_text("".join(f"{name}\n" for name in names))
            server.control("load", "classifier")
            return [
                (found.step, found.file, found.what.split(",")[0], found.recorded, found.found)
                for found in live(registry, "one", INTACT, server.grpc_url).differences
            ]

        boot, *others, last = CLASSES
        where = ("live", "classifier/labels.txt")
        assert served([last, *others, boot]) == [
            (*where, "2 of 4 classes are served under another name", boot, last)
        ]
        assert served([boot, "other: name", *others[1:], last]) == [
            (*where, "1 of 4 classes are served under another name", others[0], "other: name")
        ]
        assert served([boot, *others]) == [
            (*where, "1 of 4 classes are served under another name", last, "no name")
        ]
        assert served(CLASSES) == []


@pytest.mark.slow
def test_the_random_images_are_others_each_time_and_the_told_seed_repeats_them(registry, tmp_path):
    folder = tmp_path / "repository"
    shutil.copytree(exported_run().repository, folder)
    change_weight(folder / "classifier" / "1" / "model.onnx")
    with EmbeddedTriton(folder) as server:

        def asked(seed=None):
            """Return the note that tells the seed, and by how much the random images are answered otherwise."""
            report = live(registry, "one", INTACT, server.grpc_url, seed=seed)
            [told] = report.notes
            [found] = [found.what for found in report.differences if "random images" in found.what]
            return told, found

        fresh = [asked() for _ in range(4)]
        assert len({told for told, _ in fresh}) == 4
        assert len({found for _, found in fresh}) > 1
        told, found = fresh[0]
        assert asked(int(told.rpartition(" ")[2])) == (told, found)


def test_no_server_is_one_line(registry):
    with pytest.raises(InputError, match=r"no Triton server at 127\.0\.0\.1:9: ") as error:
        live(registry, "one", INTACT, "127.0.0.1:9")
    assert "\n" not in str(error.value)
