"""Stopwatch of a run: where wall time goes between two log lines, as the host sees it.

A lap ends where a log line has waited for the device, so its sum is true on accelerators as well. What a lap is split
into is what the host itself waited for: the loader, evaluation, saving. The rest is computation with the communication
in it; how much of that is communication which nothing hides, only a trace shows (`profiling`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EVALUATION, CHECKPOINT, FAULT = "evaluation", "checkpoint", "fault"


@dataclass(frozen=True, kw_only=True)
class Lap:
    """Seconds and steps since the lap before."""

    steps: int
    seconds: float
    """All of them."""
    data: float
    """Waiting for the loader's next batch."""
    evaluation: float
    checkpoint: float
    """Waiting for a checkpoint; what is written in the background does not count."""
    fault: float = 0.0
    """Steps that replica groups have refused, and waiting for a quorum."""

    @property
    def stepping(self) -> float:
        """Seconds that went into steps, data included."""
        return max(0.0, self.seconds - self.evaluation - self.checkpoint - self.fault)


class Stopwatch:
    """Laps between log lines; begins when `restart` is called, after the first step."""

    def __init__(self) -> None:
        self.data = 0.0
        """Seconds spent waiting for batches in this lap."""
        self._apart = {EVALUATION: 0.0, CHECKPOINT: 0.0, FAULT: 0.0}
        self._began: float | None = None
        self._step = 0

    def restart(self, step: int) -> None:
        """Begin a lap here: what came before, as compilation, would spoil it."""
        self._began, self._step, self.data = time.perf_counter(), step, 0.0
        self._apart = dict.fromkeys(self._apart, 0.0)

    @contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """Count the time of a block as evaluation or checkpoint."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._apart[what] += time.perf_counter() - began

    def lost(self, seconds: float) -> None:
        """Count the time of a step that does not count as that of a fault."""
        self._apart[FAULT] += seconds

    def lap(self, step: int) -> Lap | None:
        """End the lap at a step and begin the next; None where no lap began, or it has no step."""
        began, first = self._began, self._step
        if began is None or step == first:
            return None
        lap = Lap(
            steps=step - first,
            seconds=time.perf_counter() - began,
            data=self.data,
            evaluation=self._apart[EVALUATION],
            checkpoint=self._apart[CHECKPOINT],
            fault=self._apart[FAULT],
        )
        self.restart(step)
        return lap
