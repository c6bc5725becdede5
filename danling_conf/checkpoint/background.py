"""Background thread of saves: one job at a time, whose failure is raised by the next call and never lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from danling_conf.topology.violation import PlainError


class SaveFailed(PlainError):
    """A checkpoint was not written. The message has its path, the reason, and which checkpoint is usable instead."""


class Background:
    """A thread for one job at a time. What the job raises is raised by the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        """What the last job has raised, until `check` raises it."""
        self.what = ""
        """The running job, or the last one."""

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, what: str, job: Callable[[], None]) -> None:
        """Start a job. Raises RuntimeError while another one is running: call `wait` first."""
        if self.busy:
            raise RuntimeError(f"{self.what} is still being written")
        self.check()
        self.what = what
        # A daemon thread: a process whose disk hangs must still be able to exit. A normal exit calls `wait` first.
        self._thread = threading.Thread(target=self._run, args=(job,), name="danling-conf-checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of the last job, once."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def wait(self, timeout: float | None = None) -> float:
        """Wait until no job is running. Returns the seconds spent waiting.

        Raises:
            SaveFailed: the job failed, or did not end within `timeout` seconds.
        """
        began = time.perf_counter()
        if self._thread is not None:
            self._thread.join(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
            if self._thread.is_alive():
                raise SaveFailed(
                    f"{self.what} was not written within checkpoint.wait_timeout={timeout:g} seconds and is not "
                    "usable; latest is the checkpoint before it: raise the limit, or unset it to wait for ever"
                )
            self._thread = None
        self.check()
        return time.perf_counter() - began

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # torch's CheckpointException derives from BaseException, not Exception
            self.failure = error
