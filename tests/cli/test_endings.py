"""Every way in which a run or a job can end: all commands and all records say the same of it."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from danling_conf.cli.main import main
from danling_conf.records.attempts import attempts_of
from danling_conf.records.find import sweep_of
from danling_conf.records.ledger import Record
from danling_conf.records.metrics import end_in_metrics
from danling_conf.records.reading import read_fields
from danling_conf.records.result import reserve_result, write_result
from danling_conf.records.run_directory import newest_attempt
from danling_conf.records.state import state_of
from danling_conf.records.status import Outcome, Status
from tests.support.commands import APP, Ranks, all_gone, run, runs, started, wait_for
from tests.support.records import ATTEMPT, write_run, write_sweep_of
from tests.support.sweeps import slurm_of

TRAINING = Path(__file__).parents[1] / "support" / "slurm_app.py"
"""A real training, which fails where it is told to."""


def judged(directory: Path, capsys: Any) -> Status:
    """How the commands say that a run stands: all of them the same."""
    capsys.readouterr()
    assert main(["runs", str(directory), "--json"]) == 0
    (job,) = json.loads(capsys.readouterr().out)["jobs"]
    code = main(["watch", str(directory), "--once", "--json"])
    (watched,) = json.loads(capsys.readouterr().out)["runs"]
    page = directory.with_name(f"{directory.name}.html")
    assert main(["report", str(directory), "--html", str(page)]) == 0
    reported = re.search(r'<span class="badge[^"]*">([^<]+)</span>', page.read_text())
    assert reported is not None
    status = Status(job["state"])
    assert (watched["status"], reported[1]) == (status, status)
    assert watched["error"] == job["error"]
    assert code == (0 if status.fine else 1)
    attempts = attempts_of(directory)
    assert [item.status for item in attempts[-1:]] in ([], [status])
    return status


def recorded(directory: Path) -> tuple[Status | None, Status | None]:
    """What the newest attempt itself wrote: in its result, and as its last record of metrics."""
    attempt = newest_attempt(directory)
    assert attempt is not None
    result = read_fields(attempt / "result.json").text("status")
    return (None if result is None else Status(result)), end_in_metrics(directory, attempt.name)


def command(root: Path, *more: str, app: Path = TRAINING) -> list[str | Path]:
    return [app, f"workspace_root={root / 'ws'}", "seed=1", "log_interval=1", "checkpoint=none", *more]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status", "exit_code"),
    [
        ([], Status.COMPLETED, 0),
        (["data.fail_rank=0"], Status.FAILED, 1),
        (["data.fail_rank=0", "data.how=kill"], Status.LOST, -signal.SIGKILL),
        (["data.fail_rank=1", "data.how=kill", "parallel=ddp2"], Status.FAILED, 1),
    ],
    ids=["finished", "failed", "SIGKILL of all", "SIGKILL of one rank"],
)
def test_a_run_that_ends_by_itself(tmp_path: Path, capsys: Any, how: list[str], status: Status, exit_code: int) -> None:
    done = run(command(tmp_path, "steps=4", *how), cwd=tmp_path)
    assert done.code == exit_code, done.text
    (made,) = runs(tmp_path)
    assert judged(made, capsys) == status
    killed = "data.how=kill" in how
    own = None if status is Status.LOST else status
    assert recorded(made)[0] == own
    # A rank that loses another one to SIGKILL may be stopped before it has written.
    assert recorded(made)[1] in ((None, Status.FAILED, Status.INTERRUPTED) if killed else (own,))
    if status is Status.COMPLETED:
        assert main(["resume", str(made)]) == 0
        assert "nothing to do: the run has completed" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop(tmp_path: Path, capsys: Any, number: signal.Signals) -> None:
    with started(command(tmp_path, "steps=100000", "data.pause=0.05"), cwd=tmp_path) as process:
        wait_for(lambda: list(tmp_path.rglob("losses.jsonl")), "the first step")
        (made,) = runs(tmp_path)
        assert judged(made, capsys) == Status.RUNNING
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert judged(made, capsys) == Status.INTERRUPTED
    assert recorded(made) == (Status.INTERRUPTED, Status.INTERRUPTED)


@pytest.mark.slow
def test_a_run_that_is_stopped_while_no_runner_listens(tmp_path: Path, capsys: Any) -> None:
    """As while it imports torch: SIGTERM would end the process by default, and leave a run that looks lost."""
    words: list[str | Path] = [APP, f"workspace_root={tmp_path}", "steps=3", "data.do=wait", f"data.ranks={tmp_path}"]
    with started(words, cwd=tmp_path) as process:
        Ranks(tmp_path).wait(1, process)
        process.terminate()
        _, err = process.communicate(timeout=60)
    (made,) = runs(tmp_path)
    assert (process.returncode, f"stopped by SIGTERM; the run so far: {made}" in err) == (143, True), err
    assert judged(made, capsys) == Status.INTERRUPTED


@pytest.mark.slow
def test_a_run_whose_parent_is_killed(tmp_path: Path, capsys: Any) -> None:
    words = command(tmp_path, "steps=100000", "data.pause=0.05", "parallel=ddp2", "heartbeat=default")
    with started(words, cwd=tmp_path) as process:
        wait_for(lambda: list(tmp_path.rglob("losses.jsonl")), "the first step")
        (made,) = runs(tmp_path)
        pids = {int(beat.stem[5:]): json.loads(beat.read_text())["pid"] for beat in made.glob("heartbeats/rank-*.json")}
        process.kill()
        process.communicate()
    assert all_gone(pids)
    assert judged(made, capsys) == Status.INTERRUPTED
    assert recorded(made) == (Status.INTERRUPTED, Status.INTERRUPTED)


@pytest.mark.slow
def test_a_run_that_a_rank_refuses(tmp_path: Path, capsys: Any) -> None:
    words = command(
        tmp_path, "steps=3", "data.do=refuse in a collective", f"data.ranks={tmp_path}", "parallel=ddp2", app=APP
    )
    assert run(words, cwd=tmp_path).code == 2
    (made,) = runs(tmp_path)
    assert judged(made, capsys) == Status.REFUSED
    assert recorded(made) == (Status.REFUSED, None)


def test_a_run_of_which_nothing_started(tmp_path: Path, capsys: Any) -> None:
    made = write_run(tmp_path / "run")
    (made / "attempts").rename(tmp_path / "elsewhere")
    assert judged(made, capsys) == Status.EMPTY


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.INTERRUPTED])
@pytest.mark.parametrize("swept", [False, True])
def test_a_run_whose_result_cannot_be_made(tmp_path: Path, capsys: Any, status: Status, swept: bool) -> None:
    """Its end stands in the room that was kept for it, and counts as if it were the result."""
    if swept:
        (record,) = write_sweep_of(tmp_path, None, lines=[RUNNING]).ledger.records().values()
        assert record.run is not None
        made = record.run
    else:
        made = write_run(tmp_path / "run")
    attempt = newest_attempt(made)
    assert attempt is not None
    (attempt / "result.json").mkdir()
    reserve_result(attempt)
    assert state_of(made).status is Status.LOST
    error = "" if status is Status.COMPLETED else "as it says"
    write_result(attempt, Outcome(status=status, exit_code=0, message=error), 0.5)
    assert judged(made, capsys) == status
    state = state_of(made)
    assert (state.error, state.score) == (error or None, None if error else 0.5)
    if not swept:
        main(["resume", str(made)])
        told = "".join(capsys.readouterr())
        assert "Traceback" not in told
        assert ("nothing to do: the run has completed" in told) == (status is Status.COMPLETED)


def test_a_run_on_another_machine(tmp_path: Path, capsys: Any) -> None:
    made = write_run(tmp_path / "run")
    (made / "run.lock").write_text("process 7 on elsewhere")
    assert judged(made, capsys) == Status.UNKNOWN


RUNNING: dict[str, Any] = {"status": "running"}
ENDS_OF_JOBS: dict[str, tuple[list[dict[str, Any]], str, Status]] = {
    # what the ledger has, what Slurm says ("" for a job of this machine), how the job ended
    "SIGKILL of all": ([RUNNING], "", Status.LOST),
    "cancelled": ([RUNNING, {"told": "cancelled"}], "", Status.CANCELLED),
    "interrupted": ([RUNNING, {"told": "SIGTERM"}], "", Status.CANCELLED),
    "never started": ([], "", Status.NOT_STARTED),
    "time limit": ([RUNNING], "TIMEOUT", Status.TIMED_OUT),
    "lost node": ([RUNNING], "NODE_FAIL", Status.NODE_LOST),
    "out of memory": ([RUNNING], "OUT_OF_MEMORY", Status.OUT_OF_MEMORY),
    "preempted": ([RUNNING], "PREEMPTED", Status.PREEMPTED),
    "failed": ([RUNNING], "FAILED", Status.FAILED),
    "cancelled in Slurm": ([RUNNING], "CANCELLED", Status.CANCELLED),
    "cancelled, and failed": ([RUNNING, {"told": "cancelled"}], "FAILED", Status.CANCELLED),
}


def settled(record: Record) -> Status | None:
    """The first end that is written of a job."""
    statuses = [Status(line["status"]) for line in record.history if "status" in line]
    return next((status for status in statuses if status.ended), None)


@pytest.mark.parametrize("first", ["runs", "watch --once", "report", "resume", "cancel"])
@pytest.mark.parametrize("ending", ENDS_OF_JOBS)
def test_a_job_that_wrote_no_end(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, ending: str, first: str
) -> None:
    """Whatever command looks first: all of them write the same end, and find it."""
    lines, slurm, status = ENDS_OF_JOBS[ending]
    sweep = write_sweep_of(tmp_path, None, lines=lines, cluster="slurm" if slurm else "local")
    (record,) = sweep.ledger.records().values()
    assert record.run is not None
    if slurm:
        slurm_of(tmp_path / "bin", monkeypatch, slurm)
    if first == "cancel" and status is Status.NOT_STARTED:
        status = Status.CANCELLED  # an end of its own
    argv = [*first.split()[:1], str(record.run), *first.split()[1:]]
    code = main(argv + (["--html", str(tmp_path / "first.html")] if first == "report" else []))
    assert code in ((2,) if first == "resume" else (0, 1))  # its script is gone
    assert "Traceback" not in capsys.readouterr().err
    (record,) = sweep.ledger.records().values()
    assert settled(record) == (status if status.ended else None)
    assert judged(record.run, capsys) == status
    assert recorded(record.run) == (None, None) if record.attempts else newest_attempt(record.run) is None


@pytest.mark.parametrize("status", ["completed", "failed", "interrupted"])
def test_a_job_that_was_killed_between_its_result_and_the_ledger(tmp_path: Path, capsys: Any, status: str) -> None:
    sweep = write_sweep_of(tmp_path, None, lines=[RUNNING])
    (record,) = sweep.ledger.records().values()
    assert record.attempt is not None
    result = {"status": status, "score": 0.5 if status == "completed" else None, "error": "as it says"}
    (record.attempt / "result.json").write_text(json.dumps(result))
    assert record.run is not None
    assert judged(record.run, capsys) == status
    (record,) = sweep.ledger.records().values()
    assert (record.status, record.score, record.error) == (status, result["score"], "as it says")


def test_a_run_that_went_on_after_its_sweep_stands_for_itself(tmp_path: Path, capsys: Any) -> None:
    sweep = write_sweep_of(tmp_path, {"status": "completed", "score": 1.0, "error": None})
    (record,) = sweep.ledger.records().values()
    assert record.run is not None
    later = record.run / "attempts" / "20270101-000000"
    (record.run / "attempts" / ATTEMPT).rename(later)
    (later / "result.json").write_text('{"status": "failed", "score": null, "error": "by hand"}')
    (record.run / "attempts" / ATTEMPT).mkdir()
    assert judged(record.run, capsys) == Status.FAILED
    owner = sweep_of(record.run)
    assert owner is not None
    assert owner[1].status == Status.COMPLETED
