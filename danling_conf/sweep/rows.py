"""Rows of a table of jobs: settings, state, progress, score, attempts and times. Terminal, pages and JSON share
them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from danling_conf.config.identity import flatten
from danling_conf.records.heartbeats import read_heartbeats
from danling_conf.records.history import read_history
from danling_conf.records.ledger import Record
from danling_conf.records.metrics import last_line
from danling_conf.records.reading import read_result, warn_of_damage
from danling_conf.records.run_directory import attempt_order, newest_attempt
from danling_conf.records.status import ENDED, Status
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.schema.files import Damaged
from danling_conf.sweep.backend import Ending


@dataclass(kw_only=True)
class Row:
    """A job of a sweep, or a run without a sweep."""

    sweep: Path | None = None
    number: int | None = None
    key: str | None = None
    job_id: str | None = None
    config_id: str | None = None
    overrides: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    """Dotted paths and values."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that differ between the rows of a table, by their names on the command line."""
    state: str
    error: str | None = None
    step: int | None = None
    total_steps: int | None = None
    epoch: int | None = None
    epochs: int | None = None
    score: float | None = None
    smaller_is_better: bool = True
    attempts: int = 0
    started: float | None = None
    ended: float | None = None
    seconds: float | None = None
    """Total duration of its attempts."""
    run: Path | None = None

    @property
    def live(self) -> bool:
        return self.state in (Status.QUEUED, Status.RUNNING)


def rows_of_sweep(sweep: SweepDirectory, seen: Mapping[str, Ending] | None = None) -> list[Row]:
    """A row for each job, in the sweep's order, with the settings that differ.

    Args:
        seen: ends that are not in the ledger, by job key.
    """
    rows = [row_of_job(sweep, record, (seen or {}).get(record.key)) for record in sweep.ledger.records().values()]
    set_swept(rows)
    return rows


def row_of_job(sweep: SweepDirectory, record: Record, seen: Ending | None = None) -> Row:
    """The row of one job, without settings where its job file is damaged."""
    try:
        config = flatten(sweep.job(record.key).content.get("config", {}))
    except Damaged as damage:
        warn_of_damage(damage.path, damage.reason)
        config = {}
    facts = record.facts
    row = Row(
        sweep=sweep.path,
        number=record.number,
        key=record.key,
        job_id=facts.get("job_id"),
        config_id=facts.get("config_id"),
        overrides=facts.get("overrides", ()),
        config=config,
        state=seen.status if seen else record.status,
        error=seen.error if seen else facts.get("error"),
        epochs=facts.get("epochs"),
        score=record.score,
        attempts=record.attempts,
        run=record.run,
    )
    row.started, row.ended, row.seconds = _times(record, row.state in ENDED)
    if record.run is not None and record.attempts:
        row.step, row.total_steps, row.epoch = progress(record.run)
    row.total_steps = row.total_steps or facts.get("steps")
    row.smaller_is_better = smaller_is_better(config, record.run, record.score)
    return row


def best_first(rows: Iterable[Row]) -> list[Row]:
    """Sort by score, the best first. Rows without a score follow in the order of the sweep."""

    def order(row: Row) -> tuple[bool, float]:
        score = row.score if row.score is not None else 0.0
        return row.score is None, score if row.smaller_is_better else -score

    return sorted(rows, key=order)


def set_swept(rows: Sequence[Row]) -> list[str]:
    """Set `settings` of each row to the overrides that differ between the rows. Returns their names.

    Names are those of the command line: `optim.lr`, and `parallel` for the layout's name.
    """
    given = [_given(row.overrides) for row in rows]
    names = [name for name in dict.fromkeys(name for each in given for name in each) if not name.startswith("hydra")]
    kept = []
    for name in names:
        values = [row.config.get(name, each.get(name)) for row, each in zip(rows, given, strict=True)]
        if any(value != values[0] for value in values[1:]):
            kept.append(name)
            for row, value in zip(rows, values, strict=True):
                row.settings[name] = value
    return kept


def smaller_is_better(config: Mapping[str, Any], run: Path | None, score: float | None) -> bool:
    """Whether a smaller score is better.

    Where only the metric object knows, infer it from the metric's history: the score is the smallest or the largest of
    its values. Without a history, larger is better.
    """
    mode, name = config.get("score_mode"), config.get("score_name", "loss")
    if mode is not None or name == "loss":
        return mode != "max"
    if run is None or score is None:
        return False
    curves = [curve for key, curve in read_history(run).curves.items() if key.partition(".")[2] == name]
    lowest = min((curve.least[1] for curve in curves), default=None)
    return score == lowest and any(curve.most != lowest for curve in curves)


def progress(run: Path) -> tuple[int | None, int | None, int | None]:
    """The newest step of a run, the number of all its steps, and the epoch; None for what is not recorded."""
    # Heartbeats may be off, metrics come only at log lines, and the result at the end: of the newest attempt, whichever
    # is further knows.
    beats = read_heartbeats(run).values()
    signs = [(attempt_order(beat["attempt"]), beat["step"], beat.get("total_steps"), beat["epoch"]) for beat in beats]
    line = last_line(run)
    if line is not None:
        total = next((sign[2] for sign in signs), None)
        signs.append((attempt_order(line["attempt"]), line["step"], total, line["epoch"]))
    attempt = newest_attempt(run)
    if attempt is not None:
        result = read_result(attempt)
        step = result.integer("step")
        if step is not None:
            total = next((sign[2] for sign in signs), None)
            signs.append((attempt_order(attempt.name), step, total, result.integer("epoch") or 0))
    return max(signs, key=lambda sign: sign[:2])[1:] if signs else (None, None, None)


def _given(overrides: Sequence[str]) -> dict[str, str]:
    pairs = (item.lstrip("+").partition("=") for item in overrides)
    return {name: value for name, _, value in pairs}


def _times(record: Record, ended: bool) -> tuple[float | None, float | None, float | None]:
    """When a job first started, when it ended, and for how many seconds it ran. Time in the queue does not count."""
    started = last = None
    since: float | None = None
    seconds = 0.0
    for line in record.history:
        moment = line.get("time")
        if not isinstance(moment, (int, float)) or "status" not in line:
            continue
        if since is not None:
            seconds += max(0.0, moment - since)
        since = moment if line["status"] == Status.RUNNING else None
        started = started if started is not None or since is None else moment
        last = moment
    if since is not None and not ended:
        seconds += max(0.0, time.time() - since)
    return started, last if ended else None, seconds if started is not None else None
