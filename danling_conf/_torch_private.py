"""Adapter of torch's private names: nothing else in the package uses one.

All of it was run with torch 2.13, on the CPU (gloo) and, where a note says so, on CUDA. Each note says what breaks when
torch changes the name, and thus what to test with a new version of torch.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn
from torch.distributed import ProcessGroup, Store, distributed_c10d
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from torch.utils import checkpoint

# Trees of tensors, and the hook into the dispatcher; neither module is documented. Without them batches cannot be moved
# or cut, and nothing records what the constructor of a model on the meta device does.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

_Mode = TypeVar("_Mode")

__all__ = [
    "Replicated",
    "TorchDispatchMode",
    "all_gather",
    "all_to_all",
    "argument_names",
    "as_no_view",
    "compile_settings_restored",
    "default_store",
    "dump_memory_snapshot",
    "enable_ring",
    "equal_values",
    "fake_errors",
    "fake_tensors",
    "flatten_mesh",
    "forget_compiled_code",
    "forget_meshes",
    "gather_in_methods",
    "has_hooks",
    "hooks_of",
    "is_fake",
    "is_gathering_input",
    "is_operator",
    "is_view",
    "keep_for_backward",
    "keep_quiet_about_order",
    "one_graph",
    "operators",
    "optimize_ddp",
    "outstanding_collective",
    "own_attributes",
    "place_of_break",
    "process_groups",
    "quiet_fake_tensors",
    "real_tensors",
    "record_collectives",
    "record_memory_history",
    "reentrant_checkpoints",
    "replicate",
    "reset_data_parallel",
    "reset_fully_sharded",
    "run_inside_fsdp",
    "scheduled_rates",
    "set_timeout",
    "shut_down_workers",
    "split_mesh",
    "storage_identity",
    "sum_over_ranks",
    "takes_random_numbers",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "truncated_normal",
    "untraceable",
    "watch_gradients",
    "whole_parameters",
    "written_arguments",
]


# Process groups.


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


# Collectives.


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


def as_no_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that autograd takes for no view, so that it may be changed in place; what `to_local`
    returns is a view made by a custom function, of which torch refuses that. Only where nothing else uses the memory.

    Without `_unsafe_view`, tensor parallelism fails; a copy does the same.
    """
    return torch.ops.aten._unsafe_view.default(tensor, tensor.shape)


# Meshes and wrappers.


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

    Without `_run_ddp_forward`, a user's own `forward=` fails under DDP.
    """

    def run_inside(self, function: Callable[[nn.Module], torch.Tensor | None]) -> torch.Tensor | None:
        """The tensor that `function` makes of the module. Its gradients are reduced as those of `forward`'s output."""
        # Not `self(...)`, which may be compiled, and would compile the function with all that it closes over.
        return cast("torch.Tensor | None", self.forward(_Inside(function)))

    def _run_ddp_forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if len(inputs) != 1 or not isinstance(inputs[0], _Inside):
            return super()._run_ddp_forward(*inputs, **kwargs)
        with nullcontext() if self._use_python_reducer else self._inside_ddp_forward():
            return inputs[0].function(self.module)


class _Inside:
    """A function on its way through DDP's handling of inputs, which leaves unknown objects alone."""

    def __init__(self, function: Callable[[nn.Module], torch.Tensor | None]) -> None:
        self.function = function


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


def enable_ring(balance: bool) -> None:
    """Let attention on tensors that are sharded along the sequence go around the ranks; CUDA only. `balance` says
    whether each rank has an early and a late piece.

    Experimental in 2.13, and the most likely of all to move. Without it `parallel.context_method=ring` fails; `gather`
    and `ulysses` do not need it.
    """
    from torch.distributed.tensor.experimental._context_parallel import _attention

    _attention._cp_options.enable_load_balance = balance
    _attention._enable_context_parallel_dispatcher()


_optimize_ddp: list[Any] = []
"""What `optimize_ddp` was before the first run of this process chose another."""


def optimize_ddp(value: bool | str | None) -> None:
    """Choose how dynamo treats DDP; None for what torch has. `torch._dynamo.config` is documented but has no public
    path; another name there raises AttributeError for `compile.optimize_ddp`."""
    if not _optimize_ddp:
        _optimize_ddp.append(torch._dynamo.config.optimize_ddp)
    torch._dynamo.config.optimize_ddp = _optimize_ddp[0] if value is None else value  # type: ignore[assignment]


