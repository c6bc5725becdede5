"""Refusal of second derivatives over axes whose collectives have first ones only.

A gradient penalty differentiates a gradient. The gathers of sharded layers have a backward pass that autograd does not
record, so that the second one leaves out what other ranks have, without an error; FSDP's hooks take the first backward
pass for the one that ends the step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from danling_conf.schema.layout import Layout
from danling_conf.topology.violation import SettingError

_BACKWARD = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)


class NoSecondDerivatives(TorchFunctionMode):
    """Context of a forward and a loss, which raises SettingError where they differentiate in a way that the layout does
    not have.

    Args:
        layout: of the run.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in _BACKWARD and (given.get("create_graph") or self.layout.fsdp):
            raise self._refusal()
        return func(*args, **given)

    def _refusal(self) -> SettingError:
        rule = "the forward or the loss differentiates itself (as a gradient penalty does), which needs whole layers"
        fix = "choose a layout that only replicates (parallel=ddpN)"
        if self.layout.fsdp:
            return SettingError("fsdp.enabled", True, rule, fix)
        axis = "tensor" if self.layout.tensor > 1 else "context"
        return SettingError(f"parallel.axes.{axis}", getattr(self.layout, axis), rule, fix)


def are_missing(layout: Layout) -> bool:
    """Whether a layout without a pipeline has first derivatives only."""
    return layout.fsdp or layout.tensor > 1 or layout.context > 1
