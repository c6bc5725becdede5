"""Fake tensors: a shape, a dtype and a device, and no memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch


def fake_tensors() -> AbstractContextManager[object]:
    """Tensors made inside have a shape, a dtype and the device that was asked for, and no memory. Without it no model
    of several ranks can be built other than on the CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class OneMode(FakeTensorMode):
        # A copied tensor copies its mode, and that copy frees weak references of storages which are not its own:
        # a crash, at whatever collection of garbage comes next.
        def __deepcopy__(self, memo: dict[int, Any]) -> FakeTensorMode:
            return self

    _grouped_products_of_any_type()
    return OneMode(allow_non_fake_inputs=True)


@cache
def _grouped_products_of_any_type() -> None:
    """Teach fake tensors `grouped_mm` of other types than bf16. The operator takes them, but its shape rule refuses
    them: experts in fp32 would run everywhere but in a plan."""
    from torch._subclasses import fake_impls

    operator = torch.ops.aten._grouped_mm.default
    if operator in fake_impls.op_implementations_dict:
        return

    def product(mode: Any, func: Any, left: torch.Tensor, right: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if left.dtype == torch.bfloat16 or left.dtype != right.dtype:
            return NotImplemented
        offsets: Any = rest[0] if rest else named.get("offs")
        shape: tuple[int, ...]
        columns = right.shape[-1]
        if left.dim() == right.dim() == 2:
            shape = (len(offsets), left.shape[0], columns)
        elif left.dim() == right.dim() == 3:
            shape = (left.shape[0], left.shape[1], columns)
        else:
            shape = (left.shape[-2], columns)
        with mode:
            return torch.empty(shape, dtype=named.get("out_dtype") or left.dtype, device=left.device)

    fake_impls.register_op_impl(operator)(product)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no memory, since `fake_tensors` was on when it was made."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def fake_errors() -> tuple[type[Exception], ...]:
    """What an operator raises on fake tensors where its result depends on their values."""
    from torch._subclasses import fake_tensor

    return fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException


def own_attributes(tensor: torch.Tensor) -> dict[str, Any]:
    """What was set on a tensor by attribute; of a fake one, without what makes it fake."""
    found = vars(tensor)
    if not is_fake(tensor):
        return dict(found)
    return {name: value for name, value in found.items() if name not in _attributes_of_fakes()}


@cache
def _attributes_of_fakes() -> frozenset[str]:
    with fake_tensors():
        return frozenset(vars(torch.empty(0))) | {"_is_param", "_is_buffer"}


@contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Without torch's own report of an operator that has no rule for fake tensors, which raises all the same, and
    without its warning where a fake tensor is copied."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # A deep copy of a tensor looks at its pointer, to find that it has none.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def around_shapes(enter: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Inside of it, each time that `DTensor` runs an operator on tensors of the whole, unsharded size, only to learn
    the shape of its result, that happens inside of a context of its own: no rank ever has such tensors."""
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    original = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagate(self: Any, *args: Any, **kwargs: Any) -> Any:
        with enter():
            return original(self, *args, **kwargs)

    ShardingPropagator._propagate_tensor_meta_non_cached = propagate  # type: ignore[method-assign]
    try:
        yield
    finally:
        ShardingPropagator._propagate_tensor_meta_non_cached = original  # type: ignore[method-assign]
