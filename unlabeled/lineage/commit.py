"""The commit and tag of a run, made in a temporary repository of which the tag alone is pushed."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from unlabeled.errors import InputError
from unlabeled.lineage.git import GitError, git
from unlabeled.lineage.store import REMOTE

TAGS = "refs/tags/run/"
ROOT_DATE = "2026-01-01T00:00:00Z"
README = """# Registry of runs

Each recorded run is a commit with the tag `run/<id>`: `git tag`, `git log --all`,
`dvc metrics diff run/a run/b`, `dvc params diff run/a run/b`, `dvc get <this repository> model --rev run/a`,
`dvc pull` after `git checkout run/a`. Never run `dvc gc` on the remote: it would remove what other runs need.
"""


def is_folder(url: str) -> bool:
    """Tell a folder from the URL of a repository elsewhere (`https://…`, `git@host:…`), as git does."""
    return "://" not in url and ":" not in url.partition("/")[0]


def check_name(run: str) -> None:
    """Raise InputError where git does not allow such a tag."""
    try:
        git("check-ref-format", TAGS + run)
    except GitError:
        raise InputError(
            f"'{run}' cannot name a run: in a tag git allows no spaces, no '..', none of ~^:?*[\\"
        ) from None


def create_repository(url: str) -> None:
    """Create a bare repository in a folder that does not exist yet; one that is there is left alone."""
    if not is_folder(url) or Path(url).exists():
        return
    Path(url).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(url).parent) as room:
        git("init", "--quiet", "--bare", "--template=", "--initial-branch=main", f"{room}/git")
        try:
            os.rename(f"{room}/git", url)
        except OSError:  # another recorder was first
            if not Path(url).exists():
                raise


def push_tag(url: str, remote: str, run: str, files: Mapping[str, bytes], message: str, date: str) -> None:
    """Commit files on the repository's root commit, tag them `run/<run>` and push the tag.

    Args:
        url, remote: git URL and DVC URL of the registry.
        message: of the tag.
        date: of commit and tag.

    Raises:
        InputError: git cannot push there, or the tag exists.
    """
    with tempfile.TemporaryDirectory(prefix="unlabeled-") as clone:
        git("init", "--quiet", "--template=", clone)
        _check_out_root(url, remote, clone)
        _write(clone, {**files, ".dvc/config": _dvc_config(remote)})
        git("add", "--all", "--force", folder=clone)
        git("commit", "--quiet", "--message", f"Record run {run}", folder=clone, date=date)
        git("tag", "--annotate", "--message", message, f"run/{run}", folder=clone, date=date)
        try:
            git("push", "--quiet", url, TAGS + run, folder=clone)
        except GitError as error:
            raise InputError(f"cannot push run {run} to {url}: {error}") from None


def _check_out_root(url: str, remote: str, clone: str) -> None:
    """Check out the commit that every run's commit follows; an empty repository is given one."""
    branches = git("ls-remote", url, "HEAD", "refs/heads/main").decode().split()
    if not branches:
        ignored = b"/config.local\n/tmp\n/cache\n"
        _write(
            clone,
            {"README.md": README.encode(), ".dvc/config": _dvc_config(remote), ".dvc/.gitignore": ignored},
        )
        git("add", "--all", "--force", folder=clone)
        git("commit", "--quiet", "--message", "Open the registry", folder=clone, date=ROOT_DATE)
        try:
            git("push", "--quiet", url, "HEAD:refs/heads/main", folder=clone)
            return
        except GitError as error:
            # Either another recorder was first, or git cannot push there.
            branches = git("ls-remote", url, "refs/heads/main").decode().split()
            if not branches:
                raise InputError(f"cannot write to the registry {url}: {error}") from None
    git("fetch", "--quiet", "--depth=1", "--no-tags", url, branches[1], folder=clone)
    git("checkout", "--quiet", "--force", "FETCH_HEAD", folder=clone)


def _dvc_config(remote: str) -> bytes:
    core = f"[core]\n    remote = {REMOTE}\n    analytics = false\n    check_update = false\n"
    return f"{core}['remote \"{REMOTE}\"']\n    url = {remote}\n".encode()


def _write(folder: str, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
