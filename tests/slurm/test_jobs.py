"""Sweeps on a real Slurm: right-sized jobs, and the truth about how they end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.commands import run, started, wait_for
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_sweeps import (
    APP,
    LIMIT,
    command,
    jobs_of,
    slurm_job,
    statuses,
    submit,
    sweep_of,
    write_recipes,
)

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def test_each_job_has_the_resources_of_its_layout(slurm: Cluster, tmp_path: Path) -> None:
    layouts = {"narrow": "ddp2", "wide": "ddp2", "widest": "fsdp4"}
    write_recipes(tmp_path, narrow={"nodes": 1}, wide={"nodes": 2}, widest={"nodes": 2})
    for name, layout in layouts.items():
        with open(tmp_path / "conf" / "recipe" / f"{name}.yaml", "a") as file:
            file.write(f"defaults:\n  - override /parallel: {layout}\n")
    done = submit(slurm, tmp_path, "-m", "--config-dir", "conf", "+recipe=narrow,wide,widest", "steps=3")
    assert done.code == 0, done.text
    records = jobs_of(tmp_path)
    assert [record.status for record in records] == ["completed"] * 3
    assert all(record.score is not None for record in records)
    shapes = []
    for record in records:
        shown = slurm_job(slurm, record)
        shapes.append((int(shown["NumNodes"]), int(shown["NumTasks"])))
        assert f"gpu:{shapes[-1][1] // shapes[-1][0]}" in shown.get("TresPerNode", "")
        assert shown["ExitCode"] == "0:0"
    assert shapes == [(1, 2), (2, 2), (2, 4)]
    assert "sweep done: 3 of 3 jobs completed" in done.out


def test_a_config_for_the_launcher_of_submitit(slurm: Cluster, tmp_path: Path) -> None:
    """As apps of Hydra have it in their files: the same names of settings, checked first and run by our machinery."""
    folder = tmp_path / "conf"
    folder.mkdir()
    (folder / "train.yaml").write_text(
        "defaults: [danling, _self_, override hydra/launcher: submitit_slurm]\n"
        "steps: 2\nseed: 1\nworkspace_root: .\n"
        "hydra: {launcher: {timeout_min: 7, gpus_per_node: 0, cpus_per_task: 1, name: mine}}\n"
    )
    words: list[str | Path] = [APP, "-m", "--config-dir", "conf", "--config-name", "train"]
    refused = run([*words, "hydra.launcher.partition=nowhere"], cwd=tmp_path, env=slurm.environment, limit=LIMIT)
    assert (refused.code, "nowhere" in refused.err) == (2, True), refused.text
    done = run([*words, "parallel=ddp2"], cwd=tmp_path, env=slurm.environment, limit=LIMIT)
    assert done.code == 0, done.text
    (record,) = jobs_of(tmp_path)
    assert (record.status, record.score is None) == ("completed", False)
    shown = slurm_job(slurm, record)
    expected = {"JobName": "mine", "NumTasks": "2", "CPUs/Task": "1", "TimeLimit": "00:07:00", "Requeue": "1"}
    assert {name: shown[name] for name in expected} == expected


def test_a_rank_that_fails_fails_its_job_and_no_other(slurm: Cluster, tmp_path: Path) -> None:
    faults = [(0, "raise"), (3, "raise"), (2, "kill"), (1, "late"), (-1, "none")]
    words = ",".join(f"{{fail_rank:{rank},how:{how}}}" for rank, how in faults)
    # Two at a time: all tasks at once would only wait for the processors.
    done = submit(slurm, tmp_path, "-m", "parallel=ddp4", "hydra.launcher.nodes=2", f"+data.fault={words}", "steps=4",
                  "hydra.launcher.array_parallelism=2")  # fmt: skip
    assert done.code == 1, done.text
    records = jobs_of(tmp_path)
    assert [record.status for record in records] == ["failed"] * 4 + ["completed"], done.text
    assert records[-1].score is not None
    for (rank, how), failed in zip(faults, records[:-1], strict=False):
        # The sweep has the job's own word; the ranks that were stopped may still be on their way out.
        wait_for(lambda job=failed: slurm_job(slurm, job)["JobState"] not in ("RUNNING", "COMPLETING"), "the job's end")
        shown = slurm_job(slurm, failed)
        assert shown["JobState"] == "FAILED"
        assert shown["ExitCode"] != "0:0"
        if how == "raise":
            assert f"rank {rank} failed: RuntimeError: rank {rank} is broken at step 2" in done.err
            assert "in app\n" in done.err  # its traceback
            assert f"rank-{rank}.log" in done.err
            assert failed.facts["rank"] == rank
        elif how == "late":  # rank 0 has returned its score by then
            assert failed.facts["error"] == "RuntimeError: rank 1 is broken at the very end"
        else:
            assert "SIGKILL" in str(failed.facts["error"])
    assert "sweep done: 1 of 5 jobs completed" in done.out


def test_jobs_after_a_failed_one_do_not_start(slurm: Cluster, tmp_path: Path) -> None:
    with started(command(tmp_path, "parallel=ddp2", "+data.fail_rank=1", "steps=4"), cwd=tmp_path,
                 env=slurm.environment) as process:  # fmt: skip
        wait_for(lambda: list(tmp_path.glob("lin/exp/sweeps/*/jobs.jsonl")) and jobs_of(tmp_path)
                 and "slurm" in jobs_of(tmp_path)[0].facts, "the job to be queued")  # fmt: skip
        first = jobs_of(tmp_path)[0].facts["slurm"]
        after = slurm.run(
            "sbatch", "--parsable", f"--dependency=afterok:{first}", "--output=/dev/null", "--wrap=true"
        ).strip()
        process.communicate(timeout=LIMIT)
        assert process.returncode == 1
    wait_for(lambda: slurm.job(after)["Reason"] == "DependencyNeverSatisfied", "the dependency to fail")
    slurm.run("scancel", after)


def test_jobs_that_are_cancelled_are_told_from_others(slurm: Cluster, tmp_path: Path) -> None:
    """One that runs, and one that still waits for the array's only place."""
    with started(
        command(tmp_path, "-m", "parallel=ddp2", "steps=500", "+data.pause=0.1", "optim.lr=1e-3,3e-4",
                "hydra.launcher.array_parallelism=1"), cwd=tmp_path, env=slurm.environment,
    ) as process:  # fmt: skip
        wait_for(lambda: statuses(tmp_path)[:1] == ["running"], "the first job to run")
        wait_for(lambda: list(tmp_path.glob("lin/exp/*/losses.jsonl")), "a step")
        first, second = (record.facts["slurm"] for record in jobs_of(tmp_path))
        assert (first[-2:], second[-2:]) == ("_0", "_1")  # of one array, since they are of one shape
        slurm.run("scancel", second, first)
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1, out + err
    assert statuses(tmp_path) == ["cancelled", "cancelled"]
    assert "#0 cancelled" in out
    assert "Traceback" not in err


