"""A rank's sign of life: one small file, written by a thread that goes on when training is stuck."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from danling_conf._torch_private import outstanding_collective
from danling_conf.records.heartbeats import heartbeat_file
from danling_conf.runner.observe.memory import used_bytes
from danling_conf.schema.observability import HeartbeatConfig

_log = logging.getLogger(__name__)
LATE_SHARE = 0.8
"""Of its time limit: a collective that takes longer is told of, since some backends end the process at the limit."""
_SAMPLE_SECONDS = 0.2
"""Between two looks at whether the rank waits for others."""
_PATIENCE = 1.0
"""Seconds after which a collective that has not ended is waited for, rather than under way."""
_BLOCKING = {"agreed", "_least", "wait_for_all", "_engine_run_backward"}
"""Functions that call into C++ and wait there; the last is torch's backward pass, in whose hooks gradients are
reduced."""


class Heartbeat:
    """Writes `rank-<n>.json` into a folder, whole each time, once every `heartbeat.interval_seconds`.

    A disk that takes no more does not stop the run: it is said once in the log.

    Args:
        folder: of the heartbeats of all ranks.
        facts: what does not change: attempt, rank, world size.
        limit: gives the time limit of collectives, in seconds; None where it is torch's own.
        overdue: is told of a collective that has used up most of its limit, and how long it has taken; from the thread.
        look: gives step, total_steps, epoch and last_step_time (seconds since 1970, or None) as they are now; called
        from
            the thread.
    """

    def __init__(
        self,
        section: HeartbeatConfig,
        folder: Path,
        *,
        facts: dict[str, Any],
        look: Callable[[], dict[str, Any]],
        limit: Callable[[], float | None] = lambda: None,
        overdue: Callable[[dict[str, Any], float], None] = lambda collective, waited: None,
    ) -> None:
        self.enabled = section.enabled
        self.waited_for: dict[str, Any] | None = None
        """The collective that the rank was last seen to wait in."""
        self._interval = section.interval_seconds
        self._folder = folder
        self._facts = {**facts, "host": platform.node(), "pid": os.getpid(), "interval": section.interval_seconds}
        self._look, self._limit, self._overdue = look, limit, overdue
        self._late = 0.0
        self._path = heartbeat_file(folder, facts["rank"])
        self._state: tuple[str, float] = ("starting", time.time())
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._main = threading.main_thread().ident
        self._complained = False
        self._samples = [0, 0]
        """Looks since the last heartbeat, and those at which the rank waited for others."""

    @classmethod
    def of_run(cls, section: HeartbeatConfig, run: Path, **arguments: Any) -> Heartbeat:
        """The heartbeat of a rank of the run in a directory."""
        return cls(section, run / section.dir_name, **arguments)

    def state(self, what: str) -> None:
        """Say what the rank does from now on (`heartbeat_file.STATES`)."""
        if what != self._state[0]:
            self._state = (what, time.time())

    def start(self) -> None:
        """Write the first heartbeat, and go on from a thread. Nothing where heartbeats are switched off."""
        if not self.enabled or self._thread is not None:
            return
        self._main = threading.get_ident()
        self._write()
        self._thread = threading.Thread(target=self._run, name="danling-conf-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write a last heartbeat, and stop."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        self._write()

    def content(self) -> dict[str, Any]:
        """What a heartbeat would say now."""
        now = time.time()
        state, since = self._state
        looks, waits = self._samples
        beat = {**self._facts, **self._look(), "state": state, "state_since": since}
        beat["waiting_share"] = waits / looks if looks else None
        collective = self._waiting_in()
        if collective is not None and now - collective["since"] >= _PATIENCE:
            beat |= {"state": "waiting in a collective", "state_since": collective["since"], "collective": collective}
        return {**beat, "memory_bytes": used_bytes(), "written": now}

    def _run(self) -> None:
        written = time.monotonic()
        while not self._stop.wait(min(self._interval, _SAMPLE_SECONDS)):
            self._sample()
            if time.monotonic() - written >= self._interval:
                written = time.monotonic()
                self._write()
                self._samples = [0, 0]

    def _sample(self) -> None:
        """Look at whether the rank waits for others, and tell of a collective that will time out soon."""
        collective = self._waiting_in()
        self._samples[0] += 1
        if collective is None:
            return
        self._samples[1] += 1
        waited = time.time() - collective["since"]
        if waited >= _PATIENCE:
            self.waited_for = collective
        limit = self._limit()
        if limit is not None and waited >= LATE_SHARE * limit and collective["since"] != self._late:
            self._late = collective["since"]
            self._overdue(collective, waited)

    def _waiting_in(self) -> dict[str, Any] | None:
        """The collective that the main thread waits in; None where it does something else."""
        return outstanding_collective() if self._blocked() else None

    def _write(self) -> None:
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.content()) + "\n")
            os.replace(temporary, self._path)
        except Exception as error:  # whatever it is, it must not be what a run ends by
            if not self._complained:
                self._complained = True
                _log.warning("no heartbeat could be written, and training goes on: %s", error)
            try:
                temporary.unlink(missing_ok=True)
            except OSError:  # the disk that takes no more may not give either
                return

    def _blocked(self) -> bool:
        """Whether the main thread is somewhere that waits for other ranks."""
        frame = sys._current_frames().get(self._main or 0)
        return frame is not None and _waits(frame)


def _waits(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_name in _BLOCKING or f"{os.sep}torch{os.sep}distributed{os.sep}" in code.co_filename
