"""Learning-rate schedules: by shape, any of `torch.optim.lr_scheduler`, or a class of the user's."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from danling_conf._torch_private.attributes import scheduled_rates
from danling_conf.components.instantiate import section_from
from danling_conf.components.optimizer import construct, import_class
from danling_conf.schema.scheduler import SchedulerConfig
from danling_conf.schema.torch_options import (
    SCHEDULERS,
    Entry,
    find_scheduler,
    nearest,
    option_problems,
    scheduler_options,
)
from danling_conf.topology.rules.optimizers import violations_of
from danling_conf.topology.violation import SettingError, refuse

_RUN_LENGTH_OPTIONS = {
    "CosineAnnealingLR": "T_max",
    "LinearLR": "total_iters",
    "PolynomialLR": "total_iters",
    "OneCycleLR": "total_steps",
}
_LENGTH = "total_steps"
_LENGTH_STATE = frozenset({*_RUN_LENGTH_OPTIONS.values(), "_schedule_phases"})


def make(
    optimizer: Optimizer, section: SchedulerConfig, total_steps: int, *, metric_mode: str | None = None
) -> LRScheduler | ReduceLROnPlateau | None:
    """Build the scheduler; None where the learning rate is constant from the first step.

    Args:
        total_steps: how often the scheduler will advance in the whole run: optimizer steps, or epochs (validations),
            see `interval_of`. `warmup_steps` and `decay_steps` count in the same unit.
        metric_mode: whether the metric of `ReduceLROnPlateau` should fall (`min`) or rise (`max`), where the section
            does not say by `mode`.

    Raises:
        SettingError: an unknown scheduler or option, a path in `scheduler.type` that does not name a scheduler class, a
            run too short for its warm-up and decay, or an option that torch refuses; ConfigRefused where several are
            wrong.
    """
    entry = _entry(section)
    options = scheduler_options(section)
    refuse(violations_of(option_problems(entry, options), "scheduler"))
    if entry.shape:
        return _by_shape(optimizer, entry.name, section, total_steps)
    if entry.own_class:
        kind = import_class(entry.name, "scheduler.type", (LRScheduler, ReduceLROnPlateau))
        if _asks_length(kind, options):
            options = {**options, _LENGTH: total_steps}
        # Options of shapes are declared settings; a class of the user's may have some by the same names.
        return construct(kind, (optimizer,), options, "scheduler")
    kind = getattr(lr_scheduler, entry.name)
    return construct(kind, (optimizer,), _filled(entry, options, optimizer, total_steps, metric_mode), "scheduler")


def from_keywords(**keywords: Any) -> functools.partial[LRScheduler | ReduceLROnPlateau | None]:
    """The section's `_target_`: a partial of `make` that waits for `optimizer` and, by keyword, `total_steps`."""
    return functools.partial(make, section=section_from(SchedulerConfig, keywords, path="scheduler"))


def is_metric_driven(section: SchedulerConfig) -> bool:
    """Whether the scheduler steps on a metric: `scheduler.step(value)`. A class of the user's own does when it is a
    `ReduceLROnPlateau`, or when `scheduler.monitor` is set."""
    entry = _entry(section)
    if not entry.own_class:
        return entry.metric_driven
    if section.monitor is not None:
        return True
    kind = import_class(entry.name, "scheduler.type", (LRScheduler, ReduceLROnPlateau))
    return issubclass(kind, ReduceLROnPlateau)


def interval_of(section: SchedulerConfig) -> str:
    """When the scheduler advances: `step`, or `epoch` (in step mode: validation), as a metric-driven one does."""
    if section.interval is not None:
        return section.interval
    return "epoch" if is_metric_driven(section) else "step"


def needs_length(section: SchedulerConfig) -> bool:
    """Whether the schedule depends on how long the run is."""
    entry = _entry(section)
    if entry.shape:
        return entry.name != "constant"
    if entry.own_class:
        kind = import_class(entry.name, "scheduler.type", (LRScheduler, ReduceLROnPlateau))
        return _asks_length(kind, scheduler_options(section))
    length = _RUN_LENGTH_OPTIONS.get(entry.name)
    return length is not None and length not in scheduler_options(section)


