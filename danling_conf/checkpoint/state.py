"""The full state of a model and its optimizer, whatever wraps or shards them, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as distributed
from torch import Tensor, nn
from torch.optim import Optimizer

_SHOWN = 3


def gather(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Unsharded state on the CPU of rank 0, by fully qualified names; other ranks get empty states. Collective."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def misfit_of(model: nn.Module, state: Mapping[str, Any]) -> str | None:
    """How an unsharded model state differs from what the model has, in names and shapes; None where it fits."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    mine, theirs = _shapes(get_model_state_dict(model)), _shapes(state)
    facts = {
        "it lacks": [name for name in mine if name not in theirs],
        "the model lacks": [name for name in theirs if name not in mine],
        "of another shape": [
            f"{name} {theirs[name]} for {shape}" for name, shape in mine.items() if theirs.get(name, shape) != shape
        ],
    }
    shown = [f"{what} {', '.join(names[:_SHOWN])}" + _more(names) for what, names in facts.items() if names]
    return "; ".join(shown) or None


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


def _more(names: list[str]) -> str:
    return f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""


def scatter_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load an unsharded model state that rank 0 holds, and that fits (see `misfit_of`). Collective."""
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    set_model_state_dict(model, dict(state), options=_options())


def scatter_optimizer(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load an unsharded optimizer state that rank 0 holds. Collective."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    groups = [
        _with_options_of(mine, saved) for mine, saved in zip(optimizer.param_groups, _groups(state), strict=False)
    ]
    aligned = {**state, "param_groups": groups} if state else {}
    set_optimizer_state_dict(model, optimizer, aligned, options=_options())


def misfit_of_groups(optimizer: Optimizer, state: Mapping[str, Any]) -> str | None:
    """How the groups of a saved optimizer differ from this one's; None where they fit."""
    mine, theirs = len(optimizer.param_groups), len(_groups(state))
    return None if mine == theirs else f"it has {theirs} parameter groups, and this run's optimizer has {mine}"


def _groups(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(state.get("param_groups", ()))


def _with_options_of(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group with the options that this optimizer's group has: a scheduler adds some (`initial_lr`)."""
    return {"params": saved["params"], **{key: saved.get(key, mine[key]) for key in mine if key != "params"}}


def _options() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    several = distributed.is_initialized() and distributed.get_world_size() > 1
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
