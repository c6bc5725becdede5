"""Learning-rate schedule of a run: by step, by epoch (in step mode: by validation), or by a metric."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from danling_conf.components import scheduler
from danling_conf.runner.cadence import Cadence
from danling_conf.runner.score import Score, infer_mode
from danling_conf.schema.scheduler import SchedulerConfig
from danling_conf.topology.violation import SettingError


class Schedule:
    """A scheduler and when it advances.

    Args:
        section: `scheduler` of the configuration.
        measured: names of what evaluations during training measure, as `split.name`.
        metrics: metric objects by name, which say whether larger is better.

    Attributes:
        scheduler: torch's; None for a constant learning rate.

    Raises:
        SettingError: a monitored metric that nothing measures, or a schedule of unknown length.
    """

    def __init__(
        self,
        section: SchedulerConfig,
        optimizer: Optimizer,
        cadence: Cadence,
        *,
        score: Score,
        measured: Iterable[str],
        metrics: Mapping[str, Any],
    ) -> None:
        interval = scheduler.interval_of(section)
        self._metric_driven = scheduler.is_metric_driven(section)
        self._monitor = section.monitor or score.key
        mode = score.mode
        if self._metric_driven:
            if interval == "step":
                raise SettingError(
                    "scheduler.interval",
                    "step",
                    f"{section.type} advances when its metric is evaluated",
                    "scheduler.interval=epoch",
                )
            known = list(dict.fromkeys([score.key, *measured, "train.loss"]))
            if self._monitor not in known:
                raise SettingError(
                    "scheduler.monitor",
                    self._monitor,
                    "no evaluation during training measures it",
                    f"choose one of {', '.join(known)}",
                )
            if self._monitor != score.key:
                mode = infer_mode(None, self._monitor.partition(".")[2], metrics, path="scheduler.mode")
        advances = cadence.scheduler_advances(interval)
        if advances is None and scheduler.needs_length(section):
            raise SettingError(
                "scheduler.type",
                section.type,
                "the run's length is not known, since its data has none and epochs count it",
                "set steps, or scheduler=constant",
            )
        self.scheduler = scheduler.make(optimizer, section, advances or sys.maxsize, metric_mode=mode)
        self.by_step: Any = self.scheduler if interval == "step" else None
        """What advances with each optimizer step; None where nothing does."""
        self._by_epoch: Any = self.scheduler if interval == "epoch" else None

    def after_epoch(self, results: Mapping[str, float], *, evaluated: bool = True) -> None:
        """Advance what advances by epoch; by a metric only where it was measured anew."""
        if self._by_epoch is None:
            return
        if not self._metric_driven:
            self._by_epoch.step()
        elif evaluated:
            self._by_epoch.step(results[self._monitor])

    def state_dict(self) -> dict[str, Any] | None:
        return None if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None, *, rates: bool = False) -> None:
        """Load a saved schedule; None for one that had no state.

        Args:
            rates: set the optimizer's learning rates as well, which were not loaded with it.
        """
        if self.scheduler is not None and state is not None:
            scheduler.resume(self.scheduler, state, rates=rates)
