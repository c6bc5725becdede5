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
    """

    def __init__(self, path: Path, check_token: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self.check_token = check_token

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
        target = (self.path / name).resolve()
        return target if target.is_dir() and target.parent == self.path.resolve() else None

    def unfinished(self) -> list[Path]:
        """Staging folders of unfinished saves."""
        return sorted(path for path in self.path.glob(f".*{_STAGING}") if path.is_dir() and not path.is_symlink())

    def staging(self, name: str) -> Path:
        """The staging folder in which a checkpoint is written before it is visible."""
        return self.path / f".{name}{_STAGING}"

    def repair(self) -> list[str]:
        """Clean up after a killed process. Returns the names of unfinished checkpoints, which are removed.

        A checkpoint that was about to be replaced, but whose replacement is not visible, is restored.
        """
        left = [path.name.removeprefix(".").removesuffix(_STAGING) for path in self.unfinished()]
        for path in self.path.glob(f".*{_OLD}"):
            final = path.with_name(path.name.removeprefix(".").removesuffix(_OLD))
            if final.exists():
                self._discard(path)
            else:
                os.replace(path, final)
        for path in [*self.unfinished(), *self.path.glob(f".*{_GONE}")]:
            shutil.rmtree(path)
        for name in (LATEST, BEST):
            (self.path / f".{name}{_STAGING}").unlink(missing_ok=True)
        return left

    def publish(self, staging: Path, name: str) -> Path:
        """Make a complete staging folder visible, replacing one of the same name."""
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
        return final

    def prune(self, keep: int) -> None:
        """Remove checkpoints that are neither linked nor among the newest `keep` of the history (0 keeps all of it).
        What `latest` points to counts as one of them.

        A folder without a readable manifest stays, for a person to look at. So does one that is being read, until the
        next save.
        """
        self.check_token()
        named = {self.pointed(name) for name in (LATEST, BEST)}
        readable = [entry for entry in self.entries() if entry.manifest is not None]
        latest = self.pointed(LATEST)
        history = [
            entry.path
            for entry in readable
            if entry.path.resolve() == latest or (entry.manifest is not None and entry.manifest.history)
        ]
        kept = set(history if keep == 0 else history[:keep])
        for entry in readable:
            if entry.path in kept or entry.path.resolve() in named:
                continue
            with _locked(entry.path, wait=False) as free:
                if not free:
                    _log.info("%s is being read and is kept until the next save", entry.path)
                    continue
                # Rename, then remove: rmtree takes time, and a half-removed folder must not look like a checkpoint.
                gone = self.path / f".{entry.path.name}{_GONE}"
                os.replace(entry.path, gone)
            shutil.rmtree(gone)

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
        temporary = self.path / f".{name}{_STAGING}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        os.replace(temporary, self.path / name)
        durable.sync(self.path)


def find(source: Path, dir_name: str) -> Path | None:
    """The checkpoint that a path names: the path itself, or the latest one of a run; None where there is none.

    If a run's `latest` points to nothing, the newest readable checkpoint is taken.
    """
    if (source / FACTS).is_file() or source.resolve().name.startswith("ckpt-"):
        return source.resolve()
    folder = Folder(source / dir_name)
    latest = folder.pointed(LATEST)
    if latest is not None:
        return latest
    entries = [entry for entry in folder.entries() if entry.manifest is not None]
    return entries[0].path.resolve() if entries else None


def others(source: Path, dir_name: str) -> list[Path]:
    """The other readable checkpoints of the run that a path names, newest first."""
    named = find(source, dir_name)
    path = source / dir_name if (source / dir_name).is_dir() else source.resolve().parent
    readable = [entry.path for entry in Folder(path).entries() if entry.manifest is not None]
    return [found for found in readable if found.resolve() != named]


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Keep a checkpoint from being removed by the run that owns it. Raises Broken when it is gone."""
    path = checkpoint / FACTS
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise Broken(f"{path}: there is no such file, so the checkpoint is not whole ({error.strerror})") from None
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
