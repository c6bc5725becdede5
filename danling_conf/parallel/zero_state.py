"""Whole state of what ZeRO partitions: a model and an optimizer as checkpoints know them, by parameter.

ZeRO joins the parameters of a group into one line, of which each rank holds a part, with the optimizer's state of that
part. A checkpoint of those lines would fit this stage and this number of ranks only, and DeepSpeed's own are pickles
that are written in place. So the parts of each parameter are put together when a run is saved, and cut again when it is
resumed, under any stage and any number of ranks.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from danling_conf.parallel.deepspeed import ZeroEngine, gathered
from danling_conf.topology.violation import ABSENT, SettingError

_COUNTS = ("step", "mu_product", "eta", "mu")
"""State of torch's optimizers that is one number for a whole parameter."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Part:
    """The part of a parameter that this rank holds, as places in the parameter and in what it is joined into."""

    line: Tensor
    """What the parameters of a group are joined into: the key of the optimizer's state."""
    start: int
    """In the parameter, of all its numbers in a row."""
    offset: int
    """In the line."""
    length: int
    """0 where this rank holds nothing of the parameter."""


@contextmanager
def whole(engine: ZeroEngine, *, loading: bool) -> Iterator[tuple[list[nn.Module], Optimizer]]:
    """The model and an optimizer of the same class and options, with whole parameters and states. Collective.

    For saving, the states are on rank 0, and so are parameters that ZeRO 3 partitions; on other ranks their values are
    undefined, and take no memory. For loading, the states are empty, parameters have their values on all ranks, and
    what is put into both goes to ZeRO at the end. Whole values are on the host.

    Raises SettingError where a loaded state does not fit into ZeRO's.
    """
    stand_ins = _stand_ins(engine, everywhere=loading)
    optimizer = _stand_in_optimizer(engine, stand_ins)
    if not loading:
        _collect(engine, optimizer, stand_ins)
    _put(engine.module, stand_ins)
    try:
        yield [engine.module], optimizer
    finally:
        _put(engine.module, {stand_in: parameter for parameter, stand_in in stand_ins.items()})
    if loading:
        _deal_out(engine, optimizer, stand_ins)


def _stand_ins(engine: ZeroEngine, *, everywhere: bool) -> dict[nn.Parameter, nn.Parameter]:
    """Whole parameters by those of the model: of ZeRO 1 and 2 in the same memory, of ZeRO 3 gathered one by one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for parameter in engine.module.parameters():
        if engine.stage < 3:
            value = parameter.detach()
        else:
            with gathered([parameter]):
                here = everywhere or dist.get_rank() == 0
                held = parameter.detach()
                value = held.cpu().clone() if here else torch.empty(held.shape, dtype=held.dtype)
        made[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    return made


def _put(module: nn.Module, others: dict[nn.Parameter, nn.Parameter]) -> None:
    """Put other parameters in the place of those of a model; tied ones stay tied."""
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                owner._parameters[name] = others[parameter]


def _stand_in_optimizer(engine: ZeroEngine, stand_ins: dict[nn.Parameter, nn.Parameter]) -> Optimizer:
    """The optimizer as it would be without ZeRO, with no state."""
    made = copy.copy(engine.optimizer)
    made.state = defaultdict(dict)
    joined = _joined(engine)
    made.param_groups = [
        {**group, "params": [stand_ins[item] for item in joined[number]]}
        for number, group in enumerate(engine.optimizer.param_groups)
    ]
    return made


def _joined(engine: ZeroEngine) -> list[list[nn.Parameter]]:
    """The parameters of each group of the optimizer, in their order."""
    zero = engine.zero
    if engine.stage < 3:
        return [list(group) for group in zero.bit16_groups]
    found: list[list[nn.Parameter]] = [[] for _ in engine.optimizer.param_groups]
    for number, group in enumerate(zero.fp16_groups):
        found[zero.sub_group_to_group_id[number]] += group
    return found


def _part(engine: ZeroEngine, group: int, parameter: nn.Parameter) -> _Part:
    zero: Any = engine.zero
    if engine.stage < 3:
        line, mapping = zero.single_partition_of_fp32_groups[group], parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return _Part(line, 0, 0, 0)
        mine, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return _Part(line, mine.start, there.start, mine.numel)
    number, offset, length = zero.grad_position[zero.get_param_id(parameter)]
    start = dist.get_rank() * length
    size = parameter.ds_numel  # type: ignore[attr-defined]
    return _Part(zero.fp32_partitioned_groups_flat[number], start, offset, max(0, min(length, size - start)))


def _collect(engine: ZeroEngine, optimizer: Optimizer, stand_ins: dict[nn.Parameter, nn.Parameter]) -> None:
    """Put the optimizer's state of each parameter together, on rank 0."""
    for group, parameters in enumerate(_joined(engine)):
        for parameter in parameters:
            part, target = _part(engine, group, parameter), stand_ins[parameter]
            for key, value in engine.optimizer.state.get(part.line, {}).items():
                if not isinstance(value, Tensor) or key in _COUNTS:
                    optimizer.state[target][key] = value.detach().clone() if isinstance(value, Tensor) else value
                else:
                    optimizer.state[target][key] = _summed(part, value, target)


