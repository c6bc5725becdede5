"""How jobs end as Slurm tells it: every end by its own name, and no waiting for ever."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from danling_conf.launch.slurm import queries
from danling_conf.launch.slurm.queries import JobState, SlurmUnavailable
from danling_conf.records.job_file import JobFile, first_error, is_consequence, write_error
from danling_conf.records.ledger import Ledger, Record
from danling_conf.sweep import slurm_backend
from danling_conf.sweep.backend import Ending
from danling_conf.sweep.monitor import Monitor, OnFailure, parse_on_failure
from danling_conf.sweep.slurm_backend import SlurmJobs


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmJobs:
    monkeypatch.setattr(slurm_backend.shutil, "which", lambda name: name)
    return SlurmJobs(tmp_path)


def queued(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path)
    ledger.add("k", job=0, status="queued", slurm="7", overrides=[])
    return ledger


def ending(backend: SlurmJobs, monkeypatch: pytest.MonkeyPatch, states: Mapping[str, JobState]) -> Ending | None:
    monkeypatch.setattr(queries, "states", lambda ids: dict(states))
    record = Record(key="k")
    record.add({"key": "k", "job": 0, "status": "queued", "slurm": "7"})
    return backend.endings([record]).get("k")


@pytest.mark.parametrize(
    ("state", "status", "words"),
    [
        ("CANCELLED", "cancelled", "cancelled in Slurm"),
        ("TIMEOUT", "timed out", "time limit"),
        ("DEADLINE", "timed out", "time limit"),
        ("OUT_OF_MEMORY", "out of memory", "more memory than it had requested"),
        ("NODE_FAIL", "node lost", "a node was lost"),
        ("PREEMPTED", "preempted", None),
        ("COMPLETED", "completed", None),
    ],
)
def test_an_end_has_its_own_name(
    backend: SlurmJobs, monkeypatch: pytest.MonkeyPatch, state: str, status: str, words: str | None
) -> None:
    found = ending(backend, monkeypatch, {"7": JobState(state=state)})
    assert found is not None
    assert found.status == status
    assert words is None or words in str(found.error)


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "CONFIGURING"])
def test_what_has_not_ended(backend: SlurmJobs, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    assert ending(backend, monkeypatch, {"7": JobState(state=state, reason="Resources")}) is None


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("137:0", "SIGKILL"),
        ("0:9", "memory may have run out"),
        ("1:0", "exit code 1"),
        ("0:11", "by signal 11"),
    ],
)
def test_a_failure_without_a_word(backend: SlurmJobs, monkeypatch: pytest.MonkeyPatch, code: str, words: str) -> None:
    found = ending(backend, monkeypatch, {"7": JobState(state="FAILED", exit_code=code)})
    assert found is not None
    assert found.status == "failed"
    assert words in str(found.error)


@pytest.mark.parametrize(
    ("printed", "words"),
    [
        ("srun: error: n2: task 2: Killed\nsrun: launch/slurm: _step_signal: Terminating StepId=2.0\n"
         "srun: error: n2: task 3: Terminated\nsrun: error: n1: task 0: Killed\n",
         "rank 2 on n2: killed (SIGKILL): memory may have run out"),
        ("srun: error: n1: task 0: Segmentation fault (core dumped)\n",
         "rank 0 on n1: Segmentation fault (core dumped)"),
        ("srun: error: n1: tasks 0-3: Exited with exit code 127\n", "ranks 0-3 on n1: Exited with exit code 127"),
    ],
)  # fmt: skip
def test_the_first_task_that_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: SlurmJobs, printed: str, words: str
) -> None:
    """What srun said of an earlier start of the job is not taken for it."""
    before = "srun: error: n1: task 1: Terminated\n"
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "7_0_log.err").write_text(before + printed)
    monkeypatch.setattr(queries, "states", lambda ids: {"7": JobState(state="FAILED", exit_code="143:0")})
    record = Record(key="k")
    record.add({"key": "k", "job": 0, "status": "running", "slurm": "7", "printed": len(before)})
    assert backend.endings([record])["k"] == Ending(status="failed", error=words)


def test_a_job_that_slurm_has_forgotten_is_lost(backend: SlurmJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ending(backend, monkeypatch, {})
    assert found is not None
    assert found.status == "lost"


def test_a_job_that_will_never_start_is_ended(backend: SlurmJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(queries, "run", lambda *words: commands.append(words) or "")
    found = ending(backend, monkeypatch, {"7": JobState(state="PENDING", reason="DependencyNeverSatisfied")})
    assert found == Ending(status="failed", error="Slurm will never start it: DependencyNeverSatisfied")
    assert commands == [("scancel", "7")]


def test_a_slurm_that_does_not_answer_is_asked_again_but_not_for_ever(
    backend: SlurmJobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def silent(ids: object) -> dict[str, JobState]:
        raise SlurmUnavailable("squeue: no answer")

    clock = Clock(monkeypatch)
    monkeypatch.setattr(queries, "states", silent)
    record = Record(key="k")
    record.add({"key": "k", "job": 0, "status": "queued", "slurm": "7"})
    for _ in range(3):
        assert backend.endings([record]) == {}
        clock.passes(100)
    assert capsys.readouterr().err.count("Slurm does not answer, trying again") == 1
    clock.passes(600)
    with pytest.raises(SlurmUnavailable, match="no answer"):
        backend.endings([record])


def test_a_jobs_own_word_has_time_to_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: SlurmJobs
) -> None:
    """Slurm says that it has ended before the ledger's file system shows what the job wrote."""
    clock, ledger = Clock(monkeypatch), queued(tmp_path)
    monkeypatch.setattr(queries, "states", lambda ids: {"7": JobState(state="COMPLETED")})
    monitor = Monitor(ledger, backend, {"k": JobFile(path=tmp_path, content={})}, OnFailure())
    assert monitor.poll()
    clock.passes(backend.patience / 2)
    assert monitor.poll()
    Ledger(tmp_path).add("k", status="completed", score=0.5)
    assert not monitor.poll()
    assert ledger.records()["k"].score == 0.5


