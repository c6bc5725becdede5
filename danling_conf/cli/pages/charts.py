"""Charts as inline SVG: lines, points, and bars along time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from danling_conf.cli.pages.page import Html, text
from danling_conf.cli.pages.scales import Scale, scale_of, short, thinned
from danling_conf.cli.pages.style import COLOURS

_WIDTH, _HEIGHT = 560.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 10.0, 38.0
_MOST_POINTS = 600
_ROW = 26.0
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    name: str
    points: Points
    """Pairs (x, y), sorted by x."""


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot."""

    x: float
    y: float
    label: str
    """Tooltip."""
    group: int = 0
    """Group, which has one colour."""
    href: str | None = None


@dataclass(frozen=True)
class Bar:
    """An interval of time."""

    begin: float
    end: float
    label: str
    kind: str = "s0"
    """A colour of the style: s0 to s7, good, bad, busy, soft."""


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "step",
    y_label: str = "",
    log_y: bool = False,
    zero: bool = False,
    x_format: Callable[[float], str] = short,
    y_format: Callable[[float], str] = short,
) -> Html:
    """Line chart over a common x axis. Values that are not finite are skipped.

    Args:
        zero: whether the y axis starts at 0.
    """
    drawn = [Series(each.name, _finite(each.points, log_y)) for each in series]
    drawn = [Series(each.name, thinned(each.points, _MOST_POINTS)) for each in drawn if each.points]
    if not drawn:
        return figure(title, [], Html('<div class="empty">nothing was recorded</div>'))
    every = [point for each in drawn for point in each.points]
    x = scale_of([point[0] for point in every], _LEFT, _WIDTH - _RIGHT)
    values = [point[1] for point in every] + ([0.0] if zero and not log_y else [])
    y = scale_of(values, _HEIGHT - _BOTTOM, _TOP, log=log_y, pad=0.04)
    if zero and not log_y and y.low < 0 <= min(values):
        y = Scale(0.0, y.high, y.begin, y.end)
    body = [_axes(x, y, x_label, y_label, x_format, y_format)]
    data: list[dict[str, object]] = []
    curves: list[str] = []
    for number, each in enumerate(drawn):
        places = [(x(px), y(py)) for px, py in each.points]
        colour = f"var(--s{number % COLOURS})"
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
        curves.append(f'<path class="path" stroke="{colour}" d="{path}"/>')
        if len(places) <= 40:
            curves += [f'<circle class="mark" fill="{colour}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>' for px, py in places]
        points = [
            [round(place[0], 1), round(place[1], 1), x_format(point[0]), point[1]]
            for place, point in zip(places, each.points, strict=True)
        ]
        data.append({"name": each.name, "points": points})
    # A drawing of its own inside the axes: it cuts off what a zoom moves out of them.
    inside = f'x="{_LEFT - 4}" y="0" width="{_WIDTH - _LEFT - _RIGHT + 8}" height="{_HEIGHT - _BOTTOM + 4}"'
    view = f'viewBox="{_LEFT - 4} 0 {_WIDTH - _LEFT - _RIGHT + 8} {_HEIGHT - _BOTTOM + 4}"'
    body.append(f'<svg class="curves" {inside} {view} overflow="hidden">{"".join(curves)}</svg>')
    body.append(f'<rect class="chosen" y="{_TOP}" height="{_HEIGHT - _BOTTOM - _TOP}" style="visibility:hidden"/>')
    body.append(f'<line class="cross" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" style="visibility:hidden"/>')
    ends = f'data-left="{_LEFT}" data-right="{_WIDTH - _RIGHT}"'
    attributes = f'{ends} data-lines="{escape(json.dumps(data, separators=(",", ":")))}" data-x="{escape(x_label)}"'
    names = [each.name for each in drawn] if len(drawn) > 1 else []
    return figure(title, names, svg(body, title, _HEIGHT, attributes))


def scatter(
    points: Sequence[Point],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    groups: Sequence[str] = (),
    x_format: Callable[[float], str] = short,
    y_format: Callable[[float], str] = short,
) -> Html:
    """Scatter plot. Values that are not finite, or not positive on a logarithmic axis, are skipped.

    Args:
        groups: names of the groups, for the legend.
    """
    shown = [point for point in points if _drawable(point.x, log_x) and _drawable(point.y, log_y)]
    if not shown:
        return figure(title, [], Html('<div class="empty">nothing to compare yet</div>'))
    x = scale_of([point.x for point in shown], _LEFT, _WIDTH - _RIGHT, log=log_x, pad=0.05)
    y = scale_of([point.y for point in shown], _HEIGHT - _BOTTOM, _TOP, log=log_y, pad=0.06)
    body = [_axes(x, y, x_label, y_label, x_format, y_format)]
    for point in shown:
        words = f"{point.label}\n{x_label}: {x_format(point.x)}\n{y_label}: {y_format(point.y)}"
        mark = (
            f'<circle class="mark" fill="var(--s{point.group % COLOURS})" cx="{x(point.x):.1f}" cy="{y(point.y):.1f}" '
            f'r="5.5" data-tip="{escape(words)}"><title>{escape(words)}</title></circle>'
        )
        body.append(f'<a href="{escape(point.href)}">{mark}</a>' if point.href else mark)
    return figure(title, groups, svg(body, title, _HEIGHT, ""))


