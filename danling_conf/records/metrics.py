"""Metrics of a run: JSON lines in one file for all attempts, to which rank 0 appends.

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
from danling_conf.schema.files import METRICS, Damaged, no_links, parse_object, read_regular

BASE = ("time", "attempt", "step", "epoch")
"""The keys that every line has."""
STATUS = "status"
"""Key that only the last line of an attempt has."""
PRODUCTIVE = "train.productive_seconds"
"""Seconds since the previous line that were spent in steps, without evaluation, checkpoints and compilation."""
_TAIL_BYTES = 1 << 16


def metrics_file(run: Path) -> Path:
    """The file of a run."""
    return run / METRICS


def read_lines(run: Path) -> list[dict[str, Any]]:
    """All lines as they were written, including those of steps that were repeated; [] where there is no file.

    A damaged line is skipped with a warning. A last line without a newline is still being written, and is no damage.
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
    """The record in a line, without values that are not numbers; None for a line that is not a record."""
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
    """The last record of a run; None where there is none. Reads only the end of the file, which may be long."""
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
    """Append the end of an attempt as its last record, unless the runner wrote it. Does nothing without any record.

    A training loop of the user's own that raises never reaches the runner's last call, and a function can fail after
    it.
    """
    last = last_line(run)
    if last is None or last["attempt"] != attempt or last.get(STATUS) == status:
        return
    line = {"time": time.time(), "attempt": attempt, "step": last["step"], "epoch": last["epoch"], STATUS: status}
    with open(metrics_file(run), "ab+", opener=no_links) as file:
        # The attempt may have been killed within a line: without a newline both lines would be unreadable.
        file.seek(-1, os.SEEK_END)
        torn = file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")


def ends_in_metrics(lines: list[dict[str, Any]]) -> dict[str, Status]:
    """The ends of attempts by name, for those whose last line has one."""
    return {line["attempt"]: line[STATUS] for line in lines if STATUS in line}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The history of a run: one object a step, in the order of steps.

    Everything measured at one step is one object, with the newest value of each key. Where an attempt resumed from an
    earlier step, lines of previous attempts beyond that step are dropped: those steps were trained again.
    """
    by_step: dict[int, dict[str, Any]] = {}
    attempt = None
    for line in read_lines(run):
        if line["attempt"] != attempt:
            attempt = line["attempt"]
            # A marker says "resumed after step n", so step n stays; a measurement at step n replaces step n itself.
            first = line["step"] - (1 if is_measurement(line) else 0)
            by_step = {step: found for step, found in by_step.items() if step <= first}
        if is_measurement(line):
            step = line["step"]
            measured = {name: value for name, value in line.items() if name != STATUS}
            by_step[step] = {**by_step.get(step, {}), **measured}
    return [by_step[step] for step in sorted(by_step)]


def is_measurement(line: dict[str, Any]) -> bool:
    """Whether a line has any scalar, besides the keys that every line has and the status."""
    return len(line) - (STATUS in line) > len(BASE)


def series(history: list[dict[str, Any]], key: str, by: str = "step") -> list[tuple[float, float]]:
    """The points (`by`, value) of one metric in a history of `read_metrics`. Drops values that are not finite."""
    return [(line[by], line[key]) for line in history if is_number(line.get(key))]


def goodput(run: Path) -> float | None:
    """Share of a run's wall time spent in steps that count, over all attempts; None without lines.

    Wall time is summed over attempts, from the first line of each to its last; time between them (in a queue) does not
    count. Steps that were repeated after a restart count once.
    """
    spans: dict[str, list[float]] = {}
    for line in read_lines(run):
        spans.setdefault(line["attempt"], []).append(line["time"])
    wall = sum(max(times) - min(times) for times in spans.values())
    return productive_seconds(run) / wall if wall > 0 else None


def productive_seconds(run: Path) -> float:
    """Seconds spent in the steps of a run's history."""
    return sum(line.get(PRODUCTIVE) or 0.0 for line in read_metrics(run))
