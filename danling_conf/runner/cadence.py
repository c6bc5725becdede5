"""Cadence of a run: its budget, and the steps at which it logs, evaluates and saves."""

from __future__ import annotations

from dataclasses import dataclass

from danling_conf.schema import RunnerConfig
from danling_conf.topology.violation import SettingError

_EVALUATIONS = 10
_LOG_LINES = 50
_SAVES = 10


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """The run's length and intervals, all in optimizer steps; None for never by steps."""

    steps: int | None
    """Step at which the run ends; None when epochs without a known length decide."""
    epochs: int | None
    """Epoch at which the run ends; None in step mode."""
    steps_per_epoch: int | None
    """Optimizer steps of an epoch; None for data without a length."""
    evaluate_every: int | None
    """Steps between evaluations; None in epoch mode."""
    evaluate_epochs: int
    """Epochs between evaluations; used in epoch mode."""
    save_every: int | None
    """Steps between checkpoints; None in epoch mode, and for a run that is too short for any but the last."""
    save_epochs: int | None
    """Epochs between them, in epoch mode."""
    keeps_history: bool
    """Whether these checkpoints are kept: where an interval was set."""
    log_every: int
    """Steps between log lines."""

    def scheduler_advances(self, interval: str) -> int | None:
        """How often a scheduler with this interval advances in the run; None when that is not known."""
        if interval == "step":
            return self.steps
        if self.epochs is not None:
            return self.epochs
        if self.steps is None or self.evaluate_every is None:
            return None
        return -(-self.steps // self.evaluate_every)


def cadence_of(config: RunnerConfig, batches_per_epoch: int | None) -> Cadence:
    """The cadence of a run.

    Args:
        batches_per_epoch: micro-batches that a rank sees in an epoch of training; None when unknown.

    Raises:
        SettingError: an epoch has fewer micro-batches than one optimizer step takes.
    """
    per_epoch = None if batches_per_epoch is None else optimizer_steps(config, batches_per_epoch)
    if per_epoch == 0:
        raise SettingError(
            "accum_steps",
            config.accum_steps,
            f"an epoch has {batches_per_epoch} micro-batches, which is not one optimizer step",
            f"choose at most {batches_per_epoch}, or a smaller dataloader.batch_size",
        )
    by_epoch = config.epochs is not None
    steps = config.steps
    if config.epochs is not None:
        steps = None if per_epoch is None else config.epochs * per_epoch
    interval = config.checkpoint.interval
    return Cadence(
        steps=steps,
        epochs=config.epochs,
        steps_per_epoch=per_epoch,
        evaluate_every=None if by_epoch else config.eval_interval or max(1, (config.steps or 1) // _EVALUATIONS),
        evaluate_epochs=config.eval_interval or 1,
        save_every=None if by_epoch else interval or _default_save_steps(config.steps or 1),
        save_epochs=(interval or _default_save_epochs(config.epochs or 1, per_epoch)) if by_epoch else None,
        keeps_history=interval is not None,
        log_every=config.log_interval or max(1, (steps or per_epoch or _LOG_LINES) // _LOG_LINES),
    )


def optimizer_steps(config: RunnerConfig, micro_batches: int) -> int:
    """Optimizer steps that so many micro-batches up to the end of an epoch make."""
    whole, rest = divmod(micro_batches, config.accum_steps)
    return whole + (rest > 0 and config.accum_remainder == "step")


def _default_save_steps(steps: int) -> int | None:
    """Steps between checkpoints where no interval is set: ten a run, and never one at each step."""
    every = steps // _SAVES
    return every if every > 1 else None


def _default_save_epochs(epochs: int, steps_per_epoch: int | None) -> int | None:
    """Epochs between checkpoints where no interval is set: at most ten a run, and never one at each step."""
    every = max(1, epochs // _SAVES)
    return every if steps_per_epoch is None or every * steps_per_epoch > 1 else None


def next_multiple(step: int, *intervals: int | None) -> int | None:
    """The first step after `step` that is a multiple of any interval."""
    return min((step - step % interval + interval for interval in intervals if interval), default=None)
