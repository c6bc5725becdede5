"""What heartbeats say of a run's ranks: who is slowest, and who is stuck."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from danling_conf.records.heartbeats import heartbeat_settings, newest_attempt, read_heartbeats

SILENT_INTERVALS = 3.0
"""A rank whose heartbeat is older than so many intervals does not write any more: it is stopped, or gone."""
LEAST_SECONDS = 2.0
"""Nobody is called silent or behind before that."""
CLEAR_SHARE = 0.15
"""A rank that waits less than every other by this share of its time is the slowest."""
_LIVE = "running"
_OF_RESULT = {"completed": "completed", "failed": "failed", "interrupted": "stopped", "refused": "refused"}


@dataclass(frozen=True, kw_only=True)
class RankSeen:
    """One rank, as its newest heartbeat says."""

    rank: int
    host: str
    pid: int
    step: int
    total_steps: int | None
    epoch: int
    state: str
    state_seconds: float
    """How long it has been in that state."""
    step_seconds_ago: float | None
    """Since its last optimizer step; None before the first."""
    memory_bytes: int
    waiting_share: float | None
    """Of the time since the heartbeat before, how much it waited for other ranks; None where that is not known."""
    written_seconds_ago: float
    stuck: str
    """Why it is held to be stuck; "" where it is not."""


@dataclass(frozen=True, kw_only=True)
class RunSeen:
    """The ranks of a run's newest attempt."""

    run: str
    attempt: str | None
    status: str
    """`running`, as far as its ranks have not said that they end; else how it ended."""
    world_size: int
    ranks: list[RankSeen]
    missing: list[int]
    """Ranks that have not written a heartbeat."""
    slowest: int | None
    """The rank that the others wait for: it is steps behind, or waits least itself; None where none stands out."""
    stuck: list[int]
    note: str
    """Why there is nothing to see, where there is not."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def look_at(run: Path, now: float | None = None) -> RunSeen:
    """The ranks of a run as they are now.

    Args:
        now: seconds since 1970; the time, where None.
    """
    now = time.time() if now is None else now
    settings = heartbeat_settings(run)
    attempt = newest_attempt(run)
    beats = read_heartbeats(run, run / str(settings.get("dir_name", "heartbeats")))
    if attempt is not None:
        beats = {rank: beat for rank, beat in beats.items() if beat["attempt"] == attempt.name}
    ended = _ended(attempt)
    status = ended or (_LIVE if attempt is not None else "empty")
    world = next((int(beat["world_size"]) for beat in beats.values()), 0)
    live = ended is None
    ranks = [_rank(beat, now, beats, live=live) for beat in beats.values()]
    missing = [rank for rank in range(world) if rank not in beats]
    stuck = [each.rank for each in ranks if each.stuck] + (missing if live else [])
    note = ""
    if not beats:
        note = "no heartbeats: heartbeat=default writes them" if not settings.get("enabled") else "no heartbeat yet"
    return RunSeen(
        run=str(run),
        attempt=None if attempt is None else attempt.name,
        status=status,
        world_size=world,
        ranks=ranks,
        missing=missing,
        slowest=_slowest(beats) if live else None,
        stuck=sorted(stuck),
        note=note,
    )


def _rank(beat: dict[str, Any], now: float, beats: dict[int, dict[str, Any]], *, live: bool) -> RankSeen:
    last = beat["last_step_time"]
    return RankSeen(
        rank=beat["rank"],
        host=beat["host"],
        pid=beat["pid"],
        step=beat["step"],
        total_steps=beat.get("total_steps"),
        epoch=beat["epoch"],
        state=beat["state"],
        state_seconds=max(0.0, beat["written"] - beat["state_since"]),
        step_seconds_ago=None if last is None else max(0.0, now - last),
        memory_bytes=beat["memory_bytes"],
        waiting_share=beat.get("waiting_share"),
        written_seconds_ago=max(0.0, now - beat["written"]),
        stuck=_stuck(beat, now, beats) if live else "",
    )


def _stuck(beat: dict[str, Any], now: float, beats: dict[int, dict[str, Any]]) -> str:
    """A rank that writes no more; or one that is behind and not waiting while others wait for it."""
    silent = now - beat["written"]
    if silent > max(LEAST_SECONDS, SILENT_INTERVALS * beat["interval"]):
        return "" if beat["state"] == "stopping" else f"silent for {silent:.0f} s: stopped, or gone"
    others = [other for other in beats.values() if other["rank"] != beat["rank"]]
    waiting = [other for other in others if other["state"].startswith("waiting")]
    behind = others and beat["step"] <= min(other["step"] for other in others)
    longest = max((other["written"] - other["state_since"] for other in waiting), default=0.0)
    patience = max(10.0, 2 * beat["interval"])
    if behind and waiting and not beat["state"].startswith("waiting") and longest > patience:
        return f"{len(waiting)} rank{'' if len(waiting) == 1 else 's'} have waited for it for {longest:.0f} s"
    return ""


def _slowest(beats: dict[int, dict[str, Any]]) -> int | None:
    """The one that is behind by more than the step that ranks may differ by, though its heartbeat is no older; or that
    does not wait while all others do; or that waits clearly least."""
    if len(beats) < 2:
        return None
    every = list(beats.values())
    last = min(every, key=lambda beat: (beat["step"], beat["rank"]))
    ahead = [beat for beat in every if beat["step"] > last["step"] + 1 and beat["written"] <= last["written"]]
    if ahead:
        return int(last["rank"])
    busy = [beat for beat in every if not beat["state"].startswith("waiting")]
    if len(busy) == 1:
        return int(busy[0]["rank"])
    shares = sorted((beat["waiting_share"], beat["rank"]) for beat in every if beat.get("waiting_share") is not None)
    if len(shares) == len(every) and shares[1][0] - shares[0][0] >= CLEAR_SHARE:
        return int(shares[0][1])
    return None


def _ended(attempt: Path | None) -> str | None:
    """How an attempt ended; None where it has not said so."""
    if attempt is None:
        return None
    try:
        status = json.loads((attempt / "result.json").read_text())["status"]
    except (OSError, ValueError, KeyError):
        return None
    return _OF_RESULT.get(status, status)
