"""A rank that is stopped by SIGSTOP: `watch` names it while it is, and so does the error when its collective times
out."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from danling_conf.records.heartbeats import read_heartbeats
from danling_conf.records.run_directory import Attempt
from danling_conf.runner.observe import collective_timeout
from danling_conf.runner.observe.collective_timeout import message
from danling_conf.schema import RunnerConfig
from danling_conf.topology.rank_environment import SINGLE
from tests.support.commands import REPOSITORY, runs, started, wait_for

pytestmark = pytest.mark.slow

APP = Path(__file__).parents[2] / "support" / "long_app.py"
STUCK_RANK = 1


def watched(run: Path) -> tuple[int, dict[str, Any]]:
    """What `danling-conf watch RUN --once --json` says, and its exit code."""
    command = [sys.executable, "-m", "danling_conf.cli.main", "watch", str(run), "--once", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    (seen,) = json.loads(done.stdout)["runs"]
    return done.returncode, seen


@pytest.fixture
def environment() -> dict[str, str]:
    return {"PYTHONPATH": str(REPOSITORY)}


def stop_a_rank(root: Path) -> Iterator[tuple[Path, int]]:
    """Wait until all ranks train, stop one; the run and the process that is stopped. It is let go in the end."""

    def training() -> Any:
        found = [(run, read_heartbeats(run)) for run in runs(root)]
        return next(((run, beats) for run, beats in found if len(beats) == 3
                     and all(beat["step"] > 3 for beat in beats.values())), None)  # fmt: skip

    run, beats = wait_for(training, "three ranks that train")
    pid = beats[STUCK_RANK]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield run, pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_a_stopped_rank_is_named(tmp_path: Path, environment: dict[str, str]) -> None:
    words = [APP, "steps=1000000", f"workspace_root={tmp_path}", "parallel=ddp3", "heartbeat.enabled=true",
             "heartbeat.interval_seconds=0.3", "comm.init_timeout_seconds=60", "comm.train_timeout_seconds=12",
             "checkpoint=none"]  # fmt: skip
    with started(words, cwd=tmp_path, env=environment) as process:
        for run, pid in stop_a_rank(tmp_path):
            at = read_heartbeats(run)[STUCK_RANK]["step"]
            code, seen = wait_for(lambda run=run: _named(watched(run)), "the stopped rank to be named", limit=30)
            assert code == 1
            assert seen["stuck"] == [STUCK_RANK]
            assert seen["slowest"] == STUCK_RANK
            assert seen["world_size"] == 3
            (stuck,) = [each for each in seen["ranks"] if each["rank"] == STUCK_RANK]
            assert "silent" in stuck["stuck"]
            assert (stuck["pid"], stuck["step"]) == (pid, at)
            # The others live, and wait; which of them is in a collective now, their heartbeats say.
            others = [each for each in seen["ranks"] if each["rank"] != STUCK_RANK]
            assert all(each["stuck"] == "" for each in others)
            wait_for(lambda run=run: {each["state"] for each in watched(run)[1]["ranks"] if each["rank"] != STUCK_RANK}
                     == {"waiting in a collective"} or process.poll() is not None, "the others to wait")  # fmt: skip
            assert process.poll() is None
            _, err = process.communicate(timeout=60)
        assert process.returncode == 1
    assert re.search(r"CollectiveTimedOut: \w+ number \d+ of \w+ timed out: not all ranks came to it", err)
    assert f"rank {STUCK_RANK} did not come: last at step {at}/1000000" in err
    assert f"pid {pid}, silent for" in err
    assert "within 12 s (comm.train_timeout_seconds)" in err
    assert "ranks 0, 2 waited" in err
    log = (max(run.glob("attempts/*")) / "rank-0.log").read_text()
    assert re.search(r"is waited for since \d+ s, and will time out\n  rank 1 has not come: last at step", log)
    assert "gloo/transport" not in err  # a library's socket is no message


def _named(found: tuple[int, dict[str, Any]]) -> Any:
    return found if found[1]["stuck"] else None


def test_the_rank_that_the_others_wait_for_is_the_slowest(tmp_path: Path, environment: dict[str, str]) -> None:
    words = [APP, "steps=1000000", f"workspace_root={tmp_path}", "parallel=ddp3", "heartbeat.enabled=true",
             "heartbeat.interval_seconds=2", "checkpoint=none", "data.slow=2"]  # fmt: skip
    with started(words, cwd=tmp_path, env=environment) as process:
        (run,) = wait_for(lambda: runs(tmp_path), "a run")

        def trained() -> bool:
            beats = read_heartbeats(run)
            return len(beats) == 3 and all(beat["step"] > 20 for beat in beats.values())

        def named() -> Any:
            _, seen = watched(run)
            return seen if seen["slowest"] is not None else None

        wait_for(trained, "three ranks that train")
        seen = wait_for(named, "a rank to stand out")
        assert seen["slowest"] == 2
        assert seen["stuck"] == []
        shares = {each["rank"]: each["waiting_share"] for each in seen["ranks"]}
        assert shares[2] < 0.5 < min(shares[0], shares[1])
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_rank_that_does_not_come_to_the_start_is_named(tmp_path: Path, environment: dict[str, str]) -> None:
    words = [APP, "steps=3", f"workspace_root={tmp_path}", "parallel=ddp3", "heartbeat.enabled=true", "data.absent=1",
             "comm.init_timeout_seconds=8"]  # fmt: skip
    with started(words, cwd=tmp_path, env=environment) as process:
        _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "within 8 s (comm.init_timeout_seconds)" in err
    assert "rank 1 did not come: nothing more is known of it" in err
    assert "ranks 0, 2 waited" in err


def test_a_rank_that_lost_its_connection_to_one_that_timed_out_says_the_same(tmp_path: Path) -> None:
    attempt = Attempt(run_directory=tmp_path, directory=tmp_path, seed=0)
    config, place = RunnerConfig(), collective_timeout.Place(step=8)

    def end(rank: int, words: str) -> None:
        ranks = replace(SINGLE, rank=rank, world_size=3)
        collective_timeout.explain(RuntimeError(words), attempt, ranks, config, place)

    end(2, "Connection closed by peer")  # no rank has timed out: it is another fault
    with pytest.raises(collective_timeout.CollectiveTimedOut, match="rank 1 did not come"):
        end(0, "Timed out waiting 12000ms for recv operation to complete")
    with pytest.raises(collective_timeout.CollectiveTimedOut, match="rank 1 did not come"):
        end(2, "Connection closed by peer")


def test_the_message_says_what_is_known() -> None:
    now = time.time()
    beat = {"rank": 1, "step": 7, "total_steps": None, "state": "saving", "host": "h", "pid": 9, "written": now - 60.0,
            "interval": 5.0}  # fmt: skip
    collective = {"name": "all_reduce", "number": 12, "group": "default_pg", "since": now}
    notes = {0: {"step": 8, "collective": collective}, 2: {"step": 8, "collective": None}}
    said = message(notes, {1: beat}, 3, limit=30, setting="comm.train_timeout_seconds", now=now).splitlines()
    late = "not all ranks came to it within 30 s (comm.train_timeout_seconds)"
    assert said[0] == f"all_reduce number 12 of default_pg timed out: {late}"
    assert said[1] == "  rank 1 did not come: last at step 7, saving, on h, pid 9, silent for 60 s"
    assert said[2] == "  ranks 0, 2 waited, after step 8"
    bare = message({0: {"step": 8}}, {}, 2, limit=None, setting="comm.init_timeout_seconds", now=now)
    assert "rank 1 did not come: nothing more is known of it" in bare
    assert "heartbeat=default would say" in bare
    both = message({0: {"step": 8}, 1: {"step": 9}}, {}, 2, limit=5, setting="comm.train_timeout_seconds", now=now)
    assert "every rank was waiting" in both
    different = {0: {"step": 8, "collective": collective}, 1: {"step": 8, "collective": {**collective, "number": 13}}}
    both = message(different, {}, 2, limit=5, setting="comm.train_timeout_seconds", now=now)
    assert "rank 0 waited in all_reduce number 12" in both
    assert "rank 1 waited in all_reduce number 13" in both
    both = message({0: {"step": 8}, 1: {"step": 9}}, {}, 2, limit=5, setting="comm.train_timeout_seconds", now=now)
    assert "after steps 8 to 9" in both


def test_warnings_of_all_ranks_are_shown_once(tmp_path: Path, environment: dict[str, str]) -> None:
    words = [APP, "steps=3", f"workspace_root={tmp_path}", "parallel=ddp3", "data.warn=true", "checkpoint=none"]
    for command in (
        words,
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", *words],
    ):
        with started(command, cwd=tmp_path, env=environment) as process:
            out, err = process.communicate(timeout=100)
            assert process.returncode == 0, err
        assert (out + err).count("of all ranks") == 1
        assert (out + err).count("an error of all but rank 0") == 1
        for rank in range(3):
            assert (out + err).count(f"of rank {rank} alone") == 1
        attempt = max(tmp_path.glob("lin/exp/*/attempts/*"), key=lambda path: path.stat().st_mtime)
        for rank in range(3):
            log = (attempt / f"rank-{rank}.log").read_text()
            assert f" rank {rank} step 1 WARNING" in log
            assert f"of rank {rank} alone" in log
