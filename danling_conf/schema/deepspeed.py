"""DeepSpeed: the keys of its own configuration, and which settings of ours say the rest.

DeepSpeed takes unknown keys at the root in silence, and clips gradients to 1.0 where nobody asked for it. So every key
is known here: it is passed on, said by a setting of ours, or refused with the reason. A test compares the tables with
the installed package.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from danling_conf.schema.setting import open_keys, setting

AUTO = "auto"
"""What Hugging Face's configurations write for a value that the trainer fills in; here it is derived too."""

ROOT_KEYS = {
    "communication_data_type": str,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
}
"""Keys at the root that are passed on as they are, with the type of each."""

ZERO_KEYS = {
    "contiguous_gradients": bool,
    "reduce_scatter": bool,
    "reduce_bucket_size": int,
    "use_multi_rank_bucket_allreduce": bool,
    "allgather_partitions": bool,
    "allgather_bucket_size": int,
    "overlap_comm": bool,
    "sub_group_size": int,
    "stage3_prefetch_bucket_size": int,
    "stage3_param_persistence_threshold": int,
    "stage3_model_persistence_threshold": int,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_module_granularity_threshold": int,
    "stage3_use_all_reduce_for_fetch_params": bool,
    "stage3_allgather_sequential": bool,
    "log_trace_cache_warnings": bool,
    "enable_sanity_checks": bool,
}
"""Keys of `zero_optimization` that are passed on as they are, with the type of each."""

_CHECKPOINTS = "checkpoints are danling-conf's own: `checkpoint`"
_PRECISION = "`precision` says it, and weights stay fp32"
_PROFILES = "`profiling` measures that"
_TRACKERS = "`tracking` chooses trackers"
_UNTRIED = "it is not tried with this stack"
_OFFLOAD = "DeepSpeed deprecates it: offload_optimizer.device=cpu, offload_param.device=cpu"

SAID_ELSEWHERE = {
    "fp16": _PRECISION,
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "data_types": _PRECISION,
    "optimizer": "`optim` chooses the optimizer, which is torch's",
    "scheduler": "`scheduler` chooses the schedule",
    "zero_allow_untested_optimizer": "`optim` chooses the optimizer; one that ZeRO would step wrongly is refused",
    "zero_force_ds_cpu_optimizer": "`optim` chooses the optimizer, which is torch's",
    "managed_gradient_accumulation": "`accum_steps` says it",
    "activation_checkpointing": "`activation_checkpointing` of the root says it",
    "compile": "`compile` of the root says it",
    "dataloader_drop_last": "`dataloader` says it",
    "steps_per_print": "`log_interval` says it",
    "disable_python_gc": "`gc` says it",
    "flops_profiler": _PROFILES,
    "wall_clock_breakdown": _PROFILES,
    "memory_breakdown": _PROFILES,
    "comms_logger": _PROFILES,
    "timers": _PROFILES,
    "tensorboard": _TRACKERS,
    "wandb": _TRACKERS,
    "csv_monitor": _TRACKERS,
    "comet": _TRACKERS,
    "checkpoint": _CHECKPOINTS,
    "nebula": _CHECKPOINTS,
    "datastates_ckpt": _CHECKPOINTS,
    "pipeline": "parallel=ppN is a pipeline, of stack=auto",
    "tensor_parallel": "parallel=tpN shards layers, under stack=auto",
    "expert_parallel": "parallel=...epN distributes experts, under stack=auto",
    "elasticity": _UNTRIED,
    "autotuning": _UNTRIED,
    "curriculum_learning": _UNTRIED,
    "data_efficiency": _UNTRIED,
    "compression_training": _UNTRIED,
    "hybrid_engine": _UNTRIED,
    "sparse_gradients": _UNTRIED,
    "weight_quantization": _UNTRIED,
    "gradient_allreduce_op": _UNTRIED,
    "disable_allgather": _UNTRIED,
    "seq_parallel_communication_data_type": _UNTRIED,
    "use_data_before_expert_parallelism": _UNTRIED,
    "keep_in_fp32_modules": _PRECISION,
    "vocabulary_size": "only its autotuning reads it",
    "dump_state": "the run's directory has the whole configuration",
    "log_level": "what DeepSpeed warns of is in the logs of the ranks",
    "aio": "there is no offload to NVMe here",
}
"""Keys at the root that DeepSpeed has and this package does not pass on: what says it instead, or why."""

