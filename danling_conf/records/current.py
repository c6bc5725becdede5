"""Current attempt and rank of this process: set by its launcher, read by the runner."""

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
    """Whether the launcher sends the same signal again while the run saves, and SIGKILL when its time is over (Slurm
    does): a second signal then ends nothing."""


_current: Current | None = None


def enter(current: Current | None) -> None:
    """Set, or clear, the attempt and rank of this process."""
    global _current
    _current = current


def current() -> Current | None:
    """The attempt and rank of this process; None where nothing launched it (a notebook, plain `@hydra.main`)."""
    return _current
