"""What a run has measured, as JSON lines in the run: one file over all attempts, appended by rank 0.

Each line is an object with `time` (seconds since 1970), `attempt` (the attempt's folder name), `step`, `epoch` and
dotted scalars (`train.loss`, `val.loss`, `train.lr`, `train.samples_per_second`). A line without scalars marks where an
attempt starts: at the step that it resumes from. A line with `status` is the attempt's last: how it ended.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from danling_conf.records.reading import is_moment, is_number, warn_of_damage
from danling_conf.records.status import Status, written_status
from danling_conf.schema.files import METRICS, Damaged, parse_object, read_regular

BASE = ("time", "attempt", "step", "epoch")
"""The keys that every line has."""
STATUS = "status"
"""The key of the line with which an attempt ends."""
PRODUCTIVE = "train.productive_seconds"
"""Seconds since the line before that went into steps: without evaluation, checkpoints and compilation."""
_TAIL_BYTES = 1 << 16


def metrics_file(run: Path) -> Path:
    """The file of a run."""
    return run / METRICS


def read_lines(run: Path) -> list[dict[str, Any]]:
    """All lines as they were written, those of steps that were done again included; [] where there is no file.

    A line that is no record is left out with a warning; a last one without its end is still being written.
    """
    path = metrics_file(run)
    try:
        content = read_regular(path, limit=None)
    except FileNotFoundError:
        return []
    except Damaged as damage:
        warn_of_damage(damage.path, damage.reason)
        return []
    lines, bad = [], []
    whole = content.rfind(b"\n") + 1
    for number, line in enumerate(content.splitlines(), 1):
        found = parse_line(line)
        if found is not None:
            lines.append(found)
        elif line.strip():
            bad.append(number)
    if bad and whole < len(content) and bad[-1] == content.count(b"\n") + 1:
        bad.pop()
    if bad:
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        warn_of_damage(path, f"line {bad[0]}{more} cannot be read, and is left out")
    return lines


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record in a line, without values that are no numbers; None where there is none."""
    try:
        found = parse_object(line)
    except ValueError:
        return None
    attempt, step, epoch = found.get("attempt"), found.get("step"), found.get("epoch")
    if not is_moment(found.get("time")) or not isinstance(attempt, str):
        return None
    if any(not isinstance(count, int) or isinstance(count, bool) for count in (step, epoch)):
        return None
    kept = {name: value for name, value in found.items() if name in BASE or value is None or is_number(value)}
    status = written_status(found.get(STATUS))
    return kept if status is None else {**kept, STATUS: status}


def last_line(run: Path) -> dict[str, Any] | None:
    """The last record of a run; None where there is none. Only the end of a file that may be long is read."""
    path = metrics_file(run)
    try:
        lines = read_regular(path, limit=None, start=max(0, path.stat().st_size - _TAIL_BYTES)).splitlines()
    except OSError:
        return None
    except Damaged as damage:
        warn_of_damage(damage.path, damage.reason)
        return None
    return next((found for found in map(parse_line, reversed(lines)) if found is not None), None)


def end_metrics(run: Path, attempt: str, status: Status) -> None:
    """Write how an attempt ended as its last record, unless the runner has; nothing where it measured nothing.

    A loop of the user's own that raises never comes to the runner's last call; and a function can fail after it.
    """
    last = last_line(run)
    if last is None or last["attempt"] != attempt or last.get(STATUS) == status:
        return
    line = {"time": time.time(), "attempt": attempt, "step": last["step"], "epoch": last["epoch"], STATUS: status}
    with open(metrics_file(run), "ab+") as file:
        file.seek(-1, os.SEEK_END)
        torn = file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")


def ends_in_metrics(lines: list[dict[str, Any]]) -> dict[str, Status]:
    """How attempts ended, by their names, as far as their last lines say it."""
    return {line["attempt"]: line[STATUS] for line in lines if STATUS in line}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The history of a run: one object a step, in the order of steps.

    What was measured at one step is one object, the newest value of each key. Where an attempt resumed from an earlier
    step, the lines of the attempt before it that lie beyond that step are left out.
    """
    by_step: dict[int, dict[str, Any]] = {}
    attempt = None
    for line in read_lines(run):
        if line["attempt"] != attempt:
            attempt = line["attempt"]
            # A line that measured something was made at its step; one that marks a start comes after that step.
            first = line["step"] - (1 if is_measurement(line) else 0)
            by_step = {step: found for step, found in by_step.items() if step <= first}
        if is_measurement(line):
            step = line["step"]
            measured = {name: value for name, value in line.items() if name != STATUS}
            by_step[step] = {**by_step.get(step, {}), **measured}
    return [by_step[step] for step in sorted(by_step)]


def is_measurement(line: dict[str, Any]) -> bool:
    """Whether a line holds anything but where, when and as what it was written."""
    return len(line) - (STATUS in line) > len(BASE)


def series(history: list[dict[str, Any]], key: str, by: str = "step") -> list[tuple[float, float]]:
    """The points of one metric, from what `read_metrics` returns; values that are no finite number are left out."""
    return [(line[by], line[key]) for line in history if is_number(line.get(key))]


def goodput(run: Path) -> float | None:
    """The share of a run's wall time that went into steps which still count, over all attempts; None without lines.

    Wall time is that of the attempts, from the start of each to its last line; what lies between them (a queue) is
    none. Steps that were done again after a restart count once.
    """
    spans: dict[str, list[float]] = {}
    for line in read_lines(run):
        spans.setdefault(line["attempt"], []).append(line["time"])
    wall = sum(max(times) - min(times) for times in spans.values())
    return productive_seconds(run) / wall if wall > 0 else None


def productive_seconds(run: Path) -> float:
    """Seconds that went into the steps of a run's history."""
    return sum(line.get(PRODUCTIVE) or 0.0 for line in read_metrics(run))
