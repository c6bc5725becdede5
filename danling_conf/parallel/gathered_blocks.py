"""Blocks that FSDP gathers one by one: in the same order on every rank, whichever of their methods is called.

A gather takes whatever the other ranks send at that moment. Ranks that pass different blocks wait for each other until
the timeout, or, where shards have one size, compute with parts of two blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode

from danling_conf._torch_private.data_parallel import gather_in_methods, is_gathering_input
from danling_conf._torch_private.dispatch import real_tensors, storage_identity, tree_leaves
from danling_conf.components.optimizer import cleaned
from danling_conf.parallel.fsdp import is_sharded
from danling_conf.topology.violation import ConfigRefused, SettingError, Violation

_PATH = "parallel.unused_parameters"
_NO_CHANGES = ("requires_grad_", "detach_", "share_memory_")
_END = -1
"""In the place of a block: the forward is over."""


class GatheredBlocks:
    """Holds the order in which the first forward passes blocks, which all ranks agree on block by block, and refuses
    another one in a later forward.

    Args:
        model: under FSDP, sharded block by block.
        mesh: the ranks that train it.
        compiled: whether it is, and cannot be watched.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, *, compiled: bool) -> None:
        self.model, self.compiled = model, compiled
        self.group, self.device = mesh.get_group(), torch.device(mesh.device_type)
        found: list[tuple[str, Any]] = [
            (name, module) for name, module in model.named_modules() if name and isinstance(module, FSDPModule)
        ]
        self.names = [name for name, _ in found]
        self._order: list[int] = []
        self._agreed = False
        """Whether the first forward came to its end."""
        self._passed: int | None = None
        """Blocks passed by the forward under way; None outside of one."""
        for index, (_, module) in enumerate(found):
            # In front of FSDP's own hook, which gathers.
            module.register_forward_pre_hook(partial(_enter, self, index), prepend=True)
            gather_in_methods(module, partial(self.enter, index))

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Context of a forward that is trained on: blocks that recompute in the backward pass are not looked at.
        Collective in the first one.

        Raises:
            SettingError: in the first forward: a parameter is used outside of its block, or changed.
            ConfigRefused: ranks pass different blocks; in the first forward on all ranks, later on those whose order is
                another one than before.
        """
        self._passed, watched = 0, not self._agreed and not self.compiled
        if not self._agreed:  # the one before may have failed, and been survived
            self._order = []
        try:
            with _Watching(self.model) if watched else nullcontext():
                yield
            self.enter(_END)
            self._agreed = True
        finally:
            self._passed = None

    def enter(self, index: int) -> None:
        """Pass a block, before its parameters are gathered."""
        if self._passed is None or not self.names:
            return
        if not self._agreed:
            self._agree(index)
            self._order.append(index)
        elif self._passed >= len(self._order) or self._order[self._passed] != index:
            before = self._order[self._passed] if self._passed < len(self._order) else _END
            raise _refusal(f"the forward {self._at(index)} where it {self._at(before)} in the first step")
        self._passed += 1

    def _agree(self, index: int) -> None:
        with real_tensors():
            extremes = torch.tensor([index, -index], device=self.device)
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
            most, least = extremes.tolist()
        if most != -least:
            raise _refusal(f"the forward {self._at(most)} on some ranks where it {self._at(-least)} on others")

    def _at(self, index: int) -> str:
        return "ends" if index == _END else f"passes {self.names[index]}"


class _Watching(TorchFunctionMode):
    """Refuses what FSDP would make wrong or torch refuse without a name: a computation with a parameter that is sharded
    at that moment, whose gradient would be that of a shard; a change of one that is gathered, which is not kept; and a
    change of what a block is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {id(item): name for name, item in cleaned(model) if is_sharded(item)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used = next((self.names[id(item)] for item in tree_leaves(args) if id(item) in self.names), None)
        target = _changed(func, args, kwargs or {})
        if target is not None and target.grad_fn is None:
            self._check_kept(target)
        try:
            result = func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if target is not None and is_gathering_input(target):
                raise _input_changed(func) from error
            if used is None:
                raise
            raise _outside(used) from error
        if used is not None and isinstance(result, torch.Tensor) and result.grad_fn is not None:
            raise _outside(used)
        return result

    def _check_kept(self, target: torch.Tensor) -> None:
        changed = storage_identity(target)
        for name, item in cleaned(self.model):
            # FSDP has taken those it gathers; what it leaves whole is every rank's own.
            if name in self.names.values() and not is_sharded(item) and storage_identity(item) == changed:
                raise SettingError(
                    "fsdp.enabled",
                    True,
                    f"the forward changes the parameter {name}, and FSDP keeps no change of a gathered parameter",
                    "change it between steps, in a callback, or choose a layout that only replicates (parallel=ddpN)",
                )


def _changed(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """The tensor that a function of torch changes in place, by its name."""
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__")
    in_place = in_place or kwargs.get("inplace") is True
    first = args[0] if args else None
    return first if in_place and name not in _NO_CHANGES and isinstance(first, torch.Tensor) else None


def _input_changed(func: Any) -> SettingError:
    return SettingError(
        "fsdp.enabled",
        True,
        f"a block changes its input in place ({func.__name__}), which FSDP does not allow",
        "let it make a new tensor, or choose a layout that only replicates (parallel=ddpN)",
    )


def _outside(name: str) -> SettingError:
    return SettingError(
        _PATH,
        "refuse",
        f"the forward uses {name} outside of its block, where FSDP holds a part of it only",
        f"use it in a method of the block, or let FSDP gather the whole model at once: {_PATH}=allow",
    )


@torch.compiler.disable
def _enter(blocks: GatheredBlocks, index: int, module: nn.Module, args: object) -> None:
    blocks.enter(index)


def _refusal(what: str) -> ConfigRefused:
    rule = f"{what}: FSDP gathers block by block, which all ranks must pass in one order"
    fix = f"pass the same blocks on every rank and in each step, or let ranks differ: {_PATH}=allow"
    return ConfigRefused([Violation(_PATH, "refuse", rule, fix)])
