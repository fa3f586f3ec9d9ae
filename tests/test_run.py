"""The whole pipeline as a user runs it: real KFP, real DVC, real Triton, on scikit-learn's digits."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unlabeled.digest import file_digest, files_below

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
UNLABELED = Path(sys.executable).with_name("unlabeled")
SMOKE = ("run", "--profile", "smoke")
# What holds times or the run's name; every other file is the same to the bit.
TIMED = {"record.json", "leaderboard.json", "metrics.json", "bundle.dvc", "dvc.yaml", "report.html"}
OF_THE_COMMAND = {"request.json", "progress.jsonl", "pipeline.log", "lock"}


def unlabeled(workspace: Path, *arguments, check=True) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [UNLABELED, *map(str, arguments), "--workspace", workspace], capture_output=True, text=True
    )
    assert not check or result.returncode == 0, result.stderr
    return result


def digests(folder: Path) -> dict[str, str]:
    # The validation of a second run holds its drift from the first.
    files = {
        name: file
        for name, file in files_below(folder).items()
        if name not in TIMED | OF_THE_COMMAND and not name.startswith("validation/")
    }
    return {name: file_digest(file) for name, file in files.items()}


def newest(workspace: Path) -> Path:
    return workspace / "runs" / json.loads(unlabeled(workspace, "runs", "--json").stdout)[0]["run"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    workspace = tmp_path_factory.mktemp("undisturbed")
    leaderboard = json.loads(unlabeled(workspace, *SMOKE, "--json").stdout)
    folder = newest(workspace)
    assert leaderboard == json.loads((folder / "leaderboard.json").read_text())
    return folder


def test_a_run_leaves_what_the_design_promises(undisturbed):
    names = files_below(undisturbed)
    for name in (
        "record.json", "report.html", "leaderboard.json", "params.yaml", "table/table.parquet", "table/images.npy",
        "validation/validation.json", "methods/simclr/model/model.safetensors", "methods/simclr/labels/labels.parquet",
        "methods/autoencoder/evaluation/evaluation.json", "classifier/model.safetensors",
        "repository/encoder/1/model.onnx", "repository/classifier/config.pbtxt", "serving/serving.json",
    ):  # fmt: skip
        assert name in names, name
        assert (undisturbed / name).stat().st_size > 0


def test_the_leaderboard_is_honest(undisturbed):
    leaderboard = json.loads((undisturbed / "leaderboard.json").read_text())
    rows = {row["method"]: row for row in leaderboard["rows"]}
    assert rows.keys() == {"simclr", "autoencoder"}
    assert leaderboard["selected"] == max(rows, key=lambda name: rows[name]["held_out_knn"])
    assert {row["method"] for row in leaderboard["baselines"]} >= {"raw pixels", "PCA-128"}
    assert all(0.5 < row["knn"] < 1 for row in rows.values())


def test_the_same_command_again_reuses_every_step_and_is_recorded_as_a_run_of_its_own(undisturbed):
    workspace = undisturbed.parent.parent
    started = time.monotonic()
    unlabeled(workspace, *SMOKE)
    assert time.monotonic() - started < 120  # 20 s alone
    again = newest(workspace)
    assert again != undisturbed
    assert digests(again) == digests(undisturbed)


def test_killed_at_random_moments_it_goes_on_and_ends_with_the_same_bits(undisturbed, tmp_path):
    moments = random.Random(1)
    for _ in range(4):
        process = subprocess.Popen(
            [UNLABELED, *SMOKE, "--workspace", tmp_path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(moments.uniform(4, 20))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    unlabeled(tmp_path, *SMOKE)
    assert digests(newest(tmp_path)) == digests(undisturbed)
    assert len(list((tmp_path / "runs").iterdir())) == len(
        json.loads(unlabeled(tmp_path, "runs", "--json").stdout)
    )
    unlabeled(tmp_path, "audit")


def test_audit_proves_the_run_and_reproduces_it_bit_for_bit(undisturbed):
    workspace = undisturbed.parent.parent
    result = json.loads(unlabeled(workspace, "audit", undisturbed.name, "--rerun", "--json").stdout)
    assert result["proven"]
    assert "a fresh execution gives the same bits" in {check["claim"] for check in result["checks"]}


def test_a_run_whose_steps_had_other_numbers_of_threads_is_reproduced_bit_for_bit(tmp_path):
    """As on Kubeflow, where each step has as many as its CPUs."""
    from pipelines import local
    from pipelines.request import pipeline_arguments, resolve
    from unlabeled.lineage.registry import Registry
    from unlabeled.parameters import load_parameters

    file = Path(__file__).parents[1] / "params.yaml"
    asked = resolve(load_parameters(file, "smoke", {"methods": ["autoencoder"]}))
    registry = Registry.embedded(tmp_path / "registry")
    arguments = pipeline_arguments(asked, tmp_path / "cache", registry.url, registry.remote)
    given = {"ingest": "2", "pretrain": "3", "finetune": "2", "record": "2"}
    folder = local.open_run(tmp_path, arguments, given)
    local.execute(folder, lambda events, ended: None)
    predicate = json.loads((folder / "record.json").read_text())["predicate"]
    variables = {step["name"].split("/")[0]: step["machine"]["variables"] for step in predicate["steps"]}
    variables["record"] = predicate["runDetails"]["builder"]["environment"]["variables"]
    assert {name: variables[name]["OMP_NUM_THREADS"] for name in given} == given
    result = json.loads(unlabeled(tmp_path, "audit", folder.name, "--rerun", "--json").stdout)
    assert result["proven"], result
    assert "a fresh execution gives the same bits" in {check["claim"] for check in result["checks"]}


def test_predict_answers_with_class_cluster_and_neighbours(undisturbed, tmp_path):
    import numpy as np
    from PIL import Image

    from unlabeled.data.table import ImageTable

    table = ImageTable(undisturbed / "table")
    test = table.indices("test")[:20]
    paths = []
    for number, image in enumerate(table.images(test)):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(image[0]).save(paths[-1])
    rows = json.loads(
        unlabeled(undisturbed.parent.parent, "predict", *paths, "--run", undisturbed.name, "--json").stdout
    )
    hits = [row["class"] == table.classes[label] for row, label in zip(rows, table.labels(test))]
    assert np.mean(hits) > 0.7
    assert all(len(row["nearest"]) == 3 for row in rows)


def test_recent_inputs_that_have_drifted_fail_the_check(undisturbed, tmp_path):
    import numpy as np

    from unlabeled.data.table import ImageTable

    table = ImageTable(undisturbed / "table")
    test = table.images(table.indices("test"))
    workspace = undisturbed.parent.parent
    for name, images, code in (("same", test[::2], 0), ("inverted", 255 - test, 1), ("few", test[:9], 2)):
        np.savez(tmp_path / f"{name}.npz", images=images)
        result = unlabeled(
            workspace, "drift", tmp_path / f"{name}.npz", "--run", undisturbed.name, "--json", check=False
        )
        assert result.returncode == code, result.stderr
        assert code == 2 or json.loads(result.stdout)["drift"] == bool(code)
        assert result.stderr.count("\n") == min(code, 1) and "Traceback" not in result.stderr
    assert "have drifted" in (workspace / "drift" / undisturbed.name / "drift.html").read_text()


def test_broken_data_stops_the_run_in_one_line_and_leaves_no_record(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(30):
        (images / f"{number}.png").write_bytes(b"not an image")
    result = unlabeled(tmp_path / "workspace", *SMOKE, "--data", images, check=False)
    assert result.returncode == 1
    assert "ingest" in result.stderr and "Traceback" not in result.stderr
    assert json.loads(unlabeled(tmp_path / "workspace", "runs", "--json", check=False).stdout or "[]") == []
