"""`danling-conf runs DIR --html FILE`: a page with the table of a sweep, loss curves, and the score by each setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danling_conf.cli.pages.charts import Point, Series, line_chart, scatter
from danling_conf.cli.pages.page import KINDS, LOSS_RATIO, Html, badge, code, folded, page, section, table, text, tiles
from danling_conf.cli.pages.parallel import Axis, parallel_coordinates
from danling_conf.cli.pages.style import COLOURS
from danling_conf.cli.report import clock, duration
from danling_conf.cli.runs import Seen, look
from danling_conf.records.history import History, read_history
from danling_conf.records.status import Status, in_short
from danling_conf.sweep.rows import Row, set_swept
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
    """The page, as HTML: a part for each sweep and each metric, since neither settings nor scores compare across."""
    histories = {str(row.run): read_history(row.run) for row in seen.rows if row.run is not None}
    parts = _parts(seen, histories)
    sections = [] if len(parts) == 1 else [_contents(parts)]
    for part in parts:
        sections += [_overview(part), _table(part), _curves(part, histories), _against_settings(part)]
    notes = [Html(f'<p class="note">{text(note)}</p>') for note in seen.notes]
    sections += [section("Notes", *notes) if notes else Html(""), _asked(seen)]
    of_one = len(seen.sweeps) == 1
    title = f"Sweep {seen.sweeps[0].path.name}" if of_one else f"Runs in {seen.path.name}"
    subtitle = f"{seen.sweeps[0].path if of_one else seen.path} · {count_states(seen.rows)}"
    return page(title, [item for item in sections if item], subtitle=subtitle)


@dataclass(kw_only=True)
class _Part:
    """Rows that can be compared: jobs of one sweep, or runs outside of any, that are scored by one metric."""

    name: str
    """Heading; empty where it is the only part."""
    metric: str
    rows: list[Row]
    settings: list[str]
    """Settings that differ between its rows."""

    def heading(self, words: str) -> str:
        return f"{self.name}: {words[0].lower()}{words[1:]}" if self.name else words


def _parts(seen: Seen, histories: Mapping[str, History]) -> list[_Part]:
    found: dict[tuple[Path | None, str], list[Row]] = {}
    for row in seen.rows:
        found.setdefault((row.sweep, _metric(row, histories.get(str(row.run)))), []).append(row)
    _join_unscored(found)
    several_metrics = len({metric for _, metric in found}) > 1
    places: dict[Path | None, int] = {sweep.path: place for place, sweep in enumerate(seen.sweeps)}
    parts = []
    for (sweep, metric), rows in sorted(found.items(), key=lambda item: places.get(item[0][0], len(places))):
        name = "Runs" if sweep is None else f"Sweep {sweep.name}"
        name = f"{name} by {metric}" if several_metrics else name
        parts.append(
            _Part(name=name if len(found) > 1 else "", metric=metric, rows=rows, settings=_varying(rows, sweep))
        )
    return parts


def _join_unscored(found: dict[tuple[Path | None, str], list[Row]]) -> None:
    """Put jobs that have measured nothing to those of the same sweep that have."""
    for sweep, metric in list(found):
        if "." in metric:
            continue
        others = [key for key in found if key[0] == sweep and key[1].partition(".")[2] == metric]
        if len(others) == 1:
            found[others[0]] += found.pop((sweep, metric))


def _varying(rows: Sequence[Row], sweep: Path | None) -> list[str]:
    """The settings that differ between rows, which keep only these."""
    if sweep is not None:
        for row in rows:
            row.settings = {}
        return set_swept(rows)
    names = dict.fromkeys(name for row in rows for name in row.settings)
    kept = [name for name in names if any(row.settings.get(name) != rows[0].settings.get(name) for row in rows)]
    for row in rows:
        row.settings = {name: row.settings.get(name) for name in kept}
    return kept


def _metric(row: Row, history: History | None) -> str:
    """The metric of a row's score: `val.accuracy`; without the split where nothing says which it was."""
    name, split = str(row.config.get("score_name") or "loss"), row.config.get("score_split")
    curves = {} if history is None else history.curves
    keys = [key for key in curves if key.partition(".")[2] == name]
    if f"{split}.{name}" in keys:
        return f"{split}.{name}"
    # The best value of a metric is one of its extremes, which a curve keeps.
    scored = [key for key in keys if any(value == row.score for _, value in curves[key].points)]
    held_out = [key for key in scored if not key.startswith("train")]
    return next(iter([*held_out, *scored]), name)


def _contents(parts: Sequence[_Part]) -> Html:
    rows = [
        [part.name, part.metric, len(part.rows), _best(part) and f"{_score(_best(part)):.6g}", ", ".join(part.settings)]
        for part in parts
    ]
    return section("Contents", table(["part", "metric", "runs", "best", "varies"], rows, numeric=(2, 3)))


def _best(part: _Part) -> Row | None:
    return next((row for row in part.rows if row.score is not None), None)


def _overview(part: _Part) -> Html:
    items: list[tuple[str, object, object]] = [
        ("jobs" if part.rows[0].sweep else "runs", len(part.rows), ""),
        ("completed", sum(row.state == Status.COMPLETED for row in part.rows), ""),
    ]
    best = _best(part)
    if best is not None:
        words = ", ".join(f"{name}={value_of(value)}" for name, value in list(best.settings.items())[:4])
        items.append((f"best {part.metric}", f"{best.score:.6g}", words or _name(best)))
    seconds = [row.seconds for row in part.rows if row.seconds is not None]
    if seconds:
        items.append(("time of all jobs", duration(sum(seconds)), f"{sum(row.attempts for row in part.rows)} attempts"))
    return section(part.heading("Overview"), tiles(items))


