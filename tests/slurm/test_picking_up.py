"""Sweeps whose client is gone: nothing is lost, and another command goes on with them."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.command_line import poisoned_torch
from tests.support.commands import REPOSITORY, Result, run, started, wait_for
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_sweeps import LIMIT, command, jobs_of, statuses, submit, sweep_of

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

DANLING_CONF = Path(sys.executable).with_name("danling-conf")


def danling_conf(cluster: Cluster, root: Path, *words: str | Path) -> Result:
    return run([DANLING_CONF, *words], cwd=root, env=cluster.environment, limit=LIMIT)


def test_a_detached_sweep_is_collected(slurm: Cluster, tmp_path: Path) -> None:
    done = submit(
        slurm, tmp_path, "-m", "parallel=single", "steps=3", "optim.lr=1e-3,3e-4", "hydra.launcher.detach=true"
    )
    assert done.code == 0, done.text
    assert f"danling-conf runs {sweep_of(tmp_path)} --watch" in done.out
    assert statuses(tmp_path) == ["queued", "queued"]
    watched = danling_conf(slurm, tmp_path, "runs", sweep_of(tmp_path), "--watch")
    assert watched.code == 0, watched.text
    assert statuses(tmp_path) == ["completed", "completed"]
    shown = json.loads(danling_conf(slurm, tmp_path, "runs", sweep_of(tmp_path), "--json").out)
    assert len(str(shown)) > 100


def test_a_single_run_may_be_detached(slurm: Cluster, tmp_path: Path) -> None:
    done = submit(slurm, tmp_path, "steps=2", "hydra.launcher.detach=true")
    assert done.code == 0, done.text
    assert danling_conf(slurm, tmp_path, "runs", sweep_of(tmp_path), "--watch").code == 0


def test_submitting_imports_no_torch(slurm: Cluster, tmp_path: Path) -> None:
    """With a torch in the way that cannot be imported; the job, which needs one, is held."""
    path = os.pathsep.join([str(poisoned_torch(tmp_path)), str(REPOSITORY)])
    held = ["hydra.launcher.detach=true", "+hydra.launcher.additional_parameters.hold=true", "parallel=fsdp8",
            "steps=1"]  # fmt: skip
    done = run(command(tmp_path, "-m", *held, "optim.lr=1e-3,1e-2"), cwd=tmp_path,
               env={**slurm.environment, "PYTHONPATH": path})  # fmt: skip
    assert done.code == 0, done.text
    assert statuses(tmp_path) == ["queued", "queued"]
    assert danling_conf(slurm, tmp_path, "cancel", sweep_of(tmp_path)).code == 0


def test_the_client_may_be_killed(slurm: Cluster, tmp_path: Path) -> None:
    arguments = ["-m", "parallel=single", "steps=40", "+data.pause=0.2", "+data.fail_rank=-1,0"]
    with started(command(tmp_path, *arguments), cwd=tmp_path, env=slurm.environment) as process:
        wait_for(lambda: "running" in statuses(tmp_path), "a job to run")
        process.send_signal(signal.SIGKILL)
        process.wait()
    watched = danling_conf(slurm, tmp_path, "runs", sweep_of(tmp_path), "--watch")
    assert watched.code == 1, watched.text
    assert "RuntimeError: rank 0 is broken at step 2" in watched.err
    assert statuses(tmp_path) == ["completed", "failed"]


def test_resume_runs_what_is_missing(slurm: Cluster, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    done = submit(slurm, tmp_path, "-m", "parallel=single", "steps=4", "checkpoint.interval=2", "+data.fail_rank=-1,0",
                  "+data.fail_step=3", f"+data.fail_while={broken}")  # fmt: skip
    assert done.code == 1, done.text
    assert statuses(tmp_path) == ["completed", "failed"]
    broken.unlink()
    resumed = danling_conf(slurm, tmp_path, "resume", sweep_of(tmp_path))
    assert resumed.code == 0, resumed.text
    fine, mended = jobs_of(tmp_path)
    assert (fine.attempts, mended.attempts) == (1, 2)
    assert statuses(tmp_path) == ["completed", "completed"]
    attempts = sorted((mended.run / "attempts").iterdir())  # type: ignore[operator]
    assert "resumed at step" in (attempts[1] / "rank-0.log").read_text()


def test_cancel_ends_what_runs_and_what_waits(slurm: Cluster, tmp_path: Path) -> None:
    arguments = ["-m", "parallel=single", "steps=900", "+data.pause=0.2", "optim.lr=1e-3,3e-4",
                 "hydra.launcher.array_parallelism=1", "hydra.launcher.detach=true"]  # fmt: skip
    assert submit(slurm, tmp_path, *arguments).code == 0
    wait_for(lambda: "running" in statuses(tmp_path), "a job to run")
    done = danling_conf(slurm, tmp_path, "cancel", sweep_of(tmp_path))
    assert done.code == 0, done.text
    assert statuses(tmp_path) == ["cancelled", "cancelled"]
    shown = danling_conf(slurm, tmp_path, "logs", sweep_of(tmp_path), "0", "--rank", "0")
    assert "one process, on" in shown.out


def test_accounting_tells_what_the_queue_has_forgotten(accounted: Cluster, tmp_path: Path) -> None:
    """The queue forgets a job at once here, so that only sacct knows how it ended."""
    arguments = ["-m", "parallel=single", "steps=900", "+data.pause=0.2", "optim.lr=1e-3,3e-4"]
    with started(command(tmp_path, *arguments), cwd=tmp_path, env=accounted.environment) as process:
        wait_for(lambda: statuses(tmp_path) == ["running", "running"], "both jobs to run")
        process.send_signal(signal.SIGKILL)
        process.wait()
    first, second = (str(record.facts["slurm"]) for record in jobs_of(tmp_path))
    # A task that is killed leaves no word.
    accounted.run("scancel", "--signal=KILL", "--full", first)
    accounted.run("scancel", "--signal=KILL", "--full", second)
    wait_for(lambda: accounted.run("squeue", "-h", "--states=all") == "", "the queue to forget the jobs")
    watched = danling_conf(accounted, tmp_path, "runs", sweep_of(tmp_path), "--watch")
    assert watched.code == 1, watched.text
    for record in jobs_of(tmp_path):
        assert record.status in ("failed", "cancelled")
        assert "Slurm no longer knows" not in str(record.facts["error"])
