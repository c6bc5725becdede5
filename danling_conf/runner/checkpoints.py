"""Checkpoints of a loop of one's own: any number of models and optimizers, saved and resumed as the Runner's are.

The files, the guarantees and the settings are those of `danling_conf.checkpoint`; what the loop has beside models and
optimizers comes as objects with `state_dict` and `load_state_dict`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from danling_conf.checkpoint.background import SaveFailed
from danling_conf.checkpoint.contents import as_saved
from danling_conf.checkpoint.loading import LayoutDiffers, Loaded
from danling_conf.checkpoint.manager import CheckpointManager
from danling_conf.checkpoint.several import Optimizers
from danling_conf.checkpoint.weight_sources import NothingSaved
from danling_conf.components.samplers import seed_of
from danling_conf.config.identity import layout_name, plain
from danling_conf.records.stopped import Stopped
from danling_conf.runner import process
from danling_conf.runner.batches import Batches
from danling_conf.runner.cadence import cadence_of
from danling_conf.runner.conclusion import resume_stopped_command
from danling_conf.runner.signals import StopRequest
from danling_conf.runner.world import World
from danling_conf.schema import RunnerConfig
from danling_conf.topology.violation import ABSENT, ConfigRefused, SettingError, Violation, refused

_log = logging.getLogger(__name__)
_FAILING_SECONDS = 60.0
"""How long a loop that fails waits for a save that is under way."""


class Stateful(Protocol):
    """Anything that can be saved: a scheduler, a loss scaler, an average of weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


