"""History of a run in bounded memory."""

from __future__ import annotations

import json
import random
from pathlib import Path

from danling_conf.records.history import MOST_INTERVALS, Curve, read_history
from danling_conf.records.metrics import metrics_file, read_metrics, series


def test_a_curve_of_few_points_is_whole_and_a_long_one_keeps_its_extremes() -> None:
    draw = random.Random(1)
    values = [draw.random() for _ in range(20 * MOST_INTERVALS)]
    for count in (1, MOST_INTERVALS, len(values)):
        curve, given = Curve(), list(enumerate(values[:count]))
        for step, value in given:
            curve.add(step, -1.0)
            curve.add(step, value)  # of one step the newest counts
        least = min(given, key=lambda point: point[1])
        assert (curve.least, curve.most, curve.last) == (least, max(values[:count]), values[count - 1])
        assert set(curve.points) <= set(given)
        assert curve.points == sorted(curve.points)
        if count <= MOST_INTERVALS:
            assert curve.points == given
            assert curve.median == sorted(values[:count])[count // 2]
        else:
            # Spread evenly: no stretch of the run has lost its points.
            assert MOST_INTERVALS <= len(curve.points) <= 2 * MOST_INTERVALS + 1
            gaps = [after[0] - before[0] for before, after in zip(curve.points, curve.points[1:], strict=False)]
            assert max(gaps) <= 4 * 20
            assert abs(curve.median - 0.5) < 0.1


def test_it_is_the_history_that_is_read_whole(tmp_path: Path) -> None:
    """Attempts that resume, that lose steps again, that begin without a marker, and lines that are torn."""
    draw = random.Random(2)
    for case in range(30):
        lines, step = [], 0
        for attempt in range(draw.randint(1, 5)):
            step = draw.randint(0, step)
            head = {"time": 1.0, "attempt": f"a{attempt}", "epoch": 0}
            spaced = draw.random() < 0.8
            if draw.random() < 0.7:
                lines.append(json.dumps({**head, "step": step}))
            for _ in range(draw.randint(0, 6)):
                step += draw.randint(1, 2)
                made = {**head, "step": step, "train.loss": draw.random(), "val.loss": None}
                lines.append(json.dumps(made, separators=None if spaced else (",", ":")))
                if draw.random() < 0.3:
                    lines.append(json.dumps({**head, "step": step, "val.loss": draw.random()}))
            if draw.random() < 0.3:
                lines.append(lines[-1][:20] if lines else "{")
        run = tmp_path / str(case)
        run.mkdir()
        metrics_file(run).write_text("".join(f"{text}\n" for text in lines))
        whole, history = read_metrics(run), read_history(run)
        for key in ("train.loss", "val.loss"):
            assert history.points(key) == series(whole, key), (case, key)
        assert history.measured == ((whole[-1]["step"], 0) if whole else None)
    assert read_history(tmp_path / "nowhere").curves == {}