def resume(scheduler: LRScheduler | ReduceLROnPlateau, state: Mapping[str, Any], *, rates: bool = False) -> None:
    """Load a scheduler's saved state, but for the length of the run that saved it: this one may be longer. The learning
    rate becomes what the schedule of this run has at that point.

    Args:
        rates: whether the optimizer is a new one. A schedule that multiplies the rate by a factor (`StepLR`) would go
            on from the initial one.
    """
    own = {name: getattr(scheduler, name) for name in _LENGTH_STATE if name in state}
    longer = any(state[name] != value for name, value in own.items())
    scheduler.load_state_dict({**state, **own})
    if isinstance(scheduler, LambdaLR):
        now = [
            base * at(scheduler.last_epoch) for base, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
    elif longer:
        now = list(scheduled_rates(scheduler))
    elif rates:
        now = list(scheduler.get_last_lr())
    else:
        return
    for group, rate in zip(scheduler.optimizer.param_groups, now, strict=True):
        group["lr"] = rate


def ratio(step: int, *, shape: str, total_steps: int, warmup_steps: int, decay_steps: int, final_ratio: float) -> float:
    """The share of the base learning rate that update number `step` (from 0) is made with.

    Linear warm-up rises from 0, which is not used itself, to 1 at `step == warmup_steps`; the shape reaches
    `final_ratio` at `step == total_steps` and stays there. `wsd` (warm-up, stable, decay; S. Hu et al.,
    https://arxiv.org/abs/2404.06395) is flat until its last `decay_steps`, over which it falls linearly.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if shape == "constant":
        return 1.0
    start = total_steps - decay_steps if shape == "wsd" else warmup_steps
    if step < start:
        return 1.0
    progress = min(1.0, (step - start) / (total_steps - start)) if total_steps > start else 1.0
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if shape == "cosine" else 1 - progress
    return final_ratio + (1 - final_ratio) * remaining


def _asks_length(kind: type, options: Mapping[str, Any]) -> bool:
    """Whether a class of the user's must be given the run's length (`total_steps`), and the options do not."""
    parameter = inspect.signature(kind).parameters.get(_LENGTH)
    return parameter is not None and parameter.default is parameter.empty and _LENGTH not in options


def _entry(section: SchedulerConfig) -> Entry:
    entry = find_scheduler(section.type)
    if entry is None:
        fix = nearest(section.type, [*SCHEDULERS, "plateau"])
        raise SettingError("scheduler.type", section.type, "there is no such scheduler", fix)
    return entry


def _by_shape(optimizer: Optimizer, shape: str, section: SchedulerConfig, total_steps: int) -> LambdaLR | None:
    warmup = section.warmup_steps or 0
    if warmup > total_steps:
        raise SettingError(
            "scheduler.warmup_steps",
            warmup,
            f"the scheduler advances {total_steps} times in the run",
            f"shorten the warm-up to at most {total_steps}, or train longer",
        )
    if shape == "constant" and warmup == 0:
        return None
    decay = section.decay_steps
    if decay is None:
        decay = min(max(1, total_steps // 5), total_steps - warmup)
    elif warmup + decay > total_steps:
        raise SettingError(
            "scheduler.decay_steps",
            decay,
            f"with {warmup} steps of warm-up it is longer than the run, in which the scheduler advances {total_steps} "
            f"times",
            "shorten one of them, or train longer",
        )
    final = 0.0 if section.final_lr_ratio is None else float(section.final_lr_ratio)
    lengths = {"total_steps": total_steps, "warmup_steps": warmup, "decay_steps": decay}

    # A plain function: LambdaLR saves the attributes of any other callable, and loading them would bring back the
    # length of the run that was saved, where a longer one is allowed.
    def at(step: int) -> float:
        return ratio(step, shape=shape, final_ratio=final, **lengths)

    return LambdaLR(optimizer, at)


def _filled(
    entry: Entry, options: dict[str, Any], optimizer: Optimizer, total_steps: int, metric_mode: str | None
) -> dict[str, Any]:
    """The options with what may be left out: the length of the run, the peak learning rate, a metric's direction."""
    filled = dict(options)
    length = _RUN_LENGTH_OPTIONS.get(entry.name)
    # OneCycleLR may be given its length as epochs x steps_per_epoch instead.
    if length is not None and not {"epochs", "steps_per_epoch"}.intersection(options):
        filled.setdefault(length, total_steps)
    if entry.name == "OneCycleLR":
        filled.setdefault("max_lr", [group["lr"] for group in optimizer.param_groups])
    if entry.metric_driven and metric_mode is not None:
        filled.setdefault("mode", metric_mode)
    return filled
