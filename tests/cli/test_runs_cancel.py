"""`danling-conf cancel` and `danling-conf logs`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from danling_conf.cli.main import main
from tests.support.commands import APP, alive, run, runs, started, wait_for
from tests.support.sweeps import APP as GATED
from tests.support.sweeps import (
    records,
    run_sweep,
    slurm_of,
    started_sweep,
    states,
    sweep_in,
    wait_for_states,
    write_sweep,
)

pytestmark = pytest.mark.slow

CLI = [sys.executable, "-m", "danling_conf.cli.main"]


def test_jobs_that_run_and_jobs_that_wait(tmp_path: Path, capsys: Any) -> None:
    overrides = ("data.do=wait,nothing", "optim.lr=0.1,0.2", "hydra.launcher.parallel_jobs=1",
                 "hydra.launcher.on_failure=retry")  # fmt: skip
    with started_sweep(tmp_path, *overrides) as client:
        wait_for_states(tmp_path, "running", "queued", "queued", "queued")
        assert main(["cancel", str(tmp_path), "1", "#3"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "#1 cancelled: not started: cancelled by danling-conf cancel",
            "#3 cancelled: not started: cancelled by danling-conf cancel",
        ]
        assert main(["cancel", str(tmp_path), records(tmp_path)[0].key]) == 0
        assert capsys.readouterr().out == "#0 interrupted: stopped by SIGTERM\n"
        out, _ = client.communicate(timeout=60)
    assert client.returncode == 1
    assert states(tmp_path) == ["interrupted", "cancelled", "completed", "cancelled"]
    assert [record.attempts for record in records(tmp_path)] == [1, 0, 1, 0]  # nothing is retried
    assert "sweep done: 1 of 4 jobs completed" in out
    assert main(["cancel", str(tmp_path), "2"]) == 0
    assert "#2 completed before" in capsys.readouterr().out
    assert main(["resume", str(tmp_path)]) == 0  # it was no last word
    assert states(tmp_path) == ["completed"] * 4


def test_a_run_stands_for_its_job(tmp_path: Path, capsys: Any) -> None:
    with started_sweep(tmp_path, "data.do=wait", "optim.lr=0.1,0.2") as client:
        wait_for_states(tmp_path, "running", "running")
        assert main(["cancel", str(records(tmp_path)[1].run)]) == 0
        assert states(tmp_path) == ["running", "interrupted"]
        (tmp_path / "gate").touch()
        client.communicate(timeout=60)
    assert states(tmp_path) == ["completed", "interrupted"]


def test_a_job_that_saves_says_so_itself(tmp_path: Path, capsys: Any) -> None:
    overrides = ["data.do=train", f"data.ranks={tmp_path}", "optim.lr=0.1", "checkpoint.interval=100000"]
    command = [APP, "-m", "steps=1000000", f"workspace_root={tmp_path / 'ws'}", *overrides]
    with started(command, cwd=tmp_path) as client:
        wait_for(lambda: list(tmp_path.rglob("metrics.jsonl")), "the first step")
        assert main(["cancel", str(tmp_path)]) == 0
        assert "#0 interrupted: stopped by SIGTERM" in capsys.readouterr().out
        client.communicate(timeout=60)
    assert client.returncode == 1
    assert list(tmp_path.rglob("ckpt-*"))


def test_a_number_that_is_another_process_by_now_is_left_alone(tmp_path: Path, capsys: Any) -> None:
    with started([sys.executable, "-c", "import time; time.sleep(100)"], cwd=tmp_path) as other:
        facts = {"status": "running", "host": os.uname().nodename, "pid": other.pid}
        write_sweep(tmp_path / "sweeps" / "one", [{"lr": 0.1, "lines": [{"status": "queued"}, facts]}])
        assert main(["cancel", str(tmp_path)]) == 0
        assert "nothing to do: no job is live" in capsys.readouterr().out
        assert states(tmp_path) == ["lost"]
        assert alive(other.pid)


def test_a_job_on_another_machine_is_refused(tmp_path: Path, capsys: Any) -> None:
    facts = {"status": "running", "host": "elsewhere", "pid": os.getpid()}
    write_sweep(tmp_path / "sweeps" / "one", [{"lr": 0.1, "lines": [{"status": "queued"}, facts]}])
    assert main(["cancel", str(tmp_path)]) == 2
    assert "job #0 runs on elsewhere" in capsys.readouterr().err
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1 job: 1 running" in out
    assert "jobs were last seen running on elsewhere" in out


def test_slurm_is_asked_and_its_answer_written_down(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm_of(tmp_path / "bin", monkeypatch, "RUNNING")
    lines = [{"status": "queued", "slurm": "7_0"}, {"status": "running", "host": "node1", "pid": 1}]
    sweep = write_sweep(tmp_path / "sweeps" / "one", [{"lr": 0.1, "lines": lines}], cluster="slurm")
    assert main(["runs", str(sweep.path)]) == 0
    assert "1 job: 1 running" in capsys.readouterr().out
    (tmp_path / "bin" / "state").write_text("FAILED")
    assert main(["runs", str(sweep.path)]) == 0
    assert "#0 failed: it ended with exit code 7" in capsys.readouterr().out
    assert states(tmp_path) == ["failed"]


def test_cancel_in_slurm(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_of(tmp_path / "bin", monkeypatch, "PENDING")
    lines = [{"status": "queued", "slurm": "7_0"}]
    sweep = write_sweep(tmp_path / "sweeps" / "one", [{"lr": 0.1, "lines": lines}], cluster="slurm")
    assert main(["cancel", str(sweep.path)]) == 0
    assert capsys.readouterr().out == "#0 cancelled: cancelled in Slurm\n"
    assert (tmp_path / "bin" / "cancelled").read_text() == "7_0\n"
    assert states(tmp_path) == ["cancelled"]


def test_a_run_of_its_own(tmp_path: Path, capsys: Any) -> None:
    command = [GATED, "steps=3", "workspace_root=ws", f"data.gate={tmp_path / 'gate'}", "data.do=wait"]
    with started(command, cwd=tmp_path) as process:
        wait_for(lambda: list(tmp_path.rglob("rank-0.log")), "the run")
        assert main(["cancel", str(tmp_path / "ws")]) == 0
        assert "interrupted: stopped by SIGTERM" in capsys.readouterr().out  # it had nothing to save
        process.wait(60)
    assert main(["cancel", str(tmp_path / "ws")]) == 0
    assert "nothing to do: the run is interrupted" in capsys.readouterr().out


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("swept")
    assert run_sweep(root, "optim.lr=0.1,0.2").code == 0
    return root


def test_a_job_is_named_in_three_ways(swept: Path, capsys: Any) -> None:
    record = records(swept)[1]
    assert record.run is not None
    for name in ("1", "#1", record.key, record.key[:6], record.run.name):
        assert main(["logs", str(swept), name]) == 0
        out, err = capsys.readouterr()
        assert "this is lr=0.2" in out
        assert err == f"==> {record.run}/attempts/{record.facts['attempt']}/rank-0.log\n"
    assert main(["logs", str(record.run)]) == 0
    assert "this is lr=0.2" in capsys.readouterr().out
    assert main(["logs", str(record.run), "--attempt", record.facts["attempt"]]) == 0


@pytest.mark.parametrize(("words", "expected"), [
    (["7"], "use a number, key or run id: 0 ("), (["0", "--rank", "3"], "choose a rank of 0"),
    (["0", "--attempt", "x"], "choose one of 20"), ([], "the sweep has 2 jobs"),
])  # fmt: skip
def test_what_is_not_there(swept: Path, capsys: Any, words: list[str], expected: str) -> None:
    assert main(["logs", str(swept), *words]) == 2
    refused = capsys.readouterr().err
    assert expected in refused
    assert "Traceback" not in refused


def test_a_job_that_has_not_started_has_no_log(tmp_path: Path, capsys: Any) -> None:
    write_sweep(tmp_path / "sweeps" / "one", [{"lr": 0.1, "lines": [{"status": "queued"}]}])
    assert main(["logs", str(tmp_path), "0"]) == 2
    assert "job #0 is queued, and has printed nothing yet" in capsys.readouterr().err


def test_every_rank_has_a_log_and_it_can_be_followed(tmp_path: Path) -> None:
    with started_sweep(tmp_path, "parallel=ddp2", "data.do=wait", "parallel.mesh_device_type=cpu"):
        wait_for(lambda: list(tmp_path.rglob("rank-1.log")) and states(tmp_path) == ["running"], "the second rank")
        with started([*CLI, "logs", tmp_path, "0", "--rank", "1", "--follow"], cwd=tmp_path) as following:
            assert following.stderr is not None
            assert "rank-1.log" in following.stderr.readline()
            assert sweep_in(tmp_path).ledger.records()
            (tmp_path / "gate").touch()
            out, _ = following.communicate(timeout=60)
    assert following.returncode == 0
    assert "this is lr=0.001" in out
    assert states(tmp_path) == ["completed"]


def test_a_broken_pipe_is_no_error(swept: Path) -> None:
    command = f"{sys.executable} -m danling_conf.cli.main logs {runs(swept)[0]} 2>/dev/null | head -0"
    done = run(["bash", "-o", "pipefail", "-c", command], cwd=swept)
    assert done.code in (0, 128 + signal.SIGPIPE)
    assert done.err == ""
