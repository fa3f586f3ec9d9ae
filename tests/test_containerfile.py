"""The Containerfile: pinned, without root, with all that the code needs and nothing else."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """The instructions of the Containerfile, each with its text on one line."""
    text = "".join(
        line for line in (ROOT / "Containerfile").read_text().splitlines(True) if not line.startswith("#")
    )
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split()[0].upper(), line.split(None, 1)[1]) for line in lines]


def copied(instructions: list[tuple[str, str]]) -> set[str]:
    """Return the names that are copied from the build context."""
    copies = [text.split() for name, text in instructions if name == "COPY" and "--from=" not in text]
    return {source for words in copies for source in words[:-1]}


def test_base_is_pinned(instructions: list[tuple[str, str]]) -> None:
    [base] = [text for name, text in instructions if name == "ARG" and text.startswith("BASE=")]
    assert re.fullmatch(
        r"BASE=docker\.io/library/python:3\.11\.\d+-slim-bookworm(@sha256:[0-9a-f]{64})?", base
    )
    assert {text.split(" AS ")[0] for name, text in instructions if name == "FROM"} == {"${BASE}"}
    assert "latest" not in (ROOT / "Containerfile").read_text()


def test_nothing_is_added_from_the_network_unproven(instructions: list[tuple[str, str]]) -> None:
    commands = " ".join(text for name, text in instructions if name == "RUN")
    assert "ADD" not in {name for name, _ in instructions}
    assert not re.search(r"curl|wget|https?://|--trusted-host|--index-url", commands)
    installs = re.findall(r"pip install [^&]*", commands)
    assert len(installs) == 3
    for install in installs:
        assert "--no-deps" in install and "--no-cache-dir" in install
        assert "--require-hashes" in install or install.strip().endswith("--editable .")


def test_git_reaches_a_registry_by_https_and_by_ssh(instructions: list[tuple[str, str]]) -> None:
    [packages] = [text for name, text in instructions if name == "RUN" and " g++" in text]
    assert {"git", "ca-certificates", "openssh-client"} <= set(packages.split())


def test_runs_without_root(instructions: list[tuple[str, str]]) -> None:
    users = [text for name, text in instructions if name == "USER"]
    assert users and re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    after = instructions[instructions.index(("USER", users[-1])) :]
    assert [name for name, _ in after] == ["USER", "CMD"]
    assert not re.search(r"sudo|chmod 777|setcap", str(instructions))


def test_writes_in_tmp_alone(instructions: list[tuple[str, str]]) -> None:
    [variables] = [dict(re.findall(r"(\w+)=(\S+)", text)) for name, text in instructions if name == "ENV"]
    assert variables["HOME"] == "/tmp" and variables["DVC_SITE_CACHE_DIR"].startswith("/tmp/")
    # Nothing is compiled when it runs, so all is compiled when it is built.
    assert variables["PYTHONDONTWRITEBYTECODE"] == "1"
    commands = " ".join(text for name, text in instructions if name == "RUN")
    places = ("/opt/unlabeled/lib", "/opt/unlabeled-triton/lib", "unlabeled serving components pipelines")
    assert all(re.search(rf"compileall [^&|]*{place}\b", commands) for place in places)


def test_builds_no_other_code(instructions: list[tuple[str, str]]) -> None:
    copies = [
        index
        for index, (name, text) in enumerate(instructions)
        if (name, text) == ("COPY", "pipelines pipelines")
    ]
    [check] = [
        index for index, (name, text) in enumerate(instructions) if name == "RUN" and "CODE_DIGEST" in text
    ]
    assert copies[0] < check and "exit 1" in instructions[check][1]
    # buildah's cache looks at an argument's value only in a RUN that comes after it.
    declared = {text.split("=")[0] for name, text in instructions[:check] if name == "ARG"}
    assert declared == {"BASE", "CODE_DIGEST", "COMMIT", "IMAGE"}
    [labels] = [text for name, text in instructions if name == "LABEL"]
    assert 'unlabeled.code-digest="${CODE_DIGEST}"' in labels
    rule = subprocess.run(
        ["make", "-n", "image"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    arguments = set(re.findall(r"--build-arg (\w+)", rule))
    assert arguments == {text.split("=")[0] for name, text in instructions if name == "ARG"} - {"BASE"}


def test_carries_no_secret(instructions: list[tuple[str, str]]) -> None:
    names = [re.findall(r"(\w+)=", text) for name, text in instructions if name in ("ENV", "ARG")]
    assert not [name for found in names for name in found if re.search("TOKEN|PASSWORD|SECRET|KEY", name)]


def test_copies_what_exists_and_every_package(instructions: list[tuple[str, str]]) -> None:
    names = copied(instructions)
    assert all((ROOT / name).exists() for name in names)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    locks = {"requirements.lock", "requirements-triton.lock"}
    assert names == packages | locks | {"pyproject.toml", "README.md", "params.yaml", "data.dvc"}


def test_context_is_what_is_copied(instructions: list[tuple[str, str]]) -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied(instructions)


def test_labels_and_version(instructions: list[tuple[str, str]]) -> None:
    [labels] = [text for name, text in instructions if name == "LABEL"]
    found = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', labels))
    assert found.keys() == {"title", "description", "version", "revision"}
    assert found["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_locks_pin_every_package_with_hashes() -> None:
    for name in ("requirements.lock", "requirements-triton.lock"):
        blocks = re.split(r"\n(?=\S)", (ROOT / name).read_text().strip())
        for block in (block for block in blocks if not block.startswith("#")):
            assert re.match(r"[\w.\[\],-]+==\S+", block) and "--hash=sha256:" in block, block[:80]
