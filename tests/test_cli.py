"""The command line as its users meet it: exit codes, one-line errors, one JSON document."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from pipelines import cli
from pipelines.commands import compare
from pipelines.options import check_output, open_workspace
from unlabeled import __version__
from unlabeled.errors import InputError
from unlabeled.files import write_json
from unlabeled.parameters import described
from unlabeled.probes.few_labels.methods import METHODS
from unlabeled.signals import all_signals, settings_model

UNLABELED = Path(sys.executable).with_name("unlabeled")


def unlabeled(*arguments, cwd=None, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [UNLABELED, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
    )


def test_help_comes_at_once():
    seconds = []
    for _ in range(3):  # the first call of a fresh installation compiles what it imports
        before = os.times()
        result = unlabeled("--help")
        after = os.times()
        seconds.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    assert min(seconds) < 0.5
    assert result.returncode == 0
    for command in (
        "run",
        "methods",
        "runs",
        "show",
        "audit",
        "serve",
        "predict",
        "compile",
        "submit",
        "schedule",
        "bench",
    ):
        assert f" {command} " in result.stdout


def test_short_help_and_version():
    assert unlabeled("-h").stdout == unlabeled("--help").stdout
    assert "--data" in unlabeled("run", "-h").stdout
    assert unlabeled("--version").stdout == f"unlabeled {__version__}\n"


def test_help_imports_no_heavy_library():
    code = (
        "import sys; from pipelines import cli\n"
        "heavy = {'torch', 'kfp', 'pandas', 'great_expectations', 'dvc', 'sklearn', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_methods_lists_every_signal_with_family_equation_and_paper():
    rows = json.loads(unlabeled("methods", "--json").stdout)
    assert {"simclr", "autoencoder"} <= {row["name"] for row in rows}
    assert all(row["family"] and row["equation"] and row["paper"] for row in rows)


def test_a_methods_settings_are_listed_with_default_and_meaning():
    rows = {row["parameter"]: row for row in json.loads(unlabeled("methods", "dino", "--json").stdout)}
    assert rows["pretrain.dino.momentum"]["default"] == 0.95
    assert rows["pretrain.dino.training.batch_size"]["default"] == 128
    assert all(row["meaning"] for row in rows.values())
    assert "of the softmax over similarities" in unlabeled("methods", "simclr").stdout


@pytest.mark.parametrize("method", all_signals())
def test_every_setting_of_every_method_says_what_it_is(method):
    assert all(row["meaning"] for row in described(settings_model(method)))


def test_parameters_lists_a_section():
    said = unlabeled("parameters", "self_label").stdout
    assert "self_label.sweep" in said and "[]" in said and "training.epochs" not in said


def test_help_names_every_row_of_the_comparison():
    assert compare.ROWS.split(", ") == list(METHODS)


BAD = {
    "unknown command": (["rum"], "rum"),
    "unknown option": (["run", "--profil", "smoke"], "--profil"),
    "unknown profile": (["run", "--profile", "smok"], "did you mean 'smoke'"),
    "unknown parameter": (
        ["run", "--profile", "smoke", "--set", "training.epoch=1"],
        "did you mean 'epochs'",
    ),
    "unknown section": (
        ["run", "--profile", "smoke", "--set", "trainin.epochs=1"],
        "did you mean 'training'",
    ),
    "wrong value": (["run", "--profile", "smoke", "--set", "training.batch_size=-4"], "training.batch_size"),
    "wrong type": (
        ["run", "--profile", "smoke", "--set", "training.learning_rate=fast"],
        "training.learning_rate",
    ),
    "no value": (["run", "--profile", "smoke", "--set", "training.epochs"], "write KEY=VALUE"),
    "no key": (["run", "--profile", "smoke", "--set", "=3"], "write KEY=VALUE"),
    "negative seed": (["run", "--profile", "smoke", "--seed", "-1"], "seed"),
    "seed no number": (["run", "--profile", "smoke", "--seed", "one"], "--seed"),
    "unknown method": (["run", "--profile", "smoke", "--methods", "simcrl"], "did you mean 'simclr'"),
    "no method": (["run", "--profile", "smoke", "--methods", ","], "methods"),
    "settings of no method": (["methods", "simcrl"], "did you mean 'simclr'"),
    "parameters of no section": (["parameters", "trainin"], "did you mean 'training'"),
    "unknown method setting": (
        ["run", "--profile", "smoke", "--set", "pretrain.simclr.temprature=1"],
        "pretrain.simclr.temprature; did you mean 'temperature'",
    ),
    "wrong method setting": (
        ["run", "--profile", "smoke", "--set", "pretrain.simclr.temperature=hot"],
        "pretrain.simclr.temperature",
    ),
    "wrong training of a method": (
        ["run", "--profile", "smoke", "--set", "pretrain.simclr.training.batchsize=2"],
        "pretrain.simclr.training.batchsize; did you mean 'batch_size'",
    ),
    "settings of an unknown method": (
        ["run", "--profile", "smoke", "--set", "pretrain.simcler.x=1"],
        "simcler",
    ),
    "no such data": (["run", "--profile", "smoke", "--data", "no-such-data"], "no-such-data"),
    "no such parameter file": (["run", "--parameters", "none.yaml"], "none.yaml"),
    "workspace is a file": (["run", "--profile", "smoke", "--workspace", "/dev/null"], "/dev/null"),
    "show without a registry": (["show"], "no registry in workspace /"),
    "audit without a registry": (["audit"], "no registry in workspace"),
    "runs without a registry": (["runs"], "no registry in workspace"),
    "serve without a registry": (["serve"], "no registry in workspace"),
    "predict without a registry": (["predict", "image.png"], "no registry in workspace"),
    "predict without an image": (["predict"], "images"),
    "serve on an impossible port": (["serve", "--http-port", "70000"], "--http-port"),
    "compile to no yaml": (["compile", "-o", "pipeline.json"], "pipeline.json"),
    "submit to nobody": (
        ["submit", "--host", "http://127.0.0.1:9", "--registry", "x", "--remote", "y", "--profile", "smoke"],
        "no Kubeflow Pipelines server answers at http://127.0.0.1:9",
    ),
    "submit without a host": (["submit"], "--host"),
    "schedule five fields": (
        [
            "schedule",
            "--host",
            "http://127.0.0.1:9",
            "--registry",
            "x",
            "--remote",
            "y",
            "--cron",
            "0 3 * * *",
        ],
        "did you mean '0 0 3 * * *'",
    ),
    "validate no table": (["validate", "--table", "none", "-o", "out"], "no such folder"),
    "pretrain no table": (["pretrain", "simclr", "--table", "none", "-o", "out"], "no such folder"),
    "evaluate no model": (["evaluate", "--table", ".", "--model", "none", "-o", "out"], "no such folder"),
    "table is no table": (["validate", "--table", ".", "-o", "out"], "no image table"),
    "model is no model": (["self-label", "--table", ".", "--model", ".", "-o", "out"], "is no"),
    "output exists": (["ingest", "--data", "digits", "-o", "."], "exists already"),
    "output in no folder": (
        ["ingest", "--data", "digits", "-o", "/dev/null/out"],
        "/dev/null is no writable",
    ),
    "output where nothing can be made": (["ingest", "--data", "digits", "-o", "/proc/out"], "no such file"),
    "compiled where nothing can be made": (["compile", "-o", "/proc/out.yaml"], "no such file"),
    "unknown benchmark": (["bench", "nothing"], "nothing"),
}


@pytest.mark.parametrize("content", ["train: {epochs: 3}", "- a list", "cpu: {lr: 0.1}"])
def test_a_params_yaml_here_that_is_another_programs_is_named_and_the_way_around_it(content, tmp_path):
    (tmp_path / "params.yaml").write_text(content)
    result = unlabeled("runs", "--json", cwd=tmp_path)
    assert "params.yaml" not in result.stderr, "a command without parameters does not read it"
    result = unlabeled("run", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"{tmp_path / 'params.yaml'}" in result.stderr
    assert "taken because it lies here; --parameters names another, as /" in result.stderr
    ours = result.stderr.rstrip(")\n").rpartition(" ")[2]
    assert (
        "no-such-data"
        in unlabeled("run", "--parameters", ours, "--data", "no-such-data", cwd=tmp_path).stderr
    )


def test_a_wrong_option_is_no_fault_of_the_params_yaml_here(tmp_path):
    (tmp_path / "params.yaml").write_text("cpu: {data: digits}")
    result = unlabeled("run", "--set", "training.epochs=many", cwd=tmp_path)
    assert result.returncode == 2 and "training.epochs" in result.stderr and "lies here" not in result.stderr


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_clear_line_and_code_2(name, tmp_path):
    arguments, words = BAD[name]
    result = unlabeled(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    left = [path for path in tmp_path.rglob("*") if path.is_file() and "registry" not in path.parts]
    assert left == [], "nothing half-written"


def test_a_place_that_cannot_be_written_is_told_before_any_work(tmp_path, monkeypatch):
    """Root may write everywhere, so that the answer of the system is simulated."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(
        InputError, match=f"workspace {tmp_path}: not writable; give another with --workspace"
    ):
        open_workspace(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path} is no writable folder; give another --output"):
        check_output(tmp_path / "made" / "later")


