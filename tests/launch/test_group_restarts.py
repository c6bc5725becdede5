"""When a replica group is started again: groups that a test ends, in place of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from danling_conf.launch import groups
from danling_conf.launch.groups import Groups, Place, TaskGone
from danling_conf.launch.rank_error import WorkersFailed, WorkersInterrupted
from danling_conf.records.membership import GONE, Event, changes_of, note
from danling_conf.schema.fault_tolerance import FtConfig

LOG = Path("rank-1.log")
KILLED = WorkersFailed(1, -9, "ended by SIGKILL", LOG)
TASK_GONE = TaskGone(1, "its task on n2 is gone", LOG, for_good=False)
LOST = TaskGone(1, "its node n2 is lost", LOG, for_good=True)
STOPPED = WorkersInterrupted(15)
End = WorkersFailed | WorkersInterrupted | None


class Group:
    """The second group ends as it is told, one end a start; the first completes the run when no end is left."""

    died = False

    def __init__(self, ends: list[End], attempt: Path, index: int) -> None:
        self.ends, self.attempt, self.index = ends, attempt, index
        self.end = ends.pop(0) if index else None
        note(attempt, index, Event.JOINED, step=0)

    def running(self) -> bool:
        if self.index:
            return False
        last = [item.event for item in changes_of(self.attempt) if item.group == 1][-1]
        if self.ends or last not in GONE:
            return True
        note(self.attempt, 0, Event.COMPLETE)
        return False

    def failure(self) -> End:
        return self.end

    def kill(self) -> None:
        """It has ended."""


def watch(attempt: Path, *ends: End, scheduled: bool = True, **settings: int) -> list[Event]:
    """What is noted of the second group, but that it takes part."""

    def make(command: Any, world_size: int, attempt: Path, environment: Any, *, numbered_from: int) -> Any:
        return Group(left, attempt, numbered_from)

    left, section = list(ends), FtConfig(enabled=True, group_size=2, **settings)
    made = Groups([], section, 1, attempt, Place(make=make, scheduled=scheduled), lighthouse="http://here:1")
    made.start()
    made.watch([])
    return [item.event for item in changes_of(attempt) if item.group == 1 and item.event is not Event.JOINED]


def test_a_group_that_dies_is_started_again_as_often_as_is_said(tmp_path: Path) -> None:
    died, given_up = [Event.STARTED, Event.DIED], [Event.GIVEN_UP]
    (tmp_path / "once").mkdir()
    assert watch(tmp_path / "once", KILLED, KILLED, max_restarts=1) == [*died, *died, *given_up]
    assert watch(tmp_path, KILLED, None, scheduled=False) == [*died, Event.STARTED, Event.LEFT]


def test_a_group_whose_task_is_gone_is_started_again_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "_PAUSE_SECONDS", 0.3)
    assert watch(tmp_path, TASK_GONE, None) == [Event.STARTED, Event.DIED, Event.STARTED, Event.LEFT]
    times = {item.event: item.time for item in changes_of(tmp_path) if item.group == 1}
    assert times[Event.STARTED] - times[Event.DIED] >= 0.3


def test_a_group_whose_node_is_lost_is_given_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert watch(tmp_path, LOST) == [Event.STARTED, Event.DIED, Event.GIVEN_UP]
    assert capfd.readouterr().err == "group 1 died: its node n2 is lost; it is given up\n"


def test_a_scheduler_stops_all_groups_and_a_signal_to_one_is_its_own(tmp_path: Path) -> None:
    """What Slurm stops is not started again: the job goes back into the queue."""
    assert watch(tmp_path, STOPPED) == [Event.STARTED, Event.DIED]
    (tmp_path / "here").mkdir()
    assert Event.LEFT in watch(tmp_path / "here", STOPPED, None, scheduled=False)
