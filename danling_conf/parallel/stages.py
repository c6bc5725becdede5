"""A model cut into the stages of a pipeline: which module belongs to which, and a model of each stage."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from danling_conf.parallel.blocks import repeated_blocks
from danling_conf.parallel.pass_through import PassThrough
from danling_conf.schema.parallel import MULTI_STAGE_SCHEDULES, V_SCHEDULES
from danling_conf.topology.violation import ABSENT, SettingError

Names = list[list[str]]
"""Fully qualified names of the modules of each stage."""


def stages_per_rank(schedule: str) -> int:
    """Stages that each rank has where the configuration names none."""
    return 2 if schedule in MULTI_STAGE_SCHEDULES else 1


def placement(schedule: str, degree: int, count: int) -> list[int]:
    """The pipeline rank of each of `count` stages: round after round, or there and back (a V)."""
    if schedule in V_SCHEDULES:
        return [stage if stage < degree else count - 1 - stage for stage in range(count)]
    return [stage % degree for stage in range(count)]


def deal_out(model: nn.Module, count: int) -> Names:
    """Cut a model into `count` stages by its repeated blocks, as evenly as their number allows, the first stages having
    one more. Modules defined before the blocks go to the first stage, those after them to the last.

    Raises SettingError for a model whose blocks are too few, or are not one after another in one container, and for a
    parameter that no module below the root's containers holds.
    """
    blocks = [name for name, _ in repeated_blocks(model)]
    containers = sorted({name.rpartition(".")[0] for name in blocks})
    fix = "name the modules of each stage in parallel.module_fqns_per_model_part"
    if len(containers) != 1:
        found = f"has blocks in {', '.join(containers)}" if containers else "has no repeated blocks"
        rule = f"{type(model).__name__} {found}, which does not say how to cut it"
        raise SettingError("parallel.axes.pipeline", ABSENT, rule, fix)
    if len(blocks) < count:
        rule = f"{type(model).__name__} has {len(blocks)} repeated blocks for {count} stages"
        raise SettingError("parallel.axes.pipeline", ABSENT, rule, "choose a smaller degree or a deeper model")
    before, after = _around(model, containers[0], fix)
    size, more = divmod(len(blocks), count)
    stages: Names = []
    start = 0
    for stage in range(count):
        end = start + size + (stage < more)
        stages.append(blocks[start:end])
        start = end
    stages[0] = [*before, *stages[0]]
    stages[-1] = [*stages[-1], *after]
    return stages


def check(model: nn.Module, stages: Sequence[Sequence[str]]) -> None:
    """Refuse a division that leaves a parameter out, has it twice, or parts tied ones. Raises SettingError."""
    path = "parallel.module_fqns_per_model_part"
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    stage_of: dict[str, int] = {}
    for index, names in enumerate(stages):
        for name in names:
            if name not in modules or not name:
                raise SettingError(
                    f"{path}[{index}]", name, f"{type(model).__name__} has no module of this name", "correct the name"
                )
            if name in stage_of:
                raise SettingError(
                    f"{path}[{index}]", name, f"it is in stages {stage_of[name]} and {index}", "name it once"
                )
            stage_of[name] = index
    stages_of: defaultdict[int, dict[int, str]] = defaultdict(dict)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners = [prefix for prefix in _prefixes(name) if prefix in stage_of]
        if len(owners) != 1:
            why = f"is in {' and '.join(owners)}" if owners else "is in no stage"
            raise SettingError(
                path, ABSENT, f"the parameter {name} {why}", "let each module be part of exactly one stage"
            )
        stages_of[id(parameter)].setdefault(stage_of[owners[0]], name)
    for places in stages_of.values():
        if len(places) > 1:
            first, second = list(places.values())[:2]
            raise SettingError(
                "parallel.axes.pipeline",
                ABSENT,
                f"{first} and {second} are one tied parameter, and the pipeline has them on different stages",
                "untie them in the model's settings, or set the degree to 1",
            )


def stage_model(model: nn.Module, stages: Sequence[Sequence[str]], index: int) -> nn.Module:
    """A copy of the model in which the modules of other stages only pass their input through; names stay. Modules
    without parameters are in every stage."""
    others = [name for number, names in enumerate(stages) if number != index for name in names]
    # What is left out is not copied either: a real model is large.
    left_out = [module for name in others for module in _callable(model.get_submodule(name))]
    return copy.deepcopy(model, {id(module): PassThrough() for module in left_out})


def _callable(module: nn.Module) -> list[nn.Module]:
    """A module that its owner calls; of a list or dict of modules, those in it."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return [inner for child in module.children() for inner in _callable(child)]
    return [module]


def _around(model: nn.Module, container: str, fix: str) -> tuple[list[str], list[str]]:
    """Modules with parameters that are defined before and after the container of the blocks: the outermost that do not
    hold it."""
    before: list[str] = []
    after: list[str] = []
    module, path = model, ""
    for part in container.split("."):
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if own:
            raise SettingError(
                "parallel.axes.pipeline",
                ABSENT,
                f"{f'{path}.' if path else ''}{own[0]} is a parameter beside the blocks of {type(model).__name__}, "
                f"and no stage alone would have it",
                "put it into a module, or set the degree to 1",
            )
        names = [name for name, _ in module.named_children()]
        place = names.index(part)
        inner: list[str] = []
        for position, name in enumerate(names):
            full = f"{path}.{name}" if path else name
            if position == place or next(module.get_submodule(name).parameters(), None) is None:
                continue
            if position < place:
                before.append(full)
            else:
                inner.append(full)
        after = [*inner, *after]  # those of an outer level come later
        module, path = module.get_submodule(part), f"{path}.{part}" if path else part
    return before, after


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]
