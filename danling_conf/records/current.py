"""Current attempt and rank of this process.

The launcher sets it and the runner reads it. It is global because the user's function stands between the two, and takes
the configuration only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from danling_conf.records.run_directory import Attempt
from danling_conf.topology.rank_environment import SINGLE, RankEnvironment


@dataclass(frozen=True, kw_only=True)
class Current:
    """An attempt, and the rank that this process has in it."""

    attempt: Attempt
    ranks: RankEnvironment = SINGLE
    store: Any = None
    """The `torch.distributed.Store` of the rendezvous; None where there was none. `Any` keeps torch out of here."""
    terminal: int | None = None
    """Descriptor of the command's standard output, of a rank whose own goes to its log; None where it has it itself."""
    repeats_signals: bool = False
    """Whether the launcher repeats its signal while the run saves, and sends SIGKILL in the end, as Slurm does. A
    second signal must then not abort the save."""


_current: Current | None = None


def enter(current: Current | None) -> None:
    """Set, or clear, the attempt and rank of this process."""
    global _current
    _current = current


def current() -> Current | None:
    """The attempt and rank of this process; None where nothing launched it (a notebook, plain `@hydra.main`)."""
    return _current
