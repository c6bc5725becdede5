"""`danling-conf watch RUN`: where all ranks of a run are, live, by the heartbeats that they write."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from danling_conf.cli.checkpoints import readable_size
from danling_conf.cli.report import duration
from danling_conf.records.find import runs_or_refuse
from danling_conf.records.ranks import RankSeen, RunSeen, look_at
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation

STUCK = 1
_WIDE = 240
_COLOURS = {"running": "green", "completed": "blue", "failed": "red", "stopped": "yellow"}


def watch(directory: str, *, once: bool, as_json: bool, interval: float) -> int:
    """Show the ranks of all runs of a directory until they have ended or Ctrl-C; gives the exit code: 1 where a rank is
    stuck and `once` was asked for.

    Raises ConfigRefused where there is no run.
    """
    if as_json and not once:
        raise ConfigRefused([Violation("--json", ABSENT, "it is one look, and not a live view", "add --once")])
    runs = runs_or_refuse(directory)
    if once:
        seen = [look_at(run) for run in runs]
        if as_json:
            print(json.dumps({"time": time.time(), "runs": [each.to_json() for each in seen]}, indent=1))
        else:
            # A file or a pipe has no width to fit into.
            Console(width=None if sys.stdout.isatty() else _WIDE).print(view(seen))
        return STUCK if any(each.stuck for each in seen) else 0
    return _live(directory, runs, interval)


def _live(directory: str, runs: list[Path], interval: float) -> int:
    console = Console()
    with Live(console=console, auto_refresh=False, screen=False) as live:
        try:
            while True:
                seen = [look_at(run) for run in runs]
                live.update(view(seen), refresh=True)
                if all(each.status != "running" for each in seen):
                    return 0
                time.sleep(interval)
                runs = runs_or_refuse(directory)  # a sweep gets more of them
        except KeyboardInterrupt:
            return 0


def view(seen: Sequence[RunSeen]) -> RenderableType:
    """All runs, each with a table of its ranks; runs that have ended in a line."""
    parts: list[RenderableType] = []
    for each in seen:
        parts.append(_heading(each))
        if each.ranks and each.status == "running":
            parts.append(_table(each))
            parts.append(_verdict(each))
    return Group(*parts)


def _heading(seen: RunSeen) -> Text:
    line = Text(seen.run, style="bold", overflow="fold")
    line.append("  ")
    line.append(seen.status, style=_COLOURS.get(seen.status, "red"))
    if seen.ranks:
        step, total = max(each.step for each in seen.ranks), seen.ranks[0].total_steps
        line.append(f"  step {step}" + (f"/{total}" if total else ""), style="not bold")
    if seen.note and seen.status == "running":
        line.append(f"  {seen.note}", style="not bold yellow")
    return line


def _table(seen: RunSeen) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("rank", "host", "pid", "state", "for", "step", "last step", "waits", "memory", "heartbeat", ""):
        table.add_column(name, justify="left" if name in ("host", "state", "") else "right", no_wrap=True)
    for each in seen.ranks:
        table.add_row(*_row(each, seen), style="red" if each.stuck else "yellow" if each.rank == seen.slowest else "")
    for rank in seen.missing:
        table.add_row(str(rank), "?", "?", "no heartbeat yet", "", "", "", "", "", "", style="red")
    return table


def _row(each: RankSeen, seen: RunSeen) -> list[str]:
    last = "" if each.step_seconds_ago is None else f"{duration(each.step_seconds_ago)} ago"
    word = f"stuck: {each.stuck}" if each.stuck else "slowest" if each.rank == seen.slowest else ""
    waits = "" if each.waiting_share is None else f"{100 * each.waiting_share:.0f} %"
    return [
        str(each.rank), each.host, str(each.pid), each.state, duration(each.state_seconds), str(each.step), last, waits,
        readable_size(each.memory_bytes), f"{duration(each.written_seconds_ago)} ago", word,
    ]  # fmt: skip


def _verdict(seen: RunSeen) -> Text:
    if not seen.stuck:
        return Text("")
    ranks = ", ".join(map(str, seen.stuck))
    return Text(f"stuck: rank{'' if len(seen.stuck) == 1 else 's'} {ranks} of {seen.world_size}", style="bold red")