class Checkpoints:
    """Saves and resumes a loop that counts optimizer steps. A context manager: leaving it waits for the last save.

    Everything is collective. A signal that asks the run to stop (SIGTERM, SIGINT, SIGUSR1, SIGUSR2) is agreed on by all
    ranks in `after_step`, which saves and leaves; with several ranks, one step after it arrived. The options of the
    optimizers' groups are resumed as well. Models and optimizers are saved whole under any layout without a pipeline.
    Names in the checkpoint are `<model>.<parameter>`.

    Args:
        config: the whole configuration: it is saved, and compared when the run is resumed.
        world: of `join`.
        models: by name, as `assemble` returns them, on their device and with values.
        optimizers: by name; no two have the same parameter.
        batches: of the training split, which resume at the very batch.
        others: whatever else the loop needs, the same on all ranks, by name; states of plain values and tensors.

    Raises:
        ConfigRefused: the layout has a pipeline, `steps` is unset, or two optimizers have the same parameter.
    """

    def __init__(
        self,
        config: RunnerConfig,
        world: World,
        *,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        batches: Batches | None = None,
        others: Mapping[str, Stateful] | None = None,
    ) -> None:
        if world.layout.pipeline > 1:
            rule = "no rank of a pipeline has a whole model, which a loop of one's own needs"
            fix = "set it to 1, or use the Runner"
            raise ConfigRefused([Violation("parallel.axes.pipeline", world.layout.pipeline, rule, fix)])
        if config.steps is None:
            rule = "a loop of one's own counts optimizer steps"
            raise ConfigRefused([Violation("steps", None, rule, "set steps, and epochs=null")])
        self._config, self._world, self._batches, self._others = config, world, batches, dict(others or {})
        # One module of all: a name in the checkpoint begins with that of its model.
        self._parts = [nn.ModuleDict({name: _without_ddp(model) for name, model in models.items()})]
        with refused():
            self._optimizer: Any = Optimizers(optimizers)
        self._cadence = cadence_of(config, None)
        self.manager = CheckpointManager(
            config.checkpoint,
            world.attempt.run_directory,
            rank=world.ranks.rank,
            layout=world.layout,
            layout_name=layout_name(world.layout),
            allow_degree_change=config.parallel.allow_degree_change,
            check_token=world.attempt.check_token,
            token=world.attempt.token,
            on_node=(world.ranks.local_rank, world.ranks.local_world_size),
        )
        self._stop_request = StopRequest(second_ends=not world.repeats_signals)

    def restore(self) -> int:
        """Load what the run resumes from (`resume`, `auto_resume`), else weights alone (`pretrained`); then set the
        generators of this rank: as they were, or seeded.

        Returns:
            Optimizer steps done.

        Raises:
            ConfigRefused: there is nothing to resume, it is broken, or it does not fit. On all ranks.
        """
        world = self._world
        process.seed_rank(world.attempt.seed, world.stream)
        if world.attempt.restore is not None:
            step = self._restore(world.attempt.restore)
            if step is not None:
                return step
        if self._config.pretrained is not None:
            source = Path(self._config.pretrained).expanduser()
            with _unusable("pretrained", source), refused():
                self.manager.loader.load_weights(source, self._parts)
        return 0

    def _restore(self, source: Path) -> int | None:
        """Load a run; None where `auto_resume` found nothing saved."""
        named = self._config.resume is not None and Path(self._config.resume).expanduser().absolute() == source
        with _unusable("resume" if named else "auto_resume", source), refused():
            try:
                loaded = self.manager.loader.restore(
                    source, parts=self._parts, optimizer=self._optimizer, choose=not named
                )
            except NothingSaved:
                if named:
                    raise
                return None
            self._load_others(source, loaded)
        return loaded.facts.step

    def _load_others(self, source: Path, loaded: Loaded) -> None:
        """Load what is neither model nor optimizer."""
        world = self._world
        for note in loaded.notes:
            _log.warning("%s", note)
        others = loaded.shared.get("runner", {}).get("others", {})
        for name, item in self._others.items():
            if name not in others:
                rule = f"{loaded.path}: it holds no {name}"
                raise SettingError("resume", str(source), rule, "choose a run that saved it")
            item.load_state_dict(others[name])
        degree = loaded.facts.data_degree
        if self._batches is not None and loaded.own.get("loader") is not None:
            with as_saved(loaded.path, "loader"):
                self._batches.load_state_dict(loaded.own["loader"], data_degree=degree)
        generators = loaded.own.get("generators")
        if generators is not None and degree == world.data_degree:
            with as_saved(loaded.path, "generators"):
                process.restore_generators(generators, world.device)
        else:  # other generators, which repeat nothing
            process.seed_rank(seed_of(world.attempt.seed, 0, loaded.facts.step), world.stream)

    def after_step(self, step: int) -> None:
        """Save where a checkpoint is due after this step (every `checkpoint.interval` steps, and after the last), and
        where a signal asked the run to stop.

        Args:
            step: optimizer steps done.

        Raises:
            SaveFailed: also for an earlier save in the background.
            Stopped: a signal asked for it, and the step is saved.
        """
        self.manager.check()
        every, last = self._cadence.save_every, step == self._config.steps
        due = last or (every is not None and step % every == 0)
        if due:
            self.save(step, history=self._cadence.keeps_history and not last)
        number = self._stop_request.signal_on_any_rank()
        if number and not last:
            self._leave(step, number, saved=due)

    def _leave(self, step: int, number: int, *, saved: bool) -> None:
        enabled = self.manager.enabled
        if enabled and not saved:
            self.save(step, history=False)
        self.manager.drain()
        stopped, world = Stopped(number), self._world
        if world.ranks.main:
            print(f"{stopped}; {f'saved at step {step}' if enabled else 'nothing is saved'}", flush=True)
            if enabled:
                print(f"to resume: {resume_stopped_command(world.attempt, world.ranks)}", flush=True)
        raise stopped

    def save(self, step: int, *, history: bool = True, best: bool = False) -> None:
        """Save everything as it is now.

        Args:
            step: optimizer steps done.
            history: whether the checkpoint is kept when a later one takes its names.
            best: whether `best` points to it.

        Raises SaveFailed.
        """
        shared = {
            "settings": plain(self._config),
            "scheduler": None,
            "scaler": None,
            "runner": {
                "global_step": step,
                "others": {name: item.state_dict() for name, item in self._others.items()},
            },
        }
        own = {
            "loader": None if self._batches is None else self._batches.state_dict(),
            "generators": process.generator_state(self._world.device),
        }
        self.manager.save(
            parts=self._parts,
            optimizer=self._optimizer,
            shared=shared,
            own=own,
            step=step,
            epoch=0 if self._batches is None else self._batches.epoch,
            history=history,
            best=best,
        )

    def __enter__(self) -> Checkpoints:
        limit = self._config.comm.init_timeout_seconds
        self._stop_request.install(None if limit is None else timedelta(seconds=limit))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failing = error is not None and not isinstance(error, Stopped)
        try:
            if self._batches is not None:
                self._batches.close()
            self.manager.drain(_FAILING_SECONDS if failing else None)
        except SaveFailed as failure:
            if not failing:
                raise
            _log.warning("%s", failure)  # the loop fails by something else, which is what is shown
        finally:
            self._stop_request.remove(failing=failing)
            self.manager.close()


def _without_ddp(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def _unusable(key: str, source: Path) -> Iterator[None]:
    """Turn what the loader raises into the refusal of the setting that named the source."""
    try:
        yield
    except ConfigRefused:
        raise
    except LayoutDiffers as error:
        fix = "choose its layout, or parallel.allow_degree_change=true"
        raise ConfigRefused([Violation("parallel", ABSENT, str(error), fix)]) from error
    except ImportError as error:
        raise ConfigRefused([Violation(key, str(source), str(error), "pip install safetensors")]) from error
    except (ValueError, RuntimeError, OSError) as error:
        # Starting anew would overwrite what an older checkpoint may still save.
        fix = "choose another run or checkpoint"
        raise ConfigRefused([Violation(key, str(source), str(error), fix)]) from error
