"""Tasks in copies of this process: each sees all that this one has built, and can be ended at any time."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

MOST_CORES = 8


@dataclass(frozen=True)
class Failed:
    """A task that raised, with its error, or that ended without a word."""

    error: Exception


class Forked:
    """Runs tasks, as many at once as this process may use cores.

    A pool of `concurrent.futures` waits for what runs when it is closed; a plan has a time by which it must be done.
    """

    def __init__(self) -> None:
        self._cores = min(MOST_CORES, len(os.sched_getaffinity(0)))
        self._queue: list[tuple[Any, Callable[..., Any], tuple[Any, ...]]] = []
        self._running: dict[Connection, tuple[Any, BaseProcess]] = {}
        self._context = multiprocessing.get_context("fork")

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *error: Any) -> None:
        for connection, (_, process) in self._running.items():
            process.kill()
            process.join()
            connection.close()
        self._running.clear()

    @property
    def idle(self) -> bool:
        """Whether a further task would begin at once."""
        return len(self._running) < self._cores and not self._queue

    @property
    def busy(self) -> bool:
        """Whether a result is still to come."""
        return bool(self._running or self._queue)

    def submit(self, key: Any, function: Callable[..., Any], *arguments: Any) -> None:
        """Run a task, now or when a core is free."""
        self._queue.append((key, function, arguments))
        self._fill()

    def next(self, end: float | None = None) -> tuple[Any, Any] | None:
        """The key and the result of the next task that is done, a `Failed` where it raised; None where there is none
        left, or it is `end` on the clock of `time.monotonic`."""
        if not self.busy:
            return None
        ready = wait(list(self._running), None if end is None else max(0.0, end - time.monotonic()))
        if not ready:
            return None
        connection = ready[0]
        assert isinstance(connection, Connection)
        key, process = self._running.pop(connection)
        try:
            result = connection.recv()
        except EOFError:
            result = Failed(RuntimeError("the process of a trace has ended without a word"))
        connection.close()
        process.join()
        self._fill()
        return key, result

    def _fill(self) -> None:
        while self._queue and len(self._running) < self._cores:
            key, function, arguments = self._queue.pop(0)
            receiving, sending = self._context.Pipe(duplex=False)
            process = self._context.Process(target=_run, args=(sending, function, arguments), daemon=True)
            process.start()
            sending.close()
            self._running[receiving] = key, process


def _run(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")  # of torch about the build of a model: whoever trains it sees them once
    try:
        result = function(*arguments)
    except Exception as error:  # of the user's model; whoever asked decides
        result = Failed(error)
    try:
        connection.send(result)
    except (TypeError, AttributeError, ValueError):  # an error that cannot be pickled
        connection.send(Failed(RuntimeError(f"{type(result).__name__}: {result}")))