def test_a_workspace_inside_the_data_is_refused_before_it_is_made(tmp_path):
    """What the run writes there would change the data that it reads."""
    data = tmp_path / "my images"
    data.mkdir()
    Image.new("L", (8, 8)).save(data / "0.png")
    result = unlabeled("run", "--profile", "smoke", "--data", ".", cwd=data)
    assert result.returncode == 2
    workspace = data / "workspace"
    assert (
        result.stderr
        == f"unlabeled: the workspace {workspace} lies inside the data {data}; give another with --workspace\n"
    )
    assert not workspace.exists()
    with pytest.raises(InputError, match="lies inside"):
        open_workspace(data, str(data))


def test_a_workspace_that_adds_nothing_to_the_data_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, data in ((".hidden", "."), ("data-workspace", "data"), ("digits", "digits"), (".", "data")):
        assert open_workspace(Path(folder), data).is_dir()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_what_the_system_refuses_to_write_is_one_line_and_code_2(code, monkeypatch, capsys):
    def refused():
        raise OSError(code, os.strerror(code), "/full/file")

    monkeypatch.setattr(cli, "app", refused)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == f"unlabeled: /full/file: {os.strerror(code).lower()}\n"


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def broken():
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(OSError, match="Bad file"):
        cli.main()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_that_it_resumes(ending, tmp_path):
    process = subprocess.Popen(
        [UNLABELED, "run", "--profile", "smoke", "--workspace", tmp_path],
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, the shell has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr.readline().startswith("run digits-")
    process.send_signal(ending)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.splitlines()[-1] == "unlabeled: interrupted; the same command resumes from here"
    assert "Traceback" not in said


def test_the_next_commands_name_a_workspace_that_is_not_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    board = {"rows": [{"method": "simclr"}], "baselines": [], "selected": "simclr"}
    cli._print_leaderboard(board, tmp_path / "my runs" / "runs" / "one")
    said = capsys.readouterr().out.splitlines()
    assert f"next     unlabeled serve one --workspace '{tmp_path}/my runs'" in said
    cli._print_leaderboard(board, tmp_path / "workspace" / "runs" / "one")
    assert "next     unlabeled serve one" in capsys.readouterr().out.splitlines()


def test_without_labels_the_leaderboard_shows_what_is_known_and_what_decided(tmp_path, capsys):
    accuracies = {"knn": None, "linear": None}
    board = {
        "rows": [{"method": "dino", "view_retrieval": 0.8214, "effective_rank": 17.25, "seconds": 9, **accuracies}],
        "baselines": [
            {"method": "random init", "view_retrieval": 0.3, "effective_rank": 5.0, **accuracies},
            {"method": "raw pixels", "effective_rank": 4.0, **accuracies},
        ],
        "selected": "dino",
    }  # fmt: skip
    folder = tmp_path / "runs" / "one"
    write_json(folder / "selection" / "selection.json", {"criterion": "view_retrieval", "meaning": "views"})
    cli._print_leaderboard(board, folder)
    said = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in said.splitlines()]
    assert "method views found effective rank images/s seconds" in rows
    assert "dino ← 82.1% 17.2 – 9" in rows
    assert "random init 30.0% 5.0 – –" in rows and "raw pixels – 4.0 – –" in rows
    assert "selected dino, by views" in said.splitlines()
    board["rows"][0]["linear"] = 0.5
    cli._print_leaderboard(board, folder)
    said = capsys.readouterr().out
    assert "50.0%" in said and "linear" in said and "views found" not in said


