"""The audit: whatever is changed, missing or forged is named by step and file."""

import hashlib
import json
import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest
from lineage_bundle import KINDS, flip, record_run
from test_registry import recommit, stored

from pipelines import cli
from unlabeled.digest import json_digest
from unlabeled.errors import CheckFailed, InputError
from unlabeled.files import json_bytes, link_or_copy, read_json, write_json
from unlabeled.lineage.audit import Check, Report, audit, compare, same_environment
from unlabeled.lineage.comparison import COMPUTING
from unlabeled.lineage.git import git
from unlabeled.lineage.registry import Registry


@pytest.fixture
def no_export(monkeypatch):
    """The ONNX files of most runs here are random bytes; the slow tests hold the real comparison."""
    monkeypatch.setitem(sys.modules, "unlabeled.export.parity", type(sys)("parity"))
    sys.modules["unlabeled.export.parity"].onnx_equals_checkpoint = lambda *artifacts: []


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A registry with a run; who changes it, mends it."""
    work = tmp_path_factory.mktemp("one")
    registry = Registry.embedded(work / "registry")
    return registry, record_run(registry, work / "run", "one")


@pytest.fixture
def own(one, tmp_path):
    """A copy of it, to be spoilt."""
    shutil.copytree(Path(one[0].url).parent, tmp_path / "registry")
    return Registry.embedded(tmp_path / "registry"), one[1]


def named(report):
    return {(difference.step, difference.file) for difference in report.differences}


def test_an_untouched_run_is_proven(one, no_export):
    registry, bundle = one
    report = audit(registry, "one")
    assert report.proven
    assert report.lines()[-1] == "proven"
    assert report.record == read_json(bundle / "record.json")["digest"]
    assert len(report.checks) == 6
    assert report.notes == ["the record is not signed"]
    assert json.loads(json.dumps(report.to_json()))["proven"] is True


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_is_named(one, no_export, name):
    registry, _ = one
    path = stored(registry, "one", name)
    before = path.stat()
    flip(path)
    # As silent as a bad disk: DVC itself sees nothing.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    try:
        report = audit(registry, "one")
    finally:
        flip(path)
    assert not report.proven
    # A model or labels that were selected lie in the bundle twice, as one object.
    assert (KINDS[name], name) in named(report)
    assert {Path(file).name for _, file in named(report)} == {Path(name).name}
    assert any(name in line and "was changed in the store" in line for line in report.lines())
    assert audit(registry, "one").proven


@pytest.mark.parametrize("name", ["table/table.parquet", "repository/encoder/1/model.onnx", "index"])
def test_a_missing_object_is_named(one, no_export, name):
    registry, _ = one
    path = stored(registry, "one", name)
    path.rename(path.with_suffix(".away"))
    try:
        report = audit(registry, "one")
    finally:
        path.with_suffix(".away").rename(path)
    assert [difference.file for difference in report.differences] == [name]
    assert "is missing in the store" in report.differences[0].what
    if name.startswith("repository"):
        assert any("not checked" in note and "ONNX" in note for note in report.notes)


def test_a_store_that_lost_everything_is_named_file_by_file(own, no_export):
    registry, _ = own
    Path(registry.remote).rename(registry.remote + "-away")
    with pytest.raises(InputError, match="no DVC remote at"):
        audit(registry, "one")
    Path(registry.remote).mkdir()
    report = audit(registry, "one")
    assert {file for _, file in named(report)} >= KINDS.keys()


@pytest.mark.parametrize(
    "name", ["record.json", "params.yaml", "leaderboard.json", "metrics.json", "bundle.dvc", "dvc.yaml"]
)
def test_a_flipped_bit_in_git_is_named(own, no_export, name):
    registry, _ = own
    oid = git("rev-parse", f"refs/tags/run/one:{name}", folder=registry.url).decode().strip()
    loose = Path(registry.url) / "objects" / oid[:2] / oid[2:]
    flip(loose, loose.stat().st_size // 2)
    report = audit(registry, "one")
    assert not report.proven
    assert [difference.step for difference in report.differences] == ["record"]
    # Other runs, and the list of runs, do not suffer.
    assert registry.runs()[0]["run"] == "one"


@pytest.mark.parametrize(
    "name", ["params.yaml", "leaderboard.json", "metrics.json", "bundle.dvc", "dvc.yaml"]
)
def test_a_changed_file_in_a_moved_tag_is_named(own, no_export, name):
    registry, bundle = own
    recommit(
        registry,
        "one",
        {name: (bundle / name).read_bytes().replace(b"simclr", b"simclr ").replace(b"1", b"2")},
    )
    assert ("record", name) in named(audit(registry, "one"))
    recommit(registry, "one", {name: None})
    assert ("record", name) in named(audit(registry, "one"))


def test_a_file_that_the_record_does_not_know_is_named(own, no_export):
    registry, _ = own
    recommit(registry, "one", {"extra.txt": b"hello"})
    assert named(audit(registry, "one")) == {("record", "extra.txt")}


def forge(registry, bundle, change, signed=True):
    """Move the tag to a changed record, whose own digest is made to fit."""
    record = read_json(bundle / "record.json")
    change(record)
    if signed:
        record["digest"] = json_digest({key: value for key, value in record.items() if key != "digest"})
    recommit(registry, "one", {"record.json": (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()})
    return audit(registry, "one")


def test_a_changed_record_is_named(own, no_export):
    def change(record):
        record["predicate"]["buildDefinition"]["resolvedDependencies"][1]["digest"]["gitCommit"] = "0" * 40

    report = forge(*own, change, signed=False)
    assert named(report) == {("record", "record.json")}
    assert "was changed after it was written" in report.differences[0].what


def test_the_record_of_another_run_is_named(own, no_export, tmp_path):
    registry, _ = own
    record_run(registry, tmp_path / "two", "two", seed=1)
    commit = git("rev-parse", "refs/tags/run/two^{commit}", folder=registry.url).decode().strip()
    git("update-ref", "refs/tags/run/one", commit, folder=registry.url)
    assert "is the record of another run" in {
        difference.what for difference in audit(registry, "one").differences
    }


def test_forged_parameters_are_named(own, no_export):
    def change(record):
        record["predicate"]["buildDefinition"]["externalParameters"]["parameters"]["seed"] = 7

    assert "parameters do not have their digest" in {
        difference.what for difference in forge(*own, change).differences
    }


def test_a_broken_chain_is_named(own, no_export):
    def change(record):
        for step in record["predicate"]["steps"]:
            if step["name"] == "finetune":
                step["inputs"]["model"] = "e" * 64
            if step["name"] == "select":
                step["inputs"]["models"][1] = "d" * 64

    assert named(forge(*own, change)) == {("finetune", "model"), ("select", "models[1]")}


def test_an_artifact_exchanged_for_another_recorded_one_is_named(own, no_export):
    def change(record):
        subjects = {subject["name"]: subject for subject in record["subject"]}
        subjects["classifier/model.safetensors"]["digest"] = subjects["model/model.safetensors"]["digest"]

    report = forge(*own, change)
    # The object is sound, and its digest is the recorded one: only the step's own signature tells.
    assert ("finetune", "classifier") in named(report)


def test_other_data_than_pinned_are_named(own, no_export):
    def change(record):
        record["predicate"]["buildDefinition"]["resolvedDependencies"][0]["digest"]["dvc"] = "a" * 32 + ".dir"

    report = forge(*own, change)
    assert named(report) == {("ingest", "raw")}
    assert report.differences[0].recorded == "a" * 32 + ".dir"


def test_the_reference_of_drift_is_proven(own, no_export, tmp_path):
    registry, _ = own
    record_run(registry, tmp_path / "two", "two", seed=1, reference="one")
    report = audit(registry, "two")
    assert report.proven
    assert report.checks[4].claim == "drift was measured against the table of run one"
    record_run(registry, tmp_path / "three", "three", seed=2, reference="two")
    git("tag", "--delete", "run/two", folder=registry.url)
    [difference] = audit(registry, "three").differences
    assert (difference.step, difference.file) == ("validate", "validation/validation.json")
    assert "no run 'two'" in difference.what
    git("tag", "run/two", "run/one^{commit}", folder=registry.url)
    [difference] = audit(registry, "three").differences
    assert difference.what == "drift was not measured against the table of run two"


def test_an_undeclared_file_and_a_step_of_other_code_are_named(own, no_export):
    def change(record):
        record["subject"].append({**record["subject"][0], "name": "smuggled/file"})
        record["predicate"]["steps"][3]["code"] = "0" * 64

    report = forge(*own, change)
    assert ("record", "smuggled/file") in named(report)
    assert any(difference.file == "code" for difference in report.differences)


def test_a_polished_leaderboard_is_named(own, no_export):
    registry, bundle = own
    board = read_json(bundle / "leaderboard.json")
    board["rows"][0]["linear"] = 0.99
    content = (json.dumps(board, indent=2, sort_keys=True) + "\n").encode()
    record = read_json(bundle / "record.json")
    for entry in record["predicate"]["runDetails"]["byproducts"]:
        if entry["name"] == "leaderboard.json":
            entry["digest"]["sha256"] = hashlib.sha256(content).hexdigest()
    record["digest"] = json_digest({key: value for key, value in record.items() if key != "digest"})
    recommit(registry, "one", {"leaderboard.json": content, "record.json": json_bytes(record)})
    report = audit(registry, "one")
    assert named(report) == {("record", "leaderboard.json")}
    assert "`rows` is not what the artifacts say" in report.differences[0].what


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"null", b"\xff\xfe", b'{"_type": "https://in-toto.io/Statement/v1"}']
)
def test_a_broken_record_is_a_difference_not_a_traceback(own, no_export, content):
    registry, _ = own
    recommit(registry, "one", {"record.json": content})
    report = audit(registry, "one")
    assert not report.proven
    assert named(report) == {("record", "record.json")}
    assert report.notes == ["the record cannot be read: nothing else was checked"]


@pytest.mark.parametrize("key", ["subject", "predicate"])
def test_a_record_without_its_parts_is_a_difference(own, no_export, key):
    report = forge(*own, lambda record: record.pop(key))
    assert not report.proven
    assert named(report) == {("record", "record.json")}


def places(value, path=()):
    """Every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


