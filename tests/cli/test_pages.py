"""Pages and charts as markup: whole, self-contained, and true to their numbers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from danling_conf.cli.main import main
from danling_conf.cli.pages.charts import Bar, Point, Series, line_chart, scatter, timeline
from danling_conf.cli.pages.page import Html, badge, facts, page, section, table, tiles
from danling_conf.cli.pages.parallel import Axis, parallel_coordinates
from danling_conf.cli.pages.scales import scale_of, short, thinned
from tests.support.sweeps import write_sweep


def svg_of(chart: Html) -> ElementTree.Element:
    """The chart's SVG, which parses."""
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", chart, re.DOTALL).group())


def test_a_page_needs_nothing_from_elsewhere() -> None:
    whole = page("a <title>", [section("Heading", tiles([("label", 1, "")]), table(["x"], [["<script>"]]))])
    assert whole.startswith("<!doctype html>")
    assert "a &lt;title&gt;" in whole
    assert "<td>&lt;script&gt;</td>" in whole
    assert not re.search(r"""(src|href)=["']?(https?:|//)|@import|url\(""", whole)
    assert whole.count("<script>") == whole.count("<style>") == 1


def test_markup_is_kept_and_anything_else_is_escaped() -> None:
    made = table(["a", "b"], [[badge("w&", "good"), None], [Html("<b>x</b>"), '"']], numeric=(1,))
    assert '<span class="badge good">w&amp;</span>' in made
    assert "<b>x</b>" in made
    assert made.count('class="number"') == 3
    assert facts({"<": ">"}) == '<dl class="facts"><dt>&lt;</dt><dd>&gt;</dd></dl>'


def test_a_line_goes_through_its_points() -> None:
    chart = line_chart([Series("a", [(0, 1.0), (5, math.nan), (10, 3.0)]), Series("b & c", [(0, 2.0)])], title="t")
    svg = svg_of(chart)
    data = json.loads(svg.attrib["data-lines"])
    assert [(line["name"], [(point[2], point[3]) for point in line["points"]]) for line in data] == [
        ("a", [("0", 1.0), ("10", 3.0)]), ("b & c", [("0", 2.0)]),
    ]  # fmt: skip
    (left, high, *_), (right, low, *_) = data[0]["points"]
    assert left < right
    assert high > low  # pixels count downwards
    assert f"M{left:.1f} {high:.1f}L{right:.1f} {low:.1f}" in svg.findall(".//path")[0].attrib["d"]
    assert "b &amp; c" in chart


def test_charts_of_nothing_say_so() -> None:
    assert "nothing was recorded" in line_chart([Series("a", [(0, math.inf)])], title="t")
    assert "nothing to compare" in scatter([Point(1, -1, "p")], title="t", x_label="x", y_label="y", log_y=True)
    assert "nothing was recorded" in timeline([], title="t", x_format=short)


def test_points_of_a_scatter_plot_say_what_they_are_and_lead_there() -> None:
    points = [Point(1e-4, 2.0, "run <a>", 0, "a.html"), Point(1e-2, 1.0, "run b", 1)]
    chart = scatter(points, title="t", x_label="lr", y_label="score", log_x=True, groups=["adam", "sgd"])
    svg = svg_of(chart)
    marks = svg.findall(".//circle")
    assert [mark.attrib["data-tip"].split(" lr: ")[0] for mark in marks] == ["run <a>", "run b"]  # XML joins lines
    assert svg.find("a").attrib["href"] == "a.html"
    assert float(marks[0].attrib["cx"]) < float(marks[1].attrib["cx"])
    assert float(marks[0].attrib["cy"]) < float(marks[1].attrib["cy"])


def test_bars_along_time() -> None:
    rows = [("first", [Bar(0, 10, "ten")]), ("second", [Bar(20, 30, "more", "bad")])]
    svg = svg_of(timeline(rows, title="t", x_format=short, marks=[(15, "between")]))
    first, second = (bar.attrib for bar in svg.findall("rect"))
    assert float(first["width"]) == pytest.approx(float(second["width"]), abs=0.2)
    assert float(first["x"]) + float(first["width"]) < float(second["x"])
    assert second["fill"] == "var(--bad)"


