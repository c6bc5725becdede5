"""Fully sharded data parallelism (FSDP2)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from danling_conf._torch_private.dispatch import tree_map
from danling_conf.components.batch import map_tensors, tensors
from danling_conf.components.instantiate import section_from
from danling_conf.components.precision import dtype
from danling_conf.parallel.batch_norm import BATCH_NORMS
from danling_conf.parallel.blocks import repeated_blocks, sharing_parameters
from danling_conf.parallel.mesh import WEIGHTS, axes_of, axis, weights_mesh
from danling_conf.schema.fsdp import FsdpConfig
from danling_conf.schema.imports import uncollected
from danling_conf.topology.violation import SettingError

_log = logging.getLogger(__name__)


@uncollected()  # what is made for each block stays: to look through it took a third of the time
def shard(
    model: nn.Module,
    section: FsdpConfig,
    mesh: DeviceMesh | None,
    *,
    precision: str | None = None,
    experts: Sequence[str] = (),
    expert_mesh: DeviceMesh | None = None,
    pipelined: bool = False,
    one_group: bool = False,
) -> nn.Module:
    """Shard each repeated block of `model`, then the rest of it, over the shard axis of `mesh` and its context axis, if
    there is one; with a replicate axis, over both (hybrid sharding).

    In place; parameters become `DTensor`s, also those on the meta device. A block that shares a parameter with the rest
    of the model is sharded with the rest. Without `section.enabled` the model is returned unchanged.

    FSDP2 takes no parameter without a dimension, no complex gradient, and one dtype of gradients in a group. What it
    does not take stays whole on every rank (`whole_parameters`), and `parallel.data_gradients` averages its gradients.

    Args:
        precision: bf16 or fp16: dtype of the computation where `section.mp_policy` is unset. Gradients are then reduced
            in fp32, and batch normalisation computes in fp32.
        experts: names of modules whose first dim the expert axes have sharded; FSDP2 shards them over the remaining
            ranks of `expert_mesh`.
        pipelined: whether `model` is a stage of a pipeline. Its blocks stay gathered between microbatches unless
            `section.reshard_after_forward` is set.
        one_group: gather the whole model at once, for ranks that may pass different blocks.

    Raises:
        SettingError: the mesh has no shard axis, `reshard_after_forward` does not divide it, or a module is of a kind
            that FSDP2 does not take.
    """
    if not section.enabled:
        return model
    if mesh is None or "shard" not in axes_of(mesh):
        raise SettingError(
            "fsdp.enabled",
            True,
            f"the mesh has no shard axis (its axes: {', '.join(axes_of(mesh)) or 'none'})",
            "choose a layout with FSDP, such as parallel=fsdp, and start the process group before the mesh is made",
        )
    _check_modules(model)
    options = _options(section, mesh, precision, pipelined=pipelined)
    whole = options["ignored_params"] = {item for item in model.parameters() if not item.dim() or _is_complex(item)}
    _shard_experts(model, experts, expert_mesh, options)
    if not one_group:
        _shard_batch_norms(model, options)
    # Inner modules first: fully_shard takes the parameters of a module that no inner one has taken.
    blocks = [] if one_group else repeated_blocks(model, _classes(model, section, pipelined=pipelined))
    shared = sharing_parameters(model, (block for _, block in blocks))
    for name, block in reversed(blocks):
        if block in shared:
            _log.warning("fsdp: %s shares a parameter with the rest of the model and is sharded with it", name)
            continue
        whole |= _of_other_dtypes(block, whole)
        # Cast between blocks, outputs would meet parts of the root (norm, head) that compute in another dtype.
        fully_shard(block, **{**options, "mp_policy": replace(options["mp_policy"], output_dtype=None)})
    whole |= _of_other_dtypes(model, whole)
    fully_shard(model, **options)
    _cast_calls(model, options["mp_policy"])
    _move(whole, mesh)
    return model


def _check_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        what = None
        if isinstance(module, torch.jit.ScriptModule):
            what = "is a ScriptModule, which FSDP cannot shard"
        elif getattr(module, "sparse", False) is True and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            what = "gives sparse gradients, which FSDP cannot reduce"
        if what is not None:
            fix = "use a plain module (sparse=False, no torch.jit.script)"
            raise SettingError(
                "fsdp.enabled", True, f"{name} {what}", f"{fix}, or a layout that only replicates (parallel=ddpN)"
            )


def cast_inputs(value: Any, policy: MixedPrecisionPolicy | None) -> Any:
    """The inputs of a model as FSDP2 casts them: floating-point tensors in the dtype of the computation."""
    if policy is None or policy.param_dtype is None or not policy.cast_forward_inputs:
        return value
    return map_tensors(partial(_to, kind=policy.param_dtype), value)


@contextmanager
def explaining_uncast(value: Any, policy: MixedPrecisionPolicy | None) -> Iterator[None]:
    """Raise SettingError where a model fails on inputs that the policy leaves in another dtype than its own."""
    try:
        yield
    except RuntimeError as error:
        own = None if policy is None or policy.cast_forward_inputs else policy.param_dtype
        others = {item.dtype for item in tensors(value) if item.is_floating_point()} - {own}
        if own is None or not others or type(error) is not RuntimeError:  # subclasses: out of memory, a lost rank
            raise
        names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in others))
        rule = f"the model computes in {str(own).removeprefix('torch.')}, is given {names}, and fails: "
        rule += str(error).strip().partition("\n")[0]
        fix = "leave it out, or let the model cast what it is given"
        raise SettingError("fsdp.mp_policy.cast_forward_inputs", False, rule, fix) from error


def _cast(value: Any, kind: torch.dtype) -> Any:
    # As FSDP2's own hooks do: outputs may be of classes that only torch's trees know.
    return tree_map(lambda item: _to(item, kind) if isinstance(item, torch.Tensor) else item, value)


def _to(item: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    return item.to(kind) if item.is_floating_point() else item


def _cast_calls(model: nn.Module, policy: MixedPrecisionPolicy) -> None:
    """Cast what goes in and out of the model also where a call passes FSDP2's own hooks by; see
    `data_parallel.run_inside_fsdp`."""
    if policy.param_dtype is not None and policy.cast_forward_inputs:
        model.register_forward_pre_hook(lambda _, args, kwargs: cast_inputs((args, kwargs), policy), with_kwargs=True)
    if policy.output_dtype is not None:
        model.register_forward_hook(lambda _, args, output: _cast(output, policy.output_dtype))


def whole_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of a sharded model that every data rank holds whole. Call it before the first forward,
    which puts whole parameters in the place of sharded ones."""
    return [item for item in model.parameters() if item.requires_grad and not is_sharded(item)]


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether FSDP has sharded a parameter. A tensor axis alone makes a DTensor of it too, also of one that FSDP has
    gathered."""
    names = parameter.device_mesh.mesh_dim_names or () if isinstance(parameter, DTensor) else ()
    return any(name in names for name in ("shard", WEIGHTS, "expert_shard"))


def _is_complex(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.is_complex()


def _of_other_dtypes(module: nn.Module, whole: set[nn.Parameter]) -> set[nn.Parameter]:
    """The parameters that would be in one group and have another dtype than most of what is trained there."""
    group = [item for item in module.parameters() if item.requires_grad and item not in whole and not is_sharded(item)]
    elements: Counter[torch.dtype] = Counter()
    for item in group:
        elements[item.dtype] += item.numel()
    most = max(elements, key=lambda kind: (elements[kind], str(kind)), default=None)
    return {item for item in group if item.dtype != most}


def _move(whole: set[nn.Parameter], mesh: DeviceMesh) -> None:
    """Move parameters to the device, as `fully_shard` moves those that it takes."""
    for item in whole:
        if item.device.type not in ("meta", mesh.device_type):
            item.data = item.data.to(mesh.device_type)
    large = [tuple(item.shape) for item in whole if item.dim()]
    if large:
        _log.info("fsdp: whole on every rank, since their dtype is not that of their block: parameters of %s", large)


def _options(section: FsdpConfig, mesh: DeviceMesh, precision: str | None, *, pipelined: bool) -> dict[str, Any]:
    """The arguments of `fully_shard`; what is unset keeps torch's default."""
    options: dict[str, Any] = {
        "mesh": weights_mesh(mesh),
        "mp_policy": mixed_precision_policy(section, precision),
        "offload_policy": offload_policy(section),
    }
    size = section.reshard_after_forward
    if size is not None:
        context = axis(mesh, "context")
        degree = mesh["shard"].size() * (1 if context is None else context.size())
        if not isinstance(size, bool) and (size < 1 or degree % size):
            raise SettingError(
                "fsdp.reshard_after_forward",
                size,
                f"it must divide the {degree} ranks that weights are sharded over",
                "choose a divisor of them, or true or false",
            )
        options["reshard_after_forward"] = size
    elif pipelined:
        # A schedule runs many microbatches between two optimizer steps: to gather for each would dominate the time.
        options["reshard_after_forward"] = False
    return options


