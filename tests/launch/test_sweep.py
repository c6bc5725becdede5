"""Sweeps on this machine: all jobs checked first, a failed one does not stop the others, a true exit code."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.launch.command import APP, Ranks, attempts, run, runs, started, wait_for


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
    assert "job #2 (" in done.err
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
    command = sweep(tmp_path, "data.do=nothing,wait,nothing", f"data.ranks={tmp_path}", "optim.lr=0.5")
    with started(command, cwd=tmp_path) as process:
        wait_for(lambda: len(list((tmp_path / "lin" / "exp" / "sweeps").rglob("jobs.jsonl"))), "the first job")
        # The first job has ended; the second one writes down another attempt.
        wait_for(
            lambda: not Ranks(tmp_path).facts()[0]["attempt"].startswith(ledger(tmp_path)[0]["run"] + "/"),
            "the second job",
        )
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "#1 interrupted; the jobs after it were not started" in err
    assert "Traceback" not in out + err
    assert [job["status"] for job in ledger(tmp_path)] == ["completed", "interrupted"]
    assert len(runs(tmp_path)) == 2


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
