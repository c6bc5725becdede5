"""DDP and FSDP2: passes that did not end, functions inside of a forward, and whole parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel


def replicate(module: nn.Module, **options: Any) -> nn.Module:
    """Data parallelism with FSDP2's machinery and whole weights, for parameters that other axes shard (`DTensor`s),
    which DDP does not take.

    Experimental in 2.13. Without it, layouts that replicate next to tensor, context, expert or pipeline axes fail.
    """
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return cast(nn.Module, replicate(module, **options))


def reset_data_parallel(module: DistributedDataParallel) -> None:
    """Let a DDP module run forward again after a pass that did not come to its end; its buckets are built anew.

    torch does so only where the process group changes. Without `_reset_state`, the forward after an exception that the
    user's loop survives raises: DDP expects the reduction of the pass before to have finished.
    """
    module._has_rebuilt_buckets = False
    module.reducer._reset_state()


def reset_fully_sharded(module: FSDPModule) -> None:
    """Let a module under FSDP2 run forward again after a pass that did not come to its end, with no gradients kept from
    earlier micro-batches.

    `reset_iter_state` is public in 2.13; the gradients that wait for the last micro-batch are not part of it. Without
    this, micro-batches that are left out still count in the next optimizer step.
    """
    state: Any = module._get_fsdp_state()
    if state._is_root is None:  # it never ran
        return
    module.reset_iter_state()
    for inner in state._state_ctx.all_states:
        for group in inner._fsdp_param_groups:
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):
                    parameter._unsharded_param.grad = None


class Replicated(DistributedDataParallel):
    """DDP that can run any function of the module inside of its forward: a model whose loss is computed by another
    method than `forward` is synchronised all the same.

    Without `_pre_forward` and `_post_forward`, of which torch's own forward consists, every step under DDP fails;
    without `_inside_ddp_forward`, those of a compiled model.
    """

    def run_inside(self, function: Callable[[nn.Module], torch.Tensor | None]) -> torch.Tensor | None:
        """The tensor that `function` makes of the module. Its gradients are reduced as those of `forward`'s output."""
        # Not `self(...)`, which may be compiled, and would compile the function with all that it closes over.
        self.begin()
        with nullcontext() if self._use_python_reducer else self._inside_ddp_forward():
            result = function(self.module)
        return None if result is None else self.end(result)

    def begin(self) -> None:
        """What DDP does before the module computes something."""
        self._pre_forward(None)  # an input: DDP moves them to its device, and fails without any

    def end(self, result: torch.Tensor) -> torch.Tensor:
        """What DDP does with what the module's parameters were used for, to reduce their gradients."""
        return cast(torch.Tensor, self._post_forward(result))


