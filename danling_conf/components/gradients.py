"""Gradients of a distributed model: when they are communicated, and their norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from danling_conf._torch_private import data_parallel


def accumulate(model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
    """A context for forward and backward of one micro-batch: gradients are communicated at the `last` one only.

    For a model under FSDP2, DDP or neither. Between the micro-batches FSDP2 keeps gradients unsharded. Dividing
    the loss by the number of micro-batches is up to the caller.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def forget(model: nn.Module) -> None:
    """Drop the gradients of an optimizer step that does not take place, and what DDP and FSDP2 remember of it.

    For micro-batches that are left over, and after an exception anywhere in forward or backward: a wrapper left in the
    middle of a pass takes the next forward for a part of that one.
    """
    if isinstance(model, FSDPModule):
        data_parallel.reset_fully_sharded(model)
    elif isinstance(model, DistributedDataParallel):
        data_parallel.reset_data_parallel(model)
    for parameter in model.parameters():
        parameter.grad = None


def clip(
    parameters: Iterable[torch.Tensor], max_norm: float, *, pipeline: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Scale gradients in place so that the 2-norm of all of them together is at most `max_norm` (infinity: only
    measure), and return the norm before. Collective where gradients are sharded.

    Parameters may be plain or `DTensor`s on one or several meshes; torch's own `clip_grad_norm_` takes one mesh only.
    `pipeline` is the group whose ranks hold the other stages' parameters.
    """
    groups: dict[Any, list[torch.Tensor]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            where = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else gradient.device
            groups.setdefault(where, []).append(parameter)
    if not groups and pipeline is None:
        return torch.tensor(0.0)
    norms = [_norm_of([parameter.grad for parameter in group]) for group in groups.values()]  # type: ignore[misc]
    # A stage without gradients takes part with a norm of 0: the sum over the pipeline is collective.
    device = norms[0].device if norms else torch.accelerator.current_accelerator() or torch.device("cpu")
    total = torch.linalg.vector_norm(
        torch.stack([norm.to(device) for norm in norms or [torch.zeros((), device=device)]])
    )
    if pipeline is not None:
        squared = total.square()
        dist.all_reduce(squared, group=pipeline)
        total = squared.sqrt()
    for group in groups.values() if math.isfinite(max_norm) else ():
        clip_grads_with_norm_(group, max_norm, total)
    return total


def _norm_of(gradients: list[torch.Tensor]) -> torch.Tensor:
    norm = get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
