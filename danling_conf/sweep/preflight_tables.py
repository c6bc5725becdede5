"""Tables of the pre-flight: the faults of a sweep's jobs, the resources that jobs take, and the settings that vary."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from danling_conf.config.identity import layout_name
from danling_conf.config.job import Job
from danling_conf.sweep.preflight import Refused
from danling_conf.topology.resources import Shape
from danling_conf.topology.violation import ABSENT, ConfigRefused, show

_WIDTHS = (10, 26, 32, 26)  # with two blanks between: 100 columns
_MOST_VALUES = 8


class SweepRefused(ConfigRefused):
    """Raised where jobs of a sweep are refused; the report is their table.

    Args:
        refused: the refused jobs, in order.
        of: number of all jobs.
    """

    def __init__(self, refused: Sequence[Refused], of: int) -> None:
        self.refused, self.of = tuple(refused), of
        super().__init__([item for job in refused for item in job.violations])

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.refused, self.of)

    def report(self) -> str:
        fine = self.of - len(self.refused)
        count = f"{fine} of {self.of} jobs {'is' if fine == 1 else 'are'} fine"
        return "\n".join([*fault_table(self.refused, of=self.of), "", count])


def fault_table(refused: Sequence[Refused], *, of: int) -> list[str]:
    """One row for each distinct fault: the jobs that have it, the setting, why, and the fix.

    Args:
        of: number of jobs in the sweep.
    """
    found: dict[tuple[str, str, str, str], list[int]] = {}
    for job in refused:
        for item in job.violations:
            value = "" if item.value is ABSENT else f"={show(item.value)}"
            found.setdefault((item.path, value, item.rule, item.fix), []).append(job.number)
    faults = f"{len(found)} distinct fault{'' if len(found) == 1 else 's'}"
    lines = [f"{len(refused)} of {of} job{'' if of == 1 else 's'} refused: {faults}", ""]
    lines += _row("jobs", "setting", "why", "fix")
    lines.append("  ".join("-" * width for width in _WIDTHS))
    for (path, value, rule, fix), numbers in found.items():
        lines += _row(numbers_as_text(numbers), f"{path}{value}", rule, fix)
    return lines


def numbers_as_text(numbers: Iterable[int]) -> str:
    """Job numbers as ranges: `#0-5,#8`."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"#{first}" if first == last else f"#{first}-{last}" for first, last in spans)


def shape_table(jobs: Sequence[Job], shapes: Mapping[int, Shape]) -> list[str]:
    """Resources of the jobs by layout and shape, and the most GPU hours that all of them can take."""
    groups = Counter((layout_name(job.layout), shapes[job.number]) for job in jobs)
    header = ("layout", "jobs", "nodes", "tasks/node", "GPUs/node", "CPUs/task", "hours", "GPU hours")
    rows: list[tuple[str, ...]] = [header]
    for (name, shape), count in groups.items():
        each = (shape.nodes, shape.tasks_per_node, shape.gpus_per_node, shape.cpus_per_task)
        rows.append((name, str(count), *map(str, each), _number(shape.minutes / 60), _number(count * shape.gpu_hours)))
    total = sum(count * shape.gpu_hours for (_, shape), count in groups.items())
    hours = sum(count * shape.minutes / 60 for (_, shape), count in groups.items())
    rows.append(("total", str(len(jobs)), "", "", "", "", _number(hours), _number(total)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def varying(jobs: Sequence[Sequence[str]]) -> list[str]:
    """The settings that differ between jobs, with their values: one line each."""
    values: dict[str, dict[str, None]] = {}
    for job in jobs:
        for override in job:
            key, _, value = override.partition("=")
            values.setdefault(key.lstrip("+"), {})[value] = None
    lines = []
    for key, seen in values.items():
        if len(seen) > 1:
            shown = list(seen)[:_MOST_VALUES]
            more = f", ... ({len(seen)} values)" if len(seen) > _MOST_VALUES else ""
            lines.append(f"{key}: {', '.join(shown)}{more}")
    return lines


def _row(*cells: str) -> list[str]:
    columns = [_wrapped(cell, width) for cell, width in zip(cells, _WIDTHS, strict=True)]
    height = max(map(len, columns))
    return [
        "  ".join(
            (column[line] if line < len(column) else "").ljust(width)
            for column, width in zip(columns, _WIDTHS, strict=True)
        ).rstrip()
        for line in range(height)
    ]


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of a cell: broken at blanks, or else after commas, dots, slashes and equal signs."""
    lines: list[str] = []
    for line in textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]:
        while len(line) > width:
            cut = max(line.rfind(mark, 0, width) for mark in ",.=_/") + 1 or width
            lines.append(line[:cut])
            line = line[cut:]
        lines.append(line)
    return lines


def _number(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")
