"""Stop signals: a run that receives one saves a checkpoint and exits in order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from danling_conf.records.status import HasOutcome, Outcome, Status, exit_code_of_signal, signal_of_exit_code

STOPPING = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
"""Signals that make a run save and exit. Slurm sends SIGTERM, and SIGUSR1 or SIGUSR2 as a warning before a limit."""


class Stopped(HasOutcome, SystemExit):
    """Ends the process with 128 + the signal's number, as a shell reports it. Raised after everything is saved.

    It is a SystemExit, so that an `except Exception` of the user's code does not swallow it.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(exit_code_of_signal(number))

    @property
    def name(self) -> str:
        """The signal's name: SIGTERM."""
        return signal.Signals(self.number).name

    @property
    def outcome(self) -> Outcome:
        return Outcome(status=Status.INTERRUPTED, exit_code=exit_code_of_signal(self.number), message=str(self))

    def __str__(self) -> str:
        return f"stopped by {self.name}"


class StoppedEarly(Stopped):
    """A signal that came while no runner listened: there was nothing to save."""


@contextmanager
def stopping_in_order() -> Iterator[None]:
    """Inside the block, a stop signal that nobody handles raises StoppedEarly, as Ctrl-C raises KeyboardInterrupt: by
    default it would end the process, and nothing would say how the run ended. A second one does end it."""
    process, default = os.getpid(), signal.SIG_DFL

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, default)
        if os.getpid() != process:  # a forked child, which is not the run
            os.kill(os.getpid(), number)
        else:
            raise StoppedEarly(number)

    numbers = [int(getattr(signal, name)) for name in STOPPING if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    for number in numbers:
        if signal.getsignal(number) is default:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            if signal.getsignal(number) is stop:
                signal.signal(number, default)


_early = 0


def note_early_signals() -> None:
    """Remember stop signals that arrive before the run handles them, so that it stops at its first step.

    A job of a cluster may be warned while it still imports torch; by default the first signal would kill the process.
    """

    def note(number: int, frame: Any) -> None:
        # Set a flag and nothing else: a handler can run within a buffered write, and must not write itself.
        global _early
        _early = _early or number

    for name in STOPPING:
        signal.signal(getattr(signal, name), note)


def early_signal() -> int:
    """The first signal that was remembered; 0 for none."""
    return _early


_noted = False


def note_stop() -> None:
    """Remember that this process knows of a stop signal."""
    global _noted
    _noted = True


def stop_is_noted() -> bool:
    """Whether this process knows of a stop signal, so that another one would make it leave without saving."""
    return _noted


def is_stop(exit_code: int) -> bool:
    """Whether a process exited with the code of `Stopped`."""
    return signal_of_exit_code(exit_code) in {getattr(signal, name) for name in STOPPING if hasattr(signal, name)}
