"""The registry with its remote on a real S3 server: juicefs' gateway, MinIO's S3 layer over SQLite and files."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from git_server import git_server
from lineage_bundle import record_run
from served_bundle import head, serve
from test_registry import no_export  # noqa: F401  (a fixture)
from tls_proxy import https, self_signed

from serving.follow import bring
from serving.index import Index
from unlabeled.digest import file_digest, tree_digest
from unlabeled.errors import InputError
from unlabeled.lineage.audit import audit
from unlabeled.lineage.promotion import at_stage, promote
from unlabeled.lineage.registry import Registry
from unlabeled.lineage.verification import verify

USER, PASSWORD, REMOTE = "recorder", "correct-horse", "s3://runs/store"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    """A running S3 server with an empty bucket `runs`; its address and its process."""
    room, juicefs = tmp_path_factory.mktemp("s3"), Path(sys.executable).with_name("juicefs")
    meta = f"sqlite3://{room}/meta.db"
    storage = ("--storage", "file", "--bucket", f"{room}/data")
    subprocess.run([juicefs, "format", "--quiet", *storage, meta, "runs"], check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        "MINIO_ROOT_USER": USER,
        "MINIO_ROOT_PASSWORD": PASSWORD,
        "HOME": str(room),
        "PATH": "/usr/bin",
    }
    command = [juicefs, "gateway", "--no-usage-report", "--cache-dir", f"{room}/cache", meta, address]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", int(address.split(":")[1]))) == 0:
                    break
            time.sleep(0.1)
        yield f"http://{address}", server
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def credentials(gateway, monkeypatch, tmp_path):
    """The usual variables, and no configuration of the user's."""
    for name, value in (
        ("AWS_ENDPOINT_URL", gateway[0]), ("AWS_ACCESS_KEY_ID", USER), ("AWS_SECRET_ACCESS_KEY", PASSWORD),
        ("AWS_DEFAULT_REGION", "us-east-1"), ("AWS_CONFIG_FILE", str(tmp_path / "none")),
        ("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "dvc")),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)


def client():
    from botocore.session import Session

    return Session().create_client("s3")


@pytest.mark.slow
def test_a_promotion_comes_from_a_registry_of_two_urls(gateway, credentials, monkeypatch, tmp_path):
    """As in a cluster: git and objects on S3, both by HTTPS; recorded, promoted and brought from three places."""
    certificate = self_signed(tmp_path / "certificate.pem")
    subprocess.run(["git", "init", "-q", "--bare", tmp_path / "hosted" / "runs.git"], check=True)
    served = {run: serve(tmp_path / run, head(seed), head(seed)) for seed, run in enumerate(("one", "two"))}
    repository = tmp_path / "models" / "repository"
    with (
        git_server(tmp_path / "hosted") as plain,
        https(plain, certificate) as url,
        https(gateway[0], certificate) as store,
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", store)

        def registry():
            return Registry(f"{url}/runs.git", "s3://runs/promoted")

        # Neither is trusted before its authority is named.
        for authority in ("GIT_SSL_CAINFO", "AWS_CA_BUNDLE"):
            with pytest.raises(InputError, match="certificate"):
                record_run(registry(), tmp_path / f"before-{authority}", "untrusted", 0)
            monkeypatch.setenv(authority, str(certificate))

        for seed, run in enumerate(served):
            record_run(registry(), tmp_path / f"run-{run}", run, seed, served=served[run])
        following, brought = registry(), []
        for replaced, run in ((None, "one"), ("one", "two")):
            promoting = registry()
            holder = at_stage(promoting, "prod")
            assert (holder and holder.run) == replaced
            promotion = promote(promoting, run, "prod", holder)
            following.refresh()
            assert at_stage(following, "prod") == promotion
            brought.append(bring(following, promotion, repository))
    assert [number for number, _ in brought] == [1, 2]
    for (number, index), bundle in zip(brought, served.values(), strict=True):
        assert index.models == Index(bundle / "index").models
        for kind in index.models:
            recorded = bundle / "repository" / kind / "1" / "model.onnx"
            assert file_digest(repository / kind / str(number) / "model.onnx") == file_digest(recorded)


@pytest.mark.slow
def test_a_registry_on_s3(gateway, credentials, monkeypatch, tmp_path, no_export):  # noqa: F811
    registry = Registry(str(tmp_path / "git"), REMOTE)
    bundle = record_run(registry, tmp_path / "one", "one")
    assert audit(registry, "one").proven
    registry.fetch("one", tmp_path / "fetched")
    assert tree_digest(tmp_path / "fetched") == tree_digest(bundle)

    oid = registry.objects("one")["methods/simclr/labels/labels.parquet"]
    place = {"Bucket": "runs", "Key": f"store/files/md5/{oid[:2]}/{oid[2:]}"}
    untouched = client().get_object(**place)["Body"].read()
    client().put_object(**place, Body=bytes([untouched[0] ^ 1]) + untouched[1:])
    # The labels of the selected method lie in the bundle twice, as one object.
    for report in (audit(registry, "one"), *verify(registry)):
        found = {(difference.step, difference.file) for difference in report.differences}
        assert ("self_label/simclr", "methods/simclr/labels/labels.parquet") in found
        assert {Path(file).name for _, file in found} == {"labels.parquet"}
    assert registry.push("one", bundle)["mended"] == [oid]
    client().delete_object(**place)
    assert all(
        "is missing in the store" in difference.what for difference in audit(registry, "one").differences
    )
    registry.push("one", bundle)
    assert audit(registry, "one").proven

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    told(registry, tmp_path / "two", "Forbidden; check its credentials")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    told(registry, tmp_path / "three", "Unable to locate credentials")
    # DVC's own configuration does as well, for the remote named `store`.
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    (tmp_path / "dvc").mkdir()
    settings = f"url = {REMOTE}\nendpointurl = {gateway[0]}\naccess_key_id = {USER}\nsecret_access_key = {PASSWORD}\n"
    (tmp_path / "dvc" / "config").write_text(f"['remote \"store\"']\n{settings}")
    assert audit(registry, "one").proven
    gateway[1].kill()
    gateway[1].wait()
    told(registry, tmp_path / "four", "Could not connect to the endpoint URL")


def told(registry, work, reason):
    """What cannot be reached is one line, from who records and from who audits, and no run is recorded."""
    for call in (lambda: record_run(registry, work, work.name, seed=1), lambda: audit(registry, "one")):
        with pytest.raises(
            InputError, match=rf"cannot read the DVC remote s3://runs/store: .*{reason}"
        ) as error:
            call()
        assert "\n" not in str(error.value)
    assert [row["run"] for row in registry.runs()] == ["one"]
