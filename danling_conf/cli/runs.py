"""`danling-conf runs DIR`: shows the jobs of a sweep, or all runs below a directory, as a table, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from danling_conf.cli.checkpoints import saved_step
from danling_conf.cli.runs_found import find
from danling_conf.config.identity import flatten, layout_name
from danling_conf.records.find import sweep_of
from danling_conf.records.reading import Fields, read_fields
from danling_conf.records.run_directory import attempts_in, newest_attempt
from danling_conf.records.state import covers
from danling_conf.records.status import Status, in_short
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.schema import Layout
from danling_conf.schema.files import FROZEN, RUN_FILE
from danling_conf.schema.printable import printable, shell_line
from danling_conf.sweep.ends import is_monitored, settle_ends, standing_of
from danling_conf.sweep.rows import Row, best_first, progress, row_of_job, rows_of_sweep, smaller_is_better
from danling_conf.sweep.table import count_states, style_of, table_lines

_LAYOUT = ("parallel.axes.", "fsdp.enabled", "stack")
_ERRORS = 12
_FACTS = (
    "sweep",
    "job",
    "key",
    "job_id",
    "config_id",
    "state",
    "step",
    "total_steps",
    "epoch",
    "saved_step",
    "score",
    "attempts",
    "started",
    "ended",
    "seconds",
    "error",
    "run",
)


@dataclass(kw_only=True)
class Seen:
    """The present content of a directory."""

    path: Path
    rows: list[Row]
    """Rows, the best score first."""
    sweeps: list[SweepDirectory]
    notes: list[str] = field(default_factory=list)
    """Notes for the user below the table."""

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row.settings))


def look(directory: str) -> Seen:
    """Look at a directory, after missing ends of its jobs were settled, if this process has permission.

    Raises ConfigRefused where it has neither sweeps nor runs.
    """
    found = find(directory)
    seen = Seen(path=found.path, rows=[], sweeps=found.sweeps)
    if found.run is not None:
        owner = sweep_of(found.run)
        if owner is None or not covers(owner[1], newest_attempt(found.run)):
            seen.rows = [row_of_run(found.run)]
        else:
            sweep, record = owner
            unstarted, seen.notes = settle_ends(sweep)
            seen.rows = [row_of_job(sweep, sweep.ledger.records()[record.key], unstarted.get(record.key))]
            seen.notes.append(f"job #{record.number} of the sweep {sweep.path}")
        return seen
    for sweep in found.sweeps:
        unstarted, notes = settle_ends(sweep)
        seen.rows += rows_of_sweep(sweep, unstarted)
        seen.notes += notes
    seen.rows += [row_of_run(run) for run in found.runs]
    if len(found.sweeps) != 1 or found.runs:
        _set_differing(seen.rows)
    seen.rows = best_first(seen.rows)
    return seen


def show_runs(directory: str) -> list[str]:
    """The table as lines for a terminal or a file."""
    seen = look(directory)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = _heading(seen) + table_lines(seen.rows, width)
    if sys.stdout.isatty():
        lines = _coloured(lines, seen.rows, len(_heading(seen)))
    return [*lines, "", *map(printable, [*_errors(seen, width), *seen.notes, *_next_steps(seen)])]


def as_csv(directory: str) -> str:
    """CSV with one line per job; the settings that differ come last."""
    seen = look(directory)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_FACTS, *seen.settings])
    for row in seen.rows:
        facts = facts_of(row)
        shown = [facts[name] for name in _FACTS] + [row.settings.get(name) for name in seen.settings]
        writer.writerow([json.dumps(cell) if isinstance(cell, (list, dict, bool)) else cell for cell in shown])
    return file.getvalue()


def as_json(directory: str) -> str:
    """JSON for scripts, including the request of each sweep."""
    seen = look(directory)
    sweeps = []
    for sweep in seen.sweeps:
        request = sweep.request
        kept = {
            "created": request.text("created"),
            "command": request.texts("command"),
            "cluster": request.text("cluster"),
            "launcher": _sayable(dict(request.table("launcher").values)),
        }
        sweeps.append({"path": str(sweep.path), **kept, "looked_after": is_monitored(sweep)})
    jobs = [
        {**facts_of(row), "overrides": list(row.overrides), "settings": _sayable(row.settings)} for row in seen.rows
    ]
    content = {"time": time.time(), "path": str(seen.path), "sweeps": sweeps, "jobs": jobs, "notes": seen.notes}
    return json.dumps(content, indent=1)


def _sayable(settings: dict[str, Any]) -> dict[str, Any]:
    """A value for JSON, which has neither infinity nor NaN."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in settings.items()
    }


def facts_of(row: Row) -> dict[str, object]:
    """A row as plain values; times in seconds since 1970."""
    return {
        "sweep": str(row.sweep) if row.sweep else None,
        "job": row.number,
        "key": row.key,
        "job_id": row.job_id,
        "config_id": row.config_id,
        "state": row.state,
        "step": row.step,
        "total_steps": row.total_steps,
        "epoch": row.epoch,
        "saved_step": saved_step(row.run) if row.run else None,
        "score": row.score,
        "attempts": row.attempts,
        "started": row.started,
        "ended": row.ended,
        "seconds": row.seconds,
        "error": row.error,
        "run": str(row.run) if row.run else None,
    }