def test_a_sweep_stops_with_its_first_failure(slurm: Cluster, tmp_path: Path) -> None:
    done = submit(slurm, tmp_path, "-m", "parallel=ddp2", "+data.fail_rank=1,-1", "+data.pause=0.2", "steps=500",
                  "hydra.launcher.on_failure=stop")  # fmt: skip
    assert done.code == 1, done.text
    assert statuses(tmp_path) == ["failed", "cancelled"]


def test_a_failed_job_is_started_again_from_its_checkpoint(slurm: Cluster, tmp_path: Path) -> None:
    done = submit(slurm, tmp_path, "-m", "parallel=ddp2", "+data.fail_rank=1", "+data.fail_step=3", "steps=6",
                  "checkpoint.interval=2", "hydra.launcher.on_failure=retry 1")  # fmt: skip
    assert done.code == 1, done.text
    (record,) = jobs_of(tmp_path)
    assert (record.status, record.attempts, record.queued) == ("failed", 2, 2)
    attempts = sorted((record.run / "attempts").iterdir())  # type: ignore[operator]
    assert "resumed at step" in (attempts[1] / "rank-0.log").read_text()


def test_what_does_not_fit_the_partition_is_refused(slurm: Cluster, tmp_path: Path) -> None:
    before = slurm.run("squeue", "-h", "--states=all", "-o", "%i")
    done = submit(slurm, tmp_path, "-m", "parallel=fsdp64,fsdp8,fsdp9", "steps=3", "hydra.launcher.timeout_min=90")
    assert done.code == 2, done.text
    for words in ("parallel=fsdp64", "parallel=fsdp9", "min=90"):
        assert words in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.glob("lin/exp/sweeps/*/jobs.jsonl"))
    assert slurm.run("squeue", "-h", "--states=all", "-o", "%i") == before


def test_a_partition_that_there_is_not_is_refused(slurm: Cluster, tmp_path: Path) -> None:
    done = submit(slurm, tmp_path, "-m", "steps=3", "hydra.launcher.partition=nowhere")
    assert done.code == 2, done.text
    assert "hydra.launcher.partition=" in done.err
    assert "there are main, short, urgent" in done.err


def test_what_sbatch_refuses_is_shown(slurm: Cluster, tmp_path: Path) -> None:
    done = submit(slurm, tmp_path, "steps=3", "+hydra.launcher.additional_parameters.licenses=matlab@nowhere:1")
    assert done.code == 2, done.text
    assert re.search(r"sbatch: error: .*licen", done.err)
    assert "Traceback" not in done.err


def test_everything_that_sbatch_takes_is_reachable(slurm: Cluster, tmp_path: Path) -> None:
    done = submit(slurm, tmp_path, "steps=2", "+hydra.launcher.additional_parameters.nice=7",
                  "hydra.launcher.comment=hello", "hydra.launcher.name=mine", "hydra.launcher.mem_gb=1.5",
                  "hydra.launcher.cpus_per_task=3", 'hydra.launcher.setup=["export GREETING=hello"]')  # fmt: skip
    assert done.code == 0, done.text
    (record,) = jobs_of(tmp_path)
    shown = slurm_job(slurm, record)
    assert (shown["Nice"], shown["Comment"], shown["JobName"]) == ("7", "hello", "mine")
    assert shown["CPUs/Task"] == "3"
    assert shown["MinMemoryNode"] == "1.50G"
    assert "export GREETING=hello" in next(sweep_of(tmp_path).glob("slurm/*_submission.sh")).read_text()


def test_later_changes_do_not_reach_a_queued_job(slurm: Cluster, tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    conf.mkdir()
    (conf / "mine.yaml").write_text("defaults: [danling, _self_]\nsteps: 3\noptim: {lr: 0.5}\n")
    with started(
        command(tmp_path, "--config-dir", "conf", "--config-name", "mine",
                "+hydra.launcher.additional_parameters.begin=now+6"),
        cwd=tmp_path, env=slurm.environment,
    ) as process:  # fmt: skip
        wait_for(lambda: statuses(tmp_path) == ["queued"], "the job to be queued")
        (conf / "mine.yaml").write_text("defaults: [danling, _self_]\nsteps: 9\noptim: {lr: 0.1}\n")
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, out + err
    (record,) = jobs_of(tmp_path)
    assert record.run is not None
    frozen = json.loads(next((record.run / "attempts").glob("*/frozen.json")).read_text())
    assert (frozen["config"]["steps"], frozen["config"]["optim"]["lr"]) == (3, 0.5)