ODD = (None, [], "x", {}, 0)


@pytest.mark.slow
def test_whatever_is_lacking_or_odd_in_a_record_ends_in_a_difference(one, no_export, monkeypatch):
    registry, bundle = one
    untouched = read_json(bundle / "record.json")
    environment = untouched["predicate"]["runDetails"]["builder"]["environment"]
    environment["distributions"] = {"numpy": environment["distributions"]["numpy"]}
    # A place of each kind: list positions do not count, and names only where they are few.
    kinds = {tuple(key for key in path if isinstance(key, str))[:7]: path for path in places(untouched)}
    for number, path in enumerate(list(kinds.values())[::2]):
        record = json.loads(json.dumps(untouched))
        parent = record
        for key in path[:-1]:
            parent = parent[key]
        odd = ODD[number % len(ODD)]
        if odd is None:
            del parent[path[-1]]
        else:
            parent[path[-1]] = odd if parent[path[-1]] != odd else 1
        monkeypatch.setattr(registry, "show", lambda run, record=record: record)
        report = audit(registry, "one")
        assert not report.proven, path
        assert report.lines()[-1].startswith("not proven")


def test_an_unknown_run_is_bad_input(one, tmp_path):
    with pytest.raises(InputError, match="no run 'oen' in the registry; did you mean 'one'"):
        audit(one[0], "oen")
    with pytest.raises(InputError, match="holds no run yet"):
        audit(Registry.embedded(tmp_path / "none"), "one")


