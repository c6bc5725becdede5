"""Training loop, from top to bottom: the batches of an epoch, forward and backward, the optimizer's update, and then
what is due: log, evaluate, schedule, save, stop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from danling_conf.components import dataloader as loaders
from danling_conf.components import gradients
from danling_conf.components.batch import to_device
from danling_conf.components.samplers import ShardedSampler
from danling_conf.parallel import process_group
from danling_conf.parallel.deepspeed import ZeroEngine
from danling_conf.parallel.replica_groups import NoQuorum
from danling_conf.parallel.waiting import marks, waiting
from danling_conf.records.membership import Event
from danling_conf.runner import process
from danling_conf.runner.cadence import next_multiple
from danling_conf.runner.callbacks import Callbacks
from danling_conf.runner.conclusion import conclusion
from danling_conf.runner.data import evaluated_splits, no_batch, same_number_on_all_ranks
from danling_conf.runner.display import Display
from danling_conf.runner.evaluation import measure
from danling_conf.runner.leading import Lead
from danling_conf.runner.observe import collective_timeout, out_of_memory
from danling_conf.runner.observe.nonfinite import SKIP
from danling_conf.runner.observe.observers import Observers
from danling_conf.runner.observe.stopwatch import EVALUATION, FAULT
from danling_conf.runner.replicas import Replicas, TooFewGroups
from danling_conf.runner.resuming import Resumption
from danling_conf.runner.saving import RunSaver
from danling_conf.runner.setup import Setup
from danling_conf.runner.signals import END_REQUESTED, StopRequest
from danling_conf.runner.state import TrainState
from danling_conf.runner.world import World
from danling_conf.schema import RunnerConfig
from danling_conf.topology.violation import ConfigRefused

_END = object()
"""Behind the last batch of an epoch."""
_PASSES, _GRADIENTS = "forward and backward", "the gradients"
"""What a step may wait for other ranks in."""

Report = Callable[["nn.Module | None", Mapping[str, float]], list[str]]
"""Returns lines to print at the end, from the model and the results."""


class Loop:
    """Trains what was set up. Methods are in the order in which a run comes to them.

    Args:
        state: how far the run is; the loop moves it on.
        saver, resumption, observers, display: what saves, resumes, watches and shows the run.
        callbacks: called at the points that `Callback` names.
        lead: whether this process's replica group writes what one of several does.
        replicas: agrees with the other replica groups; None without.
        stop_request: knows of signals.
        report: called at the end.
    """

    def __init__(
        self,
        config: RunnerConfig,
        world: World,
        state: TrainState,
        setup: Setup,
        *,
        saver: RunSaver,
        resumption: Resumption,
        observers: Observers,
        display: Display,
        stop_request: StopRequest,
        callbacks: Callbacks,
        report: Report | None,
        lead: Lead,
        replicas: Replicas | None = None,
    ) -> None:
        self.config, self.world, self.state, self.setup = config, world, state, setup
        self.saver, self.resumption, self.observers, self.display = saver, resumption, observers, display
        self.stop_request, self.callbacks, self.report = stop_request, callbacks, report
        self.lead, self.replicas = lead, replicas
        self._accum_steps = config.accum_steps
        # What does not change in a run is looked up once: a step that has little to compute would notice.
        self._waits = marks()
        self._zero, self._optimizer = setup.zero, setup.optimizer
        self._clears_itself = getattr(setup.optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad
        """Whether the optimizer has a way of its own to drop gradients."""
        self._measures = config.max_grad_norm is not None or observers.nonfinite.measures_gradients
        self._skips = observers.nonfinite.mode == SKIP
        self._whole_steps = self._accum_steps == 1 and replicas is None
        """Whether each micro-batch is an optimizer step of its own, which no one can refuse."""
        advancing = (setup.schedule.by_step, observers.profiler)
        self._after_each = [each.step for each in advancing if each is not None]
        if replicas is not None:
            self._after_each.append(replicas.after_step)
        # Before what is due after the step, so that it is evaluated and saved with what callbacks did.
        if callbacks.step_end is not None:
            self._after_each.append(callbacks.step_end)
        """Called after each optimizer step."""
        self._saves, self._signals = saver.checkpoints.background, replicas or stop_request
        self._refused = False
        """Whether the groups have refused the last step, which is then repeated."""
        # The step after the start is an event as well: compilation is over, limits tighten, clocks start.
        self._next_event = state.first_step
        """The next step after which something is due."""
        self._remainder_shown = False
        self._step_batches: list[Any] = []
        """Of the step under way, for the case that the groups refuse it."""
        self._step_began = time.perf_counter()
        self._met = False
        """Whether the group has met the others for the step that comes."""
        self._behind = False
        """Whether the group has caught up in the middle of an epoch, which it then enters anew."""

    def batches(self, split: str = "train") -> Iterator[Any]:
        """Batches of this rank, on its device. Of the training split: epoch after epoch, until the budget is used up or
        the score stops improving; of any other: one pass.
        """
        loader = self.setup.loaders[split]
        if not loaders.is_training(split):
            yield from (to_device(batch, self.world.device) for batch in loader)
            return
        self.display.start()
        try:
            if self.config.evaluate_first and self.state.step == 0 and self.state.between_epochs:
                self._evaluate_first()
            self.display.activity("compiling the first step" if self.config.compile.enable else None)
            while not self._done():
                yield from self._epoch(loader)
        except RuntimeError as error:
            self.display.stop()
            self._explain(error)
            raise
        except BaseException:  # of the loop around this generator as well, when it is closed
            self.display.stop()
            raise

    def _evaluate_first(self) -> None:
        """Evaluate before the first step. Training goes on as if this had not been done. Collective."""
        began, generators = time.perf_counter(), process.generator_state(self.world.device)
        found: dict[str, float] = {}
        for split in evaluated_splits(self.setup.loaders, self.setup.score.split, final=False):
            found |= self.evaluate(split)
        process.restore_generators(generators, self.world.device)
        self.display.pause_clock(time.perf_counter() - began)
        if found:
            self.observers.evaluated(found, "before the first step")

    def _done(self) -> bool:
        """Whether the budget is used up, or the score has stopped improving."""
        if self.state.stopped_early:
            return True
        if self.setup.cadence.epochs is not None:
            return self.state.epoch >= self.setup.cadence.epochs
        return self.state.step >= self._last_step

    @property
    def _last_step(self) -> float:
        """The step at which the budget is used up; infinity where epochs count it."""
        return math.inf if self.setup.cadence.epochs is not None else self.setup.cadence.steps or 0

    def _epoch(self, loader: Any) -> Iterator[Any]:
        """The batches of an epoch, or of what is left of the one that the run resumes in."""
        state, resumption = self.state, self.resumption
        self._behind, self._step_batches = False, []
        loaders.set_epoch(loader, state.epoch)
        resumed = resumption.enter_epoch(loader)
        self.observers.known_epoch = resumed is None or resumed.data_degree == self.world.data_degree
        source = iter(()) if resumed is not None and resumed.exhausted else iter(loader)
        batches = same_number_on_all_ranks(loader, source, uneven=self._show_uneven)
        clock = self.observers.stopwatch
        if resumed is not None:
            # After the iterator is made: a sampler or a worker's seed may draw from the generators.
            resumption.restore_generators(resumed)
        # With accum_remainder=drop, what is left of an epoch and makes no whole optimizer step is not used.
        limit = self.setup.cadence.steps_per_epoch if self.config.accum_steps > 1 else None
        empty, move = state.between_epochs and resumed is None, self.world.device.type != "cpu"
        state.between_epochs = False
        self._mark_place(loader, ended=resumed is not None and resumed.exhausted)
        if self._caught_up():
            return
        ahead, following, last, replicas = False, _END, self._last_step, self.replicas
        # Whether a batch is the last shows by the one behind it.
        looks_ahead = self.config.accum_remainder == "step" and self.config.accum_steps > 1
        while True:
            if not ahead:
                began = time.perf_counter()
                following = next(batches, _END)
                clock.data += time.perf_counter() - began
            if following is _END:
                break
            if limit is not None and state.epoch_step >= limit:
                self._show_remainder()
                break
            batch, empty = following, False
            if looks_ahead:
                # After the last micro-batch of a step a checkpoint may be made, which must not find the loader ahead;
                # but there is nothing to know there either.
                ahead = state.micro_batches + 1 < self.config.accum_steps
                if ahead:
                    began = time.perf_counter()
                    following = next(batches, _END)
                    clock.data += time.perf_counter() - began
                    state.epoch_ends = following is _END
            if move:
                batch = to_device(batch, self.world.device)
            if replicas is None:
                yield batch
            else:
                yield from self._delivered(batch)
            state.epoch_ends = False
            if state.step >= last or state.stopped_early:
                return
            if replicas is not None:
                if self._behind:
                    return
                if not ahead:
                    self._mark_place(loader)
                    if self._caught_up():
                        return
        if empty:
            raise ConfigRefused([no_batch("train").violation])
        if state.micro_batches:
            self._drop_step()
            self._show_remainder()
        state.epoch += 1
        state.epoch_step = 0
        state.between_epochs, state.loader_before = True, None
        self._after_epoch()

    def _delivered(self, batch: Any) -> Iterator[Any]:
        """With replica groups: a batch; and, for as long as they refuse the step that it completes, the step's batches
        again."""
        self._step_batches.append(batch)
        ends = self.state.epoch_ends
        yield batch
        while self._refused:
            self._refused = False
            if self._caught_up():
                self._behind = True
                break
            for number, each in enumerate(self._step_batches, 1):
                self.state.epoch_ends = ends and number == len(self._step_batches)
                yield each
        if self.state.micro_batches == 0:
            self._step_batches = []

    def _mark_place(self, loader: Any, *, ended: bool = False) -> None:
        """Remember where the step begins that comes, in case that the groups refuse it."""
        if self.replicas is not None and not self.state.micro_batches and not ended:
            self.state.loader_before = loader.state_dict()

    def _caught_up(self) -> bool:
        """Before a step, meet the other replica groups. Returns whether this one was behind, and continues at another
        place of the data. Collective in the group."""
        if self.replicas is None or self.state.micro_batches:
            return False
        if self._met:  # it has caught up, and enters the epoch anew: the others are in the step already
            self._met = False
            return False
        try:
            with self.observers.stopwatch.apart(FAULT):
                behind = self.replicas.begin()
            self._step_began = time.perf_counter()
            if not behind:
                return False
        except NoQuorum as error:
            self._leave(error)
        self._continue_elsewhere()
        if isinstance(self.setup.loaders["train"].sampler, ShardedSampler):
            self.resumption.catch_up(self.replicas.taken)
            self._met = True
            return True
        self.resumption.seed_anew()  # otherwise when it enters the epoch
        return False

    def _continue_elsewhere(self) -> None:
        """The state is another group's: clocks, and what is due, start from its step."""
        self.state.first_step = max(self.state.first_step, self.state.step + 1)
        self._next_event = self.state.step + 1
        self.observers.jumped()
        self.display.line(f"caught up with the other replica groups at step {self.state.step}")

    def _leave(self, error: NoQuorum) -> NoReturn:
        """Save, and leave a run of which there are too few replica groups. Collective in the group."""
        if self.stop_request.number:
            self.state.interrupted = True
            self.saver.stop(self.stop_request.number)
        section, step = self.config.ft, self.state.step
        self.saver.save_for_later()
        saved = f"saved at step {step}" if self.saver.checkpoints.enabled and self.lead.held else f"at step {step}"
        waited = f"for {section.quorum_timeout_seconds} s (ft.quorum_timeout_seconds)"
        text = f"fewer than {section.min_replica_size} of {section.group_size} replica groups, or no lighthouse, "
        self.lead.note(Event.SHORT, step=step, why=str(error).partition("\n")[0])
        raise TooFewGroups(f"{text}{waited}; {saved}") from error

    def step(self, batch: Any) -> Tensor:
        """Forward and backward of one micro-batch and, at the last of `accum_steps`, an optimizer step with all that is
        due after it. Collective.

        Returns:
            The micro-batch's mean loss, detached and not waited for; in a pipeline, NaN on the ranks that do not hold
            the last stage.

        An exception in forward, loss or backward may be caught and survived where all ranks raise it alike (a batch
        that does not fit is skipped): the optimizer step under way is dropped with all of its micro-batches, and the
        next batch starts another. Not so in a pipeline, whose other stages wait.

        Raises:
            NotFinite: the loss or a gradient was not finite, and `nonfinite=fail`.
            SaveFailed: a checkpoint could not be written.
            Stopped: a signal asked the run to stop.
        """
        state, count = self.state, self._accum_steps
        if state.step_failed:
            self._recover()
        state.micro_batches += 1
        last = state.micro_batches == count or state.epoch_ends
        if state.micro_batches == 1:
            if state.step + 1 == state.first_step:
                self.setup.utilisation.count(batch)
            if self.callbacks.step_start is not None:
                self.callbacks.step_start()
        try:
            # Not the backward pass alone: a model that is sharded or cut into stages communicates in its forward too.
            self._waits.append(_PASSES)
            try:
                loss = self.setup.passes.train(batch, micro_batches=count, last=last)
            except BaseException:
                state.step_failed, state.micro_batches = True, 0
                raise
            finally:
                self._waits.pop()
            total = state.training_loss.append(loss, last=last, whole=self._whole_steps)
            if not (isinstance(total, float) and math.isfinite(total)):
                self.observers.micro_batch(total, state.epoch_step * count + state.micro_batches - 1)
            if last:
                rescale, state.micro_batches = count / state.micro_batches, 0
                if not self._update(rescale):
                    self._refused = True
                    self.observers.stopwatch.lost(time.perf_counter() - self._step_began)
                    self._drop_step()
                    return loss.mean
                # Not in a function of its own: after a pass through a model none of this code is in the processor's
                # cache, and each function that a step calls costs about a microsecond.
                state.loader_before = None
                state.step += 1
                state.epoch_step += 1
                self.observers.last_step_time = time.time()
                for do in self._after_each:
                    do()
                if state.step >= self._next_event:
                    self._after_step()
                if self._saves.failure is not None:
                    self.saver.checkpoints.check()
                asked = self._signals.signal_on_any_rank()
                if asked and not self._done():  # a run that is complete ends as such
                    self._stop(asked)
        except RuntimeError as error:
            self._explain(error)
            raise
        return loss.mean

    def _recover(self) -> None:
        """After an exception that the user's loop has survived, start the optimizer step anew. Not before: most
        exceptions end the run, and what they have left (a collective that timed out) may not be touched again."""
        self._drop_step()
        self.observers.known_epoch = False  # steps do not count the batches of this epoch any more

    def _drop_step(self) -> None:
        """Leave out the optimizer step under way, with what its micro-batches have left."""
        self.state.micro_batches, self.state.step_failed = 0, False
        self.setup.passes.forget()
        self.state.training_loss.drop()
        self.observers.nonfinite.drop()

    def _show_remainder(self) -> None:
        if not self._remainder_shown:
            self._remainder_shown = True
            self.display.line(
                "micro-batches at the end of an epoch that are fewer than accum_steps are left out; "
                "accum_remainder=step makes an optimizer step of them"
            )

    def _show_uneven(self) -> None:
        self.display.line(
            f"epoch {self.state.epoch + 1}: some ranks have more training batches than others, which are left out"
        )

    def _update(self, rescale: float) -> bool:
        """The optimizer's step, with clipping, loss scaling and the learning rate of the next one.

        Args:
            rescale: of gradients, in a step of fewer micro-batches than `accum_steps`.

        Returns:
            Whether the step counts; False where the replica groups have refused it.
        """
        setup, optimizer = self.setup, self._optimizer
        if self._zero is not None:
            self._update_by(self._zero, rescale)
            return True
        self._waits.append(_GRADIENTS)
        try:
            counted = None
            if setup.passes.completes or rescale != 1.0:
                counted = setup.passes.finish(setup.parameters, rescale=rescale)
            # Before anything looks at the gradients: until the vote, they may be garbage.
            if self.replicas is not None and not self._agreed(self.replicas, counted):
                return False
            if not self._whole_steps:
                self.state.training_loss.commit()
            hook = self.callbacks.before_optimizer_step
            if setup.scaler is not None and (self._measures or hook is not None):
                setup.scaler.unscale_(optimizer)
            if hook is not None:
                hook()
            if self._measures:
                limit = self.config.max_grad_norm or math.inf
                norm = gradients.clip(setup.parameters, limit, pipeline=setup.pipeline_group)
                self.observers.norm(norm, expected=setup.scaler is not None)
            skipped = self._skips and self.observers.nonfinite.skips()
        finally:
            self._waits.pop()
        if skipped:
            pass
        elif setup.scaler is None:
            (setup.compiled_update or optimizer.step)()
        else:
            setup.scaler.step(optimizer)
            setup.scaler.update()
        if self._clears_itself:
            optimizer.zero_grad()
        else:  # the same, without a mark for torch's profiler, which takes more than the rest
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        return True

    def _update_by(self, zero: ZeroEngine, rescale: float) -> None:
        """The same by ZeRO, which clips and steps at once, and leaves out a step whose gradients are not finite."""
        nonfinite = self.observers.nonfinite
        with waiting(_GRADIENTS):
            self.setup.passes.finish(self.setup.parameters, rescale=rescale)
            if not self._whole_steps:
                self.state.training_loss.commit()
            if nonfinite.skips():
                zero.forget()
            else:
                applied = zero.step()
                if not applied or self.config.max_grad_norm is not None or nonfinite.measures_gradients:
                    self.observers.norm(zero.norm, expected=False)
                nonfinite.drop()  # the norm is that of this step, which is decided

    def _agreed(self, replicas: Replicas, counted: Tensor | None) -> bool:
        """Whether the step under way counts, also with the other replica groups."""
        try:
            if not replicas.agree(counted):
                return False
        except NoQuorum as error:
            self._leave(error)
        # Not finite in any group: all of them leave the step out, or none.
        self.observers.group_loss(self.state.training_loss.step_sums(self.world.device)[0])
        return True

    def _after_step(self) -> None:
        """Do what is due after an optimizer step: log, evaluate, schedule, save. Collective."""
        state, cadence, section = self.state, self.setup.cadence, self.config.gc
        self.lead.agree()
        if state.step == state.first_step:
            self._after_first_step()
        if section.interval and state.step % section.interval == 0:
            process.collect(section)
        if self.observers.pace.due(state.step):
            if self.callbacks.log is not None:
                self.callbacks.log()
            self.observers.log_line()
        better = False
        if cadence.evaluate_every is not None and state.step % cadence.evaluate_every == 0:
            better = self._evaluate_due_splits(final=False)
            self.setup.schedule.after_epoch(state.results)
        # Saved last, so that whatever resumes from it finds everything that this step did.
        due = cadence.save_every is not None and state.step % cadence.save_every == 0
        if due or better:
            self.saver.save_run(history=due and cadence.keeps_history, best=better)
        self._next_event = self._find_next_event()

    def _after_first_step(self) -> None:
        if self.setup.artifact is not None:  # here too, so that a run that is killed has left it
            self.setup.artifact.save()
        with waiting("the first step"):
            process_group.tighten(self.config.comm)
        self.display.activity(None)
        self.display.restart_clock()
        self.observers.first_step()

    def _find_next_event(self) -> int:
        log, cadence = self.observers.pace.next, self.setup.cadence
        due = next_multiple(self.state.step, cadence.evaluate_every, cadence.save_every, self.config.gc.interval)
        return log if due is None else min(due, log)

    def _after_epoch(self) -> None:
        """Do what is due after an epoch, in epoch mode: evaluate, schedule, save. Collective."""
        state, cadence = self.state, self.setup.cadence
        if cadence.epochs is None:
            return
        evaluated = state.epoch % cadence.evaluate_epochs == 0
        better = evaluated and self._evaluate_due_splits(final=False)
        self.setup.schedule.after_epoch(state.results, evaluated=evaluated)
        due = cadence.save_epochs is not None and state.epoch % cadence.save_epochs == 0
        if due or better:
            self.saver.save_run(history=due and cadence.keeps_history, best=better)

    def _stop(self, number: int) -> None:
        """Between two steps: save and leave where a signal asked for it; end the training where a rank asked for
        that."""
        if number == END_REQUESTED:
            self._end()
        else:
            self.state.interrupted = True
            self.saver.stop(number)

    def _end(self) -> None:
        """End the training as if its budget were used up."""
        self.state.stopped_early = True
        reason = self.stop_request.reason
        self.display.line(f"stopped by runner.stop at step {self.state.step}" + (f": {reason}" if reason else ""))

    def _evaluate_due_splits(self, *, final: bool) -> bool:
        """Evaluate the splits that were not evaluated at this step, and update the score. Collective.

        Returns:
            Whether the score is the best so far.
        """
        began, state, score = time.perf_counter(), self.state, self.setup.score
        self.observers.check()
        due = evaluated_splits(self.setup.loaders, score.split, final=final)
        with waiting("the training loss"):
            mean = state.training_loss.mean()
        if mean is not None:  # None where a log line has just taken it
            state.results["train.loss"] = mean
        found: dict[str, float] = {}
        with self.observers.stopwatch.apart(EVALUATION):
            for split in due:
                if state.evaluated_at.get(split) != state.step:
                    found |= self.evaluate(split)
                    state.evaluated_at[split] = state.step
        state.results |= found
        self.display.pause_clock(time.perf_counter() - began)
        better = False
        if score.key in found or self._scored_by_training():
            better = score.update(state.results, state.step)
        if found:
            self.observers.evaluated(found, "best so far" if better else "")
        if score.exhausted and not final and not self._done():
            state.stopped_early = True
            self.display.line(f"early stop: {score.key} has not improved for {score.patience} evaluations")
        # Here and not only after the next step: what is measured is the usual reason to stop.
        if found and self.callbacks and not final and self.stop_request.end_on_any_rank() and not self._done():
            self._end()
        return better

    def _scored_by_training(self) -> bool:
        """Whether the score is the training loss, and not yet taken at this step."""
        state = self.state
        if self.setup.score.key != "train.loss" or state.evaluated_at.get("train") == state.step:
            return False
        state.evaluated_at["train"] = state.step
        return "train.loss" in state.results

    @collective_timeout.named
    def evaluate(self, split: str) -> dict[str, float]:
        """Loss and metrics of a split, by `split.name`. Collective."""
        self.display.activity(f"evaluating {split}")
        if self.state.step_failed:
            self._recover()
        if self.callbacks.evaluation_start is not None:
            self.callbacks.evaluation_start(split)
        results: dict[str, float] = {}
        try:
            with waiting("evaluation"):
                found = measure(
                    self.setup.passes,
                    self.setup.loaders[split],
                    split,
                    metrics=self.setup.metrics,
                    metric_inputs=self.setup.metric_inputs,
                    device=self.world.device,
                )
            results = {f"{split}.{name}": value for name, value in found.items()}
        finally:  # what a callback changed for the evaluation is undone in any case
            if self.callbacks.evaluation_end is not None:
                self.callbacks.evaluation_end(split, results)
        self.display.activity(None)
        return results

    @collective_timeout.named
    def finish(self) -> float:
        """Evaluate and save what is still due, report how the run ended, and close. Collective.

        Returns:
            The best score; NaN where there is none.
        """
        if self.replicas is not None and self.replicas.end():
            self._continue_elsewhere()
        better = self._evaluate_due_splits(final=True)
        if self.lead.ends_the_run():
            self.saver.save_at_the_end(better=better)
            self.lead.complete(self.state.step)
        if self.callbacks.fit_end is not None:
            self.callbacks.fit_end()
        self.observers.flush()
        self._conclude()
        return self.setup.score.best if self.setup.score.best is not None else float("nan")

    def _conclude(self) -> None:
        """Show the last lines of the run."""
        setup, lines = self.setup, []
        if self.report is not None:
            # Text of growing length would be compiled again and again.
            engine = setup.assembled.engine
            gathered: AbstractContextManager[object] = nullcontext() if engine is None else engine.whole_weights()
            with (
                torch.no_grad(),
                torch.compiler.set_stance("force_eager"),
                setup.autocast(),
                waiting("the report"),
                gathered,
            ):
                setup.assembled.train(False)
                self.display.activity("reporting")
                whole = None if setup.assembled.pipeline is not None else _without_ddp(setup.model)
                lines = self.report(whole, self.state.results)
        self.display.stop()
        lines += conclusion(
            attempt=self.world.attempt,
            ranks=self.world.ranks,
            score=self.setup.score,
            results=self.state.results,
            step=self.state.step,
            cadence=self.setup.cadence,
            resumable=self.saver.checkpoints.enabled,
        )
        for line in lines:
            self.display.line(line)

    def place(self) -> collective_timeout.Place:
        """Where this rank is, for an error that it ends with."""
        return collective_timeout.place_of(self.state, self.observers.waited_for)

    def _explain(self, error: RuntimeError) -> None:
        """Raise an error that says more, where this one is that of a device without memory or of a collective that
        timed out."""
        if isinstance(error, TooFewGroups):  # a timeout too, and no collective's
            return
        full = out_of_memory.full_device(error)
        if full is not None:
            raise out_of_memory.explained(full, self.config, self.world, self.state.step) from error
        collective_timeout.explain(error, self.world.attempt, self.world.ranks, self.config, self.place())


def _without_ddp(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model
