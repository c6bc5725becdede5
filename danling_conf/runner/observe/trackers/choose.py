"""The trackers of a run, as its configuration says."""

from __future__ import annotations

import time
from collections.abc import Callable

from danling_conf.runner.observe.trackers.guarded import Guarded
from danling_conf.runner.observe.trackers.json_lines import JsonLines
from danling_conf.runner.observe.trackers.terminal import Terminal
from danling_conf.runner.observe.trackers.tracker import Record, RunFacts, Tracker
from danling_conf.runner.progress import Progress
from danling_conf.schema import RunnerConfig


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
    """All of them on the main process, and on another rank its log alone. None can stop training."""

    def __init__(self, config: RunnerConfig, progress: Progress, *, main: bool) -> None:
        say: Callable[[str], None] = lambda text: progress.line(f"warning: {text}")  # noqa: E731
        self._lines = JsonLines()
        self._file = Guarded(self._lines, say, background=False)
        self._all = [Guarded(Terminal(progress), say, background=False)]
        if main:
            self._all += [self._file, *(Guarded(tracker, say, background=True) for tracker in chosen(config))]

    def start(self, facts: RunFacts, epoch: int) -> None:
        """Open them."""
        for tracker in self._all:
            tracker.start(facts)
        if self._file in self._all:
            self._file.call(lambda: self._lines.begin(facts.step, epoch, time.time()))

    def log(self, record: Record) -> None:
        """Give each the record."""
        for tracker in self._all:
            tracker.log(record)

    def finish(self, status: str, score: float | None) -> None:
        """Close them."""
        for tracker in self._all:
            tracker.finish(status, score)
