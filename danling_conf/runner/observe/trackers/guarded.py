"""Guard around a tracker, so that it cannot stop training: an error is shown once, and slow work runs in a thread."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from functools import partial

from danling_conf.records.logs import is_full, show_unwritable
from danling_conf.records.run_lock import LostRun
from danling_conf.runner.observe.trackers.tracker import Record, RunFacts, Tracker

_log = logging.getLogger(__name__)
_WAITING_RECORDS = 1000
_LAST_SECONDS = 120.0
"""How long the end of a run waits for what a tracker still has to send."""


class Guarded:
    """A tracker that is not called any more after its first error, which is shown once.

    Args:
        say: shows a line to the user and in the log.
        background: whether records are taken by a thread, for a tracker that talks to a network or a database: neither
            its time nor its hanging delays training.
    """

    def __init__(self, tracker: Tracker, say: Callable[[str], None], *, background: bool) -> None:
        self.tracker, self._say = tracker, say
        self.failed = False
        self._queue: queue.Queue[Record] | None = queue.Queue(_WAITING_RECORDS) if background else None
        self._thread: threading.Thread | None = None
        self._lost = False
        self._end: tuple[str, float | None] | None = None
        """How the run ended, once it has."""

    def start(self, facts: RunFacts) -> None:
        if self._queue is None:
            self.call(lambda: self.tracker.start(facts))
            return
        self._thread = threading.Thread(
            target=self._run, args=(facts,), name=f"danling-conf-{self.tracker.name}", daemon=True
        )
        self._thread.start()

    def log(self, record: Record) -> None:
        if self.failed:
            return
        if self._queue is None:
            self.call(lambda: self.tracker.log(record))
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            if not self._lost:
                self._lost = True
                self._say(f"{self.tracker.name} takes metrics too slowly: some are not sent; they are in metrics.jsonl")

    def finish(self, status: str, score: float | None) -> None:
        if self.failed:
            return
        if self._thread is None:
            self.call(lambda: self.tracker.finish(status, score))
            return
        self._end = (status, score)
        self._thread.join(_LAST_SECONDS)
        if self._thread.is_alive():
            self._say(f"{self.tracker.name} has not taken everything after {_LAST_SECONDS:.0f} s: the rest is not sent")

    def _run(self, facts: RunFacts) -> None:
        """The thread: everything that the tracker does, in order."""
        assert self._queue is not None
        self.call(lambda: self.tracker.start(facts))
        while not self.failed:
            try:
                record = self._queue.get(timeout=0.1)
            except queue.Empty:
                if self._end is None:
                    continue
                self.call(partial(self.tracker.finish, *self._end))
                return
            self.call(partial(self.tracker.log, record))

    def call(self, call: Callable[[], None]) -> None:
        """Do something with the tracker; an error is the last thing that it does. Raises LostRun alone."""
        if self.failed:
            return
        try:
            call()
        except LostRun:  # no fault of the tracker: this attempt must not write any more, and ends
            self.failed = True
            raise
        except Exception as error:
            self.failed = True
            if isinstance(error, OSError) and is_full(error):
                show_unwritable(self.tracker.name, error)
                return
            _log.debug("%s failed", self.tracker.name, exc_info=True)
            self._say(f"{self.tracker.name} failed, and training goes on without it: {type(error).__name__}: {error}")