def run_inside_fsdp(module: Any, function: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
    """Run a function between what FSDP2 does before and after the forward of its outermost module: parameters are whole
    inside, whichever method uses them.

    This is what the public `register_fsdp_forward_method` does, except that a call of the module itself inside of the
    function passes the hooks by. A second pass through them would end the first one's gradients too early: those of
    parameters used before the call would be lost without an error.

    Without `_pre_forward`, `_post_forward` or the handles of the hooks, every step under FSDP fails.
    """
    state = module._get_fsdp_state()
    state._pre_forward(module, (), {})
    with _without_hooks(module, state._pre_forward_hook_handle.id, state._post_forward_hook_handle.id):
        result = function()
    return cast("torch.Tensor | None", state._post_forward(module, (), result))


def whole_parameters(model: nn.Module) -> dict[int, torch.Tensor]:
    """For each parameter that FSDP2 shards, by its identity, the whole one that stood in for it in the last forward:
    the leaf of the graph. Empty for a model without FSDP2.

    Without `_fsdp_param_groups` or their `fsdp_params`, the first step under FSDP fails.
    """
    return {
        id(item.sharded_param): item._unsharded_param
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
        for item in group.fsdp_params
        if hasattr(item, "_unsharded_param")  # a module that no forward has passed yet has none
    }


def watch_gradients(model: nn.Module, look: Callable[[list[torch.Tensor], list[torch.Tensor]], None]) -> None:
    """Call `look` before FSDP2 reduces the gradients of a group of parameters, with the group's sharded parameters and
    those of them without a gradient. Where ranks differ in these they reduce buffers of different sizes, at which gloo
    aborts the process and NCCL waits.

    Without `post_backward` of FSDP2's groups or their `fsdp_params`, this rank says nothing of it.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            groups: Any = module._get_fsdp_state()._fsdp_param_groups
            for group in groups:
                group.post_backward = functools.partial(_watched_post_backward, group, group.post_backward, look)


def _watched_post_backward(group: Any, original: Callable[..., None], look: Callable[..., None], *unused: Any) -> None:
    if group.reduce_grads:
        without: list[torch.Tensor] = []
        for item in group.fsdp_params:
            whole = getattr(item, "_unsharded_param", None)
            if item.unsharded_accumulated_grad is None and (whole is None or whole.grad is None):
                without.append(item.sharded_param)
        if len(without) < len(group.fsdp_params):  # else there is nothing to reduce, or it is done
            look([item.sharded_param for item in group.fsdp_params], without)
    original(*unused)


def gather_in_methods(module: Any, enter: Callable[[], None]) -> None:
    """Let a module under FSDP2 have its parameters whole in any method of its class that the model's forward calls, as
    in its own forward.

    The public `register_fsdp_forward_method` does so for one method by name, also where the module's own forward calls
    it: a second pass through FSDP2's hooks, which would end the first one's gradients too early.

    Without `_pre_forward`, `_post_forward` or the states of 2.13, a model that calls such a method fails.

    Args:
        enter: called before parameters are gathered.
    """
    state = module._get_fsdp_state()

    def whole_in(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            # Compiled code is inside of the module's forward. Outside of a pass through the model nothing is gathered.
            if torch.compiler.is_compiling() or state._training_state.name != "IDLE" or not _in_forward(state):
                return method(*args, **kwargs)
            enter()
            args, kwargs = state._pre_forward(module, args, kwargs)
            return state._post_forward(module, args, method(*args, **kwargs))

        return run

    kind: Any = type(module)
    for name in _own_methods(kind):
        setattr(module, name, whole_in(getattr(module, name)))


def is_gathering_input(tensor: torch.Tensor) -> bool:
    """Whether a tensor is what FSDP2 has made of a module's input, which torch lets nobody change in place. Without
    this class's name, that is torch's own error."""
    return type(tensor.grad_fn).__name__ == "RegisterPostBackwardFunctionBackward"


def _in_forward(state: Any) -> bool:
    return state._is_root is False and state._state_ctx.iter_forward_root is not None


@cache
def _own_methods(kind: type) -> list[str]:
    """Names of the methods that a class of modules adds to `nn.Module`, without those of a container, which compute
    nothing."""
    known = {*dir(nn.Module), *dir(FSDPModule)}
    found = {
        name: value
        for base in reversed(kind.__mro__)
        if base is not FSDPModule and base is not nn.Module and base.__module__ != nn.Sequential.__module__
        for name, value in vars(base).items()
    }
    return [
        name
        for name, value in found.items()
        if name not in known and not name.startswith("__") and inspect.isfunction(value)
    ]


@contextmanager
def _without_hooks(module: Any, before: int, after: int) -> Iterator[None]:
    hooks = [(module._forward_pre_hooks, before), (module._forward_hooks, after)]
    kept = [(registered, list(registered.items())) for registered, _ in hooks]
    for registered, number in hooks:
        registered.pop(number, None)
    try:
        yield
    finally:
        for registered, items in kept:  # in their old order
            added = [item for item in registered.items() if item[0] not in dict(items)]
            registered.clear()
            registered.update([*items, *added])


@contextmanager
def watched_resizes(seen: Callable[[torch.UntypedStorage, int], None]) -> Iterator[None]:
    """Call `seen(storage, bytes before)` after each change of a storage's size: FSDP2 frees and refills the storages of
    gathered parameters so, which no operator shows. torch's own memory tracker replaces the same method."""
    original = torch.UntypedStorage.resize_

    def resize(self: torch.UntypedStorage, size: int) -> Any:
        before = self.nbytes()
        result = original(self, size)
        seen(self, before)
        return result

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]
