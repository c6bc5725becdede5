"""Operators and the dispatcher: what runs, what it writes to, and which modes see it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any, TypeVar

import torch

# Trees of tensors, and the hook into the dispatcher; neither module is documented. Without them batches cannot be moved
# or cut, and nothing records what the constructor of a model on the meta device does.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = [
    "TorchDispatchMode",
    "active_mode",
    "argument_names",
    "equal_values",
    "identity_of",
    "is_operator",
    "is_view",
    "is_wrapper",
    "operators",
    "real_tensors",
    "storage_identity",
    "takes_random_numbers",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "written_arguments",
]

_Mode = TypeVar("_Mode")


def is_operator(function: object) -> bool:
    """Whether a dispatched function is an overload of an operator (`aten.mm.default`)."""
    return isinstance(function, torch._ops.OpOverload)


def operators(found: object) -> list[Any]:
    """The operators that an attribute of `torch.ops` stands for: one, or all overloads of one. Empty where it is none.

    Without these classes `activation_checkpointing.keep_ops` and mode `selective` fail.
    """
    if isinstance(found, torch._ops.OpOverloadPacket):
        return [getattr(found, overload) for overload in found.overloads()]
    return [found] if isinstance(found, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)) else []


@cache
def written_arguments(operator: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operator writes to, by its schema.

    `_schema` is how torch's own modes read it. Without it no model can be built on the meta device.
    """
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@cache
def argument_names(operator: Any) -> list[str]:
    """The names of an operator's arguments, by its schema."""
    return [argument.name for argument in operator._schema.arguments]


@cache
def is_view(operator: Any) -> bool:
    """Whether an operator returns a view of its input, by its schema."""
    returns = operator._schema.returns
    return bool(returns) and returns[0].alias_info is not None


@cache
def takes_random_numbers(operator: Any) -> bool:
    """Whether an operator draws from a generator, by its tags."""
    return torch.Tag.nondeterministic_seeded in operator.tags


def equal_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """`torch.equal` of two plain tensors, as inside of `real_tensors`, and in a third of the time: it is asked at every
    number that a model's construction draws. Without the guard, `real_tensors` does the same."""
    with torch._C._DisableTorchDispatch():
        return torch.equal(one, other)


def storage_identity(tensor: torch.Tensor) -> int:
    """What views and `.data` of one tensor have in common; meta tensors have no address to compare. Without `_cdata`
    no model can be built on the meta device."""
    return identity_of(tensor.untyped_storage())


def identity_of(storage: torch.UntypedStorage) -> int:
    """The same of a storage."""
    return storage._cdata


def active_mode(kind: type[_Mode]) -> _Mode | None:
    """The innermost dispatch mode of a class that is on; None where none is."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return next((mode for mode in reversed(_get_current_dispatch_mode_stack()) if isinstance(mode, kind)), None)


def real_tensors() -> AbstractContextManager[object]:
    """Inside of `fake_tensors` or any other dispatch mode: operators run as if there were none. What ranks agree about
    has values in a plan too."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def is_wrapper(kind: type) -> bool:
    """Whether tensors of a class only stand for others, which their operators are passed on to (`DTensor`, the result
    of a collective under way)."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type

    return is_traceable_wrapper_subclass_type(kind)
