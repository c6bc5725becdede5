"""Stop signals: a run that gets one saves, and ends in order."""

from __future__ import annotations

import signal
from typing import Any

from danling_conf.records.status import HasOutcome, Outcome, Status, exit_code_of_signal, signal_of_exit_code

STOPPING = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
"""The signals that ask a run to save and leave."""


class Stopped(HasOutcome, SystemExit):
    """Ends the process with 128 + the signal's number, as a shell reports it; what was to be saved is saved."""

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


_early = 0


def note_early_signals() -> None:
    """Keep stopping signals that come before a run listens for them, so that it stops at its first step.

    For jobs of a cluster, which may get a warning while they still start; without it, the first one ends the process.
    """

    def note(number: int, frame: Any) -> None:
        global _early
        _early = _early or number

    for name in STOPPING:
        signal.signal(getattr(signal, name), note)


def early_signal() -> int:
    """The first signal that was kept; 0 for none."""
    return _early


def is_stop(exit_code: int) -> bool:
    """Whether a process left with the exit code of `Stopped`."""
    return signal_of_exit_code(exit_code) in {getattr(signal, name) for name in STOPPING if hasattr(signal, name)}
