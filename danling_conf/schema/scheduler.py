"""Learning-rate schedule: by shape, any of torch, or a class of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Optional

from danling_conf.schema.setting import setting


@dataclass(kw_only=True)
class SchedulerConfig:
    """A schedule by shape (`constant`, `linear`, `cosine`, `wsd`), any scheduler of `torch.optim.lr_scheduler` with its
    options beside these keys (`scheduler.step_size=10`), or a class of your own."""

    read_by: ClassVar[str] = "danling_conf.components.scheduler"
    open_to: ClassVar[str] = "scheduler options"

    type: str = "constant"
    """`constant`, `linear`, `cosine`, `wsd` (warm-up, stable, decay), `plateau`, the name of a class in
    `torch.optim.lr_scheduler`, in any case, or the dotted path of your own class. One that needs `total_steps` is given
    how often it advances in the run."""
    interval: Optional[str] = setting(None, choices=("step", "epoch"), aliases={"validation": "epoch"})
    """Advance per `step`, or per `epoch` (step mode: per validation). Unset: per step, unless the scheduler is driven
    by a metric."""
    monitor: Optional[str] = None
    """Metric that drives a metric-driven scheduler, as `split.metric`: `val.loss`. Unset: the run's score."""
    warmup_steps: Optional[int] = setting(None, at_least=0)
    """Steps of linear warm-up from 0, for a schedule by shape. Unset: 0."""
    decay_steps: Optional[int] = setting(None, at_least=1)
    """Last steps over which `wsd` decays. Unset: a fifth of the run."""
    final_lr_ratio: Optional[float] = setting(None, at_least=0)
    """Learning rate at the end of a schedule by shape, as a share of `optim.lr`. Unset: 0."""

    _target_: str = "danling_conf.components.scheduler.from_keywords"
    _recursive_: bool = False