def _classes(model: nn.Module, section: FsdpConfig, *, pipelined: bool) -> list[str] | None:
    """The classes whose modules are sharded one by one; a stage need not have a module of each."""
    classes = section.module_classes
    if classes is None or not pipelined:
        return classes
    present = {type(module).__name__ for module in model.modules()}
    return [name for name in classes if name in present]


def _shard_experts(model: nn.Module, names: Sequence[str], mesh: DeviceMesh | None, options: dict[str, Any]) -> None:
    if mesh is None or not names:
        return
    several = mesh["replicate"].size() > 1
    own = {**options, "mesh": mesh["replicate", "expert_shard"] if several else mesh["expert_shard"]}
    own["mp_policy"] = replace(options["mp_policy"], output_dtype=None)
    if not isinstance(own.get("reshard_after_forward", True), bool):
        own["reshard_after_forward"] = True  # the size was one for the ranks of the dense parameters
    for name in names:
        fully_shard(model.get_submodule(name), **own)


def _shard_batch_norms(model: nn.Module, options: dict[str, Any]) -> None:
    """Let batch normalisation compute in fp32 under mixed precision: its running statistics are no parameters, stay in
    fp32, and do not mix with parameters of another dtype."""
    policy = options["mp_policy"]
    if policy.param_dtype in (None, torch.float32):
        return
    own = MixedPrecisionPolicy(torch.float32, policy.reduce_dtype or policy.param_dtype, policy.param_dtype)
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS) and module is not model]
    shared = sharing_parameters(model, norms)
    for module in norms:
        if module not in shared:
            fully_shard(module, **{**options, "mp_policy": own})


