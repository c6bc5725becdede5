"""Fully sharded data parallelism (FSDP2)."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from danling_conf.build.blocks import repeated_blocks
from danling_conf.build.keywords import section_from
from danling_conf.build.mesh import axes_of
from danling_conf.build.precision import dtype
from danling_conf.schema.fsdp import FsdpConfig

_log = logging.getLogger(__name__)

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def shard(model: nn.Module, section: FsdpConfig, mesh: DeviceMesh | None, *, precision: str | None = None) -> nn.Module:
    """Shard each repeated block of `model`, then the rest of it, over the shard axis of `mesh`; with a replicate axis,
    over both (hybrid sharding). In place; parameters become `DTensor`s, also those on the meta device.

    `precision` (bf16, fp16) is the dtype of the computation where `section.mp_policy` says nothing; gradients are then
    reduced in fp32. Batch normalisation computes in fp32 all the same. A block that shares a parameter with the rest of
    the model is sharded with the rest.

    Raises ValueError where the mesh has no shard axis, and for a `reshard_after_forward` that does not divide it.
    """
    if not section.enabled:
        return model
    if mesh is None or "shard" not in axes_of(mesh):
        raise ValueError(
            f"fsdp.enabled=true: the mesh has no shard axis (its axes: {', '.join(axes_of(mesh)) or 'none'}); choose a "
            f"layout with FSDP, such as parallel=fsdp, and start the process group before the mesh is made"
        )
    options: dict[str, Any] = {
        "mesh": mesh["replicate", "shard"] if "replicate" in axes_of(mesh) else mesh["shard"],
        "mp_policy": mixed_precision_policy(section, precision),
        "offload_policy": offload_policy(section),
    }
    if section.reshard_after_forward is not None:
        degree = mesh["shard"].size()
        size = section.reshard_after_forward
        if not isinstance(size, bool) and (size < 1 or degree % size):
            raise ValueError(
                f"fsdp.reshard_after_forward={size}: must divide the shard degree {degree}, or be a boolean"
            )
        options["reshard_after_forward"] = size
    _shard_batch_norms(model, options)
    # Inner modules first: a module that is wrapped takes the parameters that are not taken yet.
    for name, block in reversed(repeated_blocks(model, section.module_classes)):
        if _shares_parameters(model, block):
            _log.warning("fsdp: %s shares a parameter with the rest of the model and is sharded with it", name)
            continue
        # Cast between blocks, outputs would meet parts of the root (norm, head) that compute in another dtype.
        fully_shard(block, **{**options, "mp_policy": replace(options["mp_policy"], output_dtype=None)})
    fully_shard(model, **options)
    return model


def _shard_batch_norms(model: nn.Module, options: dict[str, Any]) -> None:
    """Under mixed precision, let batch normalisation compute in fp32: its running statistics are no parameters, stay in
    fp32, and do not mix with parameters of another dtype."""
    policy = options["mp_policy"]
    if policy.param_dtype in (None, torch.float32):
        return
    own = MixedPrecisionPolicy(torch.float32, policy.reduce_dtype or policy.param_dtype, policy.param_dtype)
    for module in model.modules():
        if isinstance(module, _BATCH_NORMS) and module is not model and not _shares_parameters(model, module):
            fully_shard(module, **{**options, "mp_policy": own})


def mixed_precision_policy(section: FsdpConfig, precision: str | None) -> MixedPrecisionPolicy:
    """`section.mp_policy` as torch's policy; unset, the one that `precision` asks for."""
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


def _shares_parameters(model: nn.Module, block: nn.Module) -> bool:
    # FSDP2 refuses a parameter that two of its groups would hold.
    inside = Counter(id(parameter) for _, parameter in block.named_parameters(remove_duplicate=False))
    everywhere = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return any(everywhere[parameter] != count for parameter, count in inside.items())