def row_of_run(run: Path) -> Row:
    """The row of a run outside of any sweep."""
    attempt, attempts = newest_attempt(run), attempts_in(run)
    frozen = read_fields(attempt / FROZEN, "config") if attempt is not None else Fields(run)
    settings = frozen.table("config")
    config = flatten(dict(settings.values))
    state = standing_of(run)
    made = read_fields(run / RUN_FILE, "config_id", "settings")
    row = Row(
        job_id=frozen.text("job_id"),
        config_id=made.text("config_id"),
        config=config,
        state=state.status,
        error=state.error,
        overrides=frozen.table("attempt").texts("command")[1:],
        run=run,
        score=state.score,
        epochs=settings.integer("epochs"),
        attempts=sum((folder / FROZEN).exists() for folder in attempts),
        smaller_is_better=smaller_is_better(config, run, state.score),
    )
    row.step, row.total_steps, row.epoch = progress(run)
    row.total_steps = row.total_steps or settings.integer("steps")
    running = state.status is Status.RUNNING
    spans = [_span(folder, live=running and folder == attempt) for folder in attempts]
    if spans:
        row.started, row.seconds = min(begin for begin, _ in spans), sum(end - begin for begin, end in spans)
        row.ended = None if running else max(end for _, end in spans)
    return row


def _span(attempt: Path, *, live: bool) -> tuple[float, float]:
    """When an attempt started, and its last sign of life, by the times of its files."""
    times = [path.stat().st_mtime for path in attempt.iterdir() if path.is_file()] or [attempt.stat().st_mtime]
    return min(times), time.time() if live else max(times)


def _set_differing(rows: Sequence[Row]) -> None:
    """Set the settings that differ between rows of different origin: only those that are part of a run's identity."""
    of_rows = []
    for row in rows:
        made = read_fields(row.run / RUN_FILE).table("settings") if row.run else None
        of_rows.append(_with_layout(made) if made else {})
        row.settings = {}
    given = {item.lstrip("+").partition("=")[0] for row in rows for item in row.overrides}
    names = dict.fromkeys(name for each in of_rows for name in each)
    for name in sorted(names, key=lambda name: name not in given):
        values = [each.get(name) for each in of_rows]
        if any(value != values[0] for value in values[1:]):
            for row, value in zip(rows, values, strict=True):
                row.settings[name] = value


def _with_layout(settings: Fields) -> dict[str, object]:
    """The settings by dotted path, with the degrees replaced by the layout's name."""
    axes = settings.table("parallel").table("axes")
    degrees = {axis: axes.integer(axis) for axis in Layout().degrees()}
    known: dict[str, int] = {axis: degree for axis, degree in degrees.items() if degree is not None}
    kept = {path: value for path, value in flatten(dict(settings.values)).items() if not path.startswith(_LAYOUT)}
    return {"parallel": layout_name(Layout(**known, fsdp=settings.table("fsdp").flag("enabled"))), **kept}


def _heading(seen: Seen) -> list[str]:
    return [printable(f"{_what(seen)}: {count_states(seen.rows)}".strip())]


def _what(seen: Seen) -> str:
    if len(seen.rows) == 1 and not seen.sweeps:
        return f"run {near(seen.rows[0].run or seen.path)}"
    if len(seen.sweeps) == 1 and all(row.sweep for row in seen.rows):
        return f"sweep {near(seen.sweeps[0].path)}"
    return near(seen.path)


def near(path: Path) -> str:
    """A path relative to the working directory, where that is shorter to type."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) and path != Path.cwd() else str(path)


def _coloured(lines: list[str], rows: Sequence[Row], first: int) -> list[str]:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    texts = [Text(line) for line in lines]
    texts[first].stylize("bold")
    for text, row in zip(texts[first + 1 :], rows, strict=False):
        text.stylize(style_of(row.state))
    with console.capture() as capture:
        for text in texts:
            console.print(text, soft_wrap=True)
    return capture.get().splitlines()


def _errors(seen: Seen, width: int | None) -> list[str]:
    """Why jobs did not complete, one line each."""
    lines = []
    bad = [row for row in seen.rows if row.error and row.state != Status.COMPLETED]
    for row in bad[:_ERRORS]:
        name = f"#{row.number}" if row.number is not None else row.run.name if row.run else ""
        line = f"{name} {row.state}{_at(row)}: {in_short(row.state, row.error)}"
        lines.append(line if width is None or len(line) <= width else line[: width - 1] + "…")
    return lines + ([f"and {len(bad) - _ERRORS} more"] if len(bad) > _ERRORS else [])


def _at(row: Row) -> str:
    """Where a job ended and what it has saved, unless that is the same step."""
    saved = None if row.run is None or row.step is None else saved_step(row.run)
    return "" if saved is None or saved == row.step else f" at step {row.step}, saved at step {saved}"


def _next_steps(seen: Seen) -> list[str]:
    """Commands that a user may want next."""
    # Of a sweep its jobs alone: a run beside it may have failed, and is not resumed with it.
    rows = [row for row in seen.rows if row.number is not None] if seen.sweeps else seen.rows
    if not rows or all(row.state == Status.COMPLETED for row in rows):
        return []
    if len(seen.sweeps) > 1 or (not seen.sweeps and len(rows) > 1):
        return []
    path = near(seen.sweeps[0].path if seen.sweeps else seen.path)
    if any(row.live for row in rows) or (seen.sweeps and is_monitored(seen.sweeps[0])):
        return [f"live: {shell_line('danling-conf', 'runs', path, '--watch')}"]
    return [f"to resume: {shell_line('danling-conf', 'resume', path)}"]
