"""When log lines are due, for steps of any length: a clock that is told how long they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from danling_conf.records.metrics import read_metrics, series
from danling_conf.runner.observe import log_pace
from danling_conf.runner.observe.log_pace import LogPace
from tests.support.small import Net, Pairs, loss, runner
from tests.support.spawn import run


class Clock:
    """Says what time it is."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def lines(monkeypatch: pytest.MonkeyPatch, pace: LogPace, *, step_seconds: float, steps: int) -> list[int]:
    """The steps at which a run of so many steps of so many seconds has lines."""
    clock = Clock()
    monkeypatch.setattr(log_pace, "time", clock)
    found = []
    for step in range(1, steps + 1):
        clock.now += step_seconds
        if step == 1:
            pace.begin(step)
        if step == pace.next and pace.due(step):
            found.append(step)
            pace.logged(step, step_seconds)
    return found


def test_a_chosen_interval_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds in (1e-4, 1000.0):
        pace = LogPace(30, fixed=True, length_known=True)
        assert lines(monkeypatch, pace, step_seconds=seconds, steps=100) == [30, 60, 90]


def test_fifty_lines_a_run_of_known_length(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = LogPace(20, fixed=False, length_known=True)
    assert lines(monkeypatch, pace, step_seconds=1e-5, steps=1000) == list(range(20, 1001, 20))


@pytest.mark.parametrize("every", [1, 50, 100_000])
@pytest.mark.parametrize("length_known", [True, False])
@pytest.mark.parametrize("seconds", [1e-4, 0.1, 7.0, 200.0])
def test_neither_silence_nor_a_flood(
    monkeypatch: pytest.MonkeyPatch, every: int, length_known: bool, seconds: float
) -> None:
    steps = min(20_000, int(7200 / seconds))
    found = lines(
        monkeypatch, LogPace(every, fixed=False, length_known=length_known), step_seconds=seconds, steps=steps
    )
    if not found:  # a run of seconds may have no line of its own but for the results
        assert steps * seconds < 10
        return
    gaps = [later - earlier for earlier, later in zip([0, *found], [*found, steps], strict=True)]
    assert max(gaps[1:-1], default=0) * seconds <= max(60.0, seconds)
    assert max(gaps) * seconds <= max(120.0, 2 * seconds)
    if not length_known:
        assert len(found) <= 2 + steps * seconds


def test_the_interval_adapts_when_steps_become_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = LogPace(100, fixed=False, length_known=True)
    pace.begin(1)
    pace.logged(100, 0.01)
    assert (pace.next, pace.every) == (200, 100)
    pace.logged(200, 5.0)
    assert (pace.next, pace.every) == (204, 12)


@pytest.mark.parametrize(("settings", "fixed"), [({}, False), ({"log_interval": 3}, True), ({"val": None}, True)])
def test_what_the_score_is_taken_from_does_not_depend_on_a_clock(
    tmp_path: Path, settings: dict[str, Any], fixed: bool
) -> None:
    """The training loss is a mean since the last line: where it is the score, lines come at fixed steps."""
    data = {"train": Pairs(), **({} if "val" in settings else {"val": Pairs(8)})}
    ours = runner(tmp_path, {key: value for key, value in settings.items() if key != "val"})
    ours.prepare(Net, data, loss=loss)
    ours.close()
    assert ours.observers.pace._fixed is fixed


def steps_with_lines(root: str) -> tuple[list[int], list[int]]:
    """The steps at which this rank takes part in a line, and those of the run's file; rank 1 is told that each step
    takes 100 s."""
    import torch.distributed as dist

    class Slow(Clock):
        def perf_counter(self) -> float:
            self.now += 100.0 * dist.get_rank()
            return self.now

    log_pace.time = Slow()  # type: ignore[assignment]
    ours = runner(root, {"steps": 300, "eval_interval": 300, "parallel": {"axes": {"replicate": 2}}})
    ours.prepare(Net, {"train": Pairs(), "val": Pairs(8)}, loss=loss)
    taken = []
    logged = ours.observers.pace.logged
    ours.observers.pace.logged = lambda *arguments: (taken.append(ours.global_step), logged(*arguments))  # type: ignore[method-assign]
    for batch in ours.batches("train"):
        ours.step(batch)
    ours.finish()
    return taken, [step for step, _ in series(read_metrics(ours.world.attempt.run_directory), "train.loss")]


@pytest.mark.slow
def test_ranks_agree_on_lines_whatever_their_clocks_say(tmp_path: Path) -> None:
    (first, written), (second, _) = run(steps_with_lines, 2, str(tmp_path))
    assert first == second == written
    assert first[0] == 2  # rank 1 thought that it was time
    assert first[1:] == list(range(6, 301, 6))
