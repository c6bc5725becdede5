"""Metrics as JSON lines in the run's own directory: always there, read by every command that shows a run."""

from __future__ import annotations

import json
import os
import time
from typing import IO, Any

from danling_conf.records.metrics import STATUS, metrics_file
from danling_conf.records.metrics_index import IndexWriter
from danling_conf.runner.observe.trackers.tracker import Record, RunFacts
from danling_conf.schema.files import TEXTS, no_links


class JsonLines:
    """Appends a line a record to `metrics.jsonl`, see `records.metrics`; and a line a text to `texts.jsonl`."""

    name = "the run's metrics file"

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._attempt = ""
        self._place = {"step": 0, "epoch": 0}

    def start(self, facts: RunFacts) -> None:
        path = metrics_file(facts.attempt.run_directory)
        self._attempt, self._check_token = facts.attempt.directory.name, facts.attempt.check_token
        self._texts = facts.attempt.run_directory / TEXTS
        torn = _ends_within_a_line(path)
        # Without a buffer: what a full disk did not take would be written, and fail, again when the file is closed.
        self._file = open(path, "ab", buffering=0, opener=no_links)  # noqa: SIM115  open for as long as the run lasts
        if torn:
            self._file.write(b"\n")
        self._index = IndexWriter(facts.attempt.run_directory, self._attempt)

    def begin(self, step: int, epoch: int, at: float) -> None:
        """Mark where the attempt starts."""
        self._write({"time": at, "attempt": self._attempt, "step": step, "epoch": epoch})

    def log(self, record: Record) -> None:
        place = {"time": record.time, "attempt": self._attempt, "step": record.step, "epoch": record.epoch}
        if record.scalars or not record.texts:
            self._write({**place, **record.scalars})
        if record.texts:
            self._check_token()
            with open(self._texts, "a", opener=no_links) as file:
                for name, text in record.texts.items():
                    file.write(json.dumps({**place, "name": name, "text": text}) + "\n")

    def finish(self, status: str, score: float | None) -> None:
        if self._file is not None:
            self._write({"time": time.time(), "attempt": self._attempt, **self._place, STATUS: status})
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        self._check_token()
        self._place = {"step": line["step"], "epoch": line["epoch"]}
        text = json.dumps(line, allow_nan=False).encode() + b"\n"
        self._file.write(text)
        self._index.add(text, os.fstat(self._file.fileno()).st_size, line)


def _ends_within_a_line(path: str | os.PathLike[str]) -> bool:
    """Whether a process was killed while it wrote the last line."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            if file.tell() == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False
