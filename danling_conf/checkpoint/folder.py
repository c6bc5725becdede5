"""Checkpoint folder of a run: names, publishes, links, finds, prunes and removes checkpoints.

Every checkpoint is a folder that appears by a rename, complete. `latest` and `best` are links, replaced by a rename. A
checkpoint is renamed before it is removed. So a process may be killed at any point, and whatever looks like a
checkpoint is one. Needs no torch, so that the commands that list checkpoints start fast.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from danling_conf.checkpoint import durable, manifest
from danling_conf.checkpoint.manifest import FACTS, Broken, Manifest
from danling_conf.schema.files import Damaged, open_regular

_log = logging.getLogger(__name__)

LATEST, BEST, EXPORT = "latest", "best", "export"
_STAGING, _OLD, _GONE = ".tmp", ".old", ".gone"
_VISIBLE = "ckpt-*"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One visible checkpoint, or a folder that is named like one."""

    path: Path
    manifest: Manifest | None
    fault: str = ""
    """Why there is no manifest."""

    @property
    def step(self) -> int:
        return -1 if self.manifest is None else self.manifest.step


def name_of(step: int, epoch: int | None) -> str:
    """A checkpoint's name: by epoch if it was saved between two epochs, else (`epoch` is None) by step."""
    return f"ckpt-s{step:08d}" if epoch is None else f"ckpt-e{epoch:08d}"


class Folder:
    """The checkpoints of one run. Changes are made by one process, the one that holds the run.

    Args:
        check_token: compares fencing tokens, and raises where another process has taken over the run. Called before
            every visible change: a process on a lost node must not move `latest` back.
        token: fencing token of the attempt that writes. It is in the names of staging folders, so that ranks of an
            earlier attempt, which are still writing, do not write into those of this one.
    """

    def __init__(self, path: Path, check_token: Callable[[], None] = lambda: None, token: str = "") -> None:
        self.path = path
        self.check_token, self._token = check_token, token
        self._seen: dict[str, tuple[tuple[int, int, int], int, bool]] = {}
        """Of checkpoints that were read or written here: what tells their manifest's file, step, and `history`. With
        thousands of ranks a manifest names thousands of files, and there may be hundreds of checkpoints."""

    def entries(self) -> list[Entry]:
        """All visible checkpoints, newest first. Those without a readable manifest come before all others."""
        found = []
        for path in sorted(self.path.glob(_VISIBLE), reverse=True):
            try:
                found.append(Entry(path=path, manifest=manifest.read(path)))
            except Broken as error:
                found.append(Entry(path=path, manifest=None, fault=str(error)))
        return sorted(found, key=lambda entry: (entry.manifest is not None, -entry.step))

    def pointed(self, name: str) -> Path | None:
        """The checkpoint that `latest` or `best` points to; None where there is none."""
        target = real(self.path / name)
        return target if target.is_dir() and target.parent == real(self.path) else None

    def unfinished(self) -> list[Path]:
        """Staging folders of unfinished saves."""
        return sorted(path for path in self.path.glob(f".*{_STAGING}") if path.is_dir() and not path.is_symlink())

    def staging(self, name: str) -> Path:
        """The staging folder in which a checkpoint is written before it is visible."""
        mark = f".{self._token}" if self._token else ""
        return self.path / f".{name}{mark}{_STAGING}"

    def repair(self) -> list[str]:
        """Clean up after a killed process. Returns the names of unfinished checkpoints, which are removed.

        A checkpoint that was about to be replaced, but whose replacement is not visible, is restored.
        """
        left = [path.name.removeprefix(".").partition(".")[0] for path in self.unfinished()]
        for path in self.path.glob(f".*{_OLD}"):
            final = path.with_name(path.name.removeprefix(".").removesuffix(_OLD))
            if final.exists():
                self._discard(path)
            else:
                os.replace(path, final)
        for path in [*self.unfinished(), *self.path.glob(f".*{_GONE}")]:
            shutil.rmtree(path)
        for name in (LATEST, BEST):
            for link in self.path.glob(f".{name}*{_STAGING}"):
                link.unlink()
        return left

    def publish(self, staging: Path, name: str, facts: Manifest | None = None) -> Path:
        """Make a complete staging folder visible, replacing one of the same name.

        Args:
            facts: its manifest, so that `prune` need not read it.
        """
        self.check_token()
        final = self.path / name
        if final.exists():
            # The same step again, as for an export or the best one. A rename cannot replace a folder that is not empty,
            # so the old one moves away first; `repair` moves it back after a crash between the two renames.
            old = self.path / f".{name}{_OLD}"
            with _locked(final, wait=True):
                os.replace(final, old)
                os.replace(staging, final)
            durable.sync(self.path)
            self._discard(old)
        else:
            os.replace(staging, final)
            durable.sync(self.path)
        if facts is not None:
            self._seen[name] = _identity(final / FACTS), facts.step, facts.history
        return final

    def prune(self, keep: int) -> None:
        """Remove checkpoints that are neither linked nor among the newest `keep` of the history (0 keeps all of it).
        What `latest` points to counts as one of them.

        A folder without a readable manifest stays, for a person to look at. So does one that is being read, until the
        next save.
        """
        self.check_token()
        named = {self.pointed(name) for name in (LATEST, BEST)}
        readable, latest = self._steps(), self.pointed(LATEST)
        history = [path for path, kept in readable if kept or real(path) == latest]
        kept = set(history if keep == 0 else history[:keep])
        for path, _ in readable:
            if path in kept or real(path) in named:
                continue
            with _locked(path, wait=False) as free:
                if not free:
                    _log.info("%s is being read and is kept until the next save", path)
                    continue
                # Rename, then remove: rmtree takes time, and a half-removed folder must not look like a checkpoint.
                gone = self.path / f".{path.name}{_GONE}"
                os.replace(path, gone)
            shutil.rmtree(gone)

    def _steps(self) -> list[tuple[Path, bool]]:
        """The readable checkpoints, newest first, and whether each belongs to the history. Each manifest is read once,
        and again only where its file has changed."""
        found, before, self._seen = [], self._seen, {}
        for path in sorted(self.path.glob(_VISIBLE), reverse=True):
            try:
                identity = _identity(path / FACTS)
                known = before.get(path.name)
                if known is None or known[0] != identity:
                    facts = manifest.read(path)
                    known = identity, facts.step, facts.history
            except (OSError, Broken):
                continue
            self._seen[path.name] = known
            found.append((known[1], path, known[2]))
        return [(path, history) for _, path, history in sorted(found, key=lambda item: -item[0])]

    def _discard(self, path: Path) -> None:
        gone = path.with_name(path.name.removesuffix(_OLD) + _GONE)
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
        shutil.rmtree(gone)

    def point(self, name: str, target: Path) -> None:
        """Let `latest` or `best` point to a checkpoint."""
        # symlink fails where the name exists, and unlinking first would leave a moment without `latest`: make a new
        # link and rename it over the old one. Its target is relative, so that the run's directory can be moved.
        self.check_token()
        temporary = self.staging(name)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        os.replace(temporary, self.path / name)
        durable.sync(self.path)


