"""What this process was started for: set by whoever launched it, read by the runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from danling_conf.records.run_directory import Attempt
from danling_conf.topology.rank_environment import SINGLE, RankEnvironment


@dataclass(frozen=True, kw_only=True)
class Current:
    """The attempt that this process takes part in, and as which rank."""

    attempt: Attempt
    ranks: RankEnvironment = SINGLE
    store: Any = None
    """The `torch.distributed.Store` that the ranks met at, if they have met."""
    guard: Callable[[], None] = lambda: None
    """Raises where a later start of the same job has taken the run over, see `RunLock.check`."""
    repeats_signals: bool = False
    """Whether whoever started this process sends the same signal again while it is saving, and SIGKILL when it means
    it: a second signal then ends nothing."""


_current: Current | None = None


def enter(current: Current | None) -> None:
    """Set, or clear, what this process was started for."""
    global _current
    _current = current


def current() -> Current | None:
    """What this process was started for; None where nobody launched it (a notebook, plain `@hydra.main`)."""
    return _current
