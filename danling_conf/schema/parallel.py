"""The parallel layout: seven degrees and the settings of the axes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, List, Optional

from danling_conf.schema.setting import setting

MOST_RANKS = 1 << 20
"""A larger degree is a typing error: no machine has as many devices."""

SINGLE_STAGE_SCHEDULES = ("1F1B", "GPipe")
"""Schedules of one stage a rank."""

MULTI_STAGE_SCHEDULES = (
    "Interleaved1F1B",
    "InterleavedZeroBubble",
    "LoopedBFS",
    "ZBVZeroBubble",
    "DualPipeV",
)
"""Schedules of several stages a rank."""

V_SCHEDULES = ("ZBVZeroBubble", "DualPipeV")
"""Schedules whose stages run over the ranks and back in a V, exactly two a rank."""

SPLIT_BACKWARD_SCHEDULES = ("InterleavedZeroBubble", *V_SCHEDULES)
"""Schedules that compute the gradients of inputs and of weights separately."""

PIPELINE_SCHEDULES = (*SINGLE_STAGE_SCHEDULES, *MULTI_STAGE_SCHEDULES)

TENSOR_STYLES = {
    "colwise": "each rank has some output features; the input is whole",
    "colwise_gather_output": "the same, and outputs are gathered (a head's stay sharded under loss_parallel)",
    "colwise_rep": "another name of colwise_gather_output",
    "rowwise": "each rank has some input features; the input is sharded, outputs are summed",
    "rowwise_split_input": "the same for an input that is whole",
    "rowwise_rep": "another name of rowwise_split_input",
    "embedding_rowwise": "each rank has some rows of an embedding; outputs are summed",
    "embedding_colwise": "each rank has some features of an embedding; outputs are gathered",
    "replicated_with_grad_allreduce": "a whole layer on sharded heads (a norm of queries); gradients are summed",
    "sequence_parallel": "a whole layer on a part of the sequence (a norm); gradients are summed",
    "embedding_rowwise_sequence": "embedding_rowwise, its output split along the sequence",
    "rowwise_sequence": "rowwise, its output split along the sequence",
    "colwise_gather_output_sequence": "colwise_gather_output on an input split along the sequence",
    "gather_sequence": "joins the sequence for the sharded layers inside the module",
    "whole_sequence": "joins the sequence for a module that is not sharded, and splits its output again",
}
"""Styles of a tensor plan, and what each does: Hugging Face's words, and ours for sequences."""


@dataclass(kw_only=True)
class AxesConfig:
    """Degrees of parallelism. The world size is replicate x shard x context x tensor x pipeline; the expert degrees
    borrow ranks from shard x context x tensor."""

    read_by: ClassVar[str] = "danling_conf.topology.layout"

    replicate: int = setting(1, at_least=-1, at_most=MOST_RANKS)
    """Data-replication degree: ranks that hold the same weights and see different data (DDP, HSDP's outer axis)."""
    shard: int = setting(1, at_least=-1, at_most=MOST_RANKS)
    """Data-sharding degree (FSDP2): ranks that share one copy of the weights. One axis may be -1: filled from the
    world size."""
    context: int = setting(1, at_least=-1, at_most=MOST_RANKS)
    """Context-parallel degree: ranks that share the sequence dimension of a sample."""
    pipeline: int = setting(1, at_least=-1, at_most=MOST_RANKS)
    """Pipeline-parallel degree: ranks that hold consecutive parts of the model."""
    tensor: int = setting(1, at_least=-1, at_most=MOST_RANKS)
    """Tensor-parallel degree: ranks that share each weight matrix."""
    expert: int = setting(1, at_least=1)
    """Expert-parallel degree of mixture-of-experts blocks; borrows ranks from shard x context x tensor."""
    expert_tensor: int = setting(1, at_least=1)
    """Tensor-parallel degree inside each expert: 1, or the tensor degree."""


