"""What somebody who looks after a sweep is shown: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from danling_conf.records.job_file import JobFile
from danling_conf.records.ledger import Record
from danling_conf.records.status import Status
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.sweep.reporting import reason, say

_SECONDS = 1.0
"""Between two drawings of the table; longer where drawing it takes long, which happens with thousands of jobs."""
_SHARE = 0.1
"""Of the time that may go into drawing."""


class Lines:
    """A line for each change."""

    def __init__(self, jobs: Mapping[str, JobFile]) -> None:
        self._jobs = jobs

    def say(self, record: Record) -> None:
        say(record, self._jobs[record.key])

    def refresh(self) -> None:
        """Nothing: what was said stays."""


class Table:
    """The table of all jobs, drawn again and again; why a job failed is said above it."""

    def __init__(self, directory: SweepDirectory, jobs: Mapping[str, JobFile], live: Any) -> None:
        self._directory, self._jobs, self._live = directory, jobs, live
        self._next = 0.0

    def say(self, record: Record) -> None:
        if record.ended and record.status not in (Status.COMPLETED, Status.CANCELLED):
            print(reason(record, self._jobs[record.key]), file=sys.stderr, flush=True)

    def refresh(self) -> None:
        if time.monotonic() >= self._next:
            self.draw()

    def draw(self) -> None:
        """Draw it as it is now."""
        from danling_conf.sweep.rows import rows_of_sweep

        began = time.monotonic()
        self._live.update(drawn(rows_of_sweep(self._directory), self._live.console), refresh=True)
        now = time.monotonic()
        self._next = now + max(_SECONDS, (now - began) / _SHARE)


def drawn(rows: Any, console: Any) -> Any:
    """Rows as a table that fits a terminal, what is live first where it is too long."""
    from rich.text import Text

    from danling_conf.sweep.rows import best_first
    from danling_conf.sweep.table import count_states, style_of, table_lines

    ordered = best_first(rows)
    room = max(3, console.height - 4)
    if len(ordered) > room:
        ordered = sorted(ordered, key=lambda row: not row.live)[:room]
    text = Text(no_wrap=True, overflow="ellipsis")
    lines = table_lines(ordered, console.width)
    for number, line in enumerate(lines):
        style = "bold" if number == 0 else style_of(ordered[number - 1].state) if number <= len(ordered) else "dim"
        text.append(f"{line}\n", style=style)
    hidden = len(rows) - len(ordered)
    text.append(count_states(rows) + (f" ({hidden} not shown)" if hidden else ""), style="dim")
    return text


@contextmanager
def shown(directory: SweepDirectory, jobs: Mapping[str, JobFile]) -> Iterator[Any]:
    """Where changes are said while somebody looks after jobs."""
    if not sys.stdout.isatty():
        yield Lines(jobs)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(soft_wrap=True), auto_refresh=False, vertical_overflow="crop") as live:
        table = Table(directory, jobs, live)
        table.draw()
        yield table
        table.draw()
