"""What happens between optimizer steps: log lines, evaluation, the schedule by epochs, checkpoints, collection."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from danling_conf.parallel import process_group
from danling_conf.runner import garbage_collection, saving
from danling_conf.runner.cadence import next_multiple
from danling_conf.runner.data import evaluated_splits
from danling_conf.runner.observe.stopwatch import CHECKPOINT, EVALUATION

if TYPE_CHECKING:
    from danling_conf.runner.training import Runner


def next_event(runner: Runner) -> int:
    """The next step after which there is something to do."""
    step, cadence = runner.global_step, runner.cadence
    # The step after the start is an event as well: compilation is over, limits tighten, clocks start.
    if step < runner._first_step:
        return runner._first_step
    due = next_multiple(step, cadence.evaluate_every, cadence.save_every, runner.config.gc.interval)
    log = runner.observers.pace.next
    return log if due is None else min(due, log)


def after_step(runner: Runner) -> None:
    """Do what is due after an optimizer step. Collective."""
    step, cadence, observers, interval = runner.global_step, runner.cadence, runner.observers, runner.config.gc.interval
    if step == runner._first_step:
        process_group.tighten(runner.config.comm)
        runner.progress.activity(None)
        runner.progress.restart_clock()
        observers.first_step(step)
    if interval and step % interval == 0:
        garbage_collection.collect(runner.config.gc)
    if step == observers.pace.next and observers.pace.due(step):
        observers.log_line(runner)
    due = cadence.save_every is not None and step % cadence.save_every == 0
    better = False
    if cadence.evaluate_every is not None and step % cadence.evaluate_every == 0:
        better = evaluate(runner, final=False)
        runner.schedule.after_epoch(runner.results)
    # Last, so that who goes on from it finds everything that this step did.
    if due or better:
        save(runner, history=due and cadence.keeps_history, best=better)
    runner._next_event = next_event(runner)


def after_epoch(runner: Runner) -> None:
    """Do what is due after an epoch, in epoch mode. Collective."""
    cadence = runner.cadence
    if cadence.epochs is None:
        return
    evaluated = runner.epoch % cadence.evaluate_epochs == 0
    better = evaluated and evaluate(runner, final=False)
    runner.schedule.after_epoch(runner.results, evaluated=evaluated)
    due = cadence.save_epochs is not None and runner.epoch % cadence.save_epochs == 0
    if due or better:
        save(runner, history=due and cadence.keeps_history, best=better)


def save(runner: Runner, *, history: bool, best: bool) -> None:
    """Save a state that may be saved. Collective."""
    runner.observers.check(runner)
    with runner.observers.stopwatch.apart(CHECKPOINT):
        saving.save(runner, history=history, best=best)


def evaluate(runner: Runner, *, final: bool) -> bool:
    """Evaluate what was not evaluated at this step, and take the score from it; says whether it is the best.
    Collective."""
    began, step = time.perf_counter(), runner.global_step
    runner.observers.check(runner)
    due = evaluated_splits(runner.loaders, runner.score.split, final=final)
    splits = [split for split in due if runner._evaluated_at.get(split) != step]
    mean = runner._meter.mean()
    if mean is not None:  # None where a log line has just taken it
        runner.results["train.loss"] = mean
    found: dict[str, float] = {}
    with runner.observers.stopwatch.apart(EVALUATION):
        for split in splits:
            found |= runner.evaluate(split)
            runner._evaluated_at[split] = step
    runner.results |= found
    runner.progress.pause_clock(time.perf_counter() - began)
    better = False
    if runner.score.key in found or _scored_by_training(runner):
        better = runner.score.update(runner.results, step)
    if found:
        runner.observers.evaluated(runner, found, "best so far" if better else "")
    if runner.score.exhausted and not final and not runner._done():
        runner._stopped = True
        runner.progress.line(f"early stop: {runner.score.key} has not improved for {runner.score.patience} evaluations")
    return better


def _scored_by_training(runner: Runner) -> bool:
    """Whether the score is the training loss, and not yet taken at this step."""
    if runner.score.key != "train.loss" or runner._evaluated_at.get("train") == runner.global_step:
        return False
    runner._evaluated_at["train"] = runner.global_step
    return "train.loss" in runner.results
