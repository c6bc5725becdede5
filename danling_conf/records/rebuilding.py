"""Rebuilding of a ledger's lost lines, from the files of its jobs and of their runs.

A ledger can lose its beginning, or all of it, while everything that it told is still there: what each job is stands in
its file, and how its run ended in the run's directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from danling_conf.config.identity import layout_name
from danling_conf.records.reading import Fields, read_fields, read_result
from danling_conf.records.run_directory import newest_attempt, run_of_sweep
from danling_conf.records.status import ENDED, Status, written_status
from danling_conf.schema import Layout
from danling_conf.schema.files import JOB_FILE, RUN_FILE


def jobs_with_files(sweep: Path) -> list[str]:
    """Keys of all jobs of a sweep that have a file, in the sweep's order."""
    numbers = {path.parent.name: read_fields(path).integer("job") for path in sweep.glob(f"jobs/*/{JOB_FILE}")}
    return sorted(numbers, key=lambda key: (numbers[key] is None, numbers[key] or 0, key))


def lost_lines(sweep: Path, key: str) -> list[dict[str, Any]]:
    """The lines of a job as its files tell them: that it was planned, started, and how its run ended.

    Empty where the job's file does not say what it is.
    """
    path = sweep / "jobs" / key / JOB_FILE
    job = read_fields(path)
    number, written = job.integer("job"), job.table("binding").text("run_directory")
    if number is None or number < 0 or written is None or "\0" in written:
        return []
    run = run_of_sweep(sweep, Path(written))
    config, moment = job.table("config"), path.stat().st_mtime
    planned = {
        "job": number,
        "job_id": job.text("job_id") or key,
        "config_id": read_fields(run / RUN_FILE).text("config_id") or "",
        "status": Status.PLANNED,
        "overrides": job.texts("overrides"),
        "run": str(run),
        "layout": _layout_of(config),
        "steps": config.integer("steps"),
        "epochs": config.integer("epochs"),
    }
    return [{"key": key, "time": moment, **facts} for facts in (planned, *_of_run(run))]


def _of_run(run: Path) -> list[dict[str, Any]]:
    attempt = newest_attempt(run)
    if attempt is None:
        return []
    result = read_result(attempt)
    started = {"status": Status.RUNNING, "attempt": attempt.name}
    ended = written_status(result.text("status"))
    if ended not in ENDED:
        return [started]
    return [started, {"status": ended, "error": result.text("error"), "score": result.number("score")}]


def _layout_of(config: Fields) -> str:
    axes = config.table("parallel").table("axes")
    degrees = {name: axes.integer(name) for name in Layout().degrees()}
    known = {name: degree for name, degree in degrees.items() if degree is not None}
    return layout_name(Layout(**known, fsdp=config.table("fsdp").flag("enabled")))