def mixed_precision_policy(section: FsdpConfig, precision: str | None) -> MixedPrecisionPolicy:
    """`section.mp_policy` as torch's policy; where it is unset, the one of `precision`."""
    policy = section.mp_policy
    if policy is None:
        if precision in (None, "fp32"):
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=dtype(precision), reduce_dtype=torch.float32)
    return MixedPrecisionPolicy(
        param_dtype=dtype(policy.param_dtype),
        reduce_dtype=dtype(policy.reduce_dtype),
        output_dtype=dtype(policy.output_dtype),
        cast_forward_inputs=policy.cast_forward_inputs,
    )


def offload_policy(section: FsdpConfig) -> OffloadPolicy:
    """`section.offload_policy` as torch's policy."""
    if not offloads(section):
        return OffloadPolicy()
    pin_memory = section.offload_policy.pin_memory
    return CPUOffloadPolicy(pin_memory=torch.accelerator.is_available() if pin_memory is None else pin_memory)


def offloads(section: FsdpConfig) -> bool:
    """Whether parameters stay in host memory."""
    return section.enabled and section.offload_policy is not None and section.offload_policy.enabled


def from_keywords(**keywords: Any) -> partial[nn.Module]:
    """`fsdp` as `hydra.utils.instantiate` reads it: a partial that waits for the model and `mesh=`.

    Without `enabled` it shards: an app without our base config chose a policy, and no layout that says otherwise.
    """
    keywords.setdefault("enabled", True)
    return partial(shard, section=section_from(FsdpConfig, keywords, path="fsdp"))
