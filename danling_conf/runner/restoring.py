"""Going on: from this run's own checkpoint exactly, from another run's as far as the settings are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from danling_conf.checkpoint.folder import others
from danling_conf.checkpoint.loading import LayoutDiffers, NothingSaved
from danling_conf.checkpoint.manager import CheckpointManager
from danling_conf.config.identity import differences
from danling_conf.records.frozen import code_of, earlier_code
from danling_conf.records.run_directory import Attempt
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a checkpoint gave."""

    shared: dict[str, Any]
    """State that is the same on all ranks, without what was excluded; the model's and the optimizer's are loaded."""
    own: dict[str, Any]
    """This rank's loader and generators, without what was excluded."""
    same_schedule: bool
    """Whether the scheduler's state belongs to this run's schedule."""
    data_degree: int
    """How many data ranks there were."""
    notes: list[str]


def restore(
    checkpoints: CheckpointManager,
    attempt: Attempt,
    *,
    settings: Mapping[str, Any],
    parts: Sequence[nn.Module],
    optimizer: Optimizer,
    by_user: bool,
) -> Restored | str:
    """Load what the attempt goes on from.

    Where the settings of optimizer or schedule are others than those that the checkpoint was made with, it gives
    weights and the optimizer's state; the options of the optimizer's groups are this configuration's, and the schedule
    starts anew.

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
    mine = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    key = "resume" if by_user else "auto_resume"
    try:
        loaded = checkpoints.restore(source, parts=parts, optimizer=optimizer, choose=not by_user)
    except NothingSaved as error:
        if by_user:
            raise unusable(checkpoints, key, source, error) from error
        return f"nothing to resume yet: {error}"
    except LayoutDiffers as error:
        fix = "choose its layout, or parallel.allow_degree_change=true"
        raise ConfigRefused([Violation("parallel", ABSENT, str(error), fix)]) from error
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        # Starting anew would overwrite what an older checkpoint may still save.
        raise unusable(checkpoints, key, source, error) from error
    notes = [*loaded.notes, f"resumed at step {loaded.facts.step} from {loaded.path}"]
    changed = differences(dict(settings), loaded.shared["settings"])
    same_schedule = not any(path.startswith(("scheduler.", "optim.")) for path in changed)
    if not same_schedule:
        for group, options in zip(optimizer.param_groups, mine, strict=True):
            group.update(options)
        notes.append("the learning-rate schedule starts anew: its settings or the optimizer's differ")
    if loaded.facts.made_under != checkpoints.layout:
        notes.append(f"written under {loaded.facts.layout}, and going on under {checkpoints.layout_name}")
    if source.is_relative_to(attempt.run_directory):
        before, now = earlier_code(attempt), code_of(attempt)
        if before not in (None, now):
            notes.append(f"the attempt before this one ran other code: {before}, and this one runs {now}")
    return Restored(
        shared=loaded.shared,
        own=loaded.own,
        same_schedule=same_schedule,
        data_degree=loaded.facts.made_under.data_degree,
        notes=notes,
    )


def load_pretrained(checkpoints: CheckpointManager, source: Path, parts: Sequence[nn.Module]) -> str:
    """Load weights, and nothing else, from a checkpoint, an export or safetensors; gives a note for the user.

    Raises ConfigRefused.
    """
    try:
        checkpoints.load_weights(source, parts)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise unusable(checkpoints, "pretrained", source, error) from error
    return f"weights from {source}"


def unusable(checkpoints: CheckpointManager, key: str, source: Path, error: Exception) -> ConfigRefused:
    """The refusal of a checkpoint that cannot be loaded."""
    found = others(source, checkpoints.section.dir_name) if source.is_dir() else []
    fix = f"choose another checkpoint, such as {found[0]}" if found else "choose another run or checkpoint"
    value: Any = str(source)
    if isinstance(error, ImportError):
        fix = "pip install safetensors"
    elif key == "auto_resume":
        value = True
        fix = f"resume={found[0]}, or auto_resume=false" if found else "auto_resume=false starts another run"
    elif "do not fit the model" in str(error):
        fix += ", or checkpoint.exclude_from_loading=[model.NAME] leaves a part of it as it is"
    return ConfigRefused([Violation(key, value, str(error), fix)])
