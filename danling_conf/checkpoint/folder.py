"""Folder of a run's checkpoints: how they are named, made visible, pointed to, found, kept and removed.

Every checkpoint is a folder that appears by a rename, whole; `latest` and `best` are links that are replaced by a
rename; what is removed is renamed first. So a process may be killed at any point: what looks like a checkpoint is one.
Needs no torch.
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
    """One visible checkpoint, or a folder with the name of one."""

    path: Path
    manifest: Manifest | None
    fault: str = ""
    """Why there is no manifest."""

    @property
    def step(self) -> int:
        return -1 if self.manifest is None else self.manifest.step


def name_of(step: int, epoch: int | None) -> str:
    """A checkpoint's name: by epoch where it stands between epochs of a run that counts in them, else by step."""
    return f"ckpt-s{step:08d}" if epoch is None else f"ckpt-e{epoch:08d}"


class Folder:
    """The checkpoints of one run. Changes are made by one process, the one that holds the run.

    Args:
        check_token: compares fencing tokens: raises where another process has taken the run over. Called before
            anything that is visible changes.
    """

    def __init__(self, path: Path, check_token: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self.check_token = check_token

    def entries(self) -> list[Entry]:
        """All visible checkpoints, newest first; those without a readable manifest first of all."""
        found = []
        for path in sorted(self.path.glob(_VISIBLE), reverse=True):
            try:
                found.append(Entry(path=path, manifest=manifest.read(path)))
            except Broken as error:
                found.append(Entry(path=path, manifest=None, fault=str(error)))
        return sorted(found, key=lambda entry: (entry.manifest is not None, -entry.step))

    def pointed(self, name: str) -> Path | None:
        """Where `latest` or `best` points to; None where it points to nothing."""
        target = (self.path / name).resolve()
        return target if target.is_dir() and target.parent == self.path.resolve() else None

    def unfinished(self) -> list[Path]:
        """What unfinished saves left."""
        return sorted(path for path in self.path.glob(f".*{_STAGING}") if path.is_dir() and not path.is_symlink())

    def staging(self, name: str) -> Path:
        """Where a checkpoint is written before it is visible."""
        return self.path / f".{name}{_STAGING}"

    def repair(self) -> list[str]:
        """Repair what a killed process left; returns the names of unfinished checkpoints, which are removed.

        A checkpoint whose replacement did not become visible takes its place again.
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
        """Make a whole folder visible, in place of one of the same name."""
        self.check_token()
        final = self.path / name
        if final.exists():
            # The same step again, as an export or the best: the old one goes when the new one is in its place.
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
        """Remove what no name points to and the history does not hold: all of it, or its newest `keep`.

        What has no readable manifest stays, for a person to look at; so does what is being read, until the next save.
        """
        self.check_token()
        named = {self.pointed(name) for name in (LATEST, BEST)}
        readable = [entry for entry in self.entries() if entry.manifest is not None]
        history = [entry.path for entry in readable if entry.manifest is not None and entry.manifest.history]
        kept = set(history if keep == 0 else history[:keep])
        for entry in readable:
            if entry.path in kept or entry.path.resolve() in named:
                continue
            with _locked(entry.path, wait=False) as free:
                if not free:
                    _log.info("%s is being read and is kept until the next save", entry.path)
                    continue
                # Renamed first: what is half removed must not look like a checkpoint.
                gone = self.path / f".{entry.path.name}{_GONE}"
                os.replace(entry.path, gone)
            shutil.rmtree(gone)

    def _discard(self, path: Path) -> None:
        gone = path.with_name(path.name.removesuffix(_OLD) + _GONE)
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
        shutil.rmtree(gone)

    def point(self, name: str, target: Path) -> None:
        """Make `latest` or `best` point to a checkpoint."""
        self.check_token()
        temporary = self.path / f".{name}{_STAGING}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        os.replace(temporary, self.path / name)
        durable.sync(self.path)


def find(source: Path, dir_name: str) -> Path | None:
    """The checkpoint that a path names: itself, or the latest of a run; None when there is none.

    Where a run's `latest` points to nothing, the newest checkpoint is it.
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
    """The readable checkpoints beside the one that a path names, newest first."""
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
        if not path.is_file() or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise Broken(f"{path}: its run has just removed it")
        yield
    finally:
        # Unlocked, not only closed: a forked worker may hold a copy of the descriptor, and with it the lock.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextmanager
def _locked(checkpoint: Path, *, wait: bool) -> Iterator[bool]:
    """Lock readers out of a checkpoint that is removed; yields whether no one was reading it."""
    if not (checkpoint / FACTS).is_file():
        yield True
        return
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
