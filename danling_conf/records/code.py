"""Code identity of a run: the git state of the script's repository, so that a result can be traced to its code."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class CodeIdentity:
    """State of a git repository."""

    code_id: str
    """`<sha>`, or `<sha>-d<hash of the diff>` when the work tree differs from it; `unknown` outside a repository."""
    diff: str = ""
    """Difference of the work tree from the commit; untracked files are not part of it."""


def code_identity(directory: Path) -> CodeIdentity:
    """The git state of the repository that holds `directory`."""
    if shutil.which("git") is None:
        return CodeIdentity(code_id="unknown")
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return CodeIdentity(code_id="unknown")
    diff = _git(directory, "diff", "HEAD") or ""
    sha = commit.strip()[:12]
    if not diff:
        return CodeIdentity(code_id=sha)
    return CodeIdentity(code_id=f"{sha}-d{hashlib.sha256(diff.encode()).hexdigest()[:8]}", diff=diff)


def _git(directory: Path, *arguments: str) -> str | None:
    # A diff can hold bytes that are not UTF-8, and `git` fails in a folder that is no repository: neither is our error.
    result = subprocess.run(
        ["git", "-C", str(directory), *arguments], capture_output=True, text=True, errors="replace", check=False
    )
    return result.stdout if result.returncode == 0 else None
