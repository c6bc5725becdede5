"""Callbacks of a run: code of the user's that the loop calls at fixed points, with state in the checkpoint.

Hooks are bound once, before the first step: a hook that no callback has costs one comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from danling_conf.checkpoint.loading import gather_objects
from danling_conf.components.instantiate import from_target
from danling_conf.records.status import HasOutcome
from danling_conf.runner.world import World
from danling_conf.schema import RunnerConfig
from danling_conf.schema.runner import callback_entries
from danling_conf.topology.violation import ABSENT, ConfigRefused, SettingError

Hook = Callable[..., None]

PREFIX = "callbacks."
"""Of the names of callbacks' tensors in a checkpoint: `callbacks.EMA.weights.0`."""


class TrainingRun(Protocol):
    """What a callback may use of the runner: its public attributes, see `Runner`."""

    config: RunnerConfig
    world: World
    device: torch.device

    @property
    def global_step(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def results(self) -> dict[str, float]: ...
    @property
    def setup(self) -> Any: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def parts(self) -> Sequence[nn.Module]: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def scheduler(self) -> Any: ...
    @property
    def loaders(self) -> dict[str, Any]: ...

    def log(self, name: str, value: float | Tensor) -> None: ...
    def log_text(self, name: str, text: str) -> None: ...
    def stop(self, reason: str = "") -> None: ...


class Callback:
    """Base class of callbacks. Override the hooks that are needed; every rank calls them at the same point.

    Each hook is passed the runner, of which a callback uses the public attributes (`TrainingRun`). Callbacks are called
    in their order, those of the configuration first; hooks that end something (`_end`) in reverse order, so that what
    one callback changes at a start encloses those after it. A hook may use collectives if it does so on every rank.

    An exception that a hook raises ends the run as `CallbackFailed`, which names the callback. To end the run in order
    call `runner.stop()`.

    Attributes:
        name: key of the state in a checkpoint. None: the name of the class. Two callbacks of a run need two names.
    """

    name: str | None = None

    def setup(self, runner: TrainingRun) -> None:
        """Everything is built, and nothing is loaded yet: make what a checkpoint is loaded into."""

    def on_load(self, runner: TrainingRun) -> None:
        """A checkpoint is loaded, this callback's state too. Not called in a run that starts anew."""

    def on_fit_start(self, runner: TrainingRun) -> None:
        """Everything is built and loaded; `Runner.prepare` ends with this."""

    def on_step_start(self, runner: TrainingRun) -> None:
        """An optimizer step begins: before the first of its micro-batches."""

    def on_before_optimizer_step(self, runner: TrainingRun) -> None:
        """The gradients of the step are complete and unscaled, and not clipped yet."""

    def on_step_end(self, runner: TrainingRun) -> None:
        """The optimizer has stepped and `runner.global_step` counts it; evaluation and saving come after this."""

    def on_log(self, runner: TrainingRun) -> None:
        """A log line is due: what is logged here is part of it."""

    def on_evaluation_start(self, runner: TrainingRun, split: str) -> None:
        """A split will be evaluated."""

    def on_evaluation_end(self, runner: TrainingRun, split: str, results: Mapping[str, float]) -> None:
        """A split was evaluated. `results` by `split.name`; empty where the evaluation failed."""

    def on_export_start(self, runner: TrainingRun) -> None:
        """The model alone will be exported."""

    def on_export_end(self, runner: TrainingRun) -> None:
        """The model was exported, or that failed."""

    def on_save(self, runner: TrainingRun) -> None:
        """A checkpoint will be saved; the state is asked for after this."""

    def on_exception(self, runner: TrainingRun, error: BaseException) -> None:
        """The run ends by an exception, also by `Stopped`, after which it is resumed. Not every rank need call this."""

    def on_fit_end(self, runner: TrainingRun) -> None:
        """The run is complete: evaluated and saved."""

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint: plain values and whole tensors, the same on every rank (rank 0's is saved)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors for the checkpoint that may be sharded as parameters are, by name; loaded in place.

        In a pipeline, each stage returns those of its own parameters, by the names of the whole model.
        """
        return {}


class CallbackFailed(RuntimeError):
    """A callback raised an exception. The message names the callback, the hook and the exception, which is the cause.

    Attributes:
        key: name of the callback.
        hook: name of the hook.
    """

    def __init__(self, key: str, hook: str, error: Exception) -> None:
        self.key, self.hook = key, hook
        super().__init__(f"callback {key}, {hook}: {type(error).__name__}: {error}")


class Callbacks:
    """The callbacks of a run. Each hook is one callable, or None where no callback overrides it.

    Args:
        items: in the order in which they are called.
        runner: passed to every hook.

    Raises:
        SettingError: two callbacks have one name, or a name holds a dot.
    """

    def __init__(self, items: Iterable[Callback], runner: TrainingRun) -> None:
        self._runner = runner
        self._items: dict[str, Callback] = {}
        for item in items:
            key = item.name or type(item).__name__
            if key in self._items:
                raise SettingError("callbacks", key, "two callbacks have this name", "set the `name` of one of them")
            if "." in key:
                raise SettingError("callbacks", key, "a callback's name holds no dot", "rename it")
            self._items[key] = item
        self.setup = self._bound("setup")
        self.load = self._bound("on_load")
        self.fit_start = self._bound("on_fit_start")
        self.step_start = self._bound("on_step_start")
        self.before_optimizer_step = self._bound("on_before_optimizer_step")
        self.step_end = self._bound("on_step_end")
        self.log = self._bound("on_log")
        self.evaluation_start = self._bound("on_evaluation_start")
        self.evaluation_end = self._bound("on_evaluation_end")
        self.export_start = self._bound("on_export_start")
        self.export_end = self._bound("on_export_end")
        self.save = self._bound("on_save")
        self.exception = self._bound("on_exception")
        self.fit_end = self._bound("on_fit_end")

    def __bool__(self) -> bool:
        return bool(self._items)

    @property
    def keys(self) -> list[str]:
        """Names of the callbacks, in their order."""
        return list(self._items)

    def check_ranks(self) -> None:
        """Refuse ranks with different callbacks, whose saves would wait for each other. Collective."""
        size = self._runner.world.ranks.world_size
        everywhere = gather_objects(self.keys, size) if size > 1 else [self.keys]
        for rank, keys in enumerate(everywhere):
            if keys != everywhere[0]:
                rule = (
                    f"rank {rank} has {', '.join(keys) or 'none'}, and rank 0 has {', '.join(everywhere[0]) or 'none'}"
                )
                fix = "pass the same callbacks on every rank, and look at runner.world.ranks.main inside of them"
                raise SettingError("callbacks", ABSENT, rule, fix)

    def state_dict(self) -> dict[str, Any]:
        """The state of every callback by its name, the tensors of `tensors` left out."""
        return {key: item.state_dict() for key, item in self._items.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of every callback, by their names in a checkpoint; the very tensors, not copies."""
        return {
            f"{PREFIX}{key}.{name}": tensor
            for key, item in self._items.items()
            for name, tensor in item.tensors().items()
        }

    def load_state(self, saved: Mapping[str, Any]) -> list[str]:
        """Load the states of a checkpoint. Returns a line for each callback that only the checkpoint or the run has."""
        for key, item in self._items.items():
            if key in saved:
                item.load_state_dict(saved[key])
        new = [f"callback {key}: the checkpoint holds no state of it, and it starts anew" for key in self._items]
        gone = [f"callback {key}: the checkpoint holds its state, and this run has no such callback" for key in saved]
        return [
            line
            for keys, lines, other in ((self._items, new, saved), (saved, gone, self._items))
            for key, line in zip(keys, lines, strict=True)
            if key not in other
        ]

    def _bound(self, hook: str) -> Hook | None:
        methods = [
            (key, getattr(item, hook))
            for key, item in self._items.items()
            if getattr(type(item), hook) is not getattr(Callback, hook)
        ]
        if not methods:
            return None
        if hook.endswith("_end"):
            methods.reverse()

        def call(*arguments: Any) -> None:
            for key, method in methods:
                try:
                    method(self._runner, *arguments)
                except (ConfigRefused, SettingError):
                    raise
                except Exception as error:
                    if isinstance(error, HasOutcome):
                        raise
                    raise CallbackFailed(key, hook, error) from error

        return call


def configured(config: RunnerConfig) -> list[Callback]:
    """The callbacks that a configuration names: each entry of `callbacks` has a `_target_` and its arguments.

    Raises:
        SettingError: a target cannot be imported or called, or makes no callback.
    """
    made: list[Callback] = []
    for path, entry in callback_entries(config):
        found = from_target(entry, path)
        if not isinstance(found, Callback):
            rule = f"it makes a {type(found).__name__}, which is no danling_conf.Callback"
            raise SettingError(f"{path}._target_", entry["_target_"], rule, "name a subclass of danling_conf.Callback")
        made.append(found)
    return made


def given(callbacks: Iterable[Any]) -> list[Callback]:
    """The callbacks that were passed in code. Raises TypeError for an object that is none."""
    items = list(callbacks)
    for item in items:
        if not isinstance(item, Callback):
            raise TypeError(f"callbacks: {item!r} is no danling_conf.Callback: pass instances of its subclasses")
    return items
