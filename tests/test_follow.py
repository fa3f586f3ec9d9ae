"""Following a stage: promoted versions come into a live Triton under load, and what does not answer goes back."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError

import numpy as np
import pytest
from google.protobuf import text_format
from lineage_bundle import flip, record_run
from served_bundle import OUTPUTS, head, serve
from tritonclient.grpc.model_config_pb2 import ModelWarmup

from serving import follow, rollout
from serving.client import Client
from serving.follow import Follower, bring
from serving.index import Index
from serving.repository import read_config, read_labels
from serving.rollout import place, point, prune, roll_out, served_number
from serving.server import LOOPBACK, EmbeddedTriton
from serving.soak import Soak
from unlabeled.digest import tree_digest
from unlabeled.errors import CheckFailed, InputError
from unlabeled.lineage.promotion import at_stage, promote
from unlabeled.lineage.registry import Registry

RUNS = ("first", "second", "third")
KEY = "secret"
RESTRICTED = ("--grpc-restricted-protocol=model-repository:control-key=secret",)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A registry of three runs whose answers differ. Read only."""
    work = tmp_path_factory.mktemp("recorded")
    registry = Registry.embedded(work / "registry")
    for seed, name in enumerate(RUNS):
        serve(work / name, head(seed), head(seed))
        record_run(registry, work / f"run-{name}", name, seed, served=work / name)
    return registry


@pytest.fixture
def registry(recorded, tmp_path):
    """A copy, to be promoted in."""
    shutil.copytree(Path(recorded.url).parent, tmp_path / "registry")
    return Registry.embedded(tmp_path / "registry")


@pytest.fixture
def incoming(tmp_path):
    """Return a function that makes a bundle as the follower fetches it."""

    def make(seed):
        return serve(tmp_path / "incoming" / f"{seed}-{time.monotonic_ns()}", head(seed), head(seed))

    return make


def put(registry, run):
    return promote(registry, run, "prod", at_stage(registry, "prod"))


def test_a_version_lies_beside_the_others_until_it_is_pointed_to(incoming, tmp_path):
    exported = incoming(0)
    repository = tmp_path / "repository"
    shutil.copytree(exported / "repository", repository)
    assert place(incoming(1), repository) == 2
    # What is served did not change, but is named now: a restart of the server takes no other.
    assert served_number(repository) == 1
    assert read_config(repository / "classifier" / "config.pbtxt").output[0].label_filename == "1/labels.txt"
    before = {kind: tree_digest(repository / kind / "1") for kind in OUTPUTS}
    point(repository, 2)
    assert served_number(repository) == 2
    config = read_config(repository / "classifier" / "config.pbtxt")
    assert list(config.version_policy.specific.versions) == [2]
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 32]
    labels = repository / "classifier" / config.output[0].label_filename
    assert labels.read_text().splitlines() == read_labels(exported / "repository", "classifier")
    assert {kind: tree_digest(repository / kind / "1") for kind in OUTPUTS} == before


def test_a_version_that_is_there_is_found_again_and_a_half_one_is_not(incoming, tmp_path):
    repository = tmp_path / "repository"
    assert [place(incoming(seed), repository) for seed in (0, 1, 0, 1)] == [1, 2, 1, 2]
    # What a follower that was killed left behind: a version of which one model is missing.
    shutil.rmtree(repository / "encoder" / "2")
    assert place(incoming(1), repository) == 3
    flip(repository / "encoder" / "3" / "model.onnx")
    assert place(incoming(1), repository) == 4


def configure(bundle, **fields):
    for kind in OUTPUTS:
        path = bundle / "repository" / kind / "config.pbtxt"
        config = read_config(path)
        config.MergeFrom(type(config)(**fields))
        path.write_bytes(text_format.MessageToBytes(config))
    return bundle


def test_the_same_weights_with_another_configuration_are_another_version(incoming, tmp_path):
    repository = tmp_path / "repository"
    assert place(incoming(0), repository) == 1
    assert place(configure(incoming(0), max_batch_size=8), repository) == 2
    assert read_config(repository / "encoder" / "2" / "config.pbtxt").max_batch_size == 8
    assert place(incoming(0), repository) == 1


