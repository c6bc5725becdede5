"""Table of jobs as text, fitted to a width."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from danling_conf.records.status import Status
from danling_conf.schema.printable import printable
from danling_conf.sweep.rows import Row
from danling_conf.topology.violation import show

_GAP = 2
_LONGEST = 28
"""Width to which settings are cut where the table is too wide."""
_BAD = (
    Status.FAILED,
    Status.REFUSED,
    Status.TIMED_OUT,
    Status.OUT_OF_MEMORY,
    Status.NODE_LOST,
    Status.PREEMPTED,
    Status.LOST,
)


@dataclass
class _Column:
    name: str
    cells: list[str]
    right: bool = False
    dropped: int = 0
    """Order of dropping columns of a table that is too wide: 1 and 2 first, then from the highest down to 4. 0 and 3
    stay."""

    @property
    def width(self) -> int:
        return max(len(self.name), *(len(cell) for cell in self.cells), 0)


def table_lines(rows: Sequence[Row], width: int | None) -> list[str]:
    """A header and a line for each row.

    Args:
        width: width of the terminal; None for lines of any length.
    """
    columns = _columns(rows)
    for column in columns:
        column.name, column.cells = printable(column.name), [printable(cell) for cell in column.cells]
    left_out = _fit(columns, width) if width is not None else []
    lines = [_line(columns, [column.name for column in columns])]
    lines += [_line(columns, list(cells)) for cells in zip(*(column.cells for column in columns), strict=True)]
    if width is not None:
        lines = [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
    if left_out:
        lines.append(f"no room for {', '.join(left_out)}: --csv and --json have all columns")
    return lines


def style_of(state: str) -> str:
    """Colour of a state on a terminal."""
    colours: dict[str, str] = {Status.COMPLETED: "green", Status.RUNNING: "cyan"}
    return colours.get(state, "red" if state in _BAD else "yellow")


def count_states(rows: Sequence[Row]) -> str:
    """`12 jobs: 8 completed, 3 running, 1 failed`."""
    counts = Counter(row.state for row in rows)
    kind = "job" if all(row.sweep for row in rows) else "run"
    states = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    return f"{len(rows)} {kind}{'' if len(rows) == 1 else 's'}" + (f": {states}" if states else "")


def value_of(value: Any) -> str:
    """A setting as it is typed on the command line, with at most six significant digits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else show(value)


def step_of(row: Row) -> str:
    """`120/1000`, or `120, epoch 3/10` where only epochs are known."""
    if row.step is None:
        return f"0/{row.total_steps}" if row.live and row.total_steps else ""
    if row.total_steps:
        return f"{row.step}/{row.total_steps}"
    return f"{row.step}" + (f", epoch {row.epoch}/{row.epochs}" if row.epochs else "")


def took(seconds: float | None) -> str:
    """Seconds, minutes or hours: `45s`, `3m20s`, `2h05m`."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02}m"


def _columns(rows: Sequence[Row]) -> list[_Column]:
    names = list(dict.fromkeys(name for row in rows for name in row.settings))
    swept = [
        _Column(
            name,
            [value_of(row.settings.get(name)) for row in rows],
            right=all(isinstance(row.settings.get(name), (int, float)) for row in rows),
            dropped=3 + place,
        )
        for place, name in enumerate(names)
    ]
    columns = [
        _Column("job", [f"#{row.number}" if row.number is not None else "" for row in rows]),
        *swept,
        _Column("state", [row.state for row in rows]),
        _Column("step", [step_of(row) for row in rows], right=True),
        _Column("score", [f"{row.score:.6g}" if row.score is not None else "" for row in rows], right=True),
        _Column("attempts", [str(row.attempts) for row in rows], right=True, dropped=1),
        _Column("took", [took(row.seconds) for row in rows], right=True, dropped=2),
        _Column("run", [row.run.name if row.run else "" for row in rows]),
    ]
    if len({row.sweep for row in rows}) > 1:
        columns.append(_Column("sweep", [row.sweep.name if row.sweep else "" for row in rows]))
    always = ("state", "run")
    return [column for column in columns if column.name in always or any(column.cells)]


def _fit(columns: list[_Column], width: int) -> list[str]:
    """Cut and drop columns until they fit. Returns the names of dropped columns."""
    for column in columns:
        if column.dropped >= 3 and _width(columns) > width:
            column.cells = [cell if len(cell) <= _LONGEST else cell[: _LONGEST - 1] + "…" for cell in column.cells]
    left_out = []
    # Attempts and times go first, then settings, the last one first. One setting stays to distinguish the rows.
    order = [column for column in columns if column.dropped in (1, 2)]
    order += sorted((column for column in columns if column.dropped > 3), key=lambda column: -column.dropped)
    for column in order:
        if _width(columns) <= width:
            break
        columns.remove(column)
        left_out.append(column.name)
    return left_out


def _width(columns: Sequence[_Column]) -> int:
    return sum(column.width for column in columns) + _GAP * (len(columns) - 1)


def _line(columns: Sequence[_Column], cells: Sequence[str]) -> str:
    parts = [
        cell.rjust(column.width) if column.right else cell.ljust(column.width)
        for column, cell in zip(columns, cells, strict=True)
    ]
    return (" " * _GAP).join(parts).rstrip()
