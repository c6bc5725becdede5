"""Everything that watches a run, behind a few calls of the loop: it changes nothing of what is trained.

loop                          here
`look` at each micro-batch    losses that are not finite
`stepped` at each step        the heartbeat's clock, the profiler's schedule
`log_line`                    speed, memory, loss: one reduction over the ranks, to every tracker
`evaluated`                   results, to every tracker
`state`                       what the rank does now, in its heartbeat
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from danling_conf._torch_private import record_collectives
from danling_conf.components import profiler
from danling_conf.components.samplers import ShardedSampler
from danling_conf.config.identity import flatten, plain
from danling_conf.parallel import expert
from danling_conf.records import logs
from danling_conf.records.metrics import PRODUCTIVE, goodput
from danling_conf.records.run_directory import Attempt
from danling_conf.records.status import Status, outcome_of
from danling_conf.runner.observe import collective_timeout as stuck
from danling_conf.runner.observe import memory
from danling_conf.runner.observe.heartbeat import Heartbeat
from danling_conf.runner.observe.log_pace import LogPace
from danling_conf.runner.observe.nonfinite import FAIL, NonFinite, NotFinite, told
from danling_conf.runner.observe.stopwatch import Lap, Stopwatch
from danling_conf.runner.observe.summary import Summary, summarise
from danling_conf.runner.observe.trackers.choose import Trackers
from danling_conf.runner.observe.trackers.tracker import END, EVALUATION, TRAINING, Record, RunFacts
from danling_conf.runner.observe.warning_relay import WarningRelay
from danling_conf.schema import RunnerConfig
from danling_conf.topology.rank_environment import RankEnvironment

if TYPE_CHECKING:
    from danling_conf.runner.training import Runner

_log = logging.getLogger(__name__)


class Observers:
    """Heartbeat, trackers, clocks, profiler and the watch for what is not finite, of one rank.

    Attributes:
        stopwatch: where wall time goes.
        nonfinite: steps whose loss or gradients are not finite.
    """

    def __init__(self, config: RunnerConfig) -> None:
        self.config = config
        self.stopwatch = Stopwatch()
        self.last_step_time: float | None = None
        self._heartbeat: Heartbeat | None = None
        self._profiler: profiler.StepProfiler | None = None
        self._trackers: Trackers | None = None
        self._relay: WarningRelay | None = None
        self._runner: Runner | None = None
        self._norm: torch.Tensor | None = None
        self._told = False
        self.known_epoch = True
        """Whether the place in the current epoch says which samples a batch has."""
        if config.heartbeat.enabled:
            record_collectives()  # before there is a process group

    def begin(self, attempt: Attempt, ranks: RankEnvironment) -> None:
        """The attempt is known: give signs of life. Once; later calls do nothing."""
        if self._heartbeat is not None:
            return
        facts = {"attempt": attempt.directory.name, "rank": ranks.rank, "world_size": ranks.world_size}
        self._heartbeat = Heartbeat.of_run(
            self.config.heartbeat,
            attempt.run_directory,
            facts=facts,
            look=self._look,
            limit=self._limit,
            overdue=lambda collective, waited: _log.warning(
                "%s", stuck.late(attempt, self.config, ranks.world_size, collective, waited)
            ),
        )
        self._heartbeat.start()

    def joined(self, runner: Runner) -> None:
        """The ranks have met. Collective."""
        self._runner = runner
        world = runner.world
        self.begin(world.attempt, world.ranks)
        logs.set_position(lambda: runner.global_step)
        self._relay = WarningRelay(world.ranks)
        self._relay.start()

    def prepared(self, runner: Runner) -> None:
        """Everything is built and restored: open the trackers, and start clocks."""
        config, world = self.config, runner.world
        attempt = world.attempt
        self.nonfinite = NonFinite(
            config.nonfinite,
            device=runner.device,
            indices=self._indices,
            record=attempt.directory / f"nonfinite-rank-{world.ranks.rank}.jsonl",
        )
        self.nonfinite.begin(runner.global_step)
        cadence = runner.cadence
        loss_decides = "train.loss" in (runner.score.key, config.scheduler.monitor)
        self.pace = LogPace(
            cadence.log_every,
            fixed=config.log_interval is not None or loss_decides,
            length_known=cadence.steps is not None,
        )
        self._profiler = profiler.make(
            config.profiling,
            attempt.run_directory,
            rank=world.ranks.rank,
            attempt=attempt.directory.name,
            device=runner.device,
            step=runner.global_step,
            say=runner.progress.line,
        )
        self._trackers = Trackers(config, runner.progress, main=world.ranks.main)
        facts = RunFacts(
            attempt=attempt,
            settings=flatten(plain(config)),
            lineage=config.lineage,
            experiment=config.experiment,
            step=runner.global_step,
            score_key=runner.score.key,
        )
        self._trackers.start(facts, epoch=runner.epoch)

    def state(self, what: str) -> None:
        """Say what the rank does now (`heartbeat_file.STATES`)."""
        if self._heartbeat is not None:
            self._heartbeat.state(what)

    @property
    def waited_for(self) -> dict[str, Any] | None:
        """The collective that this rank was last seen to wait in; None where nobody looked (no heartbeat)."""
        return None if self._heartbeat is None else self._heartbeat.waited_for

    def first_step(self, step: int) -> None:
        """The first step is done: compilation is over, and clocks start."""
        self.stopwatch.restart(step)
        self.pace.begin(step)

    def norm(self, norm: torch.Tensor, step: int, epoch: int, *, expected: bool) -> None:
        """Take the gradients' norm of the step under way. `expected`: a loss scaler deals with what is not finite."""
        self._norm = norm
        if not expected:
            self.nonfinite.look(norm, step, epoch, -1)

    def stepped(self) -> None:
        """An optimizer step is done."""
        self.last_step_time = time.time()
        if self._profiler is not None:
            self._profiler.step()

    def log_line(self, runner: Runner) -> None:
        """Say how the steps since the last line went, everywhere. Collective. Raises NotFinite."""
        step = runner.global_step
        lap = self.stopwatch.lap(step)
        summary = summarise(runner._meter, self.nonfinite, lap, step, runner.device)
        if summary.loss is not None:
            runner.results["train.loss"] = summary.loss
        load = expert.busiest(runner.parts, runner.assembled.batch, runner.device)
        if load is not None:
            runner.results["train.expert_load"] = load
        self.pace.logged(step, summary.step_seconds)
        if self._trackers is not None:
            scalars = self._scalars(runner, summary, lap, load)
            self._log(TRAINING, scalars, runner)
        if self._relay is not None:
            self._relay.show()
        self._judge(summary.bad_steps, runner)

    def check(self, runner: Runner) -> None:
        """Before what must not happen after a step that was not finite. Collective where `nonfinite=fail`. Raises
        NotFinite."""
        if self.config.nonfinite == FAIL and runner.global_step > self.nonfinite._read_at:
            flags = self.nonfinite.flags(runner.global_step)
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                torch.distributed.all_reduce(flags)
            self._judge(self.nonfinite.read(runner.global_step, flags.tolist()), runner)

    def evaluated(self, runner: Runner, results: dict[str, float], note: str) -> None:
        """Tell the results of an evaluation everywhere."""
        if self._trackers is not None:
            self._log(EVALUATION, results, runner, note)

    def close(self) -> None:
        """Stop watching: traces, trackers, the passing on of warnings and the heartbeat end, in this order."""
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
                stopped = error is None and self._runner is not None and bool(self._runner.stop_request.number)
                status = Status.INTERRUPTED if stopped else outcome_of(error).status
                stack.callback(self._finish, self._trackers, status)
            if self._profiler is not None:
                stack.callback(self._profiler.stop)
            self._profiler, self._relay, self._heartbeat = None, None, None

    def _finish(self, trackers: Trackers, status: Status) -> None:
        assert self._runner is not None
        world = self._runner.world
        share = goodput(world.attempt.run_directory) if world.ranks.main else None
        if share is not None:
            self._log(END, {"goodput": share}, self._runner)
        trackers.finish(status, self._runner.score.best)
        self._trackers = None

    def _judge(self, bad: list[int], runner: Runner) -> None:
        if not bad:
            return
        said = told(bad, self.nonfinite.record, self.config.nonfinite)
        if self.config.nonfinite == FAIL:
            raise NotFinite(said)
        if not self._told:
            self._told = True
            runner.progress.line(f"warning: {said}")

    def _log(self, kind: str, scalars: dict[str, Any], runner: Runner, note: str = "") -> None:
        assert self._trackers is not None
        finite = {name: _finite(value) for name, value in scalars.items()}
        self._trackers.log(
            Record(kind=kind, scalars=finite, step=runner.global_step, epoch=runner.epoch, time=time.time(), note=note)
        )

    def _scalars(self, runner: Runner, summary: Summary, lap: Lap | None, load: float | None) -> dict[str, Any]:
        scalars: dict[str, Any] = {"train.loss": summary.loss, "train.lr": runner.optimizer.param_groups[0]["lr"]}
        if self._norm is not None:
            scalars["train.grad_norm"] = float(self._norm)
        if load is not None:
            scalars["train.expert_load"] = load
        scalars["train.nonfinite_steps"] = self.nonfinite.steps
        scalars["memory.peak_bytes"] = max(summary.peak_bytes)
        if len(summary.peak_bytes) > 1:
            scalars |= {f"memory.peak_bytes.rank-{rank}": each for rank, each in enumerate(summary.peak_bytes)}
        if lap is None or not lap.stepping:
            return scalars
        speed = lap.steps / lap.stepping
        per_step = runner.samples_per_step
        scalars["train.samples_per_second"] = speed * per_step
        if runner.tokens_per_sample:
            scalars["train.tokens_per_second"] = speed * per_step * runner.tokens_per_sample
        data = max(summary.data_seconds) / lap.steps
        scalars |= {
            "train.step_seconds": lap.stepping / lap.steps,
            "train.data_seconds": data,
            "train.compute_seconds": max(0.0, lap.stepping / lap.steps - data),
            PRODUCTIVE: lap.stepping,
            "evaluation.seconds": lap.evaluation,
            "checkpoint.seconds": lap.checkpoint,
        }
        used = None if runner.utilisation is None else runner.utilisation.of(speed * per_step)
        return scalars if used is None else {**scalars, "train.mfu": used}

    def _look(self) -> dict[str, Any]:
        runner = self._runner
        if runner is None:
            return {"step": 0, "epoch": 0, "total_steps": None, "last_step_time": None, "data_seconds": 0.0}
        cadence = getattr(runner, "cadence", None)
        return {
            "step": runner.global_step,
            "epoch": runner.epoch,
            "total_steps": None if cadence is None else cadence.steps,
            "last_step_time": self.last_step_time,
            "peak_memory_bytes": memory.peak_bytes(),
        }

    def _limit(self) -> float | None:
        """Of collectives, as things stand."""
        runner, comm = self._runner, self.config.comm
        started = runner is not None and runner.global_step >= runner._first_step
        return comm.train_timeout_seconds if started and comm.train_timeout_seconds else comm.init_timeout_seconds

    def _indices(self, epoch: int, micro_batch: int) -> list[int] | None:
        """The samples of a micro-batch of this rank."""
        runner = self._runner
        assert runner is not None
        loader = runner.loaders["train"]
        sampler, size = loader.sampler, loader.batch_size
        if not isinstance(sampler, ShardedSampler) or size is None or not self.known_epoch:
            return None
        return sampler.order(epoch)[micro_batch * size : (micro_batch + 1) * size]


def _finite(value: Any) -> Any:
    """None for what JSON cannot say."""
    return value if value is None or (value == value and abs(value) != float("inf")) else None