def test_other_code_here_is_told_and_contradicts_nothing(own, no_export):
    def change(record):
        record["predicate"]["buildDefinition"]["resolvedDependencies"][1]["digest"]["tree"] = "0" * 64
        for step in record["predicate"]["steps"]:
            step["code"] = "0" * 64

    report = forge(*own, change)
    assert report.proven
    assert any("code 000000" in note for note in report.notes)
    assert any("the leaderboard was not derived again" in note for note in report.notes)


def record_of(bundle):
    return read_json(bundle / "record.json")


def test_the_same_environment_is_comparable(one):
    record = record_of(one[1])
    assert same_environment(record) == (True, [])
    assert same_environment(record, record) == (True, [])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda step: step["machine"].update(cpu="Z80"), "cpu Z80, here"),
        (lambda step: step["machine"].update(cores=99), "cores 99, here"),
        (lambda step: step["machine"]["instructions"].append("avx9"), "instructions avx9, here none"),
        (lambda step: step["machine"].update(gpus=["H200"]), "gpus H200, here none"),
    ],
)
def test_another_machine_is_not_comparable_and_the_steps_are_named(one, change, reason):
    record = record_of(one[1])
    change(record["predicate"]["steps"][3])
    comparable, reasons = same_environment(record)
    assert not comparable
    [told] = reasons
    assert told.startswith(reason)
    assert record["predicate"]["steps"][3]["name"] in told


