"""Saving a run: what a checkpoint holds of it, at the end of the run, and when a signal stops it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from danling_conf.checkpoint.background import SaveFailed
from danling_conf.checkpoint.manager import CheckpointManager
from danling_conf.config.identity import plain
from danling_conf.records.stopped import Stopped
from danling_conf.runner import process
from danling_conf.runner.callbacks import Callbacks
from danling_conf.runner.conclusion import resume_stopped_command, shown
from danling_conf.runner.display import Display
from danling_conf.runner.leading import Lead
from danling_conf.runner.observe.observers import Observers
from danling_conf.runner.observe.stopwatch import CHECKPOINT
from danling_conf.runner.setup import Setup
from danling_conf.runner.signals import StopRequest
from danling_conf.runner.state import EXHAUSTED, TrainState
from danling_conf.runner.world import World
from danling_conf.schema import RunnerConfig

_log = logging.getLogger(__name__)
_FAILING_SECONDS = 60.0
"""How long a run that fails waits for a save that is under way, where no limit is set."""


class RunSaver:
    """Collects the state of a run and passes it to the checkpoint manager.

    Args:
        state: read; its `saved_at` is set.
        checkpoints: writes what this collects.
        observers: refuse to save after a step that was not finite.
        callbacks: their state is saved as well.
        lead: whether this process's replica group writes the checkpoints of several.
    """

    def __init__(
        self,
        config: RunnerConfig,
        world: World,
        state: TrainState,
        setup: Setup,
        checkpoints: CheckpointManager,
        display: Display,
        observers: Observers,
        callbacks: Callbacks,
        lead: Lead,
    ) -> None:
        self.config, self.world, self.state, self.setup = config, world, state, setup
        self.checkpoints, self.display, self.observers = checkpoints, display, observers
        self.callbacks, self.lead = callbacks, lead

    def save_run(self, *, history: bool, best: bool) -> None:
        """Save the run as it is, unless its last step was not finite. Collective.

        Args:
            history: whether the checkpoint is kept when a later one takes its names.
            best: whether it is the best so far.

        Raises:
            NotFinite: the loss or a gradient was not finite, and `nonfinite=fail`.
            SaveFailed: it could not be written, or the one before it could not.
        """
        self.observers.check()
        with self.observers.stopwatch.apart(CHECKPOINT):
            self._save(history=history, best=best)

    def save_at_the_end(self, *, better: bool) -> None:
        """Save what is still due when the run is complete, and wait until it is written. Raises SaveFailed."""
        section, state = self.config.checkpoint, self.state
        if not self.checkpoints.enabled:
            return
        if not section.last_save_model_only and (better or state.saved_at != state.step):
            self._save(history=False, best=better)
        if section.last_save_model_only or section.export_dtype is not None:
            self.display.activity("exporting")
            final = self._export()
            best = ", the best so far" if better and section.last_save_model_only else ""
            self.display.line(f"the model of step {state.step}{best}, is in {shown(final)}")
        self.display.activity("saving")
        self.checkpoints.drain()
        self.display.activity(None)

    def stop(self, number: int) -> None:
        """Save and leave, as signal `number` asked for. Collective. Raises Stopped, or SaveFailed."""
        stopped = Stopped(number)
        self.save_for_later()
        self.display.stop()
        outcome = f"saved at step {self.state.step}" if self.checkpoints.enabled else "nothing is saved"
        self.display.line(f"{stopped}; {outcome}")
        if self.checkpoints.enabled:
            self.display.line(f"to resume: {resume_stopped_command(self.world.attempt, self.world.ranks)}")
        raise stopped

    def save_for_later(self) -> None:
        """Save what is not saved yet, and wait until it is written. Collective. Raises SaveFailed."""
        if self.checkpoints.enabled:
            self.lead.agree()
            if self.state.saved_at != self.state.step:
                self._save(history=False, best=False)
            self.checkpoints.drain()

    def close(self, stop_request: StopRequest) -> None:
        """Release what saving and signals hold. A save that is under way is waited for, also when the run fails."""
        # While an exception unwinds the stack, it is the one that `sys` knows of.
        failing = sys.exc_info()[0] not in (None, Stopped)
        try:
            if failing and self.config.checkpoint.wait_timeout is None:
                self.checkpoints.drain(_FAILING_SECONDS)
            else:
                self.checkpoints.drain()
        except SaveFailed as error:
            if not failing:
                raise
            _log.warning("%s", error)  # the run fails by something else, which is what is shown
        finally:
            stop_request.remove(failing=failing)
            self.checkpoints.close()

    def _export(self) -> Path:
        if self.callbacks.export_start is not None:
            self.callbacks.export_start()
        try:
            with self.setup.whole() as (parts, optimizer):
                return self.checkpoints.export(
                    parts=parts, optimizer=optimizer, step=self.state.step, epoch=self.state.epoch
                )
        finally:
            if self.callbacks.export_end is not None:
                self.callbacks.export_end()

    def _save(self, *, history: bool, best: bool) -> None:
        state, setup = self.state, self.setup
        between = state.between_epochs and setup.cadence.epochs is not None
        if not self.lead.held:
            # The step is not saved by that: the group that leads may die before it has written it.
            self.checkpoints.save_place(self._own(), step=state.step, epoch=state.epoch, between_epochs=between)
            return
        if self.callbacks.save is not None:
            self.callbacks.save()
        shared = {
            "settings": plain(self.config),
            "scheduler": setup.schedule.state_dict(),
            "scaler": None if setup.scaler is None else setup.scaler.state_dict(),
            "runner": {**state.state_dict(), "score": setup.score.state_dict()},
            "callbacks": self.callbacks.state_dict(),
        }
        self.display.activity("saving")
        with setup.whole() as (parts, optimizer):
            self.checkpoints.save(
                parts=parts,
                optimizer=optimizer,
                shared=shared,
                own=self._own(),
                step=state.step,
                epoch=state.epoch,
                between_epochs=between,
                history=history,
                best=best,
                extra=self.callbacks.tensors(),
            )
        self.display.activity(None)
        state.saved_at = state.step

    def _own(self) -> dict[str, Any]:
        """This rank's own state."""
        state = self.state
        # A loader whose end was seen would start another epoch with its state.
        loader = EXHAUSTED if state.epoch_ends else self.setup.loaders["train"].state_dict()
        if state.loader_before is not None:  # the groups have refused the step, whose batches are still to be used
            loader = state.loader_before
        return {
            "loader": None if state.between_epochs else loader,
            "generators": process.generator_state(self.world.device),
        }
