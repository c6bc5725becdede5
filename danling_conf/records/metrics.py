"""What a run has measured, as JSON lines in the run: one file over all attempts, appended by rank 0.

Each line is an object with `time` (seconds since 1970), `attempt` (the attempt's folder name), `step`, `epoch` and
dotted scalars (`train.loss`, `val.loss`, `train.lr`, `train.samples_per_second`). A line without scalars marks where an
attempt starts: at the step that it goes on from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
BASE = ("time", "attempt", "step", "epoch")
"""The keys that every line has."""
PRODUCTIVE = "train.productive_seconds"
"""Seconds since the line before that went into steps: without evaluation, checkpoints and compilation."""


def metrics_file(run: Path) -> Path:
    """The file of a run."""
    return run / METRICS


def read_lines(run: Path) -> list[dict[str, Any]]:
    """All lines as they were written, those of steps that were done again included; [] where there is no file.

    A line that is not whole, as a process that was killed leaves it, is passed over.
    """
    try:
        text = metrics_file(run).read_text(errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and all(key in found for key in BASE):
            lines.append(found)
    return lines


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The history of a run: one object a step, in the order of steps.

    What was measured at one step is one object, the newest value of each key. Where an attempt went on from an earlier
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
            by_step[step] = {**by_step.get(step, {}), **line}
    return [by_step[step] for step in sorted(by_step)]


def is_measurement(line: dict[str, Any]) -> bool:
    """Whether a line holds anything but where and when it was written."""
    return len(line) > len(BASE)


def series(history: list[dict[str, Any]], key: str, by: str = "step") -> list[tuple[float, float]]:
    """The points of one metric, from what `read_metrics` gives; values that are no finite number are left out."""
    return [(line[by], line[key]) for line in history if isinstance(line.get(key), (int, float))]


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
