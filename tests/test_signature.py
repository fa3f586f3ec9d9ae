"""The signature of a record: whose it is, and that nothing of it or of the record can be changed."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from lineage_bundle import flip, key_pair, record_run, run_steps
from test_audit import forge, named
from test_registry import no_export, recommit  # noqa: F401  (no_export is a fixture)

from unlabeled.digest import dvc_digest, tree_digest
from unlabeled.errors import InputError
from unlabeled.files import read_json
from unlabeled.lineage.audit import audit
from unlabeled.lineage.git import git
from unlabeled.lineage.record import record
from unlabeled.lineage.registry import Registry
from unlabeled.lineage.signature import contradiction
from unlabeled.lineage.verification import verify


@pytest.fixture
def signed(tmp_path, monkeypatch):
    """A registry with a signed run `one`, its bundle, and the signer's public key."""
    private, public = key_pair(tmp_path)
    monkeypatch.setenv("UNLABELED_SIGNING_KEY", str(private))
    registry = Registry.embedded(tmp_path / "registry")
    return registry, record_run(registry, tmp_path / "one", "one"), public


def signature_check(report):
    [check] = [check for check in report.checks if check.claim.startswith("the record is signed")]
    return [difference.what for difference in check.differences]


def test_a_signed_run_is_proven_by_its_key_alone(signed, tmp_path):
    registry, bundle, public = signed
    report = audit(registry, "one", public)
    assert report.proven
    assert report.notes == []
    assert signature_check(report) == []
    _, other = key_pair(tmp_path, "other")
    report = audit(registry, "one", other)
    assert named(report) == {("record", "record.sig")}
    assert signature_check(report) == ["was made with another key"]
    report = audit(registry, "one")
    assert report.proven
    assert report.notes == ["the signature was not checked: that needs the signer's public key"]
    registry.fetch("one", tmp_path / "fetched")
    assert tree_digest(tmp_path / "fetched") == tree_digest(bundle)


def test_an_unsigned_run_is_named_where_a_key_is_asked_for(signed, tmp_path, monkeypatch):
    registry, _, public = signed
    monkeypatch.delenv("UNLABELED_SIGNING_KEY")
    record_run(registry, tmp_path / "two", "two", seed=1)
    assert signature_check(audit(registry, "two", public)) == ["is missing: the record is not signed"]
    assert audit(registry, "two").notes == ["the record is not signed"]
    recommit(registry, "one", {"record.sig": None})
    assert signature_check(audit(registry, "one", public)) == ["is missing: the record is not signed"]


def test_recording_a_signed_run_again_changes_nothing(signed, tmp_path):
    registry, _, public = signed
    before = git("rev-parse", "refs/tags/run/one", folder=registry.url)
    bundle = record_run(None, tmp_path / "again", "one")
    # Another signature of the same record: ECDSA draws a number for each.
    assert (bundle / "record.sig").read_bytes() != registry.read("one", "record.sig")
    for name in ("table", "raw"):
        assert (bundle / name).is_dir()
    record = read_json(bundle / "record.json")
    assert record["subject"] == registry.show("one")["subject"]
    registry.push("one", tmp_path / "one" / "bundle")
    assert git("rev-parse", "refs/tags/run/one", folder=registry.url) == before
    assert audit(registry, "one", public).proven


def test_recording_again_on_another_machine_brings_the_signature_that_is_there(tmp_path, monkeypatch):
    artifacts = run_steps(tmp_path / "steps")
    data = {"source": "mini", "digest": dvc_digest(artifacts["raw"].path), "reference": ""}

    def record_with(key, machine, registry, bundle):
        monkeypatch.setenv("UNLABELED_SIGNING_KEY", str(key or ""))
        monkeypatch.setattr(platform, "platform", lambda: machine)
        record("one", artifacts, {"data": "mini"}, data, registry.url, registry.remote, bundle)
        return bundle

    (first, public), (second, _) = (key_pair(tmp_path, name) for name in ("first", "second"))
    for name, key in (("signed", first), ("unsigned", None)):
        registry = Registry.embedded(tmp_path / name / "registry")
        bundle = record_with(key, "one machine", registry, tmp_path / name / "bundle")
        before = tree_digest(bundle)
        for other in (None, first, second):
            again = record_with(other, "another machine", registry, tmp_path / name / "again")
            assert tree_digest(again) == before
        assert (again / "record.sig").exists() == bool(key)
        if key:
            written = [(again / file).read_bytes() for file in ("record.json", "record.sig")]
            assert contradiction(*written, public) is None


