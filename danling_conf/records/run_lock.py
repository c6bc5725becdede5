"""Lock of a run's directory: only one live attempt may write to it.

It is a `flock`, which the system releases however the holder ends. The ranks of an attempt may outlive the command that
holds it, in a long step or a long save: they share a second lock, and nobody takes the run while one of them lives.

Locks do not reach everywhere: where Slurm lost a node, the old processes may run on. So each attempt draws a fencing
token when it takes the run, and every writer compares it with the one in the lock file before it writes.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from danling_conf.records.reading import read_text
from danling_conf.schema.files import LEAD_LOCK, RANKS_LOCK, RUN_LOCK, open_lock
from danling_conf.topology.violation import ConfigRefused, PlainError, Violation

_SECONDS, _SECONDS_ON_A_CLUSTER = 1.0, 60.0
"""How long to try to lock out ranks: a command that shows runs locks their file for a moment, and a cluster starts a
job again while it still ends ranks of the start before."""
_PAUSE_SECONDS = 0.02


class LostRun(PlainError):
    """This attempt no longer owns its run, and must not write to it."""


class _Lock:
    """A lock that is held until it is released, or this process ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _opened(path)
        _held.add(self)

    def release(self) -> None:
        """Let another process take it."""
        # The file stays: if it were removed, two processes could each lock a different file of this name.
        self._file.close()


class RunLock(_Lock):
    """Exclusive lock on a run's directory.

    Args:
        fence: `(job, start)` of a job that a cluster may start again. A lock that an earlier start of the same job
            holds is taken over.

    Attributes:
        token: fencing token of this attempt.

    Raises:
        ConfigRefused: another process, or a rank of an earlier attempt, holds the run.
    """

    def __init__(self, run_directory: Path, fence: tuple[str, int] | None = None) -> None:
        super().__init__(run_directory / RUN_LOCK)
        self.token = secrets.token_hex(8)
        try:
            self._take(run_directory, fence)
        except BaseException:
            self.release()
            raise

    def _take(self, run_directory: Path, fence: tuple[str, int] | None) -> None:
        free = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        holder = read_text(self._path).partition("\n")[0].strip()
        # Even where it is free: a network file system drops the locks of a node that it lost, though its processes may
        # run on there.
        if fence is not None and _is_earlier_start(holder, fence):
            self._replace()
            self._sign(fence)
        elif not free:
            raise ConfigRefused([_live(run_directory, f"{holder or 'another process'} holds it")])
        else:
            with _ranks_locked_out(run_directory, holder, _SECONDS if fence is None else _SECONDS_ON_A_CLUSTER):
                self._sign(fence)

    def _replace(self) -> None:
        """Replace the locked file: its holder keeps the lock of a file without a name."""
        other = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        file = _opened(other)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.replace(other, self._path)
        self._file.close()
        self._file = file

    def _sign(self, fence: tuple[str, int] | None) -> None:
        mark = f", start {fence[1]} of job {fence[0]}" if fence is not None else ""
        text = f"process {os.getpid()} on {os.uname().nodename}{mark}\ntoken {self.token}\n".encode()
        # Not emptied first, so that there is a token in it at any time.
        os.pwrite(self._file.fileno(), text, 0)
        self._file.truncate(len(text))


class RankLock(_Lock):
    """A rank's share of its run.

    Raises:
        LostRun: another attempt has taken the run.
    """

    def __init__(self, run_directory: Path, token: str) -> None:
        super().__init__(run_directory / RANKS_LOCK)
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH)
            check_token(run_directory, token)
        except BaseException:
            self.release()
            raise


class LeadLock(_Lock):
    """The right to write a run's records, of which one replica group has it at a time. It passes on when that group's
    process ends, however it ends."""

    def __init__(self, attempt: Path) -> None:
        super().__init__(attempt / LEAD_LOCK)
        self.held = False

    def take(self) -> bool:
        """Take it, unless another group has it. Returns whether this process has it now."""
        if not self.held:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.held = True
            except BlockingIOError:
                return False
        return True


def check_token(run_directory: Path, token: str) -> None:
    """Compare the fencing token of an attempt with that of the attempt which took its run last.

    Raises:
        LostRun: they differ.
    """
    found = re.search(r"^token (\w+)$", read_text(run_directory / RUN_LOCK, most=4096), re.MULTILINE)
    # No token is the damage of a file, and no other attempt.
    if found is not None and found[1] != token:
        raise LostRun(f"{run_directory}: another attempt has taken over the run; this one ends")


@contextmanager
def _ranks_locked_out(run_directory: Path, holder: str, seconds: float) -> Iterator[None]:
    """Keeps ranks from taking a share of the run. Raises ConfigRefused where one has it."""
    with _opened(run_directory / RANKS_LOCK) as file:
        if not any(_locks(file.fileno()) for _ in range(int(seconds / _PAUSE_SECONDS))):
            rule = f"ranks of {holder or 'an earlier attempt'}, which is gone, have not ended yet"
            raise ConfigRefused([_live(run_directory, rule)])
        yield


def _locks(descriptor: int) -> bool:
    """Whether a lock can be taken; after a moment where it cannot."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(_PAUSE_SECONDS)
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that a run's lock names."""

    process: int
    host: str

    @property
    def here(self) -> bool:
        """Whether it is a process of this machine."""
        return self.host == os.uname().nodename


def holder_of(run: Path) -> Holder | None:
    """The process that last held a run, which may be gone; None where the lock file does not name one.

    While the lock is held (`is_held`), that process holds it.
    """
    found = re.match(r"process (\d{1,9}) on ([^,\s]+)", read_text(run / RUN_LOCK))
    # `kill(0)` reaches the sender's whole process group, and 1 is init: a damaged file must name neither.
    return Holder(process=int(found[1]), host=found[2]) if found is not None and int(found[1]) > 1 else None


def is_live(run: Path) -> bool:
    """Whether a process holds the run or, as a rank, a share of it: one on this machine, or on another if the file
    system shares its locks."""
    return is_held(run / RUN_LOCK) or is_held(run / RANKS_LOCK, shared=True)


def is_held(path: Path, *, shared: bool = False) -> bool:
    """Whether a process holds the lock in a file. Leaves no trace, and needs no right to write.

    Args:
        shared: whether those that hold it share it.
    """
    try:
        # O_NONBLOCK: opening a FIFO blocks until somebody opens its other end. O_CLOEXEC: a child must not hold it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return False
        if shared:
            # Twice, since another process may look at the same moment, and would be taken for a holder.
            return not any(_locks(descriptor) for _ in range(2))
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def _is_earlier_start(holder: str, fence: tuple[str, int]) -> bool:
    found = re.search(r", start (\d+) of job (\S+)$", holder)
    return found is not None and found[2] == fence[0] and int(found[1]) < fence[1]


def _live(run_directory: Path, holder: str) -> Violation:
    return Violation("resume", str(run_directory), f"the run is live: {holder}", "wait for it, or end it")


def _opened(path: Path) -> IO[bytes]:
    return open(open_lock(path), "r+b", buffering=0)


_held: weakref.WeakSet[_Lock] = weakref.WeakSet()


def _forget_all() -> None:
    """In a forked child: it shares the locks of its parent, and they must end with the parent. Otherwise a worker of a
    DataLoader that outlives a killed rank would keep the run locked."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_forget_all)