def test_the_environment_may_name_the_workspace(tmp_path):
    result = unlabeled("runs", UNLABELED_WORKSPACE=str(tmp_path / "elsewhere"))
    assert result.returncode == 2 and f"{tmp_path}/elsewhere" in result.stderr


def test_bench_without_a_name_lists_the_benchmarks_and_runs_none():
    result = unlabeled("bench")
    assert result.returncode == 2 and "== " not in result.stdout + result.stderr
    for script in (Path(__file__).parents[1] / "benchmarks").glob("*.py"):
        assert f" {script.stem} " in result.stdout + result.stderr


def test_the_options_of_a_benchmark_are_its_scripts():
    helped = unlabeled("bench", "lineage", "--help")
    assert helped.returncode == 0 and "--megabytes" in helped.stdout
    assert unlabeled("bench", "lineage", "--nope").returncode == 2


def test_one_step_by_hand_is_the_components_step(tmp_path):
    result = unlabeled("ingest", "--data", "digits", "-o", tmp_path / "table", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "table" / "table.parquet").exists()
    assert "1,438 train and 359 test images, 10 classes, broken files: none" in result.stderr
    started = time.time()
    result = unlabeled(
        "validate", "--table", tmp_path / "table", "-o", tmp_path / "validation", "--profile", "smoke"
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "validation" / "validation.json").read_text())["success"]
    assert time.time() - started < 60


