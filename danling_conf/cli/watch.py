"""`danling-conf watch RUN`: live view of a run's ranks, from their heartbeats."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from danling_conf.cli.checkpoints import readable_size
from danling_conf.cli.report import duration
from danling_conf.records.find import runs_or_refuse
from danling_conf.records.membership import Member
from danling_conf.records.ranks import RankSeen, RunSeen, look_at
from danling_conf.records.status import EXIT_FAILED, Status
from danling_conf.schema.printable import printable
from danling_conf.sweep.ends import Standings
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation

_WIDE = 240
_ENDS_SECONDS = 10.0
"""Seconds between two queries of Slurm: a live view must not load its controller."""
_COLOURS: dict[str, str] = {
    Status.RUNNING: "green",
    Status.QUEUED: "yellow",
    Status.PLANNED: "yellow",
    Status.EMPTY: "yellow",
    Status.COMPLETED: "blue",
    Status.INTERRUPTED: "yellow",
}
"""Colours of states; red for all others."""


def watch(directory: str, *, once: bool, as_json: bool, interval: float) -> int:
    """Show the ranks of all runs of a directory until they have ended, or Ctrl-C.

    Args:
        once: show them once and return.
        as_json: print JSON; only with `once`.
        interval: seconds between two updates.

    Returns:
        The exit code. 0 where every run waits, runs or has completed, and no rank is stuck; 1 otherwise. 0 after
        Ctrl-C.

    Raises ConfigRefused where there is no run.
    """
    if as_json and not once:
        raise ConfigRefused([Violation("--json", ABSENT, "it cannot be combined with a live view", "add --once")])
    runs = runs_or_refuse(directory)
    if once:
        seen = _look(runs, Standings())
        if as_json:
            print(json.dumps({"time": time.time(), "runs": [each.to_json() for each in seen]}, indent=1))
        else:
            # rich would fold the table of a file or a pipe at 80 columns.
            Console(width=None if sys.stdout.isatty() else _WIDE).print(view(seen))
        return _exit_code(seen)
    return _live(directory, runs, interval)


def _look(runs: Sequence[Path], standings: Standings) -> list[RunSeen]:
    return [look_at(run, state=state) for run, state in zip(runs, standings.of(runs), strict=True)]


def _exit_code(seen: Sequence[RunSeen]) -> int:
    return 0 if all(each.status.fine and not each.stuck for each in seen) else EXIT_FAILED


def _live(directory: str, runs: list[Path], interval: float) -> int:
    console, standings = Console(), Standings(every=_ENDS_SECONDS)
    with Live(console=console, auto_refresh=False, screen=False) as live:
        try:
            while True:
                seen = _look(runs, standings)
                live.update(view(seen), refresh=True)
                if not any(each.status.live for each in seen):
                    return _exit_code(seen)
                time.sleep(interval)
                runs = runs_or_refuse(directory)  # look again: a sweep starts more runs meanwhile
        except KeyboardInterrupt:
            return 0


def view(seen: Sequence[RunSeen]) -> RenderableType:
    """All runs, each with a table of its ranks; ended runs take one line."""
    parts: list[RenderableType] = []
    for each in seen:
        parts.append(_heading(each))
        if each.ranks and each.status is Status.RUNNING:
            parts.append(_table(each))
            if each.groups:
                parts.append(_groups(each.groups))
            parts.append(_verdict(each))
    return Group(*parts)


def _heading(seen: RunSeen) -> Text:
    line = Text(printable(seen.run), style="bold", overflow="fold")
    line.append("  ")
    line.append(seen.status, style=_COLOURS.get(seen.status, "red"))
    if seen.ranks:
        step, total = max(each.step for each in seen.ranks), seen.ranks[0].total_steps
        line.append(f"  step {step}" + (f"/{total}" if total else ""), style="not bold")
    if seen.error and not seen.status.live:
        line.append(f"  {printable(seen.error.partition(chr(10))[0])}", style="not bold")
    if seen.note and seen.status is Status.RUNNING:
        line.append(f"  {seen.note}", style="not bold yellow")
    return line


def _table(seen: RunSeen) -> Table:
    # The space between columns is in the cells: rich takes half as long again to pad each. Nor are they strings, which
    # it would look through for markup.
    table = Table(box=None, pad_edge=False, padding=0, header_style="dim")
    for name in ("rank", "host", "pid", "state", "for", "step", "last step", "waits", "memory", "heartbeat", ""):
        first, left = name == "rank", name in ("host", "state", "")
        table.add_column(name if first else f"  {name}", justify="left" if left else "right", no_wrap=True)
    for each in seen.ranks:
        style = "red" if each.stuck else "yellow" if each.rank == seen.slowest else ""
        table.add_row(*_cells(_row(each, seen)), style=style)
    for rank in seen.missing:
        table.add_row(*_cells([str(rank), "?", "?", "no heartbeat yet"]), style="red")
    return table


def _cells(texts: Sequence[str]) -> Iterator[Text]:
    return (Text(f"  {text}" if number else text) for number, text in enumerate(texts))


def _groups(members: Sequence[Member]) -> Text:
    """The quorum of a run's replica groups: who takes part, who is missing, and why."""
    present = [each for each in members if each.takes_part]
    line = Text(f"{len(present)} of {len(members)} replica groups take part", style="green")
    for each in members:
        if not each.takes_part:
            why = f" (before: {printable(each.why.partition(chr(10))[0])})" if each.why else ""
            ago = duration(max(0.0, time.time() - each.since))
            line.append(f"\n  group {each.group}: {each.state} for {ago}, start {each.starts}{why}", style="yellow")
    return line


def _row(each: RankSeen, seen: RunSeen) -> list[str]:
    last = "" if each.step_seconds_ago is None else f"{duration(each.step_seconds_ago)} ago"
    verdict = f"stuck: {each.stuck}" if each.stuck else "slowest" if each.rank == seen.slowest else ""
    waits = "" if each.waiting_share is None else f"{100 * each.waiting_share:.0f} %"
    return [
        str(each.rank),
        printable(each.host),
        str(each.pid),
        printable(each.state),
        duration(each.state_seconds),
        str(each.step),
        last,
        waits,
        readable_size(each.memory_bytes),
        f"{duration(each.written_seconds_ago)} ago",
        verdict,
    ]


def _verdict(seen: RunSeen) -> Text:
    if not seen.stuck:
        return Text("")
    ranks = ", ".join(map(str, seen.stuck))
    return Text(f"stuck: rank{'' if len(seen.stuck) == 1 else 's'} {ranks} of {seen.world_size}", style="bold red")
