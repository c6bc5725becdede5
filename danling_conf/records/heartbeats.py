"""Heartbeats of a run's ranks: `RUN/<heartbeat.dir_name>/rank-<n>.json`, one object a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

STATES = (
    "starting", "compiling", "training", "evaluating", "saving", "reporting", "waiting in a collective", "stopping",
)  # fmt: skip
"""What a rank can be doing."""


def heartbeat_file(folder: Path, rank: int) -> Path:
    """The file of a rank."""
    return folder / f"rank-{rank}.json"


def newest_attempt(run: Path) -> Path | None:
    """The folder of the attempt that began last; None for a run without one."""
    found = [folder for folder in (run / "attempts").glob("*") if folder.is_dir()]
    return max(found, key=lambda folder: (folder.name.partition(".")[0], _number(folder.name)), default=None)


def heartbeat_settings(run: Path) -> dict[str, Any]:
    """The section `heartbeat` of the newest attempt; {} where nothing was frozen."""
    attempt = newest_attempt(run)
    try:
        return dict(json.loads((attempt / "frozen.json").read_text())["config"]["heartbeat"]) if attempt else {}
    except (OSError, ValueError, KeyError):
        return {}


def heartbeat_folder(run: Path) -> Path:
    """The folder of a run's heartbeats."""
    return run / str(heartbeat_settings(run).get("dir_name", "heartbeats"))


def read_heartbeats(run: Path, folder: Path | None = None) -> dict[int, dict[str, Any]]:
    """The newest heartbeat of each rank of the attempt that wrote last, by rank; {} where there is none.

    Args:
        folder: of the heartbeats, where it is known.
    """
    found: dict[int, dict[str, Any]] = {}
    for path in (folder or heartbeat_folder(run)).glob("rank-*.json"):
        if not re.fullmatch(r"rank-[0-9]+\.json", path.name):
            continue
        try:
            beat = json.loads(path.read_text())
            found[int(beat["rank"])] = beat
        except (OSError, ValueError, KeyError, TypeError):
            continue  # of another program, or being replaced
    newest = max((beat["attempt"] for beat in found.values()), key=_order, default=None)
    return {rank: beat for rank, beat in sorted(found.items()) if beat["attempt"] == newest}


def _order(attempt: str) -> tuple[str, int]:
    return attempt.partition(".")[0], _number(attempt)


def _number(name: str) -> int:
    number = name.partition(".")[2]
    return int(number) if number.isdecimal() else 1