def timeline(
    rows: Sequence[tuple[str, Sequence[Bar]]],
    *,
    title: str,
    x_format: Callable[[float], str],
    marks: Sequence[tuple[float, str]] = (),
) -> Html:
    """Bars along time, one row for each name.

    Args:
        x_format: formats a time.
        marks: times and their labels, drawn as small lines across all rows.
    """
    times = [time for _, bars in rows for bar in bars for time in (bar.begin, bar.end)] + [time for time, _ in marks]
    if not times:
        return figure(title, [], Html('<div class="empty">nothing was recorded</div>'))
    width = 2 * _WIDTH
    left = 14.0 + 6.6 * max(len(name) for name, _ in rows)
    height = _TOP + _ROW * len(rows) + _BOTTOM - 12
    x = scale_of(times, left, width - 24)
    body = []
    for tick in x.ticks(8):
        body.append(f'<line class="rule" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{_TOP}" y2="{height - 26}"/>')
        body.append(axis_label(x(tick), height - 10, x_format(tick), "middle"))
    for number, (name, bars) in enumerate(rows):
        top = _TOP + number * _ROW
        body.append(axis_label(left - 10, top + 16, name, "end"))
        for bar in bars:
            size = max(2.0, x(bar.end) - x(bar.begin))
            body.append(
                f'<rect class="bar" fill="var(--{escape(bar.kind)})" x="{x(bar.begin):.1f}" y="{top + 3:.1f}" rx="3" '
                f'width="{size:.1f}" height="{_ROW - 8:.0f}" data-tip="{escape(bar.label)}">'
                f"<title>{escape(bar.label)}</title></rect>"
            )
    for time, what in marks:
        body.append(
            f'<path fill="var(--ink)" d="M{x(time):.1f} {height - 30:.1f}l-4.5 8h9z" data-tip="{escape(what)}">'
            f"<title>{escape(what)}</title></path>"
        )
    return figure(title, [], svg(body, title, height, "", width))


def figure(title: str, legend: Sequence[str], content: Html, *, wide: bool = False) -> Html:
    """A chart with its title and legend; a wide one takes all columns of its section."""
    entries = "".join(
        f'<span><i style="background:var(--s{number % COLOURS})"></i>{text(name)}</span>'
        for number, name in enumerate(legend)
    )
    shown = f'<span class="legend">{entries}</span>' if entries else ""
    kind = "chart wide" if wide else "chart"
    return Html(f'<figure class="{kind}"><figcaption>{text(title)}{shown}</figcaption>{content}</figure>')


def svg(body: Sequence[str], label: str, height: float, attributes: str, width: float = _WIDTH) -> Html:
    """A drawing of that size, scaled to the width that it is given."""
    return Html(
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}" {attributes}>'
        + "".join(body)
        + "</svg>"
    )


def _axes(
    x: Scale,
    y: Scale,
    x_label: str,
    y_label: str,
    x_format: Callable[[float], str],
    y_format: Callable[[float], str],
) -> str:
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for tick in y.ticks(5):
        place = y(tick)
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(axis_label(_LEFT - 8, place + 4, y_format(tick), "end"))
    parts.append('<g class="ticks">')
    parts += [axis_label(x(tick), bottom + 17, x_format(tick), "middle") for tick in x.ticks(6)]
    parts.append("</g>")
    parts.append(f'<line class="base" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(axis_label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, x_label, "middle"))
    if y_label:
        middle = (_TOP + bottom) / 2
        parts.append(
            f'<text class="axis" text-anchor="middle" transform="translate(10 {middle:.0f}) rotate(-90)">'
            f"{escape(y_label)}</text>"
        )
    return "".join(parts)


def axis_label(x: float, y: float, words: str, anchor: str) -> str:
    """Text along an axis."""
    return f'<text class="axis" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _finite(points: Points, log: bool) -> Points:
    return [(x, y) for x, y in points if _drawable(x, False) and _drawable(y, log)]


def _drawable(value: float | None, log: bool) -> bool:
    return value is not None and math.isfinite(value) and (not log or value > 0)
