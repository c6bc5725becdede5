"""Everything of torch that has no public name, in one place."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed import ProcessGroup, Store, distributed_c10d
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import lr_scheduler


def process_groups() -> list[ProcessGroup]:
    """Every process group this rank is a member of; torch keeps the list but does not publish it."""
    return list(distributed_c10d._world.pg_map)


def set_timeout(group: ProcessGroup, timeout: timedelta) -> None:
    """Change the time limit of a group's later collectives; torch publishes it for new groups only."""
    distributed_c10d._set_pg_timeout(timeout, group)


def scheduled_rates(scheduler: Any) -> list[float]:
    """The learning rates of a schedule at its current position, not computed from those before it."""
    if hasattr(scheduler, "_get_closed_form_lr"):
        return list(scheduler._get_closed_form_lr())
    with lr_scheduler._enable_get_lr_call(scheduler):
        return scheduler.get_lr()


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The axes of `mesh` as one axis called `name`; its process group is made once and kept by the root mesh."""
    return mesh._flatten(name)


def split_mesh(mesh: DeviceMesh, axes: dict[str, int]) -> DeviceMesh:
    """A mesh of one axis as several, outermost first; tensors on it and on other meshes of the same root combine."""
    return mesh._unflatten(0, tuple(axes.values()), tuple(axes))


def keep_quiet_about_order() -> None:
    """Switch off a warning that every rank gives when it gathers a tensor that both FSDP2 and another axis shard: their
    order is FSDP2's own, and nobody who reads the warning can change it."""
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def replicate(module: nn.Module, **options: Any) -> nn.Module:
    """Data parallelism with FSDP2's machinery and whole weights, for parameters that other axes shard (`DTensor`s),
    which DDP does not take."""
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return cast(nn.Module, replicate(module, **options))


def all_gather(tensor: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
    """The group's tensors joined along `dim`; differentiable: gradients are summed and dealt back. (The all-gather of
    `torch.distributed.nn` gives wrong gradients on gloo where they are not contiguous.)"""
    return functional.all_gather_tensor_autograd(tensor.contiguous(), dim, group)


def all_to_all(tensor: torch.Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> torch.Tensor:
    """Rows of (sum of `sent`, ...) to their ranks, rows from all ranks back: (sum of `received`, ...). Differentiable.

    (torch's own differentiable one gives a tensor that the collective is still filling; a compiled function that takes
    it gives it a gradient of 0.)
    """
    return _AllToAll.apply(tensor, received, sent, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Any:
        ctx.sizes, ctx.group = (received, sent), group
        return functional.wait_tensor(functional.all_to_all_single(tensor.contiguous(), received, sent, group))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        received, sent = ctx.sizes
        back = functional.all_to_all_single(gradient.contiguous(), sent, received, ctx.group)
        return functional.wait_tensor(back), None, None, None


def enable_ring(balance: bool) -> None:
    """Let attention on tensors that are sharded along the sequence go around the ranks (torch 2.13, CUDA only).
    `balance` says whether each rank has an early and a late piece."""
    from torch.distributed.tensor.experimental._context_parallel import _attention

    _attention._cp_options.enable_load_balance = balance
    _attention._enable_context_parallel_dispatcher()


def storage_identity(tensor: torch.Tensor) -> int:
    """What views and `.data` of one tensor have in common; meta tensors have no address to compare."""
    return tensor.untyped_storage()._cdata


def record_collectives(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let process groups that are made from now on remember their latest collectives (torch's flight recorder)."""
    environment.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


def outstanding_collective() -> dict[str, Any] | None:
    """The oldest collective that this rank has begun and that has not ended: `name`, `number` in its group, `group` and
    `since` (seconds since 1970). None where there is none or nothing is recorded."""
    from torch._C import _distributed_c10d

    dump = getattr(_distributed_c10d, "_dump_fr_trace_json", None)  # not in a torch without collectives
    if dump is None:
        return None
    entries = json.loads(dump(True, True)).get("entries") or []
    under_way = [entry for entry in entries if not entry["retired"]]
    if not under_way:
        return None
    oldest = min(under_way, key=lambda entry: entry["time_created_ns"])
    return {
        "name": oldest["profiling_name"].rpartition(":")[2],
        "number": oldest["p2p_seq_id"] if oldest["is_p2p"] else oldest["collective_seq_id"],
        "group": oldest["process_group"][1] or oldest["process_group"][0],
        "since": oldest["time_created_ns"] / 1e9,
    }


def default_store() -> Store | None:
    """The store that the ranks met at; None where there is no process group."""
    return distributed_c10d._get_default_store() if torch.distributed.is_initialized() else None


def record_memory_history(record: bool) -> None:
    """Begin or end recording what CUDA's allocator does, for a snapshot."""
    torch.cuda.memory._record_memory_history("all" if record else None)


def dump_memory_snapshot(path: str) -> None:
    """Write what was recorded."""
    torch.cuda.memory._dump_snapshot(path)


def fake_tensors() -> AbstractContextManager[object]:
    """Tensors made inside have a shape, a dtype and the device that was asked for, and no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no memory, since `fake_tensors` was on when it was made."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def fake_errors() -> tuple[type[Exception], ...]:
    """What an operator raises on fake tensors where its result depends on their values."""
    from torch._subclasses import fake_tensor

    return fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException


def real_tensors() -> AbstractContextManager[object]:
    """Inside of `fake_tensors` or any other dispatch mode: operators run as if there were none."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


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


def own_attributes(tensor: torch.Tensor) -> dict[str, Any]:
    """What was set on a tensor by attribute; of a fake one, without what makes it fake."""
    found = vars(tensor)
    if not is_fake(tensor):
        return dict(found)
    with tensor.fake_mode:  # type: ignore[attr-defined]
        bare = vars(torch.empty(0))
    return {
        name: value for name, value in found.items() if name not in bare and name not in ("_is_param", "_is_buffer")
    }


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
