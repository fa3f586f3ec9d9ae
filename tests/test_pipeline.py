"""The compiled pipeline: strictly valid, byte-stable, every step keyed by data and code."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from pipelines.cluster.cron import check_cron
from pipelines.cluster.jobs import compile_pipeline
from pipelines.options import parameters_of
from unlabeled.data.table import ImageTable
from unlabeled.errors import InputError
from unlabeled.signals import all_signals, find_signal, method_settings
from unlabeled.training.resolve import resolve_training

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "training.yaml"
STEPS = {
    "ingest", "validate", "check_validation", "baselines", "pretrain", "self_label", "evaluate",
    "select", "finetune", "export", "check_serving", "record", "report",
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "training.yaml"
    compile_pipeline(path)
    return path


@pytest.fixture(scope="module")
def spec(compiled) -> dict:
    return next(yaml.safe_load_all(compiled.read_text()))


def test_compiles_to_the_golden_file(compiled):
    """After a meant change: `unlabeled compile -o tests/golden/training.yaml`, and read the difference."""
    assert compiled.read_text() == GOLDEN.read_text()


def test_compiles_to_the_same_bytes_twice(compiled, tmp_path):
    compile_pipeline(tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_bytes() == compiled.read_bytes()


def test_parses_strictly_into_the_pipeline_spec(spec):
    message = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec(), ignore_unknown_fields=False)
    deployment = json.loads(json_format.MessageToJson(message.deployment_spec))
    config = json_format.ParseDict(
        deployment, pipeline_spec_pb2.PipelineDeploymentConfig(), ignore_unknown_fields=False
    )
    assert len(config.executors) == len(STEPS)
    assert message.pipeline_info.name == "unlabeled-training"


def test_an_unknown_field_would_be_seen(spec):
    with pytest.raises(json_format.ParseError):
        json_format.ParseDict({**spec, "nonsense": 1}, pipeline_spec_pb2.PipelineSpec())


def test_every_step_takes_the_digests_of_data_and_code(spec):
    leaves = [component for component in spec["components"].values() if "executorLabel" in component]
    assert len(leaves) == len(STEPS)
    for component in leaves:
        parameters = component["inputDefinitions"]["parameters"]
        assert {"data_digest", "code_digest"} <= parameters.keys(), component["executorLabel"]


def test_the_loop_over_methods_waits_for_the_validation(spec):
    loop = next(task for name, task in spec["root"]["dag"]["tasks"].items() if name.startswith("for-loop"))
    assert "check-validation" in loop["dependentTasks"]


def test_the_record_is_never_cached(spec):
    tasks = spec["root"]["dag"]["tasks"]
    assert not tasks["record"].get("cachingOptions", {}).get("enableCache")
    assert tasks["ingest"]["cachingOptions"]["enableCache"]


@pytest.mark.parametrize("step", sorted(STEPS | {"pin"}))
def test_a_component_is_an_adapter_with_a_readme(step):
    folder = ROOT / "components" / step
    tree = ast.parse((folder / "component.py").read_text())
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    body = [node for node in function.body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)]
    lines = sum(node.end_lineno - node.lineno + 1 for node in body)
    assert lines <= 12, f"{step}: a component adapts, the library works"
    readme = (folder / "README.md").read_text().lower()
    for name in (argument.arg for argument in function.args.args):
        assert name in readme or name in ("data_digest", "code_digest", "metrics"), (
            f"{step}/README.md does not name {name}"
        )


def test_imports_point_one_way():
    """pipelines → components → serving → unlabeled; the library knows no kfp."""
    floors = ["unlabeled", "serving", "components", "pipelines"]
    for floor, package in enumerate(floors):
        above = "|".join(floors[floor + 1 :] + (["kfp"] if package in ("unlabeled", "serving") else []))
        pattern = re.compile(rf"^\s*(?:from|import) (?:{above})\b", re.MULTILINE) if above else None
        for file in (ROOT / package).rglob("*.py"):
            assert not (pattern and pattern.search(file.read_text())), (
                f"{file.relative_to(ROOT)} imports upwards"
            )


@pytest.mark.parametrize("cron", ["", "0 3 * * *", "0 0 3 * * * *", "0 0 3 * * $", "every day at three"])
def test_a_cron_that_kubeflow_would_misread_is_refused(cron):
    with pytest.raises(InputError):
        check_cron(cron)


def test_a_cron_of_six_fields_passes():
    check_cron("0 0 3 * * MON-FRI")


@pytest.mark.parametrize(
    ("data", "settings", "colour"),
    [("digits", [], False), ("stamps", [], True), ("photographs", ["ingest.channels=rgb"], True)],
)
def test_all_methods_are_those_that_the_data_serves(data, settings, colour, capsys):
    signals = all_signals()
    asked = parameters_of("smoke", data, "all", None, settings, None).methods
    assert set(asked) == {name for name, signal in signals.items() if colour or not signal.needs_color}
    assert ("colorization" in capsys.readouterr().err) == (not colour)


def test_a_training_value_that_is_asked_for_goes_before_the_methods_own_default(digits_table):
    """Though it be the section's default: DINO's own batch is 128, its largest gradient norm 3."""
    settings = [
        "training.batch_size=256",
        "training.gradient_clip=0",
        "pretrain.simclr.training.batch_size=64",
    ]
    asked = parameters_of("smoke", "digits", "simclr,dino", None, settings, None)
    table = ImageTable(digits_table)
    trained = {}
    for method in asked.methods:
        overrides = method_settings(method, asked.pretrain.get(method, {}))["training"]
        trained[method] = resolve_training(
            asked.training, find_signal(method), overrides, table, torch.device("cpu")
        )
    assert (trained["dino"].batch_size, trained["dino"].gradient_clip) == (256, 0)
    assert trained["simclr"].batch_size == 64
    assert trained["dino"].learning_rate == find_signal("dino").training_defaults["learning_rate"]
