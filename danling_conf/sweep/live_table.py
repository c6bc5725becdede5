"""View of a running sweep: a live table on a terminal, a line for each change elsewhere, and the errors of jobs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from danling_conf.records.job_file import JobFile, first_error
from danling_conf.records.ledger import Record
from danling_conf.records.logs import rank_log
from danling_conf.records.status import Status, in_short, is_consequence
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.schema.printable import printable, printable_lines
from danling_conf.sweep.local_backend import OUTPUT
from danling_conf.sweep.rows import Row, best_first, rows_of_sweep
from danling_conf.sweep.table import count_states, style_of, table_lines

if TYPE_CHECKING:  # rich is imported only where there is a terminal to draw on
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

_SECONDS = 1.0
"""Seconds between two drawings of the table; more where drawing is slow, as with thousands of jobs."""
_SHARE = 0.1
"""Largest share of the time to spend on drawing."""


class View(Protocol):
    """Shows a sweep while it is monitored."""

    def show(self, record: Record) -> None:
        """Show a job whose status has changed."""

    def refresh(self) -> None:
        """Update the view."""


class Lines:
    """View for files and pipes: a line for each change."""

    def __init__(self, jobs: Mapping[str, JobFile]) -> None:
        self._jobs = jobs

    def show(self, record: Record) -> None:
        print_change(record, self._jobs[record.key])

    def refresh(self) -> None:
        """Does nothing: printed lines stay."""


class Table:
    """View for a terminal: the table of all jobs, redrawn in place. Errors of jobs are printed above it."""

    def __init__(self, directory: SweepDirectory, jobs: Mapping[str, JobFile], live: Live) -> None:
        self._directory, self._jobs, self._live = directory, jobs, live
        self._next = 0.0

    def show(self, record: Record) -> None:
        if record.ended and record.status not in (Status.COMPLETED, Status.CANCELLED):
            print(printable_lines(reason(record, self._jobs[record.key])), file=sys.stderr, flush=True)

    def refresh(self) -> None:
        if time.monotonic() >= self._next:
            self.draw()

    def draw(self) -> None:
        """Draw the table now."""
        started = time.monotonic()
        self._live.update(drawn(rows_of_sweep(self._directory), self._live.console), refresh=True)
        now = time.monotonic()
        self._next = now + max(_SECONDS, (now - started) / _SHARE)


def drawn(rows: Sequence[Row], console: Console) -> Text:
    """Rows as a table that fits a terminal. Where it is too long, live jobs stay and ended ones are cut."""
    from rich.text import Text

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
def view_of(directory: SweepDirectory, jobs: Mapping[str, JobFile]) -> Iterator[View]:
    """The view of a sweep that suits standard output."""
    if not sys.stdout.isatty():
        yield Lines(jobs)
        return
    from rich.console import Console
    from rich.live import Live

    # Soft wrap: rich would break a long path above the table with newlines, which then get copied with it.
    with Live(console=Console(soft_wrap=True), auto_refresh=False, vertical_overflow="crop") as live:
        table = Table(directory, jobs, live)
        table.draw()
        yield table
        table.draw()


def print_change(record: Record, job: JobFile) -> None:
    """Print a line about a job that has changed. The traceback of a failed one goes to standard error."""
    number, status = f"#{record.number}", record.status
    if status == Status.QUEUED and "why" in record.history[-1]:
        _say(f"{number} requeued ({record.history[-1]['why']})")
    elif status == Status.QUEUED:
        where = f" as Slurm job {record.facts['slurm']}" if "slurm" in record.history[-1] else ""
        _say(f"{number} queued{where}: {' '.join(record.facts['overrides'])}".rstrip(": "))
    elif status == Status.RUNNING:
        there = record.facts.get("nodes") or record.facts.get("host")
        again = f", attempt {record.attempts}" if record.attempts > 1 else ""
        _say(f"{number} running on {there}{again}")
    elif status == Status.COMPLETED:
        score = f" score={record.score:.6g}" if record.score is not None else ""
        _say(f"{number} completed{score}")
    else:
        error = in_short(status, record.error)
        _say(f"{number} {status}" + (f": {error}" if error else ""))
        if status != Status.CANCELLED:
            print(printable_lines(reason(record, job)), file=sys.stderr, flush=True)


def _say(line: str) -> None:
    print(printable(line), flush=True)


def reason(record: Record, job: JobFile) -> str:
    """Why a job did not complete: the traceback of the rank that failed first, and the path of its log."""
    since = record.since_queued()[0]["time"]
    found = first_error(job.folder, since - 1)  # the clock of another node may be slightly behind
    lines = [f"job #{record.number} {record.status}"]
    if record.status == Status.REFUSED:
        lines.append(str(record.facts.get("error")))
    elif found is not None and is_consequence(found["message"]) and record.facts.get("error"):
        lines += [str(record.facts["error"]), f"rank {found['rank']}, which missed it: {found['message']}"]
        lines += tail(job, since)
    elif found is not None:
        lines.append(f"rank {found['rank']} failed: {found['message']}\n{found['traceback']}".rstrip())
    elif record.facts.get("error"):
        lines.append(str(record.facts["error"]))
        lines += tail(job, since)
    lines.append(f"logs: {logs_of(record, job, rank=0 if found is None else found['rank'])}")
    return "\n".join(lines)


def logs_of(record: Record, job: JobFile, rank: int) -> Path:
    """The log of a rank in the newest attempt of a job; before the first attempt, the output of its processes."""
    if record.run is not None and "attempt" in record.facts:
        found = rank_log(record.run / "attempts" / record.facts["attempt"], rank)
        if found.is_file():
            return found
    printed = printed_by(job)
    return printed[-1] if printed else job.folder


def printed_by(job: JobFile) -> list[Path]:
    """Files with the output of a job's processes, oldest first."""
    slurm = job.path.parents[2] / "slurm"
    ids = {line["slurm"] for line in job.ledger.records()[job.key].history if "slurm" in line}
    found = [job.folder / OUTPUT, *(path for name in ids for path in slurm.glob(f"{name}_*_log.*"))]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.stat().st_mtime)


def tail(job: JobFile, since: float, count: int = 15) -> list[str]:
    """The last lines that a job printed since a time, for a job that recorded no error itself."""
    lines: list[str] = []
    for path in printed_by(job):
        if path.suffix != ".out" and path.stat().st_mtime >= since:
            lines += [line for line in path.read_text(errors="replace").splitlines() if line.strip()][-count:]
    return lines[-count:]
