"""Metrics as lines on the terminal and in the log."""

from __future__ import annotations

from danling_conf.runner.observe.trackers.tracker import EVALUATION, TRAINING, Record, RunFacts
from danling_conf.runner.progress import Progress


class Terminal:
    """Shows records by the run's progress display."""

    name = "the terminal"

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def start(self, facts: RunFacts) -> None:
        pass

    def log(self, record: Record) -> None:
        values = record.scalars
        if record.kind == TRAINING:
            self.progress.step(
                values.get("train.loss"), values["train.lr"] or 0.0, values.get("train.expert_load"),
                values.get("train.mfu"),
            )  # fmt: skip
        elif record.kind == EVALUATION:
            self.progress.results(record.finite(), record.note)

    def finish(self, status: str, score: float | None) -> None:
        pass