def test_a_key_that_stands_twice_in_a_record_is_named(own, no_export):
    registry, _ = own
    content = registry.read("one", "record.json")
    recommit(registry, "one", {"record.json": content.replace(b"{", b'{"predicate": {"forged": true},', 1)})
    [difference] = audit(registry, "one").differences
    assert (difference.file, difference.what) == (
        "record.json", "is not written as a record is: a key may stand there twice"
    )  # fmt: skip


def test_a_record_without_a_part_is_told_by_every_reader(own, capsys):
    registry, _ = own
    record = registry.show("one")
    del record["subject"]
    recommit(registry, "one", {"record.json": json_bytes(record)})
    with pytest.raises(InputError, match=r"the record of run one is broken: it has no 'subject'"):
        registry.show("one")
    workspace = Path(registry.url).parents[1]
    with pytest.raises(InputError, match="it has no 'subject'"):
        cli.audit("one", rerun=True, key=None, live="", workspace=workspace, as_json=True)
    # What the audit found is told before what kept it from going on.
    [check] = json.loads(capsys.readouterr().out)["checks"]
    assert check["differences"][0]["file"] == "record.json"


def test_a_damaged_listing_of_the_commit_is_named(own):
    registry, _ = own
    oid = git("rev-parse", "refs/tags/run/one:.dvc", folder=registry.url).decode().strip()
    flip(Path(registry.url) / "objects" / oid[:2] / oid[2:])
    assert named(audit(registry, "one")) == {("record", "record.json")}


def test_libraries_that_compute_nothing_do_not_decide_whether_bits_are_compared(one):
    record = record_of(one[1])
    found = record["predicate"]["runDetails"]["builder"]["environment"]["distributions"]
    required = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower() for line in metadata.requires("unlabeled")}
    assert required >= set(COMPUTING)
    found["rich"]["version"] = "0"
    assert same_environment(record) == (True, [])
    found["scipy"]["version"] = "0"
    comparable, [reason] = same_environment(record)
    assert not comparable and reason.startswith("scipy 0 ")


