"""Heartbeats: what they say, how often, and that they go on when training does not, on a disk that takes nothing
too."""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from danling_conf.parallel.waiting import waiting
from danling_conf.records.heartbeats import read_heartbeats
from danling_conf.records.ranks import look_at
from danling_conf.runner.observe import heartbeat
from danling_conf.runner.observe.heartbeat import Heartbeat
from danling_conf.schema.observability import HeartbeatConfig
from tests.support.commands import wait_for
from tests.support.processes import REPOSITORY
from tests.support.small import Net, Pairs, loss, runner

DATA = {"train": Pairs(), "val": Pairs(9, seed=1)}


def test_a_run_without_heartbeats_writes_none(tmp_path: Path) -> None:
    ours = runner(tmp_path)
    ours.fit(Net, DATA, loss=loss)
    run = ours.world.attempt.run_directory
    assert not (run / "heartbeats").exists()
    assert "heartbeat=default" in look_at(run).note


def test_what_a_heartbeat_says(tmp_path: Path) -> None:
    ours = runner(tmp_path, {"heartbeat": {"enabled": True, "interval_seconds": 0.05, "dir_name": "pulse"}})
    run, attempt = ours.world.attempt.run_directory, ours.world.attempt.directory.name
    (first,) = read_heartbeats(run, run / "pulse").values()
    assert (first["state"], first["step"], first["last_step_time"]) == ("starting", 0, None)
    before = time.time()
    ours.prepare(Net, DATA, loss=loss)
    for batch in ours.batches("train"):
        ours.step(batch)
    beat = wait_for(lambda: _at(run / "pulse", step=6), "a heartbeat of the last step", limit=20)
    assert beat["state"] == "training"
    ours.finish()
    last = _at(run / "pulse", step=6)
    assert last.items() >= {
        "attempt": attempt, "rank": 0, "world_size": 1, "host": platform.node(), "pid": os.getpid(), "step": 6,
        "total_steps": 6, "epoch": ours.epoch, "state": "stopping", "interval": 0.05,
    }.items()  # fmt: skip
    assert before <= last["last_step_time"] <= last["written"] <= time.time()
    assert last["memory_bytes"] > 10e6
    assert not list((run / "pulse").glob(".*"))  # nothing half written is left


def _at(folder: Path, step: int) -> Any:
    beat = json.loads((folder / "rank-0.json").read_text())
    return beat if beat["step"] == step else None


def test_states_follow_what_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[str] = []
    monkeypatch.setattr(Heartbeat, "state", lambda self, what: states.append(what))
    settings = {"steps": 2, "eval_interval": 2, "checkpoint": {"load_only": False}, "heartbeat": {"enabled": True}}
    ours = runner(tmp_path, settings)
    ours.fit(Net, DATA, loss=loss, report=lambda model, results: [])
    changes = [state for number, state in enumerate(states) if number == 0 or state != states[number - 1]]
    assert changes == ["training", "evaluating", "training", "saving", "training", "saving", "training", "reporting",
                       "stopping"]  # fmt: skip


def test_it_writes_at_most_once_an_interval_and_goes_on_when_the_loop_does_not(tmp_path: Path) -> None:
    """The loop's thread is this one, which only waits."""
    section = HeartbeatConfig(enabled=True, interval_seconds=0.2)
    seen: list[float] = []

    def look() -> dict[str, Any]:
        seen.append(time.monotonic())
        return {"step": 1, "epoch": 0, "total_steps": None, "last_step_time": None}

    beat = Heartbeat(section, tmp_path, facts={"attempt": "a", "rank": 0, "world_size": 1}, look=look)
    beat.start()
    for _ in range(1000):
        beat.state("training")
        beat.state("saving")
    wait_for(lambda: len(seen) >= 4, "four heartbeats")
    beat.stop()
    assert all(
        later - earlier >= 0.19 for earlier, later in itertools.pairwise(seen[:-1])
    )  # the last is that of the end


def test_a_rank_that_waits_in_a_collective_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    since = time.time() - 5
    collective = {"name": "all_reduce", "number": 3, "group": "default_pg", "since": since}
    monkeypatch.setattr(heartbeat, "outstanding_collective", lambda: collective)
    facts = {"attempt": "a", "rank": 0, "world_size": 2}
    look: Any = lambda: {"step": 4, "epoch": 0, "total_steps": 9, "last_step_time": since}  # noqa: E731
    beat = Heartbeat(HeartbeatConfig(enabled=True), tmp_path, facts=facts, look=look)
    beat.state("training")
    assert beat.content()["state"] == "training"  # a collective is under way, and this thread does not wait for it
    with waiting("the backward pass"), waiting("the gradients"):
        content = beat.content()
    assert (content["state"], content["state_since"], content["collective"], content["waiting_for"]) == (
        "waiting in a collective",
        since,
        collective,
        "the gradients",
    )
    assert beat.content()["state"] == "training"


def test_another_thread_that_waits_does_not_make_the_rank_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is written in the background, where ranks wait for each other too."""
    collective = {"name": "all_gather", "number": 1, "group": "default_pg", "since": time.time() - 5}
    monkeypatch.setattr(heartbeat, "outstanding_collective", lambda: collective)
    beat = Heartbeat(HeartbeatConfig(enabled=True), tmp_path, facts={"attempt": "a", "rank": 0}, look=dict)
    inside, leave = threading.Event(), threading.Event()

    def write_checkpoint() -> None:
        with waiting("the other ranks' part of a checkpoint"):
            inside.set()
            leave.wait(60)

    writer = threading.Thread(target=write_checkpoint)
    writer.start()
    inside.wait(60)
    state = beat.content()["state"]
    leave.set()
    writer.join()
    assert state == "starting"


def _can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


FULL_DISK = """
import subprocess, sys, time
from pathlib import Path
from tests.support.small import Net, Pairs, loss, runner

ours = runner(sys.argv[1], {"steps": 40, "heartbeat": {"enabled": True, "interval_seconds": 0.02}})
folder = ours.world.attempt.run_directory / "heartbeats"
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)], check=True)
(folder / "filler").write_bytes(b"x" * 4096)
ours.prepare(Net, {"train": Pairs()}, loss=loss)
for batch in ours.batches("train"):
    ours.step(batch)
    time.sleep(0.01)
ours.finish()
assert ours.global_step == 40
log = (ours.world.attempt.directory / "rank-0.log").read_text()
assert log.count("no heartbeat could be written, and training goes on") == 1, log
assert "No space left on device" in log
assert [path.name for path in folder.iterdir()] == ["filler"]
print("trained")
"""


@pytest.mark.skipif(not _can_mount(), reason="no mount namespaces here, so no small disk can be made")
def test_a_full_disk_under_a_heartbeat_stops_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", FULL_DISK, str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "trained"
