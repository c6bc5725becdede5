"""What modules, schedules, loaders and the allocator keep to themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._utils import ExceptionWrapper
from torch.optim import lr_scheduler
from torch.utils import checkpoint


def has_hooks(parameter: torch.Tensor) -> bool:
    """Whether a function is to be called with the gradient of a parameter. Without these attributes no model can be
    built for several ranks."""
    return bool(parameter._backward_hooks) or bool(parameter._post_accumulate_grad_hooks)


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """What is called around a module's forward and backward. Without these attributes no model can be cut for a
    pipeline."""
    registered = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return [hook for hooks in registered for hook in hooks.values()]


def saved_buffers(module: nn.Module) -> list[torch.Tensor]:
    """The buffers that a module's state holds, each once; torch does not publish which ones it leaves out."""
    found = (
        buffer
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and name not in part._non_persistent_buffers_set
    )
    return list({id(buffer): buffer for buffer in found}.values())


@contextmanager
def reentrant_checkpoints(called: Callable[[], object]) -> Iterator[None]:
    """Call `called` in place of what `torch.utils.checkpoint` does with `use_reentrant=True`. Without
    `CheckpointFunction`, no model can be tried for a pipeline."""

    class Called:
        @staticmethod
        def apply(*_: object) -> object:
            return called()

    original = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = Called  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = original  # type: ignore[misc]


@contextmanager
def truncated_normal(call: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let `nn.init.trunc_normal_` go through `call(function, tensor, *arguments)`. From torch 2.13 on it draws again
    until every value is inside, so that a value decides what is run."""
    original = nn.init._no_grad_trunc_normal_
    nn.init._no_grad_trunc_normal_ = partial(call, original)
    try:
        yield
    finally:
        nn.init._no_grad_trunc_normal_ = original


def scheduled_rates(scheduler: Any) -> list[float]:
    """The learning rates of a schedule at its current position, not computed from those before it.

    `get_lr` warns when it is called outside of `step`, unless this context is entered. If either name goes, resuming
    with a longer schedule fails.
    """
    if hasattr(scheduler, "_get_closed_form_lr"):
        return list(scheduler._get_closed_form_lr())
    with lr_scheduler._enable_get_lr_call(scheduler):
        return scheduler.get_lr()


def shut_down_workers(loader: Any) -> None:
    """End the worker processes of a loader of torchdata 0.11; its next iteration starts new ones.

    If the attributes move, workers end when the garbage collector finds them, which can take five seconds each.
    """
    iterator, loader._iterator = loader._iterator, None
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


def record_memory_history(record: bool) -> None:
    """Start or stop recording what CUDA's allocator does, for a snapshot. torch's documentation of memory snapshots
    names both private functions; without them `profiling.profile_memory` fails on CUDA."""
    torch.cuda.memory._record_memory_history("all" if record else None)


def dump_memory_snapshot(path: str) -> None:
    """Write what was recorded."""
    torch.cuda.memory._dump_snapshot(path)


def carried_out_of_a_worker(error: Exception) -> object:
    """What a worker of a loader returns in place of a batch, so that the error is raised in its parent, as it is. An
    error that is raised in a worker arrives as a text that says `Caught ... in DataLoader worker process`. Without
    torch's class, that is how it arrives."""
    return _Carried(error)


class _Carried(ExceptionWrapper):
    def __init__(self, error: Exception) -> None:
        super().__init__((type(error), error, None))
        self.error = error

    def reraise(self) -> None:
        raise self.error
