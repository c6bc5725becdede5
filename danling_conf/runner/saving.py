"""What a run saves and when it goes on or leaves: its own state to and from checkpoints, exports, signals."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danling_conf.checkpoint.background import SaveFailed
from danling_conf.components import dataloader as loaders
from danling_conf.components.samplers import ShardedSampler, seed_of
from danling_conf.config.identity import plain
from danling_conf.records.stopped import Stopped
from danling_conf.runner import seeds
from danling_conf.runner.cadence import optimizer_steps
from danling_conf.runner.conclusion import go_on_command, shown
from danling_conf.runner.restoring import Restored, load_pretrained, restore

if TYPE_CHECKING:
    from danling_conf.runner.training import Runner

_log = logging.getLogger(__name__)
_FAILING_SECONDS = 60.0
"""How long a run that fails waits for a save that is under way, where no limit is set."""


def save(runner: Runner, *, history: bool, best: bool = False) -> None:
    """Save the run as it is. Collective. Raises SaveFailed."""
    shared = {
        "settings": plain(runner.config),
        "scheduler": runner.schedule.state_dict(),
        "scaler": None if runner._scaler is None else runner._scaler.state_dict(),
        "runner": {
            "global_step": runner.global_step,
            "epoch": runner.epoch,
            "results": runner.results,
            "epoch_step": runner._epoch_step,
            "evaluated_at": runner._evaluated_at,
            "score": runner.score.state_dict(),
        },
    }
    own = {
        "loader": None if runner._between_epochs or runner._epoch_ends else runner.loaders["train"].state_dict(),
        # A loader whose end was seen would begin another epoch with its state.
        "exhausted": runner._epoch_ends,
        "generators": seeds.generator_state(runner.device),
    }
    runner.progress.activity("saving")
    runner.checkpoints.save(
        parts=runner.parts, optimizer=runner.optimizer, shared=shared, own=own, step=runner.global_step,
        epoch=runner.epoch, between_epochs=runner._between_epochs and runner.cadence.epochs is not None,
        history=history, best=best,
    )  # fmt: skip
    runner.progress.activity(None)
    runner._saved_at = runner.global_step


def save_at_the_end(runner: Runner, *, better: bool) -> None:
    """Save what is still due when the run is complete, and wait until it is written. Raises SaveFailed."""
    section = runner.config.checkpoint
    if not runner.checkpoints.enabled:
        return
    if not section.last_save_model_only and (better or runner._saved_at != runner.global_step):
        save(runner, history=False, best=better)
    if section.last_save_model_only or section.export_dtype is not None:
        runner.progress.activity("exporting")
        final = runner.checkpoints.export(
            parts=runner.parts, optimizer=runner.optimizer, step=runner.global_step, epoch=runner.epoch
        )
        best = ", the best so far" if better and section.last_save_model_only else ""
        runner.progress.line(f"the model of step {runner.global_step}{best}, is in {shown(final)}")
    runner.progress.activity("saving")
    runner.checkpoints.drain()
    runner.progress.activity(None)


def watch(runner: Runner) -> None:
    """Between two steps: fail where a save has failed; save and leave where a signal asked for it.

    Raises:
        SaveFailed: a save in the background failed.
        Stopped: a rank has got a signal.
    """
    runner.checkpoints.check()
    number = runner.stop_request.agreed()
    if not number or runner._done():  # a run that is complete ends as such
        return
    stopped = Stopped(number)
    if runner.checkpoints.enabled:
        if runner._saved_at != runner.global_step:
            save(runner, history=False)
        runner.checkpoints.drain()
    runner.progress.stop()
    outcome = f"saved at step {runner.global_step}" if runner.checkpoints.enabled else "nothing is saved"
    runner.progress.line(f"{stopped}; {outcome}")
    if runner.checkpoints.enabled:
        runner.progress.line(f"to go on: {go_on_command(runner.world.attempt, runner.world.ranks)}")
    raise stopped


def leave(runner: Runner) -> None:
    """Give back what saving and signals hold. A save that is under way is waited for, also when the run fails."""
    failing = sys.exc_info()[0] not in (None, Stopped)
    try:
        if failing and runner.config.checkpoint.wait_timeout is None:
            runner.checkpoints.drain(_FAILING_SECONDS)
        else:
            runner.checkpoints.drain()
    except SaveFailed as error:
        if not failing:
            raise
        _log.warning("%s", error)  # the run fails by something else, which is what is shown
    finally:
        runner.stop_request.remove(failing=failing)
        runner.checkpoints.close()


def go_on(runner: Runner) -> None:
    """Load what the attempt goes on from. Collective. Raises ConfigRefused."""
    attempt, config = runner.world.attempt, runner.config
    for name in runner.checkpoints.unfinished:
        runner._notes.append(f"{name} was not finished when the attempt before this one ended, and is removed")
    if attempt.restore is not None:
        outcome = restore(
            runner.checkpoints,
            attempt,
            settings=plain(config),
            parts=runner.parts,
            optimizer=runner.optimizer,
            by_user=config.resume is not None and _path(config.resume) == attempt.restore,
        )
        if isinstance(outcome, Restored):
            _load_state(runner, outcome)
            return
        runner._notes.append(outcome)
    if config.pretrained is not None:
        source = Path(config.pretrained).expanduser()
        runner._notes.append(load_pretrained(runner.checkpoints, source, runner.parts))


def _path(given: str) -> Path:
    return Path(given).expanduser().absolute()


def start_epoch(runner: Runner, loader: Any) -> dict[str, Any] | None:
    """Give a loader its place in the epoch that the run was resumed in; what is left to restore once it iterates."""
    own, runner._resumed = runner._resumed, None
    if own is None:
        return None
    if own.get("loader") is not None:
        loaders.go_on(loader, own["loader"], data_degree=own["data_degree"])
    elif not own.get("exhausted"):
        runner._epoch_step = 0
    return own


def restore_generators(runner: Runner, own: dict[str, Any]) -> None:
    """The generators of the rank; under another number of data ranks new ones, which repeat nothing."""
    if "generators" in own and own["data_degree"] == runner.world.data_degree:
        seeds.restore_generators(own["generators"], runner.device)
    else:
        seeds.seed_rank(seed_of(runner.world.attempt.seed, 0, runner.global_step), runner.world.stream)


def _load_state(runner: Runner, restored: Restored) -> None:
    shared, own = restored.shared, dict(restored.own)
    state = shared.get("runner", {})
    runner.global_step, runner.epoch = state.get("global_step", 0), state.get("epoch", 0)
    runner.results = dict(state.get("results", {}))
    runner._evaluated_at, runner._saved_at = dict(state.get("evaluated_at", {})), runner.global_step
    runner._epoch_step = state.get("epoch_step", 0)
    if "score" in state:
        runner.score.load_state_dict(state["score"])
    if restored.same_schedule and "scheduler" in shared:
        runner.schedule.load_state_dict(shared["scheduler"])
    if runner._scaler is not None and shared.get("scaler") is not None:
        runner._scaler.load_state_dict(shared["scaler"])
    own["data_degree"] = restored.data_degree
    train = runner.loaders["train"]
    if restored.data_degree != runner.world.data_degree and own.get("loader") is not None:
        if not isinstance(train.sampler, ShardedSampler):
            raise ValueError(
                "parallel: the training data is iterable and deals itself out, and its place is known for "
                f"{restored.data_degree} data ranks only: resume with as many, or exclude dataloaders "
                "(checkpoint.exclude_from_loading), which begins the epoch anew"
            )
        runner._epoch_step = _steps_before(runner, train, own)
    runner._resumed = own
    runner._notes += restored.notes


def _steps_before(runner: Runner, loader: Any, own: dict[str, Any]) -> int:
    """Optimizer steps of the epoch that lie behind, counted back from its end as this run will come to it."""
    size = loader.batch_size or 1
    taken = loaders.taken_by_all(own["loader"], batch_size=size, data_degree=own["data_degree"])
    left = loader.sampler.left(taken) // size
    return max(0, (runner.cadence.steps_per_epoch or 0) - optimizer_steps(runner.config, left))
