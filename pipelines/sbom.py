"""The image's bill of materials, CycloneDX 1.6 as JSON: `python -m pipelines.sbom`, run in the image, prints it.

It lists Python, the distributions of both environments, and Debian's packages. The same image has the same bill, to
the byte: no time, no serial number. A distribution's digests are those that its lock allows: the archive that was
installed has one of them.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from components import IMAGE
from serving.server import triton_environment
from unlabeled.digest import code_digest

ROOT = Path(__file__).parents[1]
LONGEST_LICENCE_NAME = 80


def locked_digests(lock: Path) -> dict[str, list[str]]:
    """Return the sha256 digests (hex) that a lock allows for each distribution, by its normalised name."""
    blocks = re.split(r"\n(?=\S)", lock.read_text())
    return {
        _normal(re.match(r"[\w.-]+", block)[0]): re.findall(r"sha256:(\w{64})", block) for block in blocks
    }


def python_components(packages: Path, lock: Path) -> Iterator[dict[str, Any]]:
    """Yield a component for each distribution in a site-packages folder.

    Args:
        packages: the folder.
        lock: the requirements, with hashes, that it was installed from.
    """
    digests = locked_digests(lock)
    for distribution in metadata.distributions(path=[str(packages)]):
        name = _normal(distribution.metadata["Name"])
        purl = f"pkg:pypi/{name}@{quote(distribution.version)}"
        component = _component("library", name, distribution.version, purl)
        if licences := _licences(distribution.metadata):
            component["licenses"] = licences
        if allowed := digests.get(name):
            hashes = [{"alg": "SHA-256", "content": digest} for digest in allowed]
            component["externalReferences"] = [{"type": "distribution", "url": purl, "hashes": hashes}]
        yield component


def system_components() -> Iterator[dict[str, Any]]:
    """Yield Python and, where there is dpkg, each installed package of the system."""
    python = platform.python_version()
    yield _component("platform", "python", python, f"pkg:generic/python@{python}")
    if not shutil.which("dpkg-query"):
        return
    system = platform.freedesktop_os_release()
    fields = "${Package}\\t${Version}\\t${Architecture}\\n"
    listing = subprocess.run(["dpkg-query", "-W", "-f", fields], check=True, capture_output=True, text=True)
    for line in listing.stdout.splitlines():
        name, version, architecture = line.split("\t")
        qualifiers = f"arch={architecture}&distro={system['ID']}-{system['VERSION_ID']}"
        purl = f"pkg:deb/{system['ID']}/{quote(name)}@{quote(version)}?{qualifiers}"
        yield _component("library", name, version, purl)


def bill() -> dict[str, Any]:
    """Return the bill of materials of the image, or of the machine, that this runs in.

    Raises:
        InputError: there is no Triton environment.
    """
    [triton] = triton_environment().glob("lib/python3*/site-packages")
    found = [
        *python_components(Path(sysconfig.get_path("purelib")), ROOT / "requirements.lock"),
        *python_components(triton, ROOT / "requirements-triton.lock"),
        *system_components(),
    ]
    # What both environments hold at one version is one component.
    components = {component["bom-ref"]: component for component in found}
    image = {"type": "container", "bom-ref": "image", "name": IMAGE, "version": metadata.version("unlabeled")}
    properties = {"code-digest": code_digest(), "commit": os.environ.get("UNLABELED_COMMIT", "")}
    image["properties"] = [{"name": f"unlabeled:{key}", "value": value} for key, value in properties.items()]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": image},
        "components": [components[reference] for reference in sorted(components)],
        "dependencies": [{"ref": "image", "dependsOn": sorted(components)}],
    }


def _component(kind: str, name: str, version: str, purl: str) -> dict[str, Any]:
    return {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _licences(fields: Any) -> list[dict[str, Any]]:
    if expression := fields["License-Expression"]:
        return [{"expression": expression}]
    classifiers = [text for text in fields.get_all("Classifier", []) if text.startswith("License :: ")]
    names = [text.rpartition(" :: ")[2] for text in classifiers] or [fields["License"] or ""]
    # Some put the whole text of the licence into the field of its name.
    return [{"license": {"name": name}} for name in names if name and len(name) <= LONGEST_LICENCE_NAME]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    print(json.dumps(bill(), indent=1))
