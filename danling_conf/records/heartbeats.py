"""Heartbeats of a run's ranks: one JSON object for each rank, in `RUN/<heartbeat.dir_name>/rank-<n>.json`.

They let another process see which rank is slow or stuck while the run is alive.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from danling_conf.records.reading import Fields, is_moment, is_number, read_fields, read_json, warn_of_damage
from danling_conf.records.run_directory import attempt_order, newest_attempt
from danling_conf.schema.files import FROZEN

STATES = (
    "starting",
    "compiling",
    "training",
    "evaluating",
    "saving",
    "reporting",
    "waiting in a collective",
    "stopping",
)
"""States of a rank."""


def heartbeat_file(folder: Path, rank: int) -> Path:
    """The file of a rank."""
    return folder / f"rank-{rank}.json"


def heartbeat_settings(run: Path) -> Fields:
    """The section `heartbeat` of the newest attempt; empty where nothing was frozen."""
    attempt = newest_attempt(run)
    return (
        Fields(run) if attempt is None else read_fields(attempt / FROZEN, "config").table("config").table("heartbeat")
    )


def heartbeat_folder(run: Path) -> Path:
    """The folder of a run's heartbeats."""
    # Only the last part of the path: a damaged or hostile record must not make a reader leave the run.
    name = heartbeat_settings(run).text("dir_name") or "heartbeats"
    return run / Path(name.replace("\0", "")).name


def read_heartbeats(run: Path, folder: Path | None = None) -> dict[int, dict[str, Any]]:
    """The newest heartbeat of each rank of the attempt that wrote last, by rank; {} where there is none.

    Args:
        folder: folder of the heartbeats; looked up when None.
    """
    found: dict[int, dict[str, Any]] = {}
    for path in (folder or heartbeat_folder(run)).glob("rank-*.json"):
        if not re.fullmatch(r"rank-[0-9]+\.json", path.name):
            continue
        beat = read_json(path)
        wrong = [name for name, is_right in _FACTS.items() if not is_right(beat.get(name))]
        if not beat:
            continue
        if wrong:
            warn_of_damage(path, f"it is not a heartbeat: {', '.join(wrong)} missing or of another type")
            continue
        found[beat["rank"]] = beat
    # A resume on fewer ranks leaves files of the earlier, larger attempt behind.
    newest = max((beat["attempt"] for beat in found.values()), key=attempt_order, default=None)
    return {rank: beat for rank, beat in sorted(found.items()) if beat["attempt"] == newest}


def _is_count(value: Any) -> bool:
    # `bool` is a subclass of `int`: true would pass as 1.
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_FACTS: dict[str, Callable[[Any], bool]] = {
    "attempt": _is_text,
    "rank": _is_count,
    # Readers make a list of all ranks: a damaged digit must not make it one of billions.
    "world_size": lambda value: _is_count(value) and value < 1 << 24,
    "host": _is_text,
    "pid": _is_count,
    "step": _is_count,
    "epoch": _is_count,
    "state": _is_text,
    "state_since": is_moment,
    "written": is_moment,
    "interval": is_number,
    "memory_bytes": is_number,
    "total_steps": lambda value: value is None or _is_count(value),
    "last_step_time": lambda value: value is None or is_moment(value),
    "waiting_share": lambda value: value is None or is_number(value),
}
"""The keys of a heartbeat, and a check of each value: readers compute with all of them."""