def _summed(part: _Part, value: Tensor, target: Tensor) -> Tensor:
    """A tensor of which each rank has a part, on rank 0."""
    whole = torch.zeros(target.numel(), dtype=value.dtype, device=value.device)
    whole.narrow(0, part.start, part.length).copy_(value.detach().narrow(0, part.offset, part.length))
    if dist.get_world_size() > 1:
        # Of the bits, as whole numbers: a sum of floats would make 0.0 of -0.0.
        dist.reduce(whole.view(_BITS[value.element_size()]), dst=0)
    if dist.get_rank() != 0:
        return torch.empty(target.shape, dtype=value.dtype)
    return whole.cpu().view(target.shape)


@torch.no_grad()
def _deal_out(engine: ZeroEngine, optimizer: Optimizer, stand_ins: dict[nn.Parameter, nn.Parameter]) -> None:
    """Give ZeRO what was loaded: weights, the optimizer's state, and the options of its groups."""
    if engine.stage == 3:
        for parameter, target in stand_ins.items():
            with gathered([parameter], modified=True):
                parameter.copy_(target)
    engine.zero.refresh_fp32_params()  # from the weights
    for mine, loaded in zip(engine.optimizer.param_groups, optimizer.param_groups, strict=True):
        mine.update({key: value for key, value in loaded.items() if key != "params"})
    if not optimizer.state:
        return
    states: dict[Tensor, dict[str, Any]] = {}
    for group, parameters in enumerate(_joined(engine)):
        for parameter in parameters:
            part, loaded = _part(engine, group, parameter), optimizer.state.get(stand_ins[parameter], {})
            first = part.line not in states
            state = states.setdefault(part.line, {})
            _same("state", first or loaded.keys() == state.keys())
            _cut(part, loaded, state)
    for line, state in states.items():
        engine.optimizer.state[line] = state
    if engine.stage < 3:
        engine.zero._hp_optimizer_states_linked = False  # it has views of the states that were there


def _cut(part: _Part, loaded: dict[str, Any], state: dict[str, Any]) -> None:
    """Put this rank's part of a parameter's state into the state of what it is joined into."""
    for key, value in loaded.items():
        if not isinstance(value, Tensor):
            _same(key, state.setdefault(key, value) == value)
        elif key in _COUNTS:
            _same(key, torch.equal(state.setdefault(key, value), value))
        else:
            if key not in state:
                state[key] = torch.zeros_like(part.line, dtype=value.dtype)
            found = value.reshape(-1).narrow(0, part.start, part.length)
            state[key].narrow(0, part.offset, part.length).copy_(found)


def _same(key: str, same: bool) -> None:
    if not same:
        rule = f"ZeRO has one {key} for the parameters of a group, and the checkpoint has several"
        fix = "exclude the optimizer from loading (checkpoint.exclude_from_loading=optimizer), or stack=auto"
        raise SettingError("resume", ABSENT, rule, fix)
