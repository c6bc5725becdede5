"""Sweeps on this machine: all jobs checked first, a failed one does not stop the others, a true exit code."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import APP, Ranks, all_gone, attempts, run, runs, started, wait_for

pytestmark = pytest.mark.slow


def sweep(root: Path, *more: str) -> list[str | Path]:
    return [APP, "-m", "steps=3", f"workspace_root={root}", *more]


def ledger(root: Path) -> list[dict[str, Any]]:
    (found,) = root.rglob("jobs.jsonl")
    assert found.parent.parent == root / "lin" / "exp" / "sweeps"
    jobs: dict[str, dict[str, Any]] = {}
    for line in found.read_text().splitlines():
        content = json.loads(line, parse_constant=_no_constant)
        jobs.setdefault(content["key"], {"score": None}).update(content)
    return list(jobs.values())


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_each_job_is_a_run_and_a_line_of_the_ledger(tmp_path: Path) -> None:
    done = run(sweep(tmp_path / "ws", "optim.lr=1e-3,3e-4", "accum_steps=1,2"), cwd=tmp_path)
    assert done.code == 0, done.text
    jobs = ledger(tmp_path / "ws")
    assert [(job["job"], job["status"], job["score"]) for job in jobs] == [
        (0, "completed", 1e-3), (1, "completed", 1e-3), (2, "completed", 3e-4), (3, "completed", 3e-4)
    ]  # fmt: skip
    assert {Path(job["run"]) for job in jobs} == set(runs(tmp_path / "ws"))
    assert len({job["config_id"] for job in jobs}) == len({job["job_id"] for job in jobs}) == 4
    assert [job["overrides"][-2:] for job in jobs] == [
        [f"optim.lr={lr}", f"accum_steps={steps}"] for lr in ("0.001", "0.0003") for steps in ("1", "2")
    ]
    assert "sweep of 4 jobs: " in done.out
    assert "#3 completed score=0.0003" in done.out
    assert "sweep done: 4 of 4 jobs completed" in done.out
    assert sorted(item.name for item in tmp_path.iterdir()) == ["ws"]  # no outputs/, no multirun/
    for job in jobs:
        (attempt,) = attempts(Path(job["run"]))
        assert (attempt / ".hydra" / "config.yaml").is_file()


def test_a_failed_job_fails_the_sweep_and_the_others_are_kept(tmp_path: Path) -> None:
    done = run(sweep(tmp_path, "data.do=nothing,fail,nothing", "optim.lr=0.5"), cwd=tmp_path)
    assert done.code == 1
    assert "RuntimeError: this job is broken" in done.err
    assert "sweep done: 2 of 3 jobs completed" in done.out
    assert [(job["status"], job["score"]) for job in ledger(tmp_path)] == [
        ("completed", 0.5), ("failed", None), ("completed", 0.5)
    ]  # fmt: skip
    results = [attempts(Path(job["run"]))[0] / "result.json" for job in ledger(tmp_path)]
    assert [json.loads(path.read_text())["status"] for path in results] == ["completed", "failed", "completed"]


def test_jobs_that_score_nothing_are_completed(tmp_path: Path) -> None:
    done = run(sweep(tmp_path, "data.do=return a mapping,return nan,nothing"), cwd=tmp_path)
    assert done.code == 0, done.text
    assert [(job["status"], job["score"]) for job in ledger(tmp_path)] == [
        ("completed", None), ("completed", None), ("completed", 1e-3)
    ]  # fmt: skip


def test_all_faults_of_all_jobs_before_anything_starts(tmp_path: Path) -> None:
    done = run(sweep(tmp_path, "accum_steps=1,0,-1", "optim.momentum=0.9,1"), cwd=tmp_path)
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err
    assert "accum_steps=0" in done.err
    assert "accum_steps=-1" in done.err
    assert "optim.momentum=0.9" in done.err  # AdamW has none: a fault of every job, told once for each value
    assert "optim.momentum=1" in done.err
    assert "#2-3" in done.err  # the jobs that have a fault
    assert "0 of 6 jobs are fine" in done.err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_value_of_the_wrong_type_in_one_job(tmp_path: Path) -> None:
    done = run(sweep(tmp_path, "accum_steps=1,two", "optim.lr=0.1,abc"), cwd=tmp_path)
    assert done.code == 2
    assert "accum_steps=two" in done.err
    assert "optim.lr=abc" in done.err
    assert "Traceback" not in done.err
    assert runs(tmp_path) == []


def test_a_job_that_exits_ends_itself_alone(tmp_path: Path) -> None:
    done = run(sweep(tmp_path, "data.do=exit,nothing"), cwd=tmp_path)
    assert done.code == 1
    assert [job["status"] for job in ledger(tmp_path)] == ["failed", "completed"]


def test_an_interrupted_sweep_starts_no_further_job(tmp_path: Path) -> None:
    command = sweep(
        tmp_path, "data.do=nothing,wait,nothing", f"data.ranks={tmp_path}", "hydra.launcher.parallel_jobs=1"
    )
    with started(command, cwd=tmp_path) as process:
        wait_for(lambda: _statuses(tmp_path) == ["completed", "running", "queued"], "the second job to run")
        wait_for(lambda: str(ledger(tmp_path)[1]["run"]) in Ranks(tmp_path).facts()[0]["attempt"], "it to have begun")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "stopped by SIGINT; waiting for the jobs to save and exit" in err
    assert "to resume: danling-conf resume " in err
    assert "Traceback" not in out + err
    assert _statuses(tmp_path)[0] == "completed"
    assert set(_statuses(tmp_path)[1:]) <= {"interrupted", "cancelled"}
    assert [len(attempts(run)) for run in runs(tmp_path) if (run / "attempts").is_dir()] == [1, 1]


def test_jobs_run_at_once_on_devices_of_their_own(tmp_path: Path) -> None:
    """Five devices, and jobs of two: two jobs at once, and the third when one of them has ended."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo GPU $i: something; done\n")
    (tools / "nvidia-smi").chmod(0o755)
    done = run(
        sweep(tmp_path / "ws", "data.do=record devices", "parallel=ddp2", "optim.lr=1e-3,3e-4,1e-4",
              f"data.folder={tmp_path}"),
        cwd=tmp_path,
        env={"PATH": f"{tools}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "1,3,4,6,7"},
    )  # fmt: skip
    assert done.code == 0, done.text
    seen = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("devices-*.json"))]
    assert len(seen) == 6
    spans: dict[str, list[tuple[float, float]]] = {}
    for item in seen:
        assert item["devices"] in ("1,3", "4,6", "7,1", "1,3", "7,4", "6,7", "7,3", "3,7", "1,7", "4,7")
        for device in item["devices"].split(","):
            spans.setdefault(device, []).append((item["began"], item["ended"], item["run"]))  # type: ignore[arg-type]
    for held in spans.values():
        for first in held:
            for second in held:
                # Two ranks of one job share its devices; two jobs do not.
                assert first[2] == second[2] or first[1] <= second[0] or second[1] <= first[0]  # type: ignore[misc]


