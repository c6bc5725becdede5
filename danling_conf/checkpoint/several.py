"""Several optimizers as one: what a checkpoint saves and loads of a training with more than one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from danling_conf.topology.violation import ABSENT, SettingError


class Optimizers:
    """Optimizers of different parameters, seen as one optimizer with the groups and the state of all.

    Args:
        by_name: the optimizers.

    Raises SettingError where two of them have the same parameter, whose state a checkpoint could not tell apart.
    """

    def __init__(self, by_name: Mapping[str, Optimizer]) -> None:
        self.by_name = dict(by_name)
        owner: dict[int, str] = {}
        for name, optimizer in self.by_name.items():
            for parameter in (item for group in optimizer.param_groups for item in group["params"]):
                other = owner.setdefault(id(parameter), name)
                if other != name:
                    rule = f"{other} and {name} have the same parameter of shape {tuple(parameter.shape)}"
                    raise SettingError("optimizers", ABSENT, rule, "leave it to one of them")

    def __str__(self) -> str:
        return ", ".join(f"{name}={type(item).__name__}" for name, item in self.by_name.items())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.by_name.values() for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        return {key: item for optimizer in self.by_name.values() for key, item in optimizer.state.items()}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Load the state of all, numbered as the parameters are in all groups together."""
        groups, first = list(content["param_groups"]), 0
        for optimizer in self.by_name.values():
            mine, groups = groups[: len(optimizer.param_groups)], groups[len(optimizer.param_groups) :]
            count = sum(len(group["params"]) for group in mine)
            state = {index - first: item for index, item in content["state"].items() if first <= index < first + count}
            numbered = [{**group, "params": [index - first for index in group["params"]]} for group in mine]
            optimizer.load_state_dict({"state": state, "param_groups": numbered})
            first += count


def class_of(optimizer: Optimizer | Optimizers) -> str:
    """What a checkpoint records of the optimizer, and compares: its class; of several, each with its name."""
    return str(optimizer) if isinstance(optimizer, Optimizers) else type(optimizer).__name__
