"""The full state of a model and its optimizer, whatever wraps or shards them, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as distributed
from torch import nn
from torch.optim import Optimizer


def gather(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Unsharded state on the CPU of rank 0, by fully qualified names; other ranks get empty states. Collective."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def scatter_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load an unsharded model state that rank 0 holds. Collective.

    Raises RuntimeError with the keys that are missing or unexpected.
    """
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    set_model_state_dict(model, dict(state), options=_options())


def scatter_optimizer(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load an unsharded optimizer state that rank 0 holds. Collective."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer, dict(state), options=_options())


def _options() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    several = distributed.is_initialized() and distributed.get_world_size() > 1
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
