"""Flat state of a model and its optimizer: one mapping from names to tensors, however they are sharded or split.

`model.<name>` is a parameter or buffer; `optimizer.<parameter>.<key>` is a tensor of a parameter's optimizer state. The
names are those in the whole model: without what wrappers put into them, and the same in every part of a pipeline. So a
state fits any layout. What is no tensor, the options of the optimizer's groups for instance, is in `options`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.optim import Optimizer

from danling_conf.components.optimizer import cleaned

MODEL, OPTIMIZER = "model.", "optimizer."


@dataclass(frozen=True)
class Known:
    """Shape and dtype of a tensor in a checkpoint, known before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def model_tensors(parts: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The parameters and persistent buffers of this rank, by name. They are the live tensors, not copies."""
    return {name: value for name, value in _model_state(parts).items() if isinstance(value, Tensor)}


def optimizer_tensors(parts: Sequence[nn.Module], optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors of the optimizer's state that this rank holds, by name."""
    return {
        f"{OPTIMIZER}{name}.{key}": value
        for name, parameter in named_parameters(parts)
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def options_of(parts: Sequence[nn.Module], optimizer: Optimizer) -> dict[str, Any]:
    """The rest of model and optimizer: options of the groups, state that is not a tensor, and extra state."""
    names = {id(parameter): name for name, parameter in named_parameters(parts)}
    values: dict[str, Any] = {}
    for name, parameter in named_parameters(parts):
        plain = {key: item for key, item in optimizer.state.get(parameter, {}).items() if not isinstance(item, Tensor)}
        if plain:
            values[name] = plain
    groups = [
        {
            "names": [names[id(parameter)] for parameter in group["params"]],
            "options": {key: value for key, value in group.items() if key != "params"},
        }
        for group in optimizer.param_groups
    ]
    extra = {name: value for name, value in _model_state(parts).items() if not isinstance(value, Tensor)}
    # So that a tensor that is missing is missed: an optimizer has no state yet of a parameter without a gradient.
    tensors = {
        name: [list(item.shape), str(item.dtype).removeprefix("torch.")]
        for name, item in optimizer_tensors(parts, optimizer).items()
    }
    return {"groups": groups, "values": values, "extra": extra, "tensors": tensors}


def merged_options(all_of: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The options of all ranks, merged. Ranks of one stage have equal ones."""
    merged: dict[str, Any] = {"groups": [], "values": {}, "extra": {}, "frozen": {}, "tensors": {}}
    for options in all_of:
        merged["groups"] += [group for group in options["groups"] if group not in merged["groups"]]
        merged["values"] |= options["values"]
        merged["extra"] |= options["extra"]
        merged["tensors"] |= options["tensors"]
        merged["frozen"] |= options.get("frozen", {})
    return merged


def frozen(parts: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The parameters that are not trained, by the names of `model_tensors`."""
    return {f"{MODEL}{name}": item for name, item in named_parameters(parts) if not item.requires_grad}


def digests(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A number of each tensor's bits that is the same however it is sharded, to tell whether two are equal. Collective
    over the ranks that share one."""
    return {name: _digest(item) for name, item in tensors.items()}


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _digest(tensor: Tensor) -> int:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    local = torch.view_as_real(local) if local.is_complex() else local
    # Whole numbers, which wrap around: unlike a sum of floats it does not depend on the order.
    total = local.view(_BITS[local.element_size()]).sum(dtype=torch.int64).reshape(1)
    if isinstance(tensor, DTensor):
        placements = [Partial() if item.is_shard() else Replicate() for item in tensor.placements]
        total = DTensor.from_local(total, tensor.device_mesh, placements).full_tensor()
    return int(total.item())


def named_parameters(parts: Sequence[nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """The parameters of all parts, each once, by name."""
    return [pair for part in parts for pair in cleaned(part)]


def optimizer_targets(
    parts: Sequence[nn.Module], optimizer: Optimizer, known: Mapping[str, Known]
) -> dict[str, Tensor]:
    """Empty tensors for the optimizer state of this rank's parameters in a checkpoint, sharded like the parameters."""
    keys = keys_by_parameter(known)
    steppable = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {
        f"{OPTIMIZER}{name}.{key}": _empty(parameter, known[f"{OPTIMIZER}{name}.{key}"])
        for name, parameter in named_parameters(parts)
        if id(parameter) in steppable
        for key in keys.get(name, ())
    }


def load_optimizer(
    parts: Sequence[nn.Module], optimizer: Optimizer, tensors: Mapping[str, Tensor], options: Mapping[str, Any]
) -> None:
    """Load the tensors that were read, and the options, into the optimizer. Parameters without saved state get none."""
    saved = {name: group["options"] for group in options["groups"] for name in group["names"]}
    names = {id(parameter): name for name, parameter in named_parameters(parts)}
    keys = keys_by_parameter(tensors)
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        theirs: Mapping[str, Any] = {}
        indices: list[int] = []
        for parameter in group["params"]:
            name, index = names[id(parameter)], len(indices) + sum(len(other["params"]) for other in groups)
            indices.append(index)
            theirs = theirs or saved.get(name, {})
            own = {key: tensors[f"{OPTIMIZER}{name}.{key}"] for key in keys.get(name, ())}
            own |= options["values"].get(name, {})
            if own:
                state[index] = own
        # Drop options that this optimizer's groups do not have: another run's scheduler added them (`initial_lr`).
        mine = {key: theirs.get(key, value) for key, value in group.items() if key != "params"}
        groups.append({**mine, "params": indices})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def extra_names(module: nn.Module) -> set[str]:
    """Names of the extra state of modules (`get_extra_state`) that is no tensor."""
    return {name for name, value in _model_state([module]).items() if not isinstance(value, Tensor)}


def load_extra(parts: Sequence[nn.Module], extra: Mapping[str, Any]) -> None:
    """Load the extra state of modules (`set_extra_state`)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    for part in parts:
        own = {name: value for name, value in extra.items() if name in _model_state([part])}
        if own:
            bare = {name.removeprefix(MODEL): value for name, value in own.items()}
            set_model_state_dict(part, bare, options=StateDictOptions(strict=False))


def keys_by_parameter(names: Iterable[str]) -> dict[str, list[str]]:
    """The keys of optimizer state by parameter, from names such as `optimizer.first.weight.exp_avg`."""
    keys: dict[str, list[str]] = {}
    for name in names:
        if name.startswith(OPTIMIZER):
            parameter, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
            keys.setdefault(parameter, []).append(key)
    return keys


def _empty(parameter: Tensor, known: Known) -> Tensor:
    """A tensor to read into: sharded like the parameter if it has its shape; any other, such as a count, is whole."""
    if known.shape == tuple(parameter.shape) and known.shape:
        return torch.empty_like(parameter, dtype=known.dtype, requires_grad=False)
    return torch.empty(known.shape, dtype=known.dtype)


def _model_state(parts: Sequence[nn.Module]) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return {f"{MODEL}{name}": value for part in parts for name, value in get_model_state_dict(part).items()}


def is_whole(tensor: Tensor) -> bool:
    """Whether every rank that has a tensor holds all of it."""
    return not isinstance(tensor, DTensor)
