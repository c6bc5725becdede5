"""`danling-conf runs DIR --html FILE`: a page with the table of a sweep, loss curves, and the score by each setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from danling_conf.cli.pages.charts import Point, Series, line_chart, scatter
from danling_conf.cli.pages.page import KINDS, LOSS_RATIO, Html, badge, code, folded, page, section, table, text, tiles
from danling_conf.cli.pages.style import COLOURS
from danling_conf.cli.report import clock, duration
from danling_conf.cli.runs import Seen, look
from danling_conf.records.metrics import read_metrics, series
from danling_conf.records.status import Status
from danling_conf.sweep.rows import Row
from danling_conf.sweep.table import count_states, step_of, value_of
from danling_conf.topology.violation import ConfigRefused, Violation

_DECADES = 9.9
"""A setting whose largest value is this many times its smallest is drawn on a logarithmic axis."""
_CURVES = COLOURS
"""Most curves in one chart: the number of colours."""
_SETTINGS = 12
_NAMES = 8
"""Most names that fit along an axis."""


def write_page(directory: str, html: str) -> str:
    """Write the page to a file. Returns a line for the user.

    Raises ConfigRefused where there is nothing to show, or the file cannot be written.
    """
    content = page_of(look(directory))
    target = Path(html).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content, encoding="utf-8")
    except OSError as error:
        fix = "choose a file to write to"
        raise ConfigRefused([Violation("--html", html, f"it cannot be written: {error.strerror}", fix)]) from error
    return f"page of {directory}: {target}"


def page_of(seen: Seen) -> str:
    """The page, as HTML."""
    histories = {str(row.run): read_metrics(row.run) for row in seen.rows if row.run is not None}
    sections = [_overview(seen), _table(seen), _curves(seen, histories), _against_settings(seen), _asked(seen)]
    of_one = len(seen.sweeps) == 1
    title = f"Sweep {seen.sweeps[0].path.name}" if of_one else f"Runs in {seen.path.name}"
    subtitle = f"{seen.sweeps[0].path if of_one else seen.path} · {count_states(seen.rows)}"
    return page(title, [item for item in sections if item], subtitle=subtitle)


def _overview(seen: Seen) -> Html:
    items: list[tuple[str, object, object]] = [
        ("jobs" if seen.sweeps else "runs", len(seen.rows), ""),
        ("completed", sum(row.state == Status.COMPLETED for row in seen.rows), ""),
    ]
    best = next((row for row in seen.rows if row.score is not None), None)
    if best is not None:
        words = ", ".join(f"{name}={value_of(value)}" for name, value in list(best.settings.items())[:4])
        items.append(("best score", f"{best.score:.6g}", words or _name(best)))
    seconds = [row.seconds for row in seen.rows if row.seconds is not None]
    if seconds:
        items.append(("time of all jobs", duration(sum(seconds)), f"{sum(row.attempts for row in seen.rows)} attempts"))
    return section("Overview", tiles(items))


def _table(seen: Seen) -> Html:
    names = seen.settings
    numeric = [name for name in names if all(_is_number(row.settings.get(name)) for row in seen.rows)]
    several = len({row.sweep for row in seen.rows}) > 1
    head = ["job", *names, "state", "step", "score", "attempts", "took", "started", "run", "why"]
    right = [1 + place for place, name in enumerate(names) if name in numeric]
    right += [len(names) + place for place in (2, 3, 4)]
    rows = [
        [
            row.number,
            *(value_of(row.settings.get(name)) for name in names),
            badge(row.state, KINDS.get(row.state, "bad")),
            step_of(row),
            None if row.score is None else f"{row.score:.6g}",
            row.attempts,
            None if row.seconds is None else duration(row.seconds),
            None if row.started is None else clock(row.started),
            None if row.run is None else row.run.name,
            (row.error or "").partition("\n")[0][:100] if row.state != Status.COMPLETED else "",
            *([row.sweep.name if row.sweep else None] if several else []),
        ]
        for row in seen.rows
    ]
    return section(
        "Jobs" if seen.sweeps else "Runs",
        table([*head, *(["sweep"] if several else [])], rows, numeric=right),
        *(Html(f'<p class="note">{text(note)}</p>') for note in seen.notes),
    )


def _curves(seen: Seen, histories: dict[str, list[dict[str, Any]]]) -> Html:
    """The losses of the best runs, one chart for each split."""
    shown = [row for row in seen.rows if histories.get(str(row.run))]
    if not shown:
        return Html("")
    keys = {key for row in shown for line in histories[str(row.run)] for key in line if key.endswith(".loss")}
    charts = []
    for key in sorted(keys, key=lambda key: (key != "train.loss", key)):
        lines = [(row, series(histories[str(row.run)], key)) for row in shown]
        lines = [(row, points) for row, points in lines if points][:_CURVES]
        values = [value for _, points in lines for _, value in points]
        log = bool(values) and min(values) > 0 and max(values) / min(values) > LOSS_RATIO
        drawn = [Series(_name(row), points) for row, points in lines]
        charts.append(line_chart(drawn, title=key, log_y=log))
    note = f"the {_CURVES} best of {len(shown)}" if len(shown) > _CURVES else ""
    return section("Loss", *charts, note=note, columns=2)


def _against_settings(seen: Seen) -> Html:
    scored = [row for row in seen.rows if row.score is not None]
    if len(scored) < 2 or not seen.settings:
        return Html("")
    charts = [chart for name in seen.settings[:_SETTINGS] if (chart := _against(name, scored))]
    note = f"the first {_SETTINGS} of {len(seen.settings)}" if len(seen.settings) > _SETTINGS else ""
    return section("Score against each setting", *charts, note=note, columns=2)


def _against(name: str, scored: Sequence[Row]) -> Html:
    values = [row.settings.get(name) for row in scored]
    numbers = [float(value) for value in values if _is_number(value)]  # type: ignore[arg-type]
    if len(numbers) == len(values):
        log = min(numbers) > 0 and max(numbers) / min(numbers) >= _DECADES
        points = [Point(x, _score(row), _label(row)) for x, row in zip(numbers, scored, strict=True)]
        return scatter(
            points, title=f"score over {name}", x_label=name + (" (log)" if log else ""), y_label="score", log_x=log
        )
    names = list(dict.fromkeys(value_of(value) or "(none)" for value in _in_order(values)))
    places = {each: place for place, each in enumerate(names)}
    points = [
        Point(places[value_of(value) or "(none)"], _score(row), _label(row))
        for value, row in zip(values, scored, strict=True)
    ]
    return scatter(points, title=f"score over {name}", x_label=name, y_label="score", x_format=_namer(names))


def _namer(names: Sequence[str]) -> Callable[[float], str]:
    """Formats a place on an axis of names: the name, or "" between two of them."""
    longest = max(4, 80 // max(1, min(len(names), _NAMES)))

    def shown(place: float) -> str:
        nearest = round(place)
        if not math.isclose(place, nearest, abs_tol=1e-6) or not 0 <= nearest < len(names):
            return ""
        name = names[nearest]
        return name if len(name) <= longest else name[: longest - 1] + "…"

    return shown


def _in_order(values: Sequence[Any]) -> list[Any]:
    """Sort key: names alphabetically, numbers by size."""
    return sorted(values, key=lambda value: (not _is_number(value), value if _is_number(value) else 0, str(value)))


def _asked(seen: Seen) -> Html:
    commands = []
    for sweep in seen.sweeps:
        command = sweep.request.texts("command")
        if command:
            commands.append(code(f"{sweep.path.name}: {' '.join(command)}"))
    return section("Asked for", folded("the command", *commands)) if commands else Html("")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _score(row: Row) -> float:
    return math.nan if row.score is None else row.score


def _name(row: Row) -> str:
    """Label of a run in a legend: its number and the settings that set it apart."""
    words = " ".join(f"{name.rpartition('.')[2]}={value_of(value)}" for name, value in list(row.settings.items())[:3])
    number = f"#{row.number}" if row.number is not None else row.run.name if row.run else ""
    return f"{number} {words}".strip()


def _label(row: Row) -> str:
    words = [f"{name}={value_of(value)}" for name, value in row.settings.items()]
    return "\n".join([f"#{row.number}" if row.number is not None else _name(row), *words[:8]])
