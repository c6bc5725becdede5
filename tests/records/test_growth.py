"""What records cost as they grow, by counts: lines parsed, files opened, bytes read."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import danling_conf
from danling_conf.records import layouts_index, metrics, ranks, run_directory
from danling_conf.records import ledger as ledgers
from danling_conf.records.history import goodput, read_history
from danling_conf.records.ledger import Ledger
from danling_conf.records.metrics import PRODUCTIVE, end_in_metrics, read_lines, read_metrics
from danling_conf.records.run_directory import bind
from danling_conf.records.state import RunState
from danling_conf.records.status import Status
from danling_conf.schema import files

ATTEMPT = "20260101-000000"


class Counted(dict[str, Any]):
    """A heartbeat that counts how often it is looked into."""

    def __init__(self, content: dict[str, Any], counts: Counter[str]) -> None:
        super().__init__(content)
        self.counts = counts

    def __getitem__(self, name: str) -> Any:
        self.counts["looks"] += 1
        return super().__getitem__(name)


def looks(count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    counts: Counter[str] = Counter()
    beat = {"attempt": ATTEMPT, "world_size": count, "host": "h", "pid": 1, "step": 5, "epoch": 0, "state_since": 10.0,
            "written": 100.0, "interval": 1.0, "memory_bytes": 1, "last_step_time": 99.0}  # fmt: skip
    beats = {
        rank: Counted({**beat, "rank": rank, "state": "waiting in a collective" if rank else "training"}, counts)
        for rank in range(count)
    }
    monkeypatch.setattr(ranks, "read_heartbeats", lambda *_: beats)
    seen = ranks.look_at(Path("run"), now=101.0, state=RunState(status=Status.RUNNING))
    assert seen.stuck == [0]
    assert seen.ranks[0].stuck == f"{count - 1} ranks have waited for it for 90 s"
    return counts["looks"]


def test_ranks_are_not_compared_with_each_other_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = looks(50, monkeypatch), looks(200, monkeypatch)
    assert large == pytest.approx(4 * small, rel=0.05)


def test_many_jobs_are_settled_by_one_reading_and_one_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"k{number}" for number in range(50)]
    Ledger(tmp_path).add_all([(key, {"job": number, "status": "running"}) for number, key in enumerate(keys)])
    Ledger(tmp_path).add("k7", status="completed")
    parsed, synced = [], []
    parse, sync = ledgers.parse_object, os.fsync
    monkeypatch.setattr(ledgers, "parse_object", lambda line: parsed.append(line) or parse(line))
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(file) or sync(file))
    ledger = Ledger(tmp_path)
    assert ledger.settle_all(dict.fromkeys(keys, (Status.LOST, "gone"))) == {*keys} - {"k7"}
    assert len(synced) == 1
    statuses = Counter(record.status for record in ledger.records().values())
    assert statuses == {Status.LOST: 49, Status.COMPLETED: 1}
    assert len(parsed) == 50 + 1 + 49


def configured(root: Path, *given: str) -> danling_conf.RunnerConfig:
    return danling_conf.compose([f"workspace_root={root}", "steps=3", "auto_resume=true", *given])


def beside(run: Path, count: int, *, index: bool) -> None:
    """So many runs of other configurations, of this version or of one that wrote no index."""
    made = json.loads((run / "run.json").read_text())
    for number in range(count):
        name, settings = f"{number:012x}", made["settings"] | {"seed": 100 + number}
        (run.parent / name).mkdir()
        content = made | {"run_id": name, "config_id": name, "settings": settings}
        (run.parent / name / "run.json").write_text(json.dumps(content))
        if index:
            layouts_index.add(run.parent, [(name, name, settings)])


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a start lists a directory, looks at an entry and reads a run's file."""
    counts: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*given: Any, **named: Any) -> Any:
            counts[name] += 1
            return function(*given, **named)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((os, "listdir"), (os, "scandir"), (os, "stat"), (run_directory, "read_object")):
        counted(owner, name)
    return counts


def test_a_run_is_found_and_made_by_names_alone(tmp_path: Path, touched: Counter[str]) -> None:
    mine, fresh = configured(tmp_path, "seed=0"), configured(tmp_path, "seed=1")
    run = bind(mine).run_directory
    beside(run, 100, index=True)
    touched.clear()
    assert bind(mine).run_directory == run
    assert (touched["listdir"], touched["scandir"], touched["read_object"]) == (1, 0, 0)
    assert touched["stat"] < 10
    touched.clear()
    assert bind(fresh).notes == ()
    assert (touched["listdir"], touched["scandir"], touched["read_object"]) == (1, 0, 0)
    assert touched["stat"] < 10


