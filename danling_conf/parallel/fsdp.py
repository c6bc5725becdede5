"""Fully sharded data parallelism (FSDP2)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from danling_conf.components.instantiate import section_from
from danling_conf.components.precision import dtype
from danling_conf.parallel.blocks import repeated_blocks, shares_parameters
from danling_conf.parallel.mesh import axes_of, axis, weights_mesh
from danling_conf.schema.fsdp import FsdpConfig
from danling_conf.topology.violation import SettingError

_log = logging.getLogger(__name__)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def shard(
    model: nn.Module,
    section: FsdpConfig,
    mesh: DeviceMesh | None,
    *,
    precision: str | None = None,
    experts: Sequence[str] = (),
    expert_mesh: DeviceMesh | None = None,
    pipelined: bool = False,
) -> nn.Module:
    """Shard each repeated block of `model`, then the rest of it, over the shard axis of `mesh` and its context axis, if
    there is one; with a replicate axis, over both (hybrid sharding).

    In place; parameters become `DTensor`s, also those on the meta device. A block that shares a parameter with the rest
    of the model is sharded with the rest. Without `section.enabled` the model is returned unchanged.

    Args:
        precision: bf16 or fp16: dtype of the computation where `section.mp_policy` is unset. Gradients are then reduced
            in fp32, and batch normalisation computes in fp32.
        experts: names of modules whose first dim the expert axes have sharded; FSDP2 shards them over the remaining
            ranks of `expert_mesh`.
        pipelined: whether `model` is a stage of a pipeline. Its blocks stay gathered between microbatches unless
            `section.reshard_after_forward` is set.

    Raises:
        SettingError: the mesh has no shard axis, or `reshard_after_forward` does not divide it.
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
    options = _options(section, mesh, precision, pipelined=pipelined)
    _shard_experts(model, experts, expert_mesh, options)
    _shard_batch_norms(model, options)
    # Inner modules first: fully_shard takes the parameters of a module that no inner one has taken.
    for name, block in reversed(repeated_blocks(model, _classes(model, section, pipelined=pipelined))):
        if shares_parameters(model, block):
            _log.warning("fsdp: %s shares a parameter with the rest of the model and is sharded with it", name)
            continue
        # Cast between blocks, outputs would meet parts of the root (norm, head) that compute in another dtype.
        fully_shard(block, **{**options, "mp_policy": replace(options["mp_policy"], output_dtype=None)})
    fully_shard(model, **options)
    return model


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
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and module is not model and not shares_parameters(model, module):
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
    """`fsdp` as `hydra.utils.instantiate` reads it: a partial that waits for the model and `mesh=`."""
    return partial(shard, section=section_from(FsdpConfig, keywords, path="fsdp"))
