"""Pace of log lines: as the configuration says, or so that a person can follow a run of any speed."""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as distributed

from danling_conf.parallel.process_group import is_distributed
from danling_conf.parallel.waiting import waiting

LONGEST_SECONDS = 60.0
"""Between two lines, where no interval is set."""
SHORTEST_SECONDS = 1.0
"""Between two lines of a run whose length is not known; one of known length has about fifty lines in all."""
FIRST_SECONDS = 10.0
"""After so long, a run that has not logged anything yet logs how far it is."""


class LogPace:
    """The steps at which log lines are due.

    Args:
        every: steps between lines, as set or calculated from the run's length.
        fixed: whether that stays, however long steps take: where the user set it, and where it decides over which steps
            the training loss is averaged that the run is scored by.
        length_known: whether `every` was calculated from the run's length.
    """

    def __init__(self, every: int, *, fixed: bool, length_known: bool) -> None:
        self.every = every
        self._wanted, self._fixed, self._length_known = every, fixed, length_known
        self._due = every
        self._probe: int | None = None
        self._distance = 1
        """Steps between two times of asking whether a line is due; it doubles."""
        self._began = 0.0

    def begin(self, step: int) -> None:
        """Start at a step: the first one is done and clocks start."""
        self._due = step if step % self.every == 0 else self._next(step)
        self._began = time.perf_counter()
        self._probe = None if self._fixed or self._due <= step + 1 else step + 1

    @property
    def next(self) -> int:
        """The step of the next line, or at which it is decided whether one is due."""
        return self._due if self._probe is None else min(self._due, self._probe)

    def due(self, step: int) -> bool:
        """Whether a line is due at a step. Collective where `step` is `next`, the same on all ranks."""
        if step == self._due:
            return True
        if step != self._probe:
            return False
        if self._longest_wait() >= FIRST_SECONDS:
            return True
        self._distance *= 2
        following = step + self._distance
        self._probe = following if following < self._due else None
        return False

    def logged(self, step: int, step_seconds: float | None) -> None:
        """A line was written at a step; `step_seconds` is how long a step takes, the same number on all ranks."""
        self._probe = None
        if not self._fixed and step_seconds:
            self.every = self._fitting(step_seconds)
        self._due = self._next(step)

    def _fitting(self, step_seconds: float) -> int:
        longest = max(1, int(LONGEST_SECONDS / step_seconds))
        shortest = 1 if self._length_known else math.ceil(SHORTEST_SECONDS / step_seconds)
        return max(1, min(max(self._wanted, shortest), longest))

    def _next(self, step: int) -> int:
        return step - step % self.every + self.every

    def _longest_wait(self) -> float:
        waited = torch.tensor(time.perf_counter() - self._began)
        if is_distributed():
            with waiting("the log line"):
                distributed.all_reduce(waited, op=distributed.ReduceOp.MAX)
        return float(waited)