def test_a_batch_size_is_warmed_once(incoming, tmp_path):
    repository = tmp_path / "repository"
    warm = [ModelWarmup(name=f"batch of {size}", batch_size=size) for size in (1, 8)]
    place(configure(incoming(0), model_warmup=warm), repository)
    config = read_config(repository / "encoder" / "1" / "config.pbtxt")
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 8, 32]


def test_a_number_is_never_given_again(incoming, tmp_path):
    """A response cache would answer for the models that had it before."""
    repository = tmp_path / "repository"
    assert [place(incoming(seed), repository) for seed in (0, 1, 2)] == [1, 2, 3]
    point(repository, 1)
    prune(repository, keep=[1])
    assert place(incoming(3), repository) == 4
    prune(repository, keep=[4, 1])
    assert {path.name for path in repository.glob("encoder/[0-9]*")} == {"1", "4"}


def test_a_damaged_model_never_reaches_the_repository(registry, tmp_path):
    put(registry, "first")
    object_ = registry.objects("first")["repository/classifier/1/model.onnx"]
    flip(Path(registry.remote) / "files" / "md5" / object_[:2] / object_[2:])
    repository = tmp_path / "models" / "repository"
    with pytest.raises(CheckFailed, match=r"classifier/1/model\.onnx is damaged"):
        bring(registry, at_stage(registry, "prod"), repository)
    assert not list((tmp_path / "models").rglob("*.onnx"))


def test_what_cannot_be_reached_is_said_once_and_tried_again(registry, tmp_path):
    said = []
    away = Path(registry.url).rename(tmp_path / "away")
    follower = Follower(registry, "prod", "127.0.0.1:1", tmp_path / "models" / "repository", say=said.append)
    threading.Thread(target=follower.follow, args=(0.02,), daemon=True).start()
    wait_for(lambda: said)
    time.sleep(0.2)
    assert len(said) == 1 and "holds nothing yet" in said[0]
    away.rename(registry.url)
    put(registry, "first")
    wait_for(lambda: len(said) == 2)
    assert "Triton" in said[1]


def test_whatever_the_system_refuses_does_not_end_the_follower(registry, tmp_path, monkeypatch):
    said = []
    follower = Follower(registry, "prod", "127.0.0.1:1", tmp_path / "models" / "repository", say=said.append)
    monkeypatch.setattr(registry, "refresh", lambda: Path("/proc/none").read_bytes())
    thread = threading.Thread(target=follower.follow, args=(0.02,), daemon=True)
    thread.start()
    wait_for(lambda: said or not thread.is_alive())
    assert thread.is_alive() and "/proc/none" in said[0]


def test_a_run_is_brought_once_and_only_for_a_server_that_is_there(registry, tmp_path, monkeypatch):
    put(registry, "first")
    brought = []

    def bring(asked, *_):
        # The follower of an earlier test may still look, in its thread.
        if asked is registry:
            brought.append(1)
        return 1, None

    monkeypatch.setattr(follow, "bring", bring)
    follower = Follower(registry, "prod", "127.0.0.1:1", tmp_path / "models" / "repository")
    with pytest.raises(InputError, match=r"no Triton server at 127\.0\.0\.1:1"):
        follower.look()
    assert not brought

    def refuse(*_):
        raise InputError("Triton refuses the key")

    monkeypatch.setattr(Client, "check_server", lambda self: None)
    monkeypatch.setattr(follow, "roll_out", refuse)
    for _ in range(2):
        with pytest.raises(InputError, match="refuses the key"):
            follower.look()
    assert len(brought) == 1


