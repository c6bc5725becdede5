"""Heartbeat of a rank: one small file, written by a thread that keeps running when training is stuck."""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from danling_conf._torch_private.distributed import outstanding_collective
from danling_conf.parallel.waiting import waits_for
from danling_conf.records.heartbeats import heartbeat_file
from danling_conf.records.logs import is_full, show_unwritable
from danling_conf.runner.observe.summary import used_bytes
from danling_conf.schema.files import no_links
from danling_conf.schema.observability import HeartbeatConfig

_log = logging.getLogger(__name__)
LATE_SHARE = 0.8
"""Share of its time limit after which a collective is reported: some backends end the process at the limit."""
_SAMPLE_SECONDS = 0.2
"""Between two looks at whether the rank waits for others."""
_PATIENCE = 1.0
"""Seconds after which a collective that has not ended is waited for, rather than under way."""


class Heartbeat:
    """Writes `rank-<n>.json` into a folder, whole each time, once every `heartbeat.interval_seconds`.

    A full disk does not stop the run: it is shown once.

    Args:
        folder: of the heartbeats of all ranks.
        facts: what does not change: attempt, rank, world size.
        look: returns step, total_steps, epoch and last_step_time (seconds since 1970, or None) as they are now; called
            from the thread.
        limit: returns the time limit of collectives, in seconds; None where it is torch's own.
        check_token: raises where another attempt has taken over the run; its ranks then write the heartbeats.
        overdue: called, from the thread, with a collective that has used up most of its limit, and the seconds that it
            has taken.
    """

    def __init__(
        self,
        section: HeartbeatConfig,
        folder: Path,
        *,
        facts: dict[str, Any],
        look: Callable[[], dict[str, Any]],
        limit: Callable[[], float | None] = lambda: None,
        check_token: Callable[[], None] = lambda: None,
        overdue: Callable[[dict[str, Any], float], None] = lambda collective, waited: None,
    ) -> None:
        self.enabled = section.enabled
        self.waited_for: dict[str, Any] | None = None
        """The collective that the rank was last seen to wait in."""
        self._interval = section.interval_seconds
        self._folder = folder
        self._facts = {**facts, "host": platform.node(), "pid": os.getpid(), "interval": section.interval_seconds}
        self._look, self._limit, self._overdue, self._check_token = look, limit, overdue, check_token
        self._late = 0.0
        self._path = heartbeat_file(folder, facts["rank"])
        self._state: tuple[str, float] = ("starting", time.time())
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._thread_of_training = threading.get_ident()
        self._warned = False
        self._samples = [0, 0]
        """Looks since the last heartbeat, and those at which the rank waited for others."""

    @classmethod
    def of_run(cls, section: HeartbeatConfig, run: Path, **arguments: Any) -> Heartbeat:
        """The heartbeat of a rank of the run in a directory."""
        return cls(section, run / section.dir_name, **arguments)

    def state(self, what: str) -> None:
        """Set what the rank does from now on (`records.heartbeats.STATES`)."""
        if what != self._state[0]:
            self._state = (what, time.time())

    def start(self) -> None:
        """Write the first heartbeat, and the others from a thread. Nothing where heartbeats are switched off."""
        if not self.enabled or self._thread is not None:
            return
        self._thread_of_training = threading.get_ident()
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
        """The content of a heartbeat that is written now."""
        now = time.time()
        state, since = self._state
        looks, waits = self._samples
        beat = {**self._facts, **self._look(), "state": state, "state_since": since}
        beat["waiting_share"] = waits / looks if looks else None
        collective = self._waiting_in()
        if collective is not None and now - collective["since"] >= _PATIENCE:
            beat |= {"state": "waiting in a collective", "state_since": collective["since"], "collective": collective}
            beat["waiting_for"] = waits_for(self._thread_of_training)
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
        """Note whether the rank waits for others, and report a collective that will time out soon."""
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
        """The collective that the training thread waits in; None where it does something else.

        A collective that has not ended is not enough: gradients are reduced while the backward pass computes, and ranks
        agree on signals while they wait for data. `parallel.waiting` marks the code that may wait.
        """
        return None if waits_for(self._thread_of_training) is None else outstanding_collective()

    def _write(self) -> None:
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._check_token()
            self._folder.mkdir(exist_ok=True)  # not its parents: a run whose directory is gone is not made anew
            with open(temporary, "w", opener=no_links) as file:
                file.write(json.dumps(self.content()) + "\n")
            os.replace(temporary, self._path)
        except Exception as error:  # a run must not fail for its heartbeat
            full = isinstance(error, OSError) and is_full(error)
            if isinstance(error, OSError) and full:
                show_unwritable(self._path, error)
            if not self._warned:
                self._warned = True
                # A warning of each rank would be shown beside that line.
                _log.log(
                    logging.INFO if full else logging.WARNING,
                    "no heartbeat could be written, and training goes on: %s",
                    error,
                )
            try:
                temporary.unlink(missing_ok=True)
            except OSError:  # a disk that cannot write may not delete either
                return
