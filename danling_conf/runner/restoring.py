"""Going on: from this run's own checkpoint exactly, from another run's as far as the settings are the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from danling_conf.checkpoint.manager import CheckpointManager, NothingSaved
from danling_conf.resolution.frozen import code_of, earlier_code
from danling_conf.resolution.identity import differences
from danling_conf.resolution.run_directory import Attempt
from danling_conf.topology.violation import ConfigRefused, Violation


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a checkpoint gave."""

    shared: dict[str, Any]
    """State that is the same on all ranks; the model's and the optimizer's are loaded already."""
    own: dict[str, Any]
    """This rank's loader and generators."""
    same_schedule: bool
    """Whether the scheduler's state belongs to this run's schedule."""
    notes: list[str]


def restore(
    checkpoints: CheckpointManager,
    attempt: Attempt,
    *,
    settings: Mapping[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    by_user: bool,
) -> Restored | str:
    """Load what the attempt goes on from.

    A checkpoint of another run gives weights and the optimizer's state; the options of the optimizer's groups are this
    configuration's, and a schedule that differs starts anew.

    Args:
        settings: the plain configuration.
        by_user: whether the checkpoint was named (`resume`), not found (`auto_resume`).

    Returns:
        What was restored; or, where nothing was saved yet and the choice was ours, why not.

    Raises:
        ConfigRefused: the checkpoint is missing, broken, or does not fit. On all ranks.
    """
    source = attempt.restore
    if source is None:
        raise ValueError("this attempt starts afresh: there is nothing to restore")
    foreign = not source.is_relative_to(attempt.run_directory)
    mine = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    key = "resume" if by_user else "auto_resume"
    try:
        shared, own = checkpoints.restore(source, model=model, optimizer=optimizer)
    except NothingSaved as error:
        if by_user:
            raise unusable(checkpoints, key, source, error) from error
        return f"nothing to resume yet: {error}"
    except ValueError as error:
        # Starting anew would overwrite what an older checkpoint may still save.
        raise unusable(checkpoints, key, source, error) from error
    notes = [f"resumed at step {shared['runner']['global_step']} from {source}"]
    same_schedule = True
    if foreign:
        for group, options in zip(optimizer.param_groups, mine, strict=True):
            group.update(options)
        changed = differences(dict(settings), shared["settings"])
        same_schedule = not any(path.startswith(("scheduler.", "optim.")) for path in changed)
        if not same_schedule:
            notes.append("the learning-rate schedule starts anew: its settings or the optimizer's differ")
    else:
        before, now = earlier_code(attempt), code_of(attempt)
        if before not in (None, now):
            notes.append(f"the attempt before this one ran other code: {before}, and this one runs {now}")
    return Restored(shared=shared, own=own, same_schedule=same_schedule, notes=notes)


def load_pretrained(checkpoints: CheckpointManager, source: Path, model: nn.Module) -> str:
    """Load a checkpoint's weights, and nothing else; gives a note for the user. Raises ConfigRefused."""
    try:
        checkpoints.load_weights(source, model)
    except ValueError as error:
        raise unusable(checkpoints, "pretrained", source, error) from error
    return f"weights from {source}"


def unusable(checkpoints: CheckpointManager, key: str, source: Path, error: ValueError) -> ConfigRefused:
    """The refusal of a checkpoint that cannot be loaded."""
    others = checkpoints.history(source)
    fix = f"choose another checkpoint, such as {others[0]}" if others else "choose another run or checkpoint"
    value: Any = str(source)
    if key == "auto_resume":
        value = True
        fix = f"resume={others[0]}, or auto_resume=false" if others else "auto_resume=false starts another run"
    return ConfigRefused([Violation(key, value, str(error), fix)])
