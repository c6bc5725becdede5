"""The index of a run's metrics: it says what the lines say, is never believed where they differ, and spares parsing."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from danling_conf.records import metrics, metrics_index
from danling_conf.records.history import MOST_INTERVALS, goodput, read_history
from danling_conf.records.metrics import PRODUCTIVE, metrics_file
from danling_conf.records.metrics_index import IndexWriter
from danling_conf.schema.files import METRICS_INDEX
from danling_conf.sweep.rows import smaller_is_better


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_index, "LINES", 16)
    monkeypatch.setattr(metrics_index, "FEWEST", 4)


@dataclass
class Run:
    """A run whose file is written as the runner writes it."""

    path: Path
    draw: random.Random = field(default_factory=lambda: random.Random(3))
    time: float = 1e9

    def __post_init__(self) -> None:
        self.path.mkdir(exist_ok=True)

    def attempt(self, name: str, first: int, lines: int, *, marked: bool = True, torn: bool = False) -> None:
        index, step, base = IndexWriter(self.path, name), first, {"attempt": name, "epoch": 1}
        with open(metrics_file(self.path), "ab", buffering=0) as file:
            for number in range(lines):
                self.time += self.draw.random()
                line: dict[str, Any] = {"time": self.time, **base, "step": step}
                if number or not marked:
                    line |= {"train.loss": self.draw.random(), PRODUCTIVE: self.draw.random(), "x": None}
                if self.draw.random() < 0.1:
                    line["val.loss"] = self.draw.random() - 0.5
                text = json.dumps(line).encode() + b"\n"
                file.write(text)
                index.add(text, os.fstat(file.fileno()).st_size)
                step += self.draw.random() < 0.9  # else the step is measured again
            if torn:
                file.write(b'{"time": 1, "att')
                file.write(b"\n")
        self.time += 100


def said(run: Path) -> dict[str, Any]:
    """What a page says of a run."""
    history = read_history(run)
    return {
        "curves": {key: (curve.least, curve.most, curve.last) for key, curve in history.curves.items()},
        "measured": history.measured,
        "attempts": {name: vars(span) for name, span in history.attempts.items()},
        "goodput": history.goodput and pytest.approx(history.goodput, rel=1e-12),
    }


def without_index(run: Path) -> dict[str, Any]:
    index = run / METRICS_INDEX
    kept = index.rename(run / "kept") if index.exists() else None
    found = said(run)
    if kept is not None:
        kept.rename(index)
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = Run(tmp_path / "run")
    made.attempt("a", 0, 300, torn=True)
    made.attempt("b", 100, 90)  # b resumes within a, and c within both
    made.attempt("c", 130, 5)
    made.attempt("d", 128, 200, marked=False)
    return made.path


def parsed_lines(run: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    parsed: list[bytes] = []
    at_once = metrics._at_once
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "_at_once", lambda given: parsed.extend(given) or at_once(given))
        read_history(run)
    return len(parsed)


def test_it_says_what_the_lines_say_and_spares_parsing_them(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(run) == without_index(run)
    assert goodput(run) == read_history(run).goodput
    # Parsed are the ends of attempts, and stretches of which some lines count.
    assert parsed_lines(run, monkeypatch) < 595 / 5
    monkeypatch.setattr(metrics_index, "FEWEST", 1000)
    assert parsed_lines(run, monkeypatch) == 596


def test_a_curve_of_stretches_has_its_extremes_and_is_spread_evenly(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.attempt("a", 0, 20 * MOST_INTERVALS)
    curve = read_history(run.path).curves["train.loss"]
    assert MOST_INTERVALS <= len(curve.points) <= 2 * MOST_INTERVALS + 1
    gaps = [after[0] - before[0] for before, after in zip(curve.points, curve.points[1:], strict=False)]
    assert max(gaps) <= 4 * 32
    assert abs(curve.median - 0.5) < 0.1


def test_whether_a_smaller_score_is_better_is_read_from_it(run: Path) -> None:
    curve = read_history(run).curves["val.loss"]
    config = {"score_mode": None, "score_name": "other"}
    assert not smaller_is_better(config, run, curve.least[1])
    text = metrics_file(run).read_text().replace("val.loss", "val.other")
    metrics_file(run).write_text(text)  # no stretch fits any more
    assert smaller_is_better(config, run, curve.least[1])
    assert not smaller_is_better(config, run, curve.most)


def edit_metrics(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda run: (metrics_file(run).write_bytes(change(metrics_file(run).read_bytes())), None)[1]


def edit_index(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        lines = (run / METRICS_INDEX).read_bytes().splitlines(keepends=True)
        (run / METRICS_INDEX).write_bytes(b"".join(change(lines)))

    return edit


def foreign(run: Path) -> None:
    other = Run(run.parent / "other", random.Random(4))
    other.attempt("a", 0, 300)
    shutil.copy(other.path / METRICS_INDEX, run / METRICS_INDEX)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(run: Path) -> None:
        (run / METRICS_INDEX).unlink()
        make(run / METRICS_INDEX)

    return replace


def shift(line: bytes) -> bytes:
    """An entry with other numbers, and the checksum that it had."""
    return line.replace(b"0.1", b"9.1")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "metrics cut within a line": edit_metrics(lambda content: content[: len(content) // 2]),
    "metrics cut, and written anew": edit_metrics(lambda content: content[:9999] + b"\n" + content[-9000:]),
    "a digit of metrics edited": edit_metrics(lambda content: content.replace(b"0.5", b"0.6")),
    "a line of metrics removed": edit_metrics(lambda content: content.replace(content.splitlines(True)[20], b"")),
    "a newline of metrics lost": edit_metrics(lambda content: content.replace(b"}\n", b"} ", 16)[:-1]),
    "metrics in another order": edit_metrics(lambda content: b"".join(sorted(content.splitlines(True)))),
    "no metrics": lambda run: metrics_file(run).unlink(),
    "index of another run": foreign,
    "numbers of the index edited": edit_index(lambda lines: [shift(line) for line in lines]),
    "index cut within a line": edit_index(lambda lines: [*lines[:10], lines[10][:99]]),
    "index twice": edit_index(lambda lines: lines * 2),
    "index backwards": edit_index(lambda lines: lines[::-1]),
    "index without newlines": edit_index(lambda lines: [line[:-1] for line in lines]),
    "index of zeros": edit_index(lambda lines: [b"00000000 \n"] * 10),
    "index of another format": edit_index(lambda lines: [b"\xff\xfe\x00" + line for line in lines]),
    "index missing": replaced(lambda path: None),
    "index empty": replaced(Path.touch),
    "index a folder": replaced(Path.mkdir),
    "index a FIFO": replaced(os.mkfifo),
    "index a link to itself": replaced(lambda path: path.symlink_to(path)),
    "index endless": replaced(lambda path: path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_it_is_not_believed_where_the_lines_say_something_else(run: Path, kind: str) -> None:
    DAMAGE[kind](run)
    assert said(run) == without_index(run)
    # A later attempt writes on beside it, whatever stands there.
    before = len(read_history(run).attempts)
    Run(run, time=2e9).attempt("e", 128, 100)
    assert said(run) == without_index(run)
    assert len(read_history(run).attempts) == before + 1


def test_lines_of_another_process_between_those_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, index = tmp_path, IndexWriter(tmp_path, "a")
    with open(metrics_file(run), "ab", buffering=0) as file:
        for step in range(200):
            for name in ("a", "b")[: 1 + (step % 40 == 39)]:
                line = {"time": 1e9 + step, "attempt": name, "step": step, "epoch": 0, "train.loss": step % 7}
                text = json.dumps(line).encode() + b"\n"
                file.write(text)
                if name == "a":
                    index.add(text, os.fstat(file.fileno()).st_size)
    assert said(run) == without_index(run)
    assert parsed_lines(run, monkeypatch) < 100