def real(path: Path) -> Path:
    """A path without links; that of a loop of links stays as it is, where `Path.resolve` raises."""
    return Path(os.path.realpath(path))


def find(source: Path, dir_name: str) -> Path | None:
    """The checkpoint that a path names: the path itself, or the latest one of a run; None where there is none.

    If a run's `latest` points to nothing, or to an older one since a save was killed before it moved, the newest
    readable checkpoint is taken.
    """
    if (source / FACTS).is_file() or real(source).name.startswith("ckpt-"):
        return real(source)
    folder = Folder(source / dir_name)
    latest, entries = folder.pointed(LATEST), folder.entries()
    steps = {real(entry.path): entry.step for entry in entries if entry.manifest is not None}
    if latest is not None and latest not in steps:
        return latest  # it is broken, which whoever reads it says
    newest = max(steps, key=lambda path: (steps[path], path == latest), default=None)
    return newest


def others(source: Path, dir_name: str) -> list[Path]:
    """The other readable checkpoints of the run that a path names, newest first."""
    named = find(source, dir_name)
    path = source / dir_name if (source / dir_name).is_dir() else real(source).parent
    readable = [entry.path for entry in Folder(path).entries() if entry.manifest is not None]
    return [found for found in readable if real(found) != named]


def _identity(path: Path) -> tuple[int, int, int]:
    """What tells a file from another one in its place. Raises OSError."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Keep a checkpoint from being removed by the run that owns it. Raises Broken when it is gone."""
    path = checkpoint / FACTS
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        raise Broken(f"{path}: there is no such file, so the checkpoint is not whole") from None
    except Damaged as damage:
        raise Broken(f"{path}: it cannot be read: {damage.reason}") from damage
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        # The writer may have renamed the folder between open and flock: then the lock is on a file without a name.
        if not path.is_file() or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise Broken(f"{path}: its run has just removed it")
        yield
    finally:
        # Unlock explicitly: a forked DataLoader worker may have a copy of the descriptor, which keeps the lock alive.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextmanager
def _locked(checkpoint: Path, *, wait: bool) -> Iterator[bool]:
    """Lock readers out of a checkpoint that is about to be removed. Yields whether nobody is reading it."""
    if not (checkpoint / FACTS).is_file():
        yield True
        return
    # O_RDWR: NFS emulates an exclusive flock by a POSIX lock, which needs a descriptor that is open for writing.
    descriptor = os.open(checkpoint / FACTS, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        yield False
        return
    try:
        yield True
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
