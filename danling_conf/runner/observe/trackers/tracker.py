"""Interface of trackers: everything that metrics go to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from danling_conf.records.run_directory import Attempt

TRAINING, EVALUATION, LOGGED, END = "training", "evaluation", "logged", "end"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was measured at one step."""

    kind: str
    """`training`: over the steps since the last such record. `evaluation`: of the splits as the model is now. `logged`:
    what `Runner.log` and `Runner.log_text` took, apart from a log line. `end`: of the whole run."""
    scalars: Mapping[str, float | None]
    """Values by dotted name; None for what is no finite number."""
    step: int
    epoch: int
    time: float
    """Seconds since 1970."""
    note: str = ""
    """For a person."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Texts by dotted name, such as sample predictions."""

    def finite(self) -> dict[str, float]:
        """The scalars that have a value."""
        return {name: value for name, value in self.scalars.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts of the run for a tracker."""

    attempt: Attempt
    settings: Mapping[str, Any]
    """The whole configuration, flat: dotted path and value."""
    lineage: str
    experiment: str
    step: int
    """The step that the attempt resumes from."""
    score_key: str
    """Name of the metric that the score is."""


class Tracker(Protocol):
    """Takes metrics. It may raise: `Guarded` shows the error once and continues without it."""

    name: str

    def start(self, facts: RunFacts) -> None:
        """Open what is written to. The attempt may resume a run that was tracked before."""

    def log(self, record: Record) -> None:
        """Take a record."""

    def finish(self, status: str, score: float | None) -> None:
        """Close it. `status` is one of `records.status`; the score is the best so far."""
