"""What is known of a run's attempts: when each began and ended, how, and with what."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danling_conf.config.identity import flatten
from danling_conf.records.heartbeats import read_heartbeats
from danling_conf.records.metrics import read_lines

COMPLETED, RUNNING, STOPPED, FAILED, LOST = "completed", "running", "stopped", "failed", "lost"
"""How an attempt ended: `stopped` in order by a signal, `lost` without a word, as by SIGKILL."""
_OF_RESULT = {"completed": COMPLETED, "interrupted": STOPPED, "failed": FAILED, "refused": "refused"}


@dataclass(frozen=True, kw_only=True)
class AttemptFacts:
    """One attempt."""

    name: str
    begin: float
    """Seconds since 1970."""
    end: float
    """When it ended, or gave its last sign of life."""
    status: str
    error: str | None
    score: float | None
    first_step: int
    last_step: int
    ranks: int
    code_id: str | None
    command: Sequence[str]
    config: dict[str, Any]
    difference: dict[str, Any]
    """Settings that differ from the defaults, by dotted path."""
    environment: dict[str, Any]
    diff: str
    """Of the code that was not committed."""


def attempts_of(run: Path) -> list[AttemptFacts]:
    """The attempts of a run, in the order in which they began."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(run):
        lines.setdefault(line["attempt"], []).append(line)
    beats = list(read_heartbeats(run).values())
    folders = [folder for folder in (run / "attempts").glob("*") if folder.is_dir()]
    folders.sort(key=lambda folder: (folder.name.partition(".")[0], _number(folder.name)))
    live = is_live(run)
    found = []
    for folder in folders:
        newest = live and folder is folders[-1]
        signs = [beat["written"] for beat in beats if beat["attempt"] == folder.name]
        found.append(_facts(folder, lines.get(folder.name, []), signs, live=newest))
    return found


def status_of(attempts: Sequence[AttemptFacts]) -> str:
    """How a run stands: as its last attempt does."""
    return attempts[-1].status if attempts else "empty"


def is_live(run: Path) -> bool:
    """Whether a process on this machine holds the run."""
    path = run / "run.lock"
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _facts(folder: Path, lines: list[dict[str, Any]], signs: list[float], *, live: bool) -> AttemptFacts:
    frozen, result = read_json(folder / "frozen.json"), read_json(folder / "result.json")
    started = folder / "frozen.json"
    times = [line["time"] for line in lines] + signs
    if started.is_file():
        times.append(started.stat().st_mtime)
    if result:
        times.append((folder / "result.json").stat().st_mtime)
    steps = [line["step"] for line in lines]
    config = frozen.get("config", {})
    return AttemptFacts(
        name=folder.name,
        begin=min(times, default=folder.stat().st_mtime),
        end=max(times, default=folder.stat().st_mtime),
        status=RUNNING if live and not result else _OF_RESULT.get(str(result.get("status")), LOST),
        error=result.get("error"),
        score=result.get("score"),
        first_step=min(steps, default=0),
        last_step=max(steps, default=0),
        ranks=len(list(folder.glob("rank-*.log"))),
        code_id=frozen.get("code_id"),
        command=frozen.get("attempt", {}).get("command", []),
        config=config,
        difference=_yaml(folder / "difference.yaml"),
        environment=read_json(folder / "environment.json"),
        diff=_text(folder / "git.diff"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """An object in a file; {} where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    if not path.is_file():
        return {}
    found = OmegaConf.to_container(OmegaConf.load(path))
    return flatten(found) if isinstance(found, dict) else {}  # type: ignore[arg-type]


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _number(name: str) -> int:
    number = name.partition(".")[2]
    return int(number) if number.isdecimal() else 1