def test_runs_that_no_index_knows_are_read_once(tmp_path: Path, touched: Counter[str]) -> None:
    run = bind(configured(tmp_path, "seed=0")).run_directory
    beside(run, 40, index=False)
    read = []
    for seed in range(1, 5):
        touched.clear()
        bind(configured(tmp_path, f"seed={seed}"))
        read.append(touched["read_object"])
    assert read == [32, 8, 0, 0]


def test_a_new_run_does_not_take_the_place_of_one_that_was_removed(tmp_path: Path) -> None:
    config = danling_conf.compose([f"workspace_root={tmp_path}", "steps=3", "seed=0"])
    first, second = bind(config).run_directory, bind(config).run_directory
    (first / "run.json").unlink()
    first.rmdir()
    assert bind(config).run_directory.name == f"{first.name}.3"
    assert run_directory.newest_run(first.parent, first.name) == second.with_name(f"{first.name}.3")


def line(step: int, attempt: str = ATTEMPT, **more: Any) -> str:
    return json.dumps({"time": 1e9 + step, "attempt": attempt, "step": step, "epoch": 0, PRODUCTIVE: 0.5, **more})


def test_the_end_of_a_long_run_is_read_from_its_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line(step) for step in range(20_000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, line(20_000, status="completed")]) + "\n")
    sizes = []
    read = files.read_regular

    def counted(*given: Any, **named: Any) -> bytes:
        found = read(*given, **named)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(metrics, "read_regular", counted)
    assert end_in_metrics(tmp_path, ATTEMPT) is Status.COMPLETED
    assert end_in_metrics(tmp_path, "another") is None
    assert sum(sizes) <= 2 << 16
    sizes.clear()
    assert goodput(tmp_path) == pytest.approx(0.5, rel=1e-3)
    assert len(sizes) > 2
    assert max(sizes) == 1 << 20  # block by block, whatever the length


def test_a_history_parses_each_line_once_and_says_all_that_a_report_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line(0), *(line(step, x=step % 7) for step in range(1, 5000))]
    lines += [json.dumps({"time": 2e9, "attempt": "b", "step": 3000, "epoch": 0}), line(3001, "b", x=-1.0)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    share, parsed = goodput(tmp_path), []
    at_once = metrics._at_once
    monkeypatch.setattr(metrics, "_at_once", lambda given: parsed.extend(given) or at_once(given))
    history = read_history(tmp_path)
    assert len(parsed) == len(lines)
    assert history.goodput == share
    assert history.curves["x"].least == (3001, -1.0)
    assert {name: (span.first_step, span.last_step) for name, span in history.attempts.items()} == {
        ATTEMPT: (0, 4999),
        "b": (3000, 3001),
    }


def test_lines_are_the_same_parsed_at_once_and_one_by_one(tmp_path: Path) -> None:
    odd = ['{"time": 1, "att', "", '{"a": 1}, {"b": 2}', "[]", "nonsense", '{"x": NaN}', line(3, x=1e999),
           line(4, y=float("nan")), line(5, z="text"), line(6, w={"a": 1}), line(7, status="failed"),
           line(8, big=10**30), line(9, time=-1.0),
           '{"time": 1, "attempt": "a", "step": 1.5, "epoch": 0}']  # fmt: skip
    lines = [line(1), *odd, line(11, attempt="b"), '{"torn']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    one_by_one = [found for text in lines if (found := metrics.parse_line(text.encode())) is not None]
    assert list(read_lines(tmp_path)) == one_by_one
    (tmp_path / "metrics.jsonl").write_text("\n".join([line(1), line(2)]) + "\n")
    assert [found["step"] for found in read_lines(tmp_path)] == [1, 2]


def test_steps_out_of_order_are_dropped_where_an_attempt_repeats_them(tmp_path: Path) -> None:
    lines = [line(1), line(4), line(3), line(2, "b"), line(5, "b"), line(3, "c")]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert [found["step"] for found in read_metrics(tmp_path)] == [1, 2, 3]
