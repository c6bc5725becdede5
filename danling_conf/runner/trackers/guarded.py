"""Trackers that cannot stop training: their errors are said once, and what is slow goes on in a thread."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from danling_conf.runner.trackers.tracker import Record, RunFacts, Tracker

_log = logging.getLogger(__name__)
_WAITING_RECORDS = 1000
_LAST_SECONDS = 120.0
"""How long the end of a run waits for what a tracker still has to send."""


class Guarded:
    """A tracker whose first error is said once, after which it is not called any more.

    Args:
        say: tells the user and the log.
        background: whether records are taken by a thread, for a tracker that talks to a network or a database: neither
            its time nor its hanging holds training up.
    """

    def __init__(self, tracker: Tracker, say: Callable[[str], None], *, background: bool) -> None:
        self.tracker, self._say = tracker, say
        self.failed = False
        self._queue: queue.Queue[Record | None] | None = queue.Queue(_WAITING_RECORDS) if background else None
        self._thread: threading.Thread | None = None
        self._lost = False

    def start(self, facts: RunFacts) -> None:
        self.call(lambda: self.tracker.start(facts))
        if self._queue is not None and not self.failed:
            self._thread = threading.Thread(target=self._run, name=f"danling-conf-{self.tracker.name}", daemon=True)
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
        if self._thread is None or self._queue is None:
            self.call(lambda: self.tracker.finish(status, score))
            return
        ended = threading.Thread(target=self._finish, args=(status, score), daemon=True)
        ended.start()
        ended.join(_LAST_SECONDS)
        if ended.is_alive():
            self._say(f"{self.tracker.name} has not taken everything after {_LAST_SECONDS:.0f} s: the rest is not sent")

    def _finish(self, status: str, score: float | None) -> None:
        assert self._queue is not None
        assert self._thread is not None
        self._queue.put(None)
        self._thread.join()
        if not self.failed:
            self.call(lambda: self.tracker.finish(status, score))

    def _run(self) -> None:
        assert self._queue is not None
        while (record := self._queue.get()) is not None:
            if not self.failed:
                taken = record
                self.call(lambda taken=taken: self.tracker.log(taken))  # type: ignore[misc]

    def call(self, call: Callable[[], None]) -> None:
        """Do something with the tracker; an error is the last thing that it does."""
        if self.failed:
            return
        try:
            call()
        except Exception as error:
            self.failed = True
            _log.debug("%s failed", self.tracker.name, exc_info=True)
            self._say(f"{self.tracker.name} failed, and training goes on without it: {type(error).__name__}: {error}")
