"""The ledger of a sweep: several writers, torn lines, the newest word; and the lock of whoever looks after it."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from danling_conf.cli.main import main
from danling_conf.records.job_file import JobFile
from danling_conf.records.ledger import Ledger, Record
from danling_conf.records.reading import shown_damage
from danling_conf.records.status import Status
from danling_conf.records.sweep_lock import SweepLock
from danling_conf.schema.files import JOB_FILE, LEDGER, RESULT
from danling_conf.sweep.backend import Ending
from danling_conf.sweep.monitor import Monitor, parse_on_failure
from tests.support.records import write_sweep_of

_FORK = multiprocessing.get_context("spawn")


def planned(folder: Path, count: int = 1) -> Ledger:
    ledger = Ledger(folder)
    ledger.add_all([(f"k{number}", {"job": number, "status": Status.PLANNED}) for number in range(count)])
    return ledger


def _write_many(folder: str, name: str) -> None:
    ledger = Ledger(Path(folder))
    for number in range(200):
        ledger.add("k0", **{name: number})


def _settle(folder: str, status: str) -> None:
    Ledger(Path(folder)).settle("k0", status=status)


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    ledger = planned(tmp_path)
    writers = [_FORK.Process(target=_write_many, args=(str(tmp_path), name)) for name in ("first", "second")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    for name in ("first", "second"):
        assert [line[name] for line in lines if name in line] == list(range(200))
    assert ledger.records()["k0"].facts["first"] == 199


def test_a_torn_line_stays_by_itself(tmp_path: Path) -> None:
    ledger = planned(tmp_path, 2)
    assert len(ledger.records()) == 2
    with open(ledger.path, "a") as file:
        file.write('{"key": "k0", "status": "compl')
    assert ledger.records()["k0"].status == Status.PLANNED
    ledger.add("k1", status=Status.QUEUED)
    assert [record.status for record in ledger.records().values()] == [Status.PLANNED, Status.QUEUED]
    assert [record.status for record in Ledger(tmp_path).records().values()] == [Status.PLANNED, Status.QUEUED]


def test_a_job_whose_first_line_is_torn_is_unknown(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.path.write_text('{"key": "k0", "job": 0, "sta\n{"key": "k0", "status": "running"}\n7\nnull\n')
    assert ledger.records() == {}
    ledger.add("k0", job=0)
    assert ledger.records()["k0"].status == Status.RUNNING


def test_the_first_word_on_an_end_stays(tmp_path: Path) -> None:
    ledger = planned(tmp_path)
    ledger.add("k0", status=Status.RUNNING)
    writers = [
        _FORK.Process(target=_settle, args=(str(tmp_path), status))
        for status in (Status.LOST, Status.FAILED, Status.CANCELLED)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    ends = [
        line["status"]
        for line in ledger.records()["k0"].history
        if line["status"] not in (Status.PLANNED, Status.RUNNING)
    ]
    assert len(ends) == 1
    assert not ledger.settle("k0", status=Status.COMPLETED)
    ledger.add("k0", status=Status.QUEUED)
    assert ledger.settle("k0", status=Status.COMPLETED)


@pytest.mark.parametrize(
    ("seen", "own", "kept"),
    [
        (Status.FAILED, {"status": "failed", "error": "SaveFailed: no space"}, (Status.FAILED, "SaveFailed: no space")),
        (Status.FAILED, {"status": "out of memory", "error": "CUDA"}, (Status.OUT_OF_MEMORY, "CUDA")),
        (Status.FAILED, {"status": "failed", "error": "Connection closed by peer"}, (Status.FAILED, "as seen")),
        (Status.FAILED, {"status": "completed", "score": 1.0}, (Status.FAILED, "as seen")),
        (Status.NODE_LOST, {"status": "failed", "error": "mine"}, (Status.NODE_LOST, "as seen")),
    ],
)
def test_what_a_job_says_of_its_end_says_more_than_its_exit_code(
    tmp_path: Path, seen: Status, own: dict[str, object], kept: tuple[Status, str]
) -> None:
    """On a full disk it is in the result alone, for which there is room."""
    ledger = planned(tmp_path)
    ledger.add("k0", run=str(tmp_path), status=Status.RUNNING, attempt="first")
    (tmp_path / "attempts" / "first").mkdir(parents=True)
    (tmp_path / "attempts" / "first" / RESULT).write_text(json.dumps(own))
    assert ledger.settle("k0", status=seen, error="as seen")
    record = ledger.records()["k0"]
    assert (record.status, record.error) == kept


def test_a_disk_takes_a_line_or_nothing_of_it(tmp_path: Path) -> None:
    ledger = planned(tmp_path)
    before = ledger.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"jobs\.jsonl"):
            ledger.add("k0", status=Status.RUNNING)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ledger.path.read_bytes() == before


def test_a_new_start_forgets_what_was_of_the_earlier_one(tmp_path: Path) -> None:
    ledger = planned(tmp_path)
    ledger.add("k0", status=Status.RUNNING)
    ledger.add("k0", told=Status.CANCELLED)
    ledger.add("k0", status=Status.FAILED, error="broken", rank=2)
    record = ledger.records()["k0"]
    assert (record.facts["told"], record.facts["error"]) == (Status.CANCELLED, "broken")
    ledger.add("k0", status=Status.QUEUED, why="preempted")
    assert "told" in ledger.records()["k0"].facts
    ledger.add("k0", status=Status.QUEUED)
    assert not {"told", "error", "rank"} & ledger.records()["k0"].facts.keys()
    assert (record.attempts, record.queued) == (1, 1)


class Backend:
    """Jobs that end as they are told."""

    interval = patience = 0.0

    def __init__(self, ledger: Ledger, endings: Mapping[str, Ending]) -> None:
        self._ledger, self._endings = ledger, endings
        self.submitted: list[str] = []
        self.cancelled: list[str] = []

    def submit(self, jobs: Sequence[JobFile]) -> None:
        for job in jobs:
            self.submitted.append(job.key)
            self._ledger.add(job.key, status=Status.QUEUED)

    def proceed(self) -> None:
        pass

    def endings(self, unfinished: Sequence[Record]) -> Mapping[str, Ending]:
        return {record.key: self._endings[record.key] for record in unfinished if record.key in self._endings}

    def cancel(self, records: Sequence[Record]) -> None:
        self.cancelled += [record.key for record in records]


def follow(ledger: Ledger, endings: Mapping[str, Ending], policy: str, *, acts: bool = True) -> Backend:
    """One look at jobs that all run."""
    backend = Backend(ledger, endings)
    jobs = {key: JobFile(path=ledger.directory / key, content={"key": key}) for key in ledger.records()}
    Monitor(ledger, backend, jobs, parse_on_failure(policy), may_act=lambda: acts).poll()  # type: ignore[arg-type]
    return backend


@pytest.mark.parametrize("status", [Status.CANCELLED, Status.INTERRUPTED, Status.COMPLETED])
def test_what_was_stopped_has_not_failed(tmp_path: Path, status: str) -> None:
    ledger = planned(tmp_path, 2)
    ledger.add_all([("k0", {"status": Status.QUEUED}), ("k1", {"status": Status.QUEUED})])
    backend = follow(ledger, {"k0": Ending(status=status)}, "stop")
    assert backend.cancelled == []


def test_what_was_told_to_stop_is_not_retried(tmp_path: Path) -> None:
    ledger = planned(tmp_path, 2)
    ledger.add_all(
        [("k0", {"status": Status.QUEUED}), ("k1", {"status": Status.QUEUED}), ("k0", {"told": Status.CANCELLED})]
    )
    backend = follow(ledger, {key: Ending(status=Status.FAILED) for key in ("k0", "k1")}, "retry 2")
    assert backend.submitted == ["k1"]
    assert ledger.records()["k0"].status == Status.CANCELLED


def test_who_only_looks_writes_nothing(tmp_path: Path) -> None:
    ledger = planned(tmp_path, 2)
    ledger.add_all([("k0", {"status": Status.QUEUED}), ("k1", {"status": Status.QUEUED})])
    before = ledger.path.read_text()
    for policy in ("retry", "stop"):
        backend = follow(ledger, {"k0": Ending(status=Status.FAILED)}, policy, acts=False)
        assert (backend.submitted, backend.cancelled) == ([], [])
    assert ledger.path.read_text() == before


def test_one_process_looks_after_a_sweep(tmp_path: Path) -> None:
    first, second = SweepLock(tmp_path), SweepLock(tmp_path)
    assert first.is_free()
    assert list(tmp_path.iterdir()) == []  # who only asks leaves nothing behind
    assert first.acquire()
    assert first.acquire()
    assert first.is_free()
    assert not second.acquire()
    assert not second.is_free()
    assert second.holder == f"process {os.getpid()} on {os.uname().nodename}"
    first.release()
    assert second.is_free()
    with second:
        assert second.acquire()
        assert not first.acquire()
    assert first.acquire()


def test_where_nothing_can_be_written_one_only_looks(tmp_path: Path) -> None:
    assert not SweepLock(tmp_path / "gone").acquire()


def _lost(path: Path, what: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    if what == "all of it":
        path.write_text("")
    elif what == "the file":
        path.unlink()
    else:
        path.write_text("".join(lines[1:]))


@pytest.mark.parametrize("what", ["all of it", "the file", "the first line"])
def test_lost_lines_are_taken_from_the_files_of_the_jobs(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = [
        {"status": "completed", "score": 1.5, "error": None},
        {"status": "failed", "score": None, "error": "broken"},
    ]
    sweep = write_sweep_of(tmp_path, *ends)
    whole = sweep.ledger.records()
    _lost(sweep.path / LEDGER, what)
    with shown_damage():
        found = sweep.ledger.records()
    assert list(found) == list(whole)
    for key, record in found.items():
        assert (record.number, record.status, record.score) == (
            whole[key].number, whole[key].status, whole[key].score,
        )  # fmt: skip
        assert (record.run, record.attempt) == (whole[key].run, whole[key].attempt)
        assert record.facts["overrides"] == ["steps=10"]
    jobs = "1 job" if what == "the first line" else "2 jobs"
    assert f"jobs.jsonl: it lost what it said of {jobs}" in capsys.readouterr().err
    assert main(["runs", str(sweep.path)]) == 0  # found without its ledger, too
    assert "2 jobs: 1 completed, 1 failed" in capsys.readouterr().out


@pytest.mark.parametrize("lost", [False, True])
def test_a_workspace_that_was_moved_has_its_runs(tmp_path: Path, lost: bool) -> None:
    (tmp_path / "before").mkdir()
    written = write_sweep_of(tmp_path / "before", {"status": "failed", "score": None, "error": "broken"})
    (run,) = (record.run for record in written.ledger.records().values())
    assert run is not None
    sweep = tmp_path / "after" / written.path.relative_to(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    if lost:
        _lost(sweep / LEDGER, "all of it")
    (record,) = Ledger(sweep).records().values()
    assert record.run == tmp_path / "after" / run.relative_to(tmp_path / "before")
    assert record.attempt is not None
    assert record.attempt.is_dir()
    job = JobFile.read(sweep / "jobs" / record.key / JOB_FILE)
    assert job.binding.run_directory == record.run  # where a resumed one goes on
