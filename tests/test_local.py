"""How a failed run on this machine is told."""

import json

import pytest

from pipelines import local
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
