"""The run's metrics as readers see them: torn lines, steps that were done again, goodput."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from danling_conf.records.find import runs_in, runs_or_refuse
from danling_conf.records.heartbeats import read_heartbeats
from danling_conf.records.history import goodput
from danling_conf.records.metrics import PRODUCTIVE, metrics_file, read_metrics, series
from danling_conf.records.run_directory import newest_attempt
from danling_conf.topology.violation import ConfigRefused


def line(attempt: str, step: int, time: float, **scalars: float) -> str:
    return json.dumps({"time": time, "attempt": attempt, "step": step, "epoch": 0, **scalars}) + "\n"


def write(run: Path, *lines: str) -> None:
    run.mkdir(parents=True, exist_ok=True)
    metrics_file(run).write_text("".join(lines))


def test_the_newest_attempt_wins_from_the_step_that_it_went_on_from(tmp_path: Path) -> None:
    write(
        tmp_path,
        line("a", 0, 0.0),
        *(line("a", step, step, **{"train.loss": 1.0 * step}) for step in (2, 4, 6)),
        line("a", 4, 4.5, **{"val.loss": 40.0}),
        line("b", 4, 10.0),
        line("b", 5, 11.0, **{"train.loss": 50.0}),
    )
    history = read_metrics(tmp_path)
    assert series(history, "train.loss") == [(2, 2.0), (4, 4.0), (5, 50.0)]  # not 6, which nothing goes on from
    assert series(history, "val.loss") == [(4, 40.0)]
    assert series(history, "train.loss", by="time") == [(2.0, 2.0), (4.5, 4.0), (11.0, 50.0)]


def test_a_step_done_again_counts_as_it_was_done_last(tmp_path: Path) -> None:
    write(tmp_path, line("a", 3, 1.0, x=1.0), line("a", 4, 2.0, x=2.0), line("b", 2, 3.0), line("b", 3, 4.0, x=7.0))
    assert series(read_metrics(tmp_path), "x") == [(3, 7.0)]


def test_lines_that_are_torn_or_foreign_are_passed_over(tmp_path: Path) -> None:
    write(
        tmp_path, line("a", 1, 1.0, x=1.0), '{"time": 2.0, "att', "\n", "[]\n", '{"x": 1}\n', line("a", 3, 3.0, x=None)
    )
    assert [found["step"] for found in read_metrics(tmp_path)] == [1, 3]
    assert series(read_metrics(tmp_path), "x") == [(1, 1.0)]
    assert read_metrics(tmp_path / "nowhere") == []


def test_goodput_counts_steps_once_and_no_time_between_attempts(tmp_path: Path) -> None:
    write(
        tmp_path,
        line("a", 0, 0.0),
        line("a", 10, 10.0, **{PRODUCTIVE: 8.0}),
        line("a", 20, 20.0, **{PRODUCTIVE: 8.0}),  # lost: the next attempt goes on from 10
        line("b", 10, 1000.0),
        line("b", 20, 1010.0, **{PRODUCTIVE: 7.0}),
    )
    assert goodput(tmp_path) == pytest.approx((8.0 + 7.0) / (20.0 + 10.0))
    assert goodput(tmp_path / "nowhere") is None


def test_runs_of_a_run_a_sweep_and_a_root(tmp_path: Path) -> None:
    runs = [tmp_path / "exp" / name for name in ("b", "a")]
    for run in runs:
        run.mkdir(parents=True)
        (run / "run.json").touch()
    sweep = tmp_path / "exp" / "sweeps" / "one"
    sweep.mkdir(parents=True)
    of_jobs = [{"run": str(runs[0])}, {"status": "refused"}, {"run": str(runs[1])}, {"run": str(runs[0])}]
    jobs = [{"key": f"k{number}", "job": number, **facts} for number, facts in enumerate(of_jobs)]
    (sweep / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    assert list(runs_in(runs[0])) == [runs[0]]
    assert list(runs_in(sweep)) == runs
    assert list(runs_in(tmp_path)) == sorted(runs)
    with pytest.raises(ConfigRefused, match="there is no such directory"):
        runs_or_refuse(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigRefused, match="there is no run in it"):
        runs_or_refuse(str(sweep.parent))


def test_heartbeats_are_those_of_the_attempt_that_wrote_last(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeats"
    folder.mkdir()
    beat = {"world_size": 3, "host": "h", "pid": 7, "step": 5, "epoch": 0, "state": "training", "state_since": 1.0,
            "written": 2.0, "interval": 1.0, "memory_bytes": 9}  # fmt: skip
    for rank, attempt in enumerate(("20260101-000000.10", "20260101-000000.10", "20260101-000000.9")):
        (folder / f"rank-{rank}.json").write_text(json.dumps({**beat, "rank": rank, "attempt": attempt}))
    (folder / "rank-3.json").write_text('{"rank": 3,')
    (folder / "rank-x.json").write_text("{}")
    assert list(read_heartbeats(tmp_path)) == [0, 1]
    for name in ("20260101-000000.9", "20260101-000000.10"):
        (tmp_path / "attempts" / name).mkdir(parents=True)
    found = newest_attempt(tmp_path)
    assert found is not None
    assert found.name == "20260101-000000.10"