def keep_for_backward(budget: float, *, everything: bool = False) -> None:
    """Choose what graphs that are compiled from now on keep from forward for backward: as torch chooses (a budget of
    1), less, or `everything` that eager execution keeps.

    The partitioner of inductor and of `aot_eager` reads both names. Without the first, `compile.memory_policy` raises
    AttributeError. The second is a distance from backward, beyond which nothing is computed again; where torch forgets
    it, `eager` is `default`, and the test of the saved bytes fails.
    """
    from torch._functorch import config

    wanted = {"activation_memory_budget": budget, "max_dist_from_bw": -1 if everything else 1000}
    if any(getattr(config, name) != value for name, value in wanted.items()):
        torch._dynamo.reset()  # code that was compiled under another policy would be used again for the same class
    for name, value in wanted.items():
        setattr(config, name, value)


@contextmanager
def compile_settings_restored() -> Iterator[None]:
    """Whatever is set inside by `optimize_ddp`, `keep_for_backward` and `movable_kernels` is as before afterwards."""
    from torch._functorch import config

    names = ("activation_memory_budget", "max_dist_from_bw")
    before, ddp = {name: getattr(config, name) for name in names}, torch._dynamo.config.optimize_ddp
    headers = _precompiled_headers()
    try:
        yield
    finally:
        torch._dynamo.config.optimize_ddp = ddp
        for name, value in before.items():
            setattr(config, name, value)
        if _precompiled_headers() != headers:
            import torch._inductor.config as inductor

            inductor.cpp_cache_precompile_headers = headers


def movable_kernels() -> None:
    """Let inductor build kernels for the CPU without headers that it has compiled before.

    It looks for those beside its cache, by a path that is part of a kernel's key: in another directory every kernel is
    built again. Without the name in inductor's settings, compile artifacts save nothing on the CPU.
    """
    import torch._inductor.config as inductor

    inductor.cpp_cache_precompile_headers = False


