"""Process groups, collectives and meshes."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroup, Store, distributed_c10d
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh


def process_groups() -> list[ProcessGroup]:
    """Every process group that this rank is a member of; torch keeps the list but does not publish it.

    If `_world.pg_map` moves, `comm.train_timeout_seconds` fails with an AttributeError.
    """
    return list(distributed_c10d._world.pg_map)


def set_timeout(group: ProcessGroup, timeout: timedelta) -> None:
    """Change the timeout of a group's later collectives; torch publishes it for new groups only.

    If `_set_pg_timeout` goes or takes other arguments, `comm.train_timeout_seconds` fails after the first step.
    """
    distributed_c10d._set_pg_timeout(timeout, group)


def default_store() -> Store | None:
    """The store that the ranks met at; None where there is no process group.

    Without `_get_default_store`, warnings of other ranks do not reach the terminal.
    """
    return distributed_c10d._get_default_store() if torch.distributed.is_initialized() else None


def record_collectives(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let process groups that are made from now on remember their latest collectives (torch's flight recorder).

    Older versions read TORCH_NCCL_TRACE_BUFFER_SIZE instead. Where the name is not read, nothing is recorded, and a
    timeout cannot name its collective.
    """
    environment.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


def outstanding_collective() -> dict[str, Any] | None:
    """The oldest collective that this rank has started and that has not ended: `name`, `number` in its group, `group`
    and `since` (seconds since 1970). None where there is none or nothing is recorded.

    The keys of an entry are those of 2.13's flight recorder; another version of its format raises KeyError here.
    """
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


def all_gather(tensor: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
    """The group's tensors joined along `dim`. Differentiable: gradients are summed and scattered back.

    The public one, of `torch.distributed.nn`, returns wrong gradients on gloo where they are not contiguous; the parity
    tests of context parallelism show it. Without this one, context parallelism by gather fails.
    """
    return functional.all_gather_single_autograd(tensor.contiguous(), dim, group)


def all_to_all(tensor: torch.Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> torch.Tensor:
    """Rows of (sum of `sent`, ...) to their ranks, rows from all ranks back: (sum of `received`, ...). Differentiable.

    torch's own differentiable one returns a tensor that the collective is still filling, and a compiled function that
    takes it gives it a gradient of 0. So the wait is inside. Without `all_to_all_single`, expert parallelism fails.
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


def sum_over_ranks(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """The sum of the group's tensors. Differentiable: gradients are summed too.

    The public one, of `torch.distributed.nn`, warns at each call that it is deprecated for this one. Without it
    `parallel.sync_batch_norm` fails on the CPU.
    """
    return _SumOverRanks.apply(tensor, group)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: ProcessGroup) -> Any:
        ctx.group = group
        return functional.wait_tensor(functional.all_reduce(tensor.contiguous(), "sum", group))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return functional.wait_tensor(functional.all_reduce(gradient.contiguous(), "sum", ctx.group)), None


def collective_of(operator: Any, arguments: Sequence[Any]) -> tuple[str, list[int]] | None:
    """Name of the collective that a dispatched operator is, and the ranks that take part; None where it is none.

    Both families of 2.13 are known: `c10d` with the group as an object, `_c10d_functional` with its name. What is in
    neither is not counted by a plan.
    """
    namespace, name = operator.namespace, operator.overloadpacket.__name__
    if namespace == "c10d":
        groups = [item for item in arguments if isinstance(item, torch.ScriptObject)]
        for item in groups:
            try:
                group = ProcessGroup.unbox(item)
            except RuntimeError:  # an operation such as SUM, which comes as an object too
                continue
            return name.strip("_"), torch.distributed.get_process_group_ranks(group)
        return None
    if namespace in ("_c10d_functional", "_c10d_functional_autograd") and name != "wait_tensor":
        text = next((item for item in reversed(arguments) if isinstance(item, str)), None)
        if text is None:
            return None
        group = distributed_c10d._resolve_process_group(text)  # type: ignore[arg-type]
        return name.strip("_"), torch.distributed.get_process_group_ranks(group)
    return None


def as_no_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that autograd takes for no view, so that it may be changed in place; what `to_local`
    returns is a view made by a custom function, of which torch refuses that. Only where nothing else uses the memory.

    Without `_unsafe_view`, tensor parallelism fails; a copy does the same.
    """
    return torch.ops.aten._unsafe_view.default(tensor, tensor.shape)


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The axes of `mesh` as one axis called `name`; its process group is made once and kept by the root mesh.

    Without `_flatten` no layout of two data axes, or of shard and context, can be made.
    """
    return mesh._flatten(name)


def split_mesh(mesh: DeviceMesh, axes: dict[str, int]) -> DeviceMesh:
    """A mesh of one axis as several, outermost first; tensors on it and on other meshes of the same root combine.

    `_unflatten` is younger than `_flatten`. A second `init_device_mesh` is no way out: tensors on meshes of two roots
    cannot be clipped together. Without it expert axes fail.
    """
    return mesh._unflatten(0, tuple(axes.values()), tuple(axes))


def keep_quiet_about_order() -> None:
    """Switch off a warning that every rank logs when it gathers a tensor that both FSDP2 and another axis shard: their
    order is FSDP2's own, and no reader of the warning can change it. Under another logger's name it comes back."""
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def forget_meshes() -> None:
    """Clear what torch remembers of meshes: plans and coordinates, which keep their process groups alive.

    A group that outlives `destroy_process_group` keeps its threads until the interpreter is torn down, where torch 2.13
    then aborts now and then. And DTensor finds its plans by the shape of a mesh: in another world of the same process
    they name groups that are gone.
    """
    from torch.distributed.tensor import debug

    debug._clear_sharding_prop_cache()
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.distributed."):
            for item in list(vars(module).values()):
                # By its type: `isinstance` would wake objects that stand in for others.
                for value in (item, *(vars(item).values() if type(item) is type else ())):
                    if type(value) is functools._lru_cache_wrapper:
                        value.cache_clear()


def enable_ring(balance: bool) -> None:
    """Let attention on tensors that are sharded along the sequence go around the ranks; CUDA only. `balance` says
    whether each rank has an early and a late piece.

    Experimental in 2.13, and the most likely of all to move. Without it `parallel.context_method=ring` fails; `gather`
    and `ulysses` do not need it.
    """
    from torch.distributed.tensor.experimental._context_parallel import _attention

    _attention._cp_options.enable_load_balance = balance
    _attention._enable_context_parallel_dispatcher()


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    """A process group of `size` ranks of which only this one exists: collectives return at once, with this rank's own
    values. In this process there may be no other. Without `FakeStore` there are no plans of several ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        forget_meshes()
        torch.distributed.destroy_process_group()
