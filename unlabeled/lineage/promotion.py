"""Versions and stages of recorded runs, as GTO's tags: `gto show` and `dvc artifacts get --stage` read them.

`encoder@v1.2.0` on a run's commit makes the run a version; `encoder#prod#7` there, the seventh assignment of the
stage, puts that version at `prod`. Tags are only ever added, so that the history of a stage stays.
"""

import tempfile
import time
from dataclasses import dataclass

from unlabeled.errors import CheckFailed, InputError
from unlabeled.lineage.commit import TAGS
from unlabeled.lineage.git import GitError, git
from unlabeled.lineage.registry import Registry

# The name of a run among the `artifacts` of its dvc.yaml.
ARTIFACT = "encoder"
FIRST = "v1.0.0"
ATTEMPTS = 5


@dataclass(frozen=True)
class Promotion:
    """A run at a stage.

    Attributes:
        run, version: the run, and its version, as `v1.2.0`.
        stage: `prod`, …
        time: when, seconds since 1970.
    """

    run: str
    version: str
    stage: str
    time: int

    def __str__(self) -> str:
        return f"{ARTIFACT}@{self.version}#{self.stage}"


def history(registry: Registry, stage: str) -> list[Promotion]:
    """Return what was promoted to a stage, oldest first; the last one is at the stage now.

    As GTO has it, the later tag wins, and a version that was taken from the stage, or deprecated, counts no more.

    Raises:
        InputError: git cannot read the registry.
    """
    from gto.constants import Action
    from gto.tag import parse_name

    runs = _runs(registry)
    versions = _versions(registry)
    found: list[Promotion] = []
    for name, commit, seconds in _by_time(registry.tags(f"{ARTIFACT}#*", f"{ARTIFACT}@*")):
        tag = parse_name(name, raise_on_fail=False)
        if not tag or tag.get("stage", stage) != stage or commit not in runs:
            continue
        if tag["action"] is Action.ASSIGN:
            found.append(Promotion(runs[commit], versions.get(commit, commit[:7]), stage, seconds))
        elif tag["action"] in (Action.UNASSIGN, Action.DEREGISTER):
            found = [promotion for promotion in found if promotion.run != runs[commit]]
        elif tag["action"] is Action.DEPRECATE:
            found = []
    return found


def at_stage(registry: Registry, stage: str) -> Promotion | None:
    """Return what a stage holds now.

    Raises:
        InputError: git cannot read the registry.
    """
    found = history(registry, stage)
    return found[-1] if found else None


def find_run(registry: Registry, name: str) -> str:
    """Return the run that is meant by its own name, a version (`encoder@v1.2.0`) or a stage (`encoder#prod`).

    Args:
        name: empty: the newest run.

    Raises:
        InputError: there is no such version, the stage holds nothing, or no run is recorded.
    """
    if name.startswith(f"{ARTIFACT}@"):
        commits = {version: commit for commit, version in _versions(registry).items()}
        commit = commits.get(name.partition("@")[2], "")
        if commit not in (runs := _runs(registry)):
            raise InputError(
                f"no run of {registry.url} is {name}; versions: {', '.join(sorted(commits)) or 'none'}"
            )
        return runs[commit]
    if name.startswith(f"{ARTIFACT}#"):
        promotion = at_stage(registry, name.partition("#")[2])
        if promotion is None:
            raise InputError(f"stage '{name.partition('#')[2]}' of {registry.url} holds nothing")
        return promotion.run
    if name:
        return name
    recorded = registry.runs()
    if not recorded:
        raise InputError(f"no run is recorded in {registry.url}; start one with `unlabeled run`")
    return str(recorded[0]["run"])


def previous(registry: Registry, stage: str) -> Promotion:
    """Return what a stage held before the run that it holds now.

    Raises:
        InputError: it never held another.
    """
    found = history(registry, stage)
    before = [promotion for promotion in found if promotion.run != found[-1].run]
    if not before:
        raise InputError(f"stage '{stage}' held no other run before: there is none to go back to")
    return before[-1]


def check_stage(stage: str) -> None:
    """Raise InputError where GTO does not allow such a stage."""
    from gto.constants import check_string_is_valid

    if not check_string_is_valid(stage) or "/" in stage:
        raise InputError(f"'{stage}' cannot name a stage: letters, digits, - and _ only, as 'prod'")


