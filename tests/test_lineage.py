"""Digests, steps, environment and record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lineage_bundle import KINDS, flip, record_run, run_steps, write

from unlabeled import digest, progress
from unlabeled.environment import environment, machine
from unlabeled.errors import CheckFailed, InputError
from unlabeled.files import read_json
from unlabeled.lineage.chain import open_inputs, ordered
from unlabeled.lineage.record import describe, method_artifacts, record
from unlabeled.lineage.step import Artifact, sign, step, step_record

NAMES = {
    "b.txt": 10,
    "a/b/c.bin": 20,
    "a-b": 5,
    "a.b": 5,
    "ünï/日本.png": 7,
    "ünï/ z": 3,
    "A": 1,
    "empty": "",
    "é": 2,
}


@pytest.fixture
def tree(tmp_path):
    write(tmp_path / "data", NAMES, 0)
    (tmp_path / "data" / "no files" / "here").mkdir(parents=True)
    return tmp_path / "data"


def test_dvc_digest_equals_dvc(tree, tmp_path):
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import get_odb
    from dvc_objects.fs.local import localfs

    (tree / "linked folder").symlink_to(tree / "a")
    (tree / "linked file").symlink_to(tree / "b.txt")
    for path in (tree, tree / "b.txt"):
        store = get_odb(localfs, str(tmp_path / "store"), hash_name="md5")
        _, _, built = build(store, str(path), localfs, "md5", dry_run=True)
        assert digest.dvc_digest(path) == built.oid


@pytest.mark.slow
def test_dvc_digest_equals_dvc_add(tree):
    from dvc.repo import Repo

    repository = Repo.init(str(tree.parent), no_scm=True)
    [stage] = repository.add(str(tree))
    assert digest.dvc_digest(tree) == stage.outs[0].hash_info.value
    repository.close()


def test_tree_digest_sees_names_and_bytes_only(tree, tmp_path):
    first = digest.tree_digest(tree)
    os.utime(tree / "b.txt", (0, 0))
    (tree / "a" / "b" / "c.bin").chmod(0o600)
    assert digest.tree_digest(tree) == first
    flip(tree / "a" / "b" / "c.bin")
    changed = digest.tree_digest(tree)
    (tree / "é").rename(tree / "e")
    assert len({first, changed, digest.tree_digest(tree)}) == 3
    with pytest.raises(FileNotFoundError):
        digest.tree_digest(tmp_path / "nothing")


def test_tree_digest_is_the_documented_one(tmp_path):
    (tmp_path / "f" / "d").mkdir(parents=True)
    (tmp_path / "f" / "d" / "x").write_bytes(b"hello")
    hello = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert digest.tree_digest(tmp_path / "f" / "d" / "x") == hello
    assert digest.tree_digest(tmp_path / "f") == digest.json_digest({"d/x": hello})


def test_stream_digests(tree):
    with open(tree / "a/b/c.bin", "rb") as file:
        found = digest.stream_digests(digest.blocks(file))
    assert found == (
        digest.file_digest(tree / "a/b/c.bin"),
        digest.file_digest(tree / "a/b/c.bin", "md5"),
        20,
    )


def test_tensors_digest_depends_on_name_dtype_shape_and_bytes_not_on_order():
    a, b = np.arange(6, dtype=np.float32), np.ones(3, np.int64)
    first = digest.tensors_digest({"a": a, "b": b})
    assert digest.tensors_digest({"b": b, "a": a}) == first
    # The bytes of an array count, not how it lies in memory.
    assert digest.tensors_digest({"a": np.stack([a, a])[:, ::1][0], "b": b[::-1][::-1]}) == first
    others = [
        {"a": a.reshape(2, 3), "b": b},
        {"a": a.view(np.int32), "b": b},
        {"a": -a, "b": b},
        {"c": a, "b": b},
        {"a": a},
    ]
    assert len({first, *(digest.tensors_digest(other) for other in others)}) == 6


def test_code_digest_sees_every_package(tmp_path):
    assert digest.code_digest() == digest.code_digest()
    for package in digest.CODE_PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    command = [sys.executable, "-c", "from unlabeled.digest import code_digest; print(code_digest())"]
    source = Path(digest.__file__)
    (tmp_path / "unlabeled" / source.name).write_text(source.read_text())

    def run():
        return subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, check=True
        ).stdout

    first = run()
    assert run() == first  # compiled files beside the source do not count
    for package in digest.CODE_PACKAGES:
        (tmp_path / package / "new.py").write_text("")
        changed = run()
        assert changed != first
        first = changed


@pytest.fixture
def events(tmp_path, monkeypatch):
    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "progress"))
    return lambda: [json.loads(line) for line in (tmp_path / "progress").read_text().splitlines()]


def made(path, content="x", name="maker"):
    artifact = Artifact(str(path))
    with step(name, {}, {"out": artifact}):
        Path(path).write_text(content)
    return artifact


def test_step_signs_what_it_wrote(tmp_path, events):
    source, output, metrics = (
        made(tmp_path / "in"),
        Artifact(str(tmp_path / "out")),
        Artifact(str(tmp_path / "m" / "metrics")),
    )
    with step("use", {"one": source, "many": [source, source]}, {"out": output}, metrics=metrics) as result:
        progress.report(1, 2, "images", loss=0.5)
        Path(output.path).mkdir()
        (Path(output.path) / "f").write_text("y")
        result.update(loss=np.float32(0.5), count=np.int64(3), collapse=float("nan"), name="text")
    signed = step_record(output)
    assert signed["name"] == "use"
    assert signed["inputs"] == {"one": source.metadata["digest"], "many": [source.metadata["digest"]] * 2}
    assert signed["outputs"] == {"out": digest.tree_digest(output.path)} == {"out": output.metadata["digest"]}
    assert signed["metrics"] == {"loss": 0.5, "count": 3, "collapse": None, "name": "text"}
    assert signed["code"] == digest.code_digest()
    assert signed["machine"]["cores"] >= 1
    assert signed["started"] <= signed["ended"]
    assert signed["seconds"] >= 0
    assert json.loads(Path(metrics.path).read_text()) == signed["metrics"]
    assert metrics.metadata["loss"] == 0.5
    mine = [event for event in events() if event["step"] == "use"]
    assert [event["event"] for event in mine] == ["start", "progress", "end"]
    assert mine[-1]["metrics"]["count"] == 3


def test_the_machine_that_a_body_names_is_the_steps(tmp_path, events):
    elsewhere, output = machine() | {"cpu": "Z80"}, Artifact(str(tmp_path / "out"))
    metrics = Artifact(str(tmp_path / "metrics"))
    with step("train", {}, {"out": output}, metrics=metrics) as result:
        Path(output.path).write_text("y")
        result.update(loss=0.5, machine=elsewhere)
    assert step_record(output)["machine"] == elsewhere
    assert step_record(output)["metrics"] == json.loads(Path(metrics.path).read_text()) == {"loss": 0.5}
    assert events()[-1]["metrics"] == {"loss": 0.5}


def test_step_refuses_tampered_input(tmp_path, events):
    source = made(tmp_path / "in")
    flip(Path(source.path))
    output = Artifact(str(tmp_path / "out"))
    with (
        pytest.raises(CheckFailed, match=r"step use: input data has digest .* were changed"),
        step("use", {"data": source}, {"out": output}),
    ):
        pytest.fail("the body must not run")
    assert output.metadata == {}
    assert events()[-1] | {"time": 0} == {
        "time": 0, "step": "use", "event": "fail", "kind": "check", "message": events()[-1]["message"],
    }  # fmt: skip


def test_step_refuses_other_code(tmp_path, events):
    with (
        pytest.raises(InputError, match="the code here has digest"),
        step("use", {}, {}, expected_code="0" * 64),
    ):
        pytest.fail("the body must not run")
    assert events()[-1]["kind"] == "input"


def test_step_that_fails_signs_nothing(tmp_path, events):
    output = Artifact(str(tmp_path / "out"))
    with pytest.raises(ValueError), step("use", {}, {"out": output}):
        Path(output.path).write_text("half")
        raise ValueError
    assert output.metadata == {}
    assert events()[-1]["message"] == "ValueError"
    with (
        pytest.raises(RuntimeError, match="step use did not write its output out"),
        step("use", {}, {"out": Artifact(str(tmp_path / "no"))}),
    ):
        pass


def test_environment_tells_what_decides_bits(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    monkeypatch.setenv("UNLABELED_IMAGE_DIGEST", "sha256:abc")
    found = environment()
    assert found["variables"]["MKL_CBWR"] == "AVX2"
    assert found["image"] == "sha256:abc"
    assert found["distributions"]["numpy"]["version"] == np.__version__
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert found.items() >= {key: value for key, value in machine().items() if key != "torch"}.items()
    assert json.loads(json.dumps(found)) == found


def test_environment_without_torch_does_not_import_it_and_is_fast():
    code = (
        "import sys, time; from unlabeled.environment import environment;"
        "before = time.process_time();"
        "assert environment()['torch'] is None and 'torch' not in sys.modules;"
        "print(time.process_time() - before)"
    )
    assert float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) < 1


def test_environment_with_torch():
    import torch

    found = machine()["torch"]
    assert found["version"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["deterministic"] is False


def test_record_is_an_intoto_statement(tmp_path):
    bundle = record_run(None, tmp_path, "one")
    found = read_json(bundle / "record.json")
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://slsa.dev/provenance/v1"
    subjects = {subject["name"]: subject for subject in found["subject"]}
    byproducts = {entry["name"]: entry for entry in found["predicate"]["runDetails"]["byproducts"]}
    on_disk = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
    assert on_disk.keys() == subjects.keys() | byproducts.keys() | {"record.json"}
    assert subjects.keys() >= KINDS.keys()
    for name, entry in (subjects | byproducts).items():
        assert entry["digest"] == {
            "sha256": digest.file_digest(on_disk[name]),
            "md5": digest.file_digest(on_disk[name], "md5"),
        }
        assert entry["annotations"]["size"] == on_disk[name].stat().st_size
    predicate = found["predicate"]
    data, code = predicate["buildDefinition"]["resolvedDependencies"]
    assert data["digest"] == {"dvc": digest.dvc_digest(bundle / "raw")}
    assert data["annotations"]["counts"] == {"train": 10, "test": 4}
    assert code["digest"]["tree"] == digest.code_digest()
    assert predicate["buildDefinition"]["externalParameters"]["parameters"]["training"]["batch_size"] == 256
    assert predicate["steps"][0]["name"] == "ingest"
    assert predicate["runDetails"]["metadata"]["invocationId"] == "one"
    assert predicate["runDetails"]["builder"]["environment"]["python"] == environment()["python"]
    rest = {key: value for key, value in found.items() if key != "digest"}
    assert found["digest"] == digest.json_digest(rest)
    told = "\n".join(describe(found))
    assert all(part in told for part in ("run       one", found["digest"], "pretrain/simclr", "33 files"))


def test_leaderboard(tmp_path):
    board = read_json(record_run(None, tmp_path, "one") / "leaderboard.json")
    assert board["run"] == "one"
    assert board["selected"] == "simclr"
    assert [row["method"] for row in board["rows"]] == ["simclr", "autoencoder"]
    first = board["rows"][0]
    assert first["cluster"] == {"acc": 0.5, "nmi": 0.4, "ari": 0.3, "ami": 0.35, "purity": 0.55}
    assert (first["family"], first["linear"], first["images_per_second"]) == ("contrast", 0.81 + 0.05, 1000.0)
    assert [row["method"] for row in board["baselines"]] == ["raw pixels", "PCA-128"]


def test_recording_the_same_artifacts_again_gives_the_same_bytes(tmp_path):
    artifacts = run_steps(tmp_path / "steps")
    data = {"source": "mini", "digest": digest.dvc_digest(artifacts["raw"].path), "reference": ""}
    for name in ("a", "b"):
        record("one", artifacts, {"data": "mini"}, data, "", "", tmp_path / name)
    assert digest.tree_digest(tmp_path / "a") == digest.tree_digest(tmp_path / "b")


def test_parameters_of_kfp_are_numbers_again(tmp_path):
    artifacts = run_steps(tmp_path / "steps")
    data = {"source": "mini", "digest": digest.dvc_digest(artifacts["raw"].path), "reference": ""}
    record(
        "one", artifacts, {"seed": 3.0, "training": {"batch_size": 64.0}}, data, "", "", tmp_path / "bundle"
    )
    text = (tmp_path / "bundle" / "params.yaml").read_text()
    assert "seed: 3\n" in text
    assert "batch_size: 64\n" in text


def broken(tmp_path, change, match, error=CheckFailed, **data):
    artifacts = run_steps(tmp_path / "steps")
    data = {"source": "mini", "digest": digest.dvc_digest(artifacts["raw"].path), "reference": "", **data}
    change(artifacts)
    with pytest.raises(error, match=match):
        record("one", artifacts, {}, data, "", "", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert not list(tmp_path.glob(".bundle*"))


def test_record_refuses_changed_bytes(tmp_path):
    def change(artifacts):
        flip(Path(artifacts["methods/simclr/model"].path) / "model.safetensors")

    broken(tmp_path, change, "artifact methods/simclr/model has digest .* step pretrain/simclr signed")


def test_the_artifacts_of_thirty_methods_fit_into_one_argument(tmp_path):
    """KFP hands `record` the metadata of all artifacts as one argument; Linux takes 128 KiB."""
    written = tmp_path / "model"
    written.write_text("weights")
    artifact = Artifact(str(written))
    with step("pretrain/simclr", {}, {"model": artifact}) as result:
        result |= {f"metric_{number}": number / 7 for number in range(20)}
    # Beside it stand a URI, a type and a name; quotes are escaped.
    each = len(json.dumps(json.dumps(artifact.metadata))) + 300
    assert 3 * 30 * each < 128 * 1024


def test_record_refuses_an_open_chain(tmp_path):
    def change(artifacts):
        # As if the baselines had been computed on another table.
        signed = step_record(artifacts["baselines"])
        signed["inputs"]["table"] = "f" * 64
        sign(artifacts["baselines"], artifacts["baselines"].metadata["digest"], signed)

    broken(
        tmp_path, change, "step baselines read table with digest ffffffffffff, which no step before it wrote"
    )


def test_record_refuses_an_artifact_of_another_execution(tmp_path):
    def change(artifacts):
        artifacts["index"] = run_steps(tmp_path / "again")["index"]

    broken(tmp_path, change, "step export: the artifacts come from two executions")


def test_record_refuses_other_data_than_pinned(tmp_path):
    broken(
        tmp_path,
        lambda artifacts: None,
        "the raw data have the DVC digest .*, pinned is abc.dir",
        digest="abc.dir",
    )


def test_record_refuses_unsigned_artifacts_and_unknown_parameters(tmp_path):
    broken(
        tmp_path, lambda artifacts: artifacts["index"].metadata.clear(), "artifact index carries no record"
    )
    artifacts = run_steps(tmp_path / "more")
    with pytest.raises(InputError, match=r"unknown parameter training\.epoch; did you mean 'epochs'"):
        record("one", artifacts, {"training": {"epoch": 1}}, {}, "", "", tmp_path / "bundle")


def test_record_refuses_steps_of_different_code(tmp_path):
    def change(artifacts):
        signed = step_record(artifacts["serving"]) | {"code": "0" * 64}
        sign(artifacts["serving"], artifacts["serving"].metadata["digest"], signed)

    broken(tmp_path, change, "step check_serving ran code 000000000000")


def test_methods_are_told_by_their_models_not_by_their_order(tmp_path):
    artifacts = run_steps(tmp_path)
    kinds = {
        kind: [artifacts[f"methods/{name}/{kind}"] for name in ("simclr", "autoencoder")]
        for kind in ("model", "labels", "evaluation")
    }
    found = method_artifacts(kinds["model"], kinds["labels"][::-1], kinds["evaluation"])
    assert found == {name: artifact for name, artifact in artifacts.items() if name.startswith("methods/")}


def test_steps_are_ordered_by_what_they_read_whatever_their_clocks_say(tmp_path):
    steps = [step_record(artifact) for artifact in run_steps(tmp_path).values()]
    skewed = [one | {"started": -one["started"]} for one in steps]
    names = [one["name"] for one in ordered(skewed)]
    assert len(names) == len(set(names)) == 13
    assert open_inputs(ordered(skewed)) == []
    # Whatever `select` copied has the digest that `pretrain` signed.
    chain = ["ingest", "pretrain/simclr", "finetune", "export", "check_serving"]
    assert [name for name in names if name in chain] == chain
    loop = [
        {"name": "a", "started": 0, "inputs": {"x": "1"}, "outputs": {"y": "2"}},
        {"name": "b", "started": 1, "inputs": {"y": "2"}, "outputs": {"x": "1"}},
    ]
    assert open_inputs(ordered(loop)) == [("a", "x", "1")]


def test_sigterm_ends_a_step_as_an_exception(tmp_path):
    """What the body started, a server or a temporary folder, is cleared up."""
    code = """if True:
        import os, signal
        from unlabeled.lineage.step import step

        with step("ingest", {}, {}):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                print("cleared up", flush=True)
    """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "cleared up\n" and ended.returncode
