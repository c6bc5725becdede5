"""`danling-conf watch`: who is slowest and who is stuck, from heartbeats alone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from danling_conf.cli.main import main
from danling_conf.records.ledger import Ledger
from danling_conf.records.membership import Event, note
from danling_conf.records.ranks import GONE_WITH_GROUP, look_at
from danling_conf.records.run_lock import RunLock

ATTEMPT = "20260101-000000"
NOW = 1_000_000.0


_locks: list[RunLock] = []


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    yield
    while _locks:
        _locks.pop().release()


def make_run(run: Path, *, enabled: bool = True, interval: float = 1.0) -> Path:
    """A run that lives: this process holds its lock."""
    attempt = run / "attempts" / ATTEMPT
    attempt.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    heartbeat = {"enabled": enabled, "interval_seconds": interval, "dir_name": "heartbeats"}
    (attempt / "frozen.json").write_text(json.dumps({"config": {"heartbeat": heartbeat}}))
    _locks.append(RunLock(run))
    return run


def beat(run: Path, rank: int, **facts: Any) -> None:
    now = facts.pop("now", NOW)
    content = {
        "attempt": ATTEMPT, "rank": rank, "world_size": 3, "host": "h", "pid": 100 + rank, "step": 5, "total_steps": 9,
        "epoch": 0, "state": "training", "state_since": now - 3, "last_step_time": now - 1, "memory_bytes": 2e9,
        "written": now - 0.5, "interval": 1.0, **facts,
    }  # fmt: skip
    (run / "heartbeats").mkdir(exist_ok=True)
    (run / "heartbeats" / f"rank-{rank}.json").write_text(json.dumps(content))


def test_ranks_that_are_well(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for rank in range(3):
        beat(run, rank, waiting_share=0.1 * rank)
    seen = look_at(run, NOW)
    assert (seen.status, seen.stuck, seen.missing, seen.world_size) == ("running", [], [], 3)
    assert seen.slowest is None  # no rank stands out
    assert seen.ranks[0].step_seconds_ago == pytest.approx(1.0)
    assert seen.ranks[0].state_seconds == pytest.approx(2.5)
    assert seen.ranks[2].waiting_share == pytest.approx(0.2)


def test_the_slowest_rank(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for rank, step in enumerate((5, 5, 3)):
        beat(run, rank, step=step)
    assert look_at(run, NOW).slowest == 2  # steps behind
    beat(run, 2, step=3, written=NOW - 0.9)
    assert look_at(run, NOW).slowest is None  # when it wrote that, the others may have been there too
    for rank in range(3):
        beat(run, rank, state="training" if rank == 1 else "waiting in a collective")
    assert look_at(run, NOW).slowest == 1  # the others wait for it
    for rank, share in enumerate((0.5, 0.6, 0.1)):
        beat(run, rank, waiting_share=share)
    assert look_at(run, NOW).slowest == 2  # and have waited for it
    (run / "heartbeats" / "rank-1.json").unlink()
    (run / "heartbeats" / "rank-0.json").unlink()
    assert look_at(run, NOW).slowest is None


@pytest.mark.parametrize(("interval", "age", "stuck"), [(1.0, 2.5, False), (1.0, 3.5, True), (60.0, 100.0, False),
                                                        (60.0, 200.0, True)])  # fmt: skip
def test_a_silent_rank_is_stuck(tmp_path: Path, interval: float, age: float, stuck: bool) -> None:
    run = make_run(tmp_path)
    for rank in range(3):
        beat(run, rank, interval=interval, written=NOW - (age if rank == 2 else 0.1))
    seen = look_at(run, NOW)
    assert seen.stuck == ([2] if stuck else [])
    assert seen.ranks[2].stuck.startswith(f"silent for {age:.0f} s" if stuck else "")


def test_a_rank_that_others_wait_for_is_stuck_though_its_heart_beats(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    beat(run, 0, state="waiting in a collective", state_since=NOW - 50)
    beat(run, 1, step=4)
    beat(run, 2, state="waiting in a collective", state_since=NOW - 40)
    seen = look_at(run, NOW)
    assert seen.stuck == [1]
    assert "2 ranks have waited for it for 50 s" in seen.ranks[1].stuck
    beat(run, 0, state="waiting in a collective", state_since=NOW - 5)
    beat(run, 2, state="waiting in a collective", state_since=NOW - 4)
    assert look_at(run, NOW).stuck == []


def test_ranks_of_a_group_that_is_started_again_are_not_stuck(tmp_path: Path) -> None:
    """What they wrote last is of the start that died; the others train on."""
    run, now = make_run(tmp_path), time.time()
    for event in (Event.STARTED, Event.JOINED, Event.DIED, Event.STARTED):
        note(run / "attempts" / ATTEMPT, 1, event, why="ended by SIGKILL" if event is Event.DIED else "")
    for rank in range(3):
        beat(
            run, rank, now=now, group=int(rank == 1), written=now - (9 if rank == 1 else 0), step=1 if rank == 1 else 5
        )
    seen = look_at(run, now)
    assert (seen.stuck, seen.slowest) == ([], None)
    assert [each.state for each in seen.ranks] == ["training", GONE_WITH_GROUP, "training"]
    beat(run, 1, now=now + 1, group=1, state="starting", written=now + 1)  # the next start speaks
    assert look_at(run, now + 1).ranks[1].state == "starting"


def test_a_rank_without_a_heartbeat_is_missed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    beat(run, 0)
    beat(run, 2)
    seen = look_at(run, NOW)
    assert (seen.missing, seen.stuck) == ([1], [1])


def test_what_has_ended_is_not_stuck(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for rank in range(3):
        beat(run, rank, written=NOW - 1000)
    (run / "attempts" / ATTEMPT / "result.json").write_text('{"status": "failed", "score": null, "error": "x"}')
    _locks.pop().release()
    seen = look_at(run, NOW)
    assert (seen.status, seen.stuck, seen.slowest) == ("failed", [], None)


def test_beats_of_an_earlier_attempt_say_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    beat(run, 0, attempt="20250101-000000")
    seen = look_at(run, NOW)
    assert (seen.ranks, seen.note) == ([], "no heartbeat yet")
    assert "heartbeat=default" in look_at(make_run(tmp_path / "other", enabled=False), NOW).note


def test_the_command_for_people_and_for_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    for rank in range(3):
        beat(first, rank, now=now, waiting_share=0.05 if rank == 1 else 0.6)
        beat(second, rank, now=now, written=now - 100 * (rank == 1))
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    for number, run in enumerate((second, first)):
        Ledger(sweep).add(f"k{number}", job=number, run=str(run))
    assert main(["watch", str(first), "--once"]) == 0
    out = capsys.readouterr().out
    assert "running  step 5/9" in out
    assert out.count("training") == 3
    assert " 60 %" in out
    assert out.splitlines()[3].endswith("slowest")
    assert main(["watch", str(sweep), "--once", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["run"], run["stuck"]) for run in found] == [(str(second), [1]), (str(first), [])]
    assert main(["watch", str(tmp_path), "--once"]) == 1
    assert "stuck: rank 1 of 3" in capsys.readouterr().out
    assert main(["watch", str(tmp_path / "nowhere"), "--once"]) == 2
    assert main(["watch", str(first), "--json"]) == 2
    assert "add --once" in capsys.readouterr().err


def test_the_live_view_ends_with_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    beat(run, 0, now=time.time())
    (run / "attempts" / ATTEMPT / "result.json").write_text('{"status": "completed", "score": 1.0, "error": null}')
    _locks.pop().release()
    assert main(["watch", str(run)]) == 0
    assert "completed" in capsys.readouterr().out
