"""The runner: one configuration's training, in its own loop or in the user's."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from danling_conf.checkpoint.manager import CheckpointManager
from danling_conf.components import dataloader as loaders
from danling_conf.components import gradients, optimizer, precision
from danling_conf.components.batch import CountSamples, to_device
from danling_conf.components.batch import count_samples as count_by_rule
from danling_conf.components.target import model_factory
from danling_conf.config.identity import layout_name
from danling_conf.config.resolve import resolve
from danling_conf.parallel import compile as compilation
from danling_conf.parallel.forward_backward import Loss, Passes
from danling_conf.parallel.model import assemble
from danling_conf.records.current import current
from danling_conf.records.logs import close_logs, open_logs
from danling_conf.runner import events, garbage_collection, saving, seeds
from danling_conf.runner.batch import Forward, MetricInputs, forward_of, loss_of_output, metric_inputs_of
from danling_conf.runner.cadence import cadence_of
from danling_conf.runner.conclusion import conclusion
from danling_conf.runner.data import (
    batches_per_epoch,
    check_sequences,
    evaluated_splits,
    in_step,
    make_loaders,
    no_batch,
)
from danling_conf.runner.environment import record_environment
from danling_conf.runner.evaluation import evaluate
from danling_conf.runner.observe import collective_timeout as stuck
from danling_conf.runner.observe.flops import Utilisation
from danling_conf.runner.observe.meters import LossMeter
from danling_conf.runner.observe.observers import Observers
from danling_conf.runner.preflight import preflight
from danling_conf.runner.progress import Progress
from danling_conf.runner.refusal import refused
from danling_conf.runner.schedule import Schedule
from danling_conf.runner.score import make_score
from danling_conf.runner.signals import StopRequest
from danling_conf.runner.world import join
from danling_conf.schema import RunnerConfig
from danling_conf.topology.violation import ConfigRefused

_END = object()
"""Behind the last batch."""


class Runner:
    """Trains a model as a configuration says.

    `fit` is the whole of it. For a loop of one's own, `prepare` and then

        for batch in runner.batches("train"):
            runner.step(batch)
        score = runner.finish()

    is the same run: evaluation, checkpoints and early stop happen inside `step` and between epochs.

    Args:
        config: resolved, or composed by Hydra, which resolves it.

    Attributes:
        model, optimizer, scheduler, loaders: what was built; the scheduler is None for a constant learning rate, the
            model a list of this rank's stages in a pipeline.
        global_step: optimizer steps done.
        epoch: epochs done.
        results: the newest value of every metric, by `split.name`.
        score: what the best checkpoint is chosen by.
        world: where this process stands among the ranks.
    """

    def __init__(self, config: Any) -> None:
        self.config: RunnerConfig = resolve(config)
        if self.config.compile.enable:
            compilation.use_shared_cache()  # read when inductor is imported
        self._stack = ExitStack()
        self.observers = Observers(self.config)
        started = current()
        if started is not None:  # so that a rank that waits here for others is seen
            self.observers.begin(started.attempt, started.ranks)
        try:
            with refused():
                self.world = join(self.config)
        except BaseException as error:
            self.observers.close()
            if started is not None and isinstance(error, RuntimeError):
                stuck.explain(error, started.attempt, started.ranks, self.config, stuck.Place())
            raise
        self.device = self.world.device
        attempt = self.world.attempt
        if self.world.lock is not None:
            self._stack.callback(self.world.lock.release)
        if current() is None:  # whoever launches ranks opens their logs
            handlers = open_logs(attempt.directory, self.world.ranks, log=self.config.log, job_name="run")
            self._stack.callback(close_logs, handlers)
        self._stack.callback(self.observers.close)  # before the logs are
        if self.world.ranks.main:
            record_environment(attempt.directory)
        self._stack.enter_context(seeds.deterministic(self.config.deterministic))
        self.global_step = 0
        self._first_step = 1
        self.epoch = 0
        self.results: dict[str, float] = {}
        self._micro = 0
        self._meter = LossMeter()
        self._stopped = False
        self._ended: str | None = None
        self._epoch_ends = False
        self._interrupted = False
        self._remainder_said = False
        self._evaluated_at: dict[str, int] = {}
        self._saved_at = -1
        self._between_epochs = True
        self._epoch_step = 0
        self._resumed: dict[str, Any] | None = None
        self.stop_request = StopRequest(second_ends=not self.world.repeats_signals)
        self._notes: list[str] = []
        self.observers.joined(self)

    def fit(
        self, model: nn.Module | Callable[[], nn.Module] | None, datasets: Mapping[str, Any], **options: Any
    ) -> float:
        """Train to the end of the budget; gives the best score.

        Args:
            model, datasets, options: see `prepare`.

        Raises:
            ConfigRefused: the configuration does not fit the model or the data.
        """
        try:
            self.prepare(model, datasets, **options)
            for batch in self.batches("train"):
                self.step(batch)
            return self.finish()
        finally:
            self.close()

    @stuck.named
    def prepare(
        self,
        model: nn.Module | Callable[[], nn.Module] | None,
        datasets: Mapping[str, Any],
        *,
        loss: Loss | None = None,
        metrics: Mapping[str, Any] | None = None,
        metric_inputs: MetricInputs | None = None,
        forward: Forward | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        count_samples: CountSamples | None = None,
        tokens_per_sample: int | None = None,
        report: Callable[[nn.Module | None, Mapping[str, float]], list[str]] | None = None,
    ) -> None:
        """Build everything, and go on from a checkpoint where the configuration says so. Collective.

        Args:
            model: a factory without arguments, called on the meta device, or a module, taken over with its weights.
                None: what `model._target_` of the configuration names.
            datasets: data set by split; `train` is what is trained on. Each has `__getitem__` and `__len__` (a list of
                samples does), or is a torch `IterableDataset`. Batches may be tuples, lists, mappings, named tuples,
                dataclasses and what else holds tensors, with strings and numbers anywhere, or objects that move by a
                `.to(device)`.
            loss: maps the model's output and the batch to the mean loss, a scalar. None: the output's own `.loss`.
                Means are averaged over micro-batches and ranks, so batches should weigh the same. Where they do not
                (masked tokens), give a pair: the sum, and how many it is of; the count of all is divided by.
            metrics: torchmetrics objects, or functions that make them, by name: anything with `update`, `compute`,
                which returns one number, and `reset`. Updated with predictions and targets.
            metric_inputs: makes the arguments of a metric's `update`, a tuple, from the model's output and the batch.
                None: predictions are the output, or its `logits` where it is no tensor and has them; targets are what
                `batch.targets` names, else the batch's `labels`, `label`, `targets` or `target`, else the second item
                of a tuple or list.
            forward: runs the model on a batch: `forward(model, batch)`. None: what `batch.inputs` names, else the first
                item of a tuple or list, or a mapping's items as keywords, or the batch itself.
            collate_fn: makes a batch of samples, for every loader.
            count_samples: the number of samples in a batch, by which batches weigh in an evaluation and pipelines cut
                microbatches. None: the first dim of a batch's first tensor that has one; without such a tensor, the
                length of its first list of plain values.
            tokens_per_sample: shows tokens per second instead of samples per second.
            report: gives lines to print at the end, from the model and the results. Called on every rank, since a
                sharded model needs them all; in a pipeline, where no rank has the model, with None.
        """
        if self._ended is not None:
            raise RuntimeError(f"this runner {self._ended}: make another Runner to train again, or to go on (resume)")
        self._ended = "was prepared before"
        config, world = self.config, self.world
        self._report = report
        run_model, objective = forward or forward_of(config.batch), loss or loss_of_output
        count = count_samples or count_by_rule
        self._metric_inputs = metric_inputs or metric_inputs_of(config.batch)
        with refused():
            self.loaders = make_loaders(
                datasets,
                config.dataloader,
                data_rank=world.data_rank,
                data_degree=world.data_degree,
                seed=world.attempt.seed,
                collate_fn=collate_fn,
            )
            self.cadence = cadence_of(config, batches_per_epoch(self.loaders["train"]))
            model = model_factory(config.model) if model is None else model
            self.utilisation = Utilisation(
                model,
                run_model,
                objective,
                count=count,
                device=world.device,
                precision=config.precision,
                devices=world.ranks.world_size,
            )
            self.assembled = assemble(
                model,
                layout=world.layout,
                mesh=world.mesh,
                device=world.device,
                seed=world.attempt.seed,
                fsdp=config.fsdp,
                compile=config.compile,
                activation_checkpointing=config.activation_checkpointing,
                parallel=config.parallel,
                expert_mesh=world.expert_mesh,
                precision=config.precision,
            )
            check_sequences(self.loaders, self.assembled, world.layout, config.parallel)
            if loss is None and self.assembled.context is not None:
                raise ValueError(
                    f"parallel.axes.context={world.layout.context}: the model's own loss shifts labels inside of each "
                    f"part of a sequence: pass a loss, and data whose targets are shifted already"
                )
            pipelined = self.assembled.pipeline is not None
            self.model = nn.ModuleList(self.assembled.parts) if pipelined else self.assembled.module
            self.optimizer = optimizer.make(
                self.assembled.named_parameters() if pipelined else self.model,
                config.optim,
                whole=self.assembled.whole if pipelined else None,
            )
            self.metrics = {name: _metric(made, world.device) for name, made in (metrics or {}).items()}
            self.score = make_score(
                split=config.score_split,
                name=config.score_name,
                mode=config.score_mode,
                patience=config.patience,
                splits=datasets,
                metrics=self.metrics,
            )
            measured = evaluated_splits(datasets, self.score.split, final=False)
            self.schedule = Schedule(
                config.scheduler,
                self.optimizer,
                self.cadence,
                score=self.score,
                measured=[f"{split}.{name}" for split in measured for name in ("loss", *self.metrics)],
                metrics=self.metrics,
            )
        if config.score_split not in (None, self.score.split):
            self._notes.append(
                f"score_split={config.score_split}: there is no such split; the score is {self.score.key}"
            )
        self.scheduler, self._by_step = self.schedule.scheduler, self.schedule.by_step
        self.assembled.train()
        autocast = None if config.fsdp.enabled else config.precision
        self._autocast = partial(precision.autocast, autocast, world.device.type)
        self._scaler = precision.scaler(autocast, world.device.type)
        self._passes = Passes(
            self.assembled,
            run_model,
            objective,
            world.layout,
            world.device,
            autocast=self._autocast,
            scaler=self._scaler,
            count=count,
        )
        self._parameters = [item for _, item in self.assembled.named_parameters() if item.requires_grad]
        self.checkpoints = CheckpointManager(
            config.checkpoint,
            world.attempt.run_directory,
            rank=world.ranks.rank,
            layout=world.layout,
            layout_name=layout_name(world.layout),
            allow_degree_change=config.parallel.allow_degree_change,
            guard=world.guard,
        )
        limit = config.comm.init_timeout_seconds
        self.stop_request.install(None if limit is None else timedelta(seconds=limit))
        self._stack.callback(saving.leave, self)
        seeds.seed_rank(world.attempt.seed, world.stream)
        with refused():
            saving.go_on(self)
        preflight(
            self._passes, self.loaders, metrics=self.metrics, metric_inputs=self._metric_inputs, device=self.device
        )
        samples = loaders.settings_for(config.dataloader, "train").batch_size or 1
        self.samples_per_step = samples * world.data_degree * config.accum_steps
        self.tokens_per_sample = tokens_per_sample
        self.progress = Progress(
            show=world.ranks.main,
            total=self.cadence.steps,
            samples_per_step=self.samples_per_step,
            tokens_per_sample=tokens_per_sample,
            position=lambda: self.global_step,
            tell=self.observers.state,
        )
        self._stack.callback(self.progress.stop)
        for loader in self.loaders.values():
            self._stack.callback(loaders.stop_workers, loader)
        self._stack.enter_context(garbage_collection.paced(config.gc))
        self._first_step = self.global_step + 1
        self._next_event = self._first_step
        self.observers.prepared(self)
        for note in self._notes:
            self.progress.line(note)

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The model; in a pipeline, the models of this rank's stages, each with the names of the whole."""
        return self.assembled.parts

    def batches(self, split: str = "train") -> Iterator[Any]:
        """Batches of this rank, on its device. Of the training split: epoch after epoch, until the budget is used up or
        the score stops improving; of any other: one pass.
        """
        loader = self.loaders[split]
        if not loaders.is_training(split):
            yield from (to_device(batch, self.device) for batch in loader)
            return
        self.progress.start()
        self.progress.activity("compiling the first step" if self.config.compile.enable else None)
        try:
            while not self._done():
                yield from self._epoch_of(loader)
        except RuntimeError as error:
            self.progress.stop()
            stuck.explain(error, self.world.attempt, self.world.ranks, self.config, self.place())
            raise
        except BaseException:  # of the loop around this generator as well, when it is closed
            self.progress.stop()
            raise

    def step(self, batch: Any) -> Tensor:
        """Forward and backward of one micro-batch and, at the last of `accum_steps`, an optimizer step with all that is
        due after it. Gives the micro-batch's mean loss, detached and not waited for; in a pipeline, not a number on the
        ranks that do not hold the last stage.

        An exception in forward, loss or backward may be survived where all ranks raise it alike (a batch that does not
        fit is skipped): the optimizer step under way is dropped with all of its micro-batches, and the next batch
        begins another. Not so in a pipeline, whose other stages wait.
        """
        accumulated = self.config.accum_steps
        self._recover()
        self._micro += 1
        last = self._micro == accumulated or self._epoch_ends
        if self._micro == 1 and self.global_step + 1 == self._first_step:
            self.utilisation.count(batch)
        try:
            try:
                loss = self._passes.train(batch, micro_batches=accumulated, last=last)
            except BaseException:
                self._interrupted = True
                raise
            self._meter.append(loss)
            self.observers.nonfinite.look(
                loss.total, self.global_step + 1, self.epoch, self._epoch_step * accumulated + self._micro - 1
            )
            if last:
                rescale, self._micro = accumulated / self._micro, 0
                self._meter.commit()
                self._update(rescale)
                if self.global_step >= self._next_event:
                    events.after_step(self)
                saving.watch(self)
        except RuntimeError as error:
            stuck.explain(error, self.world.attempt, self.world.ranks, self.config, self.place())
            raise
        return loss.mean

    @stuck.named
    def evaluate(self, split: str) -> dict[str, float]:
        """Loss and metrics of a split, by `split.name`. Collective."""
        self.progress.activity(f"evaluating {split}")
        self._recover()
        found = evaluate(
            self._passes,
            self.loaders[split],
            metrics=self.metrics,
            metric_inputs=self._metric_inputs,
            device=self.device,
        )
        self.progress.activity(None)
        return {f"{split}.{name}": value for name, value in found.items()}

    @stuck.named
    def finish(self) -> float:
        """Evaluate and save what is still due, tell the user how the run ended, and leave; gives the best score."""
        better = events.evaluate(self, final=True)
        saving.save_at_the_end(self, better=better)
        self._conclude()
        self._ended = "has finished"
        self.close()
        return self.score.best if self.score.best is not None else float("nan")

    def place(self) -> stuck.Place:
        """Where this rank is, for an error that it ends with."""
        step = self.global_step
        return stuck.Place(step=step, starting=step < self._first_step, waited_for=self.observers.waited_for)

    def close(self) -> None:
        """Give back what the runner took: workers, logs, locks, settings of the process."""
        if self._ended != "has finished":
            self._ended = "has failed" if sys.exc_info()[0] is not None else "is closed"
        self._stack.close()

    def _done(self) -> bool:
        if self._stopped:
            return True
        if self.cadence.epochs is not None:
            return self.epoch >= self.cadence.epochs
        return self.global_step >= (self.cadence.steps or 0)

    def _epoch_of(self, loader: Any) -> Iterator[Any]:
        loaders.set_epoch(loader, self.epoch)
        own = saving.start_epoch(self, loader)
        source = iter(()) if own is not None and own.get("exhausted") else iter(loader)
        iterator = self.observers.stopwatch.waited(in_step(loader, source, uneven=self._say_uneven))
        self.observers.known_epoch = own is None or own["data_degree"] == self.world.data_degree
        if own is not None:
            saving.restore_generators(self, own)  # making the iterator may draw from them
        # What is left of an epoch and makes no whole optimizer step is not used.
        limit = self.cadence.steps_per_epoch if self.config.accum_steps > 1 else None
        takes_remainder = self.config.accum_remainder == "step"
        fresh, move = self._between_epochs and own is None, self.device.type != "cpu"
        self._between_epochs = False
        batch = next(iterator, _END)
        while batch is not _END:
            if limit is not None and self._epoch_step >= limit:
                self._say_remainder()
                break
            fresh, current = False, batch
            # Whether this is the last batch shows by the one behind it. After the last micro-batch of a step there may
            # be a checkpoint, which must not find the loader ahead; but then there is nothing to know either.
            looks_ahead = takes_remainder and self._micro + 1 < self.config.accum_steps
            if looks_ahead:
                batch = next(iterator, _END)
                self._epoch_ends = batch is _END
            yield to_device(current, self.device) if move else current
            self._epoch_ends = False
            if self._done():
                return
            if not looks_ahead:
                batch = next(iterator, _END)
        if fresh:
            raise ConfigRefused([no_batch("train").violation])
        self._recover()
        if self._micro:
            self._drop_step()
            self._say_remainder()
        self.epoch += 1
        self._epoch_step = 0
        self._between_epochs = True
        events.after_epoch(self)

    def _recover(self) -> None:
        """After an exception that the user's loop has survived: begin the optimizer step anew. Not before, since most
        exceptions are the end, and what they have left (a collective that timed out) may not be touched again."""
        if self._interrupted:
            self._drop_step()
            self._interrupted = False

    def _drop_step(self) -> None:
        """Leave out the optimizer step under way, with what its micro-batches have left."""
        self._micro = 0
        self._passes.forget()
        self._meter.drop()
        self.observers.nonfinite.drop()

    def _say_remainder(self) -> None:
        if not self._remainder_said:
            self._remainder_said = True
            self.progress.line(
                "micro-batches at the end of an epoch that are fewer than accum_steps are left out; "
                "accum_remainder=step makes an optimizer step of them"
            )

    def _say_uneven(self) -> None:
        self.progress.line(
            f"epoch {self.epoch + 1}: ranks have unequally many training batches: what some have beyond the others is "
            "left out"
        )

    def _update(self, rescale: float) -> None:
        self._passes.finish(self._parameters, rescale=rescale)
        nonfinite = self.observers.nonfinite
        if self.config.max_grad_norm is not None or nonfinite.measures_gradients:
            if self._scaler is not None:
                self._scaler.unscale_(self.optimizer)
            pipeline = self.assembled.pipeline
            group = None if pipeline is None else pipeline.group
            norm = gradients.clip(self._parameters, self.config.max_grad_norm or math.inf, pipeline=group)
            self.observers.norm(norm, self.global_step + 1, self.epoch, expected=self._scaler is not None)
        if nonfinite.skips():
            pass
        elif self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        self.optimizer.zero_grad()
        if self._by_step is not None:
            self._by_step.step()
        self.global_step += 1
        self._epoch_step += 1
        self.observers.stepped()

    def _conclude(self) -> None:
        lines = []
        if self._report is not None:
            # Text of growing length would be compiled again and again.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), self._autocast():
                self.assembled.train(False)
                self.progress.activity("reporting")
                whole = None if self.assembled.pipeline is not None else _unwrapped(self.model)
                lines = self._report(whole, self.results)
        self.progress.stop()
        lines += conclusion(
            attempt=self.world.attempt,
            ranks=self.world.ranks,
            score=self.score,
            results=self.results,
            step=self.global_step,
            cadence=self.cadence,
            resumable=self.checkpoints.enabled,
        )
        for line in lines:
            self.progress.line(line)


def _metric(made: Any, device: torch.device) -> Any:
    metric = made if hasattr(made, "update") and not isinstance(made, type) else made()
    return metric.to(device) if hasattr(metric, "to") else metric


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model