def test_two_processes_do_not_bring_into_one_folder_at_a_time(registry, tmp_path):
    put(registry, "first")
    repository = tmp_path / "models" / "repository"
    repository.parent.mkdir()
    arguments = (registry, at_stage(registry, "prod"), repository)
    thread = threading.Thread(target=bring, args=arguments, daemon=True)
    with open(repository.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        thread.join(3)
        assert thread.is_alive() and not repository.exists()
    thread.join(60)
    assert repository.exists()


@pytest.fixture
def switched(incoming, tmp_path, monkeypatch):
    """Version 1 served and proven, version 2 placed; the server, which is none, takes every version."""
    repository = tmp_path / "repository"
    for seed in (0, 1):
        place(incoming(seed), repository)
        if not seed:
            point(repository, 1)
    connection = SimpleNamespace(is_model_ready=lambda *_: True)
    client = SimpleNamespace(url="server", connection=connection, settings={})
    monkeypatch.setattr(rollout, "_load", lambda *_: None)
    return lambda: roll_out(repository, 2, None, client, "", 0.1), repository


def raising(error):
    def fail(*_):
        raise error

    return fail


def test_a_follower_killed_before_the_proof_goes_back_when_that_fails(switched, monkeypatch):
    roll, repository = switched
    monkeypatch.setattr(rollout, "_check_golden", raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        roll()
    assert served_number(repository) == 2
    monkeypatch.setattr(rollout, "_check_golden", raising(CheckFailed("other answers")))
    with pytest.raises(CheckFailed, match="other answers; version 1 serves again"):
        roll()
    assert served_number(repository) == 1


def test_where_going_back_fails_too_both_are_told(switched, monkeypatch):
    roll, _ = switched
    monkeypatch.setattr(rollout, "_load", raising(CheckFailed("cannot load")))
    with pytest.raises(CheckFailed, match="cannot load; version 1 is not loaded either: cannot load"):
        roll()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server(recorded, tmp_path_factory):
    """A server on what the chart's init container fetched: the first run, as export wrote it."""
    models = tmp_path_factory.mktemp("models")
    recorded.fetch("first", models, ["repository"])
    with EmbeddedTriton(models / "repository", arguments=RESTRICTED) as triton:
        yield triton


def answers_of(recorded, server, run, tmp_path):
    """The outputs that a run's models must give for the golden images."""
    recorded.fetch(run, tmp_path / run, ["index"])
    return Index(tmp_path / run / "index").golden


@pytest.mark.slow
def test_a_promoted_version_comes_into_a_live_server_under_load(registry, server, tmp_path):
    """No request fails; every answer is one version's, whole; after the switch only the new one's; and back."""
    golden = {run: answers_of(registry, server, run, tmp_path) for run in RUNS}
    images = golden["first"]["images"][:2]
    said = []
    follower = Follower(registry, "prod", server.grpc_url, server.repository, KEY, say=said.append)

    def kept():
        return {path.name for path in (server.repository / "encoder").glob("[0-9]*")}

    switched = []
    with Soak(server.grpc_url, dict.fromkeys(OUTPUTS, images), clients=3) as soak:
        # The third replaces the second; the second comes back from its folder, without a new one.
        for run, number, versions in (
            ("second", 2, {"1", "2"}),
            ("third", 3, {"2", "3"}),
            ("second", 2, {"2", "3"}),
        ):
            soak.wait(150)
            put(registry, run)
            started = time.monotonic()
            follower.look()
            switched.append((started, time.monotonic(), run))
            assert served_number(server.repository) == number and run in said[-1]
            # The version before is kept, and a follower that starts again keeps it too.
            Follower(registry, "prod", server.grpc_url, server.repository, KEY, say=said.append).look()
            assert "already" in said[-1] and kept() == versions
            soak.wait(150)
    assert len(soak.answers) >= 900
    assert [answer.error for answer in soak.answers if answer.error] == []

    def gives(answer, run):
        return np.abs(answer.output - golden[run][answer.model][:2]).max() < 1e-5

    for model in OUTPUTS:
        assert np.abs(golden["first"][model] - golden["second"][model]).max() > 1e-2
    current, allowed = "first", {}
    for answer in soak.answers:
        [given] = [run for run in RUNS if gives(answer, run)]
        during = [
            run for started, ended, run in switched if answer.started < ended and started < answer.ended
        ]
        current = ([run for _, ended, run in switched if ended <= answer.started] or ["first"])[-1]
        allowed.setdefault(given, 0)
        allowed[given] += 1
        assert given in {current, *during}
    assert set(allowed) == set(RUNS)


@pytest.mark.slow
def test_what_does_not_answer_as_its_run_goes_back(registry, server, tmp_path, monkeypatch):
    """Golden answers of another run stand for a server that computes wrongly."""
    before = served_number(server.repository)
    index, said = answers_of(registry, server, "third", tmp_path), []
    put(registry, "first")
    follower = Follower(registry, "prod", server.grpc_url, server.repository, KEY, say=said.append)
    original = Index.__init__

    def wrong(self, folder):
        original(self, folder)
        self.golden = index

    monkeypatch.setattr(Index, "__init__", wrong)
    with pytest.raises(CheckFailed, match=rf"golden answers.*version {before} serves again"):
        follower.look()
    assert served_number(server.repository) == before
    follower.look()  # refused once, it is left alone until something else is promoted
    monkeypatch.setattr(Index, "__init__", original)
    with Soak(server.grpc_url, dict.fromkeys(OUTPUTS, index["images"][:1])) as soak:
        soak.wait(12)
    assert {answer.version for answer in soak.answers} == {str(before)}


def readiness(server):
    """The HTTP status of a readiness probe."""
    try:
        with LOOPBACK.open(f"http://{server.http_url}/v2/health/ready", timeout=5) as answer:
            return answer.status
    except HTTPError as error:
        return error.code


@pytest.mark.slow
def test_a_server_stays_ready_though_a_promoted_version_cannot_be_loaded(registry, server, tmp_path):
    """Else every pod that follows the stage leaves the Service, and none comes back."""
    broken = serve(tmp_path / "broken", head(9), head(9))
    (broken / "repository" / "encoder" / "1" / "model.onnx").write_bytes(b"no model")
    record_run(registry, tmp_path / "run", "broken", 9, served=broken)
    put(registry, "broken")
    follower = Follower(registry, "prod", server.grpc_url, server.repository, KEY)
    with ThreadPoolExecutor(1) as pool:
        looking, asked = pool.submit(follower.look), []
        while not looking.done():
            asked.append(readiness(server))
            time.sleep(0.02)
        with pytest.raises(CheckFailed, match=r"(?s)cannot load encoder.*version \d+ serves again"):
            looking.result()
    assert set(asked) == {200} and readiness(server) == 200


@pytest.mark.slow
def test_the_command_line_follows_with_the_key_and_ends_on_sigterm(registry, server, tmp_path):
    put(registry, "third")
    command = [
        sys.executable, "-m", "pipelines.cli", "follow", "--registry", registry.url, "--remote", registry.remote,
        "--stage", "prod", "--url", server.grpc_url, "--repository", str(server.repository),
    ]  # fmt: skip
    before = served_number(server.repository)
    refused = subprocess.run(
        [*command, "--once"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_CONTROL_KEY": "wrong"},
    )
    assert refused.returncode == 2 and "restricted" in refused.stderr and "Traceback" not in refused.stderr
    assert served_number(server.repository) == before
    environment = {**os.environ, "TRITON_CONTROL_KEY": KEY}
    often = [*command, "--interval", "0.2"]
    with subprocess.Popen(often, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert "encoder@v1.0.0#prod serves in" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    once = subprocess.run([*command, "--once"], capture_output=True, text=True, env=environment)
    assert once.returncode == 0 and "serves already" in once.stdout


@pytest.mark.slow
def test_serve_a_stage_follows_it(registry, tmp_path):
    workspace = Path(registry.url).parents[1]
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "serve",
        "--stage",
        "prod",
        "--http-port",
        "0",
        "--grpc-port",
        "0",
        "--metrics-port",
        "0",
    ]
    empty = subprocess.run([*command, "--workspace", workspace], capture_output=True, text=True)
    assert empty.returncode == 2 and "unlabeled promote RUN --stage prod" in empty.stderr
    put(registry, "first")
    with subprocess.Popen([*command, "--workspace", workspace], stderr=subprocess.PIPE, text=True) as process:
        assert "Triton serves encoder@v1.0.0#prod" in process.stderr.readline()
        assert "serves already" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_stage_that_holds_nothing_is_said(registry, tmp_path):
    with pytest.raises(InputError, match="holds nothing yet"):
        Follower(registry, "prod", "127.0.0.1:1", tmp_path / "repository").look()