def test_every_flipped_bit_of_a_signature_is_seen(signed):
    registry, _, public = signed
    record, signature = registry.read("one", "record.json"), registry.read("one", "record.sig")
    assert contradiction(record, signature, public) is None
    for position in range(0, len(signature), 9):
        changed = bytearray(signature)
        changed[position] ^= 1
        assert contradiction(record, bytes(changed), public), position
    for odd in (b"", b"{}", b"null", b"\xff", b'{"verificationMaterial": {"publicKey": {"hint": null}}}'):
        assert contradiction(record, odd, public).what.startswith("is damaged")


def test_a_flipped_byte_of_the_signature_is_named_by_the_audit(signed):
    registry, bundle, public = signed
    content = bytearray((bundle / "record.sig").read_bytes())
    content[-20] ^= 1
    recommit(registry, "one", {"record.sig": bytes(content)})
    assert signature_check(audit(registry, "one", public)) == [
        "is damaged, or the signature of another record"
    ]


def test_a_signature_that_git_cannot_read_is_named_without_a_key(signed):
    registry, _, public = signed
    oid = git("rev-parse", "refs/tags/run/one:record.sig", folder=registry.url).decode().strip()
    loose = Path(registry.url) / "objects" / oid[:2] / oid[2:]
    flip(loose, loose.stat().st_size // 2)
    for key in (None, public):
        report = audit(registry, "one", key)
        assert named(report) == {("record", "record.sig")}


def test_a_forged_record_with_a_digest_that_fits_is_named(signed):
    registry, bundle, public = signed

    def polish(record):
        record["predicate"]["steps"][0]["seconds"] = 1.0

    assert forge(registry, bundle, polish).proven  # whoever may move tags can do this
    report = audit(registry, "one", public)
    assert named(report) == {("record", "record.sig")}
    assert json.loads(json.dumps(report.to_json()))["proven"] is False


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN EC PRIVATE KEY-----\nAAAA\n", "public"])
def test_a_key_that_is_none_is_one_line(signed, tmp_path, monkeypatch, content):
    registry, _, public = signed
    key = tmp_path / "broken.pem"
    if content is not None:
        key.write_bytes(public.read_bytes() if content == "public" else content)
    monkeypatch.setenv("UNLABELED_SIGNING_KEY", str(key))
    with pytest.raises(InputError, match=r"UNLABELED_SIGNING_KEY=.*broken\.pem is no private key") as error:
        record_run(registry, tmp_path / "two", "two", seed=1)
    assert "\n" not in str(error.value)
    assert [row["run"] for row in registry.runs()] == ["one"]
    if content != "public":
        with pytest.raises(InputError, match=r"broken\.pem is no public key in PEM"):
            audit(registry, "one", key)


def test_a_damaged_signature_is_named_without_a_key_too(signed):
    registry, _, _ = signed
    oid = git("rev-parse", "refs/tags/run/one:record.sig", folder=registry.url).decode().strip()
    flip(Path(registry.url) / "objects" / oid[:2] / oid[2:])
    [report] = verify(registry)
    assert ("record", "record.sig") in named(report) and ("record", "record.sig") in named(
        audit(registry, "one")
    )


def test_a_wrong_signing_key_is_told_before_anything_runs(tmp_path):
    environment = {**os.environ, "UNLABELED_SIGNING_KEY": str(tmp_path / "none.pem")}
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "run",
        "--profile",
        "smoke",
        "--workspace",
        tmp_path / "ws",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "is no private key that signs" in done.stderr
    assert not list((tmp_path / "ws").glob("runs/*"))
