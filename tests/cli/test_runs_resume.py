"""`danling-conf resume`, and what `runs` says meanwhile: clients and jobs that are killed, two clients at once."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from danling_conf.cli.main import main
from danling_conf.records.find import sweep_of
from danling_conf.records.metrics import read_lines
from danling_conf.records.sweep_lock import SweepLock
from tests.support.commands import APP, alive, run, runs, started, wait_for
from tests.support.sweeps import records, run_sweep, started_sweep, states, sweep_in, wait_for_states, write_sweep

pytestmark = pytest.mark.slow

CLI = [sys.executable, "-m", "danling_conf.cli.main"]


def test_resume_runs_what_failed_in_the_same_runs(tmp_path: Path, capsys: Any) -> None:
    assert run_sweep(tmp_path, "data.do=nothing,fail", "optim.lr=0.1,0.2").code == 1
    before = runs(tmp_path)
    (tmp_path / "gate").touch()
    assert main(["resume", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2 of 4 jobs completed; 2 to start" in out
    assert "#2 completed" in out  # that it ran may pass between two looks
    assert "sweep done: 2 of 2 jobs completed" in out
    assert states(tmp_path) == ["completed"] * 4
    assert [record.attempts for record in records(tmp_path)] == [1, 1, 2, 2]
    assert runs(tmp_path) == before
    assert main(["resume", str(tmp_path)]) == 0
    assert "nothing to do: 4 of 4 jobs completed" in capsys.readouterr().out


def test_resume_says_when_a_job_fails_again(tmp_path: Path, capsys: Any) -> None:
    assert run_sweep(tmp_path, "data.do=fail,nothing").code == 1
    assert main(["resume", str(tmp_path)]) == 1
    assert "RuntimeError: the gate is shut" in capsys.readouterr().err
    failed = records(tmp_path)[0]
    assert main(["resume", str(failed.run)]) == 1
    assert [record.attempts for record in records(tmp_path)] == [3, 1]
    assert "is job #0 of the sweep" in capsys.readouterr().out


def test_a_client_that_is_killed_loses_nothing(tmp_path: Path, capsys: Any) -> None:
    overrides = ("data.do=nothing,wait,nothing", "optim.lr=0.5", "hydra.launcher.parallel_jobs=1")
    with started_sweep(tmp_path, *overrides) as client:
        wait_for_states(tmp_path, "completed", "running", "queued")
        assert main(["runs", str(tmp_path)]) == 0
        assert "1 completed, 1 running, 1 queued" in capsys.readouterr().out
        job = records(tmp_path)[1].facts["pid"]
        client.kill()
        client.wait()
        wait_for(lambda: not alive(job), "the job to follow its client")
        assert main(["runs", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert "1 completed, 1 interrupted, 1 not started" in out
        assert "#1 interrupted: stopped by SIGTERM" in out
        assert "the jobs that it has not started will not start" in out
        assert states(tmp_path) == ["completed", "interrupted", "queued"]  # written down, too
    assert main(["resume", str(tmp_path)]) == 0
    assert states(tmp_path) == ["completed"] * 3
    assert [record.attempts for record in records(tmp_path)] == [1, 2, 1]


def test_a_job_that_is_killed_fails_alone(tmp_path: Path) -> None:
    with started_sweep(tmp_path, "data.do=wait,nothing") as client:
        wait_for_states(tmp_path, "running", "completed")
        os.kill(records(tmp_path)[0].facts["pid"], signal.SIGKILL)
        out, _ = client.communicate(timeout=60)
    assert client.returncode == 1
    assert "#0 failed: ended by SIGKILL" in out
    assert main(["resume", str(tmp_path)]) == 0
    assert states(tmp_path) == ["completed", "completed"]


def test_only_one_process_looks_after_a_sweep(tmp_path: Path, capsys: Any) -> None:
    with started_sweep(tmp_path, "data.do=wait,fail", "hydra.launcher.on_failure=retry") as client:
        # The retry is over too: it would not fail once the gate is open.
        wait_for(lambda: states(tmp_path)[1:] == ["failed"] and records(tmp_path)[1].attempts == 2, "the retry to fail")
        sweep = sweep_in(tmp_path).path
        assert main(["resume", str(sweep)]) == 2
        assert f"process {client.pid} on" in capsys.readouterr().err
        with started([*CLI, "runs", sweep, "--watch"], cwd=tmp_path) as watching:
            assert json.loads(run([*CLI, "runs", sweep, "--json"], cwd=tmp_path).out)["sweeps"][0]["looked_after"]
            (tmp_path / "gate").touch()
            out, err = watching.communicate(timeout=60)
        client.communicate(timeout=60)
    assert (client.returncode, watching.returncode) == (1, 1)
    assert "#0 completed score=0.001" in out
    assert "sweep done: 1 of 2 jobs completed" in out
    assert "Traceback (most recent call last)" in err  # why the job failed
    assert records(tmp_path)[1].attempts == 2  # by one retry, of whom it was for


def test_a_watcher_says_what_becomes_of_a_sweep_without_client(tmp_path: Path) -> None:
    overrides = ("data.do=wait,nothing", "hydra.launcher.parallel_jobs=1")
    with started_sweep(tmp_path, *overrides) as client:
        wait_for_states(tmp_path, "running", "queued")
        client.kill()
        client.wait()
        watched = run([*CLI, "runs", tmp_path, "--watch"], cwd=tmp_path)
    assert watched.code == 1
    assert "#0 interrupted: stopped by SIGTERM" in watched.out
    assert "#1 cancelled: not started: the command that monitored the sweep is gone" in watched.out
    assert main(["resume", str(tmp_path)]) == 0


def test_a_run_of_its_own_goes_on_from_its_checkpoint(tmp_path: Path, capsys: Any) -> None:
    command = [APP, "steps=1500", "data.do=train", f"data.ranks={tmp_path}", "workspace_root=ws", "heartbeat=default"]
    with started([*command, "checkpoint.interval=20"], cwd=tmp_path) as process:
        wait_for(lambda: list(tmp_path.rglob("latest")), "a checkpoint")
        assert main(["resume", str(tmp_path / "ws")]) == 2
        assert "the run is live" in capsys.readouterr().err
        process.kill()
        process.wait()
    (made,) = runs(tmp_path)
    assert main(["runs", str(tmp_path)]) == 0
    assert "1 run: 1 lost" in capsys.readouterr().out
    # The attempt's configuration goes on; a shorter one would be another command.
    attempt = next((made / "attempts").iterdir())
    frozen = json.loads((attempt / "frozen.json").read_text())
    assert frozen["config"]["steps"] == 1500
    assert main(["resume", str(made)]) == 0
    out = capsys.readouterr().out
    assert "#0 completed" in out
    starts = [line["step"] for line in read_lines(made) if len(line) == 4]
    assert starts[0] == 0
    assert starts[1] > 0
    owner = sweep_of(made)
    assert owner is not None
    assert main(["resume", str(made)]) == 0
    assert "nothing to do: 1 of 1 job completed" in capsys.readouterr().out


@pytest.mark.parametrize("status", ["failed", "lost", "timed out", "cancelled", "interrupted", "node lost"])
def test_a_slurm_sweep_is_resumed_where_slurm_is(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    lines = [{"status": "queued", "slurm": "1_0"}, {"status": status, "error": "so it was"}]
    sweep = write_sweep(tmp_path / "sweeps" / "one", [{"lr": 0.1, "lines": lines}], cluster="slurm")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["runs", str(sweep.path)]) == 0
    assert f"#0 {status}: so it was" in capsys.readouterr().out
    assert main(["resume", str(sweep.path)]) == 2
    assert "whose commands are not installed here" in capsys.readouterr().err
    with SweepLock(sweep.path) as lock:
        assert lock.acquire()  # it was let go
