"""Stacked charts: parts of a whole as bars, and along the moments of a step, with a limit that they must not exceed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from danling_conf.cli.pages.charts import axis_label, figure, svg
from danling_conf.cli.pages.page import Html
from danling_conf.cli.pages.scales import Scale
from danling_conf.cli.pages.style import COLOURS

_WIDTH = 1120.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 30.0, 20.0, 30.0
_ROW, _AREA = 30.0, 260.0
Stack = Mapping[str, float]
"""Parts of a whole, by name."""


def stacked_bars(
    rows: Sequence[tuple[str, Stack]],
    *,
    title: str,
    limit: float,
    limit_name: str,
    value_format: Callable[[float], str],
) -> Html:
    """A bar for each row, of its parts one after another, and a line where the limit is."""
    names = _names(stack for _, stack in rows)
    left = 14.0 + 6.6 * max((len(name) for name, _ in rows), default=0)
    height = _TOP + _ROW * len(rows) + _BOTTOM
    x = Scale(0.0, 1.04 * max([limit, *(sum(stack.values()) for _, stack in rows)]), left, _WIDTH - _RIGHT)
    body = []
    for tick in x.ticks(8):
        body.append(f'<line class="rule" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{_TOP}" y2="{height - 26}"/>')
        body.append(axis_label(x(tick), height - 10, value_format(tick), "middle"))
    for number, (name, stack) in enumerate(rows):
        top, begin = _TOP + number * _ROW, 0.0
        body.append(axis_label(left - 10, top + 18, name, "end"))
        for part, value in stack.items():
            if value <= 0:
                continue
            words = escape(f"{name}, {part}: {value_format(value)}")
            body.append(
                f'<rect class="bar" fill="{_colour(names, part)}" x="{x(begin):.1f}" y="{top + 3:.1f}" '
                f'width="{max(0.5, x(begin + value) - x(begin)):.1f}" height="{_ROW - 8:.0f}" data-tip="{words}">'
                f"<title>{words}</title></rect>"
            )
            begin += value
    body.append(_limit(x(limit), x(limit), 6.0, height - 26, f"{limit_name}: {value_format(limit)}"))
    return figure(title, names, svg(body, title, height, "", _WIDTH), wide=True)


def stacked_area(
    moments: Sequence[tuple[str, Stack]],
    *,
    title: str,
    limit: float,
    limit_name: str,
    value_format: Callable[[float], str],
) -> Html:
    """Parts of a whole at moments in their order, stacked, and a line where the limit is."""
    names = _names(stack for _, stack in moments)
    height, bottom = _AREA + _BOTTOM, _AREA
    most = max([limit, *(sum(stack.values()) for _, stack in moments)])
    y = Scale(0.0, 1.04 * most, bottom, _TOP)
    width = (_WIDTH - _LEFT - _RIGHT) / max(1, len(moments))
    body = []
    for tick in y.ticks(5):
        body.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        body.append(axis_label(_LEFT - 8, y(tick) + 4, value_format(tick), "end"))
    base = [0.0] * len(moments)
    for name in names:
        upper = [low + stack.get(name, 0.0) for low, (_, stack) in zip(base, moments, strict=True)]
        # Steps and no slopes: memory changes at a moment, not between two.
        there = [f"{_LEFT + place * width:.1f} {y(value):.1f}H{_LEFT + (place + 1) * width:.1f}"
                 for place, value in enumerate(upper)]  # fmt: skip
        back = [f"{_LEFT + (place + 1) * width:.1f} {y(value):.1f}H{_LEFT + place * width:.1f}"
                for place, value in reversed(list(enumerate(base)))]  # fmt: skip
        path = "M" + "L".join([*there, *back]) + "Z"
        body.append(f'<path fill="{_colour(names, name)}" d="{path}"><title>{escape(name)}</title></path>')
        base = upper
    for place, (moment, stack) in enumerate(moments):
        shown = [f"{part}: {value_format(value)}" for part, value in stack.items() if value > 0]
        words = escape("\n".join([moment, f"all: {value_format(sum(stack.values()))}", *shown]))
        body.append(
            f'<rect fill="transparent" x="{_LEFT + place * width:.1f}" y="{_TOP}" width="{width:.2f}" '
            f'height="{bottom - _TOP}" data-tip="{words}"><title>{words}</title></rect>'
        )
    body.append(f'<line class="base" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    body.append(_limit(_LEFT, _WIDTH - _RIGHT, y(limit), y(limit), f"{limit_name}: {value_format(limit)}"))
    body.append(axis_label((_LEFT + _WIDTH - _RIGHT) / 2, height - 8, "moments of a step, in order", "middle"))
    return figure(title, names, svg(body, title, height, "", _WIDTH), wide=True)


def _names(stacks: Iterable[Stack]) -> list[str]:
    found: dict[str, None] = {}
    for stack in stacks:
        found |= dict.fromkeys(name for name, value in stack.items() if value > 0)
    return list(found)


def _colour(names: Sequence[str], name: str) -> str:
    return f"var(--s{names.index(name) % COLOURS})"


def _limit(x1: float, x2: float, y1: float, y2: float, words: str) -> str:
    return (
        f'<line stroke="var(--bad)" stroke-width="1.5" stroke-dasharray="5 3" x1="{x1:.1f}" x2="{x2:.1f}" '
        f'y1="{y1:.1f}" y2="{y2:.1f}" data-tip="{escape(words)}"><title>{escape(words)}</title></line>'
    )
