"""A run that was told to stop, and did so in order."""

from __future__ import annotations

import signal
from typing import Any


class Stopped(SystemExit):
    """Ends the process with 128 + the signal's number, as a shell would say it; what was to be saved is saved."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(128 + number)

    @property
    def name(self) -> str:
        """The signal's name: SIGTERM."""
        return signal.Signals(self.number).name

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


STOPPING = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
"""The signals that ask a run to save and leave."""


def is_stop(exit_code: int) -> bool:
    """Whether a process left with the exit code of `Stopped`."""
    return exit_code - 128 in {getattr(signal, name) for name in STOPPING if hasattr(signal, name)}
