"""The registry: real git, real DVC."""

import http.server
import json
import multiprocessing
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from lineage_bundle import KINDS, flip, record_run, run_steps

from unlabeled.digest import dvc_digest, tree_digest
from unlabeled.errors import CheckFailed, InputError
from unlabeled.files import read_json
from unlabeled.lineage import commit
from unlabeled.lineage import git as git_module
from unlabeled.lineage import registry as registry_module
from unlabeled.lineage.audit import audit
from unlabeled.lineage.commit import is_folder
from unlabeled.lineage.git import git
from unlabeled.lineage.promotion import find_run
from unlabeled.lineage.record import record
from unlabeled.lineage.registry import Registry, reference_table
from unlabeled.lineage.store import Store
from unlabeled.lineage.verification import verify

FORK = multiprocessing.get_context("fork")


def objects_of(registry):
    return {path: path.read_bytes() for path in Path(registry.remote).rglob("*") if path.is_file()}


def stored(registry, run, name):
    oid = registry.objects(run)[name]
    return Path(registry.remote) / "files" / "md5" / oid[:2] / oid[2:]


def sound(registry, run):
    """Every check of the audit holds, but for the ONNX file, which is none in these runs."""
    checks = {check.claim: check for check in audit(registry, run).checks}
    assert len(checks) == 6
    return all(check.proven for claim, check in checks.items() if "ONNX" not in claim)


