"""Measured loss of a rank: what a user's loss may return, and what it may not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from danling_conf.components.batch import described
from danling_conf.topology.violation import ABSENT, SettingError

Loss = Callable[[Any, Any], "Tensor | tuple[Tensor, Tensor | int]"]
"""`loss(output, batch)`: a mean; or a sum and its count, such as the number of tokens that are not masked."""


@dataclass(slots=True)
class Measured:
    """A loss of this rank: a total and its weight, whose ratio is the mean. Both are 0 where another stage has it."""

    total: Tensor
    weight: Tensor | float
    graph: Tensor | None = None
    """What the backward pass began at, on the CPU: as in a loop by hand, its memory is freed after the optimizer's
    step, which is 1 % of a tiny step faster. On an accelerator memory is scarce, and the time to free it is not."""

    @property
    def mean(self) -> Tensor:
        """The mean; not a number on ranks that do not have the loss."""
        weight = self.weight
        return self.total if type(weight) is float and weight == 1.0 else self.total / weight


def measured_of(value: Any) -> Measured:
    """A loss as total, a scalar, and weight: a mean has the weight 1.0, a count is a tensor.

    Raises:
        SettingError: it is no such thing.
    """
    # The usual loss: nothing is made of it.
    if type(value) is Tensor and not value.ndim and value.requires_grad and value.is_floating_point():
        return Measured(value, 1.0)
    is_pair = isinstance(value, tuple)
    if is_pair and len(value) != 2:
        raise _refused(f"a tuple of {len(value)} items", "return a mean, or a pair of a sum and its count")
    total, weight = value if is_pair else (value, 1.0)
    if not isinstance(total, Tensor):
        pair = "a pair whose sum is " if is_pair else ""
        raise _refused(pair + _shown(total), "return a scalar tensor, or a pair of a sum and its count")
    if isinstance(total, DTensor):
        total = total.redistribute(placements=[Replicate()] * total.device_mesh.ndim).to_local()
    if total.numel() != 1:
        raise _refused(_shown(total), "reduce it to one number, as .mean() does")
    if not total.is_floating_point():
        raise _refused(_shown(total), "return a floating-point loss, which has a gradient")
    if torch.is_grad_enabled() and not total.requires_grad:
        raise _refused(
            f"{_shown(total)} without a gradient",
            "compute it from the model's output, without detach(), item() or torch.no_grad()",
        )
    if is_pair:
        try:
            weight = torch.as_tensor(weight, device=total.device)
        except (TypeError, ValueError, RuntimeError):
            raise _refused(f"a pair whose count is {_shown(weight)}", "return an int or a scalar tensor") from None
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        if weight.numel() != 1:
            raise _refused(f"a pair whose count is {_shown(weight)}", "return the sum of the counts")
        weight = weight.reshape(())
    # A reshaped scalar would be a view, of which FSDP warns.
    return Measured(total.reshape(()) if total.ndim else total, weight)


def _refused(what: str, fix: str) -> SettingError:
    return SettingError("loss", ABSENT, f"it returned {what}, and a loss is one number with a gradient", fix)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, (bool, int, float)):
        return f"the {type(value).__name__} {value}"
    return "None" if value is None else described(value).removeprefix("a batch (").removesuffix(")")
