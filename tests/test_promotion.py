"""Promotion: gates that refuse, tags that GTO and DVC read, promoters at once, and the way back."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lineage_bundle import flip, record_run
from served_bundle import IMAGES, TRAIN, head, serve

from pipelines.commands import promote as command
from serving.challenge import challenge, newcombe
from unlabeled.errors import CheckFailed, InputError
from unlabeled.lineage.git import git
from unlabeled.lineage.promotion import at_stage, find_run, history, previous, promote
from unlabeled.lineage.registry import Registry

FORK = multiprocessing.get_context("fork")
SCRIPTS = Path(sys.executable).parent
GOOD = head(0)


@pytest.fixture(autouse=True)
def no_export(monkeypatch):
    """The ONNX files here come from no checkpoint; test_audit holds that comparison."""
    monkeypatch.setattr("unlabeled.export.parity.onnx_equals_checkpoint", lambda *artifacts: [])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A registry of three runs on the same images: good, as good, worse. Read only."""
    work = tmp_path_factory.mktemp("recorded")
    registry = Registry.embedded(work / "workspace" / "registry")
    weights = {"good": GOOD, "equal": GOOD * np.float32(1.01), "worse": np.roll(GOOD, 1, axis=1)}
    for seed, (name, weight) in enumerate(weights.items()):
        serve(work / name, weight, GOOD)
        record_run(registry, work / f"run-{name}", name, seed, served=work / name)
    return registry


@pytest.fixture
def registry(recorded, tmp_path):
    """A copy, to be promoted in."""
    source = Path(recorded.url).parent
    subprocess.run(["cp", "-a", source, tmp_path / "registry"], check=True)
    return Registry.embedded(tmp_path / "registry")


@pytest.fixture
def ask(registry, capsys, monkeypatch):
    """`unlabeled promote … --json`: its document, and the error it ends with."""
    # Without a Triton environment the latency is onnxruntime's, which is told; test_follow has the server.
    monkeypatch.setenv("UNLABELED_TRITON", "/nowhere")

    def ask(run="", **options):
        defaults = {
            "stage": "prod",
            "version": "",
            "rollback": False,
            "margin": 0.02,
            "latency_budget": 250.0,
        }
        workspace = Path(registry.url).parents[1]
        error = None
        try:
            command.promote(
                run, **defaults | options, workspace=workspace, registry="", remote="", as_json=True
            )
        except (CheckFailed, InputError) as raised:
            error = raised
        printed = capsys.readouterr().out
        return json.loads(printed) if printed else None, error

    return ask


def refused(document):
    return {gate["name"] for gate in document["gates"] if not gate["passed"]}


def tags(registry):
    return {name for name, _, _ in registry.tags("encoder*")}


def test_every_gate_is_told_and_a_worse_challenger_is_refused(registry, ask):
    document, error = ask("good")
    assert error is None and document["version"] == "v1.0.0" and document["replaced"] is None
    document, error = ask("worse", latency_budget=0.0)
    assert isinstance(error, CheckFailed) and "nothing was tagged" in str(error)
    assert [gate["name"] for gate in document["gates"]] == ["audit", "parity", "champion", "latency"]
    assert refused(document) == {"champion", "latency"}
    gates = {gate["name"]: gate for gate in document["gates"]}
    figures = gates["champion"]["figures"]
    assert (figures["champion"], figures["challenger"]) == (1.0, 0.0) and figures["high"] < -0.9
    assert "no Triton server here" in gates["latency"]["why"]
    assert tags(registry) == {"encoder@v1.0.0", "encoder#prod#1"}


def test_an_equal_challenger_passes_and_gets_the_next_minor_version(registry, ask):
    ask("good")
    document, error = ask("equal")
    assert error is None
    assert document["version"] == "v1.1.0" and document["replaced"] == {"run": "good", "version": "v1.0.0"}
    assert at_stage(registry, "prod").run == "equal"


def test_a_tampered_run_is_refused_and_nothing_is_tagged(registry, ask):
    object_ = registry.objects("good")["repository/classifier/1/model.onnx"]
    flip(Path(registry.remote) / "files" / "md5" / object_[:2] / object_[2:])
    document, error = ask("good")
    assert isinstance(error, CheckFailed)
    # What cannot be measured on damaged files is refused too, each with its reason.
    assert refused(document) == {"audit", "parity", "champion", "latency"}
    assert all("repository/classifier" in gate["why"] for gate in document["gates"])
    assert not tags(registry)


