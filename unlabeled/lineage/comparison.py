"""A recorded run against a fresh execution of it: the same bits, or which step differs first."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unlabeled.digest import code_digest, file_digest, files_below
from unlabeled.environment import environment
from unlabeled.files import read_json
from unlabeled.lineage.findings import Difference
from unlabeled.lineage.record import dependency
from unlabeled.lineage.tracked import LEADERBOARD, RECORD

# Another machine sums in another order: absolute for scores up to 1, relative for the rest.
TOLERANCE = 0.03
TIMINGS = ("images_per_second", "seconds")
# Of the libraries that this package asks for, those that its artifacts' bytes come from.
COMPUTING = (
    "numpy", "onnx", "onnxruntime-gpu", "onnxscript", "pandas", "pillow", "pyarrow", "safetensors", "scikit-image",
    "scikit-learn", "scipy", "torch", "torchvision",
)  # fmt: skip


def same_environment(
    recorded: Mapping[str, Any], fresh: Mapping[str, Any] | None = None
) -> tuple[bool, list[str]]:
    """Tell whether a fresh execution must give the bits of a recorded one, and every reason why not.

    Compared is what decides bits: the code, Python, the libraries that compute, and each step's
    processor, instruction set, cores, GPUs, variables and, where both are known, torch.

    Args:
        recorded: a record.
        fresh: the record of a fresh execution; None: this process stands for it.
    """
    theirs = recorded["predicate"]["runDetails"]["builder"]["environment"]
    if fresh is None:
        ours, code, machines = environment(), code_digest(), {}
    else:
        ours = fresh["predicate"]["runDetails"]["builder"]["environment"]
        code = dependency(fresh, "code")["digest"]["tree"]
        machines = {step["name"]: step["machine"] for step in fresh["predicate"]["steps"]}
    pairs = [("code", dependency(recorded, "code")["digest"]["tree"], code)]
    pairs += [(name, theirs[name], ours[name]) for name in ("python", "implementation")]
    pairs += [(name, _version(theirs, name), _version(ours, name)) for name in COMPUTING]
    reasons = [f"{name} {a}, here {b}" for name, a, b in pairs if a != b]
    a, b = theirs["variables"], ours["variables"]
    if a != b:
        reasons.append(f"variables {_told(a, b)}, here {_told(b, a)}")

    steps: dict[str, list[str]] = {}
    for step in recorded["predicate"]["steps"]:
        machine = machines.get(step["name"], ours)
        for name, a in step["machine"].items():
            b = machine.get(name, a)  # a field that this version does not know decides nothing here
            # A process that is no step has not imported torch, nor set the variables that steps set themselves.
            unknown = (name == "torch" and None in (a, b)) or (name == "variables" and fresh is None)
            if a != b and not unknown:
                steps.setdefault(f"{name} {_told(a, b)}, here {_told(b, a)}", []).append(step["name"])
    for reason, names in steps.items():
        everywhere = len(names) == len(recorded["predicate"]["steps"])
        reasons.append(f"{reason} ({'every step' if everywhere else ', '.join(names)})")
    return not reasons, reasons


def compare(recorded: Path, fresh: Path, comparable: bool) -> list[Difference]:
    """Compare the bundles of two executions, step by step in the order in which they ran.

    Args:
        recorded, fresh: bundles with their records.
        comparable: bits must be equal (see `same_environment`); else only those of the raw data must be, and
            the leaderboards' numbers must agree to 0.03, timings apart.

    Returns:
        Every difference; the first one's step is the first step that did something else.
    """
    record, before, after = (
        read_json(path) for path in (recorded / RECORD, recorded / LEADERBOARD, fresh / LEADERBOARD)
    )
    differences = list(_bits(record, fresh, everything=comparable))
    return differences + list(_numbers(before, after, 0.0 if comparable else TOLERANCE))


def _bits(record: Mapping[str, Any], fresh: Path, everything: bool) -> Iterator[Difference]:
    recorded = {subject["name"]: subject["digest"]["sha256"] for subject in record["subject"]}
    artifacts = record["predicate"]["artifacts"]
    for step in record["predicate"]["steps"]:
        for name, artifact in artifacts.items():
            if artifact["step"] != step["name"] or not (everything or name == "raw"):
                continue
            old = {
                file: digest
                for file, digest in recorded.items()
                if file == name or file.startswith(name + "/")
            }
            new = {path.relative_to(fresh).as_posix(): path for path in files_below(fresh / name).values()}
            for file in sorted(old | new):
                if file not in new:
                    yield Difference(step["name"], file, "was not written again")
                elif file not in old:
                    yield Difference(step["name"], file, "was not written the first time")
                elif (digest := file_digest(new[file])) != old[file]:
                    yield Difference(step["name"], file, "has other bytes", old[file], digest)


def _numbers(before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float) -> Iterator[Difference]:
    for group in ("rows", "baselines"):
        old, new = ({row["method"]: _flat(row) for row in board[group]} for board in (before, after))
        for method in sorted(old | new):
            a, b = old.get(method, {}), new.get(method, {})
            for key in sorted(a | b):
                if not _agree(a.get(key), b.get(key), tolerance):
                    what = f"{key} of {method} differs"
                    yield Difference(
                        f"evaluate/{method}", LEADERBOARD, what, f"{a.get(key)}", f"{b.get(key)}"
                    )
    if before["selected"] != after["selected"]:
        what = "another method was selected"
        yield Difference("select", LEADERBOARD, what, str(before["selected"]), str(after["selected"]))


def _agree(a: float | None, b: float | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    return abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    flat: dict[str, float | None] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif key not in TIMINGS and not isinstance(value, str | list | bool):
            flat[prefix + key] = value
    return flat


def _version(environment: Mapping[str, Any], name: str) -> str:
    found = environment["distributions"].get(name)
    return f"{found['version']} ({found['digest'][:12]})" if found else "missing"


def _told(value: Any, other: Any) -> str:
    """A value in words; of lists and mappings only what the other one does not have."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        value = [f"{key}={item}" for key, item in value.items() if other.get(key) != item]
    elif isinstance(value, list) and isinstance(other, list):
        value = [item for item in value if item not in other]
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
