"""The parallel layout: seven degrees and the settings of the axes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, List, Optional

from danling_conf.schema.setting import setting


@dataclass(kw_only=True)
class AxesConfig:
    """Degrees of parallelism. The world size is replicate x shard x context x tensor x pipeline; the expert degrees
    borrow ranks from shard x context x tensor."""

    read_by: ClassVar[str] = "danling_conf.topology.layout"

    replicate: int = setting(1, at_least=-1)
    """Data-replication degree: ranks that hold the same weights and see different data (DDP, HSDP's outer axis)."""
    shard: int = setting(1, at_least=-1)
    """Data-sharding degree (FSDP2): ranks that share one copy of the weights. One axis may be -1: filled from the
    world size."""
    context: int = setting(1, at_least=-1)
    """Context-parallel degree: ranks that share the sequence dimension of a sample."""
    pipeline: int = setting(1, at_least=-1)
    """Pipeline-parallel degree: ranks that hold consecutive parts of the model."""
    tensor: int = setting(1, at_least=-1)
    """Tensor-parallel degree: ranks that share each weight matrix."""
    expert: int = setting(1, at_least=1)
    """Expert-parallel degree of mixture-of-experts blocks; borrows ranks from shard x context x tensor."""
    expert_tensor: int = setting(1, at_least=1)
    """Tensor-parallel degree inside each expert: 1, or the tensor degree."""


@dataclass(kw_only=True)
class ParallelConfig:
    """How a run is laid out over processes. Usually chosen by a layout's name: `parallel=fsdp8`."""

    read_by: ClassVar[str] = "danling_conf.build.mesh"

    axes: AxesConfig = field(default_factory=AxesConfig)
    pipeline_schedule: str = setting("1F1B", pending="pipeline parallelism")
    """Pipeline schedule, a name that `torch.distributed.pipelining.schedules.get_schedule_class` knows."""
    pipeline_microbatch_size: int = setting(1, at_least=1, pending="pipeline parallelism")
    """Samples in one pipeline microbatch; the number of microbatches is the local batch size divided by this."""
    pipeline_n_microbatches: Optional[int] = setting(None, at_least=1, pending="pipeline parallelism")
    """Number of pipeline microbatches. Unset: derived from the microbatch size; set, it overrides the size."""
    module_fqns_per_model_part: Optional[List[List[str]]] = setting(None, pending="pipeline parallelism")
    """Module names of each pipeline stage; the outer length is the number of stages, divisible by
    `parallel.axes.pipeline`. Unset: the model is split by layer count."""
    use_device_mesh: bool = setting(True, pending="running without a device mesh")
    """Describe the ranks by a `DeviceMesh`."""
    mesh_device_type: Optional[str] = setting(None, semantic=False, choices=("cpu", "cuda", "xpu", "mps", "hpu", "npu"))
    """Device type of the mesh and of the run. Unset: this machine's accelerator, else `cpu`."""
    allow_degree_change: bool = setting(False, semantic=False, read_by="danling_conf.resolution.run_directory")
    """Allow a checkpoint that was written under another layout to be loaded."""

    _target_: str = "danling_conf.build.mesh.from_keywords"
    _recursive_: bool = False
