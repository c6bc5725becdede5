"""Fully sharded data parallelism (FSDP2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, List, Optional, Union

from danling_conf.schema.setting import setting

DTYPES = ("fp32", "bf16", "fp16", "fp64")
DTYPE_ALIASES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float64": "fp64",
    "32": "fp32",
}


@dataclass(kw_only=True)
class MixedPrecisionPolicyConfig:
    """`fsdp.mp_policy`: the arguments of `torch.distributed.fsdp.MixedPrecisionPolicy`."""

    read_by: ClassVar[str] = "danling_conf.parallel.fsdp"

    param_dtype: Optional[str] = setting(None, choices=DTYPES, aliases=DTYPE_ALIASES)
    """dtype of the gathered parameters, and so of the computation. Unset: the parameters' own."""
    reduce_dtype: Optional[str] = setting(None, choices=DTYPES, aliases=DTYPE_ALIASES)
    """dtype in which gradients are reduced. Unset: `param_dtype`."""
    output_dtype: Optional[str] = setting(None, choices=DTYPES, aliases=DTYPE_ALIASES)
    """dtype to which the model's outputs are cast. Unset: left as they are."""
    cast_forward_inputs: bool = True
    """Cast the floating-point inputs of each wrapped block to `param_dtype`. False: the model's own code has to."""


@dataclass(kw_only=True)
class OffloadPolicyConfig:
    """`fsdp.offload_policy`: the arguments of `torch.distributed.fsdp.CPUOffloadPolicy`."""

    read_by: ClassVar[str] = "danling_conf.parallel.fsdp"

    enabled: bool = setting(True, semantic=False)
    """Keep parameters, gradients and optimizer states in host memory; blocks are copied to the device when needed."""
    pin_memory: Optional[bool] = setting(None, semantic=False)
    """Page-lock that memory, so that copies overlap with computation. Unset: yes where an accelerator is present."""


@dataclass(kw_only=True)
class FsdpConfig:
    """FSDP2 wrapping of each repeated block, then of the root. A layout's name switches it on."""

    read_by: ClassVar[str] = "danling_conf.parallel.fsdp"

    enabled: bool = False
    """Shard parameters, gradients and optimizer states over the shard axis (set by the layout, `parallel=fsdp8`)."""
    reshard_after_forward: Optional[Union[bool, int]] = setting(None, semantic=False)
    """Free the gathered parameters after a block's forward: true saves memory, false saves the second all-gather, an
    integer reshards to a smaller group of that many ranks (a divisor of the shard degree). Unset: torch's own choice,
    true for blocks and false for the root."""
    mp_policy: Any = setting(None, shape=MixedPrecisionPolicyConfig)
    """Mixed-precision policy: `fsdp.mp_policy.param_dtype=bf16`. Unset: follows `precision`."""
    offload_policy: Any = setting(None, shape=OffloadPolicyConfig, semantic=False)
    """CPU-offload policy: `fsdp.offload_policy.enabled=true`. Unset: nothing is offloaded."""
    module_classes: Optional[List[str]] = setting(None, semantic=False)
    """Class names of the modules to wrap. Unset: the model's repeated blocks are found."""

    _target_: str = "danling_conf.parallel.fsdp.from_keywords"
    _recursive_: bool = False