def test_ingest_by_hand_tells_what_it_left_out(tmp_path):
    for number in range(4):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    (tmp_path / "empty.png").touch()
    result = unlabeled(
        "ingest", "--data", tmp_path, "-o", tmp_path / "out" / "table", "--set", "ingest.max_broken_share=0.5"
    )
    assert result.returncode == 0, result.stderr
    assert "no classes, broken files: 1\nleft out empty.png: empty file\n" in result.stderr


def test_ingest_by_hand_names_the_image_that_undoes_the_classes(tmp_path):
    for number, name in enumerate(("cat/0.png", "dog/0.png", "cover.png")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(tmp_path / "in" / name)
    result = unlabeled("ingest", "--data", "in", "-o", "table", cwd=tmp_path)
    assert "no classes: cover.png lies outside a class folder\n" in result.stderr


def test_runs_that_never_ended_are_told(tmp_path):
    (tmp_path / "runs" / "digits-1").mkdir(parents=True)
    result = unlabeled("runs", "--workspace", tmp_path)
    assert result.returncode == 2 and "has come to its end, 1 begun" in result.stderr


def test_pretraining_by_hand_leaves_a_model_and_no_checkpoint_to_start_from(tmp_path):
    assert unlabeled("ingest", "--data", "digits", "-o", tmp_path / "table").returncode == 0
    few = ("--profile", "smoke", "--set", "training.steps=4", "--set", "training.checkpoint_every=2")
    for name in ("first", "second"):
        result = unlabeled(
            "pretrain", "simclr", "--table", tmp_path / "table", "-o", tmp_path / name, *few,
            UNLABELED_CACHE=str(tmp_path / "cache"),
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert json.loads((tmp_path / f"{name}-metrics.json").read_text())["resumed_at"] == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    assert not list(tmp_path.rglob("*.pt"))
