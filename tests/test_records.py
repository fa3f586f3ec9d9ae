"""Records of earlier versions: what was recorded then is read, and proven, now."""

import json
import shutil
from pathlib import Path

import pytest
from lineage_bundle import flip
from typer.testing import CliRunner

from pipelines.cli import app
from unlabeled.digest import json_digest
from unlabeled.lineage.audit import audit
from unlabeled.lineage.git import git
from unlabeled.lineage.record import describe
from unlabeled.lineage.registry import Registry
from unlabeled.lineage.tracked import PROVENANCE, STATEMENT
from unlabeled.lineage.verification import verify

V1 = Path(__file__).parent / "records" / "v1"


@pytest.fixture
def v1(tmp_path):
    """The frozen registry of format 1, laid out as an embedded one."""
    git("clone", "--quiet", "--mirror", str(V1 / "registry.bundle"), str(tmp_path / "git"))
    shutil.copytree(V1 / "store", tmp_path / "store")
    return Registry.embedded(tmp_path)


def test_the_records_of_format_1_are_read(v1):
    rows = v1.runs()
    assert [(row["run"], row["data"]["source"], row["selected"]) for row in rows] == [
        ("second", "mini", "simclr"),
        ("first", "mini", "simclr"),
    ]
    for run in ("first", "second"):
        record = v1.show(run)
        assert (record["_type"], record["predicateType"]) == (STATEMENT, PROVENANCE)
        assert record["predicate"]["buildDefinition"]["buildType"] == "urn:unlabeled:training:v1"
        assert record["digest"] == json_digest({key: record[key] for key in record if key != "digest"})
        assert any(run in line for line in describe(record))


def test_the_records_of_format_1_are_proven_and_their_damage_is_named(v1):
    for run, key, checks in (("first", None, 6), ("second", V1 / "signer.pub.pem", 8)):
        report = audit(v1, run, key)
        assert report.differences == []
        assert len(report.checks) == checks
    oid = v1.objects("second")["table/images.npy"]
    flip(Path(v1.remote) / "files" / "md5" / oid[:2] / oid[2:])
    assert [difference.file for difference in audit(v1, "second").differences] == ["table/images.npy"]
    assert [(report.run, report.proven) for report in verify(v1)] == [("second", False), ("first", True)]


def test_commands_read_a_registry_by_its_urls(v1):
    def called(*arguments):
        address = ("--registry", f"file://{v1.url}", "--remote", v1.remote, "--json")
        result = CliRunner().invoke(app, [*arguments, *address])
        return result.exit_code, json.loads(result.stdout)

    assert [row["run"] for row in called("runs")[1]] == ["second", "first"]
    assert called("show", "first")[1] == v1.show("first")
    code, report = called("verify")
    assert (code, report["sound"], [run["proven"] for run in report["runs"]]) == (0, True, [True, True])
    name = v1.objects("first")["raw"]
    (Path(v1.remote) / "files" / "md5" / name[:2] / name[2:]).unlink()
    code, report = called("verify")
    assert (code, report["sound"]) == (1, False)
    [difference] = [
        difference for run in report["runs"] for check in run["checks"] for difference in check["differences"]
    ]
    assert (difference["step"], difference["file"]) == ("ingest", "raw")
    assert "is missing in the store" in difference["what"]
    result = CliRunner().invoke(app, ["runs", "--registry", v1.url])
    assert "give both" in str(result.exception)
