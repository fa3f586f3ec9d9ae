"""A run on this machine: what its steps are given, and how one that failed is told."""

import json

import pytest
from google.protobuf import json_format

from pipelines import local
from pipelines.tasks import with_threads
from pipelines.training import training
from unlabeled.errors import CheckFailed, InputError


@pytest.fixture
def fail(tmp_path):
    """Return a function that gives the error of a run in which a step failed."""

    def failure(step, kind, message):
        event = {"time": 1.0, "step": step, "event": "fail", "kind": kind, "message": message}
        (tmp_path / local.EVENTS).write_text(json.dumps(event) + "\n")
        return local._failure(tmp_path)

    return failure


def test_the_page_of_a_failed_validation_is_put_beside_the_log(fail, tmp_path):
    page = tmp_path / "deep in the cache" / "index.html"
    page.parent.mkdir()
    page.write_text("offenders")
    error = fail("check_validation", "check", f"validation failed: images in test 2; see {page}")
    assert isinstance(error, CheckFailed)
    beside = tmp_path / "validation.html"
    assert str(error) == f"step check_validation failed: validation failed: images in test 2; see {beside}"
    assert beside.read_text() == "offenders"


def test_a_fault_names_step_and_log_and_bad_input_stands_alone(fail, tmp_path):
    assert str(fail("export", "error", "boom")) == f"step export failed: boom (log: {tmp_path / local.LOG})"
    error = fail("ingest", "input", "no images")
    assert isinstance(error, InputError) and str(error) == "no images"


def test_no_module_of_the_current_directory_is_imported(tmp_path, monkeypatch):
    for name in ("select.py", "tokenize.py", "pipelines/__init__.py", "pipelines/local.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('a file of the user was executed')")
    folder = tmp_path / "workspace" / "runs" / "one"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    # The worker starts, and ends at the first thing that it reads.
    with pytest.raises(CheckFailed, match=rf"No such file or directory: '{folder / local.REQUEST}'"):
        local.execute(folder, lambda events, ended: None)


def test_a_step_has_the_number_of_threads_that_it_is_given_and_no_other_has():
    given = {"pretrain": "4", "self_label": "2", "record": "1"}

    def threads(pipeline):
        executors = json_format.MessageToDict(pipeline.pipeline_spec)["deploymentSpec"]["executors"]
        return {
            name.removeprefix("exec-").replace("-", "_"): variable["value"]
            for name, executor in executors.items()
            for variable in executor["container"].get("env", [])
            if variable["name"] == "OMP_NUM_THREADS"
        }

    assert threads(with_threads(training, given)) == given
    assert threads(training) == {}