ZERO_SAID_ELSEWHERE = {
    "ignore_unused_parameters": "`parallel.unused_parameters` says it",
    "load_from_fp32_weights": _CHECKPOINTS,
    "elastic_checkpoint": _CHECKPOINTS,
    "pipeline_loading_checkpoint": _CHECKPOINTS,
    "stage3_gather_16bit_weights_on_model_save": "exports gather weights themselves: `checkpoint.export_dtype`",
    "stage3_gather_fp16_weights_on_model_save": "exports gather weights themselves: `checkpoint.export_dtype`",
    "cpu_offload": _OFFLOAD,
    "cpu_offload_param": _OFFLOAD,
    "cpu_offload_use_pin_memory": _OFFLOAD,
    "compute_grad_norm": "the norm is logged, clipped and looked at for what is not finite",
    "memory_efficient_linear": "it replaces torch's linear function in the whole process, for good",
    "override_module_apply": _UNTRIED,
    "leaf_module": _UNTRIED,
    "legacy_stage1": _UNTRIED,
    "zenflow": _UNTRIED,
    "zero_hpz_partition_size": _UNTRIED,
    "zero_quantized_weights": _UNTRIED,
    "zero_quantized_nontrainable_weights": _UNTRIED,
    "zero_quantized_gradients": _UNTRIED,
    "save_muon_momentum_buffer_in_memory": "Muon needs whole matrices, which ZeRO cuts",
    "round_robin_gradients": "checkpoints do not know its order of the parameters' parts",
    "parameter_alignment": "checkpoints do not know its order of the parameters' parts",
}
"""Keys of `zero_optimization` that DeepSpeed has and this package does not pass on, likewise."""

DERIVED = {
    "train_micro_batch_size_per_gpu": "dataloader.batch_size",
    "gradient_accumulation_steps": "accum_steps",
    "gradient_clipping": "max_grad_norm",
    "train_batch_size": "dataloader.batch_size, accum_steps and the layout",
}
"""Keys that follow from settings of ours. They may be given where they say the same."""

ELEMENTWISE = ("ASGD", "Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
"""Optimizers that treat each number on its own. ZeRO hands the others parameters joined into one line and cut anywhere,
and they would compute something else; of Adagrad it makes a new one without the groups' options."""


@dataclass(kw_only=True)
class OffloadConfig:
    """What lives in host memory: `deepspeed.zero_optimization.offload_optimizer`, and likewise `offload_param`."""

    read_by: ClassVar[str] = "danling_conf.schema.deepspeed"

    device: str = setting("cpu", choices=("none", "cpu"), semantic=False)
    """`cpu`: host memory. `none`: the device. NVMe is not offered: its operators are compiled when ranks start."""
    pin_memory: bool = setting(True, semantic=False)
    """Page-lock that memory, where there is an accelerator."""


@dataclass(kw_only=True)
class ZeroConfig:
    """What ZeRO partitions over the data ranks; DeepSpeed's other keys of `zero_optimization` stand beside these."""

    read_by: ClassVar[str] = "danling_conf.schema.deepspeed"
    open_to: ClassVar[str] = "keys of DeepSpeed's zero_optimization"

    stage: int = setting(0, at_least=0, at_most=3, semantic=False)
    """0: nothing is partitioned. 1: the optimizer's states. 2: gradients too. 3: parameters too."""
    offload_optimizer: Any = setting(None, shape=OffloadConfig, semantic=False)
    """Keep the optimizer's states and its step on the host (stages 1 to 3). Unset: on the device."""
    offload_param: Any = setting(None, shape=OffloadConfig, semantic=False)
    """Keep partitioned parameters on the host (stage 3). Unset: on the device."""


@dataclass(kw_only=True)
class DeepspeedConfig:
    """DeepSpeed's own configuration, for `stack=deepspeed`. What settings of ours say (batch size, accumulation,
    clipping, precision, optimizer, schedule) is derived from them."""

    read_by: ClassVar[str] = "danling_conf.parallel.deepspeed"
    open_to: ClassVar[str] = "keys of DeepSpeed's configuration"

    zero_optimization: ZeroConfig = field(default_factory=ZeroConfig)


def passed_on(section: DeepspeedConfig) -> dict[str, Any]:
    """The part of DeepSpeed's configuration that the user gives: keys that are its own, with their values."""
    zero = section.zero_optimization
    inside: dict[str, Any] = {key: value for key, value in open_keys(zero).items() if value != AUTO}
    for name in ("offload_optimizer", "offload_param"):
        given = getattr(zero, name)
        if given is not None and given.device != "none":
            inside[name] = {"device": given.device, "pin_memory": given.pin_memory}
    outside = {key: value for key, value in open_keys(section).items() if key in ROOT_KEYS and value != AUTO}
    return {**outside, "zero_optimization": {"stage": zero.stage, **inside}}


def offloads(section: DeepspeedConfig) -> bool:
    """Whether the optimizer's states are on the host."""
    given = section.zero_optimization.offload_optimizer
    return given is not None and given.device != "none"
