"""A model cut into the stages of a pipeline: which module belongs to which, and a model of each stage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import nn

from danling_conf.parallel.blocks import repeated_blocks
from danling_conf.parallel.init_plan import deep_copy
from danling_conf.parallel.pass_through import PassThrough
from danling_conf.parallel.trial import Trial
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


def blocks_of(model: nn.Module) -> list[str]:
    """The names of the repeated blocks that a model is cut between. Raises SettingError where they are not in one
    container."""
    blocks = [name for name, _ in repeated_blocks(model)]
    containers = sorted({name.rpartition(".")[0] for name in blocks})
    if len(containers) != 1:
        found = f"has blocks in {', '.join(containers)}" if containers else "has no repeated blocks"
        rule = f"{type(model).__name__} {found}, which does not say how to cut it"
        fix = "name the modules of each stage in parallel.module_fqns_per_model_part"
        raise SettingError("parallel.axes.pipeline", ABSENT, rule, fix)
    return blocks


def called(model: nn.Module, stages: Sequence[Sequence[str]]) -> list[str]:
    """The names of the modules that stages are made of; of a list or dict of modules, those in it."""

    def inner(name: str) -> list[str]:
        module = model.get_submodule(name)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return [found for child, _ in module.named_children() for found in inner(f"{name}.{child}")]
        return [name]

    return [found for names in stages for name in names for found in inner(name)]


def deal_out(model: nn.Module, count: int, trial: Trial | None = None) -> Names:
    """Cut a model into `count` stages by its repeated blocks, as evenly as their number allows, the first stages having
    one more. Modules used before the blocks go to the first stage, those used after them to the last; where there was
    no `trial`, or they were not used in it, those defined before and after the blocks.

    Raises SettingError for a model whose blocks are too few, or are not one after another in one container, and for a
    parameter that no module below the root's containers holds.
    """
    blocks = blocks_of(model)
    if len(blocks) < count:
        rule = f"{type(model).__name__} has {len(blocks)} repeated blocks for {count} stages"
        raise SettingError("parallel.axes.pipeline", ABSENT, rule, "choose a smaller degree or a deeper model")
    before, after = around(model, blocks)
    if trial is not None:
        before, after = _as_used(model, before, after, trial)
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


def _as_used(model: nn.Module, before: list[str], after: list[str], trial: Trial) -> tuple[list[str], list[str]]:
    places: tuple[list[str], list[str]] = [], []
    for name in (*before, *after):
        held = {f"{name}.{inner}" for inner, _ in model.get_submodule(name).named_parameters(remove_duplicate=False)}
        if held & trial.before and held & trial.after and not held & trial.before & trial.after:
            raise SettingError(
                "parallel.axes.pipeline",
                ABSENT,
                f"a part of {name} is used before the blocks of {type(model).__name__} and another after them",
                "name the modules of each stage in parallel.module_fqns_per_model_part",
            )
        used = held & (trial.before ^ trial.after)
        late = bool(used & trial.after) if used else name in after
        places[late].append(name)
    return places


def check_used(model: nn.Module, stages: Sequence[Sequence[str]], trial: Trial) -> None:
    """Refuse stages whose order is not the one in which their modules are used. Raises SettingError."""
    stage_of = {name: index for index, names in enumerate(stages) for name in names}

    def stage(name: str) -> int:
        return next(stage_of[prefix] for prefix in (*_prefixes(name), name) if prefix in stage_of)

    def refuse(name: str, where: str, wanted: int) -> SettingError:
        return SettingError(
            f"parallel.module_fqns_per_model_part[{stage(name)}]",
            ABSENT,
            f"{name} is used {where} the blocks of {type(model).__name__}, and its stage is not the {wanted + 1}. one",
            f"move it to stage {wanted}",
        )

    for name in sorted(trial.before):
        if stage(name) != 0:
            raise refuse(name, "before", 0)
    for name in sorted(trial.after):
        if stage(name) != len(stages) - 1:
            raise refuse(name, "after", len(stages) - 1)
    order = [stage(name) for name in trial.blocks]
    for name, earlier, later in zip(trial.blocks[1:], order, order[1:], strict=False):
        if later < earlier:
            raise SettingError(
                f"parallel.module_fqns_per_model_part[{later}]",
                name,
                "it is used after a module of a later stage",
                f"move it to stage {earlier} or a later one",
            )
    _check_buffers(
        model,
        trial,
        {
            name: stage_of[prefix]
            for name, _ in model.named_buffers()
            for prefix in _prefixes(name)
            if prefix in stage_of
        },
        order,
        len(stages) - 1,
    )
    if order and order[0] and not trial.direct:
        raise SettingError(
            f"parallel.module_fqns_per_model_part[{order[0]}]",
            trial.blocks[0],
            "it reads more of what is before the blocks than its first input",
            "move it to stage 0",
        )


def _check_buffers(
    model: nn.Module, trial: Trial, stage_of: Mapping[str, int], order: Sequence[int], last: int
) -> None:
    """Refuse a buffer that forward changes by what one stage alone has, and that is not in this stage."""
    for name, region in sorted(trial.changed.items()):
        if region is None:
            continue
        place = region // 2
        wanted = order[place] if region % 2 else 0 if region == 0 else last
        if stage_of.get(name) != wanted:
            where = f"in {trial.blocks[place]}" if region % 2 else "after the blocks" if region else "before the blocks"
            raise SettingError(
                "parallel.axes.pipeline",
                ABSENT,
                f"the buffer {name} of {type(model).__name__} is changed {where}, by what stage {wanted} alone "
                f"computes, and is not in that stage",
                "put it into a module with parameters that is used there, or set the degree to 1",
            )


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


def stage_model(model: nn.Module, stages: Sequence[Sequence[str]], index: int, trial: Trial | None = None) -> nn.Module:
    """A copy of the model in which the modules of other stages only pass their input through; names stay. Modules
    without parameters are in every stage. Without a `trial`, blocks are taken to return one tensor."""
    lengths: dict[int, int] = {}
    if trial is not None:
        places = zip(trial.blocks, trial.returns, strict=True)
        lengths = {id(model.get_submodule(name)): length for name, length in places}
    others = [names for number, names in enumerate(stages) if number != index]
    # What is left out is not copied either: a real model is large.
    left_out = [model.get_submodule(name) for name in called(model, others)]
    return deep_copy(model, {id(module): PassThrough(lengths.get(id(module), 0), like=module) for module in left_out})


def around(model: nn.Module, blocks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Modules with parameters that are defined before and after the container of the blocks: the outermost that do not
    hold it. Raises SettingError for a parameter of a module that holds it."""
    container = blocks[0].rpartition(".")[0]
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