@pytest.mark.parametrize(
    ("values", "log", "expected"),
    [
        ([0, 10], False, [0, 2, 4, 6, 8, 10]),
        ([3, 3], False, [2.7, 2.8, 2.9, 3.0, 3.1, 3.2, 3.3]),
        ([0, 0], False, [-1, -0.5, 0, 0.5, 1]),
        ([1e-4, 1e-1], True, [1e-4, 1e-3, 1e-2, 1e-1]),
        ([1, 50], True, [1, 2, 5, 10, 20, 50]),
        ([-1, 50], True, [0, 10, 20, 30, 40, 50]),  # no logarithm of what is not positive
    ],
)
def test_numbers_along_an_axis_are_round(values: list[float], log: bool, expected: list[float]) -> None:
    assert scale_of(values, 0, 100, log=log).ticks(5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1500, "1.5k"), (2e6, "2M"), (0.25, "0.25"), (1e-4, "1e-4"), (3.25e-5, "3.25e-5"), (-1200, "-1.2k")],
)
def test_numbers_are_short(value: float, shown: str) -> None:
    assert short(value) == shown


def test_a_long_line_is_thinned_and_keeps_its_extremes() -> None:
    points = [(step, float(step % 7)) for step in range(10_000)]
    points[4321] = (4321, 1000.0)
    kept = thinned(points, 100)
    assert len(kept) <= 102
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert points[4321] in kept
    assert kept == sorted(kept)
    assert thinned(points[:50], 100) == points[:50]


def test_parallel_coordinates_have_a_line_for_each_run() -> None:
    axes = [Axis("lr", [0.1, 0.001], log=True), Axis("val.loss", [1.0, 2.0])]
    chart = parallel_coordinates(axes, ["the best", "the <other>"], title="t")
    svg = svg_of(chart)
    other, best = svg.findall("path")  # the best one is on top
    assert best.attrib["data-tip"] == "the best"
    assert other.attrib["data-tip"] == "the <other>"
    assert float(best.attrib["stroke-opacity"]) > float(other.attrib["stroke-opacity"])
    assert 'class="chart wide"' in chart


def test_sweeps_and_metrics_are_parts_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores of two sweeps do not compare, nor accuracies with losses."""
    first = [_job(0.1, 1.0, momentum=0.9), _job(0.01, 2.0, momentum=0.9), _job(0.01, 1.5, momentum=0.5)]
    by_accuracy = {"score_name": "accuracy", "score_mode": "max", "score_split": "val"}
    second = [_job(0.3, 0.7, **by_accuracy), _job(0.4, 0.8, **by_accuracy)]
    for name, jobs in (("one", first), ("two", second)):
        write_sweep(tmp_path / "exp" / name / "sweeps" / name, jobs)
    for number, job in enumerate(second):
        run = tmp_path / "exp" / "two" / f"run{number}"
        run.mkdir()
        line = {"time": 1.0, "attempt": "a", "step": 1, "epoch": 0, "val.accuracy": job["lines"][1]["score"]}
        (run / "metrics.jsonl").write_text(json.dumps({**line, "train.loss": 1.0, "val.loss": 0.5}) + "\n")
    target = tmp_path / "page.html"
    assert main(["runs", str(tmp_path), "--html", str(target)]) == 0
    content = target.read_text()
    assert "<h2>Sweep one by loss: jobs</h2>" in content
    assert "<h2>Sweep two by val.accuracy: jobs</h2>" in content
    one, two = content.split("<h2>Sweep two by val.accuracy: overview</h2>")
    assert "best val.accuracy" in two
    assert "best loss" in one
    assert ">why<" not in content  # nothing failed
    assert "momentum" in one
    assert "momentum" not in two.split("Asked for")[0]
    assert "val.accuracy over optim.lr" in two
    assert "loss by all that varies" in one


def _job(lr: float, score: float, **config: Any) -> dict[str, Any]:
    momentum = config.pop("momentum", None)
    overrides = [] if momentum is None else [f"optim.momentum={momentum}"]
    lines = [{"status": "running"}, {"status": "completed", "score": score}]
    return {"lr": lr, "config": config, "lines": lines, "overrides": overrides}
