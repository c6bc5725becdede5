"""What the display tells of activities, and to whom."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from danling_conf.records.heartbeats import STATES
from danling_conf.runner.display import Display
from tests.support.small import Net, Pairs, loss, runner


@pytest.mark.parametrize(
    ("activity", "state"),
    [("compiling the first step", "compiling"), ("evaluating val", "evaluating"), ("saving", "saving"),
     ("exporting", "saving"), ("reporting", "reporting"), (None, "training")],
)  # fmt: skip
def test_an_activity_is_a_state_of_the_heartbeat(activity: str | None, state: str) -> None:
    told: list[str] = []
    progress = Display(show=False, total=None, samples_per_step=None, tokens_per_sample=None, position=lambda: 0,
                        on_state=told.append, console=Console(file=io.StringIO()))  # fmt: skip
    progress.activity(activity)
    assert told == [state]
    assert state in STATES


def test_every_line_of_a_log_has_time_rank_and_step(tmp_path: Path) -> None:
    ours = runner(tmp_path, {"log_interval": 2})
    ours.fit(Net, {"train": Pairs(), "val": Pairs(8)}, loss=loss)
    for name in ("rank-0.log", "run.log"):
        lines = (ours.world.attempt.directory / name).read_text().splitlines()
        heads = [line.split(" INFO ")[0].split(" ", 2) for line in lines if " INFO " in line]
        assert {place for _, _, place in heads} == {f"rank 0 step {step}" for step in (1, 2, 3, 4, 5, 6)}
        assert all(len(day) == len("2026-01-01") and len(time) == len("00:00:00,000") for day, time, _ in heads)
