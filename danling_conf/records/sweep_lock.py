"""Who looks after a sweep: one process at a time, the holder of a lock in the sweep's directory.

Only the holder writes down ends of jobs that left no word, starts failed ones again, and stops the others. Whoever does
not get the lock looks on, and gets it when the holder has ended, however that was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Any

LOCK = "following.lock"


class FollowingLock:
    """The lock of a sweep, not held at first.

    Args:
        sweep: the sweep's directory.
    """

    def __init__(self, sweep: Path) -> None:
        self._path = sweep / LOCK
        self._file: Any = None
        self._signed = self._useless = False

    def acquire(self, tries: int = 1) -> bool:
        """Take the lock if it is free; says whether this process has it.

        Args:
            tries: one does not wait. Somebody who asks whether it is free holds it for a moment.
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
        """Whether nobody else looks after the sweep now. Leaves no trace, and needs no right to write."""
        if self._file is not None:
            return True
        try:
            with open(self._path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # there is no such file yet, or the file system has no locks
            return True
        return True

    def _take(self) -> bool:
        if self._useless:
            return True
        try:
            file = open(self._path, "a+")  # noqa: SIM115  the lock lives as long as the file is open
        except OSError as error:
            # Somebody else's sweep is only looked at; but on a full disk, too, somebody must look after it.
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
        if self._signed:
            return
        self._signed = True
        with contextlib.suppress(OSError):  # the name is for people only
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {os.uname().nodename}")
            self._file.flush()

    def release(self) -> None:
        """Let somebody else look after the sweep."""
        if self._file is not None:
            self._file.close()
            self._file, self._signed = None, False

    @property
    def holder(self) -> str:
        """Who has it, as far as the file says."""
        try:
            return self._path.read_text().strip() or "another process"
        except OSError:
            return "another process"

    def __enter__(self) -> FollowingLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
