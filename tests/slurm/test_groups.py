"""Replica groups of one job: a step for each, of which one is killed, and catches up."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from danling_conf.records.membership import Change, Event, changes_of
from danling_conf.records.reading import read_fields
from tests.crash.group_killing import settings
from tests.support.commands import started, wait_for
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_sweeps import LIMIT, jobs_of, slurm_job

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
APP = Path(__file__).parents[1] / "support" / "group_app.py"


def test_a_group_that_is_killed_is_started_again_and_catches_up(slurm: Cluster, tmp_path: Path) -> None:
    digests, enough = tmp_path / "digests", tmp_path / "enough"
    digests.mkdir()
    words = ["hydra/launcher=danling_slurm", "hydra.launcher.nodes=2", "hydra.launcher.cpus_per_task=1", "steps=5000",
             "parallel=fsdp2", "ft.group_size=2", "eval_interval=1000",
             f"data={{digests:{digests},pause:0.1,until:{enough}}}"]  # fmt: skip
    environment = {**slurm.environment, "OMP_NUM_THREADS": "1"}
    with started([APP, *settings(tmp_path), *words], cwd=tmp_path, env=environment) as process:
        wait_for(lambda: len(noted(digests, 3)) > 5, "some steps of both groups")
        (attempt,) = tmp_path.glob("lin/exp/*/attempts/*")
        beat = read_fields(attempt.parent.parent / "heartbeats" / "rank-3.json")
        os.kill(beat.integer("pid") or 0, signal.SIGKILL)
        wait_for(lambda: [item.why for item in of_second(attempt, Event.JOINED)] == ["", "caught up"], "it to catch up")
        enough.touch()
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, out + err
    (record,) = jobs_of(tmp_path)
    assert (record.status, record.score is None, record.attempts) == ("completed", False, 1)
    shown = slurm_job(slurm, record)
    assert (shown["NumNodes"], shown["NumTasks"], shown["CPUs/Task"]) == ("2", "2", "2")
    assert [item.why for item in of_second(attempt, Event.DIED)] == ["ended by SIGKILL"]
    ends = {rank: noted(digests, rank)[-1] for rank in range(4)}
    assert len({(item["step"], item["rank"]) for item in ends.values()}) == 2  # all at one step
    assert ends[0]["digest"] == ends[2]["digest"] != ends[1]["digest"]  # rank r of one group as of the other
    assert ends[1]["digest"] == ends[3]["digest"]


def noted(digests: Path, rank: int) -> list[dict[str, Any]]:
    """What a rank, counted over both groups, has noted."""
    path = digests / f"{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def of_second(attempt: Path, event: Event) -> list[Change]:
    return [item for item in changes_of(attempt) if item.group == 1 and item.event is event]
