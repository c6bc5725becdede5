"""Resuming a run: from its own checkpoint exactly, from another run's as far as the settings are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danling_conf.checkpoint.contents import alike, as_saved
from danling_conf.checkpoint.danling_files import not_taken
from danling_conf.checkpoint.fit import ModelDiffers
from danling_conf.checkpoint.folder import others
from danling_conf.checkpoint.loading import LayoutDiffers, Loaded
from danling_conf.checkpoint.manager import CheckpointManager
from danling_conf.checkpoint.manifest import Broken
from danling_conf.checkpoint.weight_sources import NothingSaved
from danling_conf.components import dataloader
from danling_conf.components.samplers import ShardedSampler, seed_of
from danling_conf.config.identity import differences, plain
from danling_conf.records.frozen import code_of, earlier_code
from danling_conf.runner import process
from danling_conf.runner.cadence import optimizer_steps
from danling_conf.runner.callbacks import Callbacks
from danling_conf.runner.setup import Setup
from danling_conf.runner.state import EXHAUSTED, TrainState
from danling_conf.runner.world import World
from danling_conf.schema import RunnerConfig
from danling_conf.schema.checkpoint import excluded
from danling_conf.schema.files import danling_checkpoint
from danling_conf.schema.printable import override, shell_line
from danling_conf.topology.violation import ABSENT, ConfigRefused, SettingError, Violation

_LOADING_ERRORS = (ValueError, RuntimeError, OSError, ImportError)


@dataclass(frozen=True, kw_only=True)
class RankState:
    """What a checkpoint holds for this rank; None for what was excluded from loading."""

    loader: dict[str, Any] | None
    generators: dict[str, Any] | None
    data_degree: int
    """How many data ranks there were."""
    path: Path | None
    """The checkpoint; None where it is the state of another replica group."""
    taken: int | None = None
    """Samples of the epoch that all ranks together had taken, where that is all that is known of the loader."""

    @property
    def exhausted(self) -> bool:
        """Whether the epoch has no further batch."""
        return self.loader == EXHAUSTED


class Resumption:
    """Loads what the attempt resumes from. All of it is collective, except what concerns the rank's own loader.

    Args:
        state: set to what the checkpoint says.
        setup: model, optimizer, schedule and score are loaded in place.
        callbacks: likewise.
    """

    def __init__(
        self,
        config: RunnerConfig,
        world: World,
        state: TrainState,
        setup: Setup,
        checkpoints: CheckpointManager,
        callbacks: Callbacks,
    ) -> None:
        self.config, self.world, self.state, self.setup, self.checkpoints = config, world, state, setup, checkpoints
        self.callbacks = callbacks
        source = world.attempt.restore
        self._named = config.resume is not None and Path(config.resume).expanduser().absolute() == source
        """Whether the user named the checkpoint (`resume`); `auto_resume` found it otherwise."""
        self._rank_state: RankState | None = None
        """Until the epoch that it belongs to begins."""

    def load(self) -> list[str]:
        """Load the checkpoint that the attempt resumes from, or pretrained weights, or nothing; returns notes for the
        user.

        Raises:
            ConfigRefused: a checkpoint is missing, broken, or does not fit. On all ranks.
        """
        notes = [
            f"{name} was not finished when the attempt before this one ended, and is removed"
            for name in self.checkpoints.unfinished
        ]
        if self.world.attempt.restore is not None:
            if self.config.pretrained is not None and not self.config.checkpoint.save_frozen:
                self._load_weights(
                    Path(self.config.pretrained).expanduser()
                )  # the checkpoint leaves out the frozen ones
            try:
                return [*notes, *self._load_run(self.world.attempt.restore)]
            except NothingSaved as error:
                if self._named:
                    raise self._unusable("resume", self.world.attempt.restore, error) from error
                notes.append(f"nothing to resume yet: {error}")
        foreign = None if self.config.resume is None else danling_checkpoint(Path(self.config.resume).expanduser())
        key, given = ("resume", str(foreign)) if foreign is not None else ("pretrained", self.config.pretrained)
        if given is not None:
            source = Path(given).expanduser()
            self._load_weights(source, key)
            notes.append(f"weights from {source}")
            if danling_checkpoint(source) is not None:
                notes.append(f"not taken from it: {', '.join(not_taken(source))}")
        return notes

    def enter_epoch(self, loader: Any) -> RankState | None:
        """Set the loader to its place in the epoch that the run resumes in; None for any later epoch.

        Returns:
            What is left to restore once the loader iterates.
        """
        found, self._rank_state = self._rank_state, None
        if found is None:
            return None
        if found.exhausted:
            return found
        if found.taken is not None:
            loader.sampler.begin_at(found.taken)
        elif found.loader is not None and found.path is not None:
            with self._taking_over(found.path, "loader"):
                dataloader.resume(loader, found.loader, data_degree=found.data_degree)
        else:
            self.state.epoch_step = 0
        return found

    def catch_up(self, taken: int | None) -> None:
        """Continue where another replica group is, whose state was taken over: `taken` samples into the epoch."""
        degree = self.world.data_degree
        self._rank_state = RankState(loader=None, generators=None, data_degree=degree, path=None, taken=taken)

    def restore_generators(self, found: RankState) -> None:
        """Restore the generators of the rank; under another number of data ranks seed new ones, which repeat nothing.

        Call it once the loader's iterator is made: making it may draw from the generators.
        """
        same = found.data_degree == self.world.data_degree
        if found.generators is not None and found.path is not None and same:
            with self._taking_over(found.path, "generators"):
                process.restore_generators(found.generators, self.world.device)
        else:
            self.seed_anew()

    def seed_anew(self) -> None:
        """Seed the generators for what comes from this step on: other numbers than before, and in every stream others.

        So does a group that catches up. Generators of the group whose state it takes over would draw the same dropout
        for other samples; its own, from the start, what it has drawn already.
        """
        process.seed_rank(seed_of(self.world.attempt.seed, 0, self.state.step), self.world.stream)

    def _load_run(self, source: Path) -> list[str]:
        """Load a run's state.

        Where the settings of optimizer or schedule are others than those that the checkpoint was made with, weights and
        the optimizer's state are loaded; the options of the optimizer's groups are this configuration's, and the
        schedule starts anew.
        """
        optimizer = self.setup.optimizer
        mine = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        loaded = self._load_checkpoint(source)
        with self._taking_over(loaded.path, "settings"):
            changed = differences(plain(self.config), loaded.shared["settings"])
        same_schedule = not any(path.startswith(("scheduler.", "optim.")) for path in changed)
        if not same_schedule:
            for group, options in zip(optimizer.param_groups, mine, strict=True):
                group.update(options)
        self._load_state(loaded.path, loaded.shared, same_schedule=same_schedule)
        self._load_rank_state(loaded)
        lines = self.callbacks.load_state(loaded.shared.get("callbacks", {}))
        if self.callbacks.load is not None:
            self.callbacks.load()
        return [*self._notes(source, loaded, same_schedule=same_schedule), *lines]

    def _load_checkpoint(self, source: Path) -> Loaded:
        """Load model and optimizer; the rest is returned. Raises NothingSaved, or ConfigRefused."""
        try:
            with self.setup.whole(loading=True) as (parts, optimizer):
                return self.checkpoints.loader.restore(
                    source,
                    parts=parts,
                    optimizer=optimizer,
                    choose=not self._named,
                    extra=self.callbacks.tensors(),
                )
        except (NothingSaved, SettingError):
            raise
        except LayoutDiffers as error:
            fix = "choose its layout, or parallel.allow_degree_change=true"
            raise ConfigRefused([Violation("parallel", ABSENT, str(error), fix)]) from error
        except _LOADING_ERRORS as error:
            # Starting anew would overwrite what an older checkpoint may still save.
            raise self._unusable("resume" if self._named else "auto_resume", source, error) from error

    def _load_weights(self, source: Path, key: str = "pretrained") -> None:
        """Load weights, and nothing else, from a checkpoint, an export or safetensors. Raises ConfigRefused."""
        try:
            with self.setup.whole(loading=True) as (parts, _):
                self.checkpoints.loader.load_weights(source, parts)
        except SettingError:
            raise
        except _LOADING_ERRORS as error:
            raise self._unusable(key, source, error) from error

    def _load_state(self, path: Path, shared: Mapping[str, Any], *, same_schedule: bool) -> None:
        saved, setup = shared.get("runner", {}), self.setup
        with self._taking_over(path, "runner"):
            self.state.load_state_dict(saved)
            if "score" in saved:
                setup.score.load_state_dict(saved["score"])
        if same_schedule and "scheduler" in shared:
            # Without the optimizer, its groups have the initial rates.
            fresh = any(part.partition(".")[0] == "optimizer" for part in excluded(self.config.checkpoint))
            with self._taking_over(path, "scheduler"):
                present = setup.schedule.state_dict()
                if present is not None and not alike(shared["scheduler"], present):
                    raise Broken(f"{path}: its scheduler is not what was saved of one of {self.config.scheduler.type}")
                setup.schedule.load_state_dict(shared["scheduler"], rates=fresh)
        if setup.scaler is not None and shared.get("scaler") is not None:
            with self._taking_over(path, "scaler"):
                setup.scaler.load_state_dict(shared["scaler"])

    def _load_rank_state(self, loaded: Loaded) -> None:
        degree, train = loaded.facts.data_degree, self.setup.loaders["train"]
        # Generators of another replica group would make this one draw what that one draws.
        own = loaded.facts.group == self.world.group
        found = RankState(
            loader=loaded.own.get("loader"),
            generators=loaded.own.get("generators") if own else None,
            data_degree=degree,
            path=loaded.path,
        )
        if degree != self.world.data_degree and found.loader is not None and not found.exhausted:
            if not isinstance(train.sampler, ShardedSampler):
                raise SettingError(
                    "parallel",
                    ABSENT,
                    "the training data is iterable and shards itself, and its place is known for "
                    f"{degree} data ranks only",
                    "resume with as many, or exclude dataloaders (checkpoint.exclude_from_loading), which begins the "
                    "epoch anew",
                )
            with self._taking_over(loaded.path, "loader"):
                self.state.epoch_step = self._steps_before(train, found.loader, degree)
        self._rank_state = found

    def _steps_before(self, loader: Any, saved: Mapping[str, Any], data_degree: int) -> int:
        """Optimizer steps of the epoch that are done, counted back from its end as this run will reach it."""
        size = loader.batch_size or 1
        taken = dataloader.taken_by_all(saved, batch_size=size, data_degree=data_degree)
        left = int(loader.sampler.left(taken)) // size
        return max(0, (self.setup.cadence.steps_per_epoch or 0) - optimizer_steps(self.config, left))

    def _notes(self, source: Path, loaded: Loaded, *, same_schedule: bool) -> list[str]:
        attempt = self.world.attempt
        notes = [*loaded.notes, f"resumed at step {loaded.facts.step} from {loaded.path}"]
        if not same_schedule:
            notes.append("the learning-rate schedule starts anew: its settings or the optimizer's differ")
        if loaded.facts.made_under != self.checkpoints.layout:
            notes.append(f"written under {loaded.facts.layout}, resumed under {self.checkpoints.layout_name}")
        if source.is_relative_to(attempt.run_directory):
            before, now = earlier_code(attempt), code_of(attempt)
            if before not in (None, now):
                notes.append(f"the attempt before this one ran other code: {before}, and this one runs {now}")
        return notes

    @contextmanager
    def _taking_over(self, path: Path, part: str) -> Iterator[None]:
        """Refuse a part of a checkpoint that is not what a run has saved."""
        try:
            with as_saved(path, part):
                yield
        except Broken as error:
            source = self.world.attempt.restore or path
            raise self._unusable("resume" if self._named else "auto_resume", source, error) from error

    def _unusable(self, key: str, source: Path, error: Exception) -> ConfigRefused:
        """The refusal of a checkpoint that cannot be loaded."""
        found = others(source, self.checkpoints.section.dir_name) if source.is_dir() else []
        fix = f"choose another checkpoint, such as {found[0]}" if found else "choose another run or checkpoint"
        value: Any = str(source)
        if isinstance(error, ImportError):
            fix = "pip install safetensors"
        elif key == "auto_resume":
            value = True
            other = f"{shell_line(override('resume', found[0]))}, or " if found else ""
            fix = f"{other}auto_resume=false starts another run"
        elif isinstance(error, ModelDiffers):
            fix += ", or checkpoint.exclude_from_loading=[model.NAME] leaves a part of it as it is"
        return ConfigRefused([Violation(key, value, str(error), fix)])
