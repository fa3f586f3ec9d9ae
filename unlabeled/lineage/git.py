"""Git, as the command that everyone has."""

import os
import subprocess
from pathlib import Path

from unlabeled.errors import InputError

# What is committed is committed as it is: no line endings changed, no hooks,
# filters or signatures of the user's.
SETTINGS = tuple(
    part
    for setting in (
        "core.autocrlf=false", "core.hooksPath=/dev/null", "core.attributesFile=/dev/null", "advice.detachedHead=false",
        "commit.gpgSign=false", "tag.gpgSign=false", "push.gpgSign=false",
    )
    for part in ("-c", setting)
)  # fmt: skip
# A server that sends nothing for so long is given up.
STALLED_SECONDS = 60
NAME, EMAIL = "unlabeled", "unlabeled@localhost"


class GitError(InputError):
    """Git refused; the message is its own, on one line."""


def git(
    *arguments: str, folder: Path | str | None = None, input: bytes | None = None, date: str = ""
) -> bytes:
    """Run git and return what it prints.

    Args:
        arguments: as on its command line.
        folder: repository to work in.
        input: its standard input.
        date: date of commits and tags made.

    Raises:
        GitError: git fails, or a server reached by HTTP sends nothing for a minute.
    """
    # Inside a hook of another repository these would point there.
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    }
    environment |= {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"}
    environment |= {"GIT_HTTP_LOW_SPEED_LIMIT": "1", "GIT_HTTP_LOW_SPEED_TIME": str(STALLED_SECONDS)}
    for role in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{role}_NAME": NAME, f"GIT_{role}_EMAIL": EMAIL} | (
            {f"GIT_{role}_DATE": date} if date else {}
        )
    command = ["git", *SETTINGS, *(("-C", str(folder)) if folder else ()), *arguments]
    try:
        return subprocess.run(command, check=True, capture_output=True, input=input, env=environment).stdout
    except FileNotFoundError:
        raise InputError("git is not installed") from None
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.decode(errors="replace").splitlines() if "hint:" not in line]
        raise GitError(" ".join(" ".join(lines).split())[:300] or f"git {arguments[0]} failed") from None


def source_commit() -> tuple[str | None, bool | None]:
    """Return the git commit of the code here and whether files differ from it.

    In a container the commit is given by UNLABELED_COMMIT, the tree being clean by construction. (None, None)
    where neither is known: the digest of the code tells what ran all the same.
    """
    if commit := os.environ.get("UNLABELED_COMMIT"):
        return commit, False
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None, None
    try:
        commit = git("rev-parse", "HEAD", folder=root).decode().strip()
        return commit, bool(git("status", "--porcelain", folder=root).strip())
    except InputError:
        return None, None