@dataclass(kw_only=True)
class ParallelConfig:
    """How a run is laid out over processes. Usually chosen by a layout's name: `parallel=fsdp8`."""

    read_by: ClassVar[str] = "danling_conf.parallel.mesh"

    axes: AxesConfig = field(default_factory=AxesConfig)
    tensor_plan: Any = setting(None, kinds=(dict,), semantic=False, read_by="danling_conf.parallel.tensor")
    """How the tensor axis shards each module: names (`layers.*.attention.wq`) to styles, in the words of Hugging Face's
    plans: `colwise` and `rowwise` (output and input features of a `Linear`), `colwise_gather_output`,
    `rowwise_split_input`, `embedding_rowwise`, `embedding_colwise`, `replicated_with_grad_allreduce` (a norm of sharded
    heads). Unset: the model's own `tp_plan`."""
    sequence_parallel: bool = setting(False, semantic=False, read_by="danling_conf.parallel.tensor")
    """Between the tensor-parallel layers, split activations along the sequence (the model's `sequence_plan`): less
    memory for activations, the same traffic."""
    loss_parallel: bool = setting(True, semantic=False, read_by="danling_conf.parallel.tensor")
    """Under tensor parallelism, compute the cross-entropy on logits that stay sharded over the vocabulary, instead of
    gathering them. The loss must be torch's cross-entropy."""
    context_method: str = setting(
        "gather", choices=("gather", "ulysses", "ring"), semantic=False, read_by="danling_conf.parallel.context"
    )
    """How ranks that share a sequence attend to all of it: `gather` collects keys and values (any number of heads),
    `ulysses` exchanges heads for positions (the degree divides the query heads), `ring` passes keys and values around
    (torch's own, experimental; needs CUDA)."""
    context_balance: bool = setting(True, semantic=False, read_by="danling_conf.parallel.context")
    """Give each context rank one early and one late chunk of the sequence, since causal attention costs more at later
    positions. Not for `ulysses`, which is balanced anyway."""
    pipeline_schedule: str = setting(
        "1F1B",
        choices=PIPELINE_SCHEDULES,
        aliases={name.lower(): name for name in PIPELINE_SCHEDULES if name != name.lower()},
        read_by="danling_conf.parallel.pipeline",
    )
    """Pipeline schedule, a name that `torch.distributed.pipelining.schedules.get_schedule_class` knows."""
    pipeline_microbatch_size: int = setting(1, at_least=1, read_by="danling_conf.parallel.pipeline")
    """Samples in one pipeline microbatch; the number of microbatches is the local batch size divided by this."""
    pipeline_n_microbatches: Optional[int] = setting(None, at_least=1, read_by="danling_conf.parallel.pipeline")
    """Number of pipeline microbatches. Unset: derived from the microbatch size; set, it overrides the size."""
    module_fqns_per_model_part: Optional[List[List[str]]] = setting(None, read_by="danling_conf.parallel.stages")
    """Module names of each pipeline stage; the outer length is the number of stages, divisible by
    `parallel.axes.pipeline`. Unset: the repeated blocks are divided evenly, two stages a rank where the schedule
    takes several."""
    unused_parameters: str = setting(
        "refuse", choices=("refuse", "allow"), read_by="danling_conf.parallel.data_gradients"
    )
    """Trainable parameters that get no gradient in a step of a run with several data ranks. `refuse`: the run ends and
    names them; FSDP takes those that no rank uses, as one process does. `allow`: they may be others in each step and on
    each rank, and stay as they are in steps where no rank uses them. That costs a search of the graph in each step, and
    FSDP gathers the whole model at once, since ranks may pass different blocks."""
    sync_batch_norm: bool = setting(False, read_by="danling_conf.parallel.batch_norm")
    """Let batch normalisation use the samples of all data ranks, as one process with the whole batch does, at the cost
    of two sums over the ranks for each module. `false`: each rank uses its own samples, which a warning says, and rank
    0's running statistics are evaluated and saved. Not in a pipeline, which passes microbatches."""
    use_device_mesh: bool = setting(True, semantic=False)
    """Describe the ranks by a `DeviceMesh`. Without one, they are the default process group: enough for DDP only."""
    mesh_device_type: Optional[str] = setting(None, semantic=False, choices=("cpu", "cuda", "xpu", "mps", "hpu", "npu"))
    """Device type of the mesh and of the run. Unset: this machine's accelerator, else `cpu`."""
    allow_degree_change: bool = setting(False, semantic=False, read_by="danling_conf.records.run_directory")
    """Allow a checkpoint that was written under another layout to be loaded."""

    _target_: str = "danling_conf.parallel.mesh.from_keywords"
    _recursive_: bool = False
