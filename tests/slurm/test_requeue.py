"""Runs that Slurm interrupts: they save, come back into the queue, and go on as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from danling_conf.records.ledger import Record
from tests.support.commands import run, started, wait_for
from tests.support.slurm_app import losses
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_sweeps import APP, LIMIT, command, jobs_of, submit, write_recipes

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

STEPS = 60
RUN = ["parallel=ddp2", f"steps={STEPS}", "checkpoint.interval=1000000"]
"""Saves only when it is told to stop."""
ON_SLURM = ["hydra.launcher.nodes=2"]
PAUSE = 0.25
"""Seconds of a step."""


class Undisturbed(NamedTuple):
    """The same run on this machine."""

    losses: dict[int, float]
    score: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("undisturbed")
    done = run([APP, *RUN, "seed=1", f"workspace_root={root}"], cwd=root)
    assert done.code == 0, done.text
    (found,) = root.glob("lin/exp/*/losses.jsonl")
    score = json.loads(next(found.parent.glob("attempts/*/result.json")).read_text())["score"]
    return Undisturbed(losses(found.parent), score)


@contextmanager
def training(
    cluster: Cluster, root: Path, *more: str, pause: float = PAUSE
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A job that has done a few steps, with its name in Slurm."""
    with started(
        command(root, *RUN, *ON_SLURM, f"+data.pause={pause}", *more), cwd=root, env=cluster.environment
    ) as process:
        wait_for(lambda: _steps(root) >= 5 or process.poll() is not None, "five steps")
        assert process.poll() is None, process.communicate()
        yield process, str(jobs_of(root)[0].facts["slurm"])


def completed(root: Path, process: subprocess.Popen[str], undisturbed: Undisturbed) -> Record:
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, out + err
    (record,) = jobs_of(root)
    assert record.status == "completed"
    assert record.run is not None
    same(record, undisturbed)
    assert len(list((record.run / "attempts").iterdir())) == record.attempts
    return record


def same(record: Record, undisturbed: Undisturbed) -> None:
    """Bitwise: every loss that was seen, and what the final weights score. The step at which a run is told to stop does
    not come back to the loop that writes losses down."""
    assert record.run is not None
    found = losses(record.run)
    assert found == {step: undisturbed.losses[step] for step in found}
    assert STEPS - len(found) < record.attempts
    assert record.score == undisturbed.score


def reasons(record: Record) -> list[str]:
    return [line["why"] for line in record.history if "why" in line]


def test_a_job_that_is_requeued_goes_on_exactly(slurm: Cluster, tmp_path: Path, undisturbed: Undisturbed) -> None:
    with training(slurm, tmp_path) as (process, job):
        slurm.run("scontrol", "requeue", job)
        record = completed(tmp_path, process, undisturbed)
    assert reasons(record) == ["requeued"]
    assert record.attempts == 2


def test_a_job_that_is_preempted_goes_on_exactly(slurm: Cluster, tmp_path: Path, undisturbed: Undisturbed) -> None:
    with training(slurm, tmp_path, "hydra.launcher.max_num_timeout=0") as (process, _):
        slurm.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
        record = completed(tmp_path, process, undisturbed)
    assert reasons(record) == ["preempted"]


def test_a_warning_by_hand_requeues_the_right_task_of_an_array(
    slurm: Cluster, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    with started(
        command(tmp_path, "-m", *RUN, *ON_SLURM, f"+data.pause={PAUSE}", "optim.lr=1e-3,1e-2"),
        cwd=tmp_path,
        env=slurm.environment,
    ) as process:
        wait_for(lambda: _steps(tmp_path) >= 10, "steps of both")
        first, second = jobs_of(tmp_path)
        wait_for(lambda: _steps_of(second) >= 3, "steps of the second")
        slurm.run("scancel", "--signal=USR2", str(second.facts["slurm"]))
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, out + err
    first, second = jobs_of(tmp_path)
    assert (reasons(first), reasons(second)) == ([], ["asked by a signal"])
    assert first.run is not None
    assert second.run is not None
    same(first, undisturbed)
    assert STEPS - len(losses(second.run)) == 1


def test_a_time_limit_is_counted(slurm: Cluster, tmp_path: Path) -> None:
    """One job may reach it once, the other not at all; both limits are of a minute."""
    write_recipes(tmp_path, impatient={"max_num_timeout": 0}, patient={"max_num_timeout": 3})
    done = submit(
        slurm, tmp_path, "-m", "--config-dir", "conf", "+recipe=impatient,patient", "parallel=single", "steps=100",
        "+data.pause=0.7", "checkpoint.interval=1000000", "hydra.launcher.timeout_min=1", limit=400,
    )  # fmt: skip
    assert done.code == 1, done.text
    stopped, gone_on = jobs_of(tmp_path)
    assert stopped.status == "timed out"
    assert "it has reached its time limit once, and max_num_timeout is 0" in stopped.facts["error"]
    assert slurm.job(stopped.facts["slurm"])["JobState"] in ("FAILED", "TIMEOUT")
    assert gone_on.status == "completed"
    assert set(reasons(gone_on)) == {"time limit"}
    assert gone_on.run is not None
    assert 100 - len(losses(gone_on.run)) < gone_on.attempts


@pytest.mark.parametrize("node", [1, 2])
def test_a_node_that_is_lost(slurm: Cluster, tmp_path: Path, undisturbed: Undisturbed, node: int) -> None:
    """What runs on it runs on, and must not write to the run when the job has started anew."""
    with training(slurm, tmp_path, pause=0.7) as (process, job):
        slurm.kill_node(node)
        try:
            wait_for(lambda: slurm.job(job).get("Restarts") != "0", "the job to be requeued")
        finally:
            slurm.start_node(node)
        record = completed(tmp_path, process, undisturbed)
    assert record.attempts == 2


def _steps(root: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in root.glob("lin/exp/*/losses.jsonl"))


def _steps_of(record: Record) -> int:
    assert record.run is not None
    path = record.run / "losses.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0
