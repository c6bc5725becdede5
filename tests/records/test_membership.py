"""Membership of replica groups, and the lead among them."""

from __future__ import annotations

from pathlib import Path

import pytest

from danling_conf.cli import watch
from danling_conf.cli.report import _groups
from danling_conf.records.membership import Event, changes_of, has_happened, members_of, note
from danling_conf.records.run_lock import LeadLock
from danling_conf.schema.files import MEMBERSHIP


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    for group in (0, 1):
        note(tmp_path, group, Event.STARTED)
    for group in (0, 1):
        note(tmp_path, group, Event.JOINED, step=0)
    note(tmp_path, 1, Event.REFUSED, step=4)
    note(tmp_path, 0, Event.DIED, why="ended by SIGKILL")
    note(tmp_path, 0, Event.STARTED)
    return tmp_path


def test_events_say_who_takes_part(attempt: Path) -> None:
    first, second = members_of(changes_of(attempt))
    assert (first.state, first.takes_part, first.starts, first.why) == ("starting", False, 2, "ended by SIGKILL")
    assert (second.state, second.takes_part, second.starts, second.refused) == ("takes part", True, 1, 1)
    assert has_happened(attempt, Event.DIED)
    assert not has_happened(attempt, Event.COMPLETE, Event.SHORT)
    note(attempt, 0, Event.JOINED, step=5, why="caught up")
    assert all(member.takes_part for member in members_of(changes_of(attempt)))


def test_what_is_no_event_is_passed_over(attempt: Path) -> None:
    before = changes_of(attempt)
    with open(attempt / MEMBERSHIP, "ab") as file:
        file.write(b'{"group": -1, "event": "died", "time": 1.0}\n{"event": "danced"}\nnot json\n{"time": 17')
    assert changes_of(attempt) == before
    assert changes_of(attempt / "nowhere") == []


def test_a_report_has_each_group_on_its_time_line(attempt: Path) -> None:
    shown = _groups(attempt)
    assert "group 0: takes part until" in shown
    assert "group 1: takes part" in shown
    assert "ended by SIGKILL" in shown
    assert not _groups(None)


def test_watch_says_who_is_missing_and_why(attempt: Path) -> None:
    lines = watch._groups(members_of(changes_of(attempt))).plain.splitlines()
    assert lines[0] == "1 of 2 replica groups take part"
    assert lines[1].startswith("  group 0: starting for ")
    assert lines[1].endswith("start 2 (before: ended by SIGKILL)")


def test_one_group_leads_at_a_time(tmp_path: Path) -> None:
    first, second = LeadLock(tmp_path), LeadLock(tmp_path)
    assert first.take()
    assert first.take()  # it has it
    assert not second.take()
    first.release()
    assert second.take()
    second.release()
