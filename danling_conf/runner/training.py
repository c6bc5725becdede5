"""The runner: one configuration's training, in its own loop or in the user's.

It joins the ranks, builds what the configuration describes and passes the pieces to the loop (`runner.loop`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer

from danling_conf.checkpoint.manager import CheckpointManager
from danling_conf.components import dataloader
from danling_conf.components.batch import CountSamples
from danling_conf.config.identity import layout_name
from danling_conf.config.resolve import resolve
from danling_conf.parallel import compile as compilation
from danling_conf.parallel.measured import Loss
from danling_conf.parallel.waiting import waiting
from danling_conf.records.current import Current, current
from danling_conf.records.logs import close_logs, open_logs
from danling_conf.runner import planning, process
from danling_conf.runner.batch import Forward, MetricInputs
from danling_conf.runner.cadence import Cadence
from danling_conf.runner.callbacks import Callback, Callbacks, configured, given
from danling_conf.runner.display import Display
from danling_conf.runner.leading import Lead
from danling_conf.runner.loop import Loop, Report
from danling_conf.runner.observe import collective_timeout
from danling_conf.runner.observe.observers import Observers
from danling_conf.runner.preflight import preflight
from danling_conf.runner.replicas import Replicas, callbacks_of_groups
from danling_conf.runner.resuming import Resumption
from danling_conf.runner.saving import RunSaver
from danling_conf.runner.score import Score
from danling_conf.runner.setup import Setup, set_up
from danling_conf.runner.signals import StopRequest
from danling_conf.runner.state import TrainState
from danling_conf.runner.world import World, join
from danling_conf.schema import RunnerConfig
from danling_conf.topology.violation import ABSENT, SettingError, refused

Item = TypeVar("Item")
_FINISHED = "has finished"
_log = logging.getLogger(__name__)


class NotPrepared(RuntimeError):
    """Raised by an attribute or method of a runner that needs `prepare` first."""


class Runner:
    """Trains a model as configured.

    `fit` does all of it. For a loop of one's own, `prepare` and then

        for batch in runner.batches("train"):
            runner.step(batch)
        score = runner.finish()

    is the same run: evaluation, checkpoints and early stop happen inside `step` and between epochs.

    Args:
        config: resolved, or composed by Hydra, which resolves it.

    Attributes:
        config: the resolved configuration.
        world: where this process stands among the ranks.
        device: of this rank.
        global_step: optimizer steps done.
        epoch: epochs done.
        results: the newest value of every metric, by `split.name`.
        state: all of the above and what else is remembered between steps.

    Attributes that raise NotPrepared before `prepare`:
        model, optimizer, scheduler, loaders: what was built; the scheduler is None for a constant learning rate, the
            model a list of this rank's stages in a pipeline.
        score: what the best checkpoint is chosen by.
        cadence: the length of the run and its intervals.
        setup: all of the above and what else training needs.
        checkpoints: what saves and loads the run.
        display: shows progress on the terminal and in the log.
        loop: the training loop.
        callbacks: what the loop calls, see `danling_conf.Callback`.
    """

    def __init__(self, config: Any) -> None:
        self.config: RunnerConfig = resolve(config)
        self.state = TrainState()
        self._setup: Setup | None = None
        self._checkpoints: CheckpointManager | None = None
        self._display: Display | None = None
        self._loop: Loop | None = None
        self._used: str | None = None
        """Why it cannot train (again)."""
        self._callbacks: Callbacks | None = None
        self._stack = ExitStack()
        """What `close` releases, in reverse order."""
        self.observers = Observers(self.config, self.state)
        if planning.under_way():
            self.world = planning.world_of(self.config)
            self.device = self.world.device
            return
        self.world = self._join()
        self.device = self.world.device
        if self.config.compile.enable:
            self._stack.enter_context(compilation.restored())
            compilation.use_shared_cache()
        self.stop_request = StopRequest(second_ends=not self.world.repeats_signals)
        attempt = self.world.attempt
        if self.world.lock is not None:
            self._stack.callback(self.world.lock.release)
        if current() is None:  # a launcher opens the logs of the ranks that it starts
            handlers = open_logs(attempt.directory, self.world.ranks, log=self.config.log, job_name="run")
            self._stack.callback(close_logs, handlers)
        self._stack.callback(self.observers.close)  # before the logs are
        self.lead = Lead(attempt, self.world.ranks)
        self._stack.callback(self.lead.close)
        if self.world.ranks.number == 0 and self.world.ranks.starts == 1:
            process.record_environment(attempt.directory)
        self._stack.enter_context(process.deterministic(self.config.deterministic))
        self.observers.joined(self.world)

    def _join(self) -> World:
        """Meet the other ranks."""
        started = current()
        if started is not None:  # so that a rank that waits here for others is seen
            self.observers.begin(started.attempt, started.ranks)
        try:
            with refused(), waiting("the start"):
                return join(self.config)
        except BaseException as error:
            self.observers.close()
            if started is not None and isinstance(error, RuntimeError):
                place = collective_timeout.Place()
                collective_timeout.explain(error, started.attempt, started.ranks, self.config, place)
            raise

    @property
    def global_step(self) -> int:
        return self.state.step

    @property
    def epoch(self) -> int:
        return self.state.epoch

    @property
    def results(self) -> dict[str, float]:
        return self.state.results

    @property
    def setup(self) -> Setup:
        return _prepared(self._setup)

    @property
    def checkpoints(self) -> CheckpointManager:
        return _prepared(self._checkpoints)

    @property
    def loop(self) -> Loop:
        return _prepared(self._loop)

    @property
    def callbacks(self) -> Callbacks:
        return _prepared(self._callbacks)

    @property
    def display(self) -> Display:
        return _prepared(self._display)

    @property
    def loaders(self) -> dict[str, Any]:
        return self.setup.loaders

    @property
    def model(self) -> nn.Module:
        return self.setup.model

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The model; in a pipeline, the models of this rank's stages, each with the names of the whole."""
        return self.setup.assembled.parts

    @property
    def optimizer(self) -> Optimizer:
        return self.setup.optimizer

    @property
    def scheduler(self) -> Any:
        return self.setup.schedule.scheduler

    @property
    def score(self) -> Score:
        return self.setup.score

    @property
    def cadence(self) -> Cadence:
        return self.setup.cadence

    def fit(
        self, model: nn.Module | Callable[[], nn.Module] | None, datasets: Mapping[str, Any], **options: Any
    ) -> float:
        """Train to the end of the budget; returns the best score.

        Args:
            model: see `prepare`.
            datasets: see `prepare`.
            options: the other arguments of `prepare`: `loss=`, `callbacks=[...]`.

        Raises:
            ConfigRefused: the configuration does not fit the model or the data.
            CallbackFailed: a callback raised an exception.
        """
        try:
            self.prepare(model, datasets, **options)
            for batch in self.batches("train"):
                self.step(batch)
            return self.finish()
        finally:
            self.close()

    @collective_timeout.named
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
        report: Report | None = None,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        """Build everything, and resume from a checkpoint where the configuration says so. Collective.

        Args:
            model: a factory without arguments, or a module, taken over with its weights. A factory's weights are those
                of a plain call under the run's seed, under any layout.
                None: what `model._target_` of the configuration names.
            datasets: data set by split; `train` is what is trained on. Each has `__getitem__` and `__len__` (a list of
                samples does), or is a torch `IterableDataset`. Batches may be tuples, lists, mappings, named tuples,
                dataclasses and what else holds tensors, with strings and numbers anywhere, or objects that move by a
                `.to(device)`.
            loss: maps the model's output and the batch to the mean loss, a scalar. None: the output's own `.loss`.
                Means are averaged over micro-batches and ranks, so batches should weigh the same. Where they do not
                (masked tokens), return a pair: the sum, and how many it is of; the count of all is divided by.
            metrics: torchmetrics objects, or functions that make them, by name: anything with `update`, `compute`,
                which returns one number, and `reset`. Updated with predictions and targets.
            metric_inputs: returns the arguments of a metric's `update`, a tuple, from the model's output and the batch.
                None: predictions are the output, or its `logits` where it is no tensor and has them; targets are what
                `batch.targets` names, else the batch's `labels`, `label`, `targets` or `target`, else the second item
                of a tuple or list.
            forward: runs the model on a batch: `forward(model, batch)`. None: what `batch.inputs` names, else the first
                item of a tuple or list, or a mapping's items as keywords, or the batch itself.
            collate_fn: makes a batch of samples, for every loader.
            count_samples: returns the number of samples in a batch, by which batches weigh in an evaluation and
                pipelines cut microbatches. None: the first dim of a batch's first tensor that has one; without such a
                tensor, the length of its first list of plain values.
            tokens_per_sample: shows tokens per second instead of samples per second.
            report: returns lines to print at the end, from the model and the results. Called on every rank, since a
                sharded model needs them all; in a pipeline, where no rank has the model, with None.
            callbacks: called at the points that `danling_conf.Callback` names, after those of the configuration
                (`callbacks`). The same on every rank. Their state is in the checkpoint, by name; a line is shown for a
                callback that only the checkpoint or only the run has.

        One batch of each split that is not trained on is tried before training, with the loss and the metrics.

        Raises:
            ConfigRefused: the configuration does not fit the model, the data or the checkpoint; or a callback that it
                names cannot be made.
            RuntimeError: this runner was used before.
        """
        if self._used is not None:
            raise RuntimeError(f"this runner {self._used}: make another Runner to train again, or to resume")
        self._used = "has failed"
        if planning.under_way():
            planning.make(
                planning.Recipe(
                    config=self.config,
                    model=model,
                    datasets=datasets,
                    loss=loss,
                    forward=forward,
                    collate_fn=collate_fn,
                    count_samples=count_samples,
                    tokens_per_sample=tokens_per_sample,
                )
            )
        with refused(), waiting("building the model"):
            self._setup = set_up(
                self.config,
                self.world,
                model,
                datasets,
                loss=loss,
                metrics=metrics,
                metric_inputs=metric_inputs,
                forward=forward,
                collate_fn=collate_fn,
                count_samples=count_samples,
                tokens_per_sample=tokens_per_sample,
            )
            if self.setup.artifact is not None:
                self._stack.callback(self.setup.artifact.save)
            own = callbacks_of_groups(self.config)
            self._callbacks = Callbacks([*own, *configured(self.config), *given(callbacks)], self)
            self._stack.callback(self._call_of_exception)
            self._callbacks.check_ranks()
            if self.setup.zero is not None and self._callbacks.before_optimizer_step is not None:
                rule = "on_before_optimizer_step finds no gradients: ZeRO has joined and cut them"
                raise SettingError("callbacks", ABSENT, rule, "deepspeed.zero_optimization.stage=0, or stack=auto")
            if self._callbacks.setup is not None:
                self._callbacks.setup()
        self._display = self._make_display()
        self._checkpoints = self._make_checkpoints()
        saver = RunSaver(
            self.config,
            self.world,
            self.state,
            self.setup,
            self.checkpoints,
            self.display,
            self.observers,
            self.callbacks,
            self.lead,
        )
        self._listen_for_signals()
        self._stack.callback(saver.close, self.stop_request)
        process.seed_rank(self.world.attempt.seed, self.world.stream)
        resumption = Resumption(self.config, self.world, self.state, self.setup, self.checkpoints, self.callbacks)
        with refused():
            notes = resumption.load()
        # After weights are loaded: FSDP2 keeps what a forward has gathered of the root's.
        with waiting("the first batches"):
            preflight(
                self.setup.passes,
                self.loaders,
                metrics=self.setup.metrics,
                metric_inputs=self.setup.metric_inputs,
                device=self.device,
            )
        self.lead.agree()
        self._start_clocks()
        self._loop = Loop(
            self.config,
            self.world,
            self.state,
            self.setup,
            saver=saver,
            resumption=resumption,
            observers=self.observers,
            display=self.display,
            stop_request=self.stop_request,
            callbacks=self.callbacks,
            report=report,
            lead=self.lead,
            replicas=self._make_replicas(),
        )
        for note in notes:
            self.display.line(note)
        if self.callbacks.fit_start is not None:
            self.callbacks.fit_start()
        self._used = "was prepared before"

    def _make_display(self) -> Display:
        setup = self.setup
        return Display(
            show=self.world.ranks.main if not self.lead.several else lambda: self.lead.main,
            total=setup.cadence.steps,
            samples_per_step=setup.samples_per_step,
            tokens_per_sample=setup.tokens_per_sample,
            position=lambda: self.state.step,
            on_state=self.observers.state,
            console=_console_of(current()),
        )

    def _make_checkpoints(self) -> CheckpointManager:
        return CheckpointManager(
            self.config.checkpoint,
            self.world.attempt.run_directory,
            rank=self.world.ranks.rank,
            layout=self.world.layout,
            layout_name=layout_name(self.world.layout),
            allow_degree_change=self.config.parallel.allow_degree_change,
            check_token=self.world.attempt.check_token,
            token=self.world.attempt.token,
            on_node=(self.world.ranks.local_rank, self.world.ranks.local_world_size),
            whole=self.setup.zero is not None,
            groups=(self.world.group, self.world.groups, self.world.ranks.starts if self.lead.several else 0),
        )

    def _make_replicas(self) -> Replicas | None:
        """This group's agreement with the other replica groups, once it has all that it starts with."""
        if not self.config.ft.enabled:
            return None
        with refused(), waiting("the other replica groups"):
            replicas = Replicas(
                self.config, self.world, self.state, self.setup, self.callbacks, self.lead, self.stop_request
            )
        self._stack.callback(replicas.close)
        self.observers.group_scalars = replicas.scalars
        return replicas

    def _listen_for_signals(self) -> None:
        limit = self.config.comm.init_timeout_seconds
        self.stop_request.install(None if limit is None else timedelta(seconds=limit))

    def _start_clocks(self) -> None:
        """The run is where it resumes: clocks, trackers and paced garbage collection start here."""
        self._stack.callback(self.display.stop)
        for loader in self.loaders.values():
            self._stack.callback(dataloader.stop_workers, loader)
        self._stack.enter_context(process.paced_collection(self.config.gc))
        self.state.first_step = self.state.step + 1
        self.display.restart_clock()
        self.observers.prepared(self.setup, self.display, self.lead)

    def _call_of_exception(self) -> None:
        """Call `on_exception` where the runner is closed by an exception."""
        error = sys.exc_info()[1]
        if error is None or self.callbacks.exception is None:
            return
        try:
            self.callbacks.exception(error)
        except Exception:
            _log.exception("on_exception failed; the run ends by another exception, which is shown")

    def log(self, name: str, value: float | Tensor) -> None:
        """Log a value by name, from anywhere: the model's hooks, the loss, a callback, a loop of one's own.

        It stays on the device, and no rank waits. A log line takes the mean of all values that all ranks have logged by
        this name since the line before, each of the same weight, and writes it to every tracker and `metrics.jsonl`.
        Ranks may log different names: the mean of a name is over the ranks that have logged it. What no log line has
        taken is logged when the run is complete. Do not call it in code that `torch.compile` compiles.

        Args:
            name: letters, digits, spaces and `. _ - /`; no name of the runner's own values.
            value: a number, or a tensor with one element.

        Raises:
            ValueError: the name or the value is not as above.
        """
        self.observers.logged.add(name, value, self.device)

    def log_text(self, name: str, text: str) -> None:
        """Log a text at this step, such as sample predictions: to `texts.jsonl` in the run's directory, TensorBoard,
        Weights & Biases and MLflow. The main rank's counts."""
        self.observers.text(name, text)

    def stop(self, reason: str = "") -> None:
        """Ask for the end of the training, as if its budget were used up: the run is evaluated, saved, and completed.

        One rank is enough. All ranks end at the same step: the one under way; with several ranks, who agree about once
        a second, one within a second or 64 steps after it.
        Asked for in an evaluation, no further step is done. A run that is resumed goes on.

        Args:
            reason: shown with the line that says so.
        """
        self.stop_request.end(reason)

    def batches(self, split: str = "train") -> Iterator[Any]:
        """Batches of this rank, on its device. Of the training split: epoch after epoch, until the budget is used up or
        the score stops improving; of any other: one pass.
        """
        return self.loop.batches(split)

    def step(self, batch: Any) -> Tensor:
        """Forward and backward of one micro-batch and, at the last of `accum_steps`, an optimizer step with all that is
        due after it. Collective.

        Returns:
            The micro-batch's mean loss, detached and not waited for; in a pipeline, NaN on the ranks that do not hold
            the last stage.

        Raises:
            NotFinite: the loss or a gradient was not finite, and `nonfinite=fail`.
            SaveFailed: a checkpoint could not be written.
            Stopped: a signal asked the run to stop.
        """
        return (self._loop or self.loop).step(batch)

    def evaluate(self, split: str) -> dict[str, float]:
        """Loss and metrics of a split, by `split.name`. Collective."""
        return self.loop.evaluate(split)

    def finish(self) -> float:
        """Evaluate and save what is still due, report how the run ended, and close. Collective.

        Returns:
            The best score; NaN where there is none.
        """
        score = self.loop.finish()
        self._used = _FINISHED
        self.close()
        return score

    def place(self) -> collective_timeout.Place:
        """Where this rank is, for an error that it ends with."""
        return collective_timeout.place_of(self.state, self.observers.waited_for)

    def close(self) -> None:
        """Release what the runner took: workers, logs, locks, settings of the process."""
        if self._used != _FINISHED:
            self._used = "has failed" if sys.exc_info()[0] is not None else "is closed"
        self._stack.close()


def _console_of(started: Current | None) -> Console | None:
    """The command's terminal, for a rank whose own output goes to its log; None where it has the terminal itself."""
    if started is None or started.terminal is None:
        return None
    file = open(started.terminal, "w", closefd=False)  # noqa: SIM115  for as long as the process runs
    return Console(file=file, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _prepared(item: Item | None) -> Item:
    if item is None:
        raise NotPrepared("this exists only once Runner.prepare was called: call it first")
    return item
