"""State of a training run: how far it is, and what it has measured.

The loop owns it and hands it to whatever saves, resumes or watches the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from danling_conf.runner.observe.meters import LossMeter

EXHAUSTED: dict[str, Any] = {"exhausted": True}
"""In a checkpoint the state of a loader whose epoch has no further batch, although it is not over."""


@dataclass
class TrainState:
    """How far a run is. The first five fields are saved; the others start anew with each attempt."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epochs done."""
    epoch_step: int = 0
    """Optimizer steps done in the epoch under way."""
    results: dict[str, float] = field(default_factory=dict)
    """The newest value of every metric, by `split.name`."""
    evaluated_at: dict[str, int] = field(default_factory=dict)
    """The step at which each split was evaluated last."""

    saved_at: int = -1
    """The step that was saved last; -1 for none."""
    micro_batches: int = 0
    """Micro-batches done of the optimizer step under way."""
    epoch_ends: bool = False
    """Whether the micro-batch under way is known to be the last of its epoch."""
    loader_before: dict[str, Any] | None = None
    """With replica groups: the training loader's state where the step began that is under way, or refused. None where
    the loader itself is there."""
    step_failed: bool = False
    """Whether a step raised, and none was started since."""
    between_epochs: bool = True
    """Whether no epoch is under way."""
    first_step: int = 1
    """The first optimizer step of this attempt."""
    stopped_early: bool = False
    """Whether the score has stopped improving."""
    interrupted: bool = False
    """Whether this attempt left because a signal asked it to."""
    training_loss: LossMeter = field(default_factory=LossMeter)
    """The loss since the last log line."""

    @property
    def past_first_step(self) -> bool:
        """Whether this attempt has done a step: compilation and other slow starts are over."""
        return self.step >= self.first_step

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it; plain values only."""
        return {
            "global_step": self.step,
            "epoch": self.epoch,
            "results": self.results,
            "epoch_step": self.epoch_step,
            "evaluated_at": self.evaluated_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state. A key that is missing was excluded from loading and starts anew."""
        self.step, self.epoch = state.get("global_step", 0), state.get("epoch", 0)
        self.epoch_step = state.get("epoch_step", 0)
        self.results = dict(state.get("results", {}))
        self.evaluated_at = dict(state.get("evaluated_at", {}))
        self.saved_at = self.step