def test_a_sweep_stops_with_its_first_failure(tmp_path: Path) -> None:
    settings = ["hydra.launcher.parallel_jobs=1", "hydra.launcher.on_failure=stop"]
    done = run(sweep(tmp_path, "data.do=fail,nothing", *settings), cwd=tmp_path)
    assert done.code == 1
    assert _statuses(tmp_path) == ["failed", "cancelled"]
    assert "#1 cancelled: not started: the sweep was stopped" in done.out


def test_a_failed_job_is_started_again(tmp_path: Path) -> None:
    settings = [f"data.folder={tmp_path}", "hydra.launcher.on_failure=retry 2"]
    done = run(sweep(tmp_path, "data.do=fail once,fail", *settings), cwd=tmp_path)
    assert done.code == 1
    assert _statuses(tmp_path) == ["completed", "failed"]
    by_lr = {json.loads((run / "run.json").read_text())["settings"]["data"]["do"]: run for run in runs(tmp_path)}
    assert len(attempts(by_lr["fail once"])) == 2
    assert len(attempts(by_lr["fail"])) == 3


def test_jobs_that_are_refused_can_be_left_out(tmp_path: Path) -> None:
    done = run(sweep(tmp_path, "accum_steps=1,0,2", "hydra.launcher.skip_refused=true"), cwd=tmp_path)
    assert done.code == 0, done.text
    assert "1 of 3 jobs refused" in done.err
    assert "skipping them" in done.err
    assert "accum_steps=0" in done.err
    assert [(job["job"], job["status"]) for job in ledger(tmp_path)] == [(0, "completed"), (2, "completed")]


def test_a_job_whose_process_is_killed(tmp_path: Path) -> None:
    with started(sweep(tmp_path, "data.do=wait", f"data.ranks={tmp_path}"), cwd=tmp_path) as process:
        wait_for(lambda: Ranks(tmp_path).facts(), "the job to begin")
        os.kill(ledger(tmp_path)[0]["pid"], signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "#0 failed: ended by SIGKILL" in out
    assert _statuses(tmp_path) == ["failed"]


def test_the_jobs_end_with_a_client_that_is_killed(tmp_path: Path) -> None:
    with started(sweep(tmp_path, "data.do=wait", f"data.ranks={tmp_path}"), cwd=tmp_path) as process:
        wait_for(lambda: Ranks(tmp_path).facts(), "the job to begin")
        process.kill()
        process.communicate()
    assert all_gone({0: ledger(tmp_path)[0]["pid"]})


def _statuses(root: Path) -> list[str]:
    return [job["status"] for job in ledger(root)] if list(root.rglob("jobs.jsonl")) else []


@pytest.mark.parametrize("given", [["hydra/launcher=basic"], ["+recipe=theirs", "--config-dir", "conf"]])
def test_a_launcher_that_is_not_ours_is_refused(tmp_path: Path, given: list[str]) -> None:
    (tmp_path / "conf" / "hydra" / "launcher").mkdir(parents=True)
    (tmp_path / "conf" / "recipe").mkdir()
    (tmp_path / "conf" / "hydra" / "launcher" / "other.yaml").write_text(
        "_target_: hydra._internal.core_plugins.basic_launcher.BasicLauncher\n"
    )
    (tmp_path / "conf" / "recipe" / "theirs.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /hydra/launcher: other\n"
    )
    done = run([*sweep(tmp_path, "optim.lr=1e-3,3e-4"), *given], cwd=tmp_path)
    assert done.code == 2, done.text
    assert "hydra/launcher=" in done.err
    assert "fix: leave it out, or write hydra/launcher=danling_local" in done.err
    assert "Traceback" not in done.err
    assert list(tmp_path.rglob("multirun.yaml")) == []


def test_our_launcher_can_be_given_by_name(tmp_path: Path) -> None:
    done = run(sweep(tmp_path, "optim.lr=1e-3,3e-4", "hydra/launcher=danling_local"), cwd=tmp_path)
    assert done.code == 0, done.text
    assert len(ledger(tmp_path)) == 2
