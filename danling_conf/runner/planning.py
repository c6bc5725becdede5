"""Plan of a run: what a script passes to its runner, taken where training would be prepared.

`danling-conf plan` calls the user's function as a launcher would. Whatever it does on the way (data sets, model
classes, losses) is its own code; at `Runner.prepare` the plan is made, and the function is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from danling_conf.components.batch import CountSamples
from danling_conf.parallel.measured import Loss
from danling_conf.records.run_directory import Attempt
from danling_conf.runner.batch import Forward
from danling_conf.runner.world import World
from danling_conf.schema import RunnerConfig
from danling_conf.topology.layout import layout_of, random_stream
from danling_conf.topology.rank_environment import RankEnvironment

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run is made of; see `Runner.prepare`."""

    config: RunnerConfig
    model: nn.Module | Callable[[], nn.Module] | None
    datasets: Mapping[str, Any]
    loss: Loss | None = None
    forward: Forward | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None
    count_samples: CountSamples | None = None
    tokens_per_sample: int | None = None


class _Planned(BaseException):
    """Leaves the user's function. A BaseException, so that no `except Exception` of it is in the way."""

    def __init__(self, made: Any) -> None:
        self.made = made


_planner: ContextVar[Callable[[Recipe], Any] | None] = ContextVar("planner", default=None)


def plan_of_function(function: Callable[[Any], Any], config: Any, plan: Callable[[Recipe], Made]) -> Made | None:
    """Call a script's function with its configuration up to where its runner prepares, and return what `plan` makes of
    it. None where the function prepares no runner."""
    token = _planner.set(plan)
    try:
        function(config)
    except _Planned as planned:
        made: Made = planned.made
        return made
    finally:
        _planner.reset(token)
    return None


def under_way() -> bool:
    """Whether runners are looked at instead of trained."""
    return _planner.get() is not None


def make(recipe: Recipe) -> NoReturn:
    """Make the plan and leave the user's function."""
    planner = _planner.get()
    assert planner is not None
    with _not_again():
        made = planner(recipe)
    raise _Planned(made)


@contextmanager
def _not_again() -> Iterator[None]:
    token = _planner.set(None)
    try:
        yield
    finally:
        _planner.reset(token)


def world_of(config: RunnerConfig) -> World:
    """The world of rank 0, for a script that asks before its runner prepares. It has no run directory."""
    layout = layout_of(config)
    ranks = RankEnvironment(launcher="a plan", rank=0, world_size=layout.world_size, local_rank=0, local_world_size=1)
    nowhere = Path(config.workspace_root) / "plan"
    return World(
        ranks=ranks,
        layout=layout,
        group=0,
        groups=1,
        device=torch.device("cpu"),
        mesh=None,
        expert_mesh=None,
        stream=random_stream(layout, 0, sequence_parallel=config.parallel.sequence_parallel),
        attempt=Attempt(run_directory=nowhere, directory=nowhere, seed=config.seed or 0),
        lock=None,
        repeats_signals=False,
    )