def test_variables_are_compared_where_they_are_known(one):
    untouched, record = record_of(one[1]), record_of(one[1])
    # A process that has trained before has it set.
    untouched["predicate"]["steps"][3]["machine"]["variables"].pop("CUBLAS_WORKSPACE_CONFIG", None)
    record["predicate"]["steps"][3]["machine"]["variables"]["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # Steps set some themselves: a process that is no step cannot tell, a fresh execution can.
    assert same_environment(record) == (True, [])
    comparable, [reason] = same_environment(record, untouched)
    assert not comparable
    assert reason.startswith("variables CUBLAS_WORKSPACE_CONFIG=:4096:8, here none (")
    untouched["predicate"]["runDetails"]["builder"]["environment"]["variables"]["MKL_CBWR"] = "AVX"
    assert same_environment(untouched) == (False, ["variables MKL_CBWR=AVX, here none"])


def test_other_libraries_and_other_code_are_not_comparable(one):
    record = record_of(one[1])
    distributions = record["predicate"]["runDetails"]["builder"]["environment"]["distributions"]
    distributions["numpy"]["version"] = "1.0"
    distributions["pytest"]["version"] = "1.0"  # changes no bits
    del distributions["scipy"]
    record["predicate"]["buildDefinition"]["resolvedDependencies"][1]["digest"]["tree"] = "0" * 64
    comparable, reasons = same_environment(record)
    assert not comparable
    assert [reason.split()[0] for reason in reasons] == ["code", "numpy", "scipy"]


@pytest.mark.parametrize("changed", ["pretrain/simclr", "evaluate/autoencoder", "export", "ingest"])
def test_comparison_names_the_first_step_that_differs(one, tmp_path, changed):
    _, bundle = one
    # Steps after a changed one get its bytes as input, but compute the same in these small runs.
    again = record_run(None, tmp_path, "again", changed=changed)
    differences = compare(bundle, again, comparable=True)
    assert differences[0].step == changed
    if changed == "evaluate/autoencoder":
        assert {difference.file for difference in differences} == {
            "methods/autoencoder/evaluation/evaluation.json", "leaderboard.json",
        }  # fmt: skip
    report = audit_report().with_rerun(differences, True, [])
    assert not report.proven
    assert any(changed in line for line in report.lines())


def audit_report():
    return Report("one", "", [Check("the record is intact")])


def test_comparison_of_equal_runs_is_empty(one, tmp_path):
    again = record_run(None, tmp_path, "again")
    assert compare(one[1], again, comparable=True) == []
    report = audit_report().with_rerun([], True, [])
    assert report.proven
    assert report.checks[-1].claim == "a fresh execution gives the same bits"


def test_comparison_sees_missing_and_new_files(one, tmp_path):
    again = record_run(None, tmp_path, "again")
    (again / "index" / "golden.npz").rename(again / "index" / "silver.npz")
    found = {(difference.file, difference.what) for difference in compare(one[1], again, comparable=True)}
    assert found == {
        ("index/golden.npz", "was not written again"),
        ("index/silver.npz", "was not written the first time"),
    }


def test_bits_that_cannot_be_compared_are_not_but_data_and_metrics_are(one, tmp_path):
    again = record_run(None, tmp_path / "same", "again", changed="pretrain/simclr")
    assert compare(one[1], again, comparable=False) == []
    board = read_json(again / "leaderboard.json")
    board["rows"][0]["linear"] += 0.02
    board["rows"][0]["seconds"] *= 100
    (again / "leaderboard.json").unlink()
    write_json(again / "leaderboard.json", board)
    assert compare(one[1], again, comparable=False) == []
    assert [difference.step for difference in compare(one[1], again, comparable=True)].count(
        "evaluate/simclr"
    ) == 1
    board["rows"][0]["cluster"]["acc"] = None
    board["rows"][0]["linear"] += 0.02
    write_json(again / "leaderboard.json", board)
    found = compare(one[1], again, comparable=False)
    assert [difference.what for difference in found] == [
        "cluster.acc of simclr differs",
        "linear of simclr differs",
    ]
    report = audit_report().with_rerun(found, False, ["cpu Z80, here Z81"])
    assert report.notes == ["the bits of a fresh execution are not comparable: cpu Z80, here Z81"]
    other_data = record_run(None, tmp_path / "other", "again", changed="ingest")
    assert {d.file for d in compare(one[1], other_data, comparable=False)} >= {"raw/train-images-idx3-ubyte"}


@pytest.mark.slow
def test_the_served_onnx_is_proven_to_be_its_checkpoint(tmp_path):
    from lineage_bundle import real_model

    registry = Registry.embedded(tmp_path / "registry")
    for name, seed in (("right", 0), ("wrong", 5)):
        real_model(tmp_path / name, seed)
        record_run(registry, tmp_path / f"run-{name}", name, exported=tmp_path / name)
    assert audit(registry, "right").proven
    # The chain of the other is closed and every digest is sound: its file just holds other weights.
    report = audit(registry, "wrong")
    assert {difference.file for difference in report.differences} == {"repository/encoder/1/model.onnx"}
    assert "weights differ from the checkpoint" in " ".join(map(str, report.differences))


def test_an_onnx_file_that_cannot_be_read_is_a_difference(one):
    # Random bytes in the place of every model: whatever the libraries say of them, it is no traceback.
    report = audit(one[0], "one")
    assert named(report) == {("export", "repository/encoder/1/model.onnx")}
    assert "cannot be compared" in report.differences[0].what
    assert "/tmp" not in report.differences[0].what


def test_fetching_a_damaged_run_for_a_rerun_is_refused(own, tmp_path):
    registry, _ = own
    flip(stored(registry, "one", "raw/train-images-idx3-ubyte"))
    with pytest.raises(CheckFailed, match="raw/train-images-idx3-ubyte is damaged"):
        registry.fetch("one", tmp_path / "rerun")


def test_a_copied_registry_proves_the_same(one, no_export, tmp_path):
    registry, _ = one
    link_or_copy(Path(registry.url).parent, tmp_path / "copy")
    assert audit(Registry.embedded(tmp_path / "copy"), "one").proven