def promote(
    registry: Registry, run: str, stage: str, replaces: Promotion | None, version: str = ""
) -> Promotion:
    """Tag a run as a version, unless it is one, and put it at a stage; both tags appear, or none.

    Args:
        replaces: what the stage held when the run was compared with it.
        version: as `v1.2.0`; default: the run's own, else the next minor one.

    Raises:
        CheckFailed: somebody else promoted to the stage meanwhile.
        InputError: no such run, a version or stage that cannot be, or git cannot push.
    """
    check_stage(stage)
    for _ in range(ATTEMPTS):
        registry.refresh()
        registry.require(run)
        holder = at_stage(registry, stage)
        if holder != replaces:
            raise CheckFailed(
                f"stage '{stage}' went to {holder.version if holder else 'nothing'} ({holder.run if holder else ''}) "
                "meanwhile: promote again, to compare with what it holds now"
            )
        # A tag's time has seconds: of two in one second GTO would not know the later.
        last = holder.time + 1 if holder else 0
        promotion = Promotion(run, _version(registry, run, version), stage, max(int(time.time()), last))
        if _push(registry, promotion):
            registry.refresh()
            return promotion
    raise InputError(f"cannot promote run {run}: others promote all the time; try again")


def _push(registry: Registry, promotion: Promotion) -> bool:
    """Push the tags of a promotion; False where another promoter took one of their names before."""
    taken = {name for name, _, _ in registry.tags(f"{ARTIFACT}@*", f"{ARTIFACT}#*")}
    numbered = f"{ARTIFACT}#{promotion.stage}#"
    # Tags made by hand may end in anything.
    ends = [name.removeprefix(numbered) for name in taken if name.startswith(numbered)]
    counters = [int(end) for end in ends if end.isdecimal()]
    # Two promoters to one stage want the same number: git lets one of them have it.
    wanted = {
        f"{ARTIFACT}@{promotion.version}": f"Version {promotion.version}: run {promotion.run}",
        f"{ARTIFACT}#{promotion.stage}#{max(counters, default=0) + 1}": f"{promotion}: run {promotion.run}",
    }
    new = {name: message for name, message in wanted.items() if name not in taken}
    with tempfile.TemporaryDirectory(prefix="unlabeled-") as clone:
        git("init", "--quiet", "--template=", clone)
        git("fetch", "--quiet", "--depth=1", "--no-tags", registry.url, TAGS + promotion.run, folder=clone)
        for name, message in new.items():
            target = "FETCH_HEAD^{commit}"
            date = f"@{promotion.time} +0000"
            git("tag", "--annotate", "--message", message, name, target, folder=clone, date=date)
        try:
            git(
                "push",
                "--quiet",
                "--atomic",
                registry.url,
                *(f"refs/tags/{name}" for name in new),
                folder=clone,
            )
        except GitError as error:
            registry.refresh()
            if taken == {name for name, _, _ in registry.tags(f"{ARTIFACT}@*", f"{ARTIFACT}#*")}:
                raise InputError(f"cannot push {promotion} to {registry.url}: {error}") from None
            return False
    return True


def _version(registry: Registry, run: str, wanted: str) -> str:
    from gto.versions import SemVer

    if wanted and not SemVer.is_valid(wanted):
        raise InputError(f"'{wanted}' is no version: write vMAJOR.MINOR.PATCH, as v1.2.0")
    versions = _versions(registry)
    commits = {name: commit for commit, name in _runs(registry).items()}
    own = versions.get(commits[run], "")
    if own:
        if wanted not in ("", own):
            raise InputError(f"run {run} is version {own} already; it cannot be {wanted} too")
        return own
    names = [name.split("@")[1].rstrip("!").split("#")[0] for name, _, _ in registry.tags(f"{ARTIFACT}@v*")]
    if wanted in names:
        raise InputError(f"version {wanted} is another run's")
    newest = max((SemVer(name) for name in names if SemVer.is_valid(name)), default=None)
    return wanted or (newest.bump_minor().version if newest else FIRST)


def _versions(registry: Registry) -> dict[str, str]:
    """The version of each commit that is one."""
    from gto.constants import Action
    from gto.tag import parse_name

    found: dict[str, str] = {}
    for name, commit, _ in _by_time(registry.tags(f"{ARTIFACT}@*")):
        tag = parse_name(name, raise_on_fail=False)
        if tag and tag.get("action") is Action.REGISTER:
            found[commit] = tag["version"]
        elif tag and tag.get("action") is Action.DEREGISTER:
            found.pop(commit, None)
        elif tag and tag.get("action") is Action.DEPRECATE:
            found = {}
    return found


def _runs(registry: Registry) -> dict[str, str]:
    """The run of each commit that is one."""
    return {commit: name.removeprefix("run/") for name, commit, _ in registry.tags("run/*")}


def _by_time(tags: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Return tags by their seconds; of one second, as GTO numbers them."""

    def number(name: str) -> int:
        end = name.rpartition("#")[2]
        return int(end) if end.isdecimal() else 0

    return sorted(tags, key=lambda tag: (tag[2], number(tag[0])))