@pytest.fixture(autouse=True)
def no_export(monkeypatch):
    # The ONNX files of these runs are random bytes; test_audit holds the real comparison.
    monkeypatch.setitem(sys.modules, "unlabeled.export.parity", type(sys)("parity"))
    sys.modules["unlabeled.export.parity"].onnx_equals_checkpoint = lambda *artifacts: []


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A registry with two runs, read only."""
    work = tmp_path_factory.mktemp("two")
    registry = Registry.embedded(work / "registry")
    bundles = [record_run(registry, work / name, name, seed) for seed, name in enumerate(("run-a", "run-b"))]
    return registry, bundles


def test_runs_come_newest_first(two):
    registry, bundles = two
    rows = registry.runs()
    assert [row["run"] for row in rows] == ["run-b", "run-a"]
    for row, bundle in zip(rows, reversed(bundles)):
        record = read_json(bundle / "record.json")
        assert row["digest"] == record["digest"]
        assert row["started"] == record["predicate"]["runDetails"]["metadata"]["startedOn"]
        assert row["data"]["source"] == "mini"
        assert row["selected"] == "simclr"
    assert rows[0]["started"] > rows[1]["started"]
    assert registry.show("run-a") == read_json(bundles[0] / "record.json")


def test_a_run_that_began_with_steps_from_the_cache_is_the_newest(tmp_path):
    registry = Registry.embedded(tmp_path / "registry")
    first = run_steps(tmp_path / "first", seed=0)
    other = run_steps(tmp_path / "other", seed=1)
    last = run_steps(tmp_path / "last", seed=0, changed="finetune")
    cached = {name: first[name] for name in ("raw", "table")}
    for name, artifacts in (("first", first), ("other", other), ("last", {**last, **cached})):
        data = {"source": "mini", "digest": dvc_digest(artifacts["raw"].path), "reference": ""}
        address = registry.url, registry.remote, tmp_path / "bundles" / name
        record(name, artifacts, {"data": "mini"}, data, *address)
    rows = registry.runs()
    assert [row["run"] for row in rows] == ["last", "other", "first"]
    assert rows[0]["started"] == rows[2]["started"] < rows[1]["started"]
    assert find_run(registry, "") == "last"


def test_an_absent_registry_holds_no_runs_and_reading_creates_nothing(tmp_path):
    registry = Registry.embedded(tmp_path / "registry")
    assert registry.runs() == []
    with pytest.raises(InputError, match="no run 'x' in the registry; it holds no run yet"):
        registry.show("x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["show", "objects", "files"])
def test_an_unknown_run_is_named_with_its_nearest(two, call):
    with pytest.raises(InputError, match="no run 'run-aa' in the registry; did you mean 'run-a'"):
        getattr(two[0], call)("run-aa")


@pytest.mark.parametrize("run", ["", "../run-a", "run-a^", "-h", "run-a:record.json", "RUN-A", "run"])
def test_what_git_would_read_as_something_else_is_no_run(two, run):
    with pytest.raises(InputError, match="no run"):
        two[0].show(run)


def test_a_folder_that_is_no_registry(tmp_path):
    (tmp_path / "git").mkdir()
    (tmp_path / "git" / "notes.txt").write_text("hello")
    registry = Registry.embedded(tmp_path)
    with pytest.raises(InputError, match=r"is no registry: .*not a git repository"):
        registry.runs()
    with pytest.raises(InputError, match="not a git repository"):
        record_run(registry, tmp_path / "work", "one")
    assert sorted(path.name for path in (tmp_path / "git").iterdir()) == ["notes.txt"]


def test_a_url_that_leads_nowhere(tmp_path):
    with pytest.raises(InputError, match=r"is no registry"):
        Registry(f"file://{tmp_path}/nothing", str(tmp_path / "store")).runs()
    registry = Registry(str(tmp_path / "git"), "nosuch://bucket/path")
    with pytest.raises(InputError, match="cannot use nosuch://bucket/path as a DVC remote"):
        record_run(registry, tmp_path / "work", "one")
    assert registry.runs() == []


@pytest.mark.parametrize(
    ("scheme", "told"), [("http", "too slow"), ("git", "does not answer"), ("ssh", "timed out")]
)
def test_a_server_that_never_answers_is_given_up(monkeypatch, scheme, told):
    if scheme == "ssh" and not shutil.which("ssh"):
        pytest.skip("no ssh here")
    monkeypatch.setattr("unlabeled.lineage.git.STALLED_SECONDS", 1)
    monkeypatch.setattr("unlabeled.lineage.git.ANSWER_SECONDS", 1 if scheme == "git" else 20)
    monkeypatch.setattr(
        "unlabeled.lineage.git.SSH", git_module.SSH.replace("ConnectTimeout=30", "ConnectTimeout=1")
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it is connected to, and says nothing
        url = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/registry.git"
        with pytest.raises(InputError, match=told):
            git("ls-remote", url)


def test_what_the_user_runs_as_ssh_is_run(monkeypatch, tmp_path):
    monkeypatch.setattr("unlabeled.lineage.git.ANSWER_SECONDS", 20)
    (tmp_path / "config").write_text("[core]\n sshCommand = echo mine >&2; false\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    with pytest.raises(InputError, match="mine"):
        git("ls-remote", "ssh://127.0.0.1:1/registry.git")


def test_git_asks_nobody_for_input(monkeypatch):
    seen = {}
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **named: seen.update(named) or run(*a, **named))
    git("--version")
    assert seen["stdin"] == subprocess.DEVNULL


@pytest.mark.parametrize("run", ["a b", "a..b", "a:b", "a~", "a.lock", "", "a/"])
def test_a_name_that_git_refuses(tmp_path, run):
    registry = Registry.embedded(tmp_path / "registry")
    with pytest.raises(InputError, match="cannot name a run"):
        record_run(registry, tmp_path / "work", run)
    assert not (tmp_path / "registry").exists()


def test_fetch_gives_the_bundle_back(two, tmp_path):
    registry, bundles = two
    fetched = registry.fetch("run-a", tmp_path / "all")
    assert tree_digest(tmp_path / "all") == tree_digest(bundles[0])
    assert len(fetched) == sum(path.is_file() for path in bundles[0].rglob("*"))
    registry.fetch("run-a", tmp_path / "some", ["methods/simclr", "table/table.parquet"])
    some = sorted(
        path.relative_to(tmp_path / "some").as_posix()
        for path in (tmp_path / "some").rglob("*")
        if path.is_file()
    )
    assert some[0] == "methods/simclr/evaluation/evaluation.json"
    assert some[-1] == "table/table.parquet"
    assert len(some) == 7
    with pytest.raises(InputError, match="run run-a has no artifact 'tabel'; did you mean 'table'"):
        registry.fetch("run-a", tmp_path / "none", ["tabel"])
    # A copy: the store stays as it is whatever is done to it.
    flip(tmp_path / "all" / "table" / "images.npy")
    assert sound(registry, "run-a")


def test_fetch_refuses_what_is_damaged_or_missing(tmp_path):
    registry = Registry.embedded(tmp_path / "registry")
    record_run(registry, tmp_path / "work", "one")
    flip(stored(registry, "one", "table/images.npy"))
    with pytest.raises(CheckFailed, match=r"run one: table/images\.npy is damaged"):
        registry.fetch("one", tmp_path / "out", ["table"])
    assert not (tmp_path / "out" / "table" / "images.npy").exists()
    stored(registry, "one", "table/images.npy").unlink()
    with pytest.raises(CheckFailed, match=r"run one: table/images\.npy is missing"):
        registry.fetch("one", tmp_path / "out", ["table"])


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "raw/../../escaped"])
def test_fetch_writes_nothing_outside_its_folder(two, tmp_path, monkeypatch, name):
    registry, _ = two
    record = registry.show("run-a")
    record["subject"][0]["name"] = name
    monkeypatch.setattr(registry, "show", lambda run: record)
    with pytest.raises(InputError, match="leads out of the bundle"):
        registry.fetch("run-a", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_reference_table(two):
    registry, bundles = two
    with reference_table("", "", "") as nothing:
        assert nothing is None
    with reference_table(registry.url, registry.remote, "run-b") as table:
        assert table.read_bytes() == (bundles[1] / "table" / "table.parquet").read_bytes()
    with (
        pytest.raises(InputError, match="no run 'run-c'"),
        reference_table(registry.url, registry.remote, "run-c"),
    ):
        pass


def test_recording_again_changes_nothing_and_another_run_of_that_name_is_refused(tmp_path):
    registry = Registry.embedded(tmp_path / "registry")
    bundle = record_run(registry, tmp_path / "one", "one")
    before = git("rev-parse", "refs/tags/run/one", folder=registry.url), objects_of(registry)
    assert registry.push("one", bundle)["mended"] == []
    assert (git("rev-parse", "refs/tags/run/one", folder=registry.url), objects_of(registry)) == before
    with pytest.raises(InputError, match="run one is recorded already, with other content"):
        record_run(registry, tmp_path / "two", "one", seed=1)
    assert git("rev-parse", "refs/tags/run/one", folder=registry.url) == before[0]
    assert sound(registry, "one")


def test_recording_again_on_another_machine_keeps_the_record_that_is_there(tmp_path, monkeypatch):
    artifacts = run_steps(tmp_path / "steps")
    data = {"source": "mini", "digest": dvc_digest(artifacts["raw"].path), "reference": ""}
    registry = Registry.embedded(tmp_path / "registry")

    def record_here(bundle, url, seed=0):
        parameters = {"data": "mini", "seed": seed}
        return record("one", artifacts, parameters, data, url, registry.remote, tmp_path / bundle)

    first = record_here("first", registry.url)
    before = git("rev-parse", "refs/tags/run/one", folder=registry.url), objects_of(registry)
    monkeypatch.setattr(platform, "platform", lambda: "another kernel")
    unrecorded = tmp_path / "unrecorded"
    assert record("one", artifacts, {"data": "mini"}, data, "", "", unrecorded)["digest"] != first["digest"]
    # In a folder it is read as it is; by a URL through a mirror, which a new tag does not show in.
    for bundle, url in (("second", registry.url), ("third", f"file://{registry.url}")):
        assert record_here(bundle, url) == first
        assert tree_digest(tmp_path / bundle) == tree_digest(tmp_path / "first")
    with pytest.raises(InputError, match="run one is recorded already, with other content"):
        record_here("other", registry.url, seed=1)
    assert (git("rev-parse", "refs/tags/run/one", folder=registry.url), objects_of(registry)) == before
    assert sound(registry, "one")


def test_a_bundle_that_is_not_what_its_record_says_is_not_recorded(tmp_path):
    registry = Registry.embedded(tmp_path / "registry")
    bundle = record_run(None, tmp_path / "one", "one")
    flip(bundle / "index" / "index.npz")
    with pytest.raises(CheckFailed, match="comes back changed"):
        registry.push("one", bundle)
    assert registry.runs() == []


def test_the_store_is_independent_of_the_bundle(tmp_path):
    registry = Registry.embedded(tmp_path / "registry")
    bundle = record_run(registry, tmp_path / "one", "one")
    for name in KINDS:
        flip(bundle / name)
        assert os.access(bundle / name, os.W_OK)
    assert sound(registry, "one")


def test_the_next_record_mends_what_it_shares(tmp_path):
    registry = Registry.embedded(tmp_path / "registry")
    bundle = record_run(registry, tmp_path / "one", "one")
    flip(stored(registry, "one", "raw/train-images-idx3-ubyte"))
    stored(registry, "one", "raw").unlink()
    assert not sound(registry, "one")
    assert registry.push("one", bundle)["mended"] == [registry.objects("one")["raw/train-images-idx3-ubyte"]]
    assert sound(registry, "one")


def test_a_broken_record_is_one_line_and_leaves_the_others_readable(tmp_path):
    registry = Registry.embedded(tmp_path / "registry")
    for number, name in enumerate(("one", "two")):
        record_run(registry, tmp_path / name, name, seed=number)
    recommit(registry, "one", {"record.json": b"{"})
    with pytest.raises(InputError, match="the record of run one is broken: Expecting") as error:
        registry.show("one")
    assert "\n" not in str(error.value)
    rows = {row["run"]: row for row in registry.runs()}
    assert "broken" in rows["one"]["error"]
    assert rows["two"]["selected"] == "simclr"
    assert sound(registry, "two")
    recommit(registry, "one", {"record.json": b'{"_type": "x"}'})
    with pytest.raises(InputError, match="the record of run one is broken"):
        registry.show("one")
    recommit(registry, "one", {"record.json": None})
    with pytest.raises(InputError, match=r"cannot give record\.json of run one"):
        registry.show("one")


def recommit(registry, run, changes, folder=None):
    """Move a run's tag to a commit with changed files, as someone with write access could."""
    clone = Path(registry.url).parent / "forger"
    subprocess.run(["rm", "-rf", clone], check=True)
    git("clone", "--quiet", registry.url, str(clone))
    git("checkout", "--quiet", f"run/{run}", folder=clone)
    for name, content in changes.items():
        if content is None:
            (clone / name).unlink()
        else:
            (clone / name).write_bytes(content)
    git("add", "--all", "--force", folder=clone)
    git("commit", "--quiet", "--message", "forged", folder=clone)
    git("tag", "--force", f"run/{run}", folder=clone)
    git("push", "--quiet", "--force", registry.url, f"refs/tags/run/{run}", folder=clone)