def _table(part: _Part) -> Html:
    """The rows; columns that are empty in all of them are left out."""
    names = part.settings
    columns: list[tuple[str, bool, list[object]]] = [
        ("job", False, [row.number for row in part.rows]),
        *((name, _numeric(name, part.rows), _shown(name, part.rows)) for name in names),
        ("state", False, [badge(row.state, KINDS.get(row.state, "bad")) for row in part.rows]),
        ("step", True, [step_of(row) for row in part.rows]),
        (part.metric, True, [None if row.score is None else f"{row.score:.6g}" for row in part.rows]),
        ("attempts", True, [row.attempts for row in part.rows]),
        ("took", True, [None if row.seconds is None else duration(row.seconds) for row in part.rows]),
        ("started", False, [None if row.started is None else clock(row.started) for row in part.rows]),
        ("run", False, [None if row.run is None else row.run.name for row in part.rows]),
        ("why", False, [_why(row) for row in part.rows]),
    ]
    kept = [column for column in columns if any(cell not in (None, "") for cell in column[2])]
    rows = list(zip(*(cells for _, _, cells in kept), strict=True))
    right = [place for place, (_, numeric, _) in enumerate(kept) if numeric]
    heading = part.heading("Jobs" if part.rows[0].sweep else "Runs")
    return section(heading, table([name for name, _, _ in kept], rows, numeric=right))


def _shown(name: str, rows: Sequence[Row]) -> list[object]:
    return [value_of(row.settings.get(name)) for row in rows]


def _numeric(name: str, rows: Sequence[Row]) -> bool:
    return all(_is_number(row.settings.get(name)) for row in rows)


def _why(row: Row) -> str:
    return "" if row.state == Status.COMPLETED else in_short(row.state, row.error)[:100]


def _curves(part: _Part, histories: Mapping[str, History]) -> Html:
    """The losses and the metric of the best runs, one chart for each split."""
    shown = [row for row in part.rows if str(row.run) in histories and histories[str(row.run)].curves]
    if not shown:
        return Html("")
    keys = {key for row in shown for key in histories[str(row.run)].curves}
    keys = {key for key in keys if key.endswith(".loss") or key == part.metric}
    charts = []
    for key in sorted(keys, key=lambda key: (key != "train.loss", key)):
        lines = [(row, histories[str(row.run)].points(key)) for row in shown]
        lines = [(row, points) for row, points in lines if points][:_CURVES]
        values = [value for _, points in lines for _, value in points]
        log = bool(values) and min(values) > 0 and max(values) / min(values) > LOSS_RATIO
        varying = _varying_among([row for row, _ in lines], part.settings)
        drawn = [Series(_name(row, varying), points) for row, points in lines]
        charts.append(line_chart(drawn, title=key, log_y=log))
    note = f"the {_CURVES} best of {len(shown)}" if len(shown) > _CURVES else ""
    return section(part.heading("Curves"), *charts, note=note, columns=2)


def _varying_among(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    return [name for name in names if any(row.settings.get(name) != rows[0].settings.get(name) for row in rows)]


def _against_settings(part: _Part) -> Html:
    scored = [row for row in part.rows if row.score is not None]
    names = _varying_among(scored, part.settings) if scored else []
    if len(scored) < 2 or not names:
        return Html("")
    axes = [_axis(name, scored) for name in names[:_SETTINGS]]
    labels = [f"{_label(row)}\n{part.metric}: {_score(row):.6g}" for row in scored]
    score = Axis(part.metric, [_score(row) for row in scored])
    charts = [
        parallel_coordinates([*axes, score], labels, title=f"{part.metric} by all that varies, the best in colour")
    ]
    charts += [_against(axis, scored, part.metric) for axis in axes]
    note = f"the first {_SETTINGS} of {len(names)}" if len(names) > _SETTINGS else ""
    return section(part.heading(f"{part.metric} against each setting"), *charts, note=note, columns=2)


def _axis(name: str, rows: Sequence[Row]) -> Axis:
    """The values of a setting as places on an axis: numbers as they are, anything else in a row."""
    values = [row.settings.get(name) for row in rows]
    numbers = [float(value) for value in values if _is_number(value)]  # type: ignore[arg-type]
    if len(numbers) == len(values):
        return Axis(name, numbers, log=min(numbers) > 0 and max(numbers) / min(numbers) >= _DECADES)
    names = list(dict.fromkeys(value_of(value) or "(none)" for value in _in_order(values)))
    places = {each: float(place) for place, each in enumerate(names)}
    return Axis(name, [places[value_of(value) or "(none)"] for value in values], format=_namer(names), count=len(names))


def _against(axis: Axis, scored: Sequence[Row], metric: str) -> Html:
    points = [Point(x, _score(row), _label(row)) for x, row in zip(axis.values, scored, strict=True)]
    label = axis.name + (" (log)" if axis.log else "")
    return scatter(
        points, title=f"{metric} over {axis.name}", x_label=label, y_label=metric, log_x=axis.log, x_format=axis.format
    )


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


def _score(row: Row | None) -> float:
    return math.nan if row is None or row.score is None else row.score


def _name(row: Row, varying: Sequence[str] = ()) -> str:
    """Label of a run in a legend: its number and the settings that set it apart."""
    words = " ".join(f"{name.rpartition('.')[2]}={value_of(row.settings.get(name))}" for name in varying[:3])
    number = f"#{row.number}" if row.number is not None else row.run.name if row.run else ""
    return f"{number} {words}".strip()


def _label(row: Row) -> str:
    words = [f"{name}={value_of(value)}" for name, value in row.settings.items()]
    return "\n".join([f"#{row.number}" if row.number is not None else _name(row), *words[:8]])
