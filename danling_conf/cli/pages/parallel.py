"""Chart of parallel coordinates: an axis for each setting and one for the score, a line for each run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from danling_conf.cli.pages.charts import axis_label, figure, svg
from danling_conf.cli.pages.page import Html
from danling_conf.cli.pages.scales import scale_of, short

_WIDTH, _HEIGHT = 1120.0, 300.0
_SIDE, _TOP, _BOTTOM = 60.0, 34.0, 14.0
_LONGEST = 22
_FAINTEST = 0.12


@dataclass(frozen=True)
class Axis:
    """One vertical axis."""

    name: str
    values: Sequence[float]
    """Of each line, in the order of the lines."""
    log: bool = False
    format: Callable[[float], str] = short
    count: int = 5
    """About how many numbers to write along it."""


def parallel_coordinates(axes: Sequence[Axis], labels: Sequence[str], *, title: str) -> Html:
    """Lines over several axes.

    Args:
        axes: all with the same number of values.
        labels: tooltip of each line, the best run first: the better a run, the stronger its line.
    """
    step = (_WIDTH - 2 * _SIDE) / max(1, len(axes) - 1)
    body, places = [], []
    for number, axis in enumerate(axes):
        x = _SIDE + number * step
        y = scale_of(axis.values, _HEIGHT - _BOTTOM, _TOP, log=axis.log, pad=0.04)
        name = axis.name if len(axis.name) <= _LONGEST else f"…{axis.name[1 - _LONGEST :]}"
        body.append(f'<line class="base" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        body.append(axis_label(x, _TOP - 16, name + (" (log)" if axis.log else ""), "middle"))
        last = number == len(axes) - 1
        for tick in y.ticks(axis.count):
            words = axis.format(tick)
            if words:
                body.append(axis_label(x + (7 if last else -7), y(tick) + 4, words, "start" if last else "end"))
        places.append([(x, y(value)) for value in axis.values])
    count = len(labels)
    for place in reversed(range(count)):  # the best one is drawn last, on top
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (points[place] for points in places))
        strength = 1.0 if count == 1 else 1 - (1 - _FAINTEST) * place / (count - 1)
        body.append(
            f'<path class="path run" stroke="var(--s{0 if place else 1})" stroke-opacity="{strength:.2f}" d="{path}" '
            f'data-tip="{escape(labels[place])}"><title>{escape(labels[place])}</title></path>'
        )
    return figure(title, [], svg(body, title, _HEIGHT, "", _WIDTH), wide=True)
