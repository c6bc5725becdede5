"""What a failed job means for the rest of its sweep."""

from __future__ import annotations

import re
from dataclasses import dataclass

from danling_conf.records.status import Status

CONTINUE, STOP, RETRY = "continue", "stop", "retry"
RETRIED = (Status.FAILED, Status.OUT_OF_MEMORY, Status.NODE_LOST, Status.PREEMPTED, Status.LOST)
"""Ends after which another start may do better."""


@dataclass(frozen=True, kw_only=True)
class OnFailure:
    """`hydra.launcher.on_failure`, read."""

    stops: bool = False
    """Whether the other jobs end with the first that fails."""
    retries: int = 0
    """How often a failed job is started again."""


def parse_on_failure(text: str) -> OnFailure:
    """Read `continue`, `stop`, `retry` or `retry N`. Raises ValueError."""
    found = re.fullmatch(r"(continue|stop|retry)(?:[ _]?(\d+))?", text.strip())
    if found is None or (found[2] and found[1] != RETRY):
        raise ValueError(f"on_failure is {CONTINUE}, {STOP}, or {RETRY} N, not {text!r}")
    return OnFailure(stops=found[1] == STOP, retries=int(found[2] or 1) if found[1] == RETRY else 0)
