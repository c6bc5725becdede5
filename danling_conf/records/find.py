"""The runs that a path stands for: a run's own directory, a sweep's, or one above them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from danling_conf.topology.rules.paths import RUN_FILE
from danling_conf.topology.violation import ConfigRefused, Violation

LEDGER = "jobs.jsonl"
"""A sweep's list of its jobs; a job that has a run names it."""


def runs_in(path: Path) -> Iterator[Path]:
    """The run directories that `path` stands for, in the sweep's order, else by name; none where there are none."""
    if (path / RUN_FILE).is_file():
        yield path
    elif (path / LEDGER).is_file():
        yield from dict.fromkeys(_runs_of_jobs(path / LEDGER))
    else:
        yield from sorted(found.parent for found in path.rglob(RUN_FILE))


def _runs_of_jobs(ledger: Path) -> Iterator[Path]:
    for line in ledger.read_text(errors="replace").splitlines():
        try:
            run = json.loads(line).get("run")
        except (ValueError, AttributeError):
            continue  # the torn line of a writer that was killed
        if run:
            yield Path(run)


def runs_or_refuse(directory: str) -> list[Path]:
    """The runs of a directory that a user named. Raises ConfigRefused where there is none."""
    path = Path(directory).expanduser()
    found = list(runs_in(path))
    if not found:
        rule = "there is no run in it" if path.is_dir() else "there is no such directory"
        raise ConfigRefused([Violation("RUN", directory, rule, "give a run's directory, a sweep's, or one above them")])
    return found
