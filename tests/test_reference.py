"""Which earlier run drift is measured against."""

import json
from pathlib import Path

import pytest
from images import gray_folder
from lineage_bundle import run_steps

from pipelines.request import pipeline_arguments, request_key, resolve, short_name
from unlabeled.digest import dvc_digest
from unlabeled.lineage.record import record
from unlabeled.lineage.reference import newest_of
from unlabeled.lineage.registry import Registry
from unlabeled.parameters import Ingest, load_parameters

FILE = Path(__file__).parents[1] / "params.yaml"


def asked(data: str, on_cluster: bool = False):
    overrides = {"data": data, "methods": ["autoencoder"]}
    return resolve(load_parameters(FILE, "smoke", overrides), on_cluster)


def test_it_is_the_newest_run_of_the_source_that_was_ingested_alike(tmp_path: Path) -> None:
    registry = Registry.embedded(tmp_path / "registry")
    assert newest_of(registry, "a", Ingest()) == ""
    for number, (source, ingest) in enumerate(
        [
            ("a", {}),
            ("a", {"image_size": 32}),
            ("a", {"image_size": 16}),
            ("b", {}),
            ("b", {"channels": "rgb"}),
        ]
    ):
        artifacts = run_steps(tmp_path / f"{number}", seed=number)
        data = {"source": source, "digest": dvc_digest(artifacts["raw"].path), "reference": ""}
        parameters = {"data": source, "ingest": ingest}
        address = registry.url, registry.remote, tmp_path / "bundles" / f"{number}"
        record(f"run-{number}", artifacts, parameters, data, *address)
    assert newest_of(registry, "a", Ingest()) == "run-1"
    assert newest_of(registry, "a", Ingest(image_size=16)) == "run-2"
    assert newest_of(registry, "a", Ingest(image_size=8)) == ""
    assert newest_of(registry, "b", Ingest()) == "run-3"
    assert newest_of(registry, "c", Ingest()) == ""


def test_a_folder_is_asked_for_by_its_full_path_from_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        gray_folder(folder / "grau", 2)

    def arguments(data: str):
        return pipeline_arguments(asked(data), tmp_path / "cache", "", "")

    monkeypatch.chdir(here)
    first = arguments("grau")
    assert first["source"] == json.loads(first["parameters"])["data"] == str(here / "grau")
    assert short_name(first["source"]) == "grau"
    assert request_key(arguments("./grau")) == request_key(first), "the same command resumes"
    monkeypatch.chdir(there)
    assert request_key(arguments("../here/grau")) == request_key(first)
    assert arguments("grau")["source"] == str(there / "grau")
    assert asked("grau", on_cluster=True).data == "grau", "a path in the pods"
    assert asked("digits").data == "digits"