def _precompiled_headers() -> bool:
    inductor = sys.modules.get("torch._inductor.config")
    if inductor is None:  # it will read the variable when it is imported
        return os.environ.get("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "1") == "1"
    return bool(inductor.cpp_cache_precompile_headers)


def forget_compiled_code() -> None:
    """Let inductor read its cache directory anew: what it holds in memory it would not write to another one. Without
    `clear_caches`, a directory that a process changes to stays incomplete."""
    if "torch._inductor.utils" in sys.modules:
        sys.modules["torch._inductor.utils"].clear_caches()


def one_graph(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A function that calls `backward`, compiled as one graph with its backward pass.

    `trace_autograd_ops` is set for its calls alone: a forward under DDP or FSDP2 that is traced with it loses every
    gradient without an error in 2.13. Without the name, `stack=graph` fails.
    """
    compiled = torch.compile(function, fullgraph=True, **options)

    def call(*arguments: Any) -> Any:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            return compiled(*arguments)

    return call


def untraceable() -> tuple[type[Exception], ...]:
    """What is raised where a function is not one graph."""
    from torch._dynamo import exc

    return exc.Unsupported, exc.UserError


def place_of_break(error: Exception) -> tuple[str, int, str] | None:
    """File, line and text of the code at which tracing ended, of an error of `untraceable`. None where it does not
    say."""
    stack = getattr(error, "real_stack", None)
    return (stack[-1].filename, stack[-1].lineno or 0, stack[-1].line or "") if stack else None


def dynamo_is_loaded() -> bool:
    """Whether something may be compiled. Without the name, what must run eagerly may be compiled, and nothing else."""
    return "torch._dynamo" in sys.modules


# Operators.


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
def takes_random_numbers(operator: Any) -> bool:
    """Whether an operator draws from a generator, by its tags."""
    return torch.Tag.nondeterministic_seeded in operator.tags


@cache
def argument_names(operator: Any) -> list[str]:
    """The names of an operator's arguments, by its schema."""
    return [argument.name for argument in operator._schema.arguments]


@cache
def is_view(operator: Any) -> bool:
    """Whether an operator returns a view of its input, by its schema."""
    returns = operator._schema.returns
    return bool(returns) and returns[0].alias_info is not None


def storage_identity(tensor: torch.Tensor) -> int:
    """What views and `.data` of one tensor have in common; meta tensors have no address to compare. Without `_cdata`
    no model can be built on the meta device."""
    return identity_of(tensor.untyped_storage())


def identity_of(storage: torch.UntypedStorage) -> int:
    """The same of a storage."""
    return storage._cdata


# Fake tensors.


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


def real_tensors() -> AbstractContextManager[object]:
    """Inside of `fake_tensors` or any other dispatch mode: operators run as if there were none. What ranks agree about
    has values in a plan too."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def equal_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """`torch.equal` of two plain tensors, as inside of `real_tensors`, and in a third of the time: it is asked at every
    number that a model's construction draws. Without the guard, `real_tensors` does the same."""
    with torch._C._DisableTorchDispatch():
        return torch.equal(one, other)


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


def has_hooks(parameter: torch.Tensor) -> bool:
    """Whether a function is to be called with the gradient of a parameter. Without these attributes no model can be
    built for several ranks."""
    return bool(parameter._backward_hooks) or bool(parameter._post_accumulate_grad_hooks)


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """What is called around a module's forward and backward. Without these attributes no model can be cut for a
    pipeline."""
    registered = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return [hook for hooks in registered for hook in hooks.values()]


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


# Schedulers, loaders, memory.


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


def saved_buffers(module: nn.Module) -> list[torch.Tensor]:
    """The buffers that a module's state holds, each once; torch does not publish which ones it leaves out."""
    found = (
        buffer
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and name not in part._non_persistent_buffers_set
    )
    return list({id(buffer): buffer for buffer in found}.values())


def without_compile(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` has wrapped, or the module itself."""
    return cast(nn.Module, getattr(module, "_orig_mod", module))


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


# Plans.


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


def register_tracing_backend(name: str, run: Callable[..., Callable[[list[Any]], Any]], *, fused: bool) -> None:
    """Let `torch.compile` know a backend that does all that inductor does with a graph (or `aot_eager`, if not `fused`)
    up to where code would be generated: `run(graph, fused=...)` returns what is called instead, with a list of inputs.

    `compile_fx` takes the last part of inductor as `inner_compile`. Without it no compiled model can be planned.
    """
    from torch._dynamo.backends import registry

    def compiler(graph: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        call = run(graph, fused=fused)
        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        if fused:
            from torch._inductor.compile_fx import compile_fx

            return compile_fx(graph, inputs, inner_compile=compiler)
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        return aot_autograd(
            fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition
        )(graph, inputs)

    registry._BACKENDS.pop(name, None)
    registry._COMPILER_FNS.pop(name, None)
    registry.register_backend(backend, name=name)


@contextmanager
def quiet_compilation() -> Iterator[None]:
    """Without what torch logs about the way in which it compiles: whoever trains a model is told so then."""
    loggers = [logging.getLogger(name) for name in ("torch._higher_order_ops.wrap", "torch._dynamo", "torch._inductor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def forget_graphs() -> None:
    """Compile anew what is called from now on. torch compiles a function a few times only, and then runs it eagerly."""
    torch._dynamo.reset()


def active_mode(kind: type[_Mode]) -> _Mode | None:
    """The innermost dispatch mode of a class that is on; None where none is."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return next((mode for mode in reversed(_get_current_dispatch_mode_stack()) if isinstance(mode, kind)), None)


def is_recomputed_node(node: torch.fx.Node) -> bool:
    """Whether a node of a backward graph is a part of forward that is computed again. Without the tag, it counts as a
    part of backward."""
    return bool(node.meta.get("partitioner_tag") == "is_forward")


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that compiled code calls as it is: graphs end before it."""
    return cast("Callable[..., Any]", torch.compiler.disable(function))


def is_wrapper(kind: type) -> bool:
    """Whether tensors of a class only stand for others, which their operators are passed on to (`DTensor`, the result
    of a collective under way)."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type

    return is_traceable_wrapper_subclass_type(kind)


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
