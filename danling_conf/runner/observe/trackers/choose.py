"""Trackers of a run, as its configuration chooses them."""

from __future__ import annotations

import time
from collections.abc import Callable

from danling_conf.runner.display import Display
from danling_conf.runner.observe.trackers.guarded import Guarded
from danling_conf.runner.observe.trackers.json_lines import JsonLines
from danling_conf.runner.observe.trackers.tracker import EVALUATION, TRAINING, Record, RunFacts, Tracker
from danling_conf.schema import RunnerConfig


class Terminal:
    """Shows records on the run's display, which logs them too."""

    name = "the terminal"

    def __init__(self, display: Display) -> None:
        self.display = display

    def start(self, facts: RunFacts) -> None:
        pass

    def log(self, record: Record) -> None:
        values = record.scalars
        if record.kind == TRAINING:
            self.display.step(
                values.get("train.loss"),
                values["train.lr"] or 0.0,
                values.get("train.expert_load"),
                values.get("train.mfu"),
            )
        elif record.kind == EVALUATION:
            self.display.results(record.finite(), record.note)

    def finish(self, status: str, score: float | None) -> None:
        pass


def chosen(config: RunnerConfig) -> list[Tracker]:
    """The trackers beside the terminal and the run's own file. What one needs is imported only when it is chosen."""
    found: list[Tracker] = []
    if config.tensorboard:
        from danling_conf.runner.observe.trackers.tensorboard import TensorBoard

        found.append(TensorBoard())
    if config.wandb.enabled:
        from danling_conf.runner.observe.trackers.wandb import Wandb

        found.append(Wandb(config.wandb))
    if config.mlflow.enabled:
        from danling_conf.runner.observe.trackers.mlflow import Mlflow

        found.append(Mlflow(config.mlflow))
    return found


class Trackers:
    """All trackers on the main process; on another rank its log alone. None can stop training."""

    def __init__(self, config: RunnerConfig, display: Display, *, main: bool) -> None:
        say: Callable[[str], None] = lambda text: display.line(f"warning: {text}")  # noqa: E731
        self._lines = JsonLines()
        self._file = Guarded(self._lines, say, background=False)
        self._all = [Guarded(Terminal(display), say, background=False)]
        if main:
            self._all += [self._file, *(Guarded(tracker, say, background=True) for tracker in chosen(config))]

    def start(self, facts: RunFacts, epoch: int) -> None:
        """Open them."""
        for tracker in self._all:
            tracker.start(facts)
        if self._file in self._all:
            self._file.call(lambda: self._lines.begin(facts.step, epoch, time.time()))

    def log(self, record: Record) -> None:
        """Pass the record to each."""
        for tracker in self._all:
            tracker.log(record)

    def finish(self, status: str, score: float | None, *, step: int, epoch: int) -> None:
        """Close them. The run has come to a step and an epoch."""
        self._lines.reached(step, epoch)
        for tracker in self._all:
            tracker.finish(status, score)