def test_recorded_and_fresh_parity_both_count(tmp_path):
    from serving.gates import parity
    from unlabeled.files import write_json

    bundle = serve(tmp_path, GOOD, GOOD)
    assert parity(bundle, 1e-5).passed
    serve(tmp_path / "other", GOOD * 2, GOOD)
    (bundle / "repository").rename(tmp_path / "was")
    (tmp_path / "other" / "repository").rename(bundle / "repository")
    assert not parity(bundle, 1e-5).passed and "here" in parity(bundle, 1e-5).why
    (bundle / "repository").rename(tmp_path / "wrong")
    (tmp_path / "was").rename(bundle / "repository")
    models = {
        kind: {"onnx": 0.0, "triton": 1e-3 * (kind == "clusterer")}
        for kind in ("encoder", "clusterer", "classifier")
    }
    write_json(bundle / "serving" / "serving.json", {"models": models})
    gate = parity(bundle, 1e-5)
    assert not gate.passed and "clusterer, recorded, Triton" in gate.why


def test_images_that_the_champion_trained_on_are_left_out(tmp_path):
    challenger = serve(tmp_path / "challenger", GOOD, GOOD)
    # 100 of the challenger's test images lie in the champion's train split: it was trained on other data.
    moved = np.concatenate([IMAGES[TRAIN : TRAIN + TRAIN], IMAGES[:TRAIN], IMAGES[2 * TRAIN :]])
    champion = serve(tmp_path / "champion", GOOD * 2, GOOD, moved)
    gate = challenge(challenger, champion, "v1.0.0", 0.02)
    assert gate.figures["images"] == len(IMAGES) - 2 * TRAIN and f"{TRAIN} left out" in gate.why


def test_without_labels_the_agreement_of_the_clusterers_is_told_and_refuses_nobody(tmp_path):
    challenger, champion = serve(tmp_path / "a", GOOD), serve(tmp_path / "b", np.roll(GOOD, 1, axis=1))
    gate = challenge(challenger, champion, "v1.0.0", 0.02)
    assert gate.passed and "accuracy was not compared" in gate.why
    # Renamed clusters are the same clusters.
    assert gate.figures["nmi"] == pytest.approx(1)


def test_the_interval_of_a_paired_difference():
    rng = np.random.default_rng(0)
    covered, widths = 0, {0.0: [], 0.8: []}
    for trial in range(600):
        alike = (0.0, 0.8)[trial % 2]
        shared, own, other = rng.random((3, 150))
        same = rng.random(150) < alike
        ours, theirs = np.where(same, shared, own) < 0.9, np.where(same, shared, other) < 0.85
        low, high = newcombe(ours, theirs)
        assert newcombe(theirs, ours) == pytest.approx((-high, -low))
        covered += low <= 0.05 <= high
        widths[alike].append(high - low)
    assert 0.93 <= covered / 600 <= 0.99
    # Paired images pay: classifiers that err on the same ones are told apart sooner.
    assert np.mean(widths[0.8]) < 0.75 * np.mean(widths[0.0])
    low, high = newcombe(np.ones(20, bool), np.ones(20, bool))
    assert low < -0.05 and high > 0.05  # 20 answers alike prove little


def test_gto_and_dvc_read_the_tags(registry, tmp_path):
    import dvc.api

    first = promote(registry, "good", "prod", None)
    promote(registry, "equal", "staging", None, version="v2.0.0")
    second = promote(registry, "equal", "prod", first)
    promote(registry, "good", "prod", second)

    def gto(*arguments):
        command = [SCRIPTS / "gto", *arguments, "-r", registry.url]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    shown = json.loads(gto("show", "--json"))["encoder"]
    assert shown["stage"] == {"prod": "v1.0.0", "staging": "v2.0.0"} and shown["version"] == "v2.0.0"
    assert gto("history").count("assignment") == 4
    commit = git("rev-parse", "run/good^{commit}", folder=registry.url).decode().strip()
    found = dvc.api.artifacts_show("encoder", stage="prod", repo=registry.url)
    assert found == {"rev": commit, "path": "model"}
    command = [SCRIPTS / "dvc", "artifacts", "get", registry.url, "encoder", "--stage", "prod", "-o", "model"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    registry.fetch("good", tmp_path / "bundle", ["model"])
    name = "model.safetensors"
    assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "bundle" / "model" / name).read_bytes()


def test_a_run_is_found_by_its_version_and_its_stage(registry):
    with pytest.raises(InputError, match=r"stage 'prod' of .* holds nothing"):
        find_run(registry, "encoder#prod")
    first = promote(registry, "good", "prod", None)
    promote(registry, "equal", "prod", first)
    assert find_run(registry, "encoder#prod") == find_run(registry, "encoder@v1.1.0") == "equal"
    assert find_run(registry, "encoder@v1.0.0") == find_run(registry, "good") == "good"
    assert find_run(registry, "") == registry.runs()[0]["run"]
    with pytest.raises(InputError, match=r"no run of .* is encoder@v9\.0\.0; versions: v1\.0\.0, v1\.1\.0"):
        find_run(registry, "encoder@v9.0.0")


