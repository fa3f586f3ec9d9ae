"""The bill of materials: what is installed, what the locks allow, in CycloneDX's form."""

import json
import re
import sysconfig
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from pipelines.sbom import bill, locked_digests, python_components

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def components() -> dict[str, dict]:
    return {component["bom-ref"]: component for component in bill()["components"]}


def test_holds_what_is_installed_at_its_version(components: dict[str, dict]) -> None:
    for name in ("torch", "numpy", "kfp", "unlabeled"):
        version = metadata.version(name)
        assert unquote(f"pkg:pypi/{name}@{version}") in {unquote(reference) for reference in components}
    # Both environments, and the system where it is Debian's.
    assert any(component["name"] == "nvidia-pytriton" for component in components.values())
    if Path("/var/lib/dpkg/status").exists():
        [libc] = [component for component in components.values() if component["name"] == "libc6"]
        assert re.match(r"pkg:deb/\w+/libc6@[^?]+\?arch=\w+&distro=", libc["purl"])


def test_digests_are_those_of_the_lock(components: dict[str, dict]) -> None:
    text = (ROOT / "requirements.lock").read_text()
    version, block = re.search(r"^torch==(\S+) \\\n((?:    --hash=.*\n)+)", text, re.MULTILINE).groups()
    [distribution] = components[f"pkg:pypi/torch@{version}"]["externalReferences"]
    assert {entry["content"] for entry in distribution["hashes"]} == set(re.findall(r"sha256:(\w+)", block))
    assert {entry["alg"] for entry in distribution["hashes"]} == {"SHA-256"}


def test_every_locked_distribution_that_is_installed_has_digests() -> None:
    lock = ROOT / "requirements.lock"
    found = {
        component["name"]: component
        for component in python_components(Path(sysconfig.get_path("purelib")), lock)
    }
    locked = locked_digests(lock)
    assert len(locked) == len(re.findall(r"^[\w.\[\],-]+==", lock.read_text(), re.MULTILINE))
    assert len(locked.keys() & found.keys()) > 0.9 * len(locked)
    assert all("externalReferences" in found[name] for name in locked.keys() & found.keys())


def test_form() -> None:
    found = bill()
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    assert found == bill()
    references = [component["bom-ref"] for component in found["components"]]
    assert len(references) == len(set(references))
    assert found["dependencies"] == [{"ref": "image", "dependsOn": references}]
    for component in found["components"]:
        assert component["type"] in ("library", "platform") and component["name"] and component["version"]
        assert re.fullmatch(r"pkg:(pypi|deb/\w+|generic)/[^@]+@[^ ]+", component["purl"])
        assert all(len(choice) == 1 for choice in component.get("licenses", []))


def test_against_the_schema() -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill())) is None