def test_an_end_without_a_word_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: SlurmJobs
) -> None:
    clock, ledger = Clock(monkeypatch), queued(tmp_path)
    monkeypatch.setattr(queries, "states", lambda ids: {"7": JobState(state="OUT_OF_MEMORY")})
    monitor = Monitor(ledger, backend, {"k": JobFile(path=tmp_path, content={})}, OnFailure())
    assert monitor.poll()
    clock.passes(backend.patience + 1)
    assert not monitor.poll()
    assert Ledger(tmp_path).records()["k"].status == "out of memory"


def test_the_cause_comes_before_what_it_brought_about(tmp_path: Path) -> None:
    write_error(tmp_path, 0, "RuntimeError: Connection closed by peer", "trace of 0")
    write_error(tmp_path, 3, "KeyError: 'x'", "trace of 3")
    write_error(tmp_path, 1, "RuntimeError: Connection reset by peer", "trace of 1")
    found = first_error(tmp_path)
    assert found is not None
    assert (found["rank"], found["traceback"]) == (3, "trace of 3")


def test_a_job_that_is_quicker_than_its_client(tmp_path: Path) -> None:
    """It has ended before the command that queued it says so: nothing of it is lost."""
    ledger = Ledger(tmp_path)
    ledger.add("k", job=0, status="planned")
    ledger.add("k", status="running", slurm="7", start=0)
    ledger.add("k", status="completed", score=0.5)
    ledger.add("k", status="queued", slurm="7")
    record = Ledger(tmp_path).records()["k"]
    assert (record.status, record.score, record.attempts, record.queued) == ("completed", 0.5, 1, 1)
    ledger.add("k", status="queued", slurm="8")  # again, by a retry
    assert Ledger(tmp_path).records()["k"].status == "queued"


@pytest.mark.parametrize(
    "message",
    [
        "[pair.cc:553] Connection closed by peer [127.0.0.1]:1",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "NCCL communicator was aborted on rank 1",
    ],
)
def test_errors_that_only_miss_another_rank(message: str) -> None:
    assert is_consequence(message)


@pytest.mark.parametrize("message", ["KeyError: 'x'", "a collective timed out", "CUDA error: out of memory"])
def test_errors_of_a_ranks_own(message: str) -> None:
    assert not is_consequence(message)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("continue", OnFailure()),
        ("stop", OnFailure(stops=True)),
        ("retry", OnFailure(retries=1)),
        ("retry 3", OnFailure(retries=3)),
        ("retry2", OnFailure(retries=2)),
    ],
)
def test_on_failure(text: str, expected: OnFailure) -> None:
    assert parse_on_failure(text) == expected


@pytest.mark.parametrize("text", ["", "retry x", "stop 2", "again", "retry -1"])
def test_on_failure_that_says_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="on_failure is continue, stop, or retry N"):
        parse_on_failure(text)