def test_what_gto_assigns_and_takes_away_is_followed(registry):
    first = promote(registry, "good", "prod", None)

    def gto(*arguments):
        subprocess.run([SCRIPTS / "gto", *arguments, "-r", registry.url], check=True, capture_output=True)

    gto("register", "encoder", "run/equal", "--version", "v3.0.0")
    gto("assign", "encoder", "--version", "v3.0.0", "--stage", "prod")
    held = at_stage(registry, "prod")
    assert (held.run, held.version) == ("equal", "v3.0.0")
    gto("deprecate", "encoder", "v3.0.0", "prod")
    assert at_stage(registry, "prod") == first
    again = promote(registry, "equal", "prod", first)
    assert again.version == "v3.0.0"
    time.sleep(1.1)  # tags tell seconds
    gto("deprecate", "encoder", "v3.0.0")
    assert at_stage(registry, "prod") == first
    gto("deprecate", "encoder")
    assert at_stage(registry, "prod") is None


def test_a_tag_made_by_hand_keeps_nobody_from_promoting(registry):
    git("tag", "encoder#prod#v2", "run/good", folder=registry.url)
    assert at_stage(registry, "prod") is None
    assert promote(registry, "good", "prod", None) == at_stage(registry, "prod")


def test_back_to_what_the_stage_held_before(registry, ask):
    ask("good")
    ask("equal")
    document, error = ask(rollback=True)
    # The way back has one gate: a better or worse score is no reason to stay.
    assert error is None and document["version"] == "v1.0.0" and len(document["gates"]) == 1
    assert [promotion.version for promotion in history(registry, "prod")] == ["v1.0.0", "v1.1.0", "v1.0.0"]
    assert previous(registry, "prod").run == "equal"
    _, error = ask("worse", rollback=True)
    assert isinstance(error, InputError) and "never was at stage" in str(error)
    _, error = ask("good")
    assert isinstance(error, InputError) and "already" in str(error)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_two_promoters_at_once(registry, scheme):
    """To two stages both land; to one stage the second is told, since it compared itself with another."""

    def compete(run, stage, barrier, results):
        mine = Registry(scheme + registry.url, registry.remote)
        mine.runs()
        barrier.wait()
        try:
            results.put(promote(mine, run, stage, None).version)
        except CheckFailed as error:
            results.put(f"refused: {error}")

    for stages in (("a", "b"), ("c", "c")):
        barrier, results = FORK.Barrier(2), FORK.Queue()
        pairs = zip(("good", "worse"), stages, strict=True)
        workers = [FORK.Process(target=compete, args=(*pair, barrier, results)) for pair in pairs]
        for worker in workers:
            worker.start()
        outcomes = sorted(results.get(timeout=60) for _ in workers)
        for worker in workers:
            worker.join()
        refusals = [outcome for outcome in outcomes if "meanwhile" in outcome]
        assert len(refusals) == (stages[0] == stages[1])
    assert at_stage(registry, "a").version != at_stage(registry, "b").version
    assert len(history(registry, "c")) == 1


def test_a_promotion_that_breaks_off_leaves_no_tag(registry):
    """A server that refuses the second tag, as one that is cut off: the first one is not there either."""
    hook = Path(registry.url) / "hooks" / "update"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text('#!/bin/sh\ncase "$1" in *#prod#*) exit 1;; esac\n')
    hook.chmod(0o755)
    with pytest.raises(InputError, match=r"cannot push encoder@v1\.0\.0#prod"):
        promote(registry, "good", "prod", None)
    assert not tags(registry)
    hook.unlink()
    assert promote(registry, "good", "prod", None).version == "v1.0.0"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"run": "god"}, "did you mean 'good'"),
        ({"run": "good", "stage": "a b"}, "cannot name a stage"),
        ({"run": "good", "version": "1.0"}, "is no version"),
        ({"rollback": True}, "held no other run"),
    ],
)
def test_bad_input_is_one_clear_line(ask, options, told):
    _, error = ask(**options)
    assert isinstance(error, InputError) and told in str(error) and "\n" not in str(error)


def test_the_command_line_ends_with_1_and_tells_each_gate(registry):
    arguments = ["promote", "good", "--latency-budget", "0", "--workspace", Path(registry.url).parents[1]]
    environment = {**os.environ, "UNLABELED_TRITON": "/nowhere"}
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    # These ONNX files come from no checkpoint, which only the real audit finds.
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        ["REFUSED", "audit:"], ["passed", "parity:"], ["passed", "champion:"], ["REFUSED", "latency:"],
    ]  # fmt: skip
