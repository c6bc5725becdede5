"""Sweep lock: the process that holds it is the sweep's monitor, and only one acts on a sweep at a time.

Only the monitor records ends that jobs did not write themselves, retries failed jobs, and stops the others. A process
without the lock only watches; it takes over when the monitor has ended, in whatever way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path
from typing import IO

from danling_conf.records.reading import read_text
from danling_conf.records.run_lock import is_held
from danling_conf.schema.files import SWEEP_LOCK, Damaged, open_lock


class SweepLock:
    """The lock of a sweep, not held at first.

    Args:
        sweep: the sweep's directory.
    """

    def __init__(self, sweep: Path) -> None:
        self._path = sweep / SWEEP_LOCK
        self._file: IO[str] | None = None
        self._signed = self._useless = False

    def acquire(self, tries: int = 1) -> bool:
        """Take the lock if it is free. Returns whether this process may act on the sweep.

        Args:
            tries: attempts, 0.1 s apart. More than one is needed where another process may just look: `is_free` holds
                the lock for a moment.
        """
        for _ in range(tries - 1):
            if self.acquire():
                return True
            time.sleep(0.1)
        if self._file is None and not self._take():
            return False
        if self._file is not None:
            self._sign()
        return True

    def is_free(self) -> bool:
        """Whether no other process monitors the sweep now. Writes nothing, and needs no permission to write."""
        return self._file is not None or not is_held(self._path)

    def _take(self) -> bool:
        if self._useless:
            return True
        # `_useless` means that no lock is possible here, and that the jobs are better off with a monitor than without.
        try:
            file = open(open_lock(self._path), "r+")  # noqa: SIM115  the lock lives as long as the file is open
        except Damaged:
            self._useless = True
            return True
        except OSError as error:
            # Without permission it is another user's sweep, which is only watched. A full disk, for instance, is no
            # reason to leave the jobs without a monitor.
            self._useless = error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)
            return self._useless
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            self._useless = not isinstance(error, BlockingIOError)  # a file system without locks
            return self._useless
        self._file = file
        return True

    def _sign(self) -> None:
        if self._signed or self._file is None:
            return
        self._signed = True
        with contextlib.suppress(OSError):  # the name is for humans; the lock works without it
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {os.uname().nodename}")
            self._file.flush()

    def release(self) -> None:
        """Let another process monitor the sweep."""
        if self._file is not None:
            self._file.close()
            self._file, self._signed = None, False

    @property
    def holder(self) -> str:
        """The process that holds it, as named in the file."""
        return read_text(self._path).strip() or "another process"

    def __enter__(self) -> SweepLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