def test_a_production_registry_with_other_content_and_another_branch(tmp_path):
    url, work = tmp_path / "hosted.git", tmp_path / "clone"
    git("init", "--quiet", "--bare", "--initial-branch=trunk", str(url))
    git("clone", "--quiet", str(url), str(work))
    (work / "CODEOWNERS").write_text("* @team\n")
    git("add", "--all", folder=work)
    git("commit", "--quiet", "--message", "start", folder=work)
    git("push", "--quiet", "origin", "HEAD:trunk", folder=work)
    registry = Registry(f"file://{url}", str(tmp_path / "store"))
    record_run(registry, tmp_path / "one", "one")
    record_run(registry, tmp_path / "two", "two", seed=1)
    assert [row["run"] for row in registry.runs()] == ["two", "one"]
    parents = git("log", "--format=%s", "run/two", folder=url).decode().split("\n")
    assert parents[:2] == ["Record run two", "start"]
    assert git("for-each-ref", "--format=%(refname)", folder=url).decode().split() == [
        "refs/heads/trunk", "refs/tags/run/one", "refs/tags/run/two",
    ]  # fmt: skip
    assert all(audit(registry, "one").checks[number].proven for number in range(1, 5))


class _ObjectServer(http.server.BaseHTTPRequestHandler):
    """The least that DVC takes for an HTTP remote."""

    objects: ClassVar[dict[str, bytes]] = {}

    def do_POST(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            content = self.rfile.read(int(self.headers["Content-Length"]))
        self.objects[self.path] = content
        self.answer(200, b"")

    def do_GET(self):
        found = self.objects.get(self.path)
        self.answer(404 if found is None else 200, found or b"")

    do_HEAD = do_GET

    def answer(self, status, content):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def test_a_remote_that_is_no_folder(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _ObjectServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        registry = Registry(str(tmp_path / "git"), f"http://127.0.0.1:{server.server_port}/store")
        bundle = record_run(registry, tmp_path / "one", "one")
        assert sound(registry, "one")
        registry.fetch("one", tmp_path / "fetched", ["raw"])
        assert tree_digest(tmp_path / "fetched" / "raw") == tree_digest(bundle / "raw")
        oid = registry.objects("one")["table/images.npy"]
        [path] = [path for path in _ObjectServer.objects if path.endswith(oid[2:])]
        _ObjectServer.objects[path] = b"other bytes"
        [difference] = audit(registry, "one").differences
        assert (difference.step, difference.file) == ("ingest", "table/images.npy")
        assert registry.push("one", bundle)["mended"] == [oid]
        del _ObjectServer.objects[path]
        assert "is missing in the store" in audit(registry, "one").differences[0].what
        (tmp_path / "file").touch()
        with pytest.raises(
            InputError, match=r"cannot bring raw/.* of run one into .*file: .*Not a directory"
        ):
            registry.fetch("one", tmp_path / "file", ["raw"])
    finally:
        server.shutdown()
        server.server_close()
    for read in (lambda: audit(registry, "one"), lambda: list(verify(registry))):
        with pytest.raises(
            InputError, match=rf"cannot read the DVC remote {registry.remote}: Cannot connect"
        ):
            read()


def test_no_registry_is_not_a_sound_one(tmp_path):
    with pytest.raises(InputError, match=r"there is no registry at .*typo"):
        list(verify(Registry(str(tmp_path / "typo.git"), str(tmp_path / "store"))))


READS = {
    "verify": lambda registry, folder: list(verify(registry)),
    "audit": lambda registry, folder: audit(registry, "run-a"),
    "fetch": lambda registry, folder: registry.fetch("run-a", folder),
}


@pytest.mark.parametrize("name", ["nothing", "file"])
@pytest.mark.parametrize("read", READS)
def test_a_mistyped_remote_is_no_damage(two, tmp_path, read, name):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"^no DVC remote at {tmp_path / name}$"):
        READS[read](Registry(two[0].url, str(tmp_path / name)), tmp_path / "fetched")
    assert not (tmp_path / "nothing").exists()


def test_an_empty_remote_is_damage(two, tmp_path):
    (tmp_path / "empty").mkdir()
    registry = Registry(two[0].url, str(tmp_path / "empty"))
    assert [report.proven for report in verify(registry)] == [False, False]
    assert "is missing in the store" in audit(registry, "run-a").differences[0].what
    with pytest.raises(CheckFailed, match="is missing in the registry's store"):
        registry.fetch("run-a", tmp_path / "fetched")


def test_hostile_git_settings_of_the_user_change_nothing(tmp_path, monkeypatch):
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in ("pre-commit", "pre-push"):
        (hooks / name).write_text("#!/bin/sh\nexit 1\n")
        (hooks / name).chmod(0o755)
    (tmp_path / "ignore").write_text("*.json\n*.dvc\n")
    settings = f"[core]\n autocrlf = true\n hooksPath = {hooks}\n excludesFile = {tmp_path}/ignore\n"
    settings += f' attributesFile = {tmp_path}/attributes\n[filter "no"]\n clean = false\n required = true\n'
    settings += "[commit]\n gpgSign = true\n[tag]\n gpgSign = true\n[push]\n gpgSign = true\n"
    (tmp_path / "attributes").write_text("* filter=no\n")
    (tmp_path / "config").write_text(settings + "[init]\n defaultBranch = other\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    registry = Registry.embedded(tmp_path / "registry")
    record_run(registry, tmp_path / "one", "one")
    assert sound(registry, "one")


def test_a_folder_is_told_from_an_url_as_git_does(tmp_path, monkeypatch):
    assert [is_folder(url) for url in ("ws/git", "/home/a@b/git", "./a:b/git")] == [True] * 3
    assert not any(is_folder(url) for url in ("git@host:runs.git", "host:runs.git", "https://host/runs.git"))
    monkeypatch.chdir(tmp_path)
    registry = Registry("us@here/git", "us@here/store")
    record_run(registry, tmp_path / "one", "one")
    monkeypatch.chdir("/")
    assert sound(registry, "one") and (tmp_path / "us@here" / "git").is_dir()


def _record(folder, work, run, seed, barrier, queue):
    barrier.wait()
    try:
        record_run(Registry.embedded(folder), Path(work), run, seed)
        queue.put("")
    except BaseException as error:
        queue.put(f"{run}: {error!r}")


def record_at_once(tmp_path, count):
    """Record `count` runs at once, each in its own process, into a registry that does not exist yet."""
    folder, barrier, queue = tmp_path / "registry", FORK.Barrier(count), FORK.Queue()
    # Pairs of runs share data and artifacts: their recorders bring the same objects.
    jobs = [(folder, tmp_path / f"work-{n}", f"run-{n}", n // 2, barrier, queue) for n in range(count)]
    processes = [FORK.Process(target=_record, args=job) for job in jobs]
    for process in processes:
        process.start()
    failures = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert failures == [""] * count
    registry = Registry.embedded(folder)
    assert sorted(row["run"] for row in registry.runs()) == [f"run-{n}" for n in range(count)]
    assert all(sound(registry, f"run-{n}") for n in range(count))
    heads = git("for-each-ref", "--format=%(refname)", "refs/heads", folder=registry.url).decode().split()
    assert heads == ["refs/heads/main"]


def test_two_recorders_at_once(tmp_path):
    record_at_once(tmp_path, 2)


@pytest.mark.slow
def test_eight_recorders_at_once(tmp_path):
    record_at_once(tmp_path, 8)


def _record_again(folder, bundle, machine, artifacts, barrier, queue):
    platform.platform = lambda: machine
    data = {"source": "mini", "digest": dvc_digest(artifacts["raw"].path), "reference": ""}
    registry = Registry.embedded(folder)
    barrier.wait()
    try:
        result = record("one", artifacts, {"data": "mini"}, data, registry.url, registry.remote, bundle)
        queue.put(result["digest"])
    except BaseException as error:
        queue.put(repr(error))


def test_recorders_of_one_run_on_four_machines_at_once_agree(tmp_path):
    artifacts, folder = run_steps(tmp_path / "steps"), tmp_path / "registry"
    barrier, queue = FORK.Barrier(4), FORK.Queue()
    bundles = [tmp_path / f"bundle-{n}" for n in range(4)]
    processes = [
        FORK.Process(target=_record_again, args=(folder, bundle, bundle.name, artifacts, barrier, queue))
        for bundle in bundles
    ]
    for process in processes:
        process.start()
    digests = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    registry = Registry.embedded(folder)
    assert digests == {registry.show("one")["digest"]}
    assert {(bundle / "record.json").read_bytes() for bundle in bundles} == {
        registry.read("one", "record.json")
    }
    assert sound(registry, "one")


def _die_at(point, folder, bundle, run):
    """Push a run, and be killed before the given call of git or of the store's transport."""
    calls = 0.0

    def counted(function, weight=1.0):
        def call(*arguments, **named):
            nonlocal calls
            calls += weight
            if calls >= point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    registry_module.git = commit.git = counted(commit.git)
    os.rename = counted(os.rename)
    # An object's bytes are there, its name is not; there are many, so that some are left out.
    os.replace = counted(os.replace, weight=0.125)
    Store._send, Store._damaged = counted(Store._send), counted(Store._damaged)
    Registry.embedded(folder).push(run, bundle)


@pytest.mark.slow
def test_killed_at_any_point_the_registry_is_valid_and_the_next_record_lands(tmp_path):
    bundles = [record_run(None, tmp_path / f"work-{n}", f"run-{n}", seed=n) for n in range(2)]
    recorded_points = []
    for point in range(1, 200):
        folder = tmp_path / f"registry-{point}"
        process = FORK.Process(target=_die_at, args=(point, folder, bundles[0], "run-0"))
        process.start()
        process.join()
        registry = Registry.embedded(folder)
        names = [row["run"] for row in registry.runs()]
        # A tag that is there has everything that belongs to it.
        assert names in ([], ["run-0"])
        if names:
            recorded_points.append(point)
            assert sound(registry, "run-0")
        if process.exitcode == 0:
            break
        if point % 3 == 0 or names:
            registry.push("run-1", bundles[1])
            assert sound(registry, "run-1")
        registry.push("run-0", bundles[0])
        assert sound(registry, "run-0")
        assert not any("error" in row for row in registry.runs())
        git("fsck", "--strict", folder=registry.url)
        subprocess.run(["rm", "-rf", folder], check=True)
    assert process.exitcode == 0
    assert point > 20
    assert len(recorded_points) >= 2  # killed between the tag and the end, and not killed


def run_dvc(*arguments, cwd):
    # A settled environment: no analytics, no look for updates, a cache of its own.
    environment = {
        **os.environ,
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(cwd.parent / "dvc-site"),
        "CI": "1",
    }
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.slow
def test_dvc_works_on_the_registry_from_outside(two, tmp_path):
    registry, bundles = two
    run_dvc(
        "get",
        registry.url,
        "methods/simclr/model",
        "--rev",
        "run/run-a",
        "-o",
        str(tmp_path / "model"),
        cwd=tmp_path,
    )
    assert tree_digest(tmp_path / "model") == tree_digest(bundles[0] / "methods" / "simclr" / "model")
    clone = tmp_path / "clone"
    git("clone", "--quiet", registry.url, str(clone))
    metrics = json.loads(run_dvc("metrics", "diff", "run/run-a", "run/run-b", "--json", cwd=clone))
    assert metrics["metrics.json"]["simclr.knn"] == {
        "old": 0.81,
        "new": 0.811,
        "diff": pytest.approx(0.001),
    }
    parameters = json.loads(run_dvc("params", "diff", "run/run-a", "run/run-b", "--json", cwd=clone))
    assert parameters["params.yaml"] == {"seed": {"old": 0, "new": 1, "diff": 1}}
    git("checkout", "--quiet", "run/run-b", folder=clone)
    run_dvc("pull", cwd=clone)
    for name in ("raw", "table", "repository", "methods"):
        assert tree_digest(clone / name) == tree_digest(bundles[1] / name)
    assert "up to date" in run_dvc("status", cwd=clone)
    assert "in sync" in run_dvc("status", "--cloud", cwd=clone)
    assert git("status", "--porcelain", folder=clone) == b""
    git("tag", "--annotate", "--message", "first", "encoder@v1.0.0", "run/run-a^{commit}", folder=clone)
    git("push", "--quiet", "origin", "encoder@v1.0.0", folder=clone)
    run_dvc(
        "artifacts",
        "get",
        registry.url,
        "encoder",
        "--rev",
        "v1.0.0",
        "-o",
        str(tmp_path / "encoder"),
        cwd=tmp_path,
    )
    assert tree_digest(tmp_path / "encoder") == tree_digest(bundles[0] / "model")
    assert [row["run"] for row in registry.runs()] == ["run-b", "run-a"]


@pytest.mark.slow
def test_dvc_add_would_have_written_the_same_pointers_and_objects(two, tmp_path):
    from dvc.repo import Repo

    registry, _ = two
    clone = tmp_path / "clone"
    registry.fetch("run-a", clone)
    pointers = yaml.safe_load((clone / "bundle.dvc").read_text())["outs"]
    (clone / "bundle.dvc").unlink()
    (clone / "dvc.yaml").unlink()
    repository = Repo.init(str(clone), no_scm=True)
    stages = repository.add([str(clone / out["path"]) for out in pointers])
    assert [yaml.safe_load(Path(stage.path).read_text())["outs"] for stage in stages] == [
        [out] for out in pointers
    ]
    cache = clone / ".dvc" / "cache" / "files" / "md5"
    ours = Path(registry.remote) / "files" / "md5"
    theirs = {path.relative_to(cache): path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    assert all((ours / name).read_bytes() == content for name, content in theirs.items())
    assert len(theirs) == len(set(registry.objects("run-a").values()))
    repository.close()
