"""Observers of a run, behind a few calls of the loop: they change nothing of what is trained.

called by the loop            what happens
`micro_batch`                 losses that are not finite
`log_line`                    speed, memory, loss: one reduction over the ranks, to every tracker
`evaluated`                   results, to every tracker
`state`                       what the rank does now, in its heartbeat
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as distributed

from danling_conf._torch_private.distributed import record_collectives
from danling_conf.components import profiler
from danling_conf.components.samplers import ShardedSampler
from danling_conf.config.identity import flatten, plain
from danling_conf.parallel import expert
from danling_conf.parallel.process_group import is_distributed
from danling_conf.parallel.waiting import waiting
from danling_conf.records import logs
from danling_conf.records.history import goodput
from danling_conf.records.metrics import PRODUCTIVE
from danling_conf.records.run_directory import Attempt
from danling_conf.records.status import Status, outcome_of
from danling_conf.runner.display import Display
from danling_conf.runner.leading import Lead
from danling_conf.runner.observe import collective_timeout, planned
from danling_conf.runner.observe.heartbeat import Heartbeat
from danling_conf.runner.observe.log_pace import LogPace
from danling_conf.runner.observe.logged import LoggedValues
from danling_conf.runner.observe.meters import Number, at_hand
from danling_conf.runner.observe.nonfinite import FAIL, NonFinite, NotFinite, warning_of
from danling_conf.runner.observe.stopwatch import Lap, Stopwatch
from danling_conf.runner.observe.summary import Summary, peak_bytes, summarise
from danling_conf.runner.observe.trackers.choose import Trackers
from danling_conf.runner.observe.trackers.tracker import END, EVALUATION, LOGGED, TRAINING, Record, RunFacts
from danling_conf.runner.observe.warning_relay import WarningRelay
from danling_conf.runner.setup import Setup
from danling_conf.runner.state import TrainState
from danling_conf.runner.world import World
from danling_conf.schema import RunnerConfig
from danling_conf.topology.layout import coordinates
from danling_conf.topology.rank_environment import RankEnvironment

_log = logging.getLogger(__name__)


class Observers:
    """Heartbeat, trackers, clocks, profiler and the watch for what is not finite, of one rank.

    Args:
        state: of the run; read, except for the results of log lines.

    Attributes:
        stopwatch: where wall time goes.
        nonfinite: steps whose loss or gradients are not finite.
        logged: values that were logged by name since the last log line.
    """

    def __init__(self, config: RunnerConfig, state: TrainState) -> None:
        self.config, self._state = config, state
        self.stopwatch = Stopwatch()
        self.logged = LoggedValues()
        self.last_step_time: float | None = None
        """When the loop did its last optimizer step, for the heartbeat; seconds since 1970."""
        self._heartbeat: Heartbeat | None = None
        self.profiler: profiler.StepProfiler | None = None
        """Its schedule advances with each optimizer step; None where nothing is traced."""
        self._trackers: Trackers | None = None
        self._relay: WarningRelay | None = None
        self._planned: planned.Planned | None = None
        self._world: World | None = None
        self._setup: Setup | None = None
        self._display: Display | None = None
        self._lead: Lead | None = None
        self._tracks = False
        """Whether the trackers are those of a group that leads."""
        self.group_scalars: Callable[[], Mapping[str, float]] = dict
        """What replica groups add to a log line."""
        self._norm: torch.Tensor | None = None
        self._warned = False
        self.known_epoch = True
        """Whether the place in the current epoch says which samples a batch has."""
        if config.heartbeat.enabled:
            record_collectives()  # before there is a process group

    def begin(self, attempt: Attempt, ranks: RankEnvironment) -> None:
        """The attempt is known: start the heartbeat. Once; later calls do nothing."""
        if self._heartbeat is not None:
            return
        facts = {"attempt": attempt.directory.name, "rank": ranks.number, "world_size": ranks.total}
        if ranks.groups > 1:
            facts["group"] = ranks.group
        self._heartbeat = Heartbeat.of_run(
            self.config.heartbeat,
            attempt.run_directory,
            facts=facts,
            look=self._look,
            limit=self._limit,
            check_token=attempt.check_token,
            overdue=lambda collective, waited: _log.warning(
                "%s", collective_timeout.late(attempt, self.config, ranks, collective, waited)
            ),
        )
        self._heartbeat.start()

    def joined(self, world: World) -> None:
        """The ranks have met. Collective."""
        self._world = world
        self.begin(world.attempt, world.ranks)
        logs.set_position(lambda: (self._state.step, self._state.epoch))
        self._relay = WarningRelay(world.ranks)
        self._relay.start()

    def prepared(self, setup: Setup, display: Display, lead: Lead) -> None:
        """Everything is built and loaded: open the trackers, and start clocks."""
        assert self._world is not None
        self._setup, self._display, self._lead = setup, display, lead
        config, world, state = self.config, self._world, self._state
        attempt = world.attempt
        self.nonfinite = NonFinite(
            config.nonfinite,
            device=world.device,
            indices=self._indices,
            record=attempt.directory / f"nonfinite-rank-{world.ranks.number}.jsonl",
        )
        self.nonfinite.begin(state.step)
        cadence = setup.cadence
        loss_decides = "train.loss" in (setup.score.key, config.scheduler.monitor)
        self.pace = LogPace(
            cadence.log_every,
            fixed=config.log_interval is not None or loss_decides,
            length_known=cadence.steps is not None,
        )
        self.profiler = profiler.make(
            config.profiling,
            attempt.run_directory,
            rank=world.ranks.number,
            attempt=attempt.directory.name,
            device=world.device,
            step=state.step,
            say=display.line,
        )
        self._planned = planned.begun(config.plan, attempt, world.ranks, world.device, display.line)
        self._open_trackers()

    def _open_trackers(self) -> None:
        """Open the trackers, of the main rank where its group leads."""
        assert self._world is not None
        assert self._setup is not None
        assert self._display is not None
        assert self._lead is not None
        config, state = self.config, self._state
        self._tracks = self._lead.held
        self._trackers = Trackers(config, self._display, main=self._lead.main)
        facts = RunFacts(
            attempt=self._world.attempt,
            settings=flatten(plain(config)),
            lineage=config.lineage,
            experiment=config.experiment,
            step=state.step,
            score_key=self._setup.score.key,
        )
        self._trackers.start(facts, epoch=state.epoch)

    def state(self, what: str) -> None:
        """Set what the rank does now (`records.heartbeats.STATES`)."""
        if self._heartbeat is not None:
            self._heartbeat.state(what)

    @property
    def waited_for(self) -> dict[str, Any] | None:
        """The collective that this rank was last seen to wait in; None without a heartbeat."""
        return None if self._heartbeat is None else self._heartbeat.waited_for

    def first_step(self) -> None:
        """The first step is done: compilation is over, and clocks start."""
        self.stopwatch.restart(self._state.step)
        self.pace.begin(self._state.step)

    def micro_batch(self, loss: Number, place: int) -> None:
        """Take the loss of a micro-batch of the step under way; `place` is its number in the epoch."""
        self.nonfinite.look(loss, self._state.step + 1, self._state.epoch, place)

    def norm(self, norm: torch.Tensor, *, expected: bool) -> None:
        """Take the gradients' norm of the step under way. `expected`: a loss scaler handles what is not finite."""
        self._norm = norm
        if not expected:
            self.nonfinite.look(at_hand(norm), self._state.step + 1, self._state.epoch, -1)

    def group_loss(self, loss: torch.Tensor) -> None:
        """Take the loss of the step under way over all replica groups: where it is not finite in one, all of them leave
        the step out, or none."""
        if self.nonfinite.measures_gradients:
            self.nonfinite.look(at_hand(loss), self._state.step + 1, self._state.epoch, -1)

    def jumped(self) -> None:
        """The run goes on at another step, which was taken over from another replica group."""
        self.first_step()
        self.nonfinite.begin(self._state.step)
        assert self._display is not None
        self._display.restart_clock()

    def log_line(self) -> None:
        """Log how the steps since the last line went, to every tracker. Collective. Raises NotFinite."""
        assert self._world is not None
        assert self._setup is not None
        state, assembled, device = self._state, self._setup.assembled, self._world.device
        lap = self.stopwatch.lap(state.step)
        names = len(self.logged.names)
        summary = summarise(state.training_loss, self.nonfinite, lap, state.step, device, names=names)
        logged = self.logged.take(device) if summary.logged else {}
        if summary.loss is not None:
            state.results["train.loss"] = summary.loss
        with waiting("the log line"):
            load = expert.busiest(assembled.parts, assembled.batch, device)
        if load is not None:
            state.results["train.expert_load"] = load
        self.pace.logged(state.step, summary.step_seconds)
        if self._trackers is not None:
            self._log(TRAINING, {**self._scalars(self._setup, summary, lap, load), **logged})
        if self._relay is not None:
            self._relay.show()
        if self._planned is not None:
            layout, ranks = self._world.layout, range(len(summary.peak_bytes))
            pipelines = [coordinates(layout, rank)["pipeline"] for rank in ranks]
            self._planned.compare(summary.peak_bytes, pipelines, summary.step_seconds)
        self._judge(summary.bad_steps)

    def check(self) -> None:
        """Fail before evaluating or saving what a step that was not finite left. Collective where `nonfinite=fail`.
        Raises NotFinite."""
        step = self._state.step
        if self.config.nonfinite == FAIL and self.nonfinite.unread(step):
            flags = self.nonfinite.flags(step)
            if is_distributed():
                with waiting("the check for what is not finite"):
                    distributed.all_reduce(flags)
            self._judge(self.nonfinite.read(step, flags.tolist()))

    def evaluated(self, results: dict[str, float], note: str) -> None:
        """Log the results of an evaluation to every tracker."""
        if self._trackers is not None:
            self._log(EVALUATION, results, note)

    def flush(self) -> None:
        """Log the values by name that no log line has taken. Collective."""
        assert self._world is not None
        left = self.logged.take_where_any(self._world.device)
        if left and self._trackers is not None:
            self._log(LOGGED, left)

    def text(self, name: str, text: str) -> None:
        """Log a text to every tracker that takes texts."""
        if self._trackers is not None:
            self._log(LOGGED, {}, texts={name: text})

    def close(self) -> None:
        """Stop observing: traces, trackers, the relay of warnings and the heartbeat end, in this order."""
        error = sys.exc_info()[1]
        with ExitStack() as stack:
            stack.callback(logs.set_position, None)
            if self._heartbeat is not None:
                self._heartbeat.state("stopping")
                stack.callback(self._heartbeat.stop)
            if self._relay is not None:
                stack.callback(self._relay.stop)
            if self._trackers is not None:
                # A loop may catch Stopped and close the runner afterwards, when no exception is in flight any more.
                interrupted = error is None and self._state.interrupted
                status = Status.INTERRUPTED if interrupted else outcome_of(error).status
                stack.callback(self._finish, self._trackers, status)
            if self.profiler is not None:
                stack.callback(self.profiler.stop)
            if self._planned is not None:
                stack.callback(self._planned.close, wait=error is None)
            self.profiler, self._relay, self._heartbeat, self._planned = None, None, None, None

    def _finish(self, trackers: Trackers, status: Status) -> None:
        assert self._world is not None
        assert self._setup is not None
        world = self._world
        main = world.ranks.main and (self._lead is None or self._lead.held)
        share = goodput(world.attempt.run_directory) if main else None
        if share is not None:
            self._log(END, {"goodput": share})
        trackers.finish(status, self._setup.score.best, step=self._state.step, epoch=self._state.epoch)
        self._trackers = None

    def _judge(self, bad: list[int]) -> None:
        if not bad:
            return
        assert self._display is not None
        text = warning_of(bad, self.nonfinite.record, self.config.nonfinite)
        if self.config.nonfinite == FAIL:
            raise NotFinite(text)
        if not self._warned:
            self._warned = True
            self._display.line(f"warning: {text}")

    def _log(self, kind: str, scalars: dict[str, Any], note: str = "", texts: Mapping[str, str] | None = None) -> None:
        assert self._trackers is not None
        if self._lead is not None and self._lead.held and not self._tracks:
            self._open_trackers()  # the lead has passed to this replica group
        finite, state = {name: _finite(value) for name, value in scalars.items()}, self._state
        self._trackers.log(
            Record(
                kind=kind,
                scalars=finite,
                step=state.step,
                epoch=state.epoch,
                time=time.time(),
                note=note,
                texts=texts or {},
            )
        )

    def _scalars(self, setup: Setup, summary: Summary, lap: Lap | None, load: float | None) -> dict[str, Any]:
        scalars: dict[str, Any] = {"train.loss": summary.loss, "train.lr": setup.optimizer.param_groups[0]["lr"]}
        if self._norm is not None:
            scalars["train.grad_norm"] = float(self._norm)
        if load is not None:
            scalars["train.expert_load"] = load
        scalars |= self.group_scalars()
        scalars["train.nonfinite_steps"] = self.nonfinite.steps
        scalars["memory.peak_bytes"] = max(summary.peak_bytes)
        if len(summary.peak_bytes) > 1:
            scalars |= {f"memory.peak_bytes.rank-{rank}": each for rank, each in enumerate(summary.peak_bytes)}
        if lap is None or not lap.stepping:
            return scalars
        speed = lap.steps / lap.stepping
        per_step = setup.samples_per_step
        scalars["train.samples_per_second"] = speed * per_step
        if setup.tokens_per_sample:
            scalars["train.tokens_per_second"] = speed * per_step * setup.tokens_per_sample
        data = max(summary.data_seconds) / lap.steps
        scalars |= {
            "train.step_seconds": lap.stepping / lap.steps,
            "train.data_seconds": data,
            "train.compute_seconds": max(0.0, lap.stepping / lap.steps - data),
            PRODUCTIVE: lap.stepping,
            "evaluation.seconds": lap.evaluation,
            "checkpoint.seconds": lap.checkpoint,
        }
        if self.config.ft.enabled:
            scalars["ft.lost_seconds"] = lap.fault
        used = setup.utilisation.of(speed * per_step)
        return scalars if used is None else {**scalars, "train.mfu": used}

    def _look(self) -> dict[str, Any]:
        return {
            "step": self._state.step,
            "epoch": self._state.epoch,
            "total_steps": None if self._setup is None else self._setup.cadence.steps,
            "last_step_time": self.last_step_time,
            "peak_memory_bytes": peak_bytes(),
        }

    def _limit(self) -> float | None:
        """The time limit of collectives now, in seconds; None for torch's own."""
        comm, started = self.config.comm, self._state.past_first_step
        return comm.train_timeout_seconds if started and comm.train_timeout_seconds else comm.init_timeout_seconds

    def _indices(self, epoch: int, micro_batch: int) -> list[int] | None:
        """The samples of a micro-batch of this rank."""
        assert self._setup is not None
        loader = self._setup.loaders["train"]
        sampler, size = loader.sampler, loader.batch_size
        if not isinstance(sampler, ShardedSampler) or size is None or not self.known_epoch:
            return None
        return sampler.samples(epoch, micro_batch * size, size)


def _finite(value: Any) -> Any:
    """None for numbers that JSON has no notation for."""
    return value if value is None or (value == value and abs(value) != float("inf")) else None
