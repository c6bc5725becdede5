"""Lock of a run's directory: only one live attempt may write to it.

It is a `flock`, which the system releases however the holder ends. Where Slurm lost a node, the old processes may run
on and hold it: then the restart count of the job is a fencing token that lets the newer start take over.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from danling_conf.records.reading import read_text
from danling_conf.schema.files import RUN_LOCK
from danling_conf.topology.violation import ConfigRefused, Violation


class RunLock:
    """Exclusive lock on a run's directory, held until released or until this process ends.

    Args:
        fence: fencing token `(job, start)` of a job that a cluster may start again. A lock that an earlier start of the
            same job holds is taken over.

    Raises:
        ConfigRefused: another process holds the lock.
    """

    def __init__(self, run_directory: Path, fence: tuple[str, int] | None = None) -> None:
        self._path = run_directory / RUN_LOCK
        # "a+" creates the file and does not truncate it: it names its holder until the lock is ours.
        self._file: IO[str] = open(self._path, "a+")  # noqa: SIM115  the lock lives as long as the file is open
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            if fence is None or not _is_earlier_start(holder, fence):
                raise ConfigRefused([_live(run_directory, holder)]) from None
            self._file = self._take_over()
        else:
            self._file.seek(0)
            if fence is not None and _is_earlier_start(self._file.read().strip(), fence):
                # A network file system drops the locks of a node that it lost, though its processes may run on there.
                self._file.close()
                self._file = self._take_over()
        self._file.truncate(0)
        mark = f", start {fence[1]} of job {fence[0]}" if fence is not None else ""
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}{mark}")
        self._file.flush()
        _held.add(self)

    def _take_over(self) -> IO[str]:
        """Replace the locked file, so that its holder can see, by the inode, that it lost the run."""
        other = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        file = open(other, "w+")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.replace(other, self._path)
        return file

    def check(self) -> None:
        """Raises LostRun where a later start of the same job has taken over the run."""
        mine, there = os.fstat(self._file.fileno()), os.stat(self._path)
        if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
            raise LostRun(f"{self._path.parent}: a later start of this job has taken over the run; this one ends")

    def release(self) -> None:
        """Let another process take the run."""
        # The file stays: if it were removed, two processes could each lock a different file of this name.
        self._file.close()

    def forget(self) -> None:
        """Close the file in a forked child: parent and child share the lock, and it must end with the parent.

        Otherwise a worker of a DataLoader that outlives a killed rank would keep the run locked.
        """
        self._file.close()


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
    """Whether a process holds the run: one on this machine, or on another if the file system shares its locks."""
    return is_held(run / RUN_LOCK)


def is_held(path: Path) -> bool:
    """Whether a process holds the lock in a file. Leaves no trace, and needs no right to write."""
    try:
        # O_NONBLOCK: opening a FIFO blocks until somebody opens its other end. O_CLOEXEC: a child must not hold it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return False
        # Shared, so that two processes that look at the same time do not see each other as holders.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


class LostRun(RuntimeError):
    """This attempt no longer owns its run, and must not write to it."""


def _is_earlier_start(holder: str, fence: tuple[str, int]) -> bool:
    found = re.search(r", start (\d+) of job (\S+)$", holder)
    return found is not None and found[2] == fence[0] and int(found[1]) < fence[1]


def _live(run_directory: Path, holder: str) -> Violation:
    return Violation("resume", str(run_directory), f"the run is live: {holder} holds it", "wait for it, or end it")


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)
